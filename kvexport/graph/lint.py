"""Lint: names what a TensorRT parser or builder would refuse of a graph, before it is asked to build it.

Knows how rules are put to a graph; the rules themselves are in `lint_rules`. Works without any NVIDIA package.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx
import onnx_ir as ir

from kvexport.graph.lint_rules import RULES, Finding, Parser, dtype, newest_opset, operator, unfused

__all__ = ["Finding", "Parser", "lint", "refusals", "unfused_attention"]


def lint(model: ir.Model, parser: Parser) -> list[Finding]:
    """What `parser` refuses of the graph, node by node, and notes of what it does only slowly.

    The sizes that an engine fixes (batch, capacity) must be fixed already, or they are found to be open.
    """
    return [
        *_opset(model, parser),
        *(finding for node in _nodes(model) for finding in _node(node, model, parser)),
    ]


def refusals(findings: Sequence[Finding]) -> list[Finding]:
    """Those for which nothing would be built."""
    return [finding for finding in findings if not finding.note]


def unfused_attention(model: ir.Model, parser: Parser) -> list[ir.Node]:
    """Attention nodes that build only where they may be decomposed."""
    return [node for node in _nodes(model) if any(unfused(node, parser))]


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    return iter(ir.traversal.RecursiveGraphIterator(model.graph))


def _opset(model: ir.Model, parser: Parser) -> Iterator[Finding]:
    newest, opset = newest_opset(parser), model.opset_imports.get("", 0)
    if newest is not None and opset > newest:
        yield Finding(
            "",
            "",
            f"the graph is of opset {opset}, and {parser} reads {newest} at most",
            "--lowering decomposed17",
        )


def _node(node: ir.Node, model: ir.Model, parser: Parser) -> Iterator[Finding]:
    said = [*operator(node, parser), *dtype(node, parser)]
    if not said and not node.domain:
        said = [
            *_declared(node, model, parser),
            *(RULES[node.op_type](node, parser) if node.op_type in RULES else ()),
        ]
    name, kind = (
        node.name or str(node.outputs[0].name),
        f"{node.domain}.{node.op_type}" if node.domain else node.op_type,
    )
    yield from (Finding(name, kind, *each) for each in said)
    if not said:
        yield from (Finding(name, kind, *each, note=True) for each in unfused(node, parser))


def _declared(node: ir.Node, model: ir.Model, parser: Parser) -> Iterator[tuple[str, str]]:
    """An operator newer than the opset that the graph declares. TensorRT-RTX does not mind."""
    opset = model.opset_imports.get("", 0)
    if not parser.rtx and not onnx.defs.has(node.op_type, opset, ""):
        yield f"opset {opset} has no such operator", "declare the opset that has it"
