"""What helm takes as values: all that there is, and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from charts import generate
from charts.values import Values
from envoy_extproc.settings import Settings
from tests.support import helm
from tests.support.helm import Json

SCHEMA = json.loads((helm.CHART / "values.schema.json").read_text("utf-8"))
VALUES = yaml.safe_load((helm.CHART / "values.yaml").read_text("utf-8"))


def test_what_is_generated_is_up_to_date() -> None:
    assert generate.stale() == []


def test_a_file_that_was_edited_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    edited = generate._CHART / "values.yaml"
    monkeypatch.setattr(generate, "FILES", {edited: lambda: "something else", tmp_path / "gone": str})
    monkeypatch.setattr(generate, "_ROOT", Path("/"))
    assert len(generate.stale()) == 2


def test_the_defaults_are_what_the_schema_allows() -> None:
    Values.model_validate(VALUES)
    assert json.loads(helm.run("helm", "lint", "--strict", str(helm.CHART), "--quiet") or "{}") == {}


def _resolved(node: Json) -> Json:
    """What stands behind a reference, also behind one that may be null."""
    for each in (node, *node.get("anyOf", ())):
        if "$ref" in each:
            found: Json = SCHEMA["$defs"][each["$ref"].rpartition("/")[2]]
            return found
    return node


def _keys(model: Any, schema: Json, path: str) -> Iterator[tuple[str, bool]]:
    """Each key of the settings, and whether the schema has it."""
    properties = _resolved(schema)["properties"]
    for name, field in model.model_fields.items():
        yield f"{path}.{name}", name in properties
        kind = field.annotation
        if name in properties and isinstance(kind, type) and hasattr(kind, "model_fields"):
            yield from _keys(kind, properties[name], f"{path}.{name}")


def test_every_key_of_the_configuration_is_in_the_schema() -> None:
    keys = dict(_keys(Settings, SCHEMA["properties"]["config"], "config"))
    assert len(keys) > 40
    assert [name for name, there in keys.items() if not there] == []


def _paths(values: Json, prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _paths(value, f"{prefix}{key}.")


def test_every_value_is_in_the_table() -> None:
    page = (Path(generate.__file__).parents[1] / "docs" / "helm.md").read_text("utf-8")
    told = set(re.findall(r"^\| (?:\*\*)?`([^`]+)`(?:\*\*)? \|", page, re.MULTILINE))
    leaves = {"requests", "limits"}  # maps that are Kubernetes' own
    within = {path for path in told if path.rpartition(".")[2] in leaves} | {
        "securityContext",
        "podSecurityContext",
        "dashboard.labels",
        "envoy.resources",
    }
    written = {path for path in _paths(VALUES) if not any(path.startswith(f"{each}.") for each in within)}
    assert told == written


def test_every_value_has_its_reason() -> None:
    rows = [(prefix, text) for prefix, text in _reasons(Values())]
    assert [name for name, text in rows if len(text) < 5] == []


def _reasons(values: Any) -> Iterator[tuple[str, str]]:
    for name, text, value in generate._fields(values):
        yield name, text
        if hasattr(value, "model_fields_set"):
            yield from _reasons(value)


@pytest.mark.parametrize(
    "values",
    [
        {"replica": 3},
        {"replicas": 0},
        {"replicas": "two"},
        {"image": {"digest": "sha256:short"}},
        {"image": {"pullPolicy": "Sometimes"}},
        {"autoscaling": {"cpu": 70}},
        {"config": {"sever": {}}},
        {"config": {"server": {"lisen": "0.0.0.0:1"}}},
        {"config": {"server": {"drain_seconds": -1}}},
        {"config": {"routing": {"tries": 11}}},
        {"config": {"routing": {"breaker": {"enable": True}}}},
        {"config": {"discovery": {"kubernetes": {"namespace": "a"}}}},
        {"config": {"responses": {"accounting": "lua"}}},
        {"config": {"models": {"m": {"polcy": "random"}}}},
        {"config": {"envoy": {"fail_open": "maybe"}}},
        {"envoyGateway": {"models": [{"name": "m"}]}},
        {"envoy": {"serviceType": "ExternalName"}},
        {"envoy": {"services": [{"name": "llama"}]}},
    ],
    ids=json.dumps,
)
def test_what_is_misspelt_or_out_of_bounds_is_refused(values: Json) -> None:
    with pytest.raises(helm.HelmError, match="values don't meet the specifications of the schema"):
        helm.template(values)


def test_as_a_subchart_it_is_given_globals() -> None:
    assert helm.template({"global": {"region": "a"}}) == helm.template()
