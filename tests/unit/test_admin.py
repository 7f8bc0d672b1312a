"""Who may see /debug: loopback, or the bearer of the token; and what is to be seen there."""

from __future__ import annotations

import io
import random
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry

from envoy_extproc.endpoints import Endpoint, EngineState, EngineStats, ServedModel, Snapshot
from envoy_extproc.scheduling import registry
from envoy_extproc.scheduling.interfaces import SchedulingRequest
from envoy_extproc.server.admin import Admin
from envoy_extproc.server.director import Director, RoutingRules
from tests.support.builders import MODEL, endpoint

TOKEN = "correct-horse"
PAGES = [("GET", "/debug/endpoints"), ("GET", "/debug/decisions"), ("POST", "/debug/explain")]


def director(
    states: Mapping[str, EngineState] | None = None,
    avoided: Callable[[str, float], bool] = lambda _, __: False,
) -> Director:
    return Director(
        profiles=registry.build(),
        rules=RoutingRules(max_stats_age=1e12),
        in_flight=lambda _: 0,
        states=states or {},
        rng=random.Random(0),
        avoided=avoided,
    )


@asynccontextmanager
async def served(
    token: str | None = None, *, ready: bool = True, by: Director | None = None
) -> AsyncIterator[aiohttp.ClientSession]:
    admin = Admin(
        registry=CollectorRegistry(), ready=lambda: ready, director=by or director(), debug_token=token
    )
    runner = web.AppRunner(admin.app())
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{runner.addresses[0][1]}") as session:
            yield session
    finally:
        await runner.cleanup()


class Elsewhere(Admin):
    """For whom nobody is on loopback."""

    def allows(self, remote: str | None, authorization: str) -> bool:
        return super().allows("10.1.2.3", authorization)


@pytest.mark.parametrize(("method", "path"), PAGES)
async def test_loopback_sees_debug_without_a_token(method: str, path: str) -> None:
    async with served() as session, session.request(method, path) as answer:
        assert answer.status in (200, 400)  # an empty question is none


@pytest.mark.parametrize(("method", "path"), PAGES)
@pytest.mark.parametrize(
    ("token", "sent", "status"),
    [(None, "", 403), (TOKEN, "", 403), (TOKEN, "Bearer wrong", 403), (TOKEN, f"Bearer {TOKEN}", 200)],
)
async def test_every_page_is_guarded(
    method: str, path: str, token: str | None, sent: str, status: int
) -> None:
    by = director()
    by.update(Snapshot([endpoint(1)]))
    admin = Elsewhere(registry=CollectorRegistry(), ready=lambda: True, director=by, debug_token=token)
    runner = web.AppRunner(admin.app())
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        url = f"http://127.0.0.1:{runner.addresses[0][1]}{path}"
        async with (
            aiohttp.ClientSession(headers={"authorization": sent} if sent else {}) as session,
            session.request(method, url, data=b"{}" if method == "POST" else None) as answer,
        ):
            text = await answer.text()
            assert answer.status == status, text
            assert TOKEN not in text
            assert status == 200 or "pod-1" not in text
    finally:
        await runner.cleanup()


@pytest.mark.parametrize(
    ("sent", "token", "allowed"),
    [
        (f"Bearer {TOKEN}", TOKEN, True),
        ("Bearer wrong", TOKEN, False),
        ("", TOKEN, False),
        ("Bearer ", None, False),
        ("Bearer None", None, False),
    ],
)
def test_others_need_the_token(sent: str, token: str | None, allowed: bool) -> None:
    admin = Admin(registry=CollectorRegistry(), ready=lambda: True, director=director(), debug_token=token)
    assert admin.allows("10.1.2.3", sent) is allowed
    assert admin.allows("127.0.0.1", sent)
    assert admin.allows("::1", sent)
    assert admin.allows(None, sent) is allowed


async def test_not_ready() -> None:
    async with served(ready=False) as session:
        async with session.get("/readyz") as answer:
            assert answer.status == 503
        async with session.get("/healthz") as answer:
            assert answer.status == 200


# -- /debug/endpoints ----------------------------------------------------------------------------------------------

STATS = EngineStats(
    at=0.0,
    running=2.0,
    kv_cache_usage=0.5,
    queue_seconds=0.25,
    loras=frozenset({"lora-1"}),
    max_loras=4,
    utilization=float("nan"),
)
STATES = {
    "10.0.0.1:8000": EngineState(
        stats=STATS,
        interval=0.2,
        served=(ServedModel(id="base", entry=b'{"root":"/secret"}'), ServedModel(id="lora-1", parent="base")),
    ),
    "10.0.0.2:8000": EngineState(failures=3, error="no answer within 1 s", reachable=False, interval=5.0),
}


