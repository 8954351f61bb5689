"""The network on the Triton kernels: the same sums as `model.transformer`, fused, over paged KV.

    residual ── norm ── QKV ── rotary, KV store ── attention ── out ─┐ delta
       └─ + ──────── norm ── gate-up, SiLU · mul ─── down ──────┤ delta
       └─ + ──────── (next layer)

A sublayer returns its product unfinished (`Product`, maybe in parts); the next norm adds it to the
residual stream. The network holds weights and tables and nothing that changes. Legend:
`model.batch`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from model.adapters import Adapter
from model.config import Activation, ModelConfig, Norm, Position
from model.kernels.activation import silu_mul
from model.kernels.adapters import AdapterStack, add_adapters, stack_adapters
from model.kernels.attention import Partials, paged_attention
from model.kernels.head import Argmax, find_argmax, head, merge_argmax
from model.kernels.inputs import embed
from model.kernels.matmul import Product, multiply
from model.kernels.norm import add_rms_norm
from model.kernels.rotary import Heads, rotary_table, rotate_and_store
from model.kernels.shared_memory import multiprocessors_of, shared_memory
from model.kernels.tiling import Layout, layout_for, tile_for_whole
from model.kernels.work_list import WorkList
from model.packed_weights import from_blocks, is_matrix, to_float8

Multiply = Callable[..., Product]
Reduce = Callable[[torch.Tensor], torch.Tensor]
"""Sums a product over the ranks, each of which holds a share of its inputs; returns the sum."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs:
    """Tensors of a step, all on the device."""

    tokens_T: torch.Tensor
    positions_T: torch.Tensor
    kv_slots_T: torch.Tensor
    adapters_T: torch.Tensor
    table_SB: torch.Tensor  # block tables, by batch slot
    pool: torch.Tensor  # [layers, 2, X, K, D]
    block_size: int
    work: Mapping[int | None, WorkList]  # filled, one for each window that layers have
    partials: Partials
    programs: int


