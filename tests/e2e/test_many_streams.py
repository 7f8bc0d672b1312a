"""Two thousand streams under way together, all through the server: none bypassed, none lost, and what one costs."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from envoy_extproc.simulation.stack import ServerProcess
from tests.support.canned import canned, stream
from tests.support.gateway import MODEL, Gateway, eventually

STREAMS = 2000
STATS = "http.ingress.ext_proc.envoy_extproc."
DESCRIPTORS = 16_384  # the clients' sockets and the upstream's are both this process's
BODY = b'{"model":"%b","messages":[{"role":"user","content":"hello"}],"stream":true}' % MODEL.encode()
REQUEST = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx-request-id: many-%d\r\ncontent-length: %d\r\n\r\n%b"
)
FIRST = b'data: {"choices":[{"index":0,"delta":{"content":"first"}}]}\n\n'
LAST = b'data: {"choices":[{"index":0,"delta":{"content":"last"}}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":11,"completion_tokens":2,"total_tokens":13}}\n\n'
DONE = b"data: [DONE]\n\n"


class Client(asyncio.Protocol):
    """Sends one request and keeps what comes."""

    def __init__(self, number: int, begun: Callable[[], None], ended: Callable[[], None]) -> None:
        self.received = bytearray()
        self.lost = False
        self._number = number
        self._begun = begun
        self._ended = ended
        self._transport: asyncio.WriteTransport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport
        transport.write(REQUEST % (self._number, len(BODY), BODY))

    def data_received(self, data: bytes) -> None:
        if not self.received:
            self._begun()
        self.received += data
        if self.received.endswith(b"\r\n0\r\n\r\n"):
            self._ended()

    def connection_lost(self, _: Exception | None) -> None:
        self.lost = True

    def close(self) -> None:
        self._transport.close()

    @property
    def body(self) -> bytes:
        """The chunks undone."""
        rest = bytes(self.received.partition(b"\r\n\r\n")[2])
        parts = []
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            length = int(size, 16)
            parts.append(rest[:length])
            rest = rest[length + 2 :]
        return b"".join(parts)


def resident(process: ServerProcess | None) -> int:
    """Bytes of memory a process has."""
    assert process is not None
    lines = Path(f"/proc/{process.pid}/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


class Crowd:
    """All the clients.

    Attributes:
        clients: each of them.
        begun: answers of which something has come.
        ended: answers that are whole.
    """

    def __init__(self) -> None:
        self.clients: list[Client] = []
        self.begun = 0
        self.ended = 0

    async def send(self, port: int) -> None:
        """Lets every client send its request."""
        loop = asyncio.get_running_loop()
        for number in range(STREAMS):
            make = partial(Client, number, self._one_begun, self._one_ended)
            _, client = await loop.create_connection(make, "127.0.0.1", port)
            self.clients.append(client)

    @property
    def lost(self) -> bool:
        """Whether any connection was lost."""
        return any(client.lost for client in self.clients)

    def close(self) -> None:
        for client in self.clients:
            client.close()

    def _one_begun(self) -> None:
        self.begun += 1

    def _one_ended(self) -> None:
        self.ended += 1


def enough_descriptors() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < DESCRIPTORS:
        if hard < DESCRIPTORS:
            pytest.skip(f"{hard} open files are too few")
        resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, hard))


async def all_accounted(gateway: Gateway, before: float) -> None:
    """Waits for the reports; each stream has one, none has passed the server by, and none is left over."""
    async with asyncio.timeout(10):
        while await gateway.metric("envoy_extproc_requests_total") < before + STREAMS:
            await asyncio.sleep(0.05)
    assert await gateway.metric("envoy_extproc_requests_total", outcome="success") == before + STREAMS
    assert await gateway.metric("envoy_extproc_usage_total", usage_source="reported") == STREAMS
    assert await gateway.metric("envoy_extproc_in_flight_requests") == 0
    counters = ("streams_started", "failure_mode_allowed", "streams_failed", "message_timeouts")
    told = {each: await gateway.envoy_stat(STATS + each) for each in counters}
    assert told == dict.fromkeys(counters, 0) | {"streams_started": STREAMS}


async def test_two_thousand_streams_at_once(
    directory: Path, record_property: Callable[[str, object], None]
) -> None:
    enough_descriptors()
    resume = asyncio.Event()
    crowd = Crowd()
    async with (
        canned() as upstream,
        Gateway(directory, pods=[upstream.pod()], config={"envoy": {"fail_open": True}}) as gateway,
    ):
        upstream.default = stream(FIRST, resume, LAST, USAGE, DONE, pause=0.0)
        (server,) = gateway.servers
        before, memory = await gateway.metric("envoy_extproc_requests_total"), resident(server)
        try:
            await crowd.send(gateway.port)
            await eventually(lambda: crowd.begun == STREAMS or crowd.lost, 25)
            await eventually(lambda: all(FIRST in client.received for client in crowd.clients), 5)
            assert len(upstream.requests) == STREAMS
            assert await gateway.metric("envoy_extproc_in_flight_requests") == STREAMS
            each = (resident(server) - memory) / STREAMS
            resume.set()
            await eventually(lambda: crowd.ended == STREAMS or crowd.lost, 25)
        finally:
            crowd.close()
        assert len(crowd.clients) == STREAMS
        for client in crowd.clients:
            assert client.received.startswith(b"HTTP/1.1 200 OK\r\n")
            assert client.body == FIRST + LAST + DONE
        await all_accounted(gateway, before)
    print(f"memory of a held stream: {each / 1024:.1f} KiB")
    record_property("bytes_per_held_stream", round(each))
    assert each < 200_000
