"""Fine-tuning of decoders on chats or completions: what is learned is the answers alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model.compression import Anchors, compressed_config
from model.segments import anchor_ids
from model.text.chat_template import ChatTemplateError
from model.text.tokenizer import Tokenizer
from model.training import TrainingError
from model.training.data import Row, TokenBatch, in_order, padded, read_rows
from model.training.folder import Base, as_stored, open_base, write_model
from model.training.loop import Recipe
from model.training.lowrank import LowRank, merged_weights, write_adapter
from model.training.network import token_losses
from model.transformer import Transformer


@dataclass(frozen=True, slots=True)
class Example:
    """A text's tokens, and where in it the answers stand."""

    tokens: list[int]
    answers: list[range]


def open_decoder(path: Path) -> Base:
    """Reads a model into float32. Raises CheckpointError, TrainingError for an encoder."""
    base = open_base(path)
    if base.config.bidirectional:
        raise TrainingError("an encoder generates no text: choose a decoder, or tune classify")
    return base


def anchor_rule(base: Base) -> frozenset[int]:
    """Tokens that end a segment. Raises TrainingError for a model that cannot be compressed."""
    try:
        compressed_config(base.config, Anchors())
    except ValueError as error:
        raise TrainingError(str(error)) from None
    return anchor_ids(base.tokenizer.token_bytes, base.tokenizer.eos_ids)


def read_examples(path: Path, tokenizer: Tokenizer, *, context: int) -> list[Example]:
    """Rows with `messages`, or with `prompt` and `completion`, of at most `context` tokens.

    Raises TrainingError that names the row.
    """
    examples = []
    for number, row in enumerate(read_rows(path), start=1):
        try:
            example = _chat(row, tokenizer) if "messages" in row else _pair(row, tokenizer)
        except (TrainingError, ChatTemplateError, UnicodeEncodeError) as error:
            raise TrainingError(f"{path.name}: row {number}: {error}") from None
        cut = [range(span.start, min(span.stop, context)) for span in example.answers]
        answers = [span for span in cut if span]
        if not answers:
            raise TrainingError(
                f"{path.name}: row {number}: no answer within {context} tokens: raise --context"
            )
        examples.append(Example(example.tokens[:context], answers))
    return examples


def _pair(row: Row, tokenizer: Tokenizer) -> Example:
    prompt, completion = row.get("prompt"), row.get("completion")
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise TrainingError("a row has messages, or a prompt and a completion")
    begun = tokenizer.encode(prompt)
    answer = tokenizer.encode(completion, add_bos=not prompt)
    tokens = [*begun, *answer, *sorted(tokenizer.eos_ids)[:1]]
    return Example(tokens, [range(max(1, len(begun)), len(tokens))])


def _chat(row: Row, tokenizer: Tokenizer) -> Example:
    """Each answer is what the template adds to the prompt that the server would render for it."""
    messages = row["messages"]
    if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
        raise TrainingError("messages must be a list of objects with role and content")
    options: dict[str, Any] = {"tools": row["tools"]} if row.get("tools") else {}
    whole = tokenizer.apply_chat_template(messages, add_generation_prompt=False, **options)
    answers = []
    for index, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        prompt = tokenizer.apply_chat_template(messages[:index], **options)
        ended = tokenizer.apply_chat_template(
            messages[: index + 1], add_generation_prompt=False, **options
        )
        if ended[: len(prompt)] != prompt or whole[: len(ended)] != ended:
            raise TrainingError(
                "the chat template renders an answer differently in later turns:"
                " give each answer a row of its own, as its last message"
            )
        answers.append(range(len(prompt), len(ended)))
    if not answers:
        raise TrainingError("messages have no answer of the role assistant")
    return Example(whole, answers)


class Answers:
    """Examples in an order that the seed decides. A task of `loop`."""

    def __init__(
        self,
        train: Sequence[Example],
        held: Sequence[Example],
        recipe: Recipe,
        *,
        name: str,
        anchor_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._anchor_ids = anchor_ids  # see `model.segments`
        self._train, self._held, self._recipe = train, held, recipe
        self._lengths = tuple(len(example.tokens) for example in train)
        digest = hashlib.sha256(repr([train, held, sorted(anchor_ids)]).encode()).hexdigest()[:12]
        self.name = f"{name}-{digest}"

    def batches(self, first: int) -> Iterator[TokenBatch]:
        recipe = self._recipe
        order = in_order(self._lengths, batch=recipe.batch, seed=recipe.seed, first=first)
        return (_batch([self._train[index] for index in indices]) for indices in order)

    def loss(self, network: Transformer, batch: TokenBatch) -> torch.Tensor:
        return token_losses(network, batch.tokens_NT, batch.targets, anchor_ids=self._anchor_ids)

    def evaluate(self, network: Transformer) -> Mapping[str, float]:
        """Loss in nats per token of the held-out answers."""
        if not self._held:
            return {}
        device = network.embed.weight.device
        total, terms, size = 0.0, 0, self._recipe.batch
        for start in range(0, len(self._held), size):
            batch = _batch(self._held[start : start + size])
            total += float(self.loss(network, batch.to(device)))
            terms += batch.count
        return {"loss": total / terms}


def _batch(examples: Sequence[Example]) -> TokenBatch:
    tokens_NT, lengths_N = padded([example.tokens for example in examples])
    scored_NT = torch.zeros_like(tokens_NT, dtype=torch.bool)
    for row, example in zip(scored_NT, examples, strict=True):
        for span in example.answers:
            row[span.start : span.stop] = True
    return TokenBatch(tokens_NT=tokens_NT, lengths_N=lengths_N, targets=scored_NT)


def write_tuned(
    folder: Path, network: Transformer, base: Base, lowrank: LowRank | None, *, name: str
) -> None:
    """Writes a folder that `quire serve` and `transformers` load, and in it, if adapters were
    trained, a folder `adapter` for PEFT. name: the base model's.
    """
    if lowrank is not None:
        write_adapter(folder / "adapter", network, lowrank, base=name)
    tensors = as_stored(base.family, base.config, merged_weights(network))
    fields = {**base.fields, "architectures": [f"{base.class_prefix}ForCausalLM"]}
    write_model(folder, fields=fields, tensors=tensors, vocabulary=base.files, dtype=base.dtype)
