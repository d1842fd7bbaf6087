"""The conversion that an analysis looks at, from the options that name it; the one place that knows how to start one."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from kvexport.convert import Conversion, candidates, convert, kv_heads_for
from kvexport.decoder import Decoder


def conversion_for(decoder: Decoder, kv_heads: int | None, kv_ratio: float | None, method: str) -> Callable[[Tensor], Conversion]:
    """What converts the decoder on calibration windows [N, S]; the options are checked now.

    Raises:
        UsageError: the model cannot take them.
    """
    attention = decoder.layers[0].attention
    kept = kv_heads_for(attention.num_kv_heads, kv_heads, kv_ratio)
    candidates(method, attention)
    return lambda windows: convert(decoder, windows, kept, method)
