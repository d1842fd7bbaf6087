"""Folding of channel scales: the function stays, and the error of quantised weights falls."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.decoders import STYLES, make_decoder
from torch import Tensor

from kvexport.calibrate import windows as attention_windows
from kvexport.model import reference
from kvexport.model.decoder import Decoder, Layer
from kvexport.quantize.awq import channel_scales, fold_channel_scales
from kvexport.quantize.grid import quantized, round_to_nearest
from kvexport.quantize.inputs import LayerInputs


def outlier_stream(decoder: Decoder) -> Tensor:
    """A residual stream in which a few channels are far larger than the others, [4, 16, hidden]."""
    tokens = torch.randint(0, 40, (4, 16), generator=torch.Generator().manual_seed(0))
    x = reference.embed(decoder.embedding, tokens)
    return x * torch.where(torch.arange(x.shape[2]) % 11 == 3, 20.0, 1.0).to(x)


def run(layer: Layer, x: Tensor) -> Tensor:
    return reference.run_block(
        layer, x, lambda inner: attention_windows.attend(layer.attention, inner)
    ).residual


def fold(layer: Layer, x: Tensor) -> Layer:
    inputs = LayerInputs(x, range(len(x)))
    return fold_channel_scales(layer, inputs.second_moments, 4, 32, torch.float32)


@pytest.mark.parametrize("style", STYLES)
def test_the_function_of_a_layer_stays(style: str) -> None:
    decoder = make_decoder(style, hidden=32)
    x, outputs_change = outlier_stream(decoder), list[bool]()
    for layer in decoder.layers:
        folded = fold(layer, x)
        torch.testing.assert_close(run(folded, x), run(layer, x), rtol=1e-9, atol=1e-9)
        assert not torch.equal(folded.attention.q.weight, layer.attention.q.weight)
        outputs_change.append(not torch.equal(folded.attention.o.weight, layer.attention.o.weight))
        gated = layer.mlp.gate is not None
        assert torch.equal(folded.mlp.down.weight, layer.mlp.down.weight) != gated  # GELU is not linear
    assert any(outputs_change)  # an exponent of 0 can be the best one


def test_layers_without_norms_or_with_maps_keep_what_does_not_fold() -> None:
    decoder = make_decoder("llama")
    x = outlier_stream(decoder)
    layer = dataclasses.replace(decoder.layers[0], attention_norm=None, parallel=True, mlp_norm=None)
    layer = dataclasses.replace(layer, attention=dataclasses.replace(layer.attention, clip=0.5))
    folded = fold(layer, x)
    assert torch.equal(folded.attention.q.weight, layer.attention.q.weight)
    assert torch.equal(folded.attention.o.weight, layer.attention.o.weight)
    torch.testing.assert_close(run(folded, x), run(layer, x), rtol=1e-9, atol=1e-9)


def test_scales_reduce_the_error_of_outlier_channels() -> None:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(32, 64, generator=generator, dtype=torch.float64)
    x = torch.randn(256, 64, generator=generator, dtype=torch.float64)
    x[:, ::16] *= 30
    second = x.T @ x / len(x)
    scales = channel_scales((weight,), second, 4, 64, torch.float32)
    assert scales[0] > 2 * scales[1]

    def loss(factor: Tensor) -> float:
        codes = round_to_nearest(weight * factor, 4, 64, torch.float32)
        error = (codes.codes * codes.scales.repeat_interleave(64, 1)) / factor - weight
        return float(((error @ second) * error).sum())

    assert loss(scales) < 0.7 * loss(torch.ones_like(scales))


def test_queries_of_a_shared_head_have_the_same_scales() -> None:
    layer = make_decoder("gqa").layers[0]
    weight = layer.attention.o.weight  # [32, 4 heads of 8], 2 KV heads
    second = torch.rand(32, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).diag()
    tied = torch.tensor([0, 0, 1, 1])[:, None] * 8 + torch.arange(8)
    scales = channel_scales((weight,), second, 4, 32, torch.float32, tied.flatten()).unflatten(0, (4, 8))
    assert torch.equal(scales[0], scales[1])
    assert torch.equal(scales[2], scales[3])
    assert not torch.equal(scales[0], scales[2])


def test_moments_use_the_maps_as_they_are() -> None:
    """Inputs of `down` come from the quantised `up` and `gate` once the layer has them."""
    decoder = make_decoder("llama")
    x, layer = outlier_stream(decoder), decoder.layers[0]
    inputs = LayerInputs(x, range(3))
    inner = reference.normed(layer.attention_norm, x[:3]).flatten(0, 1)
    torch.testing.assert_close(inputs.second_moments(layer, "qkv"), inner.T @ inner / len(inner))
    up = quantized(layer.mlp.up, round_to_nearest(layer.mlp.up.weight, 4, 32, torch.float32))
    other = dataclasses.replace(layer, mlp=dataclasses.replace(layer.mlp, up=up))
    for part in ("qkv", "o", "gate_up"):
        assert torch.equal(inputs.second_moments(other, part), inputs.second_moments(layer, part))
    assert not torch.equal(inputs.second_moments(other, "down"), inputs.second_moments(layer, "down"))
