"""`kvexport plan` predicts the activation memory that TensorRT-RTX reports as it builds, without a GPU."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.decoders import make_decoder
from support.quantized_decoders import quantize_decoder
from support.tiny_bundles import write_bundle

from kvexport.bundle.manifest import read_manifest
from kvexport.engine import EngineOptions, build_engine
from kvexport.plan.memory import memory
from kvexport.plan.sizes import bundle_sizes
from kvexport.plan.weights import bundle_precision

pytestmark = [pytest.mark.tensorrt, pytest.mark.slow]
_REPORT = re.compile(r"Total Activation Memory: (\d+) bytes")


@pytest.fixture
def reported(rtx: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The activation memory of each profile of the builds of a test."""
    found: list[int] = []
    log = type(rtx.log).log

    def listen(self: Any, severity: Any, message: str) -> None:
        if match := _REPORT.match(message):
            found.append(int(match[1]))
        log(self, severity, message)

    monkeypatch.setattr(type(rtx.log), "log", listen)
    yield found


@pytest.mark.parametrize(
    ("lowering", "weights", "layers", "capacity", "kv_heads"),
    [
        ("std24", "int4", 1, 8192, 4),
        ("decomposed17", "float16", 2, 4096, 8),
        ("decomposed17", "int4", 4, 2048, 4),
    ],
)
def test_activation_memory_is_as_predicted(
    lowering: str,
    weights: str,
    layers: int,
    capacity: int,
    kv_heads: int,
    reported: list[int],
    tmp_path: Path,
) -> None:
    """Within 25 %. Integer weights of the layers, embedding and head are not expanded: in float16 they would
    take more than the tolerance."""
    decoder = make_decoder(
        "gqa",
        hidden=1024,
        heads=16,
        kv_heads=kv_heads,
        head_dim=64,
        vocab=12288,
        layers=layers,
        dtype=torch.float32,
        max_positions=capacity,
    )
    if weights != "float16":
        decoder = quantize_decoder(decoder, weights, block=128, dtype="float16")
    bundle = write_bundle(tmp_path / "bundle", decoder, dtype="float16", capacity=capacity)
    build_engine(bundle, EngineOptions(chunk=128, lowering=lowering), compute_capabilities=("8.6",))
    manifest = read_manifest(bundle)
    needed = memory(
        bundle_sizes(bundle, manifest),
        bundle_precision(manifest),
        capacity,
        engine="tensorrt-rtx",
        lowering=lowering,
        chunk=128,
    )
    assert 0.75 < max(reported) / needed.activations < 1.25
