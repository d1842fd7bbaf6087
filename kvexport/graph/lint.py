"""Lint: find what a TensorRT parser or builder does not take of a graph, without any NVIDIA package.

The rules are in `kvexport.graph.lint_rules` and `kvexport.graph.lint_integers`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx
import onnx_ir as ir

from kvexport.graph.lint_integers import check_integer_constant
from kvexport.graph.lint_nodes import Finding, Parser
from kvexport.graph.lint_rules import RULES, check_dtype, check_fused_kernel, check_operator

__all__ = ["Finding", "Parser", "find_unfused_attention", "lint", "refusals"]


def lint(model: ir.Model, parser: Parser) -> list[Finding]:
    """Check a graph, node by node, subgraphs included.

    Nodes that build but run slowly get a finding with `note`. Sizes that an engine fixes (batch, capacity)
    must be numbers, or they are reported as not fixed.
    """
    return [
        *_check_opset(model, parser),
        *(finding for node in _nodes(model) for finding in _check_node(node, model, parser)),
    ]


def refusals(findings: Sequence[Finding]) -> list[Finding]:
    """The findings that prevent a build."""
    return [finding for finding in findings if not finding.note]


def find_unfused_attention(model: ir.Model, parser: Parser) -> list[ir.Node]:
    """Attention nodes that no fused kernel computes: they build only with the attribute TRT_decomposable."""
    return [node for node in _nodes(model) if any(check_fused_kernel(node, parser))]


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    return iter(ir.traversal.RecursiveGraphIterator(model.graph))


def _check_opset(model: ir.Model, parser: Parser) -> Iterator[Finding]:
    newest, opset = parser.capabilities.newest_opset, model.opset_imports.get("", 0)
    if newest is not None and opset > newest:
        problem = f"the graph is of opset {opset}, and {parser} reads {newest} at most"
        yield Finding("", "", problem, "--lowering decomposed17")


def _check_node(node: ir.Node, model: ir.Model, parser: Parser) -> Iterator[Finding]:
    problems = [*check_operator(node, parser), *check_dtype(node, parser)]
    if not problems and not node.domain:
        rule = RULES.get(node.op_type)
        problems = [
            *_check_declared(node, model, parser),
            *check_integer_constant(node, parser),
            *(rule(node, parser) if rule is not None else ()),
        ]
    name = node.name or str(node.outputs[0].name)
    operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    yield from (Finding(name, operator, *each) for each in problems)
    if not problems:
        yield from (Finding(name, operator, *each, note=True) for each in check_fused_kernel(node, parser))


def _check_declared(node: ir.Node, model: ir.Model, parser: Parser) -> Iterator[tuple[str, str]]:
    """The opset that the graph declares must have the operator."""
    opset = model.opset_imports.get("", 0)
    if not parser.capabilities.undeclared_opset and not onnx.defs.has(node.op_type, opset, ""):
        yield f"opset {opset} has no such operator", "declare the opset that has it"
