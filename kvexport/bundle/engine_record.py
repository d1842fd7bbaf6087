"""What was built, as build.json says it beside the plan: written by the builder, read by whoever runs the engine.

Knows the record's keys and where an engine lies in a bundle; needs nothing but the standard library, and must not know
how an engine is built or run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from kvexport.errors import BundleError

FORMAT = 1
ENGINES = ("tensorrt", "tensorrt-rtx")
ENGINES_FOLDER = "engines"
PLAN_FILE, RECORD_FILE, CACHE_FILE, INSPECTOR_FILE = (
    "decoder.plan",
    "build.json",
    "timing.cache",
    "inspector.json",
)
_REBUILD = "build the engine again: kvexport engine BUNDLE --force"
_LARGEST = 1 << 20  # bytes of a record


@dataclass(frozen=True)
class Profile:
    """One optimisation profile: tokens per call, at least, typically and at most."""

    name: str
    sequence: tuple[int, int, int]


@dataclass(frozen=True)
class PlanFile:
    sha256: str
    bytes: int


@dataclass(frozen=True)
class BuildRecord:
    """One engine of a bundle. Its inputs and outputs are those of the lowered contract, with `batch` and `capacity` fixed.

    Attributes:
        kvexport: version that built it.
        manifest_sha256: digest of the bundle it was built from (`Bundle.digest`).
        target: the name of its folder in `engines`.
        engine: "tensorrt" or "tensorrt-rtx".
        version: of that engine's library, such as "10.3.0.30".
        lowering: the form of the graph that was parsed.
        compute_capability: the GPUs it runs on, such as ("8.7",); several where it was built ahead of time for several.
        dtype: of weights and cache.
        batch, capacity, chunk: sequences, tokens each may hold, tokens of the longest call.
        profiles: decode first.
        decomposed: names of Attention nodes that no fused kernel computes.
        options: those of the build that differ from one build to another.
        plan: of decoder.plan.
        layers: native layers of the parsed network by type.
        weights_bytes: of the bundle's weights.
        activation_bytes: device memory of one execution context; None where no driver let the engine be loaded.
        timing_cache_bytes: 0 where the engine has no timing cache.
        peak_host_bytes: most memory that the building process held, its own libraries included.
        seconds: from parsing to the serialised plan.
    """

    kvexport: str
    manifest_sha256: str
    target: str
    engine: str
    version: str
    lowering: str
    compute_capability: tuple[str, ...]
    dtype: str
    batch: int
    capacity: int
    chunk: int
    profiles: tuple[Profile, ...]
    decomposed: tuple[str, ...]
    options: Mapping[str, Any]
    plan: PlanFile
    layers: Mapping[str, int]
    weights_bytes: int
    activation_bytes: int | None
    timing_cache_bytes: int
    peak_host_bytes: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """As what `json.dumps` takes."""
        return {"format": FORMAT, **asdict(self)}


def engine_directory(bundle: Path, target: str) -> Path:
    """Where the engine of a bundle for a target lies, whether or not it is there."""
    return bundle / ENGINES_FOLDER / target


def write_record(directory: Path, record: BuildRecord) -> None:
    (directory / RECORD_FILE).write_text(
        json.dumps(record.to_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8"
    )


def read_record(directory: Path) -> BuildRecord:
    """The record in an engine's folder; the plan is there in its size (it is not hashed).

    Raises:
        BundleError: no engine, a newer format, a damaged record, a plan that is missing or of another size.
    """
    raw = _read(directory / RECORD_FILE)
    if raw.get("format") != FORMAT:
        seen = f"format {raw.get('format')!r}, written by kvexport {raw.get('kvexport')!r}"
        raise BundleError(
            f"the engine {directory} is of another format",
            got=seen,
            expected=f"format {FORMAT}",
            fix=_REBUILD,
        )
    try:
        record = _parse(raw)
    except (KeyError, TypeError, ValueError, OverflowError) as error:  # the last, of an int made of infinity
        raise BundleError(
            f"{RECORD_FILE} of the engine {directory} is damaged: {error}", fix=_REBUILD
        ) from error
    plan = directory / PLAN_FILE
    size = plan.stat().st_size if plan.is_file() else None
    if size != record.plan.bytes:
        seen = "no such file" if size is None else f"{size} bytes"
        allowed = f"{record.plan.bytes} bytes"
        raise BundleError(
            f"{PLAN_FILE} of the engine {directory} is not as built", got=seen, expected=allowed, fix=_REBUILD
        )
    return record


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError("it is larger than any record")
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BundleError(
            f"there is no engine in {path.parent}", fix="build one: kvexport engine BUNDLE"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path} cannot be read: {error}", fix=_REBUILD) from error
    if not isinstance(raw, dict):
        raise BundleError(f"{path} is not an engine's record", fix=_REBUILD)
    return raw


def _parse(raw: Mapping[str, Any]) -> BuildRecord:
    """Types and signs are checked, key by key."""
    values = {field.name: raw[field.name] for field in fields(BuildRecord)}
    for field in fields(BuildRecord):
        value = values[field.name]
        if field.type == "str":
            sound = isinstance(value, str) and value.isprintable()
        elif field.type in ("int", "float"):
            sound = (
                isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")
            )
            sound = sound and (field.type == "float" or isinstance(value, int))
        else:
            sound = True
        if not sound:
            raise ValueError(f"{field.name} is {value!r}")
    if values["engine"] not in ENGINES:  # it names the package that is imported to run the plan
        raise ValueError(f"engine is {values['engine']!r}")
    if values["activation_bytes"] is not None and not isinstance(values["activation_bytes"], int):
        raise ValueError(f"activation_bytes is {values['activation_bytes']!r}")
    for name in ("compute_capability", "decomposed"):
        if not isinstance(values[name], list) or not all(isinstance(each, str) for each in values[name]):
            raise ValueError(f"{name} is {values[name]!r}")
        values[name] = tuple(values[name])
    values["profiles"] = tuple(_profile(each) for each in values["profiles"])
    values["plan"] = PlanFile(str(raw["plan"]["sha256"]), int(raw["plan"]["bytes"]))
    values["layers"] = {str(kind): int(count) for kind, count in dict(raw["layers"]).items()}
    values["options"] = dict(raw["options"])
    if not values["profiles"] or min(values["batch"], values["capacity"], values["chunk"]) < 1:
        raise ValueError("it has no profile, or a size below 1")
    return BuildRecord(**values)


def _profile(raw: Mapping[str, Any]) -> Profile:
    least, typical, most = map(int, raw["sequence"])
    if not 1 <= least <= typical <= most:
        raise ValueError(f"a profile's sequence is {raw['sequence']}")
    return Profile(str(raw["name"]), (least, typical, most))
