"""The report of a native exchange, from an access-log entry: what it says, and that the stream lane says the same."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from envoy_extproc.endpoints import Endpoint
from envoy_extproc.exchange import native
from envoy_extproc.exchange.commands import Handover
from envoy_extproc.exchange.native import Entry, Facts, Malformed, Notes
from envoy_extproc.exchange.report import Report, routing_of
from envoy_extproc.openai.answer import Usage
from tests.support import captures, formats
from tests.support.builders import MODEL, decision, endpoint, sse, token, usage
from tests.support.lua import JSON, STREAM, Script, Told
from tests.support.playbook import ENDPOINTS, Playbook, handover, reply

STARTED = 1_000_000.0
FACTS = Facts(
    request_id="id-1",
    path="/v1/chat/completions",
    routing=routing_of(decision(1, 2)),
    operation="chat",
    model=MODEL,
    stream=True,
    read=True,
    prompt_tokens_estimate=25,
)
NOTES = Notes(
    streamed=True,
    ended=True,
    done=True,
    tokens=64,
    text=192,
    delivered=6400,
    first=1e6 * (STARTED + 0.5),
    last=1e6 * (STARTED + 3.65),
)
CUT_NOTES = msgspec.structs.replace(NOTES, ended=False, done=False)
USAGE = '{"prompt_tokens":5,"completion_tokens":64,"prompt_tokens_details":{"cached_tokens":4}}'
SUCCESS = Entry(
    facts="",
    started=STARTED,
    duration=4.0,
    status=200,
    upstream="10.0.0.1:8000",
    attempts=1,
    body_bytes=6400,
    usage=USAGE,
)


def text_of(value: object) -> str:
    return msgspec.json.encode(value).decode()


def report(facts: Facts = FACTS, notes: Notes | None = NOTES, **changes: Any) -> Report:
    """What is said of a success with these changes; `notes` None: the script wrote none."""
    told = {"facts": text_of(facts), "notes": "" if notes is None else text_of(notes)}
    return native.report(msgspec.structs.replace(SUCCESS, **{**told, **changes}), ENDPOINTS.get)


def noted(notes: Notes = NOTES, **changes: Any) -> Notes:
    return msgspec.structs.replace(notes, **changes)


# -- what an entry says --------------------------------------------------------------------------------------------


def test_a_stream_to_its_end() -> None:
    made = report(notes=noted(removed=1), attempts=2)
    assert made.time_per_output_token == pytest.approx(0.05)
    assert made == Report(
        request_id="id-1",
        path="/v1/chat/completions",
        operation="chat",
        model=MODEL,
        status=200,
        outcome="success",
        error_type=None,
        error=None,
        routing=routing_of(decision(1, 2)),
        served_by=endpoint(1),
        served_address="10.0.0.1:8000",
        attempts=2,
        streamed=True,
        usage=Usage(prompt_tokens=5, completion_tokens=64, cached_tokens=4),
        usage_source="reported",
        duration=4.0,
        time_to_first_token=0.5,
        time_per_output_token=made.time_per_output_token,
        usage_removed=1,
    )


Case = tuple[dict[str, Any], dict[str, Any]]
NOBODY = {"served_by": None, "served_address": None}
CLIENT_LEFT = {"outcome": "aborted", "error_type": "client", "error": "closed-before-end"}
POD_DIED = {"outcome": "aborted", "error_type": "network", "error": "closed-before-end"}
NO_TOKENS = {"usage_source": "none", "usage": Usage()}
NOTHING_SEEN = {"usage_source": "estimated", "usage": Usage(prompt_tokens=25)}
GOOD = {"outcome": "success", "error_type": None, "error": None}


def estimated(completion: int) -> dict[str, Any]:
    return {
        "usage_source": "estimated",
        "usage": Usage(prompt_tokens=25, completion_tokens=completion),
    }


ENDS: dict[str, Case] = {
    "the client left": (
        {"notes": CUT_NOTES, "cut_by": "client", "usage": "", "body_bytes": 12_800},
        {**CLIENT_LEFT, **estimated(128), "status": 200, "served_by": endpoint(1), "streamed": True},
    ),
    "the client left, and what came before the first token was long": (
        {
            "notes": noted(CUT_NOTES, delivered=7400, head=1000),
            "cut_by": "client",
            "usage": "",
            "body_bytes": 13_800,
        },
        {**CLIENT_LEFT, **estimated(128)},
    ),
    "the client left, and no more had gone out": (
        {"notes": CUT_NOTES, "cut_by": "client", "usage": "", "body_bytes": 6400},
        {**CLIENT_LEFT, **estimated(64)},
    ),
    "the client left, and less had gone out": (
        {"notes": CUT_NOTES, "cut_by": "client", "usage": "", "body_bytes": 10},
        {**CLIENT_LEFT, **estimated(64)},
    ),
    "the client left after an engine's usage": (
        {"notes": CUT_NOTES, "cut_by": "client"},
        {**CLIENT_LEFT, "usage_source": "reported"},
    ),
    "the client left before the first token": (
        {"notes": None, "cut_by": "client", "usage": "", "body_bytes": 0},
        {**CLIENT_LEFT, **NOTHING_SEEN, "streamed": True, "time_to_first_token": None, "unread": None},
    ),
    "the pod died": (
        {"notes": CUT_NOTES, "cut_by": "network", "usage": "", "body_bytes": 12_800},
        {**POD_DIED, **estimated(128), "served_by": endpoint(1)},
    ),
    "the client left before there was an answer": (
        {"notes": None, "cut_by": "client", "usage": "", "status": None, "upstream": None, "attempts": 0},
        {**CLIENT_LEFT, **NOTHING_SEEN, **NOBODY, "error": "closed-before-answer", "status": None},
    ),
    "the pod never answered": (
        {"notes": None, "cut_by": "network", "usage": "", "status": None},
        {**POD_DIED, **NOTHING_SEEN, **NOBODY, "error": "closed-before-answer", "attempts": 1},
    ),
    "cut off, but the script saw its end": (
        {"cut_by": "client"},
        {**GOOD, "usage_source": "reported"},
    ),
    "cut off while an error was on its way": (
        {"notes": CUT_NOTES, "cut_by": "client", "usage": "", "error": '{"error":{"code":503}}'},
        {**CLIENT_LEFT, **estimated(64)},
    ),
}


def envoys(status: int, details: str) -> dict[str, Any]:
    return {"notes": None, "usage": "", "status": status, "local_reply": details}


ENVOYS_OWN: dict[str, Case] = {
    "no pod could be reached": (
        envoys(503, "upstream_reset_before_response_started{connection_failure}"),
        {"outcome": "error", "error_type": "network", "error": "upstream_reset_before_response_started"},
    ),
    "the body was too large": (
        envoys(413, "request_payload_too_large"),
        {"outcome": "error", "error_type": "client", "error": "request_payload_too_large"},
    ),
    "it took too long": (
        envoys(504, "response_timeout"),
        {"outcome": "error", "error_type": "model_server", "error": "response_timeout"},
    ),
}
ENGINES: dict[str, Case] = {
    "engine: 404": (
        {"notes": None, "usage": "", "status": 404},
        {"outcome": "error", "error_type": "client", "error": "status-404", **NO_TOKENS},
    ),
    "engine: 429": (
        {"notes": None, "usage": "", "status": 429},
        {"outcome": "error", "error_type": "overload", "error": "status-429", **NO_TOKENS},
    ),
    "engine: 500": (
        {"notes": None, "usage": "", "status": 500},
        {"outcome": "error", "error_type": "model_server", "error": "status-500", **NO_TOKENS},
    ),
    "engine: 500, cut off": (
        {"notes": None, "usage": "", "status": 500, "cut_by": "network"},
        {**POD_DIED, **NO_TOKENS, "status": 500},
    ),
    "engine: 302": ({"notes": None, "usage": "", "status": 302}, {**GOOD, **NO_TOKENS}),
}
ANSWERS: dict[str, Case] = {
    "an error inside": (
        {"usage": "", "error": '{"error":{"message":"busy","code":503}}'},
        {"outcome": "error", "error_type": "overload", "error": "error-in-answer", **estimated(64)},
    ),
    "an error object": (
        {"usage": "", "error": '{"object":"error","message":"no","code":400}'},
        {"outcome": "error", "error_type": "client", "error": "error-in-answer"},
    ),
    "an error too long for metadata": (
        {"error": '{"error":{}}'},
        {"outcome": "error", "error_type": "model_server", "error": "error-in-answer"},
    ),
    "an error whose event had usage of its own": (
        {"error": '{"error":{"code":500},"usage":{"prompt_tokens":1}}'},
        {
            "error": "error-in-answer",
            "usage": Usage(prompt_tokens=5, completion_tokens=64, cached_tokens=4),
        },
    ),
    "no [DONE]": (
        {"notes": noted(done=False), "usage": ""},
        {"outcome": "error", "error_type": "content", "error": "no-done", **estimated(64)},
    ),
    "no [DONE], but an event too large": (
        {"notes": noted(done=False, oversized=1)},
        {**GOOD, "oversized_events": 1, "usage_source": "reported"},
    ),
    "unreadable": (
        {"notes": noted(unreadable=2)},
        {"outcome": "error", "error_type": "content", "error": "unreadable", "unreadable_events": 2},
    ),
    "several tokens in an event": (
        {"notes": noted(text=4000), "usage": ""},
        {**GOOD, **estimated(1000)},
    ),
    "compressed": (
        {"notes": Notes(streamed=True, unread="compressed"), "usage": ""},
        {**GOOD, **NOTHING_SEEN, "unread": "compressed", "streamed": True},
    ),
    "of another type": (
        {"notes": Notes(unread="content-type"), "usage": ""},
        {**GOOD, **NOTHING_SEEN, "unread": "content-type", "streamed": False},
    ),
    "of another type, the client left": (
        {"notes": Notes(unread="content-type"), "usage": "", "cut_by": "client"},
        {**CLIENT_LEFT, **NOTHING_SEEN, "unread": "content-type"},
    ),
    "without a body, and so without a type": (
        {"notes": Notes(unread="content-type"), "usage": "", "body_bytes": 0, "status": 204},
        {**GOOD, **NOTHING_SEEN, "unread": None},
    ),
    "JSON": (
        {"notes": Notes(ended=True, done=True)},
        {**GOOD, "streamed": False, "usage_source": "reported", "time_to_first_token": None},
    ),
    "JSON too large": (
        {"notes": Notes(ended=True, oversized=1), "usage": ""},
        {**GOOD, **NOTHING_SEEN, "oversized_events": 1},
    ),
    "JSON that is none": (
        {"notes": Notes(ended=True, unreadable=1), "usage": ""},
        {"outcome": "error", "error_type": "content", "error": "unreadable", "unreadable_events": 1},
    ),
    "JSON without usage": (
        {"notes": Notes(ended=True, done=True, tokens=1, text=400), "usage": ""},
        {**GOOD, **estimated(100)},
    ),
    "not to be read": (
        {"facts": msgspec.structs.replace(FACTS, read=False), "notes": None, "usage": ""},
        {**GOOD, **NO_TOKENS, "streamed": False, "unread": None, "operation": "chat"},
    ),
    "not to be read, the client left": (
        {
            "facts": msgspec.structs.replace(FACTS, read=False),
            "notes": None,
            "usage": "",
            "cut_by": "client",
        },
        {**CLIENT_LEFT, **NO_TOKENS},
    ),
}
SCRIPTS: dict[str, Case] = {
    "it broke": (
        {"notes": noted(failure=True, done=False), "usage": ""},
        {**GOOD, **estimated(64), "unread": "script", "time_to_first_token": 0.5},
    ),
    "it broke behind the usage": (
        {"notes": noted(failure=True, done=False)},
        {**GOOD, "usage_source": "reported", "unread": "script"},
    ),
    "it broke, and the client left": (
        {"notes": noted(CUT_NOTES, failure=True), "usage": "", "cut_by": "client", "body_bytes": 12_800},
        {**CLIENT_LEFT, **estimated(128), "unread": "script"},
    ),
    "it broke before its first note": (
        {"notes": None, "usage": ""},
        {**GOOD, **NOTHING_SEEN, "unread": "script", "streamed": True},
    ),
}
NO_COUNT = {"usage": Usage(), "usage_source": "reported"}
USAGES: dict[str, Case] = {
    "empty": ({"usage": "{}"}, NO_COUNT),
    "of odd members": (
        {"usage": '{"prompt_tokens":"7","completion_tokens":3.0,"prompt_tokens_details":[]}'},
        {"usage": Usage(prompt_tokens=7, completion_tokens=3), "usage_source": "reported"},
    ),
    "of members that are no number": (
        {
            "usage": '{"prompt_tokens":"x","completion_tokens":-1,"prompt_tokens_details":{"cached_tokens":{}}}'
        },
        NO_COUNT,
    ),
    "with more": (
        {"usage": '{"prompt_tokens":1,"x":{"prompt_tokens":9}}'},
        {"usage": Usage(prompt_tokens=1)},
    ),
    "with what is no number in JSON": (
        {"usage": '{"prompt_tokens":2,"x":NaN}'},
        {"usage": Usage(prompt_tokens=2)},
    ),
    "that is no JSON after all": (
        {"usage": '{"prompt_tokens":}'},
        {"error": "unreadable", "usage_source": "estimated"},
    ),
    "in two halves": (
        {"usage": '[{"input_tokens":5,"output_tokens":1},{"output_tokens":64}]'},
        {"usage": Usage(prompt_tokens=5, completion_tokens=64), "usage_source": "reported"},
    ),
    "of which the second overrules the first": (
        {
            "usage": '[{"input_tokens":5},{"input_tokens":3,"cache_read_input_tokens":4,'
            '"cache_creation_input_tokens":0}]'
        },
        {"usage": Usage(prompt_tokens=7, cached_tokens=4), "usage_source": "reported"},
    ),
    "of which only the first half came": (
        {"usage": '[{"input_tokens":5,"output_tokens":1}]'},
        {
            **GOOD,
            "usage_source": "estimated",
            "usage": Usage(prompt_tokens=5, completion_tokens=64),
        },
    ),
    "in halves that are no JSON after all": (
        {"usage": '[{"input_tokens":},{}]'},
        {"error": "unreadable", "usage_source": "estimated"},
    ),
    "of a transcription told in seconds": (
        {"usage": '{"type":"duration","seconds":3}'},
        {**GOOD, **estimated(64)},
    ),
}
TIMES: dict[str, Case] = {
    "of a stream": ({}, {"time_to_first_token": 0.5, "time_per_output_token": pytest.approx(0.05)}),
    "of one token": (
        {"notes": noted(tokens=1), "usage": '{"completion_tokens":1}'},
        {"time_to_first_token": 0.5, "time_per_output_token": None},
    ),
    "of none": (
        {"notes": noted(first=None, last=None, tokens=0)},
        {"time_to_first_token": None, "time_per_output_token": None},
    ),
    "of tokens within one millisecond, the last noted in whole ones": (
        {"notes": noted(last=1e6 * (STARTED + 0.499))},
        {"time_to_first_token": 0.5, "time_per_output_token": 0.0},
    ),
    "of a clock that was put back": (
        {"notes": noted(first=1e6 * (STARTED - 60), last=1e6 * (STARTED - 59))},
        {"time_to_first_token": 0.0, "time_per_output_token": 0.0, "duration": 4.0},
    ),
}
CASES = {
    f"{kind}: {name}": case
    for kind, table in (
        ("end", ENDS),
        (
            "local",
            {name: (given, {**said, **NOBODY, **NO_TOKENS}) for name, (given, said) in ENVOYS_OWN.items()},
        ),
        ("status", ENGINES),
        ("answer", ANSWERS),
        ("script", SCRIPTS),
        ("usage", USAGES),
        ("times", TIMES),
    )
    for name, case in table.items()
}


@pytest.mark.parametrize("name", CASES)
def test_what_an_entry_says(name: str) -> None:
    given, said = CASES[name]
    made = report(**given)
    assert {field: getattr(made, field) for field in said} == said
    assert (made.outcome in ("success", "drained")) is (made.error_type is None)


@pytest.mark.parametrize("upstream", ["10.9.9.9:8000", "[::1]:8000"])
def test_a_pod_that_discovery_does_not_know(upstream: str) -> None:
    made = report(upstream=upstream)
    assert (made.served_by, made.served_address, made.outcome) == (None, upstream, "success")


@pytest.mark.parametrize(
    "facts",
    ["{", "[]", "{}", '{"request_id":"x"}', '{"request_id":1,"path":"","routing":{}}', '"x"', "x"],
)
def test_facts_of_another_version(facts: str) -> None:
    with pytest.raises(Malformed):
        native.report(Entry(facts=facts), ENDPOINTS.get)


@pytest.mark.parametrize("notes", ["{", '{"tokens":"x"}', "[]"])
def test_notes_of_another_version(notes: str) -> None:
    entry = msgspec.structs.replace(SUCCESS, facts=text_of(FACTS), notes=notes)
    with pytest.raises(Malformed):
        native.report(entry, ENDPOINTS.get)


def test_members_of_a_later_version_are_passed_over() -> None:
    facts = text_of(FACTS)[:-1] + ',"later":{"x":1}}'
    notes = text_of(NOTES)[:-1] + ',"later":7}'
    entry = msgspec.structs.replace(SUCCESS, facts=facts, notes=notes)
    assert native.report(entry, ENDPOINTS.get) == report()


@pytest.mark.parametrize(
    ("path", "changes", "said"),
    [
        ("/v1/chat/completions?x=1", {"cut_by": "client"}, ("chat", "aborted", "closed-before-answer")),
        (
            "/v1/embeddings",
            {"status": 408, "local_reply": "request_overall_timeout"},
            ("embeddings", "error", "request_overall_timeout"),
        ),
        (
            "/v1/models",
            {"status": 413, "local_reply": "request_payload_too_large"},
            (None, "error", "request_payload_too_large"),
        ),
        ("", {"cut_by": "client"}, (None, "aborted", "closed-before-answer")),
    ],
)
def test_a_request_that_ended_before_it_was_routed(
    path: str, changes: dict[str, Any], said: tuple[str | None, str, str]
) -> None:
    made = native.report(Entry(facts="", request_id="id-1", path=path, **changes), ENDPOINTS.get)
    assert (made.operation, made.outcome, made.error) == said
    assert (made.request_id, made.path, made.error_type) == ("id-1", path.partition("?")[0], "client")
    assert (made.model, made.routing, made.served_by, made.usage_source) == (None, None, None, "none")


# -- the same as in the stream lane --------------------------------------------------------------------------------

ASKED_FOR = b'{"model":"llama-3-8b","stream":true,"stream_options":{"include_usage":true},"messages":[]}'
NOT_ASKED_FOR = b'{"model":"llama-3-8b","stream":true,"messages":[{"role":"user","content":"hello"}]}'
PLAIN = b'{"model":"llama-3-8b","messages":[]}'
TIMED = ("duration", "time_to_first_token", "time_per_output_token")


@pytest.fixture(scope="module")
def script() -> Script:
    return Script()


def in_the_stream_lane(
    body: bytes, pieces: list[bytes], *, whole: bool, **request: str
) -> tuple[Report, bytes]:
    book = Playbook()
    book.until_routed(body, 1, 2, **request)
    content_type = "text/event-stream" if b'"stream":true' in body else "application/json"
    reply(book.answer(content_type=content_type, end=not pieces))
    shown = b"".join(book.data(piece) for piece in pieces)
    if whole and pieces:
        shown += book.data(b"", end=True)
    return book.closed(), shown


def in_the_native_lane(
    script: Script, body: bytes, pieces: list[bytes], *, whole: bool, **request: str
) -> tuple[Report, bytes]:
    book = Playbook(native=True)
    left = handover(book.until_routed(body, 1, 2, **request))
    told = play(script, left, pieces, whole=whole, streamed=b'"stream":true' in body)
    book.released()
    return native.report(entry_of(left, told, whole=whole), ENDPOINTS.get), told.body


def play(script: Script, left: Handover, pieces: list[bytes], *, whole: bool, streamed: bool) -> Told:
    asked = {
        "native": 1,
        "id": "id-1",
        "policy": left.policy,
        "pods": "\n".join(f"{address} {name}" for address, name in left.pods),
        "read": left.read,
        "hide": left.hide,
        "limit": left.max_event_bytes,
    }
    return script.respond(pieces, headers=STREAM if streamed else JSON, ended=whole, asked=asked)


def entry_of(left: Handover, told: Told, *, whole: bool) -> Entry:
    return Entry(
        facts=left.facts.decode(),
        started=1.0,
        duration=9.0,
        status=200,
        cut_by=None if whole else "network",
        upstream="10.0.0.1:8000",
        attempts=1,
        body_bytes=len(told.body),
        notes="" if told.answer is None else text_of(told.answer),
        usage="" if told.usage is None else text_of(told.usage),
        error="" if told.error is None else text_of(told.error),
    )


def timeless(made: Report) -> Report:
    return msgspec.structs.replace(made, **dict.fromkeys(TIMED))


def agree(script: Script, body: bytes, pieces: list[bytes], *, whole: bool = True, **request: str) -> Report:
    stream, shown = in_the_stream_lane(body, pieces, whole=whole, **request)
    made, delivered = in_the_native_lane(script, body, pieces, whole=whole, **request)
    assert delivered == shown
    assert timeless(made) == timeless(stream)
    for name in TIMED:  # whether there is one; how long it was is another clock's
        assert (getattr(made, name) is None) is (getattr(stream, name) is None)
    return made


@pytest.mark.parametrize("name", captures.STREAMS)
@pytest.mark.parametrize("body", [NOT_ASKED_FOR, ASKED_FOR])
@pytest.mark.parametrize("pieces", ["whole", "events", "halves"])
def test_both_lanes_say_the_same_of_a_stream(script: Script, name: str, body: bytes, pieces: str) -> None:
    text = captures.body(name)
    cut = {
        "whole": [text],
        "events": captures.events(name),
        "halves": [text[: len(text) // 2], text[len(text) // 2 :]],
    }[pieces]
    made = agree(script, body, cut)
    assert made.outcome == "success"
    assert made.usage.completion_tokens > 1


ODD: dict[str, bytes] = {
    "no tokens": sse("[DONE]"),
    "nothing": b"",
    "no [DONE]": sse(token("a"), usage(3, 1)),
    "an error": sse(token("a"), {"error": {"message": "busy", "code": 503}}, "[DONE]"),
    "an error as a sentence": sse({"error": "boom"}),
    "an error beside usage": sse({"error": {"code": 500}, "choices": [], "usage": {"prompt_tokens": 1}}),
    "usage behind an error": sse(
        {"error": {"code": 400}, "usage": {"prompt_tokens": 1}}, usage(8, 9), "[DONE]"
    ),
    "usage in every event": sse(
        *(token("a") | {"usage": {"prompt_tokens": 5, "completion_tokens": each}} for each in (1, 2, 3)),
        "[DONE]",
    ),
    "empty usage": sse(token("a"), {"choices": [], "usage": {}}, "[DONE]"),
    "odd usage": sse(
        token("a"), {"choices": [], "usage": {"prompt_tokens": "7", "completion_tokens": -3}}, "[DONE]"
    ),
    "nonsense": sse(token("a"), "{", "[DONE]"),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("body", [NOT_ASKED_FOR, ASKED_FOR])
def test_both_lanes_say_the_same_of_an_odd_stream(script: Script, name: str, body: bytes) -> None:
    pieces = [piece for piece in ODD[name].splitlines(keepends=True) if piece]
    agree(script, body, pieces)


@pytest.mark.parametrize("name", formats.STREAMS)
def test_both_lanes_say_the_same_of_a_stream_of_any_format(script: Script, name: str) -> None:
    answer = formats.STREAMS[name]
    made = agree(script, ASKED_FOR, list(answer.events))
    assert made.usage_source == ("estimated" if answer.usage is None else "reported")
    assert made.outcome == ("success" if answer.done and answer.error is None else "error")
    assert answer.usage in (None, made.usage)
    if answer.usage is None:
        by_length = answer.text // 4
        shared = by_length > 2 * answer.tokens  # several tokens to an event
        assert made.usage.completion_tokens == (by_length if shared else answer.tokens)


@pytest.mark.parametrize("name", formats.DOCUMENTS)
def test_both_lanes_say_the_same_of_a_document_of_any_format(script: Script, name: str) -> None:
    answer = formats.DOCUMENTS[name]
    made = agree(script, PLAIN, [answer.body])
    assert made.outcome == ("success" if answer.error is None else "error")
    assert answer.usage in (None, made.usage)


def test_both_lanes_say_the_same_of_a_message_cut_off_between_its_halves(script: Script) -> None:
    answer = formats.STREAMS["messages: Anthropic: the start tells the prompt, the end the rest"]
    for count in (1, 2, 3, 5):
        stream, _ = in_the_stream_lane(NOT_ASKED_FOR, list(answer.events[:count]), whole=False)
        made, _ = in_the_native_lane(script, NOT_ASKED_FOR, list(answer.events[:count]), whole=False)
        assert timeless(made) == timeless(stream)
        assert (made.usage_source, made.usage.completion_tokens) == ("estimated", max(0, count - 2))


@pytest.mark.parametrize("name", captures.STREAMS)
def test_both_lanes_say_much_the_same_of_a_stream_cut_off(script: Script, name: str) -> None:
    pieces = captures.events(name)[:-3]
    stream, shown = in_the_stream_lane(NOT_ASKED_FOR, pieces, whole=False)
    made, delivered = in_the_native_lane(script, NOT_ASKED_FOR, pieces, whole=False)
    assert delivered == shown
    assert (made.outcome, made.error_type) == ("aborted", "network")
    counted = stream.usage.completion_tokens
    assert made.usage.completion_tokens == pytest.approx(counted, rel=0.2)
    assert timeless(msgspec.structs.replace(made, usage=stream.usage)) == timeless(stream)


@pytest.mark.parametrize("said", [b'{"error":{"message":"\xff","code":429}}', b'{"error":"\xc3","code":429}'])
def test_an_engines_words_that_are_no_text_reach_the_log_as_ascii(script: Script, said: bytes) -> None:
    left = handover(Playbook(native=True).until_routed(NOT_ASKED_FOR))
    pieces = [b"data: " + said + b"\n\n", sse("[DONE]")]
    told = play(script, left, pieces, whole=True, streamed=True)
    assert told.body == b"".join(pieces)
    assert text_of(told.error).isascii()
    assert native.report(entry_of(left, told, whole=True), ENDPOINTS.get).error == "error-in-answer"


@pytest.mark.parametrize("name", ["chat", "completions", "chat_logprobs", "e_embeddings"])
def test_both_lanes_say_the_same_of_json(script: Script, name: str) -> None:
    text = captures.body(name)
    made = agree(script, PLAIN, [text[:100], text[100:]])
    assert (made.outcome, made.streamed, made.usage_source) == ("success", False, "reported")


def test_both_lanes_say_the_same_of_a_client_that_leaves_before_the_answer() -> None:
    stream, book = Playbook(), Playbook(native=True)
    stream.until_routed(NOT_ASKED_FOR)
    left = handover(book.until_routed(NOT_ASKED_FOR))
    entry = Entry(facts=left.facts.decode(), duration=1.0, cut_by="client")
    assert timeless(native.report(entry, ENDPOINTS.get)) == timeless(stream.closed())


@pytest.mark.parametrize(
    ("request_id", "told"),
    [("id\udcff", "id?"), ("é\n", "é\n"), ("\U0001f600", "\U0001f600"), ("x" * 600, "x" * 512)],
)
def test_an_id_that_metadata_cannot_carry(request_id: str, told: str) -> None:
    def lookup(address: str) -> Endpoint | None:
        return ENDPOINTS.get(address)

    left = handover(Playbook(native=True).until_routed(PLAIN, 1, x_request_id=request_id))
    made = native.report(Entry(facts=left.facts.decode(), status=200, cut_by="client"), lookup)
    assert made.request_id == told
