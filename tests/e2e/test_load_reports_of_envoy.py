"""Load reports: an Envoy in front weighs gateways by ours, and engines' own are for this server alone."""

from __future__ import annotations

import asyncio
import base64
import json
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
import yaml
from aiohttp import web

from envoy_extproc._proto import orca_pb2
from envoy_extproc.orca import parse
from envoy_extproc.simulation.stack import envoy_binary, free_port
from tests.e2e.test_captures import CHAT, completion
from tests.support.canned import document, stream
from tests.support.gateway import MODEL, Gateway, chat, new_id
from tests.support.lanes import LANES, Lanes, lanes

FORMS = ("TEXT", "JSON", "BIN")
WEIGHED = (*FORMS, "hidden")
ROUND = 24
BUSY, IDLE = 0.9, 0.1


class Pod:
    """An engine whose load is set by hand.

    Attributes:
        kv: what its metrics page says of its KV cache.
        told: what its next answers say of it, in the header; None for nothing.
        asked: the forms of report it was asked for.
    """

    def __init__(self, name: str, kv: float) -> None:
        self.name = name
        self.kv = kv
        self.told: str | None = None
        self.asked: list[str | None] = []
        self.address = f"127.0.0.1:{free_port()}"

    def pod(self) -> Mapping[str, Any]:
        """As in `discovery.static.endpoints`."""
        return {"name": self.name, "address": self.address, "models": [MODEL]}

    async def metrics(self, _: web.Request) -> web.Response:
        gauges = {"kv_cache_usage_perc": self.kv, "num_requests_running": 1, "num_requests_waiting": 0}
        return web.Response(text="".join(f"vllm:{name} {value}\n" for name, value in gauges.items()))

    async def chat(self, request: web.Request) -> web.Response:
        self.asked.append(request.headers.get("endpoint-load-metrics-format"))
        headers = {} if self.told is None else {"endpoint-load-metrics": self.told}
        return web.Response(body=completion("x"), content_type="application/json", headers=headers)


@asynccontextmanager
async def pods(*loads: float) -> AsyncIterator[list[Pod]]:
    """Pods called pod-a, pod-b, ... with so much of their KV cache in use."""
    async with AsyncExitStack() as stack:
        made = [Pod(f"pod-{chr(97 + number)}", kv) for number, kv in enumerate(loads)]
        for pod in made:
            app = web.Application()
            app.add_routes([web.get("/metrics", pod.metrics), web.post(CHAT, pod.chat)])
            runner = web.AppRunner(app)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            host, _, port = pod.address.partition(":")
            await web.TCPSite(runner, host, int(port)).start()
        yield made


# -- an Envoy in front -------------------------------------------------------------------------------------------------

TYPE = "type.googleapis.com/envoy.extensions."


def cluster(name: str, ports: Sequence[int]) -> dict[str, Any]:
    policy = {
        "@type": TYPE
        + "load_balancing_policies.client_side_weighted_round_robin.v3.ClientSideWeightedRoundRobin",
        "blackout_period": "1s",
        "weight_update_period": "0.5s",
    }
    hosts = [
        {"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": port}}}}
        for port in ports
    ]
    return {
        "name": name,
        "type": "STATIC",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": hosts}]},
        "load_balancing_policy": {
            "policies": [{"typed_extension_config": {"name": "weights", "typed_config": policy}}]
        },
    }


def route(form: str) -> dict[str, Any]:
    """By path, so that one Envoy asks in each form; once it keeps what it got to itself, and once it does not ask."""
    asking = {"header": {"key": "endpoint-load-metrics-format", "value": form if form in FORMS else "text"}}
    return {
        "match": {"prefix": f"/{form}/"},
        "route": {"cluster": form, "prefix_rewrite": "/"},
        "request_headers_to_add": [] if form == "none" else [asking],
        "response_headers_to_remove": ["endpoint-load-metrics"] if form == "hidden" else [],
    }


def front_bootstrap(port: int, admin: int, gateways: Sequence[int]) -> dict[str, Any]:
    forms = (*WEIGHED, "none")
    manager = {
        "@type": TYPE + "filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "front",
        "route_config": {
            "virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route(form) for form in forms]}]
        },
        "http_filters": [
            {"name": "router", "typed_config": {"@type": TYPE + "filters.http.router.v3.Router"}}
        ],
    }
    listener = {
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": port}},
        "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}],
    }
    return {
        "admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": admin}}},
        "static_resources": {
            "listeners": [listener],
            "clusters": [cluster(form, gateways) for form in forms],
        },
    }


