"""Layer by layer: which inputs each part sees, what is corrected, and which bits each linear map has."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.decoders import STYLES, make_decoder, random_windows
from torch import Tensor

from kvexport.calibrate import windows as attention_windows
from kvexport.model import reference
from kvexport.model.decoder import Layer
from kvexport.quantize.gptq import gptq
from kvexport.quantize.grid import Grid, dequantize, round_to_nearest
from kvexport.quantize.inputs import LayerInputs, all_linears
from kvexport.quantize.layers import WeightSettings, quantize_layer
from kvexport.quantize.method_names import METHODS

COARSE = WeightSettings(block=32, ridge=None)


def stream(style: str = "llama", hidden: int = 32) -> tuple[Layer, Tensor]:
    """The first layer of a random decoder, and the residual stream before it, [8, 24, hidden]."""
    decoder = make_decoder(style, hidden=hidden)
    return decoder.layers[0], reference.embed(decoder.embedding, random_windows(decoder, 8, 24))


def attended(layer: Layer, x: Tensor) -> Tensor:
    inner = reference.normed(layer.attention_norm, x)
    return attention_windows.attend(layer.attention, inner)


def run(layer: Layer, x: Tensor) -> Tensor:
    return reference.run_block(
        layer, x, lambda inner: attention_windows.attend(layer.attention, inner)
    ).residual


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("method", METHODS)
def test_every_linear_map_has_codes_that_are_its_weight(style: str, method: str) -> None:
    layer, x = stream(style)
    settings = WeightSettings(block=32, method=method, dtype=torch.float16)
    inputs = LayerInputs(x, range(6), x, attended(layer, x))
    quantized = quantize_layer(layer, settings, inputs, eight_bits=("v", "down"))
    for name, linear in all_linears(quantized).items():
        assert linear.codes is not None
        assert linear.codes.bits == (8 if name in ("v", "down") else 4)
        assert torch.equal(linear.weight, dequantize(linear.codes))
        assert torch.equal(linear.codes.scales.half().to(linear.weight), linear.codes.scales)
        assert linear.weight.dtype == all_linears(layer)[name].weight.dtype
        if not method.startswith("awq"):
            assert linear.bias is all_linears(layer)[name].bias
    error = (run(quantized, x) - run(layer, x)).square().mean() / run(layer, x).square().mean()
    assert 0 < error < 0.05


def test_parts_see_what_the_quantised_parts_before_them_make() -> None:
    layer, x = stream()
    quantized = quantize_layer(layer, COARSE, LayerInputs(x, range(6)))
    inner = reference.mlp_inner
    before = dataclasses.replace(quantized, mlp=dataclasses.replace(quantized.mlp, down=layer.mlp.down))
    taken: list[Tensor] = []

    def feed(mlp, normed):
        taken.append(inner(mlp, normed).flatten(0, -2))
        return torch.zeros_like(normed)

    for each in (before, layer):
        reference.run_block(
            each, x[:6], lambda a, each=each: attention_windows.attend(each.attention, a), feed
        )
    codes = [
        gptq(layer.mlp.down.weight, rows.T @ rows / len(rows), Grid(4, 32), torch.float32).codes
        for rows in taken
    ]
    assert torch.equal(quantized.mlp.down.codes.codes, codes[0])
    assert not torch.equal(quantized.mlp.down.codes.codes, codes[1])


def test_correction_brings_outputs_closer_to_the_trained_ones() -> None:
    """The quantised stream differs from the trained one; in 8 bits the difference is all that counts."""
    layer, x = stream(hidden=64)
    generator = torch.Generator().manual_seed(7)
    noisy = 0.8 * x + 0.2 * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    target = reference.linear(layer.attention.q, reference.normed(layer.attention_norm, x))

    def error(settings: WeightSettings) -> float:
        inputs = LayerInputs(noisy, range(8), x, attended(layer, x))
        quantized = quantize_layer(layer, settings, inputs)
        inner = reference.normed(layer.attention_norm, noisy)
        return float((reference.linear(quantized.attention.q, inner) - target).square().mean())

    plain = error(WeightSettings(bits=8, ridge=None))
    assert error(WeightSettings(bits=8, ridge=0.01)) < 0.95 * plain
    assert error(WeightSettings(bits=8, ridge=1e9)) == pytest.approx(plain, rel=1e-3)


def test_correction_of_equal_streams_changes_nothing() -> None:
    layer, x = stream()
    inputs = LayerInputs(x, range(8), x, attended(layer, x))
    corrected = quantize_layer(layer, WeightSettings(block=32), inputs)
    plain = quantize_layer(layer, COARSE, LayerInputs(x, range(8)))
    for name in ("q", "k", "v"):
        assert torch.equal(all_linears(corrected)[name].weight, all_linears(plain)[name].weight)
    assert not torch.equal(corrected.mlp.down.weight, plain.mlp.down.weight)  # its inputs differ already


def test_round_to_nearest_needs_no_inputs() -> None:
    layer, _ = stream()
    quantized = quantize_layer(layer, WeightSettings(block=32, method="nearest"))
    for name, linear in all_linears(quantized).items():
        expected = round_to_nearest(all_linears(layer)[name].weight, 4, 32, torch.float32)
        assert torch.equal(linear.codes.codes, expected.codes)


def test_gptq_layers_lose_less_than_rounded_ones() -> None:
    layer, x = stream(hidden=64)

    def error(method: str) -> float:
        quantized = quantize_layer(layer, WeightSettings(method=method), LayerInputs(x, range(8)))
        return float((run(quantized, x) - run(layer, x)).square().mean())

    assert error("gptq") < 0.8 * error("nearest")


@pytest.mark.parametrize("method", ["gptq", "awq+gptq"])
def test_other_devices_give_equal_codes(device: torch.device, method: str) -> None:
    from kvexport.model.placement import CPU, move

    layer, x = stream("gqa")
    settings = WeightSettings(block=32, method=method)
    here = quantize_layer(layer, settings, LayerInputs(x, range(8), x, attended(layer, x)))
    there_layer, there_x = move(layer, device), x.to(device)
    there = quantize_layer(
        there_layer, settings, LayerInputs(there_x, range(8), there_x, attended(there_layer, there_x))
    )
    for name, linear in all_linears(move(there, CPU)).items():
        assert torch.equal(linear.codes.codes, all_linears(here)[name].codes.codes)
