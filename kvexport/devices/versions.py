"""Parse versions of engines, packages and compute capabilities into tuples that compare."""

from __future__ import annotations

import re

from kvexport.errors import UsageError

Version = tuple[int, ...]

_VERSION = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})+")
_RELEASE = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})*")


def is_version(text: str) -> bool:
    """Whether `text` is two or more numbers with points between them, such as "10.3.0.30"."""
    return _VERSION.fullmatch(text) is not None


def parse_version(text: str) -> Version:
    """The numbers of a version such as "10.3.0.30" or of a compute capability such as "8.7".

    Raises:
        UsageError: `text` is not a version.
    """
    if not is_version(text):
        raise UsageError(
            "a version must be numbers with points between them",
            got=repr(text),
            expected="such as 10.3 or 10.3.0.30",
        )
    return tuple(map(int, text.split(".")))


def release_of(version: str) -> Version:
    """The leading numbers of a package's version, such as (2, 8, 0) of "2.8.0+cpu"; empty if there are
    none."""
    release = _RELEASE.match(version)
    return tuple(map(int, release.group().split("."))) if release else ()
