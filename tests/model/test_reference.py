"""The reference model: its static cache equals the full pass, and maps act as documented."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvexport.model import reference
from kvexport.model.decoder import Attention, Decoder, Layer, LazyLayers, Linear, tensors_of
from kvexport.model.loader import load_decoder

FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("mistral", {"sliding_window": 5}),
    ("bloom", {"hidden_size": 36, "n_head": 6}),
    ("qwen2", {"max_window_layers": 1, "use_sliding_window": True, "sliding_window": 4}),
    ("qwen3", {"head_dim": 16}),
]
LENGTHS = (3, 9)  # prompts of the two rows
STEPS = 6


@pytest.fixture(params=FAMILIES, ids=lambda case: case[0])
def decoder(request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path]) -> Decoder:
    family, config = request.param
    return load_decoder(tiny_checkpoint(family, **config), torch.float64)


@pytest.fixture
def llama(tiny_checkpoint: Callable[..., Path]) -> Decoder:
    """Four heads, as many KV heads."""
    return load_decoder(tiny_checkpoint("llama", num_key_value_heads=4), torch.float64)


def token_ids(batch: int = 2, length: int = max(LENGTHS) + STEPS) -> torch.Tensor:
    return torch.randint(0, 67, (batch, length), generator=torch.Generator().manual_seed(3))


def close(ours: torch.Tensor, full: torch.Tensor) -> None:
    torch.testing.assert_close(ours, full, rtol=0, atol=1e-12 * float(full.abs().max()))


@pytest.mark.parametrize("stale", [0.0, 1e6])
def test_rows_at_different_positions_equal_the_full_pass(decoder: Decoder, stale: float) -> None:
    """Right-padded prompts of 3 and 9 tokens, then six steps, rows at different positions; unused slots are
    arbitrary.
    """
    ids = token_ids()
    full = reference.forward(decoder, ids)
    cache = reference.new_cache(decoder.layers, batch=2, capacity=20, dtype=torch.float64)
    for layer in cache:
        layer.key.fill_(stale)
        layer.value.fill_(stale)
    longest = max(LENGTHS)
    prompt = ids[:, :longest].clone()
    prompt[0, LENGTHS[0] :] = 66  # padding, whose cache slots the steps overwrite
    prefill = reference.forward(decoder, prompt, torch.arange(longest).expand(2, -1), cache)
    for row, length in enumerate(LENGTHS):
        close(prefill[row, :length], full[row, :length])
    for step in range(STEPS):
        at = torch.tensor(LENGTHS)[:, None] + step
        logits = reference.forward(decoder, ids.gather(1, at), at, cache)
        for row in range(2):
            close(logits[row, 0], full[row, at[row, 0]])


def test_chunked_prefill_equals_the_full_pass(decoder: Decoder) -> None:
    ids = token_ids()
    cache = reference.new_cache(decoder.layers, batch=2, capacity=ids.shape[1], dtype=torch.float64)
    positions = torch.arange(ids.shape[1]).expand(2, -1)
    chunks = [
        reference.forward(decoder, ids[:, at], positions[:, at], cache)
        for at in (slice(0, 4), slice(4, 5), slice(5, None))
    ]
    close(torch.cat(chunks, dim=1), reference.forward(decoder, ids))


def test_taps_equal_the_cache(decoder: Decoder) -> None:
    ids = token_ids()
    cache = reference.new_cache(decoder.layers, batch=2, capacity=ids.shape[1], dtype=torch.float64)
    taps: list[reference.LayerTaps] = []
    reference.forward(decoder, ids, cache=cache, taps=taps)
    assert len(taps) == len(decoder.layers)
    for tap, held in zip(taps, cache, strict=True):
        assert torch.equal(tap.key, held.key) and torch.equal(tap.value, held.value)
        assert tap.attention.shape == tap.residual.shape == (*ids.shape, decoder.dims.hidden_size)
    close(reference.logits(decoder, taps[-1].residual), reference.forward(decoder, ids))


def with_attention(decoder: Decoder, change: Callable[[Attention], Attention]) -> Decoder:
    layers: list[Layer] = [replace(layer, attention=change(layer.attention)) for layer in decoder.layers]
    return replace(decoder, layers=layers)


def random_rotation(size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q


def test_key_and_query_maps_act_after_rope(decoder: Decoder) -> None:
    """One orthogonal matrix for a key head and all of its queries does not change the scores."""

    def change(attention: Attention) -> Attention:
        maps = torch.stack(
            [random_rotation(attention.head_dim, head) for head in range(attention.num_kv_heads)]
        )
        return replace(
            attention, key_map=maps, query_map=maps.repeat_interleave(attention.queries_per_kv_head, 0)
        )

    close(
        reference.forward(with_attention(decoder, change), token_ids()),
        reference.forward(decoder, token_ids()),
    )


def test_value_map_maps_values_to_the_width_of_o(decoder: Decoder) -> None:
    def change(attention: Attention) -> Attention:
        kv, width = attention.num_kv_heads, attention.value_dim
        turns = torch.stack(
            [random_rotation(width, head) for head in range(kv)]
        )  # [Hkv, value_dim, value_dim]
        weight = (turns @ attention.v.weight.unflatten(0, (kv, width))).flatten(0, 1)
        bias = attention.v.bias
        turned = None if bias is None else (turns @ bias.view(kv, width, 1)).flatten()
        back = turns.repeat_interleave(
            attention.queries_per_kv_head, 0
        )  # row v of a head becomes (turn v)ᵀ turn = vᵀ
        return replace(attention, v=Linear(weight, turned), value_map=back)

    close(
        reference.forward(with_attention(decoder, change), token_ids()),
        reference.forward(decoder, token_ids()),
    )


def test_two_heads_may_share_one_wide_kv_head(llama: Decoder) -> None:
    """Pairs of heads cached as one head of twice the width give the same logits."""

    def change(attention: Attention) -> Attention:
        d, heads = attention.head_dim, attention.num_heads
        place = torch.zeros(heads, d, 2 * d, dtype=torch.float64)  # a query reads its own half of the pair
        for head in range(heads):
            place[head, :, (head % 2) * d : (head % 2 + 1) * d] = torch.eye(d, dtype=torch.float64)
        return replace(
            attention,
            num_kv_heads=heads // 2,
            key_map=torch.eye(2 * d, dtype=torch.float64).expand(heads // 2, -1, -1),
            query_map=place,
            value_map=place.transpose(1, 2),
        )

    wide = with_attention(llama, change)
    attention = wide.layers[0].attention
    assert (attention.key_heads, attention.key_dim, attention.value_dim, attention.queries_per_kv_head) == (
        4,
        16,
        16,
        2,
    )
    assert attention.kv_width == llama.layers[0].attention.kv_width == 64
    ids = token_ids()
    cache = reference.new_cache(wide.layers, batch=2, capacity=ids.shape[1], dtype=torch.float64)
    assert cache[0].key.shape == cache[0].value.shape == (2, 2, ids.shape[1], 16)
    close(reference.forward(wide, ids, cache=cache), reference.forward(llama, ids))


def test_window_includes_the_token_itself(llama: Decoder) -> None:
    attention = replace(llama.layers[0].attention, window=3)
    seen = reference.visibility(attention, torch.tensor([[0, 4]]), torch.arange(6), dtype=torch.float64) == 0
    assert seen[0, 0].int().tolist() == [[1, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_alibi_is_exact_in_half_precision(tiny_checkpoint: Callable[..., Path], dtype: torch.dtype) -> None:
    attention = load_decoder(tiny_checkpoint("bloom")).layers[0].attention
    exact = reference.visibility(attention, torch.tensor([[4000]]), torch.arange(4001), dtype=torch.float64)
    half = reference.visibility(attention, torch.tensor([[4000]]), torch.arange(4001), dtype=dtype)
    assert half.dtype == dtype
    assert torch.equal(half, exact.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_computes_in_its_dtype(
    tiny_checkpoint: Callable[..., Path], dtype: torch.dtype
) -> None:
    half = load_decoder(tiny_checkpoint("llama"), dtype)
    exact = reference.forward(load_decoder(tiny_checkpoint("llama"), torch.float64), token_ids())
    logits = reference.forward(half, token_ids())
    assert logits.dtype == dtype
    assert float((logits.double() - exact).abs().max() / exact.abs().max()) < (
        0.02 if dtype == torch.float16 else 0.15
    )


def test_lazy_layers_load_only_requested_layers() -> None:
    read: list[int] = []

    def one(index: int) -> Layer:
        read.append(index)
        return index  # type: ignore[return-value]

    layers = LazyLayers(3, one)
    assert len(layers) == 3 and not read
    assert [layers[0], layers[-1], layers[2]] == [0, 2, 2] and read == [0, 2, 2]
    assert layers[1:] == [1, 2] and list(layers) == [0, 1, 2]
    for outside in (3, -4):
        with pytest.raises(IndexError):
            layers[outside]


def test_tensors_of_a_layer(llama: Decoder) -> None:
    layer = llama.layers[0]
    assert sum(tensor.numel() for tensor in tensors_of(layer)) == 4 * 32 * 32 + 3 * 32 * 48 + 2 * 32
    with_map = replace(layer.attention, value_map=torch.zeros(4, 8, 8))
    assert len(tensors_of(with_map)) == len(tensors_of(layer.attention)) + 1 == 5
