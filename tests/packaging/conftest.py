"""The wheel, built once in a run."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]


def build_wheel(folder: Path) -> None:
    """Copy what git has or would add to `folder`/tree, and build the wheel of that into `folder`.

    Building leaves files behind; in the copy they are not in the checkout.
    """
    tree = folder / "tree"
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listing, cwd=CHECKOUT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (CHECKOUT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(CHECKOUT / name, tree / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    built = subprocess.run([*pip, "-w", str(folder), "."], cwd=tree, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr


@pytest.fixture(scope="session")
def tree(shared_folders: Any) -> Path:
    """The files of the repository that the wheel was built from."""
    return Path(shared_folders.get(build_wheel), "tree")


@pytest.fixture(scope="session")
def wheel(shared_folders: Any) -> Path:
    (path,) = shared_folders.get(build_wheel).glob("*.whl")
    assert isinstance(path, Path)
    return path
