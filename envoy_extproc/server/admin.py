"""The admin port over HTTP: metrics and health for machines, /debug for people on loopback or with the token."""

from __future__ import annotations

import hmac
import ipaddress
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec
from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from envoy_extproc.scheduling.interfaces import Candidate, Decision, SchedulingRequest
from envoy_extproc.server.director import Director

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Admin:
    """The handlers.

    Args:
        registry: of the metrics.
        ready: whether new exchanges are welcome.
        director: what /debug looks at.
        debug_token: opens /debug from anywhere; None leaves it to loopback.
    """

    def __init__(
        self,
        *,
        registry: CollectorRegistry,
        ready: Callable[[], bool],
        director: Director,
        debug_token: str | None,
    ) -> None:
        self._registry = registry
        self._ready = ready
        self._director = director
        self._debug_token = debug_token

    def app(self) -> web.Application:
        """The application to serve."""
        app = web.Application()
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/debug/endpoints", self._guarded(self._endpoints))
        app.router.add_get("/debug/decisions", self._guarded(self._decisions))
        return app

    async def _metrics(self, request: web.Request) -> web.Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return web.Response(body=encode(self._registry), headers={"content-type": content_type})

    async def _healthz(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _readyz(self, _: web.Request) -> web.Response:
        if self._ready():
            return web.Response(text="ready\n")
        return web.Response(text="not ready\n", status=503)

    def _guarded(self, handler: Handler) -> Handler:
        async def guarded(request: web.Request) -> web.StreamResponse:
            if not self.allows(request.remote, request.headers.get("authorization", "")):
                raise web.HTTPForbidden(text="from loopback, or with server.debug_token as a bearer token\n")
            return await handler(request)

        return guarded

    def allows(self, remote: str | None, authorization: str) -> bool:
        """Whether someone at `remote`, who sends `authorization`, may look at /debug."""
        try:
            if ipaddress.ip_address(remote or "").is_loopback:
                return True
        except ValueError:
            pass  # a Unix socket has no address
        if self._debug_token is None:
            return False
        sent = authorization.removeprefix("Bearer ")
        return hmac.compare_digest(sent.encode("utf-8", "surrogateescape"), self._debug_token.encode())

    async def _endpoints(self, _: web.Request) -> web.Response:
        director, now = self._director, time.monotonic()
        return _json(
            [_candidate(each, now) for each in director.candidates(director.snapshot.endpoints, now)]
        )

    async def _decisions(self, _: web.Request) -> web.Response:
        now = time.monotonic()
        return _json([_decision(*each, now) for each in reversed(self._director.decisions)])


def _candidate(candidate: Candidate, now: float) -> Mapping[str, Any]:
    endpoint, stats = candidate.endpoint, candidate.stats
    described = {
        "name": endpoint.name,
        "address": endpoint.address,
        "models": endpoint.models,
        "engine": endpoint.engine,
        "labels": dict(endpoint.labels),
        "in_flight": candidate.in_flight,
        "reachable": candidate.reachable,
        "stats": None,
    }
    if stats is not None:
        known = {name: value for name, value in msgspec.structs.asdict(stats).items() if name != "at"}
        described["stats"] = known | {"age_seconds": round(now - stats.at, 3)}
    return described


def _decision(at: float, request: SchedulingRequest, decision: Decision, now: float) -> Mapping[str, Any]:
    names = [candidate.endpoint.name for candidate in decision.candidates]
    return {
        "seconds_ago": round(now - at, 3),
        "model": request.model,
        "policy": decision.policy,
        "decided_by": decision.decided_by,
        "fallback_reason": decision.fallback_reason,
        "order": [endpoint.name for endpoint in decision.order],
        "filtered": {name: list(gone) for name, gone in decision.filtered},
        "scores": {
            each.scorer: dict(zip(names, (round(value, 6) for value in each.values), strict=True))
            for each in decision.scores
        },
        "candidates": [_candidate(candidate, at) for candidate in decision.candidates],
    }


def _json(value: object) -> web.Response:
    body = msgspec.json.format(msgspec.json.encode(value), indent=2)
    return web.Response(body=body, content_type="application/json")
