"""The manifest of a bundle as typed data: read, validated, written. No other file of the bundle is opened."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from kvexport.bundle.formats import BYTES, DTYPES, StoredWeights
from kvexport.bundle.graph_io import (
    CHUNK,
    DATA_FILE,
    GRAPH_FILE,
    GraphContract,
    TensorSpec,
    cache_specs,
    contract,
    ring_of,
    ring_slots,
)
from kvexport.bundle.layer_report import LayerReport
from kvexport.errors import BundleError, UsageError, reason_of
from kvexport.eviction.config import STATE_WIDTH, Eviction
from kvexport.files.schema import Table, read_limited

FORMAT = 3  # format 2 had weights in the dtype of computation only
MANIFEST_FILE = "manifest.json"
REBUILD = "build the bundle again: kvexport build CHECKPOINT -o BUNDLE"
_MAX_BYTES = 1 << 24
_MAX_SIZE = 1 << 53  # of heads, widths and parameters: reports divide them
_DIGEST = re.compile(rb'"manifest_sha256": "([0-9a-f]{64})"')
_DIGEST_KEY = b'"manifest_sha256": "'


@dataclass(frozen=True)
class Model:
    """The decoder, with the names of config.json.

    Attributes:
        tie_word_embeddings: whether the head shares the embedding's weight. None: unknown; bundles that were
            built before this key existed do not say it, and nothing assumes a value.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    max_position_embeddings: int | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    tie_word_embeddings: bool | None


@dataclass(frozen=True)
class Source:
    """The checkpoint that the bundle was built from."""

    name: str
    model_type: str
    sha256: str


@dataclass(frozen=True)
class FileEntry:
    """Hash and size of a file of the bundle."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """A validated manifest.

    Attributes:
        version: version of the kvexport that wrote it.
        digest: sha256 that the manifest gives of itself; identifies the bundle.
        source: the checkpoint that the bundle was built from.
        calibration: recipe and data; None if nothing was compressed.
        model: sizes and special tokens.
        dtype: of computation and cache: "float32", "float16" or "bfloat16".
        weights: formats of the weights.
        capacity: the largest number of tokens of a sequence.
        eviction: None if every layer holds all tokens.
        layers: one report per layer.
        graph: inputs and outputs of decoder.onnx.
        files: hash and size of every other file, by name.
    """

    version: str
    digest: str
    source: Source
    calibration: Mapping[str, Any] | None
    model: Model
    dtype: str
    weights: StoredWeights
    capacity: int
    eviction: Eviction | None
    layers: tuple[LayerReport, ...]
    graph: GraphContract
    files: Mapping[str, FileEntry]

    def kv_bytes(self, tokens: int) -> int:
        """Bytes of the KV cache of a sequence of `tokens` tokens, eviction state included.

        Layers with a sliding window hold it and the tokens of one call (`largest_call`).
        """
        return kv_bytes(self.layers, self.dtype, self.eviction, tokens)

    @property
    def rings(self) -> list[int]:
        """The windows of the layers whose cache is a ring (`kvexport.bundle.graph_io.ring_of`), in order."""
        windows = map(self.ring_of, range(len(self.layers)))
        return [window for window in windows if window is not None]

    def evicts(self, layer: int) -> bool:
        """Whether a layer evicts."""
        return self.eviction is not None and self.eviction.evicts(layer)

    def ring_of(self, layer: int) -> int | None:
        """The window of a layer whose cache is a ring; None if its cache is not."""
        return ring_of(self.layers[layer].window, self.capacity, self.evicts(layer))

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of the keys and values of one token, before any eviction."""
        return BYTES[self.dtype] * sum(layer.kv_width for layer in self.layers)

    @property
    def kv_bytes_per_token_original(self) -> int:
        """The same for the uncompressed model in the bundle's dtype."""
        return BYTES[self.dtype] * sum(layer.original_kv_width for layer in self.layers)


def largest_call(eviction: Eviction | None, chunk: int = CHUNK) -> int:
    """The largest number of prompt tokens of a call, of `chunk` where eviction does not need it smaller."""
    return chunk if eviction is None else min(chunk, eviction.chunk)


