"""The bundle: a directory that holds everything a device needs, and a manifest that says what it is.

Knows the manifest's format, hashes and names; must not know how a graph is run or what a tensor means. Reading
validates before anything is allocated, and executes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from kvexport.directory import atomic_directory
from kvexport.errors import BundleError
from kvexport.hashing import sha256_of
from kvexport.layer_report import LayerReport

FORMAT = 1
MANIFEST_FILE = "manifest.json"
REPORT_FILE = "report.json"
TOKENIZER_FILE = "tokenizer.json"
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}  # of one number
_REBUILD = "build the bundle again: kvexport build CHECKPOINT -o BUNDLE"


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
class Bundle:
    """A bundle whose manifest was read and found sound; its files are there and of the right size."""

    path: Path
    version: str  # of the kvexport that wrote it
    source: Source
    calibration: Mapping[str, Any] | None  # None: nothing was converted
    model: Model
    dtype: str
    capacity: int  # tokens that a sequence may hold
    layers: tuple[LayerReport, ...]
    graph: Mapping[str, Any]  # the graph contract, as kvexport.graph.GraphContract writes it
    files: Mapping[str, FileEntry]

    @classmethod
    def open(cls, path: Path | str) -> Bundle:
        """Read and check the manifest; hashes no file (see `verify`).

        Raises:
            BundleError: no bundle, a newer format, a damaged manifest, a file missing or of another size.
        """
        path = Path(path)
        bundle = cls(path=path, **_parse(_read_manifest(path)))
        for name, entry in bundle.files.items():
            file = path / name
            if not file.is_file():
                raise BundleError(f"the bundle {path} lacks its file {name}", fix=_REBUILD)
            if file.stat().st_size != entry.bytes:
                raise BundleError(
                    f"{name} of the bundle {path} has another size than when it was written",
                    seen=f"{file.stat().st_size} bytes",
                    allowed=f"{entry.bytes} bytes",
                    fix="copy the bundle again, or " + _REBUILD,
                )
        return bundle

    def verify(self) -> None:
        """Hash every file.

        Raises:
            BundleError: names the first file that is not as it was written.
        """
        for name, entry in self.files.items():
            if sha256_of(self.path / name) != entry.sha256:
                raise BundleError(
                    f"{name} of the bundle {self.path} is not as it was written: its sha256 differs",
                    fix="copy the bundle again, or " + _REBUILD,
                )

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that a token adds to the cache."""
        return BYTES[self.dtype] * sum(layer.kv_width for layer in self.layers)

    @property
    def kv_bytes_per_token_original(self) -> int:
        """The same before conversion, in the bundle's dtype."""
        return BYTES[self.dtype] * sum(layer.original_kv_width for layer in self.layers)


class BundleWriter:
    """Fills a directory with a bundle's files; see `new_bundle`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.sealed = False

    def seal(self, manifest: Mapping[str, Any]) -> None:
        """Hash every file and write the manifest: the bundle's last file."""
        entries = {
            file.name: {"sha256": sha256_of(file), "bytes": file.stat().st_size} for file in sorted(self.directory.iterdir())
        }
        text = json.dumps({"format": FORMAT, **manifest, "files": entries}, indent=1) + "\n"
        (self.directory / MANIFEST_FILE).write_text(text, encoding="utf-8")
        self.sealed = True


@contextmanager
def new_bundle(path: Path, *, force: bool = False) -> Iterator[BundleWriter]:
    """A writer whose files appear at `path` together when the block ends, or not at all.

    Raises:
        UsageError: `path` exists (and, with `force`, is no bundle), or its parent does not.
    """
    with atomic_directory(path, marker=MANIFEST_FILE, force=force) as directory:
        writer = BundleWriter(directory)
        yield writer
        assert writer.sealed, "a bundle without its manifest"


