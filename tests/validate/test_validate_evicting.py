"""Validation of bundles whose layers evict: each choice of a slot is checked, and a wrong slot, score or
protection found."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.decoders import make_decoder
from support.validated_bundles import broken, export

from kvexport.bundle import GRAPH_FILE, Bundle
from kvexport.errors import BundleError
from kvexport.eviction.config import POLICIES, Eviction
from kvexport.model import reference
from kvexport.progress import Progress
from kvexport.validate import ValidationReport, validate_bundle, validate_graph
from kvexport.validate.reference_run import FILE, STEPS, read_reference

EVICTION = Eviction("l2-norm", 40, protect_first=2, protect_recent=8)
SLOTS = 26  # protected ones and 16


def exported(path: Path, eviction: Eviction = EVICTION, style: str = "llama", **options: Any) -> Path:
    export(path, make_decoder(style, dtype=torch.float32), eviction=eviction, **options)
    return path


def validated(bundle: Path) -> ValidationReport:
    opened = Bundle.open(bundle)
    return validate_graph(bundle, opened.graph, Progress(), opened.eviction)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("style", ["llama", "gqa", "bloom", "window"])
def test_a_valid_bundle_passes(style: str, dtype: str, tmp_path: Path) -> None:
    """Also in half precision, where norms are rounded: each choice starts from the scores of the
    reference."""
    bundle = exported(tmp_path / "bundle", style=style, dtype=dtype)
    for report in (validated(bundle), validate_bundle(bundle, Progress())):
        assert report.failures == ()
        assert report.compared == ("key", "value", "attention", "residual", "score", "slot", "logits")
        assert report.prefill == SLOTS and report.steps == 96 - SLOTS > STEPS


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_passes_with_converted_heads_and_layers_that_do_not_evict(
    policy: str, tmp_path: Path
) -> None:
    eviction = dataclasses.replace(EVICTION, policy=policy, skip_layers=(0,))
    bundle = exported(tmp_path / "bundle", eviction, kv_heads=2)
    for report in (validated(bundle), validate_bundle(bundle, Progress())):
        assert report.failures == ()
        assert {each.name for each in report.differences} >= {"layers.0.key", "layers.1.slot"}
        assert "layers.0.slot" not in {each.name for each in report.differences}


def test_the_record_equals_the_reference_in_fewer_slots(tmp_path: Path) -> None:
    bundle = exported(tmp_path / "bundle")
    recorded = read_reference(bundle / FILE, 2, EVICTION)
    decoder = make_decoder("llama", dtype=torch.float32)
    caches = reference.new_cache(
        decoder.layers, 1, 128, torch.float32, dataclasses.replace(EVICTION, budget=SLOTS)
    )
    ids = torch.from_numpy(recorded["input_ids"])[None]
    logits = [reference.forward(decoder, ids[:, :SLOTS], torch.arange(SLOTS)[None], caches)]
    logits += [
        reference.forward(decoder, ids[:, at : at + 1], torch.tensor([[at]]), caches)
        for at in range(SLOTS, ids.shape[1])
    ]
    np.testing.assert_allclose(recorded["logits"], torch.cat(logits, 1)[0], atol=1e-5)
    evicted = recorded["layers.0.slot"][SLOTS:]
    assert len(np.unique(evicted)) > 8  # heads and steps choose different slots


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "another policy": ({"policy": "keep-high"}, "layers.0.score"),
    "no sinks": ({"protect_first": 0}, "layers.0.slot"),
    "fewer recent ones": ({"protect_recent": 2}, "layers.0.slot"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_graph_of_another_eviction_fails(name: str, tmp_path: Path) -> None:
    """Negative controls: the graph of another eviction with the reference of this one."""
    change, where = CHANGES[name]
    valid = exported(tmp_path / "valid")
    other = exported(tmp_path / "other", dataclasses.replace(EVICTION, **change))
    bundle = broken(
        valid, tmp_path / "broken", lambda path: shutil.copy(other / GRAPH_FILE, path / GRAPH_FILE)
    )
    for report in (validated(bundle), validate_bundle(bundle, Progress())):
        assert any(failure.startswith(where) for failure in report.failures)


def test_rejects_a_reference_without_eviction(tmp_path: Path) -> None:
    valid, plain = exported(tmp_path / "valid"), tmp_path / "plain"
    export(plain, make_decoder("llama", dtype=torch.float32))
    bundle = broken(valid, tmp_path / "broken", lambda path: shutil.copy(plain / FILE, path / FILE))
    with pytest.raises(BundleError, match="must have every recorded array"):
        validated(bundle)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"budget": 1000}, "eviction must be possible"),
        ({"budget": 10}, "must leave a token"),
        ({"budget": 39}, ""),  # the graph takes any budget; only the manifest sets it
        ({"skip_layers": [0]}, "must agree with"),
        ({"skip_layers": [7]}, "must name layers"),
        ({"policy": "fifo"}, "must be a known policy"),
        ({"protect_first": "2"}, "eviction.protect_first has an invalid value"),
        ({"more": 1}, "eviction has an unknown key"),
    ],
)
def test_rejects_a_manifest_with_an_impossible_eviction(
    change: dict[str, Any], says: str, tmp_path: Path
) -> None:
    from support.tiny_bundles import edit_manifest

    bundle = exported(tmp_path / "bundle")
    edit_manifest(bundle, lambda manifest: manifest["eviction"].update(change))
    if says:
        with pytest.raises(BundleError, match=says):
            Bundle.open(bundle)
    else:
        Bundle.open(bundle)


def test_rejects_a_reference_of_a_larger_budget(tmp_path: Path) -> None:
    from support.tiny_bundles import edit_manifest

    bundle = exported(tmp_path / "bundle")
    edit_manifest(bundle, lambda manifest: manifest["eviction"].update(budget=12))
    for check in (validated, lambda path: validate_bundle(path, Progress())):
        with pytest.raises(BundleError, match="with the KV budget of its manifest"):
            check(bundle)


def test_cache_bytes_are_heads_times_width_times_budget(tmp_path: Path) -> None:
    bundle = Bundle.open(
        exported(
            tmp_path / "bundle", dataclasses.replace(EVICTION, skip_layers=(0,)), kv_heads=2, dtype="float16"
        )
    )
    (kept, evicting) = bundle.layers
    numbers = kept.kv_width * 100 + evicting.kv_width * 40
    assert bundle.kv_bytes(100) == 2 * numbers + evicting.num_key_value_heads * 40 * 8
    assert bundle.kv_bytes(7) == 7 * (bundle.kv_bytes_per_token + evicting.num_key_value_heads * 8)
