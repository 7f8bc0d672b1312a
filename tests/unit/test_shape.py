"""No function is longer than one can see at once, no module longer than one can hold in mind."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LONGEST_FUNCTION = 40  # lines, its docstring apart
LONGEST_MODULE = 500
PACKAGE = "envoy_extproc"
READ_LIKE_IT = ("charts", "docs", "proto", "tests/bench", "tests/fuzz", "tests/support")
GENERATED = ROOT / PACKAGE / "_proto"


def modules(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return sorted(path for path in found if not path.is_relative_to(GENERATED))


def lines(node: ast.stmt) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def functions(source: str) -> Iterator[tuple[str, int]]:
    """Name and length of each, from its `def` to its last line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            documented = ast.get_docstring(node) is not None
            docstring = lines(node.body[0]) if documented else 0
            yield node.name, lines(node) - docstring


@pytest.mark.parametrize(
    ("body", "length"),
    [("    return 1\n", 2), ('    """One."""\n    return 1\n', 2), ('    """One.\n\n    Two.\n    """\n', 1)],
)
def test_a_docstring_makes_no_function_longer(body: str, length: int) -> None:
    assert list(functions(f"def one() -> int:\n{body}")) == [("one", length)]


def test_functions_are_short() -> None:
    found = modules(PACKAGE, *READ_LIKE_IT)
    assert len(found) > 100
    each = [(path, *one) for path in found for one in functions(path.read_text("utf-8"))]
    long = [
        f"{path.relative_to(ROOT)}: {name}: {length} lines"
        for path, name, length in each
        if length > LONGEST_FUNCTION
    ]
    assert long == []


def test_modules_are_short() -> None:
    found = modules(PACKAGE)
    assert len(found) > 60
    lengths = {str(path.relative_to(ROOT)): path.read_text("utf-8").count("\n") for path in found}
    assert {path: length for path, length in lengths.items() if length > LONGEST_MODULE} == {}
