"""Whether a Kubernetes resource has only fields that its schema knows, of the right type, and all that it must have."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_KNOWN = json.loads(Path(__file__).with_name("fields.json").read_text("utf-8"))
_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "intOrString": (int, str),
}
VERSIONS: Mapping[str, str] = _KNOWN["versions"]


def problems(resource: Mapping[str, Any]) -> list[str]:
    """What is wrong with it, each with its place; empty where nothing is.

    Kubernetes' own schemas tell of names and types alone, not of what is required or enumerated.
    """
    kind = f"{resource.get('apiVersion')} {resource.get('kind')}"
    if kind not in _KNOWN["kinds"]:
        return [f"{kind}: no such kind"]
    return list(_problems(_KNOWN["kinds"][kind], resource, str(resource["kind"])))


def _problems(node: Any, value: Any, place: str) -> Iterator[str]:
    if isinstance(node, Mapping) and "part" in node:
        node = _KNOWN["parts"][node["part"]]
    if isinstance(node, str):
        if node != "any" and (not isinstance(value, _TYPES[node]) or (node != "boolean" and value is True)):
            yield f"{place}: {value!r} is no {node}"
    elif "enum" in node:
        if value not in node["enum"]:
            yield f"{place}: {value!r} is none of {node['enum']}"
    elif not isinstance(value, list if "list" in node else Mapping):
        yield f"{place}: {value!r} is no {'list' if 'list' in node else 'mapping'}"
    else:
        yield from _inside(node, value, place)


def _inside(node: Mapping[str, Any], value: Any, place: str) -> Iterator[str]:
    if "list" in node:
        for number, each in enumerate(value):
            yield from _problems(node["list"], each, f"{place}[{number}]")
    elif "map" in node:
        for name, each in value.items():
            yield from _problems(node["map"], each, f"{place}.{name}")
    else:
        yield from _members(node, value, place)


def _members(node: Mapping[str, Any], value: Mapping[str, Any], place: str) -> Iterator[str]:
    for name in node.get("required", ()):
        if name not in value:
            yield f"{place}: {name} is missing"
    for name, each in value.items():
        if name in node["fields"]:
            yield from _problems(node["fields"][name], each, f"{place}.{name}")
        else:
            yield f"{place}: no field {name}"
