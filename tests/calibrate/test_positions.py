"""Averages over positions compared with explicit rotation, and codes that hold beyond the calibration
windows.
"""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.decoders import make_attention, make_decoder, random_inputs, random_windows, with_attention
from torch import Tensor

from kvexport.calibrate import Moments, MomentsAccumulator, average_over_positions, uncentre_keys, windows
from kvexport.calibrate.positions import Rotations
from kvexport.convert import KVShape, LayerPlan, convert, methods_for
from kvexport.model import reference
from kvexport.model.decoder import Attention, Decoder, Linear, Rope


def random(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotated(x: Tensor, inv_freq: Tensor, position: int, magnitude: Tensor | None = None) -> Tensor:
    """Every head of x [N, h·d] with RoPE at one position."""
    first, second = x.unflatten(-1, (-1, 2, len(inv_freq))).unbind(-2)
    angles = position * inv_freq.double()
    factor = 1.0 if magnitude is None else magnitude.double()
    cos, sin = factor * angles.cos(), factor * angles.sin()
    return torch.stack((first * cos - second * sin, second * cos + first * sin), -2).flatten(-3)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 80),
    st.lists(st.floats(0, 3.25, width=32), min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 1000),
    st.booleans(),
)
def test_averages_equal_those_of_rotated_samples(
    positions: int, angles: list[float], g: int, h: int, seed: int, scaled: bool
) -> None:
    inv_freq = torch.tensor(angles)
    magnitude = 1 + torch.arange(len(angles)) / 4 if scaled else None
    x, y = random(5, g * 2 * len(angles), seed=seed), random(5, h * 2 * len(angles), seed=seed + 1)
    at = [tuple(rotated(each, inv_freq, n, magnitude) for each in (x, y)) for n in range(positions)]
    average = Rotations(Rope(inv_freq, magnitude), positions)
    mean = torch.stack([each.mean(0) for each, _ in at]).mean(0)
    second = torch.stack([each.T @ other / 5 for each, other in at]).mean(0)
    torch.testing.assert_close(average.mean(x.mean(0)), mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(average.second(x.T @ y / 5), second, rtol=0, atol=1e-12)


def moments_of(attention: Attention, x: Tensor) -> Moments:
    accumulator = MomentsAccumulator(attention, weighted=False)
    accumulator.add(x)
    return accumulator.finish()


@pytest.mark.parametrize("style", ["gqa", "bias", "qwen3"])
def test_averaged_moments_equal_those_of_rotated_keys_and_queries(style: str) -> None:
    attention = make_attention(style)
    assert attention.rope is not None
    rope, x = attention.rope, random_inputs(3, 12)
    moments = moments_of(attention, x)
    averaged, projected = average_over_positions(moments, rope, 50), windows.project(attention, x)
    keys, queries = (
        each.transpose(1, 2).flatten(2).flatten(0, 1) for each in (projected.key, projected.query)
    )
    placed = [tuple(rotated(each, rope.inv_freq, n) for each in (keys, queries)) for n in range(50)]
    rows = torch.cat([key for key, _ in placed])
    torch.testing.assert_close(averaged.key_mean, rows.mean(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(averaged.key_second, rows.T @ rows / len(rows), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        averaged.key_covariance(slice(8, 16)), torch.cov(rows[:, 8:16].T, correction=0), rtol=0, atol=1e-12
    )
    for head, second in enumerate(averaged.query_second):
        own = torch.cat([query for _, query in placed])[:, 8 * head : 8 * head + 8]
        torch.testing.assert_close(second, own.T @ own / len(own), rtol=0, atol=1e-12)
    changed = {
        field.name
        for field in fields(Moments)
        if not torch.equal(getattr(averaged, field.name), getattr(moments, field.name))
    }
    assert changed == {"key_mean", "key_second", "query_second"}


@pytest.mark.parametrize("magnitude", [None, [1.25, 1.25, 1.0, 1.0]])
def test_logits_over_distances_weigh_octaves_equally(magnitude: list[float] | None) -> None:
    """Σ w_n E (qᵀ R_{-n} k)², w_n ∝ 1 / (n + 1), from second moments; the mean key rotates too, so it is
    included. A magnitude scales both queries and keys.
    """
    attention = make_attention("bias")
    assert attention.rope is not None
    rope = replace(attention.rope, magnitude=None if magnitude is None else torch.tensor(magnitude))
    x = random_inputs(3, 12)
    moments = uncentre_keys(moments_of(attention, x))
    projected = windows.project(attention, x)
    keys, queries = (each[:, 1].flatten(0, 1) for each in (projected.key, projected.query))  # head 1
    weights = 1 / (1 + torch.arange(16, dtype=torch.float64))
    scaled = rotated(queries, rope.inv_freq, 0, rope.magnitude)
    turned = [rotated(keys, rope.inv_freq, -n, rope.magnitude) for n in range(16)]
    powers = torch.stack([(scaled @ each.T).square().mean() for each in turned])
    rows = slice(8, 16)
    power = (
        moments.query_second[1] * Rotations.by_distance(rope, 16).second(moments.key_second[rows, rows])
    ).sum()
    assert float(power) == pytest.approx(float((weights * powers).sum() / weights.sum()), rel=1e-10)
    assert float(moments.key_mean.abs().max()) == 0


def test_pairs_rotate_with_assigned_frequencies_in_both_directions() -> None:
    """x has three pairs with frequencies 1, 1 and 3, y two heads of four; compared with plain matrices."""
    rope, rows = Rope(torch.tensor([1.0, 0.3, 0.1, 0.02])), torch.tensor([1, 1, 3])
    xy = torch.randn(6, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inv_freq = rope.inv_freq.double()

    def rotation(frequencies: Tensor, n: int) -> Tensor:
        cos, sin = torch.cos(n * frequencies).diag(), torch.sin(n * frequencies).diag()
        return torch.cat((torch.cat((cos, -sin), 1), torch.cat((sin, cos), 1)))

    for sign, inverse in ((1, False), (-1, True)):
        every = [
            rotation(inv_freq[rows], sign * n) @ xy @ torch.block_diag(*[rotation(inv_freq, sign * n)] * 2).T
            for n in range(9)
        ]
        average = Rotations(rope, 9).of_pairs(rows, inverse=inverse)(xy)
        torch.testing.assert_close(average, torch.stack(every).mean(0), rtol=0, atol=1e-12)
        swapped = Rotations(rope, 9).of_pairs(columns=rows, inverse=inverse)(xy.T)
        torch.testing.assert_close(swapped, average.T, rtol=0, atol=1e-12)


def test_one_position_changes_nothing_and_many_average_the_mean_out() -> None:
    attention = make_attention("bias")
    assert attention.rope is not None
    rope, moments = attention.rope, moments_of(attention, random_inputs(3, 12))
    once = average_over_positions(moments, rope, 1)
    for field in fields(Moments):
        torch.testing.assert_close(
            getattr(once, field.name), getattr(moments, field.name), rtol=0, atol=1e-14
        )
    many = average_over_positions(moments, rope, 200_000)
    assert float(many.key_mean.norm()) < 0.01 * float(moments.key_mean.norm())
    # Rotation keeps norms. A cosine of an angle of 2e5 radians is rounded to about 2e5 * 2^-53, 2e-11.
    assert float(many.key_second.trace()) == pytest.approx(float(moments.key_second.trace()), rel=2e-11)


# Codes calibrated on 256 positions and used at 4096

CALIBRATED, DEPLOYED = 256, 4096
OFFSET = DEPLOYED - CALIBRATED


def with_slow_keys() -> Decoder:
    """Keys whose strong part rotates so slowly that it has two directions within 256 positions, and four
    within 4096.

    One number of the input goes into a slow pair of every head, with a different phase per head; the rest of
    W_K is weak.
    """
    decoder = make_decoder("llama", layers=1, max_positions=DEPLOYED)
    along, phases = random(2, 32, seed=1) * 0.35, random(4, 2, 2, seed=2)

    def change(attention: Attention) -> Attention:
        weight = 0.1 * attention.k.weight.view(4, 2, 4, 32)
        weight[:, :, 2:] += phases.transpose(1, 2)[..., None] * along
        rope = Rope(torch.tensor([1.0, 0.1, 3e-4, 2e-4]))
        return replace(attention, k=Linear(weight.reshape(32, 32)), rope=rope)

    return with_attention(decoder, change)


def output(attention: Attention, x: Tensor, offset: int) -> Tensor:
    """Attention output on normed inputs x [B, S, hidden] at positions offset, offset + 1, ..."""
    positions = offset + torch.arange(x.shape[1]).expand(x.shape[:2])
    projected = reference.project(attention, x, positions)
    return reference.linear(attention.o, windows.head_outputs(attention, projected))


def errors(far: tuple[Decoder, Tensor], method: str, capacity: int) -> tuple[float, float]:
    """Relative errors of the converted attention near the start and at the far end of 4096 positions."""
    decoder, x = far
    attention, tokens = decoder.layers[0].attention, random_windows(decoder, 4, CALIBRATED)
    layer_plan = LayerPlan(methods_for(method, attention)[0], KVShape(1, 4 if method == "online" else 8, 32))
    (converted,) = convert(decoder, tokens, [layer_plan], capacity=capacity)

    def error(offset: int) -> float:
        expected = output(attention, x, offset)
        lost = output(converted.layer.attention, x, offset) - expected
        return float(lost.norm() / (expected - expected.mean((0, 1))).norm())

    return error(0), error(OFFSET)


@pytest.fixture(scope="module")
def far() -> tuple[Decoder, Tensor]:
    decoder = with_slow_keys()
    fresh = random_windows(decoder, 1, CALIBRATED, seed=9)
    return decoder, reference.norm(
        decoder.layers[0].attention_norm, reference.embed(decoder.embedding, fresh)
    )


def test_trained_attention_does_not_depend_on_the_offset(far: tuple[Decoder, Tensor]) -> None:
    decoder, x = far
    near, there = (output(decoder.layers[0].attention, x, offset) for offset in (0, OFFSET))
    assert float((near - there).norm() / near.norm()) < 1e-3  # float32 angles


def test_codes_for_4096_positions_hold_at_4096(far: tuple[Decoder, Tensor]) -> None:
    near, there = errors(far, "online", DEPLOYED)
    assert near < 0.1
    assert there < 1.2 * near


def test_codes_for_256_positions_fail_at_4096(far: tuple[Decoder, Tensor]) -> None:
    """Negative control: accurate within 256 positions, useless beyond."""
    short_near, short_there = errors(far, "online", CALIBRATED)
    _, there = errors(far, "online", DEPLOYED)
    assert short_near < 0.1
    assert short_there > 5 * max(short_near, there)


@pytest.mark.parametrize("capacity", [CALIBRATED, DEPLOYED])
def test_folded_keys_hold_at_all_positions(far: tuple[Decoder, Tensor], capacity: int) -> None:
    near, there = errors(far, "fold", capacity)
    assert there == pytest.approx(near, rel=1e-2)
