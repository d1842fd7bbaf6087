"""Measure the peak resident memory of `kvexport build` for a model that is larger than it.

Makes a llama checkpoint of random weights (1.1B parameters, bfloat16, sharded), builds a bundle from it in a
process of its own, calibrated with random tokens, and records the peak of that process in
benchmarks/results/convert_memory.json.

    python benchmarks/convert_memory.py FOLDER
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

RECORD = Path(__file__).parent / "results" / "convert_memory.json"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="work folder; needs about 10 GB, and is empty afterwards")
    parser.add_argument("--dtype", default="float16", help="dtype of the bundle [default: float16]")
    parser.add_argument(
        "--samples", type=int, default=16, help="calibration windows of 256 tokens [default: 16]"
    )
    parser.add_argument("--layers", type=int, default=22, help="layers of the model [default: 22]")
    parser.add_argument("--hidden", type=int, default=2048, help="hidden size of the model [default: 2048]")
    parser.add_argument("--output", type=Path, default=RECORD, help="file of the record")
    arguments = parser.parse_args()

    checkpoint, bundle = arguments.folder / "random", arguments.folder / "bundle"
    parameters = write_checkpoint(checkpoint, arguments.layers, arguments.hidden)
    command = [
        "build",
        str(checkpoint),
        "-o",
        str(bundle),
        "--calibration",
        "random",
        "--samples",
        str(arguments.samples),
    ]
    command += ["--kv-ratio", "0.5", "--dtype", arguments.dtype, "--no-cache", "--json"]
    start = time.perf_counter()
    try:
        output = subprocess.run(
            [sys.executable, "-m", "kvexport", *command], stdout=subprocess.PIPE, check=True, text=True
        ).stdout
    finally:
        shutil.rmtree(checkpoint)
        shutil.rmtree(bundle, ignore_errors=True)
    report = json.loads(output)
    record = {
        "command": "kvexport " + " ".join(["build", "CHECKPOINT", "-o", "BUNDLE", *command[4:]]),
        "parameters": parameters,
        "checkpoint_bytes": 2 * parameters,
        "peak_resident_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
        "seconds": round(time.perf_counter() - start, 1),
        "seconds_by_stage": report["seconds"],
        "proved": not report["validation"]["failures"],
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
    }
    arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=1))


def write_checkpoint(path: Path, layers: int, hidden: int) -> int:
    """Random bfloat16 weights, one shard a layer so that writing needs little memory too; returns their
    number."""
    import torch
    from safetensors.torch import save_file

    path.mkdir(parents=True)
    intermediate, vocab, heads = 4480, 32000, hidden // 64  # with 22 layers of 2048: 1.1e9 parameters
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
            f"{prefix}self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"
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
        json.dumps({"weight_map": weight_map}), encoding="utf-8"
    )
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return count


if __name__ == "__main__":
    main()
