"""Targets: devices with their engines, as published values in `graphs/targets/*.toml` or a user's file."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from kvexport.devices.capabilities import OLDEST_TENSORRT, capabilities_of
from kvexport.devices.versions import Version, is_version, parse_version
from kvexport.errors import UsageError, reason_of
from kvexport.files.resources import resource
from kvexport.files.schema import Table

ENGINES = ("tensorrt", "tensorrt-rtx", "onnxruntime")
_GIB, _GB, _TERA = 2**30, 1e9, 1e12
_SMALLEST, _LARGEST = 1e-3, 1e9  # no device is outside this range, and arithmetic inside it stays finite
_SM = re.compile(r"[0-9]{1,3}\.[0-9]")
_SM_EXPECTED = 'a compute capability such as "8.7"'
_VERSION_EXPECTED = 'a version such as "10.3.0.30"'
# Keys whose values are published somewhere, so that [sources] must name where.
_SOURCED = (
    "sm",
    "memory_gib",
    "usable",
    "bandwidth_gb_s",
    "fp16_tflops",
    "int8_tops",
    "jetpacks",
    "tensorrt",
)


@dataclass(frozen=True)
class Target:
    """One device with one engine.

    Attributes:
        name: the stem of its file name; the value of `--target` for shipped targets.
        title: the device's name in tables and messages.
        engine: "tensorrt", "tensorrt-rtx" or "onnxruntime".
        sm: compute capability such as "8.7"; None for a CPU.
        memory: total memory in bytes.
        usable: share of `memory` that an application can use.
        bandwidth: memory bandwidth in bytes per second.
        fp16: dense FLOP per second; None if not published.
        int8: dense operations per second; None if not published.
        unified: whether CPU and GPU share the memory.
        jetpacks: JetPack version to TensorRT version; empty except for Jetsons.
        tensorrt: the default version of TensorRT or TensorRT-RTX; None for onnxruntime.
        sources: key of the file to the source of its value.
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
        """Bytes that an application can use."""
        return int(self.memory * self.usable)


def load_target(name_or_path: str) -> Target:
    """Load a shipped target by its name, or a user's target from a TOML file.

    Raises:
        UsageError: there is no such target or file, or the file is invalid; the error names the key, got and
            expected.
    """
    shipped = _shipped()
    if name_or_path in shipped:
        return _read(shipped[name_or_path])
    path = Path(name_or_path)
    if path.suffix == ".toml" and path.is_file():
        return _read(path)
    raise UsageError(
        "the target must be a shipped target or a TOML file",
        got=repr(name_or_path),
        expected=f"{', '.join(shipped)}, or the path of a TOML file",
        fix="choose one from `kvexport targets`, or write a TOML file with the same keys: --target my.toml",
    )


def known_targets() -> list[Target]:
    """All shipped targets, sorted by name.

    Raises:
        UsageError: a shipped file is invalid.
    """
    return [_read(path) for path in _shipped().values()]


def tensorrt_version(target: Target, *, jetpack: str | None = None, tensorrt: str | None = None) -> Version:
    """The TensorRT version of a target: the one of `jetpack`, `tensorrt` itself, or the target's default.

    Raises:
        UsageError: both are given, the target has no TensorRT or no such JetPack, or the version is too old.
    """
    if target.tensorrt is None:
        raise UsageError(
            f"the target must have TensorRT; {target.name} runs on {target.engine}",
            fix="choose another --target",
        )
    if jetpack is not None and tensorrt is not None:
        raise UsageError(
            "only one of --jetpack and --tensorrt can be given: each sets the TensorRT version",
            got=f"JetPack {jetpack}, TensorRT {tensorrt}",
            fix="leave out one of them",
        )
    if jetpack is not None:
        if jetpack not in target.jetpacks:
            raise UsageError(
                f"--jetpack must be a JetPack version of the target {target.name}",
                got=jetpack,
                expected=", ".join(target.jetpacks) or "none: the target is not a Jetson",
                fix="give the TensorRT version instead, such as --tensorrt 10.3.0",
            )
        return parse_version(target.jetpacks[jetpack])
    version = parse_version(tensorrt if tensorrt is not None else target.tensorrt)
    if target.engine == "tensorrt" and version < OLDEST_TENSORRT:
        raise UsageError(
            "the TensorRT version is too old for every lowering",
            got=tensorrt,
            expected="10.3 or later (JetPack 6.1)",
        )
    return version


