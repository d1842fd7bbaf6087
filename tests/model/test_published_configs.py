"""config.json of published models is read as its authors mean it."""

from __future__ import annotations

from typing import Any

import pytest
from support.published_models import MODELS, Model, by_type

from kvexport.errors import CheckpointError
from kvexport.model.architecture import Architecture, read_architecture


@pytest.mark.parametrize("name", MODELS)
def test_published_config(name: str) -> None:
    model = MODELS[name]
    read = read_architecture(model.json())
    hidden, intermediate, layers, heads, kv_heads = model.sizes
    assert (read.hidden_size, read.intermediate_size, read.num_heads, read.num_kv_heads) == (
        hidden,
        intermediate,
        heads,
        kv_heads,
    )
    assert (read.rotary_dim, read.max_positions, read.tied) == (
        model.rotary_dim,
        model.max_positions,
        model.tied,
    )
    scale = read.head_dim**-0.5 if model.scale is None else model.scale
    assert read.scale == pytest.approx(scale, rel=1e-12)
    windows = [None if index in model.full else model.window for index in range(layers)]
    assert [each.window for each in read.layers] == windows
    still = tuple(index for index, each in enumerate(read.layers) if each.rope is None)
    assert still == model.still
    assert_rope(read, model)
    for attribute, value in model.others.items():
        assert getattr(read, attribute) == pytest.approx(value)


def assert_rope(read: Architecture, model: Model) -> None:
    for index, layer in enumerate(read.layers):
        if layer.rope is None:
            continue
        is_local = model.local_theta is not None and index not in model.full
        theta = model.local_theta if is_local else model.theta
        assert layer.rope.theta == pytest.approx(theta, rel=1e-12)
        unscaled = is_local or (model.model_type == "olmo3" and index not in model.full)
        assert layer.rope.kind == ("default" if unscaled else model.kind)


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in MODELS
        if MODELS[name].model_type not in ("chatglm", "exaone", "minicpm", "internlm", "internlm2")
    ],
)
def test_transformers_reads_the_same(name: str) -> None:
    from transformers import AutoConfig

    json = MODELS[name].json()
    theirs, read = AutoConfig.for_model(**json), read_architecture(json)
    assert theirs.tie_word_embeddings == read.tied
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert (head_dim, theirs.num_key_value_heads) == (read.head_dim, read.num_kv_heads)
    for key in ("rms_norm_eps", "norm_eps"):
        assert getattr(theirs, key, read.norm_eps) == read.norm_eps
    types = getattr(theirs, "layer_types", None)
    if types is not None:
        windows = [each == "sliding_attention" for each in types]
        assert [each.window is not None for each in read.layers] == windows


@pytest.mark.parametrize(
    ("name", "without"),
    [
        ("EXAONE-4-32B", "layer_types"),  # sliding_window_pattern says it
        ("OLMo-3-7B", "layer_types"),
        ("Gemma-2-2B", "sliding_window"),
        ("Gemma-2-2B", "attn_logit_softcapping"),
        ("Gemma-2-2B", "query_pre_attn_scalar"),
        ("Gemma-3-1B", "sliding_window_pattern"),
        ("Gemma-3-1B", "rope_local_base_freq"),
        ("Gemma-3-1B", "rope_theta"),
        ("Qwen3-0.6B", "head_dim"),
        ("SmolLM3-3B", "no_rope_layers"),
        ("GLM-4-9B-chat-hf", "partial_rotary_factor"),
        ("Nemotron-Mini-4B", "partial_rotary_factor"),
        ("ERNIE-4.5-0.3B", "rope_theta"),
    ],
)
def test_absent_key_has_the_default_of_its_class(name: str, without: str) -> None:
    json = MODELS[name].json()
    shorter = {key: value for key, value in json.items() if key != without}
    assert len(shorter) == len(json) - 1
    read, whole = read_architecture(shorter), read_architecture(json)
    assert (read.layers, read.scale, read.softcap) == (whole.layers, whole.scale, whole.softcap)
    assert (read.head_dim, read.rotary_dim) == (whole.head_dim, whole.rotary_dim)


def test_window_without_layer_types_is_refused_where_no_rule_gives_them() -> None:
    config = {"sliding_window": 8192, "max_position_embeddings": 131072, "head_dim": 128}
    cwm = Model("cwm", (6144, 21504, 64, 48, 8), 128, 131072, config).json()
    with pytest.raises(CheckpointError, match="must have layer_types"):
        read_architecture(cwm)
    types = by_type(64, tuple(range(0, 64, 4)))
    read = read_architecture({**cwm, "layer_types": types})
    assert [each.window for each in read.layers[:5]] == [None, 8192, 8192, 8192, None]
    ministral = read_architecture({**cwm, "model_type": "ministral"})  # all layers have it
    assert {each.window for each in ministral.layers} == {8192}


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("Gemma-2B", {"hidden_act": "relu"}, "hidden_act"),
        ("Gemma-3-1B", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (
            "Gemma-3-1B",
            {
                "rope_parameters": {
                    "full_attention": {"rope_theta": 1e6, "partial_rotary_factor": 0.5},
                    "sliding_attention": {"rope_theta": 1e4},
                }
            },
            "128 of 256 in full_attention, 256 of 256 in sliding_attention",
        ),
        # its class would ignore it
        ("Qwen3-0.6B", {"partial_rotary_factor": 0.5}, "'qwen3' rotates whole heads"),
        ("Hunyuan-1.8B", {"use_cla": True}, "use_cla"),
        ("SmolLM3-3B", {"use_sliding_window": True}, "use_sliding_window"),
        ("MiniCPM-2B", {"num_experts": 8}, "num_experts"),
        ("Granite-4.0-350M", {"position_embedding_type": "nope"}, "position_embedding_type"),
        ("Granite-4.0-350M", {"position_embedding_type": None}, "position_embedding_type = 'nope'"),
        ("Granite-4.0-350M", {"num_local_experts": 32}, "num_local_experts"),
        ("Granite-4.0-350M", {"layer_types": ["mamba"] * 28}, "mamba"),
    ],
)
def test_unsupported_setting_is_refused(name: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        read_architecture({**MODELS[name].json(), **changes})
