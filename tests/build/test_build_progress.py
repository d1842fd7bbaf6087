"""A build announces its stages, and these are the ones that follow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvexport.build import BuildOptions, build, calibrate, compress
from kvexport.calibrate import recipe_for
from kvexport.convert import CompressionRequest
from kvexport.progress import Progress

RECIPE = recipe_for("random", 8, 24)
Checkpoints = Callable[..., Path]


class Parts(Progress):
    """Records the plan, and the parts that began after it."""

    def __init__(self) -> None:
        self.planned: dict[str, float] = {}
        self.begun: list[str] = []

    def plan(self, parts: Mapping[str, float]) -> None:
        assert not self.planned
        self.planned, self.begun = dict(parts), []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.begun.append(name)
        yield


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"request": CompressionRequest(kv_ratio=1)},
        {"request": CompressionRequest(kv_heads=2), "method": "fold"},
        pytest.param({"request": CompressionRequest(max_kl=0.5)}, marks=pytest.mark.slow),
        pytest.param({"heal": 4}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_plan_of_a_build_is_what_it_does(
    tiny_checkpoint: Checkpoints, tmp_path: Path, build_cache: Path, changes: dict[str, Any]
) -> None:
    source = tiny_checkpoint("llama", num_key_value_heads=4)
    options = BuildOptions(RECIPE, cache=build_cache, **changes)
    for name in ("first", "second"):
        progress = Parts()
        report = build(source, tmp_path / name, options, progress, capacity=64)
        assert list(progress.planned) == progress.begun == [key for key in report.seconds if key != "read"]
        assert all(share > 0 for share in progress.planned.values())
    assert "text" not in progress.planned and "analysis" not in progress.planned  # of the second build


def test_the_plans_of_compress_and_calibrate(tiny_checkpoint: Checkpoints, tmp_path: Path) -> None:
    source, progress = tiny_checkpoint("llama", num_key_value_heads=4), Parts()
    compress(source, tmp_path / "checkpoint", BuildOptions(RECIPE, method="fold"), progress)
    assert list(progress.planned) == progress.begun == ["text", "convert", "read-back"]
    progress = Parts()
    calibrate(source, tmp_path / "statistics", RECIPE, progress)
    assert list(progress.planned) == progress.begun == ["text", "analysis"]
