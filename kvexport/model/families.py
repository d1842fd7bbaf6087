"""Family descriptions (`graphs/families/*.toml`): the meaning of config keys and tensor names of a
checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from kvexport.errors import CheckpointError, UsageError
from kvexport.files.resources import resource
from kvexport.files.schema import Table

_CONFIG_NAMES = {
    "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
    "max_positions", "norm_eps", "activation", "tied",
}  # fmt: skip
_REQUIRED_CONFIG = {"vocab_size", "hidden_size", "num_layers", "num_heads", "norm_eps", "activation", "tied"}


@dataclass(frozen=True)
class Window:
    """Sliding-window attention.

    Attributes:
        model_types: model types of the family that have it.
        size: config key of its size in tokens.
        enabled: config key that switches it on; None: always on.
        first_layer: config key of the first layer that has it; None: every layer.
    """

    model_types: tuple[str, ...]
    size: str
    enabled: str | None
    first_layer: str | None


@dataclass(frozen=True)
class Family:
    """One description. Tensor names are without `.weight` and `.bias`; names of a layer contain `{i}`, its
    index.
    """

    name: str
    model_types: tuple[str, ...]
    config: Mapping[str, tuple[str, ...]]
    defaults: Mapping[str, Any]
    require: Mapping[str, Any]
    norm_kind: str
    position: str
    layout: str
    window: Window | None
    gated: bool
    bias: Mapping[str, bool | str]
    prefixes: tuple[str, ...]
    embedding: str
    embedding_norm: str | None
    final_norm: str
    head: str
    ignored: tuple[str, ...]
    layer: Mapping[str, str]

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Values of config.json under our names, with defaults; optional ones that are absent are left out.

        Raises:
            CheckpointError: a required key is missing, or a value is not covered by the description.
        """
        for key, value in self.require.items():
            if config.get(key, value) != value:
                raise CheckpointError(
                    f"{key} in config.json must have the value that family '{self.name}' supports",
                    got=f"{key} = {config[key]!r}",
                    expected=f"{key} = {value!r}",
                )
        settings = dict(self.defaults)
        for name, keys in self.config.items():
            value = next((config[key] for key in keys if config.get(key) is not None), None)
            if value is not None:
                settings[name] = value
            elif name in _REQUIRED_CONFIG and name not in settings:
                raise CheckpointError(
                    f"config.json must have {' or '.join(keys)}", fix="restore the model's own config.json"
                )
        return settings

    def has_bias(self, which: str, config: Mapping[str, Any]) -> bool:
        """Whether the tensors of `which` ('qkv', 'o' or 'mlp') have biases under this config."""
        bias = self.bias[which]
        return bool(config.get(bias, False)) if isinstance(bias, str) else bias


def parse_family(text: str, where: str) -> Family:
    """Parse a description.

    Args:
        text: TOML.
        where: file name, for errors.

    Raises:
        UsageError: a key is missing or unknown, or has an invalid value.
    """
    table = Table.from_toml(text, where)
    model_types = table.strings("model_types")
    config, defaults = _config(table.table("config")), _defaults(table)
    for name in sorted(_REQUIRED_CONFIG - config.keys() - defaults.keys()):
        raise UsageError(f"{where}: [config] or [defaults] must have {name}")
    attention, mlp, tensors = table.table("attention"), table.table("mlp"), table.table("tensors")
    layout, gated = attention.string("layout", ("split", "fused_by_head")), mlp.boolean("gated")
    if layout != "split" and "num_kv_heads" in config:
        raise UsageError(
            f"{where}: config.num_kv_heads must be absent with a fused layout (one KV head per query head)"
        )
    norm = table.table("norm")
    family = Family(
        name=Path(where).stem,
        model_types=model_types,
        config=config,
        defaults=defaults,
        require=table.table("require").mapping() if table.has("require") else {},
        norm_kind=norm.string("kind", ("rms", "layer")),
        position=attention.string("position", ("rope", "alibi")),
        layout=layout,
        window=_window(attention.table("window"), model_types) if attention.has("window") else None,
        gated=gated,
        bias=_bias(table.table("bias")),
        prefixes=tensors.strings("prefixes"),
        embedding=tensors.string("embedding"),
        embedding_norm=tensors.string("embedding_norm") if tensors.has("embedding_norm") else None,
        final_norm=tensors.string("final_norm"),
        head=tensors.string("head"),
        ignored=tensors.strings("ignored"),
        layer=_layer_names(tensors.table("layer"), fused=layout != "split", gated=gated),
    )
    for each in (table, attention, mlp, tensors, norm):
        each.only()
    return family


def _config(table: Table) -> dict[str, tuple[str, ...]]:
    """[config]: keys of config.json by our names; a single string stands for a list of one."""
    table.only(*_CONFIG_NAMES)
    return {
        name: (table.string(name),) if isinstance(table.value(name), str) else table.strings(name)
        for name in table
    }


def _defaults(table: Table) -> Mapping[str, Any]:
    if not table.has("defaults"):
        return {}
    defaults = table.table("defaults")
    defaults.only(*_CONFIG_NAMES)
    return defaults.mapping()


def _bias(table: Table) -> dict[str, bool | str]:
    """[bias]: true, false or a key of config.json, for each group of tensors."""
    names = ("qkv", "o", "mlp")
    bias = {
        name: table.string(name) if isinstance(table.value(name), str) else table.boolean(name)
        for name in names
    }
    table.only()
    return bias


def _window(table: Table, model_types: tuple[str, ...]) -> Window:
    table.only("model_types", "size", "enabled", "first_layer")
    window = Window(
        model_types=table.strings("model_types"),
        size=table.string("size"),
        enabled=table.string("enabled") if table.has("enabled") else None,
        first_layer=table.string("first_layer") if table.has("first_layer") else None,
    )
    if not set(window.model_types) <= set(model_types):
        table.fail("model_types", f"types of the family: {', '.join(model_types)}")
    return window


def _layer_names(table: Table, *, fused: bool, gated: bool) -> dict[str, str]:
    """[tensors.layer]: tensor names of a layer, each with {i} for the layer's index."""
    names = {"attention_norm", "mlp_norm", "o", "up", "down", *({"qkv"} if fused else {"q", "k", "v"})}
    if gated:
        names.add("gate")
    if table.has("q_norm") or table.has("k_norm"):
        names |= {"q_norm", "k_norm"}
    templates = {name: table.string(name) for name in sorted(names)}
    table.only()
    for name, template in templates.items():
        if template.replace("{i}", "").count("{") or template.count("{i}") != 1:
            table.fail(name, "a tensor name with {i}, the index of the layer, once")
    return templates


@cache
def families() -> Mapping[str, Family]:
    """The shipped families by `model_type`.

    Raises:
        UsageError: a description is invalid, or two cover the same `model_type`.
    """
    by_type: dict[str, Family] = {}
    for path in sorted(resource("graphs", "families").glob("*.toml")):
        family = parse_family(path.read_text(encoding="utf-8"), path.name)
        for model_type in family.model_types:
            if model_type in by_type:
                raise UsageError(
                    f"model_type {model_type} must be in one family file only",
                    got=f"{by_type[model_type].name}.toml and {path.name}",
                )
            by_type[model_type] = family
    return by_type


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a checkpoint, by `model_type` of its config.

    Raises:
        CheckpointError: no description names its `model_type`.
    """
    model_type = config.get("model_type")
    family = families().get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise CheckpointError(
            "model_type in config.json must be of a supported family",
            got=f"model_type = {model_type!r}",
            expected=", ".join(sorted(families())),
            fix="describe the family in one new file under graphs/families/",
        )
    return family