@asynccontextmanager
async def front(directory: Path, gateways: Sequence[Gateway]) -> AsyncIterator[aiohttp.ClientSession]:
    """A stock Envoy before the gateways' own, and a client of it."""
    port, admin = free_port(), free_port()
    path = directory / "front.yaml"
    path.write_text(yaml.safe_dump(front_bootstrap(port, admin, [gateway.port for gateway in gateways])))
    with (directory / "front.log").open("wb") as log:
        # One worker: each counts its turns by itself.
        envoy = await asyncio.create_subprocess_exec(
            *(str(envoy_binary()), "-c", str(path), "--concurrency", "1", "--use-dynamic-base-id"),
            stdout=log,
            stderr=log,
        )
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as client:
            await ready(client, f"http://127.0.0.1:{admin}/ready")
            yield client
    finally:
        envoy.terminate()
        await envoy.wait()


async def ready(client: aiohttp.ClientSession, url: str) -> None:
    async with asyncio.timeout(20):
        while True:
            try:
                async with client.get(url) as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.05)


@pytest.mark.timeout(240)
async def test_an_envoy_in_front_weighs_gateways_by_their_reports(tmp_path: Path) -> None:
    """Nothing is configured there but the policy and the header; and what is busy changes sides."""
    config = {"engines": {"scrape_interval_ms": 50}}
    async with AsyncExitStack() as stack:
        first, second = await stack.enter_async_context(pods(BUSY, IDLE))
        gateways = [
            Gateway(tmp_path / lane, pods=[pod.pod()], config={**config, "responses": {"accounting": lane}})
            for pod, lane in zip((first, second), LANES, strict=True)
        ]
        for gateway in gateways:
            await stack.enter_async_context(gateway)
        client = await stack.enter_async_context(front(tmp_path, gateways))
        await prefers(client, "pod-b", "pod-a")
        first.kv, second.kv = IDLE, BUSY
        await prefers(client, "pod-a", "pod-b")
        assert await a_round(client, "none") == {"pod-a": ROUND / 2, "pod-b": ROUND / 2}


async def prefers(client: aiohttp.ClientSession, idle: str, busy: str) -> None:
    """However the report is asked for, the idle one soon gets more than twice as many.

    Raises:
        TimeoutError: it did not.
    """
    async with asyncio.timeout(60):
        for form in WEIGHED:
            while True:
                shares = await a_round(client, form)
                if shares[idle] > 2 * shares[busy]:
                    break


async def a_round(client: aiohttp.ClientSession, form: str) -> Counter[str]:
    """Who served, how often; each answer with the report in the form asked for, and none unasked."""
    served: Counter[str] = Counter()
    for _ in range(ROUND):
        async with client.post(f"/{form}{CHAT}", json=chat()) as answer:
            assert answer.status == 200, await answer.text()
            report = answer.headers.get("endpoint-load-metrics", "none")
            assert report.partition(" ")[0] == (form if form in FORMS else "none")
            served[answer.headers["target-pod"]] += 1
    return served


# -- what a client gets ------------------------------------------------------------------------------------------------


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def both(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lanes]:
    async with lanes(tmp_path_factory.mktemp("lanes")) as ready:
        yield ready


ENGINES = {
    "text": "endpoint-load-metrics: TEXT named_metrics.kv_cache_usage_perc=0.5, cpu_utilization=0.25",
    "json": 'endpoint-load-metrics: JSON {"named_metrics": {"num_requests_waiting": 7}}',
    "binary": "endpoint-load-metrics-bin: CTMzMzMzM9M/QhAKBXF1ZXVlEQAAAAAAABRA",
    "garbage": "endpoint-load-metrics: TEXT eps=NaN, \xe9\xff=, ;",
    "garbage in binary": "endpoint-load-metrics-bin: \xff\xfe!",
    "long": "endpoint-load-metrics: TEXT " + "eps=1," * 2000,
}


@pytest.mark.parametrize("streamed", [False, True], ids=["document", "stream"])
@pytest.mark.parametrize("told", ENGINES)
async def test_an_engines_own_report_is_not_for_clients(both: Lanes, told: str, streamed: bool) -> None:
    answer = document(completion("x"), ENGINES[told])
    if streamed:
        body = stream(b'data: {"choices":[{"index":0,"delta":{"content":"x"}}]}\n\n', b"data: [DONE]\n\n")
        head = body.pieces[0]
        assert isinstance(head, bytes)
        more = f"{ENGINES[told]}\r\n\r\n".encode("latin-1")
        answer = type(body)((head.removesuffix(b"\r\n") + more, *body.pieces[1:]))
    received = await both.ask(answer, stream=streamed)
    assert received.status == 200
    assert not [name for name in received.header if name.startswith("endpoint-load-metrics")]
    await both.reports([received])


@pytest.mark.parametrize("told", ENGINES)
@pytest.mark.parametrize("form", FORMS)
async def test_who_asks_gets_ours_instead(both: Lanes, form: str, told: str) -> None:
    """Of this upstream, which has no metrics page, nothing is known but what it says in answers."""
    asking = {"endpoint-load-metrics-format": form}
    received = [await one_lane(both, lane, ENGINES[told], asking) for lane in LANES]
    for headers in received:
        assert "endpoint-load-metrics-bin" not in headers
        value = headers["endpoint-load-metrics"]
        assert value.startswith(f"{form} ")
        report = parse(value).report
        assert report is not None
        assert report.named_metrics["in_flight_requests"] == 0.0
        assert "queue" not in report.named_metrics
        assert report.rps_fractional > 0
        assert report.eps == 0


