"""What a neighbour is: a model to run, the numbers it would cache, and the arithmetic it would take.

Knows how to run and to count one; must not know how any was made.

Multiply-adds (MACs) are counted per layer as a decode step runs it at batch 1. `per_cached_token` grows with
the context: what each cached token costs at every step, which is its share of logits and mixing, and whatever
is rebuilt from the cache. `per_new_token` does not: projections and maps of the new token, W_O included. A
rotation counts 2 MACs a number; norms, softmax, biases and the MLP are not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvexport.errors import UsageError
from kvexport.model.decoder import Attention, Decoder, Layer, tensors_of

from .stream import Attend, LayerMoments, Stream


@dataclass(frozen=True)
class Macs:
    """Multiply-adds of one layer's attention in a decode step; see the module's docstring."""

    per_cached_token: int
    per_new_token: int


def attention_macs(attention: Attention) -> Macs:
    """The MACs of an `Attention` as the reference computes it, converted or not."""
    heads = attention.num_heads
    parts = (
        attention.q.weight,
        attention.k.weight,
        attention.v.weight,
        attention.o.weight,
        attention.key_map,
        attention.query_map,
        attention.value_encoder,
        attention.value_map,
    )
    rotated = (heads + attention.key_heads) * attention.head_dim if attention.rope is not None else 0
    products = sum(part.numel() for part in parts if part is not None)
    return Macs(heads * (attention.key_dim + attention.value_dim), products + 2 * rotated)


def attention_parameters(attention: Attention) -> int:
    """Numbers in an `Attention`'s tensors."""
    return sum(tensor.numel() for tensor in tensors_of(attention))


@dataclass(frozen=True)
class NeighbourLayer:
    """One converted layer.

    Attributes:
        layer: norms and MLP, and an attention of which `attend` keeps what it needs.
        attend: the converted attention.
        kv_numbers: numbers cached per token.
        macs: of the attention as its paper deploys it.
        parameters: of the attention as its paper deploys it.
    """

    layer: Layer
    attend: Attend
    kv_numbers: int
    macs: Macs
    parameters: int


@dataclass(frozen=True)
class Neighbour:
    """A whole model, converted by a published method; dtype of the decoder it was made from."""

    name: str
    decoder: Decoder  # the trained one: embedding, final norm, head and rotary table are shared with it
    layers: Sequence[NeighbourLayer]
    rounding: str  # how the budget became whole numbers

    def residual_stream(self, windows: Tensor) -> Tensor:
        """The residual stream [N, S, hidden] after the last layer, of token ids [N, S]; `reference.logits`
        takes it."""
        stream = Stream(self.decoder, windows)
        for each in self.layers:
            stream.advance(each.layer, each.attend)
        return stream.x

    @property
    def kv_numbers_per_token(self) -> int:
        """Numbers cached per token, all layers."""
        return sum(each.kv_numbers for each in self.layers)

    @property
    def macs_per_cached_token(self) -> float:
        """Mean over the layers."""
        return sum(each.macs.per_cached_token for each in self.layers) / len(self.layers)

    @property
    def macs_per_new_token(self) -> float:
        """Mean over the layers."""
        return sum(each.macs.per_new_token for each in self.layers) / len(self.layers)

    @property
    def parameters(self) -> int:
        """Of the whole model as the paper deploys it; a tied head counts once."""
        parts: list[Decoder | Layer] = [
            replace(self.decoder, layers=()),
            *(each.layer for each in self.layers),
        ]
        attentions = sum(attention_parameters(each.layer.attention) for each in self.layers)
        whole = sum(tensor.numel() for part in parts for tensor in tensors_of(part))
        return whole - attentions + sum(each.parameters for each in self.layers)


ConvertLayer = Callable[[Layer, LayerMoments, Stream], NeighbourLayer]


@torch.no_grad()
def convert_layers(decoder: Decoder, windows: Tensor, convert: ConvertLayer) -> list[NeighbourLayer]:
    """Each layer converted from its moments on the trained model's stream, one layer after another."""
    stream, layers = Stream(decoder, windows), []
    for layer in decoder.layers:
        require_trained(layer.attention)
        layers.append(convert(layer, stream.measure(layer), stream))
        stream.advance(layer)
    return layers


def whole(budget: float) -> int:
    """`budget` rounded down, past the rounding of ratios like 1/3.

    Raises:
        UsageError: nothing is left.
    """
    rank = int(budget + 1e-9)
    if rank < 1:
        raise UsageError(
            "the KV ratio leaves no number to cache", got=f"{budget:.3f} numbers", fix="raise the ratio"
        )
    return rank


def halves(budget: float) -> tuple[int, int]:
    """Ranks of keys and of values, together at most `budget`; an odd one goes to the values."""
    total = int(budget + 1e-9)
    return whole(total / 2), total - total // 2


def require_trained(attention: Attention) -> None:
    """
    Raises:
        UsageError: the attention does not rotate, or is converted already.
    """
    if attention.rope is None:
        raise UsageError("the published neighbours are for rotary positions", got="a layer without RoPE")
    if attention.query_map is not None or attention.key_map is not None or attention.value_map is not None:
        raise UsageError(
            "the published neighbours convert trained models", got="a layer that is converted already"
        )


def require_plain_keys(attention: Attention, name: str) -> None:
    """
    Raises:
        UsageError: a norm stands between W_K and the rotation.
    """
    if attention.q_norm is not None or attention.k_norm is not None:
        raise UsageError(
            f"{name} mixes heads before the rotation, which a norm of queries and keys does not allow"
        )
