"""Spectra and head similarity compared with those of a cache that is small enough for memory."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.decoders import STYLES, make_decoder, random_windows
from torch import Tensor

from kvexport.analyze import compare
from kvexport.analyze.spectra import SecondMoment, SpectraStream, Spectrum
from kvexport.calibrate import windows as attention_windows
from kvexport.convert import unconverted_layers
from kvexport.model import reference
from kvexport.model.decoder import Decoder, Layer, LazyLayers
from kvexport.progress import Progress


def caches(decoder: Decoder, windows: Tensor) -> list[dict[str, Tensor]]:
    """Each layer's [tokens, heads·width] caches in float64, by the names that spectra have."""
    taps: list[reference.LayerTaps] = []
    reference.forward(decoder, windows, taps=taps)
    stream = [reference.embed(decoder.embedding, windows), *(tap.residual for tap in taps)]

    def stacked(heads: Tensor) -> Tensor:
        return heads.transpose(1, 2).flatten(2).flatten(0, 1)

    found = []
    for layer, x, tap in zip(decoder.layers, stream, taps, strict=False):
        attention = layer.attention
        key = reference.linear(attention.k, reference.norm(layer.attention_norm, x))
        if attention.k_norm is not None:
            key = reference.norm(attention.k_norm, key.unflatten(-1, (attention.num_kv_heads, -1))).flatten(2)
        held = {"value": stacked(tap.value), "key": stacked(tap.key)}
        if attention.rope is not None:
            held |= {"key_before_rope": key.flatten(0, 1), "key_after_rope": held.pop("key")}
        found.append(held)
    return found


@pytest.mark.parametrize("scores", [attention_windows.SCORES, 1])  # all windows at once, and one at a time
@pytest.mark.parametrize("style", STYLES)
def test_spectra_equal_the_singular_values_of_the_cache(
    style: str, scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_windows, "SCORES", scores)
    decoder = make_decoder(style)
    windows = random_windows(decoder, 5, 12)
    stream = SpectraStream(decoder, windows)
    for layer, cache in zip(decoder.layers, caches(decoder, windows), strict=True):
        measured = stream.measure(layer)
        assert measured.spectra.keys() == cache.keys()
        for name, held in cache.items():
            wanted = torch.linalg.svdvals(held)
            torch.testing.assert_close(
                measured.spectra[name].values, wanted, rtol=1e-9, atol=1e-7 * float(wanted[0])
            )


def test_spectra_before_and_after_rope_differ() -> None:
    decoder = make_decoder("llama")
    spectra = SpectraStream(decoder, random_windows(decoder, 5, 12)).measure(decoder.layers[0]).spectra
    assert not torch.allclose(spectra["key_before_rope"].values, spectra["key_after_rope"].values, rtol=1e-3)


def test_shares_and_ranks_of_a_known_spectrum() -> None:
    spectrum = Spectrum(torch.tensor([2.0, 1, 1, 0], dtype=torch.float64))  # energies 4, 1, 1, 0
    assert spectrum.energy_in(0.25) == pytest.approx(4 / 6)
    assert spectrum.energy_in(0.5) == pytest.approx(5 / 6)
    assert [spectrum.rank_for(share) for share in (0.5, 0.8, 0.9, 1.0)] == [1, 2, 3, 3]
    nothing = Spectrum(torch.zeros(4, dtype=torch.float64))
    assert (nothing.energy_in(0.25), nothing.rank_for(0.9)) == (1.0, 1)


@given(
    st.lists(st.floats(0, 100), min_size=1, max_size=12).filter(lambda values: sum(values) > 1e-3),
    st.sampled_from([0.9, 0.95, 0.99]),
)
def test_effective_rank_is_the_smallest_with_the_energy(values: list[float], share: float) -> None:
    spectrum = Spectrum(torch.tensor(sorted(values, reverse=True), dtype=torch.float64))
    energy = spectrum.values.square()
    rank = spectrum.rank_for(share)
    assert float(energy[:rank].sum()) >= share * float(energy.sum()) * (1 - 1e-12)
    assert rank == 1 or float(energy[: rank - 1].sum()) < share * float(energy.sum()) * (1 + 1e-12)


def cka(heads: Tensor) -> Tensor:
    """`similarity` of heads [h, tokens, width]."""
    moment = SecondMoment(len(heads), heads.shape[2], heads.device)
    for part in heads.split(7, dim=1):
        moment.add(part[None])
    return moment.similarity()


def random_heads(seed: int, heads: int = 3, tokens: int = 20, width: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    return common + torch.randn(heads, tokens, width, generator=generator, dtype=torch.float64) + 2


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32))
def test_cka_is_invariant_to_rotation_scale_and_shift(seed: int) -> None:
    heads = random_heads(seed)
    before = cka(heads)
    torch.testing.assert_close(before, before.T)
    torch.testing.assert_close(before.diagonal(), torch.ones(3, dtype=torch.float64))
    assert bool((before >= 0).all()) and bool((before <= 1 + 1e-12).all())
    turned = heads.clone()
    rotation = torch.linalg.qr(random_heads(seed + 1, 1, 4)[0]).Q
    turned[1] = 3 * heads[1] @ rotation - 5
    torch.testing.assert_close(cka(turned), before)


def test_cka_equals_the_formula_of_the_paper() -> None:
    """|YᵀX|² / (|XᵀX| |YᵀY|) of the centred heads."""
    heads = random_heads(0)
    x, y = (each - each.mean(0) for each in heads[:2])
    wanted = torch.linalg.norm(y.T @ x) ** 2 / (torch.linalg.norm(x.T @ x) * torch.linalg.norm(y.T @ y))
    assert float(cka(heads)[0, 1]) == pytest.approx(float(wanted))


def test_cosine_changes_under_rotation_and_cka_under_stretching() -> None:
    """A head and its rotated copy are equivalent for the model. CKA still distinguishes other maps."""
    head = random_heads(3, 1)[0]
    rotation = torch.linalg.qr(
        torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ).Q
    copy = head @ rotation
    cosine = float((head * copy).sum() / head.norm() / copy.norm())
    assert abs(cosine) < 0.9
    assert float(cka(torch.stack((head, copy)))[0, 1]) == pytest.approx(1)
    stretched = head * torch.tensor([1.0, 10, 1, 1])
    assert float(cka(torch.stack((head, stretched)))[0, 1]) < 0.95


@pytest.mark.slow
def test_one_layer_is_in_memory_at_a_time() -> None:
    decoder = make_decoder(layers=4)
    alive: list[weakref.ref[Layer]] = []
    held: list[int] = []

    def read(index: int) -> Layer:
        gc.collect()
        held.append(sum(each() is not None for each in alive))
        layer = make_decoder(layers=1, seed=index).layers[0]
        alive.append(weakref.ref(layer))
        return layer

    lazy = Decoder(**{**vars(decoder), "layers": LazyLayers(4, read)})
    compare(lazy, random_windows(decoder, 2, 8), unconverted_layers(lazy), torch.arange(6), Progress())
    assert max(held) == 1  # the converted twin
