"""Tests of `kvexport targets`: the list and a single target, as a table and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

from support.command_line import Ended, run_kvexport

from kvexport.devices.targets import known_targets, load_target


def targets(*arguments: object) -> Ended:
    """Run `kvexport targets`: exit code, standard output, standard error."""
    return run_kvexport("targets", *arguments)


def test_every_target_has_a_row() -> None:
    code, out, err = targets()
    assert (code, err) == (0, "")
    for target in known_targets():
        (line,) = (line for line in out.splitlines() if line.split()[:1] == [target.name])
        assert f"{target.bandwidth / 1e9:g}" in line.split()
        assert target.engine in line


def test_the_list_as_json() -> None:
    listed = json.loads(targets("--json")[1])
    assert [each["name"] for each in listed] == [target.name for target in known_targets()]
    assert all(each["memory"] > 2**31 and each["sources"] for each in listed)


def test_a_single_target_is_shown_with_the_source_of_each_value() -> None:
    code, out, _ = targets("orin-nx-16gb")
    assert code == 0
    words = " ".join(out.split())
    for text in ("102.4 GB/s", "16.0 GiB", "60%", "8.7", "10.3.0.30", "recommend.py", "derived"):
        assert text in words
    raw = json.loads(targets("orin-nx-16gb", "--json")[1])
    assert raw["sources"] == load_target("orin-nx-16gb").sources


def test_a_target_file_of_the_user_is_shown_too(tmp_path: Path) -> None:
    shipped = Path(__file__).resolve().parent.parent.parent / "graphs" / "targets" / "cpu.toml"
    (tmp_path / "mine.toml").write_text(shipped.read_text().replace("51.2", "89.6"))
    code, out, _ = targets(tmp_path / "mine.toml")
    assert code == 0
    assert "89.6 GB/s" in out


def test_rejects_an_unknown_name_and_an_invalid_file(tmp_path: Path) -> None:
    assert targets("orin")[0] == 2
    (tmp_path / "bad.toml").write_text("title = 3")
    code, out, err = targets(tmp_path / "bad.toml")
    assert (code, out) == (2, "")
    assert "title" in err
