"""Settings that configs of tiny models share: sizes, RoPE scaling, windows."""

from __future__ import annotations

from typing import Any

VOCAB = 67
TOKENS = {"bos_token_id": 1, "eos_token_id": 2}
# the names that most families use
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0,
    **TOKENS,
}  # fmt: skip
# the names of GPT-2 and models that follow it
GPT_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **TOKENS,
}  # fmt: skip

LINEAR = {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32, "rope_theta": 10000.0,
}  # fmt: skip
WINDOW = {"use_sliding_window": True, "sliding_window": 7}
# original contexts of scaled RoPE are exceeded by the tests' prompt
YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
