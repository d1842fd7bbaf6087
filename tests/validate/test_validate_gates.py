"""Each measure of a difference is correct, and each gate can fail alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from kvexport.validate import ValidationReport, judge
from kvexport.validate.gates import GATES, Gate, compare, greedy_agreement

GATE = Gate(cosine=0.99, norm_ratio=0.05, max_error=0.5, agreement=0.9, tie=0.01)
REFERENCE = np.random.default_rng(0).standard_normal((12, 64)).astype(np.float32)


def _edited(
    edit: Callable[[NDArray[np.float32]], object], reference: NDArray[np.float32] = REFERENCE
) -> NDArray[np.float32]:
    copy = reference.copy()
    edit(copy)
    return copy


def test_equal_arrays_have_no_difference() -> None:
    found = compare("x", REFERENCE, REFERENCE, GATES["float32"])
    assert found.cosine == pytest.approx(1) and found.norm_ratio == pytest.approx(1)
    assert (found.max_error, found.failed) == (0, ())


def test_a_longer_vector_fails_the_norm_ratio_alone() -> None:
    found = compare("x", _edited(lambda x: np.multiply(x[3], 1.06, out=x[3])), REFERENCE, GATE)
    assert found.failed == ("norm_ratio",)
    assert found.norm_ratio == pytest.approx(1.06) and found.cosine == pytest.approx(1)


def test_a_shorter_vector_fails_the_norm_ratio_alone() -> None:
    found = compare("x", _edited(lambda x: np.multiply(x[3], 0.94, out=x[3])), REFERENCE, GATE)
    assert found.failed == ("norm_ratio",) and found.norm_ratio == pytest.approx(0.94)


def test_a_rotated_vector_fails_the_cosine_alone() -> None:
    """One token of twelve, rotated by a fifth of a radian, of equal length."""
    token = REFERENCE[5].astype(np.float64)
    across = np.random.default_rng(1).choice([-1.0, 1.0], 64)
    across -= across @ token / (token @ token) * token
    across *= np.linalg.norm(token) / np.linalg.norm(across)
    turned = np.cos(0.2) * token + np.sin(0.2) * across
    found = compare("x", _edited(lambda x: np.copyto(x[5], turned.astype(np.float32))), REFERENCE, GATE)
    assert found.failed == ("cosine",) and found.cosine == pytest.approx(np.cos(0.2), abs=1e-5)


def test_one_wrong_number_fails_the_max_error_alone() -> None:
    rms = float(np.sqrt(np.mean(REFERENCE**2)))
    found = compare("x", _edited(lambda x: x.__setitem__((7, 9), x[7, 9] + 0.6 * rms)), REFERENCE, GATE)
    assert found.failed == ("max_error",) and found.max_error == pytest.approx(0.6, rel=1e-3)


def test_a_token_of_zero_norm_is_compared_by_its_error() -> None:
    reference = _edited(lambda x: x[2].fill(0))
    assert compare("x", reference, reference, GATE).failed == ()
    assert compare("x", _edited(lambda x: x[2].fill(1), reference), reference, GATE).failed == ("max_error",)
    nothing = np.zeros_like(reference)
    assert compare("x", nothing, nothing, GATE).failed == ()
    assert compare("x", nothing + 1, nothing, GATE).failed == ("max_error",)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_fails_every_gate(value: float) -> None:
    found = compare("x", _edited(lambda x: x.__setitem__((7, 9), value)), REFERENCE, GATES["bfloat16"])
    assert found.failed == ("cosine", "norm_ratio", "max_error")


def test_greedy_agreement_counts_equal_choices() -> None:
    logits = _edited(lambda x: x.__setitem__((slice(None), 4), 9))
    assert greedy_agreement(logits, logits, GATE) == 1
    other = _edited(lambda x: x.__setitem__((slice(0, 3), 5), 10), logits)
    assert greedy_agreement(other, logits, GATE) == 9 / 12


def test_a_tie_agrees_and_a_lead_does_not() -> None:
    reference = np.zeros((1, 98), np.float32)
    reference[0, :2] = (7.0, 6.991)  # root mean square 1
    flipped = _edited(lambda x: x.__setitem__((0, 1), 8), reference)
    assert greedy_agreement(flipped, reference, GATE) == 1
    assert greedy_agreement(flipped, reference, dataclasses.replace(GATE, tie=0.005)) == 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_agree_with_nothing(value: float) -> None:
    best = int(REFERENCE[0].argmax())
    logits = _edited(lambda x: x.__setitem__((0, best), value))
    assert greedy_agreement(logits, REFERENCE, GATE) == 11 / 12


def _judged(
    edit: Callable[[NDArray[np.float32]], object], name: str, dtype: str = "float32"
) -> ValidationReport:
    reference = {"input_ids": np.arange(12), "logits": REFERENCE, "layers.0.key": REFERENCE}
    return judge(dtype, dtype, {**reference, name: _edited(edit)}, reference, 1)


def test_a_failure_names_the_array_the_gate_and_the_bound() -> None:
    report = _judged(lambda x: np.multiply(x[3], 1.0005, out=x[3]), "layers.0.key")
    assert report.failures[0] == "layers.0.key: norm_ratio 1.0005, allowed 1 ± 0.0002"
    assert all(failure.startswith("layers.0.key") for failure in report.failures)
    assert _judged(lambda x: np.multiply(x[3], 1.0001, out=x[3]), "layers.0.key").failures == ()
    assert _judged(lambda x: np.multiply(x[3], 1.0005, out=x[3]), "layers.0.key", "float16").failures == ()


def test_greedy_agreement_can_fail_alone() -> None:
    """Logits so close that another order of the largest passes every other gate of bfloat16."""
    reference = np.full((12, 64), 5.0, np.float32)
    reference[:, 0] = 6.0
    measured = reference.copy()
    measured[:, 1] = 6.5
    reference = {"input_ids": np.arange(12), "logits": reference}
    report = judge("bfloat16", "float32", {**reference, "logits": measured}, reference, 1)
    assert not any(each.failed for each in report.differences)
    assert report.failures == ("greedy agreement 0.0000, allowed at least 0.9",)


def test_the_json_report_has_null_for_nan() -> None:
    report = _judged(lambda x: x.fill(np.nan), "logits")
    text = json.dumps(report.to_json(), allow_nan=False)
    (logits,) = (each for each in json.loads(text)["differences"] if each["name"] == "logits")
    assert logits["cosine"] is None and logits["failed"] == ["cosine", "norm_ratio", "max_error"]


def test_the_worst_of_a_kind_has_the_smallest_cosine_and_nan_is_worst() -> None:
    reference = {
        "input_ids": np.arange(12),
        "logits": REFERENCE,
        **{f"layers.{layer}.key": REFERENCE for layer in range(3)},
    }
    noisy = _edited(lambda x: np.add(x, 0.1, out=x))
    assert (
        judge("float32", "float32", {**reference, "layers.1.key": noisy}, reference, 1).worst("key").name
        == "layers.1.key"
    )
    broken = {**reference, "layers.1.key": noisy, "layers.2.key": REFERENCE * np.nan}
    assert judge("float32", "float32", broken, reference, 1).worst("key").name == "layers.2.key"


def test_gates_are_wider_for_coarser_dtypes() -> None:
    order = [GATES[dtype] for dtype in ("float32", "float16", "bfloat16")]
    for tight, wide in pairwise(order):
        assert (
            tight.cosine > wide.cosine
            and tight.norm_ratio < wide.norm_ratio
            and tight.max_error < wide.max_error
        )
        assert tight.agreement >= wide.agreement and tight.tie < wide.tie
