"""The recorded self-test equals what the reference computes on the same tokens in one call."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.decoders import STYLES, make_decoder
from support.tiny_bundles import write_bundle
from torch import Tensor

from kvexport.bundle import Bundle
from kvexport.bundle.self_test_file import ReferenceOutputs, read_reference_outputs, steady_scores
from kvexport.eviction.config import POLICIES, POSITION_PLUS_ONE, SCORE, Eviction
from kvexport.files.hashing import sha256_of
from kvexport.model import reference
from kvexport.model.decoder import Decoder, Rope
from kvexport.progress import Progress
from kvexport.validate.self_test_recorder import CONTINUATION, PROMPT, SelfTestRecorder, slots_of

EVICTION = Eviction("l2-norm", 40, protect_first=2, protect_recent=8)


def recorded(path: Path, decoder: Decoder, **options: Any) -> ReferenceOutputs:
    return read_reference_outputs(Bundle.open(write_bundle(path, decoder, self_test=True, **options)))


def rounded(part: Any, dtype: torch.dtype) -> Any:
    """A part of a decoder with its weights rounded to a dtype."""
    if isinstance(part, Tensor):
        return part.to(dtype).to(part.dtype) if part.is_floating_point() else part
    if dataclasses.is_dataclass(part) and not isinstance(part, (type, Rope)):
        names = [each.name for each in dataclasses.fields(part) if each.name != "alibi_slopes"]
        return dataclasses.replace(part, **{name: rounded(getattr(part, name), dtype) for name in names})
    return part


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("style", STYLES)
def test_rows_equal_the_reference(style: str, dtype: str, tmp_path: Path) -> None:
    decoder = make_decoder(style, dtype=torch.float32)
    vectors = recorded(tmp_path / "b", decoder, dtype=dtype)
    layers = [rounded(layer, getattr(torch, dtype)) for layer in decoder.layers]
    taps: list[reference.LayerTaps] = []
    logits = reference.forward(
        dataclasses.replace(decoder, layers=layers), torch.from_numpy(vectors.tokens)[None], taps=taps
    )[0]
    assert (len(vectors.prompt), len(vectors.continuation), len(vectors.rows)) == (
        PROMPT,
        CONTINUATION,
        PROMPT + CONTINUATION,
    )
    assert vectors.slots is None and vectors.first_row == 0 and len(set(vectors.logit_indices)) == 16
    for at, (row, wanted) in enumerate(zip(vectors.rows, logits, strict=True)):
        best = wanted.topk(2)
        assert row.likeliest == int(best.indices[0])
        assert row.rms == pytest.approx(float(wanted.square().mean().sqrt()), rel=1e-4)
        assert row.margin == pytest.approx(float(best.values[0] - best.values[1]), abs=1e-4)
        np.testing.assert_allclose(row.values, wanted[list(vectors.logit_indices)], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(row.key_norms, [tap.key[0, :, at].norm() for tap in taps], rtol=1e-5)
        np.testing.assert_allclose(row.value_norms, [tap.value[0, :, at].norm() for tap in taps], rtol=1e-5)
    chosen = logits[PROMPT - 1 : -1].argmax(-1).tolist()
    assert list(vectors.continuation) == chosen


def test_records_the_digest_of_the_weights(tmp_path: Path) -> None:
    vectors = recorded(tmp_path / "b", make_decoder(dtype=torch.float32))
    assert vectors.weights_sha256 == sha256_of(tmp_path / "b" / "decoder.onnx.data")


@pytest.mark.parametrize("policy", POLICIES)
def test_steps_evict_if_layers_evict(policy: str, tmp_path: Path) -> None:
    """The rows equal those of full attention until all slots are in use, and differ after that."""
    decoder = make_decoder("gqa", dtype=torch.float32)
    vectors = recorded(tmp_path / "b", decoder, eviction=dataclasses.replace(EVICTION, policy=policy))
    assert (
        vectors.slots == EVICTION.self_test_slots == 26
        and len(vectors.prompt) == 18
        and len(vectors.continuation) == 24
    )
    assert vectors.first_row == 2 and len(vectors.rows) == 40
    logits = reference.forward(decoder, torch.from_numpy(vectors.tokens)[None])[0]
    wrong = [
        not np.allclose(row.values, logits[at, list(vectors.logit_indices)], atol=1e-3)
        for at, row in enumerate(vectors.rows, vectors.first_row)
    ]
    assert not any(wrong[: 26 - 2]) and all(wrong[28 - 2 :])


def test_the_prompt_is_the_first_tokens_of_the_text(tmp_path: Path) -> None:
    decoder = make_decoder(dtype=torch.float32)
    for given in (torch.arange(30).reshape(2, 15), torch.arange(3)):
        greedy = SelfTestRecorder(decoder, given, 64, None, "float32", tmp_path)
        for layer in decoder.layers:
            greedy.add_layer(layer)
        greedy.record(Progress())
        assert greedy._ids[: min(16, given.numel())] == list(range(30))[: min(16, given.numel())]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["0.pt", "1.pt"]


def test_saved_layers_are_no_larger_than_their_weights(tmp_path: Path) -> None:
    """A weight that is a view of a larger tensor is saved alone, in the bundle's dtype."""
    decoder = make_decoder(dtype=torch.float32, hidden=64)
    layer = decoder.layers[0]
    wide = torch.randn(100, *layer.attention.o.weight.shape)
    o = dataclasses.replace(layer.attention.o, weight=wide[3])
    viewing = dataclasses.replace(layer, attention=dataclasses.replace(layer.attention, o=o))
    sizes = {}
    for dtype in ("float32", "float16"):
        SelfTestRecorder(decoder, torch.arange(3), 64, None, dtype, tmp_path).add_layer(viewing)
        sizes[dtype] = (tmp_path / "0.pt").stat().st_size
    SelfTestRecorder(decoder, torch.arange(3), 64, None, "float32", tmp_path).add_layer(layer)
    assert sizes["float32"] == pytest.approx((tmp_path / "0.pt").stat().st_size, rel=0.02)
    assert sizes["float16"] < 0.6 * sizes["float32"]


