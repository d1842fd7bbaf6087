"""The self-test: valid bundles pass on every backend, and each kind of fault has its own verdict."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.decoders import STYLES, make_decoder, with_attention
from support.invalid_self_tests import INVALID
from support.simulated_device import SimulatedDevice, add_engine, only_gpu
from support.tiny_bundles import decoder_with_fewer_heads, edit_manifest, write_bundle
from support.validated_bundles import broken

from kvexport.bundle import GRAPH_FILE, Bundle
from kvexport.bundle.graph_io import KEY, past
from kvexport.bundle.self_test_file import FILE, read_reference_outputs
from kvexport.errors import BundleError, CannotRunHere, UsageError
from kvexport.eviction.config import POLICIES, SCORE, Eviction
from kvexport.files.hashing import sha256_of
from kvexport.model.decoder import Decoder as Model
from kvexport.runtime.backends.base import Decoder
from kvexport.runtime.backends.select import Provider, new_cache, open_decoder
from kvexport.runtime.cache.device_arrays import HostStorage
from kvexport.runtime.cache.kv_cache import KvCache
from kvexport.runtime.self_test.runs import GARBAGE, STEP
from kvexport.runtime.self_test.verdict import SelfTestReport, compare_outputs, self_test

Raw = dict[str, Any]
EVICTION = Eviction("l2-norm", 40, protect_first=2, protect_recent=8)
CPU = Provider("cpu")


def model(style: str = "llama", **sizes: Any) -> Model:
    return make_decoder(style, dtype=torch.float32, **sizes)


def made(path: Path, decoder: Model | None = None, **options: Any) -> Path:
    return write_bundle(path, decoder or model(), self_test=True, **options)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 llama of two layers; shared."""
    return made(tmp_path_factory.mktemp("sound") / "b")


@pytest.fixture(scope="module")
def evicting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(
        tmp_path_factory.mktemp("evicting") / "b", eviction=dataclasses.replace(EVICTION, policy="window")
    )


def require_ok(report: SelfTestReport) -> None:
    assert (report.verdict, report.fix) == ("ok", None), report.message
    assert [check.first for check in report.checks] == [
        None,
        None,
    ] and report.generated == report.continuation


# Valid bundles


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("style", STYLES)
def test_valid_bundles_pass(style: str, dtype: str, tmp_path: Path) -> None:
    report = self_test(made(tmp_path / "b", model(style), dtype=dtype))
    require_ok(report)
    assert (report.provider, report.dtype, [check.rows for check in report.checks]) == (
        "cpu",
        dtype,
        [40, 40],
    )
    for check in report.checks:  # a tenth of what is allowed
        assert 10 * check.logits < report.tolerance.logits and 10 * check.norms < report.tolerance.norms
    assert report.continuation == 24 or dtype == "float16"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("policy", POLICIES)
def test_valid_bundles_with_eviction_pass(policy: str, dtype: str, tmp_path: Path) -> None:
    for style, skipped in (("gqa", ()), ("bloom", (0,)), ("window", ()))[:: 1 if dtype == "float32" else 2]:
        eviction = dataclasses.replace(EVICTION, policy=policy, skip_layers=skipped)
        report = self_test(made(tmp_path / style, model(style), dtype=dtype, eviction=eviction))
        require_ok(report)
        assert [check.rows for check in report.checks] == [16, 40]


