"""Servers that come and go behind one Envoy, as Kubernetes does it, under load whose every byte and report is checked.

Envoy learns of the servers by EDS, as from a control plane, or by a headless Service's name. The list changes before, with or
after a server's own signal, since Kubernetes tells both sides at once and neither waits for the other.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from envoy_extproc.envoy.eds import assignment
from envoy_extproc.simulation.stack import Stack, free_port
from tests.support.canned import Answer, Canned, canned, document, stream
from tests.support.dns import Names
from tests.support.gateway import chat, new_id

CHAT = "/v1/chat/completions"
_SERVICE = "servers"
_NAME = "extproc.test"
_ASSIGNMENT = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"
_USAGE = b'{"prompt_tokens":11,"completion_tokens":20,"total_tokens":31}'
_EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"word"}}]}\n\n'
_HIDDEN = b'data: {"choices":[],"usage":%b}\n\n' % _USAGE
_DONE = b"data: [DONE]\n\n"
_EVENTS = 20
STREAMED = _EVENT * _EVENTS + _DONE
DOCUMENT = b'{"choices":[{"message":{"content":"word"}}],"usage":%b}' % _USAGE
_FLUSH_SECONDS = 2.0  # for the last entries of the access log and the last lines


@dataclass(slots=True)
class Phase:
    """What became of the requests that began in it.

    Attributes:
        shown: whole answers with the usage event that should have been hidden: in the stream lane, those that a drain
            outlasted.
    """

    name: str
    requests: int = 0
    failed: int = 0
    truncated: int = 0
    bypassed: int = 0
    unreported: int = 0
    doubled: int = 0
    shown: int = 0
    ids: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Whether nothing was lost, and nothing was told twice."""
        return not any((self.failed, self.truncated, self.bypassed, self.unreported, self.doubled))


class Dns:
    """How a name tells of servers.

    Args:
        refresh: how often Envoy asks; None for the printed bootstrap's own.
        behind: seconds that the cluster's name server is behind, which keeps answers for a while.
    """

    def __init__(self, *, refresh: float | None = None, behind: float = 5.0) -> None:
        self.refresh = refresh
        self.behind = behind
        self.addresses: dict[str, list[str]] = {_NAME: []}
        self.resolver: dict[str, Any] = {}

    def tell(self, hosts: Sequence[str], *, at_once: bool) -> None:
        """The name stands for these hosts."""

        def answer() -> None:
            self.addresses[_NAME] = [*hosts]

        if at_once:
            answer()
        else:
            asyncio.get_running_loop().call_later(self.behind, answer)

    def cluster(self, cluster: dict[str, Any], port: int) -> None:
        """Lets a cluster of the printed bootstrap find its servers so."""
        cluster["load_assignment"] = assignment(cluster["name"], [f"{_NAME}:{port}"])
        cluster["typed_dns_resolver_config"] = self.resolver
        if self.refresh is not None:
            cluster["dns_refresh_rate"] = f"{self.refresh:g}s"


class _Fleet(Stack):
    """Servers whose addresses differ, and whose port does not where a name tells of them."""

    one_port = False

    def host(self, server: int) -> str:
        """Where a server listens."""
        return f"127.0.0.{server + 2}" if self.one_port else "127.0.0.1"

    def slot(self) -> int:
        """A number for one more."""
        self.server_ports.append(self.server_ports[0] if self.one_port else free_port())
        self.admin_ports.append(free_port())
        self.servers.append(None)
        return len(self.servers) - 1

    async def start_server(self, server: int = 0) -> None:
        path = self.config_file(server)
        own = {
            "listen": f"{self.host(server)}:{self.server_ports[server]}",
            "admin": f"127.0.0.1:{self.admin_ports[server]}",
        }
        config = {**self._config, "server": {**self._config.get("server", {}), **own}}
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        with self._log(f"server-{server}").open("ab") as log:
            self.servers[server] = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "envoy_extproc", "serve", "-c", str(path)), stdout=log, stderr=log
            )
        await self._ready(f"{self.admin_url(server)}/readyz", self.servers[server], f"server-{server}")


