"""The file by which Envoy learns of pods while it runs: one EDS answer, replaced whole whenever discovery says so."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import structlog

from envoy_extproc.endpoints import Endpoint, Snapshot

CLUSTER = "pods"

_ASSIGNMENT = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"

log = structlog.get_logger()


class EndpointsFile:
    """Writes the file.

    Args:
        path: where Envoy reads it; its directory must exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, snapshot: Snapshot) -> None:
        """Puts the endpoints of `snapshot` in the file; if that fails it is logged, and Envoy keeps the old ones."""
        try:
            _replace(self._path, discovery_response(snapshot.endpoints))
        except OSError as error:
            log.warning(
                "endpoints_file_unwritable", file=str(self._path), reason=error.strerror, kept="the old file"
            )


def discovery_response(endpoints: Sequence[Endpoint]) -> str:
    """The text of the file: a DiscoveryResponse in JSON whose one resource is the cluster `pods`."""
    resource = {"@type": _ASSIGNMENT, **assignment(CLUSTER, [endpoint.address for endpoint in endpoints])}
    return msgspec.json.format(msgspec.json.encode({"resources": [resource]})).decode() + "\n"


def assignment(cluster: str, addresses: Sequence[str]) -> dict[str, Any]:
    """A ClusterLoadAssignment of ``host:port`` addresses, IPv6 in brackets."""
    hosts = [{"endpoint": {"address": socket_address(address)}} for address in addresses]
    return {"cluster_name": cluster, "endpoints": [{"lb_endpoints": hosts}]}


def socket_address(address: str) -> dict[str, Any]:
    """An Envoy Address of ``host:port``, IPv6 in brackets."""
    host, _, port = address.rpartition(":")
    return {"socket_address": {"address": host.strip("[]"), "port_value": int(port)}}


def _replace(path: Path, text: str) -> None:
    """Moves a finished file onto `path`: Envoy never reads half of one, and watches for moves alone.

    Servers that share the directory do not meet: each file has a name of its own until it is moved. It is opened
    plainly, since `tempfile` would leave it unreadable to an Envoy of another user.
    """
    made = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with made.open("x", encoding="utf-8") as file:
            file.write(text)
        os.replace(made, path)  # noqa: PTH105  the word for it: it replaces on every system
    except OSError:
        made.unlink(missing_ok=True)
        raise
