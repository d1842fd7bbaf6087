"""The two losses of healing, in bounded memory: KL of the logits, and the error of a layer's residual stream.

Knows the reference's layers and head; must not know what is trained or how.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kvexport.model import reference
from kvexport.model.decoder import Decoder, Layer, Rope

_TOKENS = 2048  # of activations held at once, one window at least
_LOGITS = 1 << 23  # logits held at once, of one model


def parts(windows: int, length: int) -> Iterator[slice]:
    """Slices of windows that are run together."""
    size = max(1, _TOKENS // length)
    return (slice(at, min(at + size, windows)) for at in range(0, windows, size))


def run_layer(layer: Layer, x: Tensor, rope: Rope | None) -> Tensor:
    """The residual stream [B, S, hidden] after the layer."""
    return reference.run_layer(layer, x, torch.arange(x.shape[1]).expand(x.shape[:2]), rope).residual


@torch.no_grad()
def advance(layer: Layer, stream: Tensor, rope: Rope | None) -> None:
    """Take the residual stream [N, S, hidden] through the layer, in place."""
    for part in parts(*stream.shape[:2]):
        stream[part] = run_layer(layer, stream[part], rope)


def stream_error(layer: Layer, x: Tensor, target: Tensor, rope: Rope | None) -> Tensor:
    """Squared error of the residual stream after the layer against `target` [B, S, hidden], summed over all."""
    return (run_layer(layer, x, rope) - target).square().sum()


@torch.no_grad()
def stream_loss(layer: Layer, x: Tensor, target: Tensor, rope: Rope | None) -> float:
    """`stream_error` of windows [N, S, hidden], a mean per token."""
    errors = (float(stream_error(layer, x[part], target[part], rope)) for part in parts(*x.shape[:2]))
    return sum(errors) / (x.shape[0] * x.shape[1])


def kl_gradient(original: Decoder, teacher: Tensor, student: Tensor) -> Tensor:
    """The gradient of Σ KL(original ‖ converted) over all positions, with respect to the stream `student`.

    Both streams [B, S, hidden] are those after the last layer. As many positions at once as `_LOGITS` allows.
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
        wanted = reference.logits(original, teacher).log_softmax(-1)
    found = reference.logits(original, student).log_softmax(-1)
    return torch.nn.functional.kl_div(found, wanted, reduction="none", log_target=True).sum(-1)


def _rows(original: Decoder, count: int) -> Sequence[slice]:
    size = max(1, _LOGITS // original.dims.vocab_size)
    return [slice(at, min(at + size, count)) for at in range(0, count, size)]
