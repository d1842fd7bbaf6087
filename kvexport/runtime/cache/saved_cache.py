"""Saved caches: safetensors files whose metadata identify the bundle and the state of each sequence."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
from numpy.typing import NDArray

from kvexport.errors import UsageError
from kvexport.files.schema import Table
from kvexport.runtime.cache.device_arrays import stored_as
from kvexport.runtime.cache.eviction import Occupancy
from kvexport.runtime.cache.kv_cache import KvCache
from kvexport.runtime.types import Ids

KIND = "cache 1"
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_METADATA = "__metadata__"
_MAX_HEADER = 1 << 24  # bytes
_MAX_LENGTH = (1 << 62) - 1  # tokens
_PIECE = 1 << 22  # bytes read at once
_DIGEST = b'"sha256":"'  # of the data; its place in the header is filled in after the data was written
_SAVE_AGAIN = "save it again: kvexport run BUNDLE --prompt TEXT --save-cache FILE"


@dataclass(frozen=True)
class SavedState:
    """State of the sequences.

    Attributes:
        lengths: tokens of each that were run [B].
        last: the last of them [B].
        pending: tokens of each that are not run yet, at most one.
    """

    lengths: Ids
    last: Ids
    pending: list[list[int]]


def write(path: Path, digest: str, kv: KvCache, state: SavedState) -> None:
    """Write a cache atomically.

    Args:
        path: path of the file; an existing one is replaced.
        digest: sha256 of the bundle.
        kv: keys and values.
        state: state of the sequences.

    Raises:
        UsageError: the folder does not exist, or `path` is not a regular file.
        OSError: the disk is full, or the file cannot be written.
    """
    if not path.parent.is_dir():
        raise UsageError(
            "the folder of the saved cache must exist", got=path.parent, fix=f"mkdir -p {path.parent}"
        )
    if path.is_dir():
        raise UsageError("the saved cache must be a file, not a folder", got=path, fix="name a file in it")
    if path.exists() and not path.is_file():
        raise UsageError(
            "the saved cache must be a regular file, not a device or a pipe",
            got=path,
            fix="name a file",
        )
    header = _header(digest, kv, state)
    target = path.resolve()  # replaces what a link points to, not the link
    temporary = target.parent / f".{target.name}.{os.getpid()}.{threading.get_ident()}.partial"
    try:
        with temporary.open("xb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            data_digest = hashlib.sha256()
            for name in _order(kv):
                content = _content(kv, name, state.lengths).tobytes()
                data_digest.update(content)
                file.write(content)
            file.seek(8 + header.index(_DIGEST) + len(_DIGEST))
            file.write(data_digest.hexdigest().encode())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # as the caller named it
        raise


def read(path: Path, digest: str, vocab_size: int, like: KvCache) -> tuple[KvCache, SavedState]:
    """Read a file that `write` wrote.

    Args:
        path: path of the file.
        digest: sha256 of the bundle.
        vocab_size: vocabulary size of the bundle's model.
        like: a cache of the session that will use it.

    Raises:
        UsageError: there is no such file, it is damaged or of another bundle, or its sequences do not fit.
        CannotRunHere: there is not enough memory.
    """
    if not _is_file(path):
        raise UsageError(
            f"the saved cache {path} must be an existing file", fix="name a file that --save-cache wrote"
        )
    with path.open("rb") as file:
        return _Reader(path, file, digest, vocab_size, like).read()


def _is_file(path: Path) -> bool:
    """Whether it is a regular file; False for impossible names, and for pipes, which would block."""
    try:
        return path.is_file()
    except PermissionError:
        raise
    except (OSError, ValueError):
        return False


def _header(digest: str, kv: KvCache, state: SavedState) -> bytes:
    """The JSON at the start of the file, padded to 8 bytes, with zeros for the digest of the data."""
    occupancy = kv.occupancy
    values = {
        "lengths": state.lengths.tolist(),
        "last": state.last.tolist(),
        "pending": state.pending,
        "filled": None if occupancy is None else occupancy.filled.tolist(),
        "seen": None if occupancy is None else occupancy.seen.tolist(),
    }
    header: dict[str, Any] = {
        "__metadata__": {"kvexport": KIND, "bundle": digest, "sha256": "0" * 64, "state": json.dumps(values)}
    }
    for name, spec in _layout(kv, state.lengths, _max_filled(occupancy)).items():
        header[name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [spec.start, spec.stop]}
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the file; `dtype` by safetensors' name, `start` and `stop` in bytes after the header."""

    dtype: str
    shape: list[int]
    start: int
    stop: int


