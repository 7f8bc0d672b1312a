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

from envoy_extproc.endpoints import EngineState
from envoy_extproc.scheduling.explain import Asked, explain
from envoy_extproc.scheduling.interfaces import Candidate, Decision, SchedulingRequest
from envoy_extproc.server import explaining
from envoy_extproc.server.director import Director

_MOST_ASKED = 48 * 1024 * 1024
"""Bytes of a question: the longest body there may be by default, in base64."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Admin:
    """The handlers.

    Args:
        registry: of the metrics.
        ready: whether new exchanges are welcome.
        director: what /debug looks at.
        trust_user: whether the header `user` counts in what is to be explained.
        debug_token: opens /debug from anywhere; None leaves it to loopback.
        counted: has the prompt of a request counted.
        breaker: what the circuit breaker of an address does; None where there is none.
        routes: what the Gateways say of each model's HTTPRoutes; None where nobody watches them.
    """

    def __init__(
        self,
        *,
        registry: CollectorRegistry,
        ready: Callable[[], bool],
        director: Director,
        debug_token: str | None,
        trust_user: bool = False,
        counted: explaining.Counted = explaining.uncounted,
        breaker: Callable[[str], str | None] = lambda _: None,
        routes: Callable[[], object] | None = None,
    ) -> None:
        self._registry = registry
        self._ready = ready
        self._director = director
        self._debug_token = debug_token
        self._trust_user = trust_user
        self._counted = counted
        self._breaker = breaker
        self._routes = routes

    def app(self) -> web.Application:
        """The application to serve."""
        app = web.Application(client_max_size=_MOST_ASKED)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/debug/endpoints", self._guarded(self._endpoints))
        app.router.add_get("/debug/decisions", self._guarded(self._decisions))
        app.router.add_get("/debug/routes", self._guarded(self._routed))
        app.router.add_post("/debug/explain", self._guarded(self._explain))
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
        now = time.monotonic()
        described = [_endpoint(*each, now) for each in self._director.observed(now)]
        return _json([each | {"breaker": self._breaker(each["address"])} for each in described])

    async def _decisions(self, request: web.Request) -> web.Response:
        now, director = time.monotonic(), self._director
        limit, model = _limit(request.query.get("limit")), request.query.get("model")
        wanted = [each for each in reversed(director.decisions) if model is None or each[1].model == model]
        return _json([_decision(*each, director.asked(each[1]), now) for each in wanted[:limit]])

    async def _routed(self, _: web.Request) -> web.Response:
        if self._routes is None:
            raise web.HTTPNotFound(text="nobody watches: see discovery.kubernetes.routes\n")
        return _json(self._routes())

    async def _explain(self, request: web.Request) -> web.Response:
        try:
            question = explaining.decode(await request.read())
        except explaining.QuestionError as error:
            raise web.HTTPBadRequest(text=f"not a question: {error}\n") from None
        answer = await explaining.answer(
            question,
            lambda asked: self._director.explain(asked, time.monotonic()),
            counted=self._counted,
            trust_user=self._trust_user,
        )
        return web.Response(
            status=answer.status,
            headers=dict(answer.headers),
            body=msgspec.json.format(answer.body, indent=2),
            content_type="application/json",
        )


def _limit(text: str | None) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise web.HTTPBadRequest(text="limit is a whole number\n")
    return int(text)


def _endpoint(candidate: Candidate, state: EngineState, avoided: bool, now: float) -> dict[str, Any]:
    served = state.served
    return _candidate(candidate, now) | {
        "not_chosen": _not_chosen(state, avoided=avoided),
        "scrape": {
            "error": state.error,
            "failures": state.failures,
            "interval_seconds": state.interval,
            "last_seconds_ago": None if state.stats is None else round(now - state.stats.at, 3),
        },
        "config": candidate.endpoint.config,
        "served": None if served is None else [{"id": each.id, "parent": each.parent} for each in served],
    }


def _not_chosen(state: EngineState, *, avoided: bool) -> str | None:
    """Why other endpoints of its models come first; None where they do not."""
    reasons = [
        *(() if state.reachable else (f"unreachable: {state.error}",)),
        *(("avoided: requests to it failed lately",) if avoided else ()),
    ]
    return "; ".join(reasons) or None


def _candidate(candidate: Candidate, now: float) -> dict[str, Any]:
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


def _decision(
    at: float, request: SchedulingRequest, decision: Decision, asked: Asked, now: float
) -> Mapping[str, Any]:
    names = [candidate.endpoint.name for candidate in decision.candidates]
    explained = explain(
        decision,
        asked,
        decision.candidates,
        prompt_tokens=request.prompt_tokens,
        tokenizer=request.tokenizer,
    )
    return {
        "seconds_ago": round(now - at, 3),
        "model": request.model,
        "policy": decision.policy,
        "source": asked.source,
        "decided_by": decision.decided_by,
        "fallback_reason": decision.fallback_reason,
        "missing": decision.missing,
        "because": explained.because,
        "order": [endpoint.name for endpoint in decision.order],
        "filtered": {name: list(gone) for name, gone in decision.filtered},
        "scores": {
            each.scorer: dict(zip(names, (round(value, 6) for value in each.values), strict=True))
            for each in decision.scores
        },
        "weights": explained.weights,
        "prompt_tokens": request.prompt_tokens,
        "tokenizer": request.tokenizer,
        "candidates": [_candidate(candidate, at) for candidate in decision.candidates],
    }


def _json(value: object) -> web.Response:
    body = msgspec.json.format(msgspec.json.encode(value), indent=2)
    return web.Response(body=body, content_type="application/json")
