"""Codes of trials, compared with the layer that these codes make when one side of the cache stays exact."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from support.decoders import STYLES, make_attention, random_inputs
from support.layer_codes import identity_code, output
from torch import Tensor

from kvexport.calibrate import MomentsAccumulator, windows
from kvexport.convert.apply import LayerCode, apply_code
from kvexport.convert.code_moments import make_code_moments
from kvexport.convert.groups import Grouping, KVShape
from kvexport.convert.losses import LayerLosses
from kvexport.convert.matching import order_of
from kvexport.convert.methods import METHODS, Method, in_layer, layer_code, methods_for, without_output_bias
from kvexport.convert.permute import permute_heads
from kvexport.convert.trials import Trial, make_trials
from kvexport.model.decoder import Attention, Linear
from kvexport.model.reference import linear

POSITIONS, WIDTH = 24, 8  # half of a pair of heads


def attention_of(style: str) -> Attention:
    """A layer in which KV heads 0 and 2 are alike."""
    attention = make_attention(
        style.removeprefix("clipped "), heads=8 if style == "gqa" else 4, kv_heads=4, seed=1, sharpness=2.0
    )
    alike = {}
    for name in ("k", "v"):
        linear = getattr(attention, name)
        weight = linear.weight.clone().view(4, 8, -1)
        weight[2] = weight[0] + 0.3 * weight[2]
        alike[name] = Linear(weight.flatten(0, 1), linear.bias)
    return replace(attention, clip=0.5 if style.startswith("clipped") else None, **alike)


def converted(attention: Attention, x: Tensor, method: Method, side: str) -> Tensor:
    """Output of the layer with codes on one side and identity codes on the other."""
    accumulator = MomentsAccumulator(attention)
    accumulator.add(x)
    code_moments = make_code_moments(method.before_rotation, accumulator.finish(), attention, POSITIONS)
    order = order_of(LayerLosses(code_moments, attention).match(method.before_rotation, 2, WIDTH, WIDTH))
    assert order == [0, 2, 1, 3]  # the heads of a group are not adjacent
    attention, code_moments = permute_heads(attention, order), code_moments.permute_heads(order)
    grouping, exact = Grouping.of(attention, 2), (identity_code(16),) * 2
    code = layer_code(method, code_moments, attention, grouping, KVShape(2, WIDTH, WIDTH))
    one_side = (
        replace(code, values=exact, centred=False)
        if side == "keys"
        else LayerCode(exact, code.values, folds=False, centred=code.centred)
    )
    return output(apply_code(attention, grouping, one_side, code_moments.moments.value_mean), x)


def coded(attention: Attention, x: Tensor, trial: Trial) -> Tensor:
    """Output of the layer with the codes of a trial."""
    heads = windows.head_outputs(attention, trial.code(windows.project(attention, x)))
    return linear(attention.o, heads)


@pytest.mark.parametrize("style", [*STYLES, "clipped llama"])
def test_trial_equals_the_layer_with_one_side_converted(style: str) -> None:
    attention, x = attention_of(style), random_inputs(4, POSITIONS)
    accumulator = MomentsAccumulator(attention)
    accumulator.add(x)
    methods = methods_for("auto", attention)
    assert len(methods) == (2 if style in ("llama", "gqa", "bias", "window") else 1)
    trials = make_trials(attention, accumulator.finish(), methods, [1, 2], POSITIONS)
    exact = output(attention, x)
    pairs = [(trials.values, methods[0], "values"), *((trials.keys[each], each, "keys") for each in methods)]
    for trial, method, side in pairs:
        expected = converted(attention, x, in_layer(method, attention), side)
        actual = coded(attention, x, trial)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9 * float(exact.abs().max()))
        # control
        assert float((actual - exact).norm()) > 1e-3 * float(exact.norm())


def test_trial_of_values_without_output_bias_loses_the_mean() -> None:
    attention, x = attention_of("bias"), random_inputs(4, POSITIONS)
    accumulator = MomentsAccumulator(attention)
    accumulator.add(x)
    method = without_output_bias(METHODS["online"])
    trial = make_trials(attention, accumulator.finish(), [method], [1, 2], POSITIONS).values
    expected = converted(attention, x, method, "values")
    torch.testing.assert_close(
        coded(attention, x, trial), expected, rtol=0, atol=1e-9 * float(expected.abs().max())
    )
    centred = make_trials(attention, accumulator.finish(), [METHODS["online"]], [1, 2], POSITIONS).values
    assert not torch.allclose(coded(attention, x, centred), expected, rtol=0, atol=1e-3)


def test_the_matrices_of_a_layer_are_freed_without_the_garbage_collector() -> None:
    """Those of a wide layer take hundreds of megabytes, and the garbage collector rarely runs."""
    attention = attention_of("llama")
    accumulator = MomentsAccumulator(attention)
    accumulator.add(random_inputs(4, POSITIONS))
    gc.disable()
    try:
        trials = make_trials(
            attention, accumulator.finish(), methods_for("auto", attention), [1, 2], POSITIONS
        )
        assert trials.curves
        assert not [each for each in gc.get_objects() if isinstance(each, LayerLosses)]
    finally:
        gc.enable()
