"""Checkpoints with quantised weights, each beside the same model in floats.

GPTQ and AWQ are packed here as their programs do: AutoGPTQ, auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py,
`pack`; AutoAWQ, awq/modules/linear/gemm.py, `from_linear` (order of a word: 0, 2, 4, 6, 1, 3, 5, 7).
compressed-tensors packs with the library itself.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

# of a small model whose linear maps all have blocks of 64
SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "vocab_size": 68}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
Pack = Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor]]  # module, weight: its tensors, its floats


@dataclass(frozen=True)
class Integers:
    """A weight [out, in] rounded to unsigned integers q, w = (q - z) · s of the column's group."""

    q: Tensor  # int64 [out, in]
    zeros: Tensor  # int64 [out, groups]
    scales: Tensor  # [out, groups]
    groups: Tensor  # int64 [in]

    @property
    def floats(self) -> Tensor:
        """The weight in float32."""
        return (self.q - self.zeros[:, self.groups]).float() * self.scales.float()[:, self.groups]


def rounded(
    weight: Tensor,
    bits: int = 4,
    group: int = 32,
    *,
    symmetric: bool = True,
    order: Tensor | None = None,
    dtype: torch.dtype = torch.float16,
) -> Integers:
    """Round to nearest in groups of columns, in the given order of columns (act-order) or as they are."""
    width = weight.shape[1]
    group = width if group == -1 else group
    order = torch.arange(width) if order is None else order
    groups = torch.empty(width, dtype=torch.int64)
    groups[order] = torch.arange(width) // group
    blocks = weight[:, order].unflatten(1, (-1, group)).float()
    middle, most = 1 << bits - 1, (1 << bits) - 1
    if symmetric:
        scales = (blocks.abs().amax(2) * 2 / most).to(dtype)
        zeros = torch.full(scales.shape, middle)
    else:
        low, high = blocks.amin(2).clamp_max(0), blocks.amax(2).clamp_min(0)
        scales = ((high - low) / most).to(dtype)
        zeros = (-low / scales.float()).round().clamp(1, most).long()
    q = (weight.float() / scales.float()[:, groups]).round() + zeros[:, groups]
    return Integers(q.clamp(0, most).long(), zeros, scales, groups)


def packed(numbers: Tensor, bits: int) -> Tensor:
    """Unsigned numbers [rows, n] in int32 words [rows, n · bits / 32], the first in the lowest bits."""
    each = 32 // bits
    words = numbers.long().unflatten(1, (-1, each)) << torch.arange(each) * bits
    words = words.sum(2)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def gptq(
    bits: int = 4,
    group: int = 32,
    *,
    symmetric: bool = True,
    act_order: bool = False,
    less_one: bool = True,
    change: Callable[[Integers], Integers] = lambda integers: integers,
) -> Pack:
    """GPTQ's tensors of each module."""

    def pack(module: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        generator = torch.Generator().manual_seed(len(module))
        order = torch.randperm(weight.shape[1], generator=generator) if act_order else None
        integers = change(rounded(weight, bits, group, symmetric=symmetric, order=order))
        stored = (integers.zeros - int(less_one)).T
        return {
            f"{module}.qweight": packed(integers.q, bits).T.contiguous(),
            f"{module}.qzeros": packed(stored, bits).contiguous(),
            f"{module}.scales": integers.scales.T.contiguous(),
            f"{module}.g_idx": integers.groups.to(torch.int32),
        }, integers.floats

    return pack


def gptq_config(bits: int = 4, group: int = 32, **settings: Any) -> dict[str, Any]:
    """quantization_config of GPTQ."""
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "gptq",
        **settings,
    }


def awq(group: int = 32, *, symmetric: bool = False) -> Pack:
    """AWQ's tensors of each module, in the format GEMM."""

    def in_words(numbers: Tensor) -> Tensor:  # [rows, out]
        return packed(numbers.unflatten(1, (-1, 8))[:, :, list(AWQ_ORDER)].flatten(1), 4).contiguous()

    def pack(module: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        integers = rounded(weight, 4, group, symmetric=symmetric)
        return {
            f"{module}.qweight": in_words(integers.q.T),
            f"{module}.qzeros": in_words(integers.zeros.T),
            f"{module}.scales": integers.scales.T.contiguous(),
        }, integers.floats

    return pack


AWQ_CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def compressed(
    bits: int = 4, group: int = 32, *, symmetric: bool = True, name: str = "pack-quantized"
) -> Pack:
    """The tensors of compressed-tensors of each module, written by the library."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    scheme = QuantizationScheme(**compressed_group(bits, group, symmetric=symmetric))
    library = BaseCompressor.get_value_from_registry(name)

    def pack(module: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        integers = rounded(weight, bits, group, symmetric=symmetric, dtype=torch.bfloat16)
        given = {"weight": weight, "weight_scale": integers.scales}
        if not symmetric:
            given["weight_zero_point"] = (integers.zeros - (1 << bits - 1)).to(torch.int8)
        stored = library.compress(given, scheme)
        wide = {**stored, "weight_scale": integers.scales.float()}
        floats = library.decompress(dict(wide), scheme)["weight"]
        return {f"{module}.{part}": each.contiguous() for part, each in stored.items()}, floats

    return pack


def compressed_group(bits: int, group: int, *, symmetric: bool = True) -> dict[str, Any]:
    """An entry of config_groups."""
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group == -1 else "group",
        "group_size": None if group == -1 else group,
    }
    return {"targets": ["Linear"], "weights": weights}


def compressed_config(
    bits: int = 4, group: int = 32, *, symmetric: bool = True, name: str = "pack-quantized"
) -> dict[str, Any]:
    """quantization_config of compressed-tensors."""
    return {
        "quant_method": "compressed-tensors",
        "format": name,
        "quantization_status": "compressed",
        "config_groups": {"group_0": compressed_group(bits, group, symmetric=symmetric)},
        "ignore": ["lm_head"],
    }


@dataclass(frozen=True)
class Pair:
    """Two checkpoints of one model.

    Attributes:
        quantized: with quantised weights.
        floats: with the floats that they stand for, in float32.
    """

    quantized: Path
    floats: Path


def write_pair(
    source: Path, folder: Path, pack: Pack, config: Mapping[str, Any], *, head: bool = False
) -> Pair:
    """Quantise the linear maps of the layers of a checkpoint in one file, and the head if asked."""
    tensors = load_file(source / "model.safetensors")
    pair = Pair(folder / "quantized", folder / "floats")
    stored, floats = dict(tensors), {name: each.float() for name, each in tensors.items()}
    settings = json.loads((source / "config.json").read_text())
    conv1d = settings["model_type"] == "gpt2"  # stores [in, out]
    for name, weight in tensors.items():
        inside = "layers." in name or ".h." in name
        if weight.ndim != 2 or not (inside or (head and name == "lm_head.weight")):
            continue
        parts, exact = pack(name.removesuffix(".weight"), weight.T if conv1d else weight)
        del stored[name]
        stored |= parts
        floats[name] = (exact.T if conv1d else exact).contiguous()
    for path, each, added in (
        (pair.quantized, stored, {"quantization_config": dict(config)}),
        (pair.floats, floats, {"dtype": "float32"}),
    ):
        shutil.copytree(source, path)
        (path / "config.json").write_text(json.dumps({**settings, **added}))
        save_file(each, path / "model.safetensors", metadata={"format": "pt"})
    return pair
