"""Arithmetic expressions over config.json, by which family descriptions derive settings.

An expression has numbers, keys of config.json ("hidden_size", "attn_config.clip_qkv"), + - * / ** and
parentheses. A plain key stands for its value, of any type, and a plain number for itself.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from kvexport.errors import CheckpointError, UsageError

_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}


def evaluate(expression: str, config: Mapping[str, Any]) -> Any:
    """The value of an expression; None if a key of it is absent or null.

    Raises:
        UsageError: it is not an expression.
        CheckpointError: a value that it computes with is not a number, or the result is not finite.
    """
    node = _parse(expression)
    if isinstance(node, (ast.Name, ast.Attribute)):
        return _lookup(node, config)
    if isinstance(node, ast.Constant):
        return node.value
    keys = [each for each in ast.walk(node) if isinstance(each, (ast.Name, ast.Attribute))]
    outermost = [each for each in keys if not any(each is getattr(other, "value", None) for other in keys)]
    values = {ast.unparse(each): _lookup(each, config) for each in outermost}
    if None in values.values():
        return None
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e300:
            raise CheckpointError(f"{key} in config.json must be a number", got=f"{value!r:.60}")
    try:
        result = float(_compute(node, values))
    except (ArithmeticError, TypeError, ValueError):  # a negative number to a broken power is complex
        result = math.nan
    if not math.isfinite(result):
        got = ", ".join(f"{key} = {value!r:.40}" for key, value in values.items())
        raise CheckpointError(f"{expression} must be a finite number with config.json's values", got=got)
    return result


def keys_of(expression: str) -> list[str]:
    """The keys of config.json that an expression names.

    Raises:
        UsageError: it is not an expression.
    """
    return [ast.unparse(each) for each in ast.walk(_parse(expression)) if isinstance(each, ast.Name)]


@cache
def _parse(expression: str) -> ast.expr:
    try:
        node = ast.parse(expression, mode="eval").body
        _require_arithmetic(node)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # the last two: nested deeply
        raise UsageError(
            "an expression must consist of keys, numbers, + - * / ** and parentheses", got=repr(expression)
        ) from error
    return node


def _require_arithmetic(node: ast.expr) -> None:
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        _require_arithmetic(node.left)
        _require_arithmetic(node.right)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        _require_arithmetic(node.operand)
    elif isinstance(node, ast.Attribute):
        _require_arithmetic(node.value)
    elif not (
        isinstance(node, ast.Name) or (isinstance(node, ast.Constant) and type(node.value) in (int, float))
    ):
        raise ValueError(ast.unparse(node))


def _lookup(node: ast.expr, config: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Attribute):
        inner = _lookup(node.value, config)
        return inner.get(node.attr) if isinstance(inner, Mapping) else None
    assert isinstance(node, ast.Name)
    return config.get(node.id)


def _compute(node: ast.expr, values: Mapping[str, float]) -> float:
    if isinstance(node, ast.BinOp):
        result: float = _OPERATORS[type(node.op)](
            float(_compute(node.left, values)), float(_compute(node.right, values))
        )
        return result
    if isinstance(node, ast.UnaryOp):
        return -_compute(node.operand, values)
    if isinstance(node, ast.Constant):
        return float(node.value)  # type: ignore[arg-type]
    return values[ast.unparse(node)]
