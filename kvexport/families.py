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
from kvexport.resources import resource

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_CONFIG_NAMES = {
    "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
    "max_positions", "norm_eps", "activation", "tied",
}  # fmt: skip
_REQUIRED_CONFIG = {"vocab_size", "hidden_size", "num_layers", "num_heads", "norm_eps", "activation", "tied"}
_LAYER_TENSORS = {"attention_norm", "mlp_norm", "q", "k", "v", "qkv", "o", "q_norm", "k_norm", "gate", "up", "down"}
_CHOICES = {"norm.kind": ("rms", "layer"), "attention.position": ("rope", "alibi")}
_LAYOUTS = ("split", "fused_by_head")


@dataclass(frozen=True)
class Window:
    """Sliding-window attention: which config keys give its size and switch it on, and from which layer."""

    size: str
    enabled: str
    enabled_default: bool
    first_layer: str | None = None


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
                    seen=f"{key} = {config[key]!r}",
                    allowed=f"{key} = {value!r}",
                )
        found = dict(self.defaults)
        for name, keys in self.config.items():
            value = next((config[key] for key in keys if config.get(key) is not None), None)
            if value is not None:
                found[name] = value
            elif name in _REQUIRED_CONFIG and name not in found:
                raise CheckpointError(f"config.json has no {' or '.join(keys)}", fix="restore the model's own config.json")
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
    config = {name: (keys,) if isinstance(keys, str) else tuple(keys) for name, keys in reader.table("config").items()}
    defaults = reader.table("defaults", optional=True)
    reader.only("config", config, _CONFIG_NAMES)
    reader.only("defaults", defaults, _CONFIG_NAMES)
    for name in sorted(_REQUIRED_CONFIG - config.keys() - defaults.keys()):
        raise UsageError(f"{where}: neither [config] nor [defaults] has {name}")
    layer = reader.table("tensors.layer")
    reader.only("tensors.layer", layer, _LAYER_TENSORS)
    layout = reader.choice("attention.layout", _LAYOUTS)
    gated = reader.typed("mlp.gated", bool)
    wanted = {"attention_norm", "mlp_norm", "o", "up", "down"} | ({"qkv"} if layout != "split" else {"q", "k", "v"})
    wanted |= {"gate"} if gated else set()
    for name in sorted(wanted - layer.keys()):
        raise UsageError(f"{where}: [tensors.layer] lacks {name}", allowed=", ".join(sorted(wanted)))
    window = reader.table("attention.window", optional=True)
    bias = reader.table("bias")
    if set(bias) != {"qkv", "o", "mlp"}:
        raise UsageError(f"{where}: [bias] must say qkv, o and mlp", seen=", ".join(bias))
    family = Family(
        name=Path(where).stem,
        model_types=tuple(reader.typed("model_types", list)),
        config=config,
        defaults=defaults,
        require=reader.table("require", optional=True),
        norm_kind=reader.choice("norm.kind", _CHOICES["norm.kind"]),
        position=reader.choice("attention.position", _CHOICES["attention.position"]),
        layout=layout,
        window=Window(**window) if window else None,
        gated=gated,
        bias=bias,
        prefixes=tuple(reader.typed("tensors.prefixes", list)),
        embedding=reader.typed("tensors.embedding", str),
        embedding_norm=reader.typed("tensors.embedding_norm", str, optional=True),
        final_norm=reader.typed("tensors.final_norm", str),
        head=reader.typed("tensors.head", str),
        ignored=tuple(reader.typed("tensors.ignored", list)),
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
            raise UsageError(f"{self._where}: {path} must be a {kind.__name__}", seen=repr(found))
        return found

    def table(self, path: str, optional: bool = False) -> dict[str, Any]:
        return self.typed(path, dict, optional) or {}

    def choice(self, path: str, allowed: tuple[str, ...]) -> str:
        found = self.typed(path, str)
        if found not in allowed:
            raise UsageError(f"{self._where}: {path} is not one of those known", seen=found, allowed=", ".join(allowed))
        return str(found)

    def only(self, path: str, table: Mapping[str, Any], allowed: set[str]) -> None:
        for key in sorted(table.keys() - allowed):
            raise UsageError(f"{self._where}: [{path}] has an unknown key", seen=key, allowed=", ".join(sorted(allowed)))

    def all_read(self) -> None:
        def walk(table: Mapping[str, Any], prefix: str) -> None:
            for key, value in table.items():
                path = f"{prefix}{key}"
                if path in self._read:
                    continue
                if isinstance(value, dict) and any(read.startswith(path + ".") for read in self._read):
                    walk(value, path + ".")
                else:
                    raise UsageError(f"{self._where}: unknown key {path}", allowed=", ".join(sorted(self._read)))

        walk(self._raw, "")


@cache
def families() -> Mapping[str, Family]:
    """Every shipped family by the `model_type` that it covers."""
    found: dict[str, Family] = {}
    for path in sorted(resource("graphs", "families").glob("*.toml")):
        family = parse_family(path.read_text(encoding="utf-8"), path.name)
        found.update(dict.fromkeys(family.model_types, family))
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
            seen=f"model_type = {model_type!r}",
            allowed=", ".join(sorted(families())),
            fix="describe the family in one new file under graphs/families/",
        )
    return found
