"""TorchEncoder: encodings by the network in plain torch, on any device. The reference of others.

Torch's kernels choose the order of their sums by the shape of a product, so each input is computed
alone: its bits cannot depend on the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from model.batch import Floats
from model.config import ModelConfig, Pooling
from model.runners.encoding import EncoderInfo, Encoding, check_fits
from model.runners.torch import build_network, choose_device, choose_dtype
from model.weights import Weights


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
    ) -> None:
        place = choose_device(device)
        kind = choose_dtype(dtype, place)
        if threads is not None:
            torch.set_num_threads(threads)
        self.info = info
        self._device = place
        self._network = build_network(config, weights, dtype=kind, device=place)
        # Torch divides the rows of a product among its threads, and picks kernels by the CPU.
        machine = f"{torch.backends.cpu.get_cpu_capability()}-{torch.get_num_threads()}"
        machine = machine if place.type == "cpu" else torch.cuda.get_device_name(place)
        name = str(kind).removeprefix("torch.")
        self.numeric_class = (
            f"encode-torch-{place.type}-{name}-{torch.__version__}-{machine.replace(' ', '_')}"
            f"-{digest[:12]}"
        )

    @property
    def fingerprint(self) -> str:
        return self.numeric_class

    def encode(self, batch: Sequence[Encoding]) -> list[Floats]:
        for encoding in batch:
            check_fits(encoding, self.info)
        with torch.inference_mode():
            return [self._vector(encoding).float().cpu().numpy() for encoding in batch]

    def warm_up(self) -> None:
        for length in {1, min(128, self.info.max_tokens)}:
            self.encode([Encoding((0,) * length)])

    def close(self) -> None:
        del self._network

    def _vector(self, encoding: Encoding) -> torch.Tensor:
        tokens_T = torch.tensor(encoding.ids, device=self._device)
        types = encoding.types if self._network.types is not None else None
        types_T = None if types is None else torch.tensor(types, device=self._device)
        states_TC = self._network.states(tokens_T, types_T)
        pooled_C = pool(states_TC, self.info.pooling)
        if self._network.classifier is not None:
            logits: torch.Tensor = self._network.classifier(pooled_C[None])[0]
            return logits
        return functional.normalize(pooled_C.float(), dim=0) if self.info.normalised else pooled_C


def pool(states_TC: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """One vector of the states of an input, [C]."""
    if pooling is Pooling.MEAN:
        return states_TC.float().mean(dim=0).to(states_TC.dtype)
    return states_TC[0 if pooling is Pooling.CLS else -1]
