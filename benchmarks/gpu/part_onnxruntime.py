"""Parts onnxruntime and onnxruntime-again: validate both bundles on ONNX Runtime, then measure them in
alternation.

The second part measures only. It runs last, so that it shows whether the machine drifted meanwhile.
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
