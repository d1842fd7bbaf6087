"""Fixtures for the tests of the C++ library: builds, and the files that the tests read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import builds
import bundles as tiny
import pytest
import reader_files as reader_file_writer


@pytest.fixture(scope="session")
def built() -> Callable[[str], Path]:
    """`built(kind) -> Path`: the directory of a build, one of `builds.KINDS`; its `tests` has the test programs."""
    return builds.build


@pytest.fixture(scope="session")
def reader_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that `reader_files.write` writes."""
    folder = tmp_path_factory.mktemp("reader_files")
    reader_file_writer.write(folder)
    return folder


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundles that `bundles.write_bundles` writes. Tests must not change them."""
    folder = tmp_path_factory.mktemp("bundles")
    tiny.write_bundles(folder)
    return folder
