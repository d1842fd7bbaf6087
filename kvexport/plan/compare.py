"""Predictions beside measurements: what a bundle's builds and benchmarks recorded, where there are any.

Knows the few keys it looks for, and passes over whatever it does not understand; builds and measures nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvexport.devices.targets import Target
from kvexport.plan.memory import Precision, kv_bytes, memory, weight_bytes
from kvexport.plan.sizes import Sizes
from kvexport.plan.speed import DECODE, PREFILL, decode_seconds, prefill_seconds

_MOST = 1e18  # of what a record may plausibly hold: bytes, tokens, milliseconds


@dataclass(frozen=True)
class Comparison:
    """One quantity, predicted and measured, in `unit` ("bytes" or "ms"); `source` is the file that holds the measurement."""

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
    """Every comparison that the records under `bundle` allow.

    Builds are compared whatever target they are for; times only with a prediction for `target`, so not without one, and
    those of a CPU and of a GPU only with their own kind.
    """
    found: list[Comparison] = []
    for path in sorted(bundle.glob("engines/*/build.json")):
        for record in _objects(path):
            found += _of_build(f"{path.parent.name}/{path.name}", record, sizes, stored)
    if target is not None:
        for path in sorted(bundle.glob("bench/*.json")):
            for record in _objects(path):
                if record.get("target", target.name) == target.name and _may_be_of(
                    target, record.get("provider")
                ):
                    found += _of_benchmark(path.name, record, sizes, stored, target)
    return tuple(found)


def _objects(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file that is one, or holds one a line; nothing where it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return
    for piece in [text] if path.name == "build.json" else text.splitlines():
        try:
            found = json.loads(piece)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            yield found


def _number(value: object) -> float | None:
    return (
        float(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < _MOST
        else None
    )


def _may_be_of(target: Target, provider: object) -> bool:
    """Whether what ran on `provider` can be compared with `target`: what ran on a CPU says nothing of a GPU."""
    return provider is None or (provider == "cpu") == (target.engine == "onnxruntime")


def _of_build(source: str, record: dict[str, Any], sizes: Sizes, stored: Precision) -> Iterator[Comparison]:
    engine, lowering = record.get("engine"), record.get("lowering")
    if engine not in ("tensorrt", "tensorrt-rtx") or not isinstance(lowering, str):
        return
    plan, options = record.get("plan"), record.get("options")
    whole = not (isinstance(options, dict) and options.get("refit"))  # else its weights are not in the plan
    plan_size = _number(plan.get("bytes")) if isinstance(plan, dict) and whole else None
    activations, capacity = _number(record.get("activation_bytes")), _number(record.get("capacity"))
    pairs: list[tuple[str, float, float | None]] = [
        ("weights", weight_bytes(sizes, stored), _number(record.get("weights_bytes"))),
        ("plan", weight_bytes(sizes, stored), plan_size),
    ]
    if capacity is not None and record.get("batch", 1) == 1:
        chunk = int(_number(record.get("chunk")) or sizes.chunk)
        needed = memory(sizes, stored, int(capacity), engine=engine, lowering=lowering, chunk=chunk)
        pairs.append(("activations", needed.activations, activations))
        if plan_size is not None and activations is not None:
            device = plan_size + activations + kv_bytes(sizes, stored, int(capacity))
            pairs.append(("device memory", needed.total - needed.engine, device))
    for what, predicted, measured in pairs:
        if measured is not None:
            yield Comparison(source, what, "bytes", predicted, measured)


def _of_benchmark(
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
    """Every (stage, depth, median milliseconds) under the keys "prefill" and "decode"."""
    if isinstance(value, list):
        for each in value:
            yield from _points(each, stage)
    if not isinstance(value, dict):
        return
    depth, milliseconds = value.get("depth"), _number(value.get("p50_ms"))
    if stage is not None and type(depth) is int and 0 <= depth < _MOST and milliseconds is not None:
        yield stage, depth, milliseconds
    for key, inner in value.items():
        yield from _points(inner, key if key in ("prefill", "decode") else stage)
