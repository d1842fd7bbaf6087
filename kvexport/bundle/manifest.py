"""What a bundle's manifest says, as typed data: read, checked, written.

Knows the manifest's keys, their types and which of them must agree; opens no other file, and must not know how a
graph is run.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

from kvexport.bundle.graph_io import DATA_FILE, GRAPH_FILE, GraphContract, TensorSpec, cache_specs, contract
from kvexport.bundle.layer_report import LayerReport
from kvexport.errors import BundleError, UsageError
from kvexport.eviction.config import STATE_WIDTH, Eviction

FORMAT = 2  # 1 had its digest over the manifest's values, and no self-test
MANIFEST_FILE = "manifest.json"
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}  # of one number
REBUILD = "build the bundle again: kvexport build CHECKPOINT -o BUNDLE"
_LARGEST = 1 << 24  # bytes of a manifest
_DIGEST = re.compile(rb'"manifest_sha256": "([0-9a-f]{64})"')
_KEY = b'"manifest_sha256": "'


@dataclass(frozen=True)
class Model:
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    max_position_embeddings: int | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """The checkpoint that the bundle was made of."""

    name: str
    model_type: str
    sha256: str


@dataclass(frozen=True)
class FileEntry:
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """A manifest whose parts have the right types and agree with each other."""

    version: str  # of the kvexport that wrote it
    digest: str  # sha256 that the manifest gives of itself
    source: Source
    calibration: Mapping[str, Any] | None  # None: nothing was converted
    model: Model
    dtype: str
    capacity: int  # tokens that a sequence may have
    eviction: Eviction | None  # how layers hold fewer than all of them; None: they do not
    layers: tuple[LayerReport, ...]
    graph: GraphContract
    files: Mapping[str, FileEntry]

    def kv_bytes(self, tokens: int) -> int:
        """Bytes of the cache of a sequence of so many tokens, with the state of each slot where layers evict."""
        return kv_bytes(self.layers, self.dtype, self.eviction, tokens)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that a token adds to the cache while no layer evicts; keys and values alone."""
        return BYTES[self.dtype] * sum(layer.kv_width for layer in self.layers)

    @property
    def kv_bytes_per_token_original(self) -> int:
        """The same before conversion, in the bundle's dtype."""
        return BYTES[self.dtype] * sum(layer.original_kv_width for layer in self.layers)


def kv_bytes(layers: Sequence[LayerReport], dtype: str, eviction: Eviction | None, tokens: int) -> int:
    """As `Manifest.kv_bytes`, of layers that are not in one yet."""
    total = 0
    for index, layer in enumerate(layers):
        evicts = eviction is not None and eviction.evicts(index)
        held = tokens if eviction is None else eviction.slots(index, tokens)
        state = layer.num_key_value_heads * STATE_WIDTH * BYTES["float32"] if evicts else 0
        total += held * (BYTES[dtype] * layer.kv_width + state)
    return total


def write_manifest(directory: Path, manifest: Mapping[str, Any], files: Mapping[str, FileEntry]) -> None:
    """Write manifest.json: `manifest` with its format, the files' hashes and its own.

    Raises:
        BundleError: what would be written could not be read again.
    """
    raw = {
        "format": FORMAT,
        **manifest,
        "files": {name: asdict(entry) for name, entry in sorted(files.items())},
    }
    parse(json.loads(json.dumps({**raw, "manifest_sha256": "0" * 64})))
    content = (json.dumps({**raw, "manifest_sha256": "0" * 64}, indent=1, allow_nan=False) + "\n").encode()
    content = content.replace(_KEY + b"0" * 64, _KEY + hashlib.sha256(content).hexdigest().encode())
    (directory / MANIFEST_FILE).write_bytes(content)


def read_manifest(directory: Path) -> Manifest:
    """Read and check manifest.json.

    Raises:
        BundleError: no bundle, a newer format, or a damaged or contradictory manifest.
    """
    content, raw = _read(directory)
    seen = raw["format"]
    if type(seen) is not int or seen != FORMAT:
        older = type(seen) is int and seen < FORMAT
        raise BundleError(
            f"the bundle {directory} is of a format that this version of kvexport does not read",
            got=f"format {seen!r}, written by kvexport {raw.get('kvexport', 'of unknown version')!r}",
            expected=f"format {FORMAT}",
            fix=REBUILD
            if older
            else "update kvexport to that version or later (pip install --upgrade kvexport), or " + REBUILD,
        )
    if not _as_written(content):
        raise BundleError(
            f"{MANIFEST_FILE} of the bundle {directory} is not as it was written: its sha256 differs",
            fix="copy the bundle again, or " + REBUILD,
        )
    return parse(raw)


