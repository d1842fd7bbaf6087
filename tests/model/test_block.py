"""The reference's block, attention, embedding and head equal their equations written out."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from support.blocks import BLOCKS, NORMS
from support.graph_decoders import HIDDEN, VOCAB, mapped
from torch import Tensor
from torch.nn import functional as F

from kvexport.model import reference
from kvexport.model.decoder import Attention, Decoder, Layer, Mlp, Norm, Rope


def wide(decoder: Decoder) -> Decoder:
    return mapped(decoder, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)


def attention_of(name: str, layer: int = 0) -> Attention:
    return wide(BLOCKS[name]).layers[layer].attention


def random(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))


def rms(x: Tensor, norm: Norm) -> Tensor:
    """RMSNorm of the last axis."""
    found = x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    return found if norm.weight is None else found * norm.weight


# The block

SUBSETS = [names for count in range(len(NORMS) + 1) for names in itertools.combinations(NORMS, count)]


def block(names: tuple[str, ...], parallel: bool, multiplier: float) -> Layer:
    layer = wide(BLOCKS["all-norms"]).layers[0]
    dropped = {name: None for name in NORMS if name not in names}
    return replace(layer, parallel=parallel, residual_multiplier=multiplier, **dropped)  # type: ignore[arg-type]


def block_by_hand(layer: Layer, x: Tensor, attend: Tensor, feed: Tensor) -> tuple[Tensor, Tensor]:
    """What attention adds and the residual stream, where attention and MLP are the given matrices."""

    def normed(name: str, x: Tensor) -> Tensor:
        norm = getattr(layer, name)
        return x if norm is None else rms(x, norm)

    into = normed("attention_norm", x)
    added = layer.residual_multiplier * normed("attention_output_norm", into @ attend)
    y = normed("attention_residual_norm", x + added)
    if layer.parallel:
        into = into if layer.mlp_norm is None else rms(x, layer.mlp_norm)
    else:
        into = normed("mlp_norm", y)
    update = layer.residual_multiplier * normed("mlp_output_norm", into @ feed)
    return added, normed("mlp_residual_norm", y + update)


@pytest.mark.parametrize("multiplier", [1.0, 0.3])
@pytest.mark.parametrize("parallel", [False, True])
def test_a_block_equals_its_equation_for_every_set_of_norms(parallel: bool, multiplier: float) -> None:
    x, attend, feed = random(2, 3, HIDDEN), random(HIDDEN, HIDDEN, seed=1), random(HIDDEN, HIDDEN, seed=2)
    found = {}
    for names in SUBSETS:
        layer = block(names, parallel, multiplier)
        output = reference.run_block(layer, x, lambda inner: inner @ attend, lambda mlp, inner: inner @ feed)
        added, residual = block_by_hand(layer, x, attend, feed)
        close(output.attention, added)
        close(output.residual, residual)
        found[names] = residual
    for one, other in itertools.pairwise(SUBSETS):  # control: norms change the result
        assert float((found[one] - found[other]).abs().max()) > 1e-2


def test_a_block_leaves_its_input_as_it_is() -> None:
    x = random(1, 3, HIDDEN)
    given = x.clone()
    reference.run_block(block((), False, 1.0), x, lambda inner: inner, lambda mlp, inner: inner)
    assert torch.equal(x, given)


def test_a_layer_is_its_block_with_attention_and_mlp() -> None:
    layer, x = wide(BLOCKS["all-norms"]).layers[1], random(1, 5, HIDDEN)
    fed: list[Mlp] = []

    def feed(mlp: Mlp, inner: Tensor) -> Tensor:
        fed.append(mlp)
        return reference.mlp(mlp, inner)

    def attend(inner: Tensor) -> Tensor:
        mixed = reference.head_outputs(layer.attention, inner, torch.arange(5)[None])[0]
        return reference.linear(layer.attention.o, mixed)

    taps = reference.run_layer(layer, x, torch.arange(5)[None], feed=feed)
    output = reference.run_block(layer, x, attend)
    assert torch.equal(taps.residual, output.residual) and torch.equal(taps.attention, output.attention)
    assert len(fed) == 1 and fed[0] is layer.mlp


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("parts", [(), ("weight",), ("weight", "bias")], ids=str)
def test_norms_without_weight_or_bias(kind: str, parts: tuple[str, ...]) -> None:
    if kind == "rms" and "bias" in parts:
        return
    x, weight, bias = random(2, 3, 8), random(8, seed=1), random(8, seed=2)
    found = reference.norm(
        Norm(
            "rms" if kind == "rms" else "layer",
            weight if "weight" in parts else None,
            bias if "bias" in parts else None,
            1e-5,
        ),
        x,
    )
    centred = x if kind == "rms" else x - x.mean(-1, keepdim=True)
    wanted = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    wanted = wanted * weight if "weight" in parts else wanted
    close(found, wanted + bias if "bias" in parts else wanted)


def test_relu_squared() -> None:
    mlp = wide(BLOCKS["relu-squared-gated"]).layers[0].mlp
    x = random(2, 3, HIDDEN)
    assert mlp.gate is not None
    gate = (x @ mlp.gate.weight.T).clamp_min(0)
    close(reference.mlp(mlp, x), (gate * gate * (x @ mlp.up.weight.T)) @ mlp.down.weight.T)


# Attention


def heads(linear_output: Tensor, count: int) -> list[Tensor]:
    """[1, S, count·width] to `count` tensors [S, width]."""
    return list(linear_output[0].unflatten(-1, (count, -1)).unbind(1))


def turned(x: Tensor, rope: Rope) -> Tensor:
    """RoPE of x [S, width] at positions 0 .. S - 1 by complex numbers."""
    half = x.shape[1] // 2
    angles = torch.arange(len(x)).float()[:, None] * rope.inv_freq
    turn = torch.complex(angles.cos().double(), angles.sin().double())  # float32 tables, as in training
    pairs = torch.complex(x[:, :half], x[:, half:]) * turn
    if rope.magnitude is not None:
        pairs = pairs * rope.magnitude.double()
    return torch.cat((pairs.real, pairs.imag), dim=1)


def projected_by_hand(attention: Attention, x: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Queries, keys and values of each head [S, width], in the order clip, norm, rotation."""

    def flat(which: str) -> Tensor:
        linear = getattr(attention, which)
        found = x @ linear.weight.T + (0 if linear.bias is None else linear.bias)
        return found if attention.clip is None else found.clamp(-attention.clip, attention.clip)

    def positioned(which: str, count: int, norm: Norm | None) -> list[Tensor]:
        late = attention.norm_after_rotation and attention.rope is not None
        found = flat(which)
        if norm is not None and attention.norm_over == "heads":
            found = rms(found, norm)
        each = heads(found, count)

        def normed(each: list[Tensor]) -> list[Tensor]:
            if norm is None or attention.norm_over == "heads":
                return each
            weights = [norm.weight] * count if norm.weight is None or norm.weight.ndim == 1 else norm.weight
            return [
                rms(head, replace(norm, weight=weight)) for head, weight in zip(each, weights, strict=True)
            ]

        each = each if late else normed(each)
        if attention.rope is not None:
            each = [turned(head, attention.rope) for head in each]
        return normed(each) if late else each

    query = positioned("q", attention.num_heads, attention.q_norm)
    key = positioned("k", attention.key_heads, attention.k_norm)
    value = heads(flat("v"), attention.value_heads)
    if attention.value_encoder is not None:
        group = attention.value_heads // attention.num_kv_heads
        value = [
            torch.cat(value[at * group : (at + 1) * group], dim=1) @ encoder
            for at, encoder in enumerate(attention.value_encoder)
        ]
    return query, key, value


