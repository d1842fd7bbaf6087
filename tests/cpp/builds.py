"""Builds of the C++ library for tests, in directories that later sessions reuse."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CPP = ROOT / "cpp"
FOLDER = ROOT / "build" / "tests"  # git-ignored
KINDS: dict[str, tuple[str, ...]] = {
    "sanitized": (
        "-DCMAKE_BUILD_TYPE=Debug",
        "-DCMAKE_CXX_FLAGS_DEBUG=-O1 -g1",
        "-DKVEXPORT_SANITIZE=address;undefined",
    ),
    "release": ("-DCMAKE_BUILD_TYPE=Release",),
    "fuzz": (
        "-DCMAKE_BUILD_TYPE=Debug",
        "-DCMAKE_CXX_FLAGS_DEBUG=-O1 -g1",
        "-DKVEXPORT_SANITIZE=address;undefined",
        "-DCMAKE_C_COMPILER=clang",
        "-DCMAKE_CXX_COMPILER=clang++",
        "-DKVEXPORT_FUZZ=ON",
        "-DKVEXPORT_BUILD_TESTS=OFF",
        "-DKVEXPORT_BUILD_EXAMPLES=OFF",
    ),
    "aarch64": (
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DCMAKE_TOOLCHAIN_FILE={CPP / 'cmake' / 'aarch64.cmake'}",
        f"-DAARCH64_ROOT={ROOT / 'build' / 'aarch64'}",
        "-DOPENSSL_USE_STATIC_LIBS=ON",
        "-DKVEXPORT_BUILD_EXAMPLES=OFF",
    ),
}
# What tests run of a build; by default all.
TARGETS = {"fuzz": ("fuzzers",), "aarch64": ("kvexport_drive", "kvexport_self_test")}
_HEADERS = "#include <nlohmann/json.hpp>\n#include <openssl/evp.h>\n"
_INSTALL = "apt-get install cmake ninja-build g++ nlohmann-json3-dev libssl-dev"


@cache
def build(kind: str) -> Path:
    """The directory of an up-to-date build of one of `KINDS`.

    If a compiler or a library is missing, the test is skipped; in CI it fails.
    """
    for tool in ("cmake", "ninja", "clang++" if kind == "fuzz" else "c++"):
        if shutil.which(tool) is None:
            _skip_or_fail(f"{tool} is missing ({_INSTALL}{' clang' if kind == 'fuzz' else ''})")
    probe = subprocess.run(
        ["c++", "-std=c++17", "-E", "-x", "c++", "-"], input=_HEADERS, capture_output=True, text=True
    )
    if probe.returncode:
        _skip_or_fail(f"headers are missing ({_INSTALL}): {probe.stderr.splitlines()[0]}")
    folder = FOLDER / kind
    with _build_lock():
        runtime = () if kind == "aarch64" else (f"-DONNXRUNTIME_ROOT={onnxruntime()}",)
        if not (folder / "build.ninja").is_file():
            launcher = ("-DCMAKE_CXX_COMPILER_LAUNCHER=ccache",) if shutil.which("ccache") else ()
            options = [*KINDS[kind], *launcher, "-DKVEXPORT_WARNINGS=ON", *runtime]
            require("cmake", "-S", CPP, "-B", folder, "-G", "Ninja", *options)
        targets = ("--target", *TARGETS[kind]) if kind in TARGETS else ()
        require("cmake", "--build", folder, "-j", str(os.cpu_count()), *targets)
    return folder


def onnxruntime() -> Path:
    """Directory with the headers and the library of ONNX Runtime."""
    folder = FOLDER / "onnxruntime"
    result = run("bash", CPP / "tools" / "fetch_onnxruntime.sh", folder, sys.executable)
    if result.returncode == 3:
        _skip_or_fail(result.stderr)
    assert result.returncode == 0, result.stderr
    return folder


def require(*command: str | Path, **options: str | Path | dict[str, str]) -> str:
    """Standard output of a command, which must succeed."""
    result = run(*command, **options)
    assert result.returncode == 0, f"{command}\n{result.stdout[-6000:]}\n{result.stderr[-6000:]}"
    return result.stdout


def environment(**more: str) -> dict[str, str]:
    """Environment for programs that may be built with sanitizers: findings end the program."""
    return {**os.environ, "ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": "print_stacktrace=1", **more}


def run(*command: str | Path, **options: str | Path | dict[str, str]) -> subprocess.CompletedProcess[str]:
    words: Sequence[str] = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, **options)  # type: ignore[call-overload,no-any-return]


def _skip_or_fail(reason: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(f"the C++ library cannot be built in CI: {reason}")
    pytest.skip(f"the C++ library cannot be built on this machine: {reason}")


@contextmanager
def _build_lock() -> Iterator[None]:
    """Lets one test session on this machine build at a time."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
