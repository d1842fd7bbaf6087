"""Choose the parts of a float16 graph that are computed in float32, from the activations of calibration."""

from __future__ import annotations

from kvexport.calibrate.peaks import PeakMeter
from kvexport.errors import UsageError
from kvexport.graph import Float32Exceptions

LARGEST = 65504.0  # of float16
_MARGIN = 4  # other text can have larger activations than the calibration text


def float32_exceptions(peaks: PeakMeter) -> Float32Exceptions:
    """The parts whose activations come within a factor of 4 of the largest float16 number.

    Raises:
        UsageError: keys or values of a layer, which the cache stores in float16, exceed that number, or a
            residual stream that they are computed from without a norm does.
    """
    limit = LARGEST / _MARGIN
    for index, layer in enumerate(peaks.layers):
        if layer.cached > LARGEST:
            raise UsageError(
                f"keys and values of layer {index}, and what they are computed from, must fit in float16",
                got=f"values up to {layer.cached:g}",
                expected=f"at most {LARGEST:g}",
                fix="use --dtype bfloat16 or --dtype float32",
            )
    return Float32Exceptions(
        stream=max(peaks.embedding, *(layer.residual for layer in peaks.layers)) > limit,
        mlps=frozenset(index for index, layer in enumerate(peaks.layers) if layer.mlp > limit),
    )
