"""Every command of the README and of the documentation runs and prints what the page shows."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.documents import (
    README,
    ROOT,
    blocks,
    copy_checkout,
    follow,
    links,
    missing_output,
    pages,
    script_of,
)

SET_UP = ("make demo", "make test")
ACTIVATE = ". .venv/bin/activate"
TUTORIAL = ROOT / "docs" / "tutorial.md"
AARCH64 = ROOT / "build" / "aarch64"
SET_UP_AARCH64 = "cpp/tools/fetch_aarch64.sh build/aarch64"
DOCUMENTS = [*pages(), ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"]
RUN = [
    page for page in pages() if any(block.language != "text" and not block.board for block in blocks(page))
]


def _name(document: Path) -> str:
    return document.stem


class Reader:
    """Someone who follows the README and the tutorial in a checkout, then other pages."""

    def __init__(self, checkout: Path) -> None:
        self.checkout = checkout
        self.outputs: dict[Path, dict[str, str]] = {}

    def follow(self, document: Path) -> dict[str, str]:
        """The output of each block; a page that was followed is not followed again."""
        if document not in self.outputs:
            for earlier in (README, TUTORIAL):
                if earlier != document and document != README:
                    self.follow(earlier)
            before = "" if document == README else ACTIVATE
            self.outputs[document] = follow(document, self.checkout, before, skip="make test")  # it runs this
        return self.outputs[document]


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    checkout = copy_checkout(tmp_path_factory.mktemp("checkout"))
    if AARCH64.is_dir():  # what a page downloads
        (checkout / "build").mkdir()
        (checkout / "build" / "aarch64").symlink_to(AARCH64)
    return Reader(checkout)


def test_the_readme_opens_with_the_two_commands() -> None:
    commands = [block.command for block in blocks(README) if block.language == "sh"]
    assert commands[:2] == list(SET_UP)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_the_readme_says_how_to_get_the_command() -> None:
    assert ACTIVATE in [block.command for block in blocks(README)]
    assert any("pip install -c constraints.txt '.[convert,cpu]'" in block.text for block in blocks(README))


def test_the_readme_fits_on_a_few_screens() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.slow
@pytest.mark.parametrize("document", RUN, ids=_name)
def test_every_block_runs_and_prints_what_the_page_shows(document: Path, reader: Reader) -> None:
    text = document.read_text(encoding="utf-8")
    if "CI" not in os.environ:
        if "cmake" in text and not shutil.which("cmake"):
            pytest.skip("cmake is not installed")
        if SET_UP_AARCH64 in text and not (AARCH64 / "made").is_file():
            pytest.skip(f"programs for aarch64 cannot be built on this machine: run {SET_UP_AARCH64}")
    outputs = reader.follow(document)
    assert missing_output(document, outputs) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=_name)
def test_linked_files_exist(document: Path) -> None:
    for target in links(document):
        assert target.exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=_name)
def test_named_files_of_the_repository_exist(document: Path) -> None:
    named = re.findall(
        r"`((?:kvexport|tests|cpp|graphs|benchmarks|docs)/[\w/.-]*\w)/?`",
        document.read_text(encoding="utf-8"),
    )
    produced = ("benchmarks/results/gpu", "graphs/targets/NAME.toml", "graphs/families/NAME.toml")
    assert [each for each in named if each not in produced and not (ROOT / each).exists()] == []


def test_only_what_needs_a_board_or_an_index_is_left_out() -> None:
    marks = ("nvpmodel", "--system-site-packages", "pip install", "pip wheel")
    for document in pages():
        for block in blocks(document):
            if block.board:
                assert any(mark in block.text for mark in marks), block.text


def test_troubleshooting_quotes_messages_of_the_code() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\| `([^`]+)` \|", page.partition("## Installation")[2], flags=re.M)
    assert len(quoted) > 60
    known = "\n".join(messages()) + (ROOT / "Makefile").read_text(encoding="utf-8")
    missing = [each for each in quoted if each not in known]
    assert missing == ["kvexport: command not found"]  # the shell's


def messages() -> Iterator[str]:
    """Strings of the package; three dots stand for each value that is put into one."""
    for module in (ROOT / "kvexport").rglob("*.py"):
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                yield "".join(
                    str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values
                )


def test_generated_pages_are_up_to_date(script: Any) -> None:
    for name, text in script.pages().items():
        page = (ROOT / "docs" / name).read_text(encoding="utf-8")
        assert page == text, f"docs/{name} is out of date; run: python docs/scripts/reference.py"


@pytest.fixture
def script() -> Any:
    """docs/scripts/reference.py as a module."""
    return script_of("reference")


@pytest.mark.slow
def test_the_bundle_format_page_names_every_key(reader: Reader) -> None:
    reader.follow(ROOT / "docs" / "tensorrt.md")
    page = (ROOT / "docs" / "bundle-format.md").read_text(encoding="utf-8")
    bundles = [reader.checkout / name for name in ("half", "bounded", "half16")]
    documents = [
        bundle / name for bundle in bundles for name in ("manifest.json", "text.json", "self_test.json")
    ]
    documents += bundles[-1].glob("engines/*/build.json")
    for document in documents:
        for key in keys(json.loads(document.read_text(encoding="utf-8"))):
            assert f"`{key}`" in page, f"{key} of {document.name}"


def keys(value: object, free: tuple[str, ...] = ("files", "layers", "tolerances")) -> set[str]:
    """Keys of a JSON value at any depth; objects under `free` have keys that are no part of the format."""
    if isinstance(value, list):
        return set().union(*map(keys, value)) if value else set()
    if not isinstance(value, dict):
        return set()
    inside = [
        each.values() if name in free and isinstance(each, dict) else [each] for name, each in value.items()
    ]
    return set(value).union(*(keys(each) for part in inside for each in part))


@pytest.mark.slow
def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    mkdocs = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(mkdocs, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    for page in tmp_path.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        for attribute in ('src="http', 'src="//', '<link rel="stylesheet" href="http'):
            assert attribute not in text, (page.name, attribute)
