"""Request bodies: what is read of them, and the one edit there is, which leaves every other byte alone."""

from __future__ import annotations

import json
import tracemalloc
from contextlib import nullcontext, suppress
from typing import Any

import msgspec
import pydantic
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from envoy_extproc.errors import BadRequest
from envoy_extproc.openai import request as openai_request
from envoy_extproc.openai import routes
from envoy_extproc.openai.request import InferenceRequest, ask_for_usage, estimate_tokens

CHAT, COMPLETIONS, EMBEDDINGS = routes.ROUTES[:3]
ROUTE = {route.path: route for route in routes.ROUTES}


def chat(**fields: Any) -> InferenceRequest:
    """What a chat asks for: usage, where it does not say otherwise."""
    return InferenceRequest(**{"add_usage": True, **fields})


def decode(body: bytes, route: routes.Route = CHAT) -> InferenceRequest:
    return openai_request.decode(body, route)


# -- reading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"model":"m"}', chat(model="m")),
        (b'{"model":"m","stream":true}', chat(model="m", stream=True)),
        (b'{"model":"m","stream":false}', chat(model="m")),
        (b'{"model":"m","stream":null}', chat(model="m")),
        (b'{"model":"m","stream":1}', chat(model="m")),
        (b'{"model":"m","stream":"true"}', chat(model="m")),
        (b' \n{ "model" : "m" }\r\n', chat(model="m")),
        (b'{"mod\\u0065l":"\\u006d"}', chat(model="m")),
        ('{"model":"modèle"}'.encode(), chat(model="modèle")),
        # of duplicates the last, as Python's decoder
        (b'{"model":"a","model":"m"}', chat(model="m")),
        (b'{"stream":true,"model":"m","stream":false}', chat(model="m")),
        # look-alikes deeper inside
        (
            b'{"messages":[{"model":"x","stream":true}],"model":"m"}',
            chat(model="m", prompt_tokens_estimate=8),
        ),
        (b'{"model":"m","x":{"stream_options":{"include_usage":true}}}', chat(model="m")),
        # stream_options
        (b'{"model":"m","stream_options":null}', chat(model="m", stream_options=True)),
        (
            b'{"model":"m","stream_options":{}}',
            chat(model="m", stream_options=True, add_usage=False),
        ),
        (
            b'{"model":"m","stream_options":7}',
            chat(model="m", stream_options=True, add_usage=False),
        ),
        (
            b'{"model":"m","stream_options":{"include_usage":true}}',
            chat(model="m", stream_options=True, add_usage=False),
        ),
        (
            b'{"model":"m","stream_options":{"include_usage":false}}',
            chat(model="m", stream_options=True),
        ),
    ],
)
def test_decode(body: bytes, expected: InferenceRequest) -> None:
    assert decode(body) == expected


@pytest.mark.parametrize(
    "rest",
    [
        b'"x":"\\ud800"',
        b'"x":"\\udc00\\ud800"',
        b'"x":NaN',
        b'"x":[Infinity,-Infinity]',
        b'"x":1e400',
        b'"user":-1e400',
        b'"stop":[1e400]',
        b'"x":' + b"9" * 400,
        b'"messages":[{"content":"\\ud83d"}]',
        b'"x":' + b"[" * 200 + b"]" * 200,
    ],
)
def test_what_python_engines_read_is_not_refused(rest: bytes) -> None:
    body = b'{"model":"m","stream":true,' + rest + b"}"
    json.loads(body)
    read = decode(body)
    assert (read.model, read.stream) == ("m", True)
    assert ask_for_usage(body, read).startswith(body[:-1])


def test_a_byte_order_mark_is_read_as_python_does() -> None:
    body = b'\xef\xbb\xbf{"model":"m","stream":true}'
    assert json.loads(body) == {"model": "m", "stream": True}
    read = decode(body)
    assert read == chat(model="m", stream=True)
    assert json.loads(ask_for_usage(body, read))["stream_options"] == {"include_usage": True}


