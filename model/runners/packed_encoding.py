"""States of many inputs in one pass: a bidirectional network on the Triton kernels.

Inputs stand one behind the other without padding. Products and attention sum in an order that the
batch does not change (`model.kernels`); all else works on each row alone. So a state has the same
bits in any batch, which torch's own products do not give. Attention reads a step's K and V as a
pool of blocks of one token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from model.config import ModelConfig, Norm
from model.kernels.attention import Partials, attention_programs, paged_attention
from model.kernels.matmul import multiply
from model.kernels.work_list import WorkList
from model.text.encoder_tokenizer import Encoding
from model.transformer import Transformer

_STRIDE = 16  # columns of the block table are a multiple of it: one compiled variant for all steps


def is_supported(config: ModelConfig) -> bool:
    """Whether a row's bits are its own: torch's sum of an RMSNorm depends on the number of rows."""
    few = config.num_heads // config.num_kv_heads <= 64
    return config.bidirectional and config.norm is Norm.LAYER and few


class PackedStates:
    """Computes states by a network, whose linear layers it replaces."""

    def __init__(self, network: Transformer) -> None:
        _replace_linears(network.blocks)
        self._network = network

    def states(self, batch: Sequence[Encoding]) -> list[torch.Tensor]:
        """The normalised states of each input, [T, C]."""
        # CUDA's current device, on which Triton launches, is the first one in every thread.
        with torch.cuda.device_of(self._network.embed.weight):
            return self._states(batch)

    def _states(self, batch: Sequence[Encoding]) -> list[torch.Tensor]:
        network = self._network
        device = network.embed.weight.device
        lengths = [len(encoding.ids) for encoding in batch]
        tokens_T = torch.tensor([id_ for each in batch for id_ in each.ids], device=device)
        positions_T = torch.cat([torch.arange(length) for length in lengths]).to(device)
        types_T = None
        if network.types is not None:
            types = [kind for each in batch for kind in each.types or (0,) * len(each.ids)]
            types_T = torch.tensor(types, device=device)
        attend = _PackedAttention(lengths, device)
        x_TC = network.hidden(tokens_T, positions_T, types_T, attend=attend)
        states_TC: torch.Tensor = network.norm(x_TC)
        return [*torch.split(states_TC, lengths)]


class _PackedAttention:
    """Bidirectional attention within each input of a step; lists its items once per window."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self._lengths_S = torch.tensor(lengths, dtype=torch.int32, device=device)
        ends_S = self._lengths_S.cumsum(0, dtype=torch.int32)
        self._starts_S1 = torch.cat((ends_S.new_zeros(1), ends_S))
        columns = -(-max(lengths) // _STRIDE) * _STRIDE
        offsets = torch.arange(columns, dtype=torch.int32, device=device)
        self._table_SB = self._starts_S1[:-1, None] + offsets  # those past an input are not read
        self._batch_slots_S = torch.arange(len(lengths), dtype=torch.int32, device=device)
        self._programs = attention_programs(device)
        self._prepared: dict[int | None, tuple[WorkList, Partials]] = {}

    def __call__(
        self,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        *,
        layer: int,  # noqa: ARG002 - without a cache, layers need no telling apart
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        if window not in self._prepared:
            self._prepared[window] = self._list(q_THD, k_TKD, window)
        work, partials = self._prepared[window]
        return paged_attention(
            q_THD.contiguous(),
            k_TKD.contiguous(),
            v_TKD.contiguous(),
            self._table_SB,
            work=work,
            partials=partials,
            block_size=1,
            scale=scale,
            window=window,
            programs=self._programs,
            causal=False,
        )

    def _list(
        self, q_THD: torch.Tensor, k_TKD: torch.Tensor, window: int | None
    ) -> tuple[WorkList, Partials]:
        rows, num_heads, head_dim = q_THD.shape
        work = WorkList(
            max_rows=rows,
            max_sequences=len(self._lengths_S),
            max_context=self._table_SB.shape[1],
            group=num_heads // k_TKD.shape[1],
            device=q_THD.device,
            most_parts=0,
        )
        work.fill(
            self._starts_S1, self._lengths_S, self._batch_slots_S, window=window, causal=False
        )
        return work, Partials(work, num_heads=num_heads, head_dim=head_dim, device=q_THD.device)


class _RowLinear(nn.Module):
    """A linear layer, each row of which has the same bits in any batch."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x_TC: torch.Tensor) -> torch.Tensor:
        return multiply(x_TC, self.weight, self.bias).sum_parts(x_TC.dtype)


def _replace_linears(module: nn.Module) -> None:
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            setattr(module, name, _RowLinear(child))
        else:
            _replace_linears(child)
