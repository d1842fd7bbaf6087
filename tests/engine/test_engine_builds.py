"""TensorRT-RTX builds every family, method and form of attention; no GPU is needed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from support.combinations import representatives
from support.decoders import STYLES, make_decoder
from support.tiny_bundles import decoder_with_fewer_heads, write_bundle
from support.validated_bundles import broken, export

from kvexport import __version__
from kvexport.bundle import GRAPH_FILE, Bundle
from kvexport.bundle.engine_record import PLAN_FILE, RECORD_FILE, BuildRecord
from kvexport.convert.methods import METHODS
from kvexport.devices.gpu import find_gpu
from kvexport.engine import EngineOptions, build_engine, engine_directory, read_record
from kvexport.engine.plan import inspect_plan
from kvexport.errors import BundleError, CannotRunHere, UsageError
from kvexport.files.hashing import sha256_of
from kvexport.progress import Progress

pytestmark = pytest.mark.tensorrt

SMS = ("8.6", "8.9", "12.0")
NATIVE = ("KV_CACHE_UPDATE", "ATTENTION_INPUT", "ATTENTION_OUTPUT", "ROTARY_EMBEDDING")


class Notes(Progress):
    """Collect notes, and count steps."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps = 0

    def note(self, text: str) -> None:
        self.notes.append(text)

    def advance(self) -> None:
        self.steps += 1


def built(bundle: Path, progress: Progress | None = None, **options: Any) -> BuildRecord:
    return build_engine(
        bundle, EngineOptions(chunk=16, **options), compute_capabilities=SMS, progress=progress
    )


def native(record: BuildRecord) -> list[int]:
    """Number of cache updates, attentions and rotations in the parsed network."""
    updates, begun, ended, rotations = (record.layers.get(name, 0) for name in NATIVE)
    assert begun == ended
    return [updates, begun, rotations]


def require_native(record: BuildRecord, style: str) -> None:
    """A cache update for each cache, an attention for each layer, a rotation if any; nothing decomposed."""
    assert native(record) == [4, 2, 0 if style == "bloom" else 4]
    assert record.decomposed == ()


@pytest.mark.slow
@pytest.mark.parametrize("style", STYLES)
def test_every_family_builds_with_native_and_fused_layers(
    style: str, rtx: Any, tiny: Callable[..., Path]
) -> None:
    notes = Notes()
    record = built(tiny(style, kv_heads=2), notes)
    require_native(record, style)
    assert (record.lowering, notes.notes) == ("std24", [])
    assert notes.steps > 50  # steps come from TensorRT's progress monitor


