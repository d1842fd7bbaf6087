"""Decoders of `blocks` without one of their features: negative controls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from kvexport.model.decoder import Attention, Decoder, Layer, Rope
from support.blocks import BLOCKS


def _layer(**changes: object) -> Callable[[Decoder], Decoder]:
    return lambda decoder: dataclasses.replace(
        decoder,
        layers=[dataclasses.replace(layer, **changes) for layer in decoder.layers],  # type: ignore[arg-type]
    )


def _attention(change: Callable[[Attention], Attention]) -> Callable[[Decoder], Decoder]:
    def changed(layer: Layer) -> Layer:
        return dataclasses.replace(layer, attention=change(layer.attention))

    return lambda decoder: dataclasses.replace(decoder, layers=[changed(each) for each in decoder.layers])


def _fields(**changes: object) -> Callable[[Decoder], Decoder]:
    return _attention(lambda attention: dataclasses.replace(attention, **changes))  # type: ignore[arg-type]


def _rotating(rope: Callable[[Rope], Rope | None]) -> Callable[[Decoder], Decoder]:
    def change(attention: Attention) -> Attention:
        return (
            attention if attention.rope is None else dataclasses.replace(attention, rope=rope(attention.rope))
        )

    return _attention(change)


def _embedding(**changes: object) -> Callable[[Decoder], Decoder]:
    return lambda decoder: dataclasses.replace(
        decoder,
        embedding=dataclasses.replace(decoder.embedding, **changes),  # type: ignore[arg-type]
    )


def _decoder(**changes: object) -> Callable[[Decoder], Decoder]:
    return lambda decoder: dataclasses.replace(decoder, **changes)  # type: ignore[arg-type]


# Name of a decoder of `BLOCKS`, and what drops the feature from it.
DROPPED: dict[str, tuple[str, Callable[[Decoder], Decoder]]] = {
    "attention output norm": ("all-norms", _layer(attention_output_norm=None)),
    "MLP output norm": ("all-norms", _layer(mlp_output_norm=None)),
    "attention residual norm": ("all-norms", _layer(attention_residual_norm=None)),
    "MLP residual norm": ("all-norms", _layer(mlp_residual_norm=None)),
    "parallel block": ("parallel-two-norms", _layer(parallel=False)),
    "second norm": ("parallel-two-norms", _layer(mlp_norm=None)),
    "residual multiplier": ("residual-multiplier", _layer(residual_multiplier=1.0)),
    "norm over heads": ("qk-norm-after-rotation", _fields(norm_after_rotation=False)),
    "clip": ("clip", _fields(clip=None)),
    "softcap": ("softcap", _fields(softcap=None)),
    "rope": ("rope-in-some-layers", _rotating(lambda rope: None)),
    "second rope": (
        "two-ropes",
        _rotating(lambda rope: Rope(BLOCKS["two-ropes"].layers[0].attention.rope.inv_freq)),
    ),  # type: ignore[union-attr]
    "magnitude": ("rope-magnitude", _rotating(lambda rope: Rope(rope.inv_freq))),
    "embedding multiplier": ("embedding-multiplier", _embedding(multiplier=1.0)),
    "learned positions": ("learned-positions", _embedding(positions=None)),
    "logit multiplier": ("logit-multiplier", _decoder(logit_multiplier=1.0)),
    "logit softcap": ("logit-softcap", _decoder(logit_softcap=None)),
}