class Linear(NamedTuple):
    """Weight [outputs, inputs] and bias of a product; scales of one of 8 bits; its adapters."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    scales: torch.Tensor | None = None
    adapters: AdapterStack | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    heads: Heads
    window: int | None
    attention_norm: torch.Tensor
    qkv: Linear
    out: Linear
    mlp_norm: torch.Tensor
    gate_up: Linear
    down: Linear


def unsupported(config: ModelConfig) -> str | None:
    """Why these kernels cannot compute a network, or None if they can."""
    reasons = {
        "norms other than RMSNorm": config.norm is not Norm.RMS,
        "learned positions": config.position is not Position.ROTARY,
        "activations other than SiLU": config.activation is not Activation.SILU,
        "MLPs without a gate": not config.gated_mlp,
        "more than 64 query heads per KV head": config.num_heads // config.num_kv_heads > 64,
    }
    found = [what for what, holds in reasons.items() if holds]
    return f"the cuda runner does not support {found[0]}" if found else None


class FusedNetwork:
    """Weights on a device, and the path of a step through them."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, torch.Tensor],
        *,
        dtype: torch.dtype,
        device: torch.device,
        product: Multiply = multiply,
        reduce: Reduce | None = None,
        float8: bool = False,
        adapters: Sequence[Adapter] = (),
    ) -> None:
        """`float8`: the layers' matrices become float8. With these, or with blocks of 8 bits
        (uint8), the product is `multiply`.
        """
        reason = unsupported(config)
        if reason:
            raise ValueError(f"{reason}; for {config.family} use the torch runner")
        self.config = config
        self.dtype = dtype
        self._product = product  # of the head
        self._multiply = product  # of the layers
        self.reduce = reduce
        loaded = _load(weights, dtype=dtype, device=device, float8=float8)
        self._embed = loaded["embed.weight"]
        self._norm = loaded["norm.weight"]
        self._head = self._embed if config.tied_head else loaded["head.weight"]
        self._table = rotary_table(config, device)
        stacks = stack_adapters(adapters, dtype=dtype, device=device)
        self._layers = [_layer(config, loaded, stacks, index) for index in range(config.num_layers)]

    @property
    def fuses_head(self) -> bool:
        """Whether it can compute the argmax without storing logits: with our own product only."""
        return self._product is multiply

    @property
    def layer_products(self) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """Weights and biases of the layers' products, except those that are summed over ranks."""
        linears = self._linears
        if self.reduce is not None:
            linears = [each for layer in self._layers for each in (layer.qkv, layer.gate_up)]
        return [(linear.weight, linear.bias) for linear in linears]

    @property
    def _linears(self) -> list[Linear]:
        return [
            linear
            for layer in self._layers
            for linear in (layer.qkv, layer.out, layer.gate_up, layer.down)
        ]

    def multiply_layers_by(self, product: Multiply) -> None:
        """Replaces the product of the layers by another of the same bits; the head's stays."""
        self._multiply = product

    def layouts(self, num_rows: int) -> tuple[Layout, ...]:
        """How products of so many rows are laid out: steps of one layout launch one variant."""
        shapes = {tuple(linear.weight.shape): None for linear in self._linears}
        device = self._embed.device
        chip = {"limit": shared_memory(device), "multiprocessors": multiprocessors_of(device)}
        found = tuple(layout_for(num_rows, *shape, **chip) for shape in shapes)
        # A product that is gated or summed over ranks is whole.
        whole = (tile_for_whole(num_rows, *shape, **chip) for shape in shapes)
        return found + tuple(Layout(tiling, is_apart=False) for tiling in whole)

    @property
    def windows(self) -> set[int | None]:
        return {layer.window for layer in self._layers}

    def hidden(self, inputs: StepInputs) -> tuple[torch.Tensor, Product]:
        """The residual stream [T, C] and what the last layer still adds to it.

        Stores the step's K and V in the pool.
        """
        residual_TC = embed(inputs.tokens_T, self._embed)
        delta: Product | None = None
        for layer, (keys_XKD, values_XKD) in zip(self._layers, inputs.pool, strict=True):
            x_TC = self._add_norm(residual_TC, delta, layer.attention_norm)
            q_THD = rotate_and_store(
                self._apply(x_TC, layer.qkv, inputs),
                layer.heads,
                table=self._table,
                positions_T=inputs.positions_T,
                kv_slots_T=inputs.kv_slots_T,
                keys_XKD=keys_XKD,
                values_XKD=values_XKD,
                dtype=self.dtype,
            )
            mixed_THD = paged_attention(
                q_THD,
                keys_XKD,
                values_XKD,
                inputs.table_SB,
                work=inputs.work[layer.window],
                partials=inputs.partials,
                block_size=inputs.block_size,
                scale=self.config.head_dim**-0.5,
                window=layer.window,
                programs=inputs.programs,
            )
            delta = self._narrow(mixed_THD.flatten(1), layer.out, inputs)
            x_TC = self._add_norm(residual_TC, delta, layer.mlp_norm)
            gate_up = self._apply(x_TC, layer.gate_up, inputs, gated=True)
            x_TF = silu_mul(gate_up, dtype=self.dtype)
            delta = self._narrow(x_TF, layer.down, inputs)
        if delta is None:
            raise ValueError("a network has at least one layer")
        return residual_TC, delta

    def stream(self, inputs: StepInputs, *, out_TC: torch.Tensor) -> None:
        """Fills `out_TC` with the end of the residual stream: both parts of `hidden`, added."""
        residual_TC, delta = self.hidden(inputs)
        self._add_norm(residual_TC, delta, self._norm)
        out_TC.copy_(residual_TC)

    def logits(
        self,
        hidden: tuple[torch.Tensor, Product | None],
        rows_R: torch.Tensor | None,
        *,
        out_RV: torch.Tensor,
    ) -> None:
        """Fills `out_RV`, float32, with the logits of some rows (None: of all)."""
        self._product(self._last(hidden, rows_R), self._head, out_MN=out_RV)

    def argmax(
        self,
        hidden: tuple[torch.Tensor, Product | None],
        rows_R: torch.Tensor | None,
        *,
        out: Argmax,
        logits_RV: torch.Tensor | None,
    ) -> None:
        """Fills `out` with the argmax of whole rows; `logits_RV`, if given, as `logits` does.

        Raises ValueError if `logits_RV` is missing and the head is not fused.
        """
        if self.fuses_head:
            found = head(self._last(hidden, rows_R), self._head, logits_RV=logits_RV)
        elif logits_RV is None:
            raise ValueError("only our own product computes the argmax without logits")
        else:
            self.logits(hidden, rows_R, out_RV=logits_RV)
            found = find_argmax(logits_RV)
        merge_argmax(found, vocab_size=self.config.vocab_size, out=out)

    def _last(
        self, hidden: tuple[torch.Tensor, Product | None], rows_R: torch.Tensor | None
    ) -> torch.Tensor:
        """The input of the head: the end of the residual stream, normalised, [R, C]."""
        residual_TC, delta = hidden
        return add_rms_norm(residual_TC, delta, self._norm, eps=self.config.norm_eps, rows_R=rows_R)

    def _add_norm(
        self, residual_TC: torch.Tensor, delta: Product | None, weight_C: torch.Tensor
    ) -> torch.Tensor:
        return add_rms_norm(residual_TC, delta, weight_C, eps=self.config.norm_eps)

    def _narrow(self, x: torch.Tensor, linear: Linear, inputs: StepInputs) -> Product:
        """A sublayer's last product, summed over ranks, each of which has a share of its inputs."""
        if self.reduce is None:
            return self._apply(x, linear, inputs)
        y = torch.empty((len(x), len(linear.weight)), dtype=self.dtype, device=x.device)
        return Product(self.reduce(self._apply(x, linear, inputs, out_MN=y).values))

    def _apply(
        self, x: torch.Tensor, linear: Linear, inputs: StepInputs, **options: torch.Tensor | bool
    ) -> Product:
        if linear.scales is not None:
            options["scales"] = linear.scales
        if linear.adapters is None:
            return self._multiply(x, linear.weight, linear.bias, **options)
        options.pop("gated", None)  # activated when the adapters' products are added
        y = self._multiply(x, linear.weight, linear.bias, **options)
        add_adapters(y, x, linear.adapters, inputs.adapters_T)
        return y


