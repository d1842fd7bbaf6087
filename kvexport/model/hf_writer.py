"""Writer of Hugging Face checkpoints: a converted decoder under the names and in the layout of its family.

Where the family has no key for the number of KV heads, each KV head is repeated for the trained heads that
share it: same logits and file size as the original, and `kvexport build` compresses the repetition without
loss.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from kvexport.errors import KvexportError, UsageError
from kvexport.files.safetensors_io import save_tensors
from kvexport.model.decoder import Attention, Decoder, Layer, Linear
from kvexport.model.hf_config import HFConfig
from kvexport.model.layout import Ends, Layout

_SHARD_BYTES = 1 << 30


class HFCheckpointWriter:
    """Writes config.json and safetensors shards of at most 1 GiB into a directory, layer by layer."""

    def __init__(self, directory: Path, form: HFConfig, decoder: Decoder, dtype: torch.dtype) -> None:
        """
        Args:
            directory: an existing directory.
            form: what the checkpoint declares.
            decoder: gives the parts outside the layers.
            dtype: data type of the weights.
        """
        self._directory, self._dtype = directory, dtype
        self._form = form.with_dtype(str(dtype).removeprefix("torch."))
        self._layout = Layout(form.architecture)
        self._missing = self._layout.shapes()
        trained = Layout(form.source).shapes()
        # biases that the trained model does not have, which its key switches on together with the needed ones
        self._new_biases = {name for name in self._missing if name.endswith(".bias") and name not in trained}
        self._pending: dict[str, Tensor] = {}
        self._written: list[tuple[str, list[str], int]] = []  # file, its tensors, its bytes
        self._pending_bytes = 0
        self._layers = 0
        self._add_all(
            self._layout.pack_ends(
                Ends(decoder.embedding, decoder.final_norm, decoder.output_projection, decoder.head)
            )
        )

    def add_layer(self, layer: Layer) -> None:
        """Append a layer, which must have no maps and heads of the trained width.

        Raises:
            UsageError: a weight is not in the range of the dtype.
            KvexportError: the family has no tensor for a part of the layer.
        """
        attention = layer.attention
        maps = (attention.key_map, attention.query_map, attention.value_encoder, attention.value_map)
        assert all(each is None for each in maps)
        stored = repeat_kv_heads(attention, self._form.architecture.num_kv_heads)
        self._add_all(self._layout.pack_layer(self._layers, replace(layer, attention=stored)))
        self._layers += 1

    def finish(self) -> None:
        """Write index and config.

        Raises:
            KvexportError: a tensor that the config implies was not added.
        """
        for name in sorted(self._new_biases & self._missing.keys()):
            self._add(name, torch.zeros(self._missing[name]))
        if self._missing:
            raise KvexportError(
                "a Hugging Face checkpoint must have all tensors of its family",
                got="no " + ", ".join(sorted(self._missing)[:5]),
            )
        self._flush()
        self._name_shards()
        config = json.dumps(self._form.config, indent=2) + "\n"
        (self._directory / "config.json").write_text(config, encoding="utf-8")

    def _add_all(self, packed: Mapping[str, Tensor]) -> None:
        for name, tensor in packed.items():
            self._add(name, tensor)

    def _add(self, name: str, tensor: Tensor) -> None:
        if self._missing.pop(name, None) != tuple(tensor.shape):
            raise KvexportError(
                "a Hugging Face checkpoint must have the tensors of its family and no others",
                got=f"{name} {list(tensor.shape)}",
            )
        stored = tensor.to(self._dtype).contiguous()
        name = self._layout.stored(name)
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


def repeat_kv_heads(attention: Attention, kv_heads: int) -> Attention:
    """The same attention with `kv_heads` KV heads, each of which repeats one of its own."""
    count = attention.num_kv_heads

    def rows(x: Tensor) -> Tensor:
        return x.unflatten(0, (count, -1)).repeat_interleave(kv_heads // count, 0).flatten(0, 1)

    def repeated(linear: Linear) -> Linear:
        return Linear(rows(linear.weight), None if linear.bias is None else rows(linear.bias))

    if count == kv_heads:
        return attention
    return replace(attention, k=repeated(attention.k), v=repeated(attention.v), num_kv_heads=kv_heads)
