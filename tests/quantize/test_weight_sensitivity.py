"""Predicted losses of weights against the KL of models in which one weight is quantised."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.decoders import make_decoder, random_windows
from torch import Tensor

from kvexport.calibrate import windows as attention_windows
from kvexport.model import reference
from kvexport.model.decoder import Decoder, Linear
from kvexport.quantize.grid import quantized, round_to_nearest
from kvexport.quantize.inputs import PARTS, linears_of, with_linears
from kvexport.quantize.layers import WeightSettings
from kvexport.quantize.model import quantize_embedding, quantize_head
from kvexport.quantize.sensitivity import _go_back, layer_key, measure_weight_losses
from kvexport.validate.evaluate import divergence_of

NEAREST = WeightSettings(block=32, method="nearest", ridge=None)


def with_one(decoder: Decoder, index: int, name: str, bits: int) -> Decoder:
    """The decoder with one linear map rounded to nearest."""
    layer = decoder.layers[index]
    for part in PARTS:
        linear = linears_of(layer, part).get(name)
        if linear is not None:
            block = 32 if bits == 4 else None
            codes = round_to_nearest(linear.weight, bits, block, torch.float32)
            layer = with_linears(layer, part, {name: quantized(linear, codes)})
    layers = list(decoder.layers)
    layers[index] = layer
    return dataclasses.replace(decoder, layers=layers)


@pytest.mark.parametrize("style", ["gqa", "bloom", "qwen3"])
def test_losses_are_those_of_models_with_one_weight_quantised(style: str) -> None:
    decoder = make_decoder(style, hidden=64, head_dim=16, vocab=48)
    if style == "gqa":  # gradients differ a lot before and after a layer that adds most of the stream
        embedding = dataclasses.replace(decoder.embedding, multiplier=0.05)
        decoder = dataclasses.replace(decoder, embedding=embedding)
    losses = measure_weight_losses(decoder, random_windows(decoder, 24, 160), NEAREST)
    windows = random_windows(decoder, 8, 160, seed=5)
    ratios = []
    for index in range(2):
        for part in PARTS:
            for name, linear in linears_of(decoder.layers[index], part).items():
                loss = losses[layer_key(index, name)]
                kl = divergence_of(decoder, with_one(decoder, index, name, 4), windows).mean_kl
                ratios.append(loss.kl / kl)
                assert 1 / 3 < ratios[-1] < 3, (index, name, ratios[-1])
                assert loss.kl_eight < 0.05 * loss.kl
                assert loss.bytes == linear.weight.numel() // 2 + linear.weight.numel() // 32 * 4
                assert loss.bytes_eight == linear.weight.numel() + len(linear.weight) * 4
    assert torch.tensor(ratios).log().mean().abs() < 0.25


def test_losses_of_embedding_and_head() -> None:
    decoder = make_decoder("llama", hidden=64, head_dim=16, vocab=48)
    table = Linear(torch.randn(48, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 8)
    untied, windows = dataclasses.replace(decoder, head=table), random_windows(decoder, 48, 32)
    test = random_windows(decoder, 24, 32, seed=5)
    losses = measure_weight_losses(untied, windows, NEAREST)
    head = dataclasses.replace(untied, head=quantize_head(table, 4, 32, torch.float32))
    assert losses["head"].kl == pytest.approx(divergence_of(untied, head, test).mean_kl, rel=0.3)
    embedding = quantize_embedding(untied.embedding, 4, 32, torch.float32)
    embedded = dataclasses.replace(untied, embedding=embedding)
    assert losses["embedding"].kl == pytest.approx(divergence_of(untied, embedded, test).mean_kl, rel=0.5)
    tied = measure_weight_losses(dataclasses.replace(decoder, head=None), windows, NEAREST)
    assert "head" not in tied and tied["embedding"].kl > 0


@pytest.mark.parametrize("style", ["qwen3", "bloom"])
def test_gradients_are_those_of_autograd(style: str) -> None:
    decoder = make_decoder(style)
    layer = decoder.layers[0]
    x = reference.embed(decoder.embedding, random_windows(decoder, 2, 8)).requires_grad_()
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    before, outputs = _go_back(layer, x.detach(), weights)

    def score(x: Tensor, of_attention: Tensor, of_mlp: Tensor) -> Tensor:
        output = reference.run_block(
            layer,
            x,
            lambda a: attention_windows.attend(layer.attention, a) + of_attention,
            lambda mlp, a: reference.mlp(mlp, a) + of_mlp,
        )
        return (output.residual * weights).sum()

    zeros = [torch.zeros_like(x, requires_grad=True) for _ in range(2)]
    expected = torch.autograd.grad(score(x, *zeros), (x, *zeros))
    for found, each in zip((before, *outputs.gradient), expected, strict=True):
        torch.testing.assert_close(found, each)


def test_losses_of_gptq_are_less_than_those_of_rounding() -> None:
    decoder = make_decoder("gqa", hidden=64, head_dim=16, vocab=48)
    windows = random_windows(decoder, 48, 32)
    nearest = measure_weight_losses(decoder, windows, NEAREST)
    gptq = measure_weight_losses(decoder, windows, dataclasses.replace(NEAREST, method="gptq"))
    assert sum(each.kl for each in gptq.values()) < 0.95 * sum(each.kl for each in nearest.values())
