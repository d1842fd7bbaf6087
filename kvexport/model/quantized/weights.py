"""The quantised weights of one checkpoint, read lazily."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from kvexport.model.quantized.integers import IntegerWeight
from kvexport.model.quantized.stored_format import Get, StoredFormat

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kvexport.model.decoder import WeightCodes


class QuantizedWeights:
    """Finds the quantised weights among the tensors of a checkpoint, and reads them.

    Attributes:
        names: names of all tensors, those of a quantised weight replaced by the name of the weight.
    """

    def __init__(self, form: StoredFormat | None, stored: Collection[str], get: Get) -> None:
        """
        Args:
            form: their format; None: all weights are floats.
            stored: names of all tensors.
            get: reads a stored tensor.
        """
        self._form, self._get = form, get
        modules: set[str] = set() if form is None else form.modules(stored)
        self._weights = {f"{module}.weight" for module in modules}
        self.names = frozenset(stored if form is None else form.weight_names(stored))
        self._last: tuple[str, IntegerWeight] | None = None  # codes are read after floats

    def __contains__(self, name: object) -> bool:
        return name in self._weights

    def floats(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A quantised weight [out, in], dequantised.

        Raises:
            CheckpointError: a part of it is missing, or does not fit the shape.
        """
        return self._integers(name, shape).floats(dtype)

    def codes(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> WeightCodes | str | None:
        """Codes of a weight [out, in]; a text: why it has none; None: the checkpoint has it in floats.

        Raises:
            CheckpointError: as for `floats`.
        """
        return self._integers(name, shape).codes(dtype) if name in self else None

    def is_empty_bias(self, name: str) -> bool:
        """Whether a tensor is a bias of zeros, which old programs store with every quantised weight."""
        if not name.endswith(".bias") or f"{name.removesuffix('.bias')}.weight" not in self:
            return False
        bias = self._get(name)
        return bias is not None and not bool(bias.any())

    def forget(self) -> None:
        """Free the weight that was read last."""
        self._last = None

    def _integers(self, name: str, shape: tuple[int, ...]) -> IntegerWeight:
        assert self._form is not None
        if self._last is None or self._last[0] != name:
            out, width = shape
            self._last = name, self._form.read(self._get, name.removesuffix(".weight"), (out, width))
        return self._last[1]