def test_a_model_that_is_no_text_is_made_one() -> None:
    assert decode(b'{"model":"\\ud800"}').model == "?"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"{}", "model"),
        (b'{"model":null}', "model"),
        (b'{"model":""}', "model"),
        (b'{"model":7}', "model"),
        (b'{"model":["m"]}', "model"),
        (b'{"model":{"model":"m"}}', "model"),
        (b'{"x":{"model":"m"}}', "model"),
        (b'{"model":"m","model":null}', "model"),
        (b"", None),
        (b" ", None),
        (b"[]", None),
        (b'["model"]', None),
        (b"null", None),
        (b'"model"', None),
        (b"7", None),
        (b"model=m", None),
        (b'{"model":"m"', None),
        (b'{"model":"m"}}', None),
        (b'{"model":"m"} {}', None),
        (b"{'model':'m'}", None),
        (b'{"model":"m",}', None),
        (b'{"model":"m","x":"\x01"}', None),
        (b'{"model":"m","x":"\xff"}', None),
        (b'{"model":"\xff"}', None),
        ('{"model":"m"}'.encode("utf-16"), None),
        (b'{"model":"m","messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}", None),
        (b'{"model":"m","stream":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}", None),
        (b'{"model":"m","x":NaN,"y":' + b"[" * 100_000 + b"]" * 100_000 + b"}", None),
        (b'{"model":' + b"[" * 100_000, None),
        (b'{"model":"m","stream":' + b"9" * 5000 + b"}", None),
    ],
)
def test_what_cannot_be_understood_is_refused(body: bytes, param: str | None) -> None:
    with pytest.raises(BadRequest) as refused:
        decode(body)
    assert refused.value.param == param
    assert refused.value.status == 400


@pytest.mark.parametrize("depth", range(100, 1100, 50))
@pytest.mark.parametrize("odd", [b"NaN", b"1"])
def test_nesting_at_the_edge_is_read_or_refused(depth: int, odd: bytes) -> None:
    body = b'{"model":"m","t":' + odd + b',"x":' + b"[" * depth + b"]" * depth + b"}"
    try:
        assert decode(body).model == "m"
    except BadRequest as error:
        assert "nested" in error.message or "malformed" in error.message  # noqa: PT017  both are right


MANY = 3_000_000  # bytes


