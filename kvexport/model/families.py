"""Family descriptions (`graphs/families/*.toml`): what each config key and each tensor of a checkpoint means.

Knows TOML and the vocabulary of the descriptions, refuses any it does not understand; reads no weights.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from kvexport.errors import CheckpointError, UsageError
from kvexport.files.resources import resource

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_CONFIG_NAMES = {
    "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
    "max_positions", "norm_eps", "activation", "tied",
}  # fmt: skip
_REQUIRED_CONFIG = {"vocab_size", "hidden_size", "num_layers", "num_heads", "norm_eps", "activation", "tied"}
_CHOICES = {
    "norm.kind": ("rms", "layer"),
    "attention.position": ("rope", "alibi"),
    "attention.layout": ("split", "fused_by_head"),
}
_TOML_NAMES = {dict: "table", str: "string", bool: "boolean"}


@dataclass(frozen=True)
class Window:
    """Sliding-window attention: whose it is, and which config keys give its size, switch it on, and say from which layer."""

    model_types: tuple[str, ...]
    size: str
    enabled: str | None  # None: always on
    first_layer: str | None  # None: every layer


@dataclass(frozen=True)
class Family:
    """One description. Tensor names lack their `.weight` and `.bias`; layer names hold `{i}`."""

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
        """The config's values under our names, defaults filled in; absent optional ones are left out."""
        for key, value in self.require.items():
            if config.get(key, value) != value:
                raise CheckpointError(
                    f"config.json sets {key}, which family '{self.name}' does not cover",
                    got=f"{key} = {config[key]!r}",
                    expected=f"{key} = {value!r}",
                )
        found = dict(self.defaults)
        for name, keys in self.config.items():
            value = next((config[key] for key in keys if config.get(key) is not None), None)
            if value is not None:
                found[name] = value
            elif name in _REQUIRED_CONFIG and name not in found:
                raise CheckpointError(
                    f"config.json has no {' or '.join(keys)}", fix="restore the model's own config.json"
                )
        return found

    def has_bias(self, which: str, config: Mapping[str, Any]) -> bool:
        """Whether the tensors of `which` ('qkv', 'o' or 'mlp') have biases under this config."""
        said = self.bias[which]
        return bool(config.get(said, False)) if isinstance(said, str) else said


def parse_family(text: str, where: str) -> Family:
    """A description from TOML text; `where` names it in errors.

    Raises:
        UsageError: a key is missing, unknown, or has a value that is not allowed.
    """
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{where} is not TOML: {error}") from error
    reader = _Reader(raw, where)
    model_types = reader.strings("model_types")
    config = {name: reader.strings(f"config.{name}", one=True) for name in reader.table("config")}
    defaults = reader.table("defaults", optional=True)
    reader.only("config", config, _CONFIG_NAMES)
    reader.only("defaults", defaults, _CONFIG_NAMES)
    for name in sorted(_REQUIRED_CONFIG - config.keys() - defaults.keys()):
        raise UsageError(f"{where}: neither [config] nor [defaults] has {name}")
    layout = reader.choice("attention.layout", _CHOICES["attention.layout"])
    if layout != "split" and "num_kv_heads" in config:
        raise UsageError(
            f"{where}: config.num_kv_heads cannot go with the fused layout, which has as many of each head"
        )
    gated = reader.typed("mlp.gated", bool)
    layer = {name: reader.typed(f"tensors.layer.{name}", str) for name in reader.table("tensors.layer")}
    wanted = {"attention_norm", "mlp_norm", "o", "up", "down"} | (
        {"qkv"} if layout != "split" else {"q", "k", "v"}
    )
    wanted |= {"gate"} if gated else set()
    wanted |= {"q_norm", "k_norm"} if {"q_norm", "k_norm"} & layer.keys() else set()  # both or neither
    reader.only("tensors.layer", layer, wanted | {"q_norm", "k_norm"})
    for name in sorted(wanted - layer.keys()):
        raise UsageError(f"{where}: [tensors.layer] lacks {name}", expected=", ".join(sorted(wanted)))
    for name, template in layer.items():
        if template.replace("{i}", "").count("{") or template.count("{i}") != 1:
            raise UsageError(
                f"{where}: tensors.layer.{name} must hold {{i}}, the layer's number, once", got=template
            )
    window = None
    if reader.table("attention.window", optional=True):
        reader.only(
            "attention.window",
            reader.table("attention.window"),
            {"model_types", "size", "enabled", "first_layer"},
        )
        window = Window(
            model_types=reader.strings("attention.window.model_types"),
            size=reader.typed("attention.window.size", str),
            enabled=reader.typed("attention.window.enabled", str, optional=True),
            first_layer=reader.typed("attention.window.first_layer", str, optional=True),
        )
        for name in sorted(set(window.model_types) - set(model_types)):
            raise UsageError(
                f"{where}: attention.window.model_types has a type that model_types lacks", got=name
            )
    bias = reader.table("bias")
    if set(bias) != {"qkv", "o", "mlp"}:
        raise UsageError(f"{where}: [bias] must say qkv, o and mlp", got=", ".join(bias))
    for name, said in bias.items():
        if not isinstance(said, (bool, str)):
            raise UsageError(
                f"{where}: bias.{name} must be true, false or a key of config.json", got=repr(said)
            )
    family = Family(
        name=Path(where).stem,
        model_types=model_types,
        config=config,
        defaults=defaults,
        require=reader.table("require", optional=True),
        norm_kind=reader.choice("norm.kind", _CHOICES["norm.kind"]),
        position=reader.choice("attention.position", _CHOICES["attention.position"]),
        layout=layout,
        window=window,
        gated=gated,
        bias=bias,
        prefixes=reader.strings("tensors.prefixes"),
        embedding=reader.typed("tensors.embedding", str),
        embedding_norm=reader.typed("tensors.embedding_norm", str, optional=True),
        final_norm=reader.typed("tensors.final_norm", str),
        head=reader.typed("tensors.head", str),
        ignored=reader.strings("tensors.ignored"),
        layer=layer,
    )
    reader.all_read()
    return family


