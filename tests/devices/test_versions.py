"""`kvexport.devices.versions`: versions as tuples that compare."""

from __future__ import annotations

import pytest

from kvexport.devices.versions import is_version, parse_version, release_of
from kvexport.errors import UsageError


@pytest.mark.parametrize(
    ("text", "version"), [("10.3", (10, 3)), ("10.3.0.30", (10, 3, 0, 30)), ("11.4.1", (11, 4, 1))]
)
def test_parses_a_version(text: str, version: tuple[int, ...]) -> None:
    assert is_version(text)
    assert parse_version(text) == version


@pytest.mark.parametrize(
    "text", ["", "10", "10.", "v10.3", "10.3rc1", "10.x", " 10.3", "1" * 5000 + ".1", "١٠.٣"]
)
def test_rejects_what_is_not_a_version(text: str) -> None:
    assert not is_version(text)
    with pytest.raises(UsageError, match="a version must be numbers"):
        parse_version(text)


@pytest.mark.parametrize(
    ("version", "release"),
    [
        ("2.8.0+cpu", (2, 8, 0)),
        ("1.13", (1, 13)),
        ("3", (3,)),
        ("1.29.0rc1", (1, 29, 0)),
        ("10.3.0.30", (10, 3, 0, 30)),
        ("unknown", ()),
        ("", ()),
    ],
)
def test_takes_the_release_numbers_of_a_package_version(version: str, release: tuple[int, ...]) -> None:
    assert release_of(version) == release
