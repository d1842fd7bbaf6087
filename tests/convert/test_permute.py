"""Reordered heads compute the same function and have the moments measured on the reordered layer."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.decoders import STYLES, make_attention, random_inputs
from support.layer_codes import output

from kvexport.calibrate import Moments, MomentsAccumulator
from kvexport.convert.permute import permute_heads, permute_moments
from kvexport.model.decoder import Attention, tensors_of

SIZES = {"heads": 6}
ORDERS = {3: [2, 0, 1], 6: [3, 0, 5, 1, 4, 2]}


def layer(style: str) -> tuple[Attention, list[int]]:
    attention = make_attention(style, **SIZES)
    return attention, ORDERS[attention.num_kv_heads]


def measured(attention: Attention) -> Moments:
    accumulator = MomentsAccumulator(attention)
    accumulator.add(random_inputs(3, 10))
    return accumulator.finish()


@pytest.mark.parametrize("style", STYLES)
def test_reordering_keeps_the_output(style: str) -> None:
    attention, order = layer(style)
    x = random_inputs(2, 12)
    torch.testing.assert_close(
        output(permute_heads(attention, order), x), output(attention, x), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("part", ["q", "k", "v", "o"])
def test_reordering_without_one_weight_changes_the_output(part: str) -> None:
    """Negative control: one weight stays in the old order."""
    attention, order = layer("gqa")
    x = random_inputs(2, 12)
    wrong = replace(permute_heads(attention, order), **{part: getattr(attention, part)})
    assert float((output(wrong, x) - output(attention, x)).abs().max()) > 0.1


@pytest.mark.parametrize("style", STYLES)
def test_permuted_moments_equal_those_of_the_permuted_layer(style: str) -> None:
    attention, order = layer(style)
    permuted, expected = (
        permute_moments(measured(attention), order),
        measured(permute_heads(attention, order)),
    )
    for field in fields(Moments):
        torch.testing.assert_close(
            getattr(permuted, field.name), getattr(expected, field.name), rtol=1e-11, atol=1e-13
        )
    per_head = {field.name for field in fields(Moments)} - {"tokens", "output_power"}
    before = measured(attention)
    assert all(
        not torch.equal(getattr(before, name), getattr(permuted, name)) for name in per_head
    )  # control


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(4)), st.sampled_from(["llama", "bloom"]))
def test_inverse_order_restores_the_layer(order: list[int], style: str) -> None:
    attention = make_attention(style)
    moments, back = measured(attention), [order.index(head) for head in range(4)]
    for restored, original in (
        (permute_heads(permute_heads(attention, order), back), attention),
        (permute_moments(permute_moments(moments, order), back), moments),
    ):
        assert all(torch.equal(a, b) for a, b in zip(tensors_of(restored), tensors_of(original), strict=True))
