"""A short run of each fuzzer; benchmarks/results/fuzz.json has the longer runs."""

from __future__ import annotations

import os
from pathlib import Path

import fuzzing
import pytest

pytestmark = pytest.mark.slow
SECONDS = int(os.environ.get("KVEXPORT_FUZZ_SECONDS", "10"))


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpora")
    fuzzing.write_seeds(folder)
    return folder


@pytest.mark.parametrize("name", fuzzing.FUZZERS)
def test_no_input_ends_the_program(name: str, corpora: Path) -> None:
    run = fuzzing.fuzz(name, SECONDS, corpora / name)
    assert run["executions"] > 1000 and run["coverage_edges"] > 100 and run["corpus"] > 1
