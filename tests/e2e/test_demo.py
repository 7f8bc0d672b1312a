"""The first thing a new user types."""

from __future__ import annotations

import asyncio
import re
import signal
import sys

import pytest

from envoy_extproc.simulation.comparison import CONVERSATIONS, POLICIES, QUESTIONS
from tests.support.gateway import fast_engines


async def demo(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "envoy_extproc", "demo", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )


async def output_of(process: asyncio.subprocess.Process) -> str:
    async with asyncio.timeout(60):
        out, _ = await process.communicate()
    assert process.returncode == 0, out.decode()
    return out.decode()


async def test_demo_once_shows_every_outcome() -> None:
    shown = await output_of(await demo("--once"))
    faults = ("client", "overload", "model_server", "content", "network")
    for outcome in ("success", *(f": {fault}" for fault in faults), "(try 3)", "estimated", "reported"):
        assert outcome in shown, outcome
    (sums,) = [line for line in shown.splitlines() if line.startswith("In flight now: 0.")]
    assert all(f"{fault} " in sums for fault in faults)  # what the metrics say after all of it
    for row, status, told in (
        ("pin to no known pod", "400", "names no ready endpoint of this model"),
        ("no pod is ready", "503", "No endpoint is ready."),
    ):
        after = shown.partition(f"\n{row} ")[2].splitlines()
        assert status in after[0].split()
        assert told in after[1]
    rows = {policy: _compared(shown, policy) for policy in POLICIES}
    assert all(sum(spread) == CONVERSATIONS * len(QUESTIONS) for _, spread in rows.values())
    best, _ = rows["prefix-cache"]
    assert best > max(rows["round-robin"][0], rows["least-request"][0])


def _compared(shown: str, policy: str) -> tuple[int, list[int]]:
    """Percent of the prompt tokens that the engines had cached by this policy, and how many requests each pod got."""
    found = re.search(rf"^{policy} +[█·]+ +(\d+)% [█·]+ .*ms((?: +\d+)+)$", shown, re.MULTILINE)
    assert found is not None, shown
    return int(found[1]), [int(count) for count in found[2].split()]


async def test_demo_with_engines_of_ones_own() -> None:
    async with fast_engines(2) as engines:
        urls = [argument for engine in engines for argument in ("--engine", f"http://{engine.address}")]
        shown = await output_of(await demo("--once", *urls))
        assert "conversations" not in shown  # their caches are not ours to empty
        assert all(engine.address in shown for engine in engines)
        assert all(len(engine.requests) > 2 for engine in engines)


async def test_demo_says_when_an_engine_is_not_there() -> None:
    process = await demo("--once", "--engine", "http://127.0.0.1:9")
    async with asyncio.timeout(30):
        out, _ = await process.communicate()
    assert process.returncode == 2
    assert b"127.0.0.1:9" in out
    assert b"Traceback" not in out


@pytest.mark.parametrize("url", ["https://127.0.0.1:9", "HTTPS://llm.example/v1", "ftp://127.0.0.1:9"])
async def test_demo_says_that_engines_are_asked_in_plain_http(url: str) -> None:
    process = await demo("--once", "--engine", url)
    async with asyncio.timeout(30):
        out, _ = await process.communicate()
    assert process.returncode == 2
    assert out.decode().splitlines() == [
        f"{url}: the demo's Envoy speaks plain HTTP to an engine, so give an http:// URL"
    ]


async def test_demo_stays_until_it_is_stopped() -> None:
    process = await demo()
    assert process.stdout is not None
    async with asyncio.timeout(60):
        while b"Still up" not in await process.stdout.readline():
            pass
        assert process.returncode is None
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 0
