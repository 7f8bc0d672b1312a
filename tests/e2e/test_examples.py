"""The examples run: what they configure, before a real Envoy, simulated engines and the server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
import yaml
from h2.config import H2Configuration
from h2.connection import H2Connection

from envoy_extproc.envoy.bootstrap import native_lua
from envoy_extproc.simulation.engine import Engine
from envoy_extproc.simulation.options import EngineOptions
from tests.e2e.test_trailers import Connection
from tests.support.dns import Names
from tests.support.envoy_gateway import Places, bootstrap, documents
from tests.support.gateway import MODEL, Gateway, chat, new_id

EXAMPLES = Path(__file__).parents[2] / "examples"
LANES = ("stream", "native")


def _addresses(printed: Mapping[str, Any], cluster: str) -> list[str]:
    (found,) = [each for each in printed["static_resources"]["clusters"] if each["name"] == cluster]
    hosts = [
        each["endpoint"]["address"]["socket_address"]
        for group in found["load_assignment"]["endpoints"]
        for each in group["lb_endpoints"]
    ]
    return [f"{host['address']}:{host['port_value']}" for host in hosts]


def _socket(address: Mapping[str, Any]) -> str:
    return f"{address['socket_address']['address']}:{address['socket_address']['port_value']}"


def through_envoy_gateway(*files: str, lua: bool, served: bool) -> Callable[[str], str]:
    """What takes the place of our own bootstrap: what Envoy Gateway makes of the example, at this gateway's ports."""

    def edit(text: str) -> str:
        printed = yaml.safe_load(text)
        pods = _addresses(printed, "pods")
        (listener,) = printed["static_resources"]["listeners"]
        places = Places(
            listen=_socket(listener["address"]),
            admin=_socket(printed["admin"]["address"]),
            services={"envoy-extproc": _addresses(printed, "ext_proc"), "engines": pods, MODEL: pods[:2]},
            texts={"envoy-extproc-native-lua": native_lua()},
        )
        resources = documents(*(EXAMPLES / "envoy-gateway" / name for name in files))
        for each in resources:
            if not lua:
                each.get("spec", {}).pop("lua", None)
            for rule in each.get("spec", {}).get("rules", []) if not served else []:
                del rule["filters"]
        return yaml.safe_dump(bootstrap(resources, places))

    return edit


ALL_MODELS = ("gateway.yaml", "extension.yaml", "traffic.yaml", "route-all-models.yaml")
PER_MODEL = (*ALL_MODELS, "route-per-model.yaml")
OTHER = "other"


@asynccontextmanager
async def engine(name: str, model: str, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[Engine]:
    """One simulated engine that answers as fast as it can."""
    settings = EngineOptions(
        name=name, models=(model,), host=host, port=port, ttft_seconds=0.0, tpot_seconds=0.0
    )
    one = Engine(settings)
    await one.start()
    try:
        yield one
    finally:
        await one.stop()


@asynccontextmanager
async def engines() -> AsyncIterator[list[Engine]]:
    """Two pods of one model and one of another, as fast as they can be."""
    named = [("pod-a", MODEL), ("pod-b", MODEL), ("pod-c", OTHER)]
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(engine(name, model)) for name, model in named]


@asynccontextmanager
async def envoy_gateway(
    directory: Path, lane: str, *files: str, served: bool = True, **config: Any
) -> AsyncIterator[Gateway]:
    """Both as they stand in the native lane; in the stream lane without the script, and so without what it reads."""
    native = lane == "native"
    edit = through_envoy_gateway(*files, lua=native, served=native and served)
    async with engines() as pods, Gateway(directory, engines=pods, config=config, edit=edit) as gateway:
        yield gateway


@pytest_asyncio.fixture(scope="module", loop_scope="session", params=LANES)
async def all_models(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[str, Gateway]]:
    """Envoy Gateway with one route for all models, in either lane."""
    async with envoy_gateway(tmp_path_factory.mktemp("all"), request.param, *ALL_MODELS) as gateway:
        yield request.param, gateway


async def ask(
    gateway: Gateway, body: Mapping[str, Any], **headers: str
) -> tuple[aiohttp.ClientResponse, bytes]:
    async with (
        aiohttp.ClientSession(gateway.url) as http,
        http.post("/v1/chat/completions", json=body, headers=headers) as answer,
    ):
        return answer, await answer.read()


# -- Envoy Gateway ---------------------------------------------------------------------------------------------------------


async def test_envoy_gateway_lets_no_request_past_that_has_trailers_and_no_body(
    all_models: tuple[str, Gateway],
) -> None:
    """It has no word for request trailers: the server asks for them itself."""
    _, gateway = all_models
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    connection = Connection(reader, writer, H2Connection(H2Configuration()))
    request_id, answer = await connection.ask("/v1/chat/completions", [], pause=0.05)
    writer.close()
    assert answer.status == "400"
    assert gateway.received(request_id) == []
    assert (await gateway.report(request_id))["outcome"] == "refused"


