"""Writes what the chart takes from the code.

That is values.yaml and its schema, native.lua, Envoy's bootstrap, the dashboard, and the table in docs/helm.md. Run it as `python -m charts.generate`; with `--check` it compares instead, and exits 1 if a file is out of date.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from charts import dashboard
from charts.values import Values
from envoy_extproc.envoy.bootstrap import BootstrapOptions, as_dict, native_lua
from envoy_extproc.settings import Settings

_ROOT = Path(__file__).parent.parent
_CHART = _ROOT / "charts" / "envoy-extproc"
_MADE = "Written by `python -m charts.generate` from "


def values_yaml() -> str:
    """The defaults, each with its reason."""
    head = f"# {_MADE}charts/values.py. docs/helm.md has the same as a table.\n\n"
    return head + "\n".join(_lines(Values(), 0)) + "\n"


def _lines(values: BaseModel, indent: int) -> Iterator[str]:
    pad = " " * indent
    for name, text, value in _fields(values):
        yield from (f"{pad}# {line}" for line in textwrap.wrap(text, 110 - indent))
        if isinstance(value, BaseModel):
            yield f"{pad}{name}:"
            yield from _lines(value, indent + 2)
        else:
            dumped = yaml.safe_dump({name: value}, sort_keys=False, width=110)
            yield from textwrap.indent(dumped, pad).splitlines()


def _fields(values: BaseModel) -> Iterator[tuple[str, str, Any]]:
    """Name, reason and default of each; a section's reason is its docstring."""
    for attribute, field in type(values).model_fields.items():
        value = getattr(values, attribute)
        text = field.description or (value.__doc__ if isinstance(value, BaseModel) else "")
        if field.alias != "global":
            yield field.alias or attribute, " ".join((text or "").split()), value


def schema() -> str:
    """The schema of the values. In `config` an unknown key is refused as the server would refuse it."""
    made: dict[str, Any] = Values.model_json_schema(by_alias=True)
    # Both have sections of one name, Tls for example, so those of the configuration get another.
    config: dict[str, Any] = Settings.model_json_schema(ref_template="#/$defs/Config{model}")
    made["$defs"] |= {f"Config{name}": each for name, each in config.pop("$defs").items()}
    del config["required"]  # the chart sets `discovery` where it is left out
    made["properties"]["config"] = config
    made["$schema"] = "http://json-schema.org/draft-07/schema#"
    return json.dumps(_without_titles(made), indent=2) + "\n"


def _without_titles(node: Any) -> Any:
    """What pydantic makes of a field's name says nothing."""
    if isinstance(node, list):
        return [_without_titles(each) for each in node]
    if not isinstance(node, dict):
        return node
    return {key: _without_titles(each) for key, each in node.items() if not _is_title(key, each)}


def _is_title(key: str, value: Any) -> bool:
    return key == "title" and isinstance(value, str)


def bootstrap() -> str:
    """The bootstrap of `config envoy`, with a mark where the chart's template writes what it knows."""
    made = as_dict(_OPTIONS)
    (listener,) = made["static_resources"]["listeners"]
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    lua, ext_proc, _ = (each["typed_config"] for each in manager["http_filters"])
    lua["default_source_code"] = {"filename": "/etc/envoy/native.lua"}
    ext_proc |= {"failure_mode_allow": "__FAIL_OPEN__", "message_timeout": "__MESSAGE_TIMEOUT__"}
    host = manager["route_config"]["virtual_hosts"][0]
    host["request_body_buffer_limit"] = "__MAX_BODY_BYTES__"
    host["routes"][0]["route"]["retry_policy"]["num_retries"] = "__RETRIES__"
    pods, *servers = made["static_resources"]["clusters"]
    # A pod is known a second after DNS knows it, which for a headless Service is when it is ready.
    pods |= {"type": "STRICT_DNS", "dns_refresh_rate": "1s", "load_assignment": "__PODS__"}
    for cluster in servers:
        cluster["load_assignment"]["endpoints"] = "__SERVERS__"
    made["static_resources"]["listeners"].append(_STATS)
    made["static_resources"]["clusters"].append(_ADMIN)
    head = f"# {_MADE}envoy_extproc/envoy/bootstrap.py.\n"
    return head + yaml.safe_dump(made, sort_keys=False, width=110)


