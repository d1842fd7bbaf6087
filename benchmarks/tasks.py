"""Measure a model on tasks: PIQA by log-likelihood, and retrieving a passkey from a long text.

A model is a causal function `logits(tokens [N, S]) -> [N, S, vocab]` of int64 token ids, so that the
original, a converted model and a neighbour are measured alike. Results are JSON values.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvexport.errors import UsageError

Logits = Callable[[Tensor], Tensor]
Encode = Callable[[str], list[int]]

_TOKENS = 4096  # in a batch, unless one sequence has more


def encoder(checkpoint: Path) -> Encode:
    """Text to token ids by the checkpoint's tokenizer.json, without special tokens.

    Raises:
        UsageError: there is none that can be read.
    """
    from tokenizers import Tokenizer

    path = checkpoint / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise UsageError(f"{path} is no tokenizer: {error}", fix="add the model's tokenizer.json") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)


@dataclass(frozen=True)
class Scored:
    """What a model thinks of a continuation: log-likelihood in nats, and whether greedy decoding would write
    it."""

    log_likelihood: float
    greedy: bool


@torch.no_grad()
def score(logits: Logits, sequences: Sequence[tuple[list[int], list[int]]]) -> list[Scored]:
    """The continuation of each (context, continuation), both token ids and not empty.

    Sequences of like length go together, padded on the right, where a causal model sees nothing of it. Greedy
    decoding writes the continuation if, and only if, each of its tokens is the likeliest after those before
    it.
    """
    found: list[Scored | None] = [None] * len(sequences)
    for batch in _batches([len(context) + len(rest) - 1 for context, rest in sequences]):
        rows = [torch.tensor([*sequences[at][0], *sequences[at][1][:-1]]) for at in batch]
        predicted = logits(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)).double().log_softmax(-1)
        for row, at in enumerate(batch):
            context, rest = sequences[at]
            wanted, seen = torch.tensor(rest), predicted[row, len(context) - 1 : len(context) + len(rest) - 1]
            likelihood = float(seen.gather(1, wanted[:, None]).sum())
            found[at] = Scored(likelihood, bool((seen.argmax(-1) == wanted).all()))
    return [each for each in found if each is not None]


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices sorted by length, together at most `_TOKENS` when padded."""
    batch: list[int] = []
    for at in sorted(range(len(lengths)), key=lambda at: lengths[at]):
        if batch and lengths[at] * (len(batch) + 1) > _TOKENS:
            yield batch
            batch = []
        batch.append(at)
    if batch:
        yield batch


def share(right: int, count: int) -> tuple[float, float]:
    """A share and its binomial standard error."""
    part = right / count
    return part, math.sqrt(part * (1 - part) / count)


# PIQA


@dataclass(frozen=True)
class PiqaItem:
    goal: str
    solutions: tuple[str, str]
    label: int  # of the right one


def read_piqa(folder: Path) -> list[PiqaItem]:
    """The items of valid.jsonl with the labels of valid-labels.lst.

    Raises:
        UsageError: a file is missing, a line cannot be read, or there are not as many labels as items.
    """
    try:
        lines = (
            (folder / "valid.jsonl").read_text(encoding="utf-8").split("\n")
        )  # strings may hold all other line breaks
        labels = [int(line) for line in (folder / "valid-labels.lst").read_text(encoding="utf-8").split()]
        raw = [json.loads(line) for line in lines if line.strip()]
        pairs = zip(raw, labels, strict=True)
        items = [PiqaItem(each["goal"], (each["sol1"], each["sol2"]), label) for each, label in pairs]
        if not items or not {label for _, label in zip(raw, labels, strict=True)} <= {0, 1}:
            raise ValueError("no items, or labels other than 0 and 1")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{folder} holds no PIQA items: {error}",
            expected="valid.jsonl (goal, sol1, sol2) and valid-labels.lst with as many lines of 0 or 1",
        ) from error
    return items


def piqa(
    logits: Logits,
    encode: Encode,
    items: Sequence[PiqaItem],
    start: Sequence[int] = (),
    longest: int | None = None,
) -> dict[str, Any]:
    """Accuracy of choosing the solution that is likelier after 'Question: {goal}\\nAnswer:', as is usual for
    PIQA.

    Args:
        start: token ids before every prompt, such as BOS.
        longest: the model's positions; a longer context loses its beginning, and counts as truncated.

    Returns:
        `accuracy` by the sum of log-likelihoods, `accuracy_normalised` by the sum per character of the
        solution, each with its `_standard_error`; `items` and `truncated` (of `items`), counts. Equal scores
        take the first.

    Raises:
        UsageError: a solution alone exceeds `longest`.
    """
    sequences, truncated = [], set()
    for at, item in enumerate(items):
        for solution in item.solutions:
            context, rest = split(encode, f"Question: {item.goal}\nAnswer:", f" {solution}")
            context = [*start, *context]
            if longest is not None and len(context) + len(rest) - 1 > longest:
                truncated.add(at)
                if len(rest) > longest:
                    raise UsageError(
                        "a PIQA solution exceeds the model's positions", got=len(rest), expected=longest
                    )
                context = context[len(context) + len(rest) - 1 - longest :]
            sequences.append((context, rest))
    likelihoods = [each.log_likelihood for each in score(logits, sequences)]
    figures: dict[str, Any] = {"items": len(items), "truncated": len(truncated)}
    for name in ("accuracy", "accuracy_normalised"):
        right = 0
        for item, first, second in zip(items, likelihoods[0::2], likelihoods[1::2], strict=True):
            lengths = [len(solution) if name != "accuracy" else 1 for solution in item.solutions]
            right += int(second / max(lengths[1], 1) > first / max(lengths[0], 1)) == item.label
        figures[name], figures[f"{name}_standard_error"] = share(right, len(items))
    return figures


