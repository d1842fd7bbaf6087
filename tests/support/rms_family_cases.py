"""Tiny models of families like Llama, those with LayerNorm included: defaults and cases for parity tests."""

from __future__ import annotations

from typing import Any

from support.family_settings import DYNAMIC, LINEAR, LLAMA3, SIZES, WINDOW, YARN

MINISTRAL3 = {
    "rope_type": "yarn", "factor": 16.0, "rope_theta": 1e6, "original_max_position_embeddings": 64,
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip
MULTIPLIERS = {
    "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.2,
    "logits_scaling": 4.0,
}  # fmt: skip
GRANITE4 = {
    "num_local_experts": 0, "shared_intermediate_size": 48, "position_embedding_type": "rope",
    "layer_types": ["attention", "attention"], "mamba_n_heads": 4,
}  # fmt: skip
FOUR_LAYERS = {"num_hidden_layers": 4}


def longrope(original: int, pairs: int, theta: float = 10000.0) -> dict[str, Any]:
    """Settings of phi3: factors for sequences of `original` tokens and for longer ones."""
    return {
        "rope_parameters": {
            "rope_type": "longrope",
            "short_factor": [1.0 + 0.1 * pair for pair in range(pairs)],
            "long_factor": [1.5 + 2.0 * pair for pair in range(pairs)],
            "rope_theta": theta,
        },
        "original_max_position_embeddings": original,
    }


DEFAULTS: dict[str, dict[str, Any]] = {
    "arcee": SIZES,
    "cwm": {
        **SIZES,
        "num_hidden_layers": 4,
        "head_dim": 8,
        "sliding_window": 7,
        "layer_types": ["full_attention", *["sliding_attention"] * 3],
    },
    "ernie4_5": {**SIZES, "head_dim": 8},
    "exaone4": {**SIZES, "sliding_window": None, "layer_types": ["full_attention"] * 2},
    "gemma": {**SIZES, "head_dim": 8},
    "gemma2": {**SIZES, "head_dim": 8, "sliding_window": 7, "query_pre_attn_scalar": 24},
    "gemma3_text": {**SIZES, "head_dim": 8, "sliding_window": 7, "query_pre_attn_scalar": 24},
    "glm": {**SIZES, "head_dim": 8},
    "glm4": {**SIZES, "head_dim": 8},
    "granite": {**SIZES, **MULTIPLIERS},
    "granitemoehybrid": {**SIZES, **MULTIPLIERS, **GRANITE4},
    "helium": {**SIZES, "head_dim": 8},
    "hunyuan_v1_dense": {**SIZES, "head_dim": 8},
    "hyperclovax": {**SIZES, **MULTIPLIERS},
    "internlm3": {**SIZES, "head_dim": 8},
    "iquestcoder": {**SIZES, "head_dim": 8},
    "jais2": SIZES,
    "llama": SIZES,
    "ministral": {**SIZES, "head_dim": 8, "sliding_window": 7},
    "ministral3": {**SIZES, "head_dim": 8, "rope_parameters": MINISTRAL3},
    "mistral": {**SIZES, "sliding_window": None},
    "nemotron": SIZES,
    "olmo": SIZES,
    "olmo2": SIZES,
    "olmo3": {**SIZES, **FOUR_LAYERS, "sliding_window": 7},
    "persimmon": SIZES,
    "phi3": SIZES,
    "qwen2": SIZES,
    "qwen3": {**SIZES, "head_dim": 8},
    "seed_oss": {**SIZES, "head_dim": 8},
    "smollm3": {**SIZES, **FOUR_LAYERS},
    "vaultgemma": {**SIZES, "head_dim": 8, "sliding_window": 7, "query_pre_attn_scalar": 24},
}

# Model types with changes of their defaults.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"num_key_value_heads": 4}),
    ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"attention_bias": True, "num_attention_heads": 8, "num_key_value_heads": 2}),
    ("llama", {"head_dim": 16}),
    ("llama", {"head_dim": 6, "num_key_value_heads": 4, "rms_norm_eps": 1e-3}),
    ("llama", {"rope_parameters": LINEAR}),
    ("llama", {"rope_parameters": LLAMA3, "head_dim": 16}),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000}}),
    ("llama", {"hidden_act": "gelu"}),
    ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    ("llama", {"hidden_act": "gelu_new"}),
    ("llama", {"hidden_act": "relu"}),
    ("mistral", {"sliding_window": 7}),
    ("mistral", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    ("mistral", {"head_dim": 16, "sliding_window": 2}),
    ("qwen2", {}),
    ("qwen2", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    ("qwen2", {"num_hidden_layers": 3, "max_window_layers": 1, **WINDOW}),
    (
        "qwen2",
        {
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            **WINDOW,
        },
    ),
    ("qwen2", {"rope_parameters": LINEAR}),
    ("qwen3", {}),
    ("qwen3", {"num_key_value_heads": 4, "tie_word_embeddings": True, "head_dim": 16}),
    ("qwen3", {"attention_bias": True, "rope_parameters": LLAMA3, "head_dim": 16}),
    ("qwen3", {"max_window_layers": 1, **WINDOW}),
    # rotary scaling beyond the original context
    ("llama", {"rope_parameters": LINEAR, "max_position_embeddings": 16}),
    ("llama", {"rope_parameters": DYNAMIC}),
    ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 32}),
    ("qwen2", {"rope_parameters": YARN, "head_dim": 16}),
    ("qwen3", {"rope_parameters": {**YARN, "attention_factor": 1.2}, "head_dim": 16}),
    ("mistral", {"rope_parameters": YARN, "head_dim": 16, "sliding_window": 7}),
    ("ministral", {}),
    (
        "ministral",
        {"head_dim": 16, "num_key_value_heads": 4, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    ("ministral3", {}),
    ("ministral3", {"sliding_window": 7, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    ("internlm3", {}),
    ("internlm3", {"qkv_bias": True, "bias": True, "num_key_value_heads": 4}),
    ("iquestcoder", {"head_dim": 16}),
    ("cwm", {}),
    ("cwm", {"num_key_value_heads": 4, "mlp_bias": True, "rope_parameters": LLAMA3}),
    ("gemma", {}),
    ("gemma", {"hidden_act": "gelu", "num_key_value_heads": 4, "head_dim": 16, "tie_word_embeddings": False}),
    ("gemma", {"num_key_value_heads": 1, "attention_bias": True}),
    ("gemma2", {}),
    ("gemma2", {"num_key_value_heads": 4, "num_hidden_layers": 3, "final_logit_softcapping": None}),
    ("gemma2", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "head_dim": 16}),
    ("gemma2", {"layer_types": ["full_attention", "sliding_attention"], "attn_logit_softcapping": None}),
    ("vaultgemma", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    ("gemma3_text", {"sliding_window_pattern": 2, "num_hidden_layers": 3}),
    ("gemma3_text", {"num_hidden_layers": 6, "num_key_value_heads": 1, "head_dim": 16}),
    (
        "gemma3_text",
        {
            "num_key_value_heads": 4,
            "layer_types": ["full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    ("phi3", {}),
    ("phi3", {"num_key_value_heads": 4, "sliding_window": 7, "tie_word_embeddings": True}),
    ("phi3", longrope(64, 4)),  # within the original context
    ("phi3", {"num_key_value_heads": 4, **longrope(32, 4), "sliding_window": 20}),  # beyond it
    (
        "phi3",
        {
            "hidden_size": 64,
            "rope_parameters": {**longrope(32, 6)["rope_parameters"], "partial_rotary_factor": 0.75},
            "original_max_position_embeddings": 32,
        },
    ),
    ("phi3", {"hidden_size": 64, "partial_rotary_factor": 0.75}),
    ("smollm3", {}),
    ("smollm3", {"no_rope_layers": [0, 1, 1, 0], "num_key_value_heads": 4, "attention_bias": True}),
    ("smollm3", {"no_rope_layer_interval": 2, "rope_parameters": {**YARN, "rope_theta": 2e6}}),
    ("granite", {}),
    ("granite", {"num_key_value_heads": 4, "tie_word_embeddings": True, "mlp_bias": True}),
    ("granite", {"attention_bias": True, "rope_parameters": YARN}),
    ("granitemoehybrid", {}),
    ("granitemoehybrid", {"num_key_value_heads": 4, "attention_bias": True, "tie_word_embeddings": True}),
    ("hyperclovax", {}),
    ("hyperclovax", {"use_post_norm": False, "num_key_value_heads": 4, "attention_multiplier": None}),
    ("olmo", {"num_key_value_heads": 4, "clip_qkv": 0.8}),
    ("olmo", {"tie_word_embeddings": True}),
    ("olmo2", {}),
    ("olmo2", {"num_key_value_heads": 4, "attention_bias": True}),
    ("olmo3", {}),
    ("olmo3", {"num_key_value_heads": 4, "rope_scaling": {**YARN, "attention_factor": 1.2}}),
    ("exaone4", {}),
    ("exaone4", {"sliding_window": 7, "num_key_value_heads": 4, **FOUR_LAYERS, "layer_types": None}),
    (
        "exaone4",
        {"sliding_window": 7, "sliding_window_pattern": 2, "layer_types": None, "rope_parameters": LLAMA3},
    ),
    ("seed_oss", {}),
    ("seed_oss", {"num_key_value_heads": 4, "attention_out_bias": True, "mlp_bias": True, "head_dim": 16}),
    ("helium", {}),
    ("helium", {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}),
    ("arcee", {}),
    ("arcee", {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True, "rope_parameters": YARN}),
    ("ernie4_5", {}),
    ("ernie4_5", {"num_key_value_heads": 4, "use_bias": True, "head_dim": 16, "tie_word_embeddings": False}),
    ("hunyuan_v1_dense", {}),
    (
        "hunyuan_v1_dense",
        {
            "num_key_value_heads": 4,
            "attention_bias": True,
            "rope_parameters": {
                "rope_type": "dynamic",
                "alpha": 1000.0,
                "factor": 1.0,
                "rope_theta": 10000.0,
            },
        },
    ),
    ("nemotron", {}),
    ("nemotron", {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}),
    ("nemotron", {"hidden_size": 64, "partial_rotary_factor": 0.75}),
    ("jais2", {}),
    ("jais2", {"num_key_value_heads": 4, "attention_bias": False, "mlp_bias": False, "head_dim": 16}),
    ("persimmon", {}),
    ("persimmon", {"qk_layernorm": False, "hidden_size": 64, "partial_rotary_factor": 0.25}),
    ("glm", {}),
    ("glm", {"num_key_value_heads": 4, "attention_bias": False, "head_dim": 16}),
    ("glm4", {}),
    ("glm4", {"num_key_value_heads": 4, "partial_rotary_factor": 1.0, "tie_word_embeddings": True}),
]

_LONG = longrope(32, 4)
_LOCAL = {"rope_type": "default", "rope_theta": 10000.0}

# Model types with changes of their defaults, and a change of config.json that gives other logits.
CHANGES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", {"rope_parameters": LINEAR}, {"rope_parameters": {**LINEAR, "factor": 3.01}}),
    (
        "llama",
        {"rope_parameters": DYNAMIC, "max_position_embeddings": 32},
        {"rope_parameters": {**DYNAMIC, "factor": 2.01}},
    ),
    (
        "qwen2",
        {"rope_parameters": YARN, "head_dim": 16},
        {"rope_parameters": {**YARN, "attention_factor": 1.14}},
    ),
    ("qwen2", {"rope_parameters": YARN, "head_dim": 16}, {"rope_parameters": {**YARN, "beta_slow": 0.1}}),
    ("ministral", {}, {"layer_types": ["full_attention", "sliding_attention"]}),
    ("gemma2", {}, {"query_pre_attn_scalar": 25}),
    ("gemma2", {}, {"attn_logit_softcapping": 49.0}),
    ("gemma2", {}, {"final_logit_softcapping": 29.0}),
    ("gemma2", {}, {"layer_types": ["full_attention", "sliding_attention"]}),
    (
        "gemma3_text",
        {},
        {
            "rope_parameters": {
                "full_attention": {"rope_theta": 1e6},
                "sliding_attention": {"rope_theta": 9999.0},
            }
        },
    ),
    (
        "gemma3_text",
        {"sliding_window_pattern": 2},
        {"rope_parameters": {"full_attention": {"rope_theta": 9e5}, "sliding_attention": _LOCAL}},
    ),
    ("phi3", _LONG, {"original_max_position_embeddings": 64}),
    (
        "phi3",
        {"hidden_size": 64, "partial_rotary_factor": 0.75},
        {"rope_parameters": {**_LOCAL, "partial_rotary_factor": 0.5}},
    ),
    ("phi3", {"sliding_window": 7}, {"sliding_window": None}),
    ("smollm3", {}, {"no_rope_layers": [1, 1, 1, 1]}),
    ("granite", {}, {"embedding_multiplier": 3.01}),
    ("granite", {}, {"residual_multiplier": 0.401}),
    ("granite", {}, {"attention_multiplier": 0.201}),
    ("granite", {}, {"logits_scaling": 4.01}),
    ("olmo", {"clip_qkv": 0.8}, {"clip_qkv": 0.81}),
    ("olmo3", {}, {"sliding_window": 8}),
    ("exaone4", {}, {"sliding_window": 39, "layer_types": ["full_attention", "sliding_attention"]}),
    ("nemotron", {}, {"rope_parameters": {**_LOCAL, "partial_rotary_factor": 0.25}}),
    ("nemotron", {}, {"norm_eps": 1.1e-5}),
    ("nemotron", {}, {"hidden_act": "relu"}),
    ("glm", {}, {"rope_parameters": {**_LOCAL, "partial_rotary_factor": 1.0}}),
]

# Model types, and a change of a line of their description that gives other logits.
DESCRIPTION_CHANGES: list[tuple[str, dict[str, Any], str, str]] = [
    ("gemma", {}, "offset = 1.0", "offset = 0.5"),
    ("gemma", {}, 'embedding_multiplier = "hidden_size ** 0.5"', ""),
    ("helium", {}, 'pairs = "interleaved"', 'pairs = "half"'),
    ("glm", {}, 'pairs = "interleaved"', 'pairs = "half"'),
    ("hunyuan_v1_dense", {}, "after_rotation = true", "after_rotation = false"),
    ("nemotron", {}, "offset = 1.0", "offset = 0.5"),
    ("olmo", {}, 'kind = "layer"', 'kind = "rms"'),
    ("exaone4", {}, "attention_output_norm", "attention_residual_norm"),
    ("exaone4", {}, "mlp_output_norm", "mlp_norm"),
]
