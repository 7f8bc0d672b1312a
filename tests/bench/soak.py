"""Runs the stack under mixed load for minutes and watches memory, in-flight and the books: `python -m tests.bench.soak`.

Of the requests one in ten hangs up in the middle, one in twenty meets an engine's fault, the others stream to their end.
In the end every request must have its one report, what ended in the native lane must have been reported by the access log,
and in-flight must be zero: the status is 1 if not. Whether memory grows is for the reader to judge: the verdict has it at
each minute, and its slope over the second half.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp

from envoy_extproc.simulation.stack import ServerProcess
from tests.support.gateway import Gateway, chat, fast_engines

_PATIENCE = (
    10.0  # seconds for the last reports: the access log is written every 0.1 s, a reset is told at once
)
_DONE = b"data: [DONE]\n\n"
_SAMPLED_EVERY, _TOLD_EVERY = 5.0, 30.0  # seconds
_FEWEST = 10  # samples in a half: below that a slope is chance
_FAULTS = ("reset=3", "error-event=3", "error=500", "no-done", "no-usage", "tail")


Counts = Mapping[str, tuple[float, float]]
"""What the server says, and what it should say."""


class Tally:
    """What the clients did, and had: `broken` answers were not whole although no fault was asked for.

    Args:
        rate: tokens a second that clients together should not go beyond; 0 for as many as come.
    """

    def __init__(self, rate: float) -> None:
        self.sent = 0
        self.left = 0
        self.broken = 0
        self.tokens = 0
        self.began = time.monotonic()
        self._rate = rate

    async def turn(self) -> None:
        """Waits until one more request is within the rate."""
        while self._rate and self.tokens > self._rate * (time.monotonic() - self.began):
            await asyncio.sleep(0.01)


async def client(http: aiohttp.ClientSession, until: float, tally: Tally, rng: random.Random) -> None:
    """Sends one request after the other until the time is up."""
    while time.monotonic() < until:
        await tally.turn()
        tally.sent += 1
        faulty = rng.random() < 0.05
        headers = {"x-simulate": rng.choice(_FAULTS)} if faulty else {}
        body = chat("word " * rng.randrange(5, 400), stream=True, max_tokens=60)
        whole = await ask(http, body, headers, tally, rng if rng.random() < 0.1 else None)
        tally.broken += not whole and not faulty


async def ask(
    http: aiohttp.ClientSession,
    body: Mapping[str, Any],
    headers: Mapping[str, str],
    tally: Tally,
    leaves: random.Random | None,
) -> bool:
    """Whether all of the answer came that the client waited for. One with `leaves` leaves at a part drawn from that."""
    end = b""
    try:
        async with http.post("/v1/chat/completions", json=body, headers=headers) as answer:
            async for part in answer.content.iter_any():
                tally.tokens += part.count(b"\n\n")
                end = (end + part)[-len(_DONE) :]
                if leaves is not None and leaves.random() < 0.1:
                    tally.left += 1
                    return True
    except aiohttp.ClientError:
        return False
    return end == _DONE


def resident_mib(process: ServerProcess | None) -> float:
    """Memory a process has."""
    assert process is not None
    lines = Path(f"/proc/{process.pid}/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


class Sample(NamedTuple):
    """Memory, MiB, so many seconds after the beginning."""

    seconds: float
    server: float
    envoy: float


_PARTS: Mapping[str, Callable[[Sample], float]] = {
    "server": lambda each: each.server,
    "Envoy": lambda each: each.envoy,
}


async def watch(gateway: Gateway, tally: Tally, until: float) -> list[Sample]:
    """Samples of every few seconds; prints a line every half minute."""
    print(f"{'s':>5} {'requests':>9} {'tokens/s':>9} {'server MiB':>11} {'Envoy MiB':>10} {'in flight':>10}")
    samples: list[Sample] = []
    told = 0.0
    while time.monotonic() < until:
        await asyncio.sleep(min(_SAMPLED_EVERY, max(0.1, until - time.monotonic())))
        seconds = time.monotonic() - tally.began
        now = Sample(seconds, resident_mib(gateway.servers[0]), resident_mib(gateway.envoy))
        samples.append(now)
        if seconds - told < _TOLD_EVERY and time.monotonic() < until:
            continue
        told = seconds
        in_flight = await gateway.metric("envoy_extproc_in_flight_requests")
        print(
            f"{seconds:5.0f} {tally.sent:9} {tally.tokens / seconds:9.0f} "
            f"{now.server:11.1f} {now.envoy:10.1f} {in_flight:10g}",
            flush=True,
        )
    return samples


def at_minutes(samples: Sequence[Sample]) -> list[Sample]:
    """Of each minute the sample nearest to its end."""
    minutes = range(1, int(samples[-1].seconds + _SAMPLED_EVERY) // 60 + 1)
    return [min(samples, key=lambda each: abs(each.seconds - 60 * minute)) for minute in minutes]


def slope(samples: Sequence[Sample], part: Callable[[Sample], float]) -> float | None:
    """MiB an hour over the second half, by least squares; None of too few samples. The first half warms up."""
    half = [each for each in samples if each.seconds >= samples[-1].seconds / 2]
    if len(half) < _FEWEST:
        return None
    seconds, values = [each.seconds for each in half], [part(each) for each in half]
    return statistics.linear_regression(seconds, values).slope * 3600


async def counts(gateway: Gateway, tally: Tally) -> Counts:
    """What the server says, and what it should say."""
    said = gateway.metric
    stages = "envoy_extproc_native_exchanges_total"
    return {
        "answers not whole": (tally.broken, 0),
        "requests reported": (await said("envoy_extproc_requests_total"), tally.sent),
        "native: reported, of those ended": (
            await said(stages, stage="reported"),
            await said(stages, stage="ended"),
        ),
        "in flight": (await said("envoy_extproc_in_flight_requests"), 0),
        "bypassed": (await said("envoy_extproc_bypassed_requests_total"), 0),
        "internal errors": (await said("envoy_extproc_errors_total", error_type="internal"), 0),
    }


async def settled(gateway: Gateway, tally: Tally) -> Counts:
    """The counts once they are right, or after the time in which they should be."""
    until = time.monotonic() + _PATIENCE
    while True:
        found = await counts(gateway, tally)
        if not wrong(found) or time.monotonic() > until:
            return found
        await asyncio.sleep(0.2)


def wrong(found: Counts) -> list[str]:
    """Those that are not what they should be."""
    return [name for name, (is_, should) in found.items() if is_ != should]


def verdict(found: Counts, samples: Sequence[Sample], tally: Tally) -> str:
    """What is to be read in the end."""
    lines = [f"{'verdict':36} {'is':>12} {'should be':>12}"]
    lines += [
        f"{name:36} {is_:12g} {should:12g}  {'ok' if is_ == should else 'WRONG'}"
        for name, (is_, should) in found.items()
    ]
    lines += [f"{'clients that hung up':36} {tally.left:12}", ""]
    marks = at_minutes(samples)
    lines.append(f"{'memory, MiB, at minute':36}" + "".join(f"{round(at.seconds / 60):8}" for at in marks))
    for name, part in _PARTS.items():
        lines.append(f"{name:36}" + "".join(f"{part(at):8.1f}" for at in marks))
    for name, part in _PARTS.items():
        each = slope(samples, part)
        shown = "too short a run to tell" if each is None else f"{each:+.1f} MiB an hour"
        lines.append(f"{f'{name}, slope over the second half':36} {shown}")
    lost = wrong(found)
    lines += ["", f"LOST OR WRONG: {', '.join(lost)}" if lost else "nothing was lost"]
    return "\n".join(lines)


async def soak(options: argparse.Namespace) -> int:
    """Runs it; returns how many of the counts at the end are wrong."""
    rng = random.Random(1)
    config = {"responses": {"accounting": options.accounting}}
    with tempfile.TemporaryDirectory() as directory:
        async with (
            fast_engines(4, ttft_seconds=0.02, tpot_seconds=0.005, kept_requests=100) as engines,
            Gateway(Path(directory), engines=engines, config=config) as gateway,
            aiohttp.ClientSession(gateway.url, connector=aiohttp.TCPConnector(limit=0)) as http,
        ):
            tally = Tally(options.tokens_per_second)
            until = tally.began + options.seconds
            work = [client(http, until, tally, random.Random(rng.random())) for _ in range(options.clients)]
            watching = asyncio.ensure_future(watch(gateway, tally, until))
            await asyncio.gather(watching, *work)
            found = await settled(gateway, tally)
            print("", verdict(found, watching.result(), tally), sep="\n")
            return len(wrong(found))


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--clients", type=int, default=40, help="requests under way at once, at most")
    parser.add_argument(
        "--tokens-per-second",
        type=float,
        default=0.0,
        help="go no faster than that; 40 clients do some 5,500",
    )
    parser.add_argument("--accounting", choices=("auto", "stream", "native", "none"), default="auto")
    return 1 if asyncio.run(soak(parser.parse_args())) else 0


if __name__ == "__main__":
    raise SystemExit(main())
