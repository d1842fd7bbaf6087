"""Run the C++ library's own tests with and without sanitizers; read a file written by C++ in Python."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from builds import environment, require
from engine_bundles import write_engine_bundles
from safetensors import safe_open
from safetensors.numpy import load_file

pytestmark = pytest.mark.slow

Built = Callable[[str], Path]
RUN_ELSEWHERE = "test_text|test_self_test"  # run by test_cpp_text.py and test_cpp_self_test.py


@pytest.fixture(scope="module")
def given(
    reader_files: Path, bundles: Path, full_disk: Path | None, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """Environment variables with the paths of the files that the test programs read."""
    engines = tmp_path_factory.mktemp("engines")
    write_engine_bundles(engines)
    full = {} if full_disk is None else {"KVEXPORT_TEST_FULL_DISK": str(full_disk)}
    written = tmp_path_factory.mktemp("written") / "by_cpp.safetensors"
    return {
        "KVEXPORT_TEST_FILES": str(reader_files),
        "KVEXPORT_TEST_BUNDLES": str(bundles),
        "KVEXPORT_TEST_ENGINES": str(engines),
        "KVEXPORT_TEST_WRITE": str(written),
        **full,
    }


@pytest.fixture(scope="module")
def full_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path | None]:
    """A file system of one megabyte; None if it cannot be mounted."""
    folder = tmp_path_factory.mktemp("disk")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)], capture_output=True
    )
    yield folder if mounted.returncode == 0 else None
    if mounted.returncode == 0:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("kind", ["sanitized", "release"])
def test_ctest_passes(kind: str, built: Built, given: dict[str, str]) -> None:
    folder = built(kind)
    output = require(
        "ctest",
        "--test-dir",
        folder,
        "-E",
        RUN_ELSEWHERE,
        "--output-on-failure",
        "--verbose",
        env=environment(**given),
    )
    skipped = [line for line in output.splitlines() if ": skipped " in line]
    allowed = ("KVEXPORT_TEST_FULL_DISK is not set", "root may read everything")
    assert all(line.endswith(allowed) for line in skipped), skipped
    assert "100% tests passed" in output and "Skipped" not in output


def test_python_reads_safetensors_of_cpp(built: Built, given: dict[str, str]) -> None:
    require(
        built("release") / "tests" / "test_safetensors", "writes_a_file_for_python", env=environment(**given)
    )
    path = Path(given["KVEXPORT_TEST_WRITE"])
    tensors = load_file(path)
    assert (
        tensors["past.0.key"].tolist() == [[[0, 1, 2], [3, 4, 5]]]
        and tensors["past.0.key"].dtype == "float32"
    )
    assert tensors["past.0.value"].tolist() == [[0.5, -2.0]] and tensors["past.0.value"].dtype == "float16"
    assert tensors["none"].shape == (0, 4)
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    content = path.read_bytes()
    data = content[8 + int.from_bytes(content[:8], "little") :]
    assert metadata == {
        "kvexport": "test",
        "state": '{"sha256":"0", "x": "é"}',
        "sha256": hashlib.sha256(data).hexdigest(),
    }
