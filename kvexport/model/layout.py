"""How a family stores the parts of the neutral decoder, in both directions: names, shapes, fused matrices,
transposed weights, order of rotated pairs, offsets of norm weights.

`unpack_*` makes neutral parts from stored tensors, `pack_*` stored tensors from neutral parts; each is the
inverse of the other. Names are without the checkpoint's prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from kvexport.model.architecture import Architecture
from kvexport.model.decoder import Attention, Embedding, Layer, Linear, Mlp, Norm, WeightCodes
from kvexport.model.family import NORMS

if TYPE_CHECKING:
    from torch import Tensor

    from kvexport.model.decoder import Rope

Shape = tuple[int, ...]
Get = Callable[[str, Shape], "Tensor"]  # reads the stored tensor of a name and shape
# codes of a weight of a name and shape [out, in]; a text: why there are none; None: it is not quantised
GetCodes = Callable[[str, Shape], WeightCodes | str | None]


@dataclass(frozen=True)
class Ends:
    """The parts of a decoder before its first and after its last layer."""

    embedding: Embedding
    final_norm: Norm | None
    output_projection: Linear | None
    head: Linear | None  # None: tied to the embedding


class Layout:
    """The stored form of one architecture."""

    def __init__(self, architecture: Architecture, get_codes: GetCodes | None = None) -> None:
        """
        Args:
            architecture: of the checkpoint.
            get_codes: gives the codes of linear maps to `unpack_*`; None: they have none.
        """
        self._architecture, self._family, self._get_codes = architecture, architecture.family, get_codes
        self._order = pair_order(
            architecture.head_dim, architecture.rotary_dim, interleaved=self._family.pairs == "interleaved"
        )

    def stored(self, name: str, prefix: str | None = None, head_prefix: str = "") -> str:
        """The full name of a tensor in a checkpoint.

        Args:
            name: its name without prefix.
            prefix: what all names but the head's begin with [default: what the family's own class writes].
            head_prefix: what the head's name begins with.
        """
        names = self._family.names
        if name in (f"{names.head}.weight", f"{names.head}.bias"):
            return head_prefix + name
        return (names.prefixes[0] if prefix is None else prefix) + name

    def shapes(self) -> dict[str, Shape]:
        """Shapes of all tensors that the architecture implies, by name without prefix."""
        import torch

        shapes: dict[str, Shape] = {}

        def note(name: str, shape: Shape) -> Tensor:
            shapes[name] = shape
            return torch.empty(shape, device="meta")

        self.unpack_ends(note)
        for index in range(len(self._architecture.layers)):
            self.unpack_layer(index, note, None, None)
        return shapes

    def unpack_ends(self, get: Get) -> Ends:
        """The decoder's ends."""
        it, names = self._architecture, self._family.names
        into, hidden = it.embedding_size, it.hidden_size
        embedding = Embedding(
            weight=get(f"{names.embedding}.weight", (it.vocab_size, into)),
            norm=self._norm(get, names.embedding_norm, hidden),
            multiplier=it.embedding_multiplier,
            projection=self._outer_linear(get, names.embedding_projection, hidden, into),
            positions=self._positions(get),
        )
        head = None if it.tied else self.unpack_head(get)
        final_norm = self._norm(get, names.final_norm, hidden)
        return Ends(
            embedding, final_norm, self._outer_linear(get, names.output_projection, into, hidden), head
        )

    def unpack_head(self, get: Get) -> Linear:
        """The stored head, which a checkpoint of a tied model may have, too."""
        it, name = self._architecture, self._family.names.head
        bias = get(f"{name}.bias", (it.vocab_size,)) if self._has_bias("head") else None
        shape = (it.vocab_size, it.embedding_size)
        return self._with_codes(Linear(get(f"{name}.weight", shape), bias), name)

    def unpack_layer(self, index: int, get: Get, rope: Rope | None, slopes: Tensor | None) -> Layer:
        """Layer `index`, with its RoPE and its ALiBi slopes."""
        it, kind = self._architecture, self._architecture.layers[index]
        names = self._layer_names(index)
        q, k, v = self._unpack_qkv(get, names)
        qk_norm = self._family.qk_norm
        attention = Attention(
            q=self._reordered(q, it.num_heads),
            k=self._reordered(k, it.num_kv_heads),
            v=v,
            o=self._linear(get, names["o"], it.hidden_size, it.num_heads * it.head_dim, "o"),
            num_heads=it.num_heads,
            num_kv_heads=it.num_kv_heads,
            head_dim=it.head_dim,
            scale=it.scale,
            rope=rope,
            alibi_slopes=slopes,
            window=kind.window,
            softcap=it.softcap,
            clip=it.clip,
            q_norm=self._head_norm(get, names.get("q_norm"), it.num_heads),
            k_norm=self._head_norm(get, names.get("k_norm"), it.num_kv_heads),
            norm_over="heads" if qk_norm is not None and qk_norm.over == "heads" else "head",
            norm_after_rotation=qk_norm is not None and qk_norm.after_rotation,
        )
        norms = {part: self._norm(get, names.get(part), it.hidden_size) for part in NORMS}
        return Layer(
            attention=attention,
            mlp=self._unpack_mlp(get, names),
            parallel=self._family.parallel,
            residual_multiplier=it.residual_multiplier,
            **norms,
        )

    def pack_ends(self, ends: Ends) -> dict[str, Tensor]:
        """The inverse of `unpack_ends`."""
        names, embedding, packed = self._family.names, ends.embedding, dict[str, "Tensor"]()
        packed[f"{names.embedding}.weight"] = embedding.weight
        for name, norm in ((names.embedding_norm, embedding.norm), (names.final_norm, ends.final_norm)):
            packed |= self._pack_norm(name, norm)
        for name, linear in (
            (names.embedding_projection, embedding.projection),
            (names.output_projection, ends.output_projection),
            (names.head, ends.head),
        ):
            if name is not None and linear is not None:
                packed |= _pack(name, linear)
        if names.positions is not None and embedding.positions is not None:
            table, rows = embedding.positions, self._family.position_offset
            before = table.new_zeros(rows, table.shape[1])  # rows that no position reads
            packed[f"{names.positions}.weight"] = _concatenate([before, table])
        return packed

    def pack_layer(self, index: int, layer: Layer) -> dict[str, Tensor]:
        """The inverse of `unpack_layer`, for a layer without maps whose heads have the trained width.

        There may be fewer KV heads, and biases that the architecture does not have.
        """
        attention = layer.attention
        names = self._layer_names(index)
        packed = self._pack_qkv(names, attention)
        packed |= self._pack_linear(names["o"], attention.o)
        packed |= self._pack_head_norm(names.get("q_norm"), attention.q_norm, attention.num_heads)
        packed |= self._pack_head_norm(names.get("k_norm"), attention.k_norm, attention.num_kv_heads)
        for part in NORMS:
            packed |= self._pack_norm(names.get(part), getattr(layer, part))
        mlp, gate = layer.mlp, layer.mlp.gate
        if "gate_up" in names:
            assert gate is not None
            packed |= self._pack_linear(names["gate_up"], _join([gate, mlp.up], 1, len(gate.weight)))
        else:
            packed |= {} if gate is None else self._pack_linear(names["gate"], gate)
            packed |= self._pack_linear(names["up"], mlp.up)
        return packed | self._pack_linear(names["down"], mlp.down)

    def _layer_names(self, index: int) -> dict[str, str]:
        """Names of the tensors of layer `index` by part."""
        return {
            part: template.replace("{i}", str(index)) for part, template in self._family.names.layer.items()
        }

    def _has_bias(self, which: str) -> bool:
        return self._family.has_bias(which, self._architecture.config)

    def _linear(self, get: Get, name: str, out: int, into: int, which: str) -> Linear:
        shape = (into, out) if self._family.transposed else (out, into)
        weight = get(f"{name}.weight", shape)
        bias = get(f"{name}.bias", (out,)) if self._has_bias(which) else None
        linear = Linear(weight.T.contiguous() if self._family.transposed else weight, bias)
        return self._with_codes(linear, name)

    def _with_codes(self, linear: Linear, name: str) -> Linear:
        if self._get_codes is None:
            return linear
        codes = self._get_codes(f"{name}.weight", tuple(linear.weight.shape))
        if isinstance(codes, WeightCodes):
            return replace(linear, codes=codes)
        return replace(linear, inexact=codes)

    def _pack_linear(self, name: str, linear: Linear) -> dict[str, Tensor]:
        return _pack(name, replace(linear, weight=linear.weight.T) if self._family.transposed else linear)

    def _outer_linear(self, get: Get, name: str | None, out: int, into: int) -> Linear | None:
        """A projection beside the layers; there is none where both widths are equal."""
        return None if name is None or out == into else Linear(get(f"{name}.weight", (out, into)))

    def _positions(self, get: Get) -> Tensor | None:
        it, name = self._architecture, self._family.names.positions
        if name is None:
            return None
        assert it.max_positions is not None
        rows = self._family.position_offset
        return get(f"{name}.weight", (rows + it.max_positions, it.hidden_size))[rows:]

    def _norm(self, get: Get, name: str | None, width: int) -> Norm | None:
        if name is None:
            return None
        family, kind = self._family, self._family.norm_kind
        weight = get(f"{name}.weight", (width,)) + family.norm_offset if family.norm_weight else None
        bias = get(f"{name}.bias", (width,)) if family.norm_bias else None
        return Norm("rms" if kind == "rms" else "layer", weight, bias, self._architecture.norm_eps)

    def _pack_norm(self, name: str | None, norm: Norm | None) -> dict[str, Tensor]:
        if name is None or norm is None:
            return {}
        packed = {} if norm.weight is None else {f"{name}.weight": norm.weight - self._family.norm_offset}
        return packed if norm.bias is None else {**packed, f"{name}.bias": norm.bias}

    def _head_norm(self, get: Get, name: str | None, heads: int) -> Norm | None:
        """A norm of queries or keys, in the neutral order of pairs."""
        qk_norm, family = self._family.qk_norm, self._family
        if name is None or qk_norm is None:
            return None
        width = self._architecture.head_dim

        def read(kind: str) -> Tensor:
            if qk_norm.over == "head":
                return self._by_head(get(f"{name}.{kind}", (width,)), 1).flatten()
            if qk_norm.over == "heads":
                return self._by_head(get(f"{name}.{kind}", (heads * width,)), heads).flatten()
            if "{h}" not in name:
                return self._by_head(get(f"{name}.{kind}", (heads, width)), heads)
            rows = [get(f"{name.replace('{h}', str(head))}.{kind}", (width,)) for head in range(heads)]
            return self._by_head(_concatenate(rows), heads)

        weight, bias = read("weight") + family.norm_offset, read("bias") if qk_norm.bias else None
        return Norm("rms" if qk_norm.kind == "rms" else "layer", weight, bias, self._architecture.norm_eps)

    def _pack_head_norm(self, name: str | None, norm: Norm | None, heads: int) -> dict[str, Tensor]:
        if name is None or norm is None or norm.weight is None:
            return {}
        packed: dict[str, Tensor] = {}
        parts = {"weight": norm.weight - self._family.norm_offset, "bias": norm.bias}
        for kind, tensor in parts.items():
            if tensor is None:
                continue
            count = tensor.numel() // self._architecture.head_dim
            stored = self._by_head(tensor, count, inverse=True)
            if "{h}" in name:
                packed |= {f"{name.replace('{h}', str(head))}.{kind}": stored[head] for head in range(heads)}
            else:
                packed[f"{name}.{kind}"] = stored if tensor.ndim == 2 else stored.flatten()
        return packed

    def _unpack_qkv(self, get: Get, names: Mapping[str, str]) -> tuple[Linear, Linear, Linear]:
        it = self._architecture
        heads, kv_heads, width, hidden = it.num_heads, it.num_kv_heads, it.head_dim, it.hidden_size
        counts = {"q": heads, "k": kv_heads, "v": kv_heads}
        if "qkv" not in names:
            q, k, v = (
                self._linear(get, names[part], count * width, hidden, "qkv") for part, count in counts.items()
            )
            return q, k, v
        fused = self._linear(get, names["qkv"], (heads + 2 * kv_heads) * width, hidden, "qkv")
        groups, order = self._fused_groups(kv_heads)
        parts = _split(fused, groups, [counts[part] // groups for part in order], width)
        q, k, v = (parts[order.index(part)] for part in "qkv")
        return q, k, v

    def _pack_qkv(self, names: Mapping[str, str], attention: Attention) -> dict[str, Tensor]:
        heads, kv_heads = attention.num_heads, attention.num_kv_heads
        q = self._reordered(attention.q, heads, inverse=True)
        k = self._reordered(attention.k, kv_heads, inverse=True)
        parts = [q, k, attention.v]
        if "qkv" not in names:
            return {
                name: tensor
                for part, linear in zip("qkv", parts, strict=True)
                for name, tensor in self._pack_linear(names[part], linear).items()
            }
        groups, order = self._fused_groups(kv_heads)
        ordered = [parts["qkv".index(part)] for part in order]
        return self._pack_linear(names["qkv"], _join(ordered, groups, self._architecture.head_dim))

    def _fused_groups(self, kv_heads: int) -> tuple[int, str]:
        """Groups of heads in a fused matrix, and the order of queries, keys and values in each."""
        if self._family.fused == "stacked":
            return 1, "qkv"
        if self._family.fused == "grouped":
            return kv_heads, "qkv"
        return 4, "qvk"

    def _unpack_mlp(self, get: Get, names: Mapping[str, str]) -> Mlp:
        it = self._architecture
        inner, hidden = it.intermediate_size, it.hidden_size
        gate = None
        if "gate_up" in names:
            fused = self._linear(get, names["gate_up"], 2 * inner, hidden, "mlp")
            gate, up = _split(fused, 1, [1, 1], inner)
        else:
            if "gate" in names:
                gate = self._linear(get, names["gate"], inner, hidden, "mlp")
            up = self._linear(get, names["up"], inner, hidden, "mlp")
        return Mlp(gate, up, self._linear(get, names["down"], hidden, inner, "mlp"), it.activation)

    def _reordered(self, linear: Linear, heads: int, *, inverse: bool = False) -> Linear:
        """Rows of each head in the neutral order of pairs; `inverse`: in the stored order."""
        if self._order is None:
            return linear
        return linear.map_rows(lambda x: self._by_head(x, heads, inverse=inverse).flatten(0, 1))

    def _by_head(self, x: Tensor, heads: int, *, inverse: bool = False) -> Tensor:
        """x [heads·head_dim, ...] or [heads, head_dim] by head, each in the neutral order of pairs.

        `inverse`: from the neutral order to the stored one.
        """
        import torch

        width = self._architecture.head_dim
        by_head = x if x.shape[:2] == (heads, width) else x.unflatten(0, (heads, width))
        if self._order is None:
            return by_head
        order = torch.tensor(self._order, device=x.device)
        return by_head[:, order.argsort() if inverse else order]


def pair_order(head_dim: int, rotary_dim: int, *, interleaved: bool) -> tuple[int, ...] | None:
    """The stored place of each number of a head in the neutral order, in which pair i is (i, i + head_dim/2).

    Rotated pairs come first; numbers that do not rotate make up the other pairs. None: the orders are equal.
    """
    half, rest = rotary_dim // 2, (head_dim - rotary_dim) // 2
    first = [2 * i if interleaved else i for i in range(half)]
    second = [2 * i + 1 if interleaved else half + i for i in range(half)]
    still = list(range(rotary_dim, head_dim))
    order = (*first, *still[:rest], *second, *still[rest:])
    return None if order == tuple(range(head_dim)) else order


def with_biases(parts: Sequence[Linear]) -> list[Linear]:
    """The same maps, each with a bias if any of them has one."""
    if all(each.bias is None for each in parts):
        return list(parts)
    return [
        Linear(each.weight, each.weight.new_zeros(len(each.weight)) if each.bias is None else each.bias)
        for each in parts
    ]


def _split(linear: Linear, groups: int, counts: Sequence[int], width: int) -> list[Linear]:
    """The parts of a fused map: rows are `groups` groups of counts[0] heads of the first part, counts[1] of
    the second, and so on, of `width` rows each.
    """

    def part(index: int, x: Tensor) -> Tensor:
        return x.unflatten(0, (groups, -1, width)).split(list(counts), 1)[index].flatten(0, 2)

    return [linear.map_rows(partial(part, index)) for index in range(len(counts))]


def _join(parts: Sequence[Linear], groups: int, width: int) -> Linear:
    """The inverse of `_split`; if some parts have a bias, the others' is 0."""
    parts = with_biases(parts)

    def join(tensors: Sequence[Tensor]) -> Tensor:
        return _concatenate([x.unflatten(0, (groups, -1, width)) for x in tensors], 1).flatten(0, 2)

    biases = [each.bias for each in parts if each.bias is not None]
    return Linear(join([each.weight for each in parts]), join(biases) if biases else None)


def _pack(name: str, linear: Linear) -> dict[str, Tensor]:
    packed = {f"{name}.weight": linear.weight}
    return packed if linear.bias is None else {**packed, f"{name}.bias": linear.bias}


def _concatenate(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    import torch

    return torch.cat(list(parts), dim)
