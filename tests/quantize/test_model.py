"""Quantisation of all layers of a model."""

from __future__ import annotations

import dataclasses

import torch
from support.decoders import make_decoder, random_windows

from kvexport.model.decoder import Decoder
from kvexport.quantize.grid import round_to_nearest
from kvexport.quantize.layers import WeightSettings
from kvexport.quantize.model import LayerQuantizer, quantize_layers
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
