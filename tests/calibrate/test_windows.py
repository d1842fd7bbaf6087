"""Attention over whole windows equals the reference's, for every kind of attention and size of blocks."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.decoders import STYLES, make_attention, random_inputs
from torch import Tensor

from kvexport.calibrate import windows
from kvexport.model import reference
from kvexport.model.decoder import Attention

LENGTH = 13


def plain(attention: Attention, x: Tensor) -> Tensor:
    return reference.head_outputs(attention, x, torch.arange(x.shape[1]).expand(x.shape[:2]))[0]


def of_windows(attention: Attention, x: Tensor) -> Tensor:
    return windows.head_outputs(attention, windows.project(attention, x))


def converted(attention: Attention, key_dim: int, value_dim: int) -> Attention:
    """Two KV heads share a cached head; keys and values have maps of their own widths."""
    generator = torch.Generator().manual_seed(1)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    groups, width, heads = attention.num_kv_heads // 2, attention.head_dim, attention.num_heads
    return dataclasses.replace(
        attention,
        num_kv_heads=groups,
        clip=8.0,
        key_map=random(groups, 2 * width, key_dim),
        query_map=random(heads, width, key_dim),
        value_encoder=random(groups, 2 * width, value_dim),
        value_map=random(heads, value_dim, width),
    )


def variants() -> dict[str, Attention]:
    found = {style: make_attention(style) for style in STYLES}
    llama = found["llama"]
    found["softcap"] = dataclasses.replace(llama, softcap=0.5)
    found["softcap in groups"] = dataclasses.replace(make_attention("gqa"), softcap=0.5)
    found["window of one"] = dataclasses.replace(llama, window=1)
    found["window beyond the text"] = dataclasses.replace(llama, window=LENGTH)
    found["ALiBi in a window"] = dataclasses.replace(found["bloom"], window=4)
    for key_dim, value_dim in ((4, 12), (12, 4), (8, 8)):
        found[f"converted {key_dim} {value_dim}"] = converted(llama, key_dim, value_dim)
    found["converted, softcap"] = dataclasses.replace(converted(llama, 4, 12), softcap=0.5)
    return found


@pytest.mark.parametrize("scores", [windows.SCORES, 300, 1])  # at 1: row by row
@pytest.mark.parametrize("name", variants())
def test_head_outputs_are_those_of_the_reference(
    name: str, scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "SCORES", scores)
    attention, x = variants()[name], random_inputs(3, LENGTH)
    torch.testing.assert_close(of_windows(attention, x), plain(attention, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama", {"window": 4}),
        ("llama", {"softcap": 0.5}),
        ("llama", {"scale": 1.0}),
        ("window", {"window": 6}),
        ("bloom", {"alibi_slopes": None}),
    ],
)
def test_what_decides_the_scores_changes_the_outputs(name: str, change: dict[str, object]) -> None:
    attention, x = variants()[name], random_inputs(3, LENGTH)
    other = of_windows(dataclasses.replace(attention, **change), x)
    assert float((other - plain(attention, x)).abs().max()) > 1e-3


@pytest.mark.parametrize("style", [*STYLES, "softcap"])
def test_probabilities_of_blocks_are_those_of_the_reference(
    style: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "SCORES", 300)
    attention, x = variants()[style], random_inputs(3, LENGTH)
    projected = windows.project(attention, x)
    positions = torch.arange(LENGTH)
    bias = reference.visibility(attention, positions[None], positions, torch.float64)
    products = reference.scores(attention, projected.query_rotated, projected.key_rotated)
    expected = reference.weights(products + bias)
    found = torch.zeros_like(expected)  # keys outside `visible` have no weight
    for block in windows.probability_blocks(attention, projected):
        rows = block.probabilities.unflatten(2, (attention.queries_per_kv_head, -1)).flatten(1, 2)
        found[block.windows, :, block.rows, block.visible] = rows
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


def test_float32_differs_by_rounding_alone() -> None:
    wide = make_attention("gqa", sharpness=3.0)
    narrow = make_attention("gqa", sharpness=3.0, dtype=torch.float32)
    x = random_inputs(2, 40)
    torch.testing.assert_close(of_windows(narrow, x.float()).double(), of_windows(wide, x), rtol=0, atol=1e-5)


def test_fused_attention_has_a_gradient() -> None:
    attention = make_attention("gqa")
    x = random_inputs(1, 6).requires_grad_()
    (fused,) = torch.autograd.grad(of_windows(attention, x).square().sum(), x)
    (expected,) = torch.autograd.grad(plain(attention, x).square().sum(), x)
    torch.testing.assert_close(fused, expected, rtol=1e-10, atol=1e-12)
