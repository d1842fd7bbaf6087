"""Several threads on one session: calls are serialized, and interleaved conversations are an error."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvexport.errors import UsageError
from kvexport.runtime import Session, open_bundle
from kvexport.runtime.backends.ort import OrtDecoder
from kvexport.runtime.lock import SessionLock

PROMPTS = [[5, 9, 33], [1], list(range(40)), [66, 2]]
Opened = Callable[..., Session]


def together(*calls: Callable[[], Any]) -> list[Any]:
    """Results of calls that are started at the same time, each in its own thread."""
    begin = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Any:
        begin.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(run, call) for call in calls]]


def test_concurrent_generations_run_one_after_another(opened: Opened) -> None:
    session = opened()
    alone = [session.generate(prompt, max_new_tokens=15, stop=[]) for prompt in PROMPTS]
    for _ in range(3):
        actual = together(
            *(lambda p=prompt: session.generate(p, max_new_tokens=15, stop=[]) for prompt in PROMPTS)
        )  # type: ignore[misc]
        assert actual == alone


def test_conversations_in_threads_do_not_affect_each_other(text_bundle: Path) -> None:
    """Streams release the session between their pieces; steps and prompts continue their own cache."""
    session = open_bundle(text_bundle, threads=1)
    texts = ["Once upon", "naïve 日本", "a café"]
    alone = [session.generate(text, max_new_tokens=30, stop=[]).text for text in texts]

    def talk(text: str) -> Callable[[], str]:
        return lambda: "".join(session.stream(text, max_new_tokens=30, stop=[], cache=session.new_cache()))

    def step() -> list[Any]:
        cache = session.new_cache()
        return [session.step([token], cache=cache)[0].argmax() for token in range(30)]

    expected = step()
    for _ in range(3):
        *message, stepped = together(*map(talk, texts), step)
        assert message == alone and stepped == expected


def test_detects_a_missing_lock(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: without the lock two calls are in the decoder at once."""
    inside, most = [0], [0]
    real = OrtDecoder.run

    def run(self: OrtDecoder, *arguments: Any, **options: Any) -> Any:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        threading.Event().wait(0.01)
        try:
            return real(self, *arguments, **options)
        finally:
            inside[0] -= 1

    monkeypatch.setattr(OrtDecoder, "run", run)
    session = opened()
    caches = [session.new_cache() for _ in range(2)]
    calls = [lambda c=cache: [session.step([1], cache=c) for _ in range(5)] for cache in caches]  # type: ignore[misc]
    together(*calls)
    assert most[0] == 1
    monkeypatch.setattr(SessionLock, "__enter__", lambda self: None)
    monkeypatch.setattr(SessionLock, "__exit__", lambda self, *arguments: None)
    together(*calls)
    assert most[0] == 2


@pytest.mark.parametrize("with_cache", [True, False])
def test_stream_rejects_sequences_that_another_call_changed(text_bundle: Path, with_cache: bool) -> None:
    session = open_bundle(text_bundle, threads=1)
    cache = session.new_cache() if with_cache else None
    for come_between in (
        lambda: session.prefill("abc", cache=cache),
        lambda: session.generate("abc", max_new_tokens=2, cache=cache),
        lambda: session.step([1], cache=cache),
        lambda: cache.clear() if cache is not None else session.reset(),
    ):
        stream = session.stream("Once upon", max_new_tokens=30, stop=[], cache=cache)
        next(stream)
        come_between()
        with pytest.raises(
            UsageError, match=r"must not be changed by another call[\s\S]*session\.new_cache\(\)"
        ):
            list(stream)
    stream = session.stream("Once upon", max_new_tokens=30, stop=[])
    next(stream)
    other = session.new_cache()
    session.generate("abc", max_new_tokens=5, cache=other)
    assert "".join(stream)  # another cache is nobody else's business


def test_continues_after_an_abandoned_stream(text_bundle: Path) -> None:
    session = open_bundle(text_bundle, threads=1)
    whole = session.generate("Once upon", max_new_tokens=20, stop=[])
    cache = session.new_cache()
    stream = session.stream("Once upon", max_new_tokens=20, stop=[], cache=cache)
    next(stream)
    done = stream._loop.tokens[0].copy()
    del stream
    rest = session.generate("", max_new_tokens=20 - len(done), stop=[], cache=cache)
    assert (*done, *rest.token_ids) == whole.token_ids


def test_close_waits_for_the_running_call(text_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session, inside, leave = open_bundle(text_bundle, threads=1), threading.Event(), threading.Event()
    real = OrtDecoder.run

    def run(self: OrtDecoder, *arguments: Any, **options: Any) -> Any:
        inside.set()
        leave.wait(10)
        return real(self, *arguments, **options)

    monkeypatch.setattr(OrtDecoder, "run", run)
    with ThreadPoolExecutor(2) as pool:
        going_on = pool.submit(session.prefill, [1, 2])
        assert inside.wait(10)
        closing = pool.submit(session.close)
        assert not closing.done()
        leave.set()
        assert np.isfinite(going_on.result()).all()
        closing.result()
    with pytest.raises(UsageError, match="closed"):
        session.step([1])


def test_stream_of_a_closed_session_is_an_error(text_bundle: Path) -> None:
    session = open_bundle(text_bundle, threads=1)
    stream = session.stream("Once upon", max_new_tokens=30, stop=[])
    next(stream)
    session.close()
    with pytest.raises(UsageError, match="closed"):
        list(stream)
