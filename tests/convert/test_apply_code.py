"""Codes applied to layers: exact where nothing is lost, for every kind of attention and group size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.decoders import make_attention, random_inputs
from support.layer_codes import (
    code_moments,
    code_of,
    converted_by,
    error,
    grouping_of,
    identity_code,
    measure,
    output,
    plain_shape,
)
from torch import Tensor

from kvexport.convert import values
from kvexport.convert.apply import LayerCode, apply_code
from kvexport.convert.methods import METHODS, folds, layer_code, methods_for, without_output_bias
from kvexport.errors import UsageError
from kvexport.model.decoder import Attention, Linear, tensors_of

EXACT = 2e-4  # codes damp covariances by a millionth


def share_subspaces(attention: Attention, kv_heads: int, *, keys: str, seed: int = 0) -> Attention:
    """Make the heads of each group functions of the first: values by matrices, keys equal or by matrices.

    Biases stay as they are, a different constant for every head.
    """
    generator = torch.Generator().manual_seed(seed)
    d, size = attention.head_dim, attention.num_kv_heads // kv_heads
    k = attention.k.weight.clone().unflatten(0, (kv_heads, size, d))
    v = attention.v.weight.clone().unflatten(0, (kv_heads, size, d))
    for group in range(kv_heads):
        for member in range(1, size):
            mix, other = (torch.randn(d, d, generator=generator, dtype=torch.float64) for _ in range(2))
            v[group, member] = mix @ v[group, 0]
            k[group, member] = k[group, 0] if keys == "equal" else other @ k[group, 0]
    return replace(
        attention, k=Linear(k.flatten(0, 2), attention.k.bias), v=Linear(v.flatten(0, 2), attention.v.bias)
    )


def without_key_bias(attention: Attention) -> Attention:
    return replace(attention, k=Linear(attention.k.weight))


SIZES: list[tuple[str, dict[str, Any], int]] = [
    ("llama", {}, 2),
    ("llama", {"heads": 6}, 2),
    ("llama", {"heads": 12, "head_dim": 4}, 4),
    ("llama", {"heads": 12, "head_dim": 4}, 3),
    ("llama", {"heads": 5, "head_dim": 4}, 1),
    ("gqa", {"heads": 8, "kv_heads": 4}, 2),
    ("gqa", {"heads": 12, "kv_heads": 6, "head_dim": 4}, 2),
    ("window", {}, 2),
    ("qwen3", {}, 2),
    ("qwen3", {"heads": 6, "kv_heads": 3}, 1),
    ("bloom", {}, 2),
    ("bloom", {"heads": 6}, 2),
]


@pytest.mark.parametrize(
    ("style", "sizes", "kv_heads", "method"),
    [
        (*sizes, method)
        for sizes in SIZES
        for method in ("online", "fold")
        if (sizes[0], method) != ("qwen3", "fold")
    ],
)
def test_heads_of_one_subspace_share_one_head_without_loss(
    style: str, sizes: dict[str, Any], kv_heads: int, method: str
) -> None:
    attention = make_attention(style, **sizes)
    attention = share_subspaces(attention, kv_heads, keys="mixed" if style == "bloom" else "equal")
    x, fresh = random_inputs(4, 24), random_inputs(2, 30, seed=11)
    chosen = methods_for(method, attention)[0].name
    assert error(converted_by(chosen, attention, x, kv_heads), attention, fresh) < EXACT


@pytest.mark.parametrize("method", ["online", "fold"])
@pytest.mark.parametrize("style", ["bias", "bloom"])
def test_value_biases_of_a_group_may_differ_without_loss(style: str, method: str) -> None:
    """Attention rows sum to one, so centring keeps the biases exactly."""
    attention = make_attention(style)
    attention = without_key_bias(share_subspaces(attention, 2, keys="mixed" if style == "bloom" else "equal"))
    x, fresh = random_inputs(4, 24), random_inputs(2, 30, seed=11)
    chosen = methods_for(method, attention)[0].name
    assert error(converted_by(chosen, attention, x, 2), attention, fresh) < EXACT


def test_key_biases_are_lossless_with_alibi() -> None:
    """Without RoPE a key's constant part shifts all logits of a row alike."""
    attention = make_attention("bloom")
    attention = share_subspaces(attention, 2, keys="mixed")
    assert attention.k.bias is not None
    x, fresh = random_inputs(4, 24), random_inputs(2, 30, seed=11)
    assert error(converted_by("online", attention, x, 2), attention, fresh) < EXACT


