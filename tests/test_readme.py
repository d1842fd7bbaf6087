"""The README is true: every command block in it runs, as a reader would run it, and prints what it says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(sh|python)\n(.*?)^```", README, flags=re.M | re.S)
SET_UP = ("make demo", "make test")


def run(command: list[str], where: Path) -> str:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git has, for commands that write beside the README."""
    folder = tmp_path_factory.mktemp("checkout")
    names = run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], ROOT).splitlines()
    for name in names:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


def test_the_readme_opens_with_the_two_commands() -> None:
    blocks = [block.strip() for kind, block in BLOCKS if kind == "sh"]
    assert [block.split("#")[0].strip() for block in blocks[:2]] == list(SET_UP)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.slow
def test_every_block_runs_in_the_readmes_order(checkout: Path) -> None:
    """`make demo` runs with the environment that is there, and so do the others; `make test` is what runs this."""
    environment = Path(sys.executable).parent.parent
    ready = environment / "ready"
    told = run(["make", f"VENV={environment}", f"--old-file={ready}", "demo"], checkout)
    assert "Once upon a time" in told
    assert "proved against PyTorch: ok" in told
    for kind, block in BLOCKS:
        if block.split("#")[0].strip() in SET_UP:
            continue
        if kind == "python":
            run([sys.executable, "-c", block], checkout)
        else:
            run(["bash", "-euo", "pipefail", "-c", block], checkout)


def test_files_that_the_readme_links_to_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
