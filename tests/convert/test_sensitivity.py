"""Predicted KL of a layer compared with the KL measured after that layer alone was converted."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from support.decoders import make_decoder, random_windows, with_attention
from test_convert_pipeline import count_live_layers
from torch import Tensor

from kvexport.convert import KVShape, LayerPlan, analyze_sensitivity, convert, measure_moments
from kvexport.convert.code_moments import make_code_moments
from kvexport.convert.layer_sensitivity import LayerSensitivity
from kvexport.convert.losses import LayerLosses
from kvexport.convert.methods import METHODS, Method, methods_for
from kvexport.model.decoder import Attention, Decoder, Linear
from kvexport.validate.evaluate import divergence_of

ONLINE, FOLD = (replace(METHODS[name], refit=False) for name in ("online", "fold"))
SHAPES = [KVShape(1, 16, 16), KVShape(2, 8, 8), KVShape(1, 24, 24), KVShape(2, 8, 16), KVShape(1, 24, 32)]


def decoder_of(style: str, **sizes: int) -> Decoder:
    heads = {"heads": 8, "kv_heads": 4} if style == "gqa" else {}
    return make_decoder(style, sharpness=2.0, dtype=torch.float32, **{"layers": 3, **heads, **sizes})


def methods_of(decoder: Decoder) -> list[Method]:
    return [replace(each, refit=False) for each in methods_for("auto", decoder.layers[0].attention)]


def sensitivity_of(
    decoder: Decoder, tokens: Tensor | None = None, **options: object
) -> list[LayerSensitivity]:
    tokens = random_windows(decoder, 40, 24) if tokens is None else tokens
    return analyze_sensitivity(decoder, tokens, methods_of(decoder), [1, 2, 4], **options)  # type: ignore[arg-type]


def measured_kl(decoder: Decoder, index: int, layer_plan: LayerPlan) -> float:
    """Mean KL on fresh text with this layer alone converted."""
    tokens, trained = random_windows(decoder, 40, 24), KVShape(4, 8, 8)
    layer_plans = [
        layer_plan if each == index else replace(layer_plan, shape=trained)
        for each in range(len(decoder.layers))
    ]
    converted = replace(decoder, layers=[each.layer for each in convert(decoder, tokens, layer_plans)])
    return divergence_of(decoder, converted, random_windows(decoder, 16, 24, seed=9)).mean_kl


def ranks(x: Tensor) -> Tensor:
    return x.argsort().argsort().double()


def spearman(pairs: list[tuple[float, float]]) -> float:
    predicted, measured = torch.tensor(pairs).T
    return float(torch.corrcoef(torch.stack((ranks(predicted), ranks(measured))))[0, 1])


@pytest.mark.slow
@pytest.mark.parametrize("style", ["llama", "gqa", "bias", "bloom", "qwen3"])
def test_prediction_agrees_with_the_conversion_of_one_layer(style: str) -> None:
    """Within a factor of 2.5 at every width, and in nearly the same order over layers, methods and shapes."""
    decoder, pairs = decoder_of(style), []
    for index, layer in enumerate(sensitivity_of(decoder)):
        for layer_plan in (LayerPlan(method, shape) for method in layer.methods for shape in SHAPES):
            predicted, measured = layer.kl(layer_plan), measured_kl(decoder, index, layer_plan)
            assert measured > 1e-6
            assert 1 / 2.5 < predicted / measured < 2.5
            pairs.append((predicted, measured))
    assert spearman(pairs) > 0.9
    # the order is not trivial
    assert max(measured for _, measured in pairs) > 5 * min(measured for _, measured in pairs)


def test_sensitivity_of_another_model_does_not_predict() -> None:
    """Negative control: the same layers and relative losses, with an attention output that is scaled down."""
    decoder = decoder_of("llama", layers=2)
    quiet = with_attention(decoder, lambda each: replace(each, o=Linear(0.3 * each.o.weight)))
    layer_plan = LayerPlan(ONLINE, KVShape(2, 8, 8))
    assert sensitivity_of(decoder)[0].kl(layer_plan) > 4 * measured_kl(quiet, 0, layer_plan)


def test_uncompressed_layers_lose_nothing() -> None:
    for layer in sensitivity_of(decoder_of("llama")):
        assert layer.trained == KVShape(4, 8, 8)
        assert layer.kl(LayerPlan(ONLINE, layer.trained)) == layer.kl(LayerPlan(FOLD, layer.trained)) == 0.0
        assert layer.kl(LayerPlan(ONLINE, KVShape(1, 32, 32))) < 1e-6 * layer.kl(
            LayerPlan(ONLINE, KVShape(1, 16, 16))
        )


def test_more_numbers_predict_less_loss() -> None:
    for layer in sensitivity_of(decoder_of("llama")):
        for method in layer.methods:
            widths = [layer.kl(LayerPlan(method, KVShape(1, width, width))) for width in (10, 16, 20, 24, 30)]
            assert all(wider < narrower for narrower, wider in pairwise(widths))
        # larger groups, the same number of bytes
        assert layer.kl(LayerPlan(ONLINE, KVShape(2, 8, 8))) > layer.kl(LayerPlan(ONLINE, KVShape(1, 16, 16)))


def test_curves_are_the_losses_of_the_matched_groups() -> None:
    """All four heads form one group; among pairs, no partition loses less at the ratio that they were matched
    for.
    """
    decoder = decoder_of("llama", layers=1)
    (layer,), tokens = sensitivity_of(decoder), random_windows(decoder, 40, 24)
    (moments,), attention = measure_moments(decoder, tokens), decoder.layers[0].attention
    for method in (ONLINE, FOLD):
        code_moments = make_code_moments(method.before_rotation, moments, attention, 24)
        losses = LayerLosses(code_moments, attention)
        curves, everything = layer.curves[method, 4], (0, 1, 2, 3)
        of_keys = losses.folded_keys if method is FOLD else losses.keys
        torch.testing.assert_close(curves.keys, of_keys([everything])[0], rtol=1e-9, atol=1e-15)
        torch.testing.assert_close(curves.values, losses.values([everything])[0], rtol=1e-9, atol=1e-15)
        pairs = layer.curves[method, 2]
        matchings = [[(0, 1), (2, 3)], [(0, 2), (1, 3)], [(0, 3), (1, 2)]]

        def estimated(
            groups: list[tuple[int, int]], method: Method = method, losses: LayerLosses = losses
        ) -> float:
            of_keys = losses.estimate if method is FOLD else losses.keys
            return float((of_keys(groups) + losses.values(groups))[:, 8].sum())

        best = min(matchings, key=estimated)
        lost = float((of_keys(best) + losses.values(best))[:, 8].sum())
        assert float(pairs.keys[8] + pairs.values[8]) == pytest.approx(lost, rel=1e-9)


# Layers without influence on the logits


def test_a_layer_without_influence_on_the_logits_has_no_sensitivity() -> None:
    """The last layer writes into channels that nothing reads; its losses are as large as before."""
    decoder = decoder_of("llama", layers=2)

    def without_channels(weight: Tensor) -> Tensor:
        weight = 1e3 * weight.clone()  # with so large an ε the norm is constant and does not mix channels
        weight[16:] = 0
        return weight

    first, last = decoder.layers
    o = last.attention.o.weight.clone()
    o[:16] = 0
    norm = replace(last.mlp_norm, weight=without_channels(last.mlp_norm.weight), eps=1e6)
    last = replace(last, attention=replace(last.attention, o=Linear(o)), mlp_norm=norm)
    final = replace(decoder.final_norm, weight=without_channels(decoder.final_norm.weight), eps=1e6)
    read, unread = sensitivity_of(replace(decoder, layers=[first, last], final_norm=final))
    assert min(float(curve.keys[4]) for curve in unread.curves.values()) > 1e-3 * unread.output_power
    for method in (ONLINE, FOLD):
        assert unread.key_sensitivity[method] < 1e-4 * read.key_sensitivity[method]
    assert unread.value_sensitivity < 1e-4 * read.value_sensitivity


@pytest.mark.parametrize("part", ["v", "o"])
def test_a_layer_with_zero_output_loses_nothing(part: str) -> None:
    decoder = decoder_of("llama", layers=2)
    last = decoder.layers[1]
    without_output = replace(
        last.attention, **{part: Linear(torch.zeros_like(getattr(last.attention, part).weight))}
    )
    other, zero = sensitivity_of(
        replace(decoder, layers=[decoder.layers[0], replace(last, attention=without_output)])
    )
    assert zero.kl(LayerPlan(ONLINE, KVShape(1, 8, 8))) == zero.kl(LayerPlan(FOLD, KVShape(1, 8, 8))) == 0.0
    assert other.kl(LayerPlan(ONLINE, KVShape(1, 8, 8))) > 0


def test_heads_that_ignore_their_logits_are_insensitive_to_keys() -> None:
    decoder = decoder_of("llama", layers=1)

    def uniform(attention: Attention) -> Attention:
        return replace(attention, q=Linear(1e-3 * attention.q.weight))

    (flat,), (sharp,) = sensitivity_of(with_attention(decoder, uniform)), sensitivity_of(decoder)
    layer_plan = LayerPlan(ONLINE, KVShape(4, 4, 8))
    assert flat.kl(layer_plan) < 1e-4 * sharp.kl(layer_plan)


# Saved moments, capacity, memory


@pytest.mark.slow
def test_saved_moments_give_the_same_sensitivity() -> None:
    decoder = decoder_of("gqa")
    tokens = random_windows(decoder, 9, 24)
    saved = list(measure_moments(decoder, tokens))
    for actual, expected in zip(
        sensitivity_of(decoder, tokens, moments_of=saved.__getitem__),
        sensitivity_of(decoder, tokens),
        strict=True,
    ):
        assert replace(actual, curves={}) == replace(expected, curves={})
        assert actual.curves.keys() == expected.curves.keys()
        for key, curves in actual.curves.items():
            assert torch.equal(curves.keys, expected.curves[key].keys) and torch.equal(
                curves.values, expected.curves[key].values
            )


def test_longer_capacity_increases_the_loss_of_online_more_than_of_fold() -> None:
    decoder = decoder_of("llama", layers=1)
    (near,), (far,) = (sensitivity_of(decoder, capacity=capacity) for capacity in (24, 4096))
    assert float(far.curves[ONLINE, 4].keys[16]) > 1.2 * float(near.curves[ONLINE, 4].keys[16])
    by_fold, by_online = (
        float(far.curves[method, 4].keys[16] / near.curves[method, 4].keys[16]) for method in (FOLD, ONLINE)
    )
    assert by_fold < by_online
    assert torch.equal(far.curves[ONLINE, 4].values, near.curves[ONLINE, 4].values)
    (default,) = sensitivity_of(decoder)
    assert torch.equal(default.curves[ONLINE, 4].keys, near.curves[ONLINE, 4].keys)  # length of the windows


@pytest.mark.slow
def test_one_layer_is_alive_at_a_time() -> None:
    lazy, counts = count_live_layers(make_decoder("llama", layers=4))
    layers = analyze_sensitivity(lazy, random_windows(lazy, 4, 8), [ONLINE, FOLD], [1, 2, 4])
    assert len(layers) == 4
    assert counts == [0] * 8  # forward and backward


def test_saved_sensitivity_is_the_measured_one() -> None:
    decoder = decoder_of("llama", layers=1)
    methods = methods_for("auto", decoder.layers[0].attention)
    (layer,) = analyze_sensitivity(decoder, random_windows(decoder, 16, 24), methods, [1, 2, 4])
    saved = LayerSensitivity.from_tensors(layer.tensors())
    for method in methods:
        for shape in SHAPES:
            assert saved.kl(LayerPlan(method, shape)) == layer.kl(LayerPlan(method, shape))
    assert (saved.trained, saved.sizes, saved.output_power) == (
        layer.trained,
        layer.sizes,
        layer.output_power,
    )
