"""Works out the formulas of a page: arithmetic over names, and nothing else that Python could do."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping

_OPERATORS: Mapping[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_FUNCTIONS: Mapping[str, Callable[..., float]] = {"abs": abs, "ceil": math.ceil, "max": max, "min": min}


def value(formula: str, names: Mapping[str, float], definitions: Mapping[str, str] | None = None) -> float:
    """What `formula` comes to.

    Args:
        formula: as a page has it.
        names: values by name.
        definitions: formulas of names that have no value.

    Raises:
        ValueError: there is more in it than arithmetic.
        KeyError: a name in it means nothing.
    """
    known = definitions or {}

    def of(node: ast.expr) -> float:
        match node:
            case ast.Constant(value=int() | float() as number):
                return number
            case ast.Name(id=name):
                return names[name] if name in names else value(known[name], names, known)
            case ast.BinOp(left=left, op=sign, right=right):
                return _OPERATORS[type(sign)](of(left), of(right))
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
                return _FUNCTIONS[name](*map(of, arguments))
        raise ValueError(f"no arithmetic: {ast.unparse(node)}")

    return of(ast.parse(formula, mode="eval").body)


def names_in(formula: str) -> set[str]:
    """The names a formula asks for, functions apart."""
    found = {node.id for node in ast.walk(ast.parse(formula, mode="eval")) if isinstance(node, ast.Name)}
    return found - _FUNCTIONS.keys()
