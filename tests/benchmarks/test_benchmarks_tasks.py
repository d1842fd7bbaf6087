"""The task measures on models with known answers: a unigram model, one that copies and one that forgets."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.decoders import make_decoder
from torch import Tensor

from kvexport.errors import UsageError
from kvexport.model import reference

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
tasks = importlib.import_module("tasks")

VOCAB = 128


def encode(text: str) -> list[int]:
    """One token a character."""
    return [ord(character) for character in text]


def unigram(**counts: float) -> Callable[[Tensor], Tensor]:
    """Every token is as likely everywhere: `counts` for some, 1 for all others."""
    weights = torch.ones(VOCAB, dtype=torch.float64)
    for character, count in counts.items():
        weights[ord(character)] = count
    return lambda tokens: weights.log().expand(*tokens.shape, VOCAB)


def copying(sees: int | None = None) -> Callable[[Tensor], Tensor]:
    """Predicts what followed the longest earlier match of the last tokens, looking back `sees` tokens at
    most."""

    def next_token(seen: list[int]) -> int:
        best, length = 0, 0
        for at in range(1 if sees is None else max(1, len(seen) - sees), len(seen)):
            match = 0
            while match < at and match < 20 and seen[at - 1 - match] == seen[-1 - match]:
                match += 1
            if match > length:
                best, length = seen[at], match
        return best

    def logits(tokens: Tensor) -> Tensor:
        rows = [[next_token(row[: at + 1]) for at in range(len(row))] for row in tokens.tolist()]
        return 20 * torch.nn.functional.one_hot(torch.tensor(rows), VOCAB).double()

    return logits


def items(*pairs: tuple[str, str, int]) -> list[Any]:
    return [tasks.PiqaItem("do it", (first, second), label) for first, second, label in pairs]


# Scores


def test_the_score_of_a_continuation_equals_the_reference() -> None:
    decoder = make_decoder(vocab=VOCAB)
    sequences = [([3, 4, 5], [6, 7]), ([9], [1, 2, 3, 4]), ([1] * 30, [8])]
    found = tasks.score(lambda tokens: reference.forward(decoder, tokens), sequences)
    for (context, rest), scored in zip(sequences, found, strict=True):
        tokens = torch.tensor([context + rest])
        likely = reference.forward(decoder, tokens)[0].log_softmax(-1)
        expected = sum(float(likely[len(context) - 1 + at, token]) for at, token in enumerate(rest))
        assert scored.log_likelihood == pytest.approx(expected, abs=1e-9)


def test_greedy_equals_decoding_token_by_token() -> None:
    decoder = make_decoder(vocab=VOCAB, seed=1)
    written = [5]
    for _ in range(6):
        written.append(int(reference.forward(decoder, torch.tensor([written]))[0, -1].argmax()))
    other = [*written[:-1], (written[-1] + 1) % VOCAB]
    found = tasks.score(
        lambda tokens: reference.forward(decoder, tokens), [([5], written[1:]), ([5], other[1:])]
    )
    assert [each.greedy for each in found] == [True, False]


def test_batches_contain_each_sequence_once_and_few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "_TOKENS", 64)
    shapes = []

    def logits(tokens: Tensor) -> Tensor:
        shapes.append(tokens.shape)
        return unigram(a=9)(tokens)

    lengths = [3, 60, 7, 100, 7, 20, 1]
    found = tasks.score(logits, [([1] * length, [ord("a")]) for length in lengths])
    assert len(found) == len(lengths) and len({each.log_likelihood for each in found}) == 1
    assert all(rows == 1 or rows * length <= 64 for rows, length in shapes) and sum(
        rows for rows, _ in shapes
    ) == len(lengths)


# PIQA


def test_piqa_sums_and_normalises_by_hand() -> None:
    model, other = unigram(a=9), math.log(1 / (VOCAB + 8))
    likely = math.log(9 / (VOCAB + 8))
    # Sums: "aa" (a space, twice a) against "b" (a space, b); per character the first is ahead, by the sum the
    # second.
    assert 2 * likely + other < 2 * other and (2 * likely + other) / 2 > 2 * other
    figures = tasks.piqa(model, encode, items(("aa", "b", 0), ("aa", "b", 1), ("b", "aa", 1), ("a", "b", 0)))
    assert figures["accuracy"] == 0.5 and figures["accuracy_normalised"] == 0.75
    assert figures["accuracy_standard_error"] == pytest.approx(0.25)
    assert figures["items"] == 4 and figures["truncated"] == 0
    json.dumps(figures)


def test_piqa_scores_a_right_model_and_a_wrong_one() -> None:
    asked = items(*[("good", "evil", 0), ("evil", "good", 1)] * 8)
    assert tasks.piqa(unigram(g=50, o=50, d=50), encode, asked)["accuracy"] == 1.0
    assert tasks.piqa(unigram(e=50, v=50, i=50), encode, asked)["accuracy"] == 0.0
    assert tasks.piqa(unigram(), encode, asked)["accuracy"] == 0.5  # all alike: always the first


def test_piqa_uses_the_usual_prompt_and_truncates_it_on_the_left() -> None:
    seen = []

    def logits(tokens: Tensor) -> Tensor:
        seen.extend(tokens.tolist())
        return unigram()(tokens)

    tasks.piqa(logits, encode, items(("ab", "cd", 0)), start=(1,))
    assert seen[0] == [1, *encode("Question: do it\nAnswer: a")]  # the last token is only predicted
    seen.clear()
    assert tasks.piqa(logits, encode, items(("ab", "cd", 0)), start=(1,), longest=6)["truncated"] == 1
    assert seen[0] == encode("wer: a")
    with pytest.raises(UsageError, match="exceeds the model's positions"):
        tasks.piqa(logits, encode, items(("abcdefgh", "cd", 0)), longest=6)


def test_the_solution_starts_where_the_context_ends_even_if_tokens_merge() -> None:
    def merging(text: str) -> list[int]:
        return encode(text.replace(": ", "~"))

    assert tasks.split(encode, "a:", " b") == (encode("a:"), encode(" b"))
    assert tasks.split(merging, "a:", " b") == (encode("a~"), encode("b"))
    assert tasks.split(merging, "a:", " ") == (encode("a"), encode("~"))


def test_reads_the_files_of_piqa(tmp_path: Path) -> None:
    lines = [{"goal": f"g {at}", "sol1": "a\u2028b", "sol2": "c"} for at in range(3)]
    (tmp_path / "valid.jsonl").write_text(
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    )
    (tmp_path / "valid-labels.lst").write_text("0\n1\n0\n")
    read = tasks.read_piqa(tmp_path)
    assert [item.label for item in read] == [0, 1, 0] and read[1].solutions == ("a\u2028b", "c")
    for wrong in ("0\n1\n", "0\n1\n2\n", "0\n1\nx\n"):
        (tmp_path / "valid-labels.lst").write_text(wrong)
        with pytest.raises(UsageError, match="holds no PIQA items"):
            tasks.read_piqa(tmp_path)
    with pytest.raises(UsageError, match="holds no PIQA items"):
        tasks.read_piqa(tmp_path / "nowhere")


# Passkey

HAY = "The grass is green and the sky is blue. " * 30
DEPTHS = (0.0, 0.5, 1.0)


def cells(**given: Any) -> list[Any]:
    return tasks.passkey_cells(encode, HAY, **{"lengths": (300, 500), "depths": DEPTHS, "trials": 3, **given})


def test_prompts_have_the_given_length_and_the_key_at_its_depth() -> None:
    made = cells(start=(1,))
    assert [(cell.length, cell.depth) for cell in made] == [
        (length, depth) for length in (300, 500) for depth in DEPTHS
    ]
    keys = set()
    for cell in made:
        for prompt, answer in cell.prompts:
            text, key = "".join(map(chr, prompt)), "".join(map(chr, answer)).strip()
            assert len(prompt) + len(answer) == cell.length and prompt[0] == 1 and len(key) == 5
            place, hay = text.index(f"The pass key is {key}."), cell.length - 1 - len(tasks.BEFORE)
            assert text.count(key) == 2 and text.endswith("What is the pass key? The pass key is")
            hay -= len(tasks.NEEDLE.format(key=key)) + len(tasks.QUESTION) + 6
            assert place == pytest.approx(2 + len(tasks.BEFORE) + cell.depth * hay, abs=1)
            keys.add(key)
    assert len(keys) == 18  # each trial its own
    assert made == cells(start=(1,)) and made != cells(start=(1,), seed=1)


def test_a_model_that_copies_retrieves_every_key() -> None:
    figures = tasks.passkey(copying(), cells())
    assert figures["accuracy"] == 1.0 and figures["trials"] == 18 and figures["skipped"] is None
    assert {cell["correct"] for cell in figures["cells"]} == {3} and figures["standard_error"] == 0.0
    json.dumps(figures)


def test_skips_the_task_if_the_original_cannot_do_it() -> None:
    original = tasks.passkey(unigram(**{"7": 9}), cells())
    assert original["accuracy"] == 0.0 and "finds the key in 0% of the trials" in original["skipped"]
    converted = tasks.passkey(copying(), cells(), original)
    assert (
        converted["skipped"] == original["skipped"]
        and converted["trials"] == 0
        and converted["accuracy"] is None
    )
    assert len(converted["not_asked"]) == 6 and converted["cells"] == []


def test_a_model_that_forgets_fails_if_the_key_is_far() -> None:
    made = cells(lengths=(500,))
    near = tasks.passkey(copying(sees=200), made)
    assert [cell["accuracy"] for cell in near["cells"]] == [0.0, 0.0, 1.0] and near["skipped"] is None
    assert near["standard_error"] == pytest.approx(math.sqrt(2 / 9 / 9))
    same = tasks.passkey(copying(), made, original=near)  # only what the original could do is asked
    assert [cell["depth"] for cell in same["cells"]] == [1.0] and [
        cell["depth"] for cell in same["not_asked"]
    ] == [0.0, 0.5]
    lost = tasks.passkey(unigram(), made, original=tasks.passkey(copying(), made))
    assert (
        lost["accuracy"] == 0.0 and lost["skipped"] is None
    )  # the original could: this is a loss, no reason to skip


def test_rejects_impossible_prompts() -> None:
    for wrong in ({"lengths": (100,)}, {"lengths": (3000,)}):
        with pytest.raises(UsageError, match="cannot be made this long"):
            cells(**wrong)
    with pytest.raises(UsageError, match="depth is out of range"):
        cells(depths=(1.5,))


def test_uses_the_tokenizer_of_the_checkpoint(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(1)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert tasks.encoder(tmp_path)("a b a x") == [0, 1, 0, 2]
    with pytest.raises(UsageError, match="is no tokenizer"):
        tasks.encoder(tmp_path / "nowhere")
