"""The external data file: weights go in one after another, converted block by block, and none is kept.

Knows dtypes, byte layout and what a number format can hold; must not know what any weight is for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from kvexport.errors import UsageError

NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

_PAGE = 4096  # what maps files can start at
_LINE = 64  # what vector code reads fastest
_BLOCK = 1 << 24  # bytes of source converted at a time


def largest(dtype: str) -> float:
    """The largest finite number of a dtype."""
    return float(ir.DataType.from_numpy(NUMPY_DTYPES[dtype]).max)


class WeightFile:
    """Appends tensors to one file. Each starts at a page, or at a cache line when smaller than a page."""

    def __init__(self, path: Path, dtype: str) -> None:
        self._path, self._dtype = path, dtype
        self._path.write_bytes(b"")

    def append(self, name: str, values: NDArray[Any]) -> ir.ExternalTensor:
        """Write an array of floats in the file's dtype, C order; nothing of it stays in memory.

        Raises:
            UsageError: a number is not finite, or too large for the dtype.
            OSError: the disk is full.
        """
        target = NUMPY_DTYPES[self._dtype]
        length = values.size * target.itemsize
        with self._path.open("ab") as file:
            offset = -(-file.tell() // (align := _PAGE if length >= _PAGE else _LINE)) * align
            file.write(bytes(offset - file.tell()))
            rows = max(1, _BLOCK // max(1, values[:1].nbytes))
            for start in range(0, len(values), rows):
                block = values[start : start + rows]
                self._refuse_unfit(name, block)
                file.write(np.ascontiguousarray(block, dtype=target).view(np.uint8).data)
        return ir.ExternalTensor(
            self._path.name,
            offset,
            length,
            ir.DataType.from_numpy(target),
            shape=ir.Shape(values.shape),
            name=name,
            base_dir=self._path.parent,
        )

    def _refuse_unfit(self, name: str, block: NDArray[Any]) -> None:
        limit = largest(self._dtype)
        low, high = float(block.min()), float(block.max())
        if -limit <= low and high <= limit:  # false for NaN, too
            return
        if not np.isfinite(block).all():
            raise UsageError(
                f"tensor {name} is not finite", got="NaN or infinity", fix="use a sound checkpoint"
            )
        raise UsageError(
            f"{self._dtype} cannot hold tensor {name}",
            got=f"numbers from {low:g} to {high:g}",
            expected=f"-{limit:g} to {limit:g}",
            fix="use --dtype bfloat16 or --dtype float32",
        )