ATTENTIONS = (
    "qk-norm-per-head",
    "qk-norm-over-heads",
    "qk-norm-after-rotation",
    "qk-norm-after-rotation-in-some-layers",
    "rms-norm-without-weight",
    "clip",
    "clip-and-qk-norm",
    "rope-in-some-layers",
    "two-ropes",
    "rope-magnitude",
    "partial-rope",
    "softcap",
)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_equals_its_equations(name: str) -> None:
    x = random(1, 6, HIDDEN)
    for layer in wide(BLOCKS[name]).layers:
        attention = layer.attention
        projected = reference.project(attention, x, torch.arange(6)[None])
        wanted = projected_by_hand(attention, x)
        found = (projected.query_rotated, projected.key_rotated, projected.value)
        # Tables and magnitudes are float32 in the reference.
        rope = attention.rope
        rounded = attention.norm_after_rotation or (rope is not None and rope.magnitude is not None)
        tolerance = 1e-6 if rounded else 1e-12
        for ours, theirs in zip(found, wanted, strict=True):
            close(ours[0], torch.stack(theirs), tolerance)
        query = reference.map_queries(attention, projected.query_rotated)[0]
        key = reference.map_keys(attention, projected.key_rotated)[0]
        mixed = []
        for head in range(attention.num_heads):
            group = head // attention.queries_per_kv_head
            scores = attention.scale * query[head] @ key[group].T
            if attention.softcap is not None:
                scores = attention.softcap * (scores / attention.softcap).tanh()
            distance = torch.arange(6)[:, None] - torch.arange(6)
            hidden = (distance < 0) | (distance >= (attention.window or 6))
            mixed.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ projected.value[0, group])
            if attention.value_map is not None:
                mixed[-1] = mixed[-1] @ attention.value_map[head]
        outputs = reference.head_outputs(attention, x, torch.arange(6)[None])[0]
        close(outputs[0], torch.cat(mixed, dim=1))