class Rolling:
    """A fleet of servers, by number; a new one has a number and an address of its own, as a pod has.

    Attributes:
        phases: in order; what begins belongs to the last.
        stack: Envoy and the servers.
    """

    def __init__(
        self,
        directory: Path,
        upstream: Canned,
        config: Mapping[str, Mapping[str, Any]],
        *,
        bare: bool = False,
        dns: Dns | None = None,
        workers: int = 2,
    ) -> None:
        self.phases: list[Phase] = []
        self._file = directory / "servers" / "eds.json"
        self._file.parent.mkdir(parents=True)
        self.stack = _Fleet(
            directory, [upstream.pod()], config=config, servers=1, workers=workers, edit=self._found
        )
        self.stack.one_port = dns is not None
        self._bare = bare
        self._dns = dns
        self._listed = [0]
        self._upstream = upstream
        self.tell(0)

    # -- servers ---------------------------------------------------------------------------------------------------

    def tell(self, *servers: int) -> None:
        """Tells Envoy of these servers and no others."""
        self._listed = [*servers]
        if self._dns is not None:
            hosts = [self.stack.host(each) for each in servers]
            self._dns.tell(hosts, at_once=self.stack.envoy is None)
            return
        addresses = [f"{self.stack.host(each)}:{self.stack.server_ports[each]}" for each in servers]
        resource = {"@type": _ASSIGNMENT, **assignment(_SERVICE, addresses)}
        made = self._file.with_name(".new")
        made.write_text(json.dumps({"resources": [resource]}), encoding="utf-8")
        os.replace(made, self._file)  # noqa: PTH105  Envoy watches for moves

    @property
    def listed(self) -> Sequence[int]:
        """The servers that Envoy is told of."""
        return [*self._listed]

    async def add(self) -> int:
        """Starts one more server and lists it once it is ready; returns its number."""
        number = self.stack.slot()
        await self.stack.start_server(number)
        self.tell(*self._listed, number)
        return number

    async def remove(self, server: int, *, delist_after: float, grace: float) -> float:
        """Ends a server by SIGTERM, and takes it off the list so many seconds later, or sooner; returns how long it took.

        Args:
            server: its number.
            delist_after: seconds behind the signal, negative for before.
            grace: seconds after which Kubernetes would kill it.

        Raises:
            TimeoutError: it would have been killed.
        """
        process = self.stack.servers[server]
        assert process is not None
        clock = asyncio.get_running_loop().time
        if delist_after < 0:
            self._delist(server)
            await asyncio.sleep(-delist_after)
        began = clock()
        process.send_signal(signal.SIGTERM)
        if delist_after >= 0:
            await asyncio.sleep(delist_after)
            self._delist(server)
        async with asyncio.timeout(grace - (clock() - began)):
            status = await process.wait()
        assert status == 0, f"server {server} ended with status {status}"
        return clock() - began

    def _delist(self, server: int) -> None:
        self.tell(*(each for each in self._listed if each != server))

    def _found(self, bootstrap: str) -> str:
        tree = yaml.safe_load(bootstrap)
        tree["node"] = {"id": "gateway", "cluster": "gateway"}
        for cluster in tree["static_resources"]["clusters"]:
            if cluster["name"] == "pods":
                continue
            if self._dns is None:
                self._by_eds(cluster)
            else:
                self._dns.cluster(cluster, self.stack.server_ports[0])
            if self._bare:
                del cluster["health_checks"], cluster["outlier_detection"]
        if self._bare:
            del _ext_proc_of(tree)["grpc_service"]["retry_policy"]
        return yaml.safe_dump(tree)

    def _by_eds(self, cluster: dict[str, Any]) -> None:
        source = {"path": str(self._file), "watched_directory": {"path": str(self._file.parent)}}
        del cluster["load_assignment"]
        cluster["type"] = "EDS"
        cluster["eds_cluster_config"] = {
            "service_name": _SERVICE,
            "eds_config": {"path_config_source": source, "resource_api_version": "V3"},
        }

    # -- load ------------------------------------------------------------------------------------------------------

    def begin(self, name: str) -> Phase:
        """Requests from here on belong to a phase of this name."""
        self.phases.append(Phase(name))
        return self.phases[-1]

    async def ask(self, http: aiohttp.ClientSession, answer: Answer, expected: bytes, **more: Any) -> None:
        """One request, checked to the byte."""
        phase, request_id = self.phases[-1], new_id()
        phase.requests += 1
        phase.ids.append(request_id)
        self._upstream.answers[request_id] = answer
        status = 0
        try:
            async with http.post(CHAT, json=chat(**more), headers={"x-request-id": request_id}) as response:
                status = response.status
                body = await response.read()
                phase.shown += _HIDDEN in body
                phase.bypassed += status == 200 and "target-pod" not in response.headers
                if status != 200:
                    phase.failed += 1
                    phase.reasons.append(f"{request_id} {status} {body!r}")
                elif body.replace(_HIDDEN, b"") != expected:
                    phase.truncated += 1
                    phase.reasons.append(f"{request_id} {len(body)} bytes instead of {len(expected)}")
        except aiohttp.ClientError as error:
            phase.failed += status != 200
            phase.truncated += status == 200
            phase.reasons.append(f"{request_id} {error!r}")
        finally:
            del self._upstream.answers[request_id]

    async def settle(self) -> None:
        """Compares the books with what was sent, once all is written."""
        await asyncio.sleep(_FLUSH_SECONDS)
        found: Counter[str] = Counter()
        for server in range(len(self.stack.servers)):
            found.update(line["request_id"] for line in self.stack.reports(server))
        for phase in self.phases:
            phase.unreported = sum(found[each] == 0 for each in phase.ids)
            phase.doubled = sum(found[each] > 1 for each in phase.ids)


