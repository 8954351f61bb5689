"""Two promises of the CPU engine, measured over HTTP with the real model.

python -m loadtest.cpu_promises [--model FILE] [--repeats 3]

gap        streams run; a prompt of thousands of tokens comes in. What the prompt's chunks cost
           the others is the time between two of their tokens, which has a target.
drafts     one client, with and without drafts, in turns: text that copies itself must come
           faster, and free text hardly slower. Ratios of neighbouring runs, so that what else
           happens on the machine meets both.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from loadtest.client import Outcome, Target, arrive, complete, percentile
from loadtest.peers import SERVERS
from loadtest.servers import Plan, Running, running
from loadtest.workloads import make_prompt, make_prompts
from model.checkpoint.fetch import default_cache, resolve

_STREAMS = 8
_LONG = 4000  # tokens of the prompt that comes in between
_SENTENCE = "The quick brown fox jumps over the lazy dog and runs into the forest. "
_COPIES: Mapping[str, object] = {}
_FREE: Mapping[str, object] = {"temperature": 1.0, "seed": 7}


async def measure_gap(target: Target, *, seed: str) -> tuple[list[float], list[float], float]:
    """Gaps of the running streams before the long prompt came and while it was computed, and the
    long prompt's time to its first token.
    """
    prompts = [*make_prompts(seed, count=_STREAMS, num_tokens=64)]
    prompts.append(make_prompt(f"{seed}/long", num_tokens=_LONG))
    started = time.perf_counter()
    outcomes, _ = await arrive(
        target, prompts, times=[0.0] * _STREAMS + [1.0], max_tokens=600, patience=120.0
    )
    long = outcomes[-1]
    check(outcomes)
    begins, ends = long.sent, long.arrivals[0]
    before: list[float] = []
    during: list[float] = []
    for outcome in outcomes[:-1]:
        for gap, at in zip(outcome.gaps, outcome.arrivals[1:], strict=True):
            if begins <= at <= ends:
                during.append(gap)
            elif started + 0.5 < at < begins:
                before.append(gap)
    return before, during, ends - begins


async def rate(target: Target, prompt: str, fields: Mapping[str, object]) -> float:
    """Tokens a second of one stream, after its first."""
    target = replace(target, fields=dict(target.fields) | dict(fields))
    outcome = await complete(target, prompt, max_tokens=256)
    check([outcome])
    return 1 / outcome.time_per_token


def check(outcomes: Sequence[Outcome]) -> None:
    """Raises SystemExit where a request was not answered whole."""
    errors = {outcome.error for outcome in outcomes if outcome.error}
    if errors:
        raise SystemExit(f"not measured: {', '.join(sorted(errors))}")


def print_gaps(server: Running, *, repeats: int) -> None:
    """One row a repeat."""
    print(f"gaps in ms: {_STREAMS} streams, then a prompt of {_LONG} tokens (target 60)")
    print("                  before               while it is computed        its first token")
    for repeat in range(repeats):
        before, during, first = asyncio.run(measure_gap(server.target, seed=f"gap/{repeat}"))
        quiet = "/".join(f"{percentile(before, p) * 1e3:5.1f}" for p in (50, 99))
        busy = "/".join(f"{percentile(during, p) * 1e3:5.1f}" for p in (50, 99, 100))
        print(f"p50/p99 {quiet:>18}   p50/p99/max {busy:>20} {first:>14.2f} s")


def print_drafts(drafting: Running, plain: Running, *, repeats: int) -> None:
    """One row a kind of text: the median of the ratios, and their range."""
    kinds = {
        "copies": (_SENTENCE * 8, _COPIES),
        "free text": (make_prompt("free", num_tokens=100), _FREE),
    }
    print("\nspeed with drafts / without, 1 client")
    for name, (prompt, fields) in kinds.items():
        ratios = []
        for repeat in range(2 * repeats):
            pair = [drafting, plain] if repeat % 2 else [plain, drafting]
            text = f"{repeat} {prompt}"
            rates = {id(s): asyncio.run(rate(s.target, text, fields)) for s in pair}
            ratios.append(rates[id(drafting)] / rates[id(plain)])
        print(
            f"{name:12} {statistics.median(ratios):5.2f}   ({min(ratios):.2f} to {max(ratios):.2f})"
        )


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        plan = Plan(
            model=resolve(options.model, cache=default_cache()),
            threads=2,
            clients=_STREAMS + 1,
            context=_LONG + 700,
            folder=Path(folder),
        )
        with running(SERVERS["quire"], plan) as drafting:
            print_gaps(drafting, repeats=options.repeats)
            with running(SERVERS["quire-plain"], plan) as plain:
                print_drafts(drafting, plain, repeats=options.repeats)


if __name__ == "__main__":
    main()
