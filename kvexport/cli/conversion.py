"""The options that `build`, `compress` and `calibrate` share; knows option names, and imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from kvexport.bundle_manifest import BYTES
from kvexport.errors import UsageError

if TYPE_CHECKING:
    from kvexport.build import Plan
    from kvexport.calibrate import Recipe

F = TypeVar("F", bound=Callable[..., Any])
METHODS = ("auto", "online", "fold", "svd-a", "svd-w", "mean-pool")


def _together(*options: Callable[[F], F]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


calibration_options = _together(
    click.option(
        "--calibration",
        metavar="SOURCE",
        help="self (default: the model samples its own text), random, or a FILE of text or JSON lines.",
    ),
    click.option("--samples", type=int, help="Windows of calibration text [default: 96]."),
    click.option("--length", type=int, help="Tokens in a window [default: 256]."),
    click.option("--seed", type=int, help="Of sampling [default: 0]."),
)

conversion_options = _together(
    click.option("--kv-heads", type=int, help="KV heads to keep; must divide the model's number [default: half]."),
    click.option("--kv-ratio", type=float, help="The same as a share: 0.5, 0.25, ..."),
    calibration_options,
    click.option(
        "--statistics", type=click.Path(path_type=Path), help="Saved by `kvexport calibrate`, instead of --calibration."
    ),
    click.option("--dtype", type=click.Choice(tuple(BYTES)), default="float32", show_default=True, help="Of weights and cache."),
)


def recipe_from(calibration: str | None, samples: int | None, length: int | None, seed: int | None) -> Recipe:
    """The recipe that the calibration options mean."""
    from kvexport.calibrate import recipe_for

    return recipe_for("self" if calibration is None else calibration, samples, length, seed)


def plan_from(options: dict[str, Any]) -> Plan:
    """The plan that the conversion options mean; takes them out of `options`.

    Raises:
        UsageError: options that contradict each other or are out of range.
    """
    from kvexport.build import Plan

    sources = [options.pop(name) for name in ("calibration", "samples", "length", "seed")]
    if options["statistics"] is not None and any(value is not None for value in sources):
        raise UsageError(
            "--statistics holds its own calibration text", seen="--calibration, --samples, --length or --seed beside it",
            fix="leave those out, or --statistics",
        )  # fmt: skip
    names = ("kv_heads", "kv_ratio", "method", "statistics", "dtype")
    return Plan(recipe_from(*sources), **{name: options.pop(name) for name in names})
