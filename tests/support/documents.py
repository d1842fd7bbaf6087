"""What the documents say to type: their blocks of commands, and a checkout to run them in."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent


class Block(NamedTuple):
    """A block of a document: "sh" or "python"; `board`: it needs a Jetson."""

    language: str
    board: bool
    text: str


def blocks(document: Path) -> list[Block]:
    found = re.findall(
        r"^```(sh|python)( board)?\n(.*?)^```", document.read_text(encoding="utf-8"), flags=re.M | re.S
    )
    return [Block(language, bool(board), text) for language, board, text in found]


def links(document: Path) -> list[Path]:
    """Files that a document links to."""
    targets = re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8"))
    return [document.parent / target for target in targets if not target.startswith("https://")]


def run(command: list[str], where: Path) -> str:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        command, cwd=where, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    return done.stdout


def run_block(block: Block, where: Path) -> str:
    """As a reader would run it."""
    if block.language == "python":
        return run([sys.executable, "-c", block.text], where)
    return run(["bash", "-euo", "pipefail", "-c", block.text], where)


def copy_checkout(folder: Path) -> Path:
    """A copy of what git has, for commands that write beside the documents."""
    names = run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], ROOT).splitlines()
    for name in names:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)  # with its mode: scripts are run
    return folder
