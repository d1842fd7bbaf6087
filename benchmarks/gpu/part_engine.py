"""Parts engine-std24 and engine-decomposed17: the large compressed model as a TensorRT engine of that
lowering.

Built by the full TensorRT if it is installed, otherwise by TensorRT-RTX in a way that the part rtx found to
run; left out without either. An engine has one capacity, the bundle's, at every depth, and its attention may
read all of it.
"""

from __future__ import annotations

import json
import shutil
from typing import Any

from engines import build_rtx, build_way, copy_of, try_engine
from part import Part, run

_TRIALS = 45.0  # seconds that a trial may take after the build


def work(part: Part) -> None:
    lowering, heads = part.argument, part.settings.kv_heads[1]
    builder = builder_here(part)
    part.found |= {"lowering": lowering, "kv_heads": heads, "builder": builder}
    if builder is None:
        part.found["left_out"] = (
            "no full TensorRT is installed, and TensorRT-RTX ran no engine on this GPU (part rtx)"
        )
        return
    bundle = copy_of(part.bundle(heads), f"engine-{lowering}")
    try:
        built = build(part, bundle, builder, lowering)
        part.found["build"] = built
        if not built["built"]:
            part.failed(f"no engine: {' '.join(built.get('messages') or built.get('stderr_end', []))}")
            return
        part.found |= try_engine(
            part, bundle, required=True, depths=part.settings.depths, steps=part.settings.steps
        )
        capacity = str(part.settings.shape["max_position_embeddings"])
        if planned := part.kvexport("plan", bundle, "--context", capacity):
            row = planned[0]["rows"][0]
            part.found["plan"] = {
                "predicted": row["memory"],
                "total_bytes": row["total_bytes"],
                "lowering": planned[0]["lowering"],
                "comparisons": planned[0]["comparisons"],
            }
    finally:
        shutil.rmtree(bundle)  # gigabytes


def builder_here(part: Part) -> str | None:
    """ "tensorrt", or a way of TensorRT-RTX; None where nothing that is installed runs here."""
    from kvexport.engine.library import installed_engines

    if part.settings.rehearsal:
        return "kvexport"
    if "tensorrt" in installed_engines():
        return "tensorrt"
    rtx = part.settings.result("rtx")
    if not rtx.exists():
        return None
    layer_plans = json.loads(rtx.read_text(encoding="utf-8"))["result"].get("runs_as") or [None]
    return layer_plans[0]


def build(part: Part, bundle: Any, builder: str, lowering: str) -> dict[str, Any]:
    if builder == "tensorrt":
        records = part.kvexport("engine", bundle, "--lowering", lowering, required=False)
        return {
            "built": bool(records),
            "record": records[0] if records else None,
            "messages": part.commands[-1].get("stderr_end", []),
        }
    if builder == "kvexport":
        return build_rtx(part, bundle, lowering)
    return build_way(part, bundle, builder, lowering, part.left - _TRIALS)


if __name__ == "__main__":
    run(work)