def _as_written(content: bytes) -> bool:
    """Whether a manifest's bytes have the sha256 that they give, where its digits count as zeros."""
    found = _DIGEST.search(content)
    if found is None or content.count(_KEY) != 1:
        return False
    zeroed = content[: found.start(1)] + b"0" * 64 + content[found.end(1) :]
    return hashlib.sha256(zeroed).hexdigest().encode() == found[1]


def _read(directory: Path) -> tuple[bytes, dict[str, Any]]:
    path = directory / MANIFEST_FILE
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"{path.stat().st_size} bytes are more than any manifest has")
        content = path.read_bytes()
        raw = json.loads(content.decode("utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        remedy = f"make one: kvexport build CHECKPOINT -o {directory}"
        if directory.is_file():
            remedy = f"name its folder: {directory.parent}"
        elif (directory / "config.json").is_file():
            remedy = f"it is a checkpoint; make a bundle of it: kvexport build {directory} -o BUNDLE"
        raise BundleError(f"{directory} is no bundle: it has no {MANIFEST_FILE}", fix=remedy) from error
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"the manifest of {directory} cannot be read: {error}", fix=REBUILD) from error
    if not isinstance(raw, dict) or "format" not in raw:
        raise BundleError(f"the manifest of {directory} is not a bundle's", fix=REBUILD)
    return content, raw


def parse(raw: Mapping[str, Any]) -> Manifest:
    """A manifest's JSON as typed data.

    Raises:
        BundleError: a key is missing, its value is not of its type or range, or two of them contradict each other.
    """
    reader = _Reader(raw, "")
    model, source = reader.table("model"), reader.table("source")
    manifest = Manifest(
        version=reader.text("kvexport"),
        digest=reader.text("manifest_sha256"),
        source=Source(source.text("name"), source.text("model_type"), source.text("sha256")),
        calibration=reader.typed("calibration", dict, optional=True),
        model=Model(
            vocab_size=model.positive("vocab_size"),
            hidden_size=model.positive("hidden_size"),
            num_hidden_layers=model.positive("num_hidden_layers"),
            max_position_embeddings=model.typed("max_position_embeddings", int, optional=True),
            bos_token_id=model.typed("bos_token_id", int, optional=True),
            eos_token_ids=tuple(model.each("eos_token_ids", int)),
        ),
        dtype=reader.text("dtype"),
        capacity=reader.positive("capacity"),
        eviction=_eviction(reader),
        layers=tuple(
            _layer(_Reader(each, f"layers[{i}].")) for i, each in enumerate(reader.each("layers", dict))
        ),
        graph=_graph(reader),
        files={name: _file(name, entry) for name, entry in reader.typed("files", dict).items()},
    )
    _require_agreement(manifest)
    return manifest


def _require_agreement(manifest: Manifest) -> None:
    if manifest.dtype not in BYTES:
        raise BundleError(
            "the manifest's dtype is not one that bundles have", got=manifest.dtype, expected=", ".join(BYTES)
        )
    if len(manifest.layers) != manifest.model.num_hidden_layers:
        raise BundleError(
            "the manifest describes another number of layers than its num_hidden_layers",
            got=len(manifest.layers),
            expected=manifest.model.num_hidden_layers,
            fix=REBUILD,
        )
    if manifest.eviction is not None:
        try:
            manifest.eviction.require(manifest.capacity, len(manifest.layers))
        except UsageError as error:
            raise BundleError(
                f"the manifest's eviction is impossible: {error.what}", got=error.got, fix=REBUILD
            ) from error
    for name in (GRAPH_FILE, DATA_FILE):
        if name not in manifest.files:
            raise BundleError(f"the manifest does not list {name}", fix=REBUILD)
    promised = contract_of(manifest)
    for field in fields(GraphContract):
        seen, allowed = getattr(manifest.graph, field.name), getattr(promised, field.name)
        if seen != allowed:
            raise BundleError(
                f"the manifest's graph.{field.name} contradicts its layers, model, dtype or capacity",
                got=seen,
                expected=allowed,
                fix=REBUILD,
            )


def contract_of(manifest: Manifest) -> GraphContract:
    """What the graph must take and give, by everything else that the manifest says."""

    def caches(index: int, layer: LayerReport) -> tuple[TensorSpec, ...]:
        return cache_specs(
            index,
            kv_heads=layer.num_key_value_heads,
            key_dim=layer.key_head_dim,
            value_dim=layer.value_head_dim,
            dtype=manifest.dtype,
            evicts=manifest.eviction is not None and manifest.eviction.evicts(index),
        )

    return contract(
        dtype=manifest.dtype,
        capacity=manifest.capacity,
        vocab_size=manifest.model.vocab_size,
        hidden_size=manifest.model.hidden_size,
        caches=[caches(index, layer) for index, layer in enumerate(manifest.layers)],
    )


def _graph(reader: _Reader) -> GraphContract:
    try:
        return GraphContract.from_json(reader.typed("graph", dict))
    except (KeyError, TypeError) as error:
        raise BundleError(f"the manifest's graph is not a graph's contract: {error}", fix=REBUILD) from error


def _eviction(reader: _Reader) -> Eviction | None:
    raw = reader.typed("eviction", dict, optional=True)
    if raw is None:
        return None
    try:
        return Eviction.from_json(raw)
    except UsageError as error:
        raise BundleError(
            f"the manifest's eviction is impossible: {error.what}", got=error.got, fix=REBUILD
        ) from error
    except (KeyError, TypeError) as error:
        raise BundleError(
            f"the manifest's eviction cannot be read: {error}", got=repr(raw)[:80], fix=REBUILD
        ) from error


def _layer(reader: _Reader) -> LayerReport:
    found: dict[str, Any] = {}
    for field in fields(LayerReport):
        if field.type == "int":
            found[field.name] = reader.positive(field.name)
        elif field.type == "int | None":
            found[field.name] = (
                None if reader.typed(field.name, int, optional=True) is None else reader.positive(field.name)
            )
        elif field.type == "float":
            found[field.name] = reader.number(field.name)
        else:
            found[field.name] = reader.text(field.name)
    return LayerReport(**found)


def _file(name: str, entry: object) -> FileEntry:
    if (
        Path(name).name != name
        or name in ("", "..")
        or "\\" in name
        or not name.isprintable()
        or name == MANIFEST_FILE
    ):
        raise BundleError(
            "the manifest lists a file that is not one of the bundle's",
            got=repr(name),
            expected="plain names of files beside it",
        )
    reader = _Reader(entry, f"files[{name!r}].")
    return FileEntry(reader.text("sha256"), int(reader.typed("bytes", int)))


class _Reader:
    """Takes typed values out of parsed JSON, and says where one is missing or of another type."""

    def __init__(self, raw: object, where: str) -> None:
        if not isinstance(raw, dict):
            raise BundleError(
                f"the manifest's {where.rstrip('.')} is not an object", got=repr(raw)[:80], fix=REBUILD
            )
        self._raw, self._where = raw, where

    def typed(self, key: str, kind: type | tuple[type, ...], *, optional: bool = False) -> Any:
        found = self._raw.get(key)
        if found is None and optional:
            return None
        if not isinstance(found, kind) or isinstance(found, bool):
            self._refuse(key, "is missing or of the wrong type")
        return found

    def text(self, key: str) -> str:
        """A string that a terminal can show as it is."""
        found = str(self.typed(key, str))
        if not found.isprintable():
            self._refuse(key, "has characters that cannot be shown")
        return found

    def positive(self, key: str) -> int:
        found = int(self.typed(key, int))
        if found < 1:
            self._refuse(key, "is impossible", expected="1 or more")
        return found

    def number(self, key: str) -> float:
        found = self.typed(key, (int, float))
        if not abs(found) <= sys.float_info.max:
            self._refuse(key, "is impossible", expected="a finite number")
        return float(found)

    def each(self, key: str, kind: type) -> list[Any]:
        found = self.typed(key, list)
        if not all(isinstance(item, kind) and not isinstance(item, bool) for item in found):
            self._refuse(key, f"is not a list of {kind.__name__} values")
        return list(found)

    def table(self, key: str) -> _Reader:
        return _Reader(self._raw.get(key), f"{self._where}{key}.")

    def _refuse(self, key: str, problem: str, expected: str | None = None) -> NoReturn:
        got = repr(self._raw.get(key))[:80]
        raise BundleError(
            f"the manifest's {self._where}{key} {problem}", got=got, expected=expected, fix=REBUILD
        )