def test_clip_bounds_queries_keys_and_values() -> None:
    attention = attention_of("clip")
    projected = reference.project(attention, random(1, 6, HIDDEN), torch.arange(6)[None])
    free = reference.project(replace(attention, clip=None), random(1, 6, HIDDEN), torch.arange(6)[None])
    for part in ("query", "key", "value"):
        assert float(getattr(projected, part).abs().max()) == attention.clip == 0.5
        assert float(getattr(free, part).abs().max()) > 1


def test_pairs_of_frequency_0_do_not_rotate() -> None:
    attention = attention_of("partial-rope")
    projected = reference.project(attention, random(1, 6, HIDDEN), torch.arange(6)[None])
    fixed = [2, 3, 6, 7]  # pairs (2, 6) and (3, 7) of a head of 8
    assert torch.equal(projected.query[..., fixed], projected.query_rotated[..., fixed])
    moved = (projected.query - projected.query_rotated)[..., 1:, :].abs().amax((0, 1, 2))
    assert (moved > 1e-3).tolist() == [True, True, False, False] * 2


def test_layers_without_rope_do_not_depend_on_positions() -> None:
    rotated, free = (attention_of("rope-in-some-layers", layer) for layer in (0, 1))
    x, places = random(1, 6, HIDDEN), (torch.arange(6)[None], 100 + torch.arange(6)[None] * 7)
    for attention, depends in ((rotated, True), (free, False)):
        near, far = (reference.project(attention, x, at).key_rotated for at in places)
        assert torch.equal(near, far) != depends


# Embedding, head and cache


def test_embedding_equals_its_equation() -> None:
    decoder = wide(BLOCKS["embedding-projection"])
    norm = wide(BLOCKS["all-norms"]).layers[0].attention_norm
    assert norm is not None
    embedding = replace(decoder.embedding, multiplier=3.0, positions=random(64, HIDDEN), norm=norm)
    ids, at = torch.tensor([[3, 1, 4, 1]]), torch.tensor([[7, 8, 9, 10]])
    assert embedding.projection is not None and embedding.positions is not None
    assert embedding.projection.bias is not None
    x = 3.0 * embedding.weight[ids] @ embedding.projection.weight.T + embedding.projection.bias
    close(reference.embed(embedding, ids, at), rms(x + embedding.positions[at], norm))
    close(reference.embed(embedding, ids), rms(x + embedding.positions[:4], norm))


@pytest.mark.parametrize("name", ["logit-softcap", "logit-multiplier", "head-bias", "embedding-projection"])
def test_logits_equal_their_equation(name: str) -> None:
    decoder = wide(BLOCKS[name])
    x = random(1, 3, HIDDEN)
    assert decoder.final_norm is not None
    y = rms(x, decoder.final_norm)
    if decoder.output_projection is not None:
        assert decoder.output_projection.bias is not None
        y = y @ decoder.output_projection.weight.T + decoder.output_projection.bias
    head = decoder.embedding.weight if decoder.head is None else decoder.head.weight
    bias = None if decoder.head is None else decoder.head.bias
    wanted = decoder.logit_multiplier * F.linear(y, head, bias)
    if decoder.logit_softcap is not None:
        wanted = decoder.logit_softcap * (wanted / decoder.logit_softcap).tanh()
        assert float(wanted.abs().max()) < decoder.logit_softcap
    close(reference.logits(decoder, x), wanted)


@pytest.mark.parametrize("name", BLOCKS)
def test_steps_with_a_cache_equal_the_full_pass(name: str) -> None:
    decoder = wide(BLOCKS[name])
    ids = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(3))
    cache = reference.new_cache(decoder.layers, batch=2, capacity=12, dtype=torch.float64)
    positions = torch.arange(9).expand(2, -1)
    parts = [
        reference.forward(decoder, ids[:, at], positions[:, at], cache)
        for at in (slice(0, 4), slice(4, 7), slice(7, 8), slice(8, 9))
    ]
    close(torch.cat(parts, dim=1), reference.forward(decoder, ids))
