"""The examples in both languages: equal output, and error messages with exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from builds import ROOT, build
from genai import genai_library
from support.text_bundles import write_text_bundle
from support.validated_bundles import broken
from test_cpp_self_test import flip, update_weights_hash

import kvexport

pytestmark = pytest.mark.slow

SYSTEM, LINES = "Be kind.", ["Once upon a time", "a café, naïve 日本語 🙂", ""]
Ran = subprocess.CompletedProcess


@pytest.fixture(scope="module")
def bundle(shared_folders: Any) -> Path:
    return Path(shared_folders.get(write_text_bundle))


def cpp(name: str, *arguments: object, lines: list[str] | None = None, text: bool = True) -> Ran[str]:
    program = build("release") / "examples" / name
    environment = {key: value for key, value in os.environ.items() if key != "LD_LIBRARY_PATH"}
    if text:
        environment["LD_LIBRARY_PATH"] = str(genai_library().parent)
    return _run([program, *arguments], lines, environment)


def python(name: str, *arguments: object, lines: list[str] | None = None) -> Ran[str]:
    return _run(
        [sys.executable, ROOT / "examples" / name, *arguments], lines, {**os.environ, "PYTHONPATH": str(ROOT)}
    )


def _run(command: list[object], lines: list[str] | None, environment: dict[str, str]) -> Ran[str]:
    given = "".join(f"{line}\n" for line in lines or []).encode()
    ran = subprocess.run(list(map(str, command)), input=given, capture_output=True, env=environment)
    return Ran(ran.args, ran.returncode, ran.stdout.decode(), ran.stderr.decode())  # keep line ends


def output_of(ran: Ran[str]) -> str:
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_examples_are_short() -> None:
    for path, most in (
        (ROOT / "cpp/examples/chat.cpp", 30),
        (ROOT / "examples/chat.py", 16),
        (ROOT / "examples/restart.py", 16),
    ):
        assert len(path.read_text().splitlines()) <= most


def test_a_chat_is_one_conversation(bundle: Path) -> None:
    answers = []
    with kvexport.open(bundle) as session:
        cache = session.new_cache()
        for number, line in enumerate(LINES[:2]):
            turn = session.turn(line, system=SYSTEM if number == 0 else None, cache=cache)
            answers.append(session.generate(turn, cache=cache).text + "\n")
        alone = session.generate(session.turn(LINES[1])).text
    assert answers[1] != alone + "\n" and "".join(answers).strip()
    assert output_of(python("chat.py", bundle, SYSTEM, lines=LINES[:2])) == "".join(answers)
    ran = cpp("chat", bundle, SYSTEM, lines=LINES[:2])
    assert output_of(ran) == "".join(answers)
    assert re.match(r"onnxruntime \S+: 512 tokens in \d+ KiB\n> > > ", ran.stderr)


def test_a_chat_continues_after_its_cache_is_full(bundle: Path) -> None:
    for answers in (
        output_of(python("chat.py", bundle, lines=LINES * 5)),
        output_of(ran := cpp("chat", bundle, lines=LINES * 5)),
    ):
        assert answers.count("\n") >= 15
    assert "a new conversation begins" in ran.stderr


def test_a_cache_survives_a_restart_in_either_language(bundle: Path, tmp_path: Path) -> None:
    story, question = ROOT / "examples" / "story.txt", " The end"
    short = tmp_path / "story.txt"
    short.write_text(story.read_text()[:150])
    first = {}
    for name, run in (("chat.py", python), ("chat", cpp)):
        program = name.replace("chat", "restart")
        first[name] = run(program, bundle, short, tmp_path / name, question)
        again = run(program, bundle, short, tmp_path / name, question)
        assert output_of(first[name]) == output_of(again) and output_of(again).strip()
        if run is cpp:
            assert "prefilled and saved" in first[name].stderr and "tokens loaded" in again.stderr
    assert output_of(first["chat.py"]) == output_of(first["chat"])
    assert output_of(cpp("restart", bundle, short, tmp_path / "chat.py", question)) == output_of(
        first["chat"]
    )
    assert output_of(python("restart.py", bundle, short, tmp_path / "chat", question)) == output_of(
        first["chat"]
    )


def test_restart_reports_errors(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("word " * 2000)
    (tmp_path / "damaged").write_bytes(b"x" * 100)
    for prompt, cache, reason in (
        ("none", "c", "cannot read"),
        (".", "c", ""),
        ("long.txt", "c", "capacity"),
        ("long.txt", "damaged", "damaged"),
        ("long.txt", ".", "must be an existing file"),
    ):
        ran = cpp("restart", bundle, tmp_path / prompt, tmp_path / cache, "?")
        assert ran.returncode == 2 and reason in ran.stderr and not ran.stdout, ran
        assert not (tmp_path / "c").exists()
    other = write_text_bundle(tmp_path / "other", seed=1)
    (tmp_path / "short.txt").write_text("Once upon a time")
    output_of(cpp("restart", other, tmp_path / "short.txt", tmp_path / "its", "?"))
    ran = cpp("restart", bundle, tmp_path / "short.txt", tmp_path / "its", "?")
    assert ran.returncode == 2 and "must be of this bundle" in ran.stderr
    assert cpp("restart", bundle).returncode == 2


def test_robot_stays_within_its_memory_limit(bundle: Path) -> None:
    readings = ["The battery is low.", "word " * 2000, "The door is open."] * 3
    ran = cpp("robot", bundle, 48, 600_000, lines=readings)
    answers = output_of(ran)
    match = re.match(r"(\d+) tokens in (\d+) bytes\n", ran.stderr)
    assert match is not None
    tokens, taken = map(int, match.groups())
    with kvexport.open(bundle) as session:
        per_token = session.memory().bytes_per_token
    assert taken <= 48 * 1024 < taken + per_token + 4 * 256 and 0 < tokens < 512
    assert answers.count("\n") >= 6 and "[deadline]" not in answers  # answers may contain line ends
    assert ran.stderr.count("the prompt must fit the capacity") == 3


def test_robot_reports_errors_at_the_start(bundle: Path, tmp_path: Path) -> None:
    for arguments in (
        ("abc", "xyz"),
        ("0", "100"),
        ("-5", "100"),
        ("48", "-1"),
        ("1e3", "5"),
        ("48", ""),
        ("9" * 40, "5"),
        ("48kb", "5"),
        ("48",),
        (),
    ):
        ran = cpp("robot", bundle, *arguments)
        assert ran.returncode == 2 and ran.stderr.startswith("usage: robot"), ran
    deep = write_text_bundle(tmp_path / "deep", layers=4)
    ran = cpp("robot", deep, 1, 100)
    assert ran.returncode == 3 and "no conversation fits 1 KiB" in ran.stderr
    ran = cpp(
        "robot", broken(bundle, tmp_path / "wrong", lambda b: (flip(b), update_weights_hash(b))), 48, 100
    )
    assert ran.returncode == 1 and ran.stderr.startswith("weights: ")


def test_chat_reports_errors(bundle: Path, tmp_path: Path) -> None:
    assert cpp("chat").returncode == 2
    ran = cpp("chat", tmp_path, lines=["hello"])
    assert ran.returncode == 2 and "must be a bundle" in ran.stderr
    ran = cpp("chat", bundle, lines=["hello"], text=False)
    assert (
        ran.returncode == 3
        and "must have a tokenizer" in ran.stderr
        and "libonnxruntime-genai.so" in ran.stderr
    )


def test_a_bundle_without_a_template_takes_no_system_prompt(tmp_path: Path) -> None:
    plain = write_text_bundle(tmp_path / "b", template="{{ 1 }}")
    assert json.loads((plain / "text.json").read_text())["chat"] is None
    assert output_of(cpp("chat", plain, lines=LINES[:2])) == output_of(
        python("chat.py", plain, lines=LINES[:2])
    )
    ran = cpp("chat", plain, SYSTEM, lines=["hello"])
    assert ran.returncode == 2 and "requires a chat template" in ran.stderr
