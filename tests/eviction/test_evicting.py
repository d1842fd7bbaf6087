"""The reference's evicting cache, compared with a list of tokens that implements the definition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvexport.errors import UsageError
from kvexport.eviction.config import POLICIES, POSITION_PLUS_ONE, Eviction, random_offsets, random_scores
from kvexport.eviction.reference_cache import EvictingCache
from kvexport.files.schema import Table
from kvexport.model import reference
from kvexport.model.decoder import Decoder
from kvexport.model.loader import load_decoder

CAPACITY, WIDTH = 64, 3


@dataclass
class Plain:
    """Tokens of one head as a list: the definition of every policy."""

    eviction: Eviction
    head: int
    window: int | None
    tokens: list[tuple[int, float]]  # position and norm

    def add(self, position: int, norm: float) -> None:
        if len(self.tokens) == self.eviction.budget:
            self.tokens.remove(max(self.tokens, key=lambda token: self.rank(token, position)))
        self.tokens.append((position, norm))

    def rank(self, token: tuple[int, float], newest: int) -> tuple[int, float]:
        position, norm = token
        if self.window is not None and newest - position >= self.window:
            return 2, -position
        if position < self.eviction.protect_first or newest - position < self.eviction.protect_recent:
            return 0, 0.0
        chance = random_scores(CAPACITY)[position + random_offsets(0, 2, CAPACITY)[self.head]]
        aged = (position + 1) / 2**20
        return 1, {
            "l2-norm": norm * (1 - aged),
            "keep-high": -norm * (1 + aged),
            "window": float(-position),
            "random": float(chance),
        }[self.eviction.policy]

    @property
    def positions(self) -> list[int]:
        return sorted(position for position, _ in self.tokens)


@st.composite
def evictions(draw: st.DrawFn) -> Eviction:
    first, recent = draw(st.integers(0, 3)), draw(st.integers(0, 4))
    budget = first + max(1, recent) + draw(st.integers(1, 6))
    return Eviction(draw(st.sampled_from(sorted(POLICIES))), budget, first, recent)


def tokens(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    key, value = torch.randn(2, 1, 2, count, WIDTH, dtype=torch.float64, generator=generator)
    return key, value


def empty(eviction: Eviction, window: int | None = None, dtype: torch.dtype = torch.float64) -> EvictingCache:
    return EvictingCache.empty(1, 2, (WIDTH, WIDTH), dtype, eviction, 0, CAPACITY, window)


def held(cache: EvictingCache, head: int) -> list[int]:
    return sorted(position for position in cache.positions[0, head].tolist() if position >= 0)


def contents_are_right(cache: EvictingCache, key: Tensor, value: Tensor) -> None:
    """The key and value of a token are in the same slot."""
    for head in range(2):
        for slot, position in enumerate(cache.positions[0, head].tolist()):
            if position >= 0:
                assert torch.equal(cache.key[0, head, slot], key[0, head, position])
                assert torch.equal(cache.value[0, head, slot], value[0, head, position])


@pytest.mark.slow
@given(evictions(), st.none() | st.integers(2, 8), st.integers(0, 2**16))
def test_single_tokens_evict_by_the_definition(eviction: Eviction, window: int | None, seed: int) -> None:
    key, value = tokens(30, seed)
    cache = empty(eviction, window)
    plain = [Plain(eviction, head, window, []) for head in range(2)]
    for position in range(30):
        at = slice(position, position + 1)
        cache.write(key[:, :, at], value[:, :, at], torch.tensor([[position]]))
        for head, each in enumerate(plain):
            each.add(position, float(key[0, head, position].norm()))
            assert held(cache, head) == each.positions
    contents_are_right(cache, key, value)


@pytest.mark.slow
@given(evictions(), st.integers(0, 2**16), st.data())
def test_chunks_make_room_and_keep_protected_tokens(
    eviction: Eviction, seed: int, data: st.DataObject
) -> None:
    key, value = tokens(40, seed)
    cache, start = empty(eviction), 0
    while start < 40:
        count = min(data.draw(st.integers(1, eviction.chunk)), 40 - start)
        slots = cache.write(
            key[:, :, start : start + count],
            value[:, :, start : start + count],
            torch.arange(start, start + count)[None],
        )
        start += count
        for head in range(2):
            assert len(set(slots[0, head].tolist())) == count
            assert len(held(cache, head)) == min(start, eviction.budget)
            kept = set(held(cache, head))
            assert kept >= set(range(min(start, eviction.protect_first)))
            if count == 1:  # several may need the room of recent ones
                assert (
                    kept >= set(range(max(0, start - eviction.protect_recent), start))
                    if len(kept) < eviction.budget
                    else True
                )
    contents_are_right(cache, key, value)


@given(evictions(), st.integers(0, 2**16))
def test_compressing_once_keeps_the_lowest_priorities(eviction: Eviction, seed: int) -> None:
    key, value = tokens(30, seed)
    whole = EvictingCache.empty(1, 2, (WIDTH, WIDTH), torch.float64, eviction, 0, CAPACITY, slots=30)
    whole.write(key, value, torch.arange(30)[None])
    kept = whole.compressed(torch.tensor([30]))
    contents_are_right(kept, key, value)
    for head in range(2):
        plain = Plain(eviction, head, None, [])
        ranked = sorted(
            range(30), key=lambda at, p=plain, h=head: p.rank((at, float(key[0, h, at].norm())), 30)
        )  # type: ignore[misc]
        assert held(kept, head) == sorted(ranked[: eviction.budget])
    assert kept.slots == eviction.budget
    assert int(kept.filled) == eviction.budget
    assert held(whole, 0) == list(range(30))  # the cache itself is as it was


def test_repeated_last_token_takes_its_own_slot() -> None:
    eviction = Eviction("l2-norm", 6)
    key, value = tokens(20, 1)
    cache = empty(eviction)
    for position in range(20):
        at = slice(position, position + 1)
        slots = cache.write(key[:, :, at], value[:, :, at], torch.tensor([[position]]))
    before = cache.state.clone()
    assert torch.equal(cache.write(key[:, :, 19:], value[:, :, 19:], torch.tensor([[19]])), slots)
    assert torch.equal(cache.state, before)


@pytest.mark.parametrize("family", ["llama", "mistral", "bloom", "qwen2", "qwen3"])
def test_a_budget_that_is_not_exceeded_changes_nothing(
    family: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    config: dict[str, Any] = {"sliding_window": 5} if family == "mistral" else {}
    decoder = load_decoder(tiny_checkpoint(family, **config), torch.float64)
    ids = torch.randint(0, 67, (2, 12), generator=torch.Generator().manual_seed(3))
    ours = run(decoder, ids, Eviction("l2-norm", 12), chunk=3)
    torch.testing.assert_close(ours, reference.forward(decoder, ids), rtol=0, atol=1e-12)


def test_sinks_and_window_equal_masked_attention(tiny_checkpoint: Callable[..., Path]) -> None:
    """Full attention with everything but the sinks and the last tokens masked, at their true positions."""
    decoder = load_decoder(tiny_checkpoint("llama"), torch.float64)
    ids = torch.randint(0, 67, (1, 20), generator=torch.Generator().manual_seed(3))
    ours = run(decoder, ids, Eviction("window", 7, protect_first=2))
    sees = torch.ones(20, 20, dtype=torch.bool).tril()
    sees &= (torch.arange(20)[:, None] - torch.arange(20) < 5) | (torch.arange(20) < 2)
    original = reference.visibility

    def masked(*arguments: Any) -> Tensor:
        return original(*arguments).masked_fill(~sees, -torch.inf)

    reference.visibility = masked
    try:
        expected = reference.forward(decoder, ids)
    finally:
        reference.visibility = original
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


def test_window_within_the_budget_changes_nothing(tiny_checkpoint: Callable[..., Path]) -> None:
    """Tokens that no query attends to are evicted first, whatever their norm."""
    decoder = load_decoder(tiny_checkpoint("mistral", sliding_window=5), torch.float64)
    ids = torch.randint(0, 67, (1, 30), generator=torch.Generator().manual_seed(3))
    ours = run(decoder, ids, Eviction("keep-high", 6))
    torch.testing.assert_close(ours, reference.forward(decoder, ids), rtol=0, atol=1e-12)


def test_skipped_layers_hold_all_tokens(tiny_checkpoint: Callable[..., Path]) -> None:
    decoder = load_decoder(tiny_checkpoint("llama"), torch.float64)
    caches = reference.new_cache(
        decoder.layers, 1, 20, torch.float64, Eviction("l2-norm", 4, skip_layers=(1,))
    )
    assert [cache.key.shape[2] for cache in caches] == [4, 20]


def run(decoder: Decoder, ids: Tensor, eviction: Eviction, chunk: int = 1) -> Tensor:
    caches = reference.new_cache(decoder.layers, len(ids), ids.shape[1], torch.float64, eviction)
    logits = []
    for start in range(0, ids.shape[1], chunk):
        part = ids[:, start : start + chunk]
        logits.append(
            reference.forward(
                decoder, part, torch.arange(start, start + part.shape[1]).expand(part.shape), caches
            )
        )
    return torch.cat(logits, 1)


def test_state_of_an_empty_slot_is_zero() -> None:
    """Cleared buffers are empty."""
    assert not empty(Eviction("window", 4)).state.any()
    assert POSITION_PLUS_ONE == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy": "fifo"}, "must be a known policy"),
        ({"protect_first": -1}, "--protect-first"),
        ({"protect_recent": -1}, "--protect-recent"),
        ({"budget": 0}, "must leave a token"),
        ({"budget": 8, "protect_first": 4, "protect_recent": 4}, "must leave a token"),
    ],
)
def test_rejects_impossible_evictions(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(Eviction("l2-norm", 16), **change)


@pytest.mark.parametrize(
    ("eviction", "message"),
    [
        (Eviction("l2-norm", 65), "must be at most the capacity"),
        (Eviction("l2-norm", 16, skip_layers=(-1,)), "must name layers of the model"),
        (Eviction("l2-norm", 16, skip_layers=(4,)), "must name layers of the model"),
        (Eviction("l2-norm", 16, skip_layers=(0, 1, 2, 3)), "must leave a layer that evicts"),
    ],
)
def test_rejects_evictions_that_do_not_fit_the_model(eviction: Eviction, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        eviction.require(64, 4)


def test_of_equal_tokens_the_older_one_is_evicted() -> None:
    """Equal norms up to rounding, which differs between engines."""
    cache = empty(Eviction("l2-norm", 4), dtype=torch.float32)
    for position, rounding in enumerate((1.0, 1 - 1e-7, 1 + 1e-7, 1.0, 1 + 1e-7, 1.0)):
        key = torch.full((1, 2, 1, WIDTH), rounding)
        cache.write(key, key, torch.tensor([[position]]))
    assert held(cache, 0) == [2, 3, 4, 5]


def test_json_round_trip() -> None:
    eviction = Eviction("window", 16, 4, 2, (0, 1))
    assert Eviction.from_table(Table(eviction.to_json(), "test.json")) == eviction
    for changes in ({"budget": True}, {"budget": 1.5}, {"more": 1}, {"skip_layers": ["0"]}, {"policy": 1}):
        with pytest.raises(UsageError, match=r"test\.json"):
            Eviction.from_table(Table({**eviction.to_json(), **changes}, "test.json"))
