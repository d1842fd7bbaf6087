"""Render the records of a run as tables in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]


def render(records: Sequence[Record]) -> str:
    """All tables; `records` in the order of the parts."""
    by_name = {record["part"]: record for record in records}
    results = {name: record["result"] for name, record in by_name.items()}
    first = records[0]
    text = ["# Checks on a GPU", ""]
    if first["rehearsal"]:
        text += ["**A rehearsal on the CPU, at a tiny size: nothing here says anything of a GPU.**", ""]
    facts = first["gpu"] or {}
    text += [
        "; ".join(
            [*(f"{name} {value}" for name, value in facts.items()), *map(" ".join, first["versions"].items())]
        ),
        "",
    ]
    rows = [
        (each["part"], each["status"], f"{each['seconds']:.0f} of {each['limit_seconds']:.0f}", _note(each))
        for each in records
    ]
    text += table(("part", "outcome", "seconds", ""), rows)
    text += _convert(results.get("convert", {}))
    text += _rtx(results.get("rtx", {}))
    text += _decode(results, first["settings"])
    text += _memory(results)
    return "\n".join(text) + "\n"


def table(head: Iterable[str], rows: Iterable[Sequence[object]]) -> list[str]:
    cells = [
        list(head),
        *([str(each).replace("|", "\\|").replace("\n", " ") for each in row] for row in rows),
    ]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return [lines[0], "|" + "---|" * len(cells[0]), *lines[1:], ""]


def _note(record: Record) -> str:
    if record["status"] == "failed":
        messages = record["failures"] or record["last_words"][-1:] or [""]
        how = "time limit reached" if record["timed_out"] else f"exit code {record['exit_code']}"
        return f"{how}: {messages[0][:300]}"
    result = record["result"]
    if "left_out" in result:
        return str(result["left_out"])
    validations = [each for found in result.get("validation", {}).values() for each in found]
    return ", ".join(
        f"validated on {each['provider']}: greedy agreement {each['greedy_agreement']:.3f}"
        for each in validations
    )


def _convert(result: Record) -> list[str]:
    text = []
    if demo := result.get("demo"):
        text = [
            "## A build on the GPU against one on the CPU",
            "",
            f"Demo model on {' and '.join(demo['devices'])}: "
            f"{'the same plan' if demo['same_plan'] else 'ANOTHER PLAN'}; relative difference of the "
            f"reference's logits {demo['logits']:.2g}, of the KL {demo['kl']:.2g}.",
            "",
        ]
    if sides := result.get("seconds_by_stage"):
        stages = list(dict.fromkeys(stage for seconds in sides.values() for stage in seconds))
        rows = [
            (device, *(f"{seconds[stage]:.1f}" if stage in seconds else "" for stage in stages))
            for device, seconds in sides.items()
        ]
        text += [
            "Seconds of each stage, wide llama of random weights:",
            "",
            *table(("device", *stages), rows),
        ]
    return text


def _rtx(result: Record) -> list[str]:
    if "ways" not in result:
        return []
    listed = "lists" if result["listed"] else "does not list"
    rows = []
    for way, tried in result["ways"].items():
        words = (tried.get(where, []) for where in ("messages", "stderr_end", "runtime_said"))
        messages = [each for some in words for each in some if not each.startswith("WARNING")]
        runs = {True: "yes", False: "no", None: "not tried"}
        rows.append(
            (
                way,
                runs[tried["built"]],
                tried.get("validity", ""),
                runs[tried.get("loads")],
                runs[tried.get("runs")],
                runs[tried.get("proved")],
                messages[0][:200] if messages else "",
            )
        )
    head = ("way", "built", "validity", "loads", "runs", "proved", "first error")
    title = f"## TensorRT-RTX, which {listed} compute capability {result['compute_capability']}"
    return [title, "", *table(head, rows)]


def _decode(results: Mapping[str, Record], settings: Record) -> list[str]:
    depths = [str(depth) for depth in settings["depths"]]
    sides: dict[str, dict[str, str]] = {}
    for part in ("onnxruntime", "onnxruntime-again"):
        lines = results.get(part, {}).get("bench", [])
        for line, heads in zip(lines, settings["kv_heads"], strict=False):
            sides[f"kvexport, {line['engine']}, {heads} KV heads{', again' * part.endswith('again')}"] = (
                _points(line)
            )
    for part in ("engine-std24", "engine-decomposed17"):
        result = results.get(part, {})
        for line in result.get("bench", []):
            sides[f"kvexport, {line['engine']}, {result['lowering']}, {result['kv_heads']} KV heads"] = (
                _points(line)
            )
    for depth, figures in results.get("pytorch", {}).get("decode", {}).items():
        for side, figure in figures.items():
            sides.setdefault(f"PyTorch, {side}", {})[depth] = _shown(figure["samples_ms"])
    if not sides:
        return []
    rows = [(side, *(points.get(depth, "") for depth in depths)) for side, points in sides.items()]
    return [
        "## A decode step in milliseconds: median (quartiles)",
        "",
        *table(("tokens in the cache", *depths), rows),
    ]


def _points(line: Record) -> dict[str, str]:
    return {str(point["depth"]): _shown(point["samples_ms"]) for point in line["decode"]}


def _shown(samples: Sequence[float]) -> str:
    low, median, high = statistics.quantiles(samples, n=4)
    return f"{median:.3g} ({low:.3g}–{high:.3g})"


def _memory(results: Mapping[str, Record]) -> list[str]:
    rows: list[tuple[object, ...]] = []
    for row in results.get("memory", {}).get("rows", []):
        predicted, measured = row["predicted"], row["measured"]
        pairs = (
            ("weights", predicted["weights"], measured["weights"]),
            ("KV cache in use", predicted["kv"], measured["kv_in_use"]),
            ("KV cache allocated", predicted["kv"], measured["kv_allocated"]),
            ("in all", predicted["total"], measured["total"]),
        )
        rows += [
            (f"ONNX Runtime, {row['kv_heads']} KV heads, {row['depth']} tokens", what, *_compared(*pair))
            for what, *pair in pairs
        ]
    for part in ("engine-std24", "engine-decomposed17"):
        result = results.get(part, {})
        if plan := result.get("plan"):
            what = f"{part}, {result['kv_heads']} KV heads"
            rows += [
                (what, each["what"], *_compared(each["predicted"], each["measured"]))
                for each in plan["comparisons"]
            ]
            rows.append((what, "in all", *_compared(plan["total_bytes"], result.get("device_bytes"))))
    if not rows:
        return []
    head = ("", "", "planned MiB", "measured MiB", "measured / planned")
    return ["## Memory of the device, planned and measured", "", *table(head, rows)]


def _compared(predicted: float, measured: float | None) -> tuple[str, str, str]:
    planned = f"{predicted / 2**20:,.1f}"
    return (
        (planned, "not told", "")
        if measured is None
        else (planned, f"{measured / 2**20:,.1f}", f"{measured / predicted:.2f}")
    )