_OPTIONS = BootstrapOptions(
    listen="0.0.0.0:8080",
    admin="127.0.0.1:9901",
    servers=("first:9002", "second:9002"),  # several, so that each of them may be left alone
    endpoints=(),
    fail_open=True,
    max_body_bytes=0,
)

_ADMIN = {
    "name": "admin",
    "type": "STATIC",
    "load_assignment": {
        "cluster_name": "admin",
        "endpoints": [
            {
                "lb_endpoints": [
                    {
                        "endpoint": {
                            "address": {"socket_address": {"address": "127.0.0.1", "port_value": 9901}}
                        }
                    }
                ]
            }
        ],
    },
}

_STATS = {  # what of the admin port others may see: it could also stop Envoy
    "name": "stats",
    "address": {"socket_address": {"address": "0.0.0.0", "port_value": 9902}},  # noqa: S104  a container's port
    "filter_chains": [
        {
            "filters": [
                {
                    "name": "envoy.filters.network.http_connection_manager",
                    "typed_config": {
                        "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3"
                        ".HttpConnectionManager",
                        "stat_prefix": "stats",
                        "route_config": {
                            "name": "stats",
                            "virtual_hosts": [
                                {
                                    "name": "stats",
                                    "domains": ["*"],
                                    "routes": [
                                        {"match": {"path": path}, "route": {"cluster": "admin"}}
                                        for path in ("/ready", "/stats/prometheus")
                                    ],
                                }
                            ],
                        },
                        "http_filters": [
                            {
                                "name": "envoy.filters.http.router",
                                "typed_config": {
                                    "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"
                                },
                            }
                        ],
                    },
                }
            ]
        }
    ],
}

_TABLE = (
    "<!-- values: written by `python -m charts.generate` from charts/values.py -->\n",
    "<!-- end of values -->\n",
)


def page() -> str:
    """The page about the chart: its text as it stands, its table anew."""
    begin, end = _TABLE
    head, _, rest = (_ROOT / "docs" / "helm.md").read_text(encoding="utf-8").partition(begin)
    rows = "\n".join(_rows(Values(), ""))
    return f"{head}{begin}\n| value | default | |\n|---|---|---|\n{rows}\n\n{end}{rest.partition(end)[2]}"


def _rows(values: BaseModel, prefix: str) -> Iterator[str]:
    for name, text, value in _fields(values):
        if isinstance(value, BaseModel):
            yield f"| **`{prefix}{name}`** | | {text} |"
            yield from _rows(value, f"{prefix}{name}.")
        else:
            yield f"| `{prefix}{name}` | `{json.dumps(value)}` | {text} |"


FILES: Mapping[Path, Callable[[], str]] = {
    _CHART / "values.yaml": values_yaml,
    _CHART / "values.schema.json": schema,
    _CHART / "files" / "native.lua": native_lua,
    _CHART / "files" / "bootstrap.yaml": bootstrap,
    _CHART / "files" / "dashboard.json": dashboard.text,
    _ROOT / "docs" / "helm.md": page,
}


def stale() -> list[str]:
    """Files that are not as they would be written now, by their paths in the project."""
    return [
        str(path.relative_to(_ROOT))
        for path, made in FILES.items()
        if not path.exists() or path.read_text(encoding="utf-8") != made()
    ]


def main() -> int:
    """Writes or checks."""
    if "--check" in sys.argv[1:]:
        names = stale()
        if names:
            print(f"{', '.join(names)}: out of date: run `python -m charts.generate`")  # noqa: T201  a script
        return int(bool(names))
    for path, made in FILES.items():
        path.write_text(made(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
