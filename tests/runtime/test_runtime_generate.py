"""Generation is deterministic and independent of the batch, gives its stop reason, and streams text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.tiny_bundles import byte_level_tokenizer, decoder_with_fewer_heads, exact_logits, write_bundle

from kvexport.errors import UsageError
from kvexport.model.decoder import Decoder
from kvexport.runtime import Generation, Session, open_bundle
from kvexport.runtime.tokenizer import read_tokenizer

Opened = Callable[..., Session]


@pytest.fixture
def text_session(text_bundle: Path) -> Session:
    return open_bundle(text_bundle, threads=1)


def test_greedy_generation_equals_the_reference(opened: Opened, decoder: Decoder) -> None:
    prompt = [5, 9, 33]
    made = opened().generate(prompt, max_new_tokens=20, stop=())
    assert len(made.token_ids) == 20 and made.finish_reason == "length" and made.prompt_tokens == 3
    likeliest = exact_logits(decoder, [*prompt, *made.token_ids]).argmax(1)
    assert made.token_ids == tuple(likeliest[2:-1])
    assert opened().generate(prompt, max_new_tokens=20, stop=()) == made


def test_batch_equals_single_prompts(opened: Opened) -> None:
    prompts = [[1], [5, 9, 33], list(range(40))]
    for options in ({}, {"temperature": 0.9, "seed": 3}):
        together = opened().generate(prompts, max_new_tokens=12, stop=(), **options)
        assert isinstance(together, list) and len(together) == 3
        assert together[0] == opened().generate(prompts[0], max_new_tokens=12, stop=(), **options)
        if not options:
            assert together[1:] == [
                opened().generate(each, max_new_tokens=12, stop=()) for each in prompts[1:]
            ]


def test_same_prompt_twice_draws_differently(opened: Opened) -> None:
    one, other = opened().generate([[1, 2], [1, 2]], max_new_tokens=20, temperature=1.0, seed=0, stop=())
    assert one.token_ids != other.token_ids


def test_seed_repeats_and_no_seed_does_not(opened: Opened) -> None:
    def drawn(**options: object) -> tuple[int, ...]:
        made: Generation = opened().generate([1, 2], max_new_tokens=20, temperature=1.5, stop=(), **options)
        return made.token_ids

    assert drawn(seed=7) == drawn(seed=7) != drawn(seed=8)
    assert drawn() != drawn()


def test_top_1_is_greedy(opened: Opened) -> None:
    greedy = opened().generate([1, 2], max_new_tokens=20, stop=())
    assert opened().generate([1, 2], max_new_tokens=20, stop=(), temperature=2.0, top_k=1) == greedy
    assert opened().generate([1, 2], max_new_tokens=20, stop=(), temperature=2.0, top_p=1e-9) == greedy


@pytest.mark.parametrize("option", [{"top_k": 20}, {"top_p": 0.9}], ids=str)
def test_top_k_and_top_p_imply_temperature_1(opened: Opened, option: dict[str, float]) -> None:
    made = opened().generate([1, 2], max_new_tokens=20, seed=3, stop=(), **option)
    assert made == opened().generate([1, 2], max_new_tokens=20, seed=3, stop=(), temperature=1.0, **option)
    greedy = opened().generate([1, 2], max_new_tokens=20, stop=())
    assert made != greedy == opened().generate([1, 2], max_new_tokens=20, stop=(), temperature=0.0, **option)


def test_stop_token_ends_one_sequence_of_a_batch(opened: Opened) -> None:
    prompts = [[5, 9, 33], [1]]
    free = opened().generate(prompts, max_new_tokens=20, stop=())
    end = free[0].token_ids[6]
    first = free[0].token_ids.index(end)
    stopped = opened().generate(prompts, max_new_tokens=20, stop=[end])
    assert stopped[0].token_ids == free[0].token_ids[:first] and stopped[0].finish_reason == "stop"
    assert end in free[1].token_ids or stopped[1] == free[1]


def test_models_own_stop_tokens_are_the_default(decoder: Decoder, opened: Opened, tmp_path: Path) -> None:
    end = opened().generate([5, 9, 33], max_new_tokens=9, stop=()).token_ids[-1]
    bundle = write_bundle(
        tmp_path / "ends", decoder, change=lambda manifest: manifest["model"].update(eos_token_ids=[66, end])
    )
    made = open_bundle(bundle, threads=1).generate([5, 9, 33], max_new_tokens=9)
    assert made.finish_reason == "stop" and end not in made.token_ids


def test_generation_ends_when_the_cache_is_full(opened: Opened) -> None:
    """The last token is chosen with a full cache, while a shorter sequence continues."""
    full, short = opened().generate([[1] * 598, [2]], max_new_tokens=10, stop=())
    assert (len(full.token_ids), full.finish_reason) == (3, "capacity")
    assert (len(short.token_ids), short.finish_reason) == (10, "length")
    assert short == opened().generate([2], max_new_tokens=10, stop=())
    just = opened().generate([1] * 598, max_new_tokens=3, stop=())
    assert just.token_ids == full.token_ids and just.finish_reason == "length"
    assert len(opened().generate([1] * 600, stop=()).token_ids) == 1


def test_runs_no_step_after_the_last_token(opened: Opened) -> None:
    session = opened()
    session.generate([1, 2, 3], max_new_tokens=4, stop=())
    assert session.lengths.tolist() == [6]


def test_streamed_text_is_the_generated_text(text_session: Session) -> None:
    cut = 0
    for seed in range(8):
        options = {"max_new_tokens": 40, "temperature": 1.0, "seed": seed, "stop": ()}
        stream = text_session.stream("Once upon", **options)
        assert stream.generation is None
        pieces = list(stream)
        made = text_session.generate("Once upon", **options)
        assert stream.generation == made and made.text == "".join(pieces)
        assert len(made.token_ids) == 40
        assert all(pieces)
        cut += len(pieces) < 40
        assert stream.timing.prefill_tokens == made.prompt_tokens and stream.timing.decode_tokens == 39
    assert cut  # some tokens were held back until their character was whole


def test_text_follows_the_prompt(text_session: Session) -> None:
    made = text_session.generate(
        ["Once upon", "naïve 日本"], max_new_tokens=12, temperature=0.7, seed=2, stop=()
    )
    for prompt, each in zip(("Once upon", "naïve 日本"), made, strict=True):
        ids = read_tokenizer(text_session.bundle.path).encode(prompt)
        assert prompt + str(each.text) == read_tokenizer(text_session.bundle.path).decode(
            [*ids, *each.token_ids]
        )


def test_bundle_without_tokenizer_takes_token_ids_only(opened: Opened) -> None:
    session = opened()
    assert session.generate([1, 2], max_new_tokens=2, stop=()).text is None
    for call in (session.generate, session.stream):
        with pytest.raises(UsageError, match="must have a tokenizer"):
            call("text")
    with pytest.raises(UsageError, match="must have a tokenizer"):
        session.stream([1, 2])


def test_empty_text_is_the_bos_token(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    decoder = decoder_with_fewer_heads(
        tiny_checkpoint("llama", num_key_value_heads=4, vocab_size=320, bos_token_id=7)
    )
    session = open_bundle(
        write_bundle(tmp_path / "bos", decoder, tokenizer=byte_level_tokenizer()), threads=1
    )
    made = session.generate("", max_new_tokens=5)
    assert made.token_ids == session.generate([7], max_new_tokens=5).token_ids and made.prompt_tokens == 1


def test_rejects_empty_and_invalid_prompts(text_session: Session) -> None:
    for prompt in ("", [], [[]], ["a", ""]):
        with pytest.raises(UsageError, match="empty"):
            text_session.generate(prompt)
    with pytest.raises(UsageError, match="must be valid Unicode"):
        text_session.generate("\udcff")


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"seed": -1},
    ],
    ids=str,
)
def test_rejects_options_out_of_range(opened: Opened, options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=" must be "):
        opened().generate([1], **options)


def test_numpy_prompts(opened: Opened) -> None:
    expected = opened().generate([1, 2], max_new_tokens=3)
    assert opened().generate(np.array([1, 2]), max_new_tokens=3) == expected
    assert opened().generate(np.array([[1, 2]]), max_new_tokens=3) == [expected]
