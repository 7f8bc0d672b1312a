"""An exchange as a conversation: one says what happens, and gets what is to be done about it."""

from __future__ import annotations

from collections.abc import Sequence

from envoy_extproc.endpoints import Endpoint
from envoy_extproc.errors import GatewayError
from envoy_extproc.exchange.commands import Command, Continue, Finish, Handover, Release, Respond, Schedule
from envoy_extproc.exchange.events import (
    Event,
    Refused,
    RequestBody,
    RequestHeaders,
    RequestTrailers,
    ResponseBody,
    ResponseHeaders,
    Scheduled,
    StreamClosed,
)
from envoy_extproc.exchange.exchange import Exchange, ExchangeSettings, State
from envoy_extproc.exchange.report import Report
from envoy_extproc.scheduling.interfaces import SchedulingRequest
from tests.support.builders import decision, endpoint, headers

ENDPOINTS = {each.address: each for each in (endpoint(1), endpoint(2), endpoint(3))}


class Playbook:
    """Drives one exchange; every event is a second after the one before, unless `at` is set.

    Args:
        native: whether the native lane is open, and Envoy has its script.
    """

    def __init__(self, settings: ExchangeSettings | None = None, *, native: bool = False) -> None:
        self.exchange = Exchange(
            settings or ExchangeSettings(), self._lookup, lambda: "made-up-id", native=native
        )
        self.lua = int(native)
        self.at = 99.0

    def _lookup(self, address: str) -> Endpoint | None:
        return ENDPOINTS.get(address)

    @property
    def state(self) -> State:
        return self.exchange.state

    def receive(self, event: Event) -> Sequence[Command]:
        return self.exchange.receive(event)

    def now(self) -> float:
        self.at += 1
        return self.at

    # -- what happens; each returns what is to be done -------------------------------------------------------------

    def request(
        self,
        path: str = "/v1/chat/completions",
        *,
        end: bool = False,
        subset: tuple[str, ...] | None = None,
        **more: str,
    ) -> Sequence[Command]:
        values = {"method": "GET" if end else "POST", "path": path, "x_request_id": "id-1", **more}
        return self.receive(RequestHeaders(self.now(), headers(**values), end, subset, self.lua))

    def body(self, data: bytes) -> Sequence[Command]:
        return self.receive(RequestBody(self.now(), data, True))

    def trailers(self) -> Sequence[Command]:
        return self.receive(RequestTrailers(self.now()))

    def scheduled(self, *numbers: int) -> Continue:
        return reply(self.receive(Scheduled(self.now(), decision(*numbers))))

    def refused(self, error: GatewayError) -> Respond:
        (command,) = self.receive(Refused(self.now(), error))
        assert isinstance(command, Respond)
        return command

    def answer(
        self,
        status: int = 200,
        content_type: str | None = "text/event-stream; charset=utf-8",
        *,
        end: bool = False,
        upstream: str | None = "10.0.0.1:8000",
        attempts: int = 1,
        local_reply: str | None = None,
        **more: str | int,
    ) -> Sequence[Command]:
        values: dict[str, str | int] = {"status": status, **more}
        if content_type is not None:
            values["content_type"] = content_type
        return self.receive(
            ResponseHeaders(self.now(), headers(**values), end, upstream, attempts, local_reply)
        )

    def data(self, data: bytes, *, end: bool = False) -> bytes:
        """What the client gets of it."""
        command = reply(self.receive(ResponseBody(self.now(), data, end)))
        return data if command.body is None else command.body

    def closed(self, *, draining: bool = False, failure: str | None = None) -> Report:
        (command,) = self.receive(StreamClosed(self.now(), draining, failure))
        assert isinstance(command, Finish)
        return command.report

    def released(self, *, draining: bool = False, failure: str | None = None) -> str:
        """The id by which the report of an exchange that was handed over will come."""
        (command,) = self.receive(StreamClosed(self.now(), draining, failure))
        assert isinstance(command, Release)
        return command.request_id

    # -- the beginnings many conversations share -------------------------------------------------------------------

    def until_routed(
        self, body: bytes = b'{"model":"llama-3-8b","stream":true}', *numbers: int, **more: str
    ) -> Continue:
        self.request("/v1/chat/completions", end=False, subset=None, **more)
        asked(self.body(body))
        return self.scheduled(*numbers)

    def until_answer(self, body: bytes = b'{"model":"llama-3-8b","stream":true}') -> Continue:
        self.until_routed(body)
        return reply(self.answer())


def reply(commands: Sequence[Command]) -> Continue:
    """The one reply, when there is nothing else to do."""
    (command,) = commands
    assert isinstance(command, Continue)
    return command


def handover(routed: Continue) -> Handover:
    """What is left to Envoy."""
    assert routed.handover is not None
    return routed.handover


def respond(commands: Sequence[Command]) -> Respond:
    (command,) = commands
    assert isinstance(command, Respond)
    return command


def asked(commands: Sequence[Command]) -> SchedulingRequest:
    """What is to be scheduled, when that is all there is to do."""
    (command,) = commands
    assert isinstance(command, Schedule)
    return command.request