def lowering_for(target: Target, version: Version | None = None) -> str:
    """The best lowering that a target imports.

    Args:
        version: the version of its TensorRT; None: the target's default.

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


def _read(path: Path) -> Target:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the target file {path.name} must be readable: {reason_of(error)}") from error
    table = Table.from_toml(text, path.name)
    jetpacks = _jetpacks(table)
    target = Target(
        name=path.stem,
        title=_nonempty(table, "title"),
        engine=table.string("engine", ENGINES),
        sm=_matching(table, "sm", _SM.fullmatch, _SM_EXPECTED),
        memory=int(table.number("memory_gib", _SMALLEST, _LARGEST) * _GIB),
        usable=table.number("usable", _SMALLEST, 1),
        bandwidth=table.number("bandwidth_gb_s", _SMALLEST, _LARGEST) * _GB,
        fp16=_tera(table, "fp16_tflops"),
        int8=_tera(table, "int8_tops"),
        unified=table.boolean("unified"),
        jetpacks=jetpacks,
        tensorrt=_matching(table, "tensorrt", is_version, _VERSION_EXPECTED),
        sources=_sources(table),
    )
    table.only()
    _require_versions(target, table)
    return target


def _nonempty(table: Table, key: str) -> str:
    text = table.string(key)
    return text if text.strip() else table.fail(key, "text that is not empty")


def _matching(table: Table, key: str, matches: Callable[[str], object], expected: str) -> str | None:
    if not table.has(key):
        return None
    value = table.value(key)
    return value if isinstance(value, str) and matches(value) else table.fail(key, expected)


def _tera(table: Table, key: str) -> float | None:
    return table.number(key, _SMALLEST, _LARGEST) * _TERA if table.has(key) else None


def _jetpacks(table: Table) -> dict[str, str]:
    """JetPack version to TensorRT version; empty without the key."""
    if not table.has("jetpacks"):
        return {}
    versions = table.table("jetpacks").mapping()
    for jetpack, version in versions.items():
        if not is_version(jetpack) or not isinstance(version, str) or not is_version(version):
            table.fail("jetpacks", 'JetPack versions with their TensorRT, such as "6.2" = "10.3.0.30"')
    return dict(versions)


def _sources(table: Table) -> dict[str, str]:
    """Key of each published value to its source; every such key of the file must be there, and no other."""
    sources = table.table("sources")
    texts = {key: _nonempty(sources, key) for key in sources}
    expected = sorted(key for key in _SOURCED if table.has(key))
    if sorted(texts) != expected:
        raise UsageError(
            f"{sources.path} must give the source of each published value, and nothing else",
            got=", ".join(sorted(texts)) or "nothing",
            expected=", ".join(expected),
        )
    return texts


def _require_versions(target: Target, table: Table) -> None:
    """Require the version and the compute capability that the engine needs."""
    if target.engine == "onnxruntime":
        if target.tensorrt is not None:
            table.fail("tensorrt", "no such key with engine onnxruntime")
        return
    if target.tensorrt is None:
        table.fail("tensorrt", _VERSION_EXPECTED)
    if target.sm is None:
        table.fail("sm", _SM_EXPECTED)
    if target.engine == "tensorrt":
        versions = {"tensorrt": target.tensorrt}
        versions |= {f"jetpacks.{jetpack}": version for jetpack, version in target.jetpacks.items()}
        for key, version in versions.items():
            if parse_version(version) < OLDEST_TENSORRT:
                raise UsageError(
                    f"{table.path}: {key} is too old for every lowering",
                    got=version,
                    expected="10.3 or later",
                )
