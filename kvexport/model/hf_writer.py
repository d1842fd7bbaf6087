"""Writer of Hugging Face checkpoints, for converted decoders that transformers can run.

Decoders with RoPE and folded codes become a Llama checkpoint with fewer KV heads: the Llama layout has all
biases that folding makes, and Mistral and Qwen2 do not differ in anything else. transformers has no shared KV
heads for BLOOM, so each KV head is repeated for its query heads: same logits and file size as the original,
and `kvexport build` compresses the repetition without loss.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvexport.errors import UsageError
from kvexport.files.safetensors_io import save_tensors
from kvexport.model.decoder import Attention, Decoder, Layer, Linear, Norm

_SHARD_BYTES = 1 << 30
_LLAMA_DROPS = (
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    "quantization_config",
    "auto_map",
)


def require_hf_checkpoint(decoder: Decoder, method: str, compressing: bool) -> None:
    """Raise, before any work, if the conversion cannot be written as a Hugging Face checkpoint.

    Args:
        decoder: the trained model.
        method: name of the conversion method.
        compressing: whether KV heads are reduced.

    Raises:
        UsageError: the model or the method needs a bundle.
    """
    attention = decoder.layers[0].attention
    if attention.k_norm is not None and compressing:
        reason = "a Hugging Face checkpoint needs a model without QK-norm: a norm after W_K prevents folding"
        raise UsageError(
            reason,
            got=f"--method {method}",
            fix="make a bundle instead: kvexport build CHECKPOINT -o BUNDLE",
        )
    if attention.rope is not None and method not in ("fold", "mean-pool"):
        raise UsageError(
            "a Hugging Face checkpoint of a model with RoPE needs a method that folds into the weights",
            got=f"--method {method}",
            expected="fold, mean-pool",
            fix="use --method fold, or make a bundle: kvexport build CHECKPOINT -o BUNDLE",
        )
    if attention.rope is not None and any(layer.attention.window is not None for layer in decoder.layers):
        raise UsageError(
            "a Hugging Face checkpoint needs a model without sliding window: the Llama layout has none",
            fix="make a bundle instead: kvexport build CHECKPOINT -o BUNDLE",
        )


class HFCheckpointWriter:
    """Writes config.json and safetensors shards of at most 1 GiB into a directory, layer by layer."""

    def __init__(
        self, directory: Path, decoder: Decoder, source_config: Mapping[str, Any], dtype: torch.dtype
    ) -> None:
        self._directory, self._decoder, self._source, self._dtype = directory, decoder, source_config, dtype
        self._pending: dict[str, Tensor] = {}
        self._written: list[tuple[str, list[str], int]] = []  # file, its tensors, its bytes
        self._pending_bytes = 0
        self._layers = 0
        self._kv_heads = 0
        self._mlp_bias = False
        self._bloom = decoder.layers[0].attention.rope is None
        embedding = decoder.embedding
        self._add(
            "transformer.word_embeddings.weight" if self._bloom else "model.embed_tokens.weight",
            embedding.weight,
        )
        if embedding.norm is not None:
            self._norm("transformer.word_embeddings_layernorm", embedding.norm)

    def add_layer(self, layer: Layer) -> None:
        """Append a layer, which must have no maps."""
        attention = layer.attention
        assert attention.key_map is None and attention.value_map is None
        self._kv_heads = attention.num_kv_heads
        self._mlp_bias = layer.mlp.up.bias is not None
        (self._bloom_layer if self._bloom else self._llama_layer)(self._layers, layer)
        self._layers += 1

    def finish(self) -> None:
        """Append final norm and head, and write index and config."""
        self._norm("transformer.ln_f" if self._bloom else "model.norm", self._decoder.final_norm)
        if self._decoder.head is not None:
            self._add("lm_head.weight", self._decoder.head.weight)
        self._flush()
        self._name_shards()
        config = self._bloom_config() if self._bloom else self._llama_config()
        (self._directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def _llama_layer(self, index: int, layer: Layer) -> None:
        prefix, attention, mlp = f"model.layers.{index}.", layer.attention, layer.mlp
        self._norm(prefix + "input_layernorm", layer.attention_norm)
        self._norm(prefix + "post_attention_layernorm", layer.mlp_norm)
        for name, linear in (("q", attention.q), ("k", attention.k), ("v", attention.v), ("o", attention.o)):
            self._linear(f"{prefix}self_attn.{name}_proj", with_bias(linear))
        assert mlp.gate is not None
        for name, linear in (("gate", mlp.gate), ("up", mlp.up), ("down", mlp.down)):
            self._linear(f"{prefix}mlp.{name}_proj", linear)

    def _bloom_layer(self, index: int, layer: Layer) -> None:
        prefix, attention = f"transformer.h.{index}.", layer.attention
        self._norm(prefix + "input_layernorm", layer.attention_norm)
        self._norm(prefix + "post_attention_layernorm", layer.mlp_norm)
        self._linear(prefix + "self_attention.query_key_value", fuse(attention))
        self._linear(prefix + "self_attention.dense", with_bias(attention.o))
        self._linear(prefix + "mlp.dense_h_to_4h", layer.mlp.up)
        self._linear(prefix + "mlp.dense_4h_to_h", layer.mlp.down)

    def _llama_config(self) -> dict[str, Any]:
        config = {key: value for key, value in self._source.items() if key not in _LLAMA_DROPS}
        return config | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": True,
            "mlp_bias": self._mlp_bias,
            "num_key_value_heads": self._kv_heads,
            "head_dim": self._decoder.layers[0].attention.head_dim,
            "tie_word_embeddings": self._decoder.head is None,
            "dtype": str(self._dtype).removeprefix("torch."),
        }

    def _bloom_config(self) -> dict[str, Any]:
        dtype = str(self._dtype).removeprefix("torch.")
        return {**self._source, "tie_word_embeddings": self._decoder.head is None, "dtype": dtype}

    def _norm(self, name: str, norm: Norm | None) -> None:
        assert norm is not None and norm.weight is not None
        self._add(name + ".weight", norm.weight)
        if norm.bias is not None:
            self._add(name + ".bias", norm.bias)

    def _linear(self, name: str, linear: Linear) -> None:
        self._add(name + ".weight", linear.weight)
        if linear.bias is not None:
            self._add(name + ".bias", linear.bias)

    def _add(self, name: str, tensor: Tensor) -> None:
        stored = tensor.to(self._dtype).contiguous()
        if not bool(stored.isfinite().all()):
            raise UsageError(
                f"{name} must be in the range of {self._dtype}",
                got=f"{float(tensor.abs().max()):g}",
                fix="use --dtype bfloat16 or float32",
            )
        size = stored.numel() * stored.element_size()
        if self._pending_bytes and self._pending_bytes + size > _SHARD_BYTES:
            self._flush()
        self._pending[name] = stored
        self._pending_bytes += size

    def _flush(self) -> None:
        name = f"part-{len(self._written):05d}.safetensors"
        save_tensors(self._pending, self._directory / name)
        self._written.append((name, list(self._pending), self._pending_bytes))
        self._pending = {}
        self._pending_bytes = 0

    def _name_shards(self) -> None:
        """Rename the shards as transformers expects, now that their number is known."""
        count = len(self._written)
        if count == 1:
            (self._directory / self._written[0][0]).rename(self._directory / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for at, (file, tensors, _) in enumerate(self._written, 1):
            name = f"model-{at:05d}-of-{count:05d}.safetensors"
            (self._directory / file).rename(self._directory / name)
            weight_map.update(dict.fromkeys(tensors, name))
        index = {
            "metadata": {"total_size": sum(size for _, _, size in self._written)},
            "weight_map": weight_map,
        }
        text = json.dumps(index, indent=2) + "\n"
        (self._directory / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def with_bias(linear: Linear) -> Linear:
    """Add a zero bias if there is none: Llama's `attention_bias` applies to q, k, v and o together."""
    if linear.bias is not None:
        return linear
    return Linear(linear.weight, torch.zeros(linear.weight.shape[0], dtype=linear.weight.dtype))


def fuse(attention: Attention) -> Linear:
    """Query, key and value in BLOOM's fused rows [heads, 3, head_dim]; KV heads are repeated for their query
    heads.
    """
    repeats = attention.queries_per_kv_head

    def rows(linear: Linear, count: int, times: int) -> tuple[Tensor, Tensor]:
        biased = with_bias(linear)
        assert biased.bias is not None
        weight, bias = biased.weight.unflatten(0, (count, -1)), biased.bias.unflatten(0, (count, -1))
        return weight.repeat_interleave(times, 0), bias.repeat_interleave(times, 0)

    parts = [rows(attention.q, attention.num_heads, 1)]
    parts += [rows(each, attention.num_kv_heads, repeats) for each in (attention.k, attention.v)]
    weight = torch.stack([weight for weight, _ in parts], dim=1)  # [heads, 3, head_dim, hidden]
    bias = torch.stack([bias for _, bias in parts], dim=1)
    return Linear(weight.flatten(0, 2), bias.flatten())
