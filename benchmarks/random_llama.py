"""Checkpoints of llamas with random weights, for benchmarks of cost."""

from __future__ import annotations

import json
from pathlib import Path


def write_checkpoint(
    path: Path,
    layers: int,
    hidden: int,
    intermediate: int,
    vocab: int,
    kv_heads: int | None = None,
    head_dim: int = 64,
) -> int:
    """Write a llama with random bfloat16 weights, one shard per layer, so that writing needs little memory.

    Args:
        path: folder to make.
        layers: number of layers.
        hidden: width of the residual stream.
        intermediate: width of the MLP.
        vocab: number of tokens.
        kv_heads: number of KV heads; None: as many as query heads.
        head_dim: width of a head.

    Returns:
        The number of weights.
    """
    import torch
    from safetensors.torch import save_file

    path.mkdir(parents=True)
    heads = hidden // head_dim
    kv_heads = kv_heads or heads
    widths = {"q": hidden, "k": kv_heads * head_dim, "v": kv_heads * head_dim, "o": hidden}
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    count = 0

    def shard(file: str, shapes: dict[str, tuple[int, ...]]) -> None:
        nonlocal count
        tensors = {
            name: torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 1
            else (torch.randn(shape, generator=generator) * 0.02).to(torch.bfloat16)
            for name, shape in shapes.items()
        }
        save_file(tensors, path / file)
        weight_map.update(dict.fromkeys(tensors, file))
        count += sum(tensor.numel() for tensor in tensors.values())

    for i in range(layers):
        prefix = f"model.layers.{i}."
        shapes: dict[str, tuple[int, ...]] = {
            f"{prefix}self_attn.{name}_proj.weight": (width, hidden) for name, width in widths.items()
        }
        shapes |= {f"{prefix}mlp.{name}_proj.weight": (intermediate, hidden) for name in ("gate", "up")}
        shapes |= {f"{prefix}mlp.down_proj.weight": (hidden, intermediate)}
        shapes |= {f"{prefix}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        shard(f"layer-{i:03d}.safetensors", shapes)
    shard(
        "embedding.safetensors",
        {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)},
    )
    shard("head.safetensors", {"lm_head.weight": (vocab, hidden)})
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 2 * count}, "weight_map": weight_map}), encoding="utf-8"
    )
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return count
