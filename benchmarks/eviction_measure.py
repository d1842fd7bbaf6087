"""Measure the loss from a cache of fewer slots in the PyTorch reference: language modelling and retrieval.

A decoder runs with its cache evicting in two ways: as in the paper, and as in the runtime.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from quality_measure import Text
from tasks import share
from torch import Tensor

from kvexport.eviction.config import Eviction
from kvexport.eviction.reference_cache import EvictingCache
from kvexport.model import reference
from kvexport.model.decoder import Attention, Decoder
from kvexport.model.divergence import DivergenceMeter
from kvexport.model.reference import Cache, LayerCache

_TOGETHER = 8  # windows of text

PROTOCOLS = {
    "once": "the whole prompt is read, then the cache is compressed once (arXiv 2406.11430)",
    "chunked": "the prompt is read in chunks, for each of which room is made within the budget",
}


def held(decoder: Decoder, eviction: Eviction | None, context: int, trained: Decoder | None = None) -> float:
    """Numbers that the cache holds of a context of so many tokens, as a share of what the trained model's
    holds of it."""
    layers = list(decoder.layers)
    slots = [context if eviction is None else eviction.slots(at, context) for at in range(len(layers))]
    numbers = sum(layer.attention.kv_width * count for layer, count in zip(layers, slots, strict=True))
    return numbers / (context * sum(layer.attention.kv_width for layer in (trained or decoder).layers))


# Language modelling


def language_modelling(
    decoder: Decoder, trained: Decoder, texts: dict[str, Text], eviction: Eviction | None
) -> dict[str, dict[str, Any]]:
    """The second half of every window of each text, one token at a time from the moment that the budget is
    full.

    Returns:
        by text: `cross_entropy` and `mean_kl` to the trained model with all its cache, nats per token;
        `increase` of the cross-entropy over that model's, with its standard error over windows;
        `top1_agreement`; `increases` by window.
    """
    first = next(iter(texts.values())).windows.shape[1] // 2
    ours = stepwise(decoder, torch.cat([text.windows for text in texts.values()]), first, eviction)
    parts = ours.split([len(text.windows) for text in texts.values()])
    return {
        name: _divergence(trained, text, part, first)
        for (name, text), part in zip(texts.items(), parts, strict=True)
    }


def _divergence(trained: Decoder, text: Text, ours: Tensor, first: int) -> dict[str, Any]:
    whole, increases = DivergenceMeter(), []
    for at in range(len(ours)):
        one = slice(at, at + 1)
        original, meter = reference.logits(trained, text.original[one, first:]), DivergenceMeter()
        for each in (whole, meter):
            each.add(original, ours[one], text.windows[one, first:])
        found = meter.finish()
        increases.append(found.cross_entropy - found.cross_entropy_original)
    figures, (mean, error) = whole.finish().to_json(), mean_and_error(increases)
    kept = {name: figures[name] for name in ("cross_entropy", "mean_kl", "top1_agreement", "tokens")}
    return {
        **kept,
        "increase": mean,
        "increase_standard_error": error,
        "increases": [round(each, 6) for each in increases],
    }


@torch.no_grad()
def stepwise(decoder: Decoder, windows: Tensor, first: int, eviction: Eviction | None) -> Tensor:
    """Logits [N, S - first, vocab] of windows [N, S] from position `first` on, each token read after the one
    before it.

    What a layer evicts depends on its own keys alone, so the layers are run one after the other over all
    tokens: the reference's cache gives the step at which each token is evicted, and attention hides it from
    that step on.
    """
    return torch.cat([_stepwise(decoder, part, first, eviction) for part in windows.split(_TOGETHER)])


def _stepwise(decoder: Decoder, windows: Tensor, first: int, eviction: Eviction | None) -> Tensor:
    at = positions(len(windows), 0, windows.shape[1])
    x = reference.embed(decoder.embedding, windows)
    for index, layer in enumerate(decoder.layers):
        evicts = None if eviction is None or not eviction.evicts(index) else eviction
        x = reference.run_block(layer, x, partial(_attend, layer.attention, at, evicts, index)).residual
    return reference.logits(decoder, x[:, first:])


def _attend(attention: Attention, at: Tensor, eviction: Eviction | None, layer: int, x: Tensor) -> Tensor:
    """The attention's output of normed inputs x [N, S, hidden], from which evicted tokens are hidden."""
    projected = reference.project(attention, x, at)
    query = reference.map_queries(attention, projected.query_rotated)
    key = reference.map_keys(attention, projected.key_rotated)
    scores = reference.scores(attention, query, key) + reference.visibility(attention, at, at[0], x.dtype)
    if eviction is not None:
        gone = leaves(key, eviction, layer, attention.window)
        gone = gone.repeat_interleave(attention.queries_per_kv_head, 1)
        scores = scores.masked_fill(at[:, None, :, None] >= gone[:, :, None], -torch.inf)
    return reference.linear(attention.o, reference.mix(attention, reference.weights(scores), projected.value))


def leaves(key: Tensor, eviction: Eviction, layer: int, window: int | None) -> Tensor:
    """The position whose token takes the slot of each token, [N, Hkv, S], of keys [N, Hkv, S, width]; S: it
    stays."""
    count, heads, length, width = key.shape
    cache = EvictingCache.empty(count, heads, (width, 1), key.dtype, eviction, layer, length, window)
    gone, nothing = torch.full((count, heads, length), length), torch.zeros(count, heads, length, 1)
    room = min(eviction.budget, length)
    cache.write(key[:, :, :room], nothing[:, :, :room], positions(count, 0, room))
    for at in range(room, length):
        there = cache.positions
        slots = cache.write(key[:, :, at : at + 1], nothing[:, :, :1], positions(count, at, at + 1))
        gone.scatter_(2, there.gather(2, slots), at)
    return gone


