"""Whether a model's route is taken by its Gateways: read off HTTPRoutes, followed over HTTP, and told on change."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
import structlog.testing
from prometheus_client import generate_latest

from envoy_extproc.discovery import routes
from envoy_extproc.discovery.kubernetes_routes import RouteWatcher
from envoy_extproc.discovery.routes import Found, RouteState
from envoy_extproc.discovery.watch import Pace
from envoy_extproc.server.app import App
from envoy_extproc.settings import KubernetesSource, Settings
from envoy_extproc.telemetry.prometheus import PrometheusMetrics
from tests.support.cluster import ROUTES, Cluster, Object
from tests.support.gateway import eventually

FAST = Pace(first=0.002, longest=0.02)
NOBODY: dict[str, Any] = {
    "server": {"listen": "127.0.0.1:0", "admin": "127.0.0.1:0", "linger_seconds": 0},
    "discovery": {"static": {"endpoints": []}},
}
TAKEN = {"Accepted": ("True", "Accepted"), "ResolvedRefs": ("True", "ResolvedRefs")}


def parent(name: str = "gateway", **conditions: tuple[str, str]) -> Object:
    told = [
        {"type": kind, "status": value, "reason": reason, "message": ""}
        for kind, (value, reason) in (TAKEN | conditions).items()
        if value
    ]
    return {"parentRef": {"name": name}, "controllerName": "c", "conditions": told}


def route(name: str, *parents: Object, headers: Sequence[Object] = (), namespace: str = "default") -> Object:
    return {
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"rules": [{"matches": [{"path": {"value": "/v1"}, "headers": list(headers)}]}]},
        "status": {"parents": list(parents)},
    }


def by_model(value: str, name: str = "model", **more: str) -> Object:
    return {"name": name, "value": value, **more}


def state(*found: Object, model: str = "m") -> RouteState:
    (only,) = routes.states([model], [routes.decode(json.dumps(each)) for each in found])
    return only


@pytest.mark.parametrize(
    "found",
    [
        route("m-router", parent()),
        route("any", parent(), headers=[by_model("m")]),
        route("any", parent(), headers=[by_model("m", "Model", type="Exact")]),
        route("any", parent(), headers=[by_model("m", "x-gateway-model-name")]),
        route("any", parent(), parent("other"), headers=[by_model("x", "user"), by_model("m")]),
    ],
)
def test_a_route_that_is_taken(found: Object) -> None:
    assert state(found) == RouteState("m", "accepted", (Found(f"default/{found['metadata']['name']}", ()),))


@pytest.mark.parametrize(
    "found",
    [
        route("m", parent()),
        route("router-m", parent()),
        route("any", parent(), headers=[by_model("n")]),
        route("any", parent(), headers=[by_model("m", "user")]),
        route("any", parent(), headers=[by_model("m", type="RegularExpression")]),
        {"metadata": {"name": "any"}, "spec": {}},
        {"metadata": {"name": "any"}, "spec": {"rules": None}, "status": {"parents": None}},
        {"metadata": {"name": "any"}, "spec": {"rules": [{}, {"matches": [{}]}]}},
    ],
)
def test_a_route_that_is_another_ones(found: Object) -> None:
    assert state(found) == RouteState("m", "missing", ())


@pytest.mark.parametrize(
    ("parents", "wrong"),
    [
        ([], ("no Gateway has taken it up",)),
        ([parent(Accepted=("False", "NoMatchingParent"))], ("gateway: not Accepted: NoMatchingParent",)),
        (
            [parent(ResolvedRefs=("False", "BackendNotFound"))],
            ("gateway: not ResolvedRefs: BackendNotFound",),
        ),
        ([parent(Accepted=("Unknown", "Pending"))], ("gateway: not Accepted: Pending",)),
        ([parent(ResolvedRefs=("", ""))], ("gateway: ResolvedRefs is not told",)),
        ([parent(), parent("b", Accepted=("False", ""))], ("b: not Accepted: no reason",)),
    ],
)
def test_what_is_wrong_with_a_route(parents: Sequence[Object], wrong: tuple[str, ...]) -> None:
    assert state(route("m-router", *parents)) == RouteState(
        "m", "refused", (Found("default/m-router", wrong),)
    )


def test_one_good_route_is_enough() -> None:
    found = state(route("m-router"), route("other", parent(), headers=[by_model("m")]))
    assert found.state == "accepted"
    assert [each.name for each in found.routes] == ["default/m-router", "default/other"]


@contextlib.asynccontextmanager
async def watching(
    cluster: Cluster, directory: Path, models: Sequence[str], **source: Any
) -> AsyncIterator[RouteWatcher]:
    settings = KubernetesSource(kubeconfig=cluster.kubeconfig(directory), routes=True, **source)
    watcher = RouteWatcher(settings, models=lambda: tuple(models), pace=FAST)
    task = asyncio.ensure_future(watcher.run())
    try:
        yield watcher
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def told(watcher: RouteWatcher) -> dict[str, str]:
    return {each.model: each.state for each in watcher.states}


async def test_routes_are_followed_and_told_on_change(tmp_path: Path) -> None:
    models = ["good", "bad", "none"]
    async with Cluster(ROUTES) as cluster:
        await cluster.put(route("good-router", parent()))
        await cluster.put(route("bad-router", parent(Accepted=("False", "NoMatchingParent"))))
        with structlog.testing.capture_logs() as logs:
            async with watching(cluster, tmp_path, models) as watcher:
                await eventually(
                    lambda: told(watcher) == {"good": "accepted", "bad": "refused", "none": "missing"}
                )
                await eventually(lambda: cluster.live == 1)
                await cluster.put(route("bad-router", parent()))
                await eventually(lambda: told(watcher)["bad"] == "accepted")
                await cluster.delete("good-router")
                await eventually(lambda: told(watcher)["good"] == "missing")
                await cluster.delete("bad-router")  # which no watch will tell of
                cluster.forget()
                cluster.cut()
                await eventually(lambda: told(watcher)["bad"] == "missing")
                await cluster.put(route("x", parent(), headers=[by_model("none")]))
                await eventually(lambda: told(watcher)["none"] == "accepted")
                models.append("late")
                await eventually(lambda: told(watcher).get("late") == "missing")
    changes = [(log["model"], log["state"], log["log_level"]) for log in logs if log["event"] == "route"]
    assert changes == [
        ("bad", "refused", "warning"),
        ("none", "missing", "warning"),
        ("bad", "accepted", "info"),
        ("good", "missing", "warning"),
        ("bad", "missing", "warning"),
        ("none", "accepted", "info"),
        ("late", "missing", "warning"),
    ]
    assert cluster.seen[0].url.path == "/apis/gateway.networking.k8s.io/v1/namespaces/default/httproutes"


async def test_routes_can_be_in_other_namespaces_than_pods(tmp_path: Path) -> None:
    async with Cluster(ROUTES) as cluster:
        await cluster.put(route("m-router", parent(), namespace="aibrix-system"))
        await cluster.put(route("n-router", parent(), namespace="elsewhere"))
        async with watching(cluster, tmp_path, ["m", "n"], route_namespaces=("aibrix-system",)) as watcher:
            await eventually(lambda: told(watcher) == {"m": "accepted", "n": "missing"})


async def test_nothing_is_told_before_the_first_list(tmp_path: Path) -> None:
    async with Cluster() as without_routes, watching(without_routes, tmp_path, ["m"]) as watcher:
        await eventually(lambda: bool(watcher.healths) and watcher.healths[0].failures["404"] > 2)
        assert watcher.states == ()


async def test_the_server_tells_of_pods_and_routes(tmp_path: Path) -> None:
    async with Cluster(ROUTES) as cluster:
        source = {"kubeconfig": str(cluster.kubeconfig(tmp_path)), "routes": True}
        app, stop = App(Settings(**(NOBODY | {"discovery": {"kubernetes": source}}))), asyncio.Event()
        running = asyncio.ensure_future(app.run(stop))
        await eventually(lambda: app.admin_port != 0)
        async with aiohttp.ClientSession(f"http://127.0.0.1:{app.admin_port}") as admin:
            async with asyncio.timeout(5):
                while "httproutes" not in {each.resource.plural for each in cluster.seen if each.resource}:
                    await asyncio.sleep(0.01)
            async with admin.get("/readyz") as answer:
                assert answer.status == 503, "the cluster has no pods to list"
            async with admin.get("/debug/routes") as answer:
                assert (answer.status, await answer.json()) == (200, [])
            async with admin.get("/metrics") as answer:
                text = await answer.text()
        assert 'envoy_extproc_discovery_silent_seconds{watched="routes of default"}' in text
        assert 'envoy_extproc_discovery_failures_total{kind="404",watched="pods of default"}' in text
        stop.set()
        await running


async def test_routes_that_nobody_watches() -> None:
    app, stop = App(Settings(**NOBODY)), asyncio.Event()
    running = asyncio.ensure_future(app.run(stop))
    await eventually(lambda: app.admin_port != 0)
    async with (
        aiohttp.ClientSession() as admin,
        admin.get(f"http://127.0.0.1:{app.admin_port}/debug/routes") as answer,
    ):
        assert answer.status == 404
        assert "discovery.kubernetes.routes" in await answer.text()
    stop.set()
    await running


def test_metrics() -> None:
    made = PrometheusMetrics(lambda: (), known=lambda _: True)
    made.follow_discovery(
        lambda: [("pods", 1.5, {"gone": 2})], lambda: [("port", 3)], lambda: [("m", True), ("n", False)]
    )
    text = generate_latest(made.registry).decode()
    for sample in (
        'envoy_extproc_discovery_silent_seconds{watched="pods"} 1.5',
        'envoy_extproc_discovery_failures_total{kind="gone",watched="pods"} 2.0',
        'envoy_extproc_discovery_unusable_pods{reason="port"} 3.0',
        'envoy_extproc_route_accepted{model="m"} 1.0',
        'envoy_extproc_route_accepted{model="n"} 0.0',
    ):
        assert sample in text


def test_states_are_shown_as_they_are() -> None:
    found = state(route("m-router"))
    assert json.loads(msgspec.json.encode(found)) == {
        "model": "m",
        "state": "refused",
        "routes": [{"name": "default/m-router", "wrong": ["no Gateway has taken it up"]}],
    }
