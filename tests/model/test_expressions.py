"""Expressions over config.json: values equal Python's arithmetic, and everything else is refused."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvexport.errors import CheckpointError, UsageError
from kvexport.model.expressions import evaluate, keys_of

CONFIG = {
    "hidden": 64,
    "heads": 4,
    "scale": 0.25,
    "text": "gelu",
    "flag": True,
    "nothing": None,
    "layers": ["a", "b"],
    "attn": {"clip": 6.0, "inner": {"deep": 3}},
}


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("hidden", 64),
        ("text", "gelu"),
        ("flag", True),
        ("layers", ["a", "b"]),
        ("attn.clip", 6.0),
        ("attn.inner.deep", 3),
        ("hidden / heads", 16.0),
        ("hidden / heads + 2 * 3", 22.0),
        ("(hidden + 2) * heads", 264.0),
        ("hidden ** -0.5", 0.125),
        ("1 / attn.clip", 1 / 6.0),
        ("attn.clip * attn.inner.deep - hidden", -46.0),
        ("-heads", -4.0),
        ("-1", -1.0),
        ("1", 1),
        ("0.5", 0.5),
        ("2 ** 3 ** 2", 512.0),
    ],
)
def test_value(expression: str, value: object) -> None:
    found = evaluate(expression, CONFIG)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "expression",
    ["absent", "nothing", "absent / heads", "hidden * nothing", "attn.absent", "hidden.clip", "layers.clip"],
)
def test_an_absent_or_null_key_gives_none(expression: str) -> None:
    assert evaluate(expression, CONFIG) is None


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("text * 2", ("text in config.json must be a number", "'gelu'")),
        ("flag + 1", ("flag in config.json must be a number", "True")),
        ("attn / 2", ("attn in config.json must be a number",)),
        ("hidden / (heads - 4)", ("must be a finite number", "hidden = 64", "heads = 4")),
        ("(heads - 8) ** 0.5", ("must be a finite number", "heads = 4")),
        ("hidden ** 1000", ("must be a finite number", "hidden = 64")),
    ],
)
def test_rejects_values(expression: str, words: tuple[str, ...]) -> None:
    with pytest.raises(CheckpointError) as caught:
        evaluate(expression, CONFIG)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("value", [math.nan, math.inf, 10**400, [1], {}])
def test_rejects_values_that_are_no_finite_numbers(value: object) -> None:
    with pytest.raises(CheckpointError, match=r"heads in config\.json must be a number"):
        evaluate("heads * 2", {"heads": value})


@pytest.mark.parametrize(
    "expression",
    [
        "", "hidden heads", "hidden // heads", "hidden % heads", "hidden[0]", "len(layers)", "'text'",
        "True", "hidden if flag else heads", "hidden < heads", "[hidden]", "lambda: 1", "hidden; heads",
        "+heads", "1j", "not flag", "hidden\n= 1", "a := 1", "\0",
        "-" * 100_000 + "1", "(" * 1000 + "1" + ")" * 1000, "9" * 5000,
    ],
)  # fmt: skip
def test_rejects_other_syntax(expression: str) -> None:
    for function in (keys_of, lambda text: evaluate(text, CONFIG)):
        with pytest.raises(UsageError, match="must consist of keys, numbers"):
            function(expression)


def test_keys_are_those_at_the_top_of_the_config() -> None:
    assert sorted(keys_of("hidden / attn.clip ** -heads + 1")) == ["attn", "heads", "hidden"]
    assert keys_of("2 * 3") == []


NUMBERS = st.sampled_from(["hidden", "heads", "scale", "attn.clip", "2", "0.5", "3.0"])


def operations(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    operators = st.sampled_from(["+", "-", "*", "/", "**"])
    binary = st.tuples(inner, operators, inner).map(lambda parts: f"({' '.join(parts)})")
    return binary | inner.map(lambda text: f"-({text})")


@given(st.recursive(NUMBERS, operations, max_leaves=6))
def test_arithmetic_equals_that_of_python(expression: str) -> None:
    names = {"hidden": 64.0, "heads": 4.0, "scale": 0.25, "attn": type("Attn", (), {"clip": 6.0})}
    try:
        expected = eval(expression, {"__builtins__": {}}, names)
    except ArithmeticError:
        expected = math.nan
    if isinstance(expected, complex) or not math.isfinite(expected):
        with pytest.raises(CheckpointError, match="must be a finite number"):
            evaluate(expression, CONFIG)
    else:
        assert evaluate(expression, CONFIG) == pytest.approx(expected, rel=1e-12, abs=0)


@given(st.text(max_size=30))
def test_any_text_gives_a_value_or_an_error_of_its_own(text: str) -> None:
    try:
        keys_of(text)
    except UsageError:
        with pytest.raises(UsageError):
            evaluate(text, CONFIG)
    else:
        try:
            evaluate(text, CONFIG)
        except CheckpointError as error:
            assert "config.json" in str(error)
