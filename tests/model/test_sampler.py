"""Sampler: its distribution against exact probabilities, its bits alone against in a batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from model.batch import Ints, SamplingBatch, Seeds
from model.philox import philox4x32, uniforms
from model.sampler import SampledRows, sample, score
from tests.support.builders import at_length, slowly

INF = math.inf


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row's parameters, as a client would give them."""

    seed: int = 0
    choice: int = 0
    index: int = 0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0
    seen: Mapping[int, int] = field(default_factory=dict)  # token -> times in the answer
    bias: Sequence[tuple[int, float]] = ()
    logprobs: bool = False


def make_sampling(rows: Sequence[Row], *, vocab_size: int, num_top: int = 0) -> SamplingBatch:
    def column(values: list[Any], dtype: type) -> npt.NDArray[Any]:
        return np.array(values, dtype=dtype)

    seen = [(i, token, n) for i, row in enumerate(rows) for token, n in row.seen.items()]
    bias = [(i, token, value) for i, row in enumerate(rows) for token, value in row.bias]
    return SamplingBatch(
        seeds_R=column([row.seed for row in rows], np.uint64),
        choices_R=column([row.choice for row in rows], np.int32),
        indices_R=column([row.index for row in rows], np.int32),
        temperatures_R=column([row.temperature for row in rows], np.float32),
        top_ks_R=column([vocab_size if row.top_k is None else row.top_k for row in rows], np.int32),
        top_ps_R=column([row.top_p for row in rows], np.float32),
        min_ps_R=column([row.min_p for row in rows], np.float32),
        presence_R=column([row.presence for row in rows], np.float32),
        frequency_R=column([row.frequency for row in rows], np.float32),
        repetition_R=column([row.repetition for row in rows], np.float32),
        penalty_rows_P=column([entry[0] for entry in seen], np.int32),
        penalty_ids_P=column([entry[1] for entry in seen], np.int32),
        penalty_counts_P=column([entry[2] for entry in seen], np.int32),
        bias_rows_E=column([entry[0] for entry in bias], np.int32),
        bias_ids_E=column([entry[1] for entry in bias], np.int32),
        bias_values_E=column([entry[2] for entry in bias], np.float32),
        wants_logprobs_R=column([row.logprobs for row in rows], np.bool_),
        num_top=num_top,
    )


def draw(logits_RV: torch.Tensor, rows: Sequence[Row], *, num_top: int = 0) -> SampledRows:
    return sample(logits_RV, make_sampling(rows, vocab_size=logits_RV.shape[-1], num_top=num_top))


def twin(logits: Sequence[float], row: Row) -> list[float]:
    """The exact probabilities of one row, in plain Python and double precision."""
    x = list(logits)
    for token, value in row.bias:
        x[token] += value
    for token, count in row.seen.items():
        x[token] = x[token] / row.repetition if x[token] > 0 else x[token] * row.repetition
        x[token] -= row.frequency * count + row.presence * (count > 0)
    order = sorted(range(len(x)), key=lambda token: (-x[token], token))
    if row.temperature == 0:
        return [float(token == order[0]) for token in range(len(x))]
    largest = max(x)
    weights = [math.exp((value - largest) / row.temperature) for value in x]
    kept = [token for token in order if weights[token] >= row.min_p][: row.top_k]
    mass, run = sum(weights[token] for token in kept), 0.0
    nucleus: list[int] = []
    for token in kept:
        if nucleus and run >= row.top_p * mass:
            break
        nucleus.append(token)
        run += weights[token]
    left = frozenset(nucleus)
    return [weights[token] / run if token in left else 0.0 for token in range(len(x))]


LOGITS = (1.5, -0.3, 0.9, 0.9, -2.0, 0.1, 2.2, -0.7)
FULL = Row(
    temperature=1.2, top_k=6, top_p=0.8, min_p=0.05, presence=0.3, frequency=0.2, repetition=1.3,
    seen={6: 2, 1: 1, 0: 0}, bias=((4, 2.5), (2, -INF)),
)  # fmt: skip
PARAMETERS = {
    "plain": Row(),
    "hot": Row(temperature=2.5),
    "cold": Row(temperature=0.4),
    "top_k": Row(top_k=3),
    "top_p": Row(top_p=0.75),
    "min_p": Row(min_p=0.2),
    "top_k_top_p": Row(top_k=5, top_p=0.6),
    "min_p_top_p": Row(min_p=0.25, top_p=0.7),
    "presence": Row(presence=1.5, seen={6: 2, 1: 1, 0: 0}),
    "frequency": Row(frequency=0.8, seen={6: 2, 1: 1, 0: 0}),
    "repetition": Row(repetition=1.7, seen={6: 2, 1: 1, 0: 0}),
    "bias": Row(bias=((4, 3.0), (6, -1.0), (0, -INF))),
    "all": FULL,
}


