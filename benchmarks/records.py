"""Write the record of a benchmark after every row, so that an interruption loses one row at most.

A record is a JSON object with `settings`, `rows` and `left_out` among its keys.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from kvexport.errors import UsageError

RESULTS = Path(__file__).parent / "results"

Record = dict[str, Any]


def fill(
    record: Record,
    work: Mapping[str, Callable[[], dict[str, Any]]],
    only: Sequence[str] | None,
    write: Callable[[], None],
    told: Callable[[str], str],
) -> None:
    """Measure the rows that the record does not have yet, in the order of the work, and keep them in it.

    Args:
        only: patterns of rows; None: all.
        write: saves the record; called at first and after every row.
        told: what to say of a row that was measured, by its key.
    """
    order = list(work)
    write()
    for key, figures in work.items():
        if key in record["rows"] or key in record["left_out"] or not selected(key, only):
            continue
        try:
            record["rows"][key] = figures()
        except UsageError as error:
            record["left_out"][key] = str(error)
        record["rows"] = dict(
            sorted(record["rows"].items(), key=lambda each: order.index(each[0]) if each[0] in order else -1)
        )
        write()
        say(f"{key}: {told(key)}")


def save(record: Record, output: Path, table: str, charts: Mapping[str, str | None]) -> None:
    """OUTPUT.json, replaced whole, and what is made of it: OUTPUT.md, and charts by what their names add to
    OUTPUT."""
    output.parent.mkdir(parents=True, exist_ok=True)
    file = record_file(output)
    partial_file = file.with_suffix(".partial")
    partial_file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    partial_file.replace(file)
    output.with_name(f"{output.name}.md").write_text(table, encoding="utf-8")
    for suffix, chart in charts.items():
        if chart is not None:
            output.with_name(f"{output.name}{suffix}.svg").write_text(chart, encoding="utf-8")


def resumed(file: Path, settings: dict[str, Any]) -> Record:
    """The record that --resume goes on with.

    Raises:
        UsageError: it cannot be read, or is of other settings.
    """
    try:
        record: Record = json.loads(file.read_text(encoding="utf-8"))
        found = record["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{file} is no record to go on with: {error}", fix="leave --resume out") from error
    other = [name for name in settings if found.get(name) != settings[name]]
    if other:
        raise UsageError(
            f"{file} was measured otherwise, and rows of both are not to be compared",
            got=", ".join(other),
            fix="give the same arguments as before, or leave --resume out",
        )
    return record


def selected(key: str, patterns: Sequence[str] | None) -> bool:
    """Whether a pattern is of this row, by its name with or without the ratio; no patterns: all rows."""
    return patterns is None or any(
        fnmatch(key, each) or fnmatch(key.split(" ")[0], each) for each in patterns
    )


def named(given: Sequence[str]) -> dict[str, Path]:
    """NAME=FILE, by name.

    Raises:
        UsageError: not of that form.
    """
    pairs = [each.partition("=") for each in given]
    for said, (name, _, file) in zip(given, pairs, strict=True):
        if not name or not file:
            raise UsageError("a text needs a name", got=said, expected="NAME=FILE")
    return {name: Path(file) for name, _, file in pairs}


def record_file(output: Path) -> Path:
    return output.with_name(f"{output.name}.json")


def code_digest(files: Iterable[Path]) -> str:
    """sha256 of the code that figures depend on."""
    total = hashlib.sha256()
    for file in files:
        total.update(file.read_bytes())
    return total.hexdigest()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
