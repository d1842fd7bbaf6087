"""`kvexport run`: the text and nothing else on standard output, everything else on standard error."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.tiny_bundles import byte_level_tokenizer, decoder_with_fewer_heads, write_bundle

from kvexport.cli import main
from kvexport.runtime import open_bundle

PROMPT = "Once upon a time there was a café"
NEW = 24


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a tokenizer and no token that ends a text; its capacity is 96 tokens."""
    checkpoint = tiny_checkpoint("llama", num_key_value_heads=4, vocab_size=320, eos_token_id=None)
    decoder = decoder_with_fewer_heads(checkpoint)
    return write_bundle(
        tmp_path_factory.mktemp("run") / "text", decoder, capacity=96, tokenizer=byte_level_tokenizer()
    )


@pytest.fixture
def said(bundle: Path) -> str:
    """What the bundle makes of PROMPT, by the library."""
    return open_bundle(bundle, threads=1).generate(PROMPT, max_new_tokens=NEW).text or ""


@pytest.fixture
def run(
    bundle: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> Iterator[Callable[..., tuple[object, str, str]]]:
    """`run(*options) -> exit code, standard output, standard error` of `kvexport run` on the bundle."""

    def call(*options: str) -> tuple[object, str, str]:
        code: object = 0
        try:
            main(["run", str(bundle), "--threads", "1", "--max-new-tokens", str(NEW), *options])
        except SystemExit as ended:
            code = ended.code
        out, err = capsysbinary.readouterr()
        return code, out.decode(), err.decode()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("signal.signal", lambda *arguments: None)  # the process's handlers stay pytest's
        yield call


Run = Callable[..., tuple[object, str, str]]


def give(text: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let standard input hold `text`."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), encoding="utf-8"))


def test_prompt_and_text_on_standard_output_and_a_summary_on_standard_error(run: Run, said: str) -> None:
    code, out, err = run("--prompt", PROMPT)
    assert (code, out) == (0, f"{PROMPT}{said}\n")
    assert re.fullmatch(
        r"kvexport: --max-new-tokens reached; prefill \d+ tokens at \d+/s, decode 23 tokens at \d+/s on the CPU; "
        r"KV cache \d+\.\d KiB in use, \d+\.\d KiB allocated\n",
        err,
    )


def test_quiet_is_the_text_alone(run: Run, said: str) -> None:
    assert run("--prompt", PROMPT, "--quiet") == (0, f"{PROMPT}{said}\n", "")


def test_text_is_whole_where_tokens_cut_characters(said: str) -> None:
    """A control: this bundle does speak in pieces of characters, of which no replacement is left but the last."""
    assert any(ord(character) > 127 for character in said)


@pytest.mark.parametrize("ending", [b"", b"\n", b"\r\n"])
def test_dash_reads_standard_input_without_its_last_line_break(
    run: Run, said: str, ending: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    give(PROMPT.encode() + ending, monkeypatch)
    assert run("--prompt", "-", "--quiet") == (0, f"{PROMPT}{said}\n", "")


def test_only_the_last_line_break_is_left_out(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    give(b"One.\n\n", monkeypatch)
    _, out, _ = run("--prompt", "-", "--quiet")
    assert out.startswith("One.\n") and out == run("--prompt", "One.\n", "--quiet")[1]


def test_sampling_options(run: Run, said: str) -> None:
    first, again, other = (
        run("--prompt", PROMPT, "--temperature", "1.5", "--seed", seed)[1] for seed in ("1", "1", "2")
    )
    assert first == again != other
    assert run("--prompt", PROMPT, "--top-k", "1")[1] == f"{PROMPT}{said}\n"


@pytest.mark.parametrize("option", [("--top-k", "40"), ("--top-p", "0.95")])
def test_top_k_and_top_p_draw_unless_told_to_be_greedy(run: Run, said: str, option: tuple[str, str]) -> None:
    assert (
        run("--prompt", PROMPT, "--seed", "3", *option)[1]
        == run("--prompt", PROMPT, "--seed", "3", "--temperature", "1", *option)[1]
        != f"{PROMPT}{said}\n"
    )
    assert run("--prompt", PROMPT, "--temperature", "0", *option)[1] == f"{PROMPT}{said}\n"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--temperature", "-1"), "temperature is out of range\n  got:      -1"),
        (("--temperature", "nan"), "temperature is out of range\n  got:      nan"),
        (("--top-k", "0"), "top_k is out of range\n  got:      0"),
        (("--top-p", "1.5"), "top_p is out of range\n  got:      1.5"),
        (("--seed", "-4"), "seed is out of range\n  got:      -4"),
        (("--max-new-tokens", "0"), "--max-new-tokens"),
        (("--threads", "0"), "--threads"),
        (("--prompt", "a" * 500), "the prompt must fit the capacity"),
        (("--prompt", "\udcff"), "the prompt is not valid text"),
    ],
    ids=lambda value: (
        "" if isinstance(value, str) else "-".join(value)[:20].encode("ascii", "replace").decode()
    ),
)
def test_a_wrong_value_is_2_and_prints_no_text(run: Run, options: tuple[str, ...], said: str) -> None:
    code, out, err = run("--prompt", PROMPT, *options)
    assert (code, out) == (2, "")
    assert said in err


def test_a_prompt_beyond_the_capacity_says_both_numbers(run: Run, bundle: Path) -> None:
    tokens = len(open_bundle(bundle)._encode("é?" * 100))
    _, _, err = run("--prompt", "é?" * 100)
    assert tokens > 96
    assert f"got:      {tokens} tokens\n  expected: at most 96\n" in err


def test_capacity_ends_a_text(run: Run) -> None:
    code, _, err = run("--prompt", PROMPT, "--max-new-tokens", "1000")
    assert code == 0
    assert "the bundle's capacity reached" in err


def test_standard_input_that_is_not_text(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    give(b"caf\xe9 au lait", monkeypatch)
    code, out, err = run("--prompt", "-")
    assert (code, out) == (2, "")
    assert "UTF-8" in err and "0xe9" in err


def test_no_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["run", str(tmp_path), "--prompt", "x"])
    assert ended.value.code == 2
    assert "is no bundle: it has no manifest.json" in capsys.readouterr().err


def test_a_bundle_without_tokenizer(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path = write_bundle(
        tmp_path / "ids", decoder_with_fewer_heads(tiny_checkpoint("llama", num_key_value_heads=4))
    )
    ran = shell(path, "--prompt", "x")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "must have a tokenizer" in ran.stderr


def shell(bundle: Path, *options: str, **more: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvexport", "run", str(bundle), "--threads", "1", *options]
    return subprocess.run(command, capture_output=True, text=True, **more)  # type: ignore[call-overload,no-any-return]


def test_a_reader_that_has_gone_ends_it_quietly(bundle: Path) -> None:
    """As with `| head -c 10`, once that has its ten bytes."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "kvexport", "run", str(bundle), "--threads", "1", "--prompt", PROMPT]
    ran = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (ran.returncode, ran.stderr) == (141, b"")


def test_text_that_the_terminal_cannot_show_is_no_error(bundle: Path, said: str) -> None:
    ran = shell(
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
    assert ran.stdout == f"{PROMPT}{said}\n".encode("latin-1", "replace").decode("latin-1")
    assert "?" in ran.stdout


def test_a_flipped_byte_of_the_weights_is_found(bundle: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(bundle, tmp_path / "damaged"))
    data = bytearray((damaged / "decoder.onnx.data").read_bytes())
    data[len(data) // 2] ^= 1
    (damaged / "decoder.onnx.data").write_bytes(data)
    ran = shell(damaged, "--prompt", "x")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "decoder.onnx.data" in ran.stderr and "sha256" in ran.stderr
