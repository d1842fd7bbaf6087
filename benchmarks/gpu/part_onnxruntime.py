"""Parts onnxruntime and onnxruntime-again: both bundles on ONNX Runtime, proved, then measured call by call in turns.

The second only measures: it comes last, so that a machine that drifted while PyTorch was measured shows it.
"""

from __future__ import annotations

from part import Part, run


def work(part: Part) -> None:
    bundles = [part.bundle(heads) for heads in part.settings.kv_heads]
    part.found["bench"] = part.bench(*bundles, depths=part.settings.depths, steps=part.settings.steps)
    if part.argument != "again":
        part.found["validation"], part.found["self_test"] = {}, {}
        for bundle in bundles:
            part.found["validation"][bundle.name] = part.validate(bundle)
            part.found["self_test"][bundle.name] = part.self_test(bundle)


if __name__ == "__main__":
    run(work)
