"""The stored form of each family: packing is the inverse of unpacking."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.family_cases import CASES, DEFAULTS, case_name

from kvexport.errors import CheckpointError
from kvexport.model.architecture import read_architecture
from kvexport.model.checkpoint import Checkpoint
from kvexport.model.decoder import Linear
from kvexport.model.layout import Ends, Layout, _join, _split, pair_order
from kvexport.model.loader import load_decoder


def packed(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Tensors of a decoder packed again, and those of its checkpoint under the same names."""
    decoder, architecture = load_decoder(path), read_architecture(Checkpoint(path).config)
    layout, names = Layout(architecture), architecture.family.names
    ends = Ends(decoder.embedding, decoder.final_norm, decoder.output_projection, decoder.head)
    tensors = layout.pack_ends(ends)
    for index, layer in enumerate(decoder.layers):
        tensors |= layout.pack_layer(index, layer)
    stored = load_file(path / "model.safetensors")
    prefix = next(each for each in names.prefixes if f"{each}{names.embedding}.weight" in stored)
    heads = {f"{names.head}.weight", f"{names.head}.bias"}
    return tensors, {
        name if name in heads else name.removeprefix(prefix): tensor for name, tensor in stored.items()
    }


def assert_restored(path: Path) -> None:
    tensors, stored = packed(path)
    resolved = read_architecture(Checkpoint(path).config).family
    assert tensors.keys() == stored.keys()
    for name, tensor in tensors.items():
        expected = stored[name]
        if name == f"{resolved.names.positions}.weight":  # rows before position 0 are not read
            rows = resolved.position_offset
            assert not tensor[:rows].any()
            tensor, expected = tensor[rows:], expected[rows:]
        assert tensor.shape == expected.shape, name
        if resolved.norm_offset and "norm" in name:
            assert torch.allclose(tensor, expected, rtol=0, atol=1e-6), name
        else:
            assert torch.equal(tensor, expected), name


@pytest.mark.parametrize("family", sorted(DEFAULTS))
def test_packing_restores_every_stored_tensor(tiny_checkpoint: Callable[..., Path], family: str) -> None:
    assert_restored(tiny_checkpoint(family))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "config"), [case for case in CASES if case[1]], ids=case_name)
def test_packing_restores_every_stored_tensor_of_variants(
    tiny_checkpoint: Callable[..., Path], family: str, config: dict[str, Any]
) -> None:
    assert_restored(tiny_checkpoint(family, **config))


def test_splitting_takes_the_rows_of_each_part() -> None:
    """Two groups of two queries, a value and a key, of three rows each."""
    fused = Linear(torch.arange(24.0)[:, None], torch.arange(24.0))
    query, value, key = _split(fused, 2, [2, 1, 1], 3)
    assert query.weight[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 12, 13, 14, 15, 16, 17]
    assert value.weight[:, 0].tolist() == [6, 7, 8, 18, 19, 20]
    assert key.weight[:, 0].tolist() == [9, 10, 11, 21, 22, 23]
    assert key.bias is not None and key.bias.tolist() == [9, 10, 11, 21, 22, 23]
    joined = _join([query, value, key], 2, 3)
    assert joined.bias is not None
    assert torch.equal(joined.weight, fused.weight) and torch.equal(joined.bias, torch.arange(24.0))


def test_joining_gives_a_part_without_bias_zeros() -> None:
    parts = [Linear(torch.ones(2, 3), torch.ones(2)), Linear(torch.ones(4, 3))]
    joined = _join(parts, 1, 2)
    assert joined.bias is not None and joined.bias.tolist() == [1, 1, 0, 0, 0, 0]
    assert _join([Linear(torch.ones(2, 3))] * 2, 1, 2).bias is None


@pytest.mark.parametrize(
    ("head_dim", "rotary_dim", "interleaved", "order"),
    [
        (8, 8, False, None),
        (8, 0, False, None),
        (8, 0, True, None),
        (8, 8, True, (0, 2, 4, 6, 1, 3, 5, 7)),
        (8, 4, False, (0, 1, 4, 5, 2, 3, 6, 7)),
        (8, 4, True, (0, 2, 4, 5, 1, 3, 6, 7)),
        (6, 2, True, (0, 2, 3, 1, 4, 5)),
    ],
)
def test_pair_order(head_dim: int, rotary_dim: int, interleaved: bool, order: tuple[int, ...] | None) -> None:
    assert pair_order(head_dim, rotary_dim, interleaved=interleaved) == order


def test_heads_of_four_blocks_must_be_a_multiple_of_four() -> None:
    sizes = {"vocab_size": 9, "n_embd": 24, "n_head": 6, "n_layer": 1, "rotary_dim": 4}
    with pytest.raises(CheckpointError, match=r"must be a multiple of 4(.|\n)*got: +6"):
        read_architecture({"model_type": "codegen", **sizes})
