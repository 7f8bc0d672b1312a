"""One request through both lanes: two gateways before one upstream, and what must not differ between them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from tests.support.canned import Answer, Canned, Request, canned
from tests.support.gateway import Gateway, chat, new_id

LANES = ("stream", "native")
_MOVING = frozenset({"date", "x-envoy-upstream-service-time"})
_MOVING_FIELDS = frozenset({"timestamp", "duration", "ttft", "tpot", "endpoint"})
_TIMES = ("ttft", "tpot")

Report = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Received:
    """What the client got, in either lane.

    Attributes:
        headers: those that do not change from request to request.
    """

    request_id: str
    status: int
    headers: Sequence[tuple[str, str]]
    body: bytes

    @property
    def header(self) -> Mapping[str, str]:
        """The headers by name."""
        return dict(self.headers)


@dataclass(slots=True)
class Lanes:
    """Both gateways, by lane, and what is asked of them."""

    upstream: Canned
    gateways: dict[str, Gateway] = field(default_factory=dict)
    sessions: dict[str, aiohttp.ClientSession] = field(default_factory=dict)

    async def ask(
        self,
        answer: Answer | None,
        path: str = "/v1/chat/completions",
        *,
        method: str = "POST",
        data: Callable[[], Any] | None = None,
        headers: Mapping[str, str] | None = None,
        **more: Any,
    ) -> Received:
        """Asks in both lanes, under one request id; what came must be the same.

        Args:
            answer: what the upstream says; None leaves it to its 404.
            path: where to ask.
            method: of the request.
            data: makes the body, once for each lane; by default a chat with `more`.
            headers: more of the request's.
            more: members of the body.
        """
        request_id = new_id()
        if answer is not None:
            self.upstream.answers[request_id] = answer
        sent = {"x-request-id": request_id, **(headers or {})}
        asked = [_exchange(self.sessions[lane], method, path, sent, _body(data, more)) for lane in LANES]
        stream, native = await asyncio.gather(*asked)
        assert native == stream, f"stream lane: {stream}\nnative lane: {native}"
        self.upstream.answers.pop(request_id, None)
        bodies = [request.body for request in self.upstream.requests[request_id]]
        assert all(body == bodies[0] for body in bodies)
        return native

    async def ask_all(
        self, answers: Iterable[Answer], path: str, *, at_once: int, **more: Any
    ) -> list[Received]:
        """Many, so many at once."""
        gate = asyncio.Semaphore(at_once)

        async def one(answer: Answer) -> Received:
            async with gate:
                return await self.ask(answer, path, **more)

        return list(await asyncio.gather(*map(one, answers)))

    async def ask_one(self, lane: str, *, data: Callable[[], Any]) -> Received:
        """Asks in one lane alone, where the two are known to differ."""
        request_id = new_id()
        sent = {"x-request-id": request_id}
        return await _exchange(self.sessions[lane], "POST", "/v1/chat/completions", sent, _body(data, {}))

    def request(self, received: Received) -> Request:
        """The request as the upstream saw it."""
        return self.upstream.requests[received.request_id][0]

    async def reports(self, received: Sequence[Received]) -> list[Report]:
        """The report of each, which must be the same in both lanes but for times and load; exactly one a lane."""
        ids = [each.request_id for each in received]
        stream, native = [await _reports(self.gateways[lane], ids) for lane in LANES]
        for request_id in ids:
            differing = differences(stream[request_id], native[request_id])
            assert not differing, f"stream lane and native lane: {differing}"
        return [native[request_id] for request_id in ids]

    async def report(self, received: Received) -> Report:
        """The report of one."""
        (report,) = await self.reports([received])
        return report


@asynccontextmanager
async def lanes(directory: Path, **config: Mapping[str, Any]) -> AsyncIterator[Lanes]:
    """Both lanes over one upstream."""
    async with AsyncExitStack() as stack:
        both = Lanes(await stack.enter_async_context(canned()))
        for lane in LANES:
            gateway = Gateway(
                directory / lane,
                pods=[both.upstream.pod()],
                config={**config, "responses": {"accounting": lane}},
            )
            both.gateways[lane] = await stack.enter_async_context(gateway)
            session = aiohttp.ClientSession(
                gateway.url, connector=aiohttp.TCPConnector(limit=0), auto_decompress=False
            )
            both.sessions[lane] = await stack.enter_async_context(session)
        yield both


def differences(stream: Report, native: Report) -> Mapping[str, tuple[Any, Any]]:
    """What two reports say differently of one answer, when and beside what it ran set aside."""
    first, second = _steady(stream), _steady(native)
    return {
        name: (first.get(name), second.get(name))
        for name in first.keys() | second.keys()
        if first.get(name) != second.get(name)
    }


def _steady(report: Report) -> Mapping[str, Any]:
    steady = {name: value for name, value in report.items() if name not in _MOVING_FIELDS}
    return steady | {name: report[name] is not None for name in _TIMES}


def _body(data: Callable[[], Any] | None, more: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"json": chat(input="x", prompt="x", **more)} if data is None else {"data": data()}


async def _exchange(
    session: aiohttp.ClientSession,
    method: str,
    path: str,
    headers: Mapping[str, str],
    body: Mapping[str, Any],
) -> Received:
    async with (
        asyncio.timeout(60),
        session.request(method, path, headers=headers, allow_redirects=False, **body) as response,
    ):
        text = await response.read()
    told = ((name.lower(), value) for name, value in response.headers.items())
    # Of a load report the form: its rate moves with the clock.
    steady = [
        (name, value.partition(" ")[0] if name == "endpoint-load-metrics" else value)
        for name, value in told
        if name not in _MOVING
    ]
    return Received(headers["x-request-id"], response.status, tuple(sorted(steady)), text)


async def _reports(gateway: Gateway, ids: Sequence[str]) -> Mapping[str, Report]:
    wanted = set(ids)
    async with asyncio.timeout(20):
        while True:
            lines = [line for line in gateway.reports() if line["request_id"] in wanted]
            if len({line["request_id"] for line in lines}) == len(wanted):
                break
            await asyncio.sleep(0.05)
    assert len(lines) == len(wanted), "an exchange was reported twice"
    return {line["request_id"]: line for line in lines}
