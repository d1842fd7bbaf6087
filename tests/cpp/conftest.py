"""Fixtures for the tests of the C++ library: builds, and the files that the tests read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import builds
import bundles as tiny
import pytest
import reader_files as reader_file_writer
from drive import Drive


@pytest.fixture(scope="session")
def built() -> Callable[[str], Path]:
    """`built(kind) -> Path`: a build directory for one of `builds.KINDS`, with test programs in `tests`."""
    return builds.build


@pytest.fixture(scope="module")
def drive(built: Callable[[str], Path]) -> Iterator[Drive]:
    """The library, built with sanitizers, in another process."""
    with Drive(built("sanitized")) as drive:
        yield drive


@pytest.fixture(scope="session")
def reader_files(shared_folders: Any) -> Path:
    """The files that `reader_files.write` writes. Tests must not change them."""
    return Path(shared_folders.get(reader_file_writer.write))


@pytest.fixture(scope="session")
def bundles(shared_folders: Any) -> Path:
    """The bundles that `bundles.write_bundles` writes. Tests must not change them."""
    return Path(shared_folders.get(tiny.write_bundles))
