"""The parts that a block is made of: norms, rotary positions, and linear layers packed for oneDNN.

What flows through them and in which order stands in `model.transformer`. Legend: `model.batch`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.nn import functional

from model.config import Activation, ModelConfig, Norm
from model.rope import scaled

Rotation = tuple[torch.Tensor, torch.Tensor]
"""Cosine and signed sine of each position's angles, [T, 1, D] in float32: for all heads at once."""


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight: keeps a vector's direction and fixes its length."""

    def __init__(self, size: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x_TC: torch.Tensor) -> torch.Tensor:
        weight = self.weight.to(x_TC.dtype)  # differs under autocast only, while training
        return functional.rms_norm(x_TC, weight.shape, weight, self.eps)


def embedding(rows: int, columns: int) -> nn.Embedding:
    """One row per id. On the meta device nothing is drawn: torch would import its compiler for it,
    which takes over a second.
    """
    weight = torch.empty(rows, columns)
    return nn.Embedding(rows, columns, _weight=weight if weight.is_meta else None)


def norm_layer(config: ModelConfig) -> nn.Module:
    """The norm before a sublayer, of the kind the model was trained with."""
    if config.norm is Norm.RMS:
        return RMSNorm(config.hidden_size, eps=config.norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)


def activate(x_TF: torch.Tensor, kind: Activation) -> torch.Tensor:
    """The nonlinearity of an MLP or a classifier."""
    if kind is Activation.GELU_TANH:
        return functional.gelu(x_TF, approximate="tanh")
    functions: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
        Activation.SILU: functional.silu,
        Activation.GELU: functional.gelu,
        Activation.TANH: torch.tanh,
        Activation.RELU: torch.relu,
    }
    return functions[kind](x_TF)


def inverse_frequencies(
    config: ModelConfig, device: torch.device, *, theta: float | None = None
) -> torch.Tensor:
    """Radians a position turns pair d by, [D / 2]: from 1, falling to about 1 / theta."""
    exponents = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    frequencies = 1.0 / (theta or config.rope_theta) ** exponents
    return scaled(frequencies, config.rope_scaling) if config.rope_scaling else frequencies


def rotation(
    positions_T: torch.Tensor, config: ModelConfig, *, theta: float | None = None
) -> Rotation:
    """The tables of a step, computed once and used by every layer. theta: None: the model's."""
    frequencies = inverse_frequencies(config, positions_T.device, theta=theta)
    angles = positions_T.float()[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1)[:, None], torch.cat((-sin, sin), dim=-1)[:, None]


def fused(
    q_THD: torch.Tensor,
    k_UHD: torch.Tensor,
    v_UHD: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    scale: float,
) -> torch.Tensor:
    """Attention of T queries to U keys, of as many heads, in one call of torch: [..., T, H, D].

    mask: truth values of what is seen, or what is added to the scores. causal: instead of a mask.
    """
    mixed_HTD = nn.functional.scaled_dot_product_attention(
        q_THD.transpose(-3, -2),
        k_UHD.transpose(-3, -2),
        v_UHD.transpose(-3, -2),
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
    )
    return mixed_HTD.transpose(-3, -2)


def sinusoids(positions_T: torch.Tensor, size: int) -> torch.Tensor:
    """Position vectors [T, C]: the sines of C / 2 frequencies, then their cosines."""
    exponents = torch.arange(0, size, 2, device=positions_T.device).float() / size
    angles = positions_T.float()[:, None] / 10_000.0**exponents
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


def buckets(ago: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """The bucket of each distance: exact for near tokens, logarithmic for far ones (T5).

    `ago`: position of the query minus that of the key.
    """
    num, offset = config.num_buckets, torch.zeros_like(ago)
    if config.bidirectional:
        num //= 2
        offset = num * (ago < 0).long()
        ago = ago.abs()
    ago = ago.clamp(min=0)
    exact = num // 2
    growth = math.log(config.max_distance / exact)
    far = exact + (torch.log(ago.clamp(min=1).float() / exact) / growth * (num - exact)).long()
    return offset + torch.where(ago < exact, ago, far.clamp(max=num - 1))


def rotate(x_THD: torch.Tensor, tables: Rotation) -> torch.Tensor:
    """Turns each pair (d, d + D/2) by its position's angle; computed in float32.

    Afterwards the product of a query and a key depends on their distance alone.
    """
    cos, sin = tables
    partner = x_THD.roll(x_THD.shape[-1] // 2, dims=-1)
    return (x_THD * cos + partner * sin).to(x_THD.dtype)


class PackedLinear(nn.Module):
    """A bfloat16 linear layer whose weight lies in the order oneDNN reads it in. Inference only.

    A plain one reorders the weight in every call, which costs a third of a decode step.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        # The only way to oneDNN's packed weights without compiling the graph; present in every
        # release of torch that the project allows.
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)  # noqa: SLF001
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(  # noqa: SLF001
            x, self.packed, self.bias, "none", [], ""
        )
        return y

    @staticmethod
    def available() -> bool:
        """Whether this build and this processor have it."""
        if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
            return False
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # noqa: SLF001


def pack_linears(module: nn.Module) -> None:
    """Replaces every linear layer below `module` by its packed twin, one at a time.

    The plain weight is let go before the next is packed, so that no second copy of the network
    ever exists.
    """
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            bias = None if child.bias is None else child.bias.detach()
            setattr(module, name, PackedLinear(child.weight.detach(), bias))
        else:
            pack_linears(child)


def load_weights(
    module: nn.Module,
    weights: Mapping[str, torch.Tensor],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Gives a module built on the meta device its weights, converted one by one.

    Raises RuntimeError if a name is missing or unexpected or a shape differs.
    """
    state = {name: weights[name].to(device=device, dtype=dtype) for name in weights}
    module.load_state_dict(state, strict=True, assign=True)
