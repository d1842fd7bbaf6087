"""Freed memory that the C library keeps."""

from __future__ import annotations

import ctypes


def return_freed() -> None:
    """Return freed pages to the system; does nothing without glibc.

    glibc keeps most of the memory of one layer's tensors, because small blocks between them are still in use.
    Without this call, a long conversion grows layer by layer.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
