"""docs/engines.md says of every engine what its dialect says."""

from __future__ import annotations

import pathlib
import runpy

import pytest
import yaml

from envoy_extproc.engines.dialects import ALIASES, ENGINES, dialects
from envoy_extproc.engines.formulas import FIELDS

DOCS = pathlib.Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "engines.md").read_text("utf-8")


def test_the_tables_are_those_of_the_dialects() -> None:
    pages = runpy.run_path(str(DOCS / "generate.py"))["PAGES"]
    assert pages["engines.md"]() == PAGE
    told = sum(len(dialect.sources) for dialect in ENGINES.values())
    tables = PAGE.partition("<!-- tables")[2].partition("<!-- end")[0]
    assert sum(line.startswith("| `") for line in tables.splitlines()) == told > 60


@pytest.mark.parametrize("engine", ENGINES)
def test_where_an_engine_is_asked(engine: str) -> None:
    dialect = ENGINES[engine]
    row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{engine}` |"))
    _, _, page, models, _, others, _ = (cell.strip() for cell in row.split("|"))
    port = f" on port {dialect.port}" if dialect.port else ""
    assert page == (f"`{dialect.path}`{port}" if dialect.sources else "")
    assert models == (f"`{dialect.models_path}`" if dialect.models_path else "")
    assert {name.strip("` ") for name in others.split(",") if name} == {
        alias for alias, name in ALIASES.items() if name == engine
    }


def test_every_field_has_its_meaning() -> None:
    meanings = PAGE.partition("## What is read")[2].partition("<!-- tables")[0]
    assert [field for field in FIELDS if f"`{field}`" not in meanings] == []


def test_the_example_is_a_valid_one() -> None:
    example = yaml.safe_load(PAGE.partition("```yaml\n")[2].partition("```")[0])
    made = dialects(example["engines"]["dialects"])
    assert str(made["my-engine"].sources["waiting"]) == "my:queue"
    assert "utilization" not in made["my-engine"].sources
