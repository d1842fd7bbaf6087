"""Rotary settings of published configs against transformers, bit by bit, and invalid ones."""

from __future__ import annotations

import copy
import importlib
import math
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvexport.errors import CheckpointError
from kvexport.model.rope import LAYER_TYPES, RopeConfig, alibi_slopes, make_rope, rope_configs

LLAMA = {"hidden_size": 4096, "num_attention_heads": 32, "max_position_embeddings": 4096}
LLAMA31 = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}  # fmt: skip
PHI3_LONG = [
    1.0700000524520874, 1.1200000047683716, 1.149999976158142, 1.4199999570846558, 1.5699999332427979,
    1.7999999523162842, 2.129999876022339, 2.129999876022339, 3.009999990463257, 5.910000324249268,
    6.950000286102295, 9.070000648498535, 9.930000305175781, 10.710000038146973, 11.130000114440918,
    14.609999656677246, 15.409998893737793, 19.809999465942383, 37.279998779296875, 38.279998779296875,
    38.599998474121094, 40.12000274658203, 46.20000457763672, 50.940006256103516, 53.66000747680664,
    54.9373893737793, 56.89738845825195, 57.28738784790039, 59.98738479614258, 60.86738586425781,
    60.887386322021484, 61.71739196777344, 62.91739273071289, 62.957393646240234, 63.41739273071289,
    63.8173942565918, 63.83739471435547, 63.897396087646484, 63.93739700317383, 64.06739807128906,
    64.11434936523438, 64.12435150146484, 64.15435028076172, 64.19435119628906, 64.24435424804688,
    64.57435607910156, 64.69000244140625, 64.76000213623047,
]  # fmt: skip
PHI3_SHORT = [1.1 + 0.04 * pair for pair in range(48)]
PHI4_LONG = [
    1, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649, 2.446418898,
    2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845, 5.351743533, 5.984965424,
    6.693110555, 7.485043894, 8.370679318, 9.36110372, 10.4687158, 11.70738129, 13.09260651, 14.64173252,
    16.37415215, 18.31155283, 20.47818807, 22.90118105, 25.61086418, 28.64115884, 32.03, 32.1, 32.13, 32.23,
    32.6, 32.61, 32.64, 32.66, 32.7, 32.71, 32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77,
]  # fmt: skip
PHI3 = {
    "hidden_size": 3072, "num_attention_heads": 32, "max_position_embeddings": 131072, "rope_theta": 10000.0,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
PHI4 = {**PHI3, "num_attention_heads": 24, "partial_rotary_factor": 0.75}
QWEN = {"hidden_size": 3584, "num_attention_heads": 28, "max_position_embeddings": 32768, "rope_theta": 1e6}
INTERNLM2 = {**LLAMA, "max_position_embeddings": 32768, "rope_theta": 1000000}
GEMMA3 = {
    "hidden_size": 2560, "num_attention_heads": 8, "head_dim": 256, "max_position_embeddings": 131072,
    "layer_types": list(LAYER_TYPES), "num_hidden_layers": 2,
}  # fmt: skip
OLMO3 = {
    "hidden_size": 4096, "num_attention_heads": 32, "max_position_embeddings": 65536, "num_hidden_layers": 2,
    "layer_types": list(LAYER_TYPES),
}  # fmt: skip
OLMO3_YARN = {
    "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192, "beta_fast": 32,
    "beta_slow": 1, "attention_factor": 1.2079441541679836,
}  # fmt: skip
MINISTRAL3 = {
    "rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 16384, "rope_theta": 1e6,
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip


def yarn(factor: float | None, original: int, **values: Any) -> dict[str, Any]:
    """Settings of YaRN in the old form."""
    return {"type": "yarn", "factor": factor, "original_max_position_embeddings": original, **values}


# name, model_type, config.json, arguments, positions that it is meant for, capacities
CASES: list[tuple[str, str, dict[str, Any], dict[str, Any], int, tuple[int, ...]]] = [
    ("Llama 2", "llama", LLAMA, {}, 4096, (4096,)),
    (
        "Vicuna 16k", "llama", {**LLAMA, "rope_scaling": {"type": "linear", "factor": 4.0}}, {}, 16384,
        (1, 16384),
    ),
    (
        "DeepSeek Coder", "llama",
        {**LLAMA, "rope_theta": 100000, "rope_scaling": {"type": "linear", "factor": 4.0}}, {}, 16384, (9,),
    ),
    (
        "Llama 3.1", "llama",
        {**LLAMA, "max_position_embeddings": 131072, "rope_theta": 500000.0, "rope_scaling": LLAMA31},
        {}, 131072, (1, 131072),
    ),
    (
        "Llama 3.2", "llama",
        {
            "hidden_size": 2048, "num_attention_heads": 32, "head_dim": 64, "max_position_embeddings": 131072,
            "rope_parameters": {**LLAMA31, "factor": 32.0, "rope_theta": 500000.0},
        },
        {}, 131072, (131072,),
    ),
    ("Qwen2.5 yarn", "qwen2", {**QWEN, "rope_scaling": yarn(4.0, 32768)}, {}, 131072, (100, 131072)),
    ("yarn, no factor", "llama", {**QWEN, "rope_scaling": yarn(None, 8192)}, {}, 32768, (32768,)),
    ("yarn, untold", "llama", {**QWEN, "rope_scaling": {"type": "yarn", "factor": 4.0}}, {}, 131072, (9,)),
    (
        "yarn with mscale", "llama",
        {**LLAMA, "rope_scaling": yarn(40, 4096, mscale=0.707, mscale_all_dim=1, beta_fast=32, beta_slow=1)},
        {}, 163840, (9,),
    ),
    (
        "yarn with two mscales", "llama",
        {**LLAMA, "rope_scaling": yarn(40, 4096, mscale=1, mscale_all_dim=0.5, beta_fast=16, beta_slow=2)},
        {}, 163840, (9,),
    ),
    (
        "gpt-oss", "llama",
        {
            "hidden_size": 2880, "head_dim": 64, "num_attention_heads": 64, "max_position_embeddings": 131072,
            "rope_theta": 150000,
            "rope_scaling": {**yarn(32.0, 4096), "rope_type": "yarn", "truncate": False, "beta_fast": 32.0},
        },
        {}, 131072, (131072,),
    ),
    ("yarn, bounds alike", "llama", {**LLAMA, "rope_scaling": yarn(4.0, 7, beta_fast=1)}, {}, 4096, (9,)),
    ("Ministral 3", "ministral3", {**LLAMA, "head_dim": 128, "max_position_embeddings": 262144,
     "rope_parameters": MINISTRAL3}, {}, 16384, (16384,)),
    (
        "Phi-3 mini 128k", "phi3",
        {**PHI3, "rope_scaling": {"type": "longrope", "long_factor": PHI3_LONG, "short_factor": PHI3_SHORT}},
        {}, 131072, (1, 4096, 4097, 131072),
    ),
    (
        "Phi-3 mini 128k, first form", "phi3",
        {**PHI3, "rope_scaling": {"type": "su", "long_factor": PHI3_LONG, "short_factor": PHI3_SHORT}},
        {}, 131072, (4096, 4097),
    ),
    (
        "Phi-3 with longrope called yarn", "phi3",
        {**PHI3, "rope_scaling": {"type": "yarn", "long_factor": PHI3_LONG, "short_factor": PHI3_SHORT}},
        {}, 131072, (4096, 4097),
    ),
    (
        "Phi-4 mini", "phi3",
        {**PHI4, "rope_scaling": {"type": "longrope", "long_factor": PHI4_LONG, "short_factor": [1.0] * 48}},
        {}, 131072, (4096, 4097),
    ),
    (
        "longrope with factors", "llama",
        {
            **LLAMA, "max_position_embeddings": 32768,
            "rope_scaling": {
                "type": "longrope", "long_factor": [2.0] * 64, "short_factor": [1] * 64, "factor": 8.0,
                "original_max_position_embeddings": 4096,
            },
        },
        {}, 32768, (4096, 32768),
    ),
    (
        "longrope with attention_factor", "phi3",
        {**PHI3, "rope_scaling": {
            "type": "longrope", "long_factor": PHI3_LONG, "short_factor": PHI3_SHORT, "attention_factor": 1.5,
        }},
        {}, 131072, (4096, 4097),
    ),
    (
        "InternLM2", "llama", {**INTERNLM2, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, {}, 65536,
        (1000, 32768, 32769, 65536, 200000),
    ),
    (
        "dynamic by a third", "llama", {**LLAMA, "rope_scaling": {"type": "dynamic", "factor": 4 / 3}}, {},
        5461, (4096, 4097, 5461),
    ),
    (
        "Hunyuan", "hunyuan_v1_dense",
        {**LLAMA, "head_dim": 128, "max_position_embeddings": 32768, "rope_scaling": {
            "alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0,
            "mscale_all_dim": 1.0, "type": "dynamic",
        }},
        {}, 32768, (100, 40000),
    ),
    (
        "Gemma 3", "gemma3_text",
        {
            **GEMMA3, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        },
        {"local_theta": 10000.0}, 131072, (131072,),
    ),
    (
        "Gemma 3, new form", "gemma3_text",
        {**GEMMA3, "rope_parameters": {
            "full_attention": {"factor": 8.0, "rope_theta": 1000000.0, "rope_type": "linear"},
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        }},
        {}, 131072, (131072,),
    ),
    (
        "OLMo 3", "olmo3", {**OLMO3, "rope_theta": 500000, "rope_scaling": OLMO3_YARN},
        {"local_theta": 500000}, 65536, (65536,),
    ),
    (
        "OLMo 3, new form", "olmo3",
        {**OLMO3, "rope_parameters": {
            "full_attention": {**OLMO3_YARN, "rope_theta": 500000},
            "sliding_attention": {"rope_type": "default", "rope_theta": 500000},
        }},
        {}, 65536, (65536,),
    ),
    (
        "Pythia", "gpt_neox", {**LLAMA, "rotary_pct": 0.25, "rotary_emb_base": 20000},
        {"fraction": 0.25, "theta": 20000}, 4096, (4096,),
    ),
    (
        "Pythia, new form", "gpt_neox", {**LLAMA, "rope_parameters": {
            "rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5, "rope_theta": 20000,
        }},
        {"fraction": 0.25}, 8192, (4096,),
    ),
    ("Phi-2", "phi", {"hidden_size": 2560, "num_attention_heads": 32, "max_position_embeddings": 2048,
     "partial_rotary_factor": 0.4, "rope_theta": 10000.0}, {}, 2048, (2048,)),
    (
        "StableLM 2, dynamic", "stablelm",
        {**LLAMA, "partial_rotary_factor": 0.25, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {}, 8192, (4096, 8192),
    ),
]  # fmt: skip


def head_dim_of(config: Mapping[str, Any]) -> int:
    return config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])


def transformers_tables(
    model_type: str, config: dict[str, Any], layer_type: str, length: int
) -> tuple[Tensor, float]:
    """inv_freq and factor of cos and sin after a model of transformers has run on `length` positions."""
    from transformers import AutoConfig

    copied = copy.deepcopy(config)  # transformers edits tables of settings in place
    if copied.get("rope_scaling", {}).get("type") == "su":  # it fails to read this name
        copied["rope_scaling"]["type"] = "longrope"
    package = "gemma3" if model_type == "gemma3_text" else model_type
    module = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
    (name,) = (each for each in vars(module) if each.endswith("RotaryEmbedding"))
    rotary = getattr(module, name)(AutoConfig.for_model(model_type, **copied))
    by_type = isinstance(rotary.rope_type, dict)
    where = {"layer_type": layer_type} if by_type else {}
    rotary(torch.zeros(1), torch.tensor([[0, length - 1]]), **where)
    prefix = f"{layer_type}_" if by_type else ""
    return getattr(rotary, f"{prefix}inv_freq"), getattr(rotary, f"{prefix}attention_scaling")


@pytest.mark.parametrize(
    ("model_type", "config", "arguments", "reach", "lengths"),
    [pytest.param(*case, id=name) for name, *case in CASES],
)
def test_published_settings_are_bit_identical_to_transformers(
    model_type: str, config: dict[str, Any], arguments: dict[str, Any], reach: int, lengths: tuple[int, ...]
) -> None:
    head_dim = head_dim_of(config)
    found = rope_configs(config, head_dim, **arguments)
    assert tuple(found) == LAYER_TYPES
    positions = config["max_position_embeddings"]
    assert min(each.reach(positions) or 0 for each in found.values()) == reach
    for layer_type in LAYER_TYPES:
        for length in lengths:
            inv_freq, factor = transformers_tables(model_type, config, layer_type, length)
            table, magnitude = found[layer_type].frequencies(length)
            assert table.dtype == torch.float32
            assert torch.equal(table, inv_freq)
            assert magnitude == factor


def test_cases_cover_every_kind_and_tell_them_apart() -> None:
    """Control: each scaling changes the table, and those that depend on the length do."""
    kinds = set()
    for _, _, config, arguments, _, lengths in CASES:
        full = rope_configs(config, head_dim_of(config), **arguments)["full_attention"]
        plain = RopeConfig(theta=full.theta, rotary_dim=full.rotary_dim).frequencies(1)[0]
        kinds.add(full.kind)
        assert torch.equal(full.frequencies(lengths[-1])[0], plain) == (full.kind == "default")
        if full.kind in ("dynamic", "longrope"):
            short, long = (full.frequencies(length)[0] for length in (1, lengths[-1]))
            assert not torch.equal(short, long)
    assert kinds == {"default", "linear", "dynamic", "yarn", "longrope", "llama3"}


def test_rotated_pairs_come_first_and_others_have_frequency_0() -> None:
    case = next(each for each in CASES if each[0] == "Phi-4 mini")
    found = rope_configs(case[2], 128)["full_attention"]
    rope = make_rope(found, 128, 131072)
    inv_freq, factor = found.frequencies(131072)
    assert rope.inv_freq.tolist() == [*inv_freq.tolist(), *[0.0] * 16]
    assert factor == math.sqrt(1 + math.log(32) / math.log(4096))
    assert rope.magnitude is not None and rope.magnitude.dtype == torch.float32
    assert rope.magnitude.tolist() == [*torch.full((48,), factor).tolist(), *[1.0] * 16]
    assert make_rope(rope_configs(LLAMA, 128)["full_attention"], 128, 9).magnitude is None


def test_layers_share_settings_unless_the_config_distinguishes_them() -> None:
    linear = {"rope_scaling": {"type": "linear", "factor": 4.0}}
    full, sliding = rope_configs({**LLAMA, **linear}, 128).values()
    assert full == sliding
    full, sliding = rope_configs({**LLAMA, **linear, "rope_theta": 5e5}, 128, local_theta=1e4).values()
    assert (full.kind, full.theta, sliding.kind, sliding.theta) == ("linear", 5e5, "default", 1e4)
    nulls = {"rope_theta": 5e5, "rope_parameters": {"full_attention": linear["rope_scaling"],
             "sliding_attention": None}}  # fmt: skip
    full, sliding = rope_configs({**LLAMA, **nulls}, 128).values()
    assert (full.kind, full.theta, sliding.kind, sliding.theta) == ("linear", 5e5, "default", 5e5)


def test_theta_is_the_tables_then_the_configs_then_the_familys() -> None:
    def theta(config: dict[str, Any]) -> float:
        return rope_configs(config, 128, theta=3e4)["full_attention"].theta

    assert theta({"rope_theta": 2e4, "rope_parameters": {"rope_theta": 1e4}}) == 1e4
    assert theta({"rope_theta": 2e4, "rope_parameters": {"rope_theta": None}}) == 2e4
    assert theta({"rope_theta": None, "rope_scaling": {}}) == theta({}) == 3e4


def test_max_positions_may_have_another_key() -> None:
    dynamic = {"rope_scaling": {"type": "dynamic", "factor": 2.0}}
    found = rope_configs(dynamic, 128, max_positions=2048)["full_attention"]
    assert found == rope_configs({**dynamic, "max_position_embeddings": 2048}, 128)["full_attention"]
    assert found.reach(2048) == 4096


def test_both_forms_may_stand_beside_each_other_if_they_agree() -> None:
    old = {"rope_theta": 1e6, "rope_scaling": yarn(4.0, 32768)}
    new = {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 32768, "rope_theta": 1e6}
    assert rope_configs({**old, "rope_parameters": new}, 128) == rope_configs(old, 128)
    with pytest.raises(CheckpointError, match=r"rope_scaling and rope_parameters in .* must agree"):
        rope_configs({**old, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 128)


def test_reach_is_never_less_than_max_positions() -> None:
    found = rope_configs({"rope_scaling": yarn(4.0, 8192)}, 128)["full_attention"]
    assert [found.reach(each) for each in (None, 16384, 131072)] == [32768, 32768, 131072]
    unknown = rope_configs({"rope_scaling": {"type": "linear", "factor": 4.0}}, 128)["full_attention"]
    assert (unknown.reach(None), unknown.reach(2048)) == (None, 8192)


def test_refuses_capacities_for_which_queries_would_be_scaled_by_position() -> None:
    config = {**LLAMA, "max_position_embeddings": 262144, "rope_parameters": MINISTRAL3}
    found = rope_configs(config, 128)["full_attention"]
    make_rope(found, 128, 16384)
    with pytest.raises(CheckpointError, match="llama_4_scaling_beta"):
        make_rope(found, 128, 16385)


def test_reads_settings_without_torch() -> None:
    program = (
        "import sys; from kvexport.model.rope import rope_configs\n"
        "rope_configs({'rope_scaling': {'type': 'yarn', 'factor': 4.0}}, 64, max_positions=99)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# Invalid settings

HUGE = 10**5000
LONG = {"type": "longrope", "long_factor": [2.0] * 64, "short_factor": [1.0] * 64}


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        ({"type": "linear"}, ["must have factor with rope_type 'linear'"]),
        ({"type": "linear", "factor": 0}, ["rope_scaling.factor in config.json must be a positive number"]),
        ({"type": "linear", "factor": "2"}, ["rope_scaling.factor", "'2'"]),
        ({"type": "linear", "factor": True}, ["rope_scaling.factor", "True"]),
        ({"type": "linear", "factor": math.nan}, ["rope_scaling.factor", "nan"]),
        ({"type": "linear", "factor": HUGE}, ["rope_scaling.factor", "too large to print"]),
        ({"type": "linear", "factor": 1e9}, ["rope_scaling.factor", "must be a number in range", "1e+06"]),
        ({"type": "proportional", "factor": 2.0}, ["rope_scaling.rope_type = 'proportional'", "llama3"]),
        ({"type": ["yarn"]}, ["rope_scaling.rope_type = ['yarn']"]),
        ({"type": "dynamic", "factor": 2.0, "rope_theta": 1}, ["rope_theta", "from 2 to"]),
        ({**LONG, "long_factor": [2.0] * 63}, ["rope_scaling.long_factor", "63 entries", "64 numbers"]),
        ({**LONG, "short_factor": "1.0"}, ["rope_scaling.short_factor", "'1.0'", "64 numbers"]),
        ({**LONG, "short_factor": [1.0] * 63 + [-1]}, ["rope_scaling.short_factor", "-1"]),
        ({"type": "longrope", "long_factor": [2.0] * 64}, ["must have short_factor"]),
        (yarn(4.0, 1), ["original_max_position_embeddings", "from 2"]),
        (yarn(4.0, 4096, truncate=1), ["rope_scaling.truncate", "true or false"]),
        (yarn(4.0, 4096, beta_fast=1, beta_slow=2), ["rope_scaling.beta_fast", "1 and 2"]),
        ({**LLAMA31, "high_freq_factor": 1.0}, ["rope_scaling.high_freq_factor", "1 and 1"]),
        ({"partial_rotary_factor": 1.5}, ["partial_rotary_factor", "from 0 to 1"]),
        ({"partial_rotary_factor": 0.01}, ["1 of head_dim 128"]),
        ({"partial_rotary_factor": 0.03, "type": "default"}, ["3 of head_dim 128"]),
        ({"partial_rotary_factor": 1 / 64, "type": "dynamic", "factor": 2.0}, ["4 or more", "2"]),
        ({"chunked_attention": {}}, ["tables chunked_attention", "full_attention, sliding_attention"]),
        ([1], ["rope_scaling in config.json must be one table", "[1]"]),
        ("linear", ["rope_scaling in config.json must be one table"]),
    ],
)
def test_refuses_invalid_settings(rope: object, words: list[str]) -> None:
    with pytest.raises(CheckpointError) as error:
        rope_configs({**LLAMA, "rope_scaling": rope}, 128)
    for each in words:
        assert each in str(error.value)


@pytest.mark.parametrize("kind", ["dynamic", "yarn", "longrope", "llama3"])
def test_refuses_missing_positions(kind: str) -> None:
    lists = LONG if kind == "longrope" else {}
    rope = {**LLAMA31, **lists, "rope_type": kind, "original_max_position_embeddings": None}
    with pytest.raises(CheckpointError, match=f"must have .*max_position_embeddings with rope_type '{kind}'"):
        rope_configs({"rope_scaling": rope}, 128)


def test_names_the_table_of_a_layer_type() -> None:
    tables = {"full_attention": {}, "sliding_attention": {"rope_type": "linear", "factor": -1}}
    with pytest.raises(CheckpointError, match=r"rope_parameters\.sliding_attention\.factor"):
        rope_configs({"rope_parameters": tables}, 128)
    with pytest.raises(CheckpointError, match="the theta of sliding_attention layers"):
        rope_configs({}, 128, local_theta=math.inf)


NUMBERS = st.one_of(
    st.floats(),
    st.integers(-3, 70_000),
    st.sampled_from(
        [10**4000, -(10**4000), 1e-300, 1e300, math.nan, math.inf, 2**24, 1e6, 1e-6, True, False, None]
    ),
)
ODD = st.recursive(
    st.one_of(NUMBERS, st.text(max_size=3)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=5), st.dictionaries(st.sampled_from([*LAYER_TYPES, "factor"]), inner)
    ),
    max_leaves=5,
)
KINDS = st.sampled_from(["default", "linear", "dynamic", "yarn", "longrope", "su", "llama3"])
SETTINGS = {
    "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.1, "beta_fast": 32,
    "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.7, "truncate": True, "low_freq_factor": 1,
    "high_freq_factor": 4, "rope_theta": 1e4, "partial_rotary_factor": 0.5, "alpha": 10.0,
    "llama_4_scaling_beta": 0.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
}  # fmt: skip
OTHER_MEANING = {"yarn": {"long_factor"}, "dynamic": {"alpha"}}  # keys that make another kind of it


@st.composite
def tables(draw: st.DrawFn) -> dict[str, Any]:
    """A table with most settings of all kinds, and odd values for some."""
    kind = draw(KINDS)
    lost = draw(st.sets(st.sampled_from(sorted(SETTINGS)), max_size=2)) | OTHER_MEANING.get(kind, set())
    table = {key: value for key, value in SETTINGS.items() if key not in lost}
    table[draw(st.sampled_from(["type", "rope_type"]))] = kind
    for key in draw(st.sets(st.sampled_from(sorted(table)), max_size=2)):
        table[key] = draw(st.one_of(NUMBERS, ODD, st.lists(NUMBERS, min_size=4, max_size=4)))
    return table


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Rotary settings of config.json, more or less valid."""
    config = {
        draw(st.sampled_from(["rope_scaling", "rope_parameters"])): draw(
            st.one_of(tables(), st.dictionaries(st.sampled_from(LAYER_TYPES), tables(), min_size=1))
        ),
        "max_position_embeddings": 256,
    }
    others = ("rope_theta", "partial_rotary_factor", "rope_parameters", "original_max_position_embeddings")
    for key in draw(st.sets(st.sampled_from(sorted({*config, *others})), max_size=1)):
        config[key] = draw(st.one_of(NUMBERS, ODD))
    return config


@settings(max_examples=200, deadline=None)
@given(configs(), st.sampled_from([8, 16]), st.sampled_from([1, 64, 257, 2**24]))
def test_any_config_is_read_or_refused_in_a_sentence(
    config: dict[str, Any], head_dim: int, context: int
) -> None:
    try:
        found = rope_configs(config, head_dim)
        ropes = {key: make_rope(each, head_dim, context) for key, each in found.items()}
    except CheckpointError as error:
        assert "config.json" in str(error) or "rope_type" in str(error)
        return
    for key, rope in ropes.items():
        assert rope.inv_freq.shape == (head_dim // 2,) and rope.inv_freq.isfinite().all()
        assert rope.magnitude is None or rope.magnitude.isfinite().all()
        reach = found[key].reach(config["max_position_embeddings"])
        assert reach is None or isinstance(reach, int)


# ALiBi


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 32, 40, 71])
@pytest.mark.parametrize("bias_max", [8, 7.5])
def test_alibi_slopes_of_mpt_are_bit_identical_to_transformers(heads: int, bias_max: float) -> None:
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    bias = build_mpt_alibi_tensor(heads, 2, alibi_bias_max=bias_max)  # 1 token back: -slope
    assert torch.equal(alibi_slopes(heads, torch.float32, bias_max), -bias[:, 0, 0])


def test_alibi_slopes_of_mpt_differ_from_those_of_the_paper_where_heads_are_no_power_of_two() -> None:
    assert torch.equal(alibi_slopes(8, torch.float32, 8), alibi_slopes(8, torch.float32))
    assert not torch.equal(alibi_slopes(12, torch.float32, 8), alibi_slopes(12, torch.float32))
