"""`kvexport plan` counts a sliding window as the window and one chunk, as the documentation says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvexport.bundle.graph_io import CHUNK
from kvexport.eviction.config import Eviction, EvictionRequest
from kvexport.plan.memory import kv_bytes, kv_bytes_per_token
from kvexport.plan.planner import plan
from kvexport.plan.sizes import trained_sizes
from kvexport.plan.weights import precision

HALF, MIB, CONTEXT = precision("float16"), 2**20, 32_768
COMMON = {"vocab_size": 1000, "rms_norm_eps": 1e-6, "max_position_embeddings": 131_072}
MISTRAL: dict[str, Any] = COMMON | {
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_theta": 10_000.0,
    "hidden_act": "silu",
    "sliding_window": 4096,
}
GEMMA: dict[str, Any] = COMMON | {
    "model_type": "gemma3_text",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "num_hidden_layers": 26,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
}
LARGER = {"hidden_size": 2560, "num_hidden_layers": 34, "num_attention_heads": 8, "num_key_value_heads": 4}
# KV cache in MiB at 32,768 tokens in float16: of all tokens, and with windows
MODELS = {
    "Mistral 7B v0.1": (MISTRAL, 4096, 528),
    "Gemma 3 1B": (GEMMA, 832, 142),
    "Gemma 3 4B": (GEMMA | LARGER | {"sliding_window": 1024}, 4352, 770),
}


def config_of(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_the_cache_of_published_models(name: str, tmp_path: Path) -> None:
    config, full, windowed = MODELS[name]
    sizes = trained_sizes(config_of(tmp_path, config)).with_kv_heads(config["num_key_value_heads"])
    assert round(CONTEXT * kv_bytes_per_token(sizes, HALF) / MIB) == full
    assert round(kv_bytes(sizes, HALF, CONTEXT) / MIB) == windowed


def test_a_window_counts_as_itself_and_one_chunk(tmp_path: Path) -> None:
    sizes = trained_sizes(config_of(tmp_path, MISTRAL)).with_kv_heads(8)
    for tokens, slots in ((100, 100), (4096, 4096), (4200, 4200), (CONTEXT, 4096 + CHUNK)):
        assert kv_bytes(sizes, HALF, tokens) == slots * kv_bytes_per_token(sizes, HALF)
    evicting = replace(sizes, eviction=Eviction("window", 68, protect_first=4, skip_layers=(0,)))
    assert [evicting.cached_tokens(layer, CONTEXT) for layer in (0, 1)] == [4096 + 16, 68]


def test_a_budget_beyond_the_window_evicts_in_full_attention_only(tmp_path: Path) -> None:
    path = config_of(tmp_path, GEMMA)
    windowed = plan(path, None, eviction=EvictionRequest(512)).eviction
    assert windowed is not None and len(windowed.skip_layers) == 22
    all_evict = plan(path, None, eviction=EvictionRequest(511)).eviction
    assert all_evict is not None and all_evict.skip_layers == ()
    assert plan(config_of(tmp_path, MISTRAL), None, eviction=EvictionRequest(4096)).eviction is None
