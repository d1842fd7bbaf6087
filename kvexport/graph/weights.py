"""The external data file: weights are converted and appended block by block, and none stays in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from kvexport.bundle.formats import PAGE
from kvexport.errors import UsageError

NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

_CACHE_LINE = 64  # bytes of a cache line, for aligned vector loads
_BLOCK = 1 << 24  # bytes of the source array converted at a time


def largest_number(dtype: str) -> float:
    """The largest finite number of a dtype."""
    return float(ir.DataType.from_numpy(NUMPY_DTYPES[dtype]).max)


class WeightFile:
    """Append tensors to one file, each aligned to a page, or to a cache line if it is smaller than a page."""

    def __init__(self, path: Path, dtype: str) -> None:
        self._path, self._dtype = path, dtype
        self._path.write_bytes(b"")

    def append(self, name: str, values: NDArray[Any]) -> ir.ExternalTensor:
        """Write an array of floats in C order, rounded to the file's dtype.

        Returns:
            the tensor's name, shape, dtype and place in the file.

        Raises:
            UsageError: a number is not finite, or too large for the dtype.
            OSError: the disk is full.
        """
        target = NUMPY_DTYPES[self._dtype]
        length = values.size * target.itemsize
        with self._path.open("ab") as file:
            offset = _aligned(file, length)
            rows = max(1, _BLOCK // max(1, values[:1].nbytes))
            for start in range(0, len(values), rows):
                block = values[start : start + rows]
                self._require_representable(name, block)
                file.write(np.ascontiguousarray(block, dtype=target).view(np.uint8).data)
        return self._tensor(name, offset, length, ir.DataType.from_numpy(target), values.shape)

    def append_integers(self, name: str, values: NDArray[np.int8], bits: int) -> ir.ExternalTensor:
        """Write an array of integers in C order: INT8, or INT4 with two numbers a byte, the first one low.

        Args:
            name: of the tensor.
            values: int8; with 4 bits from -8 to 7, and the length of the last axis is even.
            bits: 8 or 4.

        Raises:
            OSError: the disk is full.
        """
        assert bits == 8 or values.shape[-1] % 2 == 0
        with self._path.open("ab") as file:
            offset = _aligned(file, values.size * bits // 8)
            rows = max(1, _BLOCK // max(1, values[:1].nbytes))
            for start in range(0, len(values), rows):
                block = np.ascontiguousarray(values[start : start + rows]).view(np.uint8)
                file.write((block if bits == 8 else block[..., ::2] & 15 | block[..., 1::2] << 4).data)
        dtype = ir.DataType.INT4 if bits == 4 else ir.DataType.INT8
        return self._tensor(name, offset, values.size * bits // 8, dtype, values.shape)

    def _tensor(
        self, name: str, offset: int, length: int, dtype: ir.DataType, shape: tuple[int, ...]
    ) -> ir.ExternalTensor:
        return ir.ExternalTensor(
            self._path.name,
            offset,
            length,
            dtype,
            shape=ir.Shape(shape),
            name=name,
            base_dir=self._path.parent,
        )

    def _require_representable(self, name: str, block: NDArray[Any]) -> None:
        limit = largest_number(self._dtype)
        low, high = float(block.min()), float(block.max())
        if -limit <= low and high <= limit:  # false for NaN, too
            return
        if not np.isfinite(block).all():
            raise UsageError(
                f"tensor {name} must be finite", got="NaN or infinity", fix="use an undamaged checkpoint"
            )
        raise UsageError(
            f"tensor {name} must fit {self._dtype}",
            got=f"numbers from {low:g} to {high:g}",
            expected=f"numbers from -{limit:g} to {limit:g}",
            fix="use --dtype bfloat16 or --dtype float32",
        )


def _aligned(file: BinaryIO, length: int) -> int:
    """Pad an open file to where a tensor of `length` bytes may begin, and return that offset."""
    align = PAGE if length >= PAGE else _CACHE_LINE
    offset = -(-file.tell() // align) * align
    file.write(bytes(offset - file.tell()))
    return offset
