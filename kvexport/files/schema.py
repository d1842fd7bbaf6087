"""Typed values from TOML and JSON files. Errors name the file, the key, the value and what is expected."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from kvexport.errors import KvexportError, UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")
_SHOWN = 80  # characters of a value in an error


class Table:
    """A table of a TOML file or an object of a JSON file, read key by key.

    A key that is absent or null is missing: call `has` first if a key is optional, `is_null` if it must be
    present but may be null. Every method raises the error class that was given to the constructor.

    Attributes:
        path: where the table is, for errors: "manifest.json: layers[2]".
    """

    def __init__(
        self,
        raw: object,
        path: str,
        *,
        error: type[KvexportError] = UsageError,
        fix: str | None = None,
    ) -> None:
        """
        Args:
            raw: the parsed value; must be a table.
            path: the file's name for errors.
            error: class of the errors.
            fix: the fix that errors name.
        """
        self.path, self._error, self._fix = path, error, fix
        if not isinstance(raw, dict):
            self._fail(f"{path} must be a table", raw, "a table")
        self._raw: dict[str, Any] = raw
        self._read: set[str] = set()

    @classmethod
    def from_json(
        cls,
        text: str | bytes,
        path: str,
        *,
        error: type[KvexportError] = UsageError,
        fix: str | None = None,
    ) -> Table:
        """Parse a JSON object; a key that occurs twice is an error."""
        try:
            raw = json.loads(text, object_pairs_hook=_unique_keys)
        except (ValueError, RecursionError) as cause:  # UnicodeDecodeError is a ValueError
            raise error(f"{path} must be JSON: {cause}", fix=fix) from cause
        return cls(raw, path, error=error, fix=fix)

    @classmethod
    def from_toml(
        cls, text: str, path: str, *, error: type[KvexportError] = UsageError, fix: str | None = None
    ) -> Table:
        """Parse a TOML document."""
        try:
            raw = tomllib.loads(text)
        except (ValueError, RecursionError) as cause:  # also an integer of more than 4300 digits
            raise error(f"{path} must be TOML: {cause}", fix=fix) from cause
        return cls(raw, path, error=error, fix=fix)

    def __iter__(self) -> Iterator[str]:
        return iter(self._raw)

    def has(self, key: str) -> bool:
        """Whether the key is present and not null."""
        self._read.add(key)
        return self._raw.get(key) is not None

    def is_null(self, key: str) -> bool:
        """Whether a key, which must be present, is null."""
        if key not in self._raw:
            self.fail(key, "a value or null")
        self._read.add(key)
        return self._raw[key] is None

    def integer(self, key: str, minimum: int | None = None, maximum: int | None = None) -> int:
        """An integer between `minimum` and `maximum`, both included."""
        value = self._get(key)
        in_range = _is_integer(value) and _between(value, minimum, maximum)
        return value if in_range else self.fail(key, _range("an integer", minimum, maximum))

    def number(self, key: str, minimum: float | None = None, maximum: float | None = None) -> float:
        """A finite number between `minimum` and `maximum`, both included."""
        value = self._get(key)
        in_range = _is_number(value) and _between(value, minimum, maximum)
        return float(value) if in_range else self.fail(key, _range("a finite number", minimum, maximum))

    def string(self, key: str, choices: Collection[str] | None = None) -> str:
        """A string of printable characters, one of `choices` if they are given."""
        value = self._get(key)
        if choices is not None:
            return (
                value if isinstance(value, str) and value in choices else self.fail(key, ", ".join(choices))
            )
        return value if isinstance(value, str) and value.isprintable() else self.fail(key, "printable text")

    def text(self, key: str) -> str:
        """A string of any characters that UTF-8 can encode, line breaks included."""
        value = self._get(key)
        return value if _is_text(value) else self.fail(key, "a string of valid Unicode")

    def boolean(self, key: str) -> bool:
        """true or false."""
        value = self._get(key)
        return value if isinstance(value, bool) else self.fail(key, "true or false")

    def table(self, key: str) -> Table:
        """A table inside this one."""
        return self._inner(self._get(key), f"{self._where(key)}")

    def tables(self, key: str) -> list[Table]:
        """A list of tables."""
        return [
            self._inner(each, f"{self._where(key)}[{index}]") for index, each in enumerate(self.list(key))
        ]

    def list(self, key: str) -> list[Any]:
        """A list of anything."""
        value = self._get(key)
        return value if isinstance(value, list) else self.fail(key, "a list")

    def integers(self, key: str, minimum: int | None = None, maximum: int | None = None) -> tuple[int, ...]:
        """A list of integers, each between `minimum` and `maximum`."""
        return self._items(
            key,
            lambda value: _is_integer(value) and _between(value, minimum, maximum),
            _range("integers", minimum, maximum),
        )

    def integer_lists(
        self, key: str, minimum: int | None = None, maximum: int | None = None
    ) -> tuple[tuple[int, ...], ...]:
        """A list of lists of integers, each between `minimum` and `maximum`."""

        def is_valid(value: Any) -> bool:
            return isinstance(value, list) and all(
                _is_integer(each) and _between(each, minimum, maximum) for each in value
            )

        lists = self._items(key, is_valid, f"lists of {_range('integers', minimum, maximum)}")
        return tuple(map(tuple, lists))

    def numbers(
        self, key: str, minimum: float | None = None, maximum: float | None = None
    ) -> tuple[float, ...]:
        """A list of finite numbers, each between `minimum` and `maximum`."""
        values = self._items(
            key,
            lambda value: _is_number(value) and _between(value, minimum, maximum),
            _range("finite numbers", minimum, maximum),
        )
        return tuple(map(float, values))

    def strings(self, key: str) -> tuple[str, ...]:
        """A list of printable strings."""
        return self._items(
            key, lambda value: isinstance(value, str) and value.isprintable(), "printable strings"
        )

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings of any characters that UTF-8 can encode."""
        return self._items(key, _is_text, "strings of valid Unicode")

    def value(self, key: str) -> Any:
        """A value of any type; it must be present."""
        return self._get(key)

    def mapping(self) -> Mapping[str, Any]:
        """The whole table as it was parsed; all of its keys count as read."""
        self._read.update(self._raw)
        return self._raw

    def only(self, *keys: str) -> None:
        """Require that the table has no other keys than those read and `keys`."""
        allowed = self._read | set(keys)
        for key in self._raw:
            if key not in allowed:
                self._fail(f"{self.path} has an unknown key", key, ", ".join(sorted(allowed)))

    def fail(self, key: str, expected: str) -> NoReturn:
        """Raise the error for a key whose value is wrong."""
        if self._raw.get(key) is None:
            raise self._error(f"{self._where(key)} is missing", expected=expected, fix=self._fix)
        self._fail(f"{self._where(key)} has an invalid value", self._raw[key], expected)

    def _get(self, key: str) -> Any:
        self._read.add(key)
        return self._raw.get(key)

    def _items(self, key: str, holds: Callable[[Any], bool], expected: str) -> tuple[Any, ...]:
        values = self._get(key)
        if not isinstance(values, list):
            self.fail(key, f"a list of {expected}")
        for index, value in enumerate(values):
            if not holds(value):
                self._fail(
                    f"{self._where(key)}[{index}] has an invalid value", value, f"a list of {expected}"
                )
        return tuple(values)

    def _inner(self, raw: object, path: str) -> Table:
        return Table(raw, path, error=self._error, fix=self._fix)

    def _where(self, key: str) -> str:
        return f"{self.path}.{key}" if ": " in self.path else f"{self.path}: {key}"

    def _fail(self, what: str, got: object, expected: str) -> NoReturn:
        raise self._error(what, got=_shown(got), expected=expected, fix=self._fix)


def read_limited(path: Path, limit: int) -> bytes:
    """Content of a file of at most `limit` bytes.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is larger.
    """
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"the file is larger than {limit} bytes")
    return content


def _shown(value: object) -> str:
    if isinstance(value, str) and value.isprintable() and value:
        return value[:_SHOWN]
    try:
        return repr(value)[:_SHOWN]
    except ValueError:  # TOML's hexadecimal integers can have more digits than Python writes in decimal
        return "an integer with too many digits"


def _unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key occurs twice")
    return table


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) <= sys.float_info.max if isinstance(value, int) else math.isfinite(value)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _between(value: float, minimum: float | None, maximum: float | None) -> bool:
    return (minimum is None or value >= minimum) and (maximum is None or value <= maximum)


def _range(kind: str, minimum: float | None, maximum: float | None) -> str:
    if minimum is not None and maximum is not None:
        return f"{kind} from {minimum} to {maximum}"
    if minimum is not None:
        return f"{kind} >= {minimum}"
    return kind if maximum is None else f"{kind} <= {maximum}"
