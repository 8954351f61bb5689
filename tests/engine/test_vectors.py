"""Results of encoding as text, and what is computed from them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from service.vectors import (
    cosines,
    from_text,
    probabilities,
    result_id,
    shortened,
    sigmoid,
    stacked,
    to_text,
)

FLOATS = st.floats(-100, 100, width=32)


@given(hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9)))
def test_results_come_back_from_their_texts_bit_by_bit(rows: np.ndarray) -> None:
    text = "".join(map(to_text, rows))
    back = from_text(text, count=len(rows))
    assert back.tobytes() == rows.tobytes()
    assert [*map(result_id, back)] == [*map(result_id, rows)]


def test_a_text_of_another_number_of_results_is_refused() -> None:
    text = to_text(np.zeros(5, np.float32))
    with pytest.raises(ValueError, match="2 results"):
        from_text(text[:-1], count=2)


@pytest.mark.slow
@given(hnp.arrays(np.float32, (3, 6), elements=FLOATS), st.integers(1, 7))
def test_what_is_shortened_has_length_1(rows: np.ndarray, dimensions: int) -> None:
    kept = shortened(rows, dimensions)
    if dimensions >= 6:
        assert kept is rows
        return
    assert kept.shape == (3, dimensions)
    for row, whole in zip(kept, rows, strict=True):
        length = math.sqrt(math.fsum(float(value) ** 2 for value in whole[:dimensions]))
        if length > 1e-20:
            assert np.allclose(row * np.float32(length), whole[:dimensions], rtol=1e-5, atol=1e-5)
            assert math.isclose(float(np.linalg.norm(row.astype(float))), 1, rel_tol=1e-6)


@pytest.mark.slow
@given(hnp.arrays(np.float32, (2, 5), elements=FLOATS), st.floats(0.5, 10))
def test_a_cosine_depends_on_directions_alone(rows: np.ndarray, factor: float) -> None:
    a, b = rows[:1], rows[1:]
    (cosine,) = cosines(a, b)
    assert -1 <= cosine <= 1
    assert cosines(b, a) == [cosine]
    if np.abs(a).max() > 1e-30:  # of smaller numbers a product has few bits
        (scaled,) = cosines(a * np.float32(factor), b)
        assert math.isclose(scaled, cosine, abs_tol=1e-5)
    (itself,) = cosines(a, a)
    assert math.isclose(itself, 1, rel_tol=1e-9) or not a.any() or itself == 0


def test_the_cosine_of_nothing_is_0() -> None:
    assert cosines(np.zeros((1, 3), np.float32), np.ones((1, 3), np.float32)) == [0.0]


@given(hnp.arrays(np.float32, st.integers(2, 6), elements=st.floats(-300, 300, width=32)))
def test_probabilities_sum_to_1_in_the_order_of_the_logits(logits: np.ndarray) -> None:
    found = probabilities(logits)
    assert math.isclose(math.fsum(found), 1, rel_tol=1e-9)
    assert found[int(logits.argmax())] == max(found)


def test_one_logit_is_a_sigmoid() -> None:
    assert probabilities(np.array([2.0], np.float32)) == [sigmoid(2.0)]
    assert math.isclose(sigmoid(-800.0), 0, abs_tol=1e-300)
    assert sigmoid(800.0) == 1.0
    assert math.isclose(sigmoid(1.5) + sigmoid(-1.5), 1)


def test_rows_of_parts_are_in_order() -> None:
    parts = [np.full((num, 2), num, np.float32) for num in (2, 1)]
    assert stacked(parts)[:, 0].tolist() == [2, 2, 1]