def test_projected_keys_pass(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    require_ok(
        self_test(
            made(tmp_path / "b", decoder_with_fewer_heads(tiny_checkpoint("llama", num_key_value_heads=4)))
        )
    )


@pytest.mark.parametrize("capacity", [1, 2, 3, 5, 8, 17, 30])
def test_valid_bundles_of_any_capacity_pass(capacity: int, tmp_path: Path) -> None:
    require_ok(self_test(made(tmp_path / "b", model(layers=1), capacity=capacity)))
    if capacity > 1:
        eviction = Eviction("keep-high", min(capacity, 2 + capacity // 2))
        require_ok(
            self_test(made(tmp_path / "evicting", model(layers=1), capacity=capacity, eviction=eviction))
        )


def test_rejects_bfloat16_on_the_cpu(tmp_path: Path) -> None:
    with pytest.raises(CannotRunHere, match="no bfloat16 kernels"):
        self_test(made(tmp_path / "b", dtype="bfloat16"))


# Weights


def reseal(bundle: Path) -> None:
    """Correct the hash of the weights in the self-test file."""
    vectors = json.loads((bundle / FILE).read_text())
    vectors["weights_sha256"] = sha256_of(bundle / "decoder.onnx.data")
    (bundle / FILE).write_text(json.dumps(vectors))


def flip(bundle: Path) -> None:
    data = bytearray((bundle / "decoder.onnx.data").read_bytes())
    data[3 + 4 * 100] ^= 0x40  # the top exponent bit of a number
    (bundle / "decoder.onnx.data").write_bytes(data)


def test_a_flipped_byte_is_an_error(sound: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(sound, tmp_path / "b"))
    flip(bundle)
    with pytest.raises(BundleError, match=r"decoder\.onnx\.data of the bundle .* must be unchanged"):
        self_test(bundle)


def test_weights_that_differ_from_the_recording_have_verdict_weights(sound: Path, tmp_path: Path) -> None:
    report = self_test(broken(sound, tmp_path / "b", flip))
    assert (report.verdict, report.checks) == ("weights", ()) and "come from two builds" in report.message
    assert report.fix is not None and "kvexport build" in report.fix


def test_reference_outputs_of_another_bundle_have_verdict_weights(sound: Path, tmp_path: Path) -> None:
    other = made(tmp_path / "other", model(seed=1))
    assert (
        self_test(broken(sound, tmp_path / "b", lambda b: shutil.copy(other / FILE, b / FILE))).verdict
        == "weights"
    )


def test_consistently_changed_weights_have_verdict_weights(sound: Path, tmp_path: Path) -> None:
    report = self_test(broken(sound, tmp_path / "b", lambda b: (flip(b), reseal(b))))
    assert report.verdict == "weights" and [check.rows for check in report.checks] == [40, 40]
    assert "first difference: token" in report.message and report.checks[0].first is not None


def test_a_graph_of_another_bundle_has_verdict_weights(sound: Path, tmp_path: Path) -> None:
    """With the same, correct weights, and another attention scale."""
    other = made(
        tmp_path / "other", with_attention(model(), lambda each: dataclasses.replace(each, scale=1.0))
    )
    report = self_test(broken(sound, tmp_path / "b", lambda b: shutil.copy(other / "decoder.cpu.onnx", b)))
    assert (
        report.verdict == "weights" and report.checks[0].first is not None and report.checks[0].first.row == 1
    )
    assert report.fix is not None and "kvexport validate" in report.fix


# Other engines


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> SimulatedDevice:
    return only_gpu(monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("lowering", ["std24", "decomposed17"])
@pytest.mark.parametrize("evicts", [False, True])
def test_engines_pass(
    lowering: str, dtype: str, evicts: bool, device: SimulatedDevice, tmp_path: Path
) -> None:
    eviction = dataclasses.replace(EVICTION, skip_layers=(0,)) if evicts else None
    bundle = made(tmp_path / "b", dtype=dtype, eviction=eviction)
    add_engine(bundle, lowering=lowering, capacity=60)
    report = self_test(bundle)
    require_ok(report)
    assert (report.provider, report.engine) == ("tensorrt", "tensorrt 10.16.2")
    require_ok(self_test(bundle, "cuda"))
    assert device.done.count("engine") > 24


def test_an_engine_of_a_smaller_capacity_runs_as_many_tokens_as_fit(
    device: SimulatedDevice, sound: Path, tmp_path: Path
) -> None:
    bundle = broken(sound, tmp_path / "b", lambda b: None)
    add_engine(bundle, capacity=21)
    report = self_test(bundle)
    require_ok(report)
    assert [check.rows for check in report.checks] == [21, 21]


def test_rejects_an_engine_that_holds_no_row(device: SimulatedDevice, tmp_path: Path) -> None:
    bundle = made(tmp_path / "b", eviction=Eviction("window", 60, protect_first=20))
    add_engine(bundle, capacity=8)
    with pytest.raises(
        CannotRunHere, match=r"must hold the tokens of the bundle's self-test[\s\S]*--capacity 48"
    ):
        self_test(bundle)


@pytest.mark.parametrize("evicts", [False, True])
def test_an_engine_that_computes_other_numbers_has_verdict_engine(
    evicts: bool, device: SimulatedDevice, tmp_path: Path
) -> None:
    eviction = EVICTION if evicts else None
    other = made(tmp_path / "other", model(seed=1), eviction=eviction)
    bundle = made(tmp_path / "b", eviction=eviction)
    add_engine(bundle, graph=other / GRAPH_FILE)
    report = self_test(bundle)
    assert report.verdict == "engine" and report.checks[0].first is not None
    assert report.fix is not None and "--provider cpu" in report.fix and "kvexport engine" in report.fix
    require_ok(self_test(bundle, "cpu"))


def test_an_engine_of_another_bundle_has_verdict_engine(
    device: SimulatedDevice, sound: Path, tmp_path: Path
) -> None:
    bundle = broken(sound, tmp_path / "b", lambda b: None)
    add_engine(bundle, manifest_sha256="0" * 64)
    for provider in ("auto", "tensorrt"):
        report = self_test(bundle, provider)
        assert (report.verdict, report.checks) == (
            "engine",
            (),
        ) and "must be built from this bundle" in report.message
        assert report.fix is not None and "kvexport engine" in report.fix
    require_ok(self_test(bundle, "cpu"))


def test_a_damaged_plan_is_an_error(device: SimulatedDevice, sound: Path, tmp_path: Path) -> None:
    bundle = broken(sound, tmp_path / "b", lambda b: None)
    plan = add_engine(bundle) / "decoder.plan"
    plan.write_bytes(plan.read_bytes()[::-1])
    with pytest.raises(BundleError, match="its sha256 differs"):
        self_test(bundle)


def test_does_not_hash_weights_that_are_in_the_plan(
    device: SimulatedDevice, sound: Path, tmp_path: Path
) -> None:
    """The simulated engine reads the weights; the test is that no code hashes a file that is not needed."""
    bundle = broken(sound, tmp_path / "b", lambda b: None)
    add_engine(bundle)
    hashed: list[str] = []
    original = Bundle.verify
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Bundle, "verify", lambda self, names: hashed.extend(names := list(names)) or original(self, names)
        )
        require_ok(self_test(bundle))
        assert "decoder.onnx.data" not in hashed and FILE in hashed
        require_ok(self_test(bundle, "cpu"))
        assert "decoder.onnx.data" in hashed


# Precision


@pytest.mark.parametrize("evicts", [False, True])
def test_float32_computed_in_float16_has_verdict_precision(evicts: bool, tmp_path: Path) -> None:
    eviction = EVICTION if evicts else None
    bundle = Bundle.open(made(tmp_path / "b", eviction=eviction))
    half = Bundle.open(made(tmp_path / "half", dtype="float16", eviction=eviction))
    decoder = open_decoder(half, CPU)
    decoder.use(new_cache(half, CPU, "float16", fill=GARBAGE, step=STEP))
    report = compare_outputs(bundle, read_reference_outputs(bundle), decoder, CPU)
    assert report.verdict == "precision" and "float16" in report.message and report.fix is not None
    require_ok(compare_outputs(half, read_reference_outputs(half), decoder, CPU))  # a control


# Cache


class Wrapped:
    """A decoder that changes its cache after each call by `after(cache, first position, tokens)`."""

    def __init__(self, decoder: Decoder, after: Callable[[KvCache, int, int], None]) -> None:
        self._decoder, self._after = decoder, after

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)

    def run(self, input_ids: Any, positions: Any, *others: Any, **options: Any) -> Any:
        logits = self._decoder.run(input_ids, positions, *others, **options)
        self._after(self._decoder.cache, int(positions[0, 0]), positions.shape[1])
        return logits


def examined(
    path: Path, after: Callable[[KvCache, int, int], None] = lambda *arguments: None
) -> SelfTestReport:
    bundle = Bundle.open(path)
    decoder = open_decoder(bundle, CPU)
    decoder.use(new_cache(bundle, CPU, bundle.dtype, fill=GARBAGE, step=STEP))
    return compare_outputs(bundle, read_reference_outputs(bundle), Wrapped(decoder, after), CPU)  # type: ignore[arg-type]


def require_cache(report: SelfTestReport) -> None:
    assert report.verdict == "cache" and report.checks[0].first is None and report.fix is not None


def test_the_wrapper_alone_passes(sound: Path, evicting: Path) -> None:
    for bundle in (sound, evicting):
        require_ok(examined(bundle))


def test_a_dropped_write_has_verdict_cache(sound: Path) -> None:
    def drop(cache: KvCache, position: int, tokens: int) -> None:
        if (position, tokens) == (20, 1):
            cache.buffers[past(1, KEY)][:, :, 20] = GARBAGE

    report = examined(sound, drop)
    require_cache(report)
    assert report.checks[1].first is not None and report.checks[1].first.row in (20, 21)
    assert "first difference: token 2" in report.message


def test_writes_one_slot_off_have_verdict_cache(sound: Path) -> None:
    def shift(cache: KvCache, position: int, tokens: int) -> None:
        if tokens == 1:
            for buffer in cache.buffers.values():
                buffer[:, :, position - 1], buffer[:, :, position] = buffer[:, :, position].copy(), GARBAGE

    require_cache(examined(sound, shift))


def test_ignored_write_indices_have_verdict_cache(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call writes from the first slot on."""
    original = KvCache.admit
    monkeypatch.setattr(
        KvCache, "admit", lambda self, positions, row=None: 0 * original(self, positions, row)
    )
    require_cache(self_test(sound))


def test_growth_without_a_copy_has_verdict_cache(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HostStorage, "copy_slots", lambda *arguments: None)
    require_cache(self_test(sound))


def test_wrongly_chosen_slots_have_verdict_cache(evicting: Path) -> None:
    def forget(cache: KvCache, position: int, tokens: int) -> None:
        state = cache.state(1)
        state[..., SCORE] *= -1  # the newest goes first
        cache.set_state(1, state)

    require_cache(examined(evicting, forget))


def test_a_cleared_state_has_verdict_cache(evicting: Path) -> None:
    def forget(cache: KvCache, position: int, tokens: int) -> None:
        if tokens == 1:
            cache.set_state(0, 0 * cache.state(0))

    require_cache(examined(evicting, forget))


def test_a_fault_in_generation_alone_has_verdict_cache(sound: Path) -> None:
    """Both runs are right, and generation is wrong."""
    begun: list[int] = []

    def spoil(cache: KvCache, position: int, tokens: int) -> None:
        begun.extend([1] * (position == 0))
        if len(begun) == 3 and position == 25:
            for buffer in cache.buffers.values():
                buffer[:, :, :20] = GARBAGE

    report = examined(sound, spoil)
    require_cache(report)
    assert report.checks[1].first is None and report.generated < report.continuation
    assert "greedy generation differs" in report.message


def test_scores_that_are_not_norms_have_verdict_weights(tmp_path: Path) -> None:
    bundle = made(tmp_path / "b", eviction=EVICTION)

    def swap(cache: KvCache, position: int, tokens: int) -> None:
        state = cache.state(1)
        state[..., SCORE] *= 1.5
        cache.set_state(1, state)

    report = examined(bundle, swap)
    assert (
        report.verdict == "weights"
        and report.checks[0].first is not None
        and report.checks[0].first.part == "score"
    )


def test_nan_is_an_infinite_error(sound: Path) -> None:
    def spoil(cache: KvCache, position: int, tokens: int) -> None:
        cache.buffers[past(0, KEY)][...] = np.nan

    report = examined(sound, spoil)
    assert report.verdict != "ok"
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["checks"][1]["norms"] is None


# The self-test file


def test_rejects_a_bundle_without_self_test_file(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"must contain self_test\.json[\s\S]*build the bundle again"):
        self_test(write_bundle(tmp_path / "b", model(layers=1)))


@pytest.mark.parametrize("change", INVALID)
def test_rejects_invalid_self_test_files(
    change: Callable[[Raw], object], sound: Path, tmp_path: Path
) -> None:
    def damage(bundle: Path) -> None:
        raw = json.loads((bundle / FILE).read_text())
        change(raw)
        (bundle / FILE).write_text(json.dumps(raw))

    with pytest.raises(BundleError, match=r"self_test\.json"):
        self_test(broken(sound, tmp_path / "b", damage))


@pytest.mark.parametrize("slots", [None, 10, 41, 17, 1.0])
def test_rejects_impossible_slots(slots: object, evicting: Path, tmp_path: Path) -> None:
    def damage(bundle: Path) -> None:
        raw = json.loads((bundle / FILE).read_text())
        (bundle / FILE).write_text(json.dumps({**raw, "slots": slots}))

    with pytest.raises(BundleError, match=r"self_test\.json"):
        self_test(broken(evicting, tmp_path / "b", damage))


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b"null"])
def test_rejects_files_that_are_not_self_test_files(content: bytes, sound: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"self_test\.json"):
        self_test(broken(sound, tmp_path / "b", lambda bundle: (bundle / FILE).write_bytes(content)))


def test_rejects_unknown_providers(sound: Path) -> None:
    with pytest.raises(UsageError, match="provider must be auto"):
        self_test(sound, "rocm")


def test_does_not_write_to_the_bundle(sound: Path, tmp_path: Path) -> None:
    bundle = broken(sound, tmp_path / "b", lambda b: None)
    before = {file.name: file.stat().st_mtime_ns for file in bundle.iterdir()}
    require_ok(self_test(bundle))
    assert {file.name: file.stat().st_mtime_ns for file in bundle.iterdir()} == before
    edit_manifest(bundle, lambda raw: raw["files"].pop(FILE))
    with pytest.raises(BundleError, match="must contain self_test"):
        self_test(bundle)


_LEAN = """
import sys
from kvexport.runtime.self_test.verdict import self_test
assert self_test(sys.argv[1]).verdict == "ok"
print(sorted({name.split(".")[0] for name in sys.modules} & {"torch", "onnx", "onnx_ir", "transformers"}))
"""


def test_needs_no_heavy_package(sound: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", _LEAN, str(sound)], capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == "[]"
