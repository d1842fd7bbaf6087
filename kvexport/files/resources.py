"""Data files that are shipped with kvexport.

In an installed wheel they are package data (`kvexport/graphs`, ...); in a checkout they are the folders of
the same names beside the package.
"""

from __future__ import annotations

from pathlib import Path

from kvexport.errors import CannotRunHere

_PACKAGE = Path(__file__).resolve().parent.parent


def resource(*parts: str) -> Path:
    """Path of a shipped file or folder, such as ``resource("graphs", "families")``.

    Raises:
        CannotRunHere: the installation is incomplete.
    """
    for root in (_PACKAGE, _PACKAGE.parent):
        path = root.joinpath(*parts)
        if path.exists():
            return path
    raise CannotRunHere(
        f"the installed kvexport must contain its data file {'/'.join(parts)}",
        fix="install kvexport again (pip install --force-reinstall kvexport)",
    )
