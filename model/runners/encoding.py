"""Encoding runners: whole inputs in, one vector per input out, without a KV cache.

`encode` computes all tokens of its inputs in one step and stores nothing. A row of its answer is a
function of its own input alone: it has the same bits in any batch and order, and on any runner of
the same numeric class. The vector is the pooled state of the input's tokens or, if the model has a
classification head, the head's logits; how these become scores is in `EncoderInfo`.

    if is_encoder(path):
        runner, tokenizer = load_encoder(path, threads=2)
        (vector,) = runner.encode([tokenizer.encode("a text")])

Encoders (BERT and its kin) embed, and decoders with the files of sentence-transformers or, in GGUF,
with a pooling. One call at a time: a runner is not thread-safe. Importing this module does not
import torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from model.batch import Floats
from model.checkpoint import find_gguf, open_checkpoint, open_model
from model.checkpoint.gguf_encoder import embeds
from model.checkpoint.gguf_parts import read_headers
from model.checkpoint.sentence_transformers import MODULES, SentenceSettings, read_settings
from model.config import Classifier, ModelConfig, Pooling, Problem
from model.families import ENCODERS
from model.text.encoder_tokenizer import EncoderTokenizer, Encoding

__all__ = [
    "EncoderInfo", "EncoderTokenizer", "Encoding", "EncodingRunner", "is_encoder", "load_encoder",
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderInfo:
    """What a model computes from an input."""

    width: int  # numbers per input: of the embedding, or labels
    max_tokens: int  # of an input, special tokens included
    vocab_size: int  # ids are below it
    num_types: int  # token types are below it; a model without types has 1
    pooling: Pooling
    normalised: bool  # embeddings have length 1
    similarity: str  # of two embeddings: cosine, dot, euclidean or manhattan
    prompts: Mapping[str, str] = field(default_factory=dict)  # name -> text to put before an input
    default_prompt: str | None = None  # the name of the one to use if a request names none
    labels: tuple[str, ...] = ()  # of a classification head; empty: the model embeds
    problem: Problem | None = None  # None: the model embeds
    sigmoid: bool = False  # a single logit becomes a score by 1 / (1 + exp(-x)); False: as it is

    @property
    def has_head(self) -> bool:
        """Whether `encode` returns logits of a classification head."""
        return bool(self.labels)

    @property
    def scores_pairs(self) -> bool:
        """Whether the model is a cross-encoder: one score for two texts."""
        return len(self.labels) == 1


class EncodingRunner(Protocol):
    """Computes the vectors of whole inputs."""

    info: EncoderInfo
    numeric_class: str  # vectors of runners of one class are equal bit by bit

    @property
    def fingerprint(self) -> str:
        """Names what the vectors depend on; the numeric class."""
        ...

    def encode(self, batch: Sequence[Encoding]) -> list[Floats]:
        """One vector per input, [width] each. Raises ValueError for an input that does not fit:
        no tokens, more than `max_tokens`, an id or a type that the model does not have.
        """
        ...

    def warm_up(self) -> None:
        """Touches what the first call would otherwise wait for."""
        ...

    def close(self) -> None:
        """Frees memory and threads; the runner must not be called again."""
        ...


def is_encoder(path: Path) -> bool:
    """Whether a file or folder is a model that embeds or classifies. Reads its configuration alone.

    Raises CheckpointError.
    """
    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    named = config.get("architectures")
    classifies = isinstance(named, list) and any("ForSequenceClass" in str(each) for each in named)
    if classifies or config.get("model_type") in ENCODERS:
        return True
    gguf = find_gguf(path)
    if gguf is not None:
        return embeds(read_headers(gguf))
    return ((path if path.is_dir() else path.parent) / MODULES).exists()


def load_encoder(
    path: Path,
    *,
    runner: str = "auto",
    dtype: str = "auto",
    device: str = "auto",
    threads: int | None = None,
) -> tuple[EncodingRunner, EncoderTokenizer]:
    """Loads an encoder and its tokenizer.

    runner: auto, native or torch. dtype: auto, float32, int8 (native) or bfloat16 (torch). The
    native runner is chosen if the device is the CPU, the dtype one of its own, and the library can
    be built. threads: None: as many as the machine has. Raises CheckpointError, and ValueError for
    options that are not available.
    """
    opened = open_model(path, headless=True)
    info = describe(opened.config, read_settings(path))
    tokenizer = EncoderTokenizer.from_path(path, max_tokens=info.max_tokens)
    digest = hashlib.sha256(
        f"{opened.digest} {info.pooling} {info.normalised}".encode()
    ).hexdigest()
    if _is_native(runner, dtype, device, opened.config):
        from model.runners.native_encoding import NativeEncoder

        native = NativeEncoder(
            opened.config, opened.weights, info=info, eight_bit=dtype == "int8", threads=threads,
            digest=digest,
        )  # fmt: skip
        return native, tokenizer
    from model.runners.torch_encoding import TorchEncoder
    from model.weights import to_tensor

    weights = {name: to_tensor(opened.weights[name]) for name in opened.weights}
    plain = TorchEncoder(
        opened.config, weights, info=info, dtype=dtype, device=device, threads=threads,
        digest=digest,
    )  # fmt: skip
    return plain, tokenizer


def _is_native(runner: str, dtype: str, device: str, config: ModelConfig) -> bool:
    """Whether the native runner serves; raises ValueError if it was named and cannot."""
    if runner not in ("auto", "native", "torch"):
        raise ValueError("runner must be auto, native or torch")
    from model.native import NativeUnavailable
    from model.native.library import NativeLibrary
    from model.runners.choose import device_type
    from model.runners.native_encoding import unsupported

    reason: str | None = None
    if device_type(device) != "cpu":
        reason = "the native encoder computes on a CPU"
    elif dtype not in ("auto", "float32", "int8"):
        reason = "dtype must be auto, float32 or int8 for the native encoder"
    else:
        reason = unsupported(config, eight_bit=dtype == "int8")
    if reason is None and runner != "torch":
        try:
            NativeLibrary()
        except NativeUnavailable as unavailable:
            reason = str(unavailable)
    if reason is not None and (runner == "native" or dtype == "int8"):
        raise ValueError(reason)
    return reason is None and runner != "torch"


def describe(config: ModelConfig, settings: SentenceSettings) -> EncoderInfo:
    """What a network computes with these settings; the library's defaults if they are silent."""
    head = config.classifier
    longest = min(config.max_model_len, settings.max_tokens or config.max_model_len)
    pooling = settings.pooling or (Pooling.MEAN if config.bidirectional else Pooling.LAST)
    info = EncoderInfo(
        width=config.hidden_size,
        max_tokens=longest,
        vocab_size=config.vocab_size,
        num_types=max(1, config.num_types),
        pooling=pooling,
        normalised=bool(settings.normalised),
        similarity=settings.similarity or "cosine",
        prompts=settings.prompts,
        default_prompt=settings.default_prompt,
    )
    return info if head is None else _with_head(info, head)


