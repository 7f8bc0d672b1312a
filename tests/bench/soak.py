"""Runs the stack under mixed load for minutes and watches memory, in-flight and the books: `python -m tests.bench.soak`.

Of the requests one in ten hangs up in the middle, one in twenty meets an engine's fault, the others stream to their end.
In the end every request must have its one report, what ended in the native lane must have been reported by the access log,
and in-flight must be zero. Whether memory grows is for the reader to see.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from pathlib import Path

import aiohttp

from tests.support.gateway import Gateway, chat, fast_engines

_PATIENCE = (
    10.0  # seconds for the last reports: the access log is written every 0.1 s, a reset is told at once
)
_FAULTS = ("reset=3", "error-event=3", "error=500", "no-done", "no-usage", "tail")


class Tally:
    """What the clients did.

    Args:
        rate: tokens a second that clients together should not go beyond; 0 for as many as come.
    """

    def __init__(self, rate: float) -> None:
        self.sent = 0
        self.left = 0
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
        leaves = rng.random() < 0.1
        headers = {"x-simulate": rng.choice(_FAULTS)} if faulty else {}
        body = chat("word " * rng.randrange(5, 400), stream=True, max_tokens=60)
        try:
            async with http.post("/v1/chat/completions", json=body, headers=headers) as answer:
                async for part in answer.content.iter_any():
                    tally.tokens += part.count(b"\n\n")
                    if leaves and rng.random() < 0.1:
                        tally.left += 1
                        break
        except aiohttp.ClientError:
            continue  # the fault it had asked for


def resident_mib(process: asyncio.subprocess.Process | None) -> float:
    """Memory a process has."""
    assert process is not None
    lines = Path(f"/proc/{process.pid}/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


async def watch(gateway: Gateway, tally: Tally, until: float) -> None:
    """A line every half minute."""
    print(f"{'s':>5} {'requests':>9} {'tokens/s':>9} {'server MiB':>11} {'Envoy MiB':>10} {'in flight':>10}")
    while time.monotonic() < until:
        await asyncio.sleep(min(30.0, max(0.1, until - time.monotonic())))
        seconds = time.monotonic() - tally.began
        print(
            f"{seconds:5.0f} {tally.sent:9} {tally.tokens / seconds:9.0f} "
            f"{resident_mib(gateway.servers[0]):11.1f} {resident_mib(gateway.envoy):10.1f} "
            f"{await gateway.metric('envoy_extproc_in_flight_requests'):10g}",
            flush=True,
        )


async def counts(gateway: Gateway, tally: Tally) -> dict[str, tuple[float, float]]:
    """What the server says, and what it should say."""
    said = gateway.metric
    stages = "envoy_extproc_native_exchanges_total"
    return {
        "requests reported": (await said("envoy_extproc_requests_total"), tally.sent),
        "native: reported, of those ended": (
            await said(stages, stage="reported"),
            await said(stages, stage="ended"),
        ),
        "in flight": (await said("envoy_extproc_in_flight_requests"), 0),
        "bypassed": (await said("envoy_extproc_bypassed_requests_total"), 0),
        "internal errors": (await said("envoy_extproc_errors_total", error_type="internal"), 0),
    }


async def check(gateway: Gateway, tally: Tally) -> int:
    """Prints the counts once they are right, or after the time in which they should be; returns how many are wrong."""
    until = time.monotonic() + _PATIENCE
    while True:
        found = await counts(gateway, tally)
        wrong = sum(is_ != should for is_, should in found.values())
        if not wrong or time.monotonic() > until:
            break
        await asyncio.sleep(0.2)
    for name, (is_, should) in found.items():
        print(f"{name}: {is_:g}, should be {should:g}{'' if is_ == should else '  <-- WRONG'}")
    print(f"clients that hung up: {tally.left}")
    return wrong


async def soak(options: argparse.Namespace) -> int:
    """Runs it; returns how many of the checks at the end failed."""
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
            await asyncio.gather(watch(gateway, tally, until), *work)
            return await check(gateway, tally)


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
    return asyncio.run(soak(parser.parse_args()))


if __name__ == "__main__":
    raise SystemExit(main())
