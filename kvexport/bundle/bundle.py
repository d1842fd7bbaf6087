"""A bundle: a directory with all that a device needs to run a model, and a manifest with the files' hashes.

Reading validates before it allocates, and executes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvexport.bundle.manifest import (
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
COPY_AGAIN = "copy the bundle again, or " + REBUILD


@dataclass(frozen=True)
class Bundle(Manifest):
    """A bundle whose manifest is valid and whose files exist in the recorded sizes.

    Attributes:
        path: its directory.
    """

    path: Path

    @classmethod
    def open(cls, path: Path | str) -> Bundle:
        """Read and validate the manifest, and check that every file has its size.

        Hashes no file (see `verify`).

        Raises:
            BundleError: there is no bundle, its format is not supported, its manifest is damaged, or a file
                is missing or has another size.
        """
        path = Path(path)
        bundle = cls(**vars(read_manifest(path)), path=path)
        sizes = {file.name: file.stat().st_size for file in path.iterdir() if file.is_file()}
        for name, entry in bundle.files.items():
            if name not in sizes:
                raise BundleError(f"the bundle {path} must contain {name}", fix=COPY_AGAIN)
            if sizes[name] != entry.bytes:
                raise BundleError(
                    f"{name} of the bundle {path} must have the size in the manifest",
                    got=f"{sizes[name]} bytes",
                    expected=f"{entry.bytes} bytes",
                    fix=COPY_AGAIN,
                )
        return bundle

    def verify(self, names: Iterable[str] | None = None) -> None:
        """Hash files and compare with the manifest.

        Args:
            names: files of the manifest; None: all.

        Raises:
            BundleError: the first file whose hash differs.
        """
        for name in self.files if names is None else names:
            if sha256_of(self.path / name) != self.files[name].sha256:
                raise BundleError(
                    f"{name} of the bundle {self.path} must be unchanged since it was written: "
                    "its sha256 differs",
                    fix=COPY_AGAIN,
                )


class BundleWriter:
    """Fills the directory of a new bundle (`new_bundle`).

    Attributes:
        directory: to write files into.
        sealed: whether the manifest was written.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.sealed = False
        self._hashes: dict[str, str] = {}

    def sha256(self, name: str) -> str:
        """Hash of a complete file, which must not be written to any more; computed once."""
        if name not in self._hashes:
            self._hashes[name] = sha256_of(self.directory / name)
        return self._hashes[name]

    def seal(self, manifest: Mapping[str, Any]) -> None:
        """Hash every file and write the manifest, the bundle's last file.

        Args:
            manifest: all keys but `format`, `files` and `manifest_sha256`.

        Raises:
            BundleError: the manifest would be invalid.
        """
        files = {
            file.name: FileEntry(self.sha256(file.name), file.stat().st_size)
            for file in self.directory.iterdir()
        }
        write_manifest(self.directory, manifest, files)
        self.sealed = True


@contextmanager
def new_bundle(path: Path, *, force: bool = False) -> Iterator[BundleWriter]:
    """Write a bundle atomically: its files appear at `path` when the block ends, or not at all.

    Args:
        path: the bundle directory.
        force: replace a bundle that exists there.

    Raises:
        UsageError: `path` exists (and, with `force`, is not a bundle), or its parent does not exist.
    """
    with atomic_directory(path, marker=MANIFEST_FILE, force=force) as directory:
        writer = BundleWriter(directory)
        yield writer
        assert writer.sealed, "a bundle without a manifest"
