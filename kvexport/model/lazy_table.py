"""Large tables of embeddings and heads, which are not held in memory as floats.

The table of 128,256 tokens of 4,096 numbers takes 2.1 GB in float32. A model uses it in two ways: it takes
some rows, and it multiplies all rows with its last hidden state. A `LazyTable` is a tensor that does these
with few rows in memory at a time. Any other operation first makes the whole table; the address of its numbers
is refused, because they have none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map

_HELD_BYTES = 1 << 27  # a larger table is not held in memory
_PART_BYTES = 1 << 26  # of the rows that are made at a time

Rows: TypeAlias = slice | Tensor
_PROPERTIES: tuple[Any, ...] = (Tensor.shape, Tensor.dtype, Tensor.device, Tensor.ndim, Tensor.requires_grad)
_METADATA = {  # what is known without the rows
    *(each.__get__ for each in _PROPERTIES),
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.__len__,
    Tensor.is_floating_point,
    Tensor.element_size,
}

_ADDRESSES = {Tensor.data_ptr, Tensor.storage, Tensor.untyped_storage}


def is_large(shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether a table is to be lazy."""
    return math.prod(shape) * dtype.itemsize > _HELD_BYTES


class LazyTable(Tensor):
    """A table [rows, width] on the CPU whose rows are made at each use and not kept."""

    _read: Callable[[Rows], Tensor]

    @staticmethod
    def __new__(cls, read: Callable[[Rows], Tensor], shape: tuple[int, int], dtype: torch.dtype) -> LazyTable:
        """
        Args:
            read: returns rows [n, width] in `dtype`, of a slice of consecutive ones or of indices [n] int64.
            shape: of the table.
            dtype: of the table.
        """
        table: LazyTable = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=torch.device("cpu")
        )
        table._read = read
        return table

    def whole(self) -> Tensor:
        """The whole table, a plain tensor."""
        return self._read(slice(0, self.shape[0]))

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _ADDRESSES:
            raise RuntimeError("a LazyTable has no memory of its own: call contiguous() first")
        if func in _LAZY and isinstance(args[1] if len(args) > 1 else kwargs.get("weight"), cls):
            return _LAZY[func](*args, **kwargs)
        if func is Tensor.__getitem__ and isinstance(args[1], slice) and args[1].step in (None, 1):
            return args[0]._read(slice(*args[1].indices(args[0].shape[0])))
        if func is Tensor.detach or (func is Tensor.to and _is_there(*args, **kwargs)):
            return args[0]
        return _with_whole_tables(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _with_whole_tables(func, args, kwargs or {})


def row_parts(table: Tensor) -> Iterator[Tensor]:
    """The table [rows, width] in parts of consecutive rows of bounded size, first rows first."""
    rows = max(1, _PART_BYTES // max(1, table.shape[1] * table.element_size()))
    return (table[start : start + rows] for start in range(0, table.shape[0], rows))


def _with_whole_tables(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    def made(each: Any) -> Any:
        return each.whole() if isinstance(each, LazyTable) else each

    return func(*tree_map(made, args), **tree_map(made, kwargs))


def _rows(
    input: Tensor,
    weight: LazyTable,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    **others: Any,
) -> Tensor:
    """`F.embedding`; what else it takes has no effect without `max_norm` and gradients of the table."""
    if max_norm is not None:  # it scales the rows in place
        return F.embedding(input, weight.whole(), padding_idx, max_norm, **others)
    if input.numel() and not 0 <= int(input.min()) <= int(input.max()) < len(weight):
        raise IndexError("index out of range in self")  # as torch
    return weight._read(input.flatten()).unflatten(0, input.shape)


def _product(input: Tensor, weight: LazyTable, bias: Tensor | None = None) -> Tensor:
    """`F.linear`."""
    found = torch.cat([F.linear(input, part) for part in row_parts(weight)], -1)
    return found if bias is None else found + bias


_LAZY: dict[Any, Callable[..., Tensor]] = {F.embedding: _rows, F.linear: _product}


def _is_there(table: Tensor, *args: Any, **kwargs: Any) -> bool:
    """Whether `table.to(...)` would return the table itself."""
    device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
    copies = kwargs.get("copy", False)
    return not copies and dtype in (None, table.dtype) and (device is None or device.type == "cpu")
