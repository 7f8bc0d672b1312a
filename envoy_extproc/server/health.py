"""grpc.health.v1 on the ext_proc port: what probes, Envoy's health checks and the picker protocol ask for."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health_pb2
from grpc_health.v1._async import HealthServicer
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server

from envoy_extproc.server import wire

_READINESS = ("", "readiness", wire.PROCESS)


class Health:
    """liveness: the process runs. readiness, the service's own name and the empty one: endpoints are known, no drain.

    Attributes:
        ready: as it was last set.
    """

    def __init__(self) -> None:
        self.ready = False
        self._servicer = HealthServicer()

    def add_to(self, server: grpc.aio.Server) -> None:
        """Serves it on `server`."""
        add_HealthServicer_to_server(self._servicer, server)

    async def start(self) -> None:
        """Alive, not ready."""
        await self._servicer.set("liveness", health_pb2.HealthCheckResponse.SERVING)
        await self.set_ready(False)

    async def set_ready(self, ready: bool) -> None:
        """Whether new exchanges are welcome."""
        self.ready = ready
        status = (
            health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        for service in _READINESS:
            await self._servicer.set(service, status)
