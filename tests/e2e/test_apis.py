"""Every path of docs/apis.md through a real Envoy, in both lanes: unchanged for the client, routed, accounted.

Answers are vLLM's own where it was recorded; the others are written to the API's published shapes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import openai
import pytest
import pytest_asyncio

from envoy_extproc.openai import routes
from tests.support import captures
from tests.support.canned import Answer, document, head, stream
from tests.support.gateway import MODEL, Gateway
from tests.support.lanes import LANES, Lanes, lanes

MEBIBYTE = 1_048_576


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def both(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lanes]:
    async with lanes(tmp_path_factory.mktemp("apis")) as ready:
        yield ready


@dataclass(frozen=True, kw_only=True)
class Case:
    """One answer to one path.

    Attributes:
        ask: members of the request's body, the model apart.
        usage: input and output tokens and how they are known.
    """

    path: str
    ask: Mapping[str, Any]
    answer: Answer
    body: bytes
    usage: tuple[int | None, int | None, str]
    note: str = ""

    @property
    def name(self) -> str:
        """For the test's id."""
        return self.path.strip("/") + (f" {self.note}" if self.note else "")


def recorded(
    path: str, name: str, ask: Mapping[str, Any], usage: tuple[int | None, int | None, str], note: str = ""
) -> Case:
    """What vLLM 0.32 said."""
    raw = (captures.FOLDER / f"{name}.raw").read_bytes()
    return Case(path=path, ask=ask, answer=Answer((raw,)), body=captures.body(name), usage=usage, note=note)


def written(
    path: str, ask: Mapping[str, Any], body: object, usage: tuple[int | None, int | None, str], note: str = ""
) -> Case:
    """A JSON answer in the API's shape."""
    text = json.dumps(body).encode()
    return Case(path=path, ask=ask, answer=document(text), body=text, usage=usage, note=note)


def streamed(path: str, ask: Mapping[str, Any], *events: object, usage: tuple[int, int, str]) -> Case:
    """An event stream in the API's shape."""
    texts = [b"data: " + json.dumps(event).encode() + b"\n\n" for event in events]
    asked = {**ask, "stream": True}
    return Case(path=path, ask=asked, answer=stream(*texts), body=b"".join(texts), usage=usage, note="stream")