def _read_manifest(path: Path) -> Mapping[str, Any]:
    try:
        raw = json.loads((path / MANIFEST_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        remedy = f"make one: kvexport build CHECKPOINT -o {path}"
        raise BundleError(f"{path} is no bundle: it has no {MANIFEST_FILE}", fix=remedy) from error
    except (OSError, ValueError) as error:
        raise BundleError(f"the manifest of {path} cannot be read: {error}", fix=_REBUILD) from error
    if not isinstance(raw, dict) or "format" not in raw:
        raise BundleError(f"the manifest of {path} is not a bundle's", fix=_REBUILD)
    if raw["format"] != FORMAT:
        raise BundleError(
            f"the bundle {path} is of a format that this version of kvexport does not read", seen=raw["format"], allowed=FORMAT,
            fix="update kvexport (pip install --upgrade kvexport), or " + _REBUILD,
        )  # fmt: skip
    return raw


def _parse(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest's values as typed fields of `Bundle`.

    Raises:
        BundleError: a key is missing, or its value is not of its type or range.
    """
    reader = _Reader(raw, "")
    model = reader.table("model")
    layers = [_Reader(each, f"layers[{i}].") for i, each in enumerate(reader.typed("layers", list))]
    parsed = {
        "version": reader.typed("kvexport", str),
        "source": Source(**{name: reader.table("source").typed(name, str) for name in ("name", "model_type", "sha256")}),
        "calibration": reader.typed("calibration", dict, optional=True),
        "model": Model(
            vocab_size=model.positive("vocab_size"),
            hidden_size=model.positive("hidden_size"),
            num_hidden_layers=model.positive("num_hidden_layers"),
            max_position_embeddings=model.typed("max_position_embeddings", int, optional=True),
            bos_token_id=model.typed("bos_token_id", int, optional=True),
            eos_token_ids=tuple(model.typed("eos_token_ids", list)),
        ),
        "dtype": reader.typed("dtype", str),
        "capacity": reader.positive("capacity"),
        "layers": tuple(_layer(each) for each in layers),
        "graph": reader.typed("graph", dict),
        "files": {name: _file(name, entry) for name, entry in reader.typed("files", dict).items()},
    }
    if parsed["dtype"] not in BYTES:
        raise BundleError("the manifest's dtype is not one that bundles have", seen=parsed["dtype"], allowed=", ".join(BYTES))
    if len(parsed["layers"]) != parsed["model"].num_hidden_layers:
        raise BundleError("the manifest describes another number of layers than num_hidden_layers", seen=len(parsed["layers"]))
    for name in ("decoder.onnx", "decoder.onnx.data"):
        if name not in parsed["files"]:
            raise BundleError(f"the manifest does not list {name}", fix=_REBUILD)
    return parsed


def _layer(reader: _Reader) -> LayerReport:
    found: dict[str, Any] = {}
    for field in fields(LayerReport):
        if field.type == "int":
            found[field.name] = reader.positive(field.name)
        elif field.type == "float":
            found[field.name] = float(reader.typed(field.name, (int, float)))
        else:
            found[field.name] = reader.typed(field.name, str)
    return LayerReport(**found)


def _file(name: str, entry: object) -> FileEntry:
    if Path(name).name != name or name in ("", ".", ".."):
        raise BundleError("the manifest lists a file outside the bundle", seen=name, allowed="plain file names")
    reader = _Reader(entry, f"files[{name!r}].")
    return FileEntry(reader.typed("sha256", str), reader.typed("bytes", int))


class _Reader:
    """Takes typed values out of parsed JSON, and says where one is missing or of another type."""

    def __init__(self, raw: object, where: str) -> None:
        if not isinstance(raw, dict):
            raise BundleError(f"the manifest's {where.rstrip('.')} is not an object", seen=repr(raw)[:80], fix=_REBUILD)
        self._raw, self._where = raw, where

    def typed(self, key: str, kind: type | tuple[type, ...], optional: bool = False) -> Any:
        found = self._raw.get(key)
        if found is None and optional:
            return None
        if not isinstance(found, kind) or isinstance(found, bool):
            what = f"the manifest's {self._where}{key} is missing or of the wrong type"
            raise BundleError(what, seen=repr(found)[:80], fix=_REBUILD)
        return found

    def positive(self, key: str) -> int:
        found = self.typed(key, int)
        if found < 1:
            raise BundleError(f"the manifest's {self._where}{key} is impossible", seen=found, allowed="1 or more", fix=_REBUILD)
        return int(found)

    def table(self, key: str) -> _Reader:
        return _Reader(self._raw.get(key), f"{self._where}{key}.")