def test_reports_its_progress(tmp_path: Path) -> None:
    decoder = make_decoder(dtype=torch.float32)
    greedy = SelfTestRecorder(decoder, torch.arange(20), 64, None, "float32", tmp_path)
    for layer in decoder.layers:
        greedy.add_layer(layer)

    class Counting(Progress):
        told: tuple[str, int] = "", 0
        done = 0

        def stage(self, name: str, steps: int) -> Any:
            self.told = name, steps
            return super().stage(name, steps)

        def advance(self) -> None:
            self.done += 1

    progress = Counting()
    greedy.record(progress)
    assert (
        progress.told == ("Recording the self-test", progress.done)
        and progress.done == (1 + CONTINUATION) * 2
    )


@pytest.mark.parametrize("capacity", [1, 2, 3, 4, 7, 16, 29, 39, 40, 41, 100])
def test_records_at_any_capacity(capacity: int, tmp_path: Path) -> None:
    decoder = make_decoder(layers=1, dtype=torch.float32)
    greedy = SelfTestRecorder(decoder, torch.arange(50), capacity, None, "float32", tmp_path)
    assert greedy._prompt >= 1 and greedy._prompt + greedy._steps == min(capacity, 40)
    for budget in range(2, capacity + 1):
        eviction = Eviction("window", budget)
        slots = slots_of(eviction, capacity)
        assert eviction.protected < slots <= budget
        greedy = SelfTestRecorder(decoder, torch.arange(50), capacity, eviction, "float32", tmp_path)
        assert 1 <= greedy._prompt <= slots and greedy._prompt + greedy._steps <= capacity
        assert greedy._prompt + greedy._steps > slots or capacity == 2  # at least one token is evicted


def test_steady_scores_are_distinct_and_change_nothing_else() -> None:
    state = np.zeros((3, 50, 2), np.float32)
    state[:, :40, POSITION_PLUS_ONE] = np.arange(1, 41)
    state[:, :, SCORE] = -7
    ranked = steady_scores(2, state)
    assert (ranked[..., 1] == state[..., 1]).all() and (ranked[:, 40:, 0] == -7).all()
    assert all(len(np.unique(head[:40, 0])) == 40 for head in ranked)
    assert ranked[1, 4, 0] == (7919 * 5 + 104729 * 7) % 65537  # as a reader computes it
    assert (state[..., 0] == -7).all()
