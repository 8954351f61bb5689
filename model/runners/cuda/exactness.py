"""Exactness, tried: the same text by different ways through a runner, compared bit by bit.

    alone            the prompt in one piece, then token by token: what the others are compared with
    beside N         the same in steps that hold N other sequences
    full step        the same in a step that fills the runner's budget to the last row
    chunks of N      the prompt in pieces of N tokens
    prefix hit       the prompt's full blocks found computed already
    recomputed       preempted in the middle: prompt and answer so far computed again as a prompt
    likeliest        greedy and with nothing read of the logits, which a runner may then not have
    likeliest, N     the same beside N others

What is compared are tokens and the log probabilities of the chosen and of the eight likeliest; of
the last two ways tokens alone, with those of a greedy answer whose log probabilities are read. It
uses the runner's blocks from number 0 on, so nobody else may hold any.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from model.batch import Batch, SamplingBatch, StepOutput
from model.runners import Runner, RunnerOptions

_NUM_TOP = 8
_ALONE = "alone"
_OVER_A_SPLIT = 530  # positions: the last rows attend over more than one split of 512


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What to try, and on how long a text."""

    prompt: int = 40
    answer: int = 6
    beside: tuple[int, ...] = (1, 16)
    chunks: tuple[int, ...] = (1, 7)
    temperature: float = 0.7
    full: int | None = None  # rows of a full step; None: no such way
    num_top: int | None = _NUM_TOP  # None: log probabilities are not asked for


