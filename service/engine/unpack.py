"""unpack: StepOutput -> new tokens and log probabilities per sequence. Shapes: `model.batch`."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass

import numpy as np

from model.batch import Floats, Ints, StepOutput
from service.engine.guide import Guide
from service.engine.plan import Plan
from service.engine.sequence import Sequence
from service.engine.speculate import accepted
from service.messages import TokenLogprob


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """Results of a step, in the order of the plan."""

    # The tokens of each of `plan.sampling`: accepted drafts, and one; none if its grammar failed.
    runs: list[list[int]]
    logprobs: list[abc.Sequence[TokenLogprob]]  # of each run; empty if not requested
    prompt_logprobs: dict[Sequence, list[tuple[int, TokenLogprob]]]  # -> (position, score)
    replaced: dict[Sequence, Guide]  # those whose token is another one than the runner's


def unpack(plan: Plan, output: StepOutput) -> StepResult:
    """Splits the rows of a step's output by sequence."""
    sampled: list[int] = output.tokens_R.tolist()
    runs = [[token] for token in sampled] if not plan.drafts else _unpack_runs(plan, sampled)
    replaced = _choose_open(plan, runs, output)
    logprobs: list[abc.Sequence[TokenLogprob]] = [()] * len(runs)
    if output.logprobs_R.size:
        logprobs = _unpack_logprobs(plan, runs, output)
    scores = _unpack_scores(plan, output)
    return StepResult(runs=runs, logprobs=logprobs, prompt_logprobs=scores, replaced=replaced)


def _choose_open(plan: Plan, runs: list[list[int]], output: StepOutput) -> dict[Sequence, Guide]:
    """Replaces the argmax of open rows by that among the tokens that their grammars allow. Returns
    the sequences whose token is then another one.
    """
    replaced = {}
    owned = dict(zip(plan.sampling, runs, strict=True))
    for (sequence, guide), logits_V in zip(plan.opened.items(), output.open_logits_LV, strict=True):
        run = owned[sequence]
        if sequence.is_alive and (token := guide.choose(run[0], logits_V)) != run[0]:
            run[:] = [] if token is None else [token]
            replaced[sequence] = guide
    return replaced


def _unpack_runs(plan: Plan, sampled: list[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    row = 0
    for sequence in plan.sampling:
        drafts = plan.drafts.get(sequence, [])
        num = accepted(drafts, sampled[row : row + len(drafts)])
        runs.append(sampled[row : row + num])
        row += 1 + len(drafts)
    return runs


def _unpack_logprobs(
    plan: Plan, runs: list[list[int]], output: StepOutput
) -> list[abc.Sequence[TokenLogprob]]:
    logprobs: list[abc.Sequence[TokenLogprob]] = []
    row = 0
    for sequence, run in zip(plan.sampling, runs, strict=True):
        num_top = sequence.request.sampling.top_logprobs
        rows = range(0) if num_top is None else range(row, row + len(run))
        logprobs.append(
            [
                _logprob(
                    output.logprobs_R[index],
                    output.top_ids_RN[index, :num_top],
                    output.top_logprobs_RN[index, :num_top],
                )
                for index in rows
            ]
        )
        row += 1 + len(plan.drafts.get(sequence, ()))
    return logprobs


def _unpack_scores(
    plan: Plan, output: StepOutput
) -> dict[Sequence, list[tuple[int, TokenLogprob]]]:
    scores: dict[Sequence, list[tuple[int, TokenLogprob]]] = {}
    row = 0
    for sequence, positions in plan.scored.items():
        num_top = sequence.request.prompt_logprobs or 0
        for position in positions:
            score = _logprob(
                output.score_logprobs_Q[row],
                output.score_top_ids_QN[row, :num_top],
                output.score_top_logprobs_QN[row, :num_top],
            )
            scores.setdefault(sequence, []).append((position, score))
            row += 1
    return scores


def _logprob(logprob: np.float32, top_ids_N: Ints, top_logprobs_N: Floats) -> TokenLogprob:
    return TokenLogprob(
        float(logprob), tuple(zip(top_ids_N.tolist(), top_logprobs_N.tolist(), strict=True))
    )
