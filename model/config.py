"""ModelConfig: every architecture flag, with its default. What the network is, not how it runs.

An encoder is a network whose attention is bidirectional. A classifier scores a whole text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

MAX_SIZE = 2**31 - 1  # of any dimension
MAX_LAYERS = 4096  # real models have hundreds
MAX_POSITIONS = 2**24  # rotary angles are computed in float32, which counts no further
ROPE_THETA = (1.0, 1e15)  # real models end at about 1e8


class Norm(StrEnum):
    """RMS: Zhang & Sennrich, arXiv 1910.07467. LAYER: Ba et al., arXiv 1607.06450."""

    RMS = "rms"
    LAYER = "layer"


class Position(StrEnum):
    """ROTARY: Su et al., arXiv 2104.09864. LEARNED: one vector a position, as in GPT-2.

    SINUSOIDAL: the vectors of arXiv 1706.03762. RELATIVE: a number per head and distance, added to
    the scores (T5: Raffel et al., arXiv 1910.10683).
    """

    ROTARY = "rotary"
    LEARNED = "learned"
    SINUSOIDAL = "sinusoidal"
    RELATIVE = "relative"


class Activation(StrEnum):
    """The MLP's nonlinearity."""

    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    TANH = "tanh"  # of classifiers only, like the next one
    RELU = "relu"


class Pooling(StrEnum):
    """How the states of a text's tokens become one vector."""

    MEAN = "mean"
    CLS = "cls"  # the first token's
    LAST = "last"


class Problem(StrEnum):
    """What a classifier was trained for, which decides how its logits become scores."""

    REGRESSION = "regression"
    SINGLE_LABEL = "single_label_classification"
    MULTI_LABEL = "multi_label_classification"


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Llama 3's frequency scaling: slow frequencies are divided by `factor`, fast ones kept."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int

    def __post_init__(self) -> None:
        _check_factor(self.factor)
        if not 0 < self.low_freq_factor < self.high_freq_factor < math.inf:
            raise ValueError("low_freq_factor must be above 0 and below high_freq_factor")
        if not 1 <= self.original_max_position <= MAX_POSITIONS:
            raise ValueError(f"original_max_position must be from 1 to {MAX_POSITIONS}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearScaling:
    """Position interpolation: every frequency is divided by `factor`. arXiv 2306.15595."""

    factor: float

    def __post_init__(self) -> None:
        _check_factor(self.factor)


def _check_factor(factor: float) -> None:
    if not 1 <= factor <= 1e6:
        raise ValueError("the factor of rotary scaling must be from 1 to 1e6")


@dataclass(frozen=True, slots=True, kw_only=True)
class Classifier:
    """A head that scores a whole text: out(norm(activation(dense(pooled state))))."""

    labels: tuple[str, ...]
    problem: Problem
    pooling: Pooling = Pooling.CLS
    dense: bool = True  # with a bias, unless `bias` is False; False: no activation either
    bias: bool = True
    activation: Activation = Activation.TANH
    norm: bool = False
    out_bias: bool = True
    sigmoid: bool = True  # how a cross-encoder's single logit becomes a score; False: as it is


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Sizes and flags of one network. Raises ValueError for sizes that cannot be a network.

    The defaults are Llama's: RMSNorm, rotary positions, a gated SiLU MLP, no biases.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_model_len: int
    norm: Norm = Norm.RMS
    norm_eps: float = 1e-5
    position: Position = Position.ROTARY
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | LinearScaling | None = None
    rope_free_layers: frozenset[int] = frozenset()  # layers without rotary positions (SmolLM3)
    activation: Activation = Activation.SILU
    gated_mlp: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm on each query and key head (Qwen3)
    tied_head: bool = False
    sliding_window: int | None = None  # tokens a query sees, itself included; None: all
    full_attention_layers: frozenset[int] = frozenset()  # layers the window does not apply to
    # What encoders have.
    bidirectional: bool = False  # a token attends to later ones, too; a window is on both sides
    post_norm: bool = False  # norms after the residual sums, and none at the end (BERT)
    embed_norm: bool = False  # a norm of the embeddings, in place of one before the first sublayer
    norm_bias: bool = True  # of LayerNorms
    position_offset: int = 0  # rows of the position table before position 0 (RoBERTa)
    num_types: int = 0  # kinds of tokens that have a vector of their own; 0: no such vectors
    window_rope_theta: float | None = None  # in layers with the window; None: rope_theta
    classifier: Classifier | None = None
    # What encoder-decoders have.
    encoder: ModelConfig | None = None  # the encoder; the other fields are the decoder's
    start_ids: tuple[int, ...] = ()  # tokens that the decoder's text begins with
    end_id: int = 0  # the token that a source ends with
    scaled_scores: bool = True  # queries times keys are divided by √D
    embed_scale: float = 1.0  # factor of the token's vectors
    head_scale: float = 1.0  # factor of the states that a tied head reads
    head_bias: bool = False  # the logits have a bias
    num_buckets: int = 0  # of distances, if positions are relative
    max_distance: int = 0  # tokens, from which on distances share the last bucket

    def __post_init__(self) -> None:
        sizes = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_layers": self.num_layers,
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate_size,
            "max_model_len": self.max_model_len,
        }
        most = {"num_layers": MAX_LAYERS, "max_model_len": MAX_POSITIONS}
        for name, size in sizes.items():
            if not 1 <= size <= most.get(name, MAX_SIZE):
                raise ValueError(f"{name} must be from 1 to {most.get(name, MAX_SIZE)}")
        if not 0 < self.norm_eps <= 1:
            raise ValueError("norm_eps must be above 0 and at most 1")
        if not ROPE_THETA[0] <= self.rope_theta <= ROPE_THETA[1]:
            raise ValueError(f"rope_theta must be from {ROPE_THETA[0]:g} to {ROPE_THETA[1]:g}")
        if self.sliding_window is not None and not 1 <= self.sliding_window <= MAX_SIZE:
            raise ValueError(f"sliding_window must be from 1 to {MAX_SIZE}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError("num_heads must be a multiple of num_kv_heads")
        if self.position is Position.ROTARY and self.head_dim % 2:
            raise ValueError("rotary positions need an even head_dim")

    @property
    def query_size(self) -> int:
        """Width of all query heads side by side."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads (or value heads) side by side."""
        return self.num_kv_heads * self.head_dim

    @property
    def final_norm(self) -> bool:
        """Whether the residual stream is normalised after the last block."""
        return not self.post_norm

    def has_attention_norm(self, layer: int) -> bool:
        """Whether a layer has a norm of its own before attention, or after it if `post_norm`."""
        return self.post_norm or layer > 0 or not self.embed_norm

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer, or None if it attends to everything."""
        return None if layer in self.full_attention_layers else self.sliding_window