@pytest.mark.parametrize("where", ["model", "stream", "stream_options", "max_tokens", "cache_salt", "prompt"])
def test_what_would_take_many_times_its_size_is_not_built(where: str) -> None:
    value = b"[" + b",".join([b"[]"] * (MANY // 3)) + b"]"
    body = b'{"model":"m","%s":%s}' % (where.encode(), value)
    expected = chat(model="m", stream_options=where == "stream_options", add_usage=where != "stream_options")
    tracemalloc.start()
    try:
        with suppress(BadRequest) if where == "model" else nullcontext():
            read = decode(body, COMPLETIONS)
            assert msgspec.structs.replace(read, prompt_tokens_estimate=0) == expected
        assert tracemalloc.get_traced_memory()[1] < 6 * MANY  # copies of the text
    finally:
        tracemalloc.stop()


def test_a_long_name_is_a_name() -> None:
    name = "x" * 100_000
    assert decode(b'{"model":"%s"}' % name.encode(), COMPLETIONS).model == name


def test_embeddings_are_no_stream() -> None:
    assert decode(b'{"model":"m","stream":true}', EMBEDDINGS) == InferenceRequest(model="m")


@pytest.mark.parametrize(
    ("route", "member"),
    [(route, name) for route in routes.ROUTES if route.body is not routes.Body.FORM for name in route.prompt],
)
def test_each_member_of_the_prompt_counts(route: routes.Route, member: str) -> None:
    body = b'{"model":"m","' + member.encode() + b'":"' + b"x" * 398 + b'"}'
    assert decode(body, route).prompt_tokens_estimate == 100


@pytest.mark.parametrize("route", routes.ROUTES)
def test_other_members_do_not(route: routes.Route) -> None:
    members = {name for other in routes.ROUTES for name in other.prompt} - set(route.prompt)
    assert decode(
        json.dumps({"model": "m"} | dict.fromkeys(members, "x")).encode(), route
    ) == InferenceRequest(model="m", add_usage=route.accounting is routes.Accounting.ASKED)


def test_a_prompt_in_several_members() -> None:
    body = b'{"model":"m","query":"12","documents":["34","56"]}'
    assert decode(body, ROUTE["/v1/rerank"]).prompt_tokens_estimate == 1 + 3


@pytest.mark.parametrize("route", routes.ROUTES)
@pytest.mark.parametrize("body", [b"{}", b'{"model":null}'])
def test_a_model_is_needed_where_the_api_has_it_so(route: routes.Route, body: bytes) -> None:
    if route.needs_model:
        with pytest.raises(BadRequest, match="must provide a model"):
            decode(body, route)
    else:
        assert decode(body, route).model is None


@pytest.mark.parametrize("model", [b'""', b"7", b"[]", b"{}", b"true"])
@pytest.mark.parametrize("route", routes.ROUTES)
def test_a_model_that_is_no_name(route: routes.Route, model: bytes) -> None:
    with pytest.raises(BadRequest, match="non-empty string"):
        decode(b'{"model":' + model + b"}", route)


@pytest.mark.parametrize(
    ("members", "limit"),
    [
        ("", None),
        (',"max_tokens":5', 5),
        (',"max_completion_tokens":6,"max_tokens":5', 6),
        (',"max_output_tokens":7', 7),
        (',"max_tokens":0', None),
        (',"max_tokens":-1', None),
        (',"max_tokens":true', None),
        (',"max_tokens":"9"', None),
        (',"max_tokens":1.5', None),
        (',"max_tokens":null', None),
    ],
)
def test_the_limit_of_an_answer(members: str, limit: int | None) -> None:
    assert decode(f'{{"model":"m"{members}}}'.encode()).max_output_tokens == limit


def test_who_is_asked_for_usage() -> None:
    asked = {route.path for route in routes.ROUTES if decode(b'{"model":"m","stream":true}', route).add_usage}
    assert asked == {"/v1/chat/completions", "/v1/completions"}


# -- forms ---------------------------------------------------------------------------------------------------------

FORM = 'multipart/form-data; boundary="b"'
TRANSCRIPTION = ROUTE["/v1/audio/transcriptions"]


def form(*parts: tuple[str, bytes], boundary: bytes = b"b") -> bytes:
    lines = b"".join(
        b'--%b\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n' % (boundary, name.encode(), value)
        for name, value in parts
    )
    return lines + b"--" + boundary + b"--\r\n"


def test_a_form() -> None:
    body = form(
        ("file", b"RIFF" + b"\0" * 1000), ("model", b"whisper"), ("stream", b"true"), ("prompt", b"names")
    )
    assert openai_request.decode(body, TRANSCRIPTION, FORM) == InferenceRequest(
        model="whisper", stream=True, prompt_tokens_estimate=2
    )


@pytest.mark.parametrize(("word", "stream"), [("True", True), ("1", True), ("false", False), ("", False)])
def test_booleans_of_a_form(word: str, stream: bool) -> None:
    body = form(("model", b"m"), ("stream", word.encode()))
    assert openai_request.decode(body, TRANSCRIPTION, FORM).stream is stream


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "does not occur"),
        (b'{"model":"m"}', "does not occur"),
        (form(("file", b"x")), "must provide a model"),
        (form(("model", b"")), "non-empty"),
        (form(("model", b"m"))[:-8], "no end"),
    ],
)
def test_forms_that_are_refused(body: bytes, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        openai_request.decode(body, TRANSCRIPTION, FORM)


def test_json_where_a_form_is_usual() -> None:
    """Engines with image edits over JSON; and a form without a boundary, which no engine reads either."""
    edit = ROUTE["/v1/images/edits"]
    assert openai_request.decode(b'{"model":"m"}', edit, "application/json").model == "m"
    with pytest.raises(BadRequest, match="JSON"):
        openai_request.decode(form(("model", b"m")), edit, "multipart/form-data")


@given(st.binary(max_size=60))
def test_any_body_is_read_or_refused(body: bytes) -> None:
    with suppress(BadRequest):
        assert decode(body).model


JSON_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["model", "stream", "stream_options", "include_usage", "x"]), inner)
    ),
    max_leaves=10,
)


