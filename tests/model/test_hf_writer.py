"""`kvexport compress` writes a checkpoint of the family's own class, and transformers runs it with the logits
of the converted decoder.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from support.family_cases import DEFAULTS, case_name
from support.family_settings import LINEAR, WINDOW
from support.rms_family_cases import longrope

from kvexport.build.options import BuildOptions
from kvexport.build.pipeline import compress
from kvexport.build.report import BuildReport
from kvexport.calibrate import recipe_for
from kvexport.cli import commands
from kvexport.convert import CompressionRequest
from kvexport.errors import GateFailed, KvexportError, UsageError
from kvexport.model import reference
from kvexport.model.decoder import Decoder, Layer
from kvexport.model.hf_config import HFConfig
from kvexport.model.hf_writer import HFCheckpointWriter
from kvexport.model.loader import load_decoder
from kvexport.progress import Progress

RECIPE = recipe_for("random", samples=8, length=24)
MHA = {"num_key_value_heads": 4}
DTYPE_KEYS = ("dtype", "torch_dtype")


class Notes(Progress):
    """Keeps all messages."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def note(self, text: str) -> None:
        self.messages.append(text)


def options(method: str = "fold", dtype: str = "float32", **request: Any) -> BuildOptions:
    return BuildOptions(RECIPE, CompressionRequest(**request), method=method, dtype=dtype)


class Recorder:
    """The layers that the writer got."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.layers: list[Layer] = []
        write = HFCheckpointWriter.add_layer

        def add_layer(writer: HFCheckpointWriter, layer: Layer) -> None:
            self.layers.append(layer)
            write(writer, layer)

        monkeypatch.setattr(HFCheckpointWriter, "add_layer", add_layer)

    def logits(self, source: Path, tokens: torch.Tensor) -> torch.Tensor:
        return reference.forward(dataclasses.replace(load_decoder(source), layers=self.layers), tokens)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(monkeypatch)


def random_tokens(length: int = 40) -> torch.Tensor:
    return torch.randint(67, (2, length), generator=torch.Generator().manual_seed(1))


def transformers_logits(checkpoint: Path, tokens: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    # eager attention of Falcon adds ALiBi twice
    attention = "sdpa" if config_of(checkpoint).get("alibi") else "eager"
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation=attention
    ).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(tokens, use_cache=False).logits
    return logits


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def config_of(checkpoint: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text())
    return config


def without_dtype(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in DTYPE_KEYS}


def changed_keys(source: Path, written: Path) -> dict[str, Any]:
    """Keys of the written config.json that differ from the source's, other than the data type."""
    before, after = without_dtype(config_of(source)), without_dtype(config_of(written))
    assert before.keys() <= after.keys()
    return {key: value for key, value in after.items() if key not in before or before[key] != value}


def reduced(source: Path, output: Path, progress: Progress | None = None, **changes: Any) -> BuildReport:
    heads = load_decoder(source).layers[0].attention.num_kv_heads
    return compress(source, output, options(kv_heads=heads // 2, **changes), progress or Progress())


def refusal_reason(decoder: Decoder) -> str | None:
    """What a refusal of fewer KV heads must name; None: they can be written."""
    attention = decoder.layers[0].attention
    if attention.num_kv_heads == 1:
        return "--kv-heads"
    if attention.k_norm is not None:
        return "QK-norm"
    return None if attention.clip is None else "clipped projections"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "config"),
    [
        *((family, {}) for family in sorted(DEFAULTS)),
        ("mpt", {"attn_config": {"clip_qkv": 1.0}}),
        ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
        ("stablelm", {"qk_layernorm": True, "use_parallel_residual": True}),
        ("phi", {"qk_layernorm": True}),
        ("cohere", {"use_qk_norm": True}),
    ],
    ids=case_name,
)
def test_a_copy_equals_the_original(
    tiny_checkpoint: Any, tmp_path: Path, family: str, config: dict[str, Any]
) -> None:
    source, tokens = tiny_checkpoint(family, **config), random_tokens()
    report = compress(source, tmp_path / "out", options(kv_ratio=1.0), Progress())
    assert changed_keys(source, tmp_path / "out") == {}
    theirs = transformers_logits(source, tokens)
    assert relative_error(transformers_logits(tmp_path / "out", tokens), theirs) < 1e-6
    assert report.read_back is not None
    assert report.read_back.difference < 1e-5
    assert report.read_back.transformers_difference is not None
    assert report.read_back.transformers_difference < 1e-5


