"""A layer's attention as an nn.Module, with or without LoRA adapters."""

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
_MAPS = ("key_map", "query_map", "value_encoder", "value_map")
_ADAPTER = "default"


class TrainableAttention(nn.Module):
    """Trainable float32 copies of q, k, v, o and of the maps; norms and shapes are those of the given
    attention.
    """

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self._given = attention
        for name in _LINEARS:
            self.add_module(name, _module(getattr(attention, name)))
        for name in _MAPS:
            given = getattr(attention, name)
            self.register_parameter(name, None if given is None else nn.Parameter(_copy(given)))

    def attention(self) -> Attention:
        """The attention with the current weights, differentiable with respect to the parameters."""
        current: dict[str, Any] = {name: _linear(getattr(self, name)) for name in _LINEARS}
        return replace(self._given, **current, **{name: getattr(self, name) for name in _MAPS})

    def scaled_parameters(self) -> Iterator[tuple[nn.Parameter, float]]:
        """Every trained parameter with the size that its steps are relative to.

        The product of encoder and decoder does not change when one is multiplied by c and the other by 1/c;
        with steps relative to the RMS of each tensor, training does not depend on c. A bias uses the RMS of
        its weight, as the weight of one more input of power 1. Adapters start with B A = 0; the size of B is
        such that a step changes B A as much as a step of the weight would.
        """
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                yield parameter, self._size(name, parameter)

    def _size(self, name: str, parameter: nn.Parameter) -> float:
        module = getattr(self, name.split(".", maxsplit=1)[0])
        if module is parameter or "lora_A" in name:
            return _rms(parameter)
        size = _rms(module.weight)  # an adapted module returns its base weight
        if "lora_B" in name:
            adapter = module.lora_A[_ADAPTER].weight  # [rank, in]
            return size / (_rms(adapter) * len(adapter) ** 0.5)
        return size


def adapt(layers: Sequence[TrainableAttention], rank: int, seed: int) -> None:
    """Freeze q, k, v and o in every layer and add LoRA adapters of `rank`; maps and biases remain trainable.

    Raises:
        CannotRunHere: peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise CannotRunHere("LoRA adapters need the package peft", fix=install_command("peft")) from error
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
