"""What the survey predicts against what conversion of one layer alone is measured to lose."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from support.decoders import make_decoder, random_windows, with_attention
from test_convert_pipeline import _watched
from torch import Tensor

from kvexport.convert import KVShape, LayerPlan, analyze_sensitivity, convert, measure_moments
from kvexport.convert.code_moments import make_code_moments
from kvexport.convert.losses import LayerLosses
from kvexport.convert.methods import METHODS, Method, methods_for
from kvexport.convert.sensitivity import LayerSensitivity
from kvexport.model.decoder import Attention, Decoder, Linear
from kvexport.validate.evaluate import divergence_of

ONLINE, FOLD = (replace(METHODS[name], refit=False) for name in ("online", "fold"))
SHAPES = [KVShape(1, 16, 16), KVShape(2, 8, 8), KVShape(1, 24, 24), KVShape(2, 8, 16), KVShape(1, 24, 32)]


def decoder_of(style: str, **sizes: int) -> Decoder:
    heads = {"heads": 8, "kv_heads": 4} if style == "gqa" else {}
    return make_decoder(style, sharpness=2.0, dtype=torch.float32, **{"layers": 3, **heads, **sizes})


def methods_of(decoder: Decoder) -> list[Method]:
    return [replace(each, refit=False) for each in methods_for("auto", decoder.layers[0].attention)]


def surveyed(decoder: Decoder, tokens: Tensor | None = None, **options: object) -> list[LayerSensitivity]:
    tokens = random_windows(decoder, 16, 24) if tokens is None else tokens
    found = analyze_sensitivity(decoder, tokens, methods_of(decoder), [1, 2, 4], 0.5, **options)  # type: ignore[arg-type]
    for _ in found:
        pass
    return found.layers


def measured(decoder: Decoder, index: int, layer_plan: LayerPlan) -> float:
    """Mean KL on fresh text with that layer converted and no other."""
    tokens, trained = random_windows(decoder, 16, 24), KVShape(4, 8, 8)
    layer_plans = [
        layer_plan if each == index else replace(layer_plan, shape=trained)
        for each in range(len(decoder.layers))
    ]
    converted = replace(decoder, layers=[each.layer for each in convert(decoder, tokens, layer_plans)])
    return divergence_of(decoder, converted, random_windows(decoder, 16, 24, seed=9)).mean_kl


def ranks(x: Tensor) -> Tensor:
    return x.argsort().argsort().double()


def spearman(pairs: list[tuple[float, float]]) -> float:
    predicted, found = torch.tensor(pairs).T
    return float(torch.corrcoef(torch.stack((ranks(predicted), ranks(found))))[0, 1])


@pytest.mark.slow
@pytest.mark.parametrize("style", ["llama", "gqa", "bias", "bloom", "qwen3"])
def test_sensitivity_times_loss_is_what_one_layer_alone_is_measured_to_lose(style: str) -> None:
    """Within a factor of 2.5 at every width, and in nearly the same order over layers, methods and shapes."""
    decoder, pairs = decoder_of(style), []
    for index, layer in enumerate(surveyed(decoder)):
        for layer_plan in (LayerPlan(method, shape) for method in layer.methods for shape in SHAPES):
            predicted, found = layer.kl(layer_plan), measured(decoder, index, layer_plan)
            assert found > 1e-6
            assert 1 / 2.5 < predicted / found < 2.5
            pairs.append((predicted, found))
    assert spearman(pairs) > 0.9
    assert max(found for _, found in pairs) > 5 * min(
        found for _, found in pairs
    )  # there is something to predict


def test_another_models_survey_predicts_nothing() -> None:
    """The negative control: the same layers and losses, with an output that the logits hear ten times less of."""
    decoder = decoder_of("llama", layers=2)
    quiet = with_attention(decoder, lambda each: replace(each, o=Linear(0.3 * each.o.weight)))
    layer_plan = LayerPlan(ONLINE, KVShape(2, 8, 8))
    assert surveyed(decoder)[0].kl(layer_plan) > 4 * measured(quiet, 0, layer_plan)


def test_what_is_kept_whole_loses_nothing() -> None:
    for layer in surveyed(decoder_of("llama")):
        assert layer.trained == KVShape(4, 8, 8)
        assert layer.kl(LayerPlan(ONLINE, layer.trained)) == layer.kl(LayerPlan(FOLD, layer.trained)) == 0.0
        assert layer.kl(LayerPlan(ONLINE, KVShape(1, 32, 32))) < 1e-6 * layer.kl(
            LayerPlan(ONLINE, KVShape(1, 16, 16))
        )


def test_more_numbers_are_predicted_to_lose_less() -> None:
    for layer in surveyed(decoder_of("llama")):
        for method in layer.methods:
            widths = [layer.kl(LayerPlan(method, KVShape(1, width, width))) for width in (10, 16, 20, 24, 30)]
            assert all(wider < narrower for narrower, wider in pairwise(widths))
        assert layer.kl(LayerPlan(ONLINE, KVShape(2, 8, 8))) > layer.kl(
            LayerPlan(ONLINE, KVShape(1, 16, 16))
        )  # wider groups, equal bytes


def test_curves_are_the_losses_of_the_heads_that_were_matched() -> None:
    """Of all four heads there is one group only; of pairs, no partition loses less at the ratio they were matched for."""
    decoder = decoder_of("llama", layers=1)
    (layer,), tokens = surveyed(decoder), random_windows(decoder, 16, 24)
    (moments,), attention = measure_moments(decoder, tokens), decoder.layers[0].attention
    for method in (ONLINE, FOLD):
        losses = LayerLosses(make_code_moments(method.before_rotation, moments, decoder.rope, 24), attention)
        curves, everything = layer.curves[method, 4], (0, 1, 2, 3)
        of_keys = losses.folded_keys if method is FOLD else losses.keys
        torch.testing.assert_close(curves.keys, of_keys(everything), rtol=1e-9, atol=1e-15)
        torch.testing.assert_close(curves.values, losses.values(everything), rtol=1e-9, atol=1e-15)
        pairs = layer.curves[method, 2]
        matchings = [[(0, 1), (2, 3)], [(0, 2), (1, 3)], [(0, 3), (1, 2)]]

        def estimated(
            groups: list[tuple[int, int]], method: Method = method, losses: LayerLosses = losses
        ) -> float:
            return sum(
                float(losses.estimate(method.before_rotation, each)[8] + losses.values(each)[8])
                for each in groups
            )

        best = min(matchings, key=estimated)
        lost = sum(float(of_keys(each)[8] + losses.values(each)[8]) for each in best)
        assert float(pairs.keys[8] + pairs.values[8]) == pytest.approx(lost, rel=1e-9)


# Layers that matter to nobody


def test_a_layer_that_the_logits_do_not_hear_has_no_sensitivity() -> None:
    """The last layer writes into channels that nothing reads; its losses are as large as ever."""
    decoder = decoder_of("llama", layers=2)

    def deaf(weight: Tensor) -> Tensor:
        weight = (
            1e3 * weight.clone()
        )  # with so large an ε a norm is a constant, and channels do not meet in it
        weight[16:] = 0
        return weight

    first, last = decoder.layers
    o = last.attention.o.weight.clone()
    o[:16] = 0
    norm = replace(last.mlp_norm, weight=deaf(last.mlp_norm.weight), eps=1e6)
    last = replace(last, attention=replace(last.attention, o=Linear(o)), mlp_norm=norm)
    final = replace(decoder.final_norm, weight=deaf(decoder.final_norm.weight), eps=1e6)
    heard, unheard = surveyed(replace(decoder, layers=[first, last], final_norm=final))
    assert min(float(curve.keys[4]) for curve in unheard.curves.values()) > 1e-3 * unheard.output_power
    for method in (ONLINE, FOLD):
        assert unheard.key_sensitivity[method] < 1e-4 * heard.key_sensitivity[method]
    assert unheard.value_sensitivity < 1e-4 * heard.value_sensitivity


@pytest.mark.parametrize("part", ["v", "o"])
def test_a_layer_without_an_output_has_nothing_to_lose(part: str) -> None:
    decoder = decoder_of("llama", layers=2)
    last = decoder.layers[1]
    dead = replace(last.attention, **{part: Linear(torch.zeros_like(getattr(last.attention, part).weight))})
    alive, silent = surveyed(replace(decoder, layers=[decoder.layers[0], replace(last, attention=dead)]))
    assert (
        silent.kl(LayerPlan(ONLINE, KVShape(1, 8, 8))) == silent.kl(LayerPlan(FOLD, KVShape(1, 8, 8))) == 0.0
    )
    assert alive.kl(LayerPlan(ONLINE, KVShape(1, 8, 8))) > 0


def test_heads_that_ignore_their_logits_are_not_sensitive_through_keys() -> None:
    decoder = decoder_of("llama", layers=1)

    def uniform(attention: Attention) -> Attention:
        return replace(attention, q=Linear(1e-3 * attention.q.weight))

    (flat,), (sharp,) = surveyed(with_attention(decoder, uniform)), surveyed(decoder)
    layer_plan = LayerPlan(ONLINE, KVShape(4, 4, 8))
    assert flat.kl(layer_plan) < 1e-4 * sharp.kl(layer_plan)


# Saved moments, capacity, memory


@pytest.mark.slow
def test_saved_moments_give_the_same_survey() -> None:
    decoder = decoder_of("gqa")
    tokens = random_windows(decoder, 9, 24)
    saved = list(measure_moments(decoder, tokens))
    for found, wanted in zip(
        surveyed(decoder, tokens, moments_of=saved.__getitem__), surveyed(decoder, tokens), strict=True
    ):
        assert replace(found, curves={}) == replace(wanted, curves={})
        assert found.curves.keys() == wanted.curves.keys()
        for key, curves in found.curves.items():
            assert torch.equal(curves.keys, wanted.curves[key].keys) and torch.equal(
                curves.values, wanted.curves[key].values
            )


def test_a_longer_capacity_costs_online_keys_and_not_folded_ones() -> None:
    decoder = decoder_of("llama", layers=1)
    (near,), (far,) = (surveyed(decoder, capacity=capacity) for capacity in (24, 4096))
    assert float(far.curves[ONLINE, 4].keys[16]) > 1.2 * float(near.curves[ONLINE, 4].keys[16])
    by_fold, by_online = (
        float(far.curves[method, 4].keys[16] / near.curves[method, 4].keys[16]) for method in (FOLD, ONLINE)
    )
    assert by_fold < by_online
    assert torch.equal(far.curves[ONLINE, 4].values, near.curves[ONLINE, 4].values)
    (unsaid,) = surveyed(decoder)
    assert torch.equal(unsaid.curves[ONLINE, 4].keys, near.curves[ONLINE, 4].keys)  # that of the windows


@pytest.mark.slow
def test_one_layer_is_alive_at_a_time() -> None:
    lazy, counts = _watched(make_decoder("llama", layers=4))
    found = analyze_sensitivity(lazy, random_windows(lazy, 4, 8), [ONLINE, FOLD], [1, 2, 4], 0.5)
    assert sum(1 for _ in found) == 4
    assert counts == [0, 0, 0, 0]
    assert len(found.layers) == 4
