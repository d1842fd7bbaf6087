"""The self-test in C++: verdicts for faulty engines, and reports on bundles that equal those of Python.

The verdicts are tested in cpp/tests/test_self_test.cpp, which a test here runs.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builds import build, environment
from support.decoders import STYLES, make_decoder
from support.invalid_self_tests import INVALID
from support.tiny_bundles import put, write_bundle
from support.validated_bundles import broken

from kvexport.bundle.self_test_file import FILE
from kvexport.errors import KvexportError
from kvexport.eviction.config import POLICIES, Eviction
from kvexport.files.hashing import sha256_of
from kvexport.runtime.self_test.verdict import self_test

pytestmark = pytest.mark.slow

Raw = dict[str, Any]
EVICTION = Eviction("window", 40, protect_first=2, protect_recent=8)
RANKED = Eviction("l2-norm", 40, protect_first=2, protect_recent=8, skip_layers=(0,))
DATA = "decoder.onnx.data"


def made(path: Path, style: str = "llama", *, seed: int = 0, **options: Any) -> Path:
    return write_bundle(path, make_decoder(style, dtype=torch.float32, seed=seed), self_test=True, **options)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundles that test_self_test.cpp uses. Tests must not change them."""
    folder = tmp_path_factory.mktemp("bundles")
    made(folder / "sound")
    made(folder / "other", seed=1)
    made(folder / "evicting", eviction=EVICTION)
    made(folder / "other-evicting", seed=1, eviction=EVICTION)
    made(folder / "ranked", "gqa", eviction=RANKED)
    made(folder / "half", "gqa", dtype="float16")
    made(folder / "bloom", "bloom")
    made(folder / "qwen3", "qwen3")
    made(folder / "tiny", capacity=3)
    made(folder / "windowed", "window")
    made(folder / "long", eviction=Eviction("window", 60, protect_first=20))
    return folder


def run_program(bundle: Path, *options: str) -> subprocess.CompletedProcess[str]:
    program = build("release") / "kvexport_self_test"
    return subprocess.run([program, bundle, *options], capture_output=True, text=True)


def report(bundle: Path) -> Raw:
    """The report that the program prints, checked to equal Python's up to rounding of the errors."""
    ran = run_program(bundle, "--provider", "cpu", "--json")
    assert ran.stdout, ran.stderr
    found: Raw = json.loads(ran.stdout)
    python = self_test(bundle, "cpu").to_json()
    checks, others = found.pop("checks"), python.pop("checks")
    assert found == python and [each.keys() for each in checks] == [each.keys() for each in others]
    for check, other in zip(checks, others, strict=True):
        for key, value in other.items():
            assert check[key] == (pytest.approx(value, rel=0.05, abs=1e-6) if type(value) is float else value)
    assert ran.returncode == (0 if found["verdict"] == "ok" else 1)
    return found | {"checks": checks}


def test_verdicts_on_faulty_engines(bundles: Path) -> None:
    program = build("sanitized") / "tests" / "test_self_test"
    ran = subprocess.run(
        [program], env=environment(KVEXPORT_TEST_SELF_TEST=str(bundles)), capture_output=True, text=True
    )
    assert ran.returncode == 0 and " 0 failed, 0 skipped" in ran.stdout, ran.stdout + ran.stderr


# Reports equal to Python's


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("style", STYLES)
def test_valid_bundles_pass(style: str, dtype: str, tmp_path: Path) -> None:
    found = report(made(tmp_path / "b", style, dtype=dtype))
    assert found["verdict"] == "ok" and [check["rows"] for check in found["checks"]] == [40, 40]


@pytest.mark.parametrize("policy", POLICIES)
def test_valid_bundles_with_eviction_pass(policy: str, tmp_path: Path) -> None:
    for style, dtype, skipped in (
        ("gqa", "float32", ()),
        ("bloom", "float16", (0,)),
        ("window", "float32", ()),
    ):
        eviction = Eviction(policy, 40, protect_first=2, protect_recent=8, skip_layers=skipped)
        found = report(made(tmp_path / style, style, dtype=dtype, eviction=eviction))
        assert found["verdict"] == "ok" and [check["rows"] for check in found["checks"]] == [16, 40]


