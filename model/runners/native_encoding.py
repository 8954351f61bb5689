"""NativeEncoder: encodings in one call of the C++ library, on a CPU, in float32 or 8 bits.

The inputs of a call are packed one behind the other without padding. Bits do not depend on the
batch, its order, the threads or the instruction set: see native/src/encoder_kernels.h. In 8 bits
are the MLPs' products, of inputs spread by a Hadamard transform. Attention stays in float32: with
its projections in 8 bits, too, some vectors of MiniLM have a cosine below 0.999 to the plain ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt

from model.batch import Floats
from model.config import Activation, ModelConfig, Norm, Pooling, Position
from model.limits import usable_cores
from model.native.encoder import EncoderShape, Matrix, NativeEncoderModel, Table, Vector
from model.native.library import NO_WINDOW, NativeLibrary
from model.native.quantize import rotary_tables
from model.runners.encoding import EncoderInfo, Encoding, check_fits, step_parts
from model.weights import Array, Arrays, float_copy

KERNEL_VERSION = 1  # raised whenever the bits of a result change, which a test enforces
MAX_THREADS = 16  # more of them wait for one another longer than they compute
STEP_TOKENS = 1024  # computed together: more of them leave the caches
_ACTIVATIONS = {
    Activation.SILU: 1,
    Activation.GELU: 2,
    Activation.GELU_TANH: 3,
    Activation.TANH: 4,
    Activation.RELU: 5,
}
_POOLINGS = {Pooling.MEAN: 0, Pooling.CLS: 1, Pooling.LAST: 2}


class NativeEncoder:
    """Owns the packed weights and the threads. `variant` forces an instruction set.

    Raises ValueError for an unsupported model, NativeUnavailable if the library cannot be built.
    """

    def __init__(
        self, config: ModelConfig, weights: Arrays, *, info: EncoderInfo, digest: str,
        eight_bit: bool = False, threads: int | None = None, variant: str = "",
        library: NativeLibrary | None = None,
    ) -> None:  # fmt: skip
        reason = unsupported(config, eight_bit=eight_bit)
        if reason:
            raise ValueError(reason)
        self.info = info
        kind = "int8" if eight_bit else "float32"
        self.numeric_class = f"encode-native-{kind}-v{KERNEL_VERSION}-{digest[:12]}"
        threads = min(threads or usable_cores(), MAX_THREADS)
        shape = _shape(config, info, eight_bit=eight_bit, threads=threads)
        self._model = NativeEncoderModel(library or NativeLibrary(), shape, variant=variant)
        _load(self._model, config, weights)

    @property
    def fingerprint(self) -> str:
        return self.numeric_class

    @property
    def variant(self) -> str:
        """The instruction set in use."""
        return self._model.variant

    def encode(self, batch: Sequence[Encoding]) -> list[Floats]:
        for encoding in batch:
            check_fits(encoding, self.info)
        return [
            vector for part in step_parts(batch, most=STEP_TOKENS) for vector in self._step(part)
        ]

    def warm_up(self) -> None:
        self.encode([Encoding((0,) * min(128, self.info.max_tokens))])

    def close(self) -> None:
        self._model.close()

    def _step(self, batch: Sequence[Encoding]) -> Floats:
        lengths = [len(encoding.ids) for encoding in batch]
        types = [encoding.types or (0,) * len(encoding.ids) for encoding in batch]
        return self._model.encode(
            tokens_T=_joined([encoding.ids for encoding in batch]),
            types_T=_joined(types),
            starts_S1=np.cumsum([0, *lengths], dtype=np.int32),
        )


def unsupported(config: ModelConfig, *, eight_bit: bool = False) -> str | None:
    """Why the kernels cannot compute a network, or None if they can."""
    step = 64 if eight_bit else 16
    sizes = {"hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size}
    odd = [name for name, size in sizes.items() if size % step]
    if odd:
        return f"the native encoder needs a {odd[0]} that is a multiple of {step}"
    if config.qk_norm and config.head_dim % 16:
        return "the native encoder needs a head_dim that is a multiple of 16"
    if config.classifier is not None and config.classifier.activation not in _ACTIVATIONS:
        return f"the native encoder does not support {config.classifier.activation}"
    return None


def _joined(rows: Sequence[Sequence[int]]) -> npt.NDArray[np.int32]:
    return np.fromiter((value for row in rows for value in row), np.int32)


def _shape(
    config: ModelConfig, info: EncoderInfo, *, eight_bit: bool, threads: int
) -> EncoderShape:
    head = config.classifier
    return EncoderShape(
        hidden=config.hidden_size,
        width=config.intermediate_size,
        layers=config.num_layers,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        dim=config.head_dim,
        activation=_ACTIVATIONS[config.activation],
        gated=config.gated_mlp,
        causal=not config.bidirectional,
        post_norm=config.post_norm,
        rms=config.norm is Norm.RMS,
        rotary=config.position is Position.ROTARY,
        has_types=config.num_types > 0,
        position_offset=config.position_offset,
        pooling=_POOLINGS[info.pooling],
        normalised=info.normalised,
        labels=len(head.labels) if head else 0,
        head_dense=head is not None and head.dense,
        head_activation=_ACTIVATIONS[head.activation] if head else 0,
        eight_bit=eight_bit,
        threads=threads,
        norm_eps=config.norm_eps,
        windows=[config.window(layer) or NO_WINDOW for layer in range(config.num_layers)],
    )


def _load(model: NativeEncoderModel, config: ModelConfig, weights: Arrays) -> None:
    def load(put: Callable[..., None], kind: Vector | Matrix, name: str, layer: int = 0) -> None:
        if f"{name}.weight" in weights:
            bias = weights.get(f"{name}.bias")
            weight = float_copy(weights[f"{name}.weight"])
            put(kind, weight, None if bias is None else float_copy(bias), layer=layer)

    vector, matrix = partial(load, model.load_vector), partial(load, model.load_matrix)
    for table, name in (
        (Table.EMBED, "embed"),
        (Table.POSITION, "position"),
        (Table.TYPE, "types"),
    ):
        if f"{name}.weight" in weights:
            model.load_table(table, _as_floats(weights[f"{name}.weight"]))
    if config.position is Position.ROTARY:
        _load_rotary(model, config)
    for kind, name in ((Vector.EMBED, "embed_norm"), (Vector.FINAL, "norm")):
        vector(kind, name)
    vector(Vector.HEAD, "classifier.norm")
    matrix(Matrix.HEAD_DENSE, "classifier.dense")
    matrix(Matrix.HEAD_OUT, "classifier.out")
    up = "gate_up" if config.gated_mlp else "up"
    for layer in range(config.num_layers):
        block = f"blocks.{layer}"
        vector(Vector.ATTENTION, f"{block}.attention_norm", layer)
        vector(Vector.MLP, f"{block}.mlp_norm", layer)
        vector(Vector.QUERY, f"{block}.attention.q_norm", layer)
        vector(Vector.KEY, f"{block}.attention.k_norm", layer)
        matrix(Matrix.QKV, f"{block}.attention.qkv", layer)
        matrix(Matrix.OUT, f"{block}.attention.out", layer)
        matrix(Matrix.UP, f"{block}.mlp.{up}", layer)
        matrix(Matrix.DOWN, f"{block}.mlp.down", layer)


def _load_rotary(model: NativeEncoderModel, config: ModelConfig) -> None:
    tables = local = rotary_tables(config, config.max_model_len)
    if config.window_rope_theta is not None:
        turned = replace(config, rope_theta=config.window_rope_theta)
        local = rotary_tables(turned, config.max_model_len)
    kinds = (Table.COS, Table.SIN, Table.LOCAL_COS, Table.LOCAL_SIN)
    for kind, rows in zip(kinds, (*tables, *local), strict=True):
        model.load_table(kind, rows)


def _as_floats(array: Array) -> Floats:
    """The file's own memory if it is float32 there: a large vocabulary is not copied."""
    plain = array.dtype == np.float32 and array.flags.c_contiguous
    return array if plain else float_copy(array)
