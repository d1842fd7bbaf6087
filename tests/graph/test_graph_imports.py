"""Imports of the graph package: reading a contract loads no onnx, and nothing loads torch."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        (
            "from kvexport.graph import GraphContract, past, present",
            ("onnx", "onnx_ir", "torch", "onnxruntime", "ml_dtypes"),
        ),
        ("from kvexport.graph import DecoderWriter, render", ("torch", "onnxruntime", "transformers")),
        ("from kvexport.graph import as_float32, with_taps", ("torch", "transformers")),
    ],
)
def test_import_does_not_load_heavy_packages(statement: str, absent: tuple[str, ...]) -> None:
    script = f"{statement}; import sys; print([name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_name_is_an_attribute_error() -> None:
    import kvexport.graph

    with pytest.raises(AttributeError, match="nothing_such"):
        _ = kvexport.graph.nothing_such
