"""Values of config.json: types, ranges and derived sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
}
_MOST = 2**24  # largest integer accepted; the longest published context is 10 million tokens


@dataclass(frozen=True)
class ConfigSizes:
    """Sizes of a model, checked; `max_positions` is None if the config has no limit."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int | None


def shown(value: object) -> str:
    """Text of a value of config.json for an error, at most 60 characters."""
    try:
        return f"{value!r:.60}"
    except (ValueError, RecursionError):  # integers of more than 4300 digits; deep nesting
        return f"{type(value).__name__}, too large to print"


def whole_number(name: str, value: object, least: int = 1) -> int:
    """An integer of config.json, at least `least`; `name` is its key.

    Raises:
        CheckpointError: the value is not an integer in range.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _MOST:
        raise CheckpointError(
            f"{name} in config.json must be an integer in range",
            got=shown(value),
            expected=f"an integer from {least} to {_MOST}",
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


def require_unquantised(config: Mapping[str, Any]) -> None:
    """Raise CheckpointError if config.json describes quantised weights."""
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise CheckpointError(
            "the checkpoint must not be quantised: config.json has quantization_config",
            got=f"quant_method = {shown(method)}",
            expected="weights in float32, float16 or bfloat16",
            fix="start from the unquantised checkpoint",
        )


def sizes_of(settings: Mapping[str, Any], rotated: bool) -> ConfigSizes:
    """Sizes from a family's settings, with derived ones filled in.

    Args:
        settings: values of config.json under the names of the family description.
        rotated: whether the model uses RoPE, which needs an even head_dim.

    Raises:
        CheckpointError: a size is out of range, or two contradict each other.
    """
    for name in (
        "vocab_size",
        "hidden_size",
        "num_layers",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "max_positions",
    ):
        whole_number(name, settings.get(name, 1))
    heads = settings["num_heads"]
    kv_heads = settings.get("num_kv_heads", heads)
    head_dim = settings.get("head_dim", settings["hidden_size"] // heads)
    if heads % kv_heads:
        raise CheckpointError(
            "num_key_value_heads must divide num_attention_heads",
            got=f"{kv_heads} of {heads}",
            fix="correct config.json",
        )
    if head_dim < 1 or (rotated and head_dim % 2):
        raise CheckpointError(
            "head_dim in config.json must be possible",
            got=head_dim,
            expected="an even number" if rotated else "1 or more",
        )
    return ConfigSizes(
        settings["vocab_size"],
        settings["hidden_size"],
        settings["num_layers"],
        heads,
        kv_heads,
        head_dim,
        settings.get("max_positions"),
    )