@given(JSON_VALUE, st.sampled_from(routes.ROUTES), st.booleans())
def test_any_json_is_read_or_refused_as_python_reads_it(
    value: object, route: routes.Route, ascii_only: bool
) -> None:
    body = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "replace")
    model = value.get("model") if isinstance(value, dict) else None
    try:
        read = decode(body, route)
    except BadRequest:
        assert not (isinstance(model, str) and model)
    else:
        assert read.model == model
        assert model or not route.needs_model


# -- asking for usage ----------------------------------------------------------------------------------------------

ON = '{"include_usage":true}'
BOOLEAN = pydantic.TypeAdapter[bool | None](bool | None)  # what decides in vLLM and in SGLang
VALUES = (
    *(
        "null",
        "false",
        "true",
        "0",
        "1",
        "-0",
        "0.0",
        "-0.0",
        "1.0",
        "2",
        "0.5",
        "1e400",
        "-1e400",
        "NaN",
        "[]",
        "{}",
    ),
    *('""', '"0"', '"off"', '"f"', '"false"', '"n"', '"no"', '"OFF"', '"False"', '"No"', '"N"', '"F"'),
    *('"1"', '"on"', '"t"', '"true"', '"y"', '"yes"', '" no"', '"no "', '"0.0"', '"null"', '"nö"', "[false]"),
)


@pytest.mark.parametrize("value", VALUES)
def test_usage_is_added_where_an_engine_would_leave_it_out(value: str) -> None:
    try:
        declined = not BOOLEAN.validate_python(json.loads(value))
    except pydantic.ValidationError:
        declined = False  # the engine refuses it, which is for the client to see
    body = b'{"model":"m","stream_options":{"include_usage":%b}}' % value.encode()
    assert decode(body).add_usage is declined


@pytest.mark.parametrize(
    ("options", "added"),
    [
        (b"null", True),
        # vLLM takes an object without the member for yes, SGLang for no: each is left to it
        (b"{}", False),
        (b'{"continuous_usage_stats":true}', False),
        (b'{"include_usag":false}', False),
        (b'{"x":{"include_usage":false}}', False),
        (b"7", False),
        (b"[]", False),
        (b"false", False),
        (b'"null"', False),
    ],
)
def test_usage_is_added_for_these_options(options: bytes, added: bool) -> None:
    assert decode(b'{"model":"m","stream_options":' + options + b"}").add_usage is added


def test_usage_is_added_where_there_are_no_options() -> None:
    assert decode(b'{"model":"m"}').add_usage


def asked(text: str) -> str:
    body = text.encode()
    return ask_for_usage(body, decode(body)).decode()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("null", ON),
        ('{"include_usage":false}', ON),
        ('{"include_usage":null}', ON),
        ('{"include_usage" : false }', '{"include_usage" : true }'),
        ('{"include_usage":"No"}', ON),
        ('{"x":1,"include_usage":0}', '{"x":1,"include_usage":true}'),
        ('{"include_usage":true,"include_usage":false}', '{"include_usage":true,"include_usage":true}'),
        ('{"incl\\u0075de_usage":false}', '{"incl\\u0075de_usage":true}'),
        (
            '{"include_usage":false,"continuous_usage_stats":true}',
            '{"include_usage":true,"continuous_usage_stats":false}',
        ),
        (
            '{"include_usage":0,"x":{"include_usage":false}}',
            '{"include_usage":true,"x":{"include_usage":false}}',
        ),
        ('{"x":"}","y":[{}],"include_usage":null}', '{"x":"}","y":[{}],"include_usage":true}'),
    ],
)
@pytest.mark.parametrize("space", ["", " ", "\n\t"])
def test_stream_options(options: str, expected: str, space: str) -> None:
    def body(value: str, *, last: bool) -> str:
        member = f'"stream_options"{space}:{space}{value}{space}'
        return f'{{"model":"m",{member}}}' if last else f'{{{member},{space}"model":"m"}}'

    assert asked(body(options, last=True)) == body(expected, last=True)
    assert asked(body(options, last=False)) == body(expected, last=False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"model":"m","stream":true}', f'{{"model":"m","stream":true,"stream_options":{ON}}}'),
        ('{"model":"m"\n}\n', f'{{"model":"m"\n,"stream_options":{ON}}}\n'),
        # of several the last counts, as in the engine
        (
            '{"stream_options":{"include_usage":false},"model":"m","stream_options":null}',
            f'{{"stream_options":{{"include_usage":false}},"model":"m","stream_options":{ON}}}',
        ),
        (
            '{"messages":[{"stream_options":{"include_usage":false}}],"model":"m"}',
            f'{{"messages":[{{"stream_options":{{"include_usage":false}}}}],"model":"m","stream_options":{ON}}}',
        ),
        (
            '{"messages":[{"content":"\\"stream_options\\":null}"}],"stream_options":null,"model":"m"}',
            f'{{"messages":[{{"content":"\\"stream_options\\":null}}"}}],"stream_options":{ON},"model":"m"}}',
        ),
        ('{"stream_opt\\u0069ons":null,"model":"m"}', f'{{"stream_opt\\u0069ons":{ON},"model":"m"}}'),
    ],
)
def test_ask_for_usage(text: str, expected: str) -> None:
    assert asked(text) == expected


