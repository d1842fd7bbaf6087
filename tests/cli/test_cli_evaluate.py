"""Tests of `kvexport evaluate`: exit codes, JSON, and the limit on KL."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.command_line import Ended, run_kvexport
from support.tiny_bundles import byte_level_tokenizer, write_bundle

from kvexport.model.checkpoint import Checkpoint
from kvexport.model.decoder import Linear
from kvexport.model.loader import load_decoder

Run = Callable[..., Ended]


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, a bundle of it with weaker attention, a bfloat16 bundle, and a text."""
    folder = tmp_path_factory.mktemp("evaluate")
    shutil.copytree(tiny_checkpoint("llama", vocab_size=300, num_key_value_heads=4), folder / "checkpoint")
    (folder / "checkpoint" / "tokenizer.json").write_text(byte_level_tokenizer(300), encoding="utf-8")
    (folder / "text.txt").write_text("Once upon a time there was a small café. " * 9, encoding="utf-8")
    decoder = load_decoder(Checkpoint(folder / "checkpoint"))
    layer = decoder.layers[0]
    weaker = dataclasses.replace(layer.attention, o=Linear(0.7 * layer.attention.o.weight))
    layers = [dataclasses.replace(layer, attention=weaker), decoder.layers[1]]
    write_bundle(folder / "bundle", dataclasses.replace(decoder, layers=layers))
    write_bundle(folder / "bfloat16", decoder, dtype="bfloat16")
    return folder


@pytest.fixture
def run(folder: Path) -> Run:
    """`run(*options, bundle=..., text=...)`: exit code, standard output and standard error."""

    def call(*options: str, bundle: str = "bundle", text: str = "text.txt") -> Ended:
        paths = [folder / bundle, "--against", folder / "checkpoint", "--text", folder / text]
        return run_kvexport("evaluate", *paths, "--length", 24, *options)

    return call


def test_json_has_all_values(run: Run) -> None:
    code, out, err = run("--json")
    result = json.loads(out)
    assert code == 0
    assert "sha256 differs" in err  # a note, no error: this bundle's manifest names another checkpoint
    assert result.keys() >= {
        "mean_kl",
        "cross_entropy",
        "cross_entropy_original",
        "perplexity",
        "perplexity_original",
        "top1_agreement",
        "kv_bytes_per_token",
        "kv_bytes_per_token_original",
        "tokens",
    }
    assert result["mean_kl"] > 0 and 0 < result["top1_agreement"] <= 1 and result["tokens"] % 23 == 0
    assert result["kv_bytes_per_token"] == result["kv_bytes_per_token_original"] == 512


def test_the_table_shows_original_and_bundle(run: Run) -> None:
    code, out, _ = run("--samples", "2")
    assert code == 0
    for text in ("original", "bundle", "perplexity", "mean KL", "512 B", "(on 46 tokens)"):
        assert text in out


def test_exits_with_1_above_max_kl(run: Run) -> None:
    kl = json.loads(run("--json")[1])["mean_kl"]
    assert run("--quiet", "--max-kl", str(1.01 * kl)) == (0, "", "")
    code, out, err = run("--json", "--max-kl", str(0.99 * kl))
    assert code == 1 and json.loads(out)["mean_kl"] == kl  # the values are still printed
    assert "must not exceed --max-kl" in err
    code, out, err = run("--quiet", "--max-kl", "0")
    assert (code, out) == (1, "") and err


def test_invalid_inputs_exit_with_2(run: Run, folder: Path) -> None:
    (folder / "empty.txt").write_text("", encoding="utf-8")
    assert run(text="empty.txt")[0] == 2
    assert run(text="missing.txt")[0] == 2
    assert run(bundle="missing")[0] == 2
    code, _, err = run("--length", "65")
    assert code == 2 and "capacity" in err
    assert run("--length", "1")[0] == 2


def test_a_dtype_without_kernels_on_this_machine_exits_with_3(run: Run) -> None:
    code, out, err = run(bundle="bfloat16")
    assert (code, out) == (3, "") and "bfloat16" in err
