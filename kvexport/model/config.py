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
_MOST = 2**24  # of any whole number in a config.json; the longest published context is 10 million tokens


@dataclass(frozen=True)
class ConfigSizes:
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int | None


def whole_number(name: str, value: object, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _MOST:
        raise CheckpointError(
            f"config.json gives an impossible {name}",
            got=f"{value!r:.60}",
            expected=f"a whole number from {least} to {_MOST}",
        )
    return value


def number(name: str, value: object) -> float:
    if (
        isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e300
    ):  # an int may be beyond any float
        raise CheckpointError(
            f"config.json gives an impossible {name}", got=repr(value), expected="a number above 0"
        )
    return float(value)


def activation_of(said: object) -> Activation:
    if not isinstance(said, str) or said not in _ACTIVATIONS:
        raise CheckpointError(
            "config.json names an activation that is not known",
            got=repr(said),
            expected=", ".join(_ACTIVATIONS),
        )
    return _ACTIVATIONS[said]


def refuse_quantised(config: Mapping[str, Any]) -> None:
    said = config.get("quantization_config")
    if said:
        method = said.get("quant_method") if isinstance(said, dict) else said
        raise CheckpointError(
            "the checkpoint is quantised (config.json has quantization_config)",
            got=f"quant_method = {method!r}",
            expected="weights in float32, float16 or bfloat16",
            fix="start from the checkpoint that it was quantised from; kvexport compresses first and quantises after",
        )


def sizes_of(settings: Mapping[str, Any], rotated: bool) -> ConfigSizes:
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
            "num_key_value_heads does not divide num_attention_heads",
            got=f"{kv_heads} of {heads}",
            fix="correct config.json",
        )
    if head_dim < 1 or (rotated and head_dim % 2):
        raise CheckpointError(
            "config.json gives an impossible head_dim",
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