MESSAGES = [{"role": "user", "content": "import os"}]
NOTHING = (0, 0, "none")
TOKENS = {"type": "tokens", "input_tokens": 14, "output_tokens": 3, "total_tokens": 17}
SOUND = os.urandom(3000)
CASES = (
    recorded("/v1/chat/completions", "chat", {"messages": MESSAGES}, (18, 8, "reported")),
    recorded("/v1/completions", "completions", {"prompt": "def f("}, (2, 8, "reported")),
    recorded("/v1/embeddings", "e_embeddings", {"input": "x"}, (4, 0, "reported")),
    recorded("/v1/responses", "responses", {"input": "import os"}, (13, 8, "reported")),
    recorded(
        "/v1/responses", "responses_stream", {"input": "a", "stream": True}, (13, 4, "reported"), "stream"
    ),
    recorded("/v1/messages", "messages", {"messages": MESSAGES, "max_tokens": 8}, (13, 8, "reported")),
    recorded(
        "/v1/messages",
        "messages_stream",
        {"messages": MESSAGES, "max_tokens": 4, "stream": True},
        (13, 4, "reported"),
        "stream",
    ),
    written("/v1/messages/count_tokens", {"messages": MESSAGES}, {"input_tokens": 13}, NOTHING),
    recorded("/v1/rerank", "e_rerank", {"query": "a", "documents": ["b", "c"]}, (13, 0, "reported")),
    written(
        "/v1/rerank",
        {"query": "a", "documents": ["bbbb", "c"]},
        [{"score": 0.9, "document": "bbbb", "index": 0, "meta_info": {}}],
        (5, 0, "estimated"),
        "a list, as SGLang writes",
    ),
    recorded("/v1/score", "e_score", {"text_1": "a", "text_2": ["b"]}, (13, 0, "reported")),
    written(
        "/classify",
        {"input": "x"},
        {
            "id": "classify-1",
            "object": "list",
            "model": MODEL,
            "data": [{"index": 0, "label": "LABEL_0", "probs": [0.9, 0.1], "num_classes": 2}],
            "usage": {"prompt_tokens": 4, "total_tokens": 4, "completion_tokens": 0},
        },
        (4, 0, "reported"),
    ),
    recorded("/pooling", "e_pooling", {"input": "x"}, (3, 0, "reported")),
    recorded("/tokenize", "tokenize", {"prompt": "def read(self):"}, NOTHING),
    recorded("/detokenize", "detokenize", {"tokens": [69, 70, 71]}, NOTHING),
    written(
        "/v1/audio/transcriptions",
        {"response_format": "json"},
        {"text": "Hello there.", "usage": TOKENS},
        (14, 3, "reported"),
    ),
    written(
        "/v1/audio/transcriptions",
        {},
        {"text": "Hello there.", "usage": {"type": "duration", "seconds": 3}},
        (0, 3, "estimated"),
        "billed by the second",
    ),
    streamed(
        "/v1/audio/transcriptions",
        {},
        {"type": "transcript.text.delta", "delta": "Hello"},
        {"type": "transcript.text.delta", "delta": " there."},
        {"type": "transcript.text.done", "text": "Hello there.", "usage": TOKENS},
        usage=(14, 3, "reported"),
    ),
    Case(
        path="/v1/audio/transcriptions",
        ask={"response_format": "srt"},
        answer=Answer((head("text/plain; charset=utf-8", "content-length: 5"), b"1\n\nHi")),
        body=b"1\n\nHi",
        usage=(0, 0, "estimated"),
        note="subtitles",
    ),
    written("/v1/audio/translations", {}, {"text": "Hello.", "usage": TOKENS}, (14, 3, "reported")),
    Case(
        path="/v1/audio/speech",
        ask={"input": "hello", "voice": "alloy"},
        answer=Answer((head("audio/mpeg", f"content-length: {len(SOUND)}"), SOUND)),
        body=SOUND,
        usage=(2, 0, "estimated"),
    ),
    streamed(
        "/v1/audio/speech",
        {"input": "hello", "stream_format": "sse"},
        {"type": "speech.audio.delta", "audio": "AAAA"},
        {"type": "speech.audio.done", "usage": TOKENS},
        usage=(14, 3, "reported"),
    ),
    written(
        "/v1/images/generations",
        {"prompt": "a cat"},
        {"created": 1, "data": [{"b64_json": "iVBORw0KGgo="}], "usage": TOKENS},
        (14, 3, "reported"),
    ),
    streamed(
        "/v1/images/generations",
        {"prompt": "a cat"},
        {"type": "image_generation.partial_image", "b64_json": "iVBO"},
        {"type": "image_generation.completed", "b64_json": "iVBO", "usage": TOKENS},
        usage=(14, 3, "reported"),
    ),
    written(
        "/v1/images/edits",
        {"prompt": "a dog"},
        {"created": 1, "data": [], "usage": TOKENS},
        (14, 3, "reported"),
    ),
    written("/v1/images/variations", {"n": 2}, {"created": 1, "data": []}, (0, 0, "estimated")),
)


async def test_every_path_is_here() -> None:
    assert {case.path for case in CASES} == {route.path for route in routes.ROUTES}


def is_form(case: Case) -> bool:
    route = routes.find(case.path)
    assert route is not None
    return route.body is routes.Body.FORM


def request_to(case: Case, file: bytes = b"RIFF....WAVE") -> io.BytesIO:
    members = {"model": MODEL, **case.ask}
    if not is_form(case):
        return io.BytesIO(json.dumps(members).encode())
    parts = [b'name="file"; filename="a.wav"\r\nContent-Type: audio/wav\r\n\r\n' + file]
    for name, value in members.items():
        parts.append(f'name="{name}"\r\n\r\n{json.dumps(value).strip(chr(34))}'.encode())
    lines = [b"--limit\r\nContent-Disposition: form-data; " + part + b"\r\n" for part in parts]
    return io.BytesIO(b"".join(lines) + b"--limit--\r\n")


