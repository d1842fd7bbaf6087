"""Lower a residual addition and the RMSNorm of its sum to one operator of ONNX Runtime."""

from __future__ import annotations

import onnx_ir as ir

from kvexport.graph.lowering.gqa import DOMAIN
from kvexport.graph.nodes import sizes


class ResidualNorms(ir.passes.InPlacePass):
    """Replace Add and RMSNormalization by SkipSimplifiedLayerNormalization, which returns sum and norm.

    A norm whose input is no sum of two values of its shape is unchanged. Post-condition: no such norm is
    left.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = [node for node in model.graph if _residual(node) is not None]
        for norm in found:
            _fuse(model, norm)
        if found:
            model.opset_imports[DOMAIN] = 1
        return ir.passes.PassResult(model, bool(found))

    def ensures(self, model: ir.Model) -> None:
        for node in model.graph:
            if _residual(node) is not None:
                raise ir.passes.PostconditionError(f"{node.name} normalises a sum that is computed apart")


def _residual(norm: ir.Node) -> ir.Node | None:
    """The Add of two values of one shape whose sum an RMSNormalization over the last axis reads; or None."""
    if norm.op_type != "RMSNormalization" or norm.domain != "" or norm.inputs[0] is None:
        return None
    add = norm.inputs[0].producer()
    if add is None or add.op_type != "Add" or norm.attributes["axis"].as_int() != -1:
        return None
    left, right = add.inputs
    assert left is not None and right is not None
    shapes_equal = left.shape is not None and right.shape is not None and sizes(left) == sizes(right)
    return add if shapes_equal else None


def _fuse(model: ir.Model, norm: ir.Node) -> None:
    add, weight = _residual(norm), norm.inputs[1]
    assert add is not None
    old_sum, old_norm = add.outputs[0], norm.outputs[0]
    names = old_sum.name, old_norm.name
    total, normed = (ir.Value(type=old.type, shape=old.shape) for old in (old_sum, old_norm))
    unused = (ir.Value(name=""), ir.Value(name=""))  # mean and inverse standard deviation
    node = ir.node(
        "SkipSimplifiedLayerNormalization",
        [*add.inputs, weight],
        {"epsilon": norm.attributes["epsilon"].as_float()},
        domain=DOMAIN,
        name=norm.name,
        outputs=[normed, *unused, total],
    )
    model.graph.insert_before(add, node)
    for old, new in ((old_norm, normed), (old_sum, total)):
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    model.graph.remove([norm, add], safe=True)
    total.name, normed.name = names
