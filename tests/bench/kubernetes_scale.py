"""What following a large cluster costs: `python -m tests.bench.kubernetes_scale`.

A Kubernetes API in this process has 2,000 pods of 6 KB each, and changes fifty of them a second: labels, readiness, pods that
go and come. One whole server in a process of its own follows it. In the middle the watch is cut, later it is cut and its
version forgotten, so that a new list is needed. What is told:

- lag: from the moment a change is in the API until the server's director decides by it;
- CPU time of the server over the time that passed, without changes first, then with them, and its memory;
- whether in the end the server has what the API has.

The pods are one port on as many loopback addresses, served by a third process, with an engine that tells nothing: what is
measured is discovery, and what every part of the server does with a new Snapshot.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import logging
import random
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import structlog
import uvloop
import yaml

from envoy_extproc.discovery.fleet import Fleet
from envoy_extproc.discovery.pods import decode
from envoy_extproc.endpoints import Endpoint, Snapshot
from envoy_extproc.scheduling.registry import POLICIES
from envoy_extproc.server.app import App
from envoy_extproc.settings import load
from envoy_extproc.simulation.stack import free_port
from tests.bench.idle_pods import process
from tests.bench.processes import cpu
from tests.support.cluster import Cluster, Object, pod

_PADDING = [{"manager": "kubelet", "fieldsV1": {f"f:field-{number}": {} for number in range(320)}}]
_SETTLING = 5.0  # seconds
_BREAK = 2.0  # seconds
_GONE = -1


class Seen(msgspec.Struct):
    """What a server saw.

    Attributes:
        at: (seconds, name, number of the change, or `_GONE`) of everything that its director took up.
        last: the addresses and changes of the endpoints it has in the end, by name.
        snapshots: how many it took up.
    """

    at: list[tuple[float, str, int]]
    last: dict[str, tuple[str, int]]
    snapshots: int


class Watcher:
    """A server that notes what it hears of."""

    def __init__(self, config: Path) -> None:
        self._app = App(load(config, policies=POLICIES), on_snapshot=self._note)
        self._known: dict[str, Endpoint] = {}
        self.seen = Seen([], {}, 0)

    def _note(self, snapshot: Snapshot) -> None:
        before, self._known = self._known, {each.address: each for each in snapshot.endpoints}
        new = [each for each in snapshot.endpoints if before.get(each.address) is not each]
        gone = [before[address] for address in before.keys() - self._known.keys()]
        self.seen.snapshots += 1
        # The director takes the Snapshot up in the same step of the loop.
        asyncio.get_running_loop().call_soon(self._taken_up, new, gone)

    def _taken_up(self, new: list[Endpoint], gone: list[Endpoint]) -> None:
        now = time.monotonic()
        self.seen.at += [(now, each.name, change(each)) for each in new]
        self.seen.at += [(now, each.name, _GONE) for each in gone]

    async def run(self) -> None:
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        await self._app.run(stop)
        self.seen.last = {each.name: (each.address, change(each)) for each in self._known.values()}


def change(endpoint: Endpoint) -> int:
    """The number of the change that made it what it is."""
    return int(endpoint.labels["change"])


def watch(config: Path, answer: Path) -> None:
    """The server's process."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    watcher = Watcher(config)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(watcher.run())
    answer.write_bytes(msgspec.json.encode(watcher.seen))


class Changes:
    """Changes to a cluster, and what of them should be seen."""

    def __init__(self, cluster: Cluster, pods: int, port: int) -> None:
        self._cluster = cluster
        self._pods = pods
        self._port = port
        self._rng = random.Random(1)
        # In turn, so that no change of a pod is overtaken by its next one, and each is seen by itself.
        self._turns = itertools.cycle(self._rng.sample(range(pods), pods))
        self._count = itertools.count(1)
        self.made: dict[str, list[tuple[float, int]]] = {}
        self.breaks: list[float] = []

    def pod(self, index: int, number: int, *, ready: bool = True) -> Object:
        address = f"127.{1 + index // 62_500}.{index // 250 % 250}.{index % 250 + 1}"
        labels = {
            "change": str(number),
            "model.aibrix.ai/port": str(self._port),
            "model.aibrix.ai/engine": "generic",
            "app.kubernetes.io/name": "engine",
        }
        each = pod(f"engine-{index}", address, model=f"model-{index % 20}", labels=labels, ready=ready)
        each["metadata"]["managedFields"] = _PADDING
        return each

    async def fill(self) -> None:
        for index in range(self._pods):
            await self._cluster.put(self.pod(index, 0))

    async def one(self) -> None:
        """Changes a pod that is there and ready; or brings one back that is not."""
        index, number = next(self._turns), next(self._count)
        name = f"engine-{index}"
        known = self._cluster.objects.get(("default", name))
        ready = known is not None and known["status"]["conditions"][1]["status"] == "True"
        at, chance = time.monotonic(), self._rng.random()
        if not ready or chance < 0.6:
            await self._cluster.put(self.pod(index, number))
        elif chance < 0.8:
            await self._cluster.put(self.pod(index, number, ready=False))
        else:
            await self._cluster.delete(name)
        self.made.setdefault(name, []).append((at, number if not ready or chance < 0.6 else _GONE))

    def lags(self, seen: Seen) -> tuple[list[tuple[float, float]], int]:
        """When each change was made and its seconds, and how many were never seen. A change that a later one overtook counts with that."""
        observed: dict[str, list[tuple[float, int]]] = {}
        for at, name, number in seen.at:
            observed.setdefault(name, []).append((at, number))
        lags: list[tuple[float, float]] = []
        missed = 0
        for name, made in self.made.items():
            waiting = made
            for at, number in observed.get(name, ()):
                index = next((i for i, (t, n) in enumerate(waiting) if n == number and t <= at), None)
                if index is not None:
                    lags += [(t, at - t) for t, _ in waiting[: index + 1]]
                    waiting = waiting[index + 1 :]
            missed += len(waiting)
        return lags, missed


