"""Writes docs/configuration.md from the settings, so that keys, defaults and reasons stand in one place.

`--check` compares instead, and exits 1 if the page is out of date.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from envoy_extproc import settings

PAGE = Path(__file__).with_name("configuration.md")
_HEAD = """# Configuration

One YAML file, `-c FILE`. Every key can also come from the environment as `ENVOY_EXTPROC_<SECTION>__<KEY>`
(`ENVOY_EXTPROC_ROUTING__POLICY=random`), which wins over the file. An unknown key, in either, is an error that names it.
Variables without `__` that name no whole section, such as Kubernetes' `ENVOY_EXTPROC_SERVICE_HOST` for a Service called
`envoy-extproc`, are ignored.
`envoy-extproc config check -c FILE` says what a file means, or what is wrong with it.

```yaml
discovery:
  static:
    endpoints:
    - {name: pod-a, address: "10.0.0.1:8000", models: [llama-3-8b], engine: vllm, labels: {gpu: a10}}
```

This page is written by `make docs` from `envoy_extproc/settings.py`.
"""


def page() -> str:
    """The whole page."""
    sections = (_section(name, field) for name, field in settings.Settings.model_fields.items())
    return "\n".join([_HEAD, *sections])


def _section(name: str, field: FieldInfo) -> str:
    model = settings.Model if name == "models" else field.annotation
    assert isinstance(model, type)
    assert issubclass(model, BaseModel)
    title = "models.<name>" if name == "models" else name
    rows = list(_rows(model, ""))
    table = ["| key | default | |", "|---|---|---|", *rows] if rows else []
    return "\n".join([f"## {title}", "", (model.__doc__ or "").strip(), "", *table, *([""] if table else [])])


def _rows(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        if name == "static":
            yield from _rows(settings.StaticSource, "static.")
            continue
        default = "" if field.is_required() else _yaml(field.default)
        yield f"| `{prefix}{name}` | {f'`{default}`' if default else ''} | {' '.join((field.description or '').split())} |"


def _yaml(value: object) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    return str(yaml.safe_dump(plain, default_flow_style=True)).removesuffix("...\n").strip()


def main() -> int:
    """Writes or checks."""
    text = page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if PAGE.read_text(encoding="utf-8") == text:
        return 0
    print(f"{PAGE.name} is out of date: run `make docs`")
    return 1


if __name__ == "__main__":
    sys.exit(main())