async def test_endpoints_tell_all_that_is_known() -> None:
    by = director(STATES, avoided=lambda address, _: address in ("10.0.0.2:8000", "10.0.0.3:8000"))
    by.update(
        Snapshot(
            [
                Endpoint(name="pod-1", address="10.0.0.1:8000", models=(MODEL,), labels={"gpu": "a10"}),
                *map(endpoint, (2, 3)),
            ]
        )
    )
    async with served(by=by) as session, session.get("/debug/endpoints") as answer:
        text = await answer.text()
        one, two, three = msgspec.json.decode(text)
    assert one["stats"].keys() - {"age_seconds"} == set(EngineStats.__struct_fields__) - {"at"}
    assert (one["stats"]["queue_seconds"], one["stats"]["loras"]) == (0.25, ["lora-1"])
    assert (one["labels"], one["not_chosen"], one["reachable"]) == ({"gpu": "a10"}, None, True)
    assert one["scrape"] | {"last_seconds_ago": 0} == {
        "error": None,
        "failures": 0,
        "interval_seconds": 0.2,
        "last_seconds_ago": 0,
    }
    assert one["served"] == [{"id": "base", "parent": None}, {"id": "lora-1", "parent": "base"}]
    assert "secret" not in text
    assert two["scrape"] == {
        "error": "no answer within 1 s",
        "failures": 3,
        "interval_seconds": 5.0,
        "last_seconds_ago": None,
    }
    assert two["not_chosen"] == "unreachable: no answer within 1 s; avoided: requests to it failed lately"
    assert (three["not_chosen"], three["reachable"]) == ("avoided: requests to it failed lately", False)
    assert (three["stats"], three["served"]) == (None, None)


# -- /debug/decisions ----------------------------------------------------------------------------------------------


def decided() -> Director:
    by = director()
    by.update(Snapshot([endpoint(1), endpoint(2), endpoint(3, models=("other",))]))
    for number, model in enumerate([MODEL, "other", MODEL, MODEL]):
        by.schedule(SchedulingRequest(model=model, policy="least-kv-cache" if number == 3 else None), 0.0)
    return by


@pytest.mark.parametrize(
    ("query", "models"),
    [
        ("", [MODEL, MODEL, "other", MODEL]),
        ("?limit=1", [MODEL]),
        ("?limit=0", []),
        ("?limit=99", [MODEL, MODEL, "other", MODEL]),
        ("?model=other", ["other"]),
        (f"?model={MODEL}&limit=2", [MODEL, MODEL]),
        ("?model=none", []),
    ],
)
async def test_decisions_newest_first(query: str, models: list[str]) -> None:
    async with served(by=decided()) as session, session.get(f"/debug/decisions{query}") as answer:
        assert [each["model"] for each in await answer.json()] == models


async def test_decisions_tell_their_reasons() -> None:
    async with served(by=decided()) as session, session.get("/debug/decisions?limit=1") as answer:
        (newest,) = await answer.json()
    assert (newest["policy"], newest["source"], newest["decided_by"]) == (
        "least-kv-cache",
        "header",
        "least-request",
    )
    assert (newest["fallback_reason"], newest["missing"]) == ("no-stats", ["least-kv-cache"])
    assert newest["because"][0] == "The policy is least-kv-cache, from the header routing-strategy."
    assert newest["scores"] == {"least-request": {"pod-1": 1.0, "pod-2": 1.0}}
    assert {each["name"] for each in newest["candidates"]} == {"pod-1", "pod-2"}


@pytest.mark.parametrize("limit", ["x", "-1", "1.5", "", "²", "1" * 40])
async def test_a_limit_is_a_number(limit: str) -> None:
    async with served(by=decided()) as session:
        async with session.get("/debug/decisions", params={"limit": limit}) as answer:
            assert answer.status == 400


# -- /debug/explain ------------------------------------------------------------------------------------------------


async def ask(by: Director, question: Any) -> tuple[int, Any, Mapping[str, str]]:
    sent = io.BytesIO(msgspec.json.encode(question))
    async with served(by=by) as session, session.post("/debug/explain", data=sent) as answer:
        body = await (answer.json() if answer.content_type == "application/json" else answer.text())
        return answer.status, body, answer.headers


async def test_explain_decides_by_live_state_and_counts_nothing() -> None:
    by = decided()
    before = len(by.decisions)
    question = {"headers": {"routing-strategy": "round-robin"}, "body": {"model": MODEL, "messages": []}}
    answers = [await ask(by, question) for _ in range(2)]
    assert [(status, told["chosen"]) for status, told, _ in answers] == [(200, "pod-1")] * 2
    _, told, _ = answers[0]
    assert (told["policy"], told["source"]) == ("round-robin", "header")
    assert [row["name"] for row in told["endpoints"]] == ["pod-1", "pod-2"]
    assert len(by.decisions) == before


async def test_explain_refuses_as_the_client_would_be() -> None:
    status, body, headers = await ask(decided(), {"body": {"model": "none"}})
    assert (status, body["error"]["code"]) == (404, "model_not_found")
    assert headers["x-error-no-model-backends"] == "true"


async def test_explain_says_what_is_no_question() -> None:
    status, text, _ = await ask(decided(), {"nope": 1})
    assert (status, "nope" in text) == (400, True)


async def test_a_long_prompt_can_be_asked_about() -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x" * 5_000_000}]}
    status, told, _ = await ask(decided(), {"body": body})
    assert (status, told["model"]) == (200, MODEL)
