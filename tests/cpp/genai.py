"""Finds the text library of the C++ runtime in an installed Python package."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

_FOLDERS = {
    "onnxruntime_genai_core": "bin",
    "onnxruntime_genai": ".",
}  # the library only; the library with Python bindings


def genai_library() -> Path:
    """Path of libonnxruntime-genai.so. If there is none, the test is skipped; in CI it fails."""
    for package, folder in _FOLDERS.items():
        spec = importlib.util.find_spec(package)
        found = (
            None
            if spec is None or spec.origin is None
            else Path(spec.origin).parent / folder / "libonnxruntime-genai.so"
        )
        if found is not None and found.is_file():
            return found.resolve()
    reason = "libonnxruntime-genai.so is missing (pip install onnxruntime-genai-core)"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
