"""transformers in float64: its models compute norms, softmax and ALiBi in float32 in any dtype."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
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
        if func is torch.Tensor.bfloat16:  # Falcon's ALiBi
            return first.double()
        if isinstance(first, torch.Tensor) and first.dtype == torch.float64:
            if func in _METHODS:
                return first
            args = tuple(map(_widened, args))
            kwargs = {name: _widened(each) for name, each in kwargs.items()}
        return func(*args, **kwargs)


def _widened(argument: Any) -> Any:
    is_narrow = isinstance(argument, torch.dtype) and argument in _NARROW
    return torch.float64 if is_narrow else argument


def widen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let models compute ALiBi in float64, and tables of rotary angles in float32, as in training.

    MPT's slopes are those of config.json's alibi_bias_max, which transformers does not read.
    """
    from transformers.models.bloom import modeling_bloom
    from transformers.models.codegen import modeling_codegen
    from transformers.models.gptj import modeling_gptj
    from transformers.models.mpt import modeling_mpt

    bloom_slopes, mpt_alibi = modeling_bloom._get_alibi_slopes, modeling_mpt.build_mpt_alibi_tensor
    monkeypatch.setattr(modeling_bloom, "_get_alibi_slopes", lambda *args: bloom_slopes(*args).double())

    def alibi(model: Any, heads: int, length: int, device: torch.device) -> torch.Tensor:
        slopes = -mpt_alibi(heads, 2, model.config.attn_config.alibi_bias_max, device)[..., :1]
        return slopes.double() * torch.arange(1 - length, 1)

    monkeypatch.setattr(modeling_mpt.MptModel, "build_mpt_alibi_tensor", alibi)
    for module in (modeling_gptj, modeling_codegen):
        monkeypatch.setattr(module, "create_sinusoidal_positions", _in_float32(module))


def _in_float32(module: Any) -> Callable[[int, int], torch.Tensor]:
    positions = module.create_sinusoidal_positions

    def call(count: int, dim: int) -> torch.Tensor:
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            result: torch.Tensor = positions(count, dim)
        finally:
            torch.set_default_dtype(dtype)
        return result

    return call
