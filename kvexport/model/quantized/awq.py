"""AWQ's tensors in the format GEMM: qweight, qzeros, scales.

    qweight  int32 [in, out · 4 / 32], packed along the outputs
    qzeros   int32 [groups, out · 4 / 32], packed along the outputs
    scales   [groups, out]

The eight numbers of a word are those of the outputs 0, 2, 4, 6, 1, 3, 5, 7 (awq/utils/packing_utils.py,
AWQ_ORDER).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvexport.model.quantized.integers import IntegerWeight, centred, unpack
from kvexport.model.quantized.stored_format import (
    Get,
    Settings,
    StoredFormat,
    column_groups,
    format_name,
    require_groups,
    require_shape,
    tensor,
)

if TYPE_CHECKING:
    from torch import Tensor

_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # the place in a word of each of eight outputs
_BITS = 4


class AWQ(StoredFormat):
    """The format GEMM of AWQ, which AutoRound can write, too."""

    MARKERS = (".qweight",)
    PARTS = (".qweight", ".qzeros", ".scales")

    def __init__(self, name: str, group_size: int | None) -> None:
        """
        Args:
            name: of the program.
            group_size: inputs that share a scale; None: all of them.
        """
        self.name = format_name(name, _BITS, group_size)
        self.block = group_size

    @classmethod
    def from_config(cls, values: Mapping[str, Any]) -> AWQ:
        """The format that quantization_config describes, with quant_method "awq".

        Raises:
            CheckpointError: a setting is not supported.
        """
        settings = Settings(values)
        settings.choice(("version", "format"), "gemm", "gemm")
        return cls.of_settings("AWQ", settings)

    @classmethod
    def of_settings(cls, name: str, settings: Settings) -> AWQ:
        """The format with the bits and groups of the settings, written by the program `name`."""
        key = "bits" if settings.has("bits") else "w_bit"
        settings.bits(key, _BITS)
        return cls(name, settings.group_size("group_size" if settings.has("group_size") else "q_group_size"))

    def read(self, get: Get, module: str, shape: tuple[int, int]) -> IntegerWeight:
        out, width = shape
        packed = tensor(get, f"{module}.qweight", integer=True)
        require_shape(f"{module}.qweight", packed, (width, -(-out * _BITS // 32)))
        scales = tensor(get, f"{module}.scales").T
        require_groups(f"{module}.scales", scales, out, width)
        count = scales.shape[1]
        groups = column_groups(None, f"{module}.scales", width, count, self.block)
        zeros = tensor(get, f"{module}.qzeros", integer=True)
        require_shape(f"{module}.qzeros", zeros, (count, packed.shape[1]))
        return IntegerWeight(_in_order(packed, out), scales, _in_order(zeros, out).short(), groups, _BITS)


def _in_order(packed: Tensor, out: int) -> Tensor:
    """Packed numbers [rows, out / 8] less 8, int8 [out, rows]."""
    numbers = unpack(packed, _BITS).unflatten(1, (-1, 8))[:, :, list(_PLACES)].flatten(1)
    return centred(numbers[:, :out].T.contiguous(), _BITS)
