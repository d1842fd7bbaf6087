"""What the tests of the C++ library share: builds, and the files that they read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import builds
import bundles as tiny
import pytest
import reader_files as reader_file_writer


@pytest.fixture(scope="session")
def built() -> Callable[[str], Path]:
    """`built(kind) -> Path`: the folder of a build, one of `builds.KINDS`; programs of the tests are in its `tests`."""
    return builds.build


@pytest.fixture(scope="session")
def reader_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `reader_files.write` makes."""
    folder = tmp_path_factory.mktemp("reader_files")
    reader_file_writer.write(folder)
    return folder


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the bundles that `bundles.write_bundles` makes; they are never written to."""
    folder = tmp_path_factory.mktemp("bundles")
    tiny.write_bundles(folder)
    return folder
