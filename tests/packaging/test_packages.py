"""`kvexport.packages` and setup.cfg name the same packages, extras and minimum versions."""

from __future__ import annotations

import re
from configparser import ConfigParser
from pathlib import Path

import pytest

from kvexport.devices.capabilities import OLDEST_TENSORRT
from kvexport.devices.versions import parse_version
from kvexport.packages import PACKAGES, install_command, package_of

SETUP = Path(__file__).resolve().parents[2] / "setup.cfg"


def requirements() -> dict[str | None, dict[str, str]]:
    """Extra (None: the base install) to its packages with their minimum versions; `%(extra)s` is resolved."""
    config = ConfigParser()
    config.read(SETUP)
    lines = {None: config["options"]["install_requires"], **config["options.extras_require"]}
    parsed: dict[str | None, dict[str, str]] = {}
    for extra, text in lines.items():
        needs = [line for line in text.splitlines() if line and not line.startswith("#")]
        matches = [re.match(r"([\w-]+)(?:\[[\w,]+\])?>=([\d.]+)", line) for line in needs]
        assert all(matches), (extra, needs)
        parsed[extra] = {match[1]: match[2] for match in matches if match is not None}
    return parsed


def test_setup_and_the_table_name_the_same_packages() -> None:
    extras = requirements()
    imported = {name for extra, names in extras.items() if extra not in ("dev", "docs") for name in names}
    assert imported == set(PACKAGES)


@pytest.mark.parametrize("name", PACKAGES)
def test_setup_and_the_table_agree_on_extra_and_minimum(name: str) -> None:
    package, extras = PACKAGES[name], requirements()
    listed = [extra for extra, packages in extras.items() if name in packages]
    assert listed[0] == package.extra
    assert {extras[extra][name] for extra in listed} == {package.minimum}


def test_the_minimum_of_tensorrt_is_the_oldest_with_capabilities() -> None:
    assert parse_version(PACKAGES["tensorrt"].minimum) == OLDEST_TENSORRT


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch", "torch"),
        ("onnx_ir", "onnx-ir"),
        ("cuda.bindings.runtime", "cuda-bindings"),
        ("onnxruntime", "onnxruntime"),
        ("tensorrt_rtx", "tensorrt-rtx"),
    ],
)
def test_finds_the_package_of_a_module(module: str, name: str) -> None:
    assert package_of(module) == PACKAGES[name]


def test_knows_no_package_of_another_module() -> None:
    assert package_of("json") is None


@pytest.mark.parametrize(
    ("names", "command"),
    [
        (("torch",), "pip install 'kvexport[convert]'"),
        (("torch", "onnx", "onnxruntime"), "pip install 'kvexport[convert,cpu]'"),
        (("numpy",), "pip install kvexport"),
    ],
)
def test_names_the_command_that_installs(names: tuple[str, ...], command: str) -> None:
    assert install_command(*names) == command
