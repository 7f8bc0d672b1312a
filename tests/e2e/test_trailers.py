"""Requests with trailers, as only HTTP/2 clients of one's own making write them: with a body, and without any."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import h2.connection
import h2.events
import pytest
import pytest_asyncio
from h2.config import H2Configuration

from tests.support.gateway import Gateway, chat, new_id

CHAT = "/v1/chat/completions"
BODY = json.dumps(chat(max_tokens=3, stream=True)).encode()
PAUSE = 0.1  # so that what comes behind it finds Envoy at rest


@dataclass
class Answer:
    """What came back."""

    headers: dict[str, str]
    body: bytes = b""

    @property
    def status(self) -> str:
        return self.headers[":status"]


@dataclass
class Connection:
    """One HTTP/2 connection, for one request."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    state: h2.connection.H2Connection

    async def send(self) -> None:
        self.writer.write(self.state.data_to_send())
        await self.writer.drain()

    async def ask(self, path: str, pieces: Sequence[bytes], *, pause: float) -> tuple[str, Answer]:
        """Headers, a DATA frame for each piece, trailers; returns the request's id and the answer."""
        request_id = new_id()
        names = {":method": "POST", ":path": path, ":authority": "x", ":scheme": "http"}
        self.state.initiate_connection()
        self.state.send_headers(1, [*names.items(), ("x-request-id", request_id)])
        await self.send()
        for piece in pieces:
            await asyncio.sleep(pause)
            self.state.send_data(1, piece)
            await self.send()
        await asyncio.sleep(pause)
        self.state.send_headers(1, [("x-checksum", "1")], end_stream=True)
        await self.send()
        async with asyncio.timeout(10):
            return request_id, await self.answer()

    async def answer(self) -> Answer:
        answer = Answer({})
        while True:
            received = await self.reader.read(65_536)
            assert received, "the connection was closed"
            for event in self.state.receive_data(received):
                if isinstance(event, h2.events.ResponseReceived):
                    answer.headers = {_text(name): _text(value) for name, value in event.headers}
                elif isinstance(event, h2.events.DataReceived):
                    answer.body += event.data or b""
                elif isinstance(event, h2.events.StreamEnded | h2.events.StreamReset):
                    return answer
            await self.send()


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


@pytest_asyncio.fixture(loop_scope="session")
async def connection(gateway: Gateway) -> AsyncIterator[Connection]:
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    yield Connection(reader, writer, h2.connection.H2Connection(H2Configuration()))
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize("pause", [0.0, PAUSE])
async def test_trailers_without_a_body_are_refused(
    gateway: Gateway, connection: Connection, pause: float
) -> None:
    """Envoy has no body to show: without its word on the trailers, the request would go to any pod."""
    request_id, answer = await connection.ask(CHAT, [], pause=pause)
    assert answer.status == "400"
    assert json.loads(answer.body)["error"]["message"] == "The request has no body."
    assert gateway.received(request_id) == []
    report = await gateway.report(request_id)
    assert (report["outcome"], report["error.type"]) == ("refused", "client")


@pytest.mark.parametrize("pause", [0.0, PAUSE])
@pytest.mark.parametrize("pieces", [[BODY], [BODY[:9], BODY[9:]]], ids=len)
async def test_trailers_behind_a_body_disturb_nothing(
    gateway: Gateway, connection: Connection, pieces: Sequence[bytes], pause: float
) -> None:
    request_id, answer = await connection.ask(CHAT, pieces, pause=pause)
    assert answer.status == "200"
    assert answer.headers["target-pod"] in gateway.engines
    assert answer.body.endswith(b"data: [DONE]\n\n")
    assert b'"usage"' not in answer.body
    ((pod, _, sent),) = gateway.received(request_id)
    assert pod == answer.headers["target-pod"]
    assert sent == BODY[:-1] + b',"stream_options":{"include_usage":true}}'
    report = await gateway.report(request_id)
    assert (report["outcome"], report["gen_ai.usage.output_tokens"]) == ("success", 3)
    assert "unexpected_messages" not in report


@pytest.mark.parametrize("pause", [0.0, PAUSE])
@pytest.mark.parametrize("pieces", [[], [b"abc"], [b"abc", b"def"]], ids=len)
async def test_a_body_that_is_not_read_arrives_once(
    gateway: Gateway, connection: Connection, pieces: Sequence[bytes], pause: float
) -> None:
    """Asked about trailers behind a body it has passed on, Envoy would pass the body on again."""
    request_id, answer = await connection.ask("/v1/audio/whatever", pieces, pause=pause)
    assert answer.headers["target-pod"] in gateway.engines
    ((_, _, sent),) = gateway.received(request_id)
    assert sent == b"".join(pieces)
    report = await gateway.report(request_id)
    assert "unexpected_messages" not in report