class _Reader:
    """Takes values out of parsed TOML and remembers which, so that a misspelt key is an error."""

    def __init__(self, raw: dict[str, Any], where: str) -> None:
        self._raw, self._where, self._read = raw, where, set[str]()

    def _find(self, path: str) -> Any:
        self._read.add(path)
        found: Any = self._raw
        for part in path.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        return found

    def typed(self, path: str, kind: type, optional: bool = False) -> Any:
        found = self._find(path)
        if found is None and optional:
            return None
        if not isinstance(found, kind):
            raise UsageError(f"{self._where}: {path} must be a {_TOML_NAMES[kind]}", got=repr(found))
        return found

    def strings(self, path: str, one: bool = False) -> tuple[str, ...]:
        """An array of strings; with `one`, a single string may stand for an array of one."""
        found = self._find(path)
        found = [found] if one and isinstance(found, str) else found
        if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
            raise UsageError(f"{self._where}: {path} must be an array of strings", got=repr(found))
        return tuple(found)

    def table(self, path: str, optional: bool = False) -> dict[str, Any]:
        return self.typed(path, dict, optional) or {}

    def choice(self, path: str, allowed: tuple[str, ...]) -> str:
        found = self.typed(path, str)
        if found not in allowed:
            raise UsageError(
                f"{self._where}: {path} is not one of those known", got=found, expected=", ".join(allowed)
            )
        return str(found)

    def only(self, path: str, table: Mapping[str, Any], allowed: set[str]) -> None:
        for key in sorted(table.keys() - allowed):
            raise UsageError(
                f"{self._where}: [{path}] has an unknown key", got=key, expected=", ".join(sorted(allowed))
            )

    def all_read(self) -> None:
        def walk(table: Mapping[str, Any], prefix: str) -> None:
            for key, value in table.items():
                path = f"{prefix}{key}"
                if path in self._read:
                    continue
                if isinstance(value, dict) and any(read.startswith(path + ".") for read in self._read):
                    walk(value, path + ".")
                else:
                    raise UsageError(
                        f"{self._where}: unknown key {path}", expected=", ".join(sorted(self._read))
                    )

        walk(self._raw, "")


@cache
def families() -> Mapping[str, Family]:
    """Every shipped family by the `model_type` that it covers.

    Raises:
        UsageError: a description is wrong, or two cover the same `model_type`.
    """
    found: dict[str, Family] = {}
    for path in sorted(resource("graphs", "families").glob("*.toml")):
        family = parse_family(path.read_text(encoding="utf-8"), path.name)
        for model_type in family.model_types:
            if model_type in found:
                raise UsageError(
                    f"{path.name} and {found[model_type].name}.toml both cover model_type {model_type}"
                )
            found[model_type] = family
    return found


def family_of(config: Mapping[str, Any]) -> Family:
    """The family whose description covers a checkpoint's config.

    Raises:
        CheckpointError: no description names its `model_type`.
    """
    model_type = config.get("model_type")
    found = families().get(model_type) if isinstance(model_type, str) else None
    if found is None:
        raise CheckpointError(
            "no family description covers this checkpoint",
            got=f"model_type = {model_type!r}",
            expected=", ".join(sorted(families())),
            fix="describe the family in one new file under graphs/families/",
        )
    return found
