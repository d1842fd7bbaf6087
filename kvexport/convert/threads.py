"""Threads of PyTorch for matrices of a few hundred rows.

An operation on such a matrix takes longer on several threads than on one: each of its many steps waits for
all of them, and for milliseconds if another program uses one of the processors. So each problem runs on one
thread, and several problems run at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

_pool: ContextVar[ThreadPoolExecutor | None] = ContextVar("pool", default=None)


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Run PyTorch on one thread until the block ends, and `map_on_threads` on as many as it had before."""
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        torch.set_num_threads(1)
        token = _pool.set(pool)
        try:
            yield
        finally:
            _pool.reset(token)
            torch.set_num_threads(threads)


def map_on_threads(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """The results of a function for all items, several at a time within `one_thread_each`."""
    pool = _pool.get()
    return [function(item) for item in items] if pool is None else list(pool.map(function, items))
