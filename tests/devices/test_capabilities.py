"""Capabilities of engines: the right entry for a version, and every documented change at its version."""

from __future__ import annotations

import pytest

from kvexport.devices.capabilities import (
    CAPABILITIES,
    OLDEST_TENSORRT,
    TENSORRT_LOWERINGS,
    capabilities_of,
    first_tensorrt_with,
)
from kvexport.devices.targets import known_targets


@pytest.mark.parametrize(
    ("version", "since"),
    [
        ((10, 0), (10, 3)),
        ((10, 3, 0, 30), (10, 3)),
        ((10, 13, 3, 9), (10, 11)),
        ((10, 14), (10, 14)),
        ((10, 15), (10, 15)),
        ((10, 16, 2, 10), (10, 15)),
        ((11, 4, 1), (11, 0)),
        (None, (11, 0)),
    ],
)
def test_a_version_gets_the_newest_entry_that_it_has_reached(
    version: tuple[int, ...] | None, since: tuple[int, ...]
) -> None:
    assert capabilities_of("tensorrt", version).since == since


@pytest.mark.parametrize(
    ("version", "opset", "lowering"),
    [
        ((10, 3), 21, "decomposed17"),
        ((10, 6), 22, "decomposed17"),
        ((10, 11), 23, "decomposed17"),
        ((10, 14), 23, "decomposed17"),
        ((10, 15), 24, "std24"),
        ((11, 0), 25, "std24"),
    ],
)
def test_tensorrt_reads_the_documented_opset_and_lowering(
    version: tuple[int, ...], opset: int, lowering: str
) -> None:
    capabilities = capabilities_of("tensorrt", version)
    assert (capabilities.newest_opset, capabilities.lowering) == (opset, lowering)


@pytest.mark.parametrize(
    ("operator", "version"),
    [
        ("MatMul", OLDEST_TENSORRT),
        ("STFT", (10, 5)),
        ("Attention", (10, 14)),
        ("TensorScatter", (10, 15)),
        ("Swish", (11, 0)),
        ("BitwiseNot", None),
    ],
)
def test_operators_are_imported_from_the_documented_version_on(
    operator: str, version: tuple[int, ...] | None
) -> None:
    assert first_tensorrt_with(operator) == version


def test_every_engine_of_a_target_has_an_entry() -> None:
    engines = {target.engine for target in known_targets()}
    assert engines <= {entry.engine for entry in CAPABILITIES}
    lowerings = {entry.lowering for entry in CAPABILITIES if entry.engine != "onnxruntime"}
    assert lowerings == set(TENSORRT_LOWERINGS)
    assert capabilities_of("onnxruntime").lowering == "ort" and capabilities_of("onnxruntime").imports("Any")


def test_entries_of_an_engine_are_in_order_of_version() -> None:
    for engine in {entry.engine for entry in CAPABILITIES}:
        versions = [entry.since for entry in CAPABILITIES if entry.engine == engine]
        assert versions == sorted(set(versions))
