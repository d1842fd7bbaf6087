"""Plans for a size of the cache and for a bound on the loss, and the choice of the method of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.decoders import make_decoder, random_windows
from test_budget import made_up
from torch import Tensor

from kvexport.calibrate import windows
from kvexport.convert import (
    CompressionPlan,
    CompressionRequest,
    KVShape,
    LayerPlan,
    convert,
    methods_for,
    plan_compression,
)
from kvexport.convert.budget import Frontier, Widths, shapes_for
from kvexport.convert.compression_plan import MARGIN, search_within_bound
from kvexport.convert.methods import METHODS
from kvexport.errors import UsageError
from kvexport.model import reference
from kvexport.model.decoder import Attention, Decoder, Linear, Rope
from kvexport.progress import Progress
from kvexport.validate.evaluate import divergence_of

WINDOWS = 40  # calibration windows; five are held out


def decoder_of(style: str = "llama") -> Decoder:
    return make_decoder(style, layers=3, sharpness=2.0, head_dim=16, dtype=torch.float32)


def plan_of(
    decoder: Decoder,
    request: CompressionRequest,
    method: str = "online",
    capacity: int | None = None,
    **options: Any,
) -> CompressionPlan:
    tokens, methods = random_windows(decoder, WINDOWS, 24), methods_for(method, decoder.layers[0].attention)
    return plan_compression(decoder, tokens, request, methods, None, capacity, Progress(), **options)


def cached(plan: CompressionPlan) -> int:
    return sum(layer_plan.shape.kv_width for layer_plan in plan.layer_plans)


def measured(decoder: Decoder, plan: CompressionPlan) -> tuple[float, float]:
    """Mean KL on the held-out calibration windows, and on other text."""
    conversion = convert(decoder, random_windows(decoder, WINDOWS, 24), plan.layer_plans)
    converted = replace(decoder, layers=[each.layer for each in conversion])
    return conversion.divergence().mean_kl, divergence_of(
        decoder, converted, random_windows(decoder, 24, 24, seed=9)
    ).mean_kl


# A bound on the loss

BOUNDS = (0.1, 0.03, 0.01, 0.003)


@pytest.mark.slow
@pytest.mark.parametrize("style", ["llama", "bias"])
def test_keeps_the_bound_and_caches_more_for_a_tighter_one(style: str) -> None:
    decoder, widths = decoder_of(style), []
    for bound in BOUNDS:
        plan = plan_of(decoder, CompressionRequest(max_kl=bound))
        held_out, fresh = measured(decoder, plan)
        assert held_out <= MARGIN * bound
        assert fresh <= bound
        tried = {point.kv_width: point.measured_kl for point in plan.points if point.measured_kl is not None}
        assert tried[cached(plan)] == pytest.approx(held_out, rel=1e-6)
        widths.append(cached(plan))
    assert all(looser <= tighter for looser, tighter in pairwise(widths)) and widths[0] < widths[-1]
    assert widths[-1] < 3 * 128  # even then less than the trained model


def test_keeps_the_bound_when_predictions_are_far_too_low() -> None:
    """The bound is kept because every accepted plan was tried."""
    decoder = decoder_of()
    honest = plan_of(decoder, CompressionRequest(max_kl=0.01))
    optimistic = [
        replace(
            each,
            key_sensitivity={method: 0.02 * value for method, value in each.key_sensitivity.items()},
            value_sensitivity=0.02 * each.value_sensitivity,
        )
        for each in honest.layers
    ]
    plan = plan_of(decoder, CompressionRequest(max_kl=0.01), layers=optimistic)
    tried = [point for point in plan.points if point.measured_kl is not None]
    assert max(point.measured_kl or 0 for point in tried) > 0.01  # the first prediction was wrong
    assert measured(decoder, plan)[0] <= MARGIN * 0.01
    assert cached(plan) < 1.25 * cached(honest)


def test_unreachable_bound_leaves_the_trained_model() -> None:
    plan = plan_of(decoder_of(), CompressionRequest(max_kl=1e-9))
    assert [layer_plan.shape for layer_plan in plan.layer_plans] == [KVShape(4, 16, 16)] * 3


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 10**6), min_size=1, max_size=3),
    st.floats(0.05, 20),
    st.floats(0, 0.5),
    st.floats(1e-3, 30),
    st.integers(0, 1000),
)
def test_search_returns_the_smallest_cache_measured_within_the_bound(
    seeds: list[int], factor: float, noise: float, bound: float, seed: int
) -> None:
    """For predictions that are too high or too low by a factor, and noisy."""
    layers = [made_up(each, 4, 16, (METHODS["online"],)) for each in seeds]
    frontier = Frontier(layers, [shapes_for(layer.trained, layer.sizes, Widths()) for layer in layers])
    generator, measured_kl = torch.Generator().manual_seed(seed), dict[int, float]()

    def measure(layer_plans: Sequence[LayerPlan]) -> float:
        predicted = sum(layer.kl(layer_plan) for layer, layer_plan in zip(layers, layer_plans, strict=True))
        kl = predicted * factor * (1 + noise * float(torch.rand((), generator=generator)))
        measured_kl[sum(layer_plan.shape.kv_width for layer_plan in layer_plans)] = kl
        return kl

    smallest, tried = search_within_bound(frontier, bound, measure)
    assert smallest == frontier.most or measured_kl[smallest] <= bound
    assert smallest == min([frontier.most, *(width for width, kl in measured_kl.items() if kl <= bound)])
    assert {point.kv_width: point.measured_kl for point in tried} == measured_kl and len(measured_kl) <= 5
    if factor == 1 and noise == 0:
        assert smallest <= 1.02 * frontier.cheapest(bound)


# A share of the cache


@pytest.mark.parametrize("ratio", [0.26, 0.37, 0.5, 0.9])
def test_ratio_is_not_exceeded_and_mostly_used(ratio: float) -> None:
    plan = plan_of(decoder_of(), CompressionRequest(kv_ratio=ratio))
    assert 0.85 * ratio < cached(plan) / (3 * 128) <= ratio
    assert all(layer_plan.shape.key_dim == layer_plan.shape.value_dim for layer_plan in plan.layer_plans)
    assert len(plan.layers) == 3


def test_more_freedom_predicts_less_loss() -> None:
    """Compare free widths of keys and values with equal ones, and these with one width or one group size."""
    decoder, gains = decoder_of(), []

    def predicted(**options: Any) -> float:
        plan = plan_of(decoder, CompressionRequest(**options))
        return sum(
            layer.kl(layer_plan) for layer, layer_plan in zip(plan.layers, plan.layer_plans, strict=True)
        )

    for ratio in (0.3, 0.45):
        free, equal = predicted(kv_ratio=ratio, equal_widths=False), predicted(kv_ratio=ratio)
        assert (
            free
            <= equal
            <= min(predicted(kv_ratio=ratio, group_size=4), predicted(kv_ratio=ratio, kv_head_dim=16))
        )
        gains.append(free / equal)
    assert min(gains) < 0.98


def test_width_and_group_size_apply_to_all_layers() -> None:
    decoder = decoder_of()
    assert {
        layer_plan.shape.key_dim
        for layer_plan in plan_of(decoder, CompressionRequest(kv_head_dim=32)).layer_plans
    } == {32}
    assert {
        layer_plan.shape.kv_heads
        for layer_plan in plan_of(decoder, CompressionRequest(group_size=2)).layer_plans
    } == {2}


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "ratio"), [(8, 0.8), (12, 0.8), (16, 0.5)])
def test_groups_may_be_wider_than_the_groups_they_grow_from(heads: int, ratio: float) -> None:
    """Eight heads are matched as pairs of pairs of pairs; their common width exceeds that of a pair."""
    decoder = make_decoder("llama", layers=1, heads=heads, head_dim=4, dtype=torch.float32)
    plan = plan_of(decoder, CompressionRequest(kv_ratio=ratio))
    assert 0.8 * ratio < cached(plan) / (heads * 8) <= ratio
    layer_plan = LayerPlan(METHODS["online"], KVShape(2, 2 * heads - 4, 2 * heads - 4))
    (converted,) = convert(decoder, random_windows(decoder, 8, 24), [layer_plan])
    assert converted.report.measured_error < 0.3


def test_rejects_a_ratio_that_no_width_reaches() -> None:
    with pytest.raises(UsageError) as caught:
        plan_of(decoder_of(), CompressionRequest(kv_ratio=0.05))
    assert caught.value.exit_code == 2
    message = str(caught.value)
    # one key head of 16 and one value head of 16: 32 of 128 numbers
    assert "--kv-ratio 0.05" in message and "0.25 to 1" in message
    assert cached(plan_of(decoder_of(), CompressionRequest(kv_ratio=0.25))) == 3 * 32


def test_frontier_points_descend_and_contain_the_plan() -> None:
    for request in (CompressionRequest(), CompressionRequest(max_kl=0.02)):
        plan = plan_of(decoder_of(), request)
        widths = [point.kv_width for point in plan.points]
        assert widths == sorted(set(widths)) and widths[-1] == 3 * 128 and len(widths) >= 7
        assert all(more.predicted_kl <= less.predicted_kl for less, more in pairwise(plan.points))
        assert plan.points[-1].predicted_kl == 0.0
        assert cached(plan) in widths
        assert any(point.measured_kl is not None for point in plan.points) == (request.max_kl is not None)


# Fixed shapes, and the method of each layer


@pytest.mark.parametrize("method", ["online", "fold", "svd-a", "mean-pool"])
def test_one_shape_and_one_method_need_no_sensitivity_analysis(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def analyze(*arguments: Any, **options: Any) -> Any:
        pytest.fail("analysed")

    monkeypatch.setattr("kvexport.convert.compression_plan.analyze_sensitivity", analyze)
    plan = plan_of(decoder_of(), CompressionRequest(kv_heads=2), method)
    assert plan == CompressionPlan([LayerPlan(METHODS[method], KVShape(2, 16, 16))] * 3)
    assert [
        layer_plan.shape
        for layer_plan in plan_of(decoder_of(), CompressionRequest(kv_ratio=1), "auto").layer_plans
    ] == [KVShape(4, 16, 16)] * 3
    with pytest.raises(pytest.fail.Exception, match="analysed"):  # control
        plan_of(decoder_of(), CompressionRequest(kv_heads=2), "auto")


def decoder_with_a_layer_per_method() -> Decoder:
    """A layer in which each method is better, where keys of four heads share 8 numbers at 4096 positions.

    In the first layer each head's queries lie in one direction and its keys, about a mean, in another, all in
    pairs that rotate slowly: a nearby query needs one number per head, which a folded code keeps, whereas a
    code for all positions finds it spread over all directions. In the second layer all keys rotate with one
    fast frequency, of which so narrow a folded code has one pair only.
    """
    decoder = make_decoder("llama", layers=2, sharpness=2.0, max_positions=4096)
    generator = torch.Generator().manual_seed(0)
    slow = torch.tensor([0.0, 1.0, 1.0, 1.0], dtype=torch.float64)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    def one_direction(linear: Linear, bias: Tensor | None = None) -> Linear:
        along = (random(4, 2, 4) * slow).view(4, 8, 1) * random(4, 1, 32) / 32**0.5
        return Linear((0.2 * linear.weight.view(4, 8, 32) + along).reshape(32, 32), bias)

    def one_frequency(linear: Linear) -> Linear:
        return Linear((linear.weight.view(4, 2, 4, 32) * (1 - 0.9 * slow)[:, None]).reshape(32, 32))

    first, second = (layer.attention for layer in decoder.layers)
    first = replace(
        first, q=one_direction(first.q), k=one_direction(first.k, (2 * random(4, 2, 4) * slow).flatten())
    )
    changed = [first, replace(second, k=one_frequency(second.k))]
    rope = Rope(torch.tensor([1.0, 2e-3, 1.2e-3, 6e-4]))
    layers = [
        replace(layer, attention=replace(each, rope=rope))
        for layer, each in zip(decoder.layers, changed, strict=True)
    ]
    return replace(decoder, layers=layers)


def names(plan: CompressionPlan) -> list[str]:
    return [layer_plan.method.name for layer_plan in plan.layer_plans]


@pytest.mark.parametrize(
    "compression",
    [CompressionRequest(kv_heads=1), CompressionRequest(group_size=4, kv_head_dim=8)],
    ids=["heads", "group and width"],
)
def test_each_layer_gets_the_method_with_less_predicted_loss(compression: CompressionRequest) -> None:
    plan = plan_of(decoder_with_a_layer_per_method(), compression, "auto", 4096)
    assert names(plan) == ["fold", "online"]
    assert {layer_plan.shape for layer_plan in plan.layer_plans} == {KVShape(1, 8, 8)}
    for layer, layer_plan in zip(plan.layers, plan.layer_plans, strict=True):
        assert layer.kl(layer_plan) == min(
            layer.kl(replace(layer_plan, method=each)) for each in layer.methods
        )
    assert plan.points == ()


def test_capacity_changes_the_choice() -> None:
    """Within 24 positions the slow pairs hardly rotate: a code after RoPE keeps the four numbers and ignores
    the mean key.
    """
    decoder = decoder_with_a_layer_per_method()
    for capacity, method in ((24, "online"), (4096, "fold"), (None, "online")):  # None: length of the windows
        plan = plan_of(decoder, CompressionRequest(group_size=4, kv_head_dim=4), "auto", capacity)
        assert names(plan)[0] == method
        best, other = sorted(
            plan.layers[0].kl(LayerPlan(each, KVShape(1, 4, 4))) for each in plan.layers[0].methods
        )
        assert best < 0.99 * other


def test_the_chosen_method_measures_better_over_the_capacity() -> None:
    decoder = decoder_with_a_layer_per_method()
    tokens, fresh = random_windows(decoder, WINDOWS, 24), random_windows(decoder, 8, 24, seed=9)
    layer = decoder.layers[0]
    x = reference.norm(layer.attention_norm, reference.embed(decoder.embedding, fresh))

    def output(attention: Attention, offset: int) -> Tensor:
        positions = (offset + torch.arange(24)).expand(x.shape[:2])
        projected = reference.project(attention, x, positions)
        return reference.linear(attention.o, windows.head_outputs(attention, projected))

    def lost(method: str, capacity: int) -> float:
        layer_plan = LayerPlan(
            replace(METHODS[method], refit=False), KVShape(1, 4, 32)
        )  # values uncompressed
        attention = next(convert(decoder, tokens, [layer_plan] * 2, capacity=capacity)).layer.attention
        offsets = range(0, capacity - 23, max(1, (capacity - 24) // 7))
        return float(
            torch.stack(
                [(output(attention, at) - output(layer.attention, at)).square().mean() for at in offsets]
            ).mean()
        )

    assert lost("fold", 4096) < 0.7 * lost("online", 4096)
    assert lost("online", 24) < 0.7 * lost("fold", 24)


@pytest.mark.parametrize("style", ["bloom", "qwen3"])
def test_auto_is_online_where_keys_cannot_fold_before_rope(style: str) -> None:
    assert set(names(plan_of(decoder_of(style), CompressionRequest(kv_heads=2), "auto"))) == {"online"}
