"""`kvexport compress` writes a Hugging Face checkpoint that transformers runs with the logits of the
reference.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.conversions import plain

from kvexport.build.conversion_job import sequence_capacity
from kvexport.build.pipeline import BuildOptions, compress
from kvexport.calibrate import recipe_for
from kvexport.convert import CompressionRequest
from kvexport.errors import UsageError
from kvexport.model import reference
from kvexport.model.loader import load_decoder
from kvexport.progress import Progress

RECIPE = recipe_for("random", samples=8, length=24)
MHA = {"num_key_value_heads": 4}


def plan(**options: Any) -> BuildOptions:
    request = CompressionRequest(kv_heads=options.pop("kv_heads", None))
    return BuildOptions(RECIPE, request, **{"method": "fold", **options})


def converted_logits(checkpoint: Path, method: str, kv_heads: int, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of the reference after the same conversion."""
    from kvexport.calibrate import calibration_windows

    decoder = load_decoder(checkpoint)
    windows = calibration_windows(decoder, checkpoint, RECIPE)
    made = plain(
        decoder,
        windows,
        kv_heads,
        method,
        adjacent=decoder.layers[0].attention.rope is None,
        capacity=sequence_capacity(decoder.dims.max_positions),
    )
    layers = [each.layer for each in made]
    return reference.forward(dataclasses.replace(decoder, layers=layers), tokens)


def transformers_logits(checkpoint: Path, tokens: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(tokens).logits
    return logits


@pytest.mark.parametrize(
    ("family", "method", "config"),
    [
        ("llama", "fold", MHA),
        ("llama", "mean-pool", MHA),
        ("llama", "fold", {"num_key_value_heads": 2}),
        ("llama", "fold", {**MHA, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("llama", "fold", {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 6}),
        ("mistral", "fold", MHA),
        ("qwen2", "fold", MHA),
        ("bloom", "fold", {}),
        ("bloom", "svd-a", {}),
        ("bloom", "online", {}),
    ],
)
def test_transformers_gives_the_logits_of_the_reference(
    tiny_checkpoint: Any, tmp_path: Path, family: str, method: str, config: dict[str, Any]
) -> None:
    source = tiny_checkpoint(family, **config)
    heads = load_decoder(source).layers[0].attention.num_kv_heads
    report = compress(source, tmp_path / "out", plan(method=method, kv_heads=heads // 2), Progress())
    tokens = torch.randint(67, (2, 40), generator=torch.Generator().manual_seed(1))
    ours = converted_logits(source, method, heads // 2, tokens)
    theirs = transformers_logits(tmp_path / "out", tokens)
    assert torch.allclose(theirs, ours, rtol=0, atol=2e-5 * float(ours.abs().max()))
    assert {layer.num_key_value_heads for layer in report.layers} == {heads // 2}


def test_config_has_fewer_heads_and_the_cache_of_transformers_shrinks(
    tiny_checkpoint: Any, tmp_path: Path
) -> None:
    compress(tiny_checkpoint("mistral", **MHA), tmp_path / "out", plan(kv_heads=1), Progress())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["num_key_value_heads"]) == ("llama", 1)

    from transformers import AutoModelForCausalLM

    cache = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(torch.tensor([[1, 2, 3]])).past_key_values
    assert cache.layers[0].keys.shape[1] == 1


def test_converts_the_result_again_and_compresses_repeated_bloom_heads_without_loss(
    tiny_checkpoint: Any, tmp_path: Path
) -> None:
    source = tiny_checkpoint("bloom")
    compress(source, tmp_path / "half", plan(kv_heads=2), Progress())
    again = compress(tmp_path / "half", tmp_path / "again", plan(kv_heads=2), Progress())
    assert max(layer.measured_error for layer in again.layers) < 1e-3
    tokens = torch.randint(67, (1, 30), generator=torch.Generator().manual_seed(2))
    assert torch.allclose(
        transformers_logits(tmp_path / "again", tokens),
        transformers_logits(tmp_path / "half", tokens),
        atol=2e-3,
    )


def test_writes_shards_for_a_large_model(
    tiny_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvexport.model.hf_writer._SHARD_BYTES", 6000)
    source = tiny_checkpoint("llama", **MHA)
    compress(source, tmp_path / "out", plan(kv_heads=2), Progress())
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    tokens = torch.arange(20)[None]
    assert torch.allclose(
        transformers_logits(tmp_path / "out", tokens), converted_logits(source, "fold", 2, tokens), atol=1e-4
    )


@pytest.mark.parametrize(
    ("family", "config", "method", "says"),
    [
        ("llama", MHA, "online", "--method fold"),
        ("llama", MHA, "online", "--method fold"),
        ("llama", MHA, "svd-a", "--method fold"),
        ("qwen3", {}, "fold", "kvexport build"),
        ("mistral", {**MHA, "sliding_window": 16}, "fold", "sliding window"),
    ],
)
def test_rejects_conversions_that_need_a_bundle_before_any_work(
    tiny_checkpoint: Any, tmp_path: Path, family: str, config: dict[str, Any], method: str, says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        compress(
            tiny_checkpoint(family, **config), tmp_path / "out", plan(method=method, kv_heads=1), Progress()
        )
    assert list(tmp_path.iterdir()) == []


def test_float16_overflow_error_names_the_tensor(
    tiny_checkpoint: Any, edit_checkpoint: Any, tmp_path: Path
) -> None:
    source = edit_checkpoint(
        tiny_checkpoint("llama", **MHA), tensors=lambda held: held["model.norm.weight"].fill_(1e5)
    )
    with pytest.raises(UsageError, match=r"model\.norm\.weight"):
        compress(source, tmp_path / "out", plan(kv_heads=2, dtype="float16"), Progress())
    assert not (tmp_path / "out").exists()
