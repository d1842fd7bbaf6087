"""The library that gives C++ its text, as a Python package brings it."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

_PLACES = {
    "onnxruntime_genai_core": "bin",
    "onnxruntime_genai": ".",
}  # the library alone; with Python around it


def genai_library() -> Path:
    """libonnxruntime-genai.so. Without one the test is skipped, where CI is set it fails."""
    for package, folder in _PLACES.items():
        spec = importlib.util.find_spec(package)
        found = (
            None
            if spec is None or spec.origin is None
            else Path(spec.origin).parent / folder / "libonnxruntime-genai.so"
        )
        if found is not None and found.is_file():
            return found.resolve()
    reason = "there is no libonnxruntime-genai.so here (pip install onnxruntime-genai-core)"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