def _ext_proc_of(tree: Any) -> dict[str, Any]:
    """The configuration of Envoy's filter."""
    (chain,) = tree["static_resources"]["listeners"][0]["filter_chains"]
    filters = {each["name"]: each for each in chain["filters"][0]["typed_config"]["http_filters"]}
    config: dict[str, Any] = filters["envoy.filters.http.ext_proc"]["typed_config"]
    return config


@dataclass(frozen=True, slots=True)
class Load:
    """How much is asked.

    Attributes:
        streams: streams at any time.
        seconds: that each of them takes.
        long_streams: streams at any time that take longer than a drain does.
        long_seconds: that each of them takes.
        rate: further requests a second, answered at once.
    """

    streams: int = 50
    seconds: float = 2.0
    long_streams: int = 4
    long_seconds: float = 9.0
    rate: float = 50.0

    @asynccontextmanager
    async def on(self, rolling: Rolling) -> AsyncIterator[None]:
        """Asks until the block is left, and lets what has begun end."""
        stop = asyncio.Event()
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(rolling.stack.url, connector=connector) as http:
            tasks = [asyncio.ensure_future(self._requests(rolling, http, stop))]
            for seconds, count in ((self.seconds, self.streams), (self.long_seconds, self.long_streams)):
                tasks += [
                    asyncio.ensure_future(self._streams(rolling, http, stop, seconds, seconds * each / count))
                    for each in range(count)
                ]
            try:
                yield
            finally:
                stop.set()
                await asyncio.gather(*tasks)

    async def _streams(
        self, rolling: Rolling, http: aiohttp.ClientSession, stop: asyncio.Event, seconds: float, phase: float
    ) -> None:
        await _sleep(stop, phase)
        while not stop.is_set():
            pieces = [*[_EVENT] * _EVENTS, _HIDDEN, _DONE]
            answer = stream(*pieces, pause=seconds / len(pieces))
            await rolling.ask(http, answer, STREAMED, stream=True)

    async def _requests(self, rolling: Rolling, http: aiohttp.ClientSession, stop: asyncio.Event) -> None:
        asked: set[asyncio.Task[None]] = set()
        while not await _sleep(stop, 1 / self.rate):
            one = asyncio.ensure_future(rolling.ask(http, document(DOCUMENT), DOCUMENT))
            asked.add(one)
            one.add_done_callback(asked.discard)
        await asyncio.gather(*asked)


