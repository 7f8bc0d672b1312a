"""Writes what docs/ says of the code: configuration.md, apis.md, and the tables of metrics in engines.md.

`--check` compares instead, and exits 1 if a page is out of date.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from envoy_extproc import settings
from envoy_extproc.engines import dialects
from envoy_extproc.openai import routes

_HERE = Path(__file__).parent
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

This page is written by `make docs` from `envoy_extproc/settings/`.
"""


def configuration() -> str:
    """The page about the settings."""
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
        if name == "kubernetes":
            yield from _rows(settings.KubernetesSource, "kubernetes.")
            continue
        if name == "tls":
            yield from _rows(settings.Tls, "tls.")
            continue
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _rows(field.annotation, f"{prefix}{name}.")
            continue
        default = "" if field.is_required() else _yaml(field.get_default(call_default_factory=True))
        yield f"| `{prefix}{name}` | {f'`{default}`' if default else ''} | {' '.join((field.description or '').split())} |"


def _yaml(value: object) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    return str(yaml.safe_dump(plain, default_flow_style=True)).removesuffix("...\n").strip()


_APIS = """# APIs

What passes through the gateway, how it is routed, and where its tokens come from. A query string and a prefix before the
path change nothing. A path that is not here passes to a ready pod untouched, whatever its body is: of the model in the header
`x-model`, else of the only model, else any.

**Routed** says what names the model: a member of the JSON body, or a field of the form, whose file is stepped over; where the API
can do without one, so can we: then `x-model` counts, as for unknown paths. **Usage**: *asked for* means that the engine
writes none into a stream unless `stream_options.include_usage` is on, so it is switched on and hidden again from a client that
did not ask; *reported* that it comes by itself, in JSON and in streams; *nothing* that nothing is generated, and the answer is not
read. Where an engine reports nothing, tokens are estimated and marked so. Of audio and subtitles, which have no tokens to read,
the prompt alone is counted. **Streamed** says whether the answer can be an event stream; its first token and the pace of the others are measured.

| API | routed by | usage | streamed | {engines} |
|---|---|---|---|{rules}|
{rows}
| `GET /v1/models` | answered here | nothing | | {all_of_them} |

*served*: by the engine's own server (Triton: by its OpenAI front end). vLLM serves speech and images with its omni models.

`GET /v1/models` is the union of what the ready pods serve, each entry as the engine itself writes it, LoRA adapters with their
parents; `GET /v1/models/{{name}}` one of them. Adapters that an engine lists are routed to the pods that have them, from about
`engines.models_interval_ms` after they were loaded.

Conversations kept in an engine (`previous_response_id`, `GET /v1/responses/{{id}}`) live in one pod: with more than one, pin them
or keep the conversation in the client.

This page is written by `make docs` from `envoy_extproc/openai/routes.py`; `tests/e2e/test_apis.py` sends a request down every row in both lanes.
"""

_ENGINES = {
    routes.VLLM: "vLLM",
    routes.SGLANG: "SGLang",
    routes.TRTLLM: "TensorRT-LLM",
    routes.LLAMACPP: "llama.cpp",
    routes.TRITON: "Triton",
}
_USAGE = {
    routes.Accounting.ASKED: "asked for",
    routes.Accounting.ITSELF: "reported",
    routes.Accounting.NOTHING: "nothing",
}


def apis() -> str:
    """The page about the paths."""
    return _APIS.format(
        engines=" | ".join(_ENGINES.values()),
        rules="---|" * len(_ENGINES),
        rows="\n".join(map(_api, routes.ROUTES)),
        all_of_them=" | ".join("served" for _ in _ENGINES),
    ).replace("||\n", "|\n")


def _api(route: routes.Route) -> str:
    paths = "<br>".join(f"`{path}`" for path in (route.path, *route.aliases))
    body = "form" if route.body is routes.Body.FORM else "JSON"
    routed = f"`model` in {body}" if route.needs_model else f"`model` in {body}, or none"
    streamed = "yes" if route.streams else ""
    served = " | ".join("served" if engine in route.engines else "" for engine in _ENGINES)
    return f"| {paths} | {routed} | {_USAGE[route.accounting]} | {streamed} | {served} |"


_TABLES = (
    "<!-- tables: written by `make docs` from envoy_extproc/engines/dialects.py -->\n",
    "<!-- end of tables -->\n",
)


def engines() -> str:
    """The page about engines: its text as it stands, its tables anew."""
    begin, end = _TABLES
    head, _, rest = (_HERE / "engines.md").read_text(encoding="utf-8").partition(begin)
    told = {name: dialect for name, dialect in dialects.ENGINES.items() if dialect.sources}
    tables = "\n".join(_engine(name, dialect) for name, dialect in told.items())
    return f"{head}{begin}\n{tables}\n{end}{rest.partition(end)[2]}"


def _engine(name: str, dialect: dialects.Dialect) -> str:
    rows = (f"| `{field}` | {_formulas(str(source))} |" for field, source in dialect.sources.items())
    return "\n".join([f"### {name}", "", "| field | formula |", "|---|---|", *rows, ""])


def _formulas(text: str) -> str:
    return ", else ".join(f"`{formula}`" for formula in text.split(", else "))


PAGES: Mapping[str, Callable[[], str]] = {
    "configuration.md": configuration,
    "apis.md": apis,
    "engines.md": engines,
}


def main() -> int:
    """Writes or checks."""
    stale = []
    for name, page in PAGES.items():
        path, text = _HERE / name, page()
        if "--check" not in sys.argv[1:]:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
    if stale:
        print(f"{', '.join(stale)}: out of date: run `make docs`")
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
