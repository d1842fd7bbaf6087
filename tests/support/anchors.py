"""Published decode and prefill speeds at batch 1 with 4-bit weights, and the configs of their models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_QWEN3 = {
    "model_type": "qwen3",
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960,
}
_LLAMA = {"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5}


def _config(
    base: dict[str, Any], hidden: int, layers: int, heads: int, inner: int, tied: bool, **more: int
) -> dict[str, Any]:
    return {
        **base,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "tie_word_embeddings": tied,
        **more,
    }


CONFIGS = {
    "Qwen3-0.6B": _config(_QWEN3, 1024, 28, 16, 3072, True),
    "Qwen3-1.7B": _config(_QWEN3, 2048, 28, 16, 6144, True),
    "Qwen3-4B": _config(_QWEN3, 2560, 36, 32, 9728, True),
    "Qwen3-8B": _config(_QWEN3, 4096, 36, 32, 12288, False),
    "Llama-2-7B": _config(
        _LLAMA,
        4096,
        32,
        32,
        11008,
        False,
        num_key_value_heads=32,
        vocab_size=32000,
        max_position_embeddings=4096,
    ),
    "Llama-2-13B": _config(
        _LLAMA,
        5120,
        40,
        40,
        13824,
        False,
        num_key_value_heads=40,
        vocab_size=32000,
        max_position_embeddings=4096,
    ),
    "Llama-3.1-8B": _config(
        _LLAMA,
        4096,
        32,
        32,
        14336,
        False,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=131072,
    ),
    "Llama-3.2-3B": _config(
        _LLAMA,
        3072,
        28,
        24,
        8192,
        True,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=131072,
    ),
    "Qwen2.5-7B": _config(
        {**_LLAMA, "model_type": "qwen2"},
        3584,
        28,
        28,
        18944,
        False,
        num_key_value_heads=4,
        vocab_size=152064,
        max_position_embeddings=32768,
    ),
}
PARAMETERS = {  # from their model cards and safetensors files
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Llama-2-7B": 6_738_415_616,
    "Llama-2-13B": 13_015_864_320,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.2-3B": 3_212_749_824,
    "Qwen2.5-7B": 7_615_616_512,
}


@dataclass(frozen=True)
class Anchor:
    model: str
    target: str
    depth: int  # tokens in the cache
    tokens_per_second: float
    runtime: str
    weights: str = "int4"  # of the layers; the rest is float16

    def __str__(self) -> str:
        return f"{self.model}, {self.target}, {self.runtime}, {self.weights}"


def _qwen3(target: str, *figures: float) -> list[Anchor]:
    names = [name for name in CONFIGS if name.startswith("Qwen3")]
    edge = "TensorRT Edge-LLM 0.10"
    return [Anchor(name, target, 2048, figure, edge) for name, figure in zip(names, figures, strict=False)]


FITTED = [
    *_qwen3("agx-orin-64gb", 162.5, 89.5, 50.7, 30.6),
    *_qwen3("orin-nx-16gb", 98.9, 52.2, 29.2, 17.5),
    *_qwen3("orin-nano-8gb", 61.0, 32.3),
    *_qwen3("thor-t5000", 253, 135, 76.5, 46.4),
    Anchor("Llama-2-7B", "agx-orin-64gb", 128, 39.1, "TinyChat, AWQ"),
    Anchor("Llama-2-7B", "agx-orin-64gb", 128, 42.9, "MLC, q4f16_ft, first published"),
    Anchor("Llama-2-7B", "agx-orin-64gb", 128, 47.0, "MLC, q4f16_ft, later"),
]
HELD_OUT = [  # developer.nvidia.com/blog, Jetson Orin Nano Developer Kit gets a Super boost: MLC, INT4
    Anchor("Llama-3.1-8B", "orin-nano-8gb", 128, 14.0, "MLC"),
    Anchor("Llama-3.1-8B", "orin-nano-8gb-super", 128, 19.14, "MLC"),
    Anchor("Llama-3.2-3B", "orin-nano-8gb", 128, 27.7, "MLC"),
    Anchor("Llama-3.2-3B", "orin-nano-8gb-super", 128, 43.07, "MLC"),
    Anchor("Qwen2.5-7B", "orin-nano-8gb", 128, 14.2, "MLC"),
    Anchor("Qwen2.5-7B", "orin-nano-8gb-super", 128, 21.75, "MLC"),
    # figure of arXiv 2306.00978; jetson-containers issue 532
    Anchor("Llama-2-13B", "agx-orin-64gb", 128, 21.2, "TinyChat"),
    Anchor("Llama-2-13B", "agx-orin-64gb", 128, 20.6, "MLC"),
    # README of tinychat in mit-han-lab/llm-awq, table of Orin; Llama-3-8B has the shape of Llama-3.1-8B
    Anchor("Llama-3.1-8B", "agx-orin-64gb", 128, 1000 / 32.55, "TinyChat"),
    Anchor("Llama-3.1-8B", "agx-orin-64gb", 128, 1000 / 96.24, "Hugging Face", "float16"),
    Anchor("Llama-2-7B", "agx-orin-64gb", 128, 1000 / 86.80, "Hugging Face", "float16"),
    # performance benchmarks of TensorRT Edge-LLM 0.4.0
    Anchor("Llama-3.1-8B", "thor-t5000", 383, 50.8, "TensorRT Edge-LLM 0.4.0"),
    Anchor("Qwen3-4B", "thor-t5000", 364, 76.4, "TensorRT Edge-LLM 0.4.0"),
    Anchor("Qwen3-0.6B", "thor-t5000", 366, 270.2, "TensorRT Edge-LLM 0.4.0"),
]
TOO_FAST = [  # predicted more than 25 % too fast: the same README against its own paper, and a 70B model
    Anchor("Llama-2-7B", "agx-orin-64gb", 512, 1000 / 32.14, "TinyChat, README"),
    Anchor("Llama-2-13B", "agx-orin-64gb", 512, 1000 / 58.20, "TinyChat, README"),
]
SLOWER = [  # of 2023, without a fused 4-bit kernel for this GPU
    Anchor("Llama-2-7B", "agx-orin-64gb", 128, 22.5, "llama.cpp"),
    Anchor("Llama-2-7B", "agx-orin-64gb", 128, 15.9, "exllama"),
    Anchor("Llama-2-7B", "agx-orin-64gb", 128, 13.4, "AutoGPTQ"),
]
PREFILL_SECONDS = {
    "agx-orin-64gb": 1.384,
    "orin-nx-16gb": 2.944,
    "thor-t5000": 0.663,
}  # Qwen3-8B, 2048 tokens
