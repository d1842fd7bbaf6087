"""Tiny bundles with engines for the simulated TensorRT; cpp/tests/gpu reads them from KVEXPORT_TEST_ENGINES.

Run: python tests/cpp/engine_bundles.py FOLDER (with `tests` on PYTHONPATH).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from support.decoders import make_decoder
from support.simulated_device import add_engine
from support.tiny_bundles import write_bundle

from kvexport.bundle.engine_record import PLAN_FILE, PlanFile, read_record, write_record
from kvexport.eviction.config import Eviction
from kvexport.graph import lower

CAPACITY, ENGINE_CAPACITY = 64, 60
BUDGET = Eviction("l2-norm", 24, protect_first=2, protect_recent=5)
OLD = "10.3.0.30"  # JetPack 6.1's


def write_engine_bundles(folder: Path) -> None:
    """Write one bundle for each form of the graph and kind of cache.

    Names: `std24`, `decomposed17`, the same with `-evicting` and `-mixed` (one layer evicts), `-half` in
    float16, `-window` with a sliding window, and `-old` for TensorRT 10.3.
    """
    decoder = make_decoder("gqa", dtype=torch.float32)
    windowed = make_decoder("window", dtype=torch.float32)
    kinds: dict[str, dict[str, Any]] = {
        "": {},
        "-evicting": {"eviction": BUDGET},
        "-mixed": {"eviction": dataclasses.replace(BUDGET, skip_layers=(0,))},
        "-half": {"dtype": "float16"},
    }
    for lowering in ("std24", "decomposed17"):
        for kind, options in kinds.items():
            bundle = write_bundle(folder / (lowering + kind), decoder, capacity=CAPACITY, **options)
            _add(bundle, lowering, folder / "graphs")
        _add(
            write_bundle(folder / f"{lowering}-window", windowed, capacity=CAPACITY),
            lowering,
            folder / "graphs",
        )
    _add(
        write_bundle(folder / "decomposed17-old", decoder, capacity=CAPACITY),
        "decomposed17",
        folder / "graphs",
        version=OLD,
    )


def _add(bundle: Path, lowering: str, graphs: Path, **changes: Any) -> None:
    """Add an engine. Its plan also names the lowered graph, since C++ cannot lower one."""
    directory = add_engine(bundle, lowering=lowering, capacity=ENGINE_CAPACITY, **changes)
    record = read_record(directory)
    plan = json.loads((directory / PLAN_FILE).read_text())
    graphs.mkdir(exist_ok=True)
    graph = graphs / f"{bundle.name}.onnx"
    graph.write_bytes(ir.to_proto(lower(bundle / "decoder.onnx", lowering)).SerializeToString())
    content = json.dumps({**plan, "runs": str(graph)}).encode()
    (directory / PLAN_FILE).write_bytes(content)
    described = PlanFile(hashlib.sha256(content).hexdigest(), len(content))
    write_record(directory, dataclasses.replace(record, plan=described))


if __name__ == "__main__":
    write_engine_bundles(Path(sys.argv[1]).resolve())
