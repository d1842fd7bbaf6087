"""transformers in float64: its models compute norms, softmax and ALiBi in float32 in any dtype."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_NARROW = (torch.float32, torch.bfloat16, torch.float16)
_METHODS = (torch.Tensor.float, torch.Tensor.bfloat16, torch.Tensor.half)


class Float64(TorchFunctionMode):
    """Within it, float64 tensors are not narrowed; rotary angles stay float32, as in training.

    Positions are integers and frequencies float32, so that their products are not affected.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        first = args[0] if args else None
        if isinstance(first, torch.Tensor) and first.dtype == torch.float64:
            if func in _METHODS:
                return first
            args = tuple(map(_widened, args))
            kwargs = {name: _widened(each) for name, each in kwargs.items()}
        return func(*args, **kwargs)


def _widened(argument: Any) -> Any:
    is_narrow = isinstance(argument, torch.dtype) and argument in _NARROW
    return torch.float64 if is_narrow else argument
