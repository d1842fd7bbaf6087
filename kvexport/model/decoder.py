"""The neutral decoder: a tree of frozen dataclasses with torch tensors at the leaves, independent of model
families.

`kvexport.model.loader` makes it from a checkpoint, `kvexport.convert` maps it to a compressed one,
`kvexport.model.reference` runs it and `kvexport.graph` writes it as ONNX. This module imports torch for
annotations only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeVar, overload

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu_squared"]


@dataclass(frozen=True)
class WeightCodes:
    """A weight [out, in] as integers and positive scales: codes · scale, symmetric, without zero points.

    Each row is divided into blocks of in / blocks adjacent columns; a block has one scale.
    """

    codes: Tensor  # int8 [out, in], from -2^(bits - 1) to 2^(bits - 1) - 1
    scales: Tensor  # [out, blocks] in the dtype of the weight, greater than 0
    bits: Literal[4, 8]
    # whether some codes of a quantised checkpoint are nearer to 0 by 1, because they have no opposite
    saturated: bool = False


@dataclass(frozen=True)
class Linear:
    """y = x · weightᵀ + bias.

    A quantised linear map has `codes`; its `weight` is then exactly what they stand for, unless they are
    `saturated`.
    """

    weight: Tensor  # [out, in]
    bias: Tensor | None = None  # [out]
    codes: WeightCodes | None = None
    inexact: str | None = None  # why the integers of a quantised checkpoint are not `codes`

    def map_rows(self, function: Callable[[Tensor], Tensor]) -> Linear:
        """The same function of the rows of weight, bias and codes, such as a permutation."""
        bias = None if self.bias is None else function(self.bias)
        codes = self.codes
        if codes is not None:
            codes = replace(codes, codes=function(codes.codes), scales=function(codes.scales))
        return Linear(function(self.weight), bias, codes, self.inexact)


@dataclass(frozen=True)
class Norm:
    """RMSNorm (no bias, no mean) or LayerNorm over the last axis.

    A norm of queries or keys may have a weight of its own for each head, [heads, head_dim].
    """

    kind: Literal["rms", "layer"]
    weight: Tensor | None  # [width]; None: 1
    bias: Tensor | None  # [width]
    eps: float


@dataclass(frozen=True)
class Rope:
    """Rotary positions, half-split layout: pair i of a head is (x[i], x[i + head_dim/2]).

    Where a family rotates a part of each head, the other numbers are pairs of frequency 0.
    """

    inv_freq: Tensor  # float32 [head_dim/2], radians per position, scaling applied; 0: pair does not rotate
    magnitude: Tensor | None = None  # float32 [head_dim/2], factor of cos and sin; None: 1


@dataclass(frozen=True)
class Attention:
    """Self-attention with `num_heads` queries over `num_kv_heads` cached heads.

    Queries, keys and values are projected, clipped, normalised (queries and keys) and rotated, in this order;
    with `norm_after_rotation` queries and keys are normalised after the rotation, if there is one.

    An unconverted layer has no maps: `k` makes `num_kv_heads` heads of `head_dim`, `v` as many of
    `value_dim`. A converted layer is one of these:

    - keys compressed after RoPE, or after a norm or clip: `k` makes t·num_kv_heads heads, which are clipped,
      normalised and rotated as trained; `key_map` projects each t of them to one cached head of `key_dim`,
      `query_map` maps queries accordingly.
    - keys compressed before RoPE: `k` makes the cached heads of `key_dim`. If these are wider than trained
      heads, `query_map` maps queries before RoPE, and each cached pair rotates with the frequency given by
      `frequencies`.
    - no RoPE: `k` makes the cached heads of `key_dim`; there may be a `query_map`.

    Values are compressed in `v`, or, if they are clipped, by `value_encoder` after the clip. `value_map` maps
    a head's attention output from `value_dim` to the width that `o` expects; without it `o` takes
    `value_dim`.
    """

    q: Linear  # [num_heads·head_dim, hidden]
    k: Linear  # [key_heads·head_dim, hidden] with key_map; else [num_kv_heads·key_dim, hidden]
    v: Linear  # [value_heads·head_dim, hidden] with value_encoder; else [num_kv_heads·value_dim, hidden]
    o: Linear  # [hidden, num_heads·(value_map width, or value_dim)]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float  # of the products of queries and keys, also after conversion
    rope: Rope | None = None
    alibi_slopes: Tensor | None = None  # [num_heads]; the bias of a key n tokens back is -slope · n
    window: int | None = None  # a query at position p sees positions p - window < n <= p
    softcap: float | None = None  # scaled products x become softcap · tanh(x / softcap)
    clip: float | None = None  # queries, keys and values are clipped to [-clip, clip]
    # [head_dim]; [heads, head_dim] if each head has its own; [heads·head_dim] with norm_over "heads"
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    norm_over: Literal["head", "heads"] = "head"  # QK-norm over each head, or over all heads together
    norm_after_rotation: bool = False
    key_map: Tensor | None = None  # [num_kv_heads, t·head_dim, key_dim], after RoPE
    # [num_heads, head_dim, key_dim], after RoPE, or before it with `frequencies`
    query_map: Tensor | None = None
    # [key_dim/2] int64, index of the RoPE frequency of each cached pair
    frequencies: Tensor | None = None
    value_encoder: Tensor | None = None  # [num_kv_heads, t·head_dim, value_dim]
    value_map: Tensor | None = None  # [num_heads, value_dim, width]

    @property
    def key_heads(self) -> int:
        """Key heads that `k` makes, before any key_map."""
        return self.num_kv_heads if self.key_map is None else self.k.weight.shape[0] // self.head_dim

    @property
    def key_dim(self) -> int:
        """Width of a cached key."""
        return self.head_dim if self.query_map is None else self.query_map.shape[2]

    @property
    def value_dim(self) -> int:
        """Width of a cached value."""
        return (
            self.v.weight.shape[0] // self.num_kv_heads
            if self.value_encoder is None
            else self.value_encoder.shape[2]
        )

    @property
    def value_heads(self) -> int:
        """Value heads that `v` makes, before any value_encoder."""
        return self.num_kv_heads if self.value_encoder is None else self.v.weight.shape[0] // self.head_dim

    @property
    def keys_fold(self) -> bool:
        """Whether a linear code of unrotated keys can be multiplied into W_K: no norm, no clip after it."""
        return self.k_norm is None and self.clip is None

    @property
    def queries_per_kv_head(self) -> int:
        """Query heads that share one cached head."""
        return self.num_heads // self.num_kv_heads

    @property
    def kv_width(self) -> int:
        """Cached numbers per token: keys and values, all heads."""
        return self.num_kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True)
class Mlp:
    """`down(act(gate(x)) · up(x))`, or `down(act(up(x)))` when there is no gate."""

    gate: Linear | None  # [intermediate, hidden]
    up: Linear  # [intermediate, hidden]
    down: Linear  # [hidden, intermediate]
    activation: Activation


@dataclass(frozen=True)
class Layer:
    """A block: attention and MLP, each added to the residual stream x.

    With m = residual_multiplier, and norms that are None left out:

        y = attention_residual_norm(x + m · attention_output_norm(attention(attention_norm(x))))
        z = mlp_residual_norm(y + m · mlp_output_norm(mlp(mlp_norm(y))))

    In a parallel block the MLP reads x in place of y, through `mlp_norm`, or through `attention_norm` if
    `mlp_norm` is None. `kvexport.model.reference.run_block` and `kvexport.graph.blocks.block` compute it.
    """

    attention_norm: Norm | None
    attention: Attention
    mlp_norm: Norm | None
    mlp: Mlp
    attention_output_norm: Norm | None = None
    mlp_output_norm: Norm | None = None
    attention_residual_norm: Norm | None = None
    mlp_residual_norm: Norm | None = None
    parallel: bool = False
    residual_multiplier: float = 1.0


@dataclass(frozen=True)
class Embedding:
    """The input of the first layer: norm(projection(multiplier · weight[token]) + positions[position]).

    Parts that are None are left out.
    """

    weight: Tensor  # [vocab, width], width = hidden without a projection
    norm: Norm | None = None
    multiplier: float = 1.0
    projection: Linear | None = None  # [hidden, width]
    positions: Tensor | None = None  # [max_positions, hidden]
    codes: WeightCodes | None = None  # of a quantised table; `weight` is then exactly what they stand for


@dataclass(frozen=True)
class ModelDims:
    """Sizes of the model that conversion does not change."""

    vocab_size: int
    hidden_size: int
    max_positions: int | None  # positions that the model supports; None: unbounded (ALiBi)


class LazyLayers(Sequence[Layer]):
    """Layers that are loaded at each access and not cached, so that one is in memory at a time."""

    def __init__(self, count: int, read: Callable[[int], Layer]) -> None:
        self._count, self._read = count, read

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Layer: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Layer]: ...
    def __getitem__(self, index: int | slice) -> Layer | Sequence[Layer]:
        if isinstance(index, slice):
            return [self._read(i) for i in range(*index.indices(self._count))]
        if not -self._count <= index < self._count:
            raise IndexError(index)
        return self._read(index % self._count)

    def __iter__(self) -> Iterator[Layer]:
        return (self._read(i) for i in range(self._count))


@dataclass(frozen=True)
class Decoder:
    """A whole model.

    Logits are softcap(logit_multiplier · head(projection(final_norm(x)))); parts that are None are left out.
    """

    embedding: Embedding
    layers: Sequence[Layer]
    final_norm: Norm | None
    head: Linear | None  # [vocab, width]; None: tied to the embedding
    dims: ModelDims
    output_projection: Linear | None = None  # [width, hidden]
    logit_multiplier: float = 1.0
    logit_softcap: float | None = None  # logits x become logit_softcap · tanh(x / logit_softcap)
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = field(default=())

    @property
    def output(self) -> Linear:
        """The head, also if it is tied to the embedding."""
        table = self.embedding
        return Linear(table.weight, codes=table.codes) if self.head is None else self.head


def map_tensors(part: T, function: Callable[[Tensor], Tensor], *, ropes: bool = False) -> T:
    """The same tree with every tensor replaced by a function of it.

    Args:
        part: a tree of these dataclasses.
        function: returns the new tensor.
        ropes: whether tensors of `Rope`, which belong to the position and not to the weights, are replaced,
            too.
    """
    if isinstance(part, Rope) and not ropes:
        return part
    if is_dataclass(part) and not isinstance(part, type):
        return replace(
            part,
            **{
                each.name: map_tensors(getattr(part, each.name), function, ropes=ropes)
                for each in fields(part)
            },
        )
    return function(part) if hasattr(part, "numel") else part  # type: ignore[arg-type, return-value]


def parameters_of(part: object) -> int:
    """The number of weights in a tree of these dataclasses; codes, which stand for weights, do not count."""
    if isinstance(part, (WeightCodes, Rope)):
        return 0
    if is_dataclass(part) and not isinstance(part, type):
        return sum(parameters_of(getattr(part, each.name)) for each in fields(part))
    return int(part.numel()) if hasattr(part, "numel") else 0


def tensors_of(part: object) -> list[Tensor]:
    """Every tensor in a tree of these dataclasses, in the order of `map_tensors`."""
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(part, keep)
    return found
