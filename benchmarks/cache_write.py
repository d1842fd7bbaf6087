"""Compare three ways for an engine without in-place cache writes to store its cache, by one decode step each.

For TensorRT before 10.15 (the lowering decomposed17). One attention layer, one new token, opset 17:
  slice    the cache is an input only; attention over the cache and over the new token is joined in one
           softmax; the outputs are the new keys and values, and the caller writes them into its buffer (as
           kvexport does)
  scatter  ScatterElements writes the new token into a copy of the cache, which is the output
  concat   the input is the cache without free slots, the output a cache longer by one token
Inputs and outputs never share memory. ONNX Runtime on the CPU, float32; times include the caller's writes.
Not measured on a GPU. Times go to benchmarks/results/cache_write.json.

    python benchmarks/cache_write.py
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

RECORD = Path(__file__).parent / "results" / "cache_write.json"
SHAPES = {"16 heads, 4 KV heads of 64": (16, 4, 64), "32 heads, 8 KV heads of 128": (32, 8, 128)}
FORMS = ("slice", "scatter", "concat")
DEPTHS = (512, 4096, 8192)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of ONNX Runtime [default: 2]")
    parser.add_argument("--repetitions", type=int, default=40, help="timed steps of each form [default: 40]")
    parser.add_argument("--output", type=Path, default=RECORD)
    arguments = parser.parse_args()
    record: dict[str, Any] = {
        "machine": f"{platform.machine()}, {arguments.threads} threads, onnxruntime "
        f"{onnxruntime.__version__}",
        "layer_step_ms": {},
    }
    for label, (heads, kv_heads, width) in SHAPES.items():
        for depth in DEPTHS:
            steps = {
                form: step(form, heads, kv_heads, width, depth, arguments.threads)
                for form in ("slice", "scatter", "concat")
            }
            results = {form: run() for form, run in steps.items()}
            for form, result in results.items():
                np.testing.assert_allclose(result, results["slice"], atol=1e-5, err_msg=form)
            times: dict[str, list[float]] = {form: [] for form in steps}
            for _ in range(arguments.repetitions):
                for form, run in steps.items():
                    start = time.perf_counter()
                    run()
                    times[form].append(1e3 * (time.perf_counter() - start))
            figures = {form: summary(raw) for form, raw in times.items()}
            record["layer_step_ms"][f"{label}, depth {depth}"] = figures
            print(
                f"{label}, depth {depth}: "
                + ", ".join(f"{form} {each['median']} ms" for form, each in figures.items())
            )
    arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def step(
    form: str, heads: int, kv_heads: int, width: int, depth: int, threads: int
) -> Callable[[], np.ndarray]:
    """One decode step of a layer whose cache holds `depth` tokens; returns the attention output [1, heads, 1,
    width]."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    model = attention(form, heads, kv_heads, width).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, dtype=np.float32)

    capacity = depth if form == "concat" else depth + 64
    feeds = {
        "query": normal(1, heads, 1, width),
        "new_key": normal(1, kv_heads, 1, width),
        "new_value": normal(1, kv_heads, 1, width),
    }
    cached = {name: normal(1, kv_heads, depth, width) for name in ("key", "value")}
    for name, values in cached.items():
        feeds[name] = np.zeros((1, kv_heads, capacity, width), np.float32)
        feeds[name][:, :, :depth] = values
    if form != "concat":
        visible = np.arange(capacity) < depth if form == "slice" else np.arange(capacity) <= depth
        feeds["bias"] = np.where(visible, 0, -1e30).astype(np.float32)
    if form == "scatter":
        feeds["slot"] = np.full((1, kv_heads, 1, width), depth, np.int64)
    outputs = {"slice": (), "scatter": (capacity,), "concat": (depth + 1,)}[form]
    arrays = {"mixed": np.empty((1, heads, 1, width), np.float32)}
    for rows in outputs:
        arrays |= {f"all_{name}": np.empty((1, kv_heads, rows, width), np.float32) for name in cached}
    binding = session.io_binding()
    for name, array in feeds.items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
    for name, array in arrays.items():
        binding.bind_ortvalue_output(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))

    def run() -> np.ndarray:
        session.run_with_iobinding(binding)
        if form == "slice":
            for name in cached:
                feeds[name][:, :, depth] = feeds[f"new_{name}"][:, :, 0]
        return arrays["mixed"]

    return run


def attention(form: str, heads: int, kv_heads: int, width: int) -> onnx.ModelProto:
    """Grouped attention of one token; K and V are never expanded to the query heads."""
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []

    def op(op_type: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op_type, inputs, [output], **attributes))
        return output

    def constant(name: str, values: Any) -> str:
        constants.append(onnx.numpy_helper.from_array(np.asarray(values), name))
        return name

    def tensor(name: str, *shape: int | str, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    inputs = [tensor("query", 1, heads, 1, width)]
    inputs += [tensor(name, 1, kv_heads, 1, width) for name in ("new_key", "new_value")]
    inputs += [tensor(name, 1, kv_heads, "capacity", width) for name in ("key", "value")]
    outputs = [tensor("mixed", 1, heads, 1, width)]
    if form != "concat":
        inputs.append(tensor("bias", "capacity"))
    if form != "slice":
        outputs += [tensor(f"all_{name}", 1, kv_heads, "total", width) for name in ("key", "value")]
    if form == "scatter":
        inputs.append(tensor("slot", 1, kv_heads, 1, width, kind=TensorProto.INT64))
    cached = {"slice": "{}", "scatter": "all_{}", "concat": "all_{}"}[form]
    for name in ("key", "value"):
        if form == "scatter":
            op("ScatterElements", [name, "slot", f"new_{name}"], f"all_{name}", axis=2)
        elif form == "concat":
            op("Concat", [name, f"new_{name}"], f"all_{name}", axis=2)
    rows = op("Reshape", ["query", constant("grouped", [1, kv_heads, -1, width])], "rows")
    scaled = op("Mul", [rows, constant("scale", np.float32(width**-0.5))], "scaled")
    scores = op(
        "MatMul", [scaled, op("Transpose", [cached.format("key")], "turned", perm=[0, 1, 3, 2])], "scores"
    )
    if form != "concat":
        scores = op("Add", [scores, "bias"], "biased")
    if form == "slice":
        fresh = op(
            "MatMul", [scaled, op("Transpose", ["new_key"], "new_turned", perm=[0, 1, 3, 2])], "new_scores"
        )
        scores = op("Concat", [scores, fresh], "all_scores", axis=-1)
    weights = op("Softmax", [scores], "weights", axis=-1)
    if form == "slice":
        last, end, start = constant("last", [-1]), constant("end", [2**63 - 1]), constant("start", [0])
        axis = constant("axis", [3])
        cached = op(
            "MatMul", [op("Slice", [weights, start, last, axis], "cached_weights"), "value"], "cached"
        )
        new = op("MatMul", [op("Slice", [weights, last, end, axis], "new_weights"), "new_value"], "new")
        mixed = op("Add", [cached, new], "mixed_rows")
    else:
        mixed = op("MatMul", [weights, cached.format("value")], "mixed_rows")
    op("Reshape", [mixed, constant("by_head", [1, heads, 1, width])], "mixed")
    graph = helper.make_graph(nodes, form, inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def summary(raw: list[float]) -> dict[str, Any]:
    quartiles = statistics.quantiles(raw, n=4)
    return {
        "median": round(statistics.median(raw), 4),
        "quartiles": [round(quartiles[0], 4), round(quartiles[2], 4)],
        "raw": [round(each, 4) for each in raw],
    }


if __name__ == "__main__":
    main()
