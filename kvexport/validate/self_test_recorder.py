"""Record the self-test of a bundle: a prompt, the reference's greedy continuation, and its outputs for both.

A continuation needs all converted layers for every token, and a build has one in memory at a time. So each
layer is saved to a temporary folder in the bundle's dtype, and loaded again for the prompt and for each token
after it. `kvexport.runtime.self_test` compares a runtime with the record.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kvexport.bundle.formats import BYTES
from kvexport.bundle.self_test_file import (
    RANKED_BY_NORM,
    ReferenceOutputs,
    Row,
    Tolerance,
    steady_scores,
    write_reference_outputs,
)
from kvexport.eviction.config import Eviction
from kvexport.eviction.reference_cache import EvictingCache
from kvexport.model import reference
from kvexport.model.decoder import Decoder, Layer, map_tensors, tensors_of
from kvexport.progress import Progress

PROMPT, CONTINUATION = 16, 24  # tokens
_FREE_SLOTS = 8  # tokens of the continuation that get an empty slot in layers that evict; later ones evict
_LOGITS = 16  # logits recorded of each row

# Largest errors of valid bundles, measured with ONNX Runtime on a CPU: (logits, norms)
#                                                             float32           float16
# a trained model of 5 layers, plain and all evictions        5e-6, 5e-7        5e-3, 5e-4
# 2 and 24 random layers of all styles, plain and evicting    6e-6, 8e-7        8e-3, 1e-3
# 24 random layers with attention 3 times as sharp            1e-5, 2e-6        3e-2, 6e-3
# 2 random layers of every family, whole and half the cache                     2e-2, 5e-3
# 4 to 12 of those with large norms, multipliers, softcaps    3e-5, 2e-6        3e-2, 7e-3
# The same 6 times as sharp amplify every rounding: 2e-4, 1e-5 and 2e-1, 3e-2; in float16 that bundle is not
# valid. The likeliest token stays the likeliest if its margin is larger than twice the error of a logit.
_TOLERANCES = {
    "float32": Tolerance(logits=5e-4, norms=1e-4, tie=1e-3),
    "float16": Tolerance(logits=0.1, norms=0.02, tie=0.2),
    "bfloat16": Tolerance(logits=0.3, norms=0.06, tie=0.6),
}
# Not measured on CUDA and TensorRT, which multiply float32 as TF32 by default; TF32 rounds like float16.
TOLERANCES: dict[str, Mapping[str, Tolerance]] = {
    "cpu": _TOLERANCES,
    **{provider: _TOLERANCES | {"float32": _TOLERANCES["float16"]} for provider in ("cuda", "tensorrt")},
}

# ONNX Runtime's CPU rounds activations to int8 in linear maps with integer weights. Errors with int4:
# a trained model of 6 layers 4e-2, 7e-3; SmolLM2-135M 2e-1, 5e-2; 24 random layers 1e-1, 1e-2, and with
# attention 3 times as sharp 4e-1, 5e-2. Wrong numbers cause 1 or more. `kvexport validate` computes without
# this rounding, under the gates of float weights.
_INT8_ACTIVATIONS = Tolerance(logits=0.8, norms=0.15, tie=0.8)
QUANTIZED_TOLERANCES = TOLERANCES | {"cpu": dict.fromkeys(BYTES, _INT8_ACTIVATIONS)}


class SelfTestRecorder:
    """Save converted layers one after another, then decode with them greedily.

    The prompt is the first tokens of `token_ids`, then random ones; prompt and continuation fit `capacity`.
    Layers that evict have few enough slots for evictions.
    """

    def __init__(
        self,
        decoder: Decoder,
        token_ids: Tensor,
        capacity: int,
        eviction: Eviction | None,
        dtype: str,
        folder: Path,
    ) -> None:
        """
        Args:
            dtype: the bundle's dtype.
            folder: an empty folder for the layers; it may be removed after `record`.
        """
        self._decoder, self._capacity, self._eviction, self._folder = decoder, capacity, eviction, folder
        self._dtype: torch.dtype = getattr(torch, dtype)
        assert dtype in BYTES
        self._slots = None if eviction is None else slots_of(eviction, capacity)
        prompt = min(PROMPT, max(1, capacity * PROMPT // (PROMPT + CONTINUATION)))
        if self._slots is not None:
            prompt = max(1, self._slots - _FREE_SLOTS)
        self._steps = min(CONTINUATION, capacity - prompt)
        vocab = decoder.dims.vocab_size
        filler = torch.randint(vocab, (prompt,), generator=torch.Generator().manual_seed(0))
        self._ids: list[int] = torch.cat((token_ids.flatten(), filler))[:prompt].tolist()
        self._prompt = prompt
        self._first_row = max(0, prompt - PROMPT)
        self._indices = sorted(
            np.random.default_rng(0).choice(vocab, min(_LOGITS, vocab), replace=False).tolist()
        )
        self._layers: list[Layer] = []  # with tensors of the device "meta": their values are in files
        self._caches: list[reference.Cache] = []
        self._rows: list[Row] = []

    def add_layer(self, layer: Layer) -> None:
        """Save the next layer."""
        attention, tokens = layer.attention, self._prompt + self._steps
        widths = (attention.key_dim, attention.value_dim)
        cache: reference.Cache
        if self._eviction is not None and self._eviction.evicts(len(self._caches)):
            cache = EvictingCache.empty(
                1,
                attention.num_kv_heads,
                widths,
                torch.float32,
                self._eviction,
                len(self._caches),
                self._capacity,
                attention.window,
                self._slots,
            )
        else:
            cache = reference.LayerCache(
                *(torch.zeros(1, attention.num_kv_heads, tokens, width) for width in widths)
            )
        layer = _cast(layer, self._dtype)
        torch.save(tensors_of(layer), self._file(len(self._caches)))
        self._layers.append(_with_tensors(layer, (tensor.to("meta") for tensor in tensors_of(layer))))
        self._caches.append(cache)

    @torch.no_grad()
    def record(self, progress: Progress) -> None:
        """Run the prompt, then one token at a time; every layer is loaded for each."""
        with progress.stage("Recording the self-test", (1 + self._steps) * len(self._caches)):
            logits = self._run(self._ids, progress)
            for _ in range(self._steps):
                self._ids.append(int(logits.argmax()))
                logits = self._run(self._ids[-1:], progress)

    def save(self, directory: Path, weights_sha256: str, *, quantized: bool = False) -> None:
        """Write self_test.json; call it after `record`.

        Args:
            directory: of the bundle.
            weights_sha256: hash of the file of the weights.
            quantized: whether any weight is stored as integers.
        """
        prompt, continuation = tuple(self._ids[: self._prompt]), tuple(self._ids[self._prompt :])
        rows, indices = tuple(self._rows), tuple(self._indices)
        tolerances = QUANTIZED_TOLERANCES if quantized else TOLERANCES
        outputs = ReferenceOutputs(
            weights_sha256, self._slots, prompt, continuation, self._first_row, indices, rows, tolerances
        )
        write_reference_outputs(directory, outputs)

    def _run(self, ids: Sequence[int], progress: Progress) -> Tensor:
        """Run `ids`, which follow all tokens so far, and record their rows: logits [vocab] after the last."""
        stop = len(self._ids)
        positions = torch.arange(stop - len(ids), stop)[None]
        x = reference.embed(self._decoder.embedding, torch.tensor([ids]), positions)
        norms: list[tuple[Tensor, Tensor]] = []
        for index, cache in enumerate(self._caches):
            tensors = torch.load(self._file(index), mmap=True, weights_only=True)
            layer = _cast(_with_tensors(self._layers[index], iter(tensors)), torch.float32)
            taps = reference.run_layer(layer, x, positions, cache)
            x = taps.residual
            norms.append((_norms(taps.key), _norms(taps.value)))
            if isinstance(cache, EvictingCache) and cache.eviction.policy in RANKED_BY_NORM:
                cache.state[0] = torch.from_numpy(steady_scores(index, cache.state[0].numpy()))
            progress.advance()
        logits = reference.logits(self._decoder, x)[0]  # [S, vocab]
        for offset in range(len(ids)):
            if stop - len(ids) + offset >= self._first_row:
                keys, values = (tuple(_short(each[which][offset]) for each in norms) for which in (0, 1))
                self._rows.append(_row(logits[offset], self._indices, keys, values))
        return logits[-1]

    def _file(self, layer: int) -> Path:
        return self._folder / f"{layer}.pt"


def slots_of(eviction: Eviction, capacity: int) -> int:
    """Slots of the self-test: those of a validation, or half of a small capacity if that leaves a token to
    evict."""
    return max(eviction.protected + 1, min(eviction.self_test_slots, capacity // 2))


def _row(logits: Tensor, indices: Sequence[int], keys: tuple[float, ...], values: tuple[float, ...]) -> Row:
    best = logits.topk(min(2, len(logits)))
    rms, margin = logits.double().square().mean().sqrt(), best.values[0] - best.values[-1]
    chosen = tuple(_short(logits[index]) for index in indices)
    return Row(_short(rms), int(best.indices[0]), _short(margin), chosen, keys, values)


def _norms(heads: Tensor) -> Tensor:
    """Norm of every token [S] over all heads [1, N, S, width]."""
    return heads[0].double().square().sum((0, 2)).sqrt()


def _short(number: Tensor) -> float:
    return float(f"{float(number):.8g}")


def _cast(layer: Layer, dtype: torch.dtype) -> Layer:
    """A layer with its weights in a dtype; slopes stay exact, as they do in the graph.

    `torch.save` writes all the memory that a tensor is a view of, so that such a tensor is copied.
    """

    def cast(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().to(dtype) if tensor.is_floating_point() else tensor
        return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()

    slopes = layer.attention.alibi_slopes
    exact = map_tensors(layer, cast)
    return replace(exact, attention=replace(exact.attention, alibi_slopes=slopes))


def _with_tensors(layer: Layer, tensors: Iterator[Tensor]) -> Layer:
    """A layer with other tensors, in the order of `tensors_of`."""
    return map_tensors(layer, lambda _: next(tensors))
