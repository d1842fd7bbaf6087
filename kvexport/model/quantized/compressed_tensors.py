"""Integers of compressed-tensors, as llm-compressor writes them.

    pack-quantized   weight_packed      int32 [out, in · bits / 32], numbers plus 2^(bits - 1)
                     weight_scale       [out, groups], or one number
                     weight_zero_point  int32 [out · bits / 32, groups], packed along the outputs
                     weight_g_idx       int32 [in], the group of each input, with act-order
    int-quantized    weight             int8 [out, in]
                     weight_scale       [out, groups], or one number
                     weight_zero_point  int8 [out, groups]

(compressed_tensors/compressors/pack_quantized and naive_quantized). Zero points are stored where the weights
are asymmetric. Scales of activations and of a KV cache are ignored: a bundle computes in floats.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvexport.errors import CheckpointError
from kvexport.model.config import shown
from kvexport.model.quantized.integers import IntegerWeight, centred, unpack
from kvexport.model.quantized.stored_format import (
    READABLE,
    UNQUANTISED,
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

_FORMATS = ("pack-quantized", "int-quantized", "naive-quantized", "mixed-precision")


class CompressedTensors(StoredFormat):
    """The integer formats of compressed-tensors."""

    MARKERS = (".weight_packed", ".weight_scale")
    PARTS = (
        ".weight",
        ".weight_packed",
        ".weight_scale",
        ".weight_shape",
        ".weight_zero_point",
        ".weight_g_idx",
        ".input_scale",
        ".input_zero_point",
        ".output_scale",
        ".output_zero_point",
    )
    IGNORED = (".k_scale", ".v_scale", ".k_zero_point", ".v_zero_point")

    def __init__(self, bits: int, group_size: int | None) -> None:
        """
        Args:
            bits: of the first group of modules in quantization_config.
            group_size: inputs that share a scale in it; None: all of them.
        """
        self.name = format_name("compressed-tensors", bits, group_size, "one scale a row")
        self.block = group_size

    @classmethod
    def from_config(cls, values: Mapping[str, Any]) -> CompressedTensors:
        """The format that quantization_config describes, with quant_method "compressed-tensors".

        Raises:
            CheckpointError: weights are not integers, or a setting is not supported.
        """
        settings = Settings(values)
        _require_known(settings.text("format") or "pack-quantized")
        for key in ("sparsity_config", "transform_config"):
            _require_no_changes(key, settings.table(key))
        found: list[tuple[int, int | None]] = []
        for name, group in settings.table("config_groups").items():
            inside = Settings({name: group}).table(name)
            _require_known(Settings(inside, name).text("format") or "pack-quantized")
            weights = Settings(inside, name).table("weights")
            if weights:
                found.append(_integers(Settings(weights, f"{name}.weights")))
        if not found:
            raise CheckpointError(
                "quantization_config of config.json must describe weights in config_groups",
                got=shown(values.get("config_groups")),
                fix=UNQUANTISED,
            )
        return cls(*found[0])

    def read(self, get: Get, module: str, shape: tuple[int, int]) -> IntegerWeight:
        out, width = shape
        packed = get(f"{module}.weight_packed")
        if packed is None:
            integers, bits = _plain_integers(get, module, shape), 8
        else:
            packed = tensor(get, f"{module}.weight_packed", integer=True)
            bits = packed_bits(f"{module}.weight_packed", packed.shape[-1], width)
            require_shape(f"{module}.weight_packed", packed, (out, -(-width * bits // 32)))
            integers = centred(unpack(packed, bits)[:, :width].contiguous(), bits)
        name = f"{module}.weight_scale"
        scales = tensor(get, name)
        if scales.numel() == 1:  # one scale for the whole weight
            scales = scales.reshape(1, 1).expand(out, 1)
        require_groups(name, scales, out, width)
        count = scales.shape[1]
        index = f"{module}.weight_g_idx"
        groups = column_groups(get(index), index, width, count, self.block if count > 1 else None)
        zeros = _zeros(get(f"{module}.weight_zero_point"), module, bits, (out, count))
        return IntegerWeight(integers, scales, zeros, groups, bits)


def _require_known(name: str) -> None:
    """
    Raises:
        CheckpointError: a format of compressed-tensors is not read.
    """
    if name not in _FORMATS:
        raise CheckpointError(
            "the quantised weights of the checkpoint must be in a format that can be read",
            got=f"the format {shown(name)} of compressed-tensors",
            expected=READABLE,
            fix=UNQUANTISED,
        )


def _require_no_changes(key: str, values: Mapping[str, Any]) -> None:
    """Check that weights are neither sparse nor rotated."""
    if key == "sparsity_config" and values.get("format", "dense") in ("dense", None):
        return
    if key == "transform_config" and not values.get("config_groups"):
        return
    raise CheckpointError(
        f"{key} in quantization_config of config.json must be absent",
        got=shown(values),
        fix=UNQUANTISED,
    )


def _integers(settings: Settings) -> tuple[int, int | None]:
    """Bits and columns of a group.

    Raises:
        CheckpointError: weights are floats, or a setting is not supported.
    """
    if settings.text("type") == "float":
        raise CheckpointError(
            "the quantised weights of the checkpoint must be in a format that can be read",
            got="floats of 8 or 4 bits (compressed-tensors with type float: FP8, NVFP4, MXFP4)",
            expected=READABLE,
            fix=UNQUANTISED,
        )
    settings.choice(("strategy",), "channel", "group", "channel", "tensor")
    return settings.bits("num_bits"), settings.group_size("group_size")


def _plain_integers(get: Get, module: str, shape: tuple[int, int]) -> Tensor:
    """The integers of a weight that is not packed, int8 [out, in]."""
    import torch

    found, name = get(f"{module}.weight"), f"{module}.weight"
    if found is None or found.dtype != torch.int8:
        raise CheckpointError(
            f"tensor {name} must have the data type of its format",
            got="no such tensor" if found is None else str(found.dtype).removeprefix("torch."),
            expected="int8, because it has a weight_scale",
            fix=UNQUANTISED,
        )
    require_shape(name, found, shape)
    return found


def _zeros(stored: Tensor | None, module: str, bits: int, shape: tuple[int, int]) -> Tensor | None:
    """Zero points less 2^(bits - 1), int16 [out, groups]; None: all 0."""
    import torch

    if stored is None:
        return None
    out, count = shape
    if stored.numel() == 1:
        stored = stored.reshape(1, 1).expand(out, 1)
    name = f"{module}.weight_zero_point"
    if stored.dtype == torch.int32 and tuple(stored.shape) == (-(-out * bits // 32), count):
        return centred(unpack(stored.T, bits)[:, :out].T.contiguous(), bits).short()
    require_shape(name, stored, shape)
    return stored.short()
