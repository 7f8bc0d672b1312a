"""The command `explain`: what it prints, what it asks, and how it ends."""

from __future__ import annotations

import asyncio
import io
import json
import random
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry
from rich.console import Console
from typer.testing import CliRunner

from envoy_extproc.cli import cli
from envoy_extproc.endpoints import EngineState, EngineStats, Snapshot
from envoy_extproc.explain import ServerError, question, show, there
from envoy_extproc.scheduling import registry
from envoy_extproc.scheduling.interfaces import SchedulingRequest
from envoy_extproc.server import explaining
from envoy_extproc.server.admin import Admin
from envoy_extproc.server.director import Director, RoutingRules
from envoy_extproc.server.explaining import Answer, Question
from envoy_extproc.simulation.stack import free_port
from tests.support.builders import MODEL, endpoint

BODY = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}).encode()
STATES = {
    "10.0.0.1:8000": EngineState(stats=EngineStats(at=0.0, running=3.0, waiting=1.0, kv_cache_usage=0.25)),
    "10.0.0.2:8000": EngineState(stats=EngineStats(at=0.0, kv_cache_usage=0.5)),
    "10.0.0.3:8000": EngineState(reachable=False),
}


def director() -> Director:
    made = Director(
        profiles=registry.build(),
        rules=RoutingRules(policy="least-kv-cache:3,least-request:1", max_stats_age=1e12, tries=2),
        in_flight=lambda address: 7 if address == "10.0.0.1:8000" else 0,
        states=STATES,
        rng=random.Random(1),
    )
    made.update(Snapshot(endpoint(number) for number in (1, 2, 3)))
    return made


async def answering(asked: Question) -> Answer:
    return await explaining.answer(asked, lambda request: director().explain(request, 0.0))


def answered(asked: Question) -> Answer:
    return asyncio.run(answering(asked))


def shown(answer: Answer) -> list[str]:
    out = io.StringIO()
    show(answer, Console(file=out))
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_a_row_for_each_endpoint_and_the_reasons() -> None:
    assert shown(answered(Question(body=BODY))) == [
        "llama-3-8b goes to pod-1",
        "endpoint  address        least-kv-cache x3  least-request x1  total  in flight  running  waiting  KV cache",
        "pod-1     10.0.0.1:8000              1.000             0.000  0.750          7        3        1     25.0%  chosen",
        "pod-2     10.0.0.2:8000              0.000             1.000  0.250          0        -        -     50.0%  try 2",
        "pod-3     10.0.0.3:8000                  -                 -      -          0        -        -         -  left out: reachable",
        "The policy is least-kv-cache:3,least-request:1, from routing.policy in the configuration.",
        "Left out by reachable: pod-3.",
        "pod-1 has the best total, 0.750.",
    ]


def test_a_single_scorer_has_no_weight_worth_showing() -> None:
    lines = shown(answered(Question(headers=(("routing-strategy", "least-request"),), body=BODY)))
    assert lines[1].split("  ")[0:1] == ["endpoint"]
    assert " least-request  total" in lines[1]
    assert lines[2].startswith("pod-2")


def test_a_policy_that_does_not_score_has_no_columns_for_it() -> None:
    lines = shown(answered(Question(headers=(("routing-strategy", "round-robin"),), body=BODY)))
    assert lines[1].split() == [
        "endpoint",
        "address",
        "total",
        "in",
        "flight",
        "running",
        "waiting",
        "KV",
        "cache",
    ]


def test_markup_in_a_clients_words_is_not_obeyed() -> None:
    asked = Question(headers=(("routing-strategy", "[bold]nope[/bold]"),), body=BODY)
    assert any("[bold]nope[/bold]" in line for line in shown(answered(asked)))


def test_a_refusal_is_shown_as_the_client_gets_it() -> None:
    lines = shown(answered(Question(headers=(("external-filter", "gpu"),), body=BODY)))
    assert lines[:3] == [
        "The client gets HTTP status 503:",
        "x-error-no-model-backends: true",
        "retry-after: 1",
    ]
    assert json.loads("".join(lines[3:]))["error"]["code"] == "service_unavailable"


@pytest.mark.parametrize(
    ("headers", "pairs"),
    [
        ([], ()),
        (["a: b", "A:b : c", " x :"], (("a", "b"), ("A", "b : c"), ("x", ""))),
    ],
)
def test_headers_of_a_command_line(headers: list[str], pairs: tuple[tuple[str, str], ...]) -> None:
    assert question("/p", headers, b"x") == Question(path="/p", headers=pairs, body=b"x")


