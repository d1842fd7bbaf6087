"""A cache in a file: safetensors whose metadata say of which bundle it is and where each sequence was.

Knows the file's format, and checks all of it before memory is taken for what it holds; must not know how a
cache is run.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
from numpy.typing import NDArray

from kvexport.errors import UsageError
from kvexport.runtime.cache.device_arrays import stored_as
from kvexport.runtime.cache.eviction import Occupancy
from kvexport.runtime.cache.kv_cache import KvCache
from kvexport.runtime.types import Ids

KIND = "cache 1"
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_LARGEST = 1 << 24  # bytes of a header
_PIECE = 1 << 22
_DIGEST = b'"sha256":"'  # of the data: in the header, and so known only when all is written
_AGAIN = "save it again: kvexport run BUNDLE --prompt TEXT --save-cache FILE"


@dataclass(frozen=True)
class SavedState:
    """Where each sequence was: lengths [B], last tokens [B], and tokens that are pending, at most one of each."""

    lengths: Ids
    last: Ids
    pending: list[list[int]]


def write(path: Path, digest: str, kv: KvCache, state: SavedState) -> None:
    """Write a cache under a temporary name beside `path`, and give it that name when it is whole.

    Args:
        digest: of the bundle's manifest.

    Raises:
        UsageError: the folder does not exist, or `path` is one.
        OSError: the disk is full, or will not be written.
    """
    if not path.parent.is_dir():
        raise UsageError(
            "the folder for the cache does not exist", got=path.parent, fix=f"mkdir -p {path.parent}"
        )
    if path.is_dir():
        raise UsageError("the file for the cache is a folder", got=path, fix="name a file in it")
    if path.exists() and not path.is_file():
        raise UsageError(
            "the file for the cache is a device or a pipe, which would be replaced",
            got=path,
            fix="name a file",
        )
    header = _header(digest, kv, state)
    target = path.resolve()  # where a link points to
    temporary = target.parent / f".{target.name}.{os.getpid()}.{threading.get_ident()}.partial"
    try:
        with temporary.open("xb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            hashed = hashlib.sha256()
            for name in _order(kv):
                held = _held(kv, name, state.lengths).tobytes()
                hashed.update(held)
                file.write(held)
            file.seek(8 + header.index(_DIGEST) + len(_DIGEST))
            file.write(hashed.hexdigest().encode())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # the one that the caller named
        raise


def read(path: Path, digest: str, vocab_size: int, like: KvCache) -> tuple[KvCache, SavedState]:
    """Read what `write` wrote.

    Args:
        digest: of the bundle's manifest.
        like: a cache of the session that will run it.

    Raises:
        UsageError: no such file, a damaged one, one of another bundle, or sequences that do not fit.
        CannotRunHere: not enough memory.
    """
    if not _is_file(path):
        raise UsageError(f"there is no saved cache {path}", fix="name the file that --save-cache wrote")
    with path.open("rb") as file:
        return _Reader(path, file, digest, vocab_size, like).read()


def _is_file(path: Path) -> bool:
    """Not of names that none can have, nor of a pipe, which would be waited for."""
    try:
        return path.is_file()
    except PermissionError:
        raise
    except (OSError, ValueError):
        return False


def _header(digest: str, kv: KvCache, state: SavedState) -> bytes:
    """The JSON at the file's beginning, as long as a multiple of 8; the data's digest is not known yet."""
    occupancy = kv.occupancy
    told = {
        "lengths": state.lengths.tolist(),
        "last": state.last.tolist(),
        "pending": state.pending,
        "filled": None if occupancy is None else occupancy.filled.tolist(),
        "seen": None if occupancy is None else occupancy.seen.tolist(),
    }
    header: dict[str, Any] = {
        "__metadata__": {"kvexport": KIND, "bundle": digest, "sha256": "0" * 64, "state": json.dumps(told)}
    }
    for name, spec in _layout(kv, state.lengths, _most(occupancy)).items():
        header[name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [spec.start, spec.stop]}
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


@dataclass(frozen=True)
class _Tensor:
    dtype: str  # safetensors' name
    shape: list[int]
    start: int
    stop: int  # of its bytes after the header


def _layout(kv: KvCache, lengths: Ids, filled: int) -> dict[str, _Tensor]:
    """What the file holds of sequences of such lengths, of which layers that evict hold `filled` tokens at most."""
    tensors, start = {}, 0
    for name in _order(kv):
        shape = kv.shape_of(name, len(lengths), int(lengths.max(initial=0)), filled)
        stop = start + int(np.prod(shape, dtype=object)) * stored_as(kv.dtype_of(name)).itemsize
        tensors[name] = _Tensor(_DTYPES[kv.dtype_of(name)], list(shape), start, stop)
        start = stop
    return tensors


def _order(kv: KvCache) -> list[str]:
    """Of the tensors: wider numbers first, so that all are aligned."""
    return sorted(kv.names, key=lambda name: -stored_as(kv.dtype_of(name)).itemsize)


def _most(occupancy: Occupancy | None) -> int:
    return 0 if occupancy is None else int(occupancy.filled.max(initial=0))


def _held(kv: KvCache, name: str, lengths: Ids) -> NDArray[Any]:
    """A copy of a buffer as far as tokens go; zeros where a sequence has none."""
    occupancy = kv.occupancy
    shape = kv.shape_of(name, kv.batch, int(lengths.max(initial=0)), _most(occupancy))
    if name not in kv.buffers:
        return np.zeros(shape, stored_as(kv.dtype_of(name)))
    held = kv.storage.read(kv.buffers[name])[:, :, : shape[2]].copy()
    ends = occupancy.filled if occupancy is not None and kv.evicts(name) else lengths
    for row, end in enumerate(ends):
        held[kv.rows_of(name, row), :, int(end) :] = 0
    return held


class _Reader:
    """One file, checked from its first byte to its last, and only then given memory."""

    def __init__(self, path: Path, file: BinaryIO, digest: str, vocab_size: int, like: KvCache) -> None:
        self._path, self._file, self._digest, self._vocab, self._like = path, file, digest, vocab_size, like
        self._size = os.fstat(file.fileno()).st_size

    def read(self) -> tuple[KvCache, SavedState]:
        header = self._header()
        metadata = header.pop("__metadata__", None)
        if not isinstance(metadata, dict) or metadata.get("kvexport") != KIND:
            self._refuse("it is no saved cache", got=repr(metadata)[:80])
        if metadata.get("bundle") != self._digest:
            raise UsageError(
                f"the cache {self._path} is of another bundle",
                got=repr(metadata.get("bundle"))[:80],
                expected=self._digest,
                fix="run the bundle that it was saved with, or " + _AGAIN,
            )
        state, occupancy = self._state(metadata.get("state"))
        wanted = _layout(self._like, state.lengths, _most(occupancy))
        self._require_layout(header, wanted)
        self._require_digest(metadata.get("sha256"))
        kv = self._like.another(len(state.lengths))
        if state.lengths.any():
            kv.reserve(int(state.lengths.max()))
            for name, tensor in wanted.items():
                self._fill(kv, name, tensor)
        if occupancy is not None:
            kv.occupy(occupancy)
        return kv, state

    def _header(self) -> dict[str, Any]:
        beginning = self._file.read(8)
        length = int.from_bytes(beginning, "little")
        if len(beginning) < 8 or length > min(self._size - 8, _LARGEST):
            self._refuse(
                "its header is longer than the file, or than any cache's",
                got=f"{length} of {self._size} bytes",
            )
        self._data = 8 + length
        try:
            header = json.loads(self._file.read(length).decode("utf-8"), object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:
            self._refuse(f"its header cannot be read: {error}")
        if not isinstance(header, dict):
            self._refuse("its header is not an object", got=repr(header)[:80])
        return header

    def _state(self, text: object) -> tuple[SavedState, Occupancy | None]:
        """What the metadata say of the sequences, each number within its range."""
        try:
            raw = json.loads(text if isinstance(text, str) else "", object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:
            self._refuse(f"what it says of its sequences cannot be read: {error}")
        evicts = self._like.occupancy is not None
        counted = ("filled", "seen") if evicts else ()
        whole = isinstance(raw, dict) and raw.keys() == {"lengths", "last", "pending", "filled", "seen"}
        if not whole or any(raw[name] is not None for name in {"filled", "seen"} - set(counted)):
            self._refuse("what it says of its sequences is not what this bundle needs", got=repr(raw)[:80])
        batch = len(raw["lengths"]) if isinstance(raw["lengths"], list) else 0
        lengths = self._numbers(raw, "lengths", batch, None)
        self._like.require_room(
            int(lengths.max(initial=0)), f"the cache {self._path} holds more than there is room for"
        )
        last = self._numbers(raw, "last", batch, self._vocab)
        pending = raw["pending"]
        if (
            not isinstance(pending, list)
            or len(pending) != batch
            or not all(isinstance(each, list) for each in pending)
        ):
            self._refuse("its pending tokens are not lists, one for each sequence", got=repr(pending)[:80])
        for each in pending:
            self._numbers({"pending": each}, "pending", min(len(each), 1), self._vocab)
        occupancy = None
        if evicts:
            filled, seen = (self._numbers(raw, name, batch, None) for name in counted)
            slots = self._like.slots
            assert slots is not None
            if (
                (seen != lengths).any()
                or (filled > np.minimum(lengths, slots)).any()
                or ((filled == 0) != (lengths == 0)).any()
            ):
                self._refuse(
                    "its slots in use contradict its lengths, or are more than there are",
                    got=f"{filled.tolist()} of {lengths.tolist()} tokens",
                    expected=f"at most {slots}",
                )
            occupancy = Occupancy(filled, seen)
        return SavedState(lengths, last, pending), occupancy

    def _numbers(self, raw: Mapping[str, Any], name: str, count: int, below: int | None) -> Ids:
        values, most = raw[name], (1 << 62) if below is None else below
        if not isinstance(values, list) or len(values) != count or (name == "lengths" and not count):
            self._refuse(f"its {name} are not one number for each sequence", got=repr(values)[:80])
        wrong = [value for value in values if type(value) is not int or not 0 <= value < most]
        if wrong:
            self._refuse(
                f"its {name} hold what cannot be", got=repr(wrong[0])[:80], expected=f"0 to {most - 1}"
            )
        return np.array(values, np.int64)

    def _require_layout(self, header: Mapping[str, Any], wanted: Mapping[str, _Tensor]) -> None:
        if header.keys() != wanted.keys():
            odd = sorted(header.keys() ^ wanted.keys())
            self._refuse("it holds other tensors than this bundle's cache", got=repr(odd[0])[:80])
        spans = []
        for name, tensor in wanted.items():
            entry = header[name]
            if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
                self._refuse(f"{name} is not described as a tensor", got=repr(entry)[:80])
            if (entry["dtype"], entry["shape"]) != (tensor.dtype, tensor.shape):
                seen, allowed = (
                    f"{entry['dtype']!r} {entry['shape']!r}"[:80],
                    f"{tensor.dtype!r} {tensor.shape}",
                )
                self._refuse(
                    f"{name} has another dtype or shape than the sequences need", got=seen, expected=allowed
                )
            offsets = entry["data_offsets"]
            if (
                not isinstance(offsets, list)
                or len(offsets) != 2
                or not all(type(each) is int for each in offsets)
            ):
                self._refuse(f"{name} does not say where it is", got=repr(offsets)[:80])
            if offsets[1] - offsets[0] != tensor.stop - tensor.start:
                self._refuse(
                    f"{name} has another extent than its shape",
                    got=offsets,
                    expected=tensor.stop - tensor.start,
                )
            spans.append((*offsets, name))
        end = 0
        for start, stop, name in sorted(spans):
            if start != end:
                self._refuse(
                    f"there is a gap or an overlap before {name}", got=f"byte {start}", expected=f"byte {end}"
                )
            end = stop
        if end != self._size - self._data:
            self._refuse(
                "its tensors are not all of its data",
                got=f"{self._size - self._data} bytes",
                expected=f"{end} bytes",
            )
        self._begins = {name: self._data + start for start, _, name in spans}

    def _require_digest(self, promised: object) -> None:
        self._file.seek(self._data)
        hashed = hashlib.sha256()
        for piece in _pieces(self._file):
            hashed.update(piece)
        if promised != hashed.hexdigest():
            self._refuse(
                "its data is not as it was written: its sha256 differs",
                got=hashed.hexdigest(),
                expected=promised,
            )

    def _fill(self, kv: KvCache, name: str, tensor: _Tensor) -> None:
        """Put a tensor into the first slots of its buffer."""
        values = np.empty(tensor.shape, stored_as(kv.dtype_of(name)))
        self._file.seek(self._begins[name])
        if self._file.readinto(values.view(np.uint8).reshape(-1).data) != values.nbytes:  # type: ignore[attr-defined]
            self._refuse("it became shorter while it was read")
        pinned: Any = kv.storage.zeros(values.shape, kv.dtype_of(name))
        kv.storage.write(pinned, values)
        kv.storage.copy_slots(pinned, kv.buffers[name], values.shape[2])

    def _refuse(self, what: str, *, got: object = None, expected: object = None) -> NoReturn:
        raise UsageError(
            f"the cache {self._path} cannot be read: {what}", got=got, expected=expected, fix=_AGAIN
        )


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    while piece := file.read(_PIECE):
        yield piece


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object none of whose keys comes twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key comes twice")
    return found
