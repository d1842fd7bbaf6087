"""A cache that evicts takes the memory of its budget at every step, and no step copies it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.decoders import make_decoder
from support.tiny_bundles import write_bundle
from test_runtime_evicting import Reference, tokens
from test_runtime_in_place import resettable

from kvexport.bundle import Bundle
from kvexport.eviction.config import Eviction
from kvexport.model import reference
from kvexport.model.decoder import Decoder

SLOTS, BATCH = 4096, 8
_PEAK = """
import json, sys
import numpy as np, onnxruntime, kvexport.runtime.backends.ort
from kvexport.bundle import Bundle
from kvexport.runtime.cache.kv_cache import KvCache
from kvexport.runtime.backends.ort import Binding, OrtDecoder
from kvexport.runtime.backends.ort_session import load_graph, session_options

path, batch, in_place = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "in place"
bundle = Bundle.open(path)
slots = bundle.eviction.budget
cache = KvCache(bundle, batch, bundle.dtype, fill=1.0, step=slots)  # filled: every page is resident
cache.reserve(slots)
state = cache.buffers["past_key_values.0.state"]
state[..., 1] = 1 + np.arange(slots)  # as many tokens as there are slots; the one at 7 ranks highest
state[..., 0] = np.arange(slots) == 7
cache.occupancy.filled[:], cache.occupancy.seen[:] = slots, slots
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
for position in range(slots, slots + 4):
    decoder.run(np.ones((batch, 1), np.int64), np.full((batch, 1), position), np.zeros((batch, 1), np.int64))
keys = cache.layer(0)[0]
written = [int((keys[row, head] != 1).any(axis=1).sum()) for row in range(batch) for head in range(4)]
print(json.dumps({"peak": (kib("VmHWM") - before) * 1024, "cache": cache.bytes(slots), "written": written,
                  "seven": float(state[0, 0, 7, 1])}))
"""
_STEPS = """
import json, sys
import numpy as np
from kvexport.runtime import open_bundle

path, ids, every = sys.argv[1], np.load(sys.argv[2]), int(sys.argv[3])
session = open_bundle(path, threads=1, provider="cpu")
kept = np.empty((len(ids) // every, session.bundle.model.vocab_size), np.float32)
kept[...] = 0

def resident():  # but for the weights, which are mapped, page by page as positions come
    status = open("/proc/self/status")
    return next(int(line.split()[1]) for line in status if line.startswith("RssAnon:")) * 1024

seen = []
for step, token in enumerate(ids.tolist(), 1):
    logits = session.step([token])
    if step % every == 0:
        kept[step // every - 1] = logits[0]
    if step % 1000 == 0:
        seen.append((session.memory().bytes_allocated, resident()))
np.save(sys.argv[4], kept)
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer, four KV heads of 64, eight query heads: 2 KiB of cache and 32 bytes of state a token."""
    decoder = make_decoder(
        "gqa", layers=1, heads=8, kv_heads=4, head_dim=64, dtype=torch.float32, max_positions=1 << 16
    )
    path = tmp_path_factory.mktemp("wide") / "b"
    return write_bundle(path, decoder, capacity=2 * SLOTS, eviction=Eviction("l2-norm", SLOTS, 2, 8))


def _peak(bundle: Path, how: str) -> tuple[dict[str, object], str]:
    ran = subprocess.run(
        [sys.executable, "-c", _PEAK, str(bundle), str(BATCH), how],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(ran.stdout), ran.stderr


@pytest.mark.skipif(
    not resettable(), reason="this system does not let a process reset its peak resident memory"
)
def test_peak_memory_of_a_step_does_not_depend_on_the_cache(wide: Path) -> None:
    actual, message = _peak(wide, "in place")
    copied, complaint = _peak(wide, "copied")
    assert actual["cache"] == copied["cache"] == BATCH * SLOTS * (2048 + 32)
    assert actual["written"] == [4] * BATCH * 4  # of every head four slots: those that ranked highest
    assert actual["seven"] == SLOTS + 1 and copied["seven"] == 8
    # Scores, masks and ranks of 4096 slots and 32 heads, and pages of onnxruntime's code: less than a buffer.
    assert isinstance(actual["peak"], int) and actual["peak"] < 16 << 20
    assert "tensorscatter" not in message
    # The control: outputs that are not bound are copies, and both instruments see them.
    assert isinstance(copied["peak"], int) and copied["peak"] > 56 << 20
    assert complaint.count("tensorscatter.cc") == 3 * 4


def _run(bundle: Path, ids: list[int], every: int, folder: Path) -> tuple[list[int], list[int], np.ndarray]:
    """Cache bytes and resident bytes after every thousand steps, and logits after every `every` steps."""
    np.save(folder / "ids.npy", np.array(ids))
    command = [
        sys.executable,
        "-c",
        _STEPS,
        str(bundle),
        str(folder / "ids.npy"),
        str(every),
        str(folder / "logits.npy"),
    ]
    actual = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    allocated, resident = zip(*actual, strict=True)
    return list(allocated), list(resident), np.load(folder / "logits.npy")


def key_norms(decoder: Decoder) -> torch.Tensor:
    """Norms of the first layer's keys before RoPE, [heads, vocabulary]."""
    layer = decoder.layers[0]
    x = reference.norm(layer.attention_norm, decoder.embedding.weight)
    keys = reference.linear(layer.attention.k, x).unflatten(-1, (layer.attention.num_kv_heads, -1))
    return keys.norm(dim=-1).T


@pytest.mark.slow
def test_ten_thousand_steps_with_a_budget_of_256(tmp_path: Path) -> None:
    """The cache stays within its budget, memory is constant, and every 50th logits equal the reference.

    One layer, so that a key's norm depends on its token alone: no two tokens have norms so close that
    rounding, which differs between processors, could change which token is evicted. Equal tokens are
    ordered by age.
    """
    decoder = make_decoder("gqa", layers=1, dtype=torch.float32, max_positions=16384)
    norms = key_norms(decoder).sort().values  # of every head and token of the vocabulary, [heads, vocabulary]
    assert (norms.diff(dim=-1) > 2e-6 * norms[:, 1:]).all()
    eviction, steps, every = Eviction("l2-norm", 256, 4, 32), 10_000, 50
    bundle = write_bundle(tmp_path / "b", decoder, capacity=16384, eviction=eviction)
    ids = tokens(steps)
    allocated, resident, logits = _run(bundle, ids, every, tmp_path)
    assert allocated == [Bundle.open(bundle).kv_bytes(16384)] * 10 == [256 * 2 * (16 + 2) * 4] * 10
    assert max(resident) - resident[0] < 512 << 10
    reference_model = Reference(decoder, eviction, 16384)
    expected = np.stack([reference_model.step(token) for token in ids])[every - 1 :: every]
    np.testing.assert_allclose(logits, expected, rtol=0.0, atol=1e-5)
    # Control: without a budget both numbers grow.
    whole = write_bundle(tmp_path / "whole", decoder, capacity=16384)
    allocated, resident, other = _run(whole, ids[:4000], every, tmp_path)
    assert allocated == sorted(set(allocated)) and resident[-1] - resident[0] > 512 << 10
    assert np.abs(other[10:] - expected[10:80]).max() > 1e-2
