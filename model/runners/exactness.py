"""Exactness check: one text by several paths through a runner, compared bit by bit.

    alone            the prompt in one piece, then token by token: the others are compared with it
    with N others    the same in steps that hold N other sequences
    full step        the same in a step that fills the runner's budget to the last row
    chunks of N      the prompt in chunks of N tokens
    prefix hit       the prompt's full blocks are found in the cache
    recomputed       preempted in the middle: prompt and output so far computed again as a prompt
    drafts           a token of the answer and a wrong one as drafts in one step
    greedy           greedy and with no log probabilities: a runner may then store no logits
    greedy, N        the same with N others

It compares tokens and the log probabilities of the sampled and of the top 8 tokens; for the last
two paths only tokens, with those of a greedy answer whose log probabilities are read. It uses the
runner's blocks from number 0 on, so no sequence may hold any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from model.batch import Batch, SamplingBatch, StepOutput
from model.runners import Runner, RunnerOptions

_NUM_TOP = 8
_ALONE = "alone"
_ABOVE_SPLIT = 530  # positions: the last rows attend over more than two splits of 256


@dataclass(frozen=True, kw_only=True)
class ExactnessCheck:
    """Which paths to compare, and on how long a text."""

    prompt: int = 40
    answer: int = 6
    beside: tuple[int, ...] = (1, 16)
    chunks: tuple[int, ...] = (1, 7)
    temperature: float = 0.7
    full: int | None = None  # rows of a full step; None: without that path
    drafts: int = 2  # in one step, the last of them wrong; 0: without that path
    num_top: int | None = _NUM_TOP  # None: no log probabilities
    adapters: int = 0  # of the runner; the text that is compared has the last one, others have any


def check_for(options: RunnerOptions, *, num_blocks: int, max_model_len: int) -> ExactnessCheck:
    """The check that fits a runner's limits: over the end of a split and several buckets."""
    answer = 4
    most = min(max_model_len, options.max_batch_tokens, num_blocks * options.block_size // 2)
    prompt = max(1, min(_ABOVE_SPLIT, most - answer))
    each = -(-(prompt + answer) // options.block_size)
    most_texts = min(options.max_sequences, num_blocks // each)
    room = min(most_texts, options.max_batch_tokens // prompt) - 1
    full = options.max_batch_tokens
    return ExactnessCheck(
        prompt=prompt,
        answer=answer,
        beside=tuple(count for count in (1, 2, 7, 15) if count <= room),
        chunks=tuple(size for size in (1, 17, 64, 130) if size < prompt),
        full=full if -(-full // prompt) <= most_texts else None,
        drafts=min(2, options.max_sequences - 1),  # each of their rows samples
        adapters=len(options.adapters),
    )


@dataclass(kw_only=True)
class _Text:
    tokens: list[int]
    blocks: range
    batch_slot: int
    computed: int = 0
    answered: int = 0
    drafts: int = 0  # the last of the tokens
    adapter: int = 0
    bits: list[bytes] = field(default_factory=list)

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.computed


def check_exactness(runner: Runner, check: ExactnessCheck) -> Mapping[str, bool]:
    """Each path through the runner, and whether it gave the bits of `alone`."""
    prompt = _prompt(runner, check.prompt, seed=0)
    expected = _alone(runner, prompt, check)
    found = {_ALONE: _alone(runner, prompt, check) == expected}
    for count in check.beside:
        texts = _place(runner, [*_others(runner, check, count), prompt], check)
        found[f"with {count} others"] = (
            _generate(runner, texts, check, chunk=check.prompt) == expected
        )
    if check.full is not None:
        texts = _place(runner, [*_fillers(runner, check, check.full), prompt], check)
        found["full step"] = _generate(runner, texts, check, chunk=check.prompt) == expected
    for size in check.chunks:
        texts = _place(runner, [prompt], check)
        found[f"chunks of {size}"] = _generate(runner, texts, check, chunk=size) == expected
    found["prefix hit"] = _prefix_hit(runner, prompt, check) == expected
    found["recomputed"] = _recomputed(runner, prompt, check) == expected
    if check.drafts and check.answer > 1:
        found["drafts"] = _drafted(runner, prompt, check, expected) == expected
    greedy = replace(check, temperature=0.0)
    tokens = _tokens(runner, prompt, greedy, count=0)
    greedy = replace(greedy, num_top=None)
    found["greedy"] = _tokens(runner, prompt, greedy, count=0) == tokens
    for count in check.beside:
        found[f"greedy, {count}"] = _tokens(runner, prompt, greedy, count=count) == tokens
    return found


def _alone(runner: Runner, prompt: list[int], check: ExactnessCheck) -> list[bytes]:
    return _generate(runner, _place(runner, [prompt], check), check, chunk=check.prompt)


def _prefix_hit(runner: Runner, prompt: list[int], check: ExactnessCheck) -> list[bytes]:
    """`alone` ran in the same blocks before, so their K and V are stored."""
    _alone(runner, prompt, check)
    texts = _place(runner, [prompt], check)
    texts[0].computed = (check.prompt - 1) // runner.block_size * runner.block_size
    return _generate(runner, texts, check, chunk=check.prompt)


def _recomputed(runner: Runner, prompt: list[int], check: ExactnessCheck) -> list[bytes]:
    elsewhere, text = _place(runner, [prompt, prompt], check)
    _generate(runner, [text], check, chunk=check.prompt, count=check.answer // 2)
    text.computed = 0
    text.batch_slot, text.blocks = elsewhere.batch_slot, elsewhere.blocks
    return _generate(runner, [text], check, chunk=check.prompt + check.answer)


def _drafted(
    runner: Runner, prompt: list[int], check: ExactnessCheck, expected: list[bytes]
) -> list[bytes]:
    """Drafts after the first token: the right ones are taken from `expected`."""
    (text,) = texts = _place(runner, [prompt], check)
    _generate(runner, texts, check, chunk=check.prompt, count=1)
    right = [int(np.frombuffer(bits[:4], np.int32)[0]) for bits in expected]
    drafts = right[1 : min(check.drafts, check.answer - 1)]
    num_tokens = len(text.tokens) + len(drafts)
    text.tokens += [*drafts, (right[-1] + 1) % runner.config.vocab_size]
    text.drafts = len(drafts) + 1
    output = runner.run(_batch(texts, [text.pending], check, vocab_size=runner.config.vocab_size))
    text.bits += [_bits(output, row) for row in range(len(drafts) + 1)]
    del text.tokens[num_tokens:]  # the wrong one; its K and V are written over
    text.tokens.append(int(output.tokens_R[len(drafts)]))
    text.computed, text.answered, text.drafts = num_tokens, len(text.bits), 0
    return _generate(runner, texts, check, chunk=check.prompt)


def _tokens(runner: Runner, prompt: list[int], check: ExactnessCheck, *, count: int) -> list[int]:
    """The output tokens in steps that hold `count` others."""
    texts = _place(runner, [*_others(runner, check, count), prompt], check)
    _generate(runner, texts, check, chunk=check.prompt)
    return texts[-1].tokens[check.prompt :]


def _generate(
    runner: Runner,
    texts: list[_Text],
    check: ExactnessCheck,
    *,
    chunk: int,
    count: int | None = None,
) -> list[bytes]:
    """Runs all together until the last text has its answer; returns the bits of that one."""
    watched = texts[-1]
    while watched.answered < (check.answer if count is None else count):
        lengths = [min(chunk, text.pending) for text in texts]
        output = runner.run(_batch(texts, lengths, check, vocab_size=runner.config.vocab_size))
        rows = iter(range(len(output.tokens_R)))
        for text, length in zip(texts, lengths, strict=True):
            text.computed += length
            if text.pending:
                continue
            row = next(rows)
            text.tokens.append(int(output.tokens_R[row]))
            text.answered += 1
            text.bits.append(_bits(output, row))
    return watched.bits


def _bits(output: StepOutput, row: int) -> bytes:
    """The bits of a row: its token and, if requested, its log probabilities."""
    columns = (output.tokens_R, output.logprobs_R, output.top_logprobs_RN)
    return b"".join(column[row].tobytes() for column in columns if len(column))


def _prompt(runner: Runner, length: int, *, seed: int) -> list[int]:
    tokens: list[int] = (
        np.random.default_rng(seed).integers(0, runner.config.vocab_size, length).tolist()
    )
    return tokens


def _others(runner: Runner, check: ExactnessCheck, count: int) -> list[list[int]]:
    """Prompts of other lengths."""
    return [_prompt(runner, 1 + 7 * n % check.prompt, seed=n + 1) for n in range(count)]


def _fillers(runner: Runner, check: ExactnessCheck, rows: int) -> list[list[int]]:
    """Prompts no longer than the checked one: together with it they have `rows` tokens."""
    room = rows - check.prompt
    count = -(-room // check.prompt)
    return [_prompt(runner, (room + n) // count, seed=n + 1) for n in range(count)]


def _place(runner: Runner, prompts: Sequence[list[int]], check: ExactnessCheck) -> list[_Text]:
    """Texts side by side in batch slots and blocks, with room for their answers. The last has the
    last adapter, those before it the others and none in turn.
    """
    each = -(-(check.prompt + check.answer) // runner.block_size)
    return [
        _Text(
            tokens=list(prompt),
            batch_slot=slot,
            blocks=range(slot * each, (slot + 1) * each),
            adapter=(slot - len(prompts)) % (check.adapters + 1),
        )
        for slot, prompt in enumerate(prompts)
    ]


def _batch(
    texts: list[_Text], lengths: list[int], check: ExactnessCheck, *, vocab_size: int
) -> Batch:
    starts = np.cumsum([0, *lengths])
    ends = [text.computed + length for text, length in zip(texts, lengths, strict=True)]
    sampling = [
        (text, int(starts[index + 1]) - 1, after)
        for index, text in enumerate(texts)
        if ends[index] == len(text.tokens)
        for after in range(text.drafts + 1)
    ]
    return Batch(
        tokens_T=_ints(
            [
                t
                for text, end in zip(texts, ends, strict=True)
                for t in text.tokens[text.computed : end]
            ]
        ),
        positions_T=_ints(
            [p for text, end in zip(texts, ends, strict=True) for p in range(text.computed, end)]
        ),
        query_starts_S1=_ints(starts),
        context_lens_S=_ints(ends),
        block_table_SB=_ints([list(text.blocks) for text in texts]),
        batch_slots_S=_ints([text.batch_slot for text in texts]),
        sample_rows_R=_ints([last - text.drafts + after for text, last, after in sampling]),
        sampling=_columns([(text, after) for text, _, after in sampling], check, vocab_size),
        score_rows_Q=_ints([]),
        score_ids_Q=_ints([]),
        adapters_S=_ints([text.adapter for text in texts] if check.adapters else []),
    )


def _columns(
    rows: list[tuple[_Text, int]], check: ExactnessCheck, vocab_size: int
) -> SamplingBatch:
    """Parameters of rows, each of a text and after so many of its drafts."""
    return SamplingBatch.plain(
        len(rows),
        vocab_size=vocab_size,
        temperature=check.temperature,
        seeds_R=np.array([text.tokens[0] for text, _ in rows], np.uint64),
        indices_R=_ints([text.answered + after for text, after in rows]),
        num_top=check.num_top,
    )


def _ints(values: object) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
    return np.asarray(values, dtype=np.int32)
