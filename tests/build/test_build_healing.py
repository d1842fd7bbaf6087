"""`build` and `compress` with healing: what is reported is the healed model, and a killed run is taken up again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvexport.build.pipeline import BuildOptions, BuildReport, build, compress
from kvexport.calibrate import recipe_for
from kvexport.convert import CompressionRequest, split_windows
from kvexport.errors import UsageError
from kvexport.graph import DecoderWriter
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
    pass


class Healing(Progress):
    """Keeps notes and stages; dies at a step of healing."""

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


def plan(**asked: Any) -> BuildOptions:
    return BuildOptions(
        recipe_for("random", WINDOWS, 24), CompressionRequest(kv_heads=2), **{"method": "online", **asked}
    )


@pytest.fixture
def source(tiny_checkpoint: Checkpoints) -> Path:
    return tiny_checkpoint("llama", num_key_value_heads=4)


def built(
    source: Path, output: Path, monkeypatch: pytest.MonkeyPatch, **asked: Any
) -> tuple[BuildReport, Decoder]:
    """The report, and the model as its layers were handed to the graph."""
    layers: list[Layer] = []
    original = DecoderWriter.add_layer
    with monkeypatch.context() as patched:
        patched.setattr(
            DecoderWriter, "add_layer", lambda self, layer: layers.append(layer) or original(self, layer)
        )
        report = build(source, output, plan(**asked), Progress(), capacity=64)
    return report, dataclasses.replace(load_decoder(source), layers=layers)


@pytest.mark.parametrize("lora", [None, pytest.param(4, marks=pytest.mark.slow)])
def test_what_is_reported_and_exported_is_the_healed_model(
    lora: int | None, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lora is not None:
        pytest.importorskip("peft")
    plain, unhealed = built(source, tmp_path / "plain", monkeypatch)
    report, healed = built(source, tmp_path / "healed", monkeypatch, heal=100, heal_lora=lora)
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
    )  # a control
    assert self_test(tmp_path / "healed").verdict == "ok"  # it was recorded from the healed layers
    assert report.to_json()["healing"]["kl_after"] == report.healing.kl_after
    assert {layer.kv_width for layer in report.layers} == {layer.kv_width for layer in plain.layers}
    assert sorted(each.name for each in tmp_path.iterdir()) == ["healed", "plain"]  # no state is left


def calibration(source: Path) -> torch.Tensor:
    from kvexport.calibrate import calibration_windows

    return calibration_windows(load_decoder(source), source, plan().recipe, lambda *_: None)


@pytest.mark.slow
@pytest.mark.parametrize("step", [20, 34])  # in the second layer; end to end
def test_a_killed_build_goes_on_and_makes_the_same_bundle(step: int, source: Path, tmp_path: Path) -> None:
    asked, whole, killed = plan(heal=STEPS), tmp_path / "whole", tmp_path / "killed"
    once = Healing()
    build(source, whole, asked, once, capacity=64)
    assert once.steps == 2 * 16 + 4
    with pytest.raises(Killed):
        build(source, killed, asked, Healing(step), capacity=64)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["killed.healing", "whole"]
    again = Healing()
    report = build(source, killed, asked, again, capacity=64)
    assert any("healing goes on from" in note for note in again.notes)
    assert 0 < again.steps < once.steps - 15  # a whole layer at least is not done again
    assert (killed / "decoder.onnx.data").read_bytes() == (whole / "decoder.onnx.data").read_bytes()
    assert report.healing is not None and report.healing.steps == STEPS
    assert sorted(each.name for each in tmp_path.iterdir()) == ["killed", "whole"]


def test_a_state_of_another_job_is_refused_and_kept(source: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        build(source, tmp_path / "b", plan(heal=STEPS), Healing(20), capacity=64)
    state = (tmp_path / "b.healing").read_bytes()
    with pytest.raises(UsageError, match=r"b\.healing belongs to another job") as caught:
        build(source, tmp_path / "b", plan(heal=STEPS + 5), Progress(), capacity=64)
    assert "delete the file" in str(caught.value)
    assert [each.name for each in tmp_path.iterdir()] == ["b.healing"]
    assert (tmp_path / "b.healing").read_bytes() == state


def test_a_standard_checkpoint_is_healed_too(source: Path, tmp_path: Path) -> None:
    reports = {}
    for name, asked in (("plain", {}), ("healed", {"heal": STEPS})):
        report = compress(source, tmp_path / name, plan(method="fold", **asked), Progress())
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
    ("plan", "says"),
    [
        (
            BuildOptions(recipe_for("random", 4, 32), CompressionRequest(kv_ratio=1.0), heal=5),
            "nothing to heal",
        ),
        (
            BuildOptions(
                recipe_for("random", 4, 32), CompressionRequest(kv_ratio=0.5), heal=5, heal_lora=10**6
            ),
            "--heal-lora",
        ),
    ],
)
def test_healing_that_makes_no_sense_is_refused_before_any_work(
    plan: BuildOptions, says: str, tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=says):
        build(tiny_checkpoint("llama"), tmp_path / "bundle", plan, Progress())
    assert not (tmp_path / "bundle").exists()


def test_a_standard_checkpoint_of_bloom_says_that_others_cache_as_much(
    tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    said = Healing()
    compress(
        tiny_checkpoint("bloom"),
        tmp_path / "out",
        BuildOptions(recipe_for("random", 8, 32), CompressionRequest(kv_ratio=0.5), "fold"),
        said,
    )
    assert any("BLOOM" in note for note in said.notes)
