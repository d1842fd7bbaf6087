"""Tests of `kvexport run`: text on standard output, everything else on standard error."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.command_line import Ended, run_kvexport
from support.tiny_bundles import byte_level_tokenizer, decoder_with_fewer_heads, write_bundle

from kvexport.cli import main
from kvexport.runtime import open_bundle

Run = Callable[..., Ended]
PROMPT = "Once upon a time there was a café"
NEW = 24


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a tokenizer, without an end-of-sequence token, and with a capacity of 96 tokens."""
    checkpoint = tiny_checkpoint("llama", num_key_value_heads=4, vocab_size=320, eos_token_id=None)
    decoder = decoder_with_fewer_heads(checkpoint)
    return write_bundle(
        tmp_path_factory.mktemp("run") / "text", decoder, capacity=96, tokenizer=byte_level_tokenizer()
    )


@pytest.fixture
def continuation(bundle: Path) -> str:
    """The continuation of PROMPT that the library generates with the bundle."""
    return open_bundle(bundle, threads=1).generate(PROMPT, max_new_tokens=NEW).text or ""


@pytest.fixture
def run(bundle: Path) -> Run:
    """`run(*options)` of `kvexport run` with the bundle: exit code, standard output, standard error."""
    return lambda *options: run_kvexport("run", bundle, "--threads", 1, "--max-new-tokens", NEW, *options)


def set_standard_input(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


def test_prints_prompt_and_continuation_to_stdout_and_a_summary_to_stderr(
    run: Run, continuation: str
) -> None:
    code, out, err = run("--prompt", PROMPT)
    assert (code, out) == (0, f"{PROMPT}{continuation}\n")
    assert re.fullmatch(
        r"kvexport: stopped at --max-new-tokens; prefill \d+ tokens at \d+/s, "
        r"decode 23 tokens at \d+/s on the CPU; "
        r"KV cache \d+\.\d KiB in use, \d+\.\d KiB allocated\n",
        err,
    )


def test_quiet_prints_the_text_only(run: Run, continuation: str) -> None:
    assert run("--prompt", PROMPT, "--quiet") == (0, f"{PROMPT}{continuation}\n", "")


def test_the_continuation_contains_characters_of_several_bytes(continuation: str) -> None:
    """Control: tokens of this bundle split characters, so the other tests cover assembled text."""
    assert any(ord(character) > 127 for character in continuation)


@pytest.mark.parametrize("ending", [b"", b"\n", b"\r\n"])
def test_a_dash_reads_the_prompt_from_stdin_without_the_last_line_break(
    run: Run, continuation: str, ending: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_standard_input(PROMPT.encode() + ending, monkeypatch)
    assert run("--prompt", "-", "--quiet") == (0, f"{PROMPT}{continuation}\n", "")


def test_removes_only_the_last_line_break_of_stdin(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    set_standard_input(b"One.\n\n", monkeypatch)
    _, out, _ = run("--prompt", "-", "--quiet")
    assert out.startswith("One.\n") and out == run("--prompt", "One.\n", "--quiet")[1]


def test_sampling_is_repeatable_with_a_seed(run: Run, continuation: str) -> None:
    first, again, other = (
        run("--prompt", PROMPT, "--temperature", "1.5", "--seed", seed)[1] for seed in ("1", "1", "2")
    )
    assert first == again != other
    assert run("--prompt", PROMPT, "--top-k", "1")[1] == f"{PROMPT}{continuation}\n"


@pytest.mark.parametrize("option", [("--top-k", "40"), ("--top-p", "0.95")])
def test_top_k_and_top_p_sample_unless_the_temperature_is_0(
    run: Run, continuation: str, option: tuple[str, str]
) -> None:
    assert (
        run("--prompt", PROMPT, "--seed", "3", *option)[1]
        == run("--prompt", PROMPT, "--seed", "3", "--temperature", "1", *option)[1]
        != f"{PROMPT}{continuation}\n"
    )
    assert run("--prompt", PROMPT, "--temperature", "0", *option)[1] == f"{PROMPT}{continuation}\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--temperature", "-1"), "temperature must be 0 or more, and finite\n  got:      -1"),
        (("--temperature", "nan"), "temperature must be 0 or more, and finite\n  got:      nan"),
        (("--top-k", "0"), "top_k must be an integer >= 1\n  got:      0"),
        (("--top-p", "1.5"), "top_p must be above 0 and at most 1\n  got:      1.5"),
        (("--seed", "-4"), "seed must be an integer >= 0\n  got:      -4"),
        (("--max-new-tokens", "0"), "--max-new-tokens"),
        (("--threads", "0"), "--threads"),
        (("--prompt", "a" * 500), "the prompt must fit the capacity"),
        (("--prompt", "\udcff"), "the prompt must be valid Unicode"),
    ],
    ids=lambda value: (
        "" if isinstance(value, str) else "-".join(value)[:20].encode("ascii", "replace").decode()
    ),
)
def test_an_invalid_value_exits_with_2_and_prints_no_text(
    run: Run, options: tuple[str, ...], message: str
) -> None:
    code, out, err = run("--prompt", PROMPT, *options)
    assert (code, out) == (2, "")
    assert message in err


