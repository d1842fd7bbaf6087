"""Memory that the C library keeps after it was freed; knows malloc, nothing of what was in it."""

from __future__ import annotations

import ctypes


def return_freed() -> None:
    """Give freed pages back to the system. glibc keeps most of what one layer's tensors took, between small blocks
    that live on, so that without this a long conversion grows layer by layer. Elsewhere: nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
