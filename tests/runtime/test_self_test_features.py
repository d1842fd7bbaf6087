"""The self-test of bundles with every feature of the neutral decoder, and of graphs that lack one."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.blocks import BLOCKS, windowed
from support.combinations import representatives
from support.dropped_features import DROPPED
from support.tiny_bundles import record_self_test, write_bundle
from support.validated_bundles import broken

from kvexport.runtime.self_test.verdict import self_test

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("name", "dtype"), representatives(list(BLOCKS), ["float32", "float16"]))
def test_every_feature_passes(name: str, dtype: str, tmp_path: Path) -> None:
    decoder = BLOCKS[name] if dtype == "float32" else windowed(BLOCKS[name])
    bundle = write_bundle(tmp_path / "bundle", decoder, dtype=dtype, self_test=True)
    assert self_test(bundle).verdict == "ok"


@pytest.mark.parametrize("dropped", DROPPED)
def test_a_graph_without_the_feature_fails(dropped: str, tmp_path: Path) -> None:
    """Negative control: the reference has the feature, and the graph lacks it."""
    name, change = DROPPED[dropped]
    lacking = write_bundle(tmp_path / "lacking", change(BLOCKS[name]))
    bundle = broken(
        lacking,
        tmp_path / "bundle",
        lambda folder: record_self_test(folder, BLOCKS[name], "float32", 64, None),
    )
    assert self_test(bundle).verdict == "weights"
