"""The record of a TensorRT engine, build.json beside its plan.

Written by the builder, read by the runtime.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvexport.errors import BundleError, reason_of
from kvexport.files.schema import Table, read_limited

FORMAT = 1
ENGINES = ("tensorrt", "tensorrt-rtx")
ENGINES_FOLDER = "engines"
PLAN_FILE, RECORD_FILE = "decoder.plan", "build.json"
CACHE_FILE, INSPECTOR_FILE = "timing.cache", "inspector.json"
_REBUILD = "build the engine again: kvexport engine BUNDLE --force"
_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Profile:
    """An optimisation profile.

    Attributes:
        name: "decode" or "prefill".
        sequence: tokens per call: minimum, typical and maximum.
    """

    name: str
    sequence: tuple[int, int, int]


@dataclass(frozen=True)
class PlanFile:
    """Hash and size of the serialised engine."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class BuildRecord:
    """One engine of a bundle.

    Its inputs and outputs are those of the lowering, with `batch` and `capacity` fixed.

    Attributes:
        kvexport: version that built it.
        manifest_sha256: digest of the bundle that it was built from (`Bundle.digest`).
        target: name of its folder in `engines`.
        engine: "tensorrt" or "tensorrt-rtx".
        version: of that library, such as "10.3.0.30".
        lowering: form of the graph that was parsed.
        compute_capability: compute capabilities of the GPUs that it runs on, such as ("8.7",); several if it
            was built ahead of time.
        dtype: data type of weights and cache.
        batch: number of sequences.
        capacity: the largest number of tokens of a sequence.
        chunk: the largest number of tokens per call.
        profiles: decode first.
        decomposed: names of Attention nodes that no fused kernel computes.
        options: build options that change the engine.
        plan: hash and size of decoder.plan.
        layers: number of native layers of the parsed network, by type.
        weights_bytes: size of the bundle's weights.
        activation_bytes: device memory of one execution context; None if the build could not load the engine.
        timing_cache_bytes: 0 if the engine has no timing cache.
        peak_host_bytes: largest resident memory of the build process, libraries included.
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
        """Values for `json.dumps`."""
        return {"format": FORMAT, **asdict(self)}


def engine_directory(bundle: Path, target: str) -> Path:
    """The folder of a bundle's engine for a target, whether it exists or not."""
    return bundle / ENGINES_FOLDER / target


def write_record(directory: Path, record: BuildRecord) -> None:
    """Write build.json into the folder of an engine."""
    (directory / RECORD_FILE).write_text(
        json.dumps(record.to_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8"
    )


def read_record(directory: Path) -> BuildRecord:
    """Read and validate build.json in the folder of an engine, and check the size of the plan.

    Hashes nothing.

    Raises:
        BundleError: there is no engine, its format is not supported, its record is damaged, or its plan is
            missing or has another size.
    """
    path = f"{RECORD_FILE} of the engine {directory}"
    table = Table.from_json(_content(directory, path), path, error=BundleError, fix=_REBUILD)
    raw = table.mapping()
    if raw.get("format") != FORMAT:
        raise BundleError(
            f"the format of the engine {directory} must be supported by this version of kvexport",
            got=f"format {raw.get('format')!r:.40}, written by kvexport {raw.get('kvexport')!r:.40}",
            expected=f"format {FORMAT}",
            fix=_REBUILD,
        )
    record = _parse(table)
    plan = directory / PLAN_FILE
    size = plan.stat().st_size if plan.is_file() else None
    if size != record.plan.bytes:
        raise BundleError(
            f"{PLAN_FILE} of the engine {directory} must have the size in {RECORD_FILE}",
            got="no such file" if size is None else f"{size} bytes",
            expected=f"{record.plan.bytes} bytes",
            fix=_REBUILD,
        )
    return record


def _content(directory: Path, path: str) -> bytes:
    try:
        return read_limited(directory / RECORD_FILE, _MAX_BYTES)
    except FileNotFoundError as error:
        raise BundleError(
            f"{directory} must contain an engine", fix="build one: kvexport engine BUNDLE"
        ) from error
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} must be readable: {reason_of(error)}", fix=_REBUILD) from error


def _parse(table: Table) -> BuildRecord:
    plan, layers = table.table("plan"), table.table("layers")
    profiles = tuple(_profile(each) for each in table.tables("profiles"))
    if not profiles:
        table.fail("profiles", "at least one profile")
    return BuildRecord(
        kvexport=table.string("kvexport"),
        manifest_sha256=table.string("manifest_sha256"),
        target=table.string("target"),
        engine=table.string("engine", ENGINES),  # names the package that is imported to run the plan
        version=table.string("version"),
        lowering=table.string("lowering"),
        compute_capability=table.strings("compute_capability"),
        dtype=table.string("dtype"),
        batch=table.integer("batch", 1),
        capacity=table.integer("capacity", 1),
        chunk=table.integer("chunk", 1),
        profiles=profiles,
        decomposed=table.strings("decomposed"),
        options=table.table("options").mapping(),
        plan=PlanFile(plan.string("sha256"), plan.integer("bytes", 0)),
        layers={kind: layers.integer(kind, 0) for kind in layers},
        weights_bytes=table.integer("weights_bytes", 0),
        activation_bytes=(
            None if table.is_null("activation_bytes") else table.integer("activation_bytes", 0)
        ),
        timing_cache_bytes=table.integer("timing_cache_bytes", 0),
        peak_host_bytes=table.integer("peak_host_bytes", 0),
        seconds=table.number("seconds", 0),
    )


def _profile(table: Table) -> Profile:
    sequence = table.integers("sequence", 1)
    if len(sequence) != 3 or list(sequence) != sorted(sequence):
        table.fail("sequence", "minimum, typical and maximum, in ascending order")
    return Profile(table.string("name"), (sequence[0], sequence[1], sequence[2]))
