"""Targets (`graphs/targets/*.toml`): the devices and engines that a bundle may be meant for, as published figures.

Knows the vocabulary of a target's file, which TensorRT each JetPack carries, and which lowering a TensorRT imports;
looks at no machine and predicts nothing.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvexport.devices.capabilities import OLDEST_TENSORRT, capabilities_of
from kvexport.devices.versions import Version, is_version, parse_version
from kvexport.errors import UsageError
from kvexport.files.resources import resource

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_ENGINES = ("tensorrt", "tensorrt-rtx", "onnxruntime")
_GB, _TERA = 1e9, 1e12
_LEAST, _MOST = 1e-3, 1e9  # of any figure: no device is beyond, and arithmetic stays finite


@dataclass(frozen=True)
class Target:
    """One device with one engine.

    Attributes:
        name: the stem of its file, as `--target` takes it.
        title: its name for people.
        engine: "tensorrt", "tensorrt-rtx" or "onnxruntime".
        sm: compute capability such as "8.7"; None for a CPU.
        memory: bytes in all.
        usable: share of `memory` that an application can have.
        bandwidth: bytes per second between memory and processor.
        fp16: dense FLOP per second; None where none is published.
        int8: dense operations per second; None where none is published.
        unified: CPU and GPU share the memory.
        jetpacks: JetPack version -> TensorRT version; empty for what is no Jetson.
        tensorrt: the TensorRT (or TensorRT-RTX) version assumed unless another is named; None for onnxruntime.
        sources: key of the file -> where its figure is published.
    """

    name: str
    title: str
    engine: str
    sm: str | None
    memory: int
    usable: float
    bandwidth: float
    fp16: float | None
    int8: float | None
    unified: bool
    jetpacks: Mapping[str, str]
    tensorrt: str | None
    sources: Mapping[str, str]

    @property
    def usable_bytes(self) -> int:
        """Bytes that an application can have."""
        return int(self.memory * self.usable)


def load_target(name_or_path: str) -> Target:
    """A shipped target by its name, or a user's own by the path of its TOML file.

    Raises:
        UsageError: no such target or file, or the file is wrong: it names the key, what was seen and what is allowed.
    """
    shipped = _shipped()
    if name_or_path in shipped:
        return _read(shipped[name_or_path])
    path = Path(name_or_path)
    if path.suffix == ".toml" and path.is_file():
        return _read(path)
    raise UsageError(
        "no such target",
        got=repr(name_or_path),
        expected=f"{', '.join(shipped)}, or the path of a TOML file",
        fix="`kvexport targets` lists those known; a TOML file with the same keys (--target my-board.toml) works the same",
    )


def known_targets() -> list[Target]:
    """Every shipped target, by name.

    Raises:
        UsageError: a shipped file is wrong.
    """
    return [_read(path) for path in _shipped().values()]


def tensorrt_version(target: Target, *, jetpack: str | None = None, tensorrt: str | None = None) -> Version:
    """The TensorRT version of `target`: the one named, the one that `jetpack` carries, or the one assumed.

    Raises:
        UsageError: both are named, the target has no TensorRT or no such JetPack, or the version is too old.
    """
    if target.tensorrt is None:
        raise UsageError(
            f"target {target.name} runs on {target.engine} and has no TensorRT", fix="choose another --target"
        )
    if jetpack is not None and tensorrt is not None:
        raise UsageError(
            "JetPack and TensorRT are both named, and each says the version",
            got=f"JetPack {jetpack}, TensorRT {tensorrt}",
            fix="give one of them",
        )
    if jetpack is not None:
        if jetpack not in target.jetpacks:
            raise UsageError(
                f"no TensorRT version is known for this JetPack on target {target.name}",
                got=jetpack,
                expected=", ".join(target.jetpacks) or "none: it is no Jetson",
                fix="name the version itself, such as --tensorrt 10.3.0",
            )
        return parse_version(target.jetpacks[jetpack])
    version = parse_version(tensorrt if tensorrt is not None else target.tensorrt)
    if target.engine == "tensorrt" and version < OLDEST_TENSORRT:
        raise UsageError(
            "this TensorRT is too old for any lowering", got=tensorrt, expected="10.3 or later (JetPack 6.1)"
        )
    return version


def lowering_for(target: Target, version: Version | None = None) -> str:
    """The best lowering that a target imports.

    Args:
        version: of its TensorRT; None: the version that `tensorrt_version` assumes.

    Returns:
        "std24", "decomposed17" or "ort".
    """
    if target.engine == "tensorrt":
        version = version or tensorrt_version(target)
    return capabilities_of(target.engine, version).lowering


def _shipped() -> dict[str, Path]:
    return {
        path.stem: path
        for path in sorted(resource("graphs", "targets").glob("*.toml"), key=lambda path: path.stem)
    }


@dataclass(frozen=True)
class _Key:
    """What a key of a target's file may hold."""

    kind: type | tuple[type, ...]
    allowed: str
    holds: Callable[[Any], bool]
    optional: bool = False
    figure: bool = False  # needs an entry in [sources]


