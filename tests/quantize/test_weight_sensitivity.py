"""Predicted losses of weights against the KL of models in which one weight is quantised."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.decoders import make_decoder, random_windows
from torch import Tensor

from kvexport.model.decoder import Decoder, Linear
from kvexport.quantize.grid import quantized, round_to_nearest
from kvexport.quantize.inputs import PARTS, all_linears, linears_of, with_linears
from kvexport.quantize.layers import WeightSettings
from kvexport.quantize.sensitivity import WeightAnalysis, WeightLoss, analyze_weights, layer_key
from kvexport.quantize.tables import quantize_embedding, quantize_head, quantize_tables
from kvexport.validate.evaluate import divergence_of

NEAREST = WeightSettings(block=32, method="nearest", ridge=None)


def losses_of(decoder: Decoder, windows: Tensor, settings: WeightSettings) -> dict[str, WeightLoss]:
    return analyze_weights(decoder, windows, settings).losses


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
    losses = losses_of(decoder, random_windows(decoder, 24, 160), NEAREST)
    windows = random_windows(decoder, 8, 160, seed=5)
    ratios = []
    for index in range(2):
        for name, linear in all_linears(decoder.layers[index]).items():
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
    losses = losses_of(untied, windows, NEAREST)
    head = dataclasses.replace(untied, head=quantize_head(table, 4, NEAREST))
    assert losses["head"].kl == pytest.approx(divergence_of(untied, head, test).mean_kl, rel=0.3)
    embedding = quantize_embedding(untied.embedding, 4, NEAREST)
    embedded = dataclasses.replace(untied, embedding=embedding)
    assert losses["embedding"].kl == pytest.approx(divergence_of(untied, embedded, test).mean_kl, rel=0.5)
    tied = losses_of(dataclasses.replace(decoder, head=None), windows, NEAREST)
    assert "head" not in tied and tied["embedding"].kl > 0


def test_the_loss_of_a_tied_table_is_that_of_the_codes_of_both_uses() -> None:
    decoder = make_decoder("llama", hidden=64, head_dim=16, vocab=48)
    table = torch.randn(48, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 8
    embedding = dataclasses.replace(decoder.embedding, weight=table, multiplier=8.0)
    decoder = dataclasses.replace(decoder, head=None, embedding=embedding)
    settings = dataclasses.replace(NEAREST, method="gptq")
    found = analyze_weights(decoder, random_windows(decoder, 48, 64), settings)
    quantized = quantize_tables(decoder, 4, 4, settings, found.head_inputs)
    kl = divergence_of(decoder, quantized, random_windows(decoder, 24, 64, seed=5)).mean_kl
    assert found.losses["embedding"].kl == pytest.approx(kl, rel=0.4)
    assert found.losses["embedding"].weights == 48 * 64


def test_an_analysis_is_saved_as_tensors() -> None:
    losses = {"0.q": WeightLoss(2**33 + 1, 0.1, 1e-9, 2**34 + 3, 2**35 + 5)}
    for second in (None, torch.eye(3)):
        analysis = WeightAnalysis(losses, second)
        again = WeightAnalysis.from_tensors(analysis.tensors())
        assert again.losses == losses
        assert (again.head_inputs is None) == (second is None)


def test_one_window_is_enough() -> None:
    decoder = make_decoder("gqa", hidden=64, head_dim=16, vocab=48)
    settings = dataclasses.replace(NEAREST, method="gptq")
    losses = losses_of(decoder, random_windows(decoder, 1, 32), settings)
    assert all(0 < each.kl_eight < each.kl for each in losses.values())


def test_losses_of_gptq_are_less_than_those_of_rounding() -> None:
    decoder = make_decoder("gqa", hidden=64, head_dim=16, vocab=48)
    windows = random_windows(decoder, 48, 32)
    nearest = losses_of(decoder, windows, NEAREST)
    gptq = losses_of(decoder, windows, dataclasses.replace(NEAREST, method="gptq"))
    assert sum(each.kl for each in gptq.values()) < 0.95 * sum(each.kl for each in nearest.values())
