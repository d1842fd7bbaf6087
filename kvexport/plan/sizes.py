"""Count a model's numbers by their use, from its config.json or from a bundle's manifest; reads no
weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kvexport.bundle.bundle import COPY_AGAIN
from kvexport.bundle.formats import BLOCKS
from kvexport.bundle.graph_io import DATA_FILE, DEFAULT_CAPACITY, GRAPH_FILE, ring_slots
from kvexport.bundle.manifest import REBUILD, Manifest, largest_call
from kvexport.errors import BundleError, UsageError
from kvexport.eviction.config import Eviction
from kvexport.model.architecture import Architecture, LayerKind, read_architecture
from kvexport.model.checkpoint import read_config, read_json
from kvexport.model.family import NORMS
from kvexport.model.quantized.formats import stored_format
from kvexport.plan.weights import Precision, Tables, WeightBytes, bundle_weights, planned_weights


@dataclass(frozen=True)
class Cache:
    """A layer's cache of a token: `width` numbers in each of `heads` KV heads, key and value together.

    `window`: sliding window in tokens; None: full attention.
    """

    heads: int
    width: int
    window: int | None = None


@dataclass(frozen=True)
class Sizes:
    """A model as it would be built. All values count numbers, not bytes.

    Attributes:
        num_heads, hidden, vocab: as in config.json.
        max_positions: maximum tokens of a sequence; None: unbounded.
        matrices: numbers in the projections of all layers, which weight-only quantisation compresses.
        small: numbers in norms, biases, key maps and query maps.
        embedding: numbers in the embedding table, of which a token reads one row.
        head: numbers in the head; 0 if it is tied to the embedding.
        mlp_width: total width of the activations of a layer's MLP.
        caches: one for each layer.
        shapes: number of matrices of each shape (rows, columns); empty for a bundle.
        rotary: numbers in the rotary tables.
        stored: bytes of the weights of a bundle; None: a checkpoint.
        maps: whether keys are projected after rotation (the online method), which needs maps.
        eviction: the eviction within a token budget; None: no layer evicts.
    """

    num_heads: int
    hidden: int
    vocab: int
    max_positions: int | None
    matrices: int
    small: int
    embedding: int
    head: int
    mlp_width: int
    caches: tuple[Cache, ...]
    shapes: Mapping[tuple[int, int], int] = field(default_factory=dict)
    rotary: int = 0
    stored: WeightBytes | None = None
    maps: bool = False
    eviction: Eviction | None = None

    @property
    def parameters(self) -> int:
        """Numbers in all weights."""
        return self.matrices + self.small + self.embedding + self.head

    def weight_bytes(self, precision: Precision) -> WeightBytes:
        """Bytes of the weights in a precision; those of a bundle are fixed."""
        if self.stored is not None:
            return self.stored
        return planned_weights(precision, self.tables, self.small + self.rotary)

    @property
    def tables(self) -> Tables:
        """Linear maps, embedding and head of a checkpoint."""
        return Tables(self.shapes, self.vocab, self.embedding // self.vocab, tied=not self.head)

    @property
    def layers(self) -> int:
        return len(self.caches)

    @property
    def kv_heads(self) -> int:
        """KV heads of a layer; the largest number if layers differ."""
        return max(cache.heads for cache in self.caches)

    @property
    def kv_width(self) -> int:
        """Cached numbers of a token in all layers, without eviction."""
        return sum(cache.heads * cache.width for cache in self.caches)

    @property
    def chunk(self) -> int:
        """Tokens of a prompt that are computed in one call."""
        return largest_call(self.eviction)

    def evicts(self, layer: int) -> bool:
        return self.eviction is not None and self.eviction.evicts(layer)

    def cached_tokens(self, layer: int, tokens: int) -> int:
        """Tokens of a sequence of `tokens` tokens that a layer has in each KV head."""
        window = self.caches[layer].window
        if window is not None and not self.evicts(layer):
            return ring_slots(window, tokens, self.chunk)
        return tokens if self.eviction is None else self.eviction.slots(layer, tokens)


def trained_sizes(path: Path) -> TrainedSizes:
    """The sizes of a checkpoint from its config.json, read as `kvexport build` reads it.

    Args:
        path: that file, or its folder.

    Raises:
        CheckpointError: there is no such file, the family is unknown, or a setting is missing or impossible.
    """
    config = read_json(path) if path.suffix == ".json" and path.is_file() else read_config(path)
    return TrainedSizes(read_architecture(config))


class TrainedSizes:
    """Sizes of a trained model with any number of KV heads."""

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture

    @property
    def kv_head_counts(self) -> list[int]:
        """Numbers of KV heads that conversion can produce, in descending order."""
        heads = self.architecture.num_kv_heads
        return [count for count in range(heads, 0, -1) if heads % count == 0]

    def with_kv_heads(self, kv_heads: int) -> Sizes:
        """The model with `kv_heads` KV heads in each layer, converted as `kvexport build` does by default.

        Where a rotation, a norm or a clip follows W_K, keys use the online method: W_K stays as trained, and
        the layer gains a key map and a query map. Elsewhere keys are folded: W_K shrinks, and there are no
        maps.

        Raises:
            UsageError: `kv_heads` does not divide the trained number.
        """
        it, family = self.architecture, self.architecture.family
        if kv_heads not in self.kv_head_counts:
            raise UsageError(
                "--kv-heads must divide the model's KV heads",
                got=f"{kv_heads} of {it.num_kv_heads}",
                expected=", ".join(map(str, self.kv_head_counts)),
                fix="choose a number from the list",
            )
        converted = kv_heads != it.num_kv_heads
        layers = [self._layer(kind, kv_heads) for kind in it.layers]
        norms_outside = [family.names.embedding_norm, family.names.final_norm]
        projections = [family.names.embedding_projection, family.names.output_projection]
        outside = self._norm * sum(name is not None for name in norms_outside)
        if it.hidden_size != it.embedding_size:
            outside += it.hidden_size * it.embedding_size * sum(name is not None for name in projections)
        outside += it.vocab_size if family.has_bias("head", it.config) else 0
        if family.names.positions is not None:
            outside += (it.max_positions or 0) * it.hidden_size
        embedding = it.vocab_size * it.embedding_size
        return Sizes(
            num_heads=it.num_heads,
            hidden=it.hidden_size,
            vocab=it.vocab_size,
            max_positions=it.max_positions,
            matrices=sum(layer.matrices for layer in layers),
            shapes=sum((layer.shapes for layer in layers), Counter()),
            rotary=self._rotary,
            small=sum(layer.small for layer in layers) + outside,
            embedding=embedding,
            head=0 if it.tied else embedding,
            mlp_width=(3 if family.is_gated else 2) * it.intermediate_size,
            caches=tuple(Cache(kv_heads, 2 * it.head_dim, kind.window) for kind in it.layers),
            maps=converted and any(map(self._needs_maps, it.layers)),
        )

    @property
    def stored_block(self) -> int | None:
        """The block of int4 in a quantised checkpoint, which a build keeps; None: it has none."""
        stored = stored_format(self.architecture.config)
        return stored.block if stored is not None and stored.block in BLOCKS else None

    @property
    def _norm(self) -> int:
        """Numbers of a norm over the hidden size."""
        family = self.architecture.family
        return self.architecture.hidden_size * (family.norm_weight + family.norm_bias)

    def _needs_maps(self, kind: LayerKind) -> bool:
        it = self.architecture
        return kind.rope is not None or it.family.qk_norm is not None or it.clip is not None

    def _layer(self, kind: LayerKind, kv_heads: int) -> _LayerSizes:
        it, family, dim = self.architecture, self.architecture.family, self.architecture.head_dim
        trained, hidden, inner = it.num_kv_heads, it.hidden_size, it.intermediate_size
        converted = kv_heads != trained
        maps = converted and self._needs_maps(kind)
        encoder = converted and it.clip is not None  # clipped values are encoded after the clip
        queries = it.num_heads * dim
        keys, values = (trained if maps else kv_heads) * dim, (trained if encoder else kv_heads) * dim
        qkv_rows, mlp_rows = queries + keys + values, (2 if family.is_gated else 1) * inner
        small = self._norm * sum(name in family.names.layer for name in NORMS)
        small += self._qk_norm()
        small += qkv_rows if family.has_bias("qkv", it.config) else 0
        # what the mean value loses is a bias of o
        small += hidden if converted or family.has_bias("o", it.config) else 0
        small += mlp_rows + hidden if family.has_bias("mlp", it.config) else 0
        small += (trained + it.num_heads) * dim * dim if maps else 0
        small += trained * dim * dim if encoder else 0
        shapes: Counter[tuple[int, int]] = Counter()
        for rows, columns in ((queries, hidden), (keys, hidden), (values, hidden), (hidden, queries)):
            shapes[rows, columns] += 1
        shapes[inner, hidden] += 2 if family.is_gated else 1
        shapes[hidden, inner] += 1
        matrices = sum(rows * columns * count for (rows, columns), count in shapes.items())
        return _LayerSizes(matrices=matrices, shapes=shapes, small=small)

    @property
    def _rotary(self) -> int:
        """Numbers of the cosines and sines of a bundle of the default capacity."""
        ropes = {repr(kind.rope) for kind in self.architecture.layers if kind.rope is not None}
        capacity = min(self.architecture.max_positions or DEFAULT_CAPACITY, DEFAULT_CAPACITY)
        return len(ropes) * capacity * self.architecture.head_dim

    def _qk_norm(self) -> int:
        """Numbers of the norms of queries and keys."""
        it, norm = self.architecture, self.architecture.family.qk_norm
        if norm is None:
            return 0
        heads = 2 if norm.over == "head" else it.num_heads + it.num_kv_heads
        return heads * it.head_dim * (1 + norm.bias)


@dataclass(frozen=True)
class _LayerSizes:
    """Numbers of one layer, as in `Sizes`."""

    matrices: int
    shapes: Counter[tuple[int, int]]
    small: int


def bundle_sizes(path: Path, manifest: Manifest) -> Sizes:
    """The sizes of the bundle at `path`; the bytes of its weights are those of their file.

    Raises:
        BundleError: its graph is missing, or the manifest does not say whether the head is tied.
    """
    if not (path / GRAPH_FILE).is_file():
        raise BundleError(f"the bundle {path} must contain {GRAPH_FILE}", fix=COPY_AGAIN)
    model, layers = manifest.model, manifest.layers
    if model.tie_word_embeddings is None:
        raise BundleError(
            f"the manifest of bundle {path} must say whether the head is tied (model.tie_word_embeddings)",
            fix=REBUILD,
        )
    tied = model.tie_word_embeddings
    embedding = model.vocab_size * model.hidden_size
    matrices = sum(share.parameters for layer in manifest.weights.layers for share in layer)
    mlp = matrices - sum(layer.parameters for layer in layers)
    return Sizes(
        num_heads=layers[0].num_attention_heads,
        hidden=model.hidden_size,
        vocab=model.vocab_size,
        max_positions=manifest.capacity,
        matrices=matrices,
        small=0,
        embedding=embedding,
        head=0 if tied else embedding,
        stored=bundle_weights(manifest, manifest.files[DATA_FILE].bytes, tied=tied),
        mlp_width=max(0, mlp) // (len(layers) * model.hidden_size),
        caches=tuple(
            Cache(layer.num_key_value_heads, layer.key_head_dim + layer.value_head_dim, layer.window)
            for layer in layers
        ),
        eviction=manifest.eviction,
    )
