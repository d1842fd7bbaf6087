"""The bundle: a directory that holds everything a device needs, and a manifest that says what it is.

Knows which files there are and their hashes; what the manifest says is in `bundle_manifest`. Must not know how a
graph is run. Reading validates before anything is allocated, and executes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvexport.bundle.graph_io import DATA_FILE, GRAPH_FILE
from kvexport.bundle.manifest import (
    BYTES,
    FORMAT,
    MANIFEST_FILE,
    REBUILD,
    FileEntry,
    Manifest,
    read_manifest,
    write_manifest,
)
from kvexport.errors import BundleError
from kvexport.files.atomic_directory import atomic_directory
from kvexport.files.hashing import sha256_of

REPORT_FILE = "report.json"
TOKENIZER_FILE = "tokenizer.json"

__all__ = [
    "BYTES",
    "DATA_FILE",
    "FORMAT",
    "GRAPH_FILE",
    "MANIFEST_FILE",
    "REPORT_FILE",
    "TOKENIZER_FILE",
    "Bundle",
    "BundleWriter",
    "new_bundle",
]


@dataclass(frozen=True)
class Bundle(Manifest):
    """A bundle whose manifest was read and found sound; its files are there and of the right size."""

    path: Path

    @classmethod
    def open(cls, path: Path | str) -> Bundle:
        """Read and check the manifest, and that every file is there in its size; hashes no file (see `verify`).

        Raises:
            BundleError: no bundle, a newer format, a damaged manifest, a file missing or of another size.
        """
        path = Path(path)
        bundle = cls(**vars(read_manifest(path)), path=path)
        sizes = {file.name: file.stat().st_size for file in path.iterdir() if file.is_file()}
        for name, entry in bundle.files.items():
            if name not in sizes:
                raise BundleError(
                    f"the bundle {path} lacks its file {name}", fix="copy the bundle again, or " + REBUILD
                )
            if sizes[name] != entry.bytes:
                raise BundleError(
                    f"{name} of the bundle {path} has another size than when it was written",
                    got=f"{sizes[name]} bytes",
                    expected=f"{entry.bytes} bytes",
                    fix="copy the bundle again, or " + REBUILD,
                )
        return bundle

    def verify(self, names: Iterable[str] | None = None) -> None:
        """Hash files, all of them or those named.

        Raises:
            BundleError: names the first file that is not as it was written.
        """
        for name in self.files if names is None else names:
            if sha256_of(self.path / name) != self.files[name].sha256:
                raise BundleError(
                    f"{name} of the bundle {self.path} is not as it was written: its sha256 differs",
                    fix="copy the bundle again, or " + REBUILD,
                )


class BundleWriter:
    """Fills a directory with a bundle's files; see `new_bundle`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.sealed = False
        self._hashed: dict[str, str] = {}

    def sha256(self, name: str) -> str:
        """Of a file that is whole: it is hashed once, and must not be written to any more."""
        if name not in self._hashed:
            self._hashed[name] = sha256_of(self.directory / name)
        return self._hashed[name]

    def seal(self, manifest: Mapping[str, Any]) -> None:
        """Hash every file and write the manifest: the bundle's last file.

        Args:
            manifest: all of its keys but `format`, `files` and `manifest_sha256`.

        Raises:
            BundleError: a key is missing, wrong, or contradicts another.
        """
        files = {
            file.name: FileEntry(self.sha256(file.name), file.stat().st_size)
            for file in self.directory.iterdir()
        }
        write_manifest(self.directory, manifest, files)
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
