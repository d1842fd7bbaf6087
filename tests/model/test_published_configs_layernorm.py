"""Published configs of LayerNorm families, with the keys and spellings that their authors wrote.

Each is read as it is, and again with small sizes, where random weights must give the logits of transformers,
which reads the same file.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.family_settings import TOKENS, VOCAB
from support.parity import our_logits, relative_error, their_logits, token_ids
from support.published_layernorm_models import PUBLISHED

from kvexport.model.architecture import read_architecture

# layers, heads, KV heads, head_dim, rotated numbers, positions, layers with a window
EXPECTED: dict[str, tuple[int, int, int, int, int, int | None, int]] = {
    "stablelm-2-1_6b": (24, 32, 32, 64, 16, 4096, 0),
    "stablelm-2-12b": (40, 32, 8, 160, 40, 4096, 0),
    "starcoder2-3b": (30, 24, 2, 128, 128, 16384, 30),
    "phi-2": (32, 32, 32, 80, 32, 2048, 0),
    "pythia-160m": (12, 12, 12, 64, 16, 2048, 0),
    "RedPajama-INCITE-7B": (32, 32, 32, 128, 128, 2048, 0),
    "gpt-j-6b": (28, 16, 16, 256, 64, 2048, 0),
    "codegen-350M-mono": (20, 16, 16, 64, 32, 2048, 0),
    "falcon-7b": (32, 71, 1, 64, 64, 2048, 0),
    "falcon-40b": (60, 128, 8, 64, 64, 2048, 0),
    "falcon-11B": (60, 32, 8, 128, 128, 8192, 0),
    "falcon-rw-1b": (24, 32, 32, 64, 0, None, 0),
    "gpt2": (12, 12, 12, 64, 0, 1024, 0),
    "starcoder": (40, 48, 1, 128, 0, 8192, 0),
    "openai-gpt": (12, 12, 12, 64, 0, 512, 0),
    "opt-125m": (12, 12, 12, 64, 0, 2048, 0),
    "opt-350m": (24, 16, 16, 64, 0, 2048, 0),
    "gpt-neo-1.3B": (24, 16, 16, 128, 0, 2048, 12),
    "biogpt": (24, 16, 16, 64, 0, 1024, 0),
    "mpt-7b": (32, 32, 32, 128, 0, 2048, 0),
    "mpt-7b-storywriter": (32, 32, 32, 128, 0, 65536, 0),
    "c4ai-command-r-v01": (40, 64, 64, 128, 128, 8192, 0),
    "c4ai-command-r-plus": (64, 96, 8, 128, 128, 8192, 0),
    "c4ai-command-r7b-12-2024": (32, 32, 8, 128, 128, 132096, 24),
}

# small sizes for keys that a config has
SMALL = {
    "vocab_size": VOCAB, "num_hidden_layers": 5, "n_layer": 2, "n_layers": 2, "num_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "num_key_value_heads": 2,
    "num_kv_heads": 2, "hidden_size": 160, "n_embd": 64, "d_model": 32, "head_dim": 40, "rotary_dim": 8,
    "intermediate_size": 48, "ffn_hidden_size": 48, "ffn_dim": 48, "n_inner": 48, "sliding_window": 7,
    "window_size": 7, "attention_layers": ["global", "local"], "attention_types": [[["global", "local"], 1]],
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config(name: str) -> None:
    read = read_architecture(PUBLISHED[name])
    windows = sum(layer.window is not None for layer in read.layers)
    sizes = (len(read.layers), read.num_heads, read.num_kv_heads, read.head_dim)
    assert (*sizes, read.rotary_dim, read.max_positions, windows) == EXPECTED[name]
    assert read.hidden_size == sizes[1] * sizes[3]


@pytest.mark.slow
@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("name", PUBLISHED)
def test_logits_of_a_small_model_equal_transformers(
    tiny_checkpoint: Callable[..., Path], edit_checkpoint: Callable[..., Path], name: str
) -> None:
    published = PUBLISHED[name]
    small = {key: SMALL.get(key, value) for key, value in published.items() if value is not None}
    if small.get("word_embed_proj_dim") not in (None, published.get("hidden_size")):
        small["word_embed_proj_dim"] = 16
    elif "word_embed_proj_dim" in small:
        small["word_embed_proj_dim"] = small["hidden_size"]
    if published.get("num_key_value_heads", 0) == published.get("num_attention_heads"):
        small["num_key_value_heads"] = SMALL["num_attention_heads"]
    small |= TOKENS
    family = small.pop("model_type")
    path = edit_checkpoint(tiny_checkpoint(family, **small))
    (path / "config.json").write_text(json.dumps({"model_type": family, **small}))
    ids = token_ids()
    ours, theirs = our_logits(path, ids, torch.float64), their_logits(path, ids, torch.float64)
    assert relative_error(ours, theirs) < 1e-9