def trial_for(options: RunnerOptions, *, num_blocks: int, max_model_len: int) -> Trial:
    """What a runner can try with its own limits: over a split's end and a ladder's rungs."""
    answer = 4
    most = min(max_model_len, options.max_batch_tokens, num_blocks * options.block_size // 2)
    prompt = max(1, min(_OVER_A_SPLIT, most - answer))
    each = -(-(prompt + answer) // options.block_size)
    most_texts = min(options.max_sequences, num_blocks // each)
    room = min(most_texts, options.max_batch_tokens // prompt) - 1
    full = options.max_batch_tokens
    return Trial(
        prompt=prompt,
        answer=answer,
        beside=tuple(count for count in (1, 2, 7, 15) if count <= room),
        chunks=tuple(size for size in (1, 17, 64, 130) if size < prompt),
        full=full if -(-full // prompt) <= most_texts else None,
    )


@dataclass(kw_only=True)
class _Text:
    tokens: list[int]
    blocks: range
    seat: int
    computed: int = 0
    answered: int = 0
    bits: list[bytes] = field(default_factory=list)

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.computed


def try_exactness(runner: Runner, trial: Trial) -> Mapping[str, bool]:
    """Each way through the runner, and whether it gave the bits of `alone`."""
    prompt = _prompt(runner, trial.prompt, seed=0)
    expected = _alone(runner, prompt, trial)
    found = {_ALONE: _alone(runner, prompt, trial) == expected}
    for count in trial.beside:
        texts = _seat_beside(runner, prompt, trial, count=count)
        found[f"beside {count}"] = _generate(runner, texts, trial, chunk=trial.prompt) == expected
    if trial.full is not None:
        texts = _seat_filling(runner, prompt, trial, rows=trial.full)
        found["full step"] = _generate(runner, texts, trial, chunk=trial.prompt) == expected
    for size in trial.chunks:
        texts = _seat(runner, [prompt], trial.prompt + trial.answer)
        found[f"chunks of {size}"] = _generate(runner, texts, trial, chunk=size) == expected
    found["prefix hit"] = _prefix_hit(runner, prompt, trial) == expected
    found["recomputed"] = _recomputed(runner, prompt, trial) == expected
    greedy = replace(trial, temperature=0.0)
    likeliest = _answer(runner, prompt, greedy, count=0)
    greedy = replace(greedy, num_top=None)
    found["likeliest"] = _answer(runner, prompt, greedy, count=0) == likeliest
    for count in trial.beside:
        answer = _answer(runner, prompt, greedy, count=count)
        found[f"likeliest, {count}"] = answer == likeliest
    return found


def _alone(runner: Runner, prompt: list[int], trial: Trial) -> list[bytes]:
    texts = _seat(runner, [prompt], trial.prompt + trial.answer)
    return _generate(runner, texts, trial, chunk=trial.prompt)


def _prefix_hit(runner: Runner, prompt: list[int], trial: Trial) -> list[bytes]:
    """`alone` ran in the same blocks before, so their K and V are stored."""
    _alone(runner, prompt, trial)
    texts = _seat(runner, [prompt], trial.prompt + trial.answer)
    texts[0].computed = (trial.prompt - 1) // runner.block_size * runner.block_size
    return _generate(runner, texts, trial, chunk=trial.prompt)


def _recomputed(runner: Runner, prompt: list[int], trial: Trial) -> list[bytes]:
    most = trial.prompt + trial.answer
    text = _seat(runner, [prompt], most)[0]
    half = trial.answer // 2
    _generate(runner, [text], trial, chunk=trial.prompt, count=half)
    text.computed = 0
    text.seat, text.blocks = 1, _seat(runner, [prompt], most, first=1)[0].blocks
    return _generate(runner, [text], trial, chunk=most)


def _answer(runner: Runner, prompt: list[int], trial: Trial, *, count: int) -> list[int]:
    """The tokens of an answer beside `count` others."""
    texts = _seat_beside(runner, prompt, trial, count=count)
    _generate(runner, texts, trial, chunk=trial.prompt)
    return texts[-1].tokens[trial.prompt :]


def _generate(
    runner: Runner, texts: list[_Text], trial: Trial, *, chunk: int, count: int | None = None
) -> list[bytes]:
    """Runs all together until the last text has its answer; returns that one's bits."""
    watched = texts[-1]
    while watched.answered < (trial.answer if count is None else count):
        lengths = [min(chunk, text.pending) for text in texts]
        output = runner.run(_batch(texts, lengths, trial, vocab_size=runner.config.vocab_size))
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
    """A row's, without log probabilities where nobody asked for any."""
    columns = (output.tokens_R, output.logprobs_R, output.top_logprobs_RN)
    return b"".join(column[row].tobytes() for column in columns if len(column))


def _prompt(runner: Runner, length: int, *, seed: int) -> list[int]:
    tokens: list[int] = (
        np.random.default_rng(seed).integers(0, runner.config.vocab_size, length).tolist()
    )
    return tokens


def _seat(
    runner: Runner, prompts: Iterable[list[int]], most: int, *, first: int = 0
) -> list[_Text]:
    """Texts side by side in seats and blocks, room for `most` tokens each."""
    each = -(-most // runner.block_size)
    return [
        _Text(tokens=list(prompt), seat=seat, blocks=range(seat * each, (seat + 1) * each))
        for seat, prompt in enumerate(prompts, first)
    ]


def _seat_beside(runner: Runner, prompt: list[int], trial: Trial, *, count: int) -> list[_Text]:
    """The prompt behind `count` others of other lengths."""
    others = [_prompt(runner, 1 + 7 * n % trial.prompt, seed=n + 1) for n in range(count)]
    most = trial.prompt + trial.answer
    return [*_seat(runner, others, most), *_seat(runner, [prompt], most, first=count)]


def _seat_filling(runner: Runner, prompt: list[int], trial: Trial, *, rows: int) -> list[_Text]:
    """The prompt behind others that are no longer: together they have `rows` tokens."""
    count = -(-(rows - trial.prompt) // trial.prompt)
    lengths = [(rows - trial.prompt + n) // count for n in range(count)]
    others = [_prompt(runner, length, seed=n + 1) for n, length in enumerate(lengths)]
    most = trial.prompt + trial.answer
    return [*_seat(runner, others, most), *_seat(runner, [prompt], most, first=count)]


def _batch(texts: list[_Text], lengths: list[int], trial: Trial, *, vocab_size: int) -> Batch:
    starts = np.cumsum([0, *lengths])
    ends = [text.computed + length for text, length in zip(texts, lengths, strict=True)]
    sampling = [index for index, text in enumerate(texts) if ends[index] == len(text.tokens)]
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
        batch_slots_S=_ints([text.seat for text in texts]),
        sample_rows_R=_ints([starts[index + 1] - 1 for index in sampling]),
        sampling=_columns([texts[index] for index in sampling], trial, vocab_size),
        score_rows_Q=_ints([]),
        score_ids_Q=_ints([]),
    )


def _columns(texts: list[_Text], trial: Trial, vocab_size: int) -> SamplingBatch:
    return SamplingBatch.plain(
        len(texts),
        vocab_size=vocab_size,
        temperature=trial.temperature,
        seeds_R=np.array([text.tokens[0] for text in texts], np.uint64),
        indices_R=_ints([text.answered for text in texts]),
        num_top=trial.num_top,
    )


def _ints(values: object) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
    return np.asarray(values, dtype=np.int32)