def chi_square_bound(degrees: int) -> float:
    """A bound that a true distribution breaks less than once in 10**5 (Wilson and Hilferty)."""
    spread = 2 / (9 * degrees)
    return float(degrees * (1 - spread + 4.3 * math.sqrt(spread)) ** 3)


@pytest.mark.parametrize("name", PARAMETERS)
def test_tokens_follow_the_exact_distribution(name: str) -> None:
    row, count = PARAMETERS[name], 20_000
    expected = twin(LOGITS, row)
    sampling = make_sampling([row] * count, vocab_size=len(LOGITS))
    fields = {name: getattr(sampling, name) for name in SamplingBatch.__slots__}
    fields["indices_R"] = np.arange(count, dtype=np.int32)
    tokens = sample(torch.tensor(LOGITS).repeat(count, 1), SamplingBatch(**fields)).tokens_R
    found = np.bincount(tokens.numpy(), minlength=len(LOGITS))
    possible = [token for token, p in enumerate(expected) if p > 0]
    assert found[possible].sum() == count, "a token was drawn that the cuts forbid"
    chi_square = sum(
        (found[t] - count * expected[t]) ** 2 / (count * expected[t]) for t in possible
    )
    assert chi_square < chi_square_bound(len(possible) - 1)


def random_row(rng: np.random.Generator, vocab_size: int) -> Row:
    def maybe(make: Callable[[], Any], other: Any) -> Any:
        return make() if rng.random() < 0.5 else other

    seen = rng.choice(vocab_size, size=5, replace=False)
    return Row(
        seed=int(rng.integers(2**64, dtype=np.uint64)),
        choice=int(rng.integers(4)),
        index=int(rng.integers(1000)),
        temperature=float(rng.choice([0.0, 1e-4, 0.7, 1.0, 3.0])),
        top_k=maybe(lambda: int(rng.integers(1, vocab_size + 1)), None),
        top_p=maybe(lambda: float(rng.random()), 1.0),
        min_p=maybe(lambda: float(rng.random() ** 4), 0.0),
        presence=maybe(lambda: float(rng.normal()), 0.0),
        frequency=maybe(lambda: float(rng.normal()), 0.0),
        repetition=maybe(lambda: float(rng.uniform(0.5, 2)), 1.0),
        seen=maybe(lambda: {int(token): int(rng.integers(4)) for token in seen}, {}),
        bias=maybe(
            lambda: [(int(token), float(rng.choice([-INF, -2.0, 5.0]))) for token in seen[:3]], ()
        ),
        logprobs=bool(rng.random() < 0.5),
    )


@pytest.mark.parametrize("seed", [*range(12), *slowly(*range(12, 20)), *at_length(*range(20, 60))])
def test_a_row_alone_has_the_bits_it_has_in_a_batch(seed: int) -> None:
    rng = np.random.default_rng(seed)
    vocab_size = int(rng.choice([9, 200, 1003, 6000]))
    rows = [random_row(rng, vocab_size) for _ in range(17)]
    # Rounded, so that equals are common and ties are decided too.
    logits = torch.from_numpy(rng.normal(scale=2, size=(17, vocab_size)).round(1)).float()
    together = draw(logits, rows, num_top=3)
    for i, row in enumerate(rows):
        alone = draw(logits[i : i + 1].clone(), [row], num_top=3)
        assert together.tokens_R[i] == alone.tokens_R[0]
        if row.logprobs:
            assert torch.equal(together.logprobs_R[i], alone.logprobs_R[0])
            assert torch.equal(together.top_ids_RN[i], alone.top_ids_RN[0])
            assert torch.equal(together.top_logprobs_RN[i], alone.top_logprobs_RN[0])


