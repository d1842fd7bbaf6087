"""Bound caches are written in place; ONNX Runtime warns if it copies a cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from support.graph_decoders import BLOOM, LLAMA, Shape, Style, make_decoder, slopes_of, write

from kvexport.graph import GRAPH_FILE, GraphContract


def _steps(
    session: onnxruntime.InferenceSession, contract: GraphContract, bound: bool
) -> list[tuple[int, int]]:
    """Run three single-token steps; the number of slots written in each buffer."""
    sizes = {"batch": 1, "capacity": 8}
    caches = {
        spec.name: onnxruntime.OrtValue.ortvalue_from_numpy(
            np.zeros([sizes[size] if isinstance(size, str) else size for size in spec.shape], spec.dtype)
        )
        for spec in contract.inputs
        if spec.name.startswith("past")
    }
    for step in range(3):
        tokens = {
            "input_ids": np.array([[step]]),
            "position_ids": np.array([[step]]),
            "write_indices": np.array([step]),
            "logits_index": np.array([[0]]),
        }
        binding = session.io_binding()
        for name, value in tokens.items():
            binding.bind_cpu_input(name, value)
        for name, cache in caches.items():
            binding.bind_ortvalue_input(name, cache)
            if bound:
                binding.bind_ortvalue_output(name.replace("past_key_values", "present"), cache)
            else:
                binding.bind_output(name.replace("past_key_values", "present"))
        binding.bind_output("logits")
        session.run_with_iobinding(binding)
    return [np.count_nonzero(cache.numpy().any(axis=(1, 3))) for cache in caches.values()]


@pytest.mark.parametrize("style", [LLAMA, BLOOM], ids=["llama", "bloom"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_bound_caches_are_written_in_place(
    style: Style, dtype: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shape = Shape(slopes=slopes_of(4)) if style is BLOOM else Shape(kv_heads=2, group=2, key_dim=8)
    contract = write(make_decoder([shape] * 2, style), tmp_path, dtype)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 2  # warnings
    session = onnxruntime.InferenceSession(tmp_path / GRAPH_FILE, options, providers=["CPUExecutionProvider"])
    capfd.readouterr()
    assert _steps(session, contract, bound=True) == [3] * 4  # three slots written in each buffer
    assert "tensorscatter" not in capfd.readouterr().err
    assert _steps(session, contract, bound=False) == [0] * 4
    assert capfd.readouterr().err.count("tensorscatter.cc") == 3 * 4
