"""The wheel holds every module and every data file, and works where there is no checkout."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from kvexport.model.families import families

pytestmark = pytest.mark.slow

DATA = {"graphs": "*/*.toml", "calibration": "*.*", "models": "demo/*"}

_LOOK = """
import json
import kvexport
from kvexport.model.families import families
from kvexport.files.resources import resource
print(json.dumps([kvexport.__file__, sorted(families()), str(resource("graphs", "families"))]))
"""


def in_wheel(tree: Path) -> set[str]:
    """What must be in the wheel: every module of the package, and the data files as package data."""
    wanted = {path.relative_to(tree).as_posix() for path in (tree / "kvexport").rglob("*.py")} | {
        "kvexport/py.typed"
    }
    wanted |= {f"kvexport/analyze/page.{kind}" for kind in ("css", "js")}
    for folder, pattern in DATA.items():
        wanted |= {
            f"kvexport/{path.relative_to(tree).as_posix()}"
            for path in (tree / folder).glob(pattern)
            if path.is_file()
        }
    return wanted


def test_wheel_holds_every_module_and_data_file(tree: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = in_wheel(tree)
    assert {
        "kvexport/graphs/families/llama.toml",
        "kvexport/calibration/self.toml",
        "kvexport/calibration/articles.txt",
        "kvexport/model/loader.py",
    } <= wanted
    assert names == wanted


def test_wheel_works_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    look = [sys.executable, "-c", _LOOK]
    ran = subprocess.run(
        look,
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site")},
        check=True,
        capture_output=True,
        text=True,
    )
    where, found, data = json.loads(ran.stdout)
    assert Path(where).is_relative_to(tmp_path) and Path(data).is_relative_to(tmp_path)
    assert found == sorted(families())


def test_wheel_names_what_it_needs(wheel: Path) -> None:
    """The base install is the lean runtime; what converts is an extra."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(name).decode()
    needs = [
        line.removeprefix("Requires-Dist: ")
        for line in metadata.splitlines()
        if line.startswith("Requires-Dist: ")
    ]
    base = {need.split(">")[0] for need in needs if "extra ==" not in need}
    assert base == {"numpy", "click", "rich", "tokenizers", "tomli"}  # the last one before Python 3.11
    assert {
        line.removeprefix("Provides-Extra: ")
        for line in metadata.splitlines()
        if line.startswith("Provides-Extra: ")
    } >= {
        "convert",
        "cpu",
        "dev",
        "gpu",
        "rtx",
        "tensorrt",
    }
    assert "License-Expression: Apache-2.0" in metadata
    assert any(need.startswith("torch") and '"convert"' in need for need in needs)


def test_a_wheel_without_its_data_says_so(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(
            tmp_path / "site", [name for name in archive.namelist() if not name.endswith(".toml")]
        )
    look = [sys.executable, "-c", _LOOK]
    ran = subprocess.run(
        look, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path / "site")}, capture_output=True, text=True
    )
    assert ran.returncode != 0 and "must contain its data file graphs/families" in ran.stderr