def test_valid_bundles_of_any_capacity_pass(tmp_path: Path) -> None:
    for capacity in (1, 2, 3, 7, 8, 16, 17, 33, 41):
        assert report(made(tmp_path / str(capacity), capacity=capacity))["verdict"] == "ok"
        if capacity > 1:
            eviction = Eviction("keep-high", min(capacity, 2 + capacity // 2))
            assert (
                report(made(tmp_path / f"{capacity}e", capacity=capacity, eviction=eviction))["verdict"]
                == "ok"
            )


def flip(bundle: Path) -> None:
    data = bytearray((bundle / DATA).read_bytes())
    data[3 + 4 * 100] ^= 0x40  # the top exponent bit of a number
    (bundle / DATA).write_bytes(data)


def update_weights_hash(bundle: Path) -> None:
    content = json.loads((bundle / FILE).read_text())
    (bundle / FILE).write_text(json.dumps({**content, "weights_sha256": sha256_of(bundle / DATA)}))


def round_weights(bundle: Path) -> None:
    """Round float32 weights to float16."""
    weights = torch.frombuffer(bytearray((bundle / DATA).read_bytes()), dtype=torch.float32)
    (bundle / DATA).write_bytes(weights.half().float().numpy().tobytes())


def damage_tokens(bundle: Path) -> None:
    """Change the continuation, so that it contradicts the rows."""
    content = json.loads((bundle / FILE).read_text())
    content["continuation"][-1] = (content["continuation"][-1] + 1) % 40
    (bundle / FILE).write_text(json.dumps(content))


def test_verdicts_on_damaged_bundles_equal_those_of_python(bundles: Path, tmp_path: Path) -> None:
    sound, cases = bundles / "sound", iter(range(100))

    def found(*changes: Callable[[Path], object], of: Path = sound) -> Raw:
        return report(
            broken(of, tmp_path / str(next(cases)), lambda bundle: [change(bundle) for change in changes])
        )

    assert found()["verdict"] == "ok"  # undamaged
    assert found(flip)["checks"] == []
    assert found(flip)["verdict"] == "weights"
    assert found(flip, update_weights_hash)["verdict"] == "weights"
    assert found(flip, update_weights_hash, of=bundles / "ranked")["verdict"] == "weights"
    assert found(lambda bundle: shutil.copy(bundles / "other" / FILE, bundle / FILE))["verdict"] == "weights"
    assert found(round_weights, update_weights_hash)["verdict"] == "precision"
    assert found(damage_tokens)["verdict"] != "ok"


def test_exit_codes_and_messages(bundles: Path, tmp_path: Path) -> None:
    sound = bundles / "sound"
    ran = run_program(sound)
    assert ran.returncode == 0 and ran.stdout.startswith("ok: onnxruntime ")
    wrong = run_program(
        broken(sound, tmp_path / "wrong", lambda bundle: (flip(bundle), update_weights_hash(bundle)))
    )
    assert (
        wrong.returncode == 1
        and "weights: onnxruntime " in wrong.stderr
        and "fix:" in wrong.stderr
        and not wrong.stdout
    )
    shutil.copytree(sound, tmp_path / "damaged")
    flip(tmp_path / "damaged")
    for refused in (
        run_program(tmp_path / "damaged", "--json"),
        run_program(tmp_path / "none"),
        run_program(sound, "--provider"),
        run_program(sound, "twice"),
        run_program(sound, "--provider", "rocm"),
        run_program(Path("--json")),
        run_program(write_bundle(tmp_path / "bare", make_decoder(dtype=torch.float32))),
    ):
        assert refused.returncode == 2 and refused.stderr and not refused.stdout
    for elsewhere in (
        run_program(sound, "--provider", "tensorrt"),
        run_program(made(tmp_path / "wide", dtype="bfloat16")),
    ):
        assert elsewhere.returncode == 3 and elsewhere.stderr and not elsewhere.stdout


def test_refuses_invalid_self_test_files(bundles: Path, tmp_path: Path) -> None:
    def refused(name: str, of: Path, change: Callable[[Raw], object]) -> None:
        def damage(bundle: Path) -> None:
            raw = json.loads((bundle / FILE).read_text())
            change(raw)
            (bundle / FILE).write_text(json.dumps(raw))

        bundle = broken(of, tmp_path / name, damage)
        with pytest.raises(KvexportError):
            self_test(bundle)
        ran = run_program(bundle)
        assert ran.returncode == 2 and FILE in ran.stderr and "build the bundle again" in ran.stderr, (
            ran.stderr
        )

    for number, change in enumerate(INVALID):
        refused(str(number), bundles / "sound", change)
    for slots in (None, 10, 41, 17, 1.0):
        refused(f"slots {slots}", bundles / "evicting", put("slots", to=slots))
