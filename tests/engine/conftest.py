"""Fixtures for tests of the engine builder: tiny bundles, and TensorRT-RTX."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.decoders import make_decoder
from support.tiny_bundles import write_bundle


@pytest.fixture(scope="session")
def rtx() -> Any:
    """TensorRT-RTX; tests that use it are skipped if it is not installed."""
    pytest.importorskip("tensorrt_rtx")
    from kvexport.engine.library import load_library

    return load_library("tensorrt-rtx")


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a bundle of two layers with four heads of 16."""

    def make(style: str = "llama", *, dtype: str = "float16", capacity: int = 64, **sizes: Any) -> Path:
        decoder = make_decoder(style, dtype=torch.float32, **{"head_dim": 16, **sizes})
        return write_bundle(tmp_path / "bundle", decoder, dtype=dtype, capacity=capacity)

    return make
