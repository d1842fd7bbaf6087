"""Write a whole decoder as one graph, layer by layer, from token ids to logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from kvexport.bundle import graph_io
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
    """Write decoder.onnx and decoder.onnx.data into an existing directory.

    All tensors of the decoder must be float32 and on the CPU. When `add_layer` returns, the layer's weights
    are in the data file and the writer holds no reference to the layer. The same decoder gives the same
    bytes.
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
            directory: existing files of the two names are replaced.
            dtype: of weights, cache and arithmetic: "float32", "float16" or "bfloat16".
            capacity: the largest number of tokens of a sequence; also the length of the rotary tables.
            dims: sizes of the decoder.
            embedding: weight [vocab, hidden], and its norm.
            rope: frequencies; None for decoders without rotary positions.
            eviction: policy, budget and layers of eviction; None: every layer caches every token.

        Raises:
            UsageError: dtype or capacity is invalid, or a weight does not fit the dtype.
            OSError: the disk is full.
        """
        if dtype not in NUMPY_DTYPES:
            raise UsageError(
                "the dtype of a graph must be supported", got=dtype, expected=", ".join(NUMPY_DTYPES)
            )
        if capacity < 1:
            raise UsageError("the capacity must be at least one token", got=capacity, expected=">= 1")
        self._path = directory / graph_io.GRAPH_FILE
        self._capacity, self._dims = capacity, dims
        self._nodes = nodes = NodeBuilder(
            "decoder", graph_io.OPSET, dtype, WeightFile(directory / graph_io.DATA_FILE, dtype)
        )
        inputs = {spec.name: nodes.input(spec) for spec in graph_io.TOKEN_INPUTS}
        self._positions, self._write_indices = inputs["position_ids"], inputs["write_indices"]
        self._logits_index = inputs["logits_index"]
        self._rotary = None if rope is None else Rotary(nodes, self._positions, rope, capacity)
        self._eviction = eviction
        self._eviction_inputs = (
            None
            if eviction is None
            else EvictionInputs(nodes, eviction, capacity, self._positions, self._write_indices)
        )
        # Made with the first layer that needs them: masks read the capacity from the shape of its cache.
        self._masks: Masks | None = None
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
            OSError: the disk is full.
        """
        nodes, index, attention = self._nodes, len(self._caches), layer.attention
        evicts = self._eviction is not None and self._eviction.evicts(index)
        specs = graph_io.cache_specs(
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
            if self._eviction is not None:  # with eviction, the input counts the slots in use instead
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
            SharedInputs(self._write_indices, self._masks, self._eviction_inputs, self._rotary),
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
        """Append final norm and head, and write decoder.onnx.

        Args:
            final_norm: norm of the residual stream after the last layer.
            head: weight [vocab, hidden]; None: the head is tied to the embedding.
            exceptions: what a float16 graph computes in float32.

        Returns:
            the inputs and outputs of the graph.

        Raises:
            UsageError: a weight does not fit the dtype.
            OSError: the disk is full.
        """
        from kvexport.version import __version__

        nodes = self._nodes
        for value in (self._logits(final_norm, head), *self._written):
            nodes.output(value)
        model = nodes.model(f"kvexport {__version__}")
        if exceptions.names:
            model = KeepFloat32(exceptions, nodes.dtype)(model).model
        ir.save(model, self._path)
        return graph_io.contract(
            dtype=nodes.dtype,
            capacity=self._capacity,
            vocab_size=self._dims.vocab_size,
            hidden_size=self._dims.hidden_size,
            caches=self._caches,
        )

    def _logits(self, final_norm: Norm, head: Linear | None) -> ir.Value:
        """Logits of the tokens that logits_index selects, float32 [batch, logits, vocab]."""
        nodes, index = self._nodes, self._logits_index
        shape = (BATCH, LOGITS, 1)
        index = nodes.op(
            "Unsqueeze", index, nodes.integers(2), name="logits.index", shape=shape, dtype="int64"
        )
        shape = (BATCH, LOGITS, self._dims.hidden_size)
        x = nodes.op("GatherND", self._x, index, name="logits.chosen", shape=shape, batch_dims=1)
        x = norm(nodes, final_norm, x, "final_norm")
        name = "logits" if nodes.dtype == "float32" else f"logits.{nodes.dtype}"
        logits = self._tied_head(x, name) if head is None else linear(nodes, head, x, "head", name)
        return logits if nodes.dtype == "float32" else nodes.cast(logits, "float32", "logits")

    def _tied_head(self, x: ir.Value, name: str) -> ir.Value:
        """x [batch, logits, hidden] · embeddingᵀ.

        With Gemm, which alone reads the embedding without a transpose, but takes only matrices.
        """
        nodes, vocab, hidden = self._nodes, self._dims.vocab_size, self._dims.hidden_size
        x = nodes.op(
            "Reshape", x, nodes.integers(-1, hidden), name="head.rows", shape=("batch*logits", hidden)
        )
        x = nodes.op("Gemm", x, self._embedding, name="head.product", shape=("batch*logits", vocab), transB=1)
        lead = nodes.op("Shape", self._logits_index, name="head.lead", shape=(2,), dtype="int64")
        to = nodes.op(
            "Concat", lead, nodes.integers(vocab), name="head.shape", shape=(3,), dtype="int64", axis=0
        )
        return nodes.op("Reshape", x, to, name=name, shape=(BATCH, LOGITS, vocab))
