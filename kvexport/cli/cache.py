"""`kvexport cache`."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvexport.errors import UsageError
from kvexport.files.schema import Table, read_limited

if TYPE_CHECKING:
    from kvexport.files.cache_folder import CachedDirectory

_LARGEST_HEADER = 1 << 24  # bytes


@click.command()
@click.option("--clean", is_flag=True, help="Remove all entries that no running build uses.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(clean: bool, as_json: bool) -> None:
    """List or remove what builds kept: calibration text, and the sensitivity of each layer and weight.

    A build that was interrupted, or is repeated at another --kv-ratio, starts from it. The entries are in
    ~/.cache/kvexport, or in the folder that the variable KVEXPORT_CACHE names. When they exceed 20 GB or a
    tenth of the free disk, those that were not used for the longest time are removed.
    """
    from kvexport.files.cache_folder import CacheFolder, default_cache_folder

    folder = CacheFolder(default_cache_folder())
    freed = folder.clean() if clean else None
    entries = [_described(entry) for entry in folder.entries()]
    if as_json:
        record: dict[str, Any] = {"path": str(folder.path), "entries": entries}
        click.echo(json.dumps(record if freed is None else record | {"freed_bytes": freed}))
        return
    _print(folder.path, entries, freed)


def _described(entry: CachedDirectory) -> dict[str, Any]:
    """An entry as plain JSON values; the header of a damaged one is null."""
    header: dict[str, Any] = dict.fromkeys(("name", "checkpoint", "recipe", "capacity"))
    stages: list[str] = []
    with suppress(OSError, ValueError, RecursionError, UsageError):
        # not read by the module that writes it, which imports torch
        text = read_limited(entry.path / "statistics.json", _LARGEST_HEADER)
        table = Table.from_json(text, "statistics.json")
        recipe, files = table.table("recipe").mapping(), set(table.table("files"))
        json.dumps(recipe, allow_nan=False)  # raises ValueError
        header = {
            "name": table.text("name"),
            "checkpoint": table.string("checkpoint"),
            "recipe": recipe,
            "capacity": table.integer("capacity", 1),
        }
        stages = _stages(files)
    return {
        "key": entry.path.name,
        **header,
        "stages": stages,
        "bytes": entry.bytes,
        "age_seconds": round(max(0.0, time.time() - entry.used)),
    }


def _stages(files: set[str]) -> list[str]:
    if "weights.safetensors" in files:
        return ["text", "weight-analysis"]
    return ["text", "analysis"] if len(files) > 1 else ["text"]


def _print(path: Path, entries: list[dict[str, Any]], freed: int | None) -> None:
    from kvexport.cli.report import PlainConsole, plain_table, size

    out = PlainConsole()
    if freed is not None:
        out.print_line(f"removed {size(freed)}")
    if entries:
        table = plain_table("checkpoint", "recipe", "capacity", "stages", "size", "last used")
        for entry in entries:
            table.add_row(
                "damaged" if entry["name"] is None else _printable(entry["name"]),
                "" if entry["recipe"] is None else _recipe(entry["recipe"]),
                str(entry["capacity"] or ""),
                ", ".join(entry["stages"]),
                size(entry["bytes"]),
                _age(entry["age_seconds"]),
            )
        out.print(table)
    count = "1 entry" if len(entries) == 1 else f"{len(entries)} entries"
    out.print_line(f"{path}: {count}, {size(sum(entry['bytes'] for entry in entries))}")


def _recipe(recipe: dict[str, Any]) -> str:
    source = recipe.get("file") or recipe.get("source")
    return _printable(
        f"{source}, {recipe.get('samples')} x {recipe.get('length')}, seed {recipe.get('seed')}"
    )


def _printable(text: str) -> str:
    """The text, with escapes in place of characters that control the terminal."""
    return text if text.isprintable() else ascii(text)


def _age(seconds: int) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length} {unit} ago"
    return f"{seconds} s ago"
