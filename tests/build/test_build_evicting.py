"""`kvexport build --kv-budget`: what is built holds the budget, says so, and what cannot be meant is refused before any work."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kvexport.bundle.bundle import Bundle
from kvexport.cli import main
from kvexport.eviction.config import DEFAULT_FIRST, DEFAULT_POLICY, Eviction, EvictionRequest

Checkpoints = Callable[..., Path]
Run = Callable[..., tuple[object, str, str]]
QUICK = ["--calibration", "random", "--samples", "8", "--length", "32", "--capacity", "64"]


@pytest.fixture
def kvexport(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """`kvexport(*arguments) -> exit code, standard output, standard error`."""
    monkeypatch.setattr("signal.signal", lambda *arguments: None)  # the process's handlers stay pytest's

    def call(*arguments: object) -> tuple[object, str, str]:
        code: object = 0
        try:
            main([str(each) for each in arguments])
        except SystemExit as ended:
            code = ended.code
        return code, *capsys.readouterr()

    return call


@pytest.mark.parametrize("method", ["auto", "fold"])
def test_a_budget_is_built_proved_and_said(
    method: str, kvexport: Run, tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    options = [
        "--kv-budget",
        "24",
        "--evict",
        "l2-norm",
        "--protect-first",
        "1",
        "--protect-recent",
        "6",
        "--evict-skip-layers",
        "1, 1",
    ]
    code, out, err = kvexport(
        "build", tiny_checkpoint("llama"), "-o", bundle, "--method", method, *QUICK, *options
    )
    assert code == 0, err
    assert (
        "24 tokens in each KV head (l2-norm, but the first 1 and the last 6 never do); layer 1 holds every token"
        in out
    )
    opened = Bundle.open(bundle)
    assert opened.eviction == Eviction("l2-norm", 24, 1, 6, (1,))
    report = json.loads((bundle / "report.json").read_text())
    assert report["eviction"] == opened.eviction.to_json()
    assert report["kv_bytes_at_capacity"] == opened.kv_bytes(64) < 64 * opened.kv_bytes_per_token
    code, out, _ = kvexport("inspect", bundle)
    assert (code, "24 tokens in each KV head" in out) == (0, True)
    code, out, _ = kvexport("inspect", bundle, "--json")
    assert json.loads(out)["eviction"]["budget"] == 24
    code, out, err = kvexport("lint", bundle, "--target", "rtx-4090")
    assert (code, "takes the bundle as" in out) == (0, True), err
    code, out, _ = kvexport("validate", bundle)
    assert (code, "layers.0.slot" in out) == (0, True)
    code, out, _ = kvexport("self-test", bundle)
    assert (code, "ok (generated" in out) == (0, True)


def test_a_share_of_the_capacity_and_the_defaults(
    kvexport: Run, tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    code, _, err = kvexport(
        "build", tiny_checkpoint("llama"), "-o", tmp_path / "bundle", *QUICK, "--kv-budget", "0.5", "--quiet"
    )
    assert code == 0, err
    assert Bundle.open(tmp_path / "bundle").eviction == EvictionRequest(32).of(64, 2)
    wished = EvictionRequest.parse("0.5").of(64, 2)
    assert (wished.policy, wished.budget, wished.protect_first, wished.protect_recent) == (
        DEFAULT_POLICY,
        32,
        DEFAULT_FIRST,
        0,
    )
    assert EvictionRequest(40, policy="l2-norm").of(64, 2).protect_recent == (40 - DEFAULT_FIRST) // 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--kv-budget", "65"], "larger than the capacity"),
        (["--kv-budget", "4"], "leaves no token"),
        (["--kv-budget", "20", "--protect-first", "10", "--protect-recent", "10"], "leaves no token"),
        (["--kv-budget", "0"], "no number of tokens"),
        (["--kv-budget", "-3"], "no number of tokens"),
        (["--kv-budget", "1.5"], "no number of tokens"),
        (["--kv-budget", "nan"], "no number of tokens"),
        (["--kv-budget", "0.0"], "no number of tokens"),
        (["--kv-budget", "half"], "no number of tokens"),
        (["--kv-budget", "9" * 5000], "no number of tokens"),
        (["--kv-budget", "0.01"], "leaves no token"),
        (["--kv-budget", "32", "--protect-recent", "-1"], "out of range"),
        (["--kv-budget", "32", "--evict-skip-layers", "0,2"], "does not have"),
        (["--kv-budget", "32", "--evict-skip-layers", "0,1"], "every layer"),
        (["--kv-budget", "32", "--evict-skip-layers", "first"], "no list of layers"),
        (["--evict", "window"], "without a budget"),
        (["--evict-skip-layers", "0"], "without a budget"),
        (["--protect-first", "0"], "without a budget"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    kvexport: Run, options: list[str], says: str, tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    code, out, err = kvexport("build", tiny_checkpoint("llama"), "-o", tmp_path / "bundle", *QUICK, *options)
    assert (code, out) == (2, "")
    assert says in err
    assert "Traceback" not in err
    assert not (tmp_path / "bundle").exists()
