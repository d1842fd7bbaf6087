"""Tests of `kvexport build --kv-budget`: bundles with a budget, and invalid budgets."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.command_line import run_kvexport
from support.tiny_bundles import exact_logits, write_bundle

from kvexport.bundle import Bundle
from kvexport.eviction.config import DEFAULT_FIRST, DEFAULT_POLICY, Eviction, EvictionRequest
from kvexport.model.decoder import Decoder
from kvexport.model.loader import load_decoder
from kvexport.runtime import Session

Checkpoints = Callable[..., Path]
QUICK = ["--calibration", "random", "--samples", "8", "--length", "32", "--capacity", "64"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["auto", "fold"])
def test_the_bundle_has_the_budget_and_passes_validation(
    method: str, tiny_checkpoint: Checkpoints, tmp_path: Path
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
    code, out, err = run_kvexport(
        "build", tiny_checkpoint("llama"), "-o", bundle, "--method", method, *QUICK, *options
    )
    assert code == 0, err
    assert (
        "24 tokens in each KV head (l2-norm; never the first 1 or the last 6); layer 1 does not evict" in out
    )
    opened = Bundle.open(bundle)
    assert opened.eviction == Eviction("l2-norm", 24, 1, 6, (1,))
    report = json.loads((bundle / "report.json").read_text())
    assert report["eviction"] == opened.eviction.to_json()
    assert report["kv_bytes_at_capacity"] == opened.kv_bytes(64) < 64 * opened.kv_bytes_per_token
    code, out, _ = run_kvexport("inspect", bundle)
    assert (code, "24 tokens in each KV head" in out) == (0, True)
    code, out, _ = run_kvexport("inspect", bundle, "--json")
    assert json.loads(out)["eviction"]["budget"] == 24
    code, out, err = run_kvexport("lint", bundle, "--target", "rtx-4090")
    assert (code, "supports the bundle in the lowering" in out) == (0, True), err
    code, out, _ = run_kvexport("validate", bundle)
    assert (code, "layers.0.slot" in out) == (0, True)
    code, out, _ = run_kvexport("self-test", bundle)
    # generation is compared up to the first near tie of two tokens
    assert code == 0 and re.search(r"ok \((\d+) of \1 generated tokens", out), out


def test_a_fraction_of_the_capacity_and_the_default_options(
    tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    code, _, err = run_kvexport(
        "build", tiny_checkpoint("llama"), "-o", tmp_path / "bundle", *QUICK, "--kv-budget", "0.5", "--quiet"
    )
    assert code == 0, err
    assert Bundle.open(tmp_path / "bundle").eviction == EvictionRequest(32).of(64, 2)
    eviction = EvictionRequest.parse("0.5").of(64, 2)
    assert (eviction.policy, eviction.budget, eviction.protect_first, eviction.protect_recent) == (
        DEFAULT_POLICY,
        32,
        DEFAULT_FIRST,
        0,
    )
    assert EvictionRequest(40, policy="l2-norm").of(64, 2).protect_recent == (40 - DEFAULT_FIRST) // 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kv-budget", "65"], "must be at most the capacity"),
        (["--kv-budget", "4"], "must leave a token"),
        (["--kv-budget", "20", "--protect-first", "10", "--protect-recent", "10"], "must leave a token"),
        (["--kv-budget", "0"], "must be an integer >= 1 or a fraction"),
        (["--kv-budget", "-3"], "must be an integer >= 1 or a fraction"),
        (["--kv-budget", "1.5"], "must be an integer >= 1 or a fraction"),
        (["--kv-budget", "nan"], "must be an integer >= 1 or a fraction"),
        (["--kv-budget", "0.0"], "must be an integer >= 1 or a fraction"),
        (["--kv-budget", "half"], "must be an integer >= 1 or a fraction"),
        (["--kv-budget", "9" * 5000], "must be an integer >= 1 or a fraction"),
        (["--kv-budget", "0.01"], "must leave a token"),
        (["--kv-budget", "32", "--protect-recent", "-1"], "--protect-recent must be at least 0"),
        (["--kv-budget", "32", "--evict-skip-layers", "0,2"], "must name layers of the model"),
        (["--kv-budget", "32", "--evict-skip-layers", "0,1"], "must leave a layer that evicts"),
        (["--kv-budget", "32", "--evict-skip-layers", "first"], "must be a list of layer numbers"),
        (["--evict", "window"], "need --kv-budget"),
        (["--evict-skip-layers", "0"], "need --kv-budget"),
        (["--protect-first", "0"], "need --kv-budget"),
    ],
)
def test_rejects_an_invalid_budget_and_writes_nothing(
    options: list[str], message: str, tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    code, out, err = run_kvexport(
        "build", tiny_checkpoint("llama"), "-o", tmp_path / "bundle", *QUICK, *options
    )
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "bundle").exists()


WINDOW, TEXT = 16, np.random.default_rng(0).integers(0, 67, 60).tolist()


def prefill_error(bundle: Path, decoder: Decoder, chunk: int) -> float:
    """Largest error of the logits after a prompt that comes in chunks."""
    expected = exact_logits(decoder, TEXT)[-1]
    return float(
        np.abs(Session(Bundle.open(bundle), threads=1, chunk=chunk).prefill(TEXT)[0] - expected).max()
    )


def test_a_budget_of_the_window_is_the_window_without_loss(
    tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    """A budget evicts before a chunk, so that its first tokens would not see their whole window."""
    checkpoint, bundle = tiny_checkpoint("mistral", sliding_window=WINDOW), tmp_path / "bundle"
    options = ["--kv-budget", WINDOW, "--protect-first", 0, "--kv-ratio", 1]
    code, _, err = run_kvexport("build", checkpoint, "-o", bundle, *QUICK, *options)
    assert code == 0, err
    assert "no layer evicts: a sliding window of at most 16 tokens is held whole, without loss" in err
    assert Bundle.open(bundle).eviction is None
    decoder = load_decoder(checkpoint)
    for chunk in (1, 4, 7, 128):
        assert prefill_error(bundle, decoder, chunk) < 1e-4
    evicting = write_bundle(tmp_path / "evicting", decoder, eviction=Eviction("window", WINDOW))
    assert prefill_error(evicting, decoder, 4) > 0.01


def test_only_layers_whose_window_exceeds_the_budget_evict() -> None:
    eviction = Eviction("window", 16, skip_layers=(3,))
    windows = [None, 16, 17, None, 8]
    assert eviction.outside_windows(windows) == Eviction("window", 16, skip_layers=(1, 3, 4))
    assert eviction.outside_windows([None, 17, None, None]) is eviction
    assert eviction.outside_windows([4, 4, 16, None]) is None
