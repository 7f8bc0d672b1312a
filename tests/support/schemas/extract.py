"""Writes fields.json: which fields the resources of Gateway API, Envoy Gateway and Kubernetes have, and of what type.

    python tests/support/schemas/extract.py GATEWAY_API_REPOSITORY ENVOY_GATEWAY_REPOSITORY

The first two are git repositories, read at the tags below; Kubernetes' own is read from the package `kubernetes`. Of
each schema names, types, enumerations and what is required are kept, nothing that anybody wrote about them. Equal parts
stand once, under `parts`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import kubernetes.client
import yaml

OUTPUT = Path(__file__).with_name("fields.json")
GATEWAY_API = "v1.6.1"
ENVOY_GATEWAY = "v1.9.0"
_GATEWAY_API_KINDS = ("gatewayclasses", "gateways", "httproutes", "referencegrants")
_ENVOY_GATEWAY_KINDS = (
    "backendtrafficpolicies",
    "clienttrafficpolicies",
    "envoyextensionpolicies",
    "envoypatchpolicies",
    "envoyproxies",
)
_KUBERNETES_KINDS = {"V1Deployment": "apps/v1", "V1Service": "v1", "V1ConfigMap": "v1", "V1Namespace": "v1"}
_DEEP = ("initContainers", "pod")
_PLAIN = {
    "str": "string",
    "bytes": "string",
    "int": "integer",
    "bool": "boolean",
    "float": "number",
    "datetime": "string",
}

Node = Any


def main(gateway_api: str, envoy_gateway: str) -> None:
    """Reads all of it and writes the file."""
    kinds: dict[str, Node] = {}
    for plural in _GATEWAY_API_KINDS:
        path = f"config/crd/standard/gateway.networking.k8s.io_{plural}.yaml"
        kinds |= _crd(_show(gateway_api, GATEWAY_API, path))
    for plural in _ENVOY_GATEWAY_KINDS:
        path = f"charts/gateway-helm/charts/crds/crds/generated/gateway.envoyproxy.io_{plural}.yaml"
        kinds |= _crd(_show(envoy_gateway, ENVOY_GATEWAY, path))
    api = _show(envoy_gateway, ENVOY_GATEWAY, "site/content/en/latest/api/extension_types.md")
    kinds["gateway.envoyproxy.io/v1alpha1 EnvoyGateway"] = _documented(_tables(api), "EnvoyGateway", ())
    for model, version in _KUBERNETES_KINDS.items():
        kinds[f"{version} {model[2:]}"] = _model(model, ())
    versions = {
        "gateway-api": GATEWAY_API,
        "envoy-gateway": ENVOY_GATEWAY,
        "kubernetes": str(kubernetes.__version__),
    }
    parts, shared = _share(kinds)
    text = json.dumps({"versions": versions, "parts": parts, "kinds": shared}, separators=(",", ":"))
    OUTPUT.write_text(text.replace('},"', '},\n"') + "\n", "utf-8")


def _show(repository: str, tag: str, path: str) -> str:
    command = ["git", "-C", repository, "show", f"{tag}:{path}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


# -- custom resources ------------------------------------------------------------------------------------------------------


def _crd(text: str) -> dict[str, Node]:
    """The stored version of each definition in a file."""
    found = {}
    for document in filter(None, yaml.safe_load_all(text)):
        if document["kind"] != "CustomResourceDefinition":
            continue
        spec = document["spec"]
        (version,) = [each for each in spec["versions"] if each.get("storage")]
        schema = version["schema"]["openAPIV3Schema"]
        schema["properties"].pop("status", None)
        found[f"{spec['group']}/{version['name']} {spec['names']['kind']}"] = _schema(schema, ())
    return found


def _schema(schema: Mapping[str, Any], path: tuple[str, ...]) -> Node:
    if schema.get("x-kubernetes-int-or-string"):
        return "intOrString"
    if "enum" in schema:
        return {"enum": schema["enum"]}
    if schema.get("type") == "array":
        return {"list": _schema(schema["items"], path)}
    if "properties" in schema:
        inner = {name: _inner(name, each, path) for name, each in schema["properties"].items()}
        return _object(inner, schema.get("required", ()))
    if isinstance(schema.get("additionalProperties"), Mapping):
        return {"map": _schema(schema["additionalProperties"], path)}
    kind = schema.get("type")
    return "any" if kind in (None, "object") else str(kind)


def _inner(name: str, schema: Mapping[str, Any], path: tuple[str, ...]) -> Node:
    """A member's schema; of the pods that EnvoyProxy describes nothing but the image."""
    if path[-1:] == ("envoyDeployment",):
        if name == "container":
            return _object(dict.fromkeys(schema["properties"], "any") | {"image": "string"}, ())
        if name in _DEEP:
            return "any"
    return "any" if name == "envoyDaemonSet" else _schema(schema, (*path, name))


