"""Tests of `kvexport run` with --cache, --save-cache and --stop."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_cli_run import PROMPT, Run, bundle, continuation, run

from kvexport.runtime import open_bundle

__all__ = ["bundle", "continuation", "run"]  # fixtures


def test_a_saved_cache_continues_as_if_the_prompt_were_given(
    run: Run, continuation: str, tmp_path: Path
) -> None:
    file = str(tmp_path / "c")
    code, out, err = run("--prompt", PROMPT, "--save-cache", file)
    assert (
        (code, out) == (0, "")
        and err.startswith(f"kvexport: wrote {file}: ")
        and "tokens, " in err
        and err.endswith("KiB\n")
    )
    assert run("--prompt", "", "--cache", file, "--quiet") == (0, f"{continuation}\n", "")
    code, out, err = run("--prompt", "", "--cache", file)
    assert "prefill 0 tokens, decode 23 tokens at " in err and "KV cache" in err
    head, tail = PROMPT[:12], PROMPT[12:]
    assert run("--prompt", head, "--save-cache", file, "--quiet") == (0, "", "")
    _, _, err = run("--prompt", tail, "--cache", file, "--save-cache", str(tmp_path / "d"))
    assert "of them from --cache" in err
    assert run("--prompt", "", "--cache", str(tmp_path / "d"), "--quiet")[0] == 0


def test_rejects_caches_that_cannot_be_continued(run: Run, bundle: Path, tmp_path: Path) -> None:
    code, out, err = run("--prompt", "a", "--cache", str(tmp_path / "none"))
    assert (code, out) == (2, "") and "must be an existing file" in err
    code, out, err = run("--prompt", "a", "--save-cache", str(tmp_path / "none" / "c"))
    assert (code, out) == (2, "") and "mkdir -p" in err
    session = open_bundle(bundle, threads=1)
    cache = session.new_cache(batch=2)
    session.prefill([[1], [2]], cache=cache)
    cache.save(tmp_path / "two")
    code, out, err = run("--prompt", "a", "--cache", str(tmp_path / "two"))
    assert (code, out) == (2, "") and "2 sequences" in err


def test_generation_ends_before_a_stop_text(run: Run, continuation: str) -> None:
    stop = continuation[5:7]
    code, out, err = run("--prompt", PROMPT, "--stop", stop, "--stop", "never there")
    assert (code, out) == (
        0,
        f"{PROMPT}{continuation[: continuation.index(stop)]}\n",
    ) and "or a --stop text" in err


@pytest.mark.parametrize("options", [("--stop", "")])
def test_rejects_an_empty_stop_text(run: Run, options: tuple[str, ...]) -> None:
    code, out, err = run("--prompt", PROMPT, *options)
    assert (code, out) == (2, "") and "must not be empty" in err


@pytest.mark.parametrize("option", [("--stop", "x"), ("--temperature", "1"), ("--seed", "1")])
def test_rejects_sampling_options_with_save_cache(run: Run, tmp_path: Path, option: tuple[str, str]) -> None:
    code, out, err = run("--prompt", PROMPT, "--save-cache", str(tmp_path / "c"), *option)
    assert (code, out) == (2, "") and f"leave {option[0]} out" in err and not (tmp_path / "c").exists()
