"""What a build made of the quantised weights of its checkpoint."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from kvexport.model.decoder import Layer, Linear
from kvexport.quantize.inputs import all_linears
from kvexport.quantize.sensitivity import ATTENTION

KEPT = "kept"
SATURATED = "kept, but for the lowest code of negative scales"
CHANGED = "changed by compression"


@dataclass(frozen=True)
class SourceWeights:
    """How the quantised weights of a checkpoint were taken.

    Attributes:
        format: name of their format.
        layers: of each layer, `KEPT` for a linear map with the codes and scales of the checkpoint,
            `SATURATED` where some codes had no opposite, and for one that was quantised anew the reason; a
            map whose weight the checkpoint has in floats is left out. Empty: all weights were dequantised,
            and are stored in floats.
        head: the same of the head; None: the checkpoint has it in floats.
    """

    format: str
    layers: tuple[dict[str, str], ...] = ()
    head: str | None = None

    @property
    def note(self) -> str:
        """The same as a sentence."""
        taken = [each for layer in self.layers for each in layer.values()]
        counts = Counter(taken if self.head is None else [*taken, self.head])
        text = f"the weights of the checkpoint are quantised ({self.format}): "
        if not counts:
            return f"{text}they are dequantised"
        total, kept, saturated = counts.total(), counts.pop(KEPT, 0), counts.pop(SATURATED, 0)
        parts = [f"{kept} of {total} linear maps keep their codes and scales"]
        if saturated:
            parts.append(
                f"{saturated} keep them but for the lowest code of negative scales, stored as 1 less"
            )
        parts += [f"{count} dequantised and quantised anew ({reason})" for reason, count in counts.items()]
        return text + "; ".join(parts)


def taken_maps(layer: Layer, *, compressed: bool) -> dict[str, str]:
    """An entry of `SourceWeights.layers`.

    Args:
        layer: a layer of a quantised checkpoint, with the codes that are kept.
        compressed: whether its attention was compressed.
    """
    taken: dict[str, str] = {}
    for name, linear in all_linears(layer).items():
        each = taken_map(linear)
        if each is None and compressed and name in ATTENTION:
            each = CHANGED
        if each is not None:
            taken[name] = each
    return taken


def taken_map(linear: Linear) -> str | None:
    """How the weight of a linear map was taken; None: the checkpoint has it in floats, or it was changed."""
    if linear.codes is None:
        return linear.inexact
    return SATURATED if linear.codes.saturated else KEPT