def positions(count: int, start: int, stop: int) -> Tensor:
    return torch.arange(start, stop).expand(count, -1)


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """A mean and its standard error; None for one value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(sum((each - mean) ** 2 for each in values) / (len(values) - 1) / len(values))


# Finding again


@dataclass(frozen=True)
class Asked:
    """Prompts of one length [N, S] with their answers [N, A], and what a cache that holds everything makes of
    them."""

    prompts: Tensor
    answers: Tensor
    rows: Tensor  # which prompts these are, [N]
    caches: Sequence[Cache]
    logits: Tensor  # [N, vocab], after the prompt

    @property
    def capacity(self) -> int:
        return self.prompts.shape[1] + self.answers.shape[1]


@torch.no_grad()
def asked_of(decoder: Decoder, prompts: Sequence[tuple[list[int], list[int]]]) -> list[Asked]:
    """Prompts read whole, those of like lengths together."""
    found = []
    for rows in _alike(prompts):
        tokens, answers = (torch.tensor([prompts[row][part] for row in rows]) for part in (0, 1))
        capacity = tokens.shape[1] + answers.shape[1]
        caches = reference.new_cache(decoder.layers, len(rows), capacity, decoder.embedding.weight.dtype)
        logits = reference.forward(decoder, tokens, positions(len(rows), 0, tokens.shape[1]), caches)[
            :, -1
        ].clone()
        found.append(Asked(tokens, answers, torch.tensor(rows), caches, logits))
    return found


def _alike(prompts: Sequence[tuple[list[int], list[int]]]) -> Iterator[list[int]]:
    lengths = [(len(prompt), len(answer)) for prompt, answer in prompts]
    for each in sorted(set(lengths)):
        yield [row for row, length in enumerate(lengths) if length == each]


def retrieval(
    decoder: Decoder,
    asked: Sequence[Asked],
    depths: Sequence[float],
    eviction: Eviction | None,
    protocol: str,
) -> dict[str, Any]:
    """How often greedy decoding writes the whole answer: the accuracy, its standard error, and by depth of
    what was hidden."""
    right = torch.zeros(len(depths), dtype=torch.bool)
    for each in asked:
        right[each.rows] = answered(decoder, each, eviction, protocol)
    part, error = share(int(right.sum()), len(depths))
    by_depth = {
        str(depth): share(
            *(int(x) for x in (right[[d == depth for d in depths]].sum(), sum(d == depth for d in depths)))
        )[0]
        for depth in sorted(set(depths))
    }
    return {"trials": len(depths), "accuracy": part, "standard_error": error, "by_depth": by_depth}


@torch.no_grad()
def answered(decoder: Decoder, asked: Asked, eviction: Eviction | None, protocol: str) -> Tensor:
    """Which answers greedy decoding writes, bool [N]: each token of it is the likeliest after those
    before."""
    count, read = asked.prompts.shape
    caches, logits = (
        _PROTOCOLS[protocol](decoder, asked, eviction)
        if eviction is not None
        else (asked.caches, asked.logits)
    )
    right = torch.ones(count, dtype=torch.bool)
    for at in range(asked.answers.shape[1]):
        right &= logits.argmax(-1) == asked.answers[:, at]
        if at + 1 < asked.answers.shape[1]:
            token, here = asked.answers[:, at : at + 1], positions(count, read + at, read + at + 1)
            logits = reference.forward(decoder, token, here, caches)[:, -1]
    return right


def _once(decoder: Decoder, asked: Asked, eviction: Eviction) -> tuple[list[Cache], Tensor]:
    """The first token of the answer still comes from the whole cache, as in the paper's code."""
    count, read = asked.prompts.shape
    caches: list[Cache] = []
    for index, (layer, cache) in enumerate(zip(decoder.layers, asked.caches, strict=True)):
        assert isinstance(cache, LayerCache)
        if not eviction.evicts(index):
            caches.append(cache)  # decoding writes each position before it sees it
            continue
        attention, key, value = layer.attention, cache.key[:, :, :read], cache.value[:, :, :read]
        widths = attention.key_dim, attention.value_dim
        slots = max(read, eviction.budget)
        whole = EvictingCache.empty(
            count,
            attention.num_kv_heads,
            widths,
            key.dtype,
            eviction,
            index,
            asked.capacity,
            attention.window,
            slots,
        )
        whole.write(key, value, positions(count, 0, read))
        caches.append(whole.compressed(torch.full((count,), read)))
    return caches, asked.logits


def _chunked(decoder: Decoder, asked: Asked, eviction: Eviction) -> tuple[list[Cache], Tensor]:
    count, read = asked.prompts.shape
    caches = reference.new_cache(
        decoder.layers, count, asked.capacity, decoder.embedding.weight.dtype, eviction
    )
    for start in range(0, read, eviction.chunk):
        stop = min(start + eviction.chunk, read)
        logits = reference.forward(
            decoder, asked.prompts[:, start:stop], positions(count, start, stop), caches
        )
    return caches, logits[:, -1]


_PROTOCOLS: dict[str, Callable[[Decoder, Asked, Eviction], tuple[list[Cache], Tensor]]] = {
    "once": _once,
    "chunked": _chunked,
}
