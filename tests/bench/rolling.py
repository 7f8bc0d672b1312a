"""What a rolling restart loses, under load: `python -m tests.bench.rolling`.

One Envoy, servers that come and go as in Kubernetes: 1 -> 3, each of the three replaced, 3 -> 1. A server stays on Envoy's list
until before, at, or after its SIGTERM. Every answer is compared to the byte and every request looked up in the servers' reports.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.rolling import Dns, Load, Phase, Rolling, Rollout, play, rolling

_GRACE_BEYOND_DRAIN = 6.0
_OFFSETS = (-1.0, 0.0, 2.0)
_COLUMNS = ("requests", "failed", "truncated", "bypassed", "unreported", "doubled", "shown")


def summed(phases: Sequence[Phase]) -> Phase:
    """All of them in one."""
    total = Phase("all")
    for phase in phases:
        for column in _COLUMNS:
            setattr(total, column, getattr(total, column) + getattr(phase, column))
    return total


def table(phases: Sequence[Phase]) -> str:
    """A row for each phase and one for their sum."""
    lines = [f"{'phase':32}" + "".join(f"{each:>11}" for each in _COLUMNS)]
    lines += [
        f"{phase.name:32}" + "".join(f"{getattr(phase, each):11}" for each in _COLUMNS)
        for phase in (*phases, summed(phases))
    ]
    return "\n".join(lines)


def config(lane: str, *, fail_open: bool, drain: float) -> dict[str, dict[str, Any]]:
    """Of every server."""
    return {
        "responses": {"accounting": lane},
        "envoy": {"fail_open": fail_open},
        "server": {"drain_seconds": drain, "linger_seconds": 1.5},
    }


class _Case(NamedTuple):
    """Seconds, and pods."""

    replicas: int
    refresh: float | None
    min_ready: float
    pre_stop: float
    linger: float


_CASES = (
    _Case(2, None, 0, 0, 1.5),
    _Case(2, None, 0, 5, 1.5),
    _Case(2, None, 10, 0, 1.5),
    _Case(2, 1, 10, 5, 1.5),
    _Case(1, None, 0, 5, 1.5),
    _Case(1, 1, 0, 5, 1.5),
    _Case(1, 1, 10, 0, 1.5),
    _Case(1, 1, 10, 5, 1.5),
)


async def by_dns(options: argparse.Namespace) -> None:
    """A rolling update behind a headless Service, by what a chart can say; which rows are clean is the finding."""
    columns = (*_Case._fields, *_COLUMNS[:5])
    print("\nfound by DNS whose answers are up to 5 s old, native lane, Envoy fails closed")
    print("".join(f"{each:>11}" for each in columns), flush=True)
    for case in _CASES:
        total = await _roll_out(case, options)
        cells = ["default" if each is None else f"{each:g}" for each in case]
        cells += [str(getattr(total, each)) for each in _COLUMNS[:5]]
        print("".join(f"{each:>11}" for each in cells), flush=True)


async def _roll_out(case: _Case, options: argparse.Namespace) -> Phase:
    settings = config("native", fail_open=False, drain=options.drain)
    settings["server"]["linger_seconds"] = case.linger
    rollout = Rollout(case.min_ready, case.pre_stop, options.drain + _GRACE_BEYOND_DRAIN, case.replicas)
    load = Load(streams=options.streams, long_streams=0, rate=options.rate)
    directory = Path(tempfile.mkdtemp(prefix="rolling-"))
    async with rolling(directory, settings, dns=Dns(refresh=case.refresh)) as fleet:
        await rollout.play(fleet, load, settled=12)
    return summed(fleet.phases)


async def one(lane: str, options: argparse.Namespace, *, fail_open: bool) -> bool:
    """One run; returns whether nothing was lost."""
    directory = Path(tempfile.mkdtemp(prefix="rolling-"))
    load = Load(
        streams=options.streams,
        long_streams=options.long_streams,
        long_seconds=options.drain + 5,
        rate=options.rate,
    )
    fleet: Rolling
    print(f"\n{lane} lane, Envoy fails {'open' if fail_open else 'closed'}", flush=True)
    settings = config(lane, fail_open=fail_open, drain=options.drain)
    async with rolling(directory, settings, bare=options.bare) as fleet:
        grace = options.drain + _GRACE_BEYOND_DRAIN
        await play(fleet, load, offsets=_OFFSETS, grace=grace, told=print)
    print(table(fleet.phases))
    lost = [reason for phase in fleet.phases for reason in phase.reasons]
    for reason in lost[:10]:
        print(f"  {reason}")
    clean = all(phase.clean for phase in fleet.phases)
    if not clean:
        print(f"  logs are in {directory}")
    return clean


async def main() -> int:
    """All runs; 1 if any lost something."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=50)
    parser.add_argument("--long-streams", type=int, default=4, help="streams longer than a drain")
    parser.add_argument("--bare", action="store_true", help="Envoy without health checks and retries")
    parser.add_argument("--dns", action="store_true", help="what a chart must say where DNS tells of servers")
    parser.add_argument("--rate", type=float, default=50.0, help="further requests a second")
    parser.add_argument("--drain", type=float, default=5.0, help="server.drain_seconds")
    parser.add_argument("--lane", choices=["native", "stream"], action="append")
    parser.add_argument("--mode", choices=["open", "closed"], action="append")
    options = parser.parse_args()
    if options.dns:
        await by_dns(options)
        return 0
    clean = [
        await one(lane, options, fail_open=mode == "open")
        for lane in options.lane or ["native", "stream"]
        for mode in options.mode or ["open", "closed"]
    ]
    return 0 if all(clean) else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
