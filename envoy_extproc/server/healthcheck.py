"""Asks a server on this machine for its health, as a container's own check does.

Over TLS it asks as Envoy does: by Envoy's CA and the name Envoy expects, so that a certificate Envoy would refuse is no
health. Where Envoy's files are not at hand the server's own do instead.
"""

from __future__ import annotations

from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from envoy_extproc.server.tls import content
from envoy_extproc.settings import EnvoySettings, Settings, Tls


class NotAnswering(Exception):
    """There is no answer; the message says why."""


async def ask_health(settings: Settings, address: str, service: str, seconds: float) -> str:
    """What grpc.health.v1 at `address` says of `service`: SERVING, NOT_SERVING.

    Raises:
        NotAnswering: nobody answers within so many seconds, or TLS does not come about.
        SettingsError: a file for TLS cannot be read.
    """
    async with _channel(settings, address) as channel:
        try:
            answer = await health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=service), timeout=seconds
            )
        except grpc.aio.AioRpcError as error:
            raise NotAnswering(f"{address}: {error.code().name}: {error.details()}") from None
    status: str = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    return status


def _channel(settings: Settings, address: str) -> grpc.aio.Channel:
    # A proxy of the environment is not asked about this machine.
    options: list[tuple[str, str | int]] = [("grpc.enable_http_proxy", 0)]
    tls = settings.server.tls
    if tls is None:
        return grpc.aio.insecure_channel(address, options)
    if settings.envoy.server_name is not None:
        options.append(("grpc.ssl_target_name_override", settings.envoy.server_name))
    return grpc.aio.secure_channel(address, _credentials(tls, settings.envoy), options)


def _credentials(tls: Tls, envoy: EnvoySettings) -> grpc.ChannelCredentials:
    trusted = _read("envoy.server_ca_file", envoy.server_ca_file)
    if trusted is None:
        trusted = content("server.tls.cert_file", tls.cert_file)
    if tls.client_ca_file is None:
        return grpc.ssl_channel_credentials(trusted)
    key = _read("envoy.client_key_file", envoy.client_key_file)
    cert = _read("envoy.client_cert_file", envoy.client_cert_file)
    if key is None or cert is None:
        key, cert = (
            content("server.tls.key_file", tls.key_file),
            content("server.tls.cert_file", tls.cert_file),
        )
    return grpc.ssl_channel_credentials(trusted, key, cert)


def _read(key: str, path: Path | None) -> bytes | None:
    """None where Envoy's file is on Envoy's machine alone."""
    return None if path is None or not path.is_file() else content(key, path)
