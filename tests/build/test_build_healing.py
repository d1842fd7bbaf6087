"""Tests of `build` and `compress` with healing: reports, bundles, and runs that are killed and resumed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvexport.build import BuildHooks, BuildOptions, BuildReport, build, compress
from kvexport.calibrate import recipe_for
from kvexport.convert import CompressionRequest, split_windows
from kvexport.errors import UsageError
from kvexport.model import reference
from kvexport.model.decoder import Decoder, Layer
from kvexport.model.loader import load_decoder
from kvexport.progress import Progress
from kvexport.runtime import open_bundle
from kvexport.runtime.self_test.verdict import self_test
from kvexport.validate.evaluate import divergence_of

STEPS = 20  # 16 of them in each of two layers, then 4 end to end, each evaluated and saved
WINDOWS = 160
Checkpoints = Callable[..., Path]


class Killed(BaseException):
    """Stands for a signal that kills the process."""


class HealingProgress(Progress):
    """Records notes and counts the steps of healing; raises Killed at a given step."""

    def __init__(self, kill_at: int = 0) -> None:
        self.notes: list[str] = []
        self.steps, self._kill_at, self._inside = 0, kill_at, False

    def note(self, text: str) -> None:
        self.notes.append(text)

    def stage(self, name: str, steps: int) -> Any:
        self._inside = name == "Healing"
        return super().stage(name, steps)

    def advance(self) -> None:
        self.steps += self._inside
        if self._inside and self.steps == self._kill_at:
            raise Killed


def build_options(**changes: Any) -> BuildOptions:
    return BuildOptions(
        recipe_for("random", WINDOWS, 24), CompressionRequest(kv_heads=2), **{"method": "online", **changes}
    )


@pytest.fixture
def source(tiny_checkpoint: Checkpoints) -> Path:
    return tiny_checkpoint("llama", num_key_value_heads=4)


def built(source: Path, output: Path, **changes: Any) -> tuple[BuildReport, Decoder]:
    """The report, and the model whose layers were written to the graph."""
    layers: list[Layer] = []

    def record(layer: Layer) -> Layer:
        layers.append(layer)
        return layer

    hooks = BuildHooks(graph_layer=record)
    report = build(source, output, build_options(**changes), Progress(), capacity=64, hooks=hooks)
    return report, dataclasses.replace(load_decoder(source), layers=layers)


@pytest.mark.parametrize("lora", [None, pytest.param(4, marks=pytest.mark.slow)])
def test_report_and_bundle_describe_the_healed_model(lora: int | None, source: Path, tmp_path: Path) -> None:
    if lora is not None:
        pytest.importorskip("peft")
    plain, unhealed = built(source, tmp_path / "plain")
    report, healed = built(source, tmp_path / "healed", heal=100, heal_lora=lora)
    assert plain.healing is None and report.healing is not None
    assert report.healing.steps == 100 and report.healing.best_step > 0
    assert report.healing.kl_after < report.healing.kl_before
    assert plain.divergence is not None and report.divergence is not None
    assert report.divergence.mean_kl < plain.divergence.mean_kl
    trained = load_decoder(source)
    windows = torch.from_numpy(np.random.default_rng(1).integers(0, 67, (64, 24)))
    for decoder, stated in ((unhealed, plain), (healed, report)):
        assert stated.divergence is not None
        held_out = calibration(source)[split_windows(WINDOWS)[1]]
        assert divergence_of(trained, decoder, held_out).mean_kl == pytest.approx(
            stated.divergence.mean_kl, rel=1e-4
        )
    assert divergence_of(trained, healed, windows).mean_kl < divergence_of(trained, unhealed, windows).mean_kl
    scored = open_bundle(tmp_path / "healed", threads=1).score(windows[:1].numpy())
    np.testing.assert_allclose(scored, reference.forward(healed, windows[:1]).numpy(), rtol=0, atol=2e-4)
    assert (
        float((reference.forward(healed, windows[:1]) - reference.forward(unhealed, windows[:1])).abs().max())
        > 1e-2
    )  # control: healing changed the logits
    assert self_test(tmp_path / "healed").verdict == "ok"  # it was recorded from the healed layers
    assert report.to_json()["healing"]["kl_after"] == report.healing.kl_after
    assert {layer.kv_width for layer in report.layers} == {layer.kv_width for layer in plain.layers}
    assert sorted(each.name for each in tmp_path.iterdir()) == ["healed", "plain"]  # no state file is left


def calibration(source: Path) -> torch.Tensor:
    from kvexport.calibrate import calibration_windows

    return calibration_windows(load_decoder(source), source, build_options().recipe, lambda *_: None)


@pytest.mark.slow
@pytest.mark.parametrize("step", [20, 34])  # in the second layer; end to end
def test_a_killed_build_is_resumed_and_gives_the_same_bundle(step: int, source: Path, tmp_path: Path) -> None:
    options, whole, killed = build_options(heal=STEPS), tmp_path / "whole", tmp_path / "killed"
    once = HealingProgress()
    build(source, whole, options, once, capacity=64)
    assert once.steps == 2 * 16 + 4
    with pytest.raises(Killed):
        build(source, killed, options, HealingProgress(step), capacity=64)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["killed.healing", "whole"]
    again = HealingProgress()
    report = build(source, killed, options, again, capacity=64)
    assert any("healing continues from" in note for note in again.notes)
    assert 0 < again.steps < once.steps - 15  # a whole layer at least is not done again
    assert (killed / "decoder.onnx.data").read_bytes() == (whole / "decoder.onnx.data").read_bytes()
    assert report.healing is not None and report.healing.steps == STEPS
    assert sorted(each.name for each in tmp_path.iterdir()) == ["killed", "whole"]


def test_rejects_the_state_of_another_job_and_keeps_the_file(source: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        build(source, tmp_path / "b", build_options(heal=STEPS), HealingProgress(20), capacity=64)
    state = (tmp_path / "b.healing").read_bytes()
    with pytest.raises(UsageError, match=r"b\.healing belongs to another job") as caught:
        build(source, tmp_path / "b", build_options(heal=STEPS + 5), Progress(), capacity=64)
    assert "delete the file" in str(caught.value)
    assert [each.name for each in tmp_path.iterdir()] == ["b.healing"]
    assert (tmp_path / "b.healing").read_bytes() == state


def test_compress_heals_a_checkpoint_too(source: Path, tmp_path: Path) -> None:
    reports = {}
    for name, changes in (("plain", {}), ("healed", {"heal": STEPS})):
        report = compress(source, tmp_path / name, build_options(method="fold", **changes), Progress())
        held_out = calibration(source)[split_windows(WINDOWS)[1]]
        read = divergence_of(load_decoder(source), load_decoder(tmp_path / name), held_out)
        assert report.divergence is not None
        assert read.mean_kl == pytest.approx(
            report.divergence.mean_kl, rel=1e-3
        )  # of the checkpoint as it was written
        reports[name] = report.divergence.mean_kl
    assert reports["healed"] < reports["plain"]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["healed", "plain"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            BuildOptions(recipe_for("random", 4, 32), CompressionRequest(kv_ratio=1.0), heal=5),
            "--heal needs compressed layers",
        ),
        (
            BuildOptions(
                recipe_for("random", 4, 32), CompressionRequest(kv_ratio=0.5), heal=5, heal_lora=10**6
            ),
            "--heal-lora",
        ),
    ],
)
def test_rejects_healing_options_that_do_not_fit_before_any_work(
    options: BuildOptions, message: str, tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        build(tiny_checkpoint("llama"), tmp_path / "bundle", options, Progress())
    assert not (tmp_path / "bundle").exists()


def test_a_note_says_that_a_bloom_checkpoint_saves_no_cache_in_other_programs(
    tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    progress = HealingProgress()
    compress(
        tiny_checkpoint("bloom"),
        tmp_path / "out",
        BuildOptions(recipe_for("random", 8, 32), CompressionRequest(kv_ratio=0.5), "fold"),
        progress,
    )
    assert any("bloom has no shared KV heads" in note for note in progress.notes)