def _load(
    weights: Mapping[str, torch.Tensor], *, dtype: torch.dtype, device: torch.device, float8: bool
) -> dict[str, torch.Tensor]:
    """Weights on the device. The scales of one of 8 bits are beside it, as `.scales`."""
    loaded: dict[str, torch.Tensor] = {}
    for name in weights:
        weight = weights[name].to(device=device)
        if weight.dtype is torch.uint8:
            loaded[name], loaded[_scales_of(name)] = from_blocks(weight)
        elif float8 and is_matrix(name):
            loaded[name], loaded[_scales_of(name)] = to_float8(weight.to(dtype))
        else:
            loaded[name] = weight.to(dtype).contiguous()
    return loaded


def _scales_of(name: str) -> str:
    return name.removesuffix("weight") + "scales"


def _layer(
    config: ModelConfig,
    loaded: Mapping[str, torch.Tensor],
    stacks: Mapping[str, AdapterStack],
    index: int,
) -> _Layer:
    prefix = f"blocks.{index}."

    def linear(name: str) -> Linear:
        weight, bias = f"{prefix}{name}.weight", f"{prefix}{name}.bias"
        scales = loaded.get(_scales_of(weight))
        return Linear(loaded[weight], loaded.get(bias), scales, stacks.get(weight))

    return _Layer(
        heads=Heads(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            q_norm_D=loaded.get(prefix + "attention.q_norm.weight"),
            k_norm_D=loaded.get(prefix + "attention.k_norm.weight"),
            eps=config.norm_eps,
            rotary=index not in config.rope_free_layers,
        ),
        window=config.window(index),
        attention_norm=loaded[prefix + "attention_norm.weight"],
        qkv=linear("attention.qkv"),
        out=linear("attention.out"),
        mlp_norm=loaded[prefix + "mlp_norm.weight"],
        gate_up=linear("mlp.gate_up"),
        down=linear("mlp.down"),
    )
