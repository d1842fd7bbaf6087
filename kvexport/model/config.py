"""Values of config.json: types and ranges."""

from __future__ import annotations

from kvexport.errors import CheckpointError
from kvexport.model.decoder import Activation

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu_squared",
}
_MOST = 2**24  # largest integer accepted; the longest published context is 10 million tokens


def shown(value: object) -> str:
    """Text of a value of config.json for an error, at most 60 characters."""
    try:
        return f"{value!r:.60}"
    except (ValueError, RecursionError):  # integers of more than 4300 digits; deep nesting
        return f"{type(value).__name__}, too large to print"


def flag(name: str, value: object) -> bool:
    """A boolean of config.json, false if it is absent; `name` is its key.

    Raises:
        CheckpointError: the value is something else.
    """
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"{name} in config.json must be true or false", got=shown(value))
    return bool(value)


def whole_number(name: str, value: object, least: int = 1, most: int | None = None) -> int:
    """An integer of config.json in a range; `name` is its key.

    Raises:
        CheckpointError: the value is not an integer in range.
    """
    most = _MOST if most is None else most
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise CheckpointError(
            f"{name} in config.json must be an integer in range",
            got=shown(value),
            expected=f"an integer from {least} to {most}",
        )
    return value


def number(name: str, value: object) -> float:
    """A positive number of config.json; `name` is its key.

    Raises:
        CheckpointError: the value is not a positive number.
    """
    # an int may exceed any float
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e300:
        raise CheckpointError(
            f"{name} in config.json must be a positive number",
            got=shown(value),
            expected="above 0",
        )
    return float(value)


def activation_of(name: object) -> Activation:
    """The activation that config.json names.

    Raises:
        CheckpointError: the activation is not supported.
    """
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise CheckpointError(
            "the activation in config.json must be supported",
            got=shown(name),
            expected=", ".join(_ACTIVATIONS),
        )
    return _ACTIVATIONS[name]
