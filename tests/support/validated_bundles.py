"""Tiny bundles with their recorded reference, and ways to damage them that no hash shows."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  teaches numpy bfloat16
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from kvexport.bundle import MANIFEST_FILE, BundleWriter
from kvexport.convert import unconverted_layers
from kvexport.eviction.config import Eviction
from kvexport.files.hashing import sha256_of
from kvexport.graph import DATA_FILE, GRAPH_FILE, DecoderWriter, GraphContract
from kvexport.model.decoder import Decoder
from kvexport.validate import ReferenceRecorder
from support.conversions import plain
from support.decoders import random_windows
from support.tiny_bundles import edit_manifest, manifest_of


def export(
    path: Path,
    decoder: Decoder,
    *,
    dtype: str = "float32",
    kv_heads: int | None = None,
    method: str = "online",
    capacity: int = 128,
    eviction: Eviction | None = None,
) -> GraphContract:
    """Write a converted decoder as a bundle at `path`, as `kvexport.build.pipeline` does; return its graph's
    contract."""
    path.mkdir()
    windows = random_windows(decoder, 6, 48)
    reference = ReferenceRecorder(decoder, windows, capacity, eviction)
    graph = DecoderWriter(
        path,
        dtype=dtype,
        capacity=capacity,
        dims=decoder.dims,
        embedding=decoder.embedding,
        eviction=eviction,
    )
    layers = []
    for converted in (
        unconverted_layers(decoder) if kv_heads is None else plain(decoder, windows, kv_heads, method)
    ):
        reference.add_layer(converted.layer)
        graph.add_layer(converted.layer)
        layers.append(converted.layer)
    reference.save(path)
    contract = graph.finish(decoder)
    whole = dataclasses.replace(decoder, layers=layers)
    BundleWriter(path).seal(manifest_of(whole, contract, graph.weights, eviction))
    return contract


def broken(valid: Path, path: Path, damage: Callable[[Path], object]) -> Path:
    """Make a damaged copy of a bundle, with hashes that match the damage."""
    shutil.copytree(valid, path)
    damage(path)

    def rehash(manifest: dict[str, Any]) -> None:
        files = [file for file in path.iterdir() if file.name != MANIFEST_FILE]
        manifest["files"] = {
            file.name: {"sha256": sha256_of(file), "bytes": file.stat().st_size} for file in files
        }

    edit_manifest(path, rehash)
    return path


def edit_weight(name: str, edit: Callable[[NDArray[Any]], object]) -> Callable[[Path], None]:
    """Damage that changes a weight in the data file in place: `edit` gets a writable array."""

    def damage(bundle: Path) -> None:
        tensor = ir.load(bundle / GRAPH_FILE).graph.initializers[name].const_value
        assert isinstance(tensor, ir.ExternalTensor) and tensor.offset is not None
        dtype, shape = tensor.dtype.numpy(), tuple(int(size) for size in tensor.shape)
        data = np.memmap(bundle / DATA_FILE, np.uint8, "r+", tensor.offset, (tensor.nbytes,))
        edit(data.view(dtype).reshape(shape))
        data.flush()

    return damage


def edit_graph(edit: Callable[[ir.Graph], object]) -> Callable[[Path], None]:
    """Damage that changes nodes of the graph."""

    def damage(bundle: Path) -> None:
        model = ir.load(bundle / GRAPH_FILE)
        edit(model.graph)
        ir.save(model, bundle / GRAPH_FILE)

    return damage


def node_of(graph: ir.Graph, output: str) -> ir.Node:
    """The node that produces a value."""
    (node,) = (node for node in graph if node.outputs[0].name == output)
    return node
