"""Count a model's numbers by their use, from its config.json or from a bundle's manifest; reads no
weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvexport.bundle.bundle import COPY_AGAIN
from kvexport.bundle.graph_io import DATA_FILE, GRAPH_FILE
from kvexport.bundle.manifest import BYTES, REBUILD, Manifest
from kvexport.engine.options import DEFAULT_CHUNK
from kvexport.errors import BundleError, UsageError
from kvexport.eviction.config import Eviction
from kvexport.model.checkpoint import read_config, read_json
from kvexport.model.config import require_unquantised, sizes_of, whole_number
from kvexport.model.families import Family, family_of


@dataclass(frozen=True)
class Cache:
    """A layer's cache of a token: `width` numbers in each of `heads` KV heads, key and value together."""

    heads: int
    width: int


@dataclass(frozen=True)
class Sizes:
    """A model as it would be built. All values count numbers, not bytes.

    Attributes:
        num_heads, hidden, vocab: as in config.json.
        max_positions: maximum tokens of a sequence; None: unbounded.
        matrices: numbers in the projections of all layers, which weight-only quantisation compresses.
        rows: output rows of those matrices.
        small: numbers in norms, biases, key maps and query maps.
        embedding: numbers in the embedding table, of which a token reads one row.
        head: numbers in the head; 0 if it is tied to the embedding.
        mlp_width: total width of the activations of a layer's MLP.
        caches: one for each layer.
        maps: whether keys are projected after rotation (the online method), which needs maps.
        eviction: the eviction within a token budget; None: no layer evicts.
    """

    num_heads: int
    hidden: int
    vocab: int
    max_positions: int | None
    matrices: int
    rows: int
    small: int
    embedding: int
    head: int
    mlp_width: int
    caches: tuple[Cache, ...]
    maps: bool = False
    eviction: Eviction | None = None

    @property
    def parameters(self) -> int:
        """Numbers in all weights."""
        return self.matrices + self.small + self.embedding + self.head

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
        return DEFAULT_CHUNK if self.eviction is None else min(DEFAULT_CHUNK, self.eviction.chunk)

    def evicts(self, layer: int) -> bool:
        return self.eviction is not None and self.eviction.evicts(layer)

    def cached_tokens(self, layer: int, tokens: int) -> int:
        """Tokens of a sequence of `tokens` tokens that a layer has in each KV head."""
        return tokens if self.eviction is None else self.eviction.slots(layer, tokens)


@dataclass(frozen=True)
class Architecture:
    """A trained model, described by its config.json."""

    family: Family
    config: Mapping[str, Any]
    vocab: int
    hidden: int
    layers: int
    num_heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    max_positions: int | None
    tied: bool

    @property
    def kv_head_counts(self) -> list[int]:
        """Numbers of KV heads that conversion can produce, in descending order."""
        return [count for count in range(self.kv_heads, 0, -1) if self.kv_heads % count == 0]

    def sizes(self, kv_heads: int) -> Sizes:
        """The model with `kv_heads` KV heads in each layer, converted as `kvexport build` does by default.

        With rotation keys use the online method: each layer keeps its trained W_K and gains a key map and a
        query map. Without rotation keys are folded: W_K shrinks, and there are no maps.

        Raises:
            UsageError: `kv_heads` does not divide the trained number.
        """
        if kv_heads not in self.kv_head_counts:
            raise UsageError(
                "--kv-heads must divide the model's KV heads",
                got=f"{kv_heads} of {self.kv_heads}",
                expected=", ".join(map(str, self.kv_head_counts)),
                fix="choose a number from the list",
            )
        family, hidden, dim, inner = self.family, self.hidden, self.head_dim, self.intermediate
        converted = kv_heads != self.kv_heads
        maps = converted and family.position == "rope"
        queries, keys, values = (
            self.num_heads * dim,
            (self.kv_heads if maps else kv_heads) * dim,
            kv_heads * dim,
        )
        qkv_rows, mlp_rows = queries + keys + values, (2 if family.gated else 1) * inner
        matrices = (qkv_rows + queries + mlp_rows + inner) * hidden
        rows = qkv_rows + hidden + mlp_rows + hidden
        norm = 2 if family.norm_kind == "layer" else 1  # weight, and bias
        small = 2 * norm * hidden
        small += 2 * norm * dim if "q_norm" in family.layer else 0
        small += qkv_rows if family.has_bias("qkv", self.config) else 0
        small += (
            hidden if converted or family.has_bias("o", self.config) else 0
        )  # what the mean value loses is a bias
        small += mlp_rows + hidden if family.has_bias("mlp", self.config) else 0
        small += (self.kv_heads + self.num_heads) * dim * dim if maps else 0
        norms_outside = norm * hidden * (1 if family.embedding_norm is None else 2)
        return Sizes(
            num_heads=self.num_heads,
            hidden=hidden,
            vocab=self.vocab,
            max_positions=self.max_positions,
            matrices=self.layers * matrices,
            rows=self.layers * rows,
            small=self.layers * small + norms_outside,
            embedding=self.vocab * hidden,
            head=0 if self.tied else self.vocab * hidden,
            mlp_width=(3 if family.gated else 2) * inner,
            caches=(Cache(kv_heads, 2 * dim),) * self.layers,
            maps=maps,
        )


def architecture(path: Path) -> Architecture:
    """Read the architecture from a config.json; `path` is that file or its folder.

    Raises:
        CheckpointError: there is no such file, the family is unknown, or a setting is missing or impossible.
    """
    config = read_json(path) if path.suffix == ".json" and path.is_file() else read_config(path)
    require_unquantised(config)
    family = family_of(config)
    settings = family.settings(config)
    sizes = sizes_of(settings, rotated=family.position == "rope")
    inner = config.get("intermediate_size")
    return Architecture(
        family=family,
        config=config,
        vocab=sizes.vocab,
        hidden=sizes.hidden,
        layers=sizes.layers,
        num_heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        intermediate=4 * sizes.hidden if inner is None else whole_number("intermediate_size", inner),
        max_positions=sizes.max_positions,
        tied=bool(settings["tied"]),
    )


def bundle_sizes(path: Path, manifest: Manifest) -> Sizes:
    """The sizes of the bundle at `path`; weights are counted by the bytes of their file, including rotary
    tables.

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
    numbers = manifest.files[DATA_FILE].bytes // BYTES[manifest.dtype]
    embedding = model.vocab_size * model.hidden_size
    head = 0 if model.tie_word_embeddings else embedding
    matrices = numbers - embedding - head
    mlp = matrices - sum(layer.parameters for layer in layers)
    return Sizes(
        num_heads=layers[0].num_attention_heads,
        hidden=model.hidden_size,
        vocab=model.vocab_size,
        max_positions=manifest.capacity,
        matrices=matrices,
        rows=0,
        small=0,
        embedding=embedding,
        head=head,
        mlp_width=max(0, mlp) // (len(layers) * model.hidden_size),
        caches=tuple(
            Cache(layer.num_key_value_heads, layer.key_head_dim + layer.value_head_dim) for layer in layers
        ),
        eviction=manifest.eviction,
    )
