"""Bytes of a model's weights by use and format, with scales, as the bundle's file has them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from kvexport.bundle.formats import BYTES, PAGE, StoredWeights, WeightFormat, WeightFormats, weight_format
from kvexport.bundle.manifest import Manifest


@dataclass(frozen=True)
class Precision:
    """The data type of computation and cache, and the formats of weights.

    Norms, biases and maps of keys, queries and values are stored in the data type.

    Attributes:
        dtype: of computation and cache.
        weights: formats of the weights.
        bits: mean number of bits of int4 weights, of which some get 8; None: all have 4.
        fixed: "embedding" and "head", if their format is fixed: they have no part in the choice of bits.
    """

    dtype: str
    weights: WeightFormats
    bits: float | None = None
    fixed: frozenset[str] = frozenset()

    @property
    def number_bytes(self) -> int:
        """Bytes of a number of the data type."""
        return BYTES[self.dtype]


def precision(dtype: str, weights: WeightFormats | None = None) -> Precision:
    """A precision; without `weights`, they are all stored in the data type."""
    return Precision(dtype, WeightFormats(dtype, dtype, dtype) if weights is None else weights)


def bundle_precision(manifest: Manifest) -> Precision:
    """The precision of a bundle; of its layers, the format of most weights."""
    weights = manifest.weights
    totals: Counter[str] = Counter()
    for share in (share for layer in weights.layers for share in layer):
        totals[share.format.format] += share.parameters
    layers = totals.most_common(1)[0][0]
    return Precision(manifest.dtype, WeightFormats(layers, weights.embedding.format, weights.head.format))


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of the weights of a model.

    Attributes:
        layers: linear maps of the layers, with their scales.
        embedding: embedding table, with its scales; also the head's if the head has no table of its own.
        head: head, with its scales; 0 if it uses the embedding's table.
        other: norms, biases, maps of keys, queries and values, and rotary tables.
        scales: all scales, which are part of the first three.
        eight_bits: what int4 weights take more because some of them get 8 bits. `kvexport build` chooses them
            by what they cost, in layers, embedding and head. 0 for a bundle, whose parts have it.
    """

    layers: int
    embedding: int
    head: int
    other: int
    scales: int
    eight_bits: int = 0

    @property
    def total(self) -> int:
        """Bytes of all weights."""
        return self.layers + self.embedding + self.head + self.other + self.eight_bits

    @property
    def read(self) -> int:
        """Bytes that a decode step reads; of an embedding that is no head, it reads one row."""
        return self.total - (self.embedding if self.head else 0)


@dataclass(frozen=True)
class Tables:
    """Linear maps, embedding and head of a model.

    Attributes:
        shapes: number of linear maps of each shape (rows, columns).
        vocab, width: rows and columns of embedding and head.
        tied: whether the head is tied to the embedding.
    """

    shapes: Mapping[tuple[int, int], int]
    vocab: int
    width: int
    tied: bool

    def open_to_bits(self, stored: Precision) -> Mapping[tuple[int, int], int]:
        """Number of weights of each shape that get 4 or 8 bits."""
        weights, fixed = Counter(self.shapes), stored.fixed
        names = {"embedding"} if self.tied else {"embedding", "head"}
        if not (self.tied and fixed):
            weights[self.vocab, self.width] += len(names - fixed)
        return weights


@dataclass(frozen=True)
class _Stored:
    """Bytes of tensors in a file, and the part of them that is scales."""

    total: int = 0
    scales: int = 0

    def __add__(self, other: _Stored) -> _Stored:
        return _Stored(self.total + other.total, self.scales + other.scales)


