"""The README is true: every command block in it runs, as a reader would run it, and prints what it says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from support.documents import ROOT, blocks, copy_checkout, links, run, run_block

README = ROOT / "README.md"
SET_UP = ("make demo", "make test")


def set_up(text: str) -> str:
    return text.split("#")[0].strip()


def test_the_readme_opens_with_the_two_commands() -> None:
    commands = [set_up(block.text) for block in blocks(README) if block.language == "sh"]
    assert commands[:2] == list(SET_UP)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.slow
def test_every_block_runs_in_the_readmes_order(tmp_path: Path) -> None:
    """`make demo` runs with the environment that is there, and so do the others; `make test` is what runs this."""
    checkout = copy_checkout(tmp_path)
    environment = Path(sys.executable).parent.parent
    ready = environment / "ready"
    told = run(["make", f"VENV={environment}", f"--old-file={ready}", "demo"], checkout)
    assert "Once upon a time" in told
    assert "proved against PyTorch: ok" in told
    for block in blocks(README):
        assert not block.board, "what needs a board is in docs/jetson.md"
        if set_up(block.text) not in SET_UP:
            run_block(block, checkout)


def test_files_that_the_readme_links_to_exist() -> None:
    for target in links(README):
        assert target.exists(), target
