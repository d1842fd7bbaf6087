"""Which parts of a float16 graph must be computed in float32, from what calibration measured.

Knows float16's range and how far beyond a sample to look; measuring and rewriting are elsewhere.
"""

from __future__ import annotations

from kvexport.calibrate.peaks import PeakMeter
from kvexport.errors import UsageError
from kvexport.graph import Float32Exceptions

LARGEST = 65504.0
_ROOM = 4  # calibration is a sample: what comes this close to the largest number counts as beyond it


def float32_exceptions(peaks: PeakMeter) -> Float32Exceptions:
    """What float16 cannot be trusted to hold.

    Raises:
        UsageError: a layer's keys or values do not fit, which the cache itself must hold.
    """
    limit = LARGEST / _ROOM
    for index, layer in enumerate(peaks.layers):
        if layer.cached > LARGEST:
            raise UsageError(
                f"float16 cannot hold the keys and values of layer {index}",
                got=f"numbers up to {layer.cached:g}",
                expected=f"{LARGEST:g}",
                fix="use --dtype bfloat16 or --dtype float32",
            )
    return Float32Exceptions(
        stream=max(peaks.embedding, *(layer.residual for layer in peaks.layers)) > limit,
        mlps=frozenset(index for index, layer in enumerate(peaks.layers) if layer.mlp > limit),
    )
