"""The reader of TOML and JSON files: types, ranges and errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvexport.errors import BundleError, UsageError
from kvexport.files.schema import Table, read_limited

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


def table(**values: Any) -> Table:
    return Table(values, "test.json", error=BundleError, fix="build again")


def test_reads_each_type() -> None:
    one = table(
        i=3,
        n=2,
        s="a",
        t="a\nb",
        b=True,
        l=[1, "x"],
        ii=[1, 2],
        nn=[1, 2.5],
        ss=["a", "b"],
        tt=["a\n", ""],
        o={"k": 1},
        oo=[{"k": 2}],
    )
    assert (one.integer("i", 0, 3), one.number("n"), one.string("s"), one.text("t"), one.boolean("b")) == (
        3,
        2.0,
        "a",
        "a\nb",
        True,
    )
    assert (one.list("l"), one.integers("ii"), one.numbers("nn"), one.strings("ss")) == (
        [1, "x"],
        (1, 2),
        (1.0, 2.5),
        ("a", "b"),
    )
    assert table(k=[[], [1]]).integer_lists("k") == ((), (1,))
    assert one.texts("tt") == ("a\n", "")
    assert one.table("o").integer("k") == 1 and [each.integer("k") for each in one.tables("oo")] == [2]
    one.only()


@pytest.mark.parametrize(
    ("value", "read", "expected"),
    [
        (True, lambda t: t.integer("k"), "an integer"),
        (1.0, lambda t: t.integer("k"), "an integer"),
        (0, lambda t: t.integer("k", 1), "an integer >= 1"),
        (9, lambda t: t.integer("k", 1, 8), "an integer from 1 to 8"),
        (float("nan"), lambda t: t.number("k"), "a finite number"),
        (10**400, lambda t: t.number("k"), "a finite number"),
        (True, lambda t: t.number("k"), "a finite number"),
        ("a\n", lambda t: t.string("k"), "printable text"),
        ("c", lambda t: t.string("k", ("a", "b")), "a, b"),
        ("\ud800", lambda t: t.text("k"), "valid Unicode"),
        (1, lambda t: t.boolean("k"), "true or false"),
        ({}, lambda t: t.list("k"), "a list"),
        ([1, True], lambda t: t.integers("k"), "a list of integers"),
        ([1, float("inf")], lambda t: t.numbers("k"), "a list of finite numbers"),
        (["a", 1], lambda t: t.strings("k"), "printable strings"),
        (["a\n", "\ud800"], lambda t: t.texts("k"), "strings of valid Unicode"),
        ([[1], 2], lambda t: t.integer_lists("k"), "a list of lists of integers"),
        ([[1], [True]], lambda t: t.integer_lists("k"), "a list of lists of integers"),
        ([[1, 9]], lambda t: t.integer_lists("k", 0, 8), "from 0 to 8"),
        ([], lambda t: t.table("k"), "a table"),
        ([[]], lambda t: t.tables("k"), "a table"),
    ],
)
def test_names_key_value_and_expected_type(value: Any, read: Any, expected: str) -> None:
    with pytest.raises(BundleError) as raised:
        read(table(k=value))
    assert raised.value.what.startswith("test.json: k")
    assert expected in str(raised.value.expected) and raised.value.got and raised.value.fix == "build again"


def test_rejects_missing_keys() -> None:
    with pytest.raises(BundleError, match=r"test.json: k is missing"):
        table().integer("k")
    assert not table(k=None).has("k") and table(k=0).has("k")
    assert table(k=None).is_null("k") and not table(k=0).is_null("k")
    with pytest.raises(BundleError, match=r"test.json: k is missing"):
        table().is_null("k")


def test_errors_name_nested_keys() -> None:
    with pytest.raises(BundleError, match=r"test.json: layers\[1\]\.width is missing"):
        for each in table(layers=[{"width": 1}, {}]).tables("layers"):
            each.integer("width")


def test_rejects_unknown_keys() -> None:
    one = table(a=1, b=2)
    one.integer("a")
    with pytest.raises(BundleError, match="unknown key") as raised:
        one.only()
    assert raised.value.got == "b"
    one.only("b")


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": 1, "a": 2}', b"\xff", "[" * 100_000])
def test_rejects_text_that_is_not_a_json_object(text: str | bytes) -> None:
    with pytest.raises(UsageError, match="test"):
        Table.from_json(text, "test")


@pytest.mark.parametrize("text", ["a", "a = ", "a = 1\na = 2", "a = " + "9" * 5000])
def test_rejects_text_that_is_not_toml(text: str) -> None:
    with pytest.raises(UsageError, match="must be TOML"):
        Table.from_toml(text, "test.toml")


@pytest.mark.parametrize("method", ["string", "boolean", "strings"])
def test_rejects_hexadecimal_integers_that_have_too_many_digits_to_print(method: str) -> None:
    one = Table.from_toml("k = 0x" + "f" * 5000, "test.toml")
    with pytest.raises(
        UsageError, match=r"test\.toml: k has an invalid value\n  got:      an integer with too"
    ):
        getattr(one, method)("k")


@given(JSON)
def test_raises_no_other_error(value: Any) -> None:
    for method in (
        "integer",
        "number",
        "string",
        "text",
        "boolean",
        "list",
        "table",
        "tables",
        "integers",
        "numbers",
    ):
        try:
            getattr(table(k=value), method)("k")
        except BundleError as error:
            assert len(str(error.got or "")) <= 80


def test_rejects_files_larger_than_the_limit(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert read_limited(tmp_path / "file", 5) == b"12345"
    with pytest.raises(ValueError, match="larger than 4"):
        read_limited(tmp_path / "file", 4)