@pytest.mark.slow
def test_threads_change_no_bit() -> None:
    rng = np.random.default_rng(1)
    logits = torch.from_numpy(rng.normal(size=(6, 49_157))).float()
    rows = [Row(seed=i, top_p=0.9 if i % 2 else 1.0, logprobs=True) for i in range(6)]
    before = torch.get_num_threads()
    try:
        outputs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outputs.append(draw(logits, rows, num_top=2))
    finally:
        torch.set_num_threads(before)
    for output in outputs[1:]:
        assert torch.equal(output.tokens_R, outputs[0].tokens_R)
        assert torch.equal(output.logprobs_R, outputs[0].logprobs_R)
        assert torch.equal(output.top_logprobs_RN, outputs[0].top_logprobs_RN)


def keys(seed: int) -> tuple[Seeds, Ints, Ints]:
    zero = np.zeros(1, np.int32)
    return np.array([seed], np.uint64), zero, zero


@pytest.mark.parametrize("seed", range(20))
def test_a_wide_nucleus_is_cut_as_exactly_as_a_narrow_one(seed: int) -> None:
    """Flat logits over 6000 tokens go through every attempt at sorting; the twin sorts all."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=0.3, size=6000).astype(np.float32)
    top_k = [None, 4500, 3000, 100][seed % 4]
    row = Row(seed=seed, top_p=float(rng.uniform(0.01, 1)), top_k=top_k)
    token = int(draw(torch.from_numpy(logits)[None], [row]).tokens_R[0])
    probabilities = np.array(twin([float(value) for value in logits], row))
    order = np.lexsort((np.arange(6000), -logits))
    share = float(uniforms(*keys(seed))[0])
    place = int(np.searchsorted(np.cumsum(probabilities[order]), share, side="right"))
    # Rounding of float32 weights may move the border of a share of 1/4000 by a place.
    assert token in order[max(0, place - 1) : place + 2]


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = torch.tensor([[0.0, 5.0, 5.0, 1.0], [-0.0, 0.0, -1.0, -0.0], [2.0, 2.0, 2.0, 2.0]])
    assert draw(logits, [Row(temperature=0)] * 3).tokens_R.tolist() == [1, 0, 0]


def test_minus_zero_equals_zero_when_sorted_too() -> None:
    logits = torch.tensor([[-1.0, -0.0, 0.0, -0.0]])
    for cut in (Row(top_k=1), Row(top_p=0.1), Row(temperature=0)):
        assert draw(logits, [cut]).tokens_R.tolist() == [1]


@pytest.mark.parametrize("share", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("row", [Row(), Row(top_p=0.999), Row(top_k=4), Row(min_p=0.01)])
def test_the_ends_of_the_interval_draw_nothing_forbidden(
    share: float, row: Row, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such draws come once in 2**53 rows: they are forced here, because no seed is known."""
    monkeypatch.setattr("model.sampler.uniforms", lambda seeds, choices, indices: np.array([share]))
    banned = Row(**{**vars(row), "bias": [(token, -INF) for token in (0, 1, 5, 6)]})
    tokens = draw(torch.zeros(1, 7), [banned]).tokens_R.tolist()
    assert tokens == ([2] if share == 0 else [4])


@pytest.mark.parametrize(
    "row", [Row(top_p=1e-6), Row(top_p=0.0), Row(top_k=1), Row(temperature=1e-4), Row(min_p=1.0)]
)
def test_the_narrowest_cuts_are_greedy(row: Row) -> None:
    logits = torch.randn(64, 300, generator=torch.Generator().manual_seed(3))
    rows = [Row(**{**vars(row), "seed": i}) for i in range(64)]
    assert torch.equal(draw(logits, rows).tokens_R, logits.argmax(-1))


def test_tiny_temperatures_neither_overflow_nor_hang() -> None:
    logits = torch.tensor([[1e4, -1e4, 1e4 - 1, 0.0]])
    for temperature in (1e-38, 1e-45, 1e-4):
        assert draw(logits, [Row(temperature=temperature)]).tokens_R.tolist() == [0]


def test_top_k_above_the_vocabulary_cuts_nothing() -> None:
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(5))
    for seed in range(50):
        plain = draw(logits, [Row(seed=seed)])
        above = draw(logits, [Row(seed=seed, top_k=10**6)])
        assert torch.equal(plain.tokens_R, above.tokens_R)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_where_everything_is_forbidden_the_likeliest_is_taken(
    temperature: float, top_p: float
) -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [0.0, 3.0, 1.0]])
    forbidden = Row(
        temperature=temperature,
        top_p=top_p,
        bias=[(token, -INF) for token in range(3)],
        logprobs=True,
    )
    only_last = Row(temperature=temperature, top_p=top_p, bias=[(0, -INF), (1, -INF)])
    output = draw(logits, [forbidden, only_last])
    assert output.tokens_R.tolist() == [1, 2]
    assert output.logprobs_R[0].isfinite()


