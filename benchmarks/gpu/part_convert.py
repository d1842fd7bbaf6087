"""Part convert: does a build on the GPU give the bundle of a build on the CPU, and how fast is each stage?

The demo model is compressed on both devices with the same random calibration tokens. Both bundles must have
the same heads, widths and methods, and their PyTorch references the same logits. Then a llama of random
weights, as wide as that of the part models but with fewer layers, is compressed on both.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from part import Part, run
from part_models import write_checkpoint

# Float32 products in another order; relative to the largest logit, and to the KL
LOGITS, KL = 1e-3, 1e-2
_LAYERS = 4
_PLAN = ("method", "num_key_value_heads", "key_head_dim", "value_head_dim")


def work(part: Part) -> None:
    settings = part.settings
    devices = ("cpu", settings.device)
    tokens = ("--samples", "16", "--length", "64")
    demo = [build(part, "demo", ("--demo",), at, device, tokens) for at, device in enumerate(devices)]
    if all(demo):
        part.found["demo"] = compare(part, *demo)
        part.save()
    kv_heads = settings.kv_heads[1]
    shape = settings.shape | {"num_hidden_layers": min(_LAYERS, settings.shape["num_hidden_layers"])}
    shape |= {"max_position_embeddings": 512}
    checkpoint = settings.work / "checkpoint-convert"
    if not checkpoint.exists():
        write_checkpoint(checkpoint, shape, kv_heads)
    tokens = (
        ("--samples", "8", "--length", "32") if settings.rehearsal else ("--samples", "32", "--length", "256")
    )
    rows = part.found["seconds_by_stage"] = {}
    for at, device in enumerate(reversed(devices)):  # the GPU first: the CPU may run out of time
        report = build(part, "wide", (checkpoint,), at, device, tokens)
        if report:
            rows[f"{at}: {report['device']}"] = report["seconds"]
            part.save()


def build(
    part: Part, name: str, source: tuple[str | Path, ...], at: int, device: str, tokens: tuple[str, ...]
) -> dict[str, Any]:
    """Build a bundle on a device; returns its report, empty if the build failed."""
    bundle = folder(part, name, at)
    shutil.rmtree(bundle, ignore_errors=True)
    reports = part.kvexport(
        "build",
        *source,
        "-o",
        bundle,
        "--no-cache",
        "--calibration",
        "random",
        *tokens,
        "--device",
        device,
    )
    return reports[0] if reports else {}


def folder(part: Part, name: str, at: int) -> Path:
    return part.settings.work / f"convert-{name}-{at}"


def compare(part: Part, here: dict[str, Any], there: dict[str, Any]) -> dict[str, Any]:
    """Differences of the demo's two bundles; each that is too large is a failure of the part."""
    plans = [[[layer[key] for key in _PLAN] for layer in report["layers"]] for report in (here, there)]
    logits = [np.load(folder(part, "demo", at) / "reference.npz")["logits"] for at in (0, 1)]
    kls = [report["divergence"]["mean_kl"] for report in (here, there)]
    found = {
        "devices": [here["device"], there["device"]],
        "same_plan": plans[0] == plans[1],
        "logits": float(np.abs(logits[0] - logits[1]).max() / np.abs(logits[0]).max()),
        "kl": abs(kls[1] / kls[0] - 1),
        "validated": not there["validation"]["failures"],
        "seconds_by_stage": [here["seconds"], there["seconds"]],
    }
    if not found["same_plan"]:
        part.failed(f"the plans must be equal: {plans[0]} on the CPU, {plans[1]} on the GPU")
    for name, most in (("logits", LOGITS), ("kl", KL)):
        if not found[name] <= most:
            part.failed(f"the relative difference of {name} must be at most {most}: it is {found[name]:.3g}")
    return found


if __name__ == "__main__":
    run(work)