async def _sleep(stop: asyncio.Event, seconds: float) -> bool:
    """Sleeps, unless it is over before; returns whether it is over."""
    try:
        await asyncio.wait_for(stop.wait(), seconds)
    except TimeoutError:
        return False
    return True


@asynccontextmanager
async def rolling(
    directory: Path,
    config: Mapping[str, Mapping[str, Any]],
    *,
    bare: bool = False,
    dns: Dns | None = None,
    workers: int = 2,
) -> AsyncIterator[Rolling]:
    """A fleet of one server.

    Args:
        directory: for its files.
        config: of every server.
        bare: an Envoy that does not ask servers for their health, does not retry and leaves none of them alone: only its
            list tells it what to do.
        dns: how Envoy finds them by a name; None for EDS.
        workers: of Envoy.
    """
    async with canned() as upstream, AsyncExitStack() as stack:
        if dns is not None:
            dns.resolver = await stack.enter_async_context(Names(dns.addresses).served())
        fleet = Rolling(directory, upstream, config, bare=bare, dns=dns, workers=workers)
        await stack.enter_async_context(fleet.stack)
        yield fleet


async def play(
    fleet: Rolling,
    load: Load,
    *,
    offsets: tuple[float, ...],
    grace: float,
    told: Callable[[str], object] = lambda _: None,
) -> None:
    """1 -> 3 servers, a restart of each of them with the next of `offsets`, and 3 -> 1, with a quiet time between.

    Raises:
        TimeoutError: a server did not end within `grace` seconds of its signal.
    """
    fleet.begin("1 server")
    async with load.on(fleet):
        await asyncio.sleep(2)
        fleet.begin("1 -> 3")
        await asyncio.gather(fleet.add(), fleet.add())
        await asyncio.sleep(2)
        for server, offset in zip(fleet.listed, offsets, strict=True):
            fleet.begin(f"restart, listed until {offset:+g} s")
            await fleet.add()
            took = await fleet.remove(server, delist_after=offset, grace=grace)
            told(f"server {server} ended {took:.1f} s after its signal")
        fleet.begin("3 -> 1")
        going = fleet.listed[1:]
        await asyncio.gather(
            *(
                fleet.remove(each, delist_after=offset, grace=grace)
                for each, offset in zip(going, (0, 1.5), strict=True)
            )
        )
        fleet.begin("1 server again")
        await asyncio.sleep(2)
    await fleet.settle()


@dataclass(frozen=True, slots=True)
class Rollout:
    """What a Deployment and its chart say of a rolling update with one pod more and none less.

    Attributes:
        min_ready: seconds that a new pod is ready before an old one is told to go (`minReadySeconds`).
        pre_stop: seconds between leaving the Service and SIGTERM (`preStop`).
        grace: seconds from there to SIGKILL.
        replicas: pods.
    """

    min_ready: float
    pre_stop: float
    grace: float
    replicas: int = 2

    async def play(self, fleet: Rolling, load: Load, *, settled: float) -> None:
        """Replaces every pod; the next one is not kept waiting by one that is still on its way out.

        Args:
            fleet: of one server.
            load: meanwhile.
            settled: seconds after which Envoy knows all servers.

        Raises:
            TimeoutError: a server did not end in time.
        """
        for _ in range(self.replicas - 1):
            await fleet.add()
        await asyncio.sleep(settled)
        fleet.begin(f"{self.replicas} servers")
        async with load.on(fleet), asyncio.TaskGroup() as leaving:
            await asyncio.sleep(2)
            for number, old in enumerate(fleet.listed, 1):
                fleet.begin(f"replacing {number}")
                await fleet.add()
                await asyncio.sleep(self.min_ready)
                leaving.create_task(fleet.remove(old, delist_after=-self.pre_stop, grace=self.grace))
            fleet.begin("all are new")
            await asyncio.sleep(self.pre_stop + settled)
        await fleet.settle()
