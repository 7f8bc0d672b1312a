"""What an operator looks at: health, readiness, metrics, debug pages."""

from __future__ import annotations

import aiohttp
import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support.gateway import MODEL, Gateway, chat, new_id


@pytest.mark.parametrize(
    "service", ["", "liveness", "readiness", "envoy.service.ext_proc.v3.ExternalProcessor"]
)
async def test_grpc_health(gateway: Gateway, service: str) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{gateway.server_ports[0]}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_grpc_health_of_what_is_not_there(gateway: Gateway) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{gateway.server_ports[0]}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Check(health_pb2.HealthCheckRequest(service="nobody"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
async def test_http_health(gateway: Gateway, path: str) -> None:
    async with aiohttp.ClientSession() as session, session.get(gateway.admin_url() + path) as answer:
        assert answer.status == 200


NAMES = [
    "gen_ai_server_request_duration_seconds_bucket",
    "gen_ai_server_time_to_first_token_seconds_bucket",
    "gen_ai_server_time_per_output_token_seconds_bucket",
    "gen_ai_client_token_usage_bucket",
    "envoy_extproc_requests_total",
    "envoy_extproc_errors_total",
    "envoy_extproc_decision_seconds_bucket",
    "envoy_extproc_bypassed_requests_total",
    "envoy_extproc_usage_total",
]


async def test_metrics_have_the_names_dashboards_know(gateway: Gateway, http: aiohttp.ClientSession) -> None:
    for model in (MODEL, "nobody"):
        body = chat(max_tokens=3, stream=True) | {"model": model}
        request_id = new_id()
        headers = {"x-request-id": request_id}
        async with http.post("/v1/chat/completions", json=body, headers=headers) as answer:
            await answer.read()
        await gateway.report(request_id)
    names = {sample.partition("{")[0] for sample in await gateway.metrics()}
    assert set(NAMES) <= names
    assert not any('"nobody"' in sample for sample in await gateway.metrics())


async def test_open_metrics_on_request(gateway: Gateway) -> None:
    headers = {"accept": "application/openmetrics-text; version=1.0.0"}
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{gateway.admin_url()}/metrics", headers=headers) as answer,
    ):
        assert answer.content_type == "application/openmetrics-text"
        assert (await answer.text()).endswith("# EOF\n")


async def test_debug_pages_from_loopback(gateway: Gateway, http: aiohttp.ClientSession) -> None:
    async with http.post("/v1/chat/completions", json=chat(max_tokens=1)) as answer:
        pod = answer.headers["target-pod"]
    async with aiohttp.ClientSession(gateway.admin_url()) as session:
        async with session.get("/debug/endpoints") as answer:
            endpoints = await answer.json()
        async with session.get("/debug/decisions") as answer:
            decisions = await answer.json()
    assert {each["name"] for each in endpoints} == set(gateway.engines)
    assert all(each["stats"]["kv_cache_usage"] is not None for each in endpoints)
    assert decisions[0]["order"][0] == pod
    assert decisions[0]["model"] == MODEL
    assert set(decisions[0]["scores"]["least-request"]) == set(gateway.engines)
