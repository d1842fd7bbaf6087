"""The exact choice of shapes compared with all choices, and the widths that an engine supports."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvexport.convert import KVShape, LayerPlan
from kvexport.convert.budget import Frontier, Widths, shapes_for
from kvexport.convert.layer_sensitivity import Curves, LayerSensitivity
from kvexport.convert.methods import METHODS, Method

ONLINE, FOLD = METHODS["online"], METHODS["fold"]


def made_up(
    seed: int, heads: int, width: int, methods: Sequence[Method], falling: bool = True
) -> LayerSensitivity:
    """A layer with random losses: falling with width, as real ones do, or arbitrary."""
    generator = torch.Generator().manual_seed(seed)
    sizes = tuple(size for size in range(1, heads + 1) if heads % size == 0)

    def curve(n: int) -> torch.Tensor:
        steps = torch.rand(n, generator=generator, dtype=torch.float64) ** 4
        ends = torch.cat((steps.cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)))
        return ends if falling else torch.rand(n + 1, generator=generator, dtype=torch.float64)

    return LayerSensitivity(
        trained=KVShape(heads, width, width),
        sizes=sizes,
        curves={
            (method, size): Curves(curve(size * width), curve(size * width))
            for method in methods
            for size in sizes
        },
        output_power=1.0,
        key_sensitivity={method: float(torch.rand((), generator=generator)) * 10 for method in methods},
        value_sensitivity=float(torch.rand((), generator=generator)) * 10,
    )


def every_choice(
    layers: Sequence[LayerSensitivity], allowed: Sequence[Sequence[KVShape]]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Cached numbers and predicted KL of every combination of layer plans."""
    layer_plans = [
        [LayerPlan(method, shape) for method in layer.methods for shape in shapes]
        for layer, shapes in zip(layers, allowed, strict=True)
    ]
    widths, kls = np.zeros(1, np.int64), np.zeros(1)
    for layer, options in zip(layers, layer_plans, strict=True):
        widths = np.add.outer(widths, [layer_plan.shape.kv_width for layer_plan in options]).ravel()
        kls = np.add.outer(kls, [layer.kl(layer_plan) for layer_plan in options]).ravel()
    return widths, kls


