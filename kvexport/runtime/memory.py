"""Settings of the C library's allocator, where it is glibc; elsewhere these functions do nothing.

While ONNX Runtime loads a graph, it frees one copy of the weights block by block. glibc keeps such blocks
resident, for later allocations of the process.
"""

from __future__ import annotations

import ctypes
import sys

_M_MMAP_THRESHOLD = -3  # of <malloc.h>
_LARGE = 1 << 17  # bytes; glibc's initial threshold


def return_free_memory() -> None:
    """Return the free memory of the allocator to the operating system."""
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