@pytest.mark.slow
@pytest.mark.parametrize("style", ["llama", "bloom"])
def test_decomposed17_builds(style: str, rtx: Any, tiny: Callable[..., Path]) -> None:
    record = built(tiny(style, kv_heads=2), lowering="decomposed17")
    assert (record.lowering, native(record)) == ("decomposed17", [0, 0, 0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("style", "method", "dtype", "lowering"),
    representatives(
        list(STYLES),
        list(METHODS),
        list(product(("float16", "bfloat16"), ("std24", "decomposed17"))),
        cover=(1, 2),
        without=[("qwen3", "fold")],
    ),
)
def test_every_method_builds(
    style: str, method: str, dtype: str, lowering: str, rtx: Any, tmp_path: Path
) -> None:
    """For SM86, SM89 and SM120 in one plan, in float16 and bfloat16."""
    decoder = make_decoder(style, kv_heads=4, head_dim=16, dtype=torch.float32)
    export(tmp_path / "bundle", decoder, dtype=dtype, kv_heads=2, method=method, capacity=64)
    record = built(tmp_path / "bundle", lowering=lowering)
    assert record.compute_capability == SMS and record.plan.bytes > 0
    if lowering == "std24":
        require_native(record, style)


def test_record_describes_the_build(rtx: Any, tiny: Callable[..., Path]) -> None:
    bundle = tiny(dtype="bfloat16", capacity=64)
    record = build_engine(bundle, EngineOptions(capacity=40, chunk=8, batch=2), target="rtx-4090")
    folder = engine_directory(bundle, "rtx-4090")
    assert read_record(folder) == record
    plan = folder / PLAN_FILE
    assert (record.plan.sha256, record.plan.bytes) == (sha256_of(plan), plan.stat().st_size)
    assert (record.kvexport, record.manifest_sha256) == (__version__, Bundle.open(bundle).digest)
    assert (record.engine, record.version, record.compute_capability) == (
        "tensorrt-rtx",
        rtx.trt.__version__,
        ("8.9",),
    )
    assert (record.dtype, record.batch, record.capacity, record.chunk) == ("bfloat16", 2, 40, 8)
    assert [(profile.name, profile.sequence) for profile in record.profiles] == [
        ("decode", (1, 1, 2)),
        ("prefill", (1, 8, 8)),
    ]
    assert record.weights_bytes == (bundle / "decoder.onnx.data").stat().st_size
    assert record.peak_host_bytes > record.plan.bytes and record.seconds > 0
    if find_gpu() is None:
        assert record.activation_bytes is None and inspect_plan(rtx, plan.read_bytes()) is None
        assert {file.name for file in folder.iterdir()} == {PLAN_FILE, RECORD_FILE}
    assert json.loads((folder / RECORD_FILE).read_text()) == json.loads(json.dumps(record.to_json()))


def test_network_has_the_profiles_and_sizes_of_the_contract(rtx: Any, tiny: Callable[..., Path]) -> None:
    """Capacity and batch of the parsed network are fixed; the two token sizes are not."""
    from kvexport.bundle.engine_record import Profile
    from kvexport.engine.engine_graph import prepare_graph
    from kvexport.engine.plan import create_profile, parse
    from kvexport.graph.lint import Parser

    bundle = tiny(kv_heads=2)
    fitted = prepare_graph(bundle / GRAPH_FILE, Parser(rtx.engine, rtx.version), batch=1, capacity=48)
    _, network, _parser = parse(rtx, fitted.model, bundle / GRAPH_FILE)
    shapes = {
        tensor.name: tuple(tensor.shape) for tensor in map(network.get_input, range(network.num_inputs))
    }
    assert shapes["input_ids"] == shapes["position_ids"] == shapes["logits_index"] == (1, -1)
    assert shapes["write_indices"] == (1,) and shapes["past_key_values.1.value"] == (1, 2, 48, 16)
    profile = create_profile(network, Profile("prefill", (1, 8, 16)))
    assert set(profile) == {"input_ids", "position_ids", "logits_index"}
    assert list(profile["input_ids"]) == [(1, 1), (1, 8), (1, 16)]
    assert list(profile["logits_index"]) == [(1, 1), (1, 1), (1, 16)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("style", "width", "dtype", "expected", "words"),
    [
        ("llama", 264, "float16", ("std24", 2), "no fused attention kernel for heads of 264"),
        ("llama", 8, "bfloat16", ("std24", 2), "no fused attention kernel for heads of 8"),
        ("llama", 16, "float32", ("std24", 2), "no fused attention kernel takes FLOAT"),
        ("llama", 36, "float16", ("decomposed17", 0), "heads of 36 with a bool mask"),
        ("bloom", 36, "float16", ("std24", 2), "no fused attention kernel for heads of 36"),
    ],
)
def test_attention_without_a_kernel_is_decomposed_with_a_note(
    style: str,
    width: int,
    dtype: str,
    expected: tuple[str, int],
    words: str,
    rtx: Any,
    tiny: Callable[..., Path],
) -> None:
    notes = Notes()
    record = built(tiny(style, dtype=dtype, head_dim=width), notes)
    assert (record.lowering, len(record.decomposed)) == expected
    (note,) = notes.notes
    assert words in note


@pytest.mark.parametrize("width", [264, 8])
def test_attention_without_a_kernel_and_without_the_attribute_does_not_build(
    width: int, rtx: Any, tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: without TRT_decomposable, attention without a kernel does not build."""
    monkeypatch.setattr("kvexport.engine.build.find_unfused_attention", lambda *arguments: [])
    monkeypatch.setattr("kvexport.engine.preflight.require_operators", lambda *arguments: None)
    bundle = tiny(head_dim=width)
    with pytest.raises(CannotRunHere) as caught:
        built(bundle, lowering="std24")
    assert "could not build this engine" in str(caught.value)
    assert "dedicated kernel" in str(caught.value) and "--lowering decomposed17" in str(caught.value)
    assert not (bundle / "engines").exists()


@pytest.mark.slow
def test_unequal_widths_fall_back_to_decomposed17(
    rtx: Any, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Keys of 12 and values of 16: TensorRT's attention layer has one width."""
    decoder = decoder_with_fewer_heads(tiny_checkpoint("llama", num_key_value_heads=4))
    bundle = write_bundle(tmp_path / "bundle", decoder, dtype="float16")
    notes = Notes()
    assert built(bundle, notes).lowering == "decomposed17"
    assert "keys are 12 wide and values 16" in notes.notes[0]
    with pytest.raises(UsageError, match="keys are 12 wide and values 16"):
        build_engine(bundle, EngineOptions(lowering="std24"), compute_capabilities=("8.9",))


def test_no_nonstandard_attribute_is_written_to_a_file(rtx: Any, tiny: Callable[..., Path]) -> None:
    bundle = tiny(head_dim=264)
    before = {file.name: sha256_of(file) for file in bundle.iterdir()}
    assert len(built(bundle).decomposed) == 2
    assert {file.name: sha256_of(file) for file in bundle.iterdir() if file.is_file()} == before


@pytest.mark.slow
def test_an_existing_engine_is_replaced_only_by_force(rtx: Any, tiny: Callable[..., Path]) -> None:
    bundle = tiny()
    first = built(bundle)
    with pytest.raises(UsageError, match="must not exist yet") as caught:
        built(bundle)
    assert "--force" in str(caught.value)
    second = build_engine(bundle, EngineOptions(chunk=8), compute_capabilities=SMS, force=True)
    assert (first.chunk, second.chunk) == (16, 8)
    assert read_record(engine_directory(bundle, first.target)) == second


def test_a_failed_replacement_leaves_the_old_engine(rtx: Any, tiny: Callable[..., Path]) -> None:
    bundle = tiny()
    first = built(bundle)
    with pytest.raises(CannotRunHere, match="workspace"):
        build_engine(bundle, EngineOptions(workspace=1, chunk=64), compute_capabilities=SMS, force=True)
    assert read_record(engine_directory(bundle, first.target)) == first
    assert [entry.name for entry in (bundle / "engines").iterdir()] == [first.target]


def test_options_reach_tensorrt(rtx: Any, tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import kvexport.engine.plan as plan

    configs: list[Any] = []
    original = plan.create_config
    monkeypatch.setattr(
        plan, "create_config", lambda *arguments: configs.append(original(*arguments)) or configs[0]
    )
    build_engine(
        tiny(),
        EngineOptions(workspace=256, optimization_level=1, chunk=8),
        compute_capabilities=("8.6", "12.0"),
    )
    (config,), trt = configs, rtx.trt
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 256 << 20
    assert config.num_optimization_profiles == 2
    capabilities = [config.get_compute_capability(index) for index in range(config.num_compute_capabilities)]
    assert capabilities == [trt.ComputeCapability.SM86, trt.ComputeCapability.SM120]
    assert not config.get_flag(trt.BuilderFlag.TF32) and not config.get_flag(trt.BuilderFlag.REFIT)


@pytest.mark.parametrize("damage", ["graph", "weights"])
def test_rejects_a_damaged_bundle(damage: str, rtx: Any, tiny: Callable[..., Path]) -> None:
    bundle = tiny()
    file = bundle / {"graph": "decoder.onnx", "weights": "decoder.onnx.data"}[damage]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(BundleError, match="sha256 differs"):
        built(bundle)
    assert not (bundle / "engines").exists()


def test_error_of_the_parser_is_shown(rtx: Any, tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Damage that neither hashes nor lint detect."""

    def transpose(path: Path) -> None:
        model = ir.load(path / GRAPH_FILE)
        node = next(node for node in model.graph if node.name == "layers.0.attention.q.by_head")
        node.attributes["perm"] = ir.AttrInt64s("perm", [0, 1, 3, 2])
        ir.save(model, path / GRAPH_FILE)

    bundle = broken(tiny(), tmp_path / "broken", transpose)
    with pytest.raises(CannotRunHere, match="could not import the graph") as caught:
        built(bundle)
    assert "layers.0.attention" in str(caught.value)
    assert not (bundle / "engines").exists()


@pytest.mark.slow
def test_configuration_of_tensorrt_with_timing_cache_and_flags(
    rtx: Any, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """TensorRT-RTX in place of TensorRT: the timing cache is written and read; flags are set by name."""
    from kvexport.bundle.engine_record import Profile
    from kvexport.engine.destination import Destination
    from kvexport.engine.engine_graph import prepare_graph
    from kvexport.engine.monitor import BuildMonitor
    from kvexport.engine.plan import build_plan, create_config, parse
    from kvexport.graph.lint import Parser

    bundle = tiny()
    library = dataclasses.replace(rtx, engine="tensorrt")
    orin = Destination("orin-nano-8gb", "tensorrt", ("8.7",), False)
    fitted = prepare_graph(bundle / GRAPH_FILE, Parser("tensorrt", (11, 4)), batch=1, capacity=64)
    profiles = (Profile("decode", (1, 1, 1)), Profile("prefill", (1, 8, 8)))
    cache = b""
    for _ in range(2):
        monitor = BuildMonitor(library.trt, Progress()).monitor
        plan = build_plan(
            library, fitted.model, bundle / GRAPH_FILE, profiles, EngineOptions(), orin, cache, monitor
        )
        assert plan.timing_cache and plan.layers["KV_CACHE_UPDATE"] == 4
        cache = plan.timing_cache
    options = EngineOptions(refit=True, version_compatible=True)
    builder, network, _parser = parse(library, fitted.model, bundle / GRAPH_FILE)
    config, flags = (
        create_config(library, builder, network, profiles, options, orin, b"", monitor),
        rtx.trt.BuilderFlag,
    )
    assert all(
        config.get_flag(flag) for flag in (flags.STRIP_PLAN, flags.REFIT_IDENTICAL, flags.VERSION_COMPATIBLE)
    )
    assert config.max_aux_streams == 0
    assert config.get_flag(flags.REQUIRE_USER_ALLOCATION)  # which TensorRT-RTX alone has