async def test_envoy_gateway_shows_no_answer_that_the_script_reads(all_models: tuple[str, Gateway]) -> None:
    lane, gateway = all_models
    stat = "http.http-10080.ext_proc.stream_msgs_sent"
    before, request_id = await gateway.envoy_stat(stat), new_id()
    await ask(gateway, chat(), **{"x-request-id": request_id})
    await gateway.report(request_id)
    assert await gateway.envoy_stat(stat) - before == (2 if lane == "native" else 4)


@pytest.mark.parametrize("stream", [False, True])
async def test_envoy_gateway_accounts_and_names_the_pod(
    all_models: tuple[str, Gateway], stream: bool
) -> None:
    lane, gateway = all_models
    request_id, name = new_id(), "envoy_extproc_native_exchanges_total"
    before = await gateway.metric(name, stage="reported")
    answer, body = await ask(gateway, chat(stream=stream), **{"x-request-id": request_id})
    report = await gateway.report(request_id)
    assert answer.status == 200
    assert (b'"usage"' in body) is not stream
    ((pod, seen, _),) = gateway.received(request_id)
    assert answer.headers["target-pod"] == pod == report["pod"]
    assert answer.headers["target-pod-ip"] == seen["target-pod"] == report["address"]
    assert (report["usage_source"], report["gen_ai.usage.output_tokens"]) == ("reported", 64)
    assert "x-envoy-extproc-served" not in answer.headers
    assert await gateway.metric(name, stage="reported") - before == (lane == "native")


async def test_envoy_gateway_without_the_served_header(directory: Path) -> None:
    """The client is not told who served; the report is, by the access log."""
    async with envoy_gateway(directory, "native", *ALL_MODELS, served=False) as gateway:
        request_id = new_id()
        answer, _ = await ask(gateway, chat(), **{"x-request-id": request_id})
        report = await gateway.report(request_id)
        ((pod, _, _),) = gateway.received(request_id)
    assert (report["pod"], report["usage_source"]) == (pod, "reported")
    assert answer.headers["routing-strategy"] == "least-request"
    assert "target-pod" not in answer.headers


async def test_envoy_gateway_lets_no_client_choose_an_address(all_models: tuple[str, Gateway]) -> None:
    _, gateway = all_models
    other = gateway.engines["pod-c"].address
    spoofed = {"x-gateway-destination-endpoint": other, "target-pod": other, "model": OTHER}
    for _ in range(4):
        answer, _ = await ask(gateway, chat(), **spoofed)
        assert answer.status == 200
        assert answer.headers["target-pod"] in ("pod-a", "pod-b")


async def test_envoy_gateway_walks_the_list_and_asks_no_pod_of_another_model(
    all_models: tuple[str, Gateway],
) -> None:
    """Envoy Gateway's retries avoid hosts that were tried; pods that the server named are asked all the same."""
    _, gateway = all_models
    for model, pods in ((MODEL, {"pod-a", "pod-b"}), (OTHER, {"pod-c"})):
        request_id = new_id()
        answer, _ = await ask(
            gateway,
            {**chat(), "model": model},
            **{"x-request-id": request_id, "x-simulate": "error=503"},
        )
        asked = [pod for pod, _, _ in gateway.received(request_id)]
        assert (answer.status, len(asked), set(asked)) == (503, 3, pods)
        report = await gateway.report(request_id)
        last = max(asked, key=asked.count)  # of two, the first is asked again
        assert (report["attempts"], report["pod"], answer.headers["target-pod"]) == (3, last, last)


@pytest.mark.parametrize("lane", LANES)
async def test_envoy_gateway_with_a_route_for_each_model(directory: Path, lane: str) -> None:
    async with envoy_gateway(directory, lane, *PER_MODEL, routing={"clear_route_cache": True}) as gateway:
        for model, pods in ((MODEL, {"pod-a", "pod-b"}), (OTHER, {"pod-c"})):
            request_id = new_id()
            answer, _ = await ask(gateway, {**chat(), "model": model}, **{"x-request-id": request_id})
            assert answer.status == 200
            assert answer.headers["target-pod"] in pods
            assert (await gateway.report(request_id))["usage_source"] == "reported"
        asked = [
            await gateway.envoy_stat(f"cluster.httproute/inference/{route}/rule/0.upstream_rq_total")
            for route in (MODEL, "all-models")
        ]
        assert asked == [1, 1]
        await gateway.kill_server()  # fail-open: Envoy serves by itself, and still nobody but it chooses
        wanted = {"x-gateway-destination-endpoint": "127.0.0.1:9"}
        answer, _ = await ask(gateway, chat(), **wanted)
        assert answer.status in (200, 404)  # 404 is the other model's pod, which knows no such model


# -- Envoy by itself -------------------------------------------------------------------------------------------------------


