"""Conversion of layers with a clip, with every QK-norm, and of models in which some layers do not rotate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.decoders import random_inputs, random_windows
from support.graph_decoders import HIDDEN, LLAMA, Shape, disagreement, make_decoder, mapped, quiet, write
from torch import Tensor

from kvexport.calibrate import MomentsAccumulator, windows
from kvexport.convert import (
    CompressionPlan,
    CompressionRequest,
    KVShape,
    LayerPlan,
    convert,
    methods_for,
    plan_compression,
)
from kvexport.convert.code_moments import make_code_moments
from kvexport.convert.permute import permute_heads
from kvexport.errors import UsageError
from kvexport.graph import GRAPH_FILE, with_taps
from kvexport.model import reference
from kvexport.model.decoder import Decoder
from kvexport.progress import Progress

QK = Shape(qk_norm=True)
ROPES = [Shape(), Shape(theta=None), Shape(theta=100.0, window=8)]
FEATURES: dict[str, Decoder] = {
    "clip": make_decoder([Shape()] * 2, replace(LLAMA, clip=1.0)),
    "clip-and-norm": make_decoder([QK] * 2, replace(LLAMA, clip=1.0, qkv_bias=True)),
    "norms-per-head": make_decoder([QK] * 2, replace(LLAMA, per_head_norm=True)),
    "norm-over-heads": make_decoder([QK] * 2, replace(LLAMA, norm_over="heads")),
    "norm-after-rotation": make_decoder([QK] * 2, replace(LLAMA, norm_after_rotation=True)),
    "rope-in-some-layers": make_decoder(ROPES),
    "rope-after-none": make_decoder(ROPES[::-1]),
    "partial-rope": make_decoder([Shape(rotary_dim=4, magnitude=True)] * 2),
    "parallel": make_decoder([Shape()] * 2, replace(LLAMA, parallel=True, residual_multiplier=0.5)),
    "output-norms": make_decoder(
        [Shape()] * 2, replace(LLAMA, norms=("attention_output_norm", "mlp_output_norm"))
    ),
}


def wide(name: str) -> Decoder:
    return mapped(FEATURES[name], lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)


def planned(decoder: Decoder, tokens: Tensor, ratio: float) -> CompressionPlan:
    methods = methods_for("auto", decoder.layers[0].attention)
    return plan_compression(
        decoder, tokens, CompressionRequest(kv_ratio=ratio), methods, None, None, Progress()
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", FEATURES)
def test_half_of_the_cache_costs_what_is_predicted(name: str, tmp_path: Path) -> None:
    decoder = FEATURES[name]
    tokens = random_windows(decoder, 40, 24)
    layers = list(convert(decoder, tokens, planned(decoder, tokens, 0.5).layer_plans))
    for each in layers:
        assert 0.05 < each.report.measured_error < 0.5
        assert 1 / 1.3 < each.report.predicted_error / each.report.measured_error < 1.3
    assert sum(each.report.kv_width for each in layers) <= 32 * len(layers)
    converted = replace(decoder, layers=[each.layer for each in layers])
    contract = write(converted, tmp_path)
    assert disagreement(converted, with_taps(tmp_path / GRAPH_FILE).session(quiet()), contract) < 5e-6


@pytest.mark.parametrize("method", ["online", "fold", "svd-a"])
@pytest.mark.parametrize("name", FEATURES)
def test_codes_of_full_width_change_nothing(name: str, method: str) -> None:
    """Two heads of twice the trained width, in the order that matching finds."""
    decoder = wide(name)
    attention = decoder.layers[0].attention
    if method == "fold" and not attention.keys_fold:
        return
    tokens = random_windows(decoder, 24, 24)
    wanted = reference.forward(decoder, tokens[:4])
    errors = []
    for shape in (KVShape(2, 16, 16), KVShape(2, 12, 16), KVShape(2, 16, 12)):  # two controls
        plan = [LayerPlan(methods_for(method, attention)[0], shape)] * len(decoder.layers)
        layers = [each.layer for each in convert(decoder, tokens, plan)]
        found = reference.forward(replace(decoder, layers=layers), tokens[:4])
        errors.append(float((found - wanted).abs().max() / wanted.abs().max()))
    assert errors[0] < (1e-4 if method == "fold" else 1e-12)
    assert min(errors[1:]) > 1e-3


def test_clipped_values_are_encoded_after_the_clip() -> None:
    decoder = wide("clip")
    tokens = random_windows(decoder, 24, 24)
    for trained, each in zip(
        decoder.layers, convert(decoder, tokens, planned(decoder, tokens, 0.5).layer_plans), strict=True
    ):
        attention = each.layer.attention
        assert attention.value_encoder is not None and attention.clip == 1.0
        assert sorted(attention.v.weight.flatten().tolist()) == sorted(
            trained.attention.v.weight.flatten().tolist()
        )
        assert attention.value_heads == 4 and attention.value_dim * attention.num_kv_heads < 32


@pytest.mark.parametrize("name", ["clip", "norms-per-head", "norm-over-heads"])
def test_keys_behind_a_clip_or_norm_do_not_fold(name: str) -> None:
    attention = FEATURES[name].layers[0].attention
    between = "clipped keys: a clip" if name == "clip" else "QK-norm: a norm"
    with pytest.raises(UsageError, match=f"needs a model without {between} after W_K prevents folding"):
        methods_for("fold", attention)
    assert [method.name for method in methods_for("auto", attention)] == ["online"]


@pytest.mark.parametrize("name", ["norms-per-head", "norm-over-heads"])
def test_norms_move_with_their_heads(name: str) -> None:
    attention, x = wide(name).layers[0].attention, random_inputs(2, 12, hidden=HIDDEN)
    moved = permute_heads(attention, [2, 0, 3, 1])
    torch.testing.assert_close(windows.attend(moved, x), windows.attend(attention, x), rtol=0, atol=1e-12)
    for which in ("q_norm", "k_norm"):  # control
        left = replace(moved, **{which: getattr(attention, which)})
        assert float((windows.attend(left, x) - windows.attend(attention, x)).abs().max()) > 1e-3


def test_moments_contain_the_weights_of_norms_after_rotation() -> None:
    attention, x = wide("norm-after-rotation").layers[0].attention, random_inputs(3, 12, hidden=HIDDEN)
    accumulator = MomentsAccumulator(attention, weighted=False)
    accumulator.add(x)
    moments = make_code_moments(False, accumulator.finish(), attention, 20).moments
    placed = [reference.project(attention, x, torch.full((1, 12), n)) for n in range(20)]
    keys = torch.cat([each.key_rotated.transpose(1, 2).flatten(2).flatten(0, 1) for each in placed])
    torch.testing.assert_close(moments.key_mean, keys.mean(0), rtol=0, atol=1e-6)  # float32 tables
    torch.testing.assert_close(moments.key_second, keys.T @ keys / len(keys), rtol=0, atol=1e-6)
    for head, second in enumerate(moments.query_second):
        queries = torch.cat([each.query_rotated[:, head].flatten(0, 1) for each in placed])
        torch.testing.assert_close(second, queries.T @ queries / len(queries), rtol=0, atol=1e-6)


def test_each_layer_is_coded_for_its_own_rope() -> None:
    decoder = wide("rope-in-some-layers")
    tokens = random_windows(decoder, 24, 24)
    attention = decoder.layers[0].attention
    plan = [LayerPlan(methods_for("fold", attention)[0], KVShape(2, 8, 8))] * 3
    layers = list(convert(decoder, tokens, plan))
    assert [each.report.method for each in layers] == ["fold", "online", "fold"]
    assert all(each.layer.attention.key_map is None for each in layers)
    online = [LayerPlan(methods_for("online", attention)[0], KVShape(2, 8, 8))] * 3
    maps = [each.layer.attention.key_map for each in convert(decoder, tokens, online)]
    assert [each is None for each in maps] == [False, True, False]  # without RoPE the code folds
