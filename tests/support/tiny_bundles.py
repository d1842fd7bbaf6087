"""Tiny random bundles, and the reference's logits for them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvexport import __version__
from kvexport.bundle import new_bundle
from kvexport.bundle.formats import StoredWeights
from kvexport.bundle.layer_report import LayerReport
from kvexport.eviction.config import Eviction
from kvexport.files.hashing import sha256_of
from kvexport.graph import DATA_FILE, GRAPH_FILE, DecoderWriter, GraphContract, write_lowered
from kvexport.graph.keep_float32 import NO_EXCEPTIONS, Float32Exceptions
from kvexport.model import reference
from kvexport.model.decoder import Attention, Decoder, Layer
from kvexport.model.loader import load_decoder
from kvexport.progress import Progress
from kvexport.validate.self_test_recorder import SelfTestRecorder

MERGED = "Once upon a time there was a café; naïve 日本語 and 🙂🙃 smiled. " * 4


def write_bundle(
    path: Path,
    decoder: Decoder,
    *,
    dtype: str = "float32",
    capacity: int = 64,
    tokenizer: str | None = None,
    eviction: Eviction | None = None,
    exceptions: Float32Exceptions = NO_EXCEPTIONS,
    self_test: bool = False,
    change: Callable[[dict[str, Any]], None] = lambda manifest: None,
) -> Path:
    """Write a bundle of `decoder` to `path`.

    `change` may edit the manifest before it is written.
    """
    with new_bundle(path) as writer:
        graph = DecoderWriter(
            writer.directory,
            dtype=dtype,
            capacity=capacity,
            dims=decoder.dims,
            embedding=decoder.embedding,
            eviction=eviction,
        )
        for layer in decoder.layers:
            graph.add_layer(layer)
        contract = graph.finish(decoder, exceptions)
        write_lowered(writer.directory / GRAPH_FILE, dtype)
        if self_test:
            record_self_test(
                writer.directory, decoder, dtype, capacity, eviction, quantized=graph.weights.is_quantized
            )
        if tokenizer is not None:
            (writer.directory / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
        manifest = manifest_of(decoder, contract, graph.weights, eviction)
        change(manifest)
        writer.seal(manifest)
    return path


def record_self_test(
    directory: Path,
    decoder: Decoder,
    dtype: str,
    capacity: int,
    eviction: Eviction | None,
    *,
    quantized: bool = False,
) -> None:
    """Write the self_test.json of a decoder, with a prompt of random tokens."""
    with TemporaryDirectory() as folder:
        greedy = SelfTestRecorder(
            decoder, torch.zeros(0, dtype=torch.int64), capacity, eviction, dtype, Path(folder)
        )
        for layer in decoder.layers:
            greedy.add_layer(layer)
        greedy.record(Progress())
    greedy.save(directory, sha256_of(directory / DATA_FILE), quantized=quantized)


def manifest_of(
    decoder: Decoder, contract: GraphContract, weights: StoredWeights, eviction: Eviction | None = None
) -> dict[str, Any]:
    return {
        "kvexport": __version__,
        "source": {"name": "tiny", "model_type": "llama", "sha256": "0" * 64},
        "calibration": None,
        "model": {
            "vocab_size": decoder.dims.vocab_size,
            "hidden_size": decoder.dims.hidden_size,
            "num_hidden_layers": len(decoder.layers),
            "max_position_embeddings": decoder.dims.max_positions,
            "bos_token_id": decoder.bos_token_id,
            "eos_token_ids": list(decoder.eos_token_ids),
            "tie_word_embeddings": decoder.head is None,
        },
        "dtype": contract.dtype,
        "weights": weights.to_json(),
        "capacity": contract.capacity,
        "eviction": None if eviction is None else eviction.to_json(),
        "layers": [dataclasses.asdict(_report(layer.attention)) for layer in decoder.layers],
        "graph": contract.to_json(),
    }


def _report(attention: Attention) -> LayerReport:
    return LayerReport(
        method="none" if attention.key_map is None else "online",
        num_attention_heads=attention.num_heads,
        original_num_key_value_heads=attention.key_heads,
        original_head_dim=attention.head_dim,
        num_key_value_heads=attention.num_kv_heads,
        key_head_dim=attention.key_dim,
        value_head_dim=attention.value_dim,
        predicted_error=0.25,
        measured_error=0.5,
        residual_error=0.125,
        parameters=1000,
        original_parameters=2000,
        window=attention.window,
    )


def edit_manifest(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest of a bundle and correct its digest."""
    raw = json.loads((bundle / "manifest.json").read_text())
    change(raw)
    raw.pop("manifest_sha256", None)
    text = json.dumps({**raw, "manifest_sha256": "0" * 64})
    before, after = text.rsplit("0" * 64, 1)
    (bundle / "manifest.json").write_text(before + hashlib.sha256(text.encode()).hexdigest() + after)


def put(*path: str | int, to: object) -> Callable[[dict[str, Any]], None]:
    """A change of parsed JSON: set the value at a path to `to`."""

    def change(raw: dict[str, Any]) -> None:
        at: Any = raw
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = to

    return change


def decoder_with_fewer_heads(checkpoint: Path, seed: int = 0) -> Decoder:
    """A decoder with four MHA heads whose second layer caches two keys of 12 and two values of 16."""
    decoder = load_decoder(checkpoint)
    layers = list(decoder.layers)
    attention = layers[1].attention
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator) / size[-2] ** 0.5

    width, hidden = attention.head_dim, decoder.dims.hidden_size
    online = dataclasses.replace(
        attention,
        num_kv_heads=2,
        key_map=random(2, 2 * width, 12),
        query_map=random(4, width, 12),
        v=dataclasses.replace(attention.v, weight=random(32, hidden)),
        value_map=random(4, 16, width),
    )
    layers[1] = dataclasses.replace(layers[1], attention=online)
    return dataclasses.replace(decoder, layers=layers)


def exact_logits(decoder: Decoder, ids: Sequence[int]) -> NDArray[np.float64]:
    """The reference's logits [S, vocab] in float64 after each of `ids`, from an empty cache."""

    def wide(tree: Any) -> Any:
        if isinstance(tree, torch.Tensor):
            return tree.double() if tree.is_floating_point() else tree
        if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
            return dataclasses.replace(
                tree, **{f.name: wide(getattr(tree, f.name)) for f in dataclasses.fields(tree)}
            )
        return tree

    layers: list[Layer] = [wide(layer) for layer in decoder.layers]
    exact = dataclasses.replace(
        decoder,
        embedding=wide(decoder.embedding),
        layers=layers,
        final_norm=wide(decoder.final_norm),
        head=wide(decoder.head),
    )
    tokens = torch.tensor([ids])
    cache = reference.new_cache(layers, 1, len(ids), torch.float64)
    with torch.no_grad():
        logits: NDArray[np.float64] = reference.forward(exact, tokens, torch.arange(len(ids))[None], cache)[
            0
        ].numpy()
    return logits


def byte_level_tokenizer(vocab_size: int = 320) -> str:
    """tokenizer.json of a byte-level BPE whose tokens split characters; 0 is a special token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([MERGED], trainer)
    return str(tokenizer.to_str())
