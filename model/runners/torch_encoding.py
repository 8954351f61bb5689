"""TorchEncoder: encodings by the network in plain torch, on any device. The reference of others.

Torch's kernels choose the order of their sums by the shape of a product, so each input is computed
alone: its bits cannot depend on the batch. On a GPU the inputs of a step are computed together by
the Triton kernels (`model.runners.packed_encoding`) if these support network and chip, and if a
check at startup finds the bits of inputs alone and in a batch equal.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from model.batch import Floats
from model.config import ModelConfig, Pooling
from model.runners.encoding import EncoderInfo, Encoding, check_fits, step_parts
from model.runners.torch import build_network, choose_device, choose_dtype
from model.weights import Weights

if TYPE_CHECKING:
    from model.runners.packed_encoding import PackedStates

log = logging.getLogger(__name__)

STEP_TOKENS = 8192  # computed together by the kernels
WARM_TOKENS = 2048  # of the steps whose variants are compiled before the first call
CHECKED = (5, 1, 70, 16, 17, 3, 140)  # tokens of the inputs of the check; its rows fill tiles


class TorchEncoder:
    """Owns the network. Raises ValueError for unsupported options."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        *,
        info: EncoderInfo,
        digest: str,
        dtype: str = "auto",
        device: str = "auto",
        threads: int | None = None,
        packed: bool | None = None,
    ) -> None:
        """`packed`: by the Triton kernels; None: on a GPU, if they can."""
        place = choose_device(device)
        kind = choose_dtype(dtype, place)
        if threads is not None:
            torch.set_num_threads(threads)
        self.info = info
        self._device = place
        self._network = build_network(config, weights, dtype=kind, device=place)
        self._packed: PackedStates | None = None
        if _can_pack(config, place) if packed is None else packed:
            self._packed = self._checked()
        # Torch divides the rows of a product among its threads, and picks kernels by the CPU.
        machine = f"{torch.backends.cpu.get_cpu_capability()}-{torch.get_num_threads()}"
        machine = machine if place.type == "cpu" else torch.cuda.get_device_name(place)
        name = str(kind).removeprefix("torch.")
        engine = "torch" if self._packed is None else "triton"
        self.numeric_class = (
            f"encode-{engine}-{place.type}-{name}-{torch.__version__}-{machine.replace(' ', '_')}"
            f"-{digest[:12]}"
        )

    @property
    def fingerprint(self) -> str:
        return self.numeric_class

    def encode(self, batch: Sequence[Encoding]) -> list[Floats]:
        for encoding in batch:
            check_fits(encoding, self.info)
        return [vector.numpy() for vector in self._encode(batch)]

    def warm_up(self) -> None:
        if self._packed is None:
            for length in {1, min(128, self.info.max_tokens)}:
                self.encode([Encoding((0,) * length)])
            return
        from model.kernels.tiling import layout_sizes
        from model.runners.cuda.chip import resource_errors

        for tokens in layout_sizes(WARM_TOKENS):
            full, rest = divmod(tokens, self.info.max_tokens)
            lengths = [self.info.max_tokens] * full + [rest] * (rest > 0)
            with resource_errors():
                self.encode([Encoding((0,) * length) for length in lengths])

    def close(self) -> None:
        del self._network

    def _encode(self, batch: Sequence[Encoding]) -> list[torch.Tensor]:
        with torch.inference_mode():
            if self._packed is None:
                states = [self._states(encoding) for encoding in batch]
            else:
                steps = step_parts(batch, most=STEP_TOKENS)
                states = [each for step in steps for each in self._packed.states(step)]
            vectors = [self._vector(states_TC).float() for states_TC in states]
            return list(torch.stack(vectors).cpu()) if vectors else []

    def _checked(self) -> PackedStates | None:
        """The packed network, or None if an input's bits depend on the batch on this device.
        Raises ValueError if the device has too little memory.
        """
        from model.runners.cuda.chip import resource_errors
        from model.runners.packed_encoding import PackedStates

        packed = PackedStates(self._network)
        vocab, longest = self.info.vocab_size, self.info.max_tokens
        batch = [
            Encoding(tuple((length * 31 + 7 * n) % vocab for n in range(min(length, longest))))
            for length in CHECKED
        ]
        with torch.inference_mode(), resource_errors():
            alone = [packed.states([encoding])[0] for encoding in batch]
            equal = all(map(torch.equal, alone, packed.states(batch)))
        if not equal:
            log.warning("the Triton kernels are not exact here: inputs are computed one by one")
        return packed if equal else None

    def _states(self, encoding: Encoding) -> torch.Tensor:
        tokens_T = torch.tensor(encoding.ids, device=self._device)
        types = encoding.types if self._network.types is not None else None
        types_T = None if types is None else torch.tensor(types, device=self._device)
        return self._network.states(tokens_T, types_T)

    def _vector(self, states_TC: torch.Tensor) -> torch.Tensor:
        pooled_C = pool(states_TC, self.info.pooling)
        if self._network.classifier is not None:
            logits: torch.Tensor = self._network.classifier(pooled_C[None])[0]
            return logits
        return functional.normalize(pooled_C.float(), dim=0) if self.info.normalised else pooled_C


def _can_pack(config: ModelConfig, device: torch.device) -> bool:
    """Whether the Triton kernels are there and can compute a network on a device."""
    if device.type != "cuda":
        return False
    try:
        from model.runners.cuda.chip import unsupported_chip
        from model.runners.packed_encoding import is_supported
    except ImportError:
        return False
    return is_supported(config) and unsupported_chip(device) is None


def pool(states_TC: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """One vector of the states of an input, [C]."""
    if pooling is Pooling.MEAN:
        return states_TC.float().mean(dim=0).to(states_TC.dtype)
    return states_TC[0 if pooling is Pooling.CLS else -1]
