"""Spectra of a layer's keys and values, and similarity of its heads.

From float64 second moments, accumulated over batches of windows; the cache itself is never in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvexport.calibrate import windows as attention_windows
from kvexport.calibrate.sums import SecondMomentSums
from kvexport.model import reference
from kvexport.model.decoder import Attention, Decoder, Layer
from kvexport.model.reference import Projected

SHARES = (0.25, 0.5)  # shares of the directions, as in Fig. 1 of arXiv 2406.07056
ENERGIES = (0.9, 0.95, 0.99)


@dataclass(frozen=True)
class Spectrum:
    """Singular values of a layer's stacked cache [tokens, heads·head_dim], uncentred as in Fig. 1 of arXiv
    2406.07056.

    The energy of a direction is its squared singular value; a mean that all tokens share counts as a
    direction.

    Attributes:
        values: [heads·head_dim] float64, descending.
    """

    values: Tensor

    def energy_in(self, share: float) -> float:
        """Share of the energy in the first `share` of the directions, at least one direction."""
        energy = self.values.square()
        total = float(energy.sum())
        return float(energy[: max(1, int(share * len(energy)))].sum()) / total if total > 0 else 1.0

    def rank_for(self, share: float) -> int:
        """Effective rank: the smallest number of directions that contain `share` of the energy."""
        energy = self.values.square().cumsum(0)
        return min(int((energy < share * energy[-1]).sum()) + 1, len(energy))


class SecondMoment:
    """Sums over tokens of vectors x [heads·head_dim] and of x xᵀ."""

    def __init__(self, heads: int, width: int, device: torch.device) -> None:
        self._heads, self._sums = heads, SecondMomentSums(heads * width, device=device)

    def add(self, x: Tensor) -> None:
        """Add heads x [B, heads, S, width]."""
        self._sums.add(x.transpose(1, 2).flatten(2).flatten(0, 1))  # [B·S, heads·width]

    def spectrum(self) -> Spectrum:
        """Spectrum of the vectors added."""
        second = self._sums.second() * self._sums.count
        return Spectrum(torch.linalg.eigvalsh(second).flip(0).clamp_min(0).sqrt())

    def similarity(self) -> Tensor:
        """Linear CKA of each two heads (arXiv 1905.00414): |Σ x yᵀ|² / (|Σ x xᵀ| |Σ y yᵀ|) about the means.

        CKA does not change when the basis of a head is rotated. The cosine of two heads' vectors does change:
        W_V and W_O of a head, or the rotary pairs of W_Q and W_K, can be rotated together without changing
        the model.

        Returns:
            [heads, heads] float64, from 0 to 1.
        """
        centred = self._sums.covariance()
        blocks = centred.unflatten(0, (self._heads, -1)).unflatten(2, (self._heads, -1))  # [h, d, h, d]
        squares = blocks.square().sum((1, 3))
        norms = squares.diagonal().sqrt()
        return squares / torch.outer(norms, norms).clamp_min(torch.finfo(torch.float64).tiny)


@dataclass(frozen=True)
class LayerSpectra:
    """Spectra and similarity of one layer.

    Attributes:
        spectra: by name: `key_before_rope` and `key_after_rope`, or `key` without RoPE; `value`.
        similarity: linear CKA [h, h] of the cached `key` heads (after RoPE) and of the `value` heads.
    """

    spectra: Mapping[str, Spectrum]
    similarity: Mapping[str, Tensor]


class SpectraStream:
    """The trained model's residual stream [N, S, hidden] over windows, measured layer by layer."""

    @torch.no_grad()
    def __init__(self, decoder: Decoder, windows: Tensor) -> None:
        """`windows`: token ids [N, S] int64."""
        self._x = reference.embed(decoder.embedding, windows)

    @torch.no_grad()
    def measure(self, layer: Layer) -> LayerSpectra:
        """Measure the cache of the next layer and advance the stream past it."""
        attention, sums = layer.attention, _sums(layer.attention)

        def attend(x: Tensor) -> Tensor:
            projected = attention_windows.project(attention, x)
            for name, total in sums.items():
                total.add(_named(projected, name))
            return reference.linear(attention.o, attention_windows.head_outputs(attention, projected))

        for batch in attention_windows.batches(range(len(self._x)), self._x.shape[1]):
            self._x[batch] = reference.run_block(layer, self._x[batch], attend).residual
        cached = {"key": "key" if attention.rope is None else "key_after_rope", "value": "value"}
        return LayerSpectra(
            {name: total.spectrum() for name, total in sums.items()},
            {name: sums[source].similarity() for name, source in cached.items()},
        )


def _sums(attention: Attention) -> dict[str, SecondMoment]:
    keys = ("key",) if attention.rope is None else ("key_before_rope", "key_after_rope")
    device = attention.k.weight.device
    sums = {name: SecondMoment(attention.key_heads, attention.head_dim, device) for name in keys}
    return sums | {"value": SecondMoment(attention.num_kv_heads, attention.value_dim, device)}


def _named(projected: Projected, name: str) -> Tensor:
    return {"key_after_rope": projected.key_rotated, "value": projected.value}.get(name, projected.key)