def headers_of(case: Case) -> Mapping[str, str]:
    return {"content-type": "multipart/form-data; boundary=limit" if is_form(case) else "application/json"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_an_answer_of_every_path(both: Lanes, case: Case) -> None:
    received = await both.ask(
        case.answer, f"/prefix{case.path}?x=1", data=lambda: request_to(case), headers=headers_of(case)
    )
    assert (received.status, received.body) == (200, case.body)
    assert received.header["target-pod"] == "pod-canned"
    assert both.request(received).target == f"/prefix{case.path}?x=1"
    report = await both.report(received)
    route = routes.find(case.path)
    assert route is not None
    assert (report["outcome"], report["error.type"]) == ("success", None)
    assert (report["gen_ai.operation.name"], report["gen_ai.request.model"]) == (route.operation, MODEL)
    usage = (
        report["gen_ai.usage.input_tokens"],
        report["gen_ai.usage.output_tokens"],
        report["usage_source"],
    )
    assert usage == case.usage
    assert "unread" not in report
    assert (report["ttft"] is not None) <= report["stream"]


@pytest.mark.parametrize("alias", [alias for route in routes.ROUTES for alias in route.aliases])
async def test_aliases(both: Lanes, alias: str) -> None:
    received = await both.ask(document(b"{}"), alias, data=lambda: json.dumps({"model": MODEL}).encode())
    route = routes.find(alias)
    assert route is not None
    assert (await both.report(received))["gen_ai.operation.name"] == route.operation


@pytest.mark.parametrize("megabytes", [1, 25])
async def test_a_large_recording(both: Lanes, megabytes: int) -> None:
    """Every byte of it arrives, and the model behind it is found."""
    sound = os.urandom(megabytes * MEBIBYTE)
    case = next(case for case in CASES if case.path == "/v1/audio/transcriptions")
    received = await both.ask(
        case.answer, case.path, data=lambda: request_to(case, sound), headers=headers_of(case)
    )
    assert (received.status, received.body) == (200, case.body)
    for request in both.upstream.requests.pop(received.request_id):
        assert _file_in(request.body) == hashlib.sha256(sound).digest()
    assert (await both.report(received))["gen_ai.request.model"] == MODEL


def _file_in(form: bytes) -> bytes:
    """A digest: pytest would write megabytes where they differ."""
    file = form.split(b"\r\n\r\n", 1)[1].split(b"\r\n--limit", 1)[0]
    return hashlib.sha256(file).digest()


async def test_a_recording_beyond_the_limit(both: Lanes) -> None:
    case = next(case for case in CASES if case.path == "/v1/audio/transcriptions")
    received = await both.ask(
        None, case.path, data=lambda: request_to(case, bytes(34 * MEBIBYTE)), headers=headers_of(case)
    )
    assert received.status == 413
    assert json.loads(received.body)["error"]["code"] == "request_too_large"


@pytest.mark.parametrize("lane", LANES)
async def test_models_are_listed(both: Lanes, lane: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{both.gateways[lane].url}/v1", api_key="x") as client:
        listed = [model async for model in client.models.list()]
        assert [model.id for model in listed] == [MODEL]
        assert (await client.models.retrieve(MODEL)).id == MODEL
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("org/unknown")


@pytest.mark.parametrize("lane", LANES)
async def test_the_official_client(both: Lanes, lane: str) -> None:
    """Responses, audio and images as the library reads them."""
    upstream = both.upstream
    async with openai.AsyncOpenAI(base_url=f"{both.gateways[lane].url}/v1", api_key="x") as client:
        upstream.default = document(captures.body("responses"))
        answer = await client.responses.create(model=MODEL, input="import os")
        assert answer.usage is not None
        assert answer.usage.output_tokens == 8
        upstream.default = stream(*captures.events("responses_stream"))
        kinds = [
            event.type async for event in await client.responses.create(model=MODEL, input="a", stream=True)
        ]
        assert kinds[-1] == "response.completed"
        upstream.default = document(b'{"text":"hi","usage":{"type":"duration","seconds":1}}')
        text = await client.audio.transcriptions.create(model=MODEL, file=("a.wav", b"RIFF"))
        assert text.text == "hi"
        upstream.default = Answer((head("audio/mpeg", f"content-length: {len(SOUND)}"), SOUND))
        speech = await client.audio.speech.create(model=MODEL, input="hi", voice="alloy")
        assert speech.content == SOUND
    upstream.default = None


async def test_nothing_is_left_over(both: Lanes) -> None:
    for gateway in both.gateways.values():
        await _nothing_left(gateway)


async def _nothing_left(gateway: Gateway) -> None:
    assert await gateway.metric("envoy_extproc_in_flight_requests") == 0
    assert await gateway.metric("envoy_extproc_unexpected_messages_total") == 0
    assert await gateway.metric("envoy_extproc_errors_total", error_type="internal") == 0
    assert await gateway.metric("envoy_extproc_bypassed_requests_total") == 0
