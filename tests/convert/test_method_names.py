"""The names and help of the conversion methods: complete, and readable without torch."""

from __future__ import annotations

import subprocess
import sys

from kvexport.convert.method_names import BASELINES, BEST, METHOD_NAMES, method_help
from kvexport.convert.methods import METHODS


def test_names_are_those_of_the_methods() -> None:
    assert (BEST, *METHODS) == METHOD_NAMES
    assert set(BASELINES) <= set(METHODS)


def test_help_names_every_method_and_marks_the_baselines() -> None:
    methods, baselines = method_help().split("Baselines")
    assert all(f"{name}: " in (baselines if name in BASELINES else methods) for name in METHOD_NAMES)


def test_command_line_reads_the_names_without_importing_torch() -> None:
    code = "import sys, kvexport.cli.build, kvexport.cli.compress; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
