"""Published models: config.json, abridged to the keys that matter, and what must be read from it.

Many are older than the installed transformers: they spell rotary settings in the old way, or lack keys that
their class had a default for.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from support.published_layernorm_models import PUBLISHED


@dataclass(frozen=True)
class Model:
    """Keys of a published config.json, and what must be read.

    Attributes:
        sizes: hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads.
        rotary_dim, max_positions, scale, tied: as in `Architecture`; scale None: head_dim ** -0.5.
        config: other keys.
        window: sliding window; None: no layer has one.
        full: layers without it, if others have it.
        still: layers that do not rotate.
        theta: of RoPE in layers with full attention.
        local_theta: in layers with a window, if different.
        kind: RoPE scaling of layers with full attention.
        others: further attributes of `Architecture`.
    """

    model_type: str
    sizes: tuple[int, int, int, int, int]
    rotary_dim: int
    max_positions: int
    config: dict[str, Any]
    scale: float | None = None
    tied: bool = False
    window: int | None = None
    full: tuple[int, ...] = ()
    still: tuple[int, ...] = ()
    theta: float = 10000.0
    local_theta: float | None = None
    kind: str = "default"
    others: dict[str, Any] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        """The config.json."""
        names = (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
        )
        common = {"vocab_size": 32000, **dict(zip(names, self.sizes, strict=True))}
        return {"model_type": self.model_type, **common, **deepcopy(self.config)}


def llama3(factor: float) -> dict[str, Any]:
    return {
        "factor": factor,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }


def every(count: int, period: int) -> tuple[int, ...]:
    """Every so-many-th layer of `count`."""
    return tuple(range(period - 1, count, period))


def by_type(count: int, full: tuple[int, ...]) -> list[str]:
    return ["full_attention" if index in full else "sliding_attention" for index in range(count)]


NO_WINDOW = {"use_sliding_window": False}
LONG = {
    "long_factor": [1.5] * 48,
    "short_factor": [1.0] * 48,
    "type": "longrope",
}

MODELS = {
    "Llama-2-7B": Model(
        "llama",
        (4096, 11008, 32, 32, 32),
        128,
        4096,
        {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_scaling": None},
    ),
    "Llama-3.2-1B": Model(
        "llama",
        (2048, 8192, 16, 32, 8),
        64,
        131072,
        {
            "head_dim": 64,
            "max_position_embeddings": 131072,
            "rope_scaling": llama3(32.0),
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
        },
        tied=True,
        theta=500000.0,
        kind="llama3",
    ),
    "Vicuna-7B-v1.5-16k": Model(
        "llama",
        (4096, 11008, 32, 32, 32),
        128,
        16384,
        {"max_position_embeddings": 4096, "rope_scaling": {"factor": 4.0, "type": "linear"}},
        kind="linear",
    ),
    "CodeLlama-7B": Model(
        "llama",
        (4096, 11008, 32, 32, 32),
        128,
        16384,
        {"max_position_embeddings": 16384, "rope_theta": 1000000},
        theta=1e6,
    ),
    "Falcon3-1B": Model(
        "llama",
        (2048, 8192, 18, 8, 4),
        256,
        8192,
        {"head_dim": 256, "max_position_embeddings": 8192, "rope_theta": 1000042, "mlp_bias": False},
        theta=1000042.0,
    ),
    "SmolLM2-135M": Model(
        "llama",
        (576, 1536, 30, 9, 3),
        64,
        8192,
        {"max_position_embeddings": 8192, "rope_theta": 100000, "tie_word_embeddings": True},
        tied=True,
        theta=100000.0,
    ),
    "Qwen2.5-7B with YaRN": Model(
        "qwen2",
        (3584, 18944, 28, 28, 4),
        128,
        131072,
        {
            "max_position_embeddings": 32768,
            "max_window_layers": 28,
            "sliding_window": 131072,
            "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
            "rope_theta": 1000000.0,
            **NO_WINDOW,
        },
        theta=1e6,
        kind="yarn",
    ),
    "DeepSeek-R1-Distill-Qwen-1.5B": Model(
        "qwen2",
        (1536, 8960, 28, 12, 2),
        128,
        131072,
        {"max_position_embeddings": 131072, "max_window_layers": 21, "sliding_window": 4096, **NO_WINDOW},
    ),
    "Qwen3-0.6B": Model(
        "qwen3",
        (1024, 3072, 28, 16, 8),
        128,
        40960,
        {
            "head_dim": 128,
            "max_position_embeddings": 40960,
            "max_window_layers": 28,
            "rope_theta": 1000000,
            "sliding_window": None,
            "tie_word_embeddings": True,
            **NO_WINDOW,
        },
        tied=True,
        theta=1e6,
    ),
    "Gemma-2B": Model(
        "gemma",
        (2048, 16384, 18, 8, 1),
        256,
        8192,
        {"head_dim": 256, "hidden_act": "gelu", "max_position_embeddings": 8192, "rms_norm_eps": 1e-6},
        tied=True,
        others={"activation": "gelu_tanh", "embedding_multiplier": 2048**0.5},
    ),
    "Gemma-2-2B": Model(
        "gemma2",
        (2304, 9216, 26, 8, 4),
        256,
        8192,
        {
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "head_dim": 256,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "max_position_embeddings": 8192,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
        },
        tied=True,
        window=4096,
        full=every(26, 2),
        others={"softcap": 50.0, "logit_softcap": 30.0, "embedding_multiplier": 48.0},
    ),
    "Gemma-2-27B": Model(
        "gemma2",
        (4608, 36864, 46, 32, 16),
        128,
        8192,
        {
            "head_dim": 128,
            "max_position_embeddings": 8192,
            "query_pre_attn_scalar": 144,
            "sliding_window": 4096,
        },
        scale=1 / 12,
        tied=True,
        window=4096,
        full=every(46, 2),
        others={"softcap": 50.0, "logit_softcap": 30.0},
    ),
    "Gemma-3-1B": Model(
        "gemma3_text",
        (1152, 6912, 26, 4, 1),
        256,
        32768,
        {
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "max_position_embeddings": 32768,
            "query_pre_attn_scalar": 256,
            "rope_local_base_freq": 10000,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
        },
        tied=True,
        window=512,
        full=every(26, 6),
        theta=1e6,
        local_theta=10000.0,
        others={"softcap": None, "logit_softcap": None, "activation": "gelu_tanh"},
    ),
    "Gemma-3-4B, text": Model(
        "gemma3_text",
        (2560, 10240, 34, 8, 4),
        256,
        131072,
        {
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
            "max_position_embeddings": 131072,
        },
        tied=True,
        window=1024,
        full=every(34, 6),
        theta=1e6,
        local_theta=10000.0,
        kind="linear",
    ),
    "Phi-3-mini-4k": Model(
        "phi3",
        (3072, 8192, 32, 32, 32),
        96,
        4096,
        {
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rope_scaling": None,
            "sliding_window": 2047,
        },
        window=2047,
    ),
    "Phi-3-mini-128k": Model(
        "phi3",
        (3072, 8192, 32, 32, 32),
        96,
        131072,
        {
            "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096,
            "rope_scaling": LONG,
            "sliding_window": 262144,
        },
        window=262144,
        kind="longrope",
    ),
    "Phi-4-mini": Model(
        "phi3",
        (3072, 8192, 32, 24, 8),
        96,
        131072,
        {
            "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096,
            "partial_rotary_factor": 0.75,
            "rope_scaling": LONG,
            "sliding_window": 262144,
            "tie_word_embeddings": True,
        },
        tied=True,
        window=262144,
        kind="longrope",
    ),
    "Mistral-7B-v0.1": Model(
        "mistral",
        (4096, 14336, 32, 32, 8),
        128,
        32768,
        {"max_position_embeddings": 32768, "sliding_window": 4096, "rope_theta": 10000.0},
        window=4096,
    ),
    "Mistral-7B-v0.3": Model(
        "mistral",
        (4096, 14336, 32, 32, 8),
        128,
        32768,
        {"max_position_embeddings": 32768, "sliding_window": None, "rope_theta": 1000000.0},
        theta=1e6,
    ),
    "Mistral-Nemo-12B": Model(
        "mistral",
        (5120, 14336, 40, 32, 8),
        128,
        1024000,
        {
            "head_dim": 128,
            "max_position_embeddings": 1024000,
            "sliding_window": None,
            "rope_theta": 1000000.0,
        },
        theta=1e6,
    ),
    "SmolLM3-3B": Model(
        "smollm3",
        (2048, 11008, 36, 16, 4),
        128,
        65536,
        {
            "max_position_embeddings": 65536,
            "no_rope_layer_interval": 4,
            "no_rope_layers": [1, 1, 1, 0] * 9,
            "layer_types": ["full_attention"] * 36,
            "rope_theta": 5000000.0,
            "sliding_window": None,
            **NO_WINDOW,
        },
        tied=True,
        theta=5e6,
        still=every(36, 4),
    ),
    "Granite-3.3-2B": Model(
        "granite",
        (2048, 8192, 40, 32, 8),
        64,
        131072,
        {
            "attention_multiplier": 0.015625,
            "embedding_multiplier": 12.0,
            "logits_scaling": 8.0,
            "residual_multiplier": 0.22,
            "max_position_embeddings": 131072,
            "rope_theta": 10000000.0,
            "tie_word_embeddings": True,
        },
        scale=1 / 64,
        tied=True,
        theta=1e7,
        others={"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logit_multiplier": 0.125},
    ),
    "Granite-4.0-350M": Model(
        "granitemoehybrid",
        (1024, 2048, 28, 16, 4),
        64,
        32768,
        {
            "attention_multiplier": 0.015625,
            "embedding_multiplier": 12,
            "layer_types": ["attention"] * 28,
            "logits_scaling": 4,
            "mamba_d_state": 256,
            "mamba_expand": 2,
            "max_position_embeddings": 32768,
            "num_experts_per_tok": 0,
            "num_local_experts": 0,
            "position_embedding_type": "rope",
            "residual_multiplier": 0.263,
            "rope_theta": 10000000,
            "shared_intermediate_size": 2048,
            "tie_word_embeddings": True,
        },
        scale=1 / 64,
        tied=True,
        theta=1e7,
        others={"embedding_multiplier": 12.0, "residual_multiplier": 0.263, "logit_multiplier": 0.25},
    ),
    "OLMo-1.7-7B": Model(
        "olmo",
        (4096, 11008, 32, 32, 32),
        128,
        4096,
        {"clip_qkv": 8.0, "max_position_embeddings": 4096},
        others={"clip": 8.0, "norm_eps": 1e-5},
    ),
    "OLMo-2-1B": Model(
        "olmo2",
        (2048, 8192, 16, 16, 16),
        128,
        4096,
        {"max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 500000},
        theta=500000.0,
    ),
    "OLMo-3-7B": Model(
        "olmo3",
        (4096, 11008, 32, 32, 32),
        128,
        65536,
        {
            "layer_types": by_type(32, every(32, 4)),
            "max_position_embeddings": 65536,
            "rope_scaling": {
                "attention_factor": 1.2079441541679836,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "factor": 8.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "yarn",
            },
            "rope_theta": 500000,
            "sliding_window": 4096,
        },
        window=4096,
        full=every(32, 4),
        theta=500000.0,
        kind="yarn",
    ),
    "EXAONE-3.5-2.4B": Model(
        "exaone",
        (2560, 7168, 30, 32, 8),
        80,
        32768,
        {
            "activation_function": "silu",
            "head_dim": 80,
            "layer_norm_epsilon": 1e-5,
            "max_position_embeddings": 32768,
            "num_layers": 30,
            "rope_scaling": llama3(8.0),
            "rope_theta": 1000000,
            "tie_word_embeddings": True,
        },
        tied=True,
        theta=1e6,
        kind="llama3",
    ),
    "EXAONE-4-1.2B": Model(
        "exaone4",
        (2048, 4096, 30, 32, 8),
        64,
        65536,
        {
            "head_dim": 64,
            "layer_types": ["full_attention"] * 30,
            "max_position_embeddings": 65536,
            "rope_scaling": llama3(16.0),
            "rope_theta": 1000000,
            "sliding_window": None,
            "sliding_window_pattern": None,
            "tie_word_embeddings": True,
        },
        tied=True,
        theta=1e6,
        kind="llama3",
    ),
    "EXAONE-4-32B": Model(
        "exaone4",
        (5120, 27392, 64, 40, 8),
        128,
        131072,
        {
            "head_dim": 128,
            "max_position_embeddings": 131072,
            "rope_scaling": llama3(16.0),
            "rope_theta": 1000000,
            "layer_types": by_type(64, every(64, 4)),
            "sliding_window": 4096,
            "sliding_window_pattern": "LLLG",
        },
        window=4096,
        full=every(64, 4),
        still=every(64, 4),
        theta=1e6,
        kind="llama3",
    ),
    "MiniCPM-2B": Model(
        "minicpm",
        (2304, 5760, 40, 36, 36),
        64,
        4096,
        {"dim_model_base": 256, "max_position_embeddings": 4096, "scale_depth": 1.4, "scale_emb": 12},
        tied=True,
        others={
            "embedding_multiplier": 12.0,
            "residual_multiplier": 1.4 / 40**0.5,
            "logit_multiplier": 256 / 2304,
        },
    ),
    "InternLM2-7B": Model(
        "internlm2",
        (4096, 14336, 32, 32, 8),
        128,
        65536,
        {
            "bias": False,
            "max_position_embeddings": 32768,
            "rope_scaling": {"factor": 2.0, "type": "dynamic"},
            "rope_theta": 1000000,
        },
        theta=1e6,
        kind="dynamic",
    ),
    "InternLM-7B": Model(
        "internlm", (4096, 11008, 32, 32, 32), 128, 2048, {"bias": True, "max_position_embeddings": 2048}
    ),
    "InternLM3-8B": Model(
        "internlm3",
        (4096, 10240, 48, 32, 2),
        128,
        196608,
        {
            "bias": False,
            "head_dim": 128,
            "max_position_embeddings": 32768,
            "qkv_bias": False,
            "rope_scaling": {"factor": 6.0, "rope_type": "dynamic"},
            "rope_theta": 50000000,
        },
        theta=5e7,
        kind="dynamic",
    ),
    "Hunyuan-1.8B": Model(
        "hunyuan_v1_dense",
        (2048, 6144, 32, 16, 4),
        128,
        262144,
        {
            "attention_head_dim": 128,
            "head_dim": 128,
            "max_position_embeddings": 262144,
            "rope_scaling": {"alpha": 1000.0, "factor": 1.0, "mscale_all_dim": 0.0, "type": "dynamic"},
            "tie_word_embeddings": True,
            "use_cla": False,
            "use_qk_norm": True,
        },
        tied=True,
        theta=10000.0 * 1000 ** (128 / 126),
    ),
    "ERNIE-4.5-0.3B": Model(
        "ernie4_5",
        (1024, 3072, 18, 16, 2),
        128,
        131072,
        {"head_dim": 128, "max_position_embeddings": 131072, "rope_theta": 500000, "use_bias": False},
        tied=True,
        theta=500000.0,
    ),
    "Seed-OSS-36B": Model(
        "seed_oss",
        (5120, 27648, 64, 80, 8),
        128,
        524288,
        {
            "attention_bias": True,
            "head_dim": 128,
            "max_position_embeddings": 524288,
            "rope_scaling": {"rope_type": "default"},
            "rope_theta": 10000000.0,
        },
        theta=1e7,
    ),
    "GLM-4-9B-chat": Model(
        "chatglm",
        (4096, 13696, 40, 32, 2),
        64,
        131072,
        {
            "add_bias_linear": False,
            "add_qkv_bias": True,
            "ffn_hidden_size": 13696,
            "kv_channels": 128,
            "layernorm_epsilon": 1.5625e-07,
            "multi_query_attention": True,
            "multi_query_group_num": 2,
            "num_layers": 40,
            "original_rope": True,
            "padded_vocab_size": 151552,
            "rmsnorm": True,
            "rope_ratio": 500,
            "seq_length": 131072,
        },
        theta=5e6,
        others={"norm_eps": 1.5625e-07},
    ),
    "GLM-4-9B-chat-hf": Model(
        "glm",
        (4096, 13696, 40, 32, 2),
        64,
        131072,
        {"max_position_embeddings": 131072, "partial_rotary_factor": 0.5, "rms_norm_eps": 1.5625e-07},
        others={"norm_eps": 1.5625e-07},
    ),
    "GLM-4-9B-0414": Model(
        "glm4", (4096, 13696, 40, 32, 2), 64, 32768, {"max_position_embeddings": 32768, "rms_norm_eps": 1e-05}
    ),
    "Nemotron-Mini-4B": Model(
        "nemotron",
        (3072, 9216, 32, 24, 8),
        64,
        4096,
        {
            "hidden_act": "relu2",
            "max_position_embeddings": 4096,
            "norm_eps": 1e-5,
            "partial_rotary_factor": 0.5,
        },
        others={"activation": "relu_squared"},
    ),
    "HyperCLOVA X SEED Think 14B": Model(
        "hyperclovax",
        (6144, 14336, 38, 48, 8),
        128,
        131072,
        {
            "attention_multiplier": 0.0078125,
            "embedding_multiplier": 10.0,
            "head_dim": 128,
            "logits_scaling": 0.125,
            "max_position_embeddings": 131072,
            "residual_multiplier": 1.0,
            "rope_theta": 100000000,
            "use_post_norm": True,
        },
        scale=1 / 128,
        theta=1e8,
        others={"logit_multiplier": 0.125, "embedding_multiplier": 10.0},
    ),
}


def published_configs() -> dict[str, dict[str, Any]]:
    """config.json of every published model, by its name."""
    return {**{name: model.json() for name, model in MODELS.items()}, **PUBLISHED}
