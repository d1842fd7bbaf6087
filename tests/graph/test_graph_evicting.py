"""The graph of layers with eviction equals the reference cache after every token: slots and contents."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from support.combinations import representatives
from support.graph_decoders import (
    BLOOM,
    LLAMA,
    QWEN2,
    VOCAB,
    Shape,
    Style,
    distance,
    make_decoder,
    mapped,
    open_session,
    slopes_of,
)

from kvexport.bundle.graph_io import past, present, sized, update
from kvexport.eviction.config import POLICIES, Eviction
from kvexport.eviction.reference_cache import EvictingCache
from kvexport.graph import DecoderWriter, GraphContract
from kvexport.model import reference
from kvexport.model.decoder import Decoder

GARBAGE = 1e4
CASES: dict[str, tuple[Style, Sequence[Shape]]] = {
    "shared heads": (LLAMA, [Shape(4, 2), Shape(4, 2)]),
    "heads of their own": (QWEN2, [Shape(4, 4)]),
    "another number in each layer": (LLAMA, [Shape(4, 4), Shape(4, 1)]),
    "mapped keys and values": (LLAMA, [Shape(4, 2, group=2, key_dim=12, value_dim=12, value_map=True)]),
    "unequal widths": (LLAMA, [Shape(4, 2, group=2, key_dim=6, value_dim=10, value_map=True)]),
    "a window": (LLAMA, [Shape(4, 2, window=6), Shape(4, 2)]),
    "alibi": (BLOOM, [Shape(4, 4, slopes=slopes_of(4)), Shape(4, 2, slopes=slopes_of(4))]),
    "alibi in a window": (BLOOM, [Shape(4, 2, slopes=slopes_of(4), window=5)]),
    "normed heads": (LLAMA, [Shape(4, 2, qk_norm=True)]),
}


def write(
    decoder: Decoder, directory: Path, eviction: Eviction, dtype: str = "float32", capacity: int = 64
) -> GraphContract:
    directory.mkdir(exist_ok=True)
    writer = DecoderWriter(
        directory,
        dtype=dtype,
        capacity=capacity,
        dims=decoder.dims,
        embedding=decoder.embedding,
        eviction=eviction,
    )
    for layer in decoder.layers:
        writer.add_layer(layer)
    return writer.finish(decoder)


class Caller:
    """Run a session as a runtime does, with plain and evicting caches, without binding."""

    def __init__(
        self, session: onnxruntime.InferenceSession, contract: GraphContract, batch: int, budget: int
    ) -> None:
        self._session, self._outputs = session, [output.name for output in session.get_outputs()]
        dtypes = {
            entry.name: np.float16 if entry.type == "tensor(float16)" else np.float32
            for entry in session.get_inputs()
        }
        sizes = {"batch": batch, "capacity": contract.capacity, "budget": budget}

        self.caches: dict[str, NDArray[np.floating]] = {}
        for spec in contract.inputs:
            if spec.name.startswith("past_key_values"):
                fill = 0.0 if spec.name.endswith("state") else GARBAGE
                self.caches[spec.name] = np.full(
                    [int(sized(each, sizes)) for each in spec.shape], fill, dtypes[spec.name]
                )

    def __call__(self, ids: torch.Tensor, start: Sequence[int], filled: Sequence[int]) -> NDArray[np.float32]:
        first = np.array(start, dtype=np.int64)
        feeds = {
            "input_ids": ids.numpy(),
            "position_ids": first[:, None] + np.arange(ids.shape[1]),
            "write_indices": np.array(filled, dtype=np.int64),
            "logits_index": np.tile(np.arange(ids.shape[1]), (len(ids), 1)),
        }
        inputs = {entry.name for entry in self._session.get_inputs()}
        feeds = {name: value for name, value in feeds.items() if name in inputs}
        found = dict(zip(self._outputs, self._session.run(None, {**feeds, **self.caches}), strict=True))
        for name, cache in self.caches.items():
            _, layer, which = name.split(".")
            if present(int(layer), which) in found:
                self.caches[name] = found[present(int(layer), which)]
            else:
                slots = found.get(f"slots.{layer}", first)
                for row, new, slot in zip(cache, found[update(int(layer), which)], slots, strict=True):
                    row[:, slot : slot + ids.shape[1]] = new
        return found["logits"]


def disagreement(
    decoder: Decoder,
    session: onnxruntime.InferenceSession,
    contract: GraphContract,
    eviction: Eviction,
    prompts: Sequence[int] = (5, 5),
    steps: int = 25,
    seed: int = 1,
) -> float:
    """Largest relative distance to the reference of logits and used cache slots, over all calls."""
    batch, prompt = len(prompts), max(prompts)
    tokens = torch.randint(0, VOCAB, (batch, prompt + steps), generator=torch.Generator().manual_seed(seed))
    graph = Caller(session, contract, batch, eviction.budget)
    caches = reference.new_cache(list(decoder.layers), batch, contract.capacity, torch.float32, eviction)
    evicting = [cache for cache in caches if isinstance(cache, EvictingCache)]
    worst, start = 0.0, torch.zeros(batch, dtype=torch.int64)
    for count in (prompt, *[1] * steps):
        positions = start[:, None] + torch.arange(count)
        ids = tokens.gather(1, positions)
        logits = graph(ids, start.tolist(), evicting[0].filled.tolist())
        worst = max(worst, distance(logits, reference.forward(decoder, ids, positions, caches)))
        start = start + count
        if count == prompt:  # shorter rows continue after their own prompt
            start = torch.tensor(prompts)
            for cache in evicting:
                cache.filled = start.clone()
        for layer, cache in enumerate(caches):
            used = cache.filled if isinstance(cache, EvictingCache) else start
            for which in ("key", "value", "state") if isinstance(cache, EvictingCache) else ("key", "value"):
                wanted = getattr(cache, which)
                found = graph.caches[past(layer, which)].reshape(wanted.shape)
                for row, slots in enumerate(used.tolist()):
                    worst = max(worst, distance(found[row, :, :slots], wanted[row, :, :slots]))
    return worst


@pytest.mark.parametrize(("case", "policy"), representatives(list(CASES), list(POLICIES)))
def test_eviction_equals_the_reference_after_every_token(case: str, policy: str, tmp_path: Path) -> None:
    style, shapes = CASES[case]
    decoder, eviction = make_decoder(shapes, style), Eviction(policy, 9, protect_first=1, protect_recent=3)
    contract = write(decoder, tmp_path, eviction)
    assert disagreement(decoder, open_session(tmp_path), contract, eviction) < 5e-6


def test_rows_of_unequal_length_evict_independently(tmp_path: Path) -> None:
    decoder, eviction = make_decoder([Shape(4, 2), Shape(4, 2)]), Eviction("l2-norm", 8, protect_recent=2)
    contract = write(decoder, tmp_path, eviction)
    assert disagreement(decoder, open_session(tmp_path), contract, eviction, prompts=(6, 2)) < 5e-6


def test_layers_without_eviction_keep_their_form(tmp_path: Path) -> None:
    decoder, eviction = (
        make_decoder([Shape(4, 2)] * 3),
        Eviction("l2-norm", 8, protect_recent=2, skip_layers=(0, 2)),
    )
    contract = write(decoder, tmp_path, eviction)
    shapes = {spec.name: spec.shape for spec in contract.inputs}
    assert shapes[past(0, "key")] == ("batch", 2, "capacity", 8)
    assert shapes[past(1, "key")] == ("batch*2", 1, "budget", 8)
    assert shapes[past(1, "state")] == ("batch*2", 1, "budget", 2)
    assert past(2, "state") not in shapes
    assert contract.variant == "std24-evicting"
    assert disagreement(decoder, open_session(tmp_path), contract, eviction) < 5e-6


@pytest.mark.parametrize(
    "change", [{"protect_recent": 2}, {"protect_first": 0}, {"policy": "keep-high"}, {"skip_layers": (1,)}]
)
def test_another_eviction_is_detected(change: dict[str, object], tmp_path: Path) -> None:
    """Negative control: a graph with another policy or protection differs from the reference."""
    decoder, eviction = (
        make_decoder([Shape(4, 2), Shape(4, 2)]),
        Eviction("l2-norm", 9, protect_first=2, protect_recent=4),
    )
    other = dataclasses.replace(eviction, **change)  # type: ignore[arg-type]
    contract = write(decoder, tmp_path, other)
    if change == {"skip_layers": (1,)}:
        with pytest.raises((ValueError, KeyError)):
            disagreement(decoder, open_session(tmp_path), contract, eviction)
    else:
        assert disagreement(decoder, open_session(tmp_path), contract, eviction) > 1e-3


def test_float16_keeps_scores_and_positions_in_float32(tmp_path: Path) -> None:
    decoder = mapped(
        make_decoder([Shape(4, 2), Shape(4, 2)]),
        lambda leaf: leaf.half().float() if leaf.is_floating_point() else leaf,
    )
    eviction = Eviction(
        "window", 9, protect_first=1
    )  # of norms that float16 rounds another slot may be the highest
    contract = write(decoder, tmp_path, eviction, dtype="float16")
    assert {spec.dtype for spec in contract.inputs if spec.name.endswith("state")} == {"float32"}
    assert disagreement(decoder, open_session(tmp_path), contract, eviction) < 2e-2


def test_state_is_not_read_by_operators_that_crash_tensorrt_rtx(tmp_path: Path) -> None:
    """These operators crash the builder of TensorRT-RTX 1.7.1 by a segmentation fault, which ends the tests.

    Gather, Shape or Squeeze of a value computed from a state; a slot chosen in int64.
    """
    decoder = make_decoder([Shape(4, 2, window=6), Shape(4, 4)])
    write(decoder, tmp_path, Eviction("l2-norm", 9, protect_first=1, protect_recent=3))
    made: set[str] = set()
    for node in ir.load(tmp_path / "decoder.onnx").graph:
        inputs = [value for value in node.inputs if value is not None]
        if not any(str(value.name) in made or str(value.name).endswith(".state") for value in inputs):
            continue
        assert node.op_type not in ("Gather", "Shape", "Squeeze"), node.name
        if node.op_type in ("Where", "Less", "Equal"):
            assert ir.DataType.INT64 not in {value.dtype for value in inputs}, node.name
        if node.op_type not in ("TensorScatter", "Attention"):
            made |= {str(value.name) for value in node.outputs}
    assert {"layers.0.attention.slot", "layers.1.attention.mask.by_head"} <= made
