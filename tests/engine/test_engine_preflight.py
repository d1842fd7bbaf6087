"""Preflight: each error names the number and the fix, and builds that can succeed are accepted."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvexport.bundle import Bundle
from kvexport.devices.gpu import Gpu
from kvexport.engine import EngineOptions, preflight
from kvexport.engine.build import build_engine, read_timing_cache
from kvexport.engine.destination import Destination
from kvexport.engine.library import TensorRTLibrary, load_library
from kvexport.errors import CannotRunHere, UsageError

AHEAD = Destination("sm86", "tensorrt-rtx", ("8.6",), True)
ORIN = Destination("orin-nano-8gb", "tensorrt", ("8.7",), False)
DESKTOP = Destination("h200", "tensorrt", ("9.0",), False)
MIB = 2**20


def library(engine: str, *names: str) -> TensorRTLibrary:
    trt = SimpleNamespace(
        __version__="11.4.0", ComputeCapability=SimpleNamespace(__members__=dict.fromkeys(names))
    )
    return TensorRTLibrary(engine, trt, (11, 4, 0), None)


RTX = library("tensorrt-rtx", "NONE", "CURRENT", "SM120", "SM75", "SM86")
FULL = library("tensorrt")


@pytest.fixture
def bundle(tiny: Callable[..., Path]) -> Bundle:
    return Bundle.open(tiny(capacity=200))


def test_default_options_come_from_the_bundle(bundle: Bundle) -> None:
    assert preflight.require_options(EngineOptions(), bundle) == (200, 128)
    assert preflight.require_options(EngineOptions(capacity=50), bundle) == (50, 50)


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"capacity": 201}, "1 to 200"),
        ({"capacity": 0}, "1 to 200"),
        ({"chunk": 0}, "1 to 200"),
        ({"chunk": 201}, "1 to 200"),
        ({"chunk": 51, "capacity": 50}, "1 to 50"),
        ({"batch": 0}, "1 sequence"),
        ({"workspace": 0}, "1 MiB"),
        ({"optimization_level": 6}, "0 to 5"),
        ({"optimization_level": -1}, "0 to 5"),
        ({"lowering": "ort-cpu"}, "decomposed17"),
    ],
)
def test_rejects_options_out_of_range(options: dict[str, Any], allowed: str, bundle: Bundle) -> None:
    with pytest.raises(UsageError) as caught:
        preflight.require_options(EngineOptions(**options), bundle)
    assert allowed in str(caught.value)


@pytest.mark.parametrize(
    ("options", "destination", "engine", "words"),
    [
        ({}, dataclasses.replace(AHEAD, compute_capabilities=("8.6", "9.0")), RTX, "7.5, 8.6, 12.0"),
        ({"version_compatible": True}, AHEAD, RTX, "leave out --version-compatible"),
        ({"hardware_compatible": True}, AHEAD, RTX, "leave out --hardware-compatible"),
        ({"refit": True}, AHEAD, RTX, "--refit, ahead of time for 8.6"),
        ({"hardware_compatible": True}, ORIN, FULL, "8.7"),
    ],
)
def test_rejects_options_that_the_engine_lacks(
    options: dict[str, Any], destination: Destination, engine: TensorRTLibrary, words: str
) -> None:
    with pytest.raises((UsageError, CannotRunHere)) as caught:
        preflight.require_engine(EngineOptions(**options), destination, engine)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("options", "destination", "engine"),
    [
        ({}, AHEAD, RTX),
        ({"refit": True}, dataclasses.replace(AHEAD, ahead_of_time=False), RTX),
        ({"refit": True, "version_compatible": True}, ORIN, FULL),
        ({"hardware_compatible": True}, DESKTOP, FULL),
    ],
)
def test_accepts_options_that_the_engine_has(
    options: dict[str, Any], destination: Destination, engine: TensorRTLibrary
) -> None:
    preflight.require_engine(EngineOptions(**options), destination, engine)


def test_requires_memory_and_disk_space(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = preflight.weights_bytes(bundle)
    free = {"memory": 2 * weights + 1024 * MIB, "disk": weights + 64 * MIB}
    monkeypatch.setattr(preflight, "available_memory", lambda: free["memory"])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free["disk"]))
    preflight.require_room(bundle, EngineOptions(), AHEAD, None)  # exactly enough
    free["memory"] -= 1
    with pytest.raises(CannotRunHere, match=r"(?s)MiB free.*2 times the weights.*fix:"):
        preflight.require_room(bundle, EngineOptions(), AHEAD, None)
    preflight.require_room(bundle, EngineOptions(), ORIN, None)
    free["disk"] -= 1
    with pytest.raises(CannotRunHere, match=r"(?s)disk.*MiB free.*--refit"):
        preflight.require_room(bundle, EngineOptions(), ORIN, None)
    preflight.require_room(bundle, EngineOptions(refit=True), ORIN, None)
    free["disk"] = 64 * MIB - 1
    with pytest.raises(CannotRunHere, match="free space"):
        preflight.require_room(bundle, EngineOptions(refit=True), ORIN, None)


def test_suggests_no_option_that_the_engine_lacks(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(CannotRunHere, match="disk") as caught:
        preflight.require_room(bundle, EngineOptions(), AHEAD, None)
    assert "--refit" not in str(caught.value)


def test_rejects_weights_that_do_not_fit_the_gpu(bundle: Bundle) -> None:
    small = Gpu("GeForce", "9.0", preflight.weights_bytes(bundle) - 1, False)
    with pytest.raises(CannotRunHere, match="must fit the memory of GeForce"):
        preflight.require_room(bundle, EngineOptions(), DESKTOP, small)
    preflight.require_room(
        bundle, EngineOptions(), DESKTOP, dataclasses.replace(small, memory=small.memory + 1)
    )
    preflight.require_room(bundle, EngineOptions(), AHEAD, small)  # which is not where it will run


def test_nothing_is_written_if_preflight_fails(
    rtx: Any, tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tiny()
    monkeypatch.setattr(preflight, "available_memory", lambda: 0)
    with pytest.raises(CannotRunHere, match="not enough free memory"):
        build_engine(bundle, compute_capabilities=("8.6",))
    assert not (bundle / "engines").exists()


def test_missing_engine_names_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(load_library.__globals__["MODULES"], "tensorrt-rtx", "no_such_tensorrt")
    with pytest.raises(CannotRunHere, match="no_such_tensorrt must be installed") as caught:
        load_library("tensorrt-rtx")
    assert "kvexport[rtx]" in str(caught.value)


def test_a_process_builds_with_one_engine(rtx: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(load_library.__globals__["MODULES"], "tensorrt", "tensorrt_rtx")
    with pytest.raises(CannotRunHere, match="another process"):
        load_library("tensorrt")


def test_timing_cache_is_reused_only_by_the_same_version(tmp_path: Path) -> None:
    from test_engine_record import RECORD

    from kvexport.bundle.engine_record import CACHE_FILE, PLAN_FILE, write_record

    same = SimpleNamespace(trt=SimpleNamespace(__version__="10.3.0.30"))
    other = SimpleNamespace(trt=SimpleNamespace(__version__="10.16.2.10"))
    assert read_timing_cache(tmp_path, same) == b""  # type: ignore[arg-type]
    (tmp_path / CACHE_FILE).write_bytes(b"measured")
    assert read_timing_cache(tmp_path, same) == b""  # type: ignore[arg-type]
    (tmp_path / PLAN_FILE).write_bytes(b"plan")
    write_record(tmp_path, RECORD)
    assert read_timing_cache(tmp_path, same) == b"measured"  # type: ignore[arg-type]
    assert read_timing_cache(tmp_path, other) == b""  # type: ignore[arg-type]
