"""Every family gives the logits of transformers on random weights, up to float64 rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvexport.model import reference
from kvexport.model.loader import alibi_slopes, load_decoder

LINEAR = {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32, "rope_theta": 10000.0,
}  # fmt: skip
WINDOW = {"use_sliding_window": True, "sliding_window": 7}

CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"num_key_value_heads": 4}),
    ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"attention_bias": True, "num_attention_heads": 8, "num_key_value_heads": 2}),
    ("llama", {"head_dim": 16}),
    ("llama", {"head_dim": 6, "num_key_value_heads": 4, "rms_norm_eps": 1e-3}),
    ("llama", {"rope_parameters": LINEAR}),
    ("llama", {"rope_parameters": LLAMA3, "head_dim": 16}),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000}}),
    ("llama", {"hidden_act": "gelu"}),
    ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    ("llama", {"hidden_act": "gelu_new"}),
    ("llama", {"hidden_act": "relu"}),
    ("mistral", {"sliding_window": 7}),
    ("mistral", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    ("mistral", {"head_dim": 16, "sliding_window": 1}),
    ("bloom", {}),
    ("bloom", {"n_head": 2, "n_layer": 3}),
    ("bloom", {"hidden_size": 36, "n_head": 6}),
    ("bloom", {"hidden_size": 88, "n_head": 11, "tie_word_embeddings": False, "layer_norm_epsilon": 1e-3}),
    ("bloom", {"hidden_size": 64, "n_head": 16}),
    ("qwen2", {}),
    ("qwen2", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    ("qwen2", {"num_hidden_layers": 3, "max_window_layers": 1, **WINDOW}),
    (
        "qwen2",
        {
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            **WINDOW,
        },
    ),
    ("qwen2", {"rope_parameters": LINEAR}),
    ("qwen3", {}),
    ("qwen3", {"num_key_value_heads": 4, "tie_word_embeddings": True, "head_dim": 16}),
    ("qwen3", {"attention_bias": True, "rope_parameters": LLAMA3, "head_dim": 16}),
    ("qwen3", {"max_window_layers": 1, **WINDOW}),
]


def _name(value: object) -> str:
    if isinstance(value, str):
        return value
    assert isinstance(value, dict)
    return (
        ",".join(
            f"{key}={said.get('rope_type') if isinstance(said, dict) else said}"
            for key, said in value.items()
        )
        or "plain"
    )


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers compute norms, BLOOM's softmax and ALiBi in the model's dtype instead of float32."""
    from transformers.models.bloom import modeling_bloom
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.mistral.modeling_mistral import MistralRMSNorm
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    def rms_norm(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    for module in (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm):
        monkeypatch.setattr(module, "forward", rms_norm)

    class Functional:
        dropout = staticmethod(torch.nn.functional.dropout)

        @staticmethod
        def softmax(x: torch.Tensor, dim: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.softmax(x, dim=dim)

    slopes = modeling_bloom._get_alibi_slopes
    monkeypatch.setattr(modeling_bloom, "F", Functional)
    monkeypatch.setattr(modeling_bloom, "_get_alibi_slopes", lambda *args: slopes(*args).double())


def their_model(path: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    sdpa = (
        {} if path.name.startswith("bloom") else {"attn_implementation": "sdpa"}
    )  # BLOOM has eager attention only
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **sdpa).eval()


@torch.no_grad()
def their_logits(path: Path, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return their_model(path, dtype)(ids).logits


def token_ids(length: int = 40) -> torch.Tensor:
    return torch.randint(0, 67, (2, length), generator=torch.Generator().manual_seed(7))


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize(("family", "config"), CASES, ids=_name)
def test_logits_equal_transformers_in_float64(
    tiny_checkpoint: Callable[..., Path], family: str, config: dict[str, Any]
) -> None:
    path = tiny_checkpoint(family, **config)
    ids = token_ids()
    ours = reference.forward(load_decoder(path, torch.float64), ids)
    assert relative_error(ours, their_logits(path, ids, torch.float64)) < 1e-9


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize(
    ("family", "config", "changed"),
    [
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
    ours = reference.forward(load_decoder(edit_checkpoint(path, config=changed), torch.float64), ids)
    assert relative_error(ours, their_logits(path, ids, torch.float64)) > 1e-8


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


@pytest.mark.parametrize("family", ["llama", "mistral", "bloom", "qwen2", "qwen3"])
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


ROPES: list[dict[str, Any]] = [
    {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000}},
    {"rope_parameters": LINEAR},
    {"rope_parameters": LLAMA3},
    {"rope_parameters": {**LLAMA3, "rope_theta": 500000.0, "original_max_position_embeddings": 8192}},
    {"rope_theta": 5000.0, "rope_scaling": None, "rope_parameters": None},
    {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None},
    {
        "rope_theta": 500000.0,
        "rope_scaling": {key: value for key, value in LLAMA3.items() if key != "rope_theta"},
        "rope_parameters": None,
    },
]


@pytest.mark.parametrize("rope", ROPES)
def test_rotary_tables_are_bit_identical_to_transformers(
    tiny_checkpoint: Callable[..., Path], edit_checkpoint: Callable[..., Path], rope: dict[str, Any]
) -> None:
    path = edit_checkpoint(tiny_checkpoint("llama", head_dim=128), config=rope)
    positions = torch.cat((torch.arange(512), torch.tensor([4095, 65536, 131071])))[None]
    ours = load_decoder(path).layers[0].attention.rope
    assert ours is not None
    cos, sin = reference.rotary_tables(ours, positions, torch.float32)
    theirs = their_model(path, torch.float32).model.rotary_emb
    assert torch.equal(ours.inv_freq, theirs.inv_freq)
    their_cos, their_sin = theirs(torch.zeros(1), positions)
    assert torch.equal(cos[:, 0], their_cos[..., :64])
    assert torch.equal(sin[:, 0], their_sin[..., :64])


def test_llama3_scaling_of_the_test_has_all_three_bands(tiny_checkpoint: Callable[..., Path]) -> None:
    def frequencies(rope: dict[str, Any]) -> torch.Tensor:
        path = tiny_checkpoint("llama", head_dim=16, rope_parameters=rope)
        found = load_decoder(path).layers[0].attention.rope
        assert found is not None
        return found.inv_freq

    ratio = frequencies({"rope_type": "default", "rope_theta": 10000.0}) / frequencies(LLAMA3)
    assert (ratio == 1).any() and ((ratio > 1.01) & (ratio < 7.99)).any() and (ratio == 8).any()


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 11, 12, 16, 25, 32, 71, 112])
def test_alibi_slopes_are_bit_identical_to_transformers(heads: int) -> None:
    from transformers.models.bloom.modeling_bloom import _get_alibi_slopes

    assert torch.equal(alibi_slopes(heads, torch.float32), _get_alibi_slopes(heads, torch.device("cpu")))


def test_alibi_slopes_equal_those_of_the_paper() -> None:
    assert alibi_slopes(8, torch.float64).tolist() == [2.0**-i for i in range(1, 9)]
    twelve = [2.0**-i for i in range(1, 9)] + [2.0 ** -(i + 0.5) for i in range(4)]
    assert alibi_slopes(12, torch.float64).tolist() == pytest.approx(twelve, rel=1e-6)
