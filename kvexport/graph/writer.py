"""Write a whole decoder as one graph, layer by layer, from token ids to logits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from kvexport.bundle import graph_io
from kvexport.bundle.formats import StoredWeights, weight_shares
from kvexport.bundle.graph_io import (
    BATCH,
    LOGITS,
    SEQUENCE,
    GraphContract,
    TensorSpec,
)
from kvexport.errors import UsageError
from kvexport.eviction.config import Eviction
from kvexport.graph.attention import AttentionBuilder, CacheValues, SharedInputs
from kvexport.graph.blocks import block, linear, norm
from kvexport.graph.eviction_attention import EvictionCacheValues, EvictionInputs
from kvexport.graph.keep_float32 import NO_EXCEPTIONS, Float32Exceptions, KeepFloat32
from kvexport.graph.nodes import NodeBuilder, sizes
from kvexport.graph.rotary import RotaryTables
from kvexport.graph.slots import SlotsBuilder
from kvexport.graph.weights import NUMPY_DTYPES, WeightFile
from kvexport.model.decoder import Decoder, Embedding, Layer, ModelDims


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
        eviction: Eviction | None = None,
    ) -> None:
        """Start the graph and write the embedding.

        Args:
            directory: existing files of the two names are replaced.
            dtype: of weights, cache and arithmetic: "float32", "float16" or "bfloat16".
            capacity: the largest number of tokens of a sequence; also the length of the rotary tables.
            dims: sizes of the decoder.
            embedding: the decoder's embedding.
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
        self._rotary = RotaryTables(nodes, self._positions, capacity)
        self._eviction = eviction
        self._eviction_inputs = (
            None
            if eviction is None
            else EvictionInputs(nodes, eviction, capacity, self._positions, self._write_indices)
        )
        # With eviction, the input write_indices counts the slots in use, and is no position.
        first = None if eviction is not None else self._write_indices
        self._slots = SlotsBuilder(nodes, self._positions, first)
        self._caches: list[tuple[TensorSpec, ...]] = []
        self._written: list[ir.Value] = []
        # [vocab, width]
        self._embedding = nodes.matrix("embedding.weight", embedding.weight, embedding.codes)
        table = nodes.matrices[-1][0]
        self._weights = StoredWeights(embedding=table, head=table, layers=())
        self._x = self._embed(embedding, inputs["input_ids"])

    def add_layer(self, layer: Layer) -> None:
        """Append a layer.

        Raises:
            UsageError: a weight does not fit the dtype.
            OSError: the disk is full.
        """
        nodes, index, attention = self._nodes, len(self._caches), layer.attention
        first_matrix = len(nodes.matrices)
        evicts = self._eviction is not None and self._eviction.evicts(index)
        ring = graph_io.ring_of(attention.window, self._capacity, evicts)
        specs = graph_io.cache_specs(
            index,
            kv_heads=attention.num_kv_heads,
            key_dim=attention.key_dim,
            value_dim=attention.value_dim,
            dtype=nodes.dtype,
            evicts=evicts,
            ring=ring,
        )
        inputs = [nodes.input(spec) for spec in specs]
        slots = None if evicts else self._slots.of(ring, inputs[0])
        past = EvictionCacheValues(*inputs) if evicts else CacheValues(*inputs)
        tokens = SharedInputs(slots, self._eviction_inputs, self._rotary)
        builder = AttentionBuilder(nodes, index, attention, tokens)

        def attend(x: ir.Value, result: str) -> ir.Value:
            attended, written = builder.add(x, past, result)
            self._written += vars(written).values()
            return attended

        self._x = block(nodes, index, layer, self._x, attend)
        self._caches.append(specs)
        shares = weight_shares(nodes.matrices[first_matrix:])
        self._weights = replace(self._weights, layers=(*self._weights.layers, shares))

    @property
    def weights(self) -> StoredWeights:
        """Formats of the weights, complete after `finish`."""
        return self._weights

    def finish(self, decoder: Decoder, exceptions: Float32Exceptions = NO_EXCEPTIONS) -> GraphContract:
        """Append final norm and head, and write decoder.onnx.

        Args:
            decoder: gives what follows the last layer; its layers are not read.
            exceptions: what a float16 graph computes in float32.

        Returns:
            the inputs and outputs of the graph.

        Raises:
            UsageError: a weight does not fit the dtype.
            OSError: the disk is full.
        """
        from kvexport.version import __version__

        nodes = self._nodes
        for value in (self._logits(decoder), *self._written):
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

    def _embed(self, embedding: Embedding, input_ids: ir.Value) -> ir.Value:
        """The input of the first layer, [batch, sequence, hidden]."""
        nodes, stream = self._nodes, (BATCH, SEQUENCE, self._dims.hidden_size)
        shape = (BATCH, SEQUENCE, embedding.weight.shape[1])
        x = nodes.op("Gather", self._embedding, input_ids, name="embedding", shape=shape, axis=0)
        if embedding.multiplier != 1:
            multiplier = nodes.number("embedding_multiplier", embedding.multiplier)
            x = nodes.op("Mul", x, multiplier, name="embedding.scaled")
        if embedding.projection is not None:
            x = linear(nodes, embedding.projection, x, "embedding.projection")
        if embedding.positions is not None:
            table = nodes.weight("positions.weight", np.asarray(embedding.positions[: self._capacity]))
            rows = nodes.op("Gather", table, self._positions, name="positions", shape=stream, axis=0)
            x = nodes.op("Add", x, rows, name="embedding.positioned")
        return x if embedding.norm is None else norm(nodes, embedding.norm, x, "embedding_norm")

    def _logits(self, decoder: Decoder) -> ir.Value:
        """Logits of the tokens that logits_index selects, float32 [batch, logits, vocab]."""
        nodes, index = self._nodes, self._logits_index
        shape = (BATCH, LOGITS, 1)
        index = nodes.op(
            "Unsqueeze", index, nodes.integers(2), name="logits.index", shape=shape, dtype="int64"
        )
        shape = (BATCH, LOGITS, self._dims.hidden_size)
        x = nodes.op("GatherND", self._x, index, name="logits.chosen", shape=shape, batch_dims=1)
        if decoder.final_norm is not None:
            x = norm(nodes, decoder.final_norm, x, "final_norm")
        if decoder.output_projection is not None:
            x = linear(nodes, decoder.output_projection, x, "output_projection")
        finished = decoder.logit_multiplier == 1 and decoder.logit_softcap is None
        result, wide = "logits" if finished else "logits.product", nodes.dtype == "float32"
        name, head = result if wide else f"logits.{nodes.dtype}", decoder.head
        if head is None:
            logits = self._tied_head(x, name, quantized=decoder.embedding.codes is not None)
        else:
            logits = linear(nodes, head, x, "head", name)
            self._weights = replace(self._weights, head=nodes.matrices[-1][0])
        logits = logits if wide else nodes.cast(logits, "float32", result)
        return logits if finished else self._scaled_logits(logits, decoder)

    def _scaled_logits(self, logits: ir.Value, decoder: Decoder) -> ir.Value:
        """Logits with the decoder's multiplier and softcap, in float32."""
        nodes, factor, cap = self._nodes, decoder.logit_multiplier, decoder.logit_softcap

        def times(x: ir.Value, factor: float, name: str) -> ir.Value:
            constant = nodes.number(f"{name}.factor", factor, "float32")
            return nodes.op("Mul", x, constant, name=name, dtype="float32")

        if cap is None:
            return times(logits, factor, "logits")
        scaled = times(logits, factor / cap, "logits.scaled")
        return times(nodes.op("Tanh", scaled, name="logits.tanh", dtype="float32"), cap, "logits")

    def _tied_head(self, x: ir.Value, name: str, *, quantized: bool) -> ir.Value:
        """x [batch, logits, width] · embeddingᵀ.

        With Gemm, which alone reads the embedding without a transpose, but takes only matrices. A quantised
        embedding is transposed after DequantizeLinear: TensorRT-RTX then has one copy of it in the engine,
        and with Gemm two in 8 bits.
        """
        nodes, vocab, hidden = self._nodes, self._dims.vocab_size, sizes(x)[-1]
        assert isinstance(hidden, int)
        if quantized:
            head = nodes.op(
                "Transpose", self._embedding, name="head.weight", shape=(hidden, vocab), perm=[1, 0]
            )
            return nodes.op("MatMul", x, head, name=name, shape=(BATCH, LOGITS, vocab))
        x = nodes.op(
            "Reshape", x, nodes.integers(-1, hidden), name="head.rows", shape=("batch*logits", hidden)
        )
        x = nodes.op("Gemm", x, self._embedding, name="head.product", shape=("batch*logits", vocab), transB=1)
        lead = nodes.op("Shape", self._logits_index, name="head.lead", shape=(2,), dtype="int64")
        to = nodes.op(
            "Concat", lead, nodes.integers(vocab), name="head.shape", shape=(3,), dtype="int64", axis=0
        )
        return nodes.op("Reshape", x, to, name=name, shape=(BATCH, LOGITS, vocab))