def planned_weights(stored: Precision, tables: Tables, small: int) -> WeightBytes:
    """The weights of a model as `kvexport build` would write them.

    Args:
        stored: their formats.
        tables: the model's.
        small: numbers that are stored in the data type.
    """
    formats, vocab, width = stored.weights, tables.vocab, tables.width

    def table(name: str, rows: int) -> _Stored:
        return _matrix(weight_format(name, rows, width, formats.block), vocab, width, stored.dtype)

    layers = _Stored()
    for (rows, columns), count in tables.shapes.items():
        chosen = weight_format(formats.layers, rows, columns, formats.block)
        layers += _times(count, _matrix(chosen, rows, columns, stored.dtype))
    embedding = table(formats.embedding, vocab + vocab % 2)  # int4 needs no even number of rows in it
    shares_table = tables.tied and formats.head == formats.embedding
    head = _Stored() if shares_table else table(formats.head, vocab)
    return WeightBytes(
        layers=layers.total,
        embedding=embedding.total,
        head=head.total,
        other=small * stored.number_bytes,
        scales=layers.scales + embedding.scales + head.scales,
        eight_bits=_more_for_eight_bits(stored, tables),
    )


def least_bits(stored: Precision, tables: Tables) -> float:
    """Mean number of bits of the weights that are open to 8 bits, if none of them gets them."""
    weights = tables.open_to_bits(stored)
    return 8 * _exact_bytes("int4", weights, stored) / _numbers(weights)


def _more_for_eight_bits(stored: Precision, tables: Tables) -> int:
    """Bytes between all weights in int4 and the mean number of bits."""
    if stored.bits is None or stored.weights.layers != "int4":
        return 0
    weights = tables.open_to_bits(stored)
    least, most = (_exact_bytes(name, weights, stored) for name in ("int4", "int8"))
    return int(min(most, max(least, stored.bits * _numbers(weights) / 8))) - least


def _numbers(weights: Mapping[tuple[int, int], int]) -> int:
    return sum(rows * columns * count for (rows, columns), count in weights.items())


def _exact_bytes(name: str, weights: Mapping[tuple[int, int], int], stored: Precision) -> int:
    """Bytes of weights that are stored as `name`, without padding."""
    total = 0
    for (rows, columns), count in weights.items():
        chosen = weight_format(name, rows, columns, stored.weights.block)
        total += count * chosen.stored_bytes(rows, columns, stored.dtype)
    return total


def bundle_weights(manifest: Manifest, total: int, *, tied: bool) -> WeightBytes:
    """The weights of a bundle, from the formats that its manifest names.

    The manifest has no shapes: maps of the layers are taken to be as wide as the model. `other` is the rest
    of the file, so that the sum is exact.

    Args:
        total: bytes of the file of weights.
        tied: whether the head is tied to the embedding.
    """
    weights, dtype = manifest.weights, manifest.dtype
    vocab, width = manifest.model.vocab_size, manifest.model.hidden_size
    layers = _layers_of(weights, width, dtype)
    embedding = _matrix(weights.embedding, vocab, width, dtype)
    shares_table = tied and weights.head == weights.embedding
    head = _Stored() if shares_table else _matrix(weights.head, vocab, width, dtype)
    parts = layers + embedding + head
    return WeightBytes(
        layers=layers.total,
        embedding=embedding.total,
        head=head.total,
        other=max(0, total - parts.total),
        scales=parts.scales,
    )


def _layers_of(weights: StoredWeights, columns: int, dtype: str) -> _Stored:
    layers = _Stored()
    for share in (share for layer in weights.layers for share in layer):
        rows = share.parameters // columns
        scales = share.format.scale_bytes(rows, columns, dtype)
        layers += _Stored(share.format.data_bytes(1, share.parameters) + scales, scales)
    return layers


def _matrix(chosen: WeightFormat, rows: int, columns: int, dtype: str) -> _Stored:
    """A weight [rows, columns]."""
    data, scales = chosen.data_bytes(rows, columns), chosen.scale_bytes(rows, columns, dtype)
    if not chosen.is_integer:
        return _Stored(data)
    padded = _in_pages(data + scales) if scales < PAGE else _in_pages(data) + _in_pages(scales)
    return _Stored(padded, scales)


def _times(count: int, stored: _Stored) -> _Stored:
    return _Stored(count * stored.total, count * stored.scales)


def _in_pages(size: int) -> int:
    """Bytes that a tensor takes in the file."""
    return -(-size // PAGE) * PAGE
