"""A tiny decoder for each feature of the neutral decoder that no family of `graph_decoders` has."""

from __future__ import annotations

from dataclasses import replace

from kvexport.model.decoder import Decoder
from support.graph_decoders import LLAMA, Shape, make_decoder, slopes_of

NORMS = (
    "attention_norm",
    "mlp_norm",
    "attention_output_norm",
    "mlp_output_norm",
    "attention_residual_norm",
    "mlp_residual_norm",
)


def _decoder(*shapes: Shape, **style: object) -> Decoder:
    return make_decoder(shapes, replace(LLAMA, **style))  # type: ignore[arg-type]


def make_blocks(head_dim: int = 8, value_dim: int = 6) -> dict[str, Decoder]:
    """The decoders, with heads of `head_dim` numbers, and coded values of `value_dim`."""
    mha = Shape(head_dim=head_dim)
    gqa = replace(mha, kv_heads=2)
    qk = replace(gqa, qk_norm=True)
    coded = replace(gqa, group=2, key_dim=head_dim)  # keys after RoPE
    coded_qk = replace(coded, qk_norm=True)
    coded_values = replace(coded, value_group=2, value_dim=value_dim, value_map=True)
    alibi = replace(gqa, slopes=slopes_of(4))
    return {
        **{f"only-{name}": _decoder(gqa, mha, norms=(name,)) for name in NORMS},
        "no-norm": _decoder(gqa, mha, norms=()),
        "all-norms": _decoder(gqa, mha, norms=NORMS, residual_multiplier=0.7),
        "parallel-one-norm": _decoder(gqa, mha, norms=("attention_norm",), parallel=True),
        "parallel-two-norms": _decoder(gqa, mha, parallel=True, norm="layer", residual_multiplier=0.5),
        "parallel-output-norms": _decoder(gqa, norms=NORMS[:4], parallel=True),
        "residual-multiplier": _decoder(gqa, mha, residual_multiplier=0.22),
        "layer-norm-without-bias": _decoder(gqa, norm="layer", norm_bias=False),
        "layer-norm-without-weight": _decoder(gqa, norm="layer", norm_weight=False),
        "rms-norm-without-weight": _decoder(qk, norm_weight=False),
        "qk-norm-per-head": _decoder(qk, coded_qk, per_head_norm=True),
        "qk-layer-norm-per-head": _decoder(
            qk, coded_qk, per_head_norm=True, norm="layer", qk_norm_kind="layer", norm_bias=False
        ),
        "qk-layer-norm": _decoder(qk, coded_qk, norm="layer", qk_norm_kind="layer"),
        "qk-norm-over-heads": _decoder(qk, coded_qk, norm_over="heads"),
        "qk-norm-after-rotation": _decoder(qk, coded_qk, norm_after_rotation=True),
        "qk-norm-after-rotation-in-some-layers": _decoder(
            qk, replace(qk, theta=None), norm_after_rotation=True
        ),
        "clip": _decoder(gqa, coded_values, clip=0.5, qkv_bias=True),
        "clip-and-qk-norm": _decoder(qk, replace(coded_values, qk_norm=True), clip=0.5),
        "softcap": _decoder(gqa, mha, replace(coded, window=3), softcap=0.8),
        "rope-in-some-layers": _decoder(
            gqa, replace(gqa, theta=None), replace(mha, window=4), replace(mha, theta=None)
        ),
        "two-ropes": _decoder(replace(gqa, theta=100.0, window=4), gqa, replace(mha, theta=100.0), mha),
        "no-rope-no-alibi": _decoder(gqa, replace(coded, theta=None), rope=False),
        "rope-magnitude": _decoder(replace(gqa, magnitude=True), replace(coded, magnitude=True), gqa),
        "partial-rope": _decoder(replace(gqa, rotary_dim=4), replace(coded, rotary_dim=4)),
        "embedding-multiplier": _decoder(gqa, embedding_multiplier=4.9, tied=True),
        "embedding-projection": _decoder(gqa, embedding_width=16, tied=True, other_bias=True),
        "learned-positions": _decoder(gqa, rope=False, learned_positions=True, embedding_norm=True),
        "no-final-norm": _decoder(gqa, final_norm=False, norms=NORMS[4:]),
        "logit-multiplier": _decoder(gqa, logit_multiplier=0.25, tied=True),
        "logit-softcap": _decoder(gqa, logit_softcap=1.5, logit_multiplier=3.0),
        "head-bias": _decoder(gqa, head_bias=True, logit_softcap=2.0),
        "relu-squared": _decoder(gqa, gated=False, activation="relu_squared", other_bias=True),
        "relu-squared-gated": _decoder(gqa, activation="relu_squared"),
        "alibi": _decoder(alibi, replace(alibi, slopes=None), rope=False),
        "alibi-and-window": _decoder(replace(alibi, window=4), alibi, rope=False, norm="layer"),
        "alibi-and-softcap": _decoder(alibi, rope=False, softcap=0.8, parallel=True),
        "alibi-and-rope": _decoder(alibi, replace(alibi, window=4)),
    }


BLOCKS = make_blocks()


def windowed(decoder: Decoder) -> Decoder:
    """The decoder with a sliding window in its first layer, and in every second one."""
    layers = [
        replace(layer, attention=replace(layer.attention, window=layer.attention.window if index % 2 else 5))
        for index, layer in enumerate(decoder.layers)
    ]
    return replace(decoder, layers=layers)
