"""A new encoder-decoder (T5 with a gated MLP) and its vocabulary, from pairs of texts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch.nn import functional

from model.config import ModelConfig
from model.encoder_decoder import EncoderDecoder
from model.families import family_of
from model.training import TrainingError
from model.training.data import TokenBatch, column, hold_out, in_order, padded, read_rows
from model.training.folder import as_stored, write_model
from model.training.loop import Recipe
from model.training.pretrain import train_vocabulary, write_tokenizer
from model.transformer import Transformer

_MAX_EVALUATED = 512  # held-out pairs
_HEAD_DIM = 32
_END_ID = 0  # of the token between texts, which also begins the decoder's text


@dataclass(frozen=True, slots=True)
class Pair:
    """The tokens of a source and of its target, each with an end."""

    source: list[int]
    target: list[int]


def read_pairs(path: Path, *, source: str, target: str) -> list[tuple[str, str]]:
    """Two columns of a file. Raises TrainingError."""
    rows = read_rows(path)
    columns = [column(rows, name, file=path.name) for name in (source, target)]
    return [(str(one), str(other)) for one, other in zip(*columns, strict=True)]


def new_vocabulary(pairs: Sequence[tuple[str, str]], size: int) -> Tokenizer:
    """One vocabulary of bytes and frequent runs of them, for both sides."""
    return train_vocabulary([text for pair in pairs for text in pair], size)


def tokenised(
    pairs: Sequence[tuple[str, str]], tokenizer: Tokenizer, *, context: int
) -> list[Pair]:
    """Raises TrainingError that names the row for a text that is empty or too long."""
    sides = [
        tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        for texts in zip(*pairs, strict=True)
    ]
    found = [Pair([*a.ids, _END_ID], [*b.ids, _END_ID]) for a, b in zip(*sides, strict=True)]
    for number, pair in enumerate(found, start=1):
        if not 1 < len(pair.source) <= context or len(pair.target) >= context:
            raise TrainingError(
                f"row {number}: a source must have 1 to {context - 1} tokens, and a target at most"
                f" {context - 2}: raise --context"
            )
    return found


def hold_out_sources(
    pairs: Sequence[tuple[str, str]], *, share: float, seed: int
) -> tuple[list[int], list[int]]:
    """As `hold_out`; a source that occurs twice is held out, or trained with, in all its rows."""
    sources = sorted({source for source, _ in pairs})
    _, held = hold_out([0] * len(sources), share=share, seed=seed)
    unseen = {sources[index] for index in held}
    parts: tuple[list[int], list[int]] = ([], [])
    for index, (source, _) in enumerate(pairs):
        parts[source in unseen].append(index)
    return parts


def config_json(*, vocab_size: int, hidden_size: int, layers: int, context: int) -> dict[str, Any]:
    """The fields of config.json. Raises TrainingError for sizes that cannot be a network."""
    if hidden_size % _HEAD_DIM:
        raise TrainingError(f"--hidden-size must be a multiple of {_HEAD_DIM}")
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": True,
        "vocab_size": vocab_size,
        "d_model": hidden_size,
        "d_kv": _HEAD_DIM,
        "d_ff": 2 * hidden_size,
        "num_layers": layers,
        "num_decoder_layers": layers,
        "num_heads": hidden_size // _HEAD_DIM,
        "n_positions": context,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "dropout_rate": 0.0,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "pad_token_id": _END_ID,
        "eos_token_id": _END_ID,
        "decoder_start_token_id": _END_ID,
    }


def model_config(fields: Mapping[str, Any]) -> ModelConfig:
    """The network of these fields. Raises TrainingError for sizes that cannot be one."""
    try:
        return family_of("t5").configure(fields)
    except ValueError as error:
        raise TrainingError(str(error)) from None


class Translation:
    """Pairs in an order that the seed decides. A task of `loop`."""

    def __init__(self, train: Sequence[Pair], held: Sequence[Pair], recipe: Recipe) -> None:
        self._train, self._held, self._recipe = train, held[:_MAX_EVALUATED], recipe
        self._lengths = tuple(len(pair.source) + len(pair.target) for pair in train)
        self.name = f"seq2seq-{hashlib.sha256(repr([train, held]).encode()).hexdigest()[:12]}"

    def batches(self, first: int) -> Iterator[TokenBatch]:
        recipe = self._recipe
        order = in_order(self._lengths, batch=recipe.batch, seed=recipe.seed, first=first)
        return (_batch([self._train[index] for index in indices]) for indices in order)

    def loss(self, network: Transformer, batch: TokenBatch) -> torch.Tensor:
        chosen = batch.targets[:, 1:]
        states_NTC = _states(network, batch.tokens_NT[:, :-1], batch)
        logits_RV = network.logits(states_NTC[chosen])
        wanted_R = batch.tokens_NT[:, 1:][chosen]
        return functional.cross_entropy(logits_RV.float(), wanted_R, reduction="sum")

    def evaluate(self, network: Transformer) -> Mapping[str, float]:
        """Loss in nats per token of held-out targets, and the share that is answered exactly."""
        if not self._held:
            return {}
        device = network.embed.weight.device
        total, terms, exact = 0.0, 0, 0
        for start in range(0, len(self._held), self._recipe.batch):
            batch = _batch(self._held[start : start + self._recipe.batch]).to(device)
            total += float(self.loss(network, batch))
            terms += batch.count
            exact += _exact(network, batch)
        return {"loss": total / terms, "exact": exact / len(self._held)}


def _batch(pairs: Sequence[Pair]) -> TokenBatch:
    tokens_NT, lengths_N = padded([[_END_ID, *pair.target] for pair in pairs])
    sources_NU, source_lengths_N = padded([pair.source for pair in pairs])
    scored_NT = torch.arange(tokens_NT.shape[1]) < lengths_N[:, None]
    scored_NT[:, 0] = False
    return TokenBatch(
        tokens_NT=tokens_NT,
        lengths_N=lengths_N + source_lengths_N,
        targets=scored_NT,
        sources_NU=sources_NU,
        source_lengths_N=source_lengths_N,
    )


def _states(network: Transformer, tokens_NT: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
    if not isinstance(network, EncoderDecoder) or batch.sources_NU is None:
        raise TypeError("pairs are learned by an encoder-decoder")
    return network.translate(tokens_NT, batch.sources_NU, batch.source_lengths_N)


def _exact(network: Transformer, batch: TokenBatch) -> int:
    """How many targets are the greedy answers, to the end."""
    tokens_NT = batch.tokens_NT[:, :1]
    for _ in range(batch.tokens_NT.shape[1] - 1):
        logits_NV = network.logits(_states(network, tokens_NT, batch)[:, -1])
        tokens_NT = torch.cat((tokens_NT, logits_NV.argmax(-1, keepdim=True)), dim=1)
    equal_NT = (tokens_NT == batch.tokens_NT) | ~batch.targets
    return int(equal_NT.all(dim=1).sum())


def write_translator(
    folder: Path, network: Transformer, tokenizer: Tokenizer, fields: Mapping[str, Any]
) -> None:
    """Writes a folder that `quire serve` and `transformers` load."""
    write_tokenizer(folder, tokenizer, context=int(fields["n_positions"]))
    tensors = as_stored(family_of("t5"), network.config, network.state_dict())
    write_model(folder, fields=fields, tensors=tensors, vocabulary=None)