def _manager(envoy: Mapping[str, Any]) -> Any:
    (listener,) = envoy["static_resources"]["listeners"]
    return listener["filter_chains"][0]["filters"][0]["typed_config"]


def at_these_ports(example: Path, directory: Path) -> Callable[[str], str]:
    """What takes the place of our own bootstrap: the example, where this gateway listens and its parts are."""

    def edit(text: str) -> str:
        printed, envoy = yaml.safe_load(text), yaml.safe_load(example.read_text("utf-8"))
        listeners = [each["static_resources"]["listeners"][0] for each in (printed, envoy)]
        listeners[1]["address"], envoy["admin"] = listeners[0]["address"], printed["admin"]
        for place in (printed, envoy):
            place["by_name"] = {each["name"]: each for each in place["static_resources"]["clusters"]}
        for name in ("pods", "access_log", "ext_proc"):
            envoy["by_name"][name]["load_assignment"] = printed["by_name"][name]["load_assignment"]
        del envoy["by_name"]
        script = directory / "native.lua"
        script.write_text(native_lua(), "utf-8")
        _manager(envoy)["http_filters"][0]["typed_config"]["default_source_code"] = {"filename": str(script)}
        return yaml.safe_dump(envoy)

    return edit


async def test_envoy_with_the_commented_bootstrap(directory: Path) -> None:
    own = yaml.safe_load((EXAMPLES / "envoy" / "gateway.yaml").read_text("utf-8"))
    endpoints = own["discovery"]["static"]["endpoints"]
    async with AsyncExitStack() as stack:
        pods = [
            await stack.enter_async_context(engine(each["name"], each["models"][0])) for each in endpoints
        ]
        edit = at_these_ports(EXAMPLES / "envoy" / "envoy.yaml", directory)
        config = {"routing": own["routing"]}
        gateway = await stack.enter_async_context(Gateway(directory, engines=pods, config=config, edit=edit))
        for each in endpoints:
            request_id = new_id()
            body = {**chat(stream=True), "model": each["models"][0]}
            answer, text = await ask(gateway, body, **{"x-request-id": request_id})
            report = await gateway.report(request_id)
            assert (answer.status, answer.headers["target-pod"]) == (200, report["pod"])
            assert report["usage_source"] == "reported"
            assert b'"usage"' not in text
        reported = await gateway.metric("envoy_extproc_native_exchanges_total", stage="reported")
    assert reported == len(endpoints)


def by_names(directory: Path, port: int, resolver: Mapping[str, Any]) -> Callable[[str], str]:
    """The bootstrap for Kubernetes: names and all, but for the ports that parts have here, and who resolves names."""
    example = EXAMPLES / "envoy" / "kubernetes" / "envoy.yaml"

    def edit(text: str) -> str:
        (server,) = _addresses(yaml.safe_load(text), "ext_proc")
        envoy = yaml.safe_load(at_these_ports(example, directory)(text))
        written = yaml.safe_load(example.read_text("utf-8"))["static_resources"]["clusters"]
        for ours, theirs in zip(envoy["static_resources"]["clusters"], written, strict=True):
            ours["load_assignment"] = theirs["load_assignment"]
            (group,) = ours["load_assignment"]["endpoints"]
            (host,) = group["lb_endpoints"]
            at = port if ours["name"] == "pods" else int(server.rpartition(":")[2])
            host["endpoint"]["address"]["socket_address"]["port_value"] = at
        envoy["typed_dns_resolver_config"] = resolver
        return yaml.safe_dump(envoy)

    return edit


async def test_envoy_finds_pods_by_the_name_of_a_headless_service(directory: Path) -> None:
    """As in Kubernetes: several addresses under one name, looked up again as pods come. The name server is our own."""
    pods = "engines.inference.svc.cluster.local"
    names = Names({pods: ["127.0.0.2"], "envoy-extproc.inference.svc.cluster.local": ["127.0.0.1"]})
    wanted = {"routing-strategy": "round-robin"}
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(engine("pod-a", MODEL, "127.0.0.2"))
        port = int(first.address.rpartition(":")[2])
        second = await stack.enter_async_context(engine("pod-b", MODEL, "127.0.0.3", port))
        edit = by_names(directory, port, await stack.enter_async_context(names.served()))
        gateway = await stack.enter_async_context(Gateway(directory, engines=[first, second], edit=edit))
        for _ in range(4):  # the second is chosen too, but Envoy does not know it yet
            answer, _ = await ask(gateway, chat(), **wanted)
            assert (answer.status, answer.headers["target-pod"]) == (200, "pod-a")
        names.addresses[pods].append("127.0.0.3")
        served: set[str] = set()
        async with asyncio.timeout(15):
            while served != {"pod-a", "pod-b"}:
                answer, _ = await ask(gateway, chat(), **wanted)
                assert answer.status == 200
                served.add(answer.headers["target-pod"])
                await asyncio.sleep(0.1)
