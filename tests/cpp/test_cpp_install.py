"""The installed library in an application: find_package from a moved tree, without further packages."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from builds import CPP, environment, onnxruntime, require, run

pytestmark = pytest.mark.slow

Built = Callable[[str], Path]

_PROJECT = """
cmake_minimum_required(VERSION 3.22)
project(application LANGUAGES C CXX)
find_package(kvexport 0.1 REQUIRED)
add_executable(application main.cpp)
target_link_libraries(application PRIVATE kvexport::kvexport)
add_executable(in_c main.c)
target_link_libraries(in_c PRIVATE kvexport::kvexport)
set_target_properties(in_c PROPERTIES C_STANDARD 99 C_EXTENSIONS OFF)
target_compile_options(in_c PRIVATE -Wall -Wextra -Wpedantic -Werror)
"""
_CPP = """
#include <kvexport/kvexport.hpp>

#include <iostream>

int main(int, char** names) {
  kvexport::OpenOptions options;
  options.text_library = "";
  kvexport::Session session(names[1], options);
  kvexport::Cache cache = session.new_cache(32);
  std::cout << kvexport_version() << " " << cache.prefill({1, 2, 3}).likeliest() << " "
            << cache.bytes() << std::endl;
}
"""
_C = """
#include <kvexport/kvexport.h>
#include <stdio.h>
int main(int count, char** names) {
  kvexport_session* session = NULL;
  kvexport_error* error = kvexport_open(count > 1 ? names[1] : "nowhere", NULL, &session);
  if (error) puts(kvexport_error_part(error, KVEXPORT_FAILED));
  kvexport_error_free(error);
  kvexport_close(session);
  return 0;
}
"""
_HIDDEN = ("nlohmann_json", "OpenSSL", "OnnxRuntime", "TensorRT")


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An installed tree that was moved to another directory."""
    first = tmp_path_factory.mktemp("first") / "tree"
    require("cmake", "--install", built("release"), "--prefix", first)
    return Path(shutil.move(first, tmp_path_factory.mktemp("moved here") / "tree"))


def application(folder: Path, tree: Path, *options: str) -> Path:
    """Build a small application against an installed tree; returns its build directory."""
    source = folder / "source"
    source.mkdir()
    for name, content in {"CMakeLists.txt": _PROJECT, "main.cpp": _CPP, "main.c": _C}.items():
        (source / name).write_text(content)
    made = folder / "made"
    require("cmake", "-S", source, "-B", made, "-G", "Ninja", f"-DCMAKE_PREFIX_PATH={tree}", *options)
    require("cmake", "--build", made)
    return made


def test_an_application_needs_no_other_packages(installed: Path, reader_files: Path, tmp_path: Path) -> None:
    made = application(tmp_path, installed, *(f"-DCMAKE_DISABLE_FIND_PACKAGE_{name}=ON" for name in _HIDDEN))
    version, token, size = require(made / "application", reader_files / "tiny", env=environment()).split()
    assert version == "0.1.0" and 0 <= int(token) < 40 and int(size) >= 2 * 2 * 2 * 8 * 32 * 4
    assert require(made / "in_c", "/nowhere").startswith("/nowhere must be a bundle")


def test_the_package_has_no_absolute_paths(installed: Path) -> None:
    files = [file for file in installed.rglob("*") if file.suffix in (".cmake", ".h", ".hpp")]
    assert len(files) >= 5
    for file in files:
        for path in (CPP.parent, Path.home(), Path("/tmp")):
            assert f"{path}/" not in file.read_text(), file


def test_the_public_headers_are_installed_and_short(installed: Path) -> None:
    assert sorted(file.name for file in (installed / "include" / "kvexport").iterdir()) == [
        "kvexport.h",
        "kvexport.hpp",
        "kvexport_inline.hpp",
    ]
    assert len((installed / "include" / "kvexport" / "kvexport.hpp").read_text().splitlines()) < 200


def test_the_self_test_program_runs_in_a_moved_tree(installed: Path) -> None:
    ran = run(installed / "bin" / "kvexport_self_test", "/nowhere")
    assert ran.returncode == 2 and "/nowhere must be a bundle" in ran.stderr


def test_an_application_links_the_static_library(built: Built, reader_files: Path, tmp_path: Path) -> None:
    built("release")  # fills the compiler cache
    root = f"-DONNXRUNTIME_ROOT={onnxruntime()}"
    launcher = ("-DCMAKE_CXX_COMPILER_LAUNCHER=ccache",) if shutil.which("ccache") else ()
    options = (
        "-DBUILD_SHARED_LIBS=OFF",
        "-DKVEXPORT_BUILD_TESTS=OFF",
        "-DKVEXPORT_BUILD_EXAMPLES=OFF",
        "-DKVEXPORT_WARNINGS=ON",
    )
    require("cmake", "-S", CPP, "-B", tmp_path / "static", "-G", "Ninja", root, *options, *launcher)
    require("cmake", "--build", tmp_path / "static", "-j", str(os.cpu_count()))
    require("cmake", "--install", tmp_path / "static", "--prefix", tmp_path / "tree")
    made = application(tmp_path, tmp_path / "tree", root)
    assert require(made / "application", reader_files / "tiny", env=environment()).startswith("0.1.0 ")


def test_missing_dependencies_are_reported(tmp_path: Path) -> None:
    for options, message in (
        (["-DONNXRUNTIME_ROOT=/nowhere"], "pass -DONNXRUNTIME_ROOT=FOLDER"),
        ([f"-DONNXRUNTIME_ROOT={onnxruntime()}", "-DKVEXPORT_TENSORRT=ON"], "Pass -DTENSORRT_ROOT=FOLDER"),
        (
            [f"-DONNXRUNTIME_ROOT={onnxruntime()}", "-DKVEXPORT_FUZZ=ON", "-DCMAKE_CXX_COMPILER=g++"],
            "libFuzzer requires Clang",
        ),
    ):
        ran = run("cmake", "-S", CPP, "-B", tmp_path / str(len(message)), "-G", "Ninja", *options)
        assert ran.returncode != 0 and message in " ".join(ran.stderr.split()), ran.stderr
