"""The documents are true: every command block that needs no Jetson runs, in its document's order."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from support.documents import ROOT, blocks, copy_checkout, links, run_block

DOCUMENTS = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.stem)
def test_every_block_runs_in_its_order(document: Path, tmp_path: Path) -> None:
    if (
        "cmake" in document.read_text(encoding="utf-8")
        and not shutil.which("cmake")
        and "CI" not in os.environ
    ):
        pytest.skip("there is no cmake")
    checkout = copy_checkout(tmp_path)
    said = [run_block(block, checkout) for block in blocks(document) if not block.board]
    assert any(said)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.stem)
def test_linked_files_exist(document: Path) -> None:
    for target in links(document):
        assert target.exists(), target


def test_only_what_needs_a_board_is_left_out() -> None:
    """A block is not run where it names what only a Jetson has, or installs from a package index."""
    marks = ("nvpmodel", "--system-site-packages", "pip install 'kvexport")
    for document in DOCUMENTS:
        for block in blocks(document):
            assert block.board == any(mark in block.text for mark in marks), block.text
