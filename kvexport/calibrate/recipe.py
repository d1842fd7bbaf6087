"""Calibration recipes (`calibration/*.toml`): source, number and length of the token windows."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kvexport.errors import UsageError
from kvexport.files.resources import resource
from kvexport.files.schema import Table

BUILT_IN = ("mixed", "self", "random")
DEFAULT = "mixed"
_RANGES = {"samples": (1, 2**20), "length": (2, 2**20), "seed": (0, 2**63 - 1)}


@dataclass(frozen=True)
class Recipe:
    """Where calibration windows come from.

    Attributes:
        source: 'mixed' (the shipped text, and windows sampled from the model), 'self' (sampled from the
            model), 'random' (uniform token ids) or 'text' (`file`).
        samples: number of windows.
        length: tokens per window.
        seed: random seed.
        temperatures: sampling temperatures, used for equally many windows each; 'self' and 'mixed'.
        sampled: share of the windows that are sampled from the model; 'mixed' only.
        file: text or JSON lines; 'text' only.
        reason: why this recipe replaces the one that was requested; None: it does not.
        default_samples: whether the number of windows is the recipe's default.
        default_length: whether the length is the recipe's default, which follows the model (`fitted`).
    """

    source: str
    samples: int
    length: int
    seed: int
    temperatures: tuple[float, ...] = ()
    sampled: float = 0.0
    file: Path | None = None
    reason: str | None = None
    default_samples: bool = False
    default_length: bool = False

    @property
    def sampled_windows(self) -> int:
        """Number of windows that are sampled from the model."""
        return self.samples if self.source == "self" else int(self.sampled * self.samples)

    def fitted(self, max_positions: int | None) -> Recipe:
        """The recipe with windows of at most `max_positions` tokens, if their length is the default.

        Args:
            max_positions: of the model; None: no limit.

        Raises:
            UsageError: the windows are longer, and their length is not the default.
        """
        if max_positions is None or self.length <= max_positions:
            return self
        if not self.default_length:
            raise UsageError(
                "--length must not exceed the positions that the model was trained for",
                got=self.length,
                expected=f"at most {max_positions}",
            )
        return replace(self, length=max(_RANGES["length"][0], max_positions))

    def from_model(self, reason: str) -> Recipe:
        """Windows of the same length and seed, sampled from the model for this reason; as many, unless their
        number is the default.
        """
        own = _read_recipe("self")
        return replace(
            own,
            samples=own.samples if self.default_samples else self.samples,
            length=self.length,
            seed=self.seed,
            reason=reason,
            default_samples=self.default_samples,
            default_length=self.default_length,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; the file by its name, without its directory."""
        values = asdict(self) | {
            "temperatures": list(self.temperatures),
            "file": os.fsencode(self.file.name).decode(errors="replace") if self.file else None,
        }
        del values["default_samples"], values["default_length"]
        if not self.sampled:
            del values["sampled"]
        return {key: value for key, value in values.items() if value not in (None, [])}


def recipe_for(
    calibration: str, samples: int | None = None, length: int | None = None, seed: int | None = None
) -> Recipe:
    """The recipe that `--calibration` names, with the options that override it.

    Args:
        calibration: 'mixed', 'self', 'random', or the path of a text or JSON lines file.
        samples, length, seed: override the recipe's values; None: keep them.

    Raises:
        UsageError: there is no such recipe or file, or an option is out of range.
    """
    file = None if calibration in BUILT_IN else Path(calibration)
    if file is not None and not os.path.isfile(file):  # noqa: PTH113 - Path.is_file raises for a long name
        raise UsageError(
            "--calibration must be a recipe or a file",
            got=repr(calibration),
            expected="mixed, self, random, or a file of text or JSON lines",
        )
    recipe = _read_recipe("text" if file else calibration)
    overrides = {"samples": samples, "length": length, "seed": seed}
    given: dict[str, Any] = {name: value for name, value in overrides.items() if value is not None}
    for name, (least, most) in _RANGES.items():
        if name in given and not least <= given[name] <= most:
            raise UsageError(f"--{name} must be an integer from {least} to {most}", got=given[name])
    return replace(recipe, **given, file=file, default_samples=samples is None, default_length=length is None)


def _read_recipe(name: str) -> Recipe:
    path = f"calibration/{name}.toml"
    table = Table.from_toml(resource("calibration", f"{name}.toml").read_text(encoding="utf-8"), path)
    return read_recipe(table)


def read_recipe(table: Table) -> Recipe:
    """The recipe of a table that has nothing else, such as `Recipe.to_json` gives.

    Raises:
        KvexportError: a value is missing or invalid, or a key is unknown.
    """
    recipe = Recipe(
        source=table.string("source", (*BUILT_IN, "text")),
        samples=table.integer("samples", *_RANGES["samples"]),
        length=table.integer("length", *_RANGES["length"]),
        seed=table.integer("seed", *_RANGES["seed"]),
        temperatures=table.numbers("temperatures", 0) if table.has("temperatures") else (),
        sampled=table.number("sampled", 0, 1) if table.has("sampled") else 0.0,
        file=Path(table.text("file")) if table.has("file") else None,
        reason=table.text("reason") if table.has("reason") else None,
    )
    table.only()
    return recipe
