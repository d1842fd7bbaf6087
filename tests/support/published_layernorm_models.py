"""Published configs of LayerNorm families, with the keys and spellings that their authors wrote."""

from __future__ import annotations

from typing import Any

BLOCKS = {"alibi": False, "apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0}
GPT2 = {
    "activation_function": "gelu_new", "attn_pdrop": 0.1, "embd_pdrop": 0.1, "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05, "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True,
}  # fmt: skip
MPT = {
    "emb_pdrop": 0, "embedding_fraction": 1.0, "expansion_ratio": 4, "init_device": "cpu",
    "learned_pos_emb": True, "logit_scale": None, "model_type": "mpt", "no_bias": True,
    "norm_type": "low_precision_layernorm", "resid_pdrop": 0, "use_cache": False, "verbose": 0,
    "vocab_size": 50432,
}  # fmt: skip
MPT_ATTENTION = {
    "alibi": True, "attn_impl": "torch", "attn_pdrop": 0, "attn_type": "multihead_attention",
    "attn_uses_sequence_id": False, "prefix_lm": False, "qk_ln": False, "softmax_scale": None,
}  # fmt: skip

PUBLISHED: dict[str, dict[str, Any]] = {
    "stablelm-2-1_6b": {
        "attention_dropout": 0.0, "hidden_act": "silu", "hidden_dropout": 0.0, "hidden_size": 2048,
        "intermediate_size": 5632, "layer_norm_eps": 1e-05, "max_position_embeddings": 4096,
        "model_type": "stablelm", "num_attention_heads": 32, "num_hidden_layers": 24,
        "num_key_value_heads": 32, "partial_rotary_factor": 0.25, "rope_theta": 10000,
        "tie_word_embeddings": False, "use_qkv_bias": True, "vocab_size": 100352,
    },
    "stablelm-2-12b": {
        "hidden_act": "silu", "hidden_size": 5120, "intermediate_size": 13824, "layer_norm_eps": 1e-05,
        "max_position_embeddings": 4096, "model_type": "stablelm", "num_attention_heads": 32,
        "num_hidden_layers": 40, "num_key_value_heads": 8, "partial_rotary_factor": 0.25,
        "qk_layernorm": True, "rope_theta": 10000, "tie_word_embeddings": False,
        "use_parallel_residual": True, "use_qkv_bias": False, "vocab_size": 100352,
    },
    "starcoder2-3b": {
        "activation_function": "gelu", "attention_softmax_in_fp32": True, "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 3072, "intermediate_size": 12288, "layer_norm_epsilon": 1e-05,
        "max_position_embeddings": 16384, "mlp_type": "default", "model_type": "starcoder2",
        "norm_epsilon": 1e-05, "norm_type": "layer_norm", "num_attention_heads": 24, "num_hidden_layers": 30,
        "num_key_value_heads": 2, "rope_theta": 999999.4420358813, "sliding_window": 4096, "use_bias": True,
        "vocab_size": 49152,
    },
    "phi-2": {
        "attention_dropout": 0.0, "embd_pdrop": 0.0, "hidden_act": "gelu_new", "hidden_size": 2560,
        "intermediate_size": 10240, "layer_norm_eps": 1e-05, "max_position_embeddings": 2048,
        "model_type": "phi", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
        "partial_rotary_factor": 0.4, "qk_layernorm": False, "resid_pdrop": 0.1, "rope_scaling": None,
        "rope_theta": 10000.0, "tie_word_embeddings": False, "vocab_size": 51200,
    },
    "pythia-160m": {
        "hidden_act": "gelu", "hidden_size": 768, "intermediate_size": 3072, "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048, "model_type": "gpt_neox", "num_attention_heads": 12,
        "num_hidden_layers": 12, "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False,
        "use_parallel_residual": True, "vocab_size": 50304,
    },
    "RedPajama-INCITE-7B": {
        "hidden_act": "gelu", "hidden_size": 4096, "intermediate_size": 16384, "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048, "model_type": "gpt_neox", "num_attention_heads": 32,
        "num_hidden_layers": 32, "rotary_emb_base": 10000, "rotary_pct": 1.0, "tie_word_embeddings": False,
        "use_parallel_residual": False, "vocab_size": 50432,
    },
    "gpt-j-6b": {
        **GPT2, "gradient_checkpointing": False, "model_type": "gptj", "n_embd": 4096, "n_head": 16,
        "n_inner": None, "n_layer": 28, "n_positions": 2048, "rotary": True, "rotary_dim": 64,
        "scale_attn_weights": True, "tie_word_embeddings": False, "vocab_size": 50400,
    },
    "codegen-350M-mono": {
        **GPT2, "gradient_checkpointing": False, "model_type": "codegen", "n_ctx": 2048, "n_embd": 1024,
        "n_head": 16, "n_inner": None, "n_layer": 20, "n_positions": 2048, "rotary_dim": 32,
        "scale_attn_weights": True, "tie_word_embeddings": False, "vocab_size": 51200,
    },
    "falcon-7b": {
        **BLOCKS, "bias": False, "hidden_dropout": 0.0, "hidden_size": 4544, "layer_norm_epsilon": 1e-05,
        "model_type": "falcon", "multi_query": True, "new_decoder_architecture": False,
        "num_attention_heads": 71, "num_hidden_layers": 32, "parallel_attn": True, "vocab_size": 65024,
    },
    "falcon-40b": {
        **BLOCKS, "bias": False, "hidden_size": 8192, "layer_norm_epsilon": 1e-05, "model_type": "falcon",
        "new_decoder_architecture": True, "num_attention_heads": 128, "num_hidden_layers": 60,
        "num_kv_heads": 8, "parallel_attn": True, "vocab_size": 65024,
    },
    "falcon-11B": {
        **BLOCKS, "activation": "gelu", "bias": False, "ff_factor": 4, "ffn_hidden_size": 16384,
        "hidden_size": 4096, "layer_norm_epsilon": 1e-05, "max_position_embeddings": 8192,
        "model_type": "falcon", "multi_query": True, "new_decoder_architecture": True,
        "num_attention_heads": 32, "num_hidden_layers": 60, "num_kv_heads": 8, "num_ln_in_parallel_attn": 1,
        "parallel_attn": True, "rope_scaling": None, "rope_theta": 500042.0, "tie_word_embeddings": False,
        "vocab_size": 65024,
    },
    "falcon-rw-1b": {
        **BLOCKS, "alibi": True, "bias": True, "hidden_size": 2048, "layer_norm_epsilon": 1e-05,
        "model_type": "falcon", "multi_query": False, "new_decoder_architecture": False,
        "num_attention_heads": 32, "num_hidden_layers": 24, "parallel_attn": False, "vocab_size": 50304,
    },
    "gpt2": {
        **GPT2, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12,
        "n_positions": 1024, "task_specific_params": {"text-generation": {"do_sample": True}},
        "vocab_size": 50257,
    },
    "starcoder": {
        **GPT2, "activation_function": "gelu", "attention_softmax_in_fp32": True, "inference_runner": 0,
        "model_type": "gpt_bigcode", "multi_query": True, "n_embd": 6144, "n_head": 48, "n_inner": 24576,
        "n_layer": 40, "n_positions": 8192, "pre_allocate_kv_cache": False, "scale_attn_weights": True,
        "scale_attention_softmax_in_fp32": True, "validate_runner_input": True, "vocab_size": 49152,
    },
    "openai-gpt": {
        "afn": "gelu", "attn_pdrop": 0.1, "embd_pdrop": 0.1, "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05, "model_type": "openai-gpt", "n_ctx": 512, "n_embd": 768, "n_head": 12,
        "n_layer": 12, "n_positions": 512, "n_special": 0, "predict_special_tokens": True, "resid_pdrop": 0.1,
        "vocab_size": 40478,
    },
    "opt-125m": {
        "_remove_final_layer_norm": False, "activation_dropout": 0.0, "activation_function": "relu",
        "do_layer_norm_before": True, "dropout": 0.1, "ffn_dim": 3072, "hidden_size": 768, "layerdrop": 0.0,
        "max_position_embeddings": 2048, "model_type": "opt", "num_attention_heads": 12,
        "num_hidden_layers": 12, "prefix": "</s>", "vocab_size": 50272, "word_embed_proj_dim": 768,
    },
    "opt-350m": {
        "_remove_final_layer_norm": False, "activation_function": "relu", "do_layer_norm_before": False,
        "dropout": 0.1, "ffn_dim": 4096, "hidden_size": 1024, "max_position_embeddings": 2048,
        "model_type": "opt", "num_attention_heads": 16, "num_hidden_layers": 24, "vocab_size": 50272,
        "word_embed_proj_dim": 512,
    },
    "gpt-neo-1.3B": {
        "activation_function": "gelu_new", "attention_dropout": 0,
        "attention_layers": ["global", "local"] * 12, "attention_types": [[["global", "local"], 12]],
        "embed_dropout": 0, "hidden_size": 2048, "intermediate_size": None, "layer_norm_epsilon": 1e-05,
        "max_position_embeddings": 2048, "model_type": "gpt_neo", "num_heads": 16, "num_layers": 24,
        "resid_dropout": 0, "vocab_size": 50257, "window_size": 256,
    },
    "biogpt": {
        "activation_dropout": 0.0, "hidden_act": "gelu", "hidden_size": 1024, "intermediate_size": 4096,
        "layer_norm_eps": 1e-12, "layerdrop": 0.0, "max_position_embeddings": 1024, "model_type": "biogpt",
        "num_attention_heads": 16, "num_hidden_layers": 24, "scale_embedding": True, "vocab_size": 42384,
    },
    "mpt-7b": {
        **MPT, "attn_config": {**MPT_ATTENTION, "alibi_bias_max": 8, "clip_qkv": None}, "d_model": 4096,
        "max_seq_len": 2048, "n_heads": 32, "n_layers": 32,
    },
    "mpt-7b-storywriter": {
        **MPT, "attn_config": {**MPT_ATTENTION, "alibi_bias_max": 16, "clip_qkv": 6.0}, "d_model": 4096,
        "max_seq_len": 65536, "n_heads": 32, "n_layers": 32,
    },
    "c4ai-command-r-v01": {
        "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 8192,
        "intermediate_size": 22528, "layer_norm_eps": 1e-05, "logit_scale": 0.0625,
        "max_position_embeddings": 8192, "model_max_length": 131072, "model_type": "cohere",
        "num_attention_heads": 64, "num_hidden_layers": 40, "num_key_value_heads": 64,
        "rope_theta": 8000000.0, "vocab_size": 256000,
    },
    "c4ai-command-r-plus": {
        "attention_bias": False, "hidden_act": "silu", "hidden_size": 12288, "intermediate_size": 33792,
        "layer_norm_eps": 1e-05, "logit_scale": 0.8333333333333334, "max_position_embeddings": 8192,
        "model_max_length": 131072, "model_type": "cohere", "num_attention_heads": 96,
        "num_hidden_layers": 64, "num_key_value_heads": 8, "rope_theta": 75000000.0, "use_qk_norm": True,
        "vocab_size": 256000,
    },
    "c4ai-command-r7b-12-2024": {
        "attention_bias": False, "cache_implementation": "hybrid", "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 4096, "intermediate_size": 14336, "layer_norm_eps": 1e-05, "layer_switch": 4,
        "logit_scale": 0.25, "max_position_embeddings": 132096, "model_type": "cohere2",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "order_of_interleaved_layers": "local_attn_first", "position_embedding_type": "rope_gptj",
        "rope_scaling": None, "rope_theta": 50000, "rotary_pct": 1.0, "sliding_window": 4096,
        "sliding_window_pattern": 4, "use_embedding_sharing": True, "use_gated_activation": True,
        "use_parallel_block": True, "use_parallel_embedding": False, "vocab_size": 256000,
    },
}  # fmt: skip