def test_a_prompt_beyond_the_capacity_is_rejected_with_both_numbers(run: Run, bundle: Path) -> None:
    tokens = len(open_bundle(bundle).encode("é?" * 100))
    _, _, err = run("--prompt", "é?" * 100)
    assert tokens > 96
    assert f"got:      {tokens} tokens\n  expected: at most 96\n" in err


def test_generation_stops_at_the_capacity(run: Run) -> None:
    code, _, err = run("--prompt", PROMPT, "--max-new-tokens", "1000")
    assert code == 0
    assert "stopped at the bundle's capacity" in err


def test_rejects_stdin_that_is_not_utf_8(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    set_standard_input(b"caf\xe9 au lait", monkeypatch)
    code, out, err = run("--prompt", "-")
    assert (code, out) == (2, "")
    assert "UTF-8" in err and "0xe9" in err


def test_rejects_a_path_that_is_not_a_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["run", str(tmp_path), "--prompt", "x"])
    assert ended.value.code == 2
    assert "must be a bundle: it has no manifest.json" in capsys.readouterr().err


def test_rejects_a_bundle_without_a_tokenizer(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path = write_bundle(
        tmp_path / "ids", decoder_with_fewer_heads(tiny_checkpoint("llama", num_key_value_heads=4))
    )
    ran = run_process(path, "--prompt", "x")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "must have a tokenizer" in ran.stderr


def run_process(bundle: Path, *options: str, **more: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvexport", "run", str(bundle), "--threads", "1", *options]
    return subprocess.run(command, capture_output=True, text=True, **more)  # type: ignore[call-overload,no-any-return]


def test_exits_with_141_and_no_message_if_stdout_is_closed(bundle: Path) -> None:
    """As with `| head -c 10`, which closes its input after ten bytes."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "kvexport", "run", str(bundle), "--threads", "1", "--prompt", PROMPT]
    ran = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (ran.returncode, ran.stderr) == (141, b"")


def test_replaces_characters_that_the_terminal_cannot_show(bundle: Path, continuation: str) -> None:
    ran = run_process(
        bundle,
        "--prompt",
        PROMPT,
        "--max-new-tokens",
        str(NEW),
        "--quiet",
        env={"PYTHONIOENCODING": "latin-1"},
        encoding="latin-1",
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout == f"{PROMPT}{continuation}\n".encode("latin-1", "replace").decode("latin-1")
    assert "?" in ran.stdout


def test_detects_a_flipped_bit_of_the_weights(bundle: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(bundle, tmp_path / "damaged"))
    data = bytearray((damaged / "decoder.onnx.data").read_bytes())
    data[len(data) // 2] ^= 1
    (damaged / "decoder.onnx.data").write_bytes(data)
    ran = run_process(damaged, "--prompt", "x")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "decoder.onnx.data" in ran.stderr and "sha256" in ran.stderr
