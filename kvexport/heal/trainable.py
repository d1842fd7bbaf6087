"""A layer's attention as an nn.Module: what is trained, and how to get a neutral attention from it.

Knows which leaves of the attention are trained and peft's adapters; must not know losses or optimizers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kvexport.errors import CannotRunHere
from kvexport.model.decoder import Attention, Linear
from kvexport.packages import install_command

_LINEARS = ("q", "k", "v", "o")
_MAPS = ("key_map", "query_map", "value_map")
_ADAPTER = "default"


class TrainableAttention(nn.Module):
    """float32 copies of q, k, v, o and of the maps there are; norms and shapes stay the given attention's."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self._given = attention
        for name in _LINEARS:
            self.add_module(name, _module(getattr(attention, name)))
        for name in _MAPS:
            given = getattr(attention, name)
            self.register_parameter(name, None if given is None else nn.Parameter(_copy(given)))

    def attention(self) -> Attention:
        """The attention with the present weights, differentiable with respect to the parameters."""
        present: dict[str, Any] = {name: _linear(getattr(self, name)) for name in _LINEARS}
        return replace(self._given, **present, **{name: getattr(self, name) for name in _MAPS})

    def scaled(self) -> Iterator[tuple[nn.Parameter, float]]:
        """Every trained parameter, with the size that its steps are relative to.

        The product of encoder and decoder stays the same when one is multiplied by c and the other by 1/c; steps
        relative to each tensor's own RMS move it by the same amount for every c. A bias is to its weights as the
        weight of one more input of power one. Adapters start as B A = 0: steps of B move B A by as much as
        those of the weight itself would.
        """
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                yield parameter, self._size(name, parameter)

    def _size(self, name: str, parameter: nn.Parameter) -> float:
        module = getattr(self, name.split(".", maxsplit=1)[0])
        if module is parameter or "lora_A" in name:
            return _rms(parameter)
        size = _rms(module.weight)  # an adapted module gives its base layer's
        if "lora_B" in name:
            adapter = module.lora_A[_ADAPTER].weight  # [rank, in]
            return size / (_rms(adapter) * len(adapter) ** 0.5)
        return size


def adapt(layers: Sequence[TrainableAttention], rank: int, seed: int) -> None:
    """Freeze q, k, v and o in every layer and put adapters of `rank` beside them; maps and biases are trained as they are.

    Raises:
        CannotRunHere: peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise CannotRunHere("adapters of low rank need peft", fix=install_command("peft")) from error
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(_LINEARS), bias="all")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, nn.ModuleList(layers), _ADAPTER)
    for layer in layers:
        for name in _MAPS:
            if getattr(layer, name) is not None:
                getattr(layer, name).requires_grad_(True)


def _module(linear: Linear) -> nn.Linear:
    out, into = linear.weight.shape
    module = torch.nn.utils.skip_init(nn.Linear, into, out, bias=linear.bias is not None)
    module.weight = nn.Parameter(_copy(linear.weight))
    if linear.bias is not None:
        module.bias = nn.Parameter(_copy(linear.bias))
    return module


def _linear(module: Any) -> Linear:
    if isinstance(module, nn.Linear):
        return Linear(module.weight, module.bias)
    base = module.get_base_layer()
    return Linear(base.weight + module.get_delta_weight(_ADAPTER), base.bias)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32, copy=True)


def _rms(tensor: Tensor) -> float:
    return float(tensor.detach().square().mean().sqrt())
