"""Sensitivity analysis and conversion on another device give the CPU's results."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.decoders import make_decoder, random_windows

from kvexport.calibrate import Moments
from kvexport.calibrate.moments import MOMENT_NAMES
from kvexport.convert import (
    CompressionRequest,
    ConvertedLayer,
    LayerSensitivity,
    analyze_sensitivity,
    convert,
    methods_for,
    plan_compression,
)
from kvexport.convert.pipeline import measure_moments
from kvexport.model.decoder import Decoder, tensors_of
from kvexport.model.placement import CPU, move, place
from kvexport.progress import Progress

# Float32 products are rounded otherwise on the device, and float64 ones are not
FLOAT32 = {"rtol": 1e-4, "atol": 1e-5}
FLOAT64 = {"rtol": 1e-9, "atol": 1e-11}
TOLERANCES = {torch.float32: FLOAT32, torch.float64: FLOAT64}


def decoder_of(style: str, dtype: torch.dtype) -> Decoder:
    return make_decoder(style, heads=8 if style == "gqa" else 4, dtype=dtype)


def moments_on(decoder: Decoder) -> list[Moments]:
    return list(measure_moments(decoder, random_windows(decoder, 6, 24)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("style", ["gqa", "qwen3", "bloom", "window"])
def test_moments_are_those_of_the_cpu(device: torch.device, style: str, dtype: torch.dtype) -> None:
    decoder = decoder_of(style, dtype)
    for here, there in zip(moments_on(decoder), moments_on(place(decoder, device)), strict=True):
        for name in MOMENT_NAMES:
            a, b = getattr(here, name), getattr(there, name)
            assert b.device.type == "cpu" and b.dtype == a.dtype
            scale = max(1.0, float(a.abs().max()))
            torch.testing.assert_close(b / scale, a / scale, **TOLERANCES[dtype])


def test_covariances_of_keys_with_a_large_mean_stay_accurate(device: torch.device) -> None:
    """Biases of keys are hundreds of times larger than their standard deviation in some families."""
    decoder = make_decoder("bias", dtype=torch.float32)
    attention = decoder.layers[0].attention
    assert attention.k.bias is not None
    biased = replace(attention, k=replace(attention.k, bias=attention.k.bias + 300))
    decoder = replace(decoder, layers=[replace(decoder.layers[0], attention=biased)])
    everything = slice(0, biased.k.weight.shape[0])
    here, there = (
        each[0].key_covariance(everything) for each in map(moments_on, (decoder, place(decoder, device)))
    )
    assert float((here - there).abs().max()) < 1e-4 * float(here.diagonal().mean())


def sensitivity_of(decoder: Decoder) -> list[LayerSensitivity]:
    windows = random_windows(decoder, 6, 24)
    return analyze_sensitivity(decoder, windows, methods_for("auto", decoder.layers[0].attention), (1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("style", ["llama", "qwen3", "bloom"])
def test_sensitivities_are_those_of_the_cpu(device: torch.device, style: str, dtype: torch.dtype) -> None:
    decoder = decoder_of(style, dtype)
    for here, there in zip(sensitivity_of(decoder), sensitivity_of(place(decoder, device)), strict=True):
        a, b = here.tensors(), there.tensors()
        assert a.keys() == b.keys()
        for name in a:
            assert b[name].device.type == "cpu"
            torch.testing.assert_close(b[name], a[name], rtol=TOLERANCES[dtype]["rtol"] * 10, atol=1e-5)


def converted_by(decoder: Decoder, method: str) -> tuple[list[ConvertedLayer], float]:
    windows = random_windows(decoder, 8, 24)
    methods = methods_for(method, decoder.layers[0].attention)
    request = CompressionRequest(kv_heads=2)
    plan = plan_compression(decoder, windows, request, methods, None, None, Progress())
    conversion = convert(decoder, windows, plan.layer_plans)
    return list(conversion), conversion.divergence().mean_kl


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("style", "method"),
    [
        ("llama", "auto"),
        ("llama", "fold"),
        ("gqa", "svd-a"),
        ("qwen3", "online"),
        ("bloom", "online"),
        ("bias", "mean-pool"),
    ],
)
def test_converted_layers_are_those_of_the_cpu(
    device: torch.device, style: str, method: str, dtype: torch.dtype
) -> None:
    decoder = decoder_of(style, dtype)
    here, kl = converted_by(decoder, method)
    there, kl_there = converted_by(place(decoder, device), method)
    assert kl_there == pytest.approx(kl, rel=10 * TOLERANCES[dtype]["rtol"])
    for a, b in zip(here, there, strict=True):
        assert b.layer.attention.o.weight.device == device
        assert replace(b.report, predicted_error=0, measured_error=0, residual_error=0) == replace(
            a.report, predicted_error=0, measured_error=0, residual_error=0
        )
        for name in ("predicted_error", "measured_error", "residual_error"):
            assert getattr(b.report, name) == pytest.approx(
                getattr(a.report, name), rel=10 * TOLERANCES[dtype]["rtol"]
            )
        if dtype == torch.float64:  # rounding of float32 can change the basis of a code
            for x, y in zip(tensors_of(a.layer), tensors_of(move(b.layer, CPU)), strict=True):
                torch.testing.assert_close(y, x, rtol=1e-6, atol=1e-6)


def test_a_decoder_on_two_devices_is_not_converted(device: torch.device) -> None:
    decoder = decoder_of("llama", torch.float32)
    with pytest.raises(RuntimeError, match="on the same device"):
        converted_by(replace(place(decoder, device), layers=decoder.layers), "online")
