"""Conversion to plain grouped-query attention, for tests of what comes after it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from kvexport.calibrate import Moments
from kvexport.convert import Conversion, Shape, convert, method_for
from kvexport.decoder import Decoder


def plain(
    decoder: Decoder, windows: Tensor, kv_heads: int, method: str, moments_of: Callable[[int], Moments] | None = None
) -> Conversion:  # fmt: skip
    """Conversion of every layer to `kv_heads` heads as wide as trained ones."""
    attention = decoder.layers[0].attention
    shapes = [Shape(kv_heads, attention.head_dim, attention.head_dim)] * len(decoder.layers)
    return convert(decoder, windows, shapes, method_for(method, attention), moments_of)
