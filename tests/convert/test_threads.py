"""Problems of small matrices run side by side, each on one thread of PyTorch."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from kvexport.convert.threads import map_on_threads, one_thread_each


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)


def test_each_problem_has_one_thread_and_the_number_is_restored() -> None:
    with one_thread_each():
        assert torch.get_num_threads() == 1
        assert set(map_on_threads(lambda _: torch.get_num_threads(), range(9))) == {1}
    assert torch.get_num_threads() == 3


def test_the_number_is_restored_after_an_error() -> None:
    def fail(item: int) -> int:
        raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match="item 0"), one_thread_each():
        map_on_threads(fail, range(2))
    assert torch.get_num_threads() == 3


def test_as_many_problems_as_threads_run_at_a_time() -> None:
    """The barrier opens only if three run at once."""
    barrier = threading.Barrier(3, timeout=60)

    def wait(item: int) -> int:
        barrier.wait()
        return 10 * item

    with one_thread_each():
        assert map_on_threads(wait, range(6)) == [0, 10, 20, 30, 40, 50]  # in the order of the items


def test_outside_the_block_problems_run_one_after_another() -> None:
    own = threading.get_ident()
    assert set(map_on_threads(lambda _: threading.get_ident(), range(4))) == {own}
    with one_thread_each():
        assert own not in map_on_threads(lambda _: threading.get_ident(), range(4))
