"""What does not fit a dense decoder is refused by the name of the feature, in the same words everywhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import run_kvexport
from support.family_cases import CASES, DEFAULTS, SIZES, case_name

from kvexport.errors import CheckpointError
from kvexport.model.architecture import read_architecture
from kvexport.model.families import families
from kvexport.model.loader import load_decoder
from kvexport.model.unsupported import FEATURES, require_dense_decoder

TEXT = {**SIZES, "rms_norm_eps": 1e-6, "hidden_act": "silu"}  # for any model type

# name of the feature, and the settings by which published models show it
REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("a mixture of experts", {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}),
    ("a mixture of experts", {"model_type": "qwen3_moe", "num_experts": 128, "moe_intermediate_size": 768}),
    ("a mixture of experts", {"model_type": "gpt_oss", "num_local_experts": 32}),
    ("a mixture of experts", {"model_type": "olmoe", "num_experts": 64}),
    ("a mixture of experts", {"model_type": "granitemoe", "num_local_experts": 40}),
    ("a mixture of experts", {"model_type": "dbrx", "ffn_config": {"moe_num_experts": 16}}),
    ("a mixture of experts", {"model_type": "hunyuan", "num_experts": [16, 16]}),
    ("a mixture of experts", {"model_type": "llama", "num_experts": 4}),
    ("a mixture of experts", {"model_type": "deepseek_v3", "kv_lora_rank": 512, "n_routed_experts": 256}),
    ("latent attention", {"model_type": "minicpm3", "kv_lora_rank": 256}),
    ("latent attention", {"model_type": "deepseek_v2", "kv_lora_rank": 512, "n_routed_experts": None}),
    ("recurrent or convolutional layers", {"model_type": "mamba", "state_size": 16}),
    ("recurrent or convolutional layers", {"model_type": "rwkv", "attention_hidden_size": 4096}),
    ("recurrent or convolutional layers", {"model_type": "rwkv7"}),
    ("recurrent or convolutional layers", {"model_type": "jamba", "attn_layer_period": 8, "num_experts": 1}),
    (
        "recurrent or convolutional layers",
        {"model_type": "recurrent_gemma", "block_types": ["recurrent", "recurrent", "attention"]},
    ),
    (
        "recurrent or convolutional layers",
        {"model_type": "qwen3_5_text", "layer_types": ["linear_attention", "full_attention"]},
    ),
    ("recurrent or convolutional layers", {"model_type": "lfm2", "layer_types": ["conv", "full_attention"]}),
    ("recurrent or convolutional layers", {"model_type": "nemotron_h", "hybrid_override_pattern": "M-M*-"}),
    ("recurrent or convolutional layers", {"model_type": "falcon_h1", "mamba_d_ssm": 1536}),
    ("recurrent or convolutional layers", {"model_type": "granitemoehybrid", "layer_types": ["mamba"]}),
    ("KV caches that layers share", {"model_type": "gemma3n_text", "num_kv_shared_layers": 15}),
    ("embeddings for each layer", {"model_type": "gemma4_text", "hidden_size_per_layer_input": 256}),
    ("a separate encoder", {"model_type": "t5", "is_encoder_decoder": True}),
    ("a separate encoder", {"model_type": "whisper", "is_encoder_decoder": True}),
    ("a separate encoder", {"model_type": "gpt2", "add_cross_attention": True}),
    ("bidirectional attention", {"model_type": "bert", "architectures": ["BertForMaskedLM"]}),
    ("bidirectional attention", {"model_type": "xlm-roberta"}),
    ("bidirectional attention", {"model_type": "gemma3_text", "use_bidirectional_attention": True}),
    ("bidirectional attention", {"model_type": "qwen2", "is_causal": False}),
    ("bidirectional attention", {"model_type": "llada", "architectures": ["LLaDAModelLM"]}),
    ("bidirectional attention", {"model_type": "Dream"}),
    ("a head other than", {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}),
    ("layers of different sizes", {"model_type": "nemotron-nas", "block_configs": [{"attention": {}}]}),
    ("layers of different sizes", {"model_type": "openelm", "num_kv_heads": [3, 4]}),
    ("attention sinks", {"model_type": "mimo", "add_swa_attention_sink_bias": True}),
    ("sparse attention", {"model_type": "minicpm", "sparse_config": {"topk": 64}}),
    ("parts for images or sound", {"model_type": "phi4mm", "vision_config": {"depth": 2}}),
    ("a mixture of experts", {"model_type": "llama4", "text_config": {"num_local_experts": 16}}),
    (
        "KV caches",
        {"model_type": "gemma3n", "text_config": {"num_kv_shared_layers": 10}, "vision_config": {}},
    ),
]


def refusal(config: dict[str, Any]) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        read_architecture(config)
    return caught.value


@pytest.mark.parametrize(("name", "settings"), REFUSED, ids=lambda each: str(each)[:50])
def test_names_the_feature_its_setting_and_the_advice(name: str, settings: dict[str, Any]) -> None:
    error = refusal({**TEXT, **settings})
    assert error.what.startswith(f"the model must not have {name}")
    assert error.fix
    # the control: without the feature's settings, no feature is named
    assert "must not have" not in refusal({**TEXT, "model_type": "unknown"}).what


def test_every_feature_of_the_table_is_tested() -> None:
    tested = {refusal({**TEXT, **settings}).what for _, settings in REFUSED}
    assert tested == {f"the model must not have {each.name}: {each.reason}" for each in FEATURES}


@pytest.mark.parametrize(
    "settings",
    [
        {"num_experts": 1, "num_local_experts": 0, "n_routed_experts": None},
        {"kv_lora_rank": None, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0},
        {"mamba_d_state": 256, "layer_types": ["attention", "attention"]},  # Granite 4 without Mamba layers
        {"is_encoder_decoder": False, "add_cross_attention": False, "is_causal": True},
        {"use_bidirectional_attention": False, "text_config": None, "vision_config": None},
        {"architectures": ["LlamaModel"]},
        {"architectures": None},
    ],
    ids=str,
)
def test_settings_that_switch_a_feature_off_are_accepted(settings: dict[str, Any]) -> None:
    require_dense_decoder({**TEXT, "model_type": "llama", **settings})


@pytest.mark.parametrize(("family", "config"), CASES, ids=case_name)
def test_accepts_every_supported_model(family: str, config: dict[str, Any]) -> None:
    from transformers import AutoConfig

    require_dense_decoder(AutoConfig.for_model(family, **{**DEFAULTS[family], **config}).to_dict())


def test_order_of_advice(tmp_path: Path) -> None:
    """A feature, then the family, then quantisation, then a pickle."""
    config: dict[str, Any] = {**TEXT, "model_type": "other", "num_experts": 8}
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (tmp_path / "pytorch_model.bin").touch()

    def what() -> str:
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError) as caught:
            load_decoder(tmp_path)
        return caught.value.what

    assert "a mixture of experts" in what()
    del config["num_experts"]
    assert "must be of a supported family" in what()
    config["model_type"] = "llama"
    assert "must be in a format that can be read" in what()
    del config["quantization_config"]
    assert "reading a pickle can run code" in what()


def test_a_known_class_gives_the_model_type() -> None:
    error = refusal({**TEXT, "model_type": "my_llama", "architectures": ["LlamaForCausalLM"]})
    assert error.what == "model_type in config.json must be of a supported family"
    assert error.fix == 'set model_type to "llama", the family of the class that architectures names'
    for architectures in (["OtherForCausalLM"], ["ForCausalLM"], ["LlamaModel"], [], [1], "Llama", None):
        error = refusal({**TEXT, "model_type": "my_llama", "architectures": architectures})
        assert error.fix is not None and "one new file" in error.fix


ODD: list[dict[str, Any]] = [
    {"model_type": "unknown"},
    {"model_type": "llama", "rope_scaling": {"type": "other"}},
    {"model_type": "llama", "num_hidden_layers": 10**9},
    {"model_type": "llama", "quantization_config": {"quant_method": "gptq"}},
    {"model_type": "llava", "text_config": {"model_type": "llama"}},
]


@pytest.mark.parametrize(
    "settings", [*(settings for _, settings in REFUSED), *ODD], ids=lambda x: str(x)[:50]
)
def test_plan_build_and_compress_refuse_in_the_same_words(settings: dict[str, Any], tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({**TEXT, **settings}))
    expected = str(refusal({**TEXT, **settings}))
    for command in (
        ("plan", model),
        ("build", model, "-o", tmp_path / "b"),
        ("compress", model, "-o", tmp_path / "c"),
    ):
        code, out, err = run_kvexport(*command)
        assert (code, out) == (2, "")
        assert expected in err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# Models for several media


def test_says_whether_the_text_part_is_supported() -> None:
    config = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "vision_config": {}}
    error = refusal({**config, "text_config": {"model_type": "llama"}})
    assert "the checkpoint must be a text model" in error.what
    assert "'llava'" in str(error.got) and "model_type = 'llama', which is supported" in str(error.got)
    assert error.fix is not None and "import LlavaForConditionalGeneration as M" in error.fix
    error = refusal({**config, "text_config": {"model_type": "qwen2_vl_text"}})
    assert "'qwen2_vl_text', which is not supported" in str(error.got)
    assert error.fix is not None and "import" not in error.fix
    nested = {"model_type": "omni", "thinker_config": {"text_config": {"model_type": "qwen3"}}}
    assert "'qwen3', which is supported" in str(refusal(nested).got)


def test_a_class_name_in_the_advice_is_an_identifier() -> None:
    config = {"model_type": "x", "architectures": ["os; import evil"], "text_config": {"model_type": "llama"}}
    fix = refusal(config).fix
    assert fix is not None and "evil" not in fix and "AutoModelForImageTextToText as M" in fix


_VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_IMAGES = {"image_size": 28, "patch_size": 14}


@pytest.mark.slow
@pytest.mark.parametrize(("wrapper", "text"), [("gemma3", "gemma3_text"), ("llava", "llama")])
def test_the_advice_saves_a_text_part_with_the_same_logits(tmp_path: Path, wrapper: str, text: str) -> None:
    from transformers import AutoConfig, AutoModelForImageTextToText

    from kvexport.model import reference

    if text not in families():
        pytest.skip(f"{text} is not supported")
    vision = {**_VISION, **_IMAGES, **({"model_type": "clip_vision_model"} if wrapper == "llava" else {})}
    tokens = {"mm_tokens_per_image": 4, "image_token_index": 60}
    config = AutoConfig.for_model(
        wrapper, text_config={"model_type": text, "head_dim": 8, **SIZES}, vision_config=vision, **tokens
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    model.save_pretrained(tmp_path / "CHECKPOINT")
    tokenizer = Path(__file__).parents[2] / "models" / "demo"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (tokenizer / name).exists():
            (tmp_path / "CHECKPOINT" / name).write_bytes((tokenizer / name).read_bytes())
    message = str(refusal(json.loads((tmp_path / "CHECKPOINT" / "config.json").read_text())))
    command = message.partition("python -c ")[2]
    subprocess.run(
        ["bash", "-c", f"{sys.executable} -c {command}"], cwd=tmp_path, check=True, capture_output=True
    )
    assert (tmp_path / "TEXT" / "tokenizer.json").exists()
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        theirs = model(input_ids=ids).logits
    ours = reference.forward(load_decoder(tmp_path / "TEXT"), ids)
    assert torch.allclose(ours, theirs, atol=1e-5)
