"""A name server on loopback: A records of a few names, for tests of what Envoy finds by DNS."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from ipaddress import IPv4Address
from typing import Any

_A, _IN = 1, 1
_NO_SUCH_NAME = 3


class Names(asyncio.DatagramProtocol):
    """The server.

    Attributes:
        addresses: what it answers, by name; read anew for each question.
    """

    def __init__(self, addresses: Mapping[str, list[str]]) -> None:
        self.addresses = addresses
        self._transport: asyncio.DatagramTransport | None = None

    @asynccontextmanager
    async def served(self) -> AsyncIterator[dict[str, Any]]:
        """Serves on a free port; gives the resolver's configuration for Envoy."""
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_datagram_endpoint(lambda: self, local_addr=("127.0.0.1", 0))
        self._transport = transport
        host, port = transport.get_extra_info("sockname")[:2]
        kind = "type.googleapis.com/envoy.extensions.network.dns_resolver.cares.v3.CaresDnsResolverConfig"
        resolver = {"socket_address": {"address": host, "port_value": port}}
        options = {"no_default_search_domain": True}
        typed = {"@type": kind, "resolvers": [resolver], "dns_resolver_options": options}
        try:
            yield {"name": "envoy.network.dns_resolver.cares", "typed_config": typed}
        finally:
            transport.close()

    def datagram_received(self, data: bytes, addr: Any) -> None:
        assert self._transport is not None
        self._transport.sendto(self._answer(data), addr)

    def _answer(self, question: bytes) -> bytes:
        name, end = _name(question, 12)
        (kind,) = struct.unpack_from("!H", question, end)
        known = self.addresses.get(name.lower().rstrip("."))
        found = known if known is not None and kind == _A else []
        flags = 0x8400 | (_NO_SUCH_NAME if known is None else 0)  # an answer, from who should know
        records = [
            struct.pack("!HHHIH", 0xC00C, _A, _IN, 1, 4) + IPv4Address(address).packed for address in found
        ]
        header = question[:2] + struct.pack("!HHHHH", flags, 1, len(records), 0, 0)
        return header + question[12 : end + 4] + b"".join(records)


def _name(message: bytes, at: int) -> tuple[str, int]:
    labels = []
    while message[at]:
        labels.append(message[at + 1 : at + 1 + message[at]].decode())
        at += 1 + message[at]
    return ".".join(labels), at + 1