def kv_bytes(layers: Sequence[LayerReport], dtype: str, eviction: Eviction | None, tokens: int) -> int:
    """As `Manifest.kv_bytes`, for layers that are in no manifest yet."""
    total = 0
    for index, layer in enumerate(layers):
        evicts = eviction is not None and eviction.evicts(index)
        slots = tokens if eviction is None else eviction.slots(index, tokens)
        if layer.window is not None and not evicts:
            slots = ring_slots(layer.window, tokens, largest_call(eviction))
        state = layer.num_key_value_heads * STATE_WIDTH * BYTES["float32"] if evicts else 0
        total += slots * (BYTES[dtype] * layer.kv_width + state)
    return total


def write_manifest(directory: Path, manifest: Mapping[str, Any], files: Mapping[str, FileEntry]) -> None:
    """Write manifest.json.

    Args:
        manifest: all keys but `format`, `files` and `manifest_sha256`, which are added here.
        files: hash and size of every other file.

    Raises:
        BundleError: the manifest would be invalid.
    """
    raw = {
        "format": FORMAT,
        **manifest,
        "files": {name: asdict(entry) for name, entry in sorted(files.items())},
        "manifest_sha256": "0" * 64,
    }
    parse(Table(json.loads(json.dumps(raw)), MANIFEST_FILE, error=BundleError, fix=REBUILD))
    content = (json.dumps(raw, indent=1, allow_nan=False) + "\n").encode()
    digest = hashlib.sha256(content).hexdigest().encode()
    (directory / MANIFEST_FILE).write_bytes(content.replace(_DIGEST_KEY + b"0" * 64, _DIGEST_KEY + digest))


def read_manifest(directory: Path) -> Manifest:
    """Read and validate manifest.json.

    Raises:
        BundleError: there is no bundle, its format is not supported, or its manifest is damaged or
            inconsistent.
    """
    path = f"{MANIFEST_FILE} of the bundle {directory}"
    content = _content(directory, path)
    table = Table.from_json(content, path, error=BundleError, fix=REBUILD)
    _require_format(table, directory)
    if not _has_own_digest(content):
        raise BundleError(
            f"{path} must be unchanged since it was written: its sha256 differs",
            fix="copy the bundle again, or " + REBUILD,
        )
    return parse(table)


def _content(directory: Path, path: str) -> bytes:
    try:
        return read_limited(directory / MANIFEST_FILE, _MAX_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        fix = f"make one: kvexport build CHECKPOINT -o {directory}"
        if directory.is_file():
            fix = f"name its folder: {directory.parent}"
        elif (directory / "config.json").is_file():
            fix = f"it is a checkpoint; make a bundle of it: kvexport build {directory} -o BUNDLE"
        raise BundleError(f"{directory} must be a bundle: it has no {MANIFEST_FILE}", fix=fix) from error
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} must be readable: {reason_of(error)}", fix=REBUILD) from error


def _require_format(table: Table, directory: Path) -> None:
    """
    Raises:
        BundleError: this version of kvexport does not read the format.
    """
    if "format" not in table:
        table.fail("format", str(FORMAT))
    raw = table.mapping()
    number = raw["format"]
    if type(number) is int and number == FORMAT:
        return
    older = type(number) is int and number < FORMAT
    update = "update kvexport to that version or later (pip install --upgrade kvexport), or "
    raise BundleError(
        f"the format of the bundle {directory} must be supported by this version of kvexport",
        got=f"format {number!r:.40}, written by kvexport {raw.get('kvexport', 'of unknown version')!r:.40}",
        expected=f"format {FORMAT}",
        fix=REBUILD if older else update + REBUILD,
    )


def _has_own_digest(content: bytes) -> bool:
    """Whether a manifest's sha256, computed with the digits of its digest as zeros, is its digest."""
    match = _DIGEST.search(content)
    if match is None or content.count(_DIGEST_KEY) != 1:
        return False
    zeroed = content[: match.start(1)] + b"0" * 64 + content[match.end(1) :]
    return hashlib.sha256(zeroed).hexdigest().encode() == match[1]


def parse(table: Table) -> Manifest:
    """The typed content of a manifest whose format is supported.

    Raises:
        BundleError: a key is missing, has another type or range, or contradicts another.
    """
    model, source = table.table("model"), table.table("source")
    calibration = table.table("calibration").mapping() if table.has("calibration") else None
    manifest = Manifest(
        version=table.string("kvexport"),
        digest=table.string("manifest_sha256"),
        source=Source(source.string("name"), source.string("model_type"), source.string("sha256")),
        calibration=calibration,
        model=Model(
            vocab_size=model.integer("vocab_size", 1),
            hidden_size=model.integer("hidden_size", 1),
            num_hidden_layers=model.integer("num_hidden_layers", 1),
            max_position_embeddings=_optional_integer(model, "max_position_embeddings"),
            bos_token_id=_optional_integer(model, "bos_token_id"),
            eos_token_ids=model.integers("eos_token_ids"),
            tie_word_embeddings=(
                model.boolean("tie_word_embeddings") if model.has("tie_word_embeddings") else None
            ),
        ),
        dtype=table.string("dtype", DTYPES),
        weights=StoredWeights.from_table(table.table("weights")),
        capacity=table.integer("capacity", 1),
        eviction=_eviction(table),
        layers=tuple(_layer(each) for each in table.tables("layers")),
        graph=GraphContract.from_table(table.table("graph")),
        files=_files(table.table("files")),
    )
    _require_consistency(manifest)
    return manifest


