"""Part memory: the device memory of a bundle at a depth, compared with the prediction of `kvexport plan`.

The plan has no target: it includes TensorRT's context (half a GiB) and a prompt in chunks of 128 tokens. The
measurement is the peak of the memory in use by all processes minus the memory in use before, read every 100
ms.
"""

from __future__ import annotations

from typing import Any

from machine import MemoryWatch
from part import Part, run

_STEPS = 4


def work(part: Part) -> None:
    rows: list[dict[str, Any]] = []
    part.found["rows"] = rows
    for heads in part.settings.kv_heads:
        bundle = part.bundle(heads)
        for depth in part.settings.memory_depths:
            with MemoryWatch() as watch:
                benched = part.bench(bundle, depths=[depth], steps=_STEPS)
            predicted = part.kvexport(
                "plan",
                part.settings.checkpoint(heads),
                "--kv-heads",
                str(heads),
                "--dtype",
                "float16",
                "--context",
                str(depth),
            )
            if benched and predicted:
                rows.append(compared(heads, depth, predicted[0]["rows"][0], benched[0], watch))
                part.save()


def compared(
    kv_heads: int, depth: int, row: dict[str, Any], benched: dict[str, Any], watch: MemoryWatch
) -> dict[str, Any]:
    """Bytes predicted and measured of weights, cache and all; None where the machine does not tell."""
    device = benched["device"]
    measured = {
        "weights": device and device["loaded"],  # the graph once loaded, with what ONNX Runtime makes of it
        "kv_in_use": benched["kv_bytes_planned"],
        "kv_allocated": benched["kv_bytes_allocated"],
        "total": watch.used,
        "host_peak": benched["peak_host_bytes"],
    }
    memory = row["memory"]
    predicted = {name: memory[name] for name in ("weights", "kv", "activations", "io", "engine")} | {
        "total": row["total_bytes"]
    }
    ratio = measured["total"] / predicted["total"] if measured["total"] else None
    return {
        "kv_heads": kv_heads,
        "depth": depth,
        "predicted": predicted,
        "measured": measured,
        "total_measured_over_predicted": ratio,
        "device": device,
    }


if __name__ == "__main__":
    run(work)
