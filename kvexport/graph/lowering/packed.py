"""Lower the INT4 projections of queries, keys and values of a layer to one product.

GroupQueryAttention takes the three results in one tensor, so that they are never split. A step then reads its
input once, and rounds it to int8 once, in place of three times.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from kvexport.graph.lowering.gqa import DOMAIN
from kvexport.graph.lowering.quantized import ACCURACY_LEVEL
from kvexport.graph.nodes import Nodes, dtype_of, sizes


class PackedProjections(ir.passes.InPlacePass):
    """Multiply by W_Q, W_K and W_V in one MatMulNBits where GroupQueryAttention reads all three products.

    Each is INT4 with blocks of one size, on the same input and without a bias. The codes of MatMulNBits are
    made of the stored ones by operators on constants, which ONNX Runtime computes when it loads the graph.

    Post-condition: no GroupQueryAttention reads three such products.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = [node for node in model.graph if _products(node)]
        for node in found:
            _pack(model, node, _products(node))
        return ir.passes.PassResult(model, bool(found))

    def ensures(self, model: ir.Model) -> None:
        for node in model.graph:
            if _products(node):
                raise ir.passes.PostconditionError(f"the projections of {node.name} are still separate")


def _products(attention: ir.Node) -> Sequence[ir.Node]:
    """The three products that a GroupQueryAttention reads, if they can be packed; else none."""
    if attention.op_type != "GroupQueryAttention" or any(value is None for value in attention.inputs[:3]):
        return ()
    nodes = [value.producer() for value in attention.inputs[:3] if value is not None]
    products = [node for node in nodes if node is not None and _dequantize(node) is not None]
    if len(products) < 3 or any(len(node.outputs[0].uses()) != 1 for node in products):
        return ()
    forms = {(node.inputs[0], _block(node)) for node in products}
    return products if len(forms) == 1 and _block(products[0]) else ()


def _dequantize(product: ir.Node) -> ir.Node | None:
    """The DequantizeLinear of INT4 by which a MatMul multiplies, blocked along its rows; or None."""
    if product.op_type != "MatMul" or product.inputs[1] is None:
        return None
    node = product.inputs[1].producer()
    if node is None or node.op_type != "DequantizeLinear":
        return None
    codes = node.inputs[0]
    return node if codes is not None and codes.dtype == ir.DataType.INT4 else None


def _block(product: ir.Node) -> int:
    """The block size; 0: not blocked along the rows."""
    node = _dequantize(product)
    assert node is not None
    block = node.attributes.get("block_size")
    return block.as_int() if block is not None and node.attributes["axis"].as_int() == 0 else 0


def _pack(model: ir.Model, attention: ir.Node, products: Sequence[ir.Node]) -> None:
    first, block = products[0], _block(products[0])
    x, old = first.inputs[0], first.outputs[0]
    parts = [node for node in map(_dequantize, products) if node is not None]
    codes, scales = ([value for node in parts if (value := node.inputs[i]) is not None] for i in (0, 1))
    width = int(sizes(codes[0])[0])
    rows = sum(int(sizes(each)[1]) for each in codes)
    nodes, name = Nodes(model.graph, dtype_of(old), before=first), f"{str(old.name).removesuffix('.q')}.qkv"
    packed = _codes(nodes, codes, width, rows, block, f"{name}.weight")
    by_block = nodes.op("Concat", *scales, name=f"{name}.weight.scales", shape=(width // block, rows), axis=1)
    by_row = nodes.op(
        "Transpose", by_block, name=f"{name}.weight.row_scales", shape=(rows, width // block), perm=[1, 0]
    )
    product = nodes.op(
        "MatMulNBits",
        x,
        packed,
        by_row,
        name=name,
        shape=(*sizes(old)[:-1], rows),
        domain=DOMAIN,
        K=width,
        N=rows,
        bits=4,
        block_size=block,
        accuracy_level=ACCURACY_LEVEL,
    )
    for index, value in enumerate((product, None, None)):
        attention.replace_input_with(index, value)
    model.graph.remove(products, safe=True)


def _codes(nodes: Nodes, codes: Sequence[ir.Value], width: int, rows: int, block: int, name: str) -> ir.Value:
    """The codes of MatMulNBits, uint8 [rows, width/block, block/2], of INT4 [width, rows of each].

    Two codes share a byte, the first one low; the code of -8 is 0, that is, the sign bit is flipped.
    """
    parts = [
        nodes.op("Cast", each, name=f"{each.name}.uint8", dtype="uint8", to=int(ir.DataType.UINT8))
        for each in codes
    ]
    joined = nodes.op("Concat", *parts, name=f"{name}.joined", shape=(width, rows), dtype="uint8", axis=1)
    by_row = nodes.op(
        "Transpose", joined, name=f"{name}.by_row", shape=(rows, width), dtype="uint8", perm=[1, 0]
    )
    shape = (rows, width // block, block // 2)
    pairs = nodes.op(
        "Reshape", by_row, nodes.integers(*shape, 2), name=f"{name}.pairs", shape=(*shape, 2), dtype="uint8"
    )
    halves = []
    for index in (0, 1):
        halves.append(
            nodes.op(
                "Gather",
                pairs,
                nodes.integer(index),
                name=f"{name}.half.{index}",
                shape=shape,
                dtype="uint8",
                axis=-1,
            )
        )
    mask = nodes.constant("uint8(15)", np.array(15, np.uint8))
    four = nodes.constant("uint8(4)", np.array(4, np.uint8))
    low = nodes.op("BitwiseAnd", halves[0], mask, name=f"{name}.low", dtype="uint8")
    high = nodes.op("BitShift", halves[1], four, name=f"{name}.high", dtype="uint8", direction="LEFT")
    both = nodes.op("BitwiseOr", low, high, name=f"{name}.both", dtype="uint8")
    sign_bits = nodes.constant("sign_bits(4)", np.array(0x88, np.uint8))
    return nodes.op("BitwiseXor", both, sign_bits, name=f"{name}.unsigned", dtype="uint8")
