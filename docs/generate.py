"""Writes what docs/ says of the code: configuration.md, apis.md, the tables of metrics in engines.md, of policies in routing.md.

`--check` compares instead, and exits 1 if a page is out of date.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from envoy_extproc import mixes, settings
from envoy_extproc.endpoints import Endpoint, EngineStats
from envoy_extproc.engines import dialects
from envoy_extproc.openai import routes
from envoy_extproc.openai.prompt import TOKEN_BYTES, Prompt
from envoy_extproc.scheduling import guide, registry
from envoy_extproc.scheduling.interfaces import Candidate, Decision, SchedulingRequest, Standing
from envoy_extproc.scheduling.profile import totals

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


def engines() -> str:
    """The page about engines: its text as it stands, its tables anew."""
    told = {name: dialect for name, dialect in dialects.ENGINES.items() if dialect.sources}
    tables = "\n".join(_engine(name, dialect) for name, dialect in told.items())
    page = (_HERE / "engines.md").read_text(encoding="utf-8")
    return _with(page, "tables", "envoy_extproc/engines/dialects.py", tables)


def _with(page: str, part: str, source: str, text: str) -> str:
    """`page` with the part of that name, which is between two comments, made anew."""
    begin, end = f"<!-- {part}: written by `make docs` from {source} -->\n", f"<!-- end of {part} -->\n"
    head, found, rest = page.partition(begin)
    assert found, begin
    return f"{head}{begin}\n{text}\n{end}{rest.partition(end)[2]}"


def _engine(name: str, dialect: dialects.Dialect) -> str:
    rows = (f"| `{field}` | {_formulas(str(source))} |" for field, source in dialect.sources.items())
    return "\n".join([f"### {name}", "", "| field | formula |", "|---|---|", *rows, ""])


def _formulas(text: str) -> str:
    return ", else ".join(f"`{formula}`" for formula in text.split(", else "))


_GUIDE = "envoy_extproc/scheduling/guide.py"
_EXAMPLE_OF = "docs/generate.py"


def routing() -> str:
    """The page about routing: its text as it stands, its tables of policies and their example anew."""
    page = (_HERE / "routing.md").read_text(encoding="utf-8")
    page = _with(page, "policies", _GUIDE, "\n".join(_policies()))
    return _with(page, "example", _EXAMPLE_OF, "\n".join(_example()))


def _policies() -> Iterator[str]:
    yield "| policy | prefers, by which score | data it needs | without it | in a mixture | use it for |"
    yield "|---|---|---|---|---|---|"
    for name, words in guide.GUIDE.items():
        cells = (f"`{name}`", words.score, words.needs, _otherwise(name), _in_a_mixture(name), words.use)
        yield f"| {' | '.join(cells)} |"
    yield from (
        "",
        "Other names of the same:",
        "",
        "| name | of | in a mixture | whose name it is |",
        "|---|---|---|---|",
    )
    for name, alias in guide.ALIASES.items():
        yield f"| `{name}` | `{alias.policy}` | {_in_a_mixture(name)} | {alias.whose} |"
    yield ""


def _otherwise(policy: str) -> str:
    words, fallback = guide.GUIDE[policy], registry.build()[policy].fallback
    reasons = ", ".join(f"`{reason}`" for reason in words.lacks)
    decides = " ".join(each for each in (f"`{fallback}`" if reasons else "", words.otherwise) if each)
    return f"{decides} ({reasons})" if reasons else decides or "needs none"


def _in_a_mixture(policy: str) -> str:
    if policy in mixes.PICKING | mixes.ALONE:
        return "no"
    return "as it is" if policy in registry.AS_THEY_ARE else "spread"


_BLOCKS = 16
_REQUEST = SchedulingRequest(
    model="llama-3-8b",
    prompt_tokens=1024,
    prompt=Prompt({"prompt": msgspec.Raw(msgspec.json.encode("x" * (_BLOCKS * 64 * TOKEN_BYTES)))}),
    max_output_tokens=200,
    session="10.0.0.3:8000",
    session_key=b"tenant-7",
    user="ann",
    standing=Standing(own=2000, least=0, most=6000, below=0.25),
)
_SHARED: Mapping[str, Any] = {
    "prompt_tokens_per_request": 1000.0,
    "generation_tokens_per_request": 200.0,
    "max_loras": 2,
}
_PODS = (
    ("pod-a", 4, 12, EngineStats(
        at=0, running=4, waiting=0, kv_cache_usage=0.7, prompt_tokens_per_second=2000, generation_tokens_per_second=600,
        prefill_seconds=0.4, decode_seconds=4, time_per_output_token=0.02, loras=frozenset({"sql"}), **_SHARED)),
    ("pod-b", 1, 0, EngineStats(
        at=0, running=1, waiting=0, kv_cache_usage=0.2, prompt_tokens_per_second=500, generation_tokens_per_second=50,
        prefill_seconds=0.8, decode_seconds=8, time_per_output_token=0.04, loras=frozenset(), **_SHARED)),
    ("pod-c", 2, 0, EngineStats(
        at=0, running=6, waiting=3, kv_cache_usage=0.45, prompt_tokens_per_second=3000, generation_tokens_per_second=300,
        prefill_seconds=0.4, decode_seconds=4, time_per_output_token=0.02, loras=frozenset({"x", "y"}),
        waiting_loras=frozenset({"sql"}), **_SHARED)),
)  # fmt: skip
_TOLD = (
    *(
        "running",
        "waiting",
        "kv_cache_usage",
        "prefill_seconds",
        "decode_seconds",
        "prompt_tokens_per_request",
    ),
    *("time_per_output_token", "prompt_tokens_per_second", "generation_tokens_per_second"),
)
_MIXTURE = "prefix-cache:2,least-request:1"


def _example() -> Iterator[str]:
    """What each pod is like, and what each policy that scores makes of it."""
    names = [name for name, *_ in _PODS]
    yield f"| | {' | '.join(names)} |"
    yield "|---|---|---|---|"
    yield f"| `in_flight` | {' | '.join(str(count) for _, count, _, _ in _PODS)} |"
    yield f"| `held` | {' | '.join(str(held) for _, _, held, _ in _PODS)} |"
    for field in _TOLD:
        yield f"| `{field}` | {' | '.join(f'{getattr(stats, field):g}' for *_, stats in _PODS)} |"
    yield from ("", f"| policy | {' | '.join(names)} | goes to |", "|---|---|---|---|---|")
    scoring = [name for name in guide.GUIDE if name not in mixes.PICKING | mixes.ALONE]
    for policy in (*scoring, _MIXTURE):
        decision = _decided(policy)
        scores = totals(decision.scores, len(names))
        cells = [f"{score:.3f}" for score in scores]
        yield f"| `{policy}` | {' | '.join(cells)} | {decision.chosen.endpoint.name} |"
    yield ""


def _decided(policy: str) -> Decision:
    policies = registry.build()
    endpoints = [
        Endpoint(name=name, address=f"10.0.0.{number}:8000", models=("llama-3-8b",))
        for number, (name, *_) in enumerate(_PODS, start=1)
    ]
    for endpoint, (_, _, held, _) in zip(endpoints, _PODS, strict=True):
        policies.prefixes.learn(policies.prefixes.blocks(_REQUEST)[:held], endpoint)
    candidates = [
        Candidate(endpoint, count, stats)
        for endpoint, (_, count, _, stats) in zip(endpoints, _PODS, strict=True)
    ]
    request = _REQUEST
    if policy == "lora-affinity":
        request = msgspec.structs.replace(request, model="sql", adapter=True)
    return policies.find(policy).run(request, candidates, random.Random(1))  # noqa: S311  no tie is left to it


PAGES: Mapping[str, Callable[[], str]] = {
    "configuration.md": configuration,
    "apis.md": apis,
    "engines.md": engines,
    "routing.md": routing,
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
