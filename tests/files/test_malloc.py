"""Memory that loading frees returns to the operating system. Each case is a process of its own."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

_MEASURE = """
import ctypes, sys
from kvexport.files.malloc import map_large_blocks, return_freed

library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]
library.free(library.malloc(24 << 20))  # glibc keeps smaller blocks from now on
if sys.argv[1] == "map":
    map_large_blocks()

def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS:"))

blocks, small = [], []
for _ in range(32):
    blocks.append(library.malloc(1 << 20))
    ctypes.memset(blocks[-1], 1, 1 << 20)
    small.append(library.malloc(64))  # which keeps the heap from shrinking at its end
before = resident()
for block in blocks:
    library.free(block)
if sys.argv[1] == "return":
    return_freed()
print((before - resident()) >> 10)
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not glibc"
)
@pytest.mark.parametrize(("case", "returns"), [("neither", False), ("map", True), ("return", True)])
def test_freed_memory_is_returned(case: str, returns: bool) -> None:
    result = subprocess.run(
        [sys.executable, "-c", _MEASURE, case], check=True, capture_output=True, text=True
    )
    assert (int(result.stdout) >= 28) is returns  # of 32 MiB
