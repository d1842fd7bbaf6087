"""Freed memory that the C library keeps, where it is glibc; elsewhere these functions do nothing.

glibc keeps most of the memory of tensors that were freed, because small blocks between them are still in use,
or for later allocations of the process.
"""

from __future__ import annotations

import ctypes
import sys

_M_MMAP_THRESHOLD = -3  # of <malloc.h>
_LARGE = 1 << 17  # bytes; glibc's initial threshold


def return_freed() -> None:
    """Return freed pages to the operating system.

    Without this call, a long conversion grows layer by layer, and a session keeps the copy of the weights
    that ONNX Runtime frees block by block while it loads a graph.
    """
    _call("malloc_trim", 0)


def map_large_blocks() -> None:
    """Map every block of at least 128 KiB apart from now on, so that freeing it returns it at once.

    glibc does so at first, but raises the size when a larger block is freed. A setting of the whole process,
    for programs and not for libraries.
    """
    _call("mallopt", _M_MMAP_THRESHOLD, _LARGE)


def _call(function: str, *arguments: int) -> None:
    if sys.platform != "linux":
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim") and hasattr(library, "mallopt"):  # musl has neither
        getattr(library, function)(*arguments)
