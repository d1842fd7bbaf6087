"""Number formats, which are three: of stored weights, of the KV cache, and of computation.

A graph computes in one float dtype. Its KV cache is stored in a dtype of `DTYPES` as well. Its weights are
stored in the graph's dtype, or as integers with scales in the graph's dtype (`WeightFormat`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvexport.errors import BundleError, UsageError
from kvexport.files.schema import Table

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}  # of one number of a float dtype
DTYPES = tuple(BYTES)  # of computation and of the KV cache
BITS = {**{dtype: 8 * size for dtype, size in BYTES.items()}, "int8": 8, "int4": 4}  # of a stored weight
INTEGERS = ("int8", "int4")  # weight formats with scales
_MAX_SIZE = 1 << 53  # of blocks and numbers of weights: reports divide them
PAGE = 4096  # bytes; tensors of at least a page begin at one in the file of weights
BLOCKS = (128, 64, 32)  # block sizes of int4 that every engine supports, largest first


@dataclass(frozen=True)
class WeightFormat:
    """The format of a weight [out, in].

    Attributes:
        format: a key of `BITS`.
        block: adjacent columns that share a scale; None: the whole row (int8), or there are no scales.
    """

    format: str
    block: int | None = None

    @property
    def is_integer(self) -> bool:
        """Whether the weight is stored as integers with scales."""
        return self.format in INTEGERS

    def fits(self, dtype: str) -> bool:
        """Whether a graph that computes in `dtype` can have weights of this format."""
        if self.is_integer:
            return self.format == "int8" or self.block is not None
        return self.format == dtype and self.block is None

    def data_bytes(self, rows: int, columns: int) -> int:
        """Bytes of the numbers of a weight [rows, columns], without scales."""
        return rows * columns * BITS[self.format] // 8

    def scale_bytes(self, rows: int, columns: int, dtype: str) -> int:
        """Bytes of the scales of a weight [rows, columns], which are stored in `dtype`."""
        if not self.is_integer:
            return 0
        return rows * (columns // self.block if self.block else 1) * BYTES[dtype]

    def stored_bytes(self, rows: int, columns: int, dtype: str) -> int:
        """Bytes of the numbers and scales of a weight [rows, columns]."""
        return self.data_bytes(rows, columns) + self.scale_bytes(rows, columns, dtype)

    def __str__(self) -> str:
        return self.format if self.block is None else f"{self.format}, blocks of {self.block}"


def weight_format(name: str, rows: int, columns: int, block: int = BLOCKS[0]) -> WeightFormat:
    """The format of a weight [rows, columns] that is to be stored as `name`.

    In int8 a row has one scale. In int4 the block is the largest of `BLOCKS` that divides the columns and is
    at most `block`. A weight that no such block divides, or whose number of rows is odd, is stored in int8:
    TensorRT takes INT4 tensors [in, out] only with an even last dimension.
    """
    if name != "int4":
        return WeightFormat(name)
    blocks = [each for each in BLOCKS if each <= block and columns % each == 0]
    return WeightFormat("int4", blocks[0]) if blocks and rows % 2 == 0 else WeightFormat("int8")


def default_block(hidden_size: int) -> int:
    """The largest block of int4 weights of a model: 128, or 64 in a small model."""
    return 128 if hidden_size >= 2048 else 64


@dataclass(frozen=True)
class WeightFormats:
    """The names of the formats that weights are to be stored in; keys of `BITS`.

    Attributes:
        layers: of the linear maps of the layers.
        embedding: of the embedding table.
        head: of the head. A head that is tied to the embedding has a table of its own if this differs.
        block: largest block of int4.
        eight_bits: of each layer, the names of linear maps (q, k, v, o, gate, up, down) that are stored as
            int8 in place of int4; None: none of them.
    """

    layers: str
    embedding: str
    head: str
    block: int = BLOCKS[0]
    eight_bits: tuple[tuple[str, ...], ...] | None = None

    @property
    def summary(self) -> str:
        """The formats as a phrase: "int4; head int8; embedding int8"."""
        if {self.embedding, self.head} == {self.layers}:
            return self.layers
        return f"{self.layers}; head {self.head}; embedding {self.embedding}"


def resolve_formats(
    dtype: str,
    *,
    tied: bool,
    hidden_size: int,
    weights: str | None = None,
    head_weights: str | None = None,
    embedding_weights: str | None = None,
    weight_block: int | None = None,
) -> WeightFormats:
    """The formats that the options of a build ask for.

    By default head and embedding are stored as the layers, and an embedding to which the head is tied as the
    head.

    Args:
        dtype: of computation.
        tied: whether the head is tied to the embedding.
        hidden_size: of the model.
        weights, head_weights, embedding_weights, weight_block: the options; None: the default.

    Raises:
        UsageError: as `require_formats`.
    """
    require_formats(dtype, weights, head_weights, embedding_weights, weight_block)
    layers = weights or dtype
    head = head_weights or (embedding_weights if tied else None) or layers
    embedding = embedding_weights or (head if tied else layers)
    return WeightFormats(layers, embedding, head, weight_block or default_block(hidden_size))


def require_formats(
    dtype: str, weights: str | None, head: str | None, embedding: str | None, block: int | None
) -> None:
    """Check the options of a build that set the formats of weights; None: not given.

    Raises:
        UsageError: a format is neither integer nor the data type of computation, or the block is not one of
            `BLOCKS`.
    """
    options = {"--weights": weights, "--head-weights": head, "--embedding-weights": embedding}
    for option, value in options.items():
        if value is not None and value not in (*INTEGERS, dtype):
            raise UsageError(
                f"{option} must be int8, int4 or the data type of computation",
                got=f"{value} with --dtype {dtype}",
                expected=f"int8, int4 or {dtype}",
                fix=f"use --dtype {value}" if value in DTYPES else "choose one of these",
            )
    if block is not None and block not in BLOCKS:
        raise UsageError(
            "--weight-block must be a block that every engine takes",
            got=block,
            expected=", ".join(map(str, BLOCKS)),
        )


def require_mean_bits(bits: float, least: float) -> None:
    """Check the mean number of bits of weights in int4 and int8 against that of all of them in int4.

    Raises:
        UsageError: `bits` are fewer than the least possible.
    """
    if bits < least:
        raise UsageError(
            "--weight-bits must allow the smallest format of every weight, with its scales",
            got=f"{bits:g}",
            expected=f"at least {int(least * 1000 + 1) / 1000:g}",
            fix="give more bits, a larger --weight-block, or --dtype float16, whose scales are smaller",
        )


@dataclass(frozen=True)
class WeightShare:
    """The number of weights of a layer's linear maps that are stored in one format."""

    format: WeightFormat
    parameters: int


