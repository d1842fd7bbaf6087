"""Gradients of a model's score with respect to the attention outputs, one layer at a time, last layer first.

The score of a prediction is log p(y) of a label y drawn from the prediction itself. The gradients g of scores
give the Fisher information: a small error Δo of an attention output causes, to second order,

    KL = ½ E[(Σ_t gᵀ_t Δo_t)²],

summed over the predictions of a window; t runs over its positions, and the expectation is over labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kvexport.calibrate import windows as attention_windows
from kvexport.model import reference
from kvexport.model.decoder import Decoder, Layer, Mlp


@dataclass(frozen=True)
class LayerOutputs:
    """Inputs and outputs of attention and MLP, in this order, and the gradients of scores with respect to the
    outputs.

    Attributes:
        inputs: after the norms before them, [B, S, hidden] each.
        outputs: before the norms after them, [B, S, hidden] each.
        gradients: same shapes.
    """

    inputs: tuple[Tensor, Tensor]
    outputs: tuple[Tensor, Tensor]
    gradients: tuple[Tensor, Tensor]


class ScoreGradients:
    """Gradients of the summed scores of each window; starts at the logits and goes back layer by layer.

    Attributes:
        before: gradients with respect to the residual stream before the layer reached, [N, S, hidden].
    """

    def __init__(self, decoder: Decoder, x: Tensor, seed: int = 0) -> None:
        """
        Args:
            decoder: the trained model.
            x: its residual stream after the last layer, [N, S, hidden].
            seed: random seed of the labels, one per prediction.
        """
        self.before = gradients_before_head(decoder, x, seed)

    def go_back(self, layer: Layer, x: Tensor) -> Tensor:
        """Go back through one layer.

        Args:
            layer: the layer before which the last call, or the constructor, ended.
            x: the residual stream before it, [N, S, hidden].

        Returns:
            Gradients with respect to the output of its attention after `o`, [N, S, hidden].
        """
        at_attention = torch.empty_like(self.before)
        for batch, found in self.batches(layer, x):
            at_attention[batch] = found.gradients[0]
        return at_attention

    def batches(self, layer: Layer, x: Tensor) -> Iterator[tuple[slice, LayerOutputs]]:
        """Go back through one layer, as `go_back` does, batch of windows by batch.

        Yields:
            Windows, and what is in the layer on them.
        """
        for batch in attention_windows.batches(range(len(x)), x.shape[1]):
            self.before[batch], found = _through_layer(layer, x[batch], self.before[batch].clone())
            yield batch, found


def _through_layer(layer: Layer, x: Tensor, gradients: Tensor) -> tuple[Tensor, LayerOutputs]:
    """Gradients with respect to `x`, which can share memory with `gradients`, and what is in the layer.

    Args:
        layer: the layer.
        x: the residual stream before it, [B, S, hidden].
        gradients: gradients with respect to the stream after it, same shape.
    """
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def attend(inner: Tensor) -> Tensor:
        inputs.append(inner)
        outputs.append(attention_windows.attend(layer.attention, inner))
        return outputs[-1]

    def feed(mlp: Mlp, inner: Tensor) -> Tensor:
        inputs.append(inner)
        outputs.append(reference.mlp(mlp, inner))
        return outputs[-1]

    before = x.clone().requires_grad_()
    with torch.enable_grad():
        after = reference.run_block(layer, before, attend, feed).residual
    first, *rest = torch.autograd.grad(after, (before, *outputs), gradients)
    attention, mlp = range(2)
    return first, LayerOutputs(
        (inputs[attention].detach(), inputs[mlp].detach()),
        (outputs[attention].detach(), outputs[mlp].detach()),
        (rest[attention], rest[mlp]),
    )


def gradients_before_head(decoder: Decoder, x: Tensor, seed: int = 0) -> Tensor:
    """Gradients of the summed scores of each window with respect to the residual stream after the last layer.

    Args:
        decoder: the trained model.
        x: that stream, [N, S, hidden].
        seed: random seed of the labels, one per prediction.

    Returns:
        [N, S, hidden].
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([_at_logits(decoder, x[at : at + 1], generator) for at in range(len(x))])


def _at_logits(decoder: Decoder, x: Tensor, generator: torch.Generator) -> Tensor:
    """Gradients of one window's scores with respect to x [1, S, hidden], same shape.

    That of log p(y) with respect to the logits is the one-hot vector of y minus p. The last position predicts
    a token outside the window and has no score.
    """
    x = x.clone().requires_grad_()
    with torch.enable_grad():
        logits = reference.logits(decoder, x)[0, :-1]  # [S - 1, vocab]
    score = logits.detach().softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32))
    # with replacement, multinomial takes the cumulative sum, in place of a random number per token
    labels = torch.multinomial(score.cpu(), 1, replacement=True, generator=generator).to(x.device)
    score = score.neg_().scatter_add_(-1, labels, score.new_ones(labels.shape))
    return torch.autograd.grad(logits, x, score.to(x.dtype))[0]
