"""The scorer of docs/routing.md as an installed package, behind a real Envoy; and one that fails whatever it is asked."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from envoy_extproc.explain import question, there
from envoy_extproc.simulation.engine import Engine
from tests.support.distributions import files, install
from tests.support.gateway import MODEL, Gateway, chat, fast_engines, new_id
from tests.support.pages import example_scorer

CHAT = "/v1/chat/completions"
FAILING = """
class Failing:
    def score(self, request, candidates):
        raise RuntimeError("as ever")

    def remember(self, request, chosen):
        raise RuntimeError("likewise")

    def keep_models(self, models):
        raise RuntimeError("likewise")
"""


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("packages") / "site"
    install(directory, example_scorer())
    install(directory, files("failing-one", {"failing": FAILING}, {"failing": "failing:Failing"}))
    return directory


def priced(engines: Sequence[Engine]) -> list[dict[str, Any]]:
    """pod-a is the dearest, the last one the cheapest."""
    return [
        {
            "name": engine.options.name,
            "address": engine.address,
            "models": [MODEL],
            "labels": {"price": str(len(engines) - place)},
        }
        for place, engine in enumerate(engines)
    ]


async def asked(http: aiohttp.ClientSession, strategy: str = "") -> tuple[str, str]:
    """Who served a request, and which policy decided."""
    headers = {"routing-strategy": strategy} if strategy else {}
    async with http.post(CHAT, json=chat(max_tokens=1), headers=headers) as answer:
        assert answer.status == 200, await answer.text()
        return answer.headers["target-pod"], answer.headers["routing-strategy"]


async def test_the_example_decides(directory: Path, packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(packages))
    config: dict[str, dict[str, Any]] = {"routing": {"policy": "cheapest-first"}}
    async with (
        fast_engines(3) as engines,
        Gateway(directory, pods=priced(engines), config=config) as gateway,
        aiohttp.ClientSession(gateway.url) as http,
    ):
        assert {await asked(http) for _ in range(4)} == {("pod-c", "cheapest-first")}
        mixture = "cheapest-first:1,least-request:2"
        hanging = await http.post(CHAT, json=chat(stream=True), headers={"x-simulate": "hang=1"})
        assert hanging.headers["target-pod"] == "pod-c"
        assert {await asked(http, mixture) for _ in range(4)} == {("pod-b", mixture)}
        told = await there(gateway.admin_url(), question(CHAT, [], json.dumps(chat()).encode()), None)
        hanging.close()
        assert told.explanation is not None
        scores = {row.name: row.scores["cheapest-first"] for row in told.explanation.endpoints}
        assert scores == pytest.approx({"pod-a": 1 / 4, "pod-b": 1 / 3, "pod-c": 1 / 2})
        async with http.get(f"{gateway.admin_url()}/debug/decisions?limit=4") as answer:
            decisions = await answer.json()
        assert {decision["policy"] for decision in decisions} == {mixture}
        assert all(decision["scores"]["cheapest-first"]["pod-c"] == 1.0 for decision in decisions)
        decided = "envoy_extproc_decision_seconds_count"
        assert await gateway.metric(decided, policy="cheapest-first") == 5
        assert await gateway.metric(decided, policy="mix") == 4


async def test_without_its_data_it_says_so(
    directory: Path, packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(packages))
    config: dict[str, dict[str, Any]] = {"models": {MODEL: {"policy": "cheapest-first"}}}
    async with (
        fast_engines(1) as engines,
        Gateway(directory, engines=engines, config=config) as gateway,
        aiohttp.ClientSession(gateway.url) as http,
    ):
        assert await asked(http) == ("pod-a", "least-request")
        fallbacks = "envoy_extproc_policy_fallbacks_total"
        assert await gateway.metric(fallbacks, policy="cheapest-first", reason="no-price") == 1


async def test_one_that_fails_breaks_nothing(
    directory: Path, packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(packages))
    config: dict[str, dict[str, Any]] = {"routing": {"policy": "failing"}}
    async with (
        fast_engines(2) as engines,
        Gateway(directory, engines=engines, config=config) as gateway,
        aiohttp.ClientSession(gateway.url) as http,
    ):
        served = Counter([await asked(http) for _ in range(20)])
        assert {policy for _, policy in served} == {"least-request"}
        request_id = new_id()
        headers = {"x-request-id": request_id, "routing-strategy": "failing:3,least-request"}
        async with http.post(CHAT, json=chat(max_tokens=1), headers=headers) as answer:
            assert (answer.status, answer.headers["routing-strategy"]) == (200, "failing:3,least-request:1")
        fallbacks = "envoy_extproc_policy_fallbacks_total"
        assert await gateway.metric(fallbacks, policy="failing", reason="scorer-failed") == 20
        assert await gateway.metric("envoy_extproc_errors_total") == 0
        failures = await gateway.metric("envoy_extproc_scorer_failures_total", scorer="failing")
        assert failures > 21  # what it should have remembered is counted, too
        told = [line for line in gateway.log_lines() if line["event"] == "scorer_failed"]
        assert len(told) == 1
        assert "as ever" in str(told[0]["exception"]) or "likewise" in str(told[0]["exception"])
        loaded = {line["name"] for line in gateway.log_lines() if line["event"] == "scorer"}
        assert loaded == {"cheapest-first", "failing"}
