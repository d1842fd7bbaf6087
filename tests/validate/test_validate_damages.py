"""Negative controls: validation finds each fault, in the array where it is, in every dtype and on every
path."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.damages import DAMAGES, SUBTLE_DAMAGES
from support.decoders import make_decoder
from support.validated_bundles import broken, export

from kvexport.bundle import Bundle
from kvexport.progress import Progress
from kvexport.validate import ValidationReport, validate_bundle, validate_graph

Valid = Callable[[str], Path]


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Valid:
    """An unconverted MHA llama of two layers in a dtype."""
    made: dict[str, Path] = {}

    def make(dtype: str) -> Path:
        if dtype not in made:
            made[dtype] = tmp_path_factory.mktemp(dtype) / "bundle"
            export(made[dtype], make_decoder("llama", dtype=torch.float32), dtype=dtype)
        return made[dtype]

    return make


def _validate_graph(bundle: Path) -> ValidationReport:
    return validate_graph(bundle, Bundle.open(bundle).graph, Progress())


def _require_failure_at(report: ValidationReport, where: str, margin: float) -> None:
    """Require that the array `where` exceeds a gate `margin` times, and that no array before it fails."""
    (seen,) = (each for each in report.differences if each.name == where)
    assert seen.failed and any(failure.startswith(where) for failure in report.failures)
    gate = report.gate
    assert not seen.cosine > 1 - margin * (1 - gate.cosine) or not seen.max_error < margin * gate.max_error
    if not where.startswith("layers.0"):
        assert not any(each.failed for each in report.differences if each.name.startswith("layers.0"))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", DAMAGES)
def test_damage_fails_validation(name: str, dtype: str, valid: Valid, tmp_path: Path) -> None:
    damage, where = DAMAGES[name]
    bundle = broken(valid(dtype), tmp_path / "broken", damage)
    _require_failure_at(validate_bundle(bundle, Progress()), where, 1.3 if dtype != "float32" else 100)


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_fails_the_validation_of_a_build(name: str, valid: Valid, tmp_path: Path) -> None:
    damage, where = DAMAGES[name]
    _require_failure_at(_validate_graph(broken(valid("float32"), tmp_path / "broken", damage)), where, 100)


@pytest.mark.parametrize("name", SUBTLE_DAMAGES)
def test_subtle_damage_fails_in_float32(name: str, valid: Valid, tmp_path: Path) -> None:
    damage, where = SUBTLE_DAMAGES[name]
    bundle = broken(valid("float32"), tmp_path / "broken", damage)
    for report in (validate_bundle(bundle, Progress()), _validate_graph(bundle)):
        _require_failure_at(report, where, 1.3)


def test_an_undamaged_copy_passes(valid: Valid, tmp_path: Path) -> None:
    assert (
        validate_bundle(broken(valid("float32"), tmp_path / "copy", lambda bundle: None), Progress()).failures
        == ()
    )


@pytest.mark.parametrize("name", ["swapped key heads", "a stale suffix", "wrong rotary base"])
def test_damage_of_a_converted_bundle_fails(name: str, tmp_path: Path) -> None:
    """With the online method, which projects keys after rotation."""
    export(tmp_path / "valid", make_decoder("llama", dtype=torch.float32), kv_heads=2, method="online")
    damage, where = DAMAGES[name]
    _require_failure_at(
        validate_bundle(broken(tmp_path / "valid", tmp_path / "broken", damage), Progress()), where, 100
    )
