"""`kvexport cache`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from kvexport.files.cache_folder import CachedDirectory


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
    try:
        # STATISTICS_FILE is not imported, as its module imports torch
        header = json.loads((entry.path / "statistics.json").read_text(encoding="utf-8"))
        header = {name: header[name] for name in ("name", "checkpoint", "recipe", "capacity", "files")}
        stages = _stages(set(header.pop("files")))
        header["recipe"] = dict(header["recipe"])
    except (OSError, ValueError, KeyError, TypeError):
        header, stages = dict.fromkeys(("name", "checkpoint", "recipe", "capacity")), []
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
                entry["name"] or "damaged",
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
    return f"{source}, {recipe.get('samples')} x {recipe.get('length')}, seed {recipe.get('seed')}"


def _age(seconds: int) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length} {unit} ago"
    return f"{seconds} s ago"
