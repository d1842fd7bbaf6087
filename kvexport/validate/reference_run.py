"""Record and read the PyTorch reference: what `kvexport.model.reference` computes for one short sequence.

A build records it from each converted layer before the layer is written to a graph. It is part of the bundle,
so that a device without torch can validate the bundle against PyTorch. Reading needs numpy only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from kvexport.errors import BundleError, reason_of
from kvexport.eviction.config import Eviction
from kvexport.validate.reference_slots import SLOT_ARRAYS

if TYPE_CHECKING:
    from torch import Tensor

    from kvexport.model.decoder import Decoder, Layer
    from kvexport.model.reference import LayerTaps

FILE = "reference.npz"
STEPS = 64  # decode steps, teacher-forced
PREFILL = 32
KINDS = ("key", "value", "attention", "residual")
_EVICTED = 48  # tokens beyond the slots of the reference run


class ReferenceRecorder:
    """Run converted layers one after another on one sequence, and keep the arrays that validation compares.

    The sequence has PREFILL + STEPS tokens, or `capacity` if that is less: those of `token_ids`, then random
    ones. If layers evict, it is long enough for evictions, with fewer slots than the budget.
    """

    def __init__(
        self, decoder: Decoder, token_ids: Tensor, capacity: int, eviction: Eviction | None = None
    ) -> None:
        import torch

        from kvexport.model import reference

        self._reference = reference
        self._decoder = decoder
        length = (
            PREFILL + STEPS if eviction is None else max(PREFILL + STEPS, eviction.self_test_slots + _EVICTED)
        )
        filler = torch.randint(decoder.dims.vocab_size, (length,), generator=torch.Generator().manual_seed(0))
        self._ids = torch.cat((token_ids.flatten(), filler))[: min(length, capacity)][None]  # [1, T]
        self._eviction, self._capacity = eviction, capacity
        self._x = reference.embed(decoder.embedding, self._ids)
        self._arrays: dict[str, NDArray[np.float32]] = {}
        self._layers = 0

    def add_layer(self, layer: Layer) -> None:
        """Run the next layer and keep its arrays."""
        import torch

        with torch.no_grad():
            if self._eviction is not None and self._eviction.evicts(self._layers):
                taps = self._run_evicting(layer, self._eviction)
            else:
                positions = torch.arange(self._ids.shape[1])[None]
                taps = self._reference.run_layer(layer, self._x, positions)
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
        """Run a layer call by call, since a token attends to what was not evicted before it; keep scores and
        slots."""
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
        taps: list[LayerTaps] = []
        parts: dict[str, list[Tensor]] = {name: [] for name in SLOT_ARRAYS}
        starts = [0, *range(prefill_of(tokens, eviction), tokens)]
        for start, stop in zip(starts, [*starts[1:], tokens], strict=True):
            positions = torch.arange(start, stop)[None]
            taps.append(self._reference.run_layer(layer, self._x[:, start:stop], positions, cache))
            slot = (cache.positions[0, :, None] == positions[0, :, None]).int().argmax(-1)  # [N, n]
            parts["slot"].append(slot.T)
            parts["score"].append(cache.state[0, ..., SCORE].gather(1, slot).T)
        for name, each in parts.items():
            self._arrays[array_name(self._layers, name)] = torch.cat(each).float().numpy()
        key, value = (torch.cat([getattr(each, which) for each in taps], 2) for which in ("key", "value"))
        attended, residual = (
            torch.cat([getattr(each, which) for each in taps], 1) for which in ("attention", "residual")
        )
        return type(taps[0])(key, value, attended, residual)

    def save(self, directory: Path) -> None:
        """Write reference.npz."""
        import torch

        with torch.no_grad():
            logits = self._reference.logits(self._decoder, self._x)[0].float().numpy()
        arrays: dict[str, Any] = {"input_ids": self._ids[0].numpy(), "logits": logits, **self._arrays}
        np.savez(directory / FILE, **arrays)


def array_name(layer: int, kind: str) -> str:
    """Name of a layer's array [T, width]: key and value with their heads side by side, attention and
    residual.

    A layer that evicts also has score and slot [T, N].
    """
    return f"layers.{layer}.{kind}"


def prefill_of(tokens: int, eviction: Eviction | None) -> int:
    """How many of the reference's tokens are prefilled at once; the others are decoded one by one."""
    maximum = PREFILL if eviction is None else min(PREFILL, eviction.self_test_slots)
    return max(1, min(maximum, tokens // 3))


def read_reference(
    path: Path, num_layers: int, eviction: Eviction | None = None
) -> Mapping[str, NDArray[Any]]:
    """The recorded arrays: `input_ids` [T] int64, `logits` [T, vocab] float32 and the arrays of each layer,
    float32.

    Each layer has key, value, attention and residual, and score and slot if it evicts.

    Raises:
        BundleError: the file is unreadable or incomplete.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except (OSError, ValueError, EOFError, KeyError, BadZipFile) as error:
        raise BundleError(
            f"{path} must be readable: {reason_of(error)}", fix="build the bundle again"
        ) from error
    kinds = {
        layer: (*KINDS, *SLOT_ARRAYS) if eviction is not None and eviction.evicts(layer) else KINDS
        for layer in range(num_layers)
    }
    expected = {"input_ids", "logits"} | {array_name(layer, kind) for layer in kinds for kind in kinds[layer]}
    if set(arrays) != expected:
        raise BundleError(
            f"{path} must have every recorded array",
            got=f"{len(arrays)} arrays",
            expected=len(expected),
            fix="build the bundle again",
        )
    return arrays
