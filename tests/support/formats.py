"""Streams and documents of every API, written as engines and OpenAI's and Anthropic's references write them.

Each is one `Answer`: its bytes, and what both lanes must read of it, to the token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from envoy_extproc.openai.usage import Usage
from tests.support import captures

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Answer:
    """What an engine writes, and what is to be read of it.

    Attributes:
        events: of a stream, each with its empty line; a document is one.
        usage: as reported; None where it is to be estimated.
        begun: prompt tokens that a message's start told; None where there was none.
        tokens: pieces of text in a stream; of a document only where there is no usage.
        text: characters in them.
        done: whether it says that it is over.
        error: its status, where it tells of one.
    """

    events: Sequence[bytes]
    usage: Usage | None = None
    begun: int | None = None
    tokens: int = 0
    text: int = 0
    done: bool = True
    error: int | None = None

    @property
    def body(self) -> bytes:
        """All of it."""
        return b"".join(self.events)


def event(**members: Any) -> bytes:
    """With an `event:` line, as engines write every event that has a type."""
    return b"event: %b\ndata: %b\n\n" % (members["type"].encode(), msgspec.json.encode(members))


def bare(**members: Any) -> bytes:
    """Without one."""
    return b"data: %b\n\n" % msgspec.json.encode(members)


def used(prompt: int, completion: int, cached: int | None = None) -> Usage:
    return Usage(prompt_tokens=prompt, completion_tokens=completion, cached_tokens=cached)


# -- messages ----------------------------------------------------------------------------------------------------------


def start(**usage: Any) -> bytes:
    message = {"id": "m", "type": "message", "role": "assistant", "content": [], "model": "x", "usage": usage}
    return event(type="message_start", message=message)


def block(index: int = 0, **delta: str) -> bytes:
    return event(type="content_block_delta", index=index, delta=delta)


def text(value: str) -> bytes:
    return block(type="text_delta", text=value)


def ending(**usage: Any) -> bytes:
    delta = {"stop_reason": "end_turn", "stop_sequence": None}
    return event(type="message_delta", delta=delta, usage=usage) + STOP


STOP = event(type="message_stop")
PING = event(type="ping")
OPEN = event(type="content_block_start", index=0, content_block={"type": "text", "text": ""})
CLOSE = event(type="content_block_stop", index=0)
THREE = (text("a"), text("bc"), text("def"))

MESSAGES: Mapping[str, Answer] = {
    "vLLM: cached tokens beside the others, told at the end": Answer(
        (
            start(input_tokens=13, output_tokens=0),
            OPEN,
            *THREE,
            CLOSE,
            ending(
                input_tokens=10,
                output_tokens=4,
                cache_creation_input_tokens=0,
                cache_read_input_tokens=3,
            ),
        ),
        used(13, 4, 3),
        begun=13,
        tokens=3,
        text=6,
    ),
    "Anthropic: the start tells the prompt, the end the rest": Answer(
        (
            start(input_tokens=10, output_tokens=1, cache_creation_input_tokens=2, cache_read_input_tokens=3),
            PING,
            *THREE,
            ending(output_tokens=40),
        ),
        used(15, 40, 3),
        begun=15,
        tokens=3,
        text=6,
    ),
    "SGLang: cached tokens among the others": Answer(
        (
            start(input_tokens=13, output_tokens=0, cache_read_input_tokens=3),
            *THREE,
            ending(input_tokens=13, output_tokens=4, cache_read_input_tokens=3),
        ),
        used(13, 4, 3),
        begun=13,
        tokens=3,
        text=6,
    ),
    "null at the end leaves what the start told": Answer(
        (
            start(input_tokens=9, output_tokens=1),
            ending(input_tokens=None, output_tokens=2, cache_read_input_tokens=None),
        ),
        used(9, 2),
        begun=9,
    ),
    "two ends: the later one counts": Answer(
        (
            start(input_tokens=9, output_tokens=1),
            event(type="message_delta", delta={}, usage={"input_tokens": 7, "output_tokens": 3}),
            ending(output_tokens=5),
        ),
        used(9, 5),
        begun=9,
    ),
    "no usage at the end": Answer(
        (start(input_tokens=9, output_tokens=1), *THREE, event(type="message_delta", delta={}), STOP),
        begun=9,
        tokens=3,
        text=6,
    ),
    "no usage at the start": Answer(
        (
            event(type="message_start", message={"id": "m"}),
            text("a"),
            ending(input_tokens=3, output_tokens=1),
        ),
        used(3, 1),
        tokens=1,
        text=1,
    ),
    "the start's usage is null": Answer(
        (event(type="message_start", message={"usage": None}), ending(input_tokens=3, output_tokens=1)),
        used(3, 1),
    ),
    "odd starts": Answer(
        (
            event(type="message_start"),
            event(type="message_start", message=7),
            event(type="message_start", message=[{"usage": {"input_tokens": 5}}]),
            event(type="message_start", message={"message": {"usage": {"input_tokens": 5}}}),
            STOP,
        )
    ),
    "thinking, a signature, a call": Answer(
        (
            start(input_tokens=5, output_tokens=0),
            *(block(type="thinking_delta", thinking=each) for each in ("hm", "mm", "so")),
            block(type="signature_delta", signature="EqQBCgIYAhIM"),
            *(block(1, type="text_delta", text=each) for each in ("on", "two")),
            event(
                type="content_block_start",
                index=2,
                content_block={"type": "tool_use", "id": "t", "name": "f", "input": {}},
            ),
            *(block(2, type="input_json_delta", partial_json=each) for each in ("", '{"a', '":1', "}")),
            ending(output_tokens=30),
        ),
        used(5, 30),
        begun=5,
        tokens=8,
        text=6 + 5 + 3 * 4,
    ),
    "nothing in a piece": Answer(
        (
            text(""),
            block(type="thinking_delta", thinking=""),
            block(type="citations_delta"),
            event(type="content_block_delta"),
            event(type="content_block_delta", delta=None),
            event(type="content_block_delta", delta=5),
            event(type="content_block_delta", delta=["text"]),
            event(type="content_block_delta", delta={"text": 5, "thinking": None}),
            event(type="content_block_delta", delta={"delta": {"text": "x"}}),
            event(type="content_block_delta", text="x"),
            STOP,
        )
    ),
    "look-alikes": Answer(
        (
            start(input_tokens=5, output_tokens=0),
            text('","usage":{"input_tokens":99}'),
            event(
                type="content_block_delta",
                delta={"type": "text_delta", "text": "x", "usage": {"input_tokens": 98}},
            ),
            event(
                type="content_block_stop", index=0, x={"type": "message_stop", "usage": {"input_tokens": 97}}
            ),
        ),
        begun=5,
        tokens=2,
        text=30,
        done=False,
    ),
    "overloaded": Answer(
        (
            start(input_tokens=5, output_tokens=0),
            text("a"),
            event(type="error", error={"type": "overloaded_error", "message": "Overloaded"}),
        ),
        begun=5,
        tokens=1,
        text=1,
        done=False,
        error=500,
    ),
    "an error of the engine": Answer(
        (event(type="error", error={"type": "api_error", "message": "boom"}),), done=False, error=500
    ),
}

# -- responses ---------------------------------------------------------------------------------------------------------

RESPONSE: dict[str, Any] = {
    "id": "resp_1",
    "object": "response",
    "output": [],
    "text": {"format": {"type": "text"}},
}
INPUT = {
    "input_tokens": 13,
    "input_tokens_details": {"cached_tokens": 4},
    "output_tokens": 8,
    "total_tokens": 21,
}


def numbered(kind: str, number: int, **members: Any) -> bytes:
    """As vLLM writes it, its members in alphabetical order."""
    return event(**dict(sorted({"sequence_number": number, "type": f"response.{kind}", **members}.items())))


def word(value: str, number: int, kind: str = "output_text") -> bytes:
    return numbered(
        f"{kind}.delta", number, content_index=0, delta=value, item_id="msg_1", logprobs=[], output_index=0
    )


def whole(kind: str, number: int = 9, **members: Any) -> bytes:
    return numbered(kind, number, response={**RESPONSE, **members})


CREATED = whole("created", 0, usage=None) + whole("in_progress", 1, usage=None)
COMPLETED = whole("completed", usage=INPUT)
WORDS = tuple(word(value, number) for number, value in enumerate(("a", "bc", "", "def", "g"), 7))

RESPONSES: Mapping[str, Answer] = {
    "as vLLM writes it": Answer((CREATED, *WORDS, COMPLETED), used(13, 8, 4), tokens=4, text=7),
    "with [DONE]": Answer((CREATED, *WORDS, COMPLETED, DONE), used(13, 8, 4), tokens=4, text=7),
    "the type first, the number before the text": Answer(
        (
            *(
                event(type="response.output_text.delta", sequence_number=number, item_id="m", delta="ab")
                for number in range(8, 12)
            ),
            COMPLETED,
        ),
        used(13, 8, 4),
        tokens=4,
        text=8,
    ),
    "the number last": Answer(
        (
            *(
                bare(type="response.output_text.delta", delta="ab", sequence_number=number)
                for number in (8, 9, 10, 99, 100)
            ),
            COMPLETED,
        ),
        used(13, 8, 4),
        tokens=5,
        text=10,
    ),
    "spaced": Answer(
        (
            *(
                b'data: {"type": "response.output_text.delta", "delta": "ab", "sequence_number": %d, "x": 1}\n\n'
                % n
                for n in range(8, 12)
            ),
            b'data: {"type" : "response.completed" , "response" : { "usage" : { "input_tokens" : 3 } } }\n\n',
        ),
        used(3, 0),
        tokens=4,
        text=8,
    ),
    "incomplete": Answer((*WORDS, whole("incomplete", usage=INPUT)), used(13, 8, 4), tokens=4, text=7),
    "no usage": Answer((*WORDS, whole("completed", usage=None)), tokens=4, text=7),
    "nothing behind the text": Answer((CREATED, *WORDS), tokens=4, text=7, done=False),
    "failed": Answer(
        (*WORDS, whole("failed", error={"code": "server_error", "message": "boom"}, usage=INPUT)),
        used(13, 8, 4),
        tokens=4,
        text=7,
        error=500,
    ),
    "failed, for too many": Answer(
        (whole("failed", error={"code": "rate_limit_exceeded", "message": "slow down"}, usage=None),),
        error=429,
    ),
    "failed, and no more said": Answer((whole("failed", error=None),), error=500),
    "failed, and no response": Answer((numbered("failed", 3),), error=500),
    "failed, at length": Answer(
        (whole("failed", error={"code": "429", "message": "m"}, instructions="y" * 5000, usage=INPUT),),
        used(13, 8, 4),
        error=429,
    ),
    "an error event": Answer(
        (
            *WORDS,
            event(
                type="error", code="rate_limit_exceeded", message="slow down", param=None, sequence_number=4
            ),
        ),
        tokens=4,
        text=7,
        done=False,
        error=429,
    ),
    "reasoning, a refusal, a call": Answer(
        (
            *(word("ab", number, "reasoning_text") for number in range(3)),
            *(word("ab", number, "reasoning_summary_text") for number in range(3, 6)),
            *(word("abc", number, "refusal") for number in range(6, 9)),
            *(word('{"', number, "function_call_arguments") for number in range(9, 12)),
            word("", 12, "function_call_arguments"),
            *(word("x" * 50, number, "custom_tool_call_input") for number in range(13, 15)),
            COMPLETED,
        ),
        used(13, 8, 4),
        tokens=14,
        text=6 + 6 + 9 + 12 + 8,
    ),
    "a delta that is no text": Answer(
        (
            numbered("output_text.delta", 1),
            numbered("output_text.delta", 2, delta=None),
            numbered("output_text.delta", 3, delta={"text": "x"}),
            numbered("output_text.delta", 4, delta=["x"]),
            numbered("output_text.done", 5, text="abc"),
            numbered("output_item.done", 6, item={"delta": "x", "type": "response.completed"}),
            COMPLETED,
        ),
        used(13, 8, 4),
    ),
    "probabilities beside the text": Answer(
        (
            *(
                numbered(
                    "output_text.delta", number, delta="ab", logprobs=[{"token": "ab", "logprob": -number}]
                )
                for number in range(4)
            ),
            COMPLETED,
        ),
        used(13, 8, 4),
        tokens=4,
        text=8,
    ),
    "look-alikes": Answer(
        (
            word('","sequence_number":7,"usage":{"input_tokens":99}', 3),
            numbered("in_progress", 4, response={"usage": {"input_tokens": 98}}),
            numbered("output_item.done", 5, item={"usage": {"input_tokens": 97}, "error": {"code": 400}}),
            whole("completed", x={"usage": {"input_tokens": 96}}, metadata={"error": "x"}),
        ),
        tokens=1,
        text=49,
    ),
    "the response is none": Answer((numbered("completed", 1, response=[{"usage": INPUT}]),)),
    "odd usage": Answer(
        (whole("completed", usage={"input_tokens": "7", "output_tokens": 3.0, "input_tokens_details": []}),),
        used(7, 3),
    ),
}

# -- sound and pictures ------------------------------------------------------------------------------------------------

TOKENS = {"type": "tokens", "input_tokens": 14, "output_tokens": 45, "total_tokens": 59}
SECONDS = {"type": "duration", "seconds": 3}


def heard(value: str) -> bytes:
    """A piece of a transcription as vLLM writes it."""
    choices = [{"delta": {"content": value}, "finish_reason": None}]
    return bare(id="trsc-1", object="transcription.chunk", created=1, model="whisper", choices=choices)


MEDIA: Mapping[str, Answer] = {
    "a transcription of vLLM": Answer(
        (
            *map(heard, ("Good", " morning", "", " all")),
            bare(
                id="trsc-1",
                object="transcription.chunk",
                created=1,
                model="whisper",
                choices=[],
                usage={"prompt_tokens": 200, "completion_tokens": 4, "total_tokens": 204},
            ),
            DONE,
        ),
        used(200, 4),
        tokens=3,
        text=16,
    ),
    "a transcription": Answer(
        (
            *(event(type="transcript.text.delta", delta=each) for each in ("I", " see", " skies")),
            event(type="transcript.text.done", text="I see skies", usage=TOKENS),
        ),
        used(14, 45),
        tokens=3,
        text=11,
    ),
    "a transcription that is told in seconds": Answer(
        (
            event(type="transcript.text.delta", delta="I see"),
            event(type="transcript.text.segment", text="I see", id="s", start=0, end=1, speaker="A"),
            event(type="transcript.text.done", text="I see", usage=SECONDS),
        ),
        tokens=1,
        text=5,
    ),
    "speech": Answer(
        (
            *(event(type="speech.audio.delta", audio=each) for each in ("UklGRgAA", "AAAA" * 30, "", "AA==")),
            event(type="speech.audio.done", usage=TOKENS),
        ),
        used(14, 45),
        tokens=3,
        text=12,
    ),
    "sound of a response": Answer(
        (
            event(type="response.audio.delta", delta="UklGRgAA" * 9),
            event(type="response.audio.transcript.delta", delta="hello"),
            COMPLETED,
        ),
        used(13, 8, 4),
        tokens=2,
        text=9,
    ),
    "a picture": Answer(
        (
            *(
                event(type="image_generation.partial_image", b64_json="iVBOR" * 9, partial_image_index=number)
                for number in range(2)
            ),
            event(type="image_generation.completed", b64_json="iVBOR", usage=TOKENS),
        ),
        used(14, 45),
    ),
    "a picture that was edited": Answer(
        (
            event(type="image_edit.partial_image", b64_json="iVBOR"),
            event(type="image_edit.completed", b64_json="iVBOR", usage=TOKENS),
        ),
        used(14, 45),
    ),
    "a picture without usage": Answer((event(type="image_generation.completed", b64_json="iVBOR"),)),
}


def _captured(name: str, usage: Usage, tokens: int, length: int, begun: int | None = None) -> Answer:
    return Answer(captures.events(name), usage, begun, tokens, length)


RECORDED: Mapping[str, Answer] = {
    "messages_stream": _captured("messages_stream", used(13, 4, 0), 4, 14, 13),
    "responses_stream": _captured("responses_stream", used(13, 4, 0), 2, 13),
}

STREAMS: Mapping[str, Answer] = {
    f"{kind}: {name}": answer
    for kind, table in (
        ("messages", MESSAGES),
        ("responses", RESPONSES),
        ("media", MEDIA),
        ("recorded", RECORDED),
    )
    for name, answer in table.items()
}

# -- documents ---------------------------------------------------------------------------------------------------------


def _json(
    value: Any, usage: Usage | None = None, tokens: int = 0, length: int = 0, error: int | None = None
) -> Answer:
    return Answer((msgspec.json.encode(value),), usage, None, tokens, length, error=error)


def _file(name: str, usage: Usage | None = None) -> Answer:
    return Answer((captures.body(name),), usage)


MESSAGE = {
    "id": "m",
    "type": "message",
    "content": [
        {"type": "thinking", "thinking": "hm", "signature": "x"},
        {"type": "text", "text": "hello"},
        {"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}},
    ],
}
OUTPUT = [
    {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
    {
        "type": "message",
        "content": [{"type": "output_text", "text": "hello"}, {"type": "refusal", "refusal": "no"}],
    },
    {"type": "function_call", "name": "f", "arguments": "{}"},
    {"type": "function_call", "name": "g", "arguments": ""},
    {"type": "x", "content": None},
    7,
]

DOCUMENTS: Mapping[str, Answer] = {
    "messages": _file("messages", used(13, 8, 0)),
    "responses": _file("responses", used(13, 8, 0)),
    "rerank": _file("e_rerank", used(13, 0)),
    "score": _file("e_score", used(13, 0)),
    "pooling": _file("e_pooling", used(3, 0)),
    "tokenize": _file("tokenize"),
    "detokenize": _file("detokenize"),
    "embeddings": _file("e_embeddings", used(4, 0)),
    "input and output tokens": _json({"usage": TOKENS, "text": "x"}, used(14, 45)),
    "a total alone": _json({"results": [], "usage": {"total_tokens": 7}}, used(7, 0)),
    "a total beside a null": _json({"usage": {"total_tokens": 7, "prompt_tokens": None}}, used(7, 0)),
    "cached tokens of a message": _json(
        {
            "usage": {
                "input_tokens": 10,
                "output_tokens": 2,
                "cache_read_input_tokens": 3,
                "cache_creation_input_tokens": 4,
            }
        },
        used(17, 2, 3),
    ),
    "a transcription told in seconds": _json({"text": "hello", "usage": SECONDS}, None, 1, 5),
    "seconds and a look-alike": _json(
        {"text": "hello", "usage": {"x": {"type": "duration"}, "input_tokens": 3, "y": "duration"}},
        used(3, 0),
    ),
    "a transcription without usage": _json(
        {"text": "hell\u00f6", "segments": [{"text": "x"}], "language": "en"}, None, 1, 5
    ),
    "a message without usage": _json(MESSAGE, None, 3, 2 + 5 + 4),
    "a response without usage": _json(
        {"object": "response", "output": OUTPUT, "text": {"format": {"type": "text"}}}, None, 4, 2 + 5 + 2 + 4
    ),
    "odd members": _json(
        {"output": {"content": []}, "content": "x", "text": ["x"], "message": 5, "delta": 7, "type": 3}
    ),
    "an object": _json({}),
    "an array": _json([{"score": 0.5, "usage": {"prompt_tokens": 9}}, [1], "]", None]),
    "an empty array": _json([]),
    "a number": _json(7),
    "a negative number": _json(-0.5),
    "a sentence": _json("hello"),
    "a truth": _json(True),
    "null": _json(None),
    "detail": _json({"detail": "not so bad"}),
    "an error": _json({"error": {"message": "boom", "code": 503}}, error=503),
    "an error of Anthropic": _json(
        {"type": "error", "error": {"type": "rate_limit_error", "message": "slow"}}, error=500
    ),
    "an error as a sentence": _json({"error": "boom"}, error=500),
    "an error object": _json({"object": "error", "message": "no", "code": 400}, error=400),
    "a response that failed": _json(
        {"error": {"code": "server_error"}, "usage": INPUT, "output": OUTPUT}, used(13, 8, 4), error=500
    ),
    "no error": _json({"error": None, "usage": INPUT}, used(13, 8, 4)),
}
