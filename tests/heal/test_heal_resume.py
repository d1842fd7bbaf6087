"""Interrupted healing resumes bit-identically; states of other jobs and damaged states are rejected."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.decoders import random_windows
from support.healing import Job

from kvexport.errors import UsageError
from kvexport.heal import HealResult
from kvexport.model.decoder import tensors_of
from kvexport.progress import Progress


class Killed(BaseException):
    pass


class KilledAt(Progress):
    """Raises at the end of a step."""

    def __init__(self, step: int) -> None:
        self.left = step

    def advance(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise Killed


def assert_same(a: HealResult, b: HealResult) -> None:
    for x, y in zip(a.decoder.layers, b.decoder.layers, strict=True):
        assert all(torch.equal(s, t) for s, t in zip(tensors_of(x), tensors_of(y), strict=True))
    assert replace(a.report, seconds=0) == replace(b.report, seconds=0)


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [None, 2])
@pytest.mark.parametrize(
    "step", [3, 18, 34, 36]
)  # 16 steps in each of two layers, then 4 end to end, evaluated at each
def test_resumes_bit_identically(tmp_path: Path, step: int, lora_rank: int | None) -> None:
    if lora_rank is not None:
        pytest.importorskip("peft")
    job, state = Job(), tmp_path / "state"
    whole = job.heal(20, lora_rank=lora_rank)
    with pytest.raises(Killed):
        job.heal(20, state, KilledAt(step), lora_rank=lora_rank)
    assert state.exists() == (step > 16)
    resumed = job.heal(20, state, lora_rank=lora_rank)
    assert_same(resumed, whole)


def test_resumes_bit_identically_after_many_interruptions(tmp_path: Path) -> None:
    job, state = Job(), tmp_path / "state"
    whole = job.heal(20)
    for _ in range(5):
        try:
            resumed = job.heal(20, state, KilledAt(17))
            break
        except Killed:
            continue
    assert_same(resumed, whole)


def test_finished_job_is_not_repeated(tmp_path: Path) -> None:
    job, state = Job(), tmp_path / "state"
    done = job.heal(20, state)
    assert_same(job.heal(20, state, KilledAt(1)), done)
    assert [path.name for path in tmp_path.iterdir()] == [
        "state"
    ]  # the caller deletes it; nothing else is left


@pytest.mark.slow
def test_state_is_usable_after_sigkill(tmp_path: Path) -> None:
    """SIGKILL from inside a step: no handler, no cleanup."""
    script = """
        import os, signal, sys
        from pathlib import Path
        from support.healing import Job
        from kvexport.progress import Progress

        class Kill(Progress):
            left = 35
            def advance(self):
                self.left -= 1
                if self.left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        Job().heal(20, Path(sys.argv[1]), Kill())
    """
    state = tmp_path / "state"
    paths = f"import sys; sys.path[:0] = {sys.path!r}\n"
    killed = subprocess.run(
        [sys.executable, "-c", paths + textwrap.dedent(script), str(state)], timeout=120, check=False
    )
    assert killed.returncode == -9
    assert_same(Job().heal(20, state), Job().heal(20))


@pytest.fixture
def interrupted(tmp_path: Path) -> tuple[Job, Path]:
    job, state = Job(), tmp_path / "state"
    with pytest.raises(Killed):
        job.heal(20, state, KilledAt(35))
    return job, state


def other_original(job: Job) -> None:
    job.original = replace(job.original, dims=replace(job.original.dims, max_positions=99))


def other_conversion(job: Job) -> None:
    layer = job.converted.layers[1]
    weight = layer.attention.o.weight.clone()
    weight[0, 0] += 1e-6 * weight[0, 0]
    attention = replace(layer.attention, o=replace(layer.attention.o, weight=weight))
    job.converted = replace(
        job.converted, layers=[job.converted.layers[0], replace(layer, attention=attention)]
    )


def other_windows(job: Job) -> None:
    job.windows = random_windows(job.original, 24, 12, seed=77)


def other_held_out(job: Job) -> None:
    job.held_out = job.held_out[:4]


@pytest.mark.parametrize("change", [other_original, other_conversion, other_windows, other_held_out])
def test_rejects_state_of_another_job(interrupted: tuple[Job, Path], change) -> None:  # type: ignore[no-untyped-def]
    job, state = interrupted
    change(job)
    with pytest.raises(UsageError, match="belongs to another job") as refused:
        job.heal(20, state)
    assert "delete the file" in str(refused.value)


@pytest.mark.parametrize("options", [{"steps": 21}, {"seed": 1}, {"batch": 3}, {"learning_rate": 0.01}])
def test_rejects_state_of_other_options(interrupted: tuple[Job, Path], options: dict[str, float]) -> None:
    job, state = interrupted
    with pytest.raises(UsageError, match="belongs to another job"):
        job.heal(state=state, **{"steps": 20, **options})  # type: ignore[arg-type]


def test_rejects_damaged_state(interrupted: tuple[Job, Path]) -> None:
    job, state = interrupted
    sound = state.read_bytes()
    spoiled = bytearray(sound)
    spoiled[-5] ^= 1
    for damaged in (
        sound[: len(sound) // 2],
        b"",
        b"not a state",
        bytes(spoiled),
        sound[:200] + b"?" + sound[201:],
    ):
        state.write_bytes(damaged)
        with pytest.raises(UsageError, match="is damaged") as refused:
            job.heal(20, state)
        assert "delete the file" in str(refused.value)
        assert state.read_bytes() == damaged  # and left for the user to judge


def test_rejects_other_safetensors_files(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(3)}, tmp_path / "state")
    with pytest.raises(UsageError, match="is damaged"):
        Job().heal(20, tmp_path / "state")
