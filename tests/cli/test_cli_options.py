"""Options say what the stations take, progress is drawn for a terminal alone, and reports show every figure."""

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
from kvexport.cli.conversion import conversion_options, plan_from
from kvexport.cli.options import BarProgress, progress_bar
from kvexport.cli.report import PlainConsole, size
from kvexport.convert import CompressionRequest
from kvexport.errors import UsageError


@pytest.fixture
def plan() -> Callable[..., Any]:
    """`plan(*options)`: the plan that a command with the conversion options makes."""

    @click.command()
    @click.option("--method", default="auto")
    @conversion_options
    @click.pass_context
    def command(context: click.Context, **options: Any) -> Any:
        made = plan_from(options)
        assert not options  # it takes all of them
        return made

    return lambda *options: command.main(list(options), standalone_mode=False)


def test_defaults_that_help_names_are_those_of_the_recipe(plan: Callable[..., Any]) -> None:
    shown = CliRunner().invoke(conversion_options(click.command()(lambda **options: None)), ["--help"]).output
    defaults = dict(re.findall(r"--(\w+) INTEGER\s[^\[]*?\[default: (\d+)\]", shown))
    recipe = recipe_for("self")
    assert defaults == {name: str(getattr(recipe, name)) for name in ("samples", "length", "seed")}
    made = plan()
    assert (
        made.recipe == recipe
        and made.dtype == "float32"
        and made.statistics is made.heal is None
        and made.request == CompressionRequest()
    )


@pytest.mark.parametrize("source", BUILT_IN)
def test_options_reach_the_plan(plan: Callable[..., Any], source: str) -> None:
    made = plan(
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
    recipe = made.recipe
    assert (recipe.source, recipe.samples, recipe.length, recipe.seed) == (source, 3, 9, 5)
    assert (made.request.kv_heads, made.dtype, made.method) == (2, "float16", "fold")


@pytest.mark.parametrize(
    "option", [("--calibration", "random"), ("--samples", "1"), ("--length", "8"), ("--seed", "0")]
)
def test_statistics_hold_their_own_text(plan: Callable[..., Any], option: tuple[str, str]) -> None:
    with pytest.raises(UsageError, match="--statistics holds its own"):
        plan("--statistics", "saved", *option)
    assert plan("--statistics", "saved").statistics == Path("saved")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--calibration", "no-such-file"), "no-such-file"),
        (("--samples", "0"), "--samples is out of range"),
        (("--length", "1"), "--length is out of range"),
        (("--seed", "-1"), "--seed is out of range"),
    ],
)
def test_values_out_of_range(plan: Callable[..., Any], options: tuple[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        plan(*options)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drawn(file: io.StringIO, monkeypatch: pytest.MonkeyPatch, *, quiet: bool = False) -> str:
    """What a stage within a stage and a note leave in a file that stands for stderr."""
    monkeypatch.setattr("sys.stderr", file)
    with progress_bar(quiet) as progress:
        with progress.stage("Outer", 2):
            progress.advance()
            with progress.stage("Inner", 1):
                progress.advance()
            progress.advance()
            outer = next(task for task in progress._bars.tasks if task.description == "Outer")
            assert outer.completed == 2  # the inner stage's steps are its own
            progress._bars.refresh()
        progress.note("read [this](link) :smile: " + "x" * 200)
    return file.getvalue()


def test_progress_is_drawn_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    note = "kvexport: read [this](link) :smile: " + "x" * 200 + "\n"
    assert drawn(io.StringIO(), monkeypatch) == note
    assert drawn(io.StringIO(), monkeypatch, quiet=True) == drawn(Terminal(), monkeypatch, quiet=True) == ""
    shown = drawn(Terminal(), monkeypatch)
    assert "Outer" in shown and "2/2" in shown and note.strip() in shown.replace("\n", "")


def test_advance_outside_a_stage_is_no_error() -> None:
    progress = BarProgress(PlainConsole(), quiet=True)
    progress.advance()
    with progress.stage("one", 1):
        progress.advance()
    progress.advance()


def test_a_long_line_is_left_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    PlainConsole().say("wrote " + "/long" * 60)
    assert capsys.readouterr().out == "wrote " + "/long" * 60 + "\n"


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (5 << 20, "5.0 MiB"),
        (3 << 40, "3072.0 GiB"),
    ],
)
def test_sizes(count: int, shown: str) -> None:
    assert size(count) == shown
