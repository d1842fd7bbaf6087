"""Command blocks of the documents with their output, links, and a checkout to run the blocks in."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
_MARK = "--- block "
_NUMBER = re.compile(r"\d[\d,.]*(?:e[+-]?\d+)?")


class Block(NamedTuple):
    """A fenced block of a document.

    Attributes:
        language: "sh", "python", or "text" (output of the block before it).
        board: the block needs a Jetson, or installs packages from an index.
    """

    language: str
    board: bool
    text: str

    @property
    def command(self) -> str:
        """The first command of the block, without its comment."""
        return self.text.partition("\n")[0].partition("#")[0].strip()


def blocks(document: Path) -> list[Block]:
    """The sh, python and text blocks of a document, in order."""
    matches = re.findall(
        r"^```(sh|python|text)( board)?\n(.*?)^```", document.read_text(encoding="utf-8"), flags=re.M | re.S
    )
    return [Block(language, bool(board), text) for language, board, text in matches]


def pages() -> list[Path]:
    """The README, then the pages of the site, in the order of its navigation."""
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    names = re.findall(r": (\S+\.md)$", navigation, flags=re.M)
    return [README, *(ROOT / "docs" / name for name in names if not name.startswith("source/"))]


def links(document: Path) -> list[Path]:
    """Files that a document links to."""
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8"))
    return [document.parent / target for target in targets if not target.startswith("https://")]


def copy_checkout(folder: Path) -> Path:
    """Copy the files of the repository, for commands that write beside the documents.

    `.venv` of the copy is the environment that the tests run in, so that nothing is installed again.
    """
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in names:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)  # with its mode: scripts are run
    environment = folder / ".venv"
    environment.mkdir()
    for part in Path(sys.prefix).iterdir():
        if part.name != "ready":
            (environment / part.name).symlink_to(part)
    (environment / "ready").touch()  # newer than the files that make compares it with
    return folder


def follow(document: Path, checkout: Path, before: str = "", skip: str | None = None) -> dict[str, str]:
    """Run the blocks of a document in one shell at the top of a checkout, as a reader types them.

    Args:
        before: commands of other documents that the reader has typed in this shell.
        skip: command whose block is not run; nor are those that need a board or an index.

    Returns:
        The output of each block by its text, standard error included.
    """
    run = [
        block
        for block in blocks(document)
        if block.language != "text" and not block.board and block.command != skip
    ]
    script = ["set -eo pipefail", before]
    for index, block in enumerate(run):
        script.append(f"printf '\\n{_MARK}{index}\\n'")
        script.append(
            block.text if block.language == "sh" else f"python - <<'END_OF_BLOCK'\n{block.text}END_OF_BLOCK"
        )
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)],
        cwd=checkout,
        env=_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    _, *outputs = re.split(rf"^{_MARK}\d+\n", done.stdout, flags=re.M)
    if done.returncode:
        failed = run[len(outputs) - 1].text if outputs else before
        raise AssertionError(f"{document.name}: this block failed:\n{failed}\n{done.stdout[-3000:]}")
    return {block.text: output for block, output in zip(run, outputs, strict=True)}


def _environment() -> dict[str, str]:
    """The reader's environment: no virtual environment is active."""
    tests = Path(sys.prefix, "bin")
    others = [part for part in os.environ["PATH"].split(os.pathsep) if Path(part) != tests]
    environment = os.environ | {"PATH": os.pathsep.join(others), "COLUMNS": "120"}
    return {name: value for name, value in environment.items() if name != "VIRTUAL_ENV"}


def missing_output(document: Path, outputs: dict[str, str]) -> list[str]:
    """Lines that a document shows as the output of a block, and that the block did not print, in order.

    Numbers may differ; a line of three dots stands for lines that the document leaves out.
    """
    missing, output = list[str](), iter(())
    for block in blocks(document):
        if block.language != "text":
            output = iter([_shape(line) for line in outputs.get(block.text, "").splitlines()])
            continue
        for line in filter(None, map(str.strip, block.text.splitlines())):
            if line != "..." and _shape(line) not in output:
                missing.append(line)
                break
    return missing


def _shape(line: str) -> str:
    return " ".join(_NUMBER.sub("#", line).split())


def script_of(name: str) -> Any:
    """docs/scripts/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
