"""Reader of family descriptions, `graphs/families/*.toml`; README.md beside them documents every key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kvexport.errors import UsageError
from kvexport.files.schema import Table
from kvexport.model.config import flag
from kvexport.model.expressions import evaluate, keys_of
from kvexport.model.family import (
    NORMS,
    REQUIRED_SETTINGS,
    SETTINGS,
    Family,
    LayerRules,
    Names,
    QueryKeyNorm,
    same,
)

_LINEARS = ({"q", "k", "v"}, {"qkv"}, {"o"}, {"gate", "up", "down"}, {"gate_up", "down"}, {"up", "down"})
_BIASES = ("qkv", "o", "mlp", "head")


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
        """config.json with the values that the model's own class assumes for absent keys.

        A null in place of an assumed text is the class's default as well; in place of a number it turns
        something off.
        """
        texts = {key: value for key, value in self._assumed.items() if isinstance(value, str)}
        return {**self._assumed, **config, **{key: texts[key] for key in texts if config.get(key) is None}}

    def overlay_configs(self) -> Iterator[Mapping[str, Any]]:
        """Conditions of the overlays, one after another."""
        return (conditions for conditions, _ in self._overlays)


def _meets(key: str, config: Mapping[str, Any], wanted: Any) -> bool:
    value = evaluate(key, config)
    if isinstance(wanted, bool):
        flag(key, value)
    return any(same(value, each) for each in (wanted if isinstance(wanted, list) else [wanted]))


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
