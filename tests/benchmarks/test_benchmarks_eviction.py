"""The eviction benchmark on tiny random llamas: measurements against other computations, rows, resuming,
reports."""

from __future__ import annotations

import importlib
import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from support.tiny_bundles import byte_level_tokenizer

from kvexport.eviction.config import POLICIES, Eviction
from kvexport.model import reference
from kvexport.model.loader import load_decoder

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "examples")]
eviction, measure, table, hidden, measured_text, training = (
    importlib.import_module(name)
    for name in (
        "eviction",
        "eviction_measure",
        "eviction_table",
        "eviction_tasks",
        "quality_measure",
        "train_passkey_model",
    )
)
Measure = Callable[..., dict[str, Any]]
LENGTH, PROMPT = 48, 400


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of three layers and four KV heads with a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("eviction") / "tiny"
    tiny = tiny_checkpoint("llama", vocab_size=320, num_key_value_heads=4, num_hidden_layers=3)
    shutil.copytree(tiny, folder)
    (folder / "tokenizer.json").write_text(byte_level_tokenizer(), encoding="utf-8")
    return folder


@pytest.fixture
def run(checkpoint: Path, tmp_path: Path) -> Measure:
    """`run(*arguments)`: the record of a run on one text and on prompts, few of each."""
    chance = random.Random(0)
    text = tmp_path / "text.txt"
    text.write_text("".join(chance.choices("abcdefgh ", k=400)), encoding="utf-8")

    def measured(
        *arguments: str, length: int = LENGTH, passkey: bool = False, expect: int = 0
    ) -> dict[str, Any]:
        given = [
            str(checkpoint),
            "--length",
            str(length),
            "--windows",
            "3",
            "--trials",
            "1",
            "--recent",
            "4",
            "--first",
            "2",
            "--output",
            str(tmp_path / "out" / "record"),
            *arguments,
        ]
        given += ["--passkey-model", str(checkpoint)] if passkey else ["--text", f"one={text}"]
        if expect:
            with pytest.raises(SystemExit) as stopped:
                eviction.main(given)
            assert stopped.value.code == expect
            return {}
        eviction.main(given)
        return dict(json.loads((tmp_path / "out" / "record.json").read_text(encoding="utf-8")))

    return measured


def _text(decoder: Any, length: int = 24, count: int = 3) -> Any:
    windows = torch.randint(0, 67, (count, length), generator=torch.Generator().manual_seed(0))
    return measured_text.Text(
        windows, measured_text.residual_stream(decoder, windows, measured_text.Progress())
    )


