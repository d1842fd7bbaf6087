"""The typed content of a family description: how the checkpoints of a family store the neutral decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvexport.errors import CheckpointError
from kvexport.model.config import flag, shown
from kvexport.model.expressions import evaluate

SETTINGS = frozenset(
    {
        "vocab_size", "hidden_size", "embedding_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
        "intermediate_size", "max_positions", "norm_eps", "activation", "tied", "attention_scale", "softcap",
        "clip", "rotary_fraction", "rope_theta", "local_rope_theta", "alibi_bias_max", "embedding_multiplier",
        "residual_multiplier", "logit_multiplier", "logit_softcap",
    }
)  # fmt: skip
REQUIRED_SETTINGS = frozenset(
    {"vocab_size", "hidden_size", "num_layers", "num_heads", "norm_eps", "activation", "tied"}
)
NORMS = (
    "attention_norm", "attention_output_norm", "attention_residual_norm",
    "mlp_norm", "mlp_output_norm", "mlp_residual_norm",
)  # fmt: skip


@dataclass(frozen=True)
class LayerRules:
    """Which layers have a sliding window, and which rotate; values are expressions over config.json.

    Attributes:
        window: size of the window in tokens; None: no layer has one.
        switch: windows are on where this is true; None: always.
        types: list of the kind of each layer, "sliding_attention" or "full_attention".
        pattern: without `types`: every so-many-th layer has full attention, the others a window.
        first: without `types`: the first layer with a window.
        rotated: "all" layers rotate, or "sliding" ones only; None: no layer does.
        rotation: list with 1 for each layer that rotates and 0 for others.
        rotation_interval: without `rotation`: every so-many-th layer does not rotate.
    """

    window: str | None
    switch: str | None
    types: str | None
    pattern: str | None
    first: str | None
    rotated: str | None
    rotation: str | None
    rotation_interval: str | None


@dataclass(frozen=True)
class QueryKeyNorm:
    """QK-norm.

    Attributes:
        kind: "rms" or "layer".
        over: "head": one weight for all heads; "each": a weight for each head; "heads": one norm over all
            heads together.
        bias: whether it has a bias.
        after_rotation: whether it follows the rotation.
    """

    kind: str
    over: str
    bias: bool
    after_rotation: bool


@dataclass(frozen=True)
class Names:
    """Names of stored tensors, without `.weight` and `.bias`; None: the family has no such tensor.

    Attributes:
        prefixes: what all names but the head's may begin with.
        layer: names of a layer's tensors by part, with {i} for its index.
        ignored: patterns of tensors that are not read.
    """

    prefixes: tuple[str, ...]
    embedding: str
    embedding_norm: str | None
    embedding_projection: str | None
    positions: str | None
    final_norm: str | None
    output_projection: str | None
    head: str
    layer: Mapping[str, str]
    ignored: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """One description, resolved for the config of one checkpoint.

    Attributes:
        name: name of its file.
        config: expressions of each setting, of which the first that has a value is used.
        defaults: settings that are used if no expression has a value.
        require: keys of config.json with their supported values.
        norm_kind: "rms" or "layer".
        norm_weight, norm_bias: whether norms have them.
        norm_offset: what is added to stored weights of norms (Gemma stores w - 1).
        position: "rope", "alibi" or "learned".
        position_offset: rows of the position table before position 0.
        pairs: layout of rotated pairs: "half" (i and i + d/2) or "interleaved" (2i and 2i + 1).
        fused: layout of a fused qkv: "stacked" (all queries, all keys, all values), "grouped" (for each KV
            head its queries, its key, its value) or "four_blocks" (for each quarter of the heads its queries,
            its values, its keys).
        alibi: "powers", the slopes of arXiv 2108.12409, or "mpt", those of MPT; "scaled" powers are
            multiplied by the attention's scale.
        qk_norm: None without one.
        parallel: whether attention and MLP read the same input.
        transposed: whether weights of the layers are stored as [in, out].
        bias: for "qkv", "o", "mlp" and "head": true, false, or the key of config.json that decides.
    """

    name: str
    config: Mapping[str, tuple[str, ...]]
    defaults: Mapping[str, Any]
    require: Mapping[str, tuple[Any, ...]]
    norm_kind: str
    norm_weight: bool
    norm_bias: bool
    norm_offset: float
    position: str
    position_offset: int
    pairs: str
    fused: str
    alibi: str
    qk_norm: QueryKeyNorm | None
    layers: LayerRules
    parallel: bool
    transposed: bool
    bias: Mapping[str, bool | str]
    names: Names

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Values of config.json under our names, with defaults; optional ones that are absent are left out.

        Raises:
            CheckpointError: a required key is missing, or a value is not covered by the description.
        """
        for key, supported in self.require.items():
            value = evaluate(key, config)
            if value is not None and not any(same(value, each) for each in supported):
                raise CheckpointError(
                    f"{key} in config.json must have the value that family '{self.name}' supports",
                    got=f"{key} = {shown(value)}",
                    expected=" or ".join(f"{key} = {each!r}" for each in supported),
                )
        settings = dict(self.defaults)
        for name, expressions in self.config.items():
            values = (evaluate(each, config) for each in expressions)
            value = next((each for each in values if each is not None), None)
            if value is not None:
                settings[name] = value
            elif name in REQUIRED_SETTINGS and name not in settings:
                raise CheckpointError(
                    f"config.json must have {' or '.join(expressions)}",
                    fix="restore the model's own config.json",
                )
        return settings

    def has_bias(self, which: str, config: Mapping[str, Any]) -> bool:
        """Whether the tensors of `which` ('qkv', 'o', 'mlp' or 'head') have biases under this config.

        Raises:
            CheckpointError: the key that decides is not true or false.
        """
        bias = self.bias[which]
        return flag(bias, evaluate(bias, config)) if isinstance(bias, str) else bias

    @property
    def is_gated(self) -> bool:
        return "gate" in self.names.layer or "gate_up" in self.names.layer


def same(value: Any, wanted: Any) -> bool:
    """Whether two values of config.json are equal and of one type."""
    return type(value) is type(wanted) and bool(value == wanted)