def _layout(
    kv: KvCache, lengths: Ids, filled: int, ring_slots: Callable[[str], int] | None = None
) -> dict[str, _Tensor]:
    """The tensors of a file for sequences of these lengths.

    A ring has the slots of its window at least, or all tokens of the longest sequence, and at most these: the
    token at position p is in slot p modulo their number.

    Args:
        filled: slots that are saved of layers that evict.
        ring_slots: slots that a file has of a ring, by its name; None: as few as possible.
    """
    tensors, start, longest = {}, 0, int(lengths.max(initial=0))
    for name in _order(kv):
        shape = kv.shape_of(name, len(lengths), longest, filled)
        if ring_slots is not None and kv.ring(name) is not None:
            shape = (*shape[:2], min(max(shape[2], ring_slots(name)), longest), shape[3])
        stop = start + int(np.prod(shape, dtype=object)) * stored_as(kv.dtype_of(name)).itemsize
        tensors[name] = _Tensor(_DTYPES[kv.dtype_of(name)], list(shape), start, stop)
        start = stop
    return tensors


def _order(kv: KvCache) -> list[str]:
    """Names of the tensors in the file's order: wider numbers first, so that all are aligned."""
    return sorted(kv.names, key=lambda name: -stored_as(kv.dtype_of(name)).itemsize)


def _max_filled(occupancy: Occupancy | None) -> int:
    return 0 if occupancy is None else int(occupancy.filled.max(initial=0))


def _content(kv: KvCache, name: str, lengths: Ids) -> NDArray[Any]:
    """A copy of the slots of a buffer that are saved, with zeros in slots that a sequence does not use."""
    occupancy = kv.occupancy
    shape = kv.shape_of(name, kv.batch, int(lengths.max(initial=0)), _max_filled(occupancy))
    if name not in kv.buffers:
        return np.zeros(shape, stored_as(kv.dtype_of(name)))
    if kv.ring(name) is not None:
        return _taken(kv, name, shape, lengths)
    content: NDArray[Any] = kv.storage.read(kv.buffers[name])[:, :, : shape[2]].copy()
    ends = occupancy.filled if occupancy is not None and kv.evicts(name) else lengths
    for row, end in enumerate(ends):
        content[kv.rows_of(name, row), :, int(end) :] = 0
    return content


def _taken(kv: KvCache, name: str, shape: tuple[int, ...], lengths: Ids) -> NDArray[Any]:
    """The last tokens of each sequence in a ring, each in the slot of its position modulo shape[2]."""
    values = np.zeros(shape, stored_as(kv.dtype_of(name)))
    buffer, slots = kv.storage.read(kv.buffers[name]), shape[2]
    for row, length in enumerate(lengths.tolist()):
        positions = np.arange(max(0, length - slots), length)
        values[row][:, positions % slots] = buffer[row][:, kv.rings.slots_of(kv.ring(name), positions)]
    return values


def _place(kv: KvCache, name: str, values: NDArray[Any], lengths: Ids) -> None:
    """Write what `_taken` returned for a ring of any number of slots to the slots of a buffer."""
    buffer, slots = kv.buffers[name], values.shape[2]
    placed = np.zeros(buffer.shape, values.dtype)
    for row, length in enumerate(lengths.tolist()):
        positions = np.arange(length - min(length, slots, buffer.shape[2]), length)
        placed[row][:, kv.rings.slots_of(kv.ring(name), positions)] = values[row][:, positions % slots]
    kv.storage.write(buffer, placed)


def _saved_slots(header: Table, name: str) -> int:
    """The slots that a file has of a ring; 0 if it says none."""
    shape = header.table(name).integers("shape") if name in header else ()
    return shape[2] if len(shape) > 2 else 0


