"""The published neighbours on tiny float64 decoders: exact at full rank, right on planted data, within
budget."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.decoders import make_decoder, random_windows
from torch import Tensor

from kvexport.calibrate.windows import attend
from kvexport.errors import UsageError
from kvexport.model import reference
from kvexport.model.decoder import Decoder, Layer, Linear

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
neighbours = importlib.import_module("neighbours")
aligned, grouping, kqsvd, low_rank, recalkv, stream, transmla, result, fisher = (
    importlib.import_module(f"neighbours.{name}")
    for name in (
        "aligned",
        "grouping",
        "kqsvd",
        "low_rank",
        "recalkv",
        "stream",
        "transmla",
        "result",
        "fisher",
    )
)
NAMES = tuple(neighbours.NEIGHBOURS)
HEADS, WIDTH = 8, 8


def _decoder(style: str = "llama", **sizes: Any) -> Decoder:
    """Hidden is as wide as all heads, so that no projection is of low rank by its shape."""
    return make_decoder(style, **{"heads": HEADS, "head_dim": WIDTH, "hidden": HEADS * WIDTH, **sizes})


def _windows(decoder: Decoder) -> Tensor:
    return random_windows(decoder, 6, 20)


def _logits(decoder: Decoder, made: Any, windows: Tensor) -> Tensor:
    return reference.logits(decoder, made.residual_stream(windows))


def _divergence(decoder: Decoder, made: Any, windows: Tensor) -> float:
    a = reference.forward(decoder, windows).log_softmax(-1)
    b = _logits(decoder, made, windows).log_softmax(-1)
    return float((a.exp() * (a - b)).sum(-1).mean())


def _with_weights(layer: Layer, **weights: Tensor) -> Layer:
    linears = {name: Linear(weight, getattr(layer.attention, name).bias) for name, weight in weights.items()}
    return dataclasses.replace(layer, attention=dataclasses.replace(layer.attention, **linears))


def _planted(decoder: Decoder, plant: Any) -> Decoder:
    """`plant(layer, random)` changes every layer."""
    generator = torch.Generator().manual_seed(5)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64) / size[-1] ** 0.5

    return dataclasses.replace(decoder, layers=[plant(layer, random) for layer in decoder.layers])


def _heads(weight: Tensor) -> Tensor:
    return weight.unflatten(0, (HEADS, -1))


def _numbers(decoder: Decoder) -> int:
    return sum(layer.attention.kv_width for layer in decoder.layers)


@pytest.mark.parametrize("style", ["llama", "gqa", "bias", "window"])
@pytest.mark.parametrize("name", NAMES)
def test_the_full_budget_loses_nothing(name: str, style: str) -> None:
    decoder = _decoder(style)
    windows = _windows(decoder)
    made = neighbours.neighbour(name)(decoder, windows, 1.0)
    assert made.kv_numbers_per_token == _numbers(decoder)
    torch.testing.assert_close(
        _logits(decoder, made, windows), reference.forward(decoder, windows), rtol=1e-8, atol=1e-8
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("head_dim", [8, 32])
def test_caches_at_most_the_budget_and_uses_most_of_it(name: str, head_dim: int) -> None:
    decoder = _decoder(layers=1, head_dim=head_dim)
    windows = random_windows(decoder, 2, 12)
    for ratio in (1 / 2, 1 / 3, 1 / 4, 1 / 8):
        made = neighbours.neighbour(name)(decoder, windows, ratio)
        budget = ratio * _numbers(decoder)
        assert made.kv_numbers_per_token <= budget + 1e-6
        rounded_to_heads = name.startswith("aligned") and ratio == 1 / 3  # 2 of 8 heads
        assert made.kv_numbers_per_token >= (0.74 if rounded_to_heads else 0.9) * budget
        assert torch.isfinite(made.residual_stream(windows)).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_decoder_keeps_its_dtype_and_its_weights(name: str) -> None:
    decoder = _decoder(dtype=torch.float32, layers=1)
    before = [part.weight.clone() for part in (decoder.layers[0].attention.q, decoder.layers[0].attention.k)]
    made = neighbours.neighbour(name)(decoder, _windows(decoder), 0.5)
    assert made.residual_stream(_windows(decoder)).dtype == torch.float32
    for part, kept in zip(
        (decoder.layers[0].attention.q, decoder.layers[0].attention.k), before, strict=True
    ):
        assert torch.equal(part.weight, kept) and not part.weight.requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_rejects_models_that_a_method_does_not_support(name: str) -> None:
    convert = neighbours.neighbour(name)
    bloom, qwen3 = _decoder("bloom", layers=1), _decoder("qwen3", layers=1)
    with pytest.raises(UsageError, match="rotary"):
        convert(bloom, _windows(bloom), 0.5)
    with pytest.raises(UsageError, match="ratio leaves no number"):
        convert(_decoder(layers=1), _windows(bloom), 0.001)
    made = neighbours.neighbour("kq-svd")(_decoder(layers=1), _windows(bloom), 0.5)
    with pytest.raises(UsageError, match="converted already"):
        convert(dataclasses.replace(bloom, layers=[made.layers[0].layer]), _windows(bloom), 0.5)
    if name in ("transmla", "aligned-mean", "aligned-mean-renorm"):
        with pytest.raises(UsageError, match="norm of queries and keys"):
            convert(qwen3, _windows(qwen3), 0.5)
    else:
        assert _divergence(qwen3, convert(qwen3, _windows(qwen3), 1.0), _windows(qwen3)) < 1e-12


def test_rejects_an_unknown_name() -> None:
    with pytest.raises(UsageError, match="no such neighbour"):
        neighbours.neighbour("mla")


# Palu and ReCalKV


def test_the_low_rank_factors_equal_the_papers_formula() -> None:
    generator = torch.Generator().manual_seed(2)
    weight, data = (torch.randn(size, 16, generator=generator, dtype=torch.float64) for size in (12, 50))
    inputs = data.T @ data / 50
    root = torch.linalg.cholesky(inputs)
    left, singular, right = torch.linalg.svd(weight @ root, full_matrices=False)
    literal = left[:, :5] * singular[:5] @ right[:5] @ torch.linalg.inv(root)
    ours = torch.matmul(*low_rank.whitened(weight, inputs, 5))
    torch.testing.assert_close(ours, literal)


def test_whitening_loses_less_of_the_keys_than_the_weights_alone() -> None:
    layer, moments = _first(_decoder())
    weight = layer.attention.k.weight
    groups = grouping.adjacent(HEADS, 4)

    def lost(inputs: Tensor) -> float:
        error = weight - low_rank.grouped(weight, inputs, groups, WIDTH, 16)
        return float((error @ moments.second * error).sum())

    assert lost(moments.second) < 0.8 * lost(torch.eye(len(moments.second), dtype=torch.float64))


def test_palu_finds_groups_of_low_rank() -> None:
    def plant(layer: Layer, random: Any) -> Layer:
        return _with_weights(
            layer, **{name: torch.cat([random(32, 16) @ random(16, 64) for _ in range(2)]) for name in "kv"}
        )

    decoder = _planted(_decoder(), plant)
    windows = _windows(decoder)
    assert _divergence(decoder, neighbours.neighbour("palu")(decoder, windows, 0.5), windows) < 1e-12
    assert _divergence(decoder, neighbours.neighbour("palu")(decoder, windows, 0.4), windows) > 1e-6


SCATTERED = [[0, 2, 5, 7], [1, 3, 4, 6]]


def test_recalkv_groups_the_similar_heads() -> None:
    def plant(layer: Layer, random: Any) -> Layer:
        key = torch.empty(HEADS, WIDTH, 64, dtype=torch.float64)
        for group in SCATTERED:
            key[group] = (random(32, 16) @ random(16, 64)).unflatten(0, (4, WIDTH))
        return _with_weights(layer, k=key.flatten(0, 1), v=random(64, 32) @ random(32, 64))

    decoder = _planted(_decoder(layers=1), plant)
    windows = _windows(decoder)
    layer, moments = _first(decoder)
    assert sorted(grouping.greedy_groups(recalkv.key_similarity(layer.attention, moments), 4)) == SCATTERED
    assert _divergence(decoder, neighbours.neighbour("recalkv")(decoder, windows, 0.5), windows) < 1e-12
    assert _divergence(decoder, neighbours.neighbour("palu")(decoder, windows, 0.5), windows) > 1e-6


def test_value_calibration_fits_other_data_than_that_of_the_factors() -> None:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(16, 16, generator=generator, dtype=torch.float64)
    made, other = (_second_moment(generator, 16) for _ in range(2))
    left, right = low_rank.whitened(weight, made, 6)

    def lost(pair: tuple[Tensor, Tensor]) -> float:
        error = weight - torch.matmul(*pair)
        return float((error @ other * error).sum())

    best = lost(low_rank.whitened(weight, other, 6))
    assert best < lost(recalkv.calibrate(weight, left, right, other)) < lost((left, right))
    same = torch.matmul(*recalkv.calibrate(weight, left, right, made))
    torch.testing.assert_close(same, left @ right)  # a fixed point on its own data


# The rank search


def test_the_rank_search_splits_the_whole_budget_by_information() -> None:
    assert fisher.allocate([1.0, 3.0], [100, 100], 40) == pytest.approx([10, 30])
    assert fisher.allocate([1.0, 1.0, 8.0], [100, 100, 20], 50) == pytest.approx(
        [15, 15, 20]
    )  # a full one overflows
    ranks = fisher.rounded([10.6, 30.9, 0.2], [64, 64, 64], [2, 2, 2], 42)
    assert ranks == [5, 15, 1]
    assert fisher.rounded([10.0, 31.9], [64, 64], [2, 1], 42) == [5, 32]
    with pytest.raises(UsageError, match="leaves no number"):
        fisher.rounded([1.0, 1.0], [64, 64], [4, 4], 7)


def test_information_is_the_gradient_of_the_loss() -> None:
    decoder = _decoder(layers=1)
    window = _windows(decoder)[:1]
    found = fisher.fisher(decoder, window)
    step, at = 1e-5, (3, 4)

    def loss(change: float) -> float:
        weight = decoder.layers[0].attention.v.weight.clone()
        weight[at] += change
        logits = reference.forward(
            dataclasses.replace(decoder, layers=[_with_weights(decoder.layers[0], v=weight)]), window
        )
        return float(torch.nn.functional.cross_entropy(logits[0, :-1], window[0, 1:]))

    slope = (loss(step) - loss(-step)) / (2 * step)
    assert slope != 0 and found[1] > 0
    quiet = _with_weights(decoder.layers[0], o=torch.zeros_like(decoder.layers[0].attention.o.weight))
    assert fisher.fisher(dataclasses.replace(decoder, layers=[quiet]), window) == [0.0, 0.0]


# KQ-SVD


def test_the_interaction_is_the_best_of_its_rank() -> None:
    generator = torch.Generator().manual_seed(3)
    mixing = torch.diag(torch.logspace(0, -2, WIDTH, dtype=torch.float64))
    keys, queries = (torch.randn(40, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
    keys, queries = keys @ mixing, queries @ mixing.flip(0, 1)
    logits = keys @ queries.T
    down, up = kqsvd.interaction(keys.T @ keys, queries.T @ queries, 3)
    error = (keys @ down @ (queries @ up).T - logits).square().sum()
    torch.testing.assert_close(error, torch.linalg.svdvals(logits)[3:].square().sum())
    basis = low_rank.leading(keys.T @ keys, 3)  # the keys alone do not know what is asked of them
    assert error < 0.7 * (keys @ basis @ (queries @ basis).T - logits).square().sum()


def test_kqsvd_finds_queries_of_few_directions() -> None:
    half = torch.zeros(WIDTH, 1, dtype=torch.float64)
    half[[0, 3, 4, 7]] = 1  # two whole rotary pairs

    def plant(layer: Layer, random: Any) -> Layer:
        attention = layer.attention
        output = attention.o.weight.unflatten(1, (HEADS, -1)) * half[:, 0]
        return _with_weights(layer, q=(_heads(attention.q.weight) * half).flatten(0, 1), o=output.flatten(1))

    decoder = _planted(_decoder(), plant)
    windows = _windows(decoder)
    assert _divergence(decoder, neighbours.neighbour("kq-svd")(decoder, windows, 0.5), windows) < 1e-12
    assert _divergence(decoder, neighbours.neighbour("kq-svd")(decoder, windows, 0.4), windows) > 1e-6


# TransMLA


def test_rotating_all_heads_alike_loses_nothing() -> None:
    decoder = _decoder("gqa", kv_heads=4)
    layer, moments = _first(decoder)
    x = reference.norm(layer.attention_norm, reference.embed(decoder.embedding, _windows(decoder)))
    wanted = attend(layer.attention, x)

    def made(rotated: int, fold: int, latent: int = 32) -> Tensor:
        code = transmla.latent_attention(layer.attention, moments, rotated, fold, rotated + latent)
        return code(x)

    torch.testing.assert_close(made(32, 1), wanted)
    for rotated, fold, latent in (
        (32, 2, 32),
        (16, 1, 48),
        (32, 1, 31),
    ):  # folding, stripping, truncating: none is exact
        assert (made(rotated, fold, latent) - wanted).abs().max() > 1e-4


def test_rotations_are_orthogonal_and_frequencies_are_the_models() -> None:
    decoder = _decoder()
    layer, moments = _first(decoder)
    keys, inv_freq = moments.outputs(layer.attention.k), layer.attention.rope.inv_freq
    for rotated, fold in transmla.choices(layer.attention, 100):
        turn, table = transmla.rotation(keys, HEADS, fold, rotated, inv_freq)
        torch.testing.assert_close(turn.T @ turn, torch.eye(64, dtype=torch.float64))
        assert 2 * len(table) == rotated and set(table.tolist()) <= set(inv_freq.tolist())
    assert {fold for _, fold in transmla.choices(layer.attention, 100)} == {1, 2, 4}


def test_transmla_finds_heads_that_are_multiples_of_one() -> None:
    def plant(layer: Layer, random: Any) -> Layer:
        one = random(WIDTH, 64)
        return _with_weights(
            layer, k=torch.cat([random(1) * one for _ in range(HEADS)]), v=random(64, 24) @ random(24, 64)
        )

    decoder = _planted(_decoder(), plant)
    windows = _windows(decoder)
    made = neighbours.neighbour("transmla")(decoder, windows, 32 / 128)  # 8 rotated, 24 latent
    assert [each.attend.rotated for each in made.layers] == [8, 8]
    assert _divergence(decoder, made, windows) < 1e-12
    assert _divergence(decoder, neighbours.neighbour("transmla")(decoder, windows, 31 / 128), windows) > 1e-9


def test_leading_components_of_all_heads_hold_more_than_the_first_head() -> None:
    layer, moments = _first(_decoder())
    keys = moments.outputs(layer.attention.k)
    turn, _ = transmla.rotation(keys, HEADS, 1, WIDTH, torch.ones(WIDTH // 2))
    turned = turn.T @ keys @ turn
    assert turned[:WIDTH, :WIDTH].trace() > 1.5 * keys[:WIDTH, :WIDTH].trace()


# Aligned heads


def _turned(random: Any, count: int) -> tuple[Tensor, Tensor]:
    """`count` random turns of key heads, which rotation commutes with, and of value heads: [count, d, d]."""
    angles = random(count, WIDTH // 2) * 9
    cos, sin = torch.diag_embed(angles.cos()), torch.diag_embed(angles.sin())
    keys = torch.cat((torch.cat((cos, -sin), 2), torch.cat((sin, cos), 2)), 1)
    return keys, torch.linalg.qr(random(count, WIDTH, WIDTH)).Q


@pytest.mark.parametrize("pairs", [[[0, 5], [1, 3], [2, 7], [4, 6]], SCATTERED])
def test_aligned_merging_finds_rotated_copies_and_their_groups(pairs: list[list[int]]) -> None:
    def plant(layer: Layer, random: Any) -> Layer:
        key, value = (torch.empty(HEADS, WIDTH, 64, dtype=torch.float64) for _ in range(2))
        for group in pairs:
            turns = _turned(random, len(group))
            key[group], value[group] = turns[0] @ random(WIDTH, 64), turns[1] @ random(WIDTH, 64)
        return _with_weights(layer, k=key.flatten(0, 1), v=value.flatten(0, 1))

    decoder = _planted(_decoder(), plant)
    windows, ratio = _windows(decoder), len(pairs) / HEADS
    layer, moments = _first(decoder)
    similarity = aligned.value_similarity(layer.attention, moments)
    assert grouping.annealed_groups(similarity, HEADS // len(pairs)) == sorted(pairs)
    for name in ("aligned-mean", "aligned-mean-renorm"):
        made = neighbours.neighbour(name)(decoder, windows, ratio)
        assert made.layers[0].layer.attention.num_kv_heads == len(pairs)
        assert _divergence(decoder, made, windows) < 1e-12
    side_by_side = grouping.adjacent(HEADS, HEADS // len(pairs))
    wrong = aligned.merged(layer.attention, moments, side_by_side, False)
    x = reference.norm(layer.attention_norm, reference.embed(decoder.embedding, windows))
    outputs = [attend(each, x) for each in (layer.attention, wrong)]
    assert (outputs[0] - outputs[1]).abs().max() > 1e-2


def test_aligned_heads_lie_closer_to_their_mean_than_unaligned_ones() -> None:
    layer, moments = _first(_decoder())
    cross = aligned.blocks(moments.outputs(layer.attention.v), HEADS)[:4, :4]
    turns = aligned.value_turns(cross)
    torch.testing.assert_close(
        turns @ turns.transpose(1, 2), torch.eye(WIDTH, dtype=torch.float64).expand(4, -1, -1)
    )
    alike = torch.einsum("ide,ijdf,jfe->", turns, cross, turns)
    assert alike > 1.3 * torch.einsum("ijdd->", cross)
    products = aligned.pair_products(aligned.blocks(moments.outputs(layer.attention.k), HEADS)[:4, :4])
    phases = aligned.key_turns(products)
    torch.testing.assert_close(phases.abs(), torch.ones_like(phases.abs()))
    assert torch.einsum("if,ijf,jf->", phases, products, phases.conj()).real > 1.2 * products.sum().real


def test_renormalised_heads_have_the_norm_of_the_trained_ones() -> None:
    decoder = _decoder(layers=1)
    layer, moments = _first(decoder)
    groups = grouping.adjacent(HEADS, 2)

    def lengths(renorm: bool) -> Tensor:
        return (
            aligned.merged(layer.attention, moments, groups, renorm)
            .k.weight.unflatten(0, (4, -1))
            .flatten(1)
            .norm(dim=1)
        )

    trained = _heads(layer.attention.k.weight).flatten(1).norm(dim=1).unflatten(0, (4, 2)).mean(1)
    torch.testing.assert_close(lengths(True), trained)
    assert (lengths(False) < trained).all()


def test_annealing_beats_random_groups_and_greedy_groups_have_equal_sizes() -> None:
    generator = torch.Generator().manual_seed(1)
    similarity = torch.rand(12, 12, generator=generator)
    similarity = similarity + similarity.T
    for size in (2, 3, 4):
        table = similarity.tolist()
        chance = grouping.score(table, grouping.adjacent(12, size))
        for groups in (grouping.annealed_groups(similarity, size), grouping.greedy_groups(similarity, size)):
            assert sorted(head for group in groups for head in group) == list(range(12))
            assert {len(group) for group in groups} == {size}
            assert grouping.score(table, groups) > chance


# Costs: 8 heads of 8, hidden 64, half the budget


def test_costs_equal_a_count_by_hand() -> None:
    decoder = _decoder(layers=1)
    windows = _windows(decoder)
    base = sum(t.numel() for t in (decoder.embedding.weight, decoder.final_norm.weight, decoder.head.weight))
    layer = decoder.layers[0]
    mlp = (layer.mlp.gate, layer.mlp.up, layer.mlp.down)
    base += sum(each.weight.numel() for each in (*mlp, layer.attention_norm, layer.mlp_norm))

    def counted(name: str) -> tuple[float, float, int]:
        made = neighbours.neighbour(name)(decoder, windows, 0.5)
        return made.macs_per_cached_token, made.macs_per_new_token, made.parameters - base

    square, rotation = 64 * 64, 2 * 64  # a whole projection; rotating a token's queries, or its keys
    # Palu: two groups of 32 channels, rank 16 for keys and values. L is [32, 16] twice, W_O' [64, 8 heads x
    # 16].
    rebuild, down, output = 2 * 32 * 16, 2 * 2 * 16 * 64, 64 * 8 * 16
    assert counted("palu") == (
        rebuild + rotation + 64 + 8 * 16,
        square + rotation + down + output,
        square + rebuild + down + output,
    )
    # ReCalKV: the same keys; one value latent of 32, W_O' [64, 8 heads x 32].
    output = 64 * 8 * 32
    assert counted("recalkv") == (
        rebuild + rotation + 64 + 8 * 32,
        square + rotation + down + output,
        square + rebuild + down + output,
    )
    # KQ-SVD: 4 numbers a head; W_K whole, W_V and W_O half, a map [8, 4] for each head's keys and queries.
    maps = 2 * 8 * 8 * 4
    assert counted("kq-svd") == (8 * (4 + 4), 3 * square + maps + 2 * rotation, 3 * square + maps)
    # Aligned: 4 of 8 KV heads; half of W_K and W_V, half of the keys to rotate.
    assert counted("aligned-mean") == (8 * (8 + 8), 3 * square + rotation * 3 // 2, 3 * square)
    assert neighbours.attention_macs(layer.attention) == neighbours.Macs(8 * 16, 4 * square + 2 * rotation)
    # TransMLA: R rotated, 64 - R latent, one row of 64 that 8 heads share.
    made = neighbours.neighbour("transmla")(decoder, windows, 0.5)
    rotated = made.layers[0].attend.rotated
    latent, weights = 64 - rotated, 3 * square
    maps = 8 * 8 * 64 + 8 * latent * 8
    assert made.layers[0].kv_numbers == 64
    assert counted("transmla") == (8 * (64 + latent), weights + maps + 2 * 9 * rotated, weights + maps)


def _first(decoder: Decoder) -> tuple[Layer, Any]:
    layer = decoder.layers[0]
    return layer, stream.Stream(decoder, _windows(decoder)).measure(layer)


def _second_moment(generator: torch.Generator, width: int) -> Tensor:
    data = torch.randn(60, width, generator=generator, dtype=torch.float64) * torch.logspace(0, -1, width)
    data = data @ torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    return data.T @ data / 60
