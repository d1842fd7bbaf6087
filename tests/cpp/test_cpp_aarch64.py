"""Both runtimes on an emulated aarch64 processor give the results of this machine, within stated tolerances.

Linear maps with integer weights round activations to int8, with other kernels of ONNX Runtime on each kind of
processor. Those for dot products (Cortex-A76, like Orin's Cortex-A78AE) and for products of int8 matrices
(Neoverse N2) round; a Cortex-A57 has neither and computes in float32. So logits differ by about the error of
rounding, and a token may differ where two logits are that close.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from aarch64 import SET_UP, emulated, native, set_up
from builds import CPP, build, environment, require, run
from drive import Drive, Refused
from numpy.typing import NDArray
from support.command_line import run_kvexport

pytestmark = pytest.mark.slow

# Largest difference of a logit, in units of the rms of its row. Measured: float32 5e-6, int8 0.07, int4 0.12.
TOLERANCE = {"float32": 5e-4, "int8": 0.25, "int4": 0.25}
PROMPT, NEW, VOCAB = [2, 340, 19, 77, 1021, 5, 260, 44], 100, 2048
ROUNDS = {"cortex-a76": True, "neoverse-n2": True, "cortex-a57": False}  # activations to int8


def exhaustive(*values: str) -> Any:
    return pytest.param(*values, marks=[pytest.mark.exhaustive])


# Format of the weights, runtime, processor.
CASES = [
    *((name, "cpp", "cortex-a76") for name in TOLERANCE),
    ("int4", "python", "cortex-a76"),
    *(exhaustive(name, "python", "cortex-a76") for name in ("float32", "int8")),
    *(exhaustive(name, "cpp", each) for each in ("neoverse-n2", "cortex-a57") for name in TOLERANCE),
    *(exhaustive("int4", "python", each) for each in ("neoverse-n2", "cortex-a57")),
]


class Results(NamedTuple):
    """What a runtime computes from a bundle.

    Attributes:
        report: of its self-test.
        tokens: generated greedily from `PROMPT`.
        logits: float32 [NEW + 1, vocab], after `PROMPT` and after each of the tokens of this machine.
    """

    report: dict[str, Any]
    tokens: list[int]
    logits: NDArray[np.float32]


def build_bundles(folder: Path) -> None:
    """Build the demo model with the weight formats of `TOLERANCE`."""
    folder.mkdir()
    quick = ["--method", "svd-w", "--samples", "4", "--length", "32", "--no-cache", "--quiet"]
    for name in TOLERANCE:
        weights = ["--weights", name] + ["--weight-method", "nearest"] * (name != "float32")
        code, _, errors = run_kvexport(
            "build", "--demo", "-o", folder / name, "--capacity", 256, *quick, *weights
        )
        assert code in (None, 0), errors


def results(drive: Drive, bundle: Path, tokens: list[int] | None = None) -> Results:
    """`tokens`: that are run one after another; None: those that the runtime generates."""
    drive.open(bundle)
    report = drive("self_test", session="s")
    drive.new()
    made = drive.generate(PROMPT, max_new_tokens=NEW, stop_tokens=[])["tokens"]
    drive.new()
    rows = [drive.prefill(PROMPT), *(drive.step(token) for token in tokens or made)]
    return Results(report, made, np.stack(rows))


@pytest.fixture(scope="module")
def bundles(shared_folders: Any) -> Path:
    set_up()
    return Path(shared_folders.get(build_bundles))


@pytest.fixture(scope="module")
def here(bundles: Path) -> Callable[[str], Results]:
    """What Python computes on this machine, by weight format; C++ computes the same (test_cpp_parity.py)."""

    @cache
    def of(name: str) -> Results:
        with native("python") as drive:
            return results(drive, bundles / name)

    return of


def difference(logits: NDArray[np.float32], reference: NDArray[np.float32]) -> NDArray[np.float64]:
    """Largest difference of a logit in each row, in units of the rms of the reference; float64 [rows]."""
    rms = np.sqrt(np.mean(reference.astype(np.float64) ** 2, axis=1))
    largest: NDArray[np.float64] = np.abs(logits.astype(np.float64) - reference).max(axis=1) / rms
    return largest


def first_disagreement(tokens: list[int], reference: Results, tolerance: float) -> int | None:
    """Index of the first token that differs from the reference's; None if there is none, or if it may differ.

    It may where the reference's logits of both tokens are closer than twice the tolerance. Later tokens then
    differ, too.
    """
    for at, (token, wanted) in enumerate(zip(tokens, reference.tokens, strict=True)):
        if token != wanted:
            row = reference.logits[at].astype(np.float64)
            return None if row[wanted] - row[token] <= 2 * tolerance * np.sqrt(np.mean(row**2)) else at
    return None


@pytest.mark.parametrize(("name", "runtime", "processor"), CASES)
def test_self_test_logits_and_100_greedy_tokens(
    name: str, runtime: str, processor: str, bundles: Path, here: Callable[[str], Results]
) -> None:
    with emulated(runtime, processor) as drive:
        found = results(drive, bundles / name, here(name).tokens)
    assert found.report["verdict"] == "ok", found.report
    errors = [check["logits"] for check in found.report["checks"]]
    assert len(errors) == 2 and max(errors) <= TOLERANCE[name], errors
    rounds = name != "float32" and ROUNDS[processor]
    assert (min(errors) > 1e-3) == rounds, errors  # the emulated processor decides on the kernels
    assert difference(found.logits, here(name).logits).max() <= TOLERANCE[name]
    assert first_disagreement(found.tokens, here(name), TOLERANCE[name]) is None
    assert len(found.tokens) == NEW and (name != "float32" or found.tokens == here(name).tokens)


def test_the_tolerances_tell_other_weights_apart(bundles: Path, here: Callable[[str], Results]) -> None:
    """Control: the logits of one format are not those of another, nor are other tokens accepted."""
    with native("python") as drive:
        for name, other in (("float32", "int8"), ("int8", "int4"), ("int4", "int8")):
            found = results(drive, bundles / other, here(name).tokens)
            assert difference(found.logits, here(name).logits).max() > TOLERANCE[name], (name, other)
    reference = here("int4")
    unlikely = int(reference.logits[50].argmin())
    assert (
        first_disagreement([*reference.tokens[:50], unlikely, *reference.tokens[51:]], reference, 0.25) == 50
    )


@pytest.mark.parametrize("runtime", ["cpp", pytest.param("python", marks=[pytest.mark.exhaustive])])
def test_refusals_are_equal(runtime: str, bundles: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(bundles / "int4", tmp_path / "damaged"))
    with (damaged / "decoder.onnx.data").open("r+b") as file:
        file.seek(1000)
        byte = file.read(1)
        file.seek(1000)
        file.write(bytes([byte[0] ^ 1]))
    with emulated(runtime) as there, native(runtime) as here:
        codes = []
        for call in refused_calls(bundles, damaged, tmp_path / "cache"):
            parts = [parts_of(call, drive) for drive in (there, here)]
            assert parts[0] == parts[1]
            codes.append(parts[0]["code"])
        assert codes == [2, 2, 3, 2, 2, 2]


def refused_calls(bundles: Path, damaged: Path, saved: Path) -> list[Callable[[Drive], object]]:
    """Calls that must be refused, in this order."""

    def load_into_another(drive: Drive) -> object:
        drive("save", cache="c", file=str(saved))
        drive.open(bundles / "int8", session="other")
        return drive("load", session="other", cache="d", file=str(saved))

    return [
        lambda drive: drive.open(saved.parent / "none"),
        lambda drive: drive.open(damaged),
        lambda drive: drive.open(bundles / "int4", provider="cuda"),
        lambda drive: (drive.open(bundles / "int4"), drive.new(), drive.prefill([VOCAB])),
        lambda drive: drive.prefill([1] * 300),
        load_into_another,
    ]


def parts_of(call: Callable[[Drive], object], drive: Drive) -> dict[str, Any]:
    with pytest.raises(Refused) as refused:
        call(drive)
    return refused.value.parts


@pytest.mark.parametrize(
    ("runtime", "processor"), [("cpp", "cortex-a76"), exhaustive("python", "cortex-a76")]
)
def test_a_cache_of_the_board_continues_here(
    runtime: str, processor: str, bundles: Path, tmp_path: Path
) -> None:
    saved, rest = str(tmp_path / "cache"), [7, 300, 21]
    with emulated(runtime, processor) as drive:
        drive.open(bundles / "float32")
        drive.new()
        drive.prefill(PROMPT)
        drive("save", cache="c", file=saved)
        there = drive.prefill(rest)
    with native("python") as drive:
        drive.open(bundles / "float32")
        drive("load", session="s", cache="c", file=saved)
        here = drive.prefill(rest)
    assert difference(there[None], here[None]).max() <= TOLERANCE["float32"]


def test_the_self_test_program_runs_on_the_board(bundles: Path, tmp_path: Path) -> None:
    program = build("aarch64") / "kvexport_self_test"
    assert program.read_bytes()[18:20] == b"\xb7\x00"  # EM_AARCH64
    ran = run(SET_UP / "bin" / "run", program, bundles / "int8", "--json", env=environment())
    assert ran.returncode == 0 and json.loads(ran.stdout)["verdict"] == "ok", ran.stderr
    ran = run(SET_UP / "bin" / "run", program, tmp_path / "none", env=environment())
    assert ran.returncode == 2 and "must be a bundle" in ran.stderr


def test_the_library_needs_no_newer_system_than_jetpack_6(bundles: Path) -> None:
    """Ubuntu 22.04: glibc 2.35, GCC 12's libstdc++ (GLIBCXX_3.4.30); and no OpenSSL."""
    dumped = require("aarch64-linux-gnu-objdump", "-p", build("aarch64") / "libkvexport.so")
    for name, newest in (("GLIBC", (2, 35)), ("GLIBCXX", (3, 4, 30))):
        found = [tuple(map(int, each.split("."))) for each in re.findall(rf"\b{name}_([\d.]+)", dumped)]
        assert found and max(found) <= newest, (name, found)
    needed = {line.split()[1].partition(".")[0] for line in dumped.splitlines() if "NEEDED" in line}
    assert needed <= {"libonnxruntime", "libstdc++", "libm", "libgcc_s", "libc", "ld-linux-aarch64"}, needed


@pytest.mark.exhaustive
def test_ctest_passes_on_the_board(bundles: Path) -> None:
    """The tests of C++ that need no files."""
    folder = build("aarch64")
    require("cmake", "--build", folder, "-j", "2")
    output = require("ctest", "--test-dir", folder, "--output-on-failure", env=environment())
    assert "100% tests passed" in output


def test_the_set_up_script_names_what_is_missing(tmp_path: Path) -> None:
    script = CPP / "tools" / "fetch_aarch64.sh"
    usage = run("bash", script)
    assert usage.returncode == 2 and "the output folder must be given" in usage.stderr
    for tool in ("dirname", "mkdir"):
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    without = run(str(shutil.which("bash")), script, tmp_path / "out", env={"PATH": str(tmp_path)})
    assert without.returncode == 3 and "apt-get install g++-aarch64-linux-gnu" in without.stderr
