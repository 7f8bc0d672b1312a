"""What is compared: one Envoy each, with the servers behind it, all over the same pods and all up at the same time."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from envoy_extproc.simulation.stack import Stack
from tests.bench.engine import MODEL, NULL_MODEL
from tests.bench.hold import place
from tests.bench.processes import cpu_of, plain_envoy, resident_bytes, samples

PLAIN, NATIVE, STREAM, NONE, TWO = "plain", "native", "stream", "none", "native x2"

CONFIGS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    NATIVE: {},  # as it comes: `auto` is the native lane here
    STREAM: {"responses": {"accounting": "stream"}},
    NONE: {"responses": {"accounting": "none"}},
    TWO: {},
}
"""Of each variant, what stands in the configuration besides what a stack has there anyway."""
_MESSAGES = re.compile(r"http\.ingress\.ext_proc\.envoy_extproc\.stream_msgs_sent:")
_BOOKS = {
    "served": re.compile(r'envoy_extproc_requests_total\{.*outcome="success"'),
    "usages": re.compile(r'envoy_extproc_usage_total\{usage_source="reported"'),
    "ended": re.compile(r'envoy_extproc_native_exchanges_total\{stage="ended"'),
    "reported": re.compile(r'envoy_extproc_native_exchanges_total\{stage="reported"'),
    "bypassed": re.compile(r"envoy_extproc_bypassed_requests_total"),
}
_PATIENCE = 3.0  # seconds: the access log is written every 0.1 s


class Cost(msgspec.Struct, frozen=True):
    """CPU seconds: of Envoy, and of all servers behind it together. Or bytes, where memory is asked for."""

    envoy: float = 0.0
    server: float = 0.0

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.envoy - other.envoy, self.server - other.server)

    def times(self, factor: float) -> Cost:
        """Both, so many times."""
        return Cost(self.envoy * factor, self.server * factor)


class Books(msgspec.Struct, frozen=True, kw_only=True):
    """What the client and the servers of one variant counted.

    Attributes:
        sent: requests the client had whole answers to.
        served: exchanges the servers report a good end of; fewer than `sent` if Envoy went past them.
        usages: exchanges with the engine's own usage.
        ended: exchanges of the native lane that ended at a server; those of held streams, which hang up, among them.
        reported: exchanges of the native lane whose access-log entry came.
        bypassed: requests of which only the access log told.
    """

    variant: str
    sent: int
    served: float
    usages: float
    ended: float
    reported: float
    bypassed: float

    @property
    def right(self) -> bool:
        """Whether nothing is missing."""
        counted = self.variant == NONE or self.usages == self.sent
        return counted and self.served == self.sent and self.ended == self.reported and not self.bypassed


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where an Envoy and its servers are.

    Attributes:
        port: where clients connect.
        envoy: its process id.
        servers: theirs; none behind a plain Envoy.
        envoy_admin: URL of Envoy's admin port; empty of a plain one.
        admins: those of the servers.
    """

    port: int
    envoy: int
    servers: tuple[int, ...] = ()
    envoy_admin: str = ""
    admins: tuple[str, ...] = ()


class Target:
    """One Envoy and its servers.

    Args:
        variant: its name in the table.
        place: where they are.

    Attributes:
        sent: whole answers the client had by it.
    """

    def __init__(self, variant: str, place: Place) -> None:
        self.variant = variant
        self.sent = 0
        self._place = place

    @property
    def port(self) -> int:
        """Where clients connect."""
        return self._place.port

    def cpu(self) -> Cost:
        """Used so far."""
        return Cost(cpu_of(self._place.envoy), sum(map(cpu_of, self._place.servers)))

    def resident(self) -> Cost:
        """Memory held now."""
        return Cost(resident_bytes(self._place.envoy), sum(map(resident_bytes, self._place.servers)))

    async def messages(self) -> float:
        """What Envoy has sent to the servers in ext_proc so far."""
        if not self._place.servers:
            return 0.0
        lines = await samples(f"{self._place.envoy_admin}/stats?filter=stream_msgs_sent")
        return _sum(lines, _MESSAGES)

    async def books(self) -> Books:
        """The counts, once they agree, or after the time in which they should."""
        until = asyncio.get_running_loop().time() + _PATIENCE
        while not (books := await self._books()).right and asyncio.get_running_loop().time() < until:
            await asyncio.sleep(0.1)
        return books

    async def _books(self) -> Books:
        lines = [sample for admin in self._place.admins for sample in await samples(f"{admin}/metrics")]
        counts = {name: _sum(lines, pattern) for name, pattern in _BOOKS.items()}
        return msgspec.convert({"variant": self.variant, "sent": self.sent, **counts}, Books)


def _sum(lines: Sequence[tuple[str, float]], pattern: re.Pattern[str]) -> float:
    return sum(value for name, value in lines if pattern.match(name))


def endpoints(ports: Sequence[int]) -> list[dict[str, Any]]:
    """The canned engines on these ports, as in `discovery.static.endpoints`."""
    models = [MODEL, NULL_MODEL]
    return [
        {"name": f"pod-{number}", "address": f"127.0.0.1:{port}", "models": models}
        for number, port in enumerate(ports)
    ]


@contextlib.asynccontextmanager
async def targets(directory: Path, pods: Sequence[Mapping[str, Any]]) -> AsyncIterator[list[Target]]:
    """All of them, each ready; plain Envoy first."""
    async with contextlib.AsyncExitStack() as running:
        stacks = {
            variant: await running.enter_async_context(
                Stack(directory / variant, pods, config=config, servers=2 if variant == TWO else 1)
            )
            for variant, config in CONFIGS.items()
        }
        printed = (directory / NATIVE / "envoy.yaml").read_text("utf-8")
        plain, port = await running.enter_async_context(plain_envoy(directory, printed))
        found = [Target(PLAIN, Place(port=port, envoy=plain.pid))]
        yield found + [
            Target(variant, msgspec.convert(place(stack), Place)) for variant, stack in stacks.items()
        ]
