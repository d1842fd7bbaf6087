"""The two losses of healing, in bounded memory: error of a layer's residual stream, and KL of the logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kvexport.model import reference
from kvexport.model.decoder import Decoder, Layer

TOKENS = 2048  # tokens whose activations are in memory at once, one window at least
LOGITS = 1 << 23  # logits of one model in memory at once


def parts(windows: int, length: int) -> Iterator[slice]:
    """Slices of `windows` windows of `length` tokens that are run together."""
    size = max(1, TOKENS // length)
    return (slice(at, min(at + size, windows)) for at in range(0, windows, size))


def run_layer(layer: Layer, x: Tensor) -> Tensor:
    """The residual stream [B, S, hidden] after the layer."""
    return reference.run_layer(
        layer, x, torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    ).residual


@torch.no_grad()
def advance(layer: Layer, stream: Tensor) -> None:
    """Advance the residual stream [N, S, hidden] past the layer, in place."""
    for part in parts(*stream.shape[:2]):
        stream[part] = run_layer(layer, stream[part])


def stream_error(layer: Layer, x: Tensor, target: Tensor) -> Tensor:
    """Sum of squared differences between x [B, S, hidden] after the layer and `target`, same shape."""
    return (run_layer(layer, x) - target).square().sum()


@torch.no_grad()
def stream_loss(layer: Layer, x: Tensor, target: Tensor) -> float:
    """`stream_error` of windows x [N, S, hidden], mean per token."""
    errors = (float(stream_error(layer, x[part], target[part])) for part in parts(*x.shape[:2]))
    return sum(errors) / (x.shape[0] * x.shape[1])


def kl_gradient(original: Decoder, teacher: Tensor, student: Tensor) -> Tensor:
    """Gradient of Σ KL(original ‖ converted) over all positions with respect to `student`.

    Args:
        original: gives final norm and head.
        teacher: the original's residual stream after the last layer, [B, S, hidden].
        student: the converted model's, same shape.

    Returns:
        [B, S, hidden].
    """
    gradient = torch.empty_like(student)
    flat, theirs, ours = (x.detach().flatten(0, 1) for x in (gradient, teacher, student))
    for rows in _rows(original, len(ours)):
        with torch.enable_grad():
            leaf = ours[rows].requires_grad_()
            flat[rows] = torch.autograd.grad(_kl(original, theirs[rows], leaf).sum(), leaf)[0]
    return gradient


@torch.no_grad()
def kl_sum(original: Decoder, teacher: Tensor, student: Tensor) -> float:
    """Σ KL(original ‖ converted) over all positions, nats; arguments as in `kl_gradient`."""
    theirs, ours = teacher.flatten(0, 1), student.flatten(0, 1)
    return sum(
        float(_kl(original, theirs[rows], ours[rows]).double().sum()) for rows in _rows(original, len(ours))
    )


def _kl(original: Decoder, teacher: Tensor, student: Tensor) -> Tensor:
    with torch.no_grad():
        target = reference.logits(original, teacher).log_softmax(-1)
    current = reference.logits(original, student).log_softmax(-1)
    return torch.nn.functional.kl_div(current, target, reduction="none", log_target=True).sum(-1)


def _rows(original: Decoder, count: int) -> Sequence[slice]:
    size = max(1, LOGITS // original.dims.vocab_size)
    return [slice(at, min(at + size, count)) for at in range(0, count, size)]
