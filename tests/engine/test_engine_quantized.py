"""TensorRT-RTX keeps integer weights, embedding and head included, in their bits; no GPU is needed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from support.decoders import make_decoder
from support.quantized_decoders import quantize_decoder
from support.tiny_bundles import write_bundle

from kvexport.bundle.engine_record import BuildRecord
from kvexport.engine import EngineOptions, build_engine

pytestmark = [pytest.mark.tensorrt, pytest.mark.slow]


def built(
    path: Path, name: str, *, head: str, layers: int, vocab: int, tied: bool, lowering: str
) -> BuildRecord:
    """An engine of a random decoder that is 1024 wide, with weights of a format, and a head of another."""
    decoder = make_decoder(
        "gqa", hidden=1024, heads=16, head_dim=64, vocab=vocab, layers=layers, dtype=torch.float32
    )
    if tied:
        decoder = dataclasses.replace(decoder, head=None)
    quantized = quantize_decoder(decoder, name, block=128, dtype="float16", head=head)
    bundle = write_bundle(path, quantized, dtype="float16", capacity=256)
    return build_engine(bundle, EngineOptions(chunk=64, lowering=lowering), compute_capabilities=("8.6",))


@pytest.mark.parametrize(
    ("name", "head", "tied", "lowering"),
    [
        ("int4", "int4", False, "std24"),
        ("int4", "int4", True, "std24"),
        ("int4", "int8", False, "std24"),
        ("int8", "int8", False, "std24"),
        ("int8", "int8", True, "std24"),
        ("int4", "int4", True, "decomposed17"),
    ],
)
def test_engine_grows_by_the_stored_weights(
    name: str, head: str, tied: bool, lowering: str, rtx: Any, tmp_path: Path
) -> None:
    """Two engines with the same kernels, of which one has more layers and a larger vocabulary.

    A table that is expanded to float16, or copied for the head, takes more than its stored bits. In
    decomposed17 each layer has kernels of its own, also in float16, and both engines have one layer.
    """
    small = built(tmp_path / "small", name, head=head, layers=1, vocab=2048, tied=tied, lowering=lowering)
    large = built(
        tmp_path / "large",
        name,
        head=head,
        layers=3 if lowering == "std24" else 1,
        vocab=12288,
        tied=tied,
        lowering=lowering,
    )
    stored = large.weights_bytes - small.weights_bytes
    assert stored > 5 << 20
    assert 0.95 < (large.plan.bytes - small.plan.bytes) / stored < 1.05
