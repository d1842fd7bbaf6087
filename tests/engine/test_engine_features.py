"""TensorRT-RTX builds every feature of the neutral decoder, with native layers; no GPU is needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.blocks import make_blocks, windowed
from support.combinations import representatives
from support.family_cases import DEFAULTS
from support.tiny_bundles import write_bundle

from kvexport.bundle import GRAPH_FILE
from kvexport.bundle.engine_record import BuildRecord
from kvexport.engine import EngineOptions, build_engine
from kvexport.engine.engine_graph import prepare_graph
from kvexport.eviction.config import Eviction
from kvexport.graph.keep_float32 import NO_EXCEPTIONS, Float32Exceptions
from kvexport.graph.lint import Parser, refusals
from kvexport.model.decoder import Decoder
from kvexport.model.loader import load_decoder
from kvexport.progress import Progress

pytestmark = [pytest.mark.slow, pytest.mark.tensorrt]

BLOCKS = make_blocks(head_dim=16, value_dim=16)  # heads of 16 have fused kernels
FIRST = (  # `make test` builds these in the variants in turn, and the others in float16
    "softcap",
    "alibi-and-softcap",
    "clip",
    "all-norms",
    "qk-norm-per-head",
    "two-ropes",
    "qk-norm-after-rotation",
)


@dataclass(frozen=True)
class Variant:
    """How the bundle of a decoder is written, and lowered (None: as `kvexport engine` chooses)."""

    dtype: str = "float16"
    lowering: str | None = None
    windows: bool = False
    exceptions: Float32Exceptions = NO_EXCEPTIONS
    eviction: Eviction | None = None


VARIANTS = {
    "float16": Variant(),
    "windows": Variant(windows=True),
    "bfloat16": Variant("bfloat16"),
    "float32-stream": Variant(exceptions=Float32Exceptions(stream=True, mlps=frozenset({0}))),
    "decomposed17": Variant(lowering="decomposed17"),
    "decomposed17-windows": Variant(lowering="decomposed17", windows=True),
    "evicting": Variant(eviction=Eviction("l2-norm", 24, protect_first=1, protect_recent=3)),
}


class Notes(Progress):
    """Collect notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def expected_layers(decoder: Decoder, evicting: bool) -> dict[str, int]:
    """Layers of TensorRT's network: every cache is updated in place, attention without softcap is fused, and
    every rotation is native."""
    attentions = [layer.attention for layer in decoder.layers]
    fused = sum(attention.softcap is None for attention in attentions)
    rotations = 2 * sum(attention.rope is not None for attention in attentions)
    return {
        "KV_CACHE_UPDATE": (3 if evicting else 2) * len(attentions),  # the third is the state of the slots
        "ATTENTION_INPUT": fused,
        "ATTENTION_OUTPUT": fused,
        "ROTARY_EMBEDDING": rotations,
    }


def native(record: BuildRecord, *names: str) -> dict[str, int]:
    return {name: record.layers.get(name, 0) for name in names}


@pytest.mark.parametrize(
    ("name", "variant"),
    representatives([*FIRST, *(name for name in BLOCKS if name not in FIRST)], list(VARIANTS)),
)
def test_every_feature_builds_with_native_layers(name: str, variant: str, rtx: Any, tmp_path: Path) -> None:
    chosen = VARIANTS[variant]
    decoder = windowed(BLOCKS[name]) if chosen.windows else BLOCKS[name]
    bundle = write_bundle(
        tmp_path / "bundle",
        decoder,
        dtype=chosen.dtype,
        exceptions=chosen.exceptions,
        eviction=chosen.eviction,
    )
    notes, evicting = Notes(), chosen.eviction is not None
    options = EngineOptions(chunk=4 if evicting else 16, lowering=chosen.lowering)
    record = build_engine(bundle, options, compute_capabilities=("8.9",), progress=notes)
    expected = expected_layers(decoder, evicting)
    if chosen.lowering == "decomposed17":
        expected = dict.fromkeys(expected, 0)
    assert native(record, *expected) == expected
    assert record.lowering == (chosen.lowering or "std24")
    assert (record.decomposed, notes.notes) == ((), [])


def widened(config: dict[str, Any]) -> dict[str, Any]:
    """Sizes of a tiny checkpoint whose heads of 16 have fused kernels."""
    return {
        name: 2 * config[name] for name in ("hidden_size", "n_embd", "d_model", "head_dim") if name in config
    }


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", sorted(DEFAULTS))
def test_every_family_builds_with_native_layers(
    family: str, rtx: Any, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    decoder = load_decoder(tiny_checkpoint(family, **widened(DEFAULTS[family])))
    bundle = write_bundle(tmp_path / "bundle", decoder, dtype="float16")
    notes = Notes()
    record = build_engine(bundle, EngineOptions(chunk=16), compute_capabilities=("8.9",), progress=notes)
    expected = expected_layers(decoder, evicting=False)
    assert native(record, *expected) == expected
    assert (record.lowering, record.decomposed, notes.notes) == ("std24", (), [])


@pytest.mark.parametrize("name", BLOCKS)
def test_lint_takes_every_feature_for_every_version(name: str, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", windowed(BLOCKS[name]), dtype="float16")
    for version, lowering in (
        ((10, 3), "decomposed17"),
        ((10, 13), "decomposed17"),
        ((10, 16), "std24"),
        ((11, 4), "std24"),
    ):
        graph = prepare_graph(bundle / GRAPH_FILE, Parser("tensorrt", version), batch=1, capacity=64)
        assert (graph.lowering, refusals(graph.findings)) == (lowering, []), version
