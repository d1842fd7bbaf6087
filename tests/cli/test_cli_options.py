"""Tests of the shared options, the progress bars and the formatting of reports."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from kvexport.calibrate.recipe import BUILT_IN, recipe_for
from kvexport.cli.bars import BarProgress
from kvexport.cli.conversion import build_options, conversion_options
from kvexport.cli.options import progress_bar
from kvexport.cli.report import PlainConsole, size
from kvexport.convert import CompressionRequest
from kvexport.errors import UsageError


@pytest.fixture
def parsed() -> Callable[..., Any]:
    """`parsed(*options)`: the build options that a command with the conversion options parses them to."""

    @click.command()
    @click.option("--method", default="auto")
    @conversion_options
    @click.pass_context
    def command(context: click.Context, **options: Any) -> Any:
        result = build_options(options)
        assert not options  # all of them are used
        return result

    return lambda *options: command.main(list(options), standalone_mode=False)


def test_the_help_shows_the_defaults_of_the_recipe(parsed: Callable[..., Any]) -> None:
    text = CliRunner().invoke(conversion_options(click.command()(lambda **options: None)), ["--help"]).output
    defaults = dict(re.findall(r"--(\w+) INTEGER\s[^\[]*?\[default:\s+(\d+)", text))
    recipe = recipe_for("mixed")
    assert defaults == {name: str(getattr(recipe, name)) for name in ("samples", "length", "seed")}
    options = parsed()
    assert (
        options.recipe == recipe
        and options.dtype == "float32"
        and options.statistics is options.heal is None
        and options.request == CompressionRequest()
    )


@pytest.mark.parametrize("source", BUILT_IN)
def test_options_reach_the_build_options(parsed: Callable[..., Any], source: str) -> None:
    options = parsed(
        "--calibration",
        source,
        "--samples",
        "3",
        "--length",
        "9",
        "--seed",
        "5",
        "--kv-heads",
        "2",
        "--dtype",
        "float16",
        "--method",
        "fold",
    )
    recipe = options.recipe
    assert (recipe.source, recipe.samples, recipe.length, recipe.seed) == (source, 3, 9, 5)
    assert (options.request.kv_heads, options.dtype, options.method) == (2, "float16", "fold")


@pytest.mark.parametrize(
    "option", [("--calibration", "random"), ("--samples", "1"), ("--length", "8"), ("--seed", "0")]
)
def test_statistics_cannot_be_combined_with_calibration_options(
    parsed: Callable[..., Any], option: tuple[str, str]
) -> None:
    with pytest.raises(UsageError, match="--statistics must be given without"):
        parsed("--statistics", "saved", *option)
    assert parsed("--statistics", "saved").statistics == Path("saved")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--calibration", "no-such-file"), "no-such-file"),
        (("--samples", "0"), "--samples must be an integer"),
        (("--length", "1"), "--length must be an integer"),
        (("--seed", "-1"), "--seed must be an integer"),
    ],
)
def test_rejects_values_out_of_range(
    parsed: Callable[..., Any], options: tuple[str, str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        parsed(*options)


class Terminal(io.StringIO):
    """A file that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def draw(file: io.StringIO, monkeypatch: pytest.MonkeyPatch, *, quiet: bool = False) -> str:
    """Run nested stages and a message with `file` as stderr; returns its content."""
    monkeypatch.setattr("sys.stderr", file)
    with progress_bar(quiet) as progress:
        assert isinstance(progress, BarProgress)
        with progress.stage("Outer", 2):
            progress.advance()
            with progress.stage("Inner", 1):
                progress.advance()
            progress.advance()
            outer = next(task for task in progress.bars.tasks if task.description == "Outer")
            assert outer.completed == 2  # not the inner stage's step
            progress.bars.refresh()
        progress.note("read [this](link) :smile: " + "x" * 200)
    return file.getvalue()


def test_bars_are_drawn_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    note = "kvexport: read [this](link) :smile: " + "x" * 200 + "\n"
    assert draw(io.StringIO(), monkeypatch) == note
    assert draw(io.StringIO(), monkeypatch, quiet=True) == draw(Terminal(), monkeypatch, quiet=True) == ""
    drawn = draw(Terminal(), monkeypatch)
    assert "Outer" in drawn and "2/2" in drawn and note.strip() in drawn.replace("\n", "")


def test_a_plan_has_one_bar_with_the_time_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    file = Terminal()
    monkeypatch.setattr("sys.stderr", file)
    with progress_bar(False) as progress:
        assert isinstance(progress, BarProgress)
        progress.plan({"text": 1.0, "conversion": 3.0})
        whole = progress.bars.tasks[-1]
        with progress.part("text"), progress.stage("Sampling", 4):
            for _ in range(2):
                progress.advance()
            assert (whole.completed, whole.description) == (0.125, "Sampling")
            with progress.stage("Inside", 2):
                progress.advance()
                assert (whole.completed, whole.description) == (0.125, "Inside")
            assert [task for task in progress.bars.tasks if task.visible] == [whole]
            progress.bars.refresh()
        assert whole.completed == 0.25
        with progress.part("unplanned"), progress.stage("Other", 1):
            progress.advance()
        assert whole.completed == 0.25
        with progress.part("conversion"), progress.stage("Converting", 0):
            assert (whole.completed, whole.description) == (0.25, "Converting")
        assert whole.completed == 1.0
    drawn = file.getvalue()
    assert "Sampling" in drawn and "2/4" in drawn and "0:00:00 left" in drawn


def test_advance_outside_a_stage_does_nothing() -> None:
    progress = BarProgress(PlainConsole(), quiet=True)
    progress.advance()
    with progress.stage("one", 1):
        progress.advance()
    progress.advance()


def test_a_long_line_is_not_wrapped(capsys: pytest.CaptureFixture[str]) -> None:
    PlainConsole().print_line("wrote " + "/long" * 60)
    assert capsys.readouterr().out == "wrote " + "/long" * 60 + "\n"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (5 << 20, "5.0 MiB"),
        (3 << 40, "3072.0 GiB"),
    ],
)
def test_size_is_formatted_with_binary_units(count: int, text: str) -> None:
    assert size(count) == text
