"""C++ and Python give bitwise equal logits, since both run the same graph on the same ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bundles import CAPACITY, EVICTING, NAMES, VOCAB
from drive import Drive, Refused, data_of

from kvexport.runtime import Session, open_bundle

pytestmark = pytest.mark.slow
Built = Callable[[str], Path]
EVICTS = {*EVICTING, "gqa-float16-evicting"}


def tokens(count: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, VOCAB, count)]


def opened(bundle: Path, **options: object) -> Session:
    return open_bundle(bundle, provider="cpu", threads=1, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_bitwise_equal_after_every_token(name: str, drive: Drive, bundles: Path) -> None:
    """Prompts and single steps in turn, while the cache grows and far beyond the eviction budget."""
    drive.open(bundles / name)
    drive.new()
    with opened(bundles / name) as session:
        cache = session.new_cache()
        for turn, count in enumerate((1, 150, 1, 7, 200, 129)):
            prompt, steps = tokens(count, turn), tokens(9, 100 + turn)
            assert (drive.prefill(prompt) == session.prefill(prompt, cache=cache)[0]).all(), (name, turn)
            for at, token in enumerate(steps):
                assert (drive.step(token) == session.step([token], cache=cache)[0]).all(), (name, turn, at)
        assert drive("cache", cache="c")["length"] == cache.lengths[0] == 542


@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_any_chunk_size_gives_equal_logits(chunk: int, drive: Drive, bundles: Path) -> None:
    for name in ("gqa", "gqa-keep-high", "window"):
        drive.open(bundles / name, chunk=chunk)
        drive.new()
        with opened(bundles / name, chunk=chunk) as session:
            assert (drive.prefill(tokens(300)) == session.prefill(tokens(300))[0]).all()


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_are_equal(name: str, drive: Drive, bundles: Path) -> None:
    drive.open(bundles / name)
    drive.new()
    with opened(bundles / name) as session:
        made = session.generate(tokens(40), max_new_tokens=200, stop=[])
    result = drive.generate(tokens(40), max_new_tokens=200, stop_tokens=[])
    assert result["tokens"] == list(made.token_ids) and result["finish"] == made.finish_reason == "length"
    assert len(result["tokens"]) == 200


@pytest.mark.parametrize("name", ["gqa", "gqa-l2-norm"])
def test_a_generation_continues_where_it_ended(name: str, drive: Drive, bundles: Path) -> None:
    """The next call, whichever it is, runs the pending token first."""
    drive.open(bundles / name)
    with opened(bundles / name) as session:
        for follow in ("generate", "nothing new", "prefill", "step"):
            cache = session.new_cache()
            drive.new()
            first = session.generate(tokens(30), max_new_tokens=20, stop=[], cache=cache)
            assert drive.generate(tokens(30), max_new_tokens=20, stop_tokens=[])["tokens"] == list(
                first.token_ids
            )
            assert drive("cache", cache="c")["length"] == cache.lengths[0] == 49
            if follow == "prefill":
                assert (drive.prefill(tokens(5, 1)) == session.prefill(tokens(5, 1), cache=cache)[0]).all()
            elif follow == "step":
                assert (drive.step(3) == session.step([3], cache=cache)[0]).all()
            else:
                more = tokens(6, 2) if follow == "generate" else []
                second = session.generate(more, max_new_tokens=20, stop=[], cache=cache)
                assert drive.generate(more, max_new_tokens=20, stop_tokens=[])["tokens"] == list(
                    second.token_ids
                )
            assert drive("cache", cache="c")["length"] == cache.lengths[0]


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_prompt_runs_the_last_token_again(name: str, drive: Drive, bundles: Path) -> None:
    """In its own place: in the first growth step, at the budget, beyond it, and in a full cache."""
    drive.open(bundles / name)
    with opened(bundles / name) as session:
        for count in (1, 20, 24, 25, 300, CAPACITY):
            cache = session.new_cache()
            drive.new()
            for prompt in (tokens(count), [], []):
                assert (drive.prefill(prompt) == session.prefill([prompt], cache=cache)[0]).all(), (
                    name,
                    count,
                )
            assert drive("cache", cache="c")["length"] == cache.lengths[0] == count
            made = session.generate([], max_new_tokens=5, stop=[], cache=cache)
            assert drive.generate([], max_new_tokens=5, stop_tokens=[])["tokens"] == list(made.token_ids)
            assert drive("cache", cache="c")["length"] == cache.lengths[0]


@pytest.mark.parametrize("name", ["gqa", "gqa-l2-norm"])
def test_saves_and_loads_a_full_cache_with_a_pending_token(
    name: str, drive: Drive, bundles: Path, tmp_path: Path
) -> None:
    drive.open(bundles / name)
    drive.new()
    assert drive.generate(tokens(CAPACITY - 3), max_new_tokens=60, stop_tokens=[])["finish"] == "capacity"
    drive("save", cache="c", file=str(tmp_path / "full"))
    assert drive("load", session="s", cache="d", file=str(tmp_path / "full"))["length"] == CAPACITY
    drive("save", cache="d", file=str(tmp_path / "again"))
    assert (tmp_path / "again").read_bytes() == (tmp_path / "full").read_bytes()
    with pytest.raises(Refused, match="must fit"):
        drive.generate([], cache="d")
    with opened(bundles / name) as session:
        assert session.load(tmp_path / "full").lengths[0] == CAPACITY


def test_stop_tokens_and_finish_reasons_are_equal(drive: Drive, bundles: Path) -> None:
    drive.open(bundles / "gqa")
    with opened(bundles / "gqa") as session:
        made = session.generate(tokens(40), max_new_tokens=60, stop=[])
        stop = made.token_ids[30]
        stopped = session.generate(tokens(40), max_new_tokens=60, stop=[stop])
        own = session.generate(tokens(40), max_new_tokens=500)
        full = session.generate(tokens(CAPACITY - 3), max_new_tokens=60, stop=[])
    for prompt, options, wanted in (
        (tokens(40), {"max_new_tokens": 60, "stop_tokens": [stop]}, stopped),
        (tokens(40), {"max_new_tokens": 500}, own),
        (tokens(CAPACITY - 3), {"max_new_tokens": 60, "stop_tokens": []}, full),
    ):
        drive.new()
        result = drive.generate(prompt, **options)
        assert (result["tokens"], result["finish"]) == (list(wanted.token_ids), wanted.finish_reason)
    assert stopped.finish_reason == "stop" and full.finish_reason == "capacity" and len(full.token_ids) == 4
    drive.new()
    result = drive.generate(tokens(40), max_new_tokens=60, stop_tokens=[], patience=7)
    assert result["tokens"] == list(made.token_ids[:7]) and result["finish"] == "callback"
    assert drive.generate([], max_new_tokens=3, stop_tokens=[])["tokens"] == list(made.token_ids[7:10])


def test_samples_are_repeatable_and_among_the_most_likely(drive: Drive, bundles: Path) -> None:
    drive.open(bundles / "gqa")

    def drawn(**options: object) -> list[int]:
        drive.new()
        made: list[int] = drive.generate(tokens(20), max_new_tokens=30, stop_tokens=[], **options)["tokens"]
        return made

    greedy = drawn()
    assert drawn(temperature=0) == drawn(top_k=1) == drawn(top_p=1e-9) == greedy
    assert drawn(top_k=5, seed=3) == drawn(temperature=1, top_k=5, seed=3) != drawn(top_k=5, seed=4)
    assert drawn(temperature=1.5) != drawn(temperature=1.5)  # equal with negligible probability
    assert drawn(temperature=1e-3, seed=1) == greedy
    drive.new()
    first = drive.prefill(tokens(20))
    likeliest = set(np.argsort(-first)[:5].tolist())
    for seed in range(20):
        drive.new()
        assert (
            drive.generate(tokens(20), max_new_tokens=1, stop_tokens=[], top_k=5, seed=seed)["tokens"][0]
            in likeliest
        )


@pytest.mark.parametrize("name", NAMES)
def test_caches_are_exchanged_between_cpp_and_python(
    name: str, drive: Drive, bundles: Path, tmp_path: Path
) -> None:
    """The files are equal except for the order of JSON keys, and the following logits are bitwise equal."""
    drive.open(bundles / name)
    with opened(bundles / name) as session:
        for count in (0, 1, 20, 300):
            cache = session.new_cache()
            drive.new()
            if count:
                session.generate(tokens(count), max_new_tokens=3, stop=[], cache=cache)
                drive.generate(tokens(count), max_new_tokens=3, stop_tokens=[])
            cache.save(tmp_path / "by_python")
            drive("save", cache="c", file=str(tmp_path / "by_cpp"))
            by_cpp = session.load(tmp_path / "by_cpp")
            drive("load", session="s", cache="d", file=str(tmp_path / "by_python"), capacity=count + 40)
            assert data_of(tmp_path / "by_cpp") == data_of(tmp_path / "by_python")
            wanted = session.prefill(tokens(30, 5), cache=cache)[0]
            assert (session.prefill(tokens(30, 5), cache=by_cpp)[0] == wanted).all()
            assert (drive.prefill(tokens(30, 5), cache="d") == wanted).all()
            for token in tokens(5, 6):
                wanted = session.step([token], cache=cache)[0]
                assert (drive.step(token, cache="d") == wanted).all()


@pytest.mark.parametrize("name", ["gqa", "gqa-l2-norm", "gqa-mixed"])
def test_a_cleared_cache_equals_a_new_one(name: str, drive: Drive, bundles: Path) -> None:
    drive.open(bundles / name)
    size = drive.new()["bytes"]
    drive.prefill(tokens(500))
    drive("clear", cache="c")
    with opened(bundles / name) as session:
        assert (drive.prefill(tokens(270, 1)) == session.prefill(tokens(270, 1))[0]).all()
        assert (drive.step(5) == session.step([5])[0]).all()
        assert drive("cache", cache="c") == {"length": 271, "capacity": CAPACITY, "bytes": size}
        assert (
            session.memory().bytes_limit <= size < session.memory().bytes_limit + 256 * 6
        )  # buffers are aligned to 256 bytes
