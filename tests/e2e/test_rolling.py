"""Servers that are replaced under load: nobody fails, no stream is cut, nothing passes by, every request has its one report."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.support.rolling import Dns, Load, Rolling, Rollout, play, rolling

DRAIN_SECONDS = 4.0
GRACE_SECONDS = DRAIN_SECONDS + 6.0  # termination grace, of which docs/operations.md says why


def config(**server: float) -> dict[str, dict[str, object]]:
    return {
        "responses": {"accounting": "native", "hold_streams": True},
        "envoy": {"fail_open": False},
        "server": {"drain_seconds": DRAIN_SECONDS, "linger_seconds": 1.5, **server},
    }


def assert_nothing_lost(fleet: Rolling) -> None:
    assert [phase for phase in fleet.phases if not phase.clean] == []
    assert all(phase.requests > 0 for phase in fleet.phases)


async def test_scaling_and_a_rolling_restart(directory: Path) -> None:
    """Both lanes, and open and closed, are in the table of `python -m tests.bench.rolling`: a minute each."""
    load = Load(long_seconds=DRAIN_SECONDS + 3)
    async with rolling(directory, config()) as fleet:
        await play(fleet, load, offsets=(-1.0, 0.0, 1.5), grace=GRACE_SECONDS)
    print(*(f"{phase.name}: {phase.requests}" for phase in fleet.phases), sep="\n")
    assert_nothing_lost(fleet)
    assert sum(phase.requests for phase in fleet.phases) > 1000
    assert sum(phase.shown for phase in fleet.phases) == 0


async def test_the_only_server_is_replaced(directory: Path) -> None:
    """Each time the new one has just become ready, and the old one is told in the same moment."""
    load = Load(streams=20, long_streams=0)
    async with rolling(directory, config()) as fleet:
        fleet.begin("1 server")
        async with load.on(fleet):
            await asyncio.sleep(1)
            for offset in (0.0, 1.5):
                fleet.begin(f"replaced, listed until {offset:+g} s")
                (old,) = fleet.listed
                await fleet.add()
                await fleet.remove(old, delist_after=offset, grace=GRACE_SECONDS)
        await fleet.settle()
    assert_nothing_lost(fleet)


@pytest.mark.parametrize("linger", [0.0, 4.0])
async def test_who_only_follows_a_list_is_served_until_it_changes(directory: Path, linger: float) -> None:
    """An Envoy that asks nobody for health and does not retry: without lingering, requests meet a closed port."""
    load = Load(streams=0, long_streams=0, rate=40)
    async with rolling(directory, config(linger_seconds=linger), bare=True) as fleet:
        fleet.begin("2 servers")
        async with load.on(fleet):
            await fleet.add()
            await asyncio.sleep(1)
            restart = fleet.begin("1 of 2 ends, listed for 2 s more")
            await fleet.remove(fleet.listed[0], delist_after=2.0, grace=GRACE_SECONDS)
        await fleet.settle()
    if linger:
        assert_nothing_lost(fleet)
    else:
        assert restart.failed > 0  # so this test can see what it is about
        assert restart.truncated == restart.doubled == 0


async def test_a_rollout_behind_a_name(directory: Path) -> None:
    """The waits of docs/operations.md, all times shorter: Envoy knows a new server 2 s after it is ready at the latest."""
    rollout = Rollout(min_ready=3, pre_stop=2, grace=GRACE_SECONDS, replicas=2)
    async with rolling(directory, config(), dns=Dns(refresh=1, behind=1)) as fleet:
        await rollout.play(fleet, Load(streams=20, long_streams=0), settled=3)
    assert_nothing_lost(fleet)
