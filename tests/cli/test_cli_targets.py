"""`kvexport targets`: the list and one target, for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kvexport.cli import main
from kvexport.devices.targets import known_targets, load_target

Targets = Callable[..., tuple[object, str, str]]


@pytest.fixture
def targets(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Targets:
    """`targets(*arguments) -> exit code, standard output, standard error`."""
    monkeypatch.setattr("signal.signal", lambda *arguments: None)  # the process's handlers stay pytest's

    def call(*arguments: object) -> tuple[object, str, str]:
        code: object = 0
        try:
            main(["targets", *map(str, arguments)])
        except SystemExit as ended:
            code = ended.code
        return code, *capsys.readouterr()

    return call


def test_every_target_has_a_line(targets: Targets) -> None:
    code, shown, said = targets()
    assert (code, said) == (0, "")
    for target in known_targets():
        (line,) = (line for line in shown.splitlines() if line.split()[:1] == [target.name])
        assert f"{target.bandwidth / 1e9:g}" in line.split()
        assert target.engine in line


def test_the_list_is_json(targets: Targets) -> None:
    listed = json.loads(targets("--json")[1])
    assert [each["name"] for each in listed] == [target.name for target in known_targets()]
    assert all(each["memory"] > 2**31 and each["sources"] for each in listed)


def test_one_target_shows_where_its_figures_are_from(targets: Targets) -> None:
    code, shown, _ = targets("orin-nx-16gb")
    assert code == 0
    words = " ".join(shown.split())
    for text in ("102.4 GB/s", "16.0 GiB", "60%", "8.7", "10.3.0.30", "recommend.py", "derived"):
        assert text in words
    raw = json.loads(targets("orin-nx-16gb", "--json")[1])
    assert raw["sources"] == load_target("orin-nx-16gb").sources


def test_a_users_file_is_shown_alike(targets: Targets, tmp_path: Path) -> None:
    shipped = Path(__file__).resolve().parent.parent.parent / "graphs" / "targets" / "cpu.toml"
    (tmp_path / "mine.toml").write_text(shipped.read_text().replace("51.2", "89.6"))
    code, shown, _ = targets(tmp_path / "mine.toml")
    assert code == 0
    assert "89.6 GB/s" in shown


def test_an_unknown_target_is_a_usage_error(targets: Targets, tmp_path: Path) -> None:
    assert targets("orin")[0] == 2
    (tmp_path / "bad.toml").write_text("title = 3")
    code, shown, said = targets(tmp_path / "bad.toml")
    assert (code, shown) == (2, "")
    assert "title" in said
