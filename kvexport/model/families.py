"""Family descriptions (`graphs/families/*.toml`): the meaning of config keys and tensor names of a
checkpoint.

`graphs/families/README.md` documents every key of a description.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from kvexport.errors import CheckpointError, UsageError
from kvexport.files.resources import resource
from kvexport.files.schema import Table
from kvexport.model.config import flag, shown
from kvexport.model.expressions import evaluate, keys_of

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
_LINEARS = ({"q", "k", "v"}, {"qkv"}, {"o"}, {"gate", "up", "down"}, {"gate_up", "down"}, {"up", "down"})
_BIASES = ("qkv", "o", "mlp", "head")
_HEADS = ("ForCausalLM", "LMHeadModel")  # ends of the names of classes in transformers


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
            if value is not None and not any(_same(value, each) for each in supported):
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


class Description:
    """A family file: tables that hold for all checkpoints, and overlays for configs with certain values.

    Attributes:
        models: by each model_type that it covers, the models that users know, in a phrase.
    """

    def __init__(self, text: str, where: str) -> None:
        """
        Args:
            text: TOML.
            where: file name, for errors.

        Raises:
            UsageError: it is not TOML, or `models`, `assume` or `when` are invalid; `resolve` reads the other
                tables.
        """
        table = Table.from_toml(text, where)
        self._where = where
        models = table.table("models")
        self.models = {model_type: models.string(model_type) for model_type in models}
        self._assumed = table.table("assume").mapping() if table.has("assume") else {}
        overlays = table.tables("when") if table.has("when") else []
        self._overlays = [(each.table("config").mapping(), _overlay(each)) for each in overlays]
        self._base = {
            name: value for name, value in table.mapping().items() if name not in ("models", "assume", "when")
        }

    def resolve(self, config: Mapping[str, Any]) -> Family:
        """The family as it is for a checkpoint with this config.json.

        Raises:
            UsageError: the description is invalid.
            CheckpointError: a key that decides is not true or false.
        """
        complete = self.complete(config)
        merged = self._base
        for conditions, overlay in self._overlays:
            if all(_meets(key, complete, wanted) for key, wanted in conditions.items()):
                merged = _merge(merged, overlay)
        return _family(Table(merged, self._where))

    def complete(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """config.json with the values that the model's own class assumes for absent keys."""
        return {**self._assumed, **config}

    def overlay_configs(self) -> Iterator[Mapping[str, Any]]:
        """Conditions of the overlays, one after another."""
        return (conditions for conditions, _ in self._overlays)


def _meets(key: str, config: Mapping[str, Any], wanted: Any) -> bool:
    value = evaluate(key, config)
    if isinstance(wanted, bool):
        flag(key, value)
    return any(_same(value, each) for each in (wanted if isinstance(wanted, list) else [wanted]))


def _same(value: Any, wanted: Any) -> bool:
    return type(value) is type(wanted) and bool(value == wanted)


def _overlay(table: Table) -> dict[str, Any]:
    """The tables that an overlay merges in; its [config] is the condition, `settings` is for [config]."""
    tables = {name: each for name, each in table.mapping().items() if name != "config"}
    if "settings" in tables:
        tables["config"] = tables.pop("settings")
    return tables


