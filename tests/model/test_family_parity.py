"""Every family gives the logits of transformers on random weights, up to float64 rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import rms_family_cases
from support.family_cases import CASES, DEFAULTS, case_name, changes_with_length
from support.family_settings import LLAMA3, WINDOW
from support.parity import our_logits, parity_errors, parity_facts, relative_error, their_logits, token_ids

from kvexport.files.resources import resource
from kvexport.model import families, reference
from kvexport.model.loader import load_decoder
from kvexport.model.rope import alibi_slopes


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize(("family", "config"), CASES, ids=case_name)
def test_logits_equal_transformers_in_float64(
    tiny_checkpoint: Callable[..., Path],
    record_property: Callable[[str, object], None],
    family: str,
    config: dict[str, Any],
) -> None:
    path, ids = tiny_checkpoint(family, **config), token_ids()
    errors = parity_errors(path, ids, step_by_step=not changes_with_length(config))
    record_property("parity", parity_facts(path, ids, errors))
    assert max(errors.values()) < 1e-9


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize(
    ("family", "config", "changed"),
    [
        *rms_family_cases.CHANGES,
        ("llama", {}, {"rms_norm_eps": 1.1e-6}),
        ("llama", {}, {"rope_parameters": {"rope_type": "default", "rope_theta": 10001.0}}),
        ("llama", {"num_key_value_heads": 4}, {"hidden_act": "gelu"}),
        (
            "llama",
            {"rope_parameters": LLAMA3, "head_dim": 16},
            {"rope_parameters": {**LLAMA3, "high_freq_factor": 4.1}},
        ),
        ("llama", {"hidden_act": "gelu"}, {"hidden_act": "gelu_new"}),
        ("mistral", {"sliding_window": 7}, {"sliding_window": 8}),
        ("bloom", {"hidden_size": 36, "n_head": 6}, {"layer_norm_epsilon": 1.1e-5}),
        ("biogpt", {}, {"scale_embedding": False}),
        ("cohere", {}, {"logit_scale": 0.0626}),
        ("cohere", {"use_qk_norm": True}, {"rope_parameters": {"rope_theta": 499999.0}}),
        ("cohere2", {}, {"sliding_window": 8}),
        ("cohere2", {}, {"layer_types": ["full_attention", "sliding_attention"]}),
        ("falcon", {"alibi": True}, {"alibi": False}),
        ("gpt2", {}, {"scale_attn_weights": False}),
        ("gpt_bigcode", {}, {"activation_function": "gelu"}),
        ("gpt_neo", {}, {"window_size": 8}),
        ("gpt_neo", {}, {"attention_layers": ["local", "global"]}),
        ("gptj", {}, {"rotary_dim": 6}),
        ("mpt", {"attn_config": {"clip_qkv": 1.0}}, {"attn_config": {"clip_qkv": 1.1}}),
        ("mpt", {}, {"attn_config": {"alibi_bias_max": 9}}),
        ("mpt", {}, {"attn_config": {"softmax_scale": 0.35}}),
        ("opt", {}, {"activation_function": "gelu"}),
        ("gpt_neox", {}, {"use_parallel_residual": False}),
        ("gpt_neox", {}, {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}}),
        ("starcoder2", {"sliding_window": 7}, {"sliding_window": 8}),
        ("qwen2", {"max_window_layers": 1, **WINDOW}, {"layer_types": ["full_attention", "full_attention"]}),
        ("qwen3", {"max_window_layers": 0, **WINDOW}, {"layer_types": None, "max_window_layers": 1}),
    ],
)
def test_one_changed_setting_breaks_parity(
    tiny_checkpoint: Callable[..., Path],
    edit_checkpoint: Callable[..., Path],
    family: str,
    config: dict[str, Any],
    changed: dict[str, Any],
) -> None:
    path = tiny_checkpoint(family, **config)
    ids = token_ids()
    ours = our_logits(edit_checkpoint(path, config=changed), ids, torch.float64)
    assert relative_error(ours, their_logits(path, ids, torch.float64)) > 1e-8


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize(
    ("family", "config", "old", "new"),
    [
        *rms_family_cases.DESCRIPTION_CHANGES,
        ("biogpt", {}, '"hidden_size ** 0.5"', '"hidden_size"'),
        ("codegen", {}, 'fused = "four_blocks"', 'fused = "stacked"'),
        ("cohere2", {"num_hidden_layers": 5}, 'rotated = "sliding"', 'rotated = "all"'),
        ("falcon", {"alibi": True}, ', alibi = "scaled"', ""),
        (
            "falcon",
            {"new_decoder_architecture": True},
            'attention_norm = "h.{i}.ln_attn", mlp_norm = "h.{i}.ln_mlp"',
            'attention_norm = "h.{i}.ln_mlp", mlp_norm = "h.{i}.ln_attn"',
        ),
        ("gpt_neo", {}, "attention_scale = 1.0\n", ""),
        ("gpt_neox", {}, 'fused = "grouped"', 'fused = "stacked"'),
        ("gptj", {}, 'pairs = "interleaved"', 'pairs = "half"'),
        ("mpt", {"attn_config": {"alibi_bias_max": 16}}, 'alibi = "mpt"', 'alibi = "powers"'),
        ("openai-gpt", {}, "mlp_residual_norm", "mlp_output_norm"),
        ("openai-gpt", {"afn": "swish"}, 'activation = "silu"', 'activation = "gelu_new"'),
        ("opt", {"do_layer_norm_before": False}, "attention_residual_norm", "attention_output_norm"),
        ("phi", {}, "parallel = true", "parallel = false"),
    ],
)
def test_one_changed_line_of_a_description_breaks_parity(
    tiny_checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    config: dict[str, Any],
    old: str,
    new: str,
) -> None:
    path, ids = tiny_checkpoint(family, **config), token_ids()
    name = f"{families.families()[family].resolve({'model_type': family}).name}.toml"
    text = resource("graphs", "families").joinpath(name).read_text(encoding="utf-8")
    assert text.count(old) == 1
    changed = families.Description(text.replace(old, new), name)
    monkeypatch.setattr(families, "families", lambda: {family: changed})
    ours = our_logits(path, ids, torch.float64)
    assert relative_error(ours, their_logits(path, ids, torch.float64)) > 1e-3


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize(
    ("family", "config", "name"),
    [
        ("codegen", {}, "transformer.h.1.attn.qkv_proj.weight"),
        ("cohere", {"use_qk_norm": True}, "model.layers.1.self_attn.k_norm.weight"),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, "transformer.h.1.ln_mlp.weight"),
        ("falcon", {"parallel_attn": False}, "transformer.h.1.post_attention_layernorm.weight"),
        ("gpt2", {}, "transformer.wpe.weight"),
        ("gptj", {}, "lm_head.bias"),
        ("opt", {}, "model.decoder.embed_positions.weight"),
        ("opt", {"do_layer_norm_before": False}, "model.decoder.layers.1.final_layer_norm.weight"),
        ("opt", {"word_embed_proj_dim": 16}, "model.decoder.project_in.weight"),
        ("opt", {"word_embed_proj_dim": 16}, "model.decoder.project_out.weight"),
        ("gpt_neox", {}, "gpt_neox.layers.1.post_attention_layernorm.weight"),
        ("phi", {}, "lm_head.bias"),
        ("phi", {"qk_layernorm": True}, "model.layers.1.self_attn.k_layernorm.bias"),
        ("stablelm", {}, "model.layers.0.self_attn.v_proj.bias"),
        ("stablelm", {"qk_layernorm": True}, "model.layers.1.self_attn.q_layernorm.norms.3.weight"),
    ],
)
def test_one_changed_tensor_breaks_parity(
    tiny_checkpoint: Callable[..., Path],
    edit_checkpoint: Callable[..., Path],
    family: str,
    config: dict[str, Any],
    name: str,
) -> None:
    path, ids = tiny_checkpoint(family, **config), token_ids()
    changed = edit_checkpoint(path, tensors=lambda held: held.update({name: held[name].roll(1, 0)}))
    ours = reference.forward(load_decoder(changed, torch.float64), ids)
    assert relative_error(ours, their_logits(path, ids, torch.float64)) > 1e-5


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("gpt2", ("transformer.h.0.attn.bias", "transformer.h.1.attn.masked_bias")),
        ("gpt_bigcode", ("transformer.h.0.attn.bias",)),
        ("gpt_neo", ("transformer.h.1.attn.attention.bias", "transformer.h.0.attn.attention.masked_bias")),
        ("gpt_neox", ("gpt_neox.layers.0.attention.bias", "gpt_neox.layers.1.attention.rotary_emb.inv_freq")),
        ("gptj", ("transformer.h.0.attn.bias", "transformer.h.1.attn.masked_bias")),
        ("codegen", ("transformer.h.0.attn.causal_mask",)),
        ("falcon", ("lm_head.weight", "transformer.h.0.self_attention.rotary_emb.inv_freq")),
    ],
)
def test_buffers_of_old_checkpoints_are_not_read(
    tiny_checkpoint: Callable[..., Path],
    edit_checkpoint: Callable[..., Path],
    family: str,
    names: tuple[str, ...],
) -> None:
    path, ids = tiny_checkpoint(family), token_ids()

    def add(held: dict[str, torch.Tensor]) -> None:
        tied = held.get("transformer.word_embeddings.weight", torch.zeros(1))
        held |= {name: tied.clone() if name == "lm_head.weight" else torch.ones(3) for name in names}

    old = edit_checkpoint(path, tensors=add)
    assert torch.equal(our_logits(old, ids, torch.float32), our_logits(path, ids, torch.float32))


@pytest.mark.usefixtures("wide")
def test_swapped_kv_heads_break_parity(
    tiny_checkpoint: Callable[..., Path], edit_checkpoint: Callable[..., Path]
) -> None:
    path = tiny_checkpoint("llama")
    name = "model.layers.1.self_attn.v_proj.weight"
    swapped = edit_checkpoint(path, tensors=lambda held: held.update({name: held[name].roll(8, 0)}))
    ids = token_ids()
    ours = reference.forward(load_decoder(swapped, torch.float64), ids)
    assert relative_error(ours, their_logits(path, ids, torch.float64)) > 1e-3


@pytest.mark.parametrize("family", sorted(DEFAULTS))
def test_logits_equal_unpatched_transformers_in_float32(
    tiny_checkpoint: Callable[..., Path], family: str
) -> None:
    path = tiny_checkpoint(family)
    ids = token_ids()
    ours = reference.forward(load_decoder(path), ids)
    assert ours.dtype == torch.float32
    assert relative_error(ours, their_logits(path, ids, torch.float32)) < 5e-6


@pytest.mark.usefixtures("wide")
def test_loads_bloom_without_its_prefix(
    tiny_checkpoint: Callable[..., Path], edit_checkpoint: Callable[..., Path]
) -> None:
    path = tiny_checkpoint("bloom")

    def rename(held: dict[str, Any]) -> None:
        for name in list(held):
            held[name.removeprefix("transformer.")] = held.pop(name)

    plain = edit_checkpoint(path, tensors=rename)
    ids = token_ids()
    ours = reference.forward(load_decoder(plain, torch.float64), ids)
    assert relative_error(ours, their_logits(path, ids, torch.float64)) < 1e-9


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 11, 12, 16, 25, 32, 71, 112])
def test_alibi_slopes_are_bit_identical_to_transformers(heads: int) -> None:
    from transformers.models.bloom.modeling_bloom import _get_alibi_slopes

    assert torch.equal(alibi_slopes(heads, torch.float32), _get_alibi_slopes(heads, torch.device("cpu")))


def test_alibi_slopes_equal_those_of_the_paper() -> None:
    assert alibi_slopes(8, torch.float64).tolist() == [2.0**-i for i in range(1, 9)]
    twelve = [2.0**-i for i in range(1, 9)] + [2.0 ** -(i + 0.5) for i in range(4)]
    assert alibi_slopes(12, torch.float64).tolist() == pytest.approx(twelve, rel=1e-6)
