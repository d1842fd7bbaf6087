"""Faults of an exported decoder, as negative controls; each must fail validation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from support.validated_bundles import edit_graph, edit_weight, node_of

HEAD_DIM = 8
_TOP_EXPONENT_BIT = {2: np.uint16(1 << 14), 4: np.uint32(1 << 30)}  # by bytes of a number


def flip_bits(weight: NDArray[Any]) -> None:
    """Flip the top exponent bit of eight numbers."""
    bits = weight.reshape(-1).view(f"u{weight.itemsize}")
    bits[:: len(bits) // 8] ^= _TOP_EXPONENT_BIT[weight.itemsize]


def swap_heads(weight: NDArray[Any]) -> None:
    """Swap the first two heads of a projection [in, heads·head_dim]."""
    first, second = weight[:, :HEAD_DIM].copy(), weight[:, HEAD_DIM : 2 * HEAD_DIM].copy()
    weight[:, :HEAD_DIM], weight[:, HEAD_DIM : 2 * HEAD_DIM] = second, first


def rotary_base(base: float) -> Callable[[Path], None]:
    """Replace both rotary tables [capacity, head_dim/2] by those of another base."""

    def angles(table: NDArray[Any]) -> NDArray[Any]:
        return np.arange(len(table))[:, None] / base ** (np.arange(0, HEAD_DIM, 2) / HEAD_DIM)

    def damage(bundle: Path) -> None:
        for name, function in (("rope.cos", np.cos), ("rope.sin", np.sin)):
            edit_weight(
                name,
                lambda table, function=function: np.copyto(
                    table, function(angles(table)).astype(table.dtype)
                ),
            )(bundle)

    return damage


def see_beyond(slots: int) -> Callable[[ir.Graph], None]:
    """Let the mask show every token `slots` slots after its own."""

    def edit(graph: ir.Graph) -> None:
        mask = node_of(graph, "mask.causal")
        more = ir.Value(name="more", const_value=ir.Tensor(np.array(slots), name="more"))
        graph.register_initializer(more)
        last = ir.node("Add", [mask.inputs[1], more], name="mask.last")
        last.outputs[0].name = "mask.last"
        graph.insert_before(mask, last)
        mask.replace_input_with(1, last.outputs[0])

    return edit


def set_attribute(output: str, name: str, value: float) -> Callable[[ir.Graph], None]:
    def edit(graph: ir.Graph) -> None:
        node_of(graph, output).attributes[name] = ir.AttrFloat32(name, value)

    return edit


def drop_residual(output: str) -> Callable[[ir.Graph], None]:
    """Leave out the residual stream in the sum that gives this value."""

    def edit(graph: ir.Graph) -> None:
        add = node_of(graph, output)
        assert add.op_type == "Add"
        add.op_type = "Identity"
        add.resize_inputs(2)
        add.replace_input_with(0, add.inputs[1])
        add.resize_inputs(1)

    return edit


def _nan(weight: NDArray[Any]) -> None:
    weight[..., -1] = np.nan


# Each fault, and the array that must differ.
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "corrupted weight": (edit_weight("layers.1.mlp.down.weight", flip_bits), "layers.1.residual"),
    "wrong rotary base": (rotary_base(500.0), "layers.0.key"),
    "swapped key heads": (edit_weight("layers.1.attention.k.weight", swap_heads), "layers.1.key"),
    "swapped value heads": (edit_weight("layers.0.attention.v.weight", swap_heads), "layers.0.value"),
    "one stale slot": (edit_graph(see_beyond(1)), "layers.0.attention"),
    "a stale suffix": (edit_graph(see_beyond(1000)), "layers.0.attention"),
    "wrong softmax scale": (
        edit_graph(set_attribute("layers.1.attention.mixed", "scale", 1.0)),
        "layers.1.attention",
    ),
    "wrong norm epsilon": (
        edit_graph(set_attribute("layers.0.mlp_norm", "epsilon", 1.0)),
        "layers.0.residual",
    ),
    "dropped residual": (edit_graph(drop_residual("layers.1.residual")), "layers.1.residual"),
    "dropped attention residual": (
        edit_graph(drop_residual("layers.1.attention_residual")),
        "layers.1.residual",
    ),
    "not a number": (edit_weight("final_norm.weight", _nan), "logits"),
}


def _double(weight: NDArray[Any]) -> None:
    """Double one number of the tensor."""
    weight.reshape(-1)[weight.size // 2] *= 2


# Faults that only float32 is exact enough to show.
SUBTLE_DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "one doubled number": (edit_weight("layers.1.mlp.down.weight", _double), "layers.1.residual"),
    "rotary base off by a hundredth": (rotary_base(10100.0), "layers.0.key"),
    "softmax scale off by a hundredth": (
        edit_graph(set_attribute("layers.1.attention.mixed", "scale", 1.01 * HEAD_DIM**-0.5)),
        "layers.1.attention",
    ),
    "norm epsilon of another model": (
        edit_graph(set_attribute("layers.0.mlp_norm", "epsilon", 1e-3)),
        "layers.0.residual",
    ),
}