@dataclass(frozen=True)
class StoredWeights:
    """The formats of all weights of a graph.

    Attributes:
        embedding: of the embedding table.
        head: of the head; that of the embedding if the head is tied to it.
        layers: of the linear maps of each layer, largest number of weights first. Norms, biases and maps of
            keys, queries and values are stored in the graph's dtype.
    """

    embedding: WeightFormat
    head: WeightFormat
    layers: tuple[tuple[WeightShare, ...], ...]

    @property
    def formats(self) -> tuple[WeightFormat, ...]:
        """Every format, in the order of the attributes."""
        return (self.embedding, self.head, *(share.format for layer in self.layers for share in layer))

    @property
    def is_quantized(self) -> bool:
        """Whether any weight is stored as integers."""
        return any(each.is_integer for each in self.formats)

    def to_json(self) -> dict[str, Any]:
        """The value of the manifest's key "weights"."""
        return {
            "embedding": vars(self.embedding),
            "head": vars(self.head),
            "layers": [
                {"maps": [{**vars(share.format), "parameters": share.parameters} for share in layer]}
                for layer in self.layers
            ],
        }

    @property
    def summary(self) -> str:
        """The formats as a phrase: "int4, blocks of 64; head int8; embedding int8"."""
        totals: dict[WeightFormat, int] = {}
        for share in (share for layer in self.layers for share in layer):
            totals[share.format] = totals.get(share.format, 0) + share.parameters
        body = " and ".join(str(each) for each in sorted(totals, key=lambda each: -totals[each]))
        if {self.embedding, self.head} == {*totals}:
            return body
        return f"{body}; head {self.head}; embedding {self.embedding}"

    def require_fit(self, dtype: str, num_layers: int, fix: str) -> None:
        """Check the formats against the dtype of computation and the number of layers.

        Raises:
            BundleError: they contradict each other; `fix` is what it says to do.
        """
        if len(self.layers) != num_layers:
            raise BundleError(
                "the manifest's weights must describe num_hidden_layers layers",
                got=len(self.layers),
                expected=num_layers,
                fix=fix,
            )
        for each in self.formats:
            if not each.fits(dtype):
                raise BundleError(
                    "the manifest's weights must have formats that its dtype allows",
                    got=each,
                    expected=f"{dtype}, int8, or int4 with a block",
                    fix=fix,
                )

    @classmethod
    def from_table(cls, table: Table) -> StoredWeights:
        """The inverse of `to_json`.

        Raises:
            KvexportError: the table's error class: a key is missing, unknown or of another type.
        """
        embedding, head = _format_of(table.table("embedding")), _format_of(table.table("head"))
        layers = [
            tuple(
                WeightShare(_format_of(each), each.integer("parameters", 1, _MAX_SIZE))
                for each in layer.tables("maps")
            )
            for layer in table.tables("layers")
        ]
        return cls(embedding, head, tuple(layers))


def _format_of(table: Table) -> WeightFormat:
    block = table.integer("block", 1, _MAX_SIZE) if table.has("block") else None
    return WeightFormat(table.string("format", tuple(BITS)), block)


def weight_shares(weights: Sequence[tuple[WeightFormat, int]]) -> tuple[WeightShare, ...]:
    """The shares of weights that are given with their formats and numbers, largest share first."""
    totals: dict[WeightFormat, int] = {}
    for each, count in weights:
        totals[each] = totals.get(each, 0) + count
    shares = [WeightShare(each, count) for each, count in totals.items()]
    return tuple(sorted(shares, key=lambda share: -share.parameters))
