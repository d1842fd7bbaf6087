"""Gradients of scores, layer by layer, against autograd through the whole model and a measured KL."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from support.decoders import make_decoder, random_windows
from torch import Tensor

from kvexport.calibrate import windows as attention_windows
from kvexport.convert.score_gradients import ScoreGradients, _through_layer
from kvexport.model import reference
from kvexport.model.decoder import Attention, Decoder

STYLES = ["llama", "gqa", "bias", "bloom", "qwen3", "parallel"]


def decoder_of(style: str) -> Decoder:
    heads = {"heads": 8, "kv_heads": 4} if style == "gqa" else {}
    parallel = style == "parallel"
    kind = "llama" if parallel else style
    decoder = make_decoder(kind, layers=3, sharpness=2.0, dtype=torch.float64, **heads)
    return replace(decoder, layers=[replace(layer, parallel=parallel) for layer in decoder.layers])


def run(
    decoder: Decoder, tokens: Tensor, changed: Callable[[int, Tensor], Tensor]
) -> tuple[list[Tensor], Tensor]:
    """The residual stream before each layer and after the last one, with changed attention outputs; and the
    logits.
    """

    def attend(index: int, attention: Attention, inner: Tensor) -> Tensor:
        return changed(index, attention_windows.attend(attention, inner))

    x = reference.embed(decoder.embedding, tokens)
    streams = [x]
    for index, layer in enumerate(decoder.layers):
        x = reference.run_block(layer, x, partial(attend, index, layer.attention)).residual
        streams.append(x)
    return streams, reference.logits(decoder, x)


def gradients_of(decoder: Decoder, tokens: Tensor, seed: int = 0) -> list[Tensor]:
    """Gradients [N, S, hidden] at the attention output of each layer."""
    streams, _ = run(decoder, tokens, lambda index, output: output)
    gradients = ScoreGradients(decoder, streams[-1], seed)
    found = [
        gradients.go_back(layer, stream)
        for layer, stream in zip(reversed(decoder.layers), reversed(streams[:-1]), strict=True)
    ]
    return found[::-1]


def labels_of(decoder: Decoder, tokens: Tensor, seed: int) -> Tensor:
    """The labels that `ScoreGradients` draws, [N, S - 1, 1]."""
    _, logits = run(decoder, tokens, lambda index, output: output)
    generator = torch.Generator().manual_seed(seed)
    probabilities = logits[:, :-1].softmax(-1)
    return torch.stack(
        [torch.multinomial(window, 1, replacement=True, generator=generator) for window in probabilities]
    )


@pytest.mark.parametrize("style", STYLES)
def test_layer_by_layer_is_autograd_through_the_model(style: str) -> None:
    decoder = decoder_of(style)
    tokens = random_windows(decoder, 3, 12)
    found, labels = gradients_of(decoder, tokens, seed=5), labels_of(decoder, tokens, seed=5)
    zeros = [
        torch.zeros(3, 12, decoder.dims.hidden_size, dtype=torch.float64, requires_grad=True) for _ in found
    ]
    _, logits = run(decoder, tokens, lambda index, output: output + zeros[index])
    score = logits[:, :-1].log_softmax(-1).gather(-1, labels).sum()
    for each, whole in zip(found, torch.autograd.grad(score, zeros), strict=True):
        torch.testing.assert_close(each, whole, rtol=1e-9, atol=1e-12)
    other = gradients_of(decoder, tokens, seed=6)  # control: other labels
    assert (other[0] - found[0]).norm() > 0.1 * found[0].norm()


def test_squared_scores_are_the_kl_of_a_small_error() -> None:
    """½ E[(Σ_t g·Δo)²] against the KL of the disturbed model, with other layers' gradients as a control."""
    decoder = decoder_of("llama")
    tokens = random_windows(decoder, 1, 8).expand(1500, 8)  # one window, many labels
    generator = torch.Generator().manual_seed(1)
    error = 1e-3 * torch.randn(8, decoder.dims.hidden_size, generator=generator, dtype=torch.float64)
    gradients = gradients_of(decoder, tokens)
    _, trained = run(decoder, tokens, lambda index, output: output)
    for layer in range(3):
        _, disturbed = run(
            decoder, tokens, lambda index, output, layer=layer: output + error if index == layer else output
        )
        a, b = (each[:, :-1].log_softmax(-1) for each in (trained, disturbed))
        kl = float((a.exp() * (a - b)).sum()) / len(tokens)
        estimates = [float((each * error).sum((1, 2)).square().mean()) / 2 for each in gradients]
        assert estimates[layer] == pytest.approx(kl, rel=0.15)
        others = [each for index, each in enumerate(estimates) if index != layer]
        assert all(each != pytest.approx(kl, rel=0.15) for each in others)


def test_gradients_leave_the_decoder_without_gradients() -> None:
    decoder = decoder_of("llama")
    weight = decoder.layers[0].attention.o.weight
    gradients_of(decoder, random_windows(decoder, 2, 6))
    assert weight.grad is None and not weight.requires_grad


@pytest.mark.parametrize("style", ["qwen3", "bloom"])
def test_gradients_in_a_layer_are_those_of_autograd(style: str) -> None:
    decoder = make_decoder(style)
    layer = decoder.layers[0]
    x = reference.embed(decoder.embedding, random_windows(decoder, 2, 8)).requires_grad_()
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    before, found = _through_layer(layer, x.detach(), weights)

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
    for each, whole in zip((before, *found.gradients), expected, strict=True):
        torch.testing.assert_close(each, whole)
