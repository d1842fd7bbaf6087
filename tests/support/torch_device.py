"""A simulated second device of PyTorch, with real numbers and the errors of a real device.

A tensor of the device wraps a tensor on the CPU that holds its numbers. Every operator runs on the CPU and
wraps its results. Products of float32 matrices are computed in float64 before they are rounded, so that they
differ from those of the CPU as those of a GPU do.

The device fails where CUDA fails: if tensors of both devices mix (apart from CPU tensors of one number), if
random numbers are drawn with a generator of the CPU, and if numpy reads a tensor. It also fails where CUDA
copies without a word: at an index on the CPU.

The device takes PyTorch's name for devices outside of PyTorch, `privateuseone`; no accelerator is announced,
so that other code in the process does not choose it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_map

NAME = "simulated"
_aten = torch.ops.aten
_PRODUCTS = (_aten.mm.default, _aten.bmm.default, _aten.addmm.default)
_COPIES = (_aten._to_copy.default, _aten.copy_.default)


class SimulatedTensor(torch.Tensor):
    """A tensor of the simulated device; `on_cpu` holds its numbers."""

    on_cpu: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, on_cpu: torch.Tensor) -> SimulatedTensor:
        tensor: SimulatedTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            on_cpu.shape,
            on_cpu.stride(),
            on_cpu.storage_offset(),
            dtype=on_cpu.dtype,
            device=torch.device(NAME, 0),
        )
        tensor.on_cpu = on_cpu
        return tensor

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"SimulatedTensor({self.on_cpu})"

    @classmethod
    def __torch_dispatch__(
        cls, operator: Any, types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _run(operator, args, kwargs or {})


def _run(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run an operator on the CPU; the result is on the device, unless it is copied to the CPU."""

    def unwrap(value: Any) -> Any:
        if isinstance(value, SimulatedTensor):
            return value.on_cpu
        if isinstance(value, torch.Generator):
            raise RuntimeError(f"{operator}: Expected a '{NAME}' device type for generator but found 'cpu'")
        if isinstance(value, torch.Tensor) and value.ndim and operator not in _COPIES:
            raise RuntimeError(
                f"{operator}: Expected all tensors to be on the same device, but found at least two devices, "
                f"{NAME}:0 and {value.device}!"
            )
        return value

    def wrap(value: Any) -> Any:
        return SimulatedTensor(value) if isinstance(value, torch.Tensor) else value

    given, named = tree_map(unwrap, (tuple(args), dict(kwargs)))
    device = named.get("device")
    if device is not None:
        named["device"] = torch.device("cpu")
    written = [
        (args[at] if at < len(args) else kwargs[each.name])
        for at, each in enumerate(operator._schema.arguments)
        if each.alias_info is not None and each.alias_info.is_write
    ]
    if operator not in _COPIES and not all(isinstance(each, SimulatedTensor) for each in written):
        raise RuntimeError(
            f"{operator}: Expected all tensors to be on the same device, also those that change"
        )
    if operator in _PRODUCTS and given[0].dtype == torch.float32:
        result = operator(*(each.double() for each in given), **named).float()
    else:
        result = operator(*given, **named)
    if device is not None and torch.device(device).type == "cpu":
        return result
    if written and len(operator._schema.returns) == 1:
        return written[0]  # the operator changed it in place
    return tree_map(wrap, result)


class _Module(backend_registration._DummyBackendModule):
    """The device's module in `torch`, which announces no accelerator."""

    def is_available(self) -> bool:
        return False

    def device_count(self) -> int:
        return 0

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16]


class _Hook(backend_registration._DummyPrivateUse1Hook):
    def is_available(self) -> bool:
        return False


@cache
def _register() -> torch.library.Library:
    """Register the device with PyTorch, once in a process. Factories have no tensor that is dispatched on."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, _Module(), _Hook())
    library = torch.library.Library("aten", "IMPL")
    for operator in (_aten.empty.memory_format, _aten.empty_strided.default, _aten.copy_.default):
        library.impl(operator, _kernel(operator), "PrivateUse1")
    return library


def _kernel(operator: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: _run(operator, args, kwargs)


@contextmanager
def simulated_device() -> Iterator[torch.device]:
    """The device; backward passes inside the block run on the calling thread."""
    _register()
    # a thread of the autograd engine that runs Python aborts the process when it ends
    with torch.autograd.set_multithreading_enabled(False):
        yield torch.device(NAME, 0)


def take_for_cuda(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Let `--device cuda` mean the simulated device."""
    from kvexport.build import conversion_job
    from kvexport.validate import evaluate

    for module in (conversion_job, evaluate):
        monkeypatch.setattr(
            module, "resolve_device", lambda name: device if name == "cuda" else torch.device("cpu")
        )
