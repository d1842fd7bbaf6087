"""Spectra, similarities and attention maps on another device are those of the CPU."""

from __future__ import annotations

import pytest
import torch
from support.analyses import conversion
from support.decoders import make_decoder, random_windows

from kvexport.analyze import LayerAnalysis, compare
from kvexport.analyze.maps import AttentionMaps
from kvexport.model.decoder import Decoder
from kvexport.model.placement import place
from kvexport.progress import Progress


def analysed(decoder: Decoder) -> tuple[list[LayerAnalysis], AttentionMaps]:
    windows = random_windows(decoder, 6, 16)
    return compare(decoder, windows, conversion(decoder), windows[0], Progress())


@pytest.mark.parametrize("style", ["llama", "gqa", "bloom"])
def test_an_analysis_is_that_of_the_cpu(device: torch.device, style: str) -> None:
    decoder = make_decoder(style, dtype=torch.float32)
    layers, maps = analysed(decoder)
    layers_there, maps_there = analysed(place(decoder, device))
    for here, there in zip(layers, layers_there, strict=True):
        for name, spectrum in here.spectra.spectra.items():
            values = there.spectra.spectra[name].values
            # the root of a product's rounding, relative to the largest
            torch.testing.assert_close(values, spectrum.values, rtol=1e-4, atol=1e-3 * float(values[0]))
            torch.testing.assert_close(values[:8], spectrum.values[:8], rtol=1e-4, atol=0)
        for name, matrix in here.spectra.similarity.items():
            torch.testing.assert_close(there.spectra.similarity[name], matrix, rtol=0, atol=1e-4)
    for a, b in zip(
        maps.original + maps.compressed, maps_there.original + maps_there.compressed, strict=True
    ):
        assert b.device.type == "cpu"
        torch.testing.assert_close(b, a, rtol=0, atol=1e-6)
    assert maps_there.distance()[0][0] == pytest.approx(maps.distance()[0][0], rel=1e-4)