@pytest.mark.parametrize("family", sorted(DEFAULTS))
def test_half_the_heads_give_the_logits_of_the_converted_decoder_or_are_refused(
    tiny_checkpoint: Any, tmp_path: Path, recorder: Recorder, family: str
) -> None:
    source, tokens, notes = tiny_checkpoint(family), random_tokens(), Notes()
    decoder = load_decoder(source)
    reason = refusal_reason(decoder)
    if reason is not None:
        with pytest.raises(UsageError, match=reason):
            reduced(source, tmp_path / "out", method="mean-pool")
        assert list(tmp_path.iterdir()) == []
        return
    report = reduced(source, tmp_path / "out", notes)
    heads = decoder.layers[0].attention.num_kv_heads // 2
    assert {layer.num_key_value_heads for layer in report.layers} == {heads}
    expected = recorder.logits(source, tokens)
    assert relative_error(transformers_logits(tmp_path / "out", tokens), expected) < 2e-5
    form = HFConfig.of_source(config_of(tmp_path / "out"))
    stored = load_decoder(tmp_path / "out").layers[0].attention.num_kv_heads
    assert form.architecture.num_kv_heads == stored
    shares = stored == heads
    assert shares or stored == heads * 2
    assert shares != any("no shared KV heads" in note for note in notes.messages)
    keys = changed_keys(source, tmp_path / "out")
    assert len(keys) == shares + (form.has_output_bias != form.of_source(config_of(source)).has_output_bias)


