"""Tests of the build cache: finished stages are kept and found, and never the reason that a build fails."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kvexport.analyze import analyze
from kvexport.build import BuildHooks, BuildOptions, BuildReport, build, calibrate, compress, conversion_job
from kvexport.build.stage_cache import weights_key
from kvexport.bundle import formats
from kvexport.calibrate import recipe_for
from kvexport.convert import CompressionRequest
from kvexport.errors import CheckpointError, UsageError
from kvexport.files import cache_folder
from kvexport.files.cache_folder import CacheFolder
from kvexport.model.decoder import Layer
from kvexport.progress import Progress

RECIPE = recipe_for("random", 8, 24)
FILES = ("decoder.onnx", "decoder.onnx.data", "reference.npz")
TEXT, ANALYSIS = "calibration_windows", "analyze_sensitivity"  # as `work` names them
Checkpoints = Callable[..., Path]


class Killed(BaseException):
    """Stands for a signal that kills the process."""


class Notes(Progress):
    """Collects the notes; raises Killed, or calls a function, when a stage begins."""

    def __init__(self, kill_at: str | None = None, act: Callable[[], None] | None = None) -> None:
        self.notes: list[str] = []
        self._kill_at, self._act = kill_at, act

    def stage(self, name: str, steps: int) -> Any:
        if name == self._kill_at and self._act is None:
            raise Killed
        if name == self._kill_at and self._act is not None:
            self._act()
        return super().stage(name, steps)

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def source(tiny_checkpoint: Checkpoints) -> Path:
    return tiny_checkpoint("llama", num_key_value_heads=4)


def built(
    source: Path,
    output: Path,
    cache: Path | None,
    *,
    progress: Progress | None = None,
    hooks: BuildHooks | None = None,
    recipe: Any = RECIPE,
    capacity: int = 64,
    method: str = "auto",
    **request: Any,
) -> BuildReport:
    options = BuildOptions(recipe, CompressionRequest(**request), method, cache=cache)
    return build(source, output, options, progress or Progress(), capacity=capacity, hooks=hooks)


def same(one: Path, other: Path) -> bool:
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in FILES)


def entry(cache: Path) -> Path:
    (only,) = CacheFolder(cache).entries()
    return only.path


def test_a_second_build_at_another_ratio_only_converts(
    source: Path, tmp_path: Path, build_cache: Path, work: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for ratio in (0.5, 0.75):
        built(source, tmp_path / f"{ratio}-alone", None, kv_ratio=ratio)
    assert not build_cache.exists()
    del work[:]
    first = built(source, tmp_path / "0.5", build_cache, kv_ratio=0.5)
    assert work == [TEXT, ANALYSIS] and first.reused == []
    monkeypatch.setattr("kvexport.convert.streams.TrainedStream.measure", None)  # nor are moments measured
    second = built(source, tmp_path / "0.75", build_cache, kv_ratio=0.75)
    assert work == [TEXT, ANALYSIS] and second.reused == ["text", "analysis"]
    assert not {"text", "analysis"} & second.seconds.keys()
    for ratio in (0.5, 0.75):
        assert same(tmp_path / f"{ratio}", tmp_path / f"{ratio}-alone")
    assert not same(tmp_path / "0.5", tmp_path / "0.75")  # control


@pytest.mark.parametrize(
    ("stage", "finished", "repeated"),
    [
        ("Analyzing layer sensitivity", [TEXT], [ANALYSIS]),
        pytest.param("Converting layers", [TEXT, ANALYSIS], [], marks=pytest.mark.slow),
        pytest.param("Validating the graph", [TEXT, ANALYSIS], [], marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_build_goes_on_after_its_last_finished_stage(
    source: Path,
    tmp_path: Path,
    build_cache: Path,
    work: list[str],
    stage: str,
    finished: list[str],
    repeated: list[str],
) -> None:
    with pytest.raises(Killed):
        built(source, tmp_path / "b", build_cache, progress=Notes(stage))
    assert work == finished and not (tmp_path / "b").exists()
    del work[:]
    report = built(source, tmp_path / "b", build_cache)
    assert work == repeated
    assert report.reused == ["text", "analysis"][: len(finished)]
    built(source, tmp_path / "alone", None)
    assert same(tmp_path / "b", tmp_path / "alone")


@pytest.mark.slow
def test_a_killed_process_leaves_what_it_finished(
    source: Path, tmp_path: Path, build_cache: Path, work: list[str]
) -> None:
    script = """
