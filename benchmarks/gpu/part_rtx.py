"""Part rtx: whether TensorRT-RTX runs its engines on this GPU, even if it does not list the GPU.

Uses the demo model in float16. Every outcome is a result: the part fails only if it cannot try. Messages are
TensorRT-RTX's own.
"""

from __future__ import annotations

from engines import build_rtx, build_way, copy_of, try_engine
from part import Part, run

from kvexport.devices.versions import parse_version

_LOWERING = "std24"
_LIMIT = 60.0  # seconds of a build
_DEPTHS, _STEPS = (64,), 32


def work(part: Part) -> None:
    bundle = part.settings.work / "bundle-demo"
    if not bundle.is_dir():
        part.kvexport(
            "build",
            "--demo",
            "-o",
            bundle,
            "--kv-ratio",
            "0.5",
            "--dtype",
            "float16",
            "--calibration",
            "random",
            "--samples",
            "4",
            "--length",
            "32",
        )
    if not bundle.is_dir():
        return
    capabilities = known()
    here = part.settings.compute_capability
    part.found |= {
        "compute_capability": here,
        "known": capabilities,
        "listed": here in capabilities,
        "ways": {},
    }
    for way in (
        "kvexport",
        "current",
        "portable",
        *([] if here in capabilities else [nearest(here, capabilities)]),
    ):
        copy = copy_of(bundle, f"demo-{way}")
        if way == "kvexport":
            tried = build_rtx(part, copy, _LOWERING)
        else:
            tried = build_way(part, copy, way, _LOWERING, min(_LIMIT, part.left - 10))
        if tried["built"]:
            tried |= try_engine(part, copy, required=False, depths=_DEPTHS, steps=_STEPS)
        part.found["ways"][way] = tried
        part.save()
    part.found["runs_as"] = [way for way, tried in part.found["ways"].items() if tried.get("proved")]


def known() -> list[str]:
    """Compute capabilities that TensorRT-RTX has a name for."""
    from kvexport.engine.library import load_library

    return list(load_library("tensorrt-rtx").compute_capabilities)


def nearest(here: str, capabilities: list[str]) -> str:
    """Its name of the highest one below the GPU's, or of the lowest: SM89 for 9.0."""

    below = [each for each in capabilities if parse_version(each) < parse_version(here)]
    chosen = max(below, key=parse_version) if below else min(capabilities, key=parse_version)
    return f"SM{chosen.replace('.', '')}"


if __name__ == "__main__":
    run(work)
