"""Shared by the two TensorRT parts: a copy of a bundle for each engine, builds, and runs of an engine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from machine import MemoryWatch
from part import Part

# The target whose engine is TensorRT-RTX; what it is built for is named beside it.
_RTX_TARGET = "rtx-4090"


def copy_of(bundle: Path, name: str) -> Path:
    """Copy the bundle without engines, by hard links, since a runtime takes the first engine of a bundle."""
    path = bundle.with_name(name)
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    for file in bundle.iterdir():
        if file.is_file():
            os.link(file, path / file.name)
    return path


def build_rtx(part: Part, bundle: Path, lowering: str) -> dict[str, Any]:
    """As kvexport builds with TensorRT-RTX for the GPU's compute capability, which it refuses where there is
    no such name."""
    records = part.kvexport(
        "engine",
        bundle,
        "--target",
        _RTX_TARGET,
        "--compute-capability",
        part.settings.compute_capability,
        "--lowering",
        lowering,
        required=False,
    )
    if records:
        return {"built": True, "record": records[0]}
    return {"built": False, "messages": part.commands[-1].get("stderr_end", [])}


def build_way(part: Part, bundle: Path, way: str, lowering: str, limit: float) -> dict[str, Any]:
    """As `rtx_way.py` builds, in a process of its own."""
    result = part.settings.work / f"{bundle.name}.way.json"
    script = str(Path(__file__).with_name("rtx_way.py"))
    command = [
        sys.executable,
        script,
        str(bundle),
        way,
        lowering,
        part.settings.compute_capability,
        str(result),
    ]
    result.unlink(missing_ok=True)
    try:
        ended = subprocess.run(
            command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, timeout=max(1.0, limit)
        )
        code, words = ended.returncode, ended.stderr.splitlines()[-12:]
    except subprocess.TimeoutExpired:
        code, words = None, [f"ended after {limit:.0f} seconds"]
    part.commands.append(
        {"command": f"rtx_way.py {bundle.name} {way} {lowering}", "exit_code": code, "stderr_end": words}
    )
    found = (
        json.loads(result.read_text(encoding="utf-8")) if result.exists() else {"way": way, "built": False}
    )
    return {**found, "exit_code": code, "stderr_end": words}


def try_engine(
    part: Part, bundle: Path, *, required: bool, depths: tuple[int, ...], steps: int
) -> dict[str, Any]:
    """Validate and measure a bundle's engine with kvexport's runtime; `runs` is whether it ran at all."""
    if part.settings.rehearsal:
        return {"runs": None, "not_run": "a rehearsal: the engine was built, and nothing was run"}
    validation = part.validate(bundle, "tensorrt", required=required)
    ended = part.commands[-1]
    found: dict[str, Any] = {"validation": {bundle.name: validation}}
    found["runs"] = bool(validation)  # exit code 1 with figures: it ran, and gave other numbers
    found["proved"] = ended["exit_code"] == 0
    found["self_test"] = part.self_test(bundle, "tensorrt", required=required)
    if not found["runs"]:
        return found | {"runtime_said": ended.get("stderr_end", [])}
    with MemoryWatch() as watch:
        found["bench"] = part.bench(bundle, depths=depths, steps=steps, provider="tensorrt")
    return found | {"device_bytes": watch.used}