def test_a_budget_of_the_whole_context_loses_nothing_and_a_smaller_one_does(tiny_checkpoint: Any) -> None:
    decoder = load_decoder(tiny_checkpoint("llama"))
    texts = {"one": _text(decoder)}
    whole = measure.language_modelling(decoder, decoder, texts, None)["one"]
    same = measure.language_modelling(decoder, decoder, texts, Eviction("keep-high", 24))["one"]
    less = measure.language_modelling(decoder, decoder, texts, Eviction("keep-high", 6))["one"]
    assert whole["tokens"] == 3 * 11  # of 24 tokens the last 11 are predicted from the second half
    assert abs(whole["increase"]) < 1e-6 and abs(same["increase"]) < 1e-6
    assert less["mean_kl"] > 1e-6 and abs(less["increase"]) > 1e-6
    assert less["increase"] == pytest.approx(sum(less["increases"]) / 3, abs=1e-5)


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("family", ["llama", "mistral", "bloom"])
def test_language_modelling_equals_the_reference_token_by_token(
    family: str, policy: str, tiny_checkpoint: Any
) -> None:
    config = {"sliding_window": 9} if family == "mistral" else {}
    decoder, evicts = load_decoder(tiny_checkpoint(family, **config)), Eviction(policy, 7, 1, 3, (1,))
    windows = torch.randint(0, 67, (3, 24), generator=torch.Generator().manual_seed(0))
    caches = reference.new_cache(decoder.layers, 3, 24, torch.float32, evicts)
    steps = [
        reference.forward(decoder, windows[:, at : at + 1], torch.full((3, 1), at), caches)
        for at in range(24)
    ]
    for first in (2, 12):  # before and after the budget is full
        ours = measure.stepwise(decoder, windows, first, evicts)
        torch.testing.assert_close(ours, torch.cat(steps, 1)[:, first:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("protocol", ["once", "chunked"])
def test_an_answer_is_right_if_greedy_decoding_produces_it(protocol: str, tiny_checkpoint: Any) -> None:
    """Answers that the model itself writes are right, any other token in them is wrong, and other budgets
    write others."""
    decoder = load_decoder(tiny_checkpoint("llama"))
    prompts = torch.randint(0, 67, (8, 30), generator=torch.Generator().manual_seed(1)).tolist()
    whole = [_greedy(decoder, prompt) for prompt in prompts]
    asked = measure.asked_of(decoder, list(zip(prompts, whole, strict=True)))
    depths = [0.0, 1.0] * 4

    def accuracy(policy: Eviction | None) -> float:
        return measure.retrieval(decoder, asked, depths, policy, protocol)["accuracy"]

    assert accuracy(None) == 1
    assert accuracy(Eviction("random", 33)) == 1  # the last token is not read
    assert accuracy(Eviction("random", 5)) < 1
    wrong = [[*answer[:2], (answer[2] + 1) % 67, answer[3]] for answer in whole]
    asked = measure.asked_of(decoder, list(zip(prompts, wrong, strict=True)))
    assert accuracy(Eviction("random", 33)) == 0


def _greedy(decoder: Any, prompt: list[int]) -> list[int]:
    written = list(prompt)
    for _ in range(4):
        written.append(int(reference.forward(decoder, torch.tensor([written]))[0, -1].argmax()))
    return written[len(prompt) :]


def test_once_evicts_after_the_prompt_and_chunked_during_it(tiny_checkpoint: Any) -> None:
    """A window: once, the answer's tokens see the last tokens of the prompt as the whole cache made them."""
    decoder, policy = load_decoder(tiny_checkpoint("llama")), Eviction("window", 8)
    prompt = torch.randint(0, 67, (1, 30), generator=torch.Generator().manual_seed(1))
    (asked,) = measure.asked_of(decoder, [(prompt[0].tolist(), [1, 2])])
    once, chunked = (make(decoder, asked, policy)[0] for make in (measure._once, measure._chunked))
    for ours, layer in zip(once, chunked, strict=True):
        assert (
            sorted(ours.positions[0, 0].tolist())
            == sorted(layer.positions[0, 0].tolist())
            == list(range(22, 30))
        )
    for ours, layer, whole in zip(once[1:], chunked[1:], asked.caches[1:], strict=True):
        kept = whole.key[0, 0, ours.positions[0, 0]]
        assert torch.equal(ours.key[0, 0], kept)
        assert not torch.allclose(layer.key[0, 0], whole.key[0, 0, layer.positions[0, 0]])


def test_prompts_have_the_given_length_and_contain_their_answer(checkpoint: Path) -> None:
    encode = eviction.tasks.encoder(checkpoint)
    for task in hidden.TASKS:
        found = hidden.prompts_of(encode, task, 400, (0.0, 1.0), 3)
        assert [len(prompt) + len(answer) for prompt, answer in found.prompts] == [400] * 6
        for (prompt, answer), depth in zip(found.prompts, found.depths, strict=True):
            places = [at for at in range(len(prompt)) if prompt[at : at + len(answer)] == answer]
            assert places and (places[0] < 160 if depth == 0 else places[-1] > 160)
    assert len({tuple(answer) for _, answer in found.prompts}) == 6
    with pytest.raises(hidden.UsageError, match="this long"):
        hidden.prompts_of(encode, "needle", 40, (0.5,), 1)


def test_rows_record_their_cache_and_impossible_rows_are_left_out(run: Measure, tmp_path: Path) -> None:
    record = run("--shares", "0.5", "0.1", "--only", "lm*")
    rows, left_out = record["rows"], record["left_out"]
    assert len(rows) + len(left_out) == 34
    assert rows["lm window first 0.5"]["held"] == 0.5
    assert rows["lm window first 0.5"]["eviction"] == Eviction("window", 24, 2).to_json()
    assert rows["lm l2-norm half-first-skip 0.5"]["held"] == pytest.approx((2 + 0.5) / 3)
    assert "must leave a token that can be evicted" in left_out["lm l2-norm recent-first 0.1"]
    report = (tmp_path / "out" / "record.md").read_text(encoding="utf-8")
    assert all(
        name in report
        for name in ("Where each policy wins", "One setting for everything", "Left out", "half-first-skip")
    )
    ElementTree.fromstring((tmp_path / "out" / "record.svg").read_text(encoding="utf-8"))
    assert str(tmp_path) not in json.dumps(record) + report


def test_resuming_measures_the_rest_and_rejects_other_settings(run: Measure) -> None:
    first = run("--only", "lm window first 0.5")
    again = run("--only", "lm window *0.5", "--resume")
    assert set(first["rows"]) == {"lm window first 0.5"}
    assert set(again["rows"]) == {f"lm window {name} 0.5" for name in ("bare", "first", "first-skip")}
    assert again["rows"]["lm window first 0.5"] == first["rows"]["lm window first 0.5"]
    run("--only", "lm window *0.5", "--resume", "--first", "3", expect=2)


def test_retrieval_rows_and_fewer_heads(run: Measure, tmp_path: Path) -> None:
    only = [
        "passkey once window first*",
        "needle chunked l2-norm half-first 0.5",
        "passkey heads 1/2*",
        "passkey heads 1 *",
    ]
    record = run("--kept", "0.5", "--compare-converted", "1/2", "--only", *only, length=PROMPT, passkey=True)
    rows = record["rows"]
    assert rows["needle chunked l2-norm half-first 0.5"]["trials"] == 5
    assert rows["passkey heads 1/2 full"]["held"] == pytest.approx(0.5, abs=0.02)
    assert rows["passkey heads 1 window first 0.5"]["held"] == 0.5
    assert record["full"]["passkey"]["held"] == 1
    assert "at equal bytes" in (tmp_path / "out" / "record.md").read_text(encoding="utf-8")


def test_rejects_a_run_without_anything_to_measure(checkpoint: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        eviction.main([str(checkpoint)])
    assert stopped.value.code == 2


def _row(policy: str, increases: list[float], protection: str = "bare") -> dict[str, Any]:
    figures = {"increase": sum(increases) / len(increases), "increases": increases}
    return {
        "kind": "lm",
        "heads": "1",
        "policy": policy,
        "protection": protection,
        "share": 0.5,
        "texts": {"one": figures},
    }


def test_a_win_must_exceed_the_standard_error() -> None:
    record = {"settings": {"texts": {"one": {}}}}
    clear = [
        _row("window", [0.1, 0.2, 0.3]),
        _row("l2-norm", [0.21, 0.29, 0.4]),
        _row("l2-norm", [0.5, 0.5, 0.5], "recent"),
    ]
    (found,) = table.winners(record, clear)
    assert [each["policy"] for each in found["ranked"]] == ["window", "l2-norm"]
    assert found["ranked"][1]["protection"] == "bare"  # the one that serves it best
    assert found["clear"] and found["gap"] == pytest.approx(0.1)
    (found,) = table.winners(record, [_row("window", [0.1, 0.2, 0.3]), _row("l2-norm", [0.5, 0.0, 0.2])])
    assert not found["clear"]
    assert not table.winners(
        record, [_row("window", [0.1]), _row("l2-norm", [0.0], "half-first-skip")]
    )  # other bytes


def test_a_mean_is_over_all_tasks_or_none() -> None:
    """Two policies, of which one was asked one task of two; a setting that was measured twice counts once."""
    asked = [
        ("window", "passkey", 0.4),
        ("window", "needle", 0.6),
        ("random", "passkey", 0.8),
        ("random", "passkey", 0.8),
    ]
    rows = [
        {
            "kind": "retrieval",
            "policy": policy,
            "protection": "bare",
            "share": 0.5,
            "task": task,
            "protocol": "once",
            "accuracy": right,
        }
        for policy, task, right in asked
    ]
    grid = table._defaults(table._once_each(rows))[-1].splitlines()
    assert grid[2:] == ["| window | bare | 50% |", "| random | bare |  |"]


def test_training_windows_contain_what_they_ask_for() -> None:
    tokenizer = training.train_tokenizer(0)
    windows = training.Windows(
        lambda text: tokenizer.encode(text, add_special_tokens=False), len(tokenizer), 0
    )
    for _ in range(20):
        ids, answers = windows.window(192)
        assert len(ids) == len(answers) == 192
        starts = [at for at in range(1, 192) if answers[at] and not answers[at - 1]]
        assert starts
        for start in starts:
            stop = next((at for at in range(start, 192) if not answers[at]), 192)
            answer = ids[start:stop]
            assert any(ids[at : at + len(answer)] == answer for at in range(start - len(answer)))
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode(" 12345")) == ["Ġ", "12", "34", "5"]


def test_insufficient_training_writes_nothing_and_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        training,
        "SHAPE",
        {**training.SHAPE, "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16},
    )
    monkeypatch.setattr(training, "TOKENS_PER_STEP", 192)
    monkeypatch.setattr(training, "TRIALS", 1)
    monkeypatch.setattr(sys, "argv", ["train", "--output", str(tmp_path / "model"), "--steps", "2"])
    with pytest.raises(SystemExit) as stopped:
        training.main()
    assert stopped.value.code == 1
    assert not (tmp_path / "model").exists()
