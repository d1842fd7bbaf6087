"""The neutral decoder: a tree of frozen dataclasses with torch tensors at the leaves, independent of model
families.

`kvexport.model.loader` makes it from a checkpoint, `kvexport.convert` maps it to a compressed one,
`kvexport.model.reference` runs it and `kvexport.graph` writes it as ONNX. This module imports torch for
annotations only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Literal, overload

if TYPE_CHECKING:
    from torch import Tensor

Position = Literal["rope", "alibi"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True)
class Linear:
    """y = x · weightᵀ + bias."""

    weight: Tensor  # [out, in]
    bias: Tensor | None = None  # [out]


@dataclass(frozen=True)
class Norm:
    """RMSNorm (no bias, no mean) or LayerNorm over the last axis."""

    kind: Literal["rms", "layer"]
    weight: Tensor  # [width]
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

    An unconverted layer has no maps: `k` makes `num_kv_heads` heads of `head_dim`, `v` as many of
    `value_dim`. A converted layer is one of these:

    - keys compressed after RoPE: `k` makes t·num_kv_heads heads, which are normalised and rotated as trained;
    `key_map`
      projects each t of them to one cached head of `key_dim`, `query_map` maps queries accordingly.
    - keys compressed before RoPE: `k` makes the cached heads of `key_dim`. If these are wider than trained
    heads,
      `query_map` maps queries before RoPE, and each cached pair rotates with the frequency given by
      `frequencies`.
    - no RoPE: `k` makes the cached heads of `key_dim`; there may be a `query_map`.

    `value_map` maps a head's attention output from `value_dim` to the width that `o` expects; without it `o`
    takes `value_dim`. The softmax scale is that of the trained model, 1/sqrt(its head_dim).
    """

    q: Linear  # [num_heads·head_dim, hidden]
    k: Linear  # [key_heads·head_dim, hidden] with key_map; else [num_kv_heads·key_dim, hidden]
    v: Linear  # [num_kv_heads·value_dim, hidden]
    o: Linear  # [hidden, num_heads·(value_map width, or value_dim)]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    position: Position
    q_norm: Norm | None = None  # [head_dim], before RoPE
    k_norm: Norm | None = None  # [head_dim], before RoPE
    key_map: Tensor | None = None  # [num_kv_heads, t·head_dim, key_dim], after RoPE
    # [num_heads, head_dim, key_dim], after RoPE, or before it with `frequencies`
    query_map: Tensor | None = None
    # [key_dim/2] int64, index of the RoPE frequency of each cached pair
    frequencies: Tensor | None = None
    value_map: Tensor | None = None  # [num_heads, value_dim, width]
    alibi_slopes: Tensor | None = None  # [num_heads]
    window: int | None = None  # a query at position p sees positions p - window < n <= p

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
        return self.v.weight.shape[0] // self.num_kv_heads

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
    """x += attention(norm(x)); x += mlp(norm(x))."""

    attention_norm: Norm
    attention: Attention
    mlp_norm: Norm
    mlp: Mlp


@dataclass(frozen=True)
class Embedding:
    """Token embedding, and the norm after it (BLOOM has one)."""

    weight: Tensor  # [vocab, hidden]
    norm: Norm | None = None


@dataclass(frozen=True)
class ModelDims:
    """Sizes of the model that conversion does not change."""

    vocab_size: int
    hidden_size: int
    max_positions: int | None  # positions the model was trained for; None: unbounded (ALiBi)


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
    """A whole model. `head` is None if it is tied to the embedding."""

    embedding: Embedding
    layers: Sequence[Layer]
    final_norm: Norm
    head: Linear | None  # [vocab, hidden]
    rope: Rope | None
    dims: ModelDims
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = field(default=())

    @property
    def output(self) -> Linear:
        """The head, also if it is tied to the embedding."""
        return Linear(self.embedding.weight) if self.head is None else self.head


def tensors_of(part: object) -> list[Tensor]:
    """Every tensor in a tree of these dataclasses."""
    if is_dataclass(part):
        return [tensor for field in fields(part) for tensor in tensors_of(getattr(part, field.name))]
    return [part] if hasattr(part, "numel") else []  # type: ignore[list-item]