def test_a_ban_holds_beside_another_bias_on_the_same_token() -> None:
    row = Row(temperature=0, bias=((1, 50.0), (1, -INF), (2, 0.5)))
    assert draw(torch.tensor([[0.0, 3.0, 1.0]]), [row]).tokens_R.tolist() == [2]


@pytest.mark.parametrize("seed", range(30))
def test_greedy_after_penalties_agrees_with_the_twin(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=2, size=(5, 40)).astype(np.float32)
    rows = [Row(**{**vars(random_row(rng, 40)), "temperature": 0.0}) for _ in range(5)]
    tokens = draw(torch.from_numpy(logits), rows).tokens_R.tolist()
    for values, row, token in zip(logits, rows, tokens, strict=True):
        assert twin([float(value) for value in values], row)[token] == 1


def test_the_same_key_draws_the_same_and_another_key_another() -> None:
    seeds, choices, indices = np.meshgrid(
        np.array([0, 1, 2**32, 2**63], np.uint64), np.arange(4), np.arange(200), indexing="ij"
    )
    columns = (seeds.ravel(), choices.ravel().astype(np.int32), indices.ravel().astype(np.int32))
    numbers = uniforms(*columns)
    again = uniforms(columns[0][::-1], columns[1][::-1], columns[2][::-1])
    assert np.array_equal(numbers, again[::-1])
    assert len(np.unique(numbers)) == numbers.size
    assert numbers.min() >= 0
    assert numbers.max() < 1
    by_key = numbers.reshape(4, 4, 200)
    for axis in range(3):
        left, right = np.delete(by_key, -1, axis), np.delete(by_key, 0, axis)
        # 5 standard errors of a correlation of independent numbers
        assert abs(np.corrcoef(left.ravel(), right.ravel())[0, 1]) < 5 / math.sqrt(left.size)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_known_answers(counter: list[int], key: list[int], words: str) -> None:
    """The vectors that Random123 publishes for philox4x32-10."""
    counter_41 = np.array(counter, np.uint64)[:, None]
    found = philox4x32(counter_41, np.array(key, np.uint64)[:, None])[:, 0]
    assert " ".join(f"{word:08x}" for word in found) == words


def test_log_probabilities_are_of_the_unmodified_logits() -> None:
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(7)) * 3
    copy = logits.clone()
    rows = [Row(**{**vars(FULL), "seed": i, "logprobs": i != 2}) for i in range(4)]
    output = draw(logits, rows, num_top=5)
    expected = copy.double().log_softmax(-1)
    for i in (0, 1, 3):
        chosen = expected[i, output.tokens_R[i]]
        torch.testing.assert_close(output.logprobs_R[i].double(), chosen, rtol=0, atol=2e-6)
        values, ids = expected[i].sort(descending=True, stable=True)
        assert output.top_ids_RN[i].tolist() == ids[:5].tolist()
        torch.testing.assert_close(
            output.top_logprobs_RN[i].double(), values[:5], rtol=0, atol=2e-6
        )
    assert torch.equal(logits, copy)


def test_without_takers_there_are_no_log_probabilities() -> None:
    output = draw(torch.zeros(2, 4), [Row(), Row()])
    assert output.logprobs_R.shape == (0,)
    assert output.top_ids_RN.numel() == output.top_logprobs_RN.numel() == 0


def test_score_gives_the_given_tokens_and_no_more_than_the_vocabulary() -> None:
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(9)).bfloat16()
    expected = logits.double().log_softmax(-1)
    output = score(logits, np.array([5, 0, 2], np.int32), num_top=9)
    torch.testing.assert_close(
        output.logprobs_Q.double(), expected[[0, 1, 2], [5, 0, 2]], rtol=0, atol=2e-6
    )
    assert output.top_ids_QN.tolist() == [
        sorted(range(6), key=lambda token: (-row[token], token)) for row in expected.tolist()
    ]
    assert score(logits, np.array([5, 0, 2], np.int32), num_top=0).top_ids_QN.shape == (3, 0)
