"""`kvexport.validate.reference_run`: the record equals the reference's forward pass; a damaged record is an
error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.decoders import make_decoder, random_windows

from kvexport.errors import BundleError
from kvexport.model import reference
from kvexport.validate import ReferenceRecorder, read_reference
from kvexport.validate.reference_run import FILE


def _record(directory: Path, style: str = "gqa", capacity: int = 128) -> None:
    decoder = make_decoder(style, dtype=torch.float32)
    recorder = ReferenceRecorder(decoder, random_windows(decoder, 3, 40), capacity)
    for layer in decoder.layers:
        recorder.add_layer(layer)
    recorder.save(directory)


@pytest.mark.parametrize(("style", "capacity"), [("gqa", 128), ("bloom", 128), ("window", 50)])
def test_the_record_equals_the_reference(style: str, capacity: int, tmp_path: Path) -> None:
    _record(tmp_path, style, capacity)
    recorded = read_reference(tmp_path / FILE, 2)
    decoder = make_decoder(style, dtype=torch.float32)
    ids = random_windows(decoder, 3, 40).flatten()[: min(96, capacity)]
    taps: list[reference.LayerTaps] = []
    logits = reference.forward(decoder, ids[None], taps=taps)[0]
    np.testing.assert_array_equal(recorded["input_ids"], ids)
    np.testing.assert_array_equal(recorded["logits"], logits)
    for layer, tap in enumerate(taps):
        np.testing.assert_array_equal(recorded[f"layers.{layer}.residual"], tap.residual[0])
        np.testing.assert_array_equal(recorded[f"layers.{layer}.attention"], tap.attention[0])
        for which, heads in (("key", tap.key[0]), ("value", tap.value[0])):  # [heads, T, width]
            side_by_side = torch.cat(list(heads), dim=-1)
            np.testing.assert_array_equal(recorded[f"layers.{layer}.{which}"], side_by_side)


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "not an archive", "pickle"])
def test_rejects_an_unreadable_record(damage: str, tmp_path: Path) -> None:
    _record(tmp_path)
    path = tmp_path / FILE
    if damage == "missing":
        path.unlink()
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "not an archive":
        path.write_bytes(b"PK\x03\x04 and nothing else")
    else:
        np.savez(path, logits=np.array([object()]))
    with pytest.raises(BundleError, match="must be readable"):
        read_reference(path, 2)


@pytest.mark.parametrize("layers", [1, 3])
def test_rejects_a_record_of_another_number_of_layers(layers: int, tmp_path: Path) -> None:
    _record(tmp_path)
    with pytest.raises(BundleError, match="must have every recorded array"):
        read_reference(tmp_path / FILE, layers)
