"""The PyTorch twin's word: what `kvexport.model.reference` computes for one short sequence, recorded at build time.

It is recorded from the converted layers as they pass, before any of them is written to a graph, and travels in
the bundle, so that a device without torch can prove the bundle against PyTorch. Knows the reference; nothing of
ONNX. Reading needs numpy only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from kvexport.errors import BundleError
from kvexport.eviction.config import Eviction
from kvexport.validate.slots import NAMES

if TYPE_CHECKING:
    from torch import Tensor

    from kvexport.model.decoder import Decoder, Layer
    from kvexport.model.reference import LayerTaps

FILE = "reference.npz"
STEPS = 64  # decode steps, teacher-forced
PREFILL = 32
KINDS = ("key", "value", "attention", "residual")
_EVICTED = 48  # tokens beyond the slots that a proof runs in


class ReferenceRecorder:
    """Runs converted layers, as they pass, on one sequence and keeps what validation compares.

    The sequence is the first PREFILL + STEPS of `token_ids`, filled up with random ones, or as many as `capacity` holds. Of
    layers that evict it is as long as it takes to do so, in fewer slots than the budget.
    """

    def __init__(
        self, decoder: Decoder, token_ids: Tensor, capacity: int, eviction: Eviction | None = None
    ) -> None:
        import torch

        from kvexport.model import reference

        self._reference = reference
        self._decoder = decoder
        wanted = (
            PREFILL + STEPS if eviction is None else max(PREFILL + STEPS, eviction.self_test_slots + _EVICTED)
        )
        filler = torch.randint(decoder.dims.vocab_size, (wanted,), generator=torch.Generator().manual_seed(0))
        self._ids = torch.cat((token_ids.flatten(), filler))[: min(wanted, capacity)][None]  # [1, T]
        self._eviction, self._capacity = eviction, capacity
        self._x = reference.embed(decoder.embedding, self._ids)
        self._arrays: dict[str, NDArray[np.float32]] = {}
        self._layers = 0

    def add_layer(self, layer: Layer) -> None:
        import torch

        with torch.no_grad():
            if self._eviction is not None and self._eviction.evicts(self._layers):
                taps = self._run_evicting(layer, self._eviction)
            else:
                positions = torch.arange(self._ids.shape[1])[None]
                taps = self._reference.run_layer(layer, self._x, positions, self._decoder.rope)
        self._x = taps.residual
        heads = {"key": taps.key, "value": taps.value}  # [1, Hkv, T, width]
        flat = {"attention": taps.attention, "residual": taps.residual}  # [1, T, hidden]
        for kind, tensor in heads.items():
            self._arrays[array_name(self._layers, kind)] = (
                tensor[0].float().transpose(0, 1).flatten(1).numpy()
            )
        for kind, tensor in flat.items():
            self._arrays[array_name(self._layers, kind)] = tensor[0].float().numpy()
        self._layers += 1

    def _run_evicting(self, layer: Layer, eviction: Eviction) -> LayerTaps:
        """The layer in calls, since what a token sees depends on what was evicted before it; keeps scores and slots."""
        import torch

        from kvexport.eviction.config import SCORE
        from kvexport.eviction.reference_cache import EvictingCache

        attention = layer.attention
        widths, tokens = (attention.key_dim, attention.value_dim), self._ids.shape[1]
        cache = EvictingCache.empty(
            1,
            attention.num_kv_heads,
            widths,
            self._x.dtype,
            eviction,
            self._layers,
            self._capacity,
            attention.window,
            eviction.self_test_slots,
        )
        seen: list[LayerTaps] = []
        kept: dict[str, list[Tensor]] = {name: [] for name in NAMES}
        starts = [0, *range(prefill_of(tokens, eviction), tokens)]
        for start, stop in zip(starts, [*starts[1:], tokens], strict=True):
            positions = torch.arange(start, stop)[None]
            seen.append(
                self._reference.run_layer(layer, self._x[:, start:stop], positions, self._decoder.rope, cache)
            )
            slot = (cache.positions[0, :, None] == positions[0, :, None]).int().argmax(-1)  # [N, n]
            kept["slot"].append(slot.T)
            kept["score"].append(cache.state[0, ..., SCORE].gather(1, slot).T)
        for name, parts in kept.items():
            self._arrays[array_name(self._layers, name)] = torch.cat(parts).float().numpy()
        key, value = (torch.cat([getattr(each, which) for each in seen], 2) for which in ("key", "value"))
        attended, residual = (
            torch.cat([getattr(each, which) for each in seen], 1) for which in ("attention", "residual")
        )
        return type(seen[0])(key, value, attended, residual)

    def save(self, directory: Path) -> None:
        """Write reference.npz."""
        import torch

        with torch.no_grad():
            logits = self._reference.logits(self._decoder, self._x)[0].float().numpy()
        arrays: dict[str, Any] = {"input_ids": self._ids[0].numpy(), "logits": logits, **self._arrays}
        np.savez(directory / FILE, **arrays)


def array_name(layer: int, kind: str) -> str:
    """Name of a layer's array [T, width]: key and value with their heads side by side, attention and residual.

    Of a layer that evicts also score and slot [T, N].
    """
    return f"layers.{layer}.{kind}"


def prefill_of(tokens: int, eviction: Eviction | None) -> int:
    """How many of the twin's tokens are prefilled at once; the others are decoded one by one."""
    most = PREFILL if eviction is None else min(PREFILL, eviction.self_test_slots)
    return max(1, min(most, tokens // 3))


def read_reference(
    path: Path, num_layers: int, eviction: Eviction | None = None
) -> Mapping[str, NDArray[Any]]:
    """The recorded arrays: `input_ids` [T] int64, `logits` [T, vocab] and four arrays a layer, six of one that evicts, float32.

    Raises:
        BundleError: unreadable or incomplete.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except (OSError, ValueError, EOFError, KeyError, BadZipFile) as error:
        raise BundleError(f"{path} cannot be read: {error}", fix="build the bundle again") from error
    kinds = {
        layer: (*KINDS, *NAMES) if eviction is not None and eviction.evicts(layer) else KINDS
        for layer in range(num_layers)
    }
    wanted = {"input_ids", "logits"} | {array_name(layer, kind) for layer in kinds for kind in kinds[layer]}
    if set(arrays) != wanted:
        raise BundleError(
            f"{path} is incomplete",
            got=f"{len(arrays)} arrays",
            expected=len(wanted),
            fix="build the bundle again",
        )
    return arrays
