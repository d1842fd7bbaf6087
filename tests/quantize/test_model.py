"""Quantisation of whole models, alone and within a conversion; embedding and head."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.decoders import make_decoder, random_windows

from kvexport.convert import CompressionRequest, convert, methods_for, plan_compression
from kvexport.model import reference
from kvexport.model.decoder import Decoder, Layer, Linear
from kvexport.progress import Progress
from kvexport.quantize.grid import dequantize, round_to_nearest
from kvexport.quantize.layers import WeightSettings
from kvexport.quantize.model import LayerQuantizer, quantize_embedding, quantize_head, quantize_layers
from kvexport.validate.evaluate import divergence_of

SMALL = {"hidden": 64, "heads": 4, "head_dim": 16, "layers": 3, "dtype": torch.float32}


def quantized_decoder(decoder: Decoder, settings: WeightSettings, eight_bits=None) -> Decoder:
    windows = random_windows(decoder, 16, 32)
    layers = quantize_layers(decoder, windows, LayerQuantizer(settings, eight_bits))
    return dataclasses.replace(decoder, layers=[each.layer for each in layers])


def kl(decoder: Decoder, other: Decoder) -> float:
    return divergence_of(decoder, other, random_windows(decoder, 8, 32, seed=1)).mean_kl


def test_sequential_gptq_loses_less_than_rounding() -> None:
    decoder = make_decoder("gqa", **SMALL)
    losses = {
        name: kl(decoder, quantized_decoder(decoder, settings))
        for name, settings in {
            "nearest": WeightSettings(method="nearest", ridge=None),
            "gptq": WeightSettings(ridge=None),
            "corrected": WeightSettings(),
            "eight": WeightSettings(bits=8),
        }.items()
    }
    assert losses["gptq"] < losses["nearest"]
    assert losses["corrected"] < 0.9 * losses["nearest"]
    assert losses["eight"] < 0.05 * losses["corrected"]


def test_without_calibration_weights_are_rounded_to_nearest() -> None:
    decoder = make_decoder("llama", **SMALL)
    eight_bits = [("v",), (), ("down",)]
    layers = list(quantize_layers(decoder, None, LayerQuantizer(WeightSettings(), eight_bits)))
    for each, names in zip(layers, eight_bits, strict=True):
        trained = decoder.layers[each.index]
        assert each.layer.attention.v.codes is not None
        assert each.layer.attention.v.codes.bits == (8 if "v" in names else 4)
        expected = round_to_nearest(trained.mlp.down.weight, 8 if "down" in names else 4, 128, torch.float32)
        assert torch.equal(each.layer.mlp.down.codes.codes, expected.codes)


def test_residual_errors_grow_with_fewer_bits() -> None:
    decoder = make_decoder("llama", **SMALL)

    def errors(bits: int) -> list[float]:
        quantizer = LayerQuantizer(WeightSettings(bits=bits))
        windows = random_windows(decoder, 16, 32)
        return [each.report.residual_error for each in quantize_layers(decoder, windows, quantizer)]

    assert all(0 < eight < 0.3 * four for four, eight in zip(errors(4), errors(8), strict=True))


@pytest.mark.parametrize("style", ["llama", "qwen3", "bias"])
def test_compression_comes_before_quantisation_and_the_refit_sees_both(style: str) -> None:
    decoder = make_decoder(style, **SMALL)
    windows = random_windows(decoder, 16, 32)
    request = CompressionRequest(kv_ratio=0.5)
    methods = methods_for("auto", decoder.layers[0].attention)
    plans = plan_compression(decoder, windows, request, methods, None, 32, Progress()).layer_plans
    quantizer = LayerQuantizer(WeightSettings(bits=8))
    refitted: list[bool] = []

    def quantize(index, layer: Layer, streams, refit) -> Layer:
        assert layer.attention.q.codes is None
        refitted.append(refit is not None)
        return quantizer(index, layer, streams, refit)

    def converted(hook) -> Decoder:
        layers = [each.layer for each in convert(decoder, windows, plans, quantize=hook)]
        return dataclasses.replace(decoder, layers=layers)

    both, alone = converted(quantize), converted(None)
    assert any(refitted)
    for a, b in zip(both.layers, alone.layers, strict=True):
        assert a.attention.kv_width == b.attention.kv_width
        assert a.attention.o.codes is not None and b.attention.o.codes is None
    loss, loss_alone = kl(decoder, both), kl(decoder, alone)
    assert loss == pytest.approx(loss_alone, rel=0.2)
    afterwards = dataclasses.replace(
        alone,
        layers=[each.layer for each in quantize_layers(alone, windows, LayerQuantizer(WeightSettings()))],
    )
    four = converted(LayerQuantizer(WeightSettings()))
    assert kl(decoder, four) > loss_alone
    assert kl(decoder, four) < 1.1 * kl(decoder, afterwards)


def test_embedding_and_head() -> None:
    decoder = make_decoder("llama", **SMALL)
    weight = decoder.embedding.weight
    for bits, blocks in ((8, 1), (4, 2)):
        table = quantize_embedding(decoder.embedding, bits, 32, torch.float16)
        codes = table.codes
        assert torch.equal(table.weight, dequantize(codes))
        assert codes.scales.shape == (len(weight), blocks)
        assert torch.equal(codes.codes, round_to_nearest(weight, bits, 64 // blocks, torch.float16).codes)
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(0)) @ torch.randn(
        64, 64, generator=torch.Generator().manual_seed(1)
    )
    head = Linear(weight)

    def error(found: Linear) -> float:
        assert torch.equal(found.weight, dequantize(found.codes))
        return float((reference.linear(found, x) - reference.linear(head, x)).square().mean())

    second = x.double().T @ x.double() / len(x)
    nearest = quantize_head(head, 4, 32, torch.float32)
    assert error(quantize_head(head, 4, 32, torch.float32, second)) < 0.8 * error(nearest)
    assert error(quantize_head(head, 8, 32, torch.float32)) < 0.02 * error(nearest)
