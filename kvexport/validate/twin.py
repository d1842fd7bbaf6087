"""The PyTorch twin's word: what `kvexport.reference` computes for one short sequence, recorded at build time.

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

if TYPE_CHECKING:
    from torch import Tensor

    from kvexport.decoder import Decoder, Layer

FILE = "reference.npz"
STEPS = 64  # decode steps, teacher-forced
PREFILL = 32
KINDS = ("key", "value", "attention", "residual")


class TwinRecorder:
    """Runs converted layers, as they pass, on one sequence and keeps what validation compares.

    The sequence is the first PREFILL + STEPS of `token_ids`, filled up with random ones, or as many as `capacity` holds.
    """

    def __init__(self, decoder: Decoder, token_ids: Tensor, capacity: int) -> None:
        import torch

        from kvexport import reference

        self._reference = reference
        self._decoder = decoder
        filler = torch.randint(decoder.limits.vocab_size, (PREFILL + STEPS,), generator=torch.Generator().manual_seed(0))
        self._ids = torch.cat((token_ids.flatten(), filler))[: min(PREFILL + STEPS, capacity)][None]  # [1, T]
        self._x = reference.embed(decoder.embedding, self._ids)
        self._arrays: dict[str, NDArray[np.float32]] = {}
        self._layers = 0

    def add_layer(self, layer: Layer) -> None:
        import torch

        positions = torch.arange(self._ids.shape[1])[None]
        with torch.no_grad():
            taps = self._reference.run_layer(layer, self._x, positions, self._decoder.rope)
        self._x = taps.residual
        heads = {"key": taps.key, "value": taps.value}  # [1, Hkv, T, width]
        flat = {"attention": taps.attention, "residual": taps.residual}  # [1, T, hidden]
        for kind, tensor in heads.items():
            self._arrays[array_name(self._layers, kind)] = tensor[0].float().transpose(0, 1).flatten(1).numpy()
        for kind, tensor in flat.items():
            self._arrays[array_name(self._layers, kind)] = tensor[0].float().numpy()
        self._layers += 1

    def save(self, directory: Path) -> None:
        """Write reference.npz."""
        import torch

        with torch.no_grad():
            logits = self._reference.logits(self._decoder, self._x)[0].float().numpy()
        arrays: dict[str, Any] = {"input_ids": self._ids[0].numpy(), "logits": logits, **self._arrays}
        np.savez(directory / FILE, **arrays)


def array_name(layer: int, kind: str) -> str:
    """Name of a layer's array [T, width]: key and value with their heads side by side, attention and residual."""
    return f"layers.{layer}.{kind}"


def read_twin(path: Path, num_layers: int) -> Mapping[str, NDArray[Any]]:
    """The recorded arrays: `input_ids` [T] int64, `logits` [T, vocab] and four arrays a layer, float32.

    Raises:
        BundleError: unreadable or incomplete.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except (OSError, ValueError, EOFError, KeyError, BadZipFile) as error:
        raise BundleError(f"{path} cannot be read: {error}", fix="build the bundle again") from error
    wanted = {"input_ids", "logits"} | {array_name(layer, kind) for layer in range(num_layers) for kind in KINDS}
    if set(arrays) != wanted:
        raise BundleError(
            f"{path} is incomplete", seen=f"{len(arrays)} arrays", allowed=len(wanted), fix="build the bundle again"
        )
    return arrays
