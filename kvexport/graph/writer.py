"""The whole decoder as one graph, layer by layer: `DecoderWriter`.

Knows the order of things, from token ids to logits; must not keep a weight, nor know how attention is made.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from kvexport.bundle import graph_io as terms
from kvexport.bundle.graph_io import (
    BATCH,
    LOGITS,
    SEQUENCE,
    GraphContract,
    TensorSpec,
    attention_residual,
    residual_tap,
)
from kvexport.errors import UsageError
from kvexport.eviction.config import Eviction
from kvexport.graph.attention import AttentionBuilder, CacheValues, SharedInputs
from kvexport.graph.blocks import linear, mlp, norm
from kvexport.graph.eviction_attention import EvictionCacheValues, EvictionInputs
from kvexport.graph.keep_float32 import NO_EXCEPTIONS, Float32Exceptions, KeepFloat32
from kvexport.graph.masks import Masks
from kvexport.graph.nodes import NodeBuilder
from kvexport.graph.rotary import Rotary
from kvexport.graph.weights import NUMPY_DTYPES, WeightFile
from kvexport.model.decoder import Embedding, Layer, Linear, ModelDims, Norm, Rope


class DecoderWriter:
    """Writes decoder.onnx and decoder.onnx.data into a directory that exists.

    Leaves must be float32 CPU tensors. A layer's weights are in the data file when `add_layer` returns, and
    nothing keeps the layer. The same decoder gives the same bytes.
    """

    def __init__(
        self,
        directory: Path,
        *,
        dtype: str,
        capacity: int,
        dims: ModelDims,
        embedding: Embedding,
        rope: Rope | None,
        eviction: Eviction | None = None,
    ) -> None:
        """Start the graph and write the embedding.

        Args:
            directory: where the two files are written; files of those names are replaced.
            dtype: of weights, cache and arithmetic: "float32", "float16" or "bfloat16".
            capacity: the most tokens a sequence may ever hold, the length of the rotary tables.
            limits, embedding, rope: the decoder's own.
            eviction: how layers stay within a budget; None: they hold every token.

        Raises:
            UsageError: dtype or capacity is not allowed, or a weight does not fit the dtype.
        """
        if dtype not in NUMPY_DTYPES:
            raise UsageError("a graph cannot have this dtype", got=dtype, expected=", ".join(NUMPY_DTYPES))
        if capacity < 1:
            raise UsageError("the capacity must hold a token", got=capacity, expected="1 or more")
        self._path = directory / terms.GRAPH_FILE
        self._capacity, self._limits = capacity, dims
        self._nodes = nodes = NodeBuilder(
            "decoder", terms.OPSET, dtype, WeightFile(directory / terms.DATA_FILE, dtype)
        )
        inputs = {spec.name: nodes.input(spec) for spec in terms.TOKEN_INPUTS}
        self._positions, self._write_indices = inputs["position_ids"], inputs["write_indices"]
        self._logits_index = inputs["logits_index"]
        self._rotary = None if rope is None else Rotary(nodes, self._positions, rope, capacity)
        self._eviction = eviction
        self._evicting = (
            None
            if eviction is None
            else EvictionInputs(nodes, eviction, capacity, self._positions, self._write_indices)
        )
        self._masks: Masks | None = (
            None  # made with the first layer that needs them: its cache tells the capacity
        )
        self._caches: list[tuple[TensorSpec, ...]] = []
        self._written: list[ir.Value] = []
        self._embedding = nodes.weight("embedding.weight", np.asarray(embedding.weight))  # [vocab, hidden]
        stream = (BATCH, SEQUENCE, dims.hidden_size)
        self._x = nodes.op(
            "Gather", self._embedding, inputs["input_ids"], name="embedding", shape=stream, axis=0
        )
        if embedding.norm is not None:
            self._x = norm(nodes, embedding.norm, self._x, "embedding_norm")

    def add_layer(self, layer: Layer) -> None:
        """Append a layer.

        Raises:
            UsageError: a weight does not fit the dtype.
        """
        nodes, index, attention = self._nodes, len(self._caches), layer.attention
        evicts = self._eviction is not None and self._eviction.evicts(index)
        specs = terms.cache_specs(
            index,
            kv_heads=attention.num_kv_heads,
            key_dim=attention.key_dim,
            value_dim=attention.value_dim,
            dtype=nodes.dtype,
            evicts=evicts,
        )
        inputs = [nodes.input(spec) for spec in specs]
        if not evicts and self._masks is None:
            self._masks = Masks(nodes, self._positions, inputs[0])
            if self._eviction is not None:  # write_indices are of the slots of layers that evict
                first = nodes.integer(0)
                self._write_indices = nodes.op(
                    "Gather",
                    self._positions,
                    first,
                    name="first_position",
                    shape=(BATCH,),
                    dtype="int64",
                    axis=1,
                )
        past = EvictionCacheValues(*inputs) if evicts else CacheValues(*inputs)
        name, tokens = (
            f"layers.{index}",
            SharedInputs(self._write_indices, self._masks, self._evicting, self._rotary),
        )
        builder = AttentionBuilder(nodes, index, attention, tokens)
        attended, written = builder.add(
            norm(nodes, layer.attention_norm, self._x, f"{name}.attention_norm"), past
        )
        x = nodes.op("Add", self._x, attended, name=attention_residual(index))
        update = mlp(nodes, layer.mlp, norm(nodes, layer.mlp_norm, x, f"{name}.mlp_norm"), f"{name}.mlp")
        self._x = nodes.op("Add", x, update, name=residual_tap(index))
        self._caches.append(specs)
        self._written += vars(written).values()

    def finish(
        self, final_norm: Norm, head: Linear | None, exceptions: Float32Exceptions = NO_EXCEPTIONS
    ) -> GraphContract:
        """Append the head (None: the embedding's own weight), write decoder.onnx and say what it takes and gives.

        Args:
            kept: what a narrower graph computes in float32.

        Raises:
            UsageError: a weight does not fit the dtype.
        """
        from kvexport.version import __version__

        nodes = self._nodes
        for value in (self._logits(final_norm, head), *self._written):
            nodes.output(value)
        model = nodes.model(f"kvexport {__version__}")
        if exceptions.names:
            model = KeepFloat32(exceptions, nodes.dtype)(model).model
        ir.save(model, self._path)
        return terms.contract(
            dtype=nodes.dtype,
            capacity=self._capacity,
            vocab_size=self._limits.vocab_size,
            hidden_size=self._limits.hidden_size,
            caches=self._caches,
        )

    def _logits(self, final_norm: Norm, head: Linear | None) -> ir.Value:
        """The chosen tokens' logits, float32 [batch, logits, vocab]."""
        nodes, index = self._nodes, self._logits_index
        shape = (BATCH, LOGITS, 1)
        index = nodes.op(
            "Unsqueeze", index, nodes.integers(2), name="logits.index", shape=shape, dtype="int64"
        )
        shape = (BATCH, LOGITS, self._limits.hidden_size)
        x = nodes.op("GatherND", self._x, index, name="logits.chosen", shape=shape, batch_dims=1)
        x = norm(nodes, final_norm, x, "final_norm")
        name = "logits" if nodes.dtype == "float32" else f"logits.{nodes.dtype}"
        logits = self._tied_head(x, name) if head is None else linear(nodes, head, x, "head", name)
        return logits if nodes.dtype == "float32" else nodes.cast(logits, "float32", "logits")

    def _tied_head(self, x: ir.Value, name: str) -> ir.Value:
        """x [batch, logits, hidden] · embeddingᵀ. Only Gemm takes the embedding as it lies, and only rows."""
        nodes, vocab, hidden = self._nodes, self._limits.vocab_size, self._limits.hidden_size
        x = nodes.op(
            "Reshape", x, nodes.integers(-1, hidden), name="head.rows", shape=("batch*logits", hidden)
        )
        x = nodes.op("Gemm", x, self._embedding, name="head.product", shape=("batch*logits", vocab), transB=1)
        lead = nodes.op("Shape", self._logits_index, name="head.lead", shape=(2,), dtype="int64")
        to = nodes.op(
            "Concat", lead, nodes.integers(vocab), name="head.shape", shape=(3,), dtype="int64", axis=0
        )
        return nodes.op("Reshape", x, to, name=name, shape=(BATCH, LOGITS, vocab))
