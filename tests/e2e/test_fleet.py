"""Pods that fail what they are asked for while they look healthy: what their clients notice of it, in both lanes."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from envoy_extproc.simulation.faults import NONE, Faults
from tests.bench.fleet import LANES, PODS, SCENARIOS, WHOLE, Fleet, Load, before_and_after, failed, fleet
from tests.support.gateway import Gateway, chat, fast_engines, new_id

LOAD = Load()
LAG_SECONDS = 1.0
"""From the end of an exchange to its news: an access-log entry takes 0.1 s, and a machine that runs three tests at a time longer."""


def most_failures(load: Load) -> float:
    """How many clients at most pay for it that three of eight pods are found out, by round-robin.

    An upper bound for each: as if the five good pods were all that is left from the beginning. The pod that hangs is known
    one patience after its third request, the others after their third at most, and each open breaker costs a probe after
    1, 2, 4 ... seconds.
    """
    each_second = load.rate / (PODS - 3)
    three = 3 + each_second * LAG_SECONDS
    seconds = load.requests / load.rate
    probes = next(count for count in itertools.count() if 2**count - 1 > seconds)
    return 3 * three + each_second * load.patience + 3 * probes


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("scenario", SCENARIOS)
async def test_few_clients_notice_pods_that_fail(directory: Path, scenario: str, lane: str) -> None:
    ends = await before_and_after(directory, scenario, lane=lane, policy="round-robin", load=LOAD)
    before, after = map(failed, ends)
    print(f"{dict(ends[0])} without breakers, {dict(ends[1])} with; bound {most_failures(LOAD):.0f}")
    assert before >= LOAD.requests * 3 / PODS - 3  # each pod has its turn, good or bad
    assert after <= most_failures(LOAD)
    assert after <= before / 3


# -- the way out and back ----------------------------------------------------------------------------------------------


async def state(made: Fleet, pod: str) -> float:
    return await made.gateway.metric("envoy_extproc_endpoint_breaker_state", endpoint=pod)


async def endpoints(made: Fleet) -> dict[str, float]:
    """How many of the model's pods are in which state."""
    states = ("ready", "failing", "unreachable")
    return {each: await made.gateway.metric("envoy_extproc_endpoints", state=each) for each in states}


@pytest.mark.parametrize("lane", LANES)
async def test_a_pod_that_is_well_again_serves_again(directory: Path, lane: str) -> None:
    async with fleet(directory, {"pod-b": Faults(error=500)}, lane=lane, pods=2, longest_seconds=2) as made:
        async with asyncio.timeout(10):
            while await state(made, "pod-b") != 2:
                await made.ask()
        assert await endpoints(made) == {"ready": 1, "failing": 1, "unreachable": 0}
        asked = len(made.engines["pod-b"].requests)
        assert [await made.ask() for _ in range(10)] == [WHOLE] * 10
        assert len([each for each in made.engines["pod-b"].requests if each.method == "POST"]) <= asked
        made.engines["pod-b"].faults = NONE
        async with asyncio.timeout(10):
            while await state(made, "pod-b") != 0:
                assert await made.ask() == WHOLE
                await asyncio.sleep(0.05)
        assert await state(made, "pod-a") == 0
        assert await endpoints(made) == {"ready": 2, "failing": 0, "unreachable": 0}
        moves = [line for line in made.gateway.log_lines() if line["event"].startswith("breaker_")]
        assert {line["endpoint"] for line in moves} == {"pod-b"}
        assert [line["event"] for line in moves] == ["breaker_open", "breaker_half_open", "breaker_closed"]
        opened = await made.gateway.metric(
            "envoy_extproc_breaker_opened_total", endpoint="pod-b", reason="error"
        )
        assert opened == 1
        before = len(made.engines["pod-b"].requests)
        assert [await made.ask() for _ in range(4)] == [WHOLE] * 4
        assert len(made.engines["pod-b"].requests) >= before + 2


# -- what Envoy's words for a failure are taken for --------------------------------------------------------------------


def impatient(bootstrap: str) -> str:
    """An Envoy that gives up on a stream after a second without a byte."""
    tree: dict[str, Any] = yaml.safe_load(bootstrap)
    (chain,) = tree["static_resources"]["listeners"][0]["filter_chains"]
    manager = chain["filters"][0]["typed_config"]
    manager["stream_idle_timeout"] = "1s"
    for route in manager["route_config"]["virtual_hosts"][0]["routes"]:
        route["route"]["idle_timeout"] = "1s"
    return yaml.safe_dump(tree)


REASONS: Mapping[str, str | None] = {
    "error=500": "error",
    "error=502": "error",
    "error=503": "overload",
    "error=429": "overload",
    "error=400": None,
    "error-event=2": "error",
    "reset=0": "refused",
    "reset=3": "cut",
    "no-done": "truncated",
    "hang=0": "silent",
    "hang=3": "cut",
}


@asynccontextmanager
async def one_pod(directory: Path, lane: str) -> AsyncIterator[Fleet]:
    """A gateway before one pod, whose breaker opens with the first error and for a moment only."""
    quick = {"consecutive_errors": 1, "silent_seconds": 0.5, "first_seconds": 0.2, "longest_seconds": 0.2}
    config: dict[str, dict[str, Any]] = {"responses": {"accounting": lane}, "routing": {"breaker": quick}}
    async with (
        fast_engines(1) as engines,
        Gateway(directory, engines=engines, config=config, edit=impatient) as gateway,
        aiohttp.ClientSession(gateway.url) as http,
    ):
        yield Fleet(gateway, http)


async def reason_after(made: Fleet, fault: str) -> str | None:
    """Why the breaker opens when a request meets the fault; None if it does not."""
    async with asyncio.timeout(10):
        while await made.ask() != WHOLE or await state(made, "pod-a"):
            await asyncio.sleep(0.1)
        # A good answer that is told of late is taken for one that came meanwhile: then the pod was not silent.
        while await made.gateway.metric("envoy_extproc_native_unreported_exchanges"):
            await asyncio.sleep(0.02)
    before, request_id = len(made.gateway.log_lines()), new_id()
    headers = {"x-simulate": fault, "x-request-id": request_id}
    try:
        body = chat(stream=True, max_tokens=8)
        async with made.http.post("/v1/chat/completions", json=body, headers=headers) as answer:
            await answer.read()
    except aiohttp.ClientError:
        pass
    await made.gateway.report(request_id, seconds=30)
    await state(made, "pod-a")  # whoever answers this has done with the report: the breaker has heard of it
    lines = made.gateway.log_lines()[before:]
    reasons = [str(line["reason"]) for line in lines if line["event"] == "breaker_open"]
    assert len(reasons) < 2
    return reasons[0] if reasons else None


async def reasons(directory: Path, lane: str) -> Mapping[tuple[str, str], str | None]:
    async with one_pod(directory / lane, lane) as made:
        return {(lane, fault): await reason_after(made, fault) for fault in REASONS}


async def test_what_opens_a_breaker(directory: Path) -> None:
    for found in await asyncio.gather(*(reasons(directory, lane) for lane in LANES)):
        wrong = {key: reason for key, reason in found.items() if reason != REASONS[key[1]]}
        assert not wrong
