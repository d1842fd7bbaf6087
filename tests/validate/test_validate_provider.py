"""Validation and evaluation on the lowered graph, on a simulated device and on a simulated engine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from support.decoders import make_decoder
from support.simulated_device import SimulatedDevice, add_engine, only_gpu
from support.tiny_bundles import byte_level_tokenizer, write_bundle
from support.validated_bundles import broken, edit_graph, export, node_of

from kvexport.bundle import GRAPH_FILE
from kvexport.errors import BundleError, CannotRunHere, UsageError
from kvexport.graph import write_lowered
from kvexport.model.checkpoint import Checkpoint
from kvexport.model.loader import load_decoder
from kvexport.progress import Progress
from kvexport.runtime.backends.tensorrt import TensorRtDecoder
from kvexport.validate import ValidationReport, validate_bundle
from kvexport.validate.evaluate import evaluate
from kvexport.validate.layerwise import GARBAGE

ALL = ("key", "value", "attention", "residual", "logits")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> SimulatedDevice:
    return only_gpu(monkeypatch)


@pytest.fixture(scope="module")
def validated(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A valid bundle with its lowered graph, by dtype; tests must not write to it."""
    folder = tmp_path_factory.mktemp("validated")
    made: dict[str, Path] = {}

    def bundle(dtype: str) -> Path:
        if dtype not in made:
            export(folder / f"plain-{dtype}", make_decoder("llama", dtype=torch.float32), dtype=dtype)
            made[dtype] = broken(
                folder / f"plain-{dtype}",
                folder / dtype,
                lambda path: write_lowered(path / GRAPH_FILE, dtype),
            )
        return made[dtype]

    return bundle


def _validated(bundle: Path, provider: str) -> ValidationReport:
    return validate_bundle(bundle, Progress(), provider)


def _wrong_scale(node: ir.Node) -> None:
    node.attributes["scale"] = ir.AttrFloat32("scale", 1.0)


def _lowered(name: str) -> Callable[[Path], None]:
    """Damage one of the lowered graphs: a wrong attention scale in the second layer."""

    def damage(path: Path) -> None:
        model = ir.load(path / name)
        nodes = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
        _wrong_scale(nodes[1])
        ir.save(model, path / name)

    return damage


def test_validates_the_deployed_graph(validated: Callable[[str], Path], tmp_path: Path) -> None:
    on_cpu = _validated(validated("float32"), "cpu")
    assert on_cpu.failures == () and (on_cpu.provider, on_cpu.compared) == ("cpu", ALL)
    lowered = broken(validated("float32"), tmp_path / "lowered", _lowered("decoder.cpu.onnx"))
    assert any(line.startswith("layers.1.attention") for line in _validated(lowered, "cpu").failures)
    standard = edit_graph(lambda graph: _wrong_scale(node_of(graph, "layers.1.attention.mixed")))
    assert (
        _validated(broken(validated("float32"), tmp_path / "standard", standard), "cpu").failures == ()
    )  # it does not run here


def test_on_a_device_every_layer_is_compared(
    validated: Callable[[str], Path], tmp_path: Path, device: SimulatedDevice
) -> None:
    for dtype in ("float32", "float16"):
        report = _validated(validated(dtype), "cuda")
        assert report.failures == () and (report.provider, report.compared) == ("cuda", ALL)
        assert report.computed_in == dtype and len(report.differences) == 2 * 4 + 1
    assert "copy_rows" in device.done  # the cache grew there
    damaged = broken(validated("float16"), tmp_path / "damaged", _lowered("decoder.cuda.onnx"))
    assert _validated(damaged, "cuda").failures and not _validated(damaged, "cpu").failures


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("lowering", ["std24", "decomposed17"])
def test_a_valid_engine_passes(
    lowering: str, dtype: str, validated: Callable[[str], Path], tmp_path: Path, device: SimulatedDevice
) -> None:
    bundle = broken(validated(dtype), tmp_path / "b", lambda path: None)
    add_engine(bundle, lowering=lowering, capacity=100)
    for provider in ("tensorrt", "auto"):
        report = _validated(bundle, provider)
        assert report.failures == () and report.provider == "tensorrt"
        assert report.compared == ("key", "value", "logits") and len(report.differences) == 2 * 2 + 1
        assert (report.prefill, report.steps, report.computed_in) == (32, 64, dtype)
        assert json.loads(json.dumps(report.to_json()))["compared"] == ["key", "value", "logits"]


