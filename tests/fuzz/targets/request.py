"""The request decoder, over every route: it reads what the engine would read, and rewrites nothing else.

The engines' own reading is the oracle: FastAPI hands the body to Python's `json.loads`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec

from envoy_extproc.errors import BadRequest
from envoy_extproc.openai import request
from envoy_extproc.openai.request import InferenceRequest
from envoy_extproc.openai.routes import ROUTES, Body, Route
from tests.fuzz.draw import Draw, bounded, seed

CHOICES = 2
TYPES = ("application/json", "", 'multipart/form-data; boundary="x"', "multipart/form-data")
WORDS = [
    b'"model"', b'"stream"', b"true", b"false", b"null", b'"stream_options"', b'{"include_usage":true}', b'"include_usage"',
    b'"continuous_usage_stats"', b'"messages"', b'"prompt"', b'"max_tokens"', b'"mod\\u0065l"', b"NaN", b"1e400", b'"\\ud800"',
    b'"a":', b"{}", b"[]", b",", b" ", b"\n", b"\\", b'"', b"\xef\xbb\xbf", b";base64,", b"-1", b"0", b'"off"', b"1.0",
]  # fmt: skip


class _Raw(msgspec.Struct):
    stream_options: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


def check(data: bytes) -> None:
    """Decodes or refuses; and what it decodes can be asked for usage."""
    draw = Draw(data)
    route, content_type, body = draw.choose(ROUTES), draw.choose(TYPES), draw.text()
    is_form = route.body is Body.FORM and "boundary" in content_type
    theirs = None if is_form else _as_engines_read(body)
    try:
        with bounded():
            decoded = request.decode(body, route, content_type)
    except BadRequest:
        assert theirs is None or not _is_well_named(theirs, route), "an engine would have taken this"
        return
    assert decoded.model is None or decoded.model, "a model without a name"
    assert decoded.prompt_tokens_estimate >= 0
    if theirs is not None:
        _check_as_engines_read(decoded, theirs, route)
    if decoded.add_usage:
        _check_asking(body, decoded, route, theirs)


def _as_engines_read(body: bytes) -> dict[str, Any] | None:
    try:
        body.decode()
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _is_well_named(theirs: dict[str, Any], route: Route) -> bool:
    model = theirs.get("model")
    return (isinstance(model, str) and model != "") or (model is None and not route.needs_model)


def _check_as_engines_read(decoded: InferenceRequest, theirs: dict[str, Any], route: Route) -> None:
    model = theirs.get("model")
    if isinstance(model, str):  # a lone surrogate names no model
        model = model.encode("utf-8", "replace").decode()
    assert decoded.model == model, f"read {decoded.model!r}, an engine reads {model!r}"
    assert decoded.stream == (theirs.get("stream") is True and route.streams)
    assert decoded.stream_options == ("stream_options" in theirs)


def _check_asking(
    body: bytes, decoded: InferenceRequest, route: Route, theirs: dict[str, Any] | None
) -> None:
    with bounded():
        asked = request.ask_for_usage(body, decoded)
    again = request.decode(asked, route)
    assert not again.add_usage, "asked, and still to be asked"
    _check_bytes(body, asked)
    if theirs is not None:
        _check_options(theirs, json.loads(asked))


def _check_options(before: dict[str, Any], after: dict[str, Any]) -> None:
    said = before.pop("stream_options", None) or {}
    asked = after.pop("stream_options")
    assert asked["include_usage"] is True
    assert asked.keys() == said.keys() | {"include_usage"}
    assert asked.get("continuous_usage_stats", False) is False
    assert _written(before) == _written(after)
    for name in asked.keys() - {"include_usage", "continuous_usage_stats"}:
        assert _written(asked[name]) == _written(said[name])


def _written(value: object) -> str:
    """Comparable where NaN is not."""
    return json.dumps(value)


def _check_bytes(body: bytes, asked: bytes) -> None:
    try:
        before, after = _raw_options(body), _raw_options(asked)
    except (
        msgspec.DecodeError
    ):  # what only Python's decoder reads, such as NaN: where the options stand is not known
        return
    assert after is not None
    if before is not None:
        assert _is_replaced(body, asked, before, after), "more than the options changed"
    else:
        assert _is_inserted(body, asked, b'"stream_options":' + after), "more than the options came"


def _raw_options(body: bytes) -> bytes | None:
    raw = msgspec.json.decode(body, type=_Raw).stream_options
    return None if raw is msgspec.UNSET else bytes(raw)


def _is_replaced(old: bytes, new: bytes, before: bytes, after: bytes) -> bool:
    """Whether `new` is `old` with one `before` replaced by `after`."""
    place = old.find(before)
    while place >= 0:
        if new == old[:place] + after + old[place + len(before) :]:
            return True
        place = old.find(before, place + 1)
    return False


def _is_inserted(old: bytes, new: bytes, member: bytes) -> bool:
    """Whether `new` is `old` with `member` before its last brace, and a comma where one belongs."""
    brace = old.rindex(b"}")
    return new in (old[:brace] + b"," + member + old[brace:], old[:brace] + member + old[brace:])


def seeds() -> Iterator[bytes]:
    """Bodies of all kinds, over the routes."""
    bodies = [
        b'{"model":"m","messages":[{"role":"user","content":"hello"}],"stream":true}',
        b'{"model":"m","prompt":[1,2,3],"stream":true,"stream_options":null}',
        b'{ "model" : "m" , "stream" : true , "stream_options" : { "include_usage" : false } }\n',
        b'{"model":"m","stream":true,"stream_options":{"continuous_usage_stats":true,"include_usage":0}}',
        b'{"model":"a","model":"b","stream":true,"stream_options":{"include_usage":true},"stream_options":null}',
        b'{"mod\\u0065l":"b","str\\u0065am":true,"stream_option\\u0073":null}',
        b'{"model":"m","x":NaN,"y":-Infinity,"stream":true}',
        b'{"model":"m","x":"\\ud800","stream":true}',
        b'\xef\xbb\xbf{"model":"m","stream":true}',
        b'{"model":"m","max_tokens":7,"input":[{"image":"data:image/png;base64,AAAA"}]}',
    ]
    for number in range(len(ROUTES)):
        for body in bodies if number < 2 else bodies[:1]:
            yield seed(number, 0, text=body)
    form = b'--x\r\ncontent-disposition: form-data; name="model"\r\n\r\nm\r\n--x--'
    forms = [number for number, route in enumerate(ROUTES) if route.body is Body.FORM]
    yield from (seed(number, 2, text=form) for number in forms)