async def one_lane(both: Lanes, lane: str, told: str, asking: Mapping[str, str]) -> Mapping[str, str]:
    """The headers that a client gets in one lane."""
    request_id = new_id()
    both.upstream.answers[request_id] = document(completion("x"), told)
    headers = {"x-request-id": request_id, **asking}
    async with both.sessions[lane].post(CHAT, json=chat(), headers=headers) as answer:
        assert answer.status == 200
        await answer.read()
        # A pod is asked for the form that is read here, whatever the client asked for.
        sent = both.upstream.requests[request_id][0].headers
        assert sent["endpoint-load-metrics-format"] == "TEXT"
        return {name.lower(): value for name, value in answer.headers.items()}


# -- what this server makes of it --------------------------------------------------------------------------------------


@pytest.mark.parametrize("lane", LANES)
async def test_what_an_engine_tells_in_an_answer_counts_before_its_scrape(directory: Path, lane: str) -> None:
    config: dict[str, dict[str, Any]] = {
        "routing": {"policy": "least-kv-cache"},
        # Scraped once, at the start.
        "engines": {"scrape_interval_ms": 60_000, "max_stats_age_ms": 600_000},
        "responses": {"accounting": lane},
    }
    async with pods(0.2, 0.5) as (first, second), AsyncExitStack() as stack:
        made = Gateway(directory, pods=[first.pod(), second.pod()], config=config)
        gateway = await stack.enter_async_context(made)
        client = await stack.enter_async_context(aiohttp.ClientSession(gateway.url))
        # The first scrape comes within the interval: until then nobody is told of.
        first.told, second.told = (f"TEXT named_metrics.kv_cache_usage_perc={kv}" for kv in (0.2, 0.5))
        for pod in (first, second):
            while await served_by(client, "random") != pod.name:
                pass
        await settled(lane)
        assert await served_by(client) == "pod-a"
        first.told = "garbage"
        assert await served_by(client) == "pod-a"
        first.told = "TEXT named_metrics.vllm:kv_cache_usage_perc=0.75, rps_fractional=2"
        assert await served_by(client) == "pod-a"
        await settled(lane)
        assert [await served_by(client) for _ in range(3)] == ["pod-b"] * 3
        assert {*first.asked, *second.asked} == {"TEXT"}
        unread = await gateway.metric("envoy_extproc_unread_load_reports_total", reason="malformed")
        assert unread == 1


async def served_by(client: aiohttp.ClientSession, policy: str | None = None) -> str:
    headers = {} if policy is None else {"routing-strategy": policy}
    async with client.post(CHAT, json=chat(), headers=headers) as answer:
        assert answer.status == 200
        return str(answer.headers["target-pod"])


async def settled(lane: str) -> None:
    """In the native lane a report comes with the access log, written every 0.1 s."""
    await asyncio.sleep(0.6 if lane == "native" else 0.0)


@pytest.mark.parametrize("form", FORMS)
async def test_a_report_on_every_answer_by_config(directory: Path, form: str) -> None:
    config: dict[str, dict[str, Any]] = {
        "responses": {"load_report": form},
        "engines": {"scrape_interval_ms": 50},
    }
    async with pods(0.5) as (pod,), Gateway(directory, pods=[pod.pod()], config=config) as gateway:
        async with aiohttp.ClientSession(gateway.url) as client:
            value = await a_report_of_the_scraped(client)
    assert value.startswith(f"{form} ")
    report = parse(value).report
    assert report is not None
    assert report.application_utilization == 0.5
    assert 0 < report.rps_fractional < 1000
    assert report.named_metrics == as_others_read(value)


async def a_report_of_the_scraped(client: aiohttp.ClientSession) -> str:
    """The header of the first answer that tells of what was scraped."""
    async with asyncio.timeout(10):
        while True:
            async with client.post(CHAT, json=chat()) as answer:
                value = answer.headers["endpoint-load-metrics"]
            if "kv_cache_usage_perc" in as_others_read(value):
                return value


def as_others_read(value: str) -> dict[str, float]:
    """The named metrics, by a reader that is not ours."""
    form, _, rest = value.partition(" ")
    if form == "BIN":
        return dict(orca_pb2.OrcaLoadReport.FromString(base64.b64decode(rest, validate=True)).named_metrics)
    if form == "JSON":
        return dict(json.loads(rest)["named_metrics"])
    pairs = (pair.strip().split("=") for pair in rest.split(","))
    prefix = "named_metrics."
    return {name.removeprefix(prefix): float(number) for name, number in pairs if name.startswith(prefix)}
