"""Everything that goes wrong, on purpose: pods of every bad sort, a server with a defect, an Envoy with little patience."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import struct
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from envoy_extproc.simulation.stack import free_port
from tests.support.canned import Canned, canned
from tests.support.gateway import MODEL, Gateway

MAX_BODY = 1_500_000
LATE_SECONDS = 1.0  # Envoy's patience with this server
IDLE_SECONDS = 1.0  # with a pod that is silent
UPLOAD_SECONDS = 0.6  # with an upload
CONNECT_SECONDS = 0.2  # with a connection to a pod
TRY_SECONDS = 0.2  # with an answer, on routes for it

DEAD, QUITS, DEAF, RESETS, DEFECT = "dead", "quits", "deaf", "resets", "defect"
"""Models: of pods that refuse connections, of one that will and one that is well, of one that takes none, of one that ends
each connection by a reset, and the one that this server breaks down over."""

_DEFECT = """
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder


class Defect(Exception):
    pass


class Finder(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "envoy_extproc.server.director":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            schedule = module.Director.schedule

            def broken(self, request, now):
                if request.model == "defect":
                    raise Defect
                return schedule(self, request, now)

            module.Director.schedule = broken

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())
"""
"""A `sitecustomize` that puts a defect into the server: no request makes it break down by itself."""


@contextmanager
def defect(directory: Path) -> Iterator[None]:
    """Servers that start within it break down over the model `DEFECT`."""
    directory.mkdir(parents=True)
    (directory / "sitecustomize.py").write_text(_DEFECT, "utf-8")
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(directory), before)))
    try:
        yield
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


@asynccontextmanager
async def resetting() -> AsyncIterator[Canned]:
    """A canned upstream whose connections end by RST where they are closed."""
    upstream = Canned()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection: socket.socket = writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await upstream.serve(reader, writer)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    upstream.address = "127.0.0.1:{1}".format(*server.sockets[0].getsockname())
    try:
        yield upstream
    finally:
        server.close()
        await upstream.close()


@contextmanager
def deaf() -> Iterator[str]:
    """The address of a socket that takes no connection: its queue is full."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield "127.0.0.1:{1}".format(*listener.getsockname())


@asynccontextmanager
async def quitter() -> AsyncIterator[asyncio.Server]:
    """One that listens until it is closed. Its address sorts before the others', so round-robin asks it first."""

    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.10", 0)
    try:
        yield server
    finally:
        server.close()
        await server.wait_closed()


def address_of(server: asyncio.Server) -> str:
    """Where it listens."""
    return "{}:{}".format(*server.sockets[0].getsockname())


@dataclass(slots=True)
class Side:
    """A gateway of one lane and one fail mode, and what is behind it.

    Attributes:
        lane: `stream` or `native`.
        upstream: the pod that is well, of `MODEL` and of `QUITS`.
        resetting: that of `RESETS`.
        quitter: the other pod of `QUITS`.
    """

    lane: str
    gateway: Gateway
    http: aiohttp.ClientSession
    upstream: Canned
    resetting: Canned
    quitter: asyncio.Server

    async def allowed(self) -> int:
        """How many requests Envoy has let past since its start, because it failed open."""
        return await self.gateway.envoy_stat("http.ingress.ext_proc.envoy_extproc.failure_mode_allowed")

    @contextmanager
    def stopped_server(self) -> Iterator[None]:
        """The server does nothing for a while."""
        (process,) = self.gateway.servers
        assert process is not None
        process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            process.send_signal(signal.SIGCONT)


@asynccontextmanager
async def side(directory: Path, lane: str, *, fail_open: bool) -> AsyncIterator[Side]:
    """One of them, with an Envoy of little patience."""
    async with AsyncExitStack() as stack:
        upstream = await stack.enter_async_context(canned())
        breaking = await stack.enter_async_context(resetting())
        quits = await stack.enter_async_context(quitter())
        addresses = {
            DEAD: f"127.0.0.1:{free_port()}",
            DEAF: stack.enter_context(deaf()),
            RESETS: breaking.address,
            QUITS: address_of(quits),
        }
        gateway = Gateway(
            directory,
            # Where Envoy chooses by itself, there is none but the one that is well.
            pods=_pods(upstream, {} if fail_open else addresses),
            config={
                "server": {"max_body_bytes": MAX_BODY},
                "engines": {"scrape_interval_ms": 60_000},
                "envoy": {"fail_open": fail_open, "message_timeout_seconds": LATE_SECONDS},
                "responses": {"accounting": lane},
            },
            edit=impatient,
        )
        await stack.enter_async_context(gateway)
        http = aiohttp.ClientSession(gateway.url, auto_decompress=False)
        await stack.enter_async_context(http)
        yield Side(lane, gateway, http, upstream, breaking, quits)


def _pods(upstream: Canned, addresses: Mapping[str, str]) -> Sequence[Mapping[str, Any]]:
    well = {**upstream.pod(), "models": [MODEL, QUITS, DEFECT]}
    others = [
        {"name": f"pod-{model}", "address": address, "models": [model]}
        for model, address in addresses.items()
    ]
    return [well, *others]


HASTY = "x-test-hasty"
"""A request header for a route that waits `TRY_SECONDS` for an answer: `answer` in all, or `try` at each pod."""


def _hasty(route: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    patience = f"{TRY_SECONDS}s"
    changes: Mapping[str, Mapping[str, Any]] = {
        "answer": {"timeout": patience},
        "try": {"retry_policy": {"per_try_timeout": patience}},
    }
    for word, change in changes.items():
        match = {"prefix": "/", "headers": [{"name": HASTY, "string_match": {"exact": word}}]}
        yield {"match": match, "route": {**route["route"], **change}}


SUBSET = "x-test-subset"
"""A request header that stands for another filter's subset hint."""


def _subset_by_header() -> Mapping[str, Any]:
    hint = {"metadata_namespace": "envoy.lb.subset_hint", "key": "x-gateway-destination-endpoint-subset"}
    return {
        "name": "envoy.filters.http.header_to_metadata",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.header_to_metadata.v3.Config",
            "request_rules": [{"header": SUBSET, "on_header_present": hint}],
        },
    }


def impatient(bootstrap: str) -> str:
    """The bootstrap with timeouts that a test can wait for."""
    tree = yaml.safe_load(bootstrap)
    resources = tree["static_resources"]
    manager = resources["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    manager["request_timeout"] = f"{UPLOAD_SECONDS}s"
    manager["stream_idle_timeout"] = f"{IDLE_SECONDS}s"
    (host,) = manager["route_config"]["virtual_hosts"]
    (route,) = host["routes"]
    route["route"]["idle_timeout"] = f"{IDLE_SECONDS}s"
    host["routes"] = [*_hasty(route), route]
    manager["http_filters"].insert(0, _subset_by_header())
    next(each for each in resources["clusters"] if each["name"] == "pods")["connect_timeout"] = (
        f"{CONNECT_SECONDS}s"
    )
    return yaml.safe_dump(tree)
