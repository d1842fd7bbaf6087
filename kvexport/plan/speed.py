"""Time: what a decode step and a prefill take on a target, from bytes moved and arithmetic done.

Knows two fitted figures and their bands; must not know how a model came to its sizes. Everything here is an estimate.

A decode step moves every weight once (of the embedding one row, the head in its own precision) and the cache of all
tokens before it, where layers evict of those that they hold; each layer costs a fixed time besides, for launches and
dependencies. So
    seconds = layers · LAYER_SECONDS + bytes / (efficiency · bandwidth).
LAYER_SECONDS and DECODE.typical are the least squares, in the logarithm, over 17 published figures, with nothing fitted
to a single model or device: Qwen3 0.6B, 1.7B, 4B and 8B in INT4 after 2048 tokens on AGX Orin 64 GB, Orin NX 16 GB, Orin
Nano 8 GB (the two small ones) and Thor T5000 (TensorRT Edge-LLM 0.10, performance benchmarks), and Llama-2-7B in 4 bits on
AGX Orin 64 GB: 39.1 tokens/s with TinyChat (AWQ, arXiv 2306.00978), 42.9 and 47 with MLC (jetson-containers issue 412), at
128 tokens, as those prompts were short. llama.cpp, exllama and AutoGPTQ of 2023 (22.5, 15.9 and 13.4) are left out: they
had no fused 4-bit kernel for this GPU, and say what a runtime can lose, not what memory allows. Orin Nano is taken at its
68 GB/s without Super mode, which the page does not say, but its ratio to Orin NX does. Residuals: at most 13 %, 8 % as
root mean square; predicted 3 to 13 % too fast for Qwen3 on AGX Orin, 7 to 10 % too slow on Thor. Not fitted, and predicted
8 to 17 % too slow: six figures of MLC, which quantises the head too, on Orin Nano 8 GB with and without Super mode.
DECODE.low and .high are the least and greatest efficiency that any of the 17 implies.

Prefill does two operations for each weight and token and is bounded by arithmetic, or by reading the weights once a chunk.
Only three figures were found, Qwen3-8B in INT4, 2048 tokens (the same page): 51 % of the dense FP16 rate on AGX Orin, 67 %
on Orin NX, 17 % on Thor, where 4-bit weights are unpacked rather than multiplied. PREFILL.typical is their geometric mean.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvexport.devices.targets import Target
from kvexport.plan.memory import Precision, kv_bytes
from kvexport.plan.sizes import Sizes

LAYER_SECONDS = 31e-6


@dataclass(frozen=True)
class Band:
    """Share of a peak rate that is reached: at worst, typically and at best, of what is published."""

    low: float
    typical: float
    high: float


DECODE = Band(low=0.71, typical=0.82, high=0.92)
PREFILL = Band(low=0.17, typical=0.39, high=0.67)


def step_bytes(sizes: Sizes, stored: Precision, depth: int) -> int:
    """Bytes that a decode step reads after `depth` tokens."""
    head = sizes.head or sizes.embedding
    return stored.matrix_bytes(sizes) + (sizes.small + head) * stored.other + kv_bytes(sizes, stored, depth)


def decode_seconds(sizes: Sizes, stored: Precision, target: Target, depth: int, efficiency: float) -> float:
    """Seconds of one decode step after `depth` tokens, batch 1."""
    return sizes.layers * LAYER_SECONDS + step_bytes(sizes, stored, depth) / (efficiency * target.bandwidth)


def prefill_flops(sizes: Sizes, tokens: int) -> int:
    """Operations of a prompt of `tokens`: the layers' matrices for each, causal attention over the tokens that a layer
    holds, and the head for one."""
    attention = 0
    for layer, cache in enumerate(sizes.caches):
        gone = tokens - sizes.held(layer, tokens)
        attention += sizes.num_heads * cache.width * (tokens * tokens - gone * gone)
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
    """Seconds of a prompt of `tokens`, batch 1; None where the target's file has no rate for it.

    Args:
        efficiency: of arithmetic, from PREFILL.
        reading: of bandwidth, from DECODE.
        chunk: tokens that are computed at once; None: as many as the runtime does.
    """
    if target.fp16 is None or stored.bits == 32:
        return None
    chunks = -(-tokens // (sizes.chunk if chunk is None else chunk))
    arithmetic = prefill_flops(sizes, tokens) / (efficiency * target.fp16)
    return max(arithmetic, chunks * decode_seconds(sizes, stored, target, 0, reading))