@pytest.mark.parametrize("style", ["llama", "gqa", "bias", "window", "qwen3", "bloom"])
@pytest.mark.parametrize("method", METHODS)
def test_unrelated_heads_lose(style: str, method: str) -> None:
    """Control for the tests above."""
    attention = make_attention(style)
    if attention.k_norm is not None and method == "fold":
        return
    x = random_inputs(4, 24)
    assert error(converted_by(method, attention, x, attention.num_kv_heads // 2), attention, x) > 1e-2


def test_constant_values_lose_nothing_when_centred() -> None:
    """Each head's values are a different constant; the uncentred mean over heads is the control."""
    attention = make_attention("bias")
    attention = replace(attention, v=Linear(torch.zeros_like(attention.v.weight), attention.v.bias))
    x = random_inputs(2, 12)
    expected = output(attention, x)
    for method in ("online", "fold"):
        torch.testing.assert_close(
            output(converted_by(method, attention, x, 2), x), expected, rtol=0, atol=1e-12
        )
    assert float((output(converted_by("mean-pool", attention, x, 2), x) - expected).abs().max()) > 1e-2


def test_constant_values_are_coded_where_the_output_has_no_bias() -> None:
    """Codes of centred values lose the constant without a bias: the control."""
    attention = make_attention("bias")
    attention = replace(attention, v=Linear(torch.zeros_like(attention.v.weight), attention.v.bias))
    assert attention.o.bias is None
    x, grouping = random_inputs(2, 12), grouping_of(attention, 2)
    moments = code_moments(attention, x, "fold")
    lost = {}
    for method in (without_output_bias(METHODS["fold"]), replace(METHODS["fold"], centred=False)):
        code = layer_code(method, moments, attention, grouping, plain_shape(attention, 2))
        converted = apply_code(attention, grouping, code, moments.moments.value_mean)
        assert converted.o.bias is None
        lost[method.value] = float((output(converted, x) - output(attention, x)).abs().max())
    assert lost[values.weighted_uncentred] < EXACT
    assert lost[values.weighted] > 1e-2


def test_baselines_have_no_output_bias_to_leave_out() -> None:
    assert without_output_bias(METHODS["mean-pool"]) is METHODS["mean-pool"]
    assert not without_output_bias(METHODS["online"]).centred


# Parts of a converted layer


@pytest.mark.parametrize(("style", "sizes", "kv_heads"), SIZES)
@pytest.mark.parametrize("method", METHODS)
def test_cache_shrinks_by_the_group_size(
    style: str, sizes: dict[str, Any], kv_heads: int, method: str
) -> None:
    attention = make_attention(style, **sizes)
    if attention.k_norm is not None and method == "fold":
        return
    converted = converted_by(method, attention, random_inputs(2, 12), kv_heads)
    assert converted.num_kv_heads == kv_heads
    assert converted.num_heads == attention.num_heads
    assert converted.kv_width * attention.num_kv_heads == attention.kv_width * kv_heads
    assert converted.key_dim == converted.value_dim == attention.head_dim
    assert converted.scale == attention.scale
    assert converted.window == attention.window
    mapped = not folds(METHODS[method], attention)
    assert (converted.key_map is not None) == (converted.query_map is not None) == mapped
    if mapped:
        assert converted.k is attention.k
        assert converted.q is attention.q
        assert converted.q_norm is attention.q_norm
    else:
        assert converted.k.weight.shape[0] == kv_heads * attention.head_dim
    assert all(each.dtype == torch.float64 for each in tensors_of(converted))


@pytest.mark.parametrize("style", ["llama", "bias", "bloom", "qwen3"])
def test_converted_layers_keep_the_dtype(style: str) -> None:
    attention = make_attention(style, dtype=torch.float32)
    converted = converted_by("online", attention, random_inputs(2, 12, dtype=torch.float32), 2)
    assert all(each.dtype == torch.float32 for each in tensors_of(converted))
    assert converted.o.bias is not None  # needed for centring


def test_alibi_folds_entirely_and_keeps_its_slopes() -> None:
    attention = make_attention("bloom", heads=6)
    for method in METHODS:
        converted = converted_by(method, attention, random_inputs(2, 12), 2)
        assert converted.key_map is None
        assert converted.query_map is None
        assert converted.value_map is None
        assert converted.alibi_slopes is attention.alibi_slopes
        assert converted.frequencies is None


def test_qk_norm_rejects_fold_and_suggests_online() -> None:
    attention = make_attention("qwen3")
    with pytest.raises(UsageError, match="QK-norm") as refusal:
        methods_for("fold", attention)
    assert "kvexport build --method online" in str(refusal.value)


def test_fold_is_online_without_rope() -> None:
    rotated, alibi = make_attention("llama"), make_attention("bloom")

    def names(method: str, attention: Attention) -> list[str]:
        return [each.name for each in methods_for(method, attention)]

    assert names("fold", rotated) == ["fold"] and names("auto", rotated) == ["online", "fold"]
    assert names("fold", alibi) == names("auto", alibi) == ["online"]  # the unrestricted code folds
    assert names("svd-a", alibi) == ["svd-a"]


def test_rejects_unknown_method() -> None:
    with pytest.raises(UsageError, match="--method must be a conversion method") as refusal:
        methods_for("svd-b", make_attention("llama"))
    assert "svd-a" in str(refusal.value)


# Wide codes, mean-pool and svd-a


def _identity(attention: Attention, kv_heads: int, *, folds: bool, centred: bool) -> LayerCode:
    n = attention.num_kv_heads // kv_heads * attention.head_dim
    return LayerCode((identity_code(n),) * kv_heads, (identity_code(n),) * kv_heads, folds, centred)


@pytest.mark.parametrize("style", ["llama", "gqa", "bias", "window", "qwen3", "bloom"])
@pytest.mark.parametrize("centred", [True, False])
def test_identity_codes_change_nothing(style: str, centred: bool) -> None:
    """The cached head of a group of t heads has t·head_dim numbers."""
    attention = make_attention(style, heads=6, kv_heads=None if style != "gqa" else 3)
    kv_heads = attention.num_kv_heads // 3
    x, grouping = random_inputs(2, 14), grouping_of(attention, kv_heads)
    code = _identity(attention, kv_heads, folds=style == "bloom", centred=centred)
    converted = apply_code(attention, grouping, code, measure(attention, x).value_mean)
    assert converted.value_dim == 3 * attention.head_dim
    torch.testing.assert_close(output(converted, x), output(attention, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("style", ["llama", "bias", "gqa", "bloom"])
def test_mean_pool_averages_keys_and_values_and_keeps_queries_and_outputs(style: str) -> None:
    attention = make_attention(style)
    kv_heads = attention.num_kv_heads // 2
    converted = converted_by("mean-pool", attention, random_inputs(2, 12), kv_heads)

    def averaged(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.unflatten(0, (kv_heads, 2, 8)).mean(1).flatten(0, 1)

    for converted_linear, trained in ((converted.k, attention.k), (converted.v, attention.v)):
        torch.testing.assert_close(converted_linear.weight, averaged(trained.weight), rtol=0, atol=1e-15)
        if trained.bias is not None:
            torch.testing.assert_close(converted_linear.bias, averaged(trained.bias), rtol=0, atol=1e-15)
    for converted_linear, trained in ((converted.q, attention.q), (converted.o, attention.o)):
        torch.testing.assert_close(converted_linear.weight, trained.weight, rtol=0, atol=1e-15)
        assert (converted_linear.bias is None) == (trained.bias is None)
        if trained.bias is not None:
            torch.testing.assert_close(converted_linear.bias, trained.bias, rtol=0, atol=1e-15)


@pytest.mark.parametrize("style", ["llama", "bias", "gqa", "bloom", "qwen3"])
def test_svd_a_equals_projection_of_the_trained_caches(style: str) -> None:
    """The converted layer computes what the trained layer computes with its caches projected."""
    attention = make_attention(style)
    kv_heads = attention.num_kv_heads // 2
    x = random_inputs(3, 16)
    _, code = code_of("svd-a", attention, x, kv_heads)
    converted = converted_by("svd-a", attention, x, kv_heads)
    torch.testing.assert_close(
        output(converted, x), _with_projected_caches(attention, x, code), rtol=0, atol=1e-12
    )


def _with_projected_caches(attention: Attention, x: Tensor, code: LayerCode) -> Tensor:
    from kvexport.calibrate import windows
    from kvexport.model.reference import linear

    projected = windows.project(attention, x)

    def through(cached: Tensor, codes: Any) -> Tensor:  # [B, h, S, d]
        groups = cached.unflatten(1, (len(codes), -1)).transpose(2, 3).flatten(3)  # [B, G, S, t·d]
        back = torch.stack(
            [groups[:, g] @ each.encode @ each.decode.T for g, each in enumerate(codes)], dim=1
        )
        return back.unflatten(3, (-1, attention.head_dim)).transpose(2, 3).flatten(1, 2)

    changed = replace(
        projected,
        key_rotated=through(projected.key_rotated, code.keys),
        value=through(projected.value, code.values),
    )
    return linear(attention.o, windows.head_outputs(attention, changed))