def _object(fields: Mapping[str, Node], required: Iterable[str]) -> Node:
    wanted = sorted(required)
    return {"fields": dict(fields), "required": wanted} if wanted else {"fields": dict(fields)}


# -- Kubernetes' own -------------------------------------------------------------------------------------------------------


def _model(name: str, seen: tuple[str, ...]) -> Node:
    kind = getattr(kubernetes.client, name)
    attributes = kind.attribute_map
    return {
        "fields": {
            attributes[ours]: _typed(type_, (*seen, name))
            for ours, type_ in kind.openapi_types.items()
            if ours not in ("status", "managed_fields")
        }
    }


def _typed(text: str, seen: tuple[str, ...]) -> Node:
    """A type as the package writes it: `List[V1Container]`, `Dict[str, str]`."""
    if match := re.fullmatch(r"List\[(.*)\]", text):
        return {"list": _typed(match[1], seen)}
    if match := re.fullmatch(r"Dict\[str, (.*)\]", text):
        return {"map": _typed(match[1], seen)}
    if text in _PLAIN:
        return _PLAIN[text]
    if text == "object" or text in seen:
        return "any"
    return _model(text, seen)


# -- Envoy Gateway's own configuration, which is no custom resource --------------------------------------------------------


def _tables(text: str) -> Mapping[str, Mapping[str, str]]:
    """Each type's fields and the name of their type, from the reference pages' tables."""
    found = {}
    for section in re.split(r"^#### ", text, flags=re.MULTILINE)[1:]:
        name = section.split("\n", 1)[0].strip()
        rows = re.findall(r"^\| `(\w+)` \| _(.+?)_ \|", section, flags=re.MULTILINE)
        found[name] = {field: re.sub(r"\[(.*?)\]\(.*?\)", r"\1", kind) for field, kind in rows}
    return found


def _documented(tables: Mapping[str, Mapping[str, str]], name: str, seen: tuple[str, ...]) -> Node:
    if name in _PLAIN.values():
        return name
    if name in seen or not tables.get(name):
        return "any"
    inner = {field: _documented(tables, kind, (*seen, name)) for field, kind in tables[name].items()}
    return {"fields": inner}


# -- writing ---------------------------------------------------------------------------------------------------------------


def _share(kinds: Mapping[str, Node]) -> tuple[dict[str, Node], dict[str, Node]]:
    """Takes out objects that stand in several places; `{"part": number}` stands for them."""
    counts: Counter[str] = Counter()

    def count(node: Node) -> None:
        if isinstance(node, Mapping):
            text = json.dumps(node, sort_keys=True)
            counts[text] += 1
            if counts[text] == 1:
                for each in _children(node):
                    count(each)

    for node in kinds.values():
        count(node)
    numbers: dict[str, str] = {}
    parts: dict[str, Node] = {}

    def shared(node: Node, *, top: bool = False) -> Node:
        if not isinstance(node, Mapping):
            return node
        text = json.dumps(node, sort_keys=True)
        if not top and counts[text] > 1 and len(text) > 60:
            if text not in numbers:
                numbers[text] = str(len(numbers))
                parts[numbers[text]] = _mapped(node, shared)
            return {"part": numbers[text]}
        return _mapped(node, shared)

    made = {name: shared(node, top=True) for name, node in sorted(kinds.items())}
    return parts, made


def _children(node: Mapping[str, Any]) -> Iterable[Node]:
    if "fields" in node:
        yield from node["fields"].values()
    yield from (node[each] for each in ("list", "map") if each in node)


def _mapped(node: Mapping[str, Any], change: Any) -> Node:
    mapped = dict(node)
    for each in ("list", "map"):
        if each in mapped:
            mapped[each] = change(mapped[each])
    if "fields" in mapped:
        mapped["fields"] = {name: change(each) for name, each in sorted(mapped["fields"].items())}
    return mapped


if __name__ == "__main__":
    main(*sys.argv[1:])
