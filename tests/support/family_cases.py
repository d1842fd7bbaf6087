"""Tiny models of every family, as configs of transformers: defaults by model type, and the cases that parity
tests run.
"""

from __future__ import annotations

from typing import Any

from support import rms_family_cases
from support.family_settings import GPT_SIZES, LINEAR, SIZES, TOKENS, VOCAB

DEFAULTS: dict[str, dict[str, Any]] = {
    **rms_family_cases.DEFAULTS,
    "bloom": {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4, **TOKENS},
    "biogpt": {**SIZES, "max_position_embeddings": 64},
    "codegen": {**GPT_SIZES, "rotary_dim": 4},
    "cohere": SIZES,
    "cohere2": {**SIZES, "sliding_window": 7},
    "falcon": SIZES,
    "gpt2": GPT_SIZES,
    "gpt_bigcode": GPT_SIZES,
    "gpt_neo": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "window_size": 7,
        "max_position_embeddings": 64,
        "attention_types": [[["global", "local"], 1]],
        **TOKENS,
    },
    "gptj": {**GPT_SIZES, "rotary_dim": 4},
    "gpt_neox": {**SIZES, "use_parallel_residual": True},
    "mpt": {"vocab_size": VOCAB, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, **TOKENS},
    "openai-gpt": GPT_SIZES,
    "opt": {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": None, "max_position_embeddings": 64},
    "phi": SIZES,
    "stablelm": {**SIZES, "use_qkv_bias": True},
    "starcoder2": SIZES,
}

# Model types with changes of their defaults; every family has MHA and GQA where transformers has both.
CASES: list[tuple[str, dict[str, Any]]] = [
    *rms_family_cases.CASES,
    ("bloom", {}),
    ("bloom", {"n_head": 2, "n_layer": 3}),
    ("bloom", {"hidden_size": 36, "n_head": 6}),
    ("bloom", {"hidden_size": 88, "n_head": 11, "tie_word_embeddings": False, "layer_norm_epsilon": 1e-3}),
    ("bloom", {"hidden_size": 64, "n_head": 16}),
    ("biogpt", {}),
    ("biogpt", {"scale_embedding": False, "tie_word_embeddings": False}),
    ("codegen", {}),
    ("codegen", {"n_head": 8, "n_embd": 64, "rotary_dim": 8}),
    ("cohere", {}),
    ("cohere", {"num_key_value_heads": 4, "logit_scale": 0.8, "attention_bias": True, "rope_theta": 500}),
    ("cohere", {"use_qk_norm": True, "tie_word_embeddings": False}),
    ("cohere2", {"num_hidden_layers": 5}),
    ("cohere2", {"num_hidden_layers": 3, "sliding_window_pattern": 2, "num_key_value_heads": 4}),
    ("cohere2", {"layer_types": ["full_attention", "sliding_attention"], "attention_bias": True}),
    ("falcon", {}),
    ("falcon", {"bias": True, "tie_word_embeddings": False, "ffn_hidden_size": 48, "rope_theta": 500}),
    ("falcon", {"multi_query": False}),
    ("falcon", {"parallel_attn": False}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    ("falcon", {"new_decoder_architecture": True, "bias": True}),
    ("falcon", {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1, "num_kv_heads": 2}),
    ("falcon", {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}),
    ("falcon", {"alibi": True, "num_attention_heads": 8}),
    ("gpt2", {}),
    ("gpt2", {"n_inner": 48, "scale_attn_weights": False, "activation_function": "relu"}),
    ("gpt2", {"tie_word_embeddings": False, "reorder_and_upcast_attn": False, "n_head": 2}),
    ("gpt_bigcode", {}),
    ("gpt_bigcode", {"multi_query": False, "scale_attn_weights": False, "n_inner": 48}),
    ("gpt_neo", {}),
    ("gpt_neo", {"attention_types": [[["local"], 2], [["global"], 1]], "num_layers": 3}),
    ("gptj", {}),
    ("gptj", {"rotary_dim": 8, "n_inner": 48}),
    ("gpt_neox", {"rotary_pct": 0.5}),
    ("gpt_neox", {"rotary_pct": 1.0, "rotary_emb_base": 500, "use_parallel_residual": False}),
    ("gpt_neox", {"attention_bias": False, "num_hidden_layers": 3}),
    (
        "gpt_neox",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500, "partial_rotary_factor": 0.5}},
    ),
    ("gpt_neox", {"rope_parameters": LINEAR, "tie_word_embeddings": True, "hidden_act": "gelu_new"}),
    ("mpt", {}),
    ("mpt", {"n_heads": 6, "d_model": 36, "attn_config": {"clip_qkv": 1.0, "alibi_bias_max": 16}}),
    ("mpt", {"n_heads": 16, "d_model": 64, "attn_config": {"softmax_scale": 0.3}}),
    ("openai-gpt", {}),
    ("openai-gpt", {"afn": "relu", "tie_word_embeddings": False}),
    ("openai-gpt", {"afn": "swish", "n_head": 2, "layer_norm_epsilon": 1e-3}),
    ("opt", {}),
    ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    ("opt", {"enable_bias": False, "tie_word_embeddings": False, "_remove_final_layer_norm": True}),
    ("opt", {"layer_norm_elementwise_affine": False, "activation_function": "gelu"}),
    ("phi", {}),
    ("phi", {"num_key_value_heads": 4, "partial_rotary_factor": 0.25}),
    ("phi", {"qk_layernorm": True, "hidden_act": "gelu"}),
    ("phi", {"rope_parameters": {"rope_type": "default", "rope_theta": 500, "partial_rotary_factor": 1.0}}),
    ("stablelm", {}),
    ("stablelm", {"use_qkv_bias": False, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    ("stablelm", {"qk_layernorm": True, "use_parallel_residual": True}),
    ("stablelm", {"qk_layernorm": True, "num_key_value_heads": 4, "partial_rotary_factor": 0.5}),
    ("stablelm", {"use_parallel_residual": True, "partial_rotary_factor": 1.0, "rope_theta": 500}),
    ("starcoder2", {}),
    ("starcoder2", {"sliding_window": 7, "num_key_value_heads": 4}),
    ("starcoder2", {"use_bias": False, "tie_word_embeddings": False, "norm_epsilon": 1e-3}),
]


def case_name(value: object) -> str:
    """Name of a part of a case in test ids."""
    if isinstance(value, str):
        return value
    assert isinstance(value, dict)
    shown = (
        f"{key}={each.get('rope_type', 'by-layer') if isinstance(each, dict) else each}"
        for key, each in value.items()
    )
    return ",".join(shown) or "plain"


def changes_with_length(config: dict[str, Any]) -> bool:
    """Whether transformers itself gives other logits step by step than for the whole sequence.

    Dynamic RoPE has other frequencies with each token beyond max_position_embeddings; cached keys keep
    theirs.
    """
    rope, positions = config.get("rope_parameters", {}), config.get("max_position_embeddings", 256)
    return rope.get("rope_type") == "dynamic" and "alpha" not in rope and positions < 40
