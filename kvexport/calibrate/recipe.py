"""Calibration recipes (`calibration/*.toml`): where the token windows come from, how many, how long.

Knows the recipe's vocabulary; makes no tokens.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvexport.errors import UsageError
from kvexport.files.resources import resource

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BUILT_IN = ("self", "random")


@dataclass(frozen=True)
class Recipe:
    """`samples` windows of `length` tokens from `source` ('self', 'random' or 'text', with `file`)."""

    source: str
    samples: int
    length: int
    seed: int
    temperatures: tuple[float, ...] = ()  # 'self' only: the windows are shared out among them evenly
    file: Path | None = None  # 'text' only

    def to_json(self) -> dict[str, Any]:
        """The recipe as plain JSON values; the file by its name alone."""
        found = asdict(self) | {
            "temperatures": list(self.temperatures),
            "file": self.file.name if self.file else None,
        }
        return {key: value for key, value in found.items() if value not in (None, [])}


def recipe_for(
    calibration: str, samples: int | None = None, length: int | None = None, seed: int | None = None
) -> Recipe:
    """The recipe that `--calibration` names, 'self', 'random' or a text file, with what the options override.

    Raises:
        UsageError: no such recipe or file, or an option out of range.
    """
    file = None if calibration in BUILT_IN else Path(calibration)
    if file is not None and not file.is_file():
        raise UsageError(
            "the calibration text is no file",
            got=repr(calibration),
            expected="self, random, or a file of text or JSON lines",
        )
    raw = tomllib.loads(
        resource("calibration", f"{'text' if file else calibration}.toml").read_text(encoding="utf-8")
    )
    raw["temperatures"] = tuple(raw.get("temperatures", ()))
    overrides = {"samples": samples, "length": length, "seed": seed}
    recipe = Recipe(
        **{**raw, **{key: value for key, value in overrides.items() if value is not None}}, file=file
    )
    ranges = (
        ("samples", recipe.samples, 1, 2**20),
        ("length", recipe.length, 2, 2**20),
        ("seed", recipe.seed, 0, 2**63 - 1),
    )
    for name, value, least, most in ranges:
        if not least <= value <= most:
            raise UsageError(
                f"--{name} is out of range", got=value, expected=f"a whole number from {least} to {most}"
            )
    return recipe
