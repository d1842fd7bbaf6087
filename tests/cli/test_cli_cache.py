"""Tests of `kvexport cache` and --no-cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from kvexport.cli import commands

KEY = 64 * "a"
FAST = ("--calibration", "random", "--samples", "8", "--length", "24")


def cli(*arguments: object) -> str:
    """Run `kvexport ARGUMENTS`; returns its standard output."""
    result = CliRunner().invoke(commands, [str(each) for each in arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def listed() -> list[dict[str, Any]]:

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    entries: list[dict[str, Any]] = json.loads(cli("cache", "--json"), parse_constant=refuse)["entries"]
    return entries


def test_lists_and_removes_entries(tiny_checkpoint: Any, tmp_path: Path, build_cache: Path) -> None:
    source = tiny_checkpoint("llama")
    assert cli("cache") == f"{build_cache}: 0 entries, 0 B\n"
    cli("build", source, "-o", tmp_path / "a", *FAST, "--quiet")
    cli("compress", source, "-o", tmp_path / "b", *FAST, "--seed", "7", "--quiet")
    compressed, built = listed()
    for entry, stages, seed in ((built, ["text", "analysis"], 0), (compressed, ["text"], 7)):
        assert (entry["name"], entry["stages"], entry["recipe"]["seed"]) == ("llama", stages, seed)
        assert entry["recipe"]["source"] == "random"
        folder = build_cache / entry["key"]
        assert entry["bytes"] == sum(file.stat().st_size for file in folder.iterdir())
        assert 0 <= entry["age_seconds"] < 3600
    shown = cli("cache")
    for words in ("llama", "random, 8 x 24, seed 7", "text, analysis", "2 entries", str(build_cache)):
        assert words in shown
    freed = json.loads(cli("cache", "--clean", "--json"))
    assert freed["entries"] == [] and freed["freed_bytes"] == built["bytes"] + compressed["bytes"]
    assert cli("cache", "--clean").startswith("removed 0 B\n")


def header(**changes: str) -> str:
    """statistics.json of an entry, with other JSON for some values."""
    values = {"name": '"model"', "checkpoint": '"1f"', "recipe": '{"source": "self"}', "capacity": "4"}
    values |= {"files": '{"tokens.safetensors": "1f"}'} | changes
    return "{" + ", ".join(f'"{name}": {value}' for name, value in values.items()) + "}"


@pytest.mark.parametrize(
    "content",
    [
        *(None, "{", "[]", '{"name": 1}', '{"files": 3}', "[" * 100_000, '{"recipe":' * 100_000),
        *(header(name='["x"]'), header(capacity="1e999"), header(recipe='{"samples": 1e999}')),
        *(header(recipe='{"samples": NaN}'), header(files="[[]]")),
    ],
    ids=lambda content: str(content)[:20],
)
def test_lists_damaged_entries(build_cache: Path, content: str | None) -> None:
    (build_cache / KEY).mkdir(parents=True)
    if content is not None:
        (build_cache / KEY / "statistics.json").write_text(content)
    assert "damaged" in cli("cache")
    assert [entry["stages"] for entry in listed()] == [[]]
    assert json.loads(cli("cache", "--clean", "--json"))["entries"] == []


def test_control_characters_are_escaped(build_cache: Path) -> None:
    (build_cache / KEY).mkdir(parents=True)
    recipe = json.dumps({"source": "text", "file": "a\u001b[31m"})
    (build_cache / KEY / "statistics.json").write_text(header(name='"m\\u001b[2J"', recipe=recipe))
    shown = cli("cache")
    assert "\x1b" not in shown and r"'m\x1b[2J'" in shown and "damaged" not in shown
    assert listed()[0]["name"] == "m\x1b[2J"


@pytest.mark.parametrize(
    "command",
    ["compress", *(pytest.param(each, marks=pytest.mark.slow) for each in ("build", "calibrate", "analyze"))],
)
def test_no_cache_keeps_nothing(
    command: str, tiny_checkpoint: Any, tmp_path: Path, build_cache: Path
) -> None:
    source = tiny_checkpoint("llama")
    cli(command, source, "-o", tmp_path / "a", *FAST, "--quiet", "--no-cache")
    assert not build_cache.exists()
    cli(command, source, "-o", tmp_path / "b", *FAST, "--quiet")
    assert len(listed()) == 1  # control


@pytest.mark.slow
def test_the_report_names_the_longest_stage_and_what_was_saved(tiny_checkpoint: Any, tmp_path: Path) -> None:
    source = tiny_checkpoint("llama")
    cli("build", source, "-o", tmp_path / "a", *FAST, "--quiet")
    report = json.loads(cli("build", source, "-o", tmp_path / "b", *FAST, "--json", "--kv-ratio", "0.75"))
    assert report["reused"] == ["text", "analysis"]
    seconds = report["seconds"]
    assert seconds.keys() == {"read", "convert", "self-test", "write", "validation"}
    assert report["longest_stage"] == max(seconds, key=seconds.__getitem__)
    shown = cli("build", source, "-o", tmp_path / "c", *FAST)
    assert "saved earlier: calibration text, sensitivity analysis" in shown
    fresh = cli("build", source, "-o", tmp_path / "d", *FAST, "--no-cache")
    assert (
        "saved earlier" not in fresh
        and " s on " in fresh
        and "; the longest stage was " in fresh
        and "sensitivity analysis " in fresh
    )
