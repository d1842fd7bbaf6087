"""A tiny decoder for each feature of the neutral decoder that no family of `graph_decoders` has."""

from __future__ import annotations

from dataclasses import replace

from kvexport.model.decoder import Decoder
from support.graph_decoders import LLAMA, Shape, make_decoder

NORMS = (
    "attention_norm",
    "mlp_norm",
    "attention_output_norm",
    "mlp_output_norm",
    "attention_residual_norm",
    "mlp_residual_norm",
)

GQA = Shape(kv_heads=2)
QK = replace(GQA, qk_norm=True)
CODED = Shape(kv_heads=2, group=2, key_dim=8)  # keys after RoPE
CODED_QK = replace(CODED, qk_norm=True)
CODED_VALUES = replace(CODED, value_group=2, value_dim=6, value_map=True)


def _decoder(*shapes: Shape, **style: object) -> Decoder:
    return make_decoder(shapes, replace(LLAMA, **style))  # type: ignore[arg-type]


BLOCKS: dict[str, Decoder] = {
    **{f"only-{name}": _decoder(GQA, Shape(), norms=(name,)) for name in NORMS},
    "no-norm": _decoder(GQA, Shape(), norms=()),
    "all-norms": _decoder(GQA, Shape(), norms=NORMS, residual_multiplier=0.7),
    "parallel-one-norm": _decoder(GQA, Shape(), norms=("attention_norm",), parallel=True),
    "parallel-two-norms": _decoder(GQA, Shape(), parallel=True, norm="layer", residual_multiplier=0.5),
    "parallel-output-norms": _decoder(GQA, norms=NORMS[:4], parallel=True),
    "residual-multiplier": _decoder(GQA, Shape(), residual_multiplier=0.22),
    "layer-norm-without-bias": _decoder(GQA, norm="layer", norm_bias=False),
    "layer-norm-without-weight": _decoder(GQA, norm="layer", norm_weight=False),
    "rms-norm-without-weight": _decoder(QK, norm_weight=False),
    "qk-norm-per-head": _decoder(QK, CODED_QK, per_head_norm=True),
    "qk-layer-norm-per-head": _decoder(
        QK, CODED_QK, per_head_norm=True, norm="layer", qk_norm_kind="layer", norm_bias=False
    ),
    "qk-layer-norm": _decoder(QK, CODED_QK, norm="layer", qk_norm_kind="layer"),
    "qk-norm-over-heads": _decoder(QK, CODED_QK, norm_over="heads"),
    "qk-norm-after-rotation": _decoder(QK, CODED_QK, norm_after_rotation=True),
    "qk-norm-after-rotation-in-some-layers": _decoder(QK, replace(QK, theta=None), norm_after_rotation=True),
    "clip": _decoder(GQA, CODED_VALUES, clip=0.5, qkv_bias=True),
    "clip-and-qk-norm": _decoder(QK, replace(CODED_VALUES, qk_norm=True), clip=0.5),
    "softcap": _decoder(GQA, Shape(), replace(CODED, window=3), softcap=0.8),
    "rope-in-some-layers": _decoder(GQA, replace(GQA, theta=None), Shape(window=4), Shape(theta=None)),
    "two-ropes": _decoder(replace(GQA, theta=100.0, window=4), GQA, Shape(theta=100.0), Shape()),
    "no-rope-no-alibi": _decoder(GQA, replace(CODED, theta=None), rope=False),
    "rope-magnitude": _decoder(replace(GQA, magnitude=True), replace(CODED, magnitude=True), GQA),
    "partial-rope": _decoder(replace(GQA, rotary_dim=4), replace(CODED, rotary_dim=4)),
    "embedding-multiplier": _decoder(GQA, embedding_multiplier=4.9, tied=True),
    "embedding-projection": _decoder(GQA, embedding_width=16, tied=True, other_bias=True),
    "learned-positions": _decoder(GQA, rope=False, learned_positions=True, embedding_norm=True),
    "no-final-norm": _decoder(GQA, final_norm=False, norms=NORMS[4:]),
    "logit-multiplier": _decoder(GQA, logit_multiplier=0.25, tied=True),
    "logit-softcap": _decoder(GQA, logit_softcap=1.5, logit_multiplier=3.0),
    "head-bias": _decoder(GQA, head_bias=True, logit_softcap=2.0),
    "relu-squared": _decoder(GQA, gated=False, activation="relu_squared", other_bias=True),
    "relu-squared-gated": _decoder(GQA, activation="relu_squared"),
}
