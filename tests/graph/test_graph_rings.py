"""A ring, which holds a window and the tokens of one call, gives what a cache of all tokens gives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.graph_decoders import (
    BLOOM,
    VOCAB,
    Caller,
    Shape,
    distance,
    make_decoder,
    quiet,
    slopes_of,
    write,
)

from kvexport.bundle.graph_io import past, window_of
from kvexport.errors import BundleError
from kvexport.graph import GRAPH_FILE, GraphContract
from kvexport.graph.lowering import LOWERINGS, lower, lowered_contract
from kvexport.graph.taps import GraphCopy, serialize
from kvexport.model import reference
from kvexport.model.decoder import Decoder

CAPACITY = 64
DECODERS = {
    "one-window": make_decoder([Shape(kv_heads=2, window=5)] * 2),
    "mixed": make_decoder(
        [Shape(kv_heads=2, window=5), Shape(kv_heads=2), Shape(kv_heads=4, window=9), Shape(window=CAPACITY)]
    ),
    "full-first": make_decoder([Shape(), Shape(kv_heads=2, window=5), Shape(kv_heads=1)]),
    "alibi": make_decoder([Shape(slopes=slopes_of(4), window=5), Shape(slopes=slopes_of(4))], BLOOM),
    "online": make_decoder([Shape(heads=4, kv_heads=2, group=2, key_dim=12, window=5)]),
}


def opened(
    decoder: Decoder, directory: Path, lowering: str = "std24"
) -> tuple[onnxruntime.InferenceSession, GraphContract]:
    contract = write(decoder, directory, capacity=CAPACITY)
    model = serialize(lower(directory / GRAPH_FILE, lowering))
    return GraphCopy(model, directory).session(quiet()), lowered_contract(contract, lowering)


def calls(start: int, stop: int, chunk: int, rings: list[int]) -> Iterator[range]:
    """Calls of at most `chunk` tokens that wrap in no ring of so many slots."""
    while start < stop:
        size = min([chunk, stop - start, *(slots - start % slots for slots in rings)])
        yield range(start, start + size)
        start += size


def rings_of(caller: Caller, contract: GraphContract) -> list[int]:
    return [
        caller.caches[spec.name].shape[2]
        for spec in contract.inputs
        if len(spec.shape) == 4 and window_of(spec.shape[2]) is not None
    ]


def worst_logits(
    decoder: Decoder,
    session: onnxruntime.InferenceSession,
    contract: GraphContract,
    tokens: int,
    chunk: int,
    *,
    prompt: int,
    extra: int | None = None,
    batch: int = 2,
) -> float:
    """Distance of the logits of `tokens` tokens from those without a cache; `prompt` of them in chunks."""
    ids = torch.randint(0, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(tokens))
    caller = Caller(session, contract, batch, CAPACITY, 1e3, chunk if extra is None else extra)
    rings = rings_of(caller, contract)
    pieces = [*calls(0, prompt, chunk, rings), *calls(prompt, tokens, 1, rings)]
    logits = [caller(ids[:, each.start : each.stop], [each.start] * batch)["logits"] for each in pieces]
    return distance(np.concatenate(logits, axis=1), reference.forward(decoder, ids))


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("name", DECODERS)
def test_chunks_and_steps_far_beyond_the_ring_equal_the_reference(
    name: str, lowering: str, tmp_path: Path
) -> None:
    session, contract = opened(DECODERS[name], tmp_path, lowering)
    for chunk in (1, 4, 7):
        assert worst_logits(DECODERS[name], session, contract, 60, chunk, prompt=43) < 5e-6


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_the_smallest_ring_equals_the_reference_and_a_smaller_one_does_not(
    lowering: str, tmp_path: Path
) -> None:
    """Calls of S tokens need W + S - 1 slots, and W - 1 where the graph only reads the cache."""
    decoder, chunk = DECODERS["one-window"], 4
    session, contract = opened(decoder, tmp_path, lowering)
    smallest = chunk - 1 if lowering != "decomposed17" else -1
    run = {"prompt": 43, "batch": 1}
    assert worst_logits(decoder, session, contract, 60, chunk, **run, extra=smallest) < 5e-6
    assert worst_logits(decoder, session, contract, 60, chunk, **run, extra=smallest - 1) > 1e-2


def test_a_call_that_wraps_gives_wrong_logits(tmp_path: Path) -> None:
    """Negative control: TensorScatter is linear, so that the runtime has to split such calls."""
    session, contract = opened(DECODERS["one-window"], tmp_path)
    ids = torch.randint(0, VOCAB, (1, 12), generator=torch.Generator().manual_seed(0))
    caller = Caller(session, contract, 1, CAPACITY, 0.0, 4)  # 9 slots
    caller(ids[:, :4], [0])
    caller(ids[:, 4:8], [4])
    with pytest.raises(Exception, match="TensorScatter"):
        caller(ids[:, 8:12], [8])


def test_rows_at_their_own_positions_equal_each_row_alone(tmp_path: Path) -> None:
    decoder = DECODERS["mixed"]
    session, contract = opened(decoder, tmp_path)
    lengths = (40, 3, 17)
    ids = torch.randint(0, VOCAB, (3, 60), generator=torch.Generator().manual_seed(3))
    rows = [Caller(session, contract, 1, CAPACITY, 1e3, 4) for _ in lengths]
    for row, length in enumerate(lengths):
        for each in calls(0, length, 4, rings_of(rows[row], contract)):
            rows[row](ids[row : row + 1, each.start : each.stop], [each.start])
    together = Caller(session, contract, 3, CAPACITY, 1e3, 4)
    together.caches = {name: np.concatenate([row.caches[name] for row in rows]) for name in together.caches}
    wanted = [
        reference.forward(decoder, ids[row : row + 1, : length + 15]) for row, length in enumerate(lengths)
    ]
    for step in range(15):
        depths = [length + step for length in lengths]
        tokens = torch.stack([ids[row, depth] for row, depth in enumerate(depths)])[:, None]
        logits = together(tokens, depths)["logits"]
        for row, depth in enumerate(depths):
            assert distance(logits[row, 0], wanted[row][0, depth]) < 5e-6


def test_padding_writes_only_to_slots_that_no_later_token_attends_to(tmp_path: Path) -> None:
    decoder, chunk = DECODERS["one-window"], 4
    session, contract = opened(decoder, tmp_path)
    ids = torch.randint(0, VOCAB, (1, 40), generator=torch.Generator().manual_seed(5))
    wanted = reference.forward(decoder, ids)
    for length in (8, 13, 21):
        caller = Caller(session, contract, 1, CAPACITY, 1e3, chunk)
        for each in calls(0, length, chunk, rings_of(caller, contract)):
            caller(ids[:, each.start : each.stop], [each.start])
        room = 9 - length % 9
        caller(torch.zeros(1, min(chunk, room), dtype=torch.int64), [length])
        logits = caller(ids[:, length : length + 1], [length])["logits"]
        assert distance(logits[0, 0], wanted[0, length]) < 5e-6


_SESSIONS: dict[int, tuple[Decoder, onnxruntime.InferenceSession, GraphContract]] = {}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_any_window_chunk_and_length_equals_the_reference(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    window = data.draw(st.sampled_from([1, 2, 3, 7, 16]), "window")
    if window not in _SESSIONS:
        decoder = make_decoder([Shape(kv_heads=2, window=window), Shape(kv_heads=2)])
        _SESSIONS[window] = decoder, *opened(decoder, tmp_path_factory.mktemp("rings"))
    chunk = data.draw(st.integers(1, 12), "chunk")
    tokens = data.draw(st.integers(1, CAPACITY), "tokens")
    prompt = data.draw(st.integers(0, tokens), "prompt")
    extra = data.draw(st.integers(chunk - 1, CAPACITY - window), "extra")
    decoder, session, contract = _SESSIONS[window]
    if window + extra < 1:
        return
    assert worst_logits(decoder, session, contract, tokens, chunk, prompt=prompt, extra=extra, batch=1) < 5e-6


def test_only_layers_whose_window_is_below_the_capacity_are_rings(tmp_path: Path) -> None:
    _, contract = opened(DECODERS["mixed"], tmp_path)
    shapes = {spec.name: spec.shape[2] for spec in contract.inputs if spec.name.endswith(".key")}
    assert shapes == {
        past(0, "key"): "window_5",
        past(1, "key"): "capacity",
        past(2, "key"): "window_9",
        past(3, "key"): "capacity",
    }


def test_group_query_attention_behind_a_ring_reads_the_positions(tmp_path: Path) -> None:
    """Full attention behind a ring has the form of a ring; ONNX Runtime gets the input without the modulo."""
    write(make_decoder([Shape(window=5), Shape()]), tmp_path, capacity=CAPACITY)
    nodes = {str(node.name): node for node in lower(tmp_path / GRAPH_FILE, "ort-cuda").graph}
    assert "mask.index" not in nodes and "ring_5.index" in nodes
    assert str(nodes["gqa.stop"].inputs[0].name) == "write_indices"


def test_decomposed17_refuses_a_ring_of_another_form(tmp_path: Path) -> None:
    write(DECODERS["one-window"], tmp_path, capacity=CAPACITY)
    model = ir.load(tmp_path / GRAPH_FILE)
    next(node for node in model.graph if node.name == "ring_5.held").name = "other"
    ir.save(model, tmp_path / "other.onnx")
    with pytest.raises(BundleError, match=r"the graph has no Where ring_5\.held"):
        lower(tmp_path / "other.onnx", "decomposed17")
