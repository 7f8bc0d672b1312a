"""grpc.health.v1 on the ext_proc port: what probes, Envoy's health checks and the picker protocol ask for."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health_pb2
from grpc_health.v1._async import HealthServicer
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server

from envoy_extproc.server import wire

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_READINESS = ("", "readiness", wire.PROCESS)


class Health:
    """liveness: the process runs. readiness, the service's own name and the empty one: endpoints are known, no drain.

    Attributes:
        ready: as it was last set.
    """

    def __init__(self) -> None:
        self.ready = False
        self._draining = False
        self._servicer = HealthServicer()

    def add_to(self, server: grpc.aio.Server) -> None:
        """Serves it on `server`."""
        add_HealthServicer_to_server(self._servicer, server)

    async def start(self) -> None:
        """Alive, not ready."""
        await self._servicer.set("liveness", _SERVING)
        await self.set_ready(False)

    async def set_ready(self, ready: bool) -> None:
        """Whether new exchanges are welcome. A drain is final: after it they never are again."""
        self.ready = ready and not self._draining
        for service in _READINESS:
            # Looked up each time: a drain may begin between two of them.
            await self._servicer.set(service, _SERVING if self.ready else _NOT_SERVING)

    async def drain(self) -> None:
        """No new exchanges from here on."""
        self._draining = True
        await self.set_ready(False)
