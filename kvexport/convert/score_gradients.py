"""Gradients of a model's score with respect to the attention outputs, one layer at a time, last layer first.

The score of a prediction is log p(y) of a label y drawn from the prediction itself. The gradients g of scores
give the Fisher information: a small error Δo of an attention output causes, to second order,

    KL = ½ E[(Σ_t gᵀ_t Δo_t)²],

summed over the predictions of a window; t runs over its positions, and the expectation is over labels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kvexport.calibrate import windows as attention_windows
from kvexport.model import reference
from kvexport.model.decoder import Attention, Decoder, Layer


class ScoreGradients:
    """Gradients of the summed scores of each window; starts at the logits and goes back layer by layer."""

    def __init__(self, decoder: Decoder, x: Tensor, draws: int, seed: int = 0) -> None:
        """
        Args:
            decoder: the trained model.
            x: its residual stream after the last layer, [N, S, hidden].
            draws: labels per prediction, each of which gives gradients of its own.
            seed: random seed of the labels.
        """
        generator = torch.Generator().manual_seed(seed)
        self._gradients = torch.stack(
            [_at_logits(decoder, x[at : at + 1], draws, generator) for at in range(len(x))], 1
        )  # [draws, N, S, hidden]

    def go_back(self, layer: Layer, x: Tensor) -> Tensor:
        """Go back through one layer.

        Args:
            layer: the layer before which the last call, or the constructor, ended.
            x: the residual stream before it, [N, S, hidden].

        Returns:
            Gradients with respect to the output of its attention after `o`, [draws, N, S, hidden].
        """
        at_attention = torch.empty_like(self._gradients)
        for batch in attention_windows.batches(range(len(x)), x.shape[1]):
            before = x[batch].clone().requires_grad_()
            recorded: list[Tensor] = []
            attend = partial(_recording, layer.attention, recorded.append)
            with torch.enable_grad():
                after = reference.run_block(layer, before, attend).residual
            for draw in range(len(self._gradients)):
                keep = draw + 1 < len(self._gradients)
                self._gradients[draw, batch], at_attention[draw, batch] = torch.autograd.grad(
                    after, (before, recorded[0]), self._gradients[draw, batch], retain_graph=keep
                )
        return at_attention


def _recording(attention: Attention, record: Callable[[Tensor], None], inner: Tensor) -> Tensor:
    output = attention_windows.attend(attention, inner)
    record(output)
    return output


def _at_logits(decoder: Decoder, x: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Gradients of one window's scores with respect to x [1, S, hidden], [draws, S, hidden].

    The last position predicts a token outside the window and has no score.
    """
    x = x.clone().requires_grad_()
    with torch.enable_grad():
        logits = reference.logits(decoder, x)[0, :-1]  # [S - 1, vocab]
        log_probabilities = logits.log_softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32))
    probabilities = log_probabilities.detach().exp().cpu()
    gradients = []
    for draw in range(draws):
        labels = torch.multinomial(probabilities, 1, generator=generator).to(x.device)
        with torch.enable_grad():
            score = log_probabilities.gather(-1, labels).sum()
        (gradient,) = torch.autograd.grad(score, x, retain_graph=draw + 1 < draws)
        gradients.append(gradient[0])
    return torch.stack(gradients)