class _Reader:
    """Reads one file: all of it is validated before memory is allocated for its contents."""

    def __init__(self, path: Path, file: BinaryIO, digest: str, vocab_size: int, like: KvCache) -> None:
        self._path, self._file, self._digest, self._vocab, self._like = path, file, digest, vocab_size, like
        self._size = os.fstat(file.fileno()).st_size

    def read(self) -> tuple[KvCache, SavedState]:
        header = self._header()
        metadata = header.table(_METADATA)
        metadata.string("kvexport", (KIND,))
        if metadata.string("bundle") != self._digest:
            raise UsageError(
                f"the saved cache {self._path} must be of this bundle",
                got=metadata.string("bundle")[:80],
                expected=self._digest,
                fix="run the bundle that it was saved with, or " + _SAVE_AGAIN,
            )
        state, occupancy = self._state(metadata.text("state"))
        layout = _layout(self._like, state.lengths, _max_filled(occupancy), partial(_saved_slots, header))
        self._require_layout(header, layout)
        self._require_digest(metadata.string("sha256"))
        kv = self._like.another(len(state.lengths))
        if state.lengths.any():
            kv.reserve(int(state.lengths.max()))
            for name, tensor in layout.items():
                self._fill(kv, name, tensor, state.lengths)
        if occupancy is not None:
            kv.occupy(occupancy)
        return kv, state

    def _header(self) -> Table:
        prefix = self._file.read(8)
        length, limit = int.from_bytes(prefix, "little"), min(self._size - 8, _MAX_HEADER)
        if len(prefix) < 8 or length > limit:
            self._refuse(
                "its header is too long",
                got=f"{length} of {self._size} bytes",
                expected=f"at most {max(limit, 0)} bytes",
            )
        self._data = 8 + length
        return self._table(self._file.read(length), "header")

    def _table(self, text: str | bytes, part: str) -> Table:
        path = f"the {part} of the saved cache {self._path}"
        return Table.from_json(text, path, error=UsageError, fix=_SAVE_AGAIN)

    def _state(self, text: str) -> tuple[SavedState, Occupancy | None]:
        """The state of the sequences, each number within its range."""
        table = self._table(text, "state")
        lengths = self._numbers(table, "lengths", None, _MAX_LENGTH)
        if not len(lengths):
            table.fail("lengths", "one number for each sequence")
        self._like.require_room(
            int(lengths.max()), f"the sequences of the saved cache {self._path} must fit the capacity"
        )
        last = self._numbers(table, "last", len(lengths), self._vocab - 1)
        pending = table.integer_lists("pending", 0, self._vocab - 1)
        if len(pending) != len(lengths) or any(len(each) > 1 for each in pending):
            table.fail("pending", "a list of at most one token for each sequence")
        occupancy = self._occupancy(table, lengths)
        table.only()
        return SavedState(lengths, last, [list(each) for each in pending]), occupancy

    def _occupancy(self, table: Table, lengths: Ids) -> Occupancy | None:
        slots = self._like.slots
        if slots is None:
            for key in ("filled", "seen"):
                if not table.is_null(key):
                    table.fail(key, "null, because no layer evicts")
            return None
        filled = self._numbers(table, "filled", len(lengths), _MAX_LENGTH)
        seen = self._numbers(table, "seen", len(lengths), _MAX_LENGTH)
        if (seen != lengths).any():
            table.fail("seen", "the same numbers as lengths")
        if (filled > np.minimum(lengths, slots)).any() or ((filled == 0) != (lengths == 0)).any():
            table.fail("filled", f"1 to {slots} slots for each sequence with tokens, at most its length")
        return Occupancy(filled, seen)

    def _numbers(self, table: Table, key: str, count: int | None, maximum: int) -> Ids:
        values = table.integers(key, 0, maximum)
        if count is not None and len(values) != count:
            table.fail(key, "one number for each sequence")
        return np.array(values, np.int64)

    def _require_layout(self, header: Table, layout: Mapping[str, _Tensor]) -> None:
        """Check dtypes and shapes of the tensors, and that their data is contiguous and complete."""
        odd = sorted(set(header) ^ {_METADATA, *layout})
        if odd:
            self._refuse("its tensors differ from this bundle's cache", got=repr(odd[0])[:80])
        spans = []
        for name, tensor in layout.items():
            entry = header.table(name)
            shape, offsets = list(entry.integers("shape")), entry.integers("data_offsets")
            if (entry.string("dtype"), shape) != (tensor.dtype, tensor.shape):
                self._refuse(
                    f"dtype and shape of {name} do not match the sequences",
                    got=f"{entry.string('dtype')} {shape}"[:80],
                    expected=f"{tensor.dtype} {tensor.shape}",
                )
            entry.only()
            if len(offsets) != 2:
                entry.fail("data_offsets", "a start and an end")
            if offsets[1] - offsets[0] != tensor.stop - tensor.start:
                self._refuse(
                    f"the data of {name} does not match its shape",
                    got=f"{offsets[1] - offsets[0]} bytes",
                    expected=f"{tensor.stop - tensor.start} bytes",
                )
            spans.append((*offsets, name))
        end = 0
        for start, stop, name in sorted(spans):
            if start != end:
                self._refuse(
                    f"its tensors overlap or leave a gap, at {name}",
                    got=f"byte {start}",
                    expected=f"byte {end}",
                )
            end = stop
        if end != self._size - self._data:
            self._refuse(
                "the size of its data differs from its header",
                got=f"{self._size - self._data} bytes",
                expected=f"{end} bytes",
            )
        self._starts = {name: self._data + start for start, _, name in spans}

    def _require_digest(self, expected: str) -> None:
        self._file.seek(self._data)
        digest = hashlib.sha256()
        while piece := self._file.read(_PIECE):
            digest.update(piece)
        if digest.hexdigest() != expected:
            self._refuse(
                "its data was changed: its sha256 differs", got=digest.hexdigest(), expected=expected
            )

    def _fill(self, kv: KvCache, name: str, tensor: _Tensor, lengths: Ids) -> None:
        """Copy a tensor into the first slots of its buffer, or into those of its positions in a ring."""
        values = np.empty(tensor.shape, stored_as(kv.dtype_of(name)))
        self._file.seek(self._starts[name])
        view: Any = values.view(np.uint8).reshape(-1).data
        if self._file.readinto(view) != values.nbytes:  # type: ignore[attr-defined]
            self._refuse("it was truncated while it was read")
        if kv.ring(name) is not None:
            _place(kv, name, values, lengths)
            return
        copy: Any = kv.storage.zeros(values.shape, kv.dtype_of(name))
        kv.storage.write(copy, values)
        kv.storage.copy_slots(copy, kv.buffers[name], values.shape[2])

    def _refuse(self, what: str, *, got: object = None, expected: object = None) -> NoReturn:
        raise UsageError(
            f"the saved cache {self._path} must be valid: {what}",
            got=got,
            expected=expected,
            fix=_SAVE_AGAIN,
        )
