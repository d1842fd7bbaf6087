"""Lower quantised embeddings and tied heads to forms that ONNX Runtime keeps small.

ONNX Runtime fuses DequantizeLinear and MatMul of a linear map into MatMulNBits itself. It would dequantise an
embedding as a whole before Gather, and a tied head, whose DequantizeLinear is transposed, in every call. The
forms below read the tensors of the standard graph, so that the data file holds them once. Measured with ONNX
Runtime 1.31.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from kvexport.graph.lowering.gqa import DOMAIN
from kvexport.graph.nodes import Nodes, dtype_of, sizes

ACCURACY_LEVEL = 4  # of MatMulNBits: activations in int8, as in the MatMulNBits that ONNX Runtime fuses
_BLOCKS = (256, 128, 64, 32, 16)  # that MatMulNBits takes


class QuantizedTables(ir.passes.InPlacePass):
    """Gather rows of a quantised table as integers, and multiply by a tied one with MatMulNBits.

    A head whose width no block of MatMulNBits divides keeps its form.

    Pre-condition: a quantised table that Gather reads is INT4 with blocks, or INT8 with a scale for each row.
    Post-condition: no Gather reads the result of a DequantizeLinear.
    """

    def requires(self, model: ir.Model) -> None:
        for node in model.graph:
            table = _dequantize(node) if node.op_type == "Gather" else None
            if table is not None and (_is_int4(table)) != bool(_block(table)):
                raise ir.passes.PreconditionError(f"{table.name} has another form than the writer gives it")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        lowerings = {"Gather": _lower_gather, "Transpose": _lower_head}
        found = [node for node in model.graph if node.op_type in lowerings and _dequantize(node) is not None]
        modified = False
        for node in found:
            modified |= lowerings[node.op_type](model, node)
        return ir.passes.PassResult(model, modified)

    def ensures(self, model: ir.Model) -> None:
        for node in model.graph:
            if node.op_type == "Gather" and _dequantize(node) is not None:
                raise ir.passes.PostconditionError(f"{node.name} reads a table that is dequantised whole")


def _dequantize(node: ir.Node) -> ir.Node | None:
    """The DequantizeLinear of a stored tensor that a node reads first; None: there is none."""
    value = node.inputs[0]
    producer = None if value is None else value.producer()
    return producer if producer is not None and producer.op_type == "DequantizeLinear" else None


def _block(dequantize: ir.Node) -> int:
    """The block size; 0: a scale for each row."""
    block = dequantize.attributes.get("block_size")
    return 0 if block is None else block.as_int()


def _is_int4(dequantize: ir.Node) -> bool:
    codes = dequantize.inputs[0]
    return codes is not None and codes.dtype == ir.DataType.INT4


def _parts(node: ir.Node) -> tuple[ir.Node, ir.Value, ir.Value]:
    """The DequantizeLinear before a node, its integers [rows, width] and its scales."""
    dequantize = _dequantize(node)
    assert dequantize is not None
    codes, scales = dequantize.inputs[:2]
    assert codes is not None and scales is not None
    return dequantize, codes, scales


def _lower_gather(model: ir.Model, node: ir.Node) -> bool:
    dequantize, codes, scales = _parts(node)
    old, indices = node.outputs[0], node.inputs[1]
    nodes, name, shape = Nodes(model.graph, dtype_of(old), before=node), str(old.name), sizes(old)
    if block := _block(dequantize):
        new = nodes.op(
            "GatherBlockQuantized",
            codes,
            indices,
            scales,
            name=f"{name}.rows",
            shape=shape,
            domain=DOMAIN,
            gather_axis=0,
            quantize_axis=1,
            block_size=block,
        )
        model.opset_imports[DOMAIN] = 1
    else:
        rows = nodes.op("Gather", codes, indices, name=f"{name}.codes", shape=shape, dtype="int8", axis=0)
        factors = nodes.op("Gather", scales, indices, name=f"{name}.scales", shape=shape[:-1], axis=0)
        column = (*shape[:-1], 1)
        factors = nodes.op(
            "Unsqueeze", factors, nodes.integers(-1), name=f"{name}.scale_column", shape=column
        )
        wide = nodes.cast(rows, nodes.dtype, f"{name}.numbers")
        new = nodes.op("Mul", wide, factors, name=f"{name}.rows")
    _replace(model, node, new)
    return True


def _lower_head(model: ir.Model, node: ir.Node) -> bool:
    """Replace Transpose and MatMul by MatMulNBits; its unsigned codes are made when the graph is loaded.

    MatMulNBits takes codes + 2^(bits - 1), which is an exclusive or of the stored two's complement.
    """
    dequantize, codes, scales = _parts(node)
    stored = codes.const_value
    rows, width = (int(size) for size in sizes(codes))
    block = _block(dequantize) or next((each for each in _BLOCKS if width % each == 0), 0)
    uses = list(node.outputs[0].uses())
    if not isinstance(stored, ir.ExternalTensor) or block not in _BLOCKS or len(uses) != 1:
        return False
    product = uses[0].node
    x, old = product.inputs[0], product.outputs[0]
    if product.op_type != "MatMul" or uses[0].idx != 1 or x is None:
        return False
    nodes, name = Nodes(model.graph, dtype_of(old), before=product), str(node.outputs[0].name)
    bits, blocks = (4 if codes.dtype == ir.DataType.INT4 else 8), width // block
    packed = ir.Value(
        name=f"{codes.name}.bytes",
        type=ir.TensorType(ir.DataType.UINT8),
        shape=ir.Shape((rows, blocks, block * bits // 8)),
    )
    packed.const_value = ir.ExternalTensor(
        stored.location,
        stored.offset,
        stored.length,
        ir.DataType.UINT8,
        shape=packed.shape,  # type: ignore[arg-type]
        name=str(packed.name),
        base_dir=stored.base_dir,
    )
    model.graph.register_initializer(packed)
    sign_bits = nodes.constant(f"sign_bits({bits})", np.array(0x88 if bits == 4 else 0x80, np.uint8))
    unsigned = nodes.op("BitwiseXor", packed, sign_bits, name=f"{name}.unsigned", dtype="uint8")
    if not _block(dequantize):
        column = nodes.op("Unsqueeze", scales, nodes.integers(-1), name=f"{name}.scales", shape=(rows, 1))
        scales = nodes.op(
            "Expand", column, nodes.integers(rows, blocks), name=f"{name}.block_scales", shape=(rows, blocks)
        )
    new = nodes.op(
        "MatMulNBits",
        x,
        unsigned,
        scales,
        name=f"{old.name}.product",
        shape=sizes(old),
        domain=DOMAIN,
        K=width,
        N=rows,
        bits=bits,
        block_size=block,
        accuracy_level=ACCURACY_LEVEL,
    )
    model.opset_imports[DOMAIN] = 1
    _replace(model, product, new)
    model.graph.remove(node, safe=True)
    return True


def _replace(model: ir.Model, node: ir.Node, new: ir.Value) -> None:
    """Put `new`, which takes the name, in the place of a node's output."""
    old = node.outputs[0]
    name = old.name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    model.graph.remove(node, safe=True)
    new.name = name
