"""SHA-256 of files."""

from __future__ import annotations

import hashlib
from pathlib import Path

from kvexport.files.identity import identity_of


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hexadecimal; the file is read in pieces.

    Raises:
        OSError: it cannot be read, or is not a regular file.
    """
    identity_of(path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()
