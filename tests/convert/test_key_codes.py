"""Codes of keys: which depend on positions, and that each is the best of its kind."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from support.decoders import make_attention, random_inputs
from support.layer_codes import (
    code_moments,
    code_of,
    converted_by,
    error,
    grouping_of,
    loss,
    measure,
    output,
    predicted,
)
from torch import Tensor

from kvexport.calibrate import Moments, windows
from kvexport.convert import keys
from kvexport.convert.apply import LayerCode, apply_code
from kvexport.convert.codes import Code
from kvexport.convert.groups import Grouping
from kvexport.convert.methods import METHODS
from kvexport.model import reference
from kvexport.model.decoder import Attention, Linear, Rope
from kvexport.model.rotation import rotary_tables, rotate


def stacked(x: Tensor, width: int) -> Tensor:
    """[..., heads·width] -> [1, heads, S, width], as `reference.rotate` takes it."""
    return x.unflatten(-1, (-1, width)).transpose(0, 1)[None]


def rotated(x: Tensor, width: int, positions: Tensor, rope: Rope) -> Tensor:
    """Every head of x [S, heads·width] with RoPE at `positions` [S]."""
    tables = rotary_tables(rope, positions[None], torch.float64)
    return rotate(stacked(x, width), tables)[0].transpose(0, 1).flatten(1)


def test_mean_pool_commutes_with_rope_and_the_others_do_not() -> None:
    attention = make_attention("bias")
    assert attention.rope is not None
    rope = attention.rope
    x, grouping = random_inputs(4, 32), grouping_of(attention, 2)
    positions = torch.cat((torch.arange(100), torch.tensor([1000, 4095, 100_000])))
    z = torch.randn(len(positions), 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def distance(code: Code) -> float:
        return float(
            (rotated(z, 8, positions, rope) @ code.encode - rotated(z @ code.encode, 8, positions, rope))
            .abs()
            .max()
        )

    codes = {method: code_of(method, attention, x, 2)[1].keys for method in ("mean-pool", "online", "fold")}
    for group in range(grouping.kv_heads):
        assert distance(codes["mean-pool"][group]) < 1e-12
        assert min(distance(codes["online"][group]), distance(codes["fold"][group])) > 1e-2


@pytest.mark.parametrize("style", ["llama", "gqa", "bias"])
def test_folded_keys_depend_on_distances_and_online_keys_on_positions(style: str) -> None:
    """The same text from position 3000 on does not change the output of a folded layer."""
    attention = make_attention(style)
    x, offset = random_inputs(2, 24), 3000
    for method, depends in (("fold", False), ("mean-pool", False), ("online", True)):
        converted = converted_by(method, attention, x, attention.num_kv_heads // 2)
        outputs = []
        for start in (0, offset):
            positions = start + torch.arange(24).expand(2, 24)
            projected = reference.project(converted, x, positions)
            outputs.append(reference.linear(converted.o, windows.head_outputs(converted, projected)))
        moved = float((outputs[1] - outputs[0]).norm() / outputs[0].norm())
        assert (moved > 1e-2) == depends and (depends or moved < 1e-4), (method, moved)  # float32 angles


@pytest.mark.parametrize("style", ["llama", "gqa", "bias", "window"])
def test_folding_a_commuting_code_gives_the_logits_of_its_maps(style: str) -> None:
    attention = make_attention(style)
    x = random_inputs(2, 24)
    moments, code = code_of("mean-pool", attention, x, attention.num_kv_heads // 2)
    grouping = grouping_of(attention, attention.num_kv_heads // 2)
    folded = apply_code(attention, grouping, code, moments.value_mean)
    mapped = apply_code(attention, grouping, replace(code, folds=False), moments.value_mean)
    assert folded.key_map is None
    assert mapped.key_map is not None
    torch.testing.assert_close(logits(folded, x), logits(mapped, x), rtol=0, atol=1e-12)
    torch.testing.assert_close(output(folded, x), output(mapped, x), rtol=0, atol=1e-12)


def logits(layer: Attention, x: Tensor) -> Tensor:
    projected = windows.project(layer, x)
    return reference.scores(
        layer,
        reference.map_queries(layer, projected.query_rotated),
        reference.map_keys(layer, projected.key_rotated),
    )


@pytest.mark.parametrize("style", ["llama", "gqa", "bias"])
def test_folded_weights_give_the_logits_of_the_code(style: str) -> None:
    """Compare (D_h q)ᵀ C_{n - m} Eᵀ k, for each head and pair of tokens, with the folded layer."""
    attention = make_attention(style)
    assert attention.rope is not None
    rope = attention.rope
    x, kv_heads = random_inputs(1, 6), attention.num_kv_heads // 2
    moments, code = code_of("fold", attention, random_inputs(4, 32), kv_heads)
    grouping = grouping_of(attention, kv_heads)
    folded = logits(apply_code(attention, grouping, code, moments.value_mean), x)[0]
    projected = windows.project(attention, x)
    q, k = projected.query[0], projected.key[0].transpose(0, 1).flatten(1)  # [H, S, d] and [S, h·d]
    for group in range(kv_heads):
        cached = k[:, grouping.rows(group)] @ code.keys[group].encode  # [S, d]
        for head in grouping.query_heads(group):
            query = q[head] @ code.keys[group].decode[grouping.member(head)]
            rotated_pair = [rotated(each, 8, torch.arange(6), rope) for each in (query, cached)]
            causal = torch.ones(6, 6).tril().bool()
            torch.testing.assert_close(
                folded[head][causal],
                (rotated_pair[0] @ rotated_pair[1].T * attention.scale)[causal],
                rtol=0,
                atol=1e-10,
            )


def test_folding_a_code_made_after_rotation_changes_the_logits() -> None:
    """Control for the tests above: the online code, folded although it does not commute."""
    attention = make_attention("llama")
    x = random_inputs(2, 24)
    moments, code = code_of("online", attention, x, 2)
    grouping = grouping_of(attention, 2)
    mapped = apply_code(attention, grouping, code, moments.value_mean)
    folded = apply_code(attention, grouping, replace(code, folds=True), moments.value_mean)
    assert float((output(folded, x) - output(mapped, x)).abs().max()) > 1e-3


# Quality


def key_loss(moments: Moments, grouping: Grouping, code: Code, group: int) -> float:
    rows = grouping.rows(group)
    return loss(code, keys.query_weights(moments, grouping, group), moments.key_covariance(rows))


def procrustes(moments: Moments, grouping: Grouping, group: int) -> Code:
    """Rotate each pair of each head towards the first head, then take the mean (arXiv 2412.20677)."""
    half, rows = grouping.head_dim // 2, grouping.rows(group)
    blocks = moments.key_covariance(rows).view(grouping.size, 2, half, grouping.size, 2, half)
    code = torch.zeros(grouping.size, 2, half, 2, half, dtype=torch.float64)
    for i in range(half):
        for h in range(grouping.size):
            cross = blocks[h, :, i, 0, :, i]  # E[z_h z_0ᵀ], of one pair
            turn = torch.complex(cross[0, 0] + cross[1, 1], cross[1, 0] - cross[0, 1])
            turn = turn / turn.abs()
            code[h, :, i, :, i] = torch.tensor([[turn.real, -turn.imag], [turn.imag, turn.real]])
    flat = code.view(-1, grouping.head_dim)
    return Code(flat / grouping.size, flat)


@pytest.mark.parametrize("style", ["llama", "gqa", "bias"])
@pytest.mark.parametrize("seed", range(4))
def test_fold_beats_procrustes_alignment_which_beats_the_mean(style: str, seed: int) -> None:
    attention = make_attention(style, seed=seed)
    each = code_moments(attention, random_inputs(4, 32, seed=seed), "fold")
    grouping = grouping_of(attention, attention.num_kv_heads // 2)
    total = dict.fromkeys(("fold", "aligned", "mean"), 0.0)
    assert each.distances is not None
    for group in range(grouping.kv_heads):
        problem = keys.folding(each.moments, grouping, group, None, each.distances)
        codes = {
            "fold": problem.code(),
            "aligned": procrustes(each.moments, grouping, group),
            "mean": keys.mean_pool(each.moments, attention, grouping, group, grouping.head_dim),
        }
        for name, code in codes.items():
            total[name] += problem.loss(code)
    assert total["fold"] < 0.95 * total["aligned"] < 0.95 * total["mean"]


def test_more_cached_pairs_lose_less_and_all_lose_nothing() -> None:
    attention = make_attention("llama", heads=8)
    each, grouping = code_moments(attention, random_inputs(4, 32), "fold"), grouping_of(attention, 2)
    losses = []
    assert each.distances is not None
    for width in (8, 12, 16, 24, 32):
        frequencies = keys.cached_frequencies(each.moments, grouping, width)
        assert (frequencies is None) == (width == 8)
        problem = keys.folding(each.moments, grouping, 0, frequencies, each.distances)
        losses.append(problem.loss(problem.code()))
    assert all(after < before for before, after in pairwise(losses))
    assert losses[-1] < 1e-8 * losses[0]


def test_frequencies_follow_the_energy() -> None:
    """Heads that agree at frequency 0 need one pair of it, and two of each frequency at which they differ."""
    attention = make_attention("llama", heads=2)
    weight = attention.k.weight.clone().view(2, 2, 4, -1)
    weight[1, :, 0] = weight[0, :, 0]
    attention = replace(attention, k=Linear(weight.view(16, -1)))
    moments, grouping = measure(attention, random_inputs(8, 32), "fold"), grouping_of(attention, 1)
    assert keys.cached_frequencies(moments, grouping, 14).tolist() == [0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("style", ["llama", "gqa", "bias", "window", "bloom", "qwen3"])
def test_online_code_minimises_its_loss(style: str) -> None:
    attention = make_attention(style)
    moments = measure(attention, random_inputs(4, 32))
    grouping = grouping_of(attention, attention.num_kv_heads // 2)
    for group in range(grouping.kv_heads):
        losses = {
            name: key_loss(
                moments, grouping, method.key(moments, attention, grouping, group, grouping.head_dim), group
            )
            for name, method in METHODS.items()
            if method.key is not None  # fold makes no code after RoPE
        }
        best = losses.pop("online")
        assert all(best <= each * (1 + 1e-6) for each in losses.values()), losses


@pytest.mark.parametrize("style", ["llama", "gqa", "bias"])
@pytest.mark.parametrize("seed", range(3))
def test_fold_predicts_less_error_than_the_mean(style: str, seed: int) -> None:
    attention = make_attention(style, seed=seed)
    x, kv_heads = random_inputs(4, 32, seed=seed), attention.num_kv_heads // 2
    predictions = [
        predicted(attention, x, name, kv_heads, code_of(name, attention, x, kv_heads)[1])
        for name in ("fold", "mean-pool")
    ]
    assert predictions[0] < 0.9 * predictions[1]


def complex_multiples(attention: Attention, seed: int = 0) -> Attention:
    """Make every odd KV head a multiple of its neighbour: complex per frequency for keys, a matrix for
    values.
    """
    generator = torch.Generator().manual_seed(seed)
    d, hidden = attention.head_dim, attention.k.weight.shape[1]
    k = attention.k.weight.clone().view(-1, 2, d // 2, hidden)
    v = attention.v.weight.clone().view(-1, d, hidden)
    for head in range(1, len(k), 2):
        mix = torch.randn(d // 2, generator=generator, dtype=torch.complex128)[:, None] + 0.2
        z = mix * torch.complex(k[head - 1, 0], k[head - 1, 1])
        k[head, 0], k[head, 1] = z.real, z.imag
        v[head] = torch.randn(d, d, generator=generator, dtype=torch.float64) @ v[head - 1]
    return replace(attention, k=Linear(k.reshape(-1, hidden)), v=Linear(v.reshape(-1, hidden)))


@pytest.mark.parametrize("style", ["llama", "gqa"])
def test_fold_is_lossless_for_complex_multiples(style: str) -> None:
    attention = make_attention(style, kv_heads=4, heads=8 if style == "gqa" else 4)
    attention = complex_multiples(attention)
    x, fresh = random_inputs(4, 32), random_inputs(2, 40, seed=11)
    _, code = code_of("fold", attention, x, 2)
    assert predicted(attention, x, "fold", 2, code) < 1e-5
    assert error(converted_by("fold", attention, x, 2), attention, fresh) < 1e-4
    assert error(converted_by("mean-pool", attention, x, 2), attention, fresh) > 0.1


def test_a_head_with_zero_gain_costs_the_others_nothing() -> None:
    """Gain is zero where W_O is zero: the other member of the group loses nothing, and nothing is NaN."""
    attention = make_attention("llama")
    weight = attention.o.weight.clone()
    weight[:, 8:16] = 0
    attention = replace(attention, o=Linear(weight))
    x = random_inputs(4, 32)
    assert float(measure(attention, x).key_gain[1]) == 0.0
    for method in ("online", "fold"):
        converted = converted_by(method, attention, x, 2)
        alone = replace(attention, o=Linear(weight.clone()))
        alone.o.weight[:, 16:] = 0  # output of the first group alone
        alone_converted = replace(converted, o=Linear(converted.o.weight.clone(), converted.o.bias))
        alone_converted.o.weight[:, 16:] = 0
        expected, actual = output(alone, x), output(alone_converted, x)
        lost = (actual - actual.mean((0, 1))) - (expected - expected.mean((0, 1)))
        assert float(lost.square().sum() / expected.square().sum()) < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_a_group_with_zero_gain_gives_finite_codes(method: str) -> None:
    attention = make_attention("llama")
    weight = attention.o.weight.clone()
    weight[:, :16] = 0
    attention = replace(attention, o=Linear(weight))
    _, code = code_of(method, attention, random_inputs(2, 8), 2)
    for part in (*code.keys, *code.values):
        assert bool(part.encode.isfinite().all())
        assert bool(part.decode.isfinite().all())
        assert float(part.decode.abs().max()) < 1e3


def test_svd_a_is_the_svd_of_the_cached_keys_and_values() -> None:
    """Compare with an SVD of the caches of all tokens [N, t·d], each key at every position once."""
    attention = make_attention("bias")
    assert attention.rope is not None
    rope, x = attention.rope, random_inputs(3, 16)
    projected = windows.project(attention, x)
    everywhere = [
        rotate(projected.key, rotary_tables(rope, torch.full((3, 16), n), torch.float64)) for n in range(16)
    ]
    keys_rotated = torch.cat(everywhere)
    _, code = code_of("svd-a", attention, x, 2)
    for group in range(2):
        for cached, actual in ((keys_rotated, code.keys[group]), (projected.value, code.values[group])):
            rows = cached[:, 2 * group : 2 * group + 2].transpose(1, 2).flatten(2).flatten(0, 1)  # [N, t·d]
            right = torch.linalg.svd(rows, full_matrices=False).Vh[:8]
            torch.testing.assert_close(actual.decode @ actual.encode.T, right.T @ right, rtol=0, atol=1e-6)
            torch.testing.assert_close(actual.encode, actual.decode)


def test_svd_w_is_the_svd_of_the_weights_and_needs_no_data() -> None:
    attention = make_attention("llama")
    _, code = code_of("svd-w", attention, random_inputs(1, 8), 2)
    for group in range(2):
        for linear, actual in ((attention.k, code.keys[group]), (attention.v, code.values[group])):
            left = torch.linalg.svd(linear.weight[16 * group : 16 * group + 16]).U[:, :8]
            torch.testing.assert_close(actual.decode @ actual.encode.T, left @ left.T, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", ["online", "svd-a", "svd-w"])
def test_decoders_are_orthonormal(method: str) -> None:
    attention = make_attention("bias")
    _, code = code_of(method, attention, random_inputs(4, 24), 2)
    for part in (*code.keys, *code.values):
        identity = torch.eye(8, dtype=torch.float64)
        torch.testing.assert_close(part.decode.T @ part.decode, identity, rtol=0, atol=1e-9)


def test_cached_pairs_of_folded_keys_have_equal_norm() -> None:
    attention = make_attention("bias")
    _, code = code_of("fold", attention, random_inputs(4, 24), 2)
    for part in code.keys:
        powers = part.decode.square().sum(0).view(2, 4).mean(0)
        torch.testing.assert_close(powers, torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-9)


def test_a_layer_has_one_code_per_group() -> None:
    attention = make_attention("llama", heads=6)
    _, code = code_of("fold", attention, random_inputs(2, 16), 3)
    assert isinstance(code, LayerCode)
    assert len(code.keys) == len(code.values) == 3
    assert all(part.encode.shape == part.decode.shape == (16, 8) for part in (*code.keys, *code.values))
