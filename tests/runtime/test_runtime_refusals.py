"""Invalid arguments are rejected with a message before anything is run."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvexport
from kvexport.errors import CannotRunHere, UsageError
from kvexport.runtime import Session, open_bundle

Opened = Callable[..., Session]


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([-1], {}, "inside the vocabulary"),
        ([1 << 33], {}, "inside the vocabulary"),
        ([1.5], {}, "must be integers"),
        (None, {}, "must be text, token ids"),
        ([1], {"stop": [None]}, "stop must be a list"),
        ([1], {"stop": 5}, "stop must be a list"),
        ([1], {"stop": b"x"}, "stop must be a list"),
        ([1], {"stop": [b"x"]}, "stop must be a list"),
        ([1], {"stop": [5.5]}, "stop must be a list"),
        ([1], {"stop": [True]}, "stop must be a list"),
        ([1], {"stop": [-1]}, "stop must be a list"),
        ([1], {"stop": [67]}, "stop must be a list"),
        ([1], {"max_new_tokens": 1.5}, "max_new_tokens must be at least 1"),
        ([1], {"top_k": 1.5}, "top_k must be an integer"),
        ([1], {"seed": 1.5}, "seed must be an integer"),
    ],
)
def test_rejects_invalid_prompts_and_options(
    opened: Opened, prompt: Any, options: dict[str, Any], message: str
) -> None:
    session = opened()
    cache = session.new_cache()
    with pytest.raises(UsageError, match=message):
        session.generate(prompt, cache=cache, **options)
    assert not cache.lengths.any()
    session.generate(
        [1], max_new_tokens=np.int64(2), stop=[np.int64(5)], cache=cache
    )  # numpy's numbers are numbers
    assert cache.lengths.tolist() == [2]


def test_streams_reject_the_same(text_bundle: Path) -> None:
    session = open_bundle(text_bundle, threads=1)
    for prompt in ([-1], ["a", "b"], None):
        with pytest.raises(UsageError):
            list(session.stream(prompt))  # type: ignore[arg-type]


@pytest.mark.parametrize("prompts", [[[1], [2]], [[1], [2], [3]]])
def test_rejects_another_number_of_prompts_than_sequences(opened: Opened, prompts: list[list[int]]) -> None:
    session = opened()
    with pytest.raises(UsageError, match="one prompt for each sequence"):
        session.generate(prompts, cache=session.new_cache(1))


def test_rejects_more_sequences_than_memory_holds(opened: Opened) -> None:
    with pytest.raises(CannotRunHere, match="not enough memory"):
        opened().new_cache(1 << 40)


@pytest.mark.parametrize("threads", [0, 1025, 1_000_000])
def test_rejects_too_many_threads(tiny_bundle: Path, threads: int) -> None:
    with pytest.raises(UsageError, match="threads must be from 1 to 1024"):
        open_bundle(tiny_bundle, threads=threads)


def test_rejects_saved_caches_that_are_not_files(opened: Opened, tmp_path: Path) -> None:
    session = opened()
    cache = session.new_cache()
    session.prefill([1, 2], cache=cache)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="a device or a pipe"):
        cache.save(tmp_path / "pipe")
    for name in ("pipe", "none", "n" * 300, "a\0b", "."):
        with pytest.raises(UsageError, match="must be an existing file"):
            session.load(tmp_path / name)
    (tmp_path / "link").symlink_to(tmp_path / "target")
    cache.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and session.load(tmp_path / "target").lengths.tolist() == [2]


def test_rejects_the_path_of_a_manifest(tiny_bundle: Path) -> None:
    with pytest.raises(UsageError, match="name its folder"):
        kvexport.self_test(tiny_bundle / "manifest.json")
