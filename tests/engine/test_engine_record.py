"""build.json: records round-trip, and damaged files are rejected."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvexport.bundle.engine_record import PLAN_FILE, RECORD_FILE, BuildRecord, PlanFile, Profile, write_record
from kvexport.engine import engine_directory, read_record
from kvexport.errors import BundleError

RECORD = BuildRecord(
    kvexport="1.0",
    manifest_sha256="0" * 64,
    target="orin-nano-8gb",
    engine="tensorrt",
    version="10.3.0.30",
    lowering="decomposed17",
    compute_capability=("8.7",),
    dtype="float16",
    batch=1,
    capacity=64,
    chunk=16,
    profiles=(Profile("decode", (1, 1, 1)), Profile("prefill", (1, 16, 16))),
    decomposed=(),
    options={"refit": False},
    plan=PlanFile("1" * 64, 4),
    layers={"MATRIX_MULTIPLY": 7},
    weights_bytes=100,
    activation_bytes=10,
    timing_cache_bytes=0,
    peak_host_bytes=1000,
    seconds=1.5,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = engine_directory(tmp_path, "orin-nano-8gb")
    folder.mkdir(parents=True)
    (folder / PLAN_FILE).write_bytes(b"plan")
    write_record(folder, RECORD)
    return folder


def test_record_round_trips(folder: Path) -> None:
    assert folder.parts[-2:] == ("engines", "orin-nano-8gb")
    assert read_record(folder) == RECORD


def test_missing_engine_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="must contain an engine") as caught:
        read_record(tmp_path)
    assert "kvexport engine" in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "[" * 10000, "\xff"])
def test_rejects_files_that_are_not_records(text: str, folder: Path) -> None:
    (folder / RECORD_FILE).write_bytes(text.encode("latin-1"))
    with pytest.raises(BundleError):
        read_record(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", 2),
        ("format", None),
        ("kvexport", 1),
        ("capacity", "64"),
        ("capacity", 0),
        ("capacity", -1),
        ("batch", True),
        ("chunk", 1.5),
        ("seconds", "1"),
        ("profiles", []),
        ("profiles", [{"name": "decode"}]),
        ("profiles", None),
        ("profiles", [{"name": "decode", "sequence": [2, 1, 1]}]),
        ("profiles", [{"name": "decode", "sequence": [0, 1, 1]}]),
        ("compute_capability", "8.7"),
        ("compute_capability", [8.7]),
        ("decomposed", [1]),
        ("plan", {}),
        ("layers", 1),
        ("options", 1),
        ("activation_bytes", "1"),
        ("engine", "tensor\x1brt"),
        ("engine", "antigravity"),
        ("engine", ""),
        ("layers", {"CAST": float("inf")}),
        ("plan", {"sha256": "1", "bytes": float("inf")}),
        ("profiles", [{"name": "decode", "sequence": [1, 1, float("inf")]}]),
    ],
)
def test_rejects_damaged_values(key: str, value: Any, folder: Path) -> None:
    raw = json.loads((folder / RECORD_FILE).read_text())
    (folder / RECORD_FILE).write_text(json.dumps({**raw, key: value}))
    with pytest.raises(BundleError):
        read_record(folder)


@pytest.mark.parametrize("key", list(RECORD.to_json()))
def test_rejects_missing_keys(key: str, folder: Path) -> None:
    raw = json.loads((folder / RECORD_FILE).read_text())
    del raw[key]
    (folder / RECORD_FILE).write_text(json.dumps(raw))
    with pytest.raises(BundleError):
        read_record(folder)


@pytest.mark.parametrize(
    "damage", [Path.unlink, lambda plan: plan.write_bytes(b"pla"), lambda plan: plan.write_bytes(b"plans")]
)
def test_rejects_a_plan_of_another_size(damage: Callable[[Path], object], folder: Path) -> None:
    damage(folder / PLAN_FILE)
    with pytest.raises(BundleError, match="must have the size in build"):
        read_record(folder)
