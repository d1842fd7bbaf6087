"""Folders that are built once in a run of the tests and shared by all of its processes."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

Build = Callable[..., object]


class SharedFolders:
    """Folders addressed by what builds them: a function and its arguments.

    All workers of pytest-xdist share `root`, which belongs to one run. The first one that asks for a folder
    builds it, the others wait for it. Tests never write into these folders.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        root.mkdir(parents=True, exist_ok=True)

    def get(self, build: Build, /, *arguments: Any, **options: Any) -> Path:
        """The folder that `build(folder, *arguments, **options)` makes.

        Raises:
            TypeError: an argument cannot be written as JSON, so that it does not identify the folder.
        """
        name = f"{build.__module__}.{build.__qualname__}"
        identity = json.dumps([name, arguments, options], sort_keys=True)
        key = hashlib.sha256(identity.encode()).hexdigest()[:16]
        folder = self._root / f"{build.__name__.strip('_')}-{key}"
        with (self._root / f"{key}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                unfinished = self._root / f"{key}.unfinished"
                shutil.rmtree(unfinished, ignore_errors=True)
                build(unfinished, *arguments, **options)
                unfinished.rename(folder)
        return folder
