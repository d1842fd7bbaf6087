"""Compare predictions with what the builds and benchmarks of a bundle recorded; unknown records are
ignored."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvexport.devices.targets import Target
from kvexport.plan.memory import kv_bytes, memory
from kvexport.plan.sizes import Sizes
from kvexport.plan.speed import DECODE, PREFILL, decode_seconds, prefill_seconds
from kvexport.plan.weights import Precision

_LARGEST = 1e18  # plausible value of a record: bytes, tokens, milliseconds


@dataclass(frozen=True)
class Comparison:
    """One quantity, predicted and measured, in `unit` ("bytes" or "ms"); `source` is the file of the
    measurement."""

    source: str
    what: str
    unit: str
    predicted: float
    measured: float

    @property
    def ratio(self) -> float:
        """Measured over predicted."""
        return self.measured / self.predicted


def compare(bundle: Path, sizes: Sizes, stored: Precision, target: Target | None) -> tuple[Comparison, ...]:
    """Compare every record under `bundle` that can be compared.

    Builds are compared for any target. Times need a prediction for `target`; times of a CPU are compared with
    a CPU target only, times of a GPU with a GPU target only.
    """
    comparisons: list[Comparison] = []
    for path in sorted(bundle.glob("engines/*/build.json")):
        for record in _objects(path):
            comparisons += _compare_build(f"{path.parent.name}/{path.name}", record, sizes, stored)
    if target is not None:
        for path in sorted(bundle.glob("bench/*.json")):
            for record in _objects(path):
                if record.get("target", target.name) == target.name and _comparable(
                    target, record.get("provider")
                ):
                    comparisons += _compare_benchmark(path.name, record, sizes, stored, target)
    return tuple(comparisons)


def _objects(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file, the whole file or one on each line; none if it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return
    for piece in [text] if path.name == "build.json" else text.splitlines():
        try:
            value = json.loads(piece)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            yield value


def _number(value: object) -> float | None:
    return (
        float(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < _LARGEST
        else None
    )


def _comparable(target: Target, provider: object) -> bool:
    """Whether a measurement on `provider` can be compared with `target`: both CPU, or both GPU."""
    return provider is None or (provider == "cpu") == (target.engine == "onnxruntime")


def _compare_build(
    source: str, record: dict[str, Any], sizes: Sizes, stored: Precision
) -> Iterator[Comparison]:
    engine, lowering = record.get("engine"), record.get("lowering")
    if engine not in ("tensorrt", "tensorrt-rtx") or not isinstance(lowering, str):
        return
    plan, options = record.get("plan"), record.get("options")
    with_weights = not (isinstance(options, dict) and options.get("refit"))
    plan_size = _number(plan.get("bytes")) if isinstance(plan, dict) and with_weights else None
    activations, capacity = _number(record.get("activation_bytes")), _number(record.get("capacity"))
    weights = sizes.weight_bytes(stored).total
    pairs: list[tuple[str, float, float | None]] = [
        ("weights", weights, _number(record.get("weights_bytes"))),
        ("plan", weights, plan_size),
    ]
    if capacity is not None and record.get("batch", 1) == 1:
        chunk = int(_number(record.get("chunk")) or sizes.chunk)
        needed = memory(sizes, stored, int(capacity), engine=engine, lowering=lowering, chunk=chunk)
        pairs.append(("activations", needed.activations, activations))
        if plan_size is not None and activations is not None:
            device = plan_size + activations + kv_bytes(sizes, stored, int(capacity))
            pairs.append(("device memory", weights + needed.activations + needed.kv, device))
    for what, predicted, measured in pairs:
        if measured is not None:
            yield Comparison(source, what, "bytes", predicted, measured)


def _compare_benchmark(
    source: str, record: dict[str, Any], sizes: Sizes, stored: Precision, target: Target
) -> Iterator[Comparison]:
    for stage, depth, milliseconds in _points(record, None):
        if stage == "decode":
            seconds: float | None = decode_seconds(sizes, stored, target, depth, DECODE.typical)
        else:
            seconds = prefill_seconds(sizes, stored, target, max(1, depth), PREFILL.typical, DECODE.typical)
        if seconds is not None:
            yield Comparison(source, f"{stage}, {depth} tokens", "ms", 1000 * seconds, milliseconds)


def _points(value: object, stage: str | None) -> Iterator[tuple[str, int, float]]:
    """Find every (stage, depth, median milliseconds) under the keys "prefill" and "decode"."""
    if isinstance(value, list):
        for each in value:
            yield from _points(each, stage)
    if not isinstance(value, dict):
        return
    depth, milliseconds = value.get("depth"), _number(value.get("p50_ms"))
    if stage is not None and type(depth) is int and 0 <= depth < _LARGEST and milliseconds is not None:
        yield stage, depth, milliseconds
    for key, inner in value.items():
        yield from _points(inner, key if key in ("prefill", "decode") else stage)
