"""GPTQ's tensors: qweight, qzeros, scales, g_idx; AutoRound stores the same.

    qweight  int32 [in · bits / 32, out], packed along the inputs
    qzeros   int32 [groups, out · bits / 32], packed along the outputs; in the format "gptq" less 1
    scales   [groups, out]
    g_idx    int32 [in], the group of each input; with act-order not monotonic

As AutoGPTQ packs them (auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py, `pack`); GPTQModel added the format
"gptq_v2", whose zero points are stored as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvexport.errors import CheckpointError
from kvexport.model.quantized.integers import IntegerWeight, centred, unpack
from kvexport.model.quantized.stored_format import (
    Get,
    Settings,
    StoredFormat,
    column_groups,
    format_name,
    packed_bits,
    require_groups,
    require_shape,
    tensor,
)

if TYPE_CHECKING:
    from torch import Tensor

_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}  # 1 in each number of a word


class GPTQ(StoredFormat):
    """The format of GPTQ and of AutoRound."""

    MARKERS = (".qweight",)
    PARTS = (".qweight", ".qzeros", ".scales", ".g_idx")

    def __init__(
        self, name: str, bits: int, group_size: int | None, symmetric: bool | None, *, less_one: bool
    ) -> None:
        """
        Args:
            name: of the program.
            bits: bits of most weights.
            group_size: inputs that share a scale; None: all of them.
            symmetric: whether all zero points are 2^(bits - 1); None: config.json does not say it for all.
            less_one: whether zero points are stored less 1.
        """
        self.name = format_name(name, bits, group_size)
        self.block = group_size
        self._symmetric, self._less_one = symmetric, less_one

    @classmethod
    def from_config(cls, values: Mapping[str, Any]) -> GPTQ:
        """The format that quantization_config describes, with quant_method "gptq".

        Raises:
            CheckpointError: a setting is not supported.
        """
        settings = Settings(values)
        layout = settings.choice(("checkpoint_format", "format"), "gptq", "gptq", "gptq_v2")
        if settings.boolean("is_marlin_format"):
            settings.choice(("format",), "marlin", "gptq")
        symmetric = None if settings.table("dynamic") else settings.boolean("sym")
        return cls(
            "GPTQ",
            settings.bits("bits"),
            settings.group_size("group_size"),
            symmetric,
            less_one=layout == "gptq",
        )

    def read(self, get: Get, module: str, shape: tuple[int, int]) -> IntegerWeight:
        out, width = shape
        packed = tensor(get, f"{module}.qweight", integer=True)
        bits = packed_bits(f"{module}.qweight", packed.shape[0], width)
        require_shape(f"{module}.qweight", packed, (width * bits // 32, out))
        scales = tensor(get, f"{module}.scales").T
        require_groups(f"{module}.scales", scales, out, width)
        count = scales.shape[1]
        groups = column_groups(get(f"{module}.g_idx"), f"{module}.g_idx", width, count, self.block)
        zeros = self._zeros(tensor(get, f"{module}.qzeros", integer=True), module, bits, (out, count))
        return IntegerWeight(centred(unpack(packed.T, bits), bits), scales, zeros, groups, bits)

    def _zeros(self, packed: Tensor, module: str, bits: int, shape: tuple[int, int]) -> Tensor:
        """Zero points less 2^(bits - 1), int16 [out, groups]."""
        import torch

        out, count = shape
        require_shape(f"{module}.qzeros", packed, (count, -(-out * bits // 32)))
        # added to whole words, so that the carry of a zero point of 0, stored as -1, is undone
        words = packed + _ONES[bits] if self._less_one else packed
        zeros = centred(unpack(words, bits)[:, :out], bits).to(torch.int16)
        if self._symmetric and bool(zeros.any()):
            middle = 1 << bits - 1
            raise CheckpointError(
                f"the zero points of {module} must be {middle}, because config.json says sym",
                got=", ".join(str(int(each) + middle) for each in zeros.unique()[:4]),
                fix="correct checkpoint_format in quantization_config: gptq stores zero points less 1, and "
                "gptq_v2 as they are; or set sym to false",
            )
        return zeros.T