def _merge(base: Mapping[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    """Tables of `base` with the keys of `overlay`; an empty string removes a key."""
    merged = dict(base)
    for name, value in overlay.items():
        inner = merged.get(name)
        if isinstance(value, dict) and isinstance(inner, dict):
            merged[name] = _merge(inner, value)
        elif value == "":
            merged.pop(name, None)
        else:
            merged[name] = value
    return merged


def _family(table: Table) -> Family:
    config, defaults = _config(table.table("config")), _defaults(table)
    for name in sorted(REQUIRED_SETTINGS - config.keys() - defaults.keys()):
        raise UsageError(f"{table.path}: [config] or [defaults] must have {name}")
    norm, attention, tensors = table.table("norm"), table.table("attention"), table.table("tensors")
    norm_kind = norm.string("kind", ("rms", "layer"))
    family = Family(
        name=Path(table.path).stem,
        config=config,
        defaults=defaults,
        require=_require(table),
        norm_kind=norm_kind,
        norm_weight=_flag(norm, "weight", True),
        norm_bias=_flag(norm, "bias", norm_kind == "layer"),
        norm_offset=norm.number("offset") if norm.has("offset") else 0.0,
        position=attention.string("position", ("rope", "alibi", "learned")),
        position_offset=tensors.integer("position_offset", 0) if tensors.has("position_offset") else 0,
        pairs=_choice(attention, "pairs", ("half", "interleaved")),
        fused=_choice(attention, "fused", ("stacked", "grouped", "four_blocks")),
        alibi=_choice(attention, "alibi", ("powers", "scaled", "mpt")),
        qk_norm=_qk_norm(attention.table("qk_norm"), norm_kind) if attention.has("qk_norm") else None,
        layers=_layer_rules(table),
        parallel=_flag(table, "parallel", False),
        transposed=_flag(tensors, "transposed", False),
        bias=_bias(table.table("bias")),
        names=_names(tensors),
    )
    if (family.qk_norm is not None) != ("q_norm" in family.names.layer):
        raise UsageError(f"{table.path}: [attention.qk_norm] and tensors.layer.q_norm must be given together")
    for each in (table, attention, norm, tensors):
        each.only()
    return family


def _flag(table: Table, key: str, default: bool) -> bool:
    return table.boolean(key) if table.has(key) else default


def _choice(table: Table, key: str, choices: tuple[str, ...]) -> str:
    """A string of `choices`; the first if the key is absent."""
    return table.string(key, choices) if table.has(key) else choices[0]


def _optional(table: Table, key: str) -> str | None:
    return table.string(key) if table.has(key) else None


def _config(table: Table) -> dict[str, tuple[str, ...]]:
    """[config]: expressions by setting; a single string stands for a list of one."""
    table.only(*SETTINGS)
    found = {
        name: (table.string(name),) if isinstance(table.value(name), str) else table.strings(name)
        for name in table
    }
    for name, expressions in found.items():
        for each in expressions:
            _require_expression(table, name, each)
    return found


def _require_expression(table: Table, key: str, expression: str) -> None:
    try:
        keys_of(expression)
    except UsageError:
        table.fail(key, "an expression of keys of config.json, numbers, + - * / ** and parentheses")


def _defaults(table: Table) -> Mapping[str, Any]:
    if not table.has("defaults"):
        return {}
    defaults = table.table("defaults")
    defaults.only(*SETTINGS)
    return defaults.mapping()


def _require(table: Table) -> dict[str, tuple[Any, ...]]:
    if not table.has("require"):
        return {}
    required = table.table("require")
    for key in required:
        _require_expression(required, key, key)
    return {
        key: tuple(value) if isinstance(value, list) else (value,)
        for key, value in required.mapping().items()
    }


def _qk_norm(table: Table, norm_kind: str) -> QueryKeyNorm:
    norm = QueryKeyNorm(
        kind=table.string("kind", ("rms", "layer")) if table.has("kind") else norm_kind,
        over=_choice(table, "over", ("head", "each", "heads")),
        bias=_flag(table, "bias", False),
        after_rotation=_flag(table, "after_rotation", False),
    )
    table.only()
    return norm


def _layer_rules(table: Table) -> LayerRules:
    rules = table.table("layers") if table.has("layers") else Table({}, f"{table.path}: layers")
    expressions = ("window", "switch", "types", "pattern", "first", "rotation", "rotation_interval")
    values = {name: _optional(rules, name) for name in expressions}
    for name, value in values.items():
        if value is not None:
            _require_expression(rules, name, value)
    rotated = _choice(rules, "rotated", ("all", "sliding"))
    rules.only()
    return LayerRules(
        **values, rotated=rotated if table.table("attention").string("position") == "rope" else None
    )


def _bias(table: Table) -> dict[str, bool | str]:
    """[bias]: true, false or a key of config.json, for each group of tensors."""
    bias: dict[str, bool | str] = {}
    for name in _BIASES:
        if name == "head" and not table.has(name):
            bias[name] = False
        elif isinstance(table.value(name), str):
            bias[name] = table.string(name)
            _require_expression(table, name, table.string(name))
        else:
            bias[name] = table.boolean(name)
    table.only()
    return bias


def _names(table: Table) -> Names:
    return Names(
        prefixes=table.strings("prefixes"),
        embedding=table.string("embedding"),
        embedding_norm=_optional(table, "embedding_norm"),
        embedding_projection=_optional(table, "embedding_projection"),
        positions=_optional(table, "positions"),
        final_norm=_optional(table, "final_norm"),
        output_projection=_optional(table, "output_projection"),
        head=table.string("head"),
        layer=_layer_names(table.table("layer")),
        ignored=table.strings("ignored"),
    )


def _layer_names(table: Table) -> dict[str, str]:
    """[tensors.layer]: names of a layer's tensors, each with {i} for the layer's index."""
    table.only(*NORMS, "q_norm", "k_norm", *set().union(*_LINEARS))
    templates = {name: table.string(name) for name in table}
    linears = set(templates) - {*NORMS, "q_norm", "k_norm"}
    attention = ({"q", "k", "v", "o"}, {"qkv", "o"})
    allowed = [one | other for one in attention for other in _LINEARS[3:]]
    if linears not in allowed:
        raise UsageError(
            f"{table.path} must name q, k, v or qkv; o; up or gate and up or gate_up; down",
            got=", ".join(sorted(linears)),
        )
    if ("q_norm" in templates) != ("k_norm" in templates):
        raise UsageError(f"{table.path} must name q_norm and k_norm together")
    for name, template in templates.items():
        heads = "{h}" if name in ("q_norm", "k_norm") else "{i}"
        rest = template.replace("{i}", "").replace(heads, "")
        if rest.count("{") or template.count("{i}") != 1:
            table.fail(name, "a tensor name with {i}, the index of the layer, once")
    return templates


@cache
def families() -> Mapping[str, Description]:
    """The shipped descriptions by `model_type`.

    Raises:
        UsageError: a description is invalid, or two cover the same `model_type`.
    """
    by_type: dict[str, Description] = {}
    files: dict[str, str] = {}
    for path in sorted(resource("graphs", "families").glob("*.toml")):
        description = Description(path.read_text(encoding="utf-8"), path.name)
        for model_type in description.models:
            if model_type in by_type:
                raise UsageError(
                    f"model_type {model_type} must be in one family file only",
                    got=f"{files[model_type]} and {path.name}",
                )
            by_type[model_type], files[model_type] = description, path.name
    return by_type


def description_of(config: Mapping[str, Any]) -> Description:
    """The description of a checkpoint's family, by `model_type` of its config.

    Raises:
        CheckpointError: no description names its `model_type`.
    """
    model_type = config.get("model_type")
    description = families().get(model_type) if isinstance(model_type, str) else None
    if description is None:
        similar = _model_type_of_class(config.get("architectures"))
        raise CheckpointError(
            "model_type in config.json must be of a supported family",
            got=f"model_type = {shown(model_type)}",
            expected=", ".join(sorted(families())),
            fix="describe the family in one new file under graphs/families/ (CONTRIBUTING.md, add a family)"
            if similar is None
            else f'set model_type to "{similar}", the family of the class that architectures names',
        )
    return description


def _model_type_of_class(architectures: Any) -> str | None:
    """The supported model type whose class in transformers has the name that config.json gives."""
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    if not isinstance(name, str) or not name.endswith(_HEADS):
        return None
    stem = next(name.removesuffix(head) for head in _HEADS if name.endswith(head)).lower()
    return next((each for each in families() if each.replace("_", "") == stem), None)
