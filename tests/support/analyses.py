"""Analyses of tiny decoders in which adjacent KV heads are replaced by their mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kvexport.analyze import Analysis, Facts, compare
from kvexport.convert import ConvertedLayer, unconverted_layers
from kvexport.model import reference
from kvexport.model.decoder import Attention, Decoder, Linear
from kvexport.model.divergence import DivergenceMeter
from kvexport.progress import Progress
from support.decoders import make_decoder, random_windows

TOKENS = (
    "<s>",
    "Once",
    " upon",
    " a",
    " </script><b>",
    "\n",
    "“é”",
    " time",
    ",",
    " there",
    " was",
    " &amp;",
)


def mean_pooled(attention: Attention) -> Attention:
    """Replace each two adjacent KV heads by their mean."""

    def mean(linear: Linear) -> Linear:
        def halve(x: Tensor) -> Tensor:
            return x.unflatten(0, (attention.num_kv_heads // 2, 2, -1)).mean(1).flatten(0, 1)

        return Linear(halve(linear.weight), None if linear.bias is None else halve(linear.bias))

    return dataclasses.replace(
        attention, k=mean(attention.k), v=mean(attention.v), num_kv_heads=attention.num_kv_heads // 2
    )


def conversion(decoder: Decoder) -> Iterator[ConvertedLayer]:
    for each in unconverted_layers(decoder):
        attention = mean_pooled(each.layer.attention)
        report = dataclasses.replace(
            each.report,
            method="mean-pool",
            num_key_value_heads=attention.num_kv_heads,
            predicted_error=0.2 + 0.1 * each.index,
            measured_error=0.25,
            residual_error=0.03,
        )
        yield dataclasses.replace(
            each, layer=dataclasses.replace(each.layer, attention=attention), report=report
        )


def analysis_of(
    style: str = "llama",
    *,
    tokens: Sequence[str] = TOKENS,
    pairs: Sequence[tuple[int, int]] = (),
    **more: Any,
) -> Analysis:
    """An analysis of three layers, four heads, and a window of `tokens`."""
    decoder = make_decoder(style, layers=3)
    windows = random_windows(decoder, 4, 16)
    window = random_windows(decoder, 1, len(tokens))[0]
    layers, maps = compare(decoder, windows, conversion(decoder), window, Progress())
    meter = DivergenceMeter()
    logits = reference.forward(decoder, windows)
    meter.add(logits, logits + torch.linspace(0, 0.1, logits.shape[-1]), windows)
    first = decoder.layers[0].attention
    facts = Facts(
        "tiny <model>",
        "llama",
        3,
        first.num_heads,
        first.num_kv_heads,
        first.head_dim,
        {"source": "random"},
        windows.numel(),
    )
    found = Analysis(
        facts, tuple(layers), meter.finish(), tuple(window.tolist()), tuple(tokens), maps, tuple(pairs)
    )
    return dataclasses.replace(found, **more)