@pytest.mark.parametrize("header", ["a", "", ": b"])
def test_what_is_no_header(header: str) -> None:
    with pytest.raises(ValueError, match="name: value"):
        question("/p", [header], b"")


# -- a server ------------------------------------------------------------------------------------------------------


class Elsewhere(Admin):
    """For whom nobody is on loopback."""

    def allows(self, remote: str | None, authorization: str) -> bool:
        return super().allows("10.1.2.3", authorization)


@asynccontextmanager
async def admin(kind: type[Admin] = Admin) -> AsyncIterator[str]:
    made = kind(
        registry=CollectorRegistry(), ready=lambda: True, director=director(), debug_token="correct-horse"
    )
    runner = web.AppRunner(made.app())
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@pytest.mark.parametrize(
    "headers", [(), (("routing-strategy", "nope"),), (("external-filter", "gpu"),)], ids=["200", "400", "503"]
)
async def test_a_server_answers_as_it_is_answered_here(headers: tuple[tuple[str, str], ...]) -> None:
    asked = Question(headers=headers, body=BODY)
    async with admin() as url:
        far, near = await there(f"{url}/", asked, None), await answering(asked)
    assert (far.status, set(far.headers)) == (near.status, set(near.headers))
    assert json.loads(far.body).keys() == json.loads(near.body).keys()
    assert (far.explanation is None) is (near.explanation is None)
    if far.explanation is not None and near.explanation is not None:
        assert far.explanation.endpoints == near.explanation.endpoints


@pytest.mark.parametrize(("token", "let_in"), [(None, False), ("wrong", False), ("correct-horse", True)])
async def test_a_server_elsewhere_wants_its_token(token: str | None, let_in: bool) -> None:
    async with admin(Elsewhere) as url:
        if let_in:
            assert (await there(url, Question(body=BODY), token)).status == 200
        else:
            with pytest.raises(ServerError, match="403 from loopback"):
                await there(url, Question(body=BODY), token)


@pytest.mark.parametrize("url", ["http://127.0.0.1:{port}", "nonsense", "http://["])
async def test_a_server_that_is_not_there(url: str) -> None:
    with pytest.raises(ServerError):
        await there(url.replace("{port}", str(free_port())), Question(), None)


# -- the whole command ---------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "gateway.yaml"
    rows = [
        {
            "name": f"pod-{n}",
            "address": f"127.0.0.1:{free_port()}",
            "models": [MODEL],
            "labels": {"n": str(n)},
        }
        for n in (1, 2)
    ]
    path.write_text(json.dumps({"discovery": {"static": {"endpoints": rows}}}))
    return path


def run(*arguments: str, body: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "envoy_extproc", "explain", *arguments]
    return subprocess.run(command, capture_output=True, timeout=60, check=False, input=body)


def test_by_a_configuration(config: Path) -> None:
    done = run("-c", str(config), "--body", "-", "--header", "external-filter: n=2", "--json", body=BODY)
    assert (done.returncode, done.stderr) == (0, b"")
    told = json.loads(done.stdout)
    assert (told["chosen"], told["decided_by"], told["source"]) == ("pod-2", "least-request", "routing")
    assert [(row["left_out"], row["reachable"]) for row in told["endpoints"]] == [
        (None, False),
        ("external-filter", False),
    ]


def test_a_refusal_ends_with_1(config: Path, tmp_path: Path) -> None:
    body = tmp_path / "body.json"
    body.write_bytes(b'{"model": "none"}')
    done = run("-c", str(config), "--body", str(body))
    assert done.returncode == 1
    assert b"HTTP status 404" in done.stdout
    assert b"model_not_found" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "--config or --server"),
        (("-c", "a", "--server", "b"), "--config or --server"),
        (("-c", "CONFIG", "--header", "x"), "name: value"),
        (("-c", "CONFIG", "--body", "nowhere.json"), "nowhere.json"),
        (("-c", "nowhere.yaml"), "nowhere.yaml"),
    ],
)
def test_what_is_asked_wrongly_ends_with_2(config: Path, arguments: tuple[str, ...], said: str) -> None:
    told = CliRunner().invoke(
        cli, ["explain", *(str(config) if each == "CONFIG" else each for each in arguments)]
    )
    assert (told.exit_code, told.stdout) == (2, "")
    assert said in told.stderr


def test_a_question_without_a_body_is_decided_by_headers() -> None:

    assert explaining.read(question("/v1/chat/completions", [], b"")) == SchedulingRequest()
