"""Whether an object of Kubernetes' own APIs has fields that the API does not know, which the server would drop or refuse."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from kubernetes import client

_LIST = re.compile(r"List\[(.+)\]")
_MAP = re.compile(r"Dict\[str, (.+)\]")


def model_of(each: dict[str, Any]) -> str | None:
    """The client's class for an object; None for kinds that are not Kubernetes' own."""
    group, _, version = each["apiVersion"].rpartition("/")
    if group and "." in group and not group.endswith(".k8s.io"):
        return None
    name = f"{version.capitalize()}{each['kind']}"
    return name if hasattr(client, name) and not group.startswith("gateway.") else None


def strays(value: Any, model: str, path: str = "") -> Iterator[str]:
    """Paths of what `model` does not know, or knows as something else."""
    for pattern in (_LIST, _MAP):
        inner = pattern.fullmatch(model)
        if inner is not None:
            yield from _strays_of_many(value, inner[1], path, pattern is _LIST)
            return
    kind = getattr(client, model, None)
    if kind is None:
        if not _is(value, model):
            yield f"{path}: {value!r} is no {model}"
        return
    if not isinstance(value, dict):
        yield f"{path}: {value!r} is no {model}"
        return
    known = {json: kind.openapi_types[python] for python, json in kind.attribute_map.items()}
    for key, each in value.items():
        if key not in known:
            yield f"{path}.{key}: unknown"
        else:
            yield from strays(each, known[key], f"{path}.{key}")


def _strays_of_many(value: Any, model: str, path: str, listed: bool) -> Iterator[str]:
    if not isinstance(value, list if listed else dict):
        yield f"{path}: {value!r} is no {'list' if listed else 'map'}"
        return
    items: Iterable[tuple[Any, Any]] = enumerate(value) if isinstance(value, list) else value.items()
    for key, each in items:
        yield from strays(each, model, f"{path}[{key}]")


def _is(value: Any, model: str) -> bool:
    simple: dict[str, type | tuple[type, ...]] = {
        "str": str,
        "int": int,
        "bool": bool,
        "float": (int, float),
        "datetime": str,
    }
    expected = simple.get(model, object)
    return isinstance(value, expected) and not (isinstance(value, bool) and model in ("int", "float"))