def test_wrong_engines_fail(
    validated: Callable[[str], Path], tmp_path: Path, device: SimulatedDevice
) -> None:
    wrong = edit_graph(lambda graph: _wrong_scale(node_of(graph, "layers.0.attention.mixed")))
    other = broken(validated("float32"), tmp_path / "other", wrong)
    bundle = broken(validated("float32"), tmp_path / "b", lambda path: None)
    folder = add_engine(bundle)
    plan = json.loads((folder / "decoder.plan").read_text())
    (folder / "decoder.plan").write_text(json.dumps({**plan, "graph": str(other / GRAPH_FILE)}))
    with pytest.raises(BundleError, match="must have the size in build"):
        _validated(bundle, "tensorrt")
    (folder / "decoder.plan").unlink()
    (folder / "build.json").unlink()
    folder.rmdir()
    add_engine(bundle, graph=other / GRAPH_FILE)
    failures = _validated(bundle, "tensorrt").failures
    assert any(line.startswith("layers.1.key") for line in failures) and any(
        line.startswith("logits") for line in failures
    )
    assert not any(line.startswith("layers.0.key") for line in failures)  # computed before the wrong scale


def test_a_runtime_that_writes_no_cache_fails(
    validated: Callable[[str], Path], tmp_path: Path, device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = broken(validated("float32"), tmp_path / "b", lambda path: None)
    add_engine(bundle, lowering="decomposed17")
    monkeypatch.setattr(TensorRtDecoder, "write_updates", lambda *arguments: None)
    failures = _validated(bundle, "tensorrt").failures
    assert any(line.startswith("layers.0.key") for line in failures) and any(
        line.startswith("logits") for line in failures
    )


def test_an_engine_gets_garbage_in_unwritten_slots(
    validated: Callable[[str], Path], tmp_path: Path, device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[TensorRtDecoder] = []
    real = TensorRtDecoder.__init__

    def remembered(self: TensorRtDecoder, *arguments: Any, **options: Any) -> None:
        real(self, *arguments, **options)
        made.append(self)

    monkeypatch.setattr(TensorRtDecoder, "__init__", remembered)
    bundle = broken(validated("float32"), tmp_path / "b", lambda path: None)
    add_engine(bundle)
    assert _validated(bundle, "tensorrt").failures == ()
    for buffer in made[0].cache.layer_in_float32(1):
        assert (buffer[:, :, 96:] == GARBAGE).all() and (buffer[:, :, :96] != GARBAGE).all()


def test_hashes_the_plan_before_it_runs(
    validated: Callable[[str], Path], tmp_path: Path, device: SimulatedDevice
) -> None:
    bundle = broken(validated("float32"), tmp_path / "b", lambda path: None)
    plan = add_engine(bundle) / "decoder.plan"
    plan.write_bytes(plan.read_bytes()[::-1])
    with pytest.raises(BundleError, match="its sha256 differs"):
        _validated(bundle, "tensorrt")


def test_rejects_an_engine_shorter_than_the_reference(
    validated: Callable[[str], Path], tmp_path: Path, device: SimulatedDevice
) -> None:
    bundle = broken(validated("float32"), tmp_path / "b", lambda path: None)
    add_engine(bundle, capacity=50)
    with pytest.raises(UsageError, match=r"engine again with --capacity"):
        _validated(bundle, "tensorrt")


def test_rejects_an_unknown_provider_and_missing_hardware(validated: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match="auto, cpu, cuda or tensorrt"):
        _validated(validated("float32"), "rocm")
    for provider in ("cuda", "tensorrt"):
        with pytest.raises(CannotRunHere):
            _validated(validated("float32"), provider)
    assert _validated(validated("float32"), "auto").provider == "cpu"


def test_evaluation_on_an_engine_equals_that_on_the_cpu(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, device: SimulatedDevice
) -> None:
    checkpoint = Path(
        shutil.copytree(
            tiny_checkpoint("llama", vocab_size=320, num_key_value_heads=4), tmp_path / "checkpoint"
        )
    )
    (checkpoint / "tokenizer.json").write_text(byte_level_tokenizer(320), encoding="utf-8")
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a cafe; everyone in it smiled. " * 20, encoding="utf-8")
    bundle = write_bundle(tmp_path / "b", load_decoder(Checkpoint(checkpoint)), dtype="float16")
    add_engine(bundle, lowering="decomposed17", capacity=40)

    def cost(provider: str, length: int = 24) -> float:
        found = evaluate(bundle, checkpoint, text, Progress(), length=length, samples=3, provider=provider)
        return found.divergence.cross_entropy

    assert cost("tensorrt") == pytest.approx(cost("cpu"), abs=1e-2)
    with pytest.raises(UsageError, match=r"--length must not exceed[\s\S]*at most 40"):
        cost("tensorrt", length=41)
    assert cost("cpu", length=41) > 0
