"""Families that transformers lacks give the logits of the Llama or Granite checkpoint that they rename.

The names and the order of fused rows are those of the families' own published code.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.parity import parity_errors, parity_facts, token_ids
from torch import Tensor

from kvexport.errors import CheckpointError
from kvexport.model import reference
from kvexport.model.loader import load_decoder

AssertParity = Callable[[Path, Path], None]
HEADS, KV_HEADS, HEAD_DIM, LAYERS, HIDDEN = 4, 2, 8, 2, 32  # of the tiny checkpoints
INTERNLM2 = {
    "model.embed_tokens": "model.tok_embeddings",
    "lm_head": "output",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
CHATGLM = {
    "model.embed_tokens": "transformer.embedding.word_embeddings",
    "model.norm": "transformer.encoder.final_layernorm",
    "lm_head": "transformer.output_layer",
    "model.layers": "transformer.encoder.layers",
    "self_attn.o_proj": "self_attention.dense",
    "mlp.gate_up_proj": "mlp.dense_h_to_4h",
    "mlp.down_proj": "mlp.dense_4h_to_h",
}
EXAONE = {
    "model.embed_tokens": "transformer.wte",
    "model.norm": "transformer.ln_f",
    "model.layers": "transformer.h",
    "self_attn.o_proj": "attn.attention.out_proj",
    "self_attn": "attn.attention",
    "mlp.gate_proj": "mlp.c_fc_0",
    "mlp.up_proj": "mlp.c_fc_1",
    "mlp.down_proj": "mlp.c_proj",
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
}


def renamed(held: dict[str, Tensor], names: dict[str, str]) -> None:
    for name in list(held):
        new = name
        for old, other in names.items():
            new = re.sub(rf"(^|\.){re.escape(old)}\.", rf"\g<1>{other}.", new)
        held[new] = held.pop(name)


def fuse_by_kv_head(held: dict[str, Tensor]) -> None:
    """Rows for each KV head: its queries, its key, its value."""
    for index in range(LAYERS):
        names = [f"model.layers.{index}.self_attn.{part}_proj" for part in "qkv"]
        for kind in ("weight", "bias"):
            if f"{names[0]}.{kind}" in held:
                parts = [held.pop(f"{name}.{kind}").unflatten(0, (KV_HEADS, -1, HEAD_DIM)) for name in names]
                held[f"model.layers.{index}.attention.wqkv.{kind}"] = torch.cat(parts, 1).flatten(0, 2)


def logits(path: Path) -> Tensor:
    ids = torch.randint(0, 67, (2, 24), generator=torch.Generator().manual_seed(7))
    return reference.forward(load_decoder(path, torch.float64, context=24), ids)


@pytest.fixture
def assert_parity(wide: None, record_property: Callable[[str, object], None]) -> AssertParity:
    """`assert_parity(converted, source)`: transformers gives the logits of `converted` for `source`."""

    def check(converted: Path, source: Path) -> None:
        ids = token_ids()
        errors = parity_errors(converted, ids, source)
        record_property("parity", parity_facts(converted, ids, errors))
        assert max(errors.values()) < 1e-9

    return check


@pytest.mark.parametrize("bias", [False, True])
def test_internlm2_is_llama_with_fused_projections(
    tiny_checkpoint: Callable[..., Path],
    edit_checkpoint: Callable[..., Path],
    bias: bool,
    assert_parity: AssertParity,
) -> None:
    llama = tiny_checkpoint("llama", attention_bias=bias)

    def convert(held: dict[str, Any]) -> None:
        fuse_by_kv_head(held)
        renamed(held, INTERNLM2)

    config = {"model_type": "internlm2", "bias": bias}
    converted = edit_checkpoint(llama, config=config, tensors=convert, without=("attention_bias",))
    assert torch.equal(logits(converted), logits(llama))
    assert_parity(converted, llama)


def test_rows_of_internlm2_in_another_order_break_parity(
    tiny_checkpoint: Callable[..., Path], edit_checkpoint: Callable[..., Path]
) -> None:
    llama = tiny_checkpoint("llama")

    def convert(held: dict[str, Any]) -> None:
        fuse_by_kv_head(held)
        renamed(held, INTERNLM2)
        name = "model.layers.0.attention.wqkv.weight"
        held[name] = held[name].roll(HEAD_DIM, 0)

    converted = edit_checkpoint(llama, config={"model_type": "internlm2"}, tensors=convert)
    assert not torch.allclose(logits(converted), logits(llama), atol=1e-3)


def test_exaone_is_llama_under_other_names(
    tiny_checkpoint: Callable[..., Path],
    edit_checkpoint: Callable[..., Path],
    assert_parity: AssertParity,
) -> None:
    llama = tiny_checkpoint("llama", rms_norm_eps=1e-5)
    config = {"num_layers": 2, "layer_norm_epsilon": 1e-5, "activation_function": "silu"}
    converted = edit_checkpoint(
        llama,
        config={"model_type": "exaone", **config},
        without=("num_hidden_layers", "rms_norm_eps", "hidden_act"),
        tensors=lambda held: renamed(held, EXAONE),
    )
    assert torch.equal(logits(converted), logits(llama))
    assert_parity(converted, llama)


def test_chatglm_is_glm_with_one_fused_projection(
    tiny_checkpoint: Callable[..., Path],
    edit_checkpoint: Callable[..., Path],
    assert_parity: AssertParity,
) -> None:
    rope = {"rope_type": "default", "rope_theta": 50000.0, "partial_rotary_factor": 0.5}
    glm = tiny_checkpoint("glm", rope_parameters=rope)

    def convert(held: dict[str, Any]) -> None:
        for index in range(LAYERS):
            layer = f"model.layers.{index}"
            for kind in ("weight", "bias"):
                parts = [held.pop(f"{layer}.self_attn.{part}_proj.{kind}") for part in "qkv"]
                held[f"{layer}.self_attention.query_key_value.{kind}"] = torch.cat(parts)
        renamed(held, CHATGLM)
        held["transformer.rotary_pos_emb.inv_freq"] = torch.ones(2)

    config = {
        "model_type": "chatglm", "padded_vocab_size": 67, "hidden_size": 32, "ffn_hidden_size": 48,
        "num_layers": 2, "num_attention_heads": 4, "multi_query_attention": True,
        "multi_query_group_num": 2, "kv_channels": 8, "seq_length": 256, "layernorm_epsilon": 1.5625e-07,
        "add_qkv_bias": True, "add_bias_linear": False, "rmsnorm": True, "rope_ratio": 5,
    }  # fmt: skip
    old = tuple(json.loads((glm / "config.json").read_text()).keys() - config.keys())
    converted = edit_checkpoint(glm, config=config, tensors=convert, without=old)
    assert torch.equal(logits(converted), logits(glm))
    assert_parity(converted, glm)
    other = edit_checkpoint(glm, config={**config, "rope_ratio": 6}, tensors=convert, without=old)
    assert not torch.allclose(logits(other), logits(glm), atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_internlm_is_llama_with_another_key_for_biases(
    tiny_checkpoint: Callable[..., Path],
    edit_checkpoint: Callable[..., Path],
    bias: bool,
    assert_parity: AssertParity,
) -> None:
    llama = tiny_checkpoint("llama", attention_bias=bias, num_key_value_heads=4)
    config = {"model_type": "internlm", "bias": bias}
    converted = edit_checkpoint(llama, config=config, without=("attention_bias",))
    assert torch.equal(logits(converted), logits(llama))
    assert_parity(converted, llama)


def test_mimo_is_qwen2_without_its_layers_for_further_tokens(
    tiny_checkpoint: Callable[..., Path],
    edit_checkpoint: Callable[..., Path],
    assert_parity: AssertParity,
) -> None:
    qwen2 = tiny_checkpoint("qwen2")
    extra = {"model.mtp_layers.0.input_layernorm.weight": torch.ones(HIDDEN)}
    converted = edit_checkpoint(qwen2, config={"model_type": "mimo"}, tensors=lambda held: held.update(extra))
    assert torch.equal(logits(converted), logits(qwen2))
    assert_parity(converted, qwen2)
    with pytest.raises(CheckpointError, match="only tensors of family 'qwen2'"):
        load_decoder(edit_checkpoint(qwen2, tensors=lambda held: held.update(extra)))


def test_minicpm_is_granite_with_other_multipliers(
    tiny_checkpoint: Callable[..., Path], edit_checkpoint: Callable[..., Path], assert_parity: AssertParity
) -> None:
    scale_emb, scale_depth, dim_model_base = 12.0, 1.4, 16
    granite = tiny_checkpoint(
        "granite",
        embedding_multiplier=scale_emb,
        residual_multiplier=scale_depth / math.sqrt(LAYERS),
        attention_multiplier=1 / math.sqrt(HEAD_DIM),
        logits_scaling=HIDDEN / dim_model_base,
    )
    multipliers = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
    config = {"scale_emb": scale_emb, "scale_depth": scale_depth, "dim_model_base": dim_model_base}

    def converted(**changes: float) -> Path:
        settings = {"model_type": "minicpm", **config, **changes}
        return edit_checkpoint(granite, config=settings, without=multipliers)

    assert_parity(converted(), granite)
    expected = logits(granite)
    assert torch.allclose(logits(converted()), expected, rtol=1e-12, atol=1e-12)
    for changes in ({"scale_emb": 12.1}, {"scale_depth": 1.41}, {"dim_model_base": 17}):
        assert not torch.allclose(logits(converted(**changes)), expected, rtol=1e-5, atol=1e-5)