def _positive(allowed: str, *, optional: bool = False) -> _Key:
    return _Key((int, float), allowed, lambda value: _LEAST <= value <= _MOST, optional, figure=True)


def _versions(table: dict[str, Any]) -> bool:
    return all(
        isinstance(value, str) and is_version(f"{key}") and is_version(value) for key, value in table.items()
    )


_KEYS = {
    "title": _Key(str, "a name for people", lambda value: bool(value.strip()) and value.isprintable()),
    "engine": _Key(str, ", ".join(_ENGINES), lambda value: value in _ENGINES),
    "sm": _Key(
        str,
        'a compute capability such as "8.7"',
        lambda value: bool(re.fullmatch(r"[0-9]{1,3}\.[0-9]", value)),
        True,
        True,
    ),
    "memory_gib": _positive("GiB in all, 0.001 to 10^9"),
    "usable": _Key(
        (int, float), "a share of the memory, 0.001 to 1", lambda value: _LEAST <= value <= 1, figure=True
    ),
    "bandwidth_gb_s": _positive("10^9 bytes per second, 0.001 to 10^9"),
    "fp16_tflops": _positive("10^12 dense operations per second, 0.001 to 10^9", optional=True),
    "int8_tops": _positive("10^12 dense operations per second, 0.001 to 10^9", optional=True),
    "unified": _Key(bool, "true or false", lambda value: True),
    "jetpacks": _Key(
        dict, 'JetPack versions with their TensorRT, such as "6.2" = "10.3.0.30"', _versions, True, True
    ),
    "tensorrt": _Key(str, 'a version such as "10.3.0.30"', is_version, True, True),
    "sources": _Key(
        dict,
        "text for each figure",
        lambda table: all(isinstance(said, str) and said.strip() for said in table.values()),
    ),
}


def _read(path: Path) -> Target:
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (
        OSError,
        ValueError,
        RecursionError,
    ) as error:  # tomllib's own, and int's for a number of 5000 digits
        raise UsageError(f"the target file {path.name} cannot be read: {error}") from error
    _require_keys(raw, path.name)
    figures = {name for name, key in _KEYS.items() if key.figure and name in raw}
    if raw["sources"].keys() != figures:
        raise UsageError(
            f"{path.name}: [sources] must say where each figure is from, and nothing else",
            got=", ".join(sorted(raw["sources"])) or "nothing",
            expected=", ".join(sorted(figures)),
        )
    _require_agreement(raw, path.name)
    return Target(
        name=path.stem,
        title=raw["title"],
        engine=raw["engine"],
        sm=raw.get("sm"),
        memory=int(raw["memory_gib"] * 2**30),
        usable=float(raw["usable"]),
        bandwidth=raw["bandwidth_gb_s"] * _GB,
        fp16=raw["fp16_tflops"] * _TERA if "fp16_tflops" in raw else None,
        int8=raw["int8_tops"] * _TERA if "int8_tops" in raw else None,
        unified=raw["unified"],
        jetpacks=raw.get("jetpacks", {}),
        tensorrt=raw.get("tensorrt"),
        sources=raw["sources"],
    )


def _require_keys(raw: Mapping[str, Any], where: str) -> None:
    for name in sorted(raw.keys() - _KEYS.keys()):
        raise UsageError(f"{where} has an unknown key", got=name, expected=", ".join(_KEYS))
    for name, key in _KEYS.items():
        if name not in raw:
            if key.optional:
                continue
            raise UsageError(f"{where} lacks the key {name}", expected=key.allowed)
        value = raw[name]
        typed = isinstance(value, key.kind) and (key.kind is bool or not isinstance(value, bool))
        if not typed or not key.holds(value):
            raise UsageError(f"{where}: {name} is wrong", got=repr(value), expected=key.allowed)


def _require_agreement(raw: Mapping[str, Any], where: str) -> None:
    tensorrt, sm, version = raw["engine"] != "onnxruntime", raw.get("sm"), raw.get("tensorrt")
    if tensorrt != (version is not None):
        allowed = "a version" if tensorrt else f"no such key with engine {raw['engine']}"
        raise UsageError(f"{where}: tensorrt contradicts the engine", got=repr(version), expected=allowed)
    if tensorrt and sm is None:
        raise UsageError(
            f"{where} lacks the key sm, which engine {raw['engine']} needs", expected=_KEYS["sm"].allowed
        )
    if raw["engine"] == "tensorrt":
        for name in ["tensorrt"] * bool(version) + [
            f"jetpacks.{jetpack}" for jetpack in raw.get("jetpacks", {})
        ]:
            said = version if name == "tensorrt" else raw["jetpacks"][name.removeprefix("jetpacks.")]
            if parse_version(str(said)) < OLDEST_TENSORRT:
                raise UsageError(
                    f"{where}: {name} is too old for any lowering", got=said, expected="10.3 or later"
                )
