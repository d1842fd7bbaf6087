"""The format of a checkpoint's quantised weights, from config.json; or why it is not read, and what to do.

`kvexport plan`, which has no more than config.json, and every command that reads weights ask here. No torch
is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvexport.errors import CheckpointError
from kvexport.model.config import shown
from kvexport.model.quantized.awq import AWQ
from kvexport.model.quantized.compressed_tensors import CompressedTensors
from kvexport.model.quantized.gptq import GPTQ
from kvexport.model.quantized.stored_format import READABLE, UNQUANTISED, Settings, StoredFormat

KEYS = ("quantization_config", "compression_config")  # of config.json
# Ends of the names of tensors that only quantised weights have.
_SIGNS = (
    ".qweight",
    ".qzeros",
    ".absmax",
    ".quant_map",
    ".SCB",
    ".weight_packed",
    ".weight_scale",
    ".weight_scale_inv",
    ".weight_scale_2",
    "_blocks",
    ".W_q",
)
_FP4 = "floats of 4 bits in blocks, which no engine of kvexport computes with"
_FP8 = "floats of 8 bits, whose grid no integers have"
_REFUSED = {
    "bitsandbytes": "bitsandbytes: its 4-bit numbers are places in a table (NF4, FP4), not integers",
    "bitnet": "weights of -1, 0 and 1, of a model whose activations are rounded, too",
    "fp8": _FP8,
    "fbgemm_fp8": _FP8,
    "mxfp8": _FP8,
    "mxfp4": _FP4,
    "nvfp4": _FP4,
    "fp_quant": _FP4,
    "fouroversix": _FP4,
    "modelopt": "FP8 or NVFP4 of ModelOpt: floats of 8 or 4 bits",
    "eetq": "EETQ packs integers for the kernels of one GPU",
    "hqq": "HQQ, whose zero points are not integers",
    "aqlm": "AQLM: sums of vectors of a codebook, not integers",
    "vptq": "VPTQ: vectors of a codebook, not integers",
    "higgs": "HIGGS: rotated vectors of a codebook, not integers",
    "spqr": "SpQR: integers with exceptions in floats",
}


def stored_format(config: Mapping[str, Any]) -> StoredFormat | None:
    """The format of the quantised weights of a checkpoint; None: they are floats.

    Args:
        config: config.json.

    Raises:
        CheckpointError: the format is not read, or a setting of it is not supported.
    """
    values = next((config[key] for key in KEYS if config.get(key)), None)
    if values is None:
        return None
    method = values.get("quant_method") if isinstance(values, dict) else values
    method = "compressed-tensors" if method is None and "config_groups" in values else method
    name = method.lower().replace("_", "-").rpartition("/")[2] if isinstance(method, str) else ""
    if name == "gptq":
        return GPTQ.from_config(values)
    if name == "awq":
        return AWQ.from_config(values)
    if name in ("auto-round", "autoround"):
        return _autoround(values)
    if name in ("compressed-tensors", "sparseml"):
        return CompressedTensors.from_config(values)
    reason = _REFUSED.get(name.replace("-", "_"))
    raise CheckpointError(
        "the quantised weights of the checkpoint must be in a format that can be read",
        got=f"quant_method = {shown(method)}" + ("" if reason is None else f": {reason}"),
        expected=READABLE,
        fix=UNQUANTISED,
    )


def require_no_other_format(names: list[str], form: StoredFormat | None) -> None:
    """Check that no tensor belongs to quantised weights of another format than config.json describes.

    Args:
        names: of all tensors, sorted.
        form: the format that config.json describes; None: none.

    Raises:
        CheckpointError: there is such a tensor.
    """
    known = () if form is None else form.PARTS
    other = next((name for name in names if name.endswith(_SIGNS) and not name.endswith(known)), None)
    if other is None:
        return
    if form is not None:
        raise CheckpointError(
            f"the checkpoint must contain only tensors of its format ({form.name})",
            got=other,
            fix=UNQUANTISED,
        )
    raise CheckpointError(
        "config.json must describe the quantised weights of the checkpoint: it has no quantization_config",
        got=other,
        expected=READABLE,
        fix=f"{UNQUANTISED}; or add quantization_config, which older programs wrote to a file of its own "
        "(quantize_config.json, quant_config.json)",
    )


def _autoround(values: Mapping[str, Any]) -> StoredFormat:
    """The format of AutoRound, which packs as GPTQ or as AWQ do.

    Raises:
        CheckpointError: weights are not integers, or are packed in another way.
    """
    settings = Settings(values)
    settings.choice(("data_type",), "int", "int", "int_sym", "int_asym")
    packing = settings.text("packing_format", "backend") or "auto_round:auto_gptq"
    if "awq" in packing:
        return AWQ.of_settings("AutoRound", settings)
    if any(other in packing for other in ("llm_compressor", "fp", "gguf", "marlin")):
        settings.choice(("packing_format",), packing, "auto_round:auto_gptq", "auto_round:auto_awq")
    symmetric = None if settings.table("extra_config") else settings.boolean("sym")
    bits, size = settings.bits("bits"), settings.group_size("group_size")
    return GPTQ("AutoRound", bits, size, symmetric, less_one="gptq" in packing)