async def measure(pods: int, rate: float, seconds: float) -> None:
    """Measures and prints."""
    port = free_port()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        async with (
            Cluster() as cluster,
            process("-m", "tests.bench.idle_pods", "--serve", str(port)) as fleet,
        ):
            assert fleet.stdout is not None
            await fleet.stdout.readline()
            changes = Changes(cluster, pods, port)
            await changes.fill()
            settings: dict[str, Any] = {
                "server": {"listen": f"127.0.0.1:{free_port()}", "admin": f"127.0.0.1:{free_port()}"},
                "engines": {"models_interval_ms": 3_600_000},  # each pod is asked once
                "discovery": {"kubernetes": {"kubeconfig": str(cluster.kubeconfig(directory))}},
            }
            config, answer = directory / "config.yaml", directory / "seen.json"
            config.write_text(yaml.safe_dump(settings), "utf-8")
            arguments = ("-m", "tests.bench.kubernetes_scale", "--watch", str(config), str(answer))
            async with process(*arguments) as server:
                await asyncio.sleep(_SETTLING)
                idle = await cores(server, asyncio.sleep(min(10.0, seconds)))
                busy = await cores(server, play(cluster, changes, rate, seconds))
                await asyncio.sleep(1)
                memory = resident(server)
                server.terminate()
                assert server.stdout is not None
                await server.stdout.read()
                await server.wait()
            seen = msgspec.json.decode(answer.read_bytes(), type=Seen)
            tell(cluster, changes, seen, pods)
            print(
                f"CPU          {idle:.3f} cores without changes, {busy:.3f} with them, cut and list included"
            )
            print(f"memory       {memory} MB")
            print(f"API          {dict(cluster.asked)}")


async def play(cluster: Cluster, changes: Changes, rate: float, seconds: float) -> None:
    """Changes at a steady rate; the watch is cut after a third, and forgotten after two."""
    total = int(rate * seconds)
    begin = time.monotonic()
    for number in range(total):
        await asyncio.sleep(max(0.0, begin + number / rate - time.monotonic()))
        if number == total * 2 // 3:
            await changes.one()
            cluster.forget()
        if number in (total // 3, total * 2 // 3):
            changes.breaks.append(time.monotonic())
            cluster.cut()
        await changes.one()


async def cores(server: asyncio.subprocess.Process, during: Any) -> float:
    """CPU seconds a second while something is awaited."""
    used, begin = cpu(server), time.monotonic()
    await during
    return (cpu(server) - used) / (time.monotonic() - begin)


def resident(server: asyncio.subprocess.Process) -> int:
    """MB of memory."""
    text = Path(f"/proc/{server.pid}/status").read_text("ascii")
    return next(int(line.split()[1]) // 1024 for line in text.splitlines() if line.startswith("VmRSS"))


def quantiles(seconds: list[float]) -> str:
    """As people read them."""
    cuts = statistics.quantiles(seconds, n=100)
    return f"p50 {1000 * cuts[49]:.0f} ms, p99 {1000 * cuts[98]:.0f} ms, longest {1000 * max(seconds):.0f} ms"


def tell(cluster: Cluster, changes: Changes, seen: Seen, pods: int) -> None:
    """Prints what was seen of the changes."""
    lags, missed = changes.lags(seen)
    calm = [lag for at, lag in lags if not any(-_BREAK < at - broken < _BREAK for broken in changes.breaks)]
    truth = Fleet(engines=["generic"], qualified=False)
    truth.replace("default", [decode(msgspec.json.encode(each)) for each in cluster.objects.values()])
    should = {each.name: (each.address, change(each)) for each in truth.snapshot().endpoints}
    print(f"{pods} pods, {len(lags) + missed} changes, {seen.snapshots} snapshots")
    print(f"lag          {quantiles([lag for _, lag in lags])}")
    print(f"  and apart from the {_BREAK:g} s around a break {quantiles(calm)}")
    print(f"never seen   {missed}")
    print(f"final state  {'equal' if seen.last == should else 'DIFFERENT'}, {len(should)} endpoints")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pods", type=int, default=2000)
    parser.add_argument("--rate", type=float, default=50)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--watch", nargs=2, metavar=("CONFIG", "ANSWER"), help="be the server")
    asked = parser.parse_args()
    if asked.watch is None:
        asyncio.run(measure(asked.pods, asked.rate, asked.seconds))
    else:
        sys.stdout = sys.stderr
        watch(*map(Path, asked.watch))


if __name__ == "__main__":
    main()