import os, sys
from pathlib import Path
from kvexport.analyze import analyze
from kvexport.build import BuildHooks, BuildOptions, build
from kvexport.calibrate import recipe_for
from kvexport.progress import Progress
options = BuildOptions(recipe_for("random", 8, 24), cache=Path(sys.argv[3]))
hooks = BuildHooks(graph_layer=lambda layer: os.kill(os.getpid(), 9))
build(Path(sys.argv[1]), Path(sys.argv[2]), options, Progress(), capacity=64, hooks=hooks)
"""
    arguments = [str(each) for each in (source, tmp_path / "b", build_cache)]
    assert subprocess.run([sys.executable, "-c", script, *arguments], check=False).returncode == -9
    built(source, tmp_path / "b", build_cache)
    assert work == []


@pytest.mark.slow
def test_calibrate_and_compress_use_the_same_entry(
    source: Path, tmp_path: Path, build_cache: Path, work: list[str]
) -> None:
    calibrate(source, tmp_path / "alone", RECIPE, Progress(), capacity=64)
    del work[:]
    calibrate(source, tmp_path / "first", RECIPE, Progress(), capacity=64, cache=build_cache)
    calibrate(source, tmp_path / "second", RECIPE, Progress(), capacity=64, cache=build_cache)
    assert work == [TEXT, ANALYSIS]
    names = sorted(path.name for path in (tmp_path / "alone").iterdir())
    for name in ("first", "second"):
        folder = tmp_path / name
        assert sorted(path.name for path in folder.iterdir()) == names
        assert all((folder / each).read_bytes() == (tmp_path / "alone" / each).read_bytes() for each in names)
    built(source, tmp_path / "b", build_cache)
    options = BuildOptions(RECIPE, method="fold", cache=build_cache)
    for name in ("one", "other"):
        compress(source, tmp_path / name, options, Progress())
    assert work == [TEXT, ANALYSIS, TEXT]  # of another capacity


@pytest.mark.slow
def test_analyze_uses_the_entry_of_a_build_and_statistics(
    source: Path, tmp_path: Path, build_cache: Path, work: list[str]
) -> None:
    alone = analyze(source, BuildOptions(RECIPE), Progress(), tokens=8).to_json()
    calibrate(source, tmp_path / "statistics", RECIPE, Progress(), cache=build_cache)
    del work[:]
    for options in (
        BuildOptions(RECIPE, cache=build_cache),
        BuildOptions(RECIPE, statistics=tmp_path / "statistics"),
    ):
        saved = analyze(source, options, Progress(), tokens=8).to_json()
        del saved["model"]["calibration"]  # with statistics it has their sha256
        assert saved == alone | {"model": saved["model"]}
    assert not work


def test_analyze_measures_all_text_of_a_model_that_is_not_compressed(source: Path) -> None:
    options = BuildOptions(recipe_for("random", 100, 64), CompressionRequest(kv_ratio=1))
    assert analyze(source, options, Progress(), tokens=8).facts.calibration_tokens == 6400
    assert len(conversion_job.ConversionJob(source, None, options, Progress()).calibrate()) == 64  # control


def test_no_analysis_is_made_for_the_cache_alone(
    source: Path, tmp_path: Path, build_cache: Path, work: list[str]
) -> None:
    built(source, tmp_path / "a", build_cache, kv_heads=2, method="fold")
    built(source, tmp_path / "b", build_cache, kv_heads=2, method="fold")
    assert work == [TEXT]
    assert same(tmp_path / "a", tmp_path / "b")


@pytest.mark.slow
def test_whatever_changes_the_numbers_changes_the_key(
    source: Path, tiny_checkpoint: Checkpoints, edit_checkpoint: Any, tmp_path: Path, build_cache: Path
) -> None:
    from support.tokenizer_shapes import shapes

    text, tokenizer = tmp_path / "text.txt", shapes()["gpt2"][0]
    text.write_text("one two three four " * 400)
    speaking = edit_checkpoint(tiny_checkpoint("llama", vocab_size=600))
    (speaking / "tokenizer.json").write_text(tokenizer)
    count = 0

    def keys(checkpoint: Path = source, **changes: Any) -> int:
        """Number of entries after a build."""
        nonlocal count
        count += 1
        built(checkpoint, tmp_path / f"b{count}", build_cache, kv_heads=1, method="fold", **changes)
        return len(CacheFolder(build_cache).entries())

    assert keys() == 1
    assert keys() == 1  # control
    assert keys(tiny_checkpoint("llama", num_key_value_heads=4, seed=1)) == 2
    assert keys(capacity=96) == 3
    assert keys(recipe=recipe_for("random", 9, 24)) == 4
    assert keys(recipe=recipe_for("random", 8, 24, 1)) == 5
    assert keys(speaking, recipe=recipe_for(str(text), 8, 24)) == 6
    copy = tmp_path / "folder" / "copy.txt"
    copy.parent.mkdir()
    shutil.copy(text, copy)
    assert keys(speaking, recipe=recipe_for(str(copy), 8, 24)) == 6  # the same content
    copy.write_text(copy.read_text() + "five")
    assert keys(speaking, recipe=recipe_for(str(copy), 8, 24)) == 7
    (speaking / "generation_config.json").write_text('{"bos_token_id": 3}')
    assert keys(speaking, recipe=recipe_for(str(text), 8, 24)) == 8


@pytest.mark.slow
def test_other_code_changes_the_key(
    source: Path, tmp_path: Path, build_cache: Path, work: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    built(source, tmp_path / "a", build_cache)
    monkeypatch.setattr("kvexport.build.stage_cache._code", lambda: "of another version")
    built(source, tmp_path / "b", build_cache)
    assert work == [TEXT, ANALYSIS] * 2


def test_another_choice_of_weight_formats_changes_the_key_of_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = weights_key("key", "settings")
    assert weights_key("key", "settings") == key  # control
    (tmp_path / "formats.py").touch()
    monkeypatch.setattr(formats, "__file__", str(tmp_path / "formats.py"))
    assert weights_key("key", "settings") != key


def test_a_calibration_file_that_vanished_is_refused_by_the_stage_that_reads_it(
    source: Path, tmp_path: Path, build_cache: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one two")
    recipe = recipe_for(str(text), 8, 24)
    text.unlink()
    with pytest.raises(UsageError, match=r"the text .*text\.txt must be readable"):
        built(source, tmp_path / "b", build_cache, recipe=recipe)


def test_a_stage_of_a_checkpoint_that_changed_is_not_kept(
    tiny_checkpoint: Checkpoints, edit_checkpoint: Any, tmp_path: Path, build_cache: Path, work: list[str]
) -> None:
    source = edit_checkpoint(tiny_checkpoint("llama", num_key_value_heads=4))
    weights, other = source / "model.safetensors", tiny_checkpoint("llama", num_key_value_heads=4, seed=1)
    original = weights.read_bytes()

    def replaced() -> None:
        weights.write_bytes((other / weights.name).read_bytes())

    progress = Notes("Analyzing layer sensitivity", replaced)
    with pytest.raises(CheckpointError, match="must not change while it is read") as refusal:
        calibrate(source, tmp_path / "a", RECIPE, progress, cache=build_cache)
    assert refusal.value.got == "model.safetensors changed" and not (tmp_path / "a").exists()
    weights.write_bytes(original)
    calibrate(source, tmp_path / "b", RECIPE, Progress(), cache=build_cache)
    assert work == [TEXT, ANALYSIS]  # the text, which was made before, is not made again
    calibrate(source, tmp_path / "alone", RECIPE, Progress())
    for name in ("statistics.json", "layer-00001.safetensors"):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_build_of_a_checkpoint_that_changed_is_refused(
    source: Path, edit_checkpoint: Any, tmp_path: Path, build_cache: Path, name: str
) -> None:
    source = edit_checkpoint(source)

    def touched() -> None:
        (source / name).touch()

    progress = Notes("Validating the graph", touched)
    with pytest.raises(CheckpointError, match="must not change while it is read"):
        built(source, tmp_path / "b", build_cache, progress=progress, kv_heads=1, method="fold")
    assert not (tmp_path / "b").exists()


def test_calibration_text_that_changes_is_refused(
    tiny_checkpoint: Checkpoints, edit_checkpoint: Any, tmp_path: Path, build_cache: Path
) -> None:
    from support.tokenizer_shapes import shapes

    speaking = edit_checkpoint(tiny_checkpoint("llama", vocab_size=600))
    (speaking / "tokenizer.json").write_text(shapes()["gpt2"][0])
    text = tmp_path / "text.txt"
    text.write_text("one two three four " * 400)

    def edited() -> None:
        text.write_text("five " * 1000)

    recipe = recipe_for(str(text), 8, 24)
    progress = Notes("Reading calibration text", edited)
    with pytest.raises(UsageError, match="the calibration text must not change while it is read"):
        built(speaking, tmp_path / "b", build_cache, progress=progress, recipe=recipe)
    assert CacheFolder(build_cache).entries() == []


@pytest.mark.parametrize(
    ("stage", "repeated"), [("Converting layers", []), ("Analyzing layer sensitivity", [ANALYSIS])]
)
def test_an_entry_that_vanishes_during_a_build_is_made_again(
    source: Path, tmp_path: Path, build_cache: Path, work: list[str], stage: str, repeated: list[str]
) -> None:
    built(source, tmp_path / "first", build_cache)

    class Planned(Notes):
        """Removes the cache after it has been opened."""

        def plan(self, times: Any) -> None:
            if repeated:
                shutil.rmtree(build_cache)

    del work[:]
    progress = Planned(stage, lambda: shutil.rmtree(build_cache, ignore_errors=True))
    built(source, tmp_path / "b", build_cache, progress=progress)
    assert sum("an entry of the build cache is made again" in note for note in progress.notes) == 1
    assert work == repeated and same(tmp_path / "b", tmp_path / "first")


def test_an_entry_without_sensitivities_gives_whole_statistics(
    source: Path, tmp_path: Path, build_cache: Path
) -> None:
    calibrate(source, tmp_path / "a", RECIPE, Progress(), cache=build_cache)
    header = json.loads((entry(build_cache) / "statistics.json").read_text())
    header["files"] = {name: each for name, each in header["files"].items() if "sensitivity" not in name}
    (entry(build_cache) / "statistics.json").write_text(json.dumps(header))
    calibrate(source, tmp_path / "b", RECIPE, Progress(), cache=build_cache)
    names = [sorted(path.name for path in (tmp_path / each).iterdir()) for each in "ab"]
    assert names[0] == names[1]


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    "damage", [_truncate, *(pytest.param(each, marks=pytest.mark.slow) for each in (_flip, Path.unlink))]
)
@pytest.mark.parametrize(
    "name",
    [
        "tokens.safetensors",
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in ("statistics.json", "layer-00001.safetensors", "sensitivity-00000.safetensors")
        ),
    ],
)
def test_a_damaged_entry_is_made_again(
    source: Path,
    tmp_path: Path,
    build_cache: Path,
    work: list[str],
    name: str,
    damage: Callable[[Path], None],
) -> None:
    def calibrated(output: str, progress: Progress) -> bytes:
        calibrate(source, tmp_path / output, RECIPE, progress, cache=build_cache)
        return (tmp_path / output / "sensitivity-00001.safetensors").read_bytes()

    first = calibrated("a", Progress())
    if damage is _flip and name == "statistics.json":
        (entry(build_cache) / name).write_text('{"format": 3}')
    else:
        damage(entry(build_cache) / name)
    progress = Notes()
    assert calibrated("b", progress) == first
    assert any("a damaged entry of the build cache is made again" in note for note in progress.notes)
    assert work == [TEXT, ANALYSIS] * 2
    calibrated("c", Progress())
    assert len(work) == 4  # it is whole again


def test_a_folder_that_cannot_be_written_is_noted_once(
    source: Path, tmp_path: Path, build_cache: Path
) -> None:
    build_cache.write_text("a file is in the way")  # the tests may run as root, whom permissions do not stop
    progress = Notes()
    built(source, tmp_path / "b", build_cache, progress=progress)
    notes = [note for note in progress.notes if "cannot be written" in note]
    assert len(notes) == 1 and str(build_cache) in notes[0]
    built(source, tmp_path / "alone", None)
    assert same(tmp_path / "b", tmp_path / "alone")


@pytest.mark.slow
def test_a_full_disk_costs_the_entry_alone(
    source: Path, tmp_path: Path, build_cache: Path, monkeypatch: pytest.MonkeyPatch, work: list[str]
) -> None:
    from kvexport.calibrate import statistics

    save = statistics.save_tensors

    def full(tensors: Any, path: Path) -> None:
        if path.name == "layer-00001.safetensors":
            raise OSError(28, "No space left on device", str(path))
        save(tensors, path)

    monkeypatch.setattr(statistics, "save_tensors", full)
    progress = Notes()
    built(source, tmp_path / "b", build_cache, progress=progress)
    assert sum("No space left on device" in note for note in progress.notes) == 1
    assert [path.name for path in entry(build_cache).iterdir()] != []  # the text, of the stage before
    assert not (entry(build_cache) / "layer-00000.safetensors").exists()
    assert [path for path in build_cache.iterdir() if path.name.startswith(".")] == []
    built(source, tmp_path / "alone", None)
    assert same(tmp_path / "b", tmp_path / "alone")


@pytest.mark.slow
def test_an_entry_above_the_limit_is_not_kept(
    source: Path, tmp_path: Path, build_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_folder, "_LARGEST", 20_000)
    progress = Notes()
    report = built(source, tmp_path / "b", build_cache, progress=progress)
    assert any("do not fit into the build cache" in note for note in progress.notes)
    assert not (entry(build_cache) / "layer-00000.safetensors").exists()
    assert report.reused == []


@pytest.mark.slow
def test_concurrent_builds_do_not_disturb_each_other(
    source: Path, tmp_path: Path, build_cache: Path, work: list[str]
) -> None:
    ratios = [0.5, 0.625, 0.75, 0.5]
    with ThreadPoolExecutor(len(ratios)) as pool:
        jobs = [
            pool.submit(built, source, tmp_path / f"{index}", build_cache, kv_ratio=ratio)
            for index, ratio in enumerate(ratios)
        ]
        for job in jobs:
            job.result()
    assert same(tmp_path / "0", tmp_path / "3")
    assert [path for path in build_cache.iterdir() if path.name.startswith(".")] == []
    del work[:]
    built(source, tmp_path / "again", build_cache, kv_ratio=0.625)
    assert work == [] and same(tmp_path / "again", tmp_path / "1")


@pytest.mark.slow
def test_an_entry_that_a_build_reads_is_not_removed(source: Path, tmp_path: Path, build_cache: Path) -> None:
    built(source, tmp_path / "a", build_cache)
    freed = []

    def clean(layer: Layer) -> Layer:
        freed.append(CacheFolder(build_cache).clean())
        return layer

    built(source, tmp_path / "b", build_cache, hooks=BuildHooks(graph_layer=clean))
    assert freed == [0, 0] and same(tmp_path / "a", tmp_path / "b")
    assert CacheFolder(build_cache).clean() > 0  # control


def test_a_second_build_with_other_bits_skips_the_weight_analysis(
    tiny_checkpoint: Checkpoints, tmp_path: Path, build_cache: Path
) -> None:
    source = tiny_checkpoint("llama", hidden_size=64, intermediate_size=128, vocab_size=68)

    def weighed(name: str, bits: float, **others: Any) -> BuildReport:
        options = BuildOptions(
            RECIPE,
            CompressionRequest(kv_ratio=1),
            cache=build_cache,
            weights="int4",
            weight_bits=bits,
            **others,
        )
        return build(source, tmp_path / name, options, Progress(), capacity=64)

    first = weighed("first", 5.0)
    assert "weight-analysis" in first.seconds and "weight-analysis" not in first.reused
    second = weighed("second", 6.0)
    assert "weight-analysis" in second.reused and "weight-analysis" not in second.seconds
    assert first.weight_bits is not None and second.weight_bits is not None
    assert first.weight_bits.predicted_kl > second.weight_bits.predicted_kl
    assert not same(tmp_path / "first", tmp_path / "second")
    assert "weight-analysis" in weighed("block", 6.0, weight_block=32).seconds  # control: other settings
    assert CacheFolder(build_cache).clean() > 0
    alone = weighed("alone", 6.0)
    assert "weight-analysis" in alone.seconds and same(tmp_path / "second", tmp_path / "alone")
