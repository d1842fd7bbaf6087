"""Builds from saved statistics calibrate and analyse nothing again, and give the same bundle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvexport.build import BuildOptions, BuildReport, build, calibrate, compress
from kvexport.calibrate import recipe_for
from kvexport.convert import CompressionRequest
from kvexport.errors import UsageError
from kvexport.progress import Progress

RECIPE = recipe_for("random", 8, 24)
FILES = ("decoder.onnx", "decoder.onnx.data", "reference.npz")
Checkpoints = Callable[..., Path]


class Notes(Progress):
    """Collects the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def built(source: Path, output: Path, statistics: Path | None = None, **request: Any) -> BuildReport:
    method, capacity = request.pop("method", "auto"), request.pop("capacity", 64)
    options = BuildOptions(RECIPE, CompressionRequest(**request), method, statistics)
    return build(source, output, options, Progress(), capacity=capacity)


def same(one: Path, other: Path) -> bool:
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in FILES)


@pytest.mark.parametrize(
    "requested",
    [
        {"kv_ratio": 0.75},
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in (
                {"kv_ratio": 0.5},
                {"kv_heads": 2},
                {"kv_ratio": 0.5, "method": "fold"},
                {"group_size": 2, "kv_ratio": 0.5, "method": "online"},
                {"max_kl": 0.5},
            )
        ),
    ],
    ids=str,
)
def test_saved_statistics_serve_every_request(
    tiny_checkpoint: Checkpoints, tmp_path: Path, work: list[str], requested: dict[str, Any]
) -> None:
    source, statistics = tiny_checkpoint("llama", num_key_value_heads=4), tmp_path / "statistics"
    calibrate(source, statistics, RECIPE, Progress(), capacity=64)
    assert work == ["calibration_windows", "analyze_sensitivity"]
    built(source, tmp_path / "direct", **requested)
    assert work[2:] == ["calibration_windows", "analyze_sensitivity"]  # control: it needs both
    built(source, tmp_path / "saved", statistics, **requested)
    assert len(work) == 4
    assert same(tmp_path / "direct", tmp_path / "saved")


def test_one_method_and_one_shape_need_no_analysis(
    tiny_checkpoint: Checkpoints, tmp_path: Path, work: list[str]
) -> None:
    built(tiny_checkpoint("llama"), tmp_path / "b", kv_heads=1, method="fold")
    assert work == ["calibration_windows"]


@pytest.mark.slow
def test_another_capacity_is_analysed_again_with_the_saved_moments(
    tiny_checkpoint: Checkpoints, tmp_path: Path, work: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, statistics = tiny_checkpoint("llama", num_key_value_heads=4), tmp_path / "statistics"
    calibrate(source, statistics, RECIPE, Progress(), capacity=64)
    built(source, tmp_path / "direct", capacity=96)
    built(source, tmp_path / "other", capacity=64)
    assert not same(tmp_path / "direct", tmp_path / "other")  # control: the capacity matters
    del work[:]
    options, progress = BuildOptions(RECIPE, statistics=statistics), Notes()
    monkeypatch.setattr("kvexport.convert.streams.TrainedStream.measure", None)
    build(source, tmp_path / "saved", options, progress, capacity=96)
    assert work == ["analyze_sensitivity"]
    assert any("analysed again for 96" in note for note in progress.notes)
    assert same(tmp_path / "direct", tmp_path / "saved")


def test_another_capacity_is_refused_if_rope_depends_on_it(
    tiny_checkpoint: Checkpoints, tmp_path: Path, work: list[str]
) -> None:
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    source = tiny_checkpoint("llama", max_position_embeddings=64, rope_parameters=scaling)
    statistics = tmp_path / "statistics"
    calibrate(source, statistics, RECIPE, Progress(), capacity=64)
    del work[:]
    with pytest.raises(UsageError, match="must be for the capacity of the build") as refused:
        built(source, tmp_path / "b", statistics, capacity=96)
    assert "--capacity 96" in str(refused.value) and not work
    built(source, tmp_path / "b", statistics, capacity=64)


def test_compress_starts_from_statistics(
    tiny_checkpoint: Checkpoints, tmp_path: Path, work: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, statistics = tiny_checkpoint("llama", num_key_value_heads=4), tmp_path / "statistics"
    calibrate(source, statistics, RECIPE, Progress())
    compress(source, tmp_path / "direct", BuildOptions(RECIPE, method="fold"), Progress())
    del work[:]
    monkeypatch.setattr("kvexport.convert.streams.TrainedStream.measure", None)
    options = BuildOptions(RECIPE, method="fold", statistics=statistics)
    compress(source, tmp_path / "saved", options, Progress())
    assert not work
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("direct", "saved")]
    assert weights[0] == weights[1]
