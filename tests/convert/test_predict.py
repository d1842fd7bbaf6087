"""Predicted and measured error: equal where the assumptions hold, close where little is lost."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.decoders import make_attention, random_inputs
from support.layer_codes import (
    code_moments,
    code_of,
    error,
    grouping_of,
    identity_code,
    measure,
    output,
    predicted,
)
from torch import Tensor

from kvexport.calibrate import Moments
from kvexport.convert import keys, values
from kvexport.convert.apply import LayerCode, apply_code
from kvexport.convert.codes import Code, optimal_codes
from kvexport.convert.groups import Grouping
from kvexport.convert.methods import METHODS
from kvexport.model.decoder import Attention, Linear

STYLES = ("llama", "gqa", "bias", "qwen3", "bloom", "window")


def optimal_layer_code(
    moments: Moments, attention: Attention, grouping: Grouping, which: str, rank: int
) -> LayerCode:
    """Optimal codes of `rank`, up to t·d, for keys or for values; the other side is kept exactly."""
    n = grouping.size * grouping.head_dim
    codes: dict[str, tuple[Code, ...]] = dict.fromkeys(
        ("keys", "values"), (identity_code(n),) * grouping.kv_heads
    )

    def code(group: int) -> Code:
        rows = grouping.rows(group)
        if which == "keys":
            return optimal_codes(
                keys.query_weights(moments, grouping, group), moments.key_covariance(rows)
            ).code(rank)
        weights = values.output_weights(moments, attention, grouping, group)
        return optimal_codes(weights, moments.value_covariance(rows)).code(rank)

    codes[which] = tuple(code(group) for group in range(grouping.kv_heads))
    return LayerCode(codes["keys"], codes["values"], folds=False, centred=True)


def predicted_and_measured(
    attention: Attention, x: Tensor, code: LayerCode, kv_heads: int, method: str = "online"
) -> tuple[float, float]:
    value_mean = code_moments(attention, x).moments.value_mean
    converted = apply_code(attention, grouping_of(attention, kv_heads), code, value_mean)
    return predicted(attention, x, method, kv_heads, code), error(converted, attention, x)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("which", ["keys", "values"])
@pytest.mark.parametrize("seed", range(3))
def test_small_errors_are_predicted_within_a_factor(style: str, which: str, seed: int) -> None:
    attention = make_attention(style, seed=seed, sharpness=2.0)
    x = random_inputs(12, 32, seed=seed)
    kv_heads = attention.num_kv_heads // 2
    code = optimal_layer_code(
        measure(attention, x), attention, grouping_of(attention, kv_heads), which, rank=12
    )
    predicted_error, measured = predicted_and_measured(attention, x, code, kv_heads)
    assert 1e-4 < measured < 0.2
    assert 1 / 1.5 < predicted_error / measured < 1.5


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("which", ["keys", "values"])
def test_random_errors_are_predicted_within_a_factor(style: str, which: str) -> None:
    """Codes with a small random error in every direction, independent of the moments."""
    attention = make_attention(style, seed=1, sharpness=2.0)
    x, kv_heads = random_inputs(12, 32), attention.num_kv_heads // 2
    generator = torch.Generator().manual_seed(0)

    def disturbed(size: float) -> tuple[Code, ...]:
        whole = identity_code(16)
        noise = [torch.randn(16, 16, generator=generator, dtype=torch.float64) for _ in range(kv_heads)]
        return tuple(Code(whole.encode, whole.decode + size * each) for each in noise)

    sizes = {"keys": 0.0, "values": 0.0, which: 0.01}
    code = LayerCode(disturbed(sizes["keys"]), disturbed(sizes["values"]), folds=False, centred=True)
    predicted_error, measured = predicted_and_measured(attention, x, code, kv_heads)
    assert measured > 1e-4
    assert 1 / 2 < predicted_error / measured < 2  # the prediction ignores correlations between heads


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("method", METHODS)
def test_value_error_is_exact_for_windows_of_one_token(style: str, method: str) -> None:
    """One group, attention weight 1: errors of tokens are not added, and logits have no influence."""
    attention = make_attention(style)
    if attention.k_norm is not None and method == "fold":
        return
    x = random_inputs(64, 1)
    _, code = code_of(method, attention, x, 1)
    predicted_error, measured = predicted_and_measured(attention, x, code, 1, method)
    assert predicted_error == pytest.approx(measured, rel=1e-9)


@pytest.mark.parametrize("style", ["llama", "gqa", "bloom"])
@pytest.mark.parametrize("method", ["online", "mean-pool"])
def test_value_error_is_correct_for_independent_tokens(style: str, method: str) -> None:
    """Independent inputs and attention that ignores them (W_Q = 0): exact up to sampling."""
    attention = make_attention(style)
    attention = replace(attention, q=Linear(torch.zeros_like(attention.q.weight)))
    x = random_inputs(400, 8)
    _, code = code_of(method, attention, x, 1)
    predicted_error, measured = predicted_and_measured(attention, x, code, 1, method)
    assert predicted_error == pytest.approx(measured, rel=0.03)


def test_predicts_the_mean_that_uncentred_codes_lose() -> None:
    """With nearly constant values mean-pool loses mainly the mean, which attention does not average out."""
    attention = make_attention("bias")
    attention = replace(attention, v=Linear(0.05 * attention.v.weight, attention.v.bias))
    x = random_inputs(6, 16)
    _, code = code_of("mean-pool", attention, x, 2)
    predicted_error, measured = predicted_and_measured(attention, x, code, 2, "mean-pool")
    assert measured > 3
    assert predicted_error == pytest.approx(measured, rel=0.05)
    without_mean = predicted(attention, x, "mean-pool", 2, replace(code, centred=True))
    assert without_mean < measured / 3


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("seed", range(3))
def test_prediction_ranks_methods_as_measured(style: str, seed: int) -> None:
    """Two methods whose measured errors differ by a third are predicted in the same order."""
    attention = make_attention(style, seed=seed, sharpness=2.0)
    x, kv_heads = random_inputs(8, 32, seed=seed), attention.num_kv_heads // 2
    errors = []
    for method in METHODS:
        if attention.k_norm is None or method != "fold":
            _, code = code_of(method, attention, x, kv_heads)
            errors.append(predicted_and_measured(attention, x, code, kv_heads, method))
    compared = 0
    for predicted_error, measured in errors:
        for other_predicted, other_measured in errors:
            if measured < other_measured / 1.33:
                compared += 1
                assert predicted_error < other_predicted
    assert compared


def test_identity_codes_have_no_predicted_error() -> None:
    attention = make_attention("gqa")
    x, whole = random_inputs(2, 8), (identity_code(16),)
    predicted_error, measured = predicted_and_measured(attention, x, LayerCode(whole, whole, False, True), 1)
    assert predicted_error < 1e-12
    assert measured < 1e-12


def test_output_weights_equal_plain_sums() -> None:
    """S_hh' = Σ ρ_qq' W_qᵀ W_q' over the query heads of the members h and h'."""
    attention = make_attention("gqa", heads=8, kv_heads=4)
    moments, grouping = measure(attention, random_inputs(3, 12)), grouping_of(attention, 2)
    for group in range(2):
        expected = torch.zeros(16, 16, dtype=torch.float64)
        for a in grouping.query_heads(group):
            for b in grouping.query_heads(group):
                w_a, w_b = (attention.o.weight[:, 8 * each : 8 * each + 8] for each in (a, b))
                expected[grouping.member(a), grouping.member(b)] += moments.overlap[a, b] * w_a.T @ w_b
        torch.testing.assert_close(values.output_weights(moments, attention, grouping, group), expected)


def test_lost_constant_is_the_change_of_the_output() -> None:
    attention = make_attention("gqa", heads=8, kv_heads=4)
    x = random_inputs(3, 12)
    moments, code = code_of("mean-pool", attention, x, 2)
    constant = replace(attention, v=Linear(torch.zeros_like(attention.v.weight), moments.value_mean))
    converted = apply_code(constant, grouping_of(attention, 2), code, moments.value_mean)
    change = output(constant, x) - output(converted, x)
    lost = values.lost_constant(attention, grouping_of(attention, 2), code.values, moments.value_mean)
    torch.testing.assert_close(change, lost.expand_as(change), rtol=0, atol=1e-12)