@pytest.mark.parametrize(
    ("family", "method", "config"),
    [
        ("llama", "mean-pool", MHA),
        ("llama", "fold", {**MHA, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("llama", "fold", {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 6}),
        ("mistral", "fold", {**MHA, "sliding_window": 7}),
        ("qwen2", "fold", {**MHA, "max_window_layers": 1, **WINDOW}),
        ("qwen2", "mean-pool", {"rope_parameters": LINEAR}),
        ("phi3", "fold", {"max_position_embeddings": 64, **longrope(16, 4), "num_key_value_heads": 4}),
        ("phi3", "fold", {"max_position_embeddings": 64, **longrope(64, 4), "sliding_window": 7}),
        ("falcon", "fold", {"new_decoder_architecture": True, "num_kv_heads": 2}),
        ("falcon", "fold", {"multi_query": False}),
        ("falcon", "fold", {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}),
        ("gpt_bigcode", "fold", {"multi_query": False}),
        ("glm4", "fold", {"num_key_value_heads": 4, "attention_bias": True}),
        ("starcoder2", "fold", {"use_bias": False, "sliding_window": 7}),
        ("smollm3", "fold", {"num_hidden_layers": 4, "no_rope_layers": [0, 1, 1, 0], **MHA}),
        ("bloom", "svd-a", {}),
        ("bloom", "auto", {}),
    ],
)
def test_transformers_gives_the_logits_of_the_converted_decoder(
    tiny_checkpoint: Any,
    tmp_path: Path,
    recorder: Recorder,
    family: str,
    method: str,
    config: dict[str, Any],
) -> None:
    source, tokens = tiny_checkpoint(family, **config), random_tokens()
    reduced(source, tmp_path / "out", method=method)
    expected = recorder.logits(source, tokens)
    assert relative_error(transformers_logits(tmp_path / "out", tokens), expected) < 2e-5


def test_the_cache_of_transformers_shrinks_and_the_window_stays(tiny_checkpoint: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = tiny_checkpoint("mistral", **MHA, sliding_window=7)
    compress(source, tmp_path / "out", options(kv_heads=1), Progress())
    assert changed_keys(source, tmp_path / "out") == {"num_key_value_heads": 1}
    assert config_of(tmp_path / "out")["model_type"] == "mistral"
    cache = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(torch.tensor([[1, 2, 3]])).past_key_values
    assert cache.layers[0].keys.shape[1] == 1


def test_biases_are_switched_on_where_the_family_has_a_key_for_them(
    tiny_checkpoint: Any, tmp_path: Path
) -> None:
    """Llama's key adds biases to q, k, v and o; Qwen2 has none on o, so that none is written."""
    for family, added in (("llama", {"q", "k", "v", "o"}), ("qwen2", set())):
        source = tiny_checkpoint(family, **MHA)
        reduced(source, tmp_path / family)
        keys = {"num_key_value_heads": 2} | ({"attention_bias": True} if added else {})
        assert changed_keys(source, tmp_path / family) == keys
        attention = load_decoder(tmp_path / family).layers[0].attention
        before = load_decoder(source).layers[0].attention
        for name in ("q", "k", "v", "o"):
            has, had = getattr(attention, name).bias is not None, getattr(before, name).bias is not None
            assert has == (had or name in added)


def test_copy_of_qwen3_keeps_its_norms_and_fewer_heads_are_refused(
    tiny_checkpoint: Any, tmp_path: Path
) -> None:
    source = tiny_checkpoint("qwen3")
    for method in ("fold", "mean-pool"):
        compress(source, tmp_path / method, options(method, kv_ratio=1.0), Progress())
        ours, theirs = (load_decoder(path).layers[1].attention for path in (tmp_path / method, source))
        assert ours.q_norm is not None and theirs.q_norm is not None
        assert ours.q_norm.weight is not None and theirs.q_norm.weight is not None
        assert ours.q_norm.weight.equal(theirs.q_norm.weight)
        with pytest.raises(UsageError, match="QK-norm") as refusal:
            compress(source, tmp_path / "none", options(method, kv_ratio=0.5), Progress())
        assert "kvexport build" in str(refusal.value)
        assert not (tmp_path / "none").exists()


def test_converts_the_result_again_and_compresses_repeated_bloom_heads_without_loss(
    tiny_checkpoint: Any, tmp_path: Path
) -> None:
    source = tiny_checkpoint("bloom")
    compress(source, tmp_path / "half", options(kv_heads=2), Progress())
    again = compress(tmp_path / "half", tmp_path / "again", options(kv_heads=2), Progress())
    assert max(layer.measured_error for layer in again.layers) < 1e-3
    tokens = random_tokens(30)
    assert torch.allclose(
        transformers_logits(tmp_path / "again", tokens),
        transformers_logits(tmp_path / "half", tokens),
        atol=2e-3,
    )


def test_writes_shards_for_a_large_model(
    tiny_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorder: Recorder
) -> None:
    monkeypatch.setattr("kvexport.model.hf_writer._SHARD_BYTES", 6000)
    source, tokens = tiny_checkpoint("llama", **MHA), random_tokens()
    compress(source, tmp_path / "out", options(kv_heads=2), Progress())
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    expected = recorder.logits(source, tokens)
    assert relative_error(transformers_logits(tmp_path / "out", tokens), expected) < 2e-5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_narrow_weights_are_compared_as_they_are_stored(
    tiny_checkpoint: Any, tmp_path: Path, family: str, dtype: str
) -> None:
    report = reduced(tiny_checkpoint(family), tmp_path / "out", dtype=dtype)
    assert report.read_back is not None and report.read_back.difference < 1e-5
    config = config_of(tmp_path / "out")
    assert [config[key] for key in DTYPE_KEYS if key in config] == [dtype]


def test_remote_code_is_kept_with_its_files_and_dropped_without_them(
    tiny_checkpoint: Any, edit_checkpoint: Any, tmp_path: Path
) -> None:
    auto_map = {"AutoModelForCausalLM": "modeling_own.Model", "AutoConfig": "hub/repo--configuration.Config"}
    source, notes = edit_checkpoint(tiny_checkpoint("llama"), config={"auto_map": auto_map}), Notes()
    compress(source, tmp_path / "without", options(kv_ratio=1.0), notes)
    assert "auto_map" not in config_of(tmp_path / "without")
    assert any("modeling_own.py" in note for note in notes.messages)
    (source / "modeling_own.py").write_text("class Model: ...\n")
    compress(source, tmp_path / "with", options(kv_ratio=1.0), Progress())
    assert config_of(tmp_path / "with")["auto_map"] == auto_map
    assert (tmp_path / "with" / "modeling_own.py").read_text() == "class Model: ...\n"


def _drop(held: dict[str, torch.Tensor]) -> None:
    del held["model.layers.1.mlp.up_proj.weight"]


def _swap(held: dict[str, torch.Tensor]) -> None:
    one, other = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"
    held[one], held[other] = held[other], held[one]


@pytest.mark.parametrize(
    ("damage", "says"), [(_drop, "must be readable"), (_swap, "the logits of the converted model")]
)
def test_a_writer_that_drops_or_swaps_tensors_fails_the_gate(
    tiny_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Any, says: str
) -> None:
    def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
        damage(tensors)
        original(tensors, path)

    from kvexport.files.safetensors_io import save_tensors as original

    monkeypatch.setattr("kvexport.model.hf_writer.save_tensors", save)
    with pytest.raises(GateFailed, match=says) as failure:
        reduced(tiny_checkpoint("llama"), tmp_path / "out")
    assert failure.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_the_command_reports_the_comparison_and_exits_with_1_where_it_fails(
    tiny_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["compress", tiny_checkpoint("mistral"), "-o", tmp_path / "out", "--calibration", "random"]
    arguments += ["--samples", 4, "--length", 16]

    def run() -> Any:
        return CliRunner().invoke(commands, [str(each) for each in arguments])

    done = run()
    assert done.exit_code == 0
    assert "read back: ok (logits within" in done.output and "with transformers" in done.output
    (tmp_path / "out").rename(tmp_path / "first")
    monkeypatch.setattr("kvexport.build.read_back.TOLERANCE", -1.0)
    failed = run()
    assert isinstance(failed.exception, GateFailed)
    assert [path.name for path in tmp_path.iterdir()] == ["first"]


def test_tensors_under_a_wrappers_prefix_get_the_names_of_the_family(
    tiny_checkpoint: Any, edit_checkpoint: Any, tmp_path: Path
) -> None:
    def rename(held: dict[str, torch.Tensor]) -> None:
        for name in list(held):
            held[f"language_model.{name}"] = held.pop(name)

    source = tiny_checkpoint("qwen2")
    compress(edit_checkpoint(source, tensors=rename), tmp_path / "out", options(kv_ratio=1.0), Progress())
    tokens = random_tokens()
    theirs = transformers_logits(source, tokens)
    assert relative_error(transformers_logits(tmp_path / "out", tokens), theirs) < 1e-6


def test_a_config_that_transformers_reads_otherwise_fails_the_gate(
    tiny_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our reader ignores `rms_norm_eps` here, as a wrong family description would."""
    source = tiny_checkpoint("llama", rms_norm_eps=0.5)
    load = load_decoder(source)
    norm = load.final_norm
    assert norm is not None and norm.eps == 0.5

    from kvexport.model.layout import Layout

    real = Layout._norm

    def other(self: Layout, *args: Any) -> Any:
        made = real(self, *args)
        return None if made is None else dataclasses.replace(made, eps=1e-6)

    monkeypatch.setattr(Layout, "_norm", other)
    with pytest.raises(GateFailed, match="transformers must give the logits"):
        reduced(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_says_that_transformers_was_not_compared(
    tiny_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = Notes()
    monkeypatch.setattr("kvexport.build.read_back.find_spec", lambda name: None)
    report = reduced(tiny_checkpoint("llama"), tmp_path / "out", notes)
    assert report.read_back is not None and report.read_back.transformers is None
    assert any("not compared with transformers" in note for note in notes.messages)


def test_parts_that_the_family_cannot_store_are_errors(tiny_checkpoint: Any, tmp_path: Path) -> None:
    source = tiny_checkpoint("qwen2")
    decoder, form = load_decoder(source), HFConfig.of_source(config_of(source))
    layer = decoder.layers[0]
    bias = torch.zeros(layer.attention.o.weight.shape[0])
    o = dataclasses.replace(layer.attention.o, bias=bias)
    biased = dataclasses.replace(layer, attention=dataclasses.replace(layer.attention, o=o))
    with pytest.raises(KvexportError, match="no others") as error:
        HFCheckpointWriter(tmp_path, form, decoder, torch.float32).add_layer(biased)
    assert "o_proj.bias" in str(error.value)
    writer = HFCheckpointWriter(tmp_path, form, decoder, torch.float32)
    writer.add_layer(layer)
    with pytest.raises(KvexportError, match="all tensors"):
        writer.finish()


@pytest.mark.parametrize(
    ("family", "config", "method", "says"),
    [
        ("llama", MHA, "online", "--method fold"),
        ("llama", MHA, "auto", "--method fold"),
        ("llama", MHA, "svd-a", "--method fold"),
        ("qwen3", {}, "fold", "kvexport build"),
        ("qwen3", {}, "online", "kvexport build"),
    ],
)
def test_rejects_conversions_that_need_a_bundle_before_any_work(
    tiny_checkpoint: Any, tmp_path: Path, family: str, config: dict[str, Any], method: str, says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        compress(tiny_checkpoint(family, **config), tmp_path / "out", options(method, kv_heads=1), Progress())
    assert list(tmp_path.iterdir()) == []


def test_float16_overflow_error_names_the_tensor(
    tiny_checkpoint: Any, edit_checkpoint: Any, tmp_path: Path
) -> None:
    source = edit_checkpoint(
        tiny_checkpoint("llama", **MHA), tensors=lambda held: held["model.norm.weight"].fill_(1e5)
    )
    with pytest.raises(UsageError, match=r"model\.norm\.weight"):
        compress(source, tmp_path / "out", options(kv_heads=2, dtype="float16"), Progress())
    assert not (tmp_path / "out").exists()
