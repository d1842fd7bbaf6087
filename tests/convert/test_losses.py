"""Predicted losses of groups at each width, compared with the losses of codes of that width."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.decoders import make_attention, random_inputs
from support.layer_codes import code_moments, identity_code

from kvexport.calibrate import Moments, Rotations
from kvexport.convert import keys, values
from kvexport.convert.apply import LayerCode
from kvexport.convert.code_moments import CodeMoments
from kvexport.convert.codes import Code
from kvexport.convert.folding import ROUNDS
from kvexport.convert.groups import Grouping
from kvexport.convert.losses import LayerLosses
from kvexport.convert.matching import Group, order_of
from kvexport.convert.permute import permute_heads, permute_moments
from kvexport.convert.predict import predict_error
from kvexport.model.decoder import Attention, Linear, Rope

STYLES = ("llama", "gqa", "bias", "qwen3", "bloom", "window")
PARTITIONS: list[list[Group]] = [[(0, 2), (1, 3)], [(0, 3), (1, 2)], [(0, 1, 2, 3)], [(2,), (0,), (3,), (1,)]]


def layer(style: str, method: str, seed: int = 0) -> tuple[Attention, CodeMoments]:
    attention = make_attention(style, heads=8 if style == "gqa" else 4, kv_heads=4, seed=seed, sharpness=2.0)
    return attention, code_moments(attention, random_inputs(4, 24, seed=seed), method)


def grouped(
    attention: Attention, moments: Moments, groups: list[Group]
) -> tuple[Attention, Moments, Grouping]:
    """The layer with the heads of each group adjacent."""
    order = order_of(groups)
    return (
        permute_heads(attention, order),
        permute_moments(moments, order),
        Grouping.of(attention, len(groups)),
    )


def lost_by(
    moments: Moments, attention: Attention, grouping: Grouping, key: tuple[Code, ...], value: tuple[Code, ...]
) -> float:
    """E|Δo|² by the formula of `predict`."""
    code = LayerCode(key, value, folds=False, centred=True)
    return predict_error(CodeMoments(moments), attention, grouping, code) ** 2 * float(moments.output_power)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("groups", PARTITIONS, ids=str)
def test_losses_equal_those_of_the_optimal_codes(style: str, groups: list[Group]) -> None:
    attention, moments_of_layer = layer(style, "online")
    losses, moments = LayerLosses(moments_of_layer, attention), moments_of_layer.moments
    placed, moved, grouping = grouped(attention, moments, groups)
    n, each = grouping.size * 8, range(grouping.kv_heads)
    exact = (identity_code(n),) * grouping.kv_heads
    curves = {"keys": losses.keys(groups).sum(0), "values": losses.values(groups).sum(0)}
    for width in {1, 3, n // 2, n - 1, n}:
        key = tuple(keys.online(moved, placed, grouping, group, width) for group in each)
        value = tuple(values.weighted(moved, placed, grouping, group, width) for group in each)
        lost = {
            "keys": lost_by(moved, placed, grouping, key, exact),
            "values": lost_by(moved, placed, grouping, exact, value),
        }
        for which, curve in curves.items():
            assert curve.shape == (n + 1,) and curve.dtype == torch.float64
            whole = float(curve[0])
            assert lost[which] == pytest.approx(
                float(curve[width]), rel=1e-6, abs=2e-5 * whole
            )  # damping by a millionth
            assert width > n // 2 or lost[which] > 1e-4 * whole  # above the tolerance


@pytest.mark.parametrize("style", STYLES)
def test_width_zero_loses_the_whole_variance(style: str) -> None:
    """From moments alone: Σ gain E[(q·(k - k̄))²] scale² for keys, and tr(S Cov(v)) for values."""
    attention, moments_of_layer = layer(style, "online")
    losses, grouping, moments = (
        LayerLosses(moments_of_layer, attention),
        Grouping.of(attention, 4),
        moments_of_layer.moments,
    )
    for head in range(4):
        lost = sum(
            float(
                moments.key_gain[q]
                * (moments.query_second[q] * moments.key_covariance(grouping.rows(head))).sum()
            )
            for q in grouping.query_heads(head)
        )
        assert float(losses.keys([(head,)])[0, 0]) == pytest.approx(lost * attention.scale**2, rel=1e-9)
        weights = values.output_weights(moments, attention, grouping, head)
        covariance = moments.value_covariance(grouping.rows(head))
        assert float(losses.values([(head,)])[0, 0]) == pytest.approx(
            float((weights * covariance).sum()), rel=1e-9
        )


# within this many positions every frequency passes through all phases, independently of the others
APART = Rope(torch.tensor([0.1, 0.7, 1.3, 2.1]))
POSITIONS = 100_000


@pytest.mark.parametrize("style", ["llama", "gqa", "bias", "window"])
@pytest.mark.parametrize("group", [(0, 2), (1, 2, 3), (0, 1, 2, 3)], ids=str)
def test_estimate_equals_the_loss_for_uniform_phases(style: str, group: Group) -> None:
    attention, moments_of_layer = layer(style, "fold")
    (estimate,), n = LayerLosses(moments_of_layer, attention).estimate([group]), 8 * len(group)
    rest = [head for head in range(4) if head not in group]
    moved, grouping = (
        moments_of_layer.permute_heads([*group, *rest]).moments,
        Grouping(1, len(group), attention.queries_per_kv_head, 8),
    )
    assert estimate.shape == (n + 1,)
    for width in (2, 6, 8, 10, n - 2):
        frequencies = keys.cached_frequencies(moved, grouping, width)
        problem = keys.folding(moved, grouping, 0, frequencies, Rotations(APART, POSITIONS))
        lost = problem.loss(problem.code()) * attention.scale**2
        assert lost == pytest.approx(float(estimate[width]), rel=0.02)
        # an odd width leaves one number unused
        assert float(estimate[width - 1]) == float(estimate[width - 2]) or width - 2 == 8
    assert float(estimate[n]) == 0 < float(estimate[n - 2])


@pytest.mark.parametrize("style", ["llama", "gqa", "bias"])
@pytest.mark.parametrize("seed", range(3))
def test_curves_of_folded_keys_equal_their_codes_and_stay_below_the_estimate(style: str, seed: int) -> None:
    """A code for the given distances need not be optimal for all phases."""
    attention, moments_of_layer = layer(style, "fold", seed)
    losses, grouping, everything = (
        LayerLosses(moments_of_layer, attention),
        Grouping.of(attention, 1),
        (0, 1, 2, 3),
    )
    (curve,), (estimate,) = losses.folded_keys([everything]), losses.estimate([everything])
    assert moments_of_layer.distances is not None
    for width in (4, 8, 16, 24):
        frequencies = keys.cached_frequencies(moments_of_layer.moments, grouping, width)
        problem = keys.folding(moments_of_layer.moments, grouping, 0, frequencies, moments_of_layer.distances)
        early, final = (
            attention.scale**2 * float(problem.loss(problem.code(rounds))) for rounds in (5, ROUNDS)
        )
        assert float(curve[width]) == pytest.approx(early, rel=1e-9)
        assert 0.75 * early < final <= early
        assert curve[width] < 0.95 * estimate[width]
    for below, width, above in ((4, 6, 8), (8, 10, 16), (16, 20, 24), (24, 28, 32)):
        assert curve[above] < curve[width] < curve[below]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("group", [(1,), (1, 3), (0, 1, 2, 3)], ids=str)
def test_loss_descends_with_width_to_zero(style: str, group: Group) -> None:
    for method in ("online", "fold") if style not in ("bloom", "qwen3") else ("online",):
        attention, moments_of_layer = layer(style, method)
        losses = LayerLosses(moments_of_layer, attention)
        curves = (
            [*losses.folded_keys([group]), *losses.estimate([group])]
            if method == "fold"
            else [*losses.keys([group]), *losses.values([group])]
        )
        for curve in curves:
            steps = curve.diff()
            # a head of the trained width has each frequency once, the best choice or not
            if method == "fold" and len(group) > 1:
                assert curve[8] >= curve[10]
                steps = torch.cat((curve[:8].diff(), curve[9:].diff()))
            assert bool((steps <= 1e-12 * curve[0]).all())
            assert float(curve[-1]) <= 1e-9 * float(curve[0]) and float(curve[0]) > 0


def test_equal_heads_lose_nothing_together() -> None:
    """The order of heads in a group does not matter."""
    attention = make_attention("llama")
    k, v = (each.weight.clone().view(4, 8, -1) for each in (attention.k, attention.v))
    k[3], v[3] = k[1], v[1]
    equal = replace(attention, k=Linear(k.flatten(0, 1)), v=Linear(v.flatten(0, 1)))
    online, fold = (
        LayerLosses(code_moments(equal, random_inputs(4, 24), method), equal) for method in ("online", "fold")
    )
    for curve in (online.keys, online.values, fold.folded_keys):
        equal_heads, others = curve([(1, 3), (0, 2)])
        assert float(equal_heads[8]) < 1e-9 * float(equal_heads[0])
        assert float(others[8]) > 1e-2 * float(others[0])
        torch.testing.assert_close(*curve([(2, 1), (1, 2)]), rtol=1e-9, atol=1e-12)


def test_heads_of_one_pair_have_a_curve() -> None:
    """There is no width between 0 and the full width."""
    attention = make_attention("llama", heads=4, kv_heads=4, head_dim=2)
    losses = LayerLosses(code_moments(attention, random_inputs(4, 24), "fold"), attention)
    assert losses.folded_keys([(0,)]).shape == (1, 3)


@pytest.mark.parametrize("style", ["llama", "gqa"])
@pytest.mark.parametrize("group", [(0,), (0, 2), (1, 3)])
def test_output_weights_of_a_group_are_a_block_of_those_of_the_layer(
    style: str, group: tuple[int, ...]
) -> None:
    attention, coded = layer(style, "online")
    moments = coded.moments
    order = [*group, *(head for head in range(4) if head not in group)]
    alone = Grouping(1, len(group), attention.queries_per_kv_head, attention.head_dim)
    expected = values.output_weights(
        permute_moments(moments, order), permute_heads(attention, order), alone, 0
    )
    inside = [head * attention.head_dim + at for head in group for at in range(attention.head_dim)]
    found = values.stacked_output_weights(moments, attention)[inside][:, inside]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
