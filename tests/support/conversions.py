"""Conversion to plain grouped-query attention, for tests of later stages."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor

from kvexport.calibrate import Moments
from kvexport.convert import Conversion, KVShape, LayerPlan, convert, methods_for
from kvexport.model.decoder import Decoder


def plain(
    decoder: Decoder,
    windows: Tensor,
    kv_heads: int,
    method: str,
    moments_of: Callable[[int], Moments] | None = None,
    adjacent: bool = False,
    capacity: int | None = None,
) -> Conversion:
    """Convert every layer to `kv_heads` heads of the trained width; `adjacent`: without matching of heads."""
    attention = decoder.layers[0].attention
    chosen = methods_for(method, attention)[0]
    if adjacent:
        chosen = dataclasses.replace(chosen, matched=False)
    layer_plan = LayerPlan(chosen, KVShape(kv_heads, attention.head_dim, attention.head_dim))
    return convert(decoder, windows, [layer_plan] * len(decoder.layers), moments_of, capacity)
