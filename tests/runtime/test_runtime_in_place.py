"""A decode step copies no cache: its peak memory is independent of the cache's size and of the capacity.

Each measurement is a process of its own that resets the kernel's record of its peak resident memory, runs
decode steps, and reads the record again: any copy of a cache buffer would have to be resident.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.tiny_bundles import write_bundle

from kvexport.bundle import Bundle
from kvexport.model.loader import load_decoder
from kvexport.runtime import Session, open_bundle

BATCH, DEPTH = 8, 4096
_MEASURE = """
import json, sys
import numpy as np, onnxruntime, kvexport.runtime.backends.ort
from kvexport.bundle import Bundle
from kvexport.runtime.cache.kv_cache import KvCache
from kvexport.runtime.backends.ort import Binding, OrtDecoder
from kvexport.runtime.backends.ort_session import load_graph, session_options

path, batch, depth, in_place = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "in place"
bundle = Bundle.open(path)
cache = KvCache(bundle, batch, bundle.dtype, fill=1.0, step=depth)  # filled: every page is resident
cache.reserve(depth)
session = load_graph(bundle, session_options(1))
if not in_place:
    class Copying(Binding):
        def bind_array(self, name, *arguments):
            unbound = name.startswith("present")
            self.binding.bind_output(name) if unbound else super().bind_array(name, *arguments)
    kvexport.runtime.backends.ort.Binding = Copying
decoder = OrtDecoder(session, cache)

def kib(what):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(what + ":"))

open("/proc/self/clear_refs", "w").write("5")
before = kib("VmRSS")
for position in range(depth - 4, depth):
    decoder.run(np.ones((batch, 1), np.int64), np.full((batch, 1), position), np.zeros((batch, 1), np.int64))
written = int((cache.layer(0)[0][0, 0] != 1).any(axis=1).sum())
print(json.dumps({"peak": (kib("VmHWM") - before) * 1024, "cache": cache.bytes(depth), "written": written}))
"""


def resettable() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def wide_bundle(
    tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], Path]:
    """`wide_bundle(capacity)`: one layer, four KV heads of 64, eight query heads: 2 KiB of cache a token."""
    checkpoint = tiny_checkpoint(
        "llama",
        num_hidden_layers=1,
        head_dim=64,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1 << 17,
    )
    folder = tmp_path_factory.mktemp("wide")
    made: dict[int, Path] = {}

    def bundle(capacity: int) -> Path:
        if capacity not in made:
            made[capacity] = write_bundle(folder / str(capacity), load_decoder(checkpoint), capacity=capacity)
        return made[capacity]

    return bundle


def _measure(bundle: Path, how: str) -> tuple[dict[str, int], str]:
    command = [sys.executable, "-c", _MEASURE, str(bundle), str(BATCH), str(DEPTH), how]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(ran.stdout), ran.stderr


@pytest.mark.skipif(
    not resettable(), reason="this system does not let a process reset its peak resident memory"
)
def test_peak_memory_of_a_step_does_not_depend_on_cache_and_capacity(
    wide_bundle: Callable[[int], Path],
) -> None:
    """At the smaller capacity GroupQueryAttention writes the cache, at the larger one TensorScatter."""
    exact, _ = _measure(wide_bundle(DEPTH), "in place")
    roomy, message = _measure(wide_bundle(1 << 16), "in place")
    copied, complaint = _measure(wide_bundle(1 << 16), "copied")
    assert exact["cache"] == roomy["cache"] == 64 << 20
    assert exact["written"] == roomy["written"] == 4
    # Scores and masks of 4096 slots, and code pages of onnxruntime: far below one buffer.
    assert exact["peak"] < 8 << 20 and roomy["peak"] < 8 << 20
    assert "tensorscatter" not in message
    # Control: outputs that are not bound are copied, and both measurements show it.
    assert copied["peak"] > 56 << 20 and copied["written"] == 0
    assert complaint.count("tensorscatter.cc") == 2 * 4


def test_step_allocates_the_same_small_arrays_at_any_depth(wide_bundle: Callable[[int], Path]) -> None:
    """tracemalloc, which counts numpy arrays: a step allocates its logits and little else."""
    peaks = []
    for capacity, depth in ((512, 10), (1 << 16, 10), (1 << 16, 700)):
        session = open_bundle(wide_bundle(capacity), threads=1)
        session.prefill([1] * depth)
        session.step([2])
        addresses = _addresses(session)
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        session.step([3])
        peaks.append(tracemalloc.get_traced_memory()[1] - before)
        tracemalloc.stop()
        assert _addresses(session) == addresses
    assert max(peaks) < 16 << 10


def test_frees_old_buffers_when_the_cache_grows(wide_bundle: Callable[[int], Path]) -> None:
    session = open_bundle(wide_bundle(1 << 16), threads=1)
    session.prefill([1] * 256)
    tracemalloc.start()  # after the first buffers: their release is not seen, whatever is new is
    session.step([1])
    grown = session.memory().bytes_allocated
    assert grown == 512 * 2048
    for _ in range(256):
        session.step([1])
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    now = session.memory().bytes_allocated
    assert now == 768 * 2048 and held < now * 1.2
    assert peak < now + grown / 2 + now * 0.2  # one buffer of the two at a time


def _addresses(session: Session) -> list[int]:
    return [buffer.ctypes.data for buffer in session.core.decoder.cache.buffers.values()]


def test_reported_bytes_equal_the_buffers(wide_bundle: Callable[[int], Path]) -> None:
    bundle = Bundle.open(wide_bundle(512))
    assert bundle.kv_bytes_per_token == 2048
    session = open_bundle(wide_bundle(512), threads=1)
    session.prefill([[1], [2, 3]])
    assert (
        session.memory().bytes_allocated
        == 2 * 256 * 2048
        == sum(buffer.nbytes for buffer in session.core.decoder.cache.buffers.values())
    )
    assert all(buffer.dtype == np.float32 for buffer in session.core.decoder.cache.buffers.values())