OPTIONS = st.one_of(
    st.none(),
    st.dictionaries(
        st.sampled_from(["include_usage", "continuous_usage_stats", "x"]),
        st.none() | st.booleans() | st.integers(),
    ),
)
MESSAGES = st.lists(
    st.dictionaries(
        st.sampled_from(["role", "content", "stream_options", "usage"]), st.text(max_size=8) | OPTIONS
    ),
    max_size=3,
)


@given(
    messages=MESSAGES,
    options=OPTIONS,
    has_options=st.booleans(),
    first=st.booleans(),
    indent=st.sampled_from([None, 0, 2]),
    escape=st.booleans(),
)
def test_nothing_but_stream_options_changes(
    *,
    messages: object,
    options: dict[str, Any] | None,
    has_options: bool,
    first: bool,
    indent: int | None,
    escape: bool,
) -> None:
    members: dict[str, object] = {"model": "m", "stream": True, "messages": messages, "seed": 2**80}
    if has_options:
        added: dict[str, object] = {"stream_options": options}
        members = added | members if first else members | added
    body = json.dumps(members, indent=indent, ensure_ascii=escape).encode("utf-8", "replace")
    read = decode(body)
    assume(read.add_usage)
    result = ask_for_usage(body, read)

    wanted = json.loads(body)
    kept = dict(options or {}) if has_options else {}
    if "continuous_usage_stats" in kept:
        kept["continuous_usage_stats"] = False
    wanted["stream_options"] = kept | {"include_usage": True}
    assert json.loads(result) == wanted

    assert not decode(result).add_usage
    same_start = _common(body, result)
    same_end = _common(body[same_start:][::-1], result[same_start:][::-1])
    changed = body[same_start : len(body) - same_end]
    written = json.dumps(options, indent=indent).encode() if has_options else b""
    assert len(changed) <= len(written)


def _common(one: bytes, other: bytes) -> int:
    """How many bytes both begin with."""
    return next(
        (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )


# -- estimates -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [
        (b"", 0),
        (b'"1234567890"', 3),
        (b'"' + b"x" * 398 + b'"', 100),
        (b"[1,2,3]", 3),
        (b"[1]", 1),
        (b"[[1,2],[3,4]]", 4),
        (b"[ [ 101 , 7592 ] ]", 2),
        (b'["ab","cd"]', 3),
        (b'[{"image_url":{"url":"data:image/png;base64,' + b"A" * 100_000 + b'=="}}]', 10),
    ],
)
def test_estimate_tokens(prompt: bytes, tokens: int) -> None:
    assert estimate_tokens(prompt) == tokens


@given(st.binary(max_size=200))
def test_an_estimate_is_never_negative_nor_more_than_the_bytes(prompt: bytes) -> None:
    assert 0 <= estimate_tokens(prompt) <= len(prompt) + 1
