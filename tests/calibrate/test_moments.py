"""Moments equal plain loops over tokens, for any batching."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support.decoders import STYLES, make_attention, random_inputs
from torch import Tensor

from kvexport.calibrate import Moments, MomentsAccumulator, windows
from kvexport.calibrate.moments import MOMENT_NAMES
from kvexport.model import reference
from kvexport.model.decoder import Attention, Linear, Norm, Rope

Array = np.ndarray[Any, np.dtype[Any]]


def moments_of(attention: Attention, *batches: Tensor) -> Moments:
    accumulator = MomentsAccumulator(attention)
    for x in batches:
        accumulator.add(x)
    return accumulator.finish()


def _apply(linear: Linear, x: Array) -> Array:
    y = linear.weight.numpy() @ x
    return y if linear.bias is None else y + linear.bias.numpy()


def _rms(norm: Norm | None, x: Array) -> Array:
    return x if norm is None else x / np.sqrt((x**2).mean() + norm.eps) * norm.weight.numpy()


def _rotate(x: Array, position: int, rope: Rope | None) -> Array:
    """RoPE by complex numbers."""
    if rope is None:
        return x
    half = len(x) // 2
    angle = position * rope.inv_freq  # tables are float32, as models are trained
    z = (x[:half] + 1j * x[half:]) * (angle.cos().double().numpy() + 1j * angle.sin().double().numpy())
    return np.concatenate((z.real, z.imag))


def _rows(attention: Attention, window: Array) -> Iterator[tuple[Array, Array, Array, Array]]:
    """Queries [H, d], keys [h, d] before RoPE, values [h, d] and attention rows [H, m + 1] of each token."""
    d, heads, kv_heads = attention.head_dim, attention.num_heads, attention.num_kv_heads
    keys: list[Array] = []
    for m, x in enumerate(window):
        q, k, v = (_apply(each, x) for each in (attention.q, attention.k, attention.v))
        unrotated = np.stack([_rms(attention.q_norm, q[h * d : (h + 1) * d]) for h in range(heads)])
        new = np.stack([_rms(attention.k_norm, k[h * d : (h + 1) * d]) for h in range(kv_heads)])
        queries = np.stack([_rotate(each, m, attention.rope) for each in unrotated])
        keys.append(np.stack([_rotate(each, m, attention.rope) for each in new]))
        rows = np.zeros((heads, m + 1))
        for h in range(heads):
            logits = np.full(m + 1, -np.inf)
            for n in range(m + 1):
                if attention.window is None or m - n < attention.window:
                    logits[n] = queries[h] @ keys[n][h // (heads // kv_heads)] * attention.scale
                    if attention.alibi_slopes is not None:
                        logits[n] -= float(attention.alibi_slopes[h]) * (m - n)
            rows[h] = np.exp(logits - logits.max())
            rows[h] /= rows[h].sum()
        yield unrotated, new, v.reshape(kv_heads, d), rows


def brute_force(attention: Attention, x: Array, *, weighted: bool = True) -> dict[str, Array]:
    d, heads = attention.head_dim, attention.num_heads
    shared = heads // attention.num_kv_heads
    w_o = attention.o.weight.numpy()
    n_keys = attention.num_kv_heads * d
    total: dict[str, Any] = {
        "key_mean": np.zeros(n_keys),
        "key_second": np.zeros((n_keys, n_keys)),
        "query_second": np.zeros((heads, d, d)),
        "value_mean": np.zeros(n_keys),
        "value_second": np.zeros((n_keys, n_keys)),
        "overlap": np.zeros((heads, heads)),
        "key_gain": np.zeros(heads),
    }
    outputs, weights = [], {"key": 0.0, "value": 0.0}
    for window in x:
        values: list[Array] = []
        keys: list[Array] = []
        gains, received = np.zeros(len(window)), np.zeros(len(window))
        for queries, key, value, rows in _rows(attention, window):
            keys.append(key)
            values.append(value)
            pooled = []
            for h in range(heads):
                total["query_second"][h] += np.outer(queries[h], queries[h])
                part = w_o[:, h * d : (h + 1) * d]
                pooled.append(sum(a * v[h // shared] for a, v in zip(rows[h], values, strict=True)))
                for n, (a, v) in enumerate(zip(rows[h], values, strict=True)):
                    gain = a**2 * np.sum((part @ (v[h // shared] - pooled[h])) ** 2)
                    total["key_gain"][h] += gain
                    gains[n] += gain
                    received[n] += a**2
                for other in range(heads):
                    total["overlap"][h, other] += rows[h] @ rows[other]
            outputs.append(_apply(attention.o, np.concatenate(pooled)))
        for name, vectors, each in (("key", keys, gains), ("value", values, received)):
            for vector, weight in zip(vectors, each if weighted else np.ones(len(window)), strict=True):
                weights[name] += weight
                total[f"{name}_mean"] += weight * vector.ravel()
                total[f"{name}_second"] += weight * np.outer(vector, vector)
    count = x.shape[0] * x.shape[1]
    means = {name: value / weights.get(name.split("_")[0], count) for name, value in total.items()}
    means["key_gain"] = total["key_gain"] / count
    return means | {"tokens": np.array(count), "output_power": np.var(np.stack(outputs), axis=0).sum()}


CASES = [(style, {}) for style in STYLES] + [
    ("gqa", {"heads": 6, "kv_heads": 2}),
    ("bloom", {"heads": 6}),
    ("llama", {"sharpness": 4.0}),
]


@pytest.mark.parametrize(("style", "sizes"), CASES)
def test_moments_equal_loops_over_every_token(style: str, sizes: dict[str, Any]) -> None:
    attention = make_attention(style, **sizes)
    x = random_inputs(3, 9)
    moments, expected = moments_of(attention, x), brute_force(attention, x.numpy())
    assert set(expected) == set(MOMENT_NAMES)
    for name, value in expected.items():
        np.testing.assert_allclose(
            getattr(moments, name).numpy(), value, rtol=1e-11, atol=1e-13, err_msg=name
        )


def test_tokens_count_alike_where_they_are_not_weighted() -> None:
    attention, x = make_attention("llama"), random_inputs(3, 9)
    accumulator = MomentsAccumulator(attention, weighted=False)
    accumulator.add(x)
    moments, expected = accumulator.finish(), brute_force(attention, x.numpy(), weighted=False)
    for name, value in expected.items():
        np.testing.assert_allclose(
            getattr(moments, name).numpy(), value, rtol=1e-11, atol=1e-13, err_msg=name
        )
    weighted = moments_of(attention, x)
    assert not torch.allclose(weighted.key_second, moments.key_second, rtol=0.01)
    assert not torch.allclose(weighted.value_second, moments.value_second, rtol=0.01)


@pytest.mark.parametrize("style", STYLES)
def test_moments_do_not_depend_on_batches_or_blocks_of_rows(
    style: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = make_attention(style)
    x = random_inputs(4, 11)
    whole = moments_of(attention, x)
    one_by_one = moments_of(attention, *x.split(1))
    monkeypatch.setattr(windows, "SCORES", 3 * attention.num_heads * 11)  # three rows of one window
    in_blocks = moments_of(attention, *x.split(1))
    for name in MOMENT_NAMES:
        for other in (one_by_one, in_blocks):
            torch.testing.assert_close(getattr(other, name), getattr(whole, name), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("style", STYLES)
def test_add_returns_the_attention_output_of_the_reference(
    style: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = make_attention(style)
    x = random_inputs(2, 12)
    positions = torch.arange(12).expand(2, 12)
    expected = reference.linear(attention.o, reference.head_outputs(attention, x, positions)[0])
    torch.testing.assert_close(MomentsAccumulator(attention).add(x), expected, rtol=0, atol=1e-13)
    monkeypatch.setattr(windows, "SCORES", 1)  # row by row
    torch.testing.assert_close(MomentsAccumulator(attention).add(x), expected, rtol=0, atol=1e-13)


def test_covariances_are_blocks_of_the_moments() -> None:
    attention = make_attention("bias")
    x = random_inputs(3, 10)
    accumulator, rows = MomentsAccumulator(attention, weighted=False), slice(8, 24)
    accumulator.add(x)
    moments = accumulator.finish()
    values = (reference.linear(attention.v, x)).flatten(0, 1)[:, rows]
    torch.testing.assert_close(
        moments.value_covariance(rows), torch.cov(values.T, correction=0), rtol=1e-10, atol=1e-13
    )
    stacked = windows.project(attention, x).key.transpose(1, 2).flatten(2).flatten(0, 1)[:, rows]
    torch.testing.assert_close(
        moments.key_covariance(rows), torch.cov(stacked.T, correction=0), rtol=1e-10, atol=1e-13
    )


@pytest.mark.parametrize("seed", range(3))
def test_gain_in_float32_is_accurate_for_nearly_constant_values(seed: int) -> None:
    """The mean is a thousand times the deviation: differences of squares would lose all digits or be
    negative.
    """
    attention = make_attention("bias", seed=seed)
    big = Linear(attention.v.weight * 1e-3, torch.ones(32, dtype=torch.float64))
    attention = Attention(**{**vars(attention), "v": big})
    x = random_inputs(2, 16, seed=seed)
    expected = moments_of(attention, x).key_gain
    narrow = Attention(**{name: _to_float32(value) for name, value in vars(attention).items()})
    gain = moments_of(narrow, x.float()).key_gain
    assert (gain >= 0).all()
    torch.testing.assert_close(gain, expected, rtol=1e-3, atol=0)


def _to_float32(value: Any) -> Any:
    if isinstance(value, Linear):
        return Linear(value.weight.float(), None if value.bias is None else value.bias.float())
    return value


def test_constant_values_have_no_gain() -> None:
    attention = make_attention("bias")
    constant = Attention(
        **{**vars(attention), "v": Linear(torch.zeros_like(attention.v.weight), attention.v.bias)}
    )
    assert float(moments_of(constant, random_inputs(2, 9)).key_gain.max()) < 1e-25


def test_memory_grows_neither_with_batches_nor_with_the_square_of_the_window(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Size of the accumulator, and of the largest block of probabilities."""
    attention = make_attention("llama")
    accumulator = MomentsAccumulator(attention)

    def size(part: object) -> int:
        if isinstance(part, Tensor):
            return part.numel()
        return sum(map(size, vars(part).values())) if hasattr(part, "__dict__") else 0

    accumulator.add(random_inputs(2, 16))
    before = size(accumulator)
    for _ in range(3):
        accumulator.add(random_inputs(2, 16))
    assert size(accumulator) == before
    monkeypatch.setattr(windows, "SCORES", 4096)
    projected = windows.project(attention, random_inputs(1, 256))
    blocks = [each.probabilities.numel() for each in windows.probability_blocks(attention, projected)]
    assert max(blocks) <= 4096 < sum(blocks)


def test_no_tokens_give_finite_moments() -> None:
    attention = make_attention("llama")
    empty = MomentsAccumulator(attention).finish()
    assert int(empty.tokens) == 0
    assert all(bool(getattr(empty, name).isfinite().all()) for name in MOMENT_NAMES)


def test_batches_cover_every_window_once() -> None:
    for count, length in ((96, 256), (5, 16), (1, 4096), (7, 2048)):
        slices = list(windows.batches(range(2, count + 2), length))
        assert [i for each in slices for i in range(each.start, each.stop)] == list(range(2, count + 2))
        assert all((s.stop - s.start) * length <= windows.TOKENS or s.stop - s.start == 1 for s in slices)