def split(encode: Encode, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of both, tokenised as one text and cut where the context alone ends; the continuation keeps
    one at least."""
    whole = encode(context + continuation)
    cut = min(len(encode(context)), len(whole) - 1)
    return whole[:cut], whole[cut:]


# Passkey

BEFORE = "There is a pass key hidden in the following text. Find it and remember it.\n"
NEEDLE = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "\nWhat is the pass key? The pass key is"
ABLE = 0.5  # the least accuracy of the original in a cell that others are asked in


@dataclass(frozen=True)
class PasskeyCell:
    """Prompts of one length in tokens, answer included, with the key at one depth (0: first, 1: last)."""

    length: int
    depth: float
    prompts: Sequence[tuple[list[int], list[int]]]  # (prompt, answer)


def passkey_cells(
    encode: Encode,
    haystack: str,
    lengths: Sequence[int],
    depths: Sequence[float],
    trials: int = 10,
    digits: int = 5,
    seed: int = 0,
    start: Sequence[int] = (),
) -> list[PasskeyCell]:
    """Prompts for every length and depth: each trial has its own number and its own stretch of the haystack.

    Raises:
        UsageError: a length leaves no room for the haystack, or the haystack is shorter than that, or a depth
            is outside 0..1.
    """
    chance, hay = random.Random(seed), encode(haystack)
    before, cells = [*start, *encode(BEFORE)], []
    for length in lengths:
        for depth in depths:
            if not 0 <= depth <= 1:
                raise UsageError(
                    "a passkey depth is out of range", got=depth, expected="0 (first) to 1 (last)"
                )
            prompts = []
            for _ in range(trials):
                key = str(chance.randrange(10 ** (digits - 1), 10**digits))
                question, answer = split(encode, QUESTION, f" {key}")
                needle = encode(NEEDLE.format(key=key))
                room = length - len(before) - len(needle) - len(question) - len(answer)
                if not 0 <= room <= len(hay):
                    raise UsageError(
                        "a passkey prompt cannot be made this long",
                        got=f"{length} tokens",
                        expected=f"{length - room} to {length - room + len(hay)}, by the prompt and the "
                        "haystack's length",
                    )
                at = chance.randrange(len(hay) - room + 1)
                cut = at + round(depth * room)
                prompts.append(([*before, *hay[at:cut], *needle, *hay[cut : at + room], *question], answer))
            cells.append(PasskeyCell(length, depth, prompts))
    return cells


def passkey(
    logits: Logits, cells: Sequence[PasskeyCell], original: dict[str, Any] | None = None
) -> dict[str, Any]:
    """How often greedy decoding writes the key.

    Args:
        original: what this returned for the original model; cells that it could not do are not asked again,
            for they cannot show what was lost.

    Returns:
        `cells`, each with length, depth, trials, correct, accuracy, standard_error; over all cells asked:
        trials, accuracy, standard_error; `not_asked`, the length and depth of cells left out; `skipped`, why
        there is nothing to compare, or None. Without any cell asked the figures are None.
    """
    able = (
        None
        if original is None
        else {(c["length"], c["depth"]) for c in original["cells"] if c["accuracy"] >= ABLE}
    )
    selected = [cell for cell in cells if able is None or (cell.length, cell.depth) in able]
    rows: list[dict[str, Any]] = []
    for cell in selected:
        right = sum(each.greedy for each in score(logits, cell.prompts))
        part, error = share(right, len(cell.prompts))
        row = {"length": cell.length, "depth": cell.depth, "trials": len(cell.prompts), "correct": right}
        rows.append(row | {"accuracy": part, "standard_error": error})
    trials = sum(row["trials"] for row in rows)
    total = share(sum(row["correct"] for row in rows), trials) if trials else (None, None)
    reason = None
    if not any(row["accuracy"] >= ABLE for row in rows) and original is None:
        best = max((row["accuracy"] for row in rows), default=0.0)
        reason = (
            f"the original finds the key in {best:.0%} of the trials at best, below {ABLE:.0%}: "
            "nothing to lose"
        )
    elif original is not None:
        reason = original["skipped"]
    left_out = [{"length": cell.length, "depth": cell.depth} for cell in cells if cell not in selected]
    return {
        "trials": trials,
        "accuracy": total[0],
        "standard_error": total[1],
        "skipped": reason,
        "cells": rows,
        "not_asked": left_out,
    }
