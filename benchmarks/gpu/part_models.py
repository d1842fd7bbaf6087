"""Part models: two checkpoints of random weights, and kvexport's bundles of them, not compressed.

"Without compression" is a llama with as many KV heads as heads, "with" is the same shape with a quarter of
them. The second is not converted from the first: converting a billion weights would take longer than
everything else, and speed does not depend on the values of weights. These records measure no quality.
"""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from part import Part, run

_DEVIATION = 0.02
_HEAD_DIM = 64


def work(part: Part) -> None:
    settings = part.settings
    with ThreadPoolExecutor(len(settings.kv_heads)) as pool:
        part.found = dict(
            zip(
                map(str, settings.kv_heads),
                pool.map(lambda heads: make(part, heads), settings.kv_heads),
                strict=True,
            )
        )


def make(part: Part, kv_heads: int) -> dict[str, Any]:
    """One checkpoint and its bundle, where they are not there yet."""
    checkpoint, bundle = part.settings.checkpoint(kv_heads), part.settings.bundle(kv_heads)
    made: dict[str, Any] = {"kv_heads": kv_heads}
    if not checkpoint.exists():
        made["parameters"] = write_checkpoint(checkpoint, part.settings.shape, kv_heads)
    if not bundle.exists():
        threads = max(1, (os.cpu_count() or 1) // len(part.settings.kv_heads))
        records = part.kvexport(
            "build",
            checkpoint,
            "-o",
            bundle,
            "--kv-ratio",
            "1",
            "--dtype",
            "float16",
            "--calibration",
            "random",
            "--samples",
            "4",
            "--length",
            "32",
            "--capacity",
            str(part.settings.shape["max_position_embeddings"]),
            threads=threads,
        )
        if records:
            made["seconds_by_stage"] = records[0]["seconds"]
            made["kept_float32"] = records[0]["kept_float32"]
            made["proved_by_layer"] = not records[0]["validation"]["failures"]
    made["bundle_bytes"] = sum(file.stat().st_size for file in bundle.glob("decoder*"))
    return made


def write_checkpoint(path: Path, shape: dict[str, Any], kv_heads: int) -> int:
    """Random float16 weights, a shard a layer, so that writing needs little memory too; returns their
    number."""
    import torch
    from safetensors.torch import save_file

    folder = path.with_name(f"{path.name}.new")  # whole, or not there
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    generator = torch.Generator().manual_seed(kv_heads)
    weight_map: dict[str, str] = {}
    count = 0

    def shard(file: str, shapes: dict[str, tuple[int, ...]]) -> None:
        nonlocal count
        tensors = {
            name: torch.ones(size, dtype=torch.float16)
            if len(size) == 1
            else torch.randn(size, generator=generator).mul_(_DEVIATION).to(torch.float16)
            for name, size in shapes.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
        count += sum(tensor.numel() for tensor in tensors.values())

    hidden, intermediate, vocab = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    assert hidden == _HEAD_DIM * shape["num_attention_heads"]
    rows = {"q": hidden, "k": _HEAD_DIM * kv_heads, "v": _HEAD_DIM * kv_heads, "o": hidden}
    for index in range(shape["num_hidden_layers"]):
        prefix = f"model.layers.{index}."
        shapes: dict[str, tuple[int, ...]] = {
            f"{prefix}self_attn.{name}_proj.weight": (out, hidden) for name, out in rows.items()
        }
        shapes |= {f"{prefix}mlp.{name}_proj.weight": (intermediate, hidden) for name in ("gate", "up")}
        shapes |= {f"{prefix}mlp.down_proj.weight": (hidden, intermediate)}
        shapes |= {f"{prefix}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        shard(f"layer-{index:03d}.safetensors", shapes)
    shard(
        "embedding.safetensors",
        {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)},
    )
    shard("head.safetensors", {"lm_head.weight": (vocab, hidden)})
    contents = {"metadata": {"total_size": 2 * count}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(contents), encoding="utf-8")
    config = {
        **shape,
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_key_value_heads": kv_heads,
        "head_dim": _HEAD_DIM,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float16",
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    folder.rename(path)
    return count


if __name__ == "__main__":
    run(work)
