"""Estimate the time of a decode step and of a prefill on a target, from bytes moved and arithmetic.

A decode step reads every weight once (one row of the embedding, the head in its own precision) and the cache
of all cached tokens. Each layer adds a fixed time for launches and dependencies:
    seconds = layers · LAYER_SECONDS + bytes / (efficiency · bandwidth).
LAYER_SECONDS and DECODE.typical are a least-squares fit, in the logarithm, to 17 published measurements;
nothing is fitted to a single model or device:
- Qwen3 0.6B, 1.7B, 4B and 8B in INT4 after 2048 tokens on AGX Orin 64 GB, Orin NX 16 GB, Orin Nano 8 GB (the
  two smaller models) and Thor T5000: TensorRT Edge-LLM 0.10, performance benchmarks.
- Llama-2-7B in 4 bits on AGX Orin 64 GB: 39.1 tokens/s with TinyChat (AWQ, arXiv 2306.00978), 42.9 and 47
  with MLC (jetson-containers issue 412), at 128 tokens, since those prompts were short.
llama.cpp, exllama and AutoGPTQ of 2023 (22.5, 15.9 and 13.4 tokens/s) are left out: they had no fused 4-bit
kernel for this GPU, so that memory was not their limit. Orin Nano counts with 68 GB/s, without Super mode;
the page does not name the mode, but the ratio to Orin NX shows it. The residuals are at most 13 %, with a
root mean square of 8 %: predictions are 3 to 13 % too fast for Qwen3 on AGX Orin and 7 to 10 % too slow on
Thor. DECODE.low and .high are the lowest and the highest efficiency of the 17 measurements.

14 measurements that are not part of the fit are predicted within 25 %: six of MLC in INT4 on Orin Nano 8 GB,
with and without Super mode (8 to 17 % too slow; MLC quantises the head too); Llama-2-13B in 4 bits on AGX
Orin with TinyChat and MLC; Llama-3-8B on AGX Orin in INT4 (TinyChat) and, with Llama-2-7B, in float16
(Hugging Face); three of TensorRT Edge-LLM 0.4 in INT4 on Thor. Not within 25 %: the README of TinyChat gives
31 and 17 tokens/s for Llama-2-7B and 13B on Orin, where the paper has 39.1 and 21.2, and Llama-2-70B (3.5
tokens/s) is predicted a third too fast.

Prefill does two operations for each weight and token. Its limit is arithmetic, or reading the weights once
for each chunk. Only three measurements were found, of Qwen3-8B in INT4 with 2048 tokens on the same page: 51
% of the dense FP16 rate on AGX Orin, 67 % on Orin NX, and 17 % on Thor, which unpacks 4-bit weights.
PREFILL.typical is their geometric mean.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvexport.devices.targets import Target
from kvexport.plan.memory import kv_bytes
from kvexport.plan.sizes import Sizes
from kvexport.plan.weights import Precision

LAYER_SECONDS = 31e-6


@dataclass(frozen=True)
class Band:
    """Fraction of a peak rate that published measurements reach: lowest, typical and highest."""

    low: float
    typical: float
    high: float


DECODE = Band(low=0.715, typical=0.82, high=0.92)
PREFILL = Band(low=0.17, typical=0.39, high=0.67)


def step_bytes(sizes: Sizes, stored: Precision, depth: int) -> int:
    """Bytes that a decode step reads after `depth` tokens."""
    return sizes.weight_bytes(stored).read + kv_bytes(sizes, stored, depth)


def decode_seconds(sizes: Sizes, stored: Precision, target: Target, depth: int, efficiency: float) -> float:
    """Seconds of one decode step after `depth` tokens at batch 1."""
    return sizes.layers * LAYER_SECONDS + step_bytes(sizes, stored, depth) / (efficiency * target.bandwidth)


def prefill_flops(sizes: Sizes, tokens: int) -> int:
    """Operations of a prompt of `tokens` tokens: the layers' matrices for each token, causal attention over
    the cached tokens, and the head for one token."""
    attention = 0
    for layer, cache in enumerate(sizes.caches):
        evicted = tokens - sizes.cached_tokens(layer, tokens)
        attention += sizes.num_heads * cache.width * (tokens * tokens - evicted * evicted)
    return 2 * sizes.matrices * tokens + attention + 2 * (sizes.head or sizes.embedding)


def prefill_seconds(
    sizes: Sizes,
    stored: Precision,
    target: Target,
    tokens: int,
    efficiency: float,
    reading: float,
    *,
    chunk: int | None = None,
) -> float | None:
    """Seconds of a prompt of `tokens` tokens at batch 1; None if the target's file has no rate for it.

    Args:
        efficiency: fraction of the arithmetic rate, from PREFILL.
        reading: fraction of the bandwidth, from DECODE.
        chunk: tokens that are computed in one call; None: the chunk of the runtime.
    """
    if target.fp16 is None or stored.dtype == "float32":
        return None
    chunks = -(-tokens // (sizes.chunk if chunk is None else chunk))
    arithmetic = prefill_flops(sizes, tokens) / (efficiency * target.fp16)
    return max(arithmetic, chunks * decode_seconds(sizes, stored, target, 0, reading))