problems = st.tuples(
    st.lists(st.integers(0, 10**6), min_size=2, max_size=3, unique=True),
    st.sampled_from([(2, 16), (4, 8), (2, 24), (3, 16)]),
    st.sampled_from([(ONLINE,), (ONLINE, FOLD)]),
    st.booleans(),
    st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(problems, st.lists(st.floats(0, 1.1), min_size=1, max_size=6))
def test_frontier_equals_the_best_of_all_choices(
    problem: tuple[list[int], tuple[int, int], tuple[Method, ...], bool, bool], shares: list[float]
) -> None:
    seeds, (heads, width), methods, equal, falling = problem
    layers = [made_up(seed, heads, width, methods, falling) for seed in seeds]
    allowed = [shapes_for(layer.trained, layer.sizes, Widths(equal)) for layer in layers]
    frontier, (widths, kls) = Frontier(layers, allowed), every_choice(layers, allowed)
    assert frontier.most == sum(layer.trained.kv_width for layer in layers)
    assert frontier.fewest == widths.min()
    for share in shares:
        budget = int(share * frontier.most)
        if budget < frontier.fewest:
            assert frontier.kl(budget) == float("inf")
            continue
        least = kls[widths <= budget].min()
        assert frontier.kl(budget) == pytest.approx(least, rel=1e-12, abs=1e-12)
        layer_plans = frontier.layer_plans(budget)
        assert sum(layer_plan.shape.kv_width for layer_plan in layer_plans) <= budget
        assert sum(
            layer.kl(layer_plan) for layer, layer_plan in zip(layers, layer_plans, strict=True)
        ) == pytest.approx(least, rel=1e-12, abs=1e-12)
        assert all(
            layer_plan.shape in shapes and layer_plan.method in methods
            for layer_plan, shapes in zip(layer_plans, allowed, strict=True)
        )
        bound = least * (1 + 1e-9) + 1e-12
        assert frontier.cheapest(bound) == widths[kls <= bound].min() <= budget


def test_independent_choice_per_layer_loses_more() -> None:
    """Control for the test above: equal shares do not reach the optimum on these losses."""
    worse = 0
    for seed in range(10):
        layers = [made_up(seed + 100 * each, 4, 8, (ONLINE,), falling=False) for each in range(3)]
        allowed = [shapes_for(layer.trained, layer.sizes, Widths()) for layer in layers]
        frontier = Frontier(layers, allowed)
        alone = sum(
            Frontier([layer], [shapes]).kl(layer.trained.kv_width // 2)
            for layer, shapes in zip(layers, allowed, strict=True)
        )
        worse += alone > frontier.kl(frontier.most // 2) * 1.05
    assert worse >= 8


def test_the_whole_cache_is_the_trained_model_without_loss() -> None:
    layers = [made_up(seed, 4, 8, (ONLINE, FOLD)) for seed in range(3)]
    frontier = Frontier(layers, [shapes_for(layer.trained, layer.sizes, Widths()) for layer in layers])
    for budget in (frontier.most, 2 * frontier.most):
        assert frontier.kl(budget) == 0.0
        assert [layer_plan.shape for layer_plan in frontier.layer_plans(budget)] == [
            layer.trained for layer in layers
        ]
    assert frontier.cheapest(0.0) == frontier.most
    assert frontier.cheapest(1e9) == frontier.fewest


def test_each_layer_gets_the_method_with_less_predicted_loss() -> None:
    layers = [made_up(seed, 4, 8, (ONLINE, FOLD)) for seed in range(8)]
    allowed = [[KVShape(2, 8, 8)]] * 8
    chosen = [layer_plan.method for layer_plan in Frontier(layers, allowed).layer_plans(8 * 64)]
    assert {ONLINE, FOLD} == set(chosen)
    for layer, method in zip(layers, chosen, strict=True):
        assert layer.kl(LayerPlan(method, KVShape(2, 8, 8))) == min(
            layer.kl(LayerPlan(each, KVShape(2, 8, 8))) for each in (ONLINE, FOLD)
        )


def test_the_more_sensitive_layer_keeps_more() -> None:
    """Two layers with the same losses, one of them a hundred times as sensitive."""
    first, second = made_up(3, 4, 16, (ONLINE,)), made_up(3, 4, 16, (ONLINE,))
    sensitive = LayerSensitivity(
        second.trained,
        second.sizes,
        second.curves,
        1.0,
        {ONLINE: 100 * second.key_sensitivity[ONLINE]},
        100 * second.value_sensitivity,
    )
    frontier = Frontier([first, sensitive], [shapes_for(first.trained, first.sizes, Widths())] * 2)
    less, more = frontier.layer_plans(frontier.most // 2)
    assert more.shape.kv_width > less.shape.kv_width


# Shapes and widths to choose from


@pytest.mark.parametrize(
    ("widths", "size", "head_dim", "expected"),
    [
        (Widths(), 1, 64, [16, 24, 32, 40, 48, 56, 64]),
        (Widths(), 2, 16, [16, 24, 32]),
        (Widths(), 4, 8, [8, 16, 24, 32]),  # trained heads of 8 were not fused either
        (Widths(), 4, 4, [4, 8, 12, 16]),
        (Widths(), 1, 20, [16]),
        (Widths(only=64), 1, 32, []),
        (Widths(only=64), 2, 32, [64]),
        (Widths(only=20), 2, 32, [20]),
    ],
)
def test_widths_of_a_head(widths: Widths, size: int, head_dim: int, expected: list[int]) -> None:
    assert widths.of(size, head_dim) == expected


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([1, 2, 4, 8, 16, 32]), st.sampled_from([16, 32, 64, 80, 96, 128, 256]))
def test_widths_are_those_of_fused_attention(size: int, head_dim: int) -> None:
    assert Widths().of(size, head_dim) == [
        width for width in range(16, min(256, size * head_dim) + 1) if width % 8 == 0
    ]


@pytest.mark.parametrize("heads", [2, 6])
def test_shapes_are_the_trained_one_and_all_that_cache_less(heads: int) -> None:
    layer = made_up(0, heads, 16, (ONLINE,))
    equal, free = (
        shapes_for(layer.trained, layer.sizes, Widths()),
        shapes_for(layer.trained, layer.sizes, Widths(equal=False)),
    )
    widths = [16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96]
    expected = {
        KVShape(heads // size, key, value)
        for size in layer.sizes
        for key, value in product(widths, widths)
        if max(key, value) <= size * 16 and heads // size * (key + value) < 2 * heads * 16
    }
    assert set(free) == expected | {layer.trained} and len(free) == len(set(free))
    assert set(equal) == {shape for shape in expected if shape.key_dim == shape.value_dim} | {layer.trained}
    assert equal[0] == free[0] == layer.trained
    assert any(shape.key_dim != shape.value_dim for shape in free)


def test_one_width_leaves_a_choice_of_heads() -> None:
    layer = made_up(0, 8, 16, (ONLINE,))
    assert shapes_for(layer.trained, layer.sizes, Widths(only=32)) == [
        KVShape(8, 16, 16),
        KVShape(2, 32, 32),
        KVShape(1, 32, 32),
    ]


def test_no_head_is_wider_than_kernels_support() -> None:
    layer = made_up(0, 8, 64, (ONLINE,))
    shapes = shapes_for(layer.trained, layer.sizes, Widths(equal=False))
    assert max(max(shape.key_dim, shape.value_dim) for shape in shapes) == 256
    assert {shape.kv_heads for shape in shapes} == {8, 4, 2, 1}
