"""Expected times of the stages of a build relative to each other, for the progress bar."""

from __future__ import annotations

# In forward passes over the calibration tokens, measured with SmolLM2-135M on two cores.
_SAMPLING, _READING = 2.4, 0.02
_ANALYSIS, _CONVERSION, _WRITING = 3.0, 3.0, 0.1
_WEIGHT_WINDOWS = 16 * 3  # on which the losses of weights are measured, and the work on each
_TRIALS = 3  # conversions in search of --max-kl
_HEALED_WINDOWS = 8 * 3  # of a step: forward and backward pass of a batch
# In tokens of a forward pass: these stages do not depend on the calibration text.
_FIXED = {"self-test": 2000, "write": 1500, "validation": 2300, "read-back": 1500}


def expected_times(
    sampled: int, samples: int, length: int, *, compresses: bool, heal_steps: int
) -> dict[str, float]:
    """Expected time of each stage after reading, in forward passes over the calibration tokens.

    Args:
        sampled: number of calibration windows that are sampled from the model.
        samples: number of calibration windows.
        length: tokens of a window.
        compresses: whether layers are converted.
        heal_steps: number of distillation steps.
    """
    conversion = _CONVERSION if compresses else _WRITING
    return {
        "text": _READING + _SAMPLING * sampled / samples,
        "analysis": _ANALYSIS,
        "weight-analysis": _WEIGHT_WINDOWS / samples,
        "trials": _TRIALS * _CONVERSION,
        "convert": conversion,
        "heal": heal_steps * _HEALED_WINDOWS / samples,
        **{stage: tokens / (samples * length) for stage, tokens in _FIXED.items()},
    }