def _with_head(info: EncoderInfo, head: Classifier) -> EncoderInfo:
    return replace(
        info,
        width=len(head.labels),
        pooling=head.pooling,
        normalised=False,
        labels=head.labels,
        problem=head.problem,
        sigmoid=len(head.labels) == 1 and head.sigmoid,
    )


def check_fits(encoding: Encoding, info: EncoderInfo) -> None:
    """Raises ValueError for an input that the model cannot compute."""
    if not 1 <= len(encoding.ids) <= info.max_tokens:
        raise ValueError(f"an input must have from 1 to {info.max_tokens} tokens")
    if not 0 <= min(encoding.ids) <= max(encoding.ids) < info.vocab_size:
        raise ValueError(f"token ids must be from 0 to {info.vocab_size - 1}")
    types = encoding.types
    if types is not None and (
        len(types) != len(encoding.ids) or not 0 <= min(types) <= max(types) < info.num_types
    ):
        raise ValueError(f"token types must be from 0 to {info.num_types - 1}, one per token")


def step_parts(batch: Sequence[Encoding], *, most: int) -> Iterator[Sequence[Encoding]]:
    """The batch in steps of at most so many tokens, or one input each."""
    start = tokens = 0
    for index, encoding in enumerate(batch):
        if tokens and tokens + len(encoding.ids) > most:
            yield batch[start:index]
            start, tokens = index, 0
        tokens += len(encoding.ids)
    if batch:
        yield batch[start:]
