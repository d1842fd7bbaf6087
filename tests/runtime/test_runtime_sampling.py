"""Draws follow the distribution of temperature, top-k and top-p, one by one and together."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvexport.errors import BundleError
from kvexport.runtime.sampling import Sampling, nucleus


def shares(logits: list[float], draws: int = 4000, **options: float) -> np.ndarray:
    """Frequency of each token."""
    sampling, generator = Sampling(**options), np.random.default_rng(0)  # type: ignore[arg-type]
    array = np.array(logits, np.float32)
    return (
        np.bincount([sampling.choose(array, generator) for _ in range(draws)], minlength=len(logits)) / draws
    )


def softmax(logits: list[float]) -> np.ndarray:
    weights = np.exp(np.array(logits) - max(logits))
    return weights / weights.sum()


LOGITS = [1.0, 3.0, -2.0, 2.5, 0.0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_frequencies_equal_the_softmax_at_the_temperature(temperature: float) -> None:
    expected = softmax([each / temperature for each in LOGITS])
    assert np.abs(shares(LOGITS, temperature=temperature) - expected).max() < 0.03


def test_top_k_keeps_the_likeliest() -> None:
    actual = shares(LOGITS, temperature=1.0, top_k=2)
    assert np.abs(actual[[1, 3]] - softmax([3.0, 2.5])).max() < 0.03 and actual[[0, 2, 4]].sum() == 0


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    probabilities = softmax(LOGITS)  # 0.079, 0.582, 0.004, 0.353, 0.029 or so
    assert (shares(LOGITS, temperature=1.0, top_p=probabilities[1] - 0.01) > 0).tolist() == [
        False,
        True,
        False,
        False,
        False,
    ]
    assert (shares(LOGITS, temperature=1.0, top_p=probabilities[1] + 0.01) > 0).tolist() == [
        False,
        True,
        False,
        True,
        False,
    ]
    assert (shares(LOGITS, temperature=1.0, top_p=1.0) > 0).all()


def test_top_p_counts_within_top_k() -> None:
    share = softmax([3.0, 2.5])[0]
    assert (shares(LOGITS, temperature=1.0, top_k=2, top_p=share - 0.01) > 0).sum() == 1
    assert (shares(LOGITS, temperature=1.0, top_k=2, top_p=share + 0.01) > 0).sum() == 2


def test_top_k_limits_equal_logits() -> None:
    assert (shares([0.0] * 10, temperature=1.0, top_k=3) > 0).tolist() == [True] * 3 + [False] * 7
    assert (shares([0.0] * 10, temperature=0.0) > 0).tolist() == [True] + [False] * 9


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(-120, 120).map(lambda n: n / 4), min_size=1, max_size=50, unique=True),
    st.floats(0.05, 5),
    st.integers(1, 60),
    st.floats(0.01, 1),
)
def test_draws_are_in_the_exact_nucleus(logits: list[float], temperature: float, k: int, p: float) -> None:
    array = np.array(logits, np.float32)
    order = np.argsort(-array, kind="stable")[:k]
    probabilities = softmax((array[order].astype(float) / temperature).tolist())
    allowed = set(order[: int(np.searchsorted(probabilities.cumsum(), p * (1 + 1e-9))) + 1].tolist())
    generator = np.random.default_rng(0)
    sampling = Sampling(temperature, k, p)
    assert {sampling.choose(array, generator) for _ in range(20)} <= allowed


def test_extreme_logits_and_temperatures() -> None:
    assert (shares([-np.inf, 0.0, -np.inf], draws=50, temperature=1.0, top_k=2) > 0).tolist() == [
        False,
        True,
        False,
    ]
    assert shares([0.0, 80.0], draws=50, temperature=1e-6)[1] == 1
    assert shares([5.0], draws=5, temperature=1.0, top_k=9, top_p=0.1)[0] == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rejects_logits_that_are_not_finite(bad: float, temperature: float) -> None:
    with pytest.raises(BundleError, match="must be finite"):
        Sampling(temperature).choose(np.array([0.0, bad, 1.0], np.float32), np.random.default_rng(0))


@pytest.mark.parametrize("size", [1, 5, 1024, 1025, 5000])
@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0, 5.0])
def test_nucleus_equals_a_full_sort(size: int, spread: float) -> None:
    """Vocabularies that are sorted in part only, flat and peaked."""
    weights = np.exp(np.random.default_rng(0).standard_normal(size) * spread)
    order = np.argsort(-weights, kind="stable")
    for share in (0.01, 0.5, 0.9, 0.999):
        mass = share * weights.sum()
        np.testing.assert_array_equal(
            nucleus(weights, mass), order[: int(weights[order].cumsum().searchsorted(mass)) + 1]
        )
