"""The device on which PyTorch computes (`--device`), and decoders whose layers are moved there one at a time.

Results do not depend on the device beyond rounding: float32 products are computed in float32, never in TF32,
and random numbers are drawn on the CPU.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from kvexport.errors import CannotRunHere, UsageError
from kvexport.model.decoder import Decoder, LazyLayers, map_tensors

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
AUTO, CPU = "auto", "cpu"


def resolve_device(name: str) -> torch.device:
    """The device that `--device` names.

    Args:
        name: "cpu"; "cuda" or "cuda:N", an NVIDIA GPU; "auto": cuda if PyTorch can use it, else cpu.

    Raises:
        UsageError: the name is none of these.
        CannotRunHere: PyTorch cannot use that GPU.
    """
    import torch

    if name == AUTO:
        device = torch.device("cuda", 0)
        return device if _reason_unusable(device) is None else torch.device(CPU)
    if name == CPU:
        return torch.device(CPU)
    match = re.fullmatch(r"cuda(?::([0-9]{1,3}))?", name)
    if match is None:
        raise UsageError(
            "--device must be a device that PyTorch converts on",
            got=name,
            expected="auto, cpu, cuda, or cuda:N for the GPU with index N",
        )
    device = torch.device("cuda", int(match[1] or 0))
    reason = _reason_unusable(device)
    if reason is not None:
        raise CannotRunHere(
            f"--device {name} needs an NVIDIA GPU that PyTorch can use",
            got=reason,
            fix="use --device cpu, or install a PyTorch for CUDA that supports the GPU and its driver",
        )
    return device


def _reason_unusable(device: torch.device) -> str | None:
    """Why PyTorch cannot compute on a GPU; None: it can."""
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        which = "without CUDA" if built is None else f"for CUDA {built}, which finds no usable GPU"
        return f"PyTorch {torch.__version__} {which}"
    count = torch.cuda.device_count()
    if device.index >= count:
        return f"{count} GPUs, with indices from 0 to {count - 1}"
    try:
        torch.ones(1, device=device).add(1).item()
    except RuntimeError as error:  # such as a GPU that this PyTorch has no kernels for
        return str(error).splitlines()[0]
    return None


def device_name(device: torch.device) -> str:
    """The device for a report: "cpu", or "cuda:0 (NVIDIA RTX 4090)"."""
    import torch

    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def move(part: T, device: torch.device | str) -> T:
    """A tree of the decoder's dataclasses with its tensors on a device; a tensor there is not copied."""
    return map_tensors(part, lambda tensor: tensor.to(device), ropes=True)


def place(decoder: Decoder, device: torch.device) -> Decoder:
    """The decoder with embedding, final norm and head on a device; a layer is moved there at each access.

    Nothing keeps a layer, so that its memory is free as soon as the caller drops it. A decoder that is there
    already is returned as it is.
    """
    if decoder.embedding.weight.device == device:
        return decoder
    layers = decoder.layers
    lazy = LazyLayers(len(layers), lambda index: move(layers[index], device))
    return replace(move(replace(decoder, layers=()), device), layers=lazy)


@contextmanager
def device_computation() -> Iterator[None]:
    """Compute float32 products in float32, also where TF32 was allowed, and report exhausted GPU memory.

    Raises:
        CannotRunHere: the memory of the GPU is exhausted.
    """
    import torch

    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    except RuntimeError as error:
        exhausted = isinstance(error, torch.OutOfMemoryError) or "CUBLAS_STATUS_ALLOC_FAILED" in str(error)
        if not exhausted:
            raise
        raise CannotRunHere(
            "the tensors of this command must fit into the memory of the GPU",
            got=str(error).partition(". GPU ")[0],
            fix="use --device cpu, fewer --samples or a shorter --length, or stop other programs on the GPU",
        ) from error
    finally:
        torch.set_float32_matmul_precision(precision)