def _optional_integer(
    table: Table, key: str, minimum: int | None = None, maximum: int | None = None
) -> int | None:
    return table.integer(key, minimum, maximum) if table.has(key) else None


def _eviction(table: Table) -> Eviction | None:
    if not table.has("eviction"):
        return None
    try:
        return Eviction.from_table(table.table("eviction"))
    except BundleError:
        raise
    except UsageError as error:
        raise _impossible(error) from error


def _impossible(error: UsageError) -> BundleError:
    return BundleError(
        f"the manifest's eviction must be possible: {error.what}",
        got=error.got,
        expected=error.expected,
        fix=REBUILD,
    )


def _layer(table: Table) -> LayerReport:
    values: dict[str, Any] = {}
    for field in fields(LayerReport):
        if field.type == "int":
            values[field.name] = table.integer(field.name, 1, _MAX_SIZE)
        elif field.type == "int | None":
            values[field.name] = _optional_integer(table, field.name, 1, _MAX_SIZE)
        elif field.type == "float":
            values[field.name] = table.number(field.name)
        else:
            values[field.name] = table.string(field.name)
    return LayerReport(**values)


def _files(table: Table) -> dict[str, FileEntry]:
    files = {}
    for name in table:
        if not _is_file_name(name):
            raise BundleError(
                "the manifest must list files of the bundle by their plain names", got=repr(name), fix=REBUILD
            )
        entry = table.table(name)
        files[name] = FileEntry(entry.string("sha256"), entry.integer("bytes", 0))
    return files


def _is_file_name(name: str) -> bool:
    """Whether it names a file in the bundle's folder, and not the manifest."""
    plain = Path(name).name == name and name not in ("", "..") and "\\" not in name
    return plain and name.isprintable() and name != MANIFEST_FILE


def _require_consistency(manifest: Manifest) -> None:
    """
    Raises:
        BundleError: two parts contradict each other.
    """
    if len(manifest.layers) != manifest.model.num_hidden_layers:
        raise BundleError(
            "the manifest must describe num_hidden_layers layers",
            got=len(manifest.layers),
            expected=manifest.model.num_hidden_layers,
            fix=REBUILD,
        )
    if manifest.eviction is not None:
        try:
            manifest.eviction.require(manifest.capacity, len(manifest.layers))
        except UsageError as error:
            raise _impossible(error) from error
    for name in (GRAPH_FILE, DATA_FILE):
        if name not in manifest.files:
            raise BundleError(f"the manifest must list {name}", fix=REBUILD)
    expected = contract_of(manifest)
    for field in fields(GraphContract):
        value, derived = getattr(manifest.graph, field.name), getattr(expected, field.name)
        if value != derived:
            raise BundleError(
                f"the manifest's graph.{field.name} must agree with its layers, model, dtype and capacity",
                got=value,
                expected=derived,
                fix=REBUILD,
            )
    manifest.weights.require_fit(manifest.dtype, len(manifest.layers), REBUILD)


def contract_of(manifest: Manifest) -> GraphContract:
    """The graph's inputs and outputs as the rest of the manifest determines them."""

    def caches(index: int, layer: LayerReport) -> tuple[TensorSpec, ...]:
        return cache_specs(
            index,
            kv_heads=layer.num_key_value_heads,
            key_dim=layer.key_head_dim,
            value_dim=layer.value_head_dim,
            dtype=manifest.dtype,
            evicts=manifest.evicts(index),
            ring=manifest.ring_of(index),
        )

    return contract(
        dtype=manifest.dtype,
        capacity=manifest.capacity,
        vocab_size=manifest.model.vocab_size,
        hidden_size=manifest.model.hidden_size,
        caches=[caches(index, layer) for index, layer in enumerate(manifest.layers)],
    )
