"""What of a prompt is counted, over every route; what is asked about it; and what an answer tells."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress

from envoy_extproc.errors import BadRequest
from envoy_extproc.openai import request, texts, tokenize
from envoy_extproc.openai.routes import ROUTES, Route
from envoy_extproc.openai.tokenize import Form, Unusable
from tests.fuzz.draw import Draw, bounded, seed

CHOICES = 3
MOST = (10, 1000, 1_000_000)
WORDS = [
    b'"model":"m"', b'"messages"', b'"prompt"', b'"input"', b'"tools"', b'"role"', b'"content"', b'"type":"text"', b'"text"', b'"image_url"',
    b'"count":5', b'"tokens"', b"[1,2]", b"[[1],[2]]", b"[]", b"{}", b"null", b"1e400", b'"\\ud800"', b'"\\u0000"', b",", b" ", b"\xff",
]  # fmt: skip


def check(data: bytes) -> None:
    """Texts and a question, or none; a count, or none."""
    draw = Draw(data)
    route, form, most, text = draw.choose(ROUTES), draw.choose(tuple(Form)), draw.choose(MOST), draw.text()
    with bounded():
        _check_answer(form, text, most)
        _check_question(form, text, route, most)


def _check_answer(form: Form, text: bytes, most: int) -> None:
    with suppress(Unusable):
        assert 0 <= tokenize.count(form, text, most) <= most


def _check_question(form: Form, text: bytes, route: Route, most: int) -> None:
    try:
        decoded, prompt = request.read(text, route)
    except BadRequest:
        return
    found = None if prompt is None else texts.read(prompt, most)
    if prompt is None or found is None:
        return
    assert sum(len(piece.encode()) for piece in found.pieces) <= 3 * most, "more than what was allowed"
    assert found.known >= 0
    question = tokenize.question(form, decoded.model or "", prompt, found)
    if question is None:
        return
    with suppress(RecursionError):  # of the oracle
        asked = json.loads(question.body)
        assert asked.keys() & {"messages", "prompt", "content"}
        assert form is Form.CONTENT or asked["model"] == (decoded.model or "")


def seeds() -> Iterator[bytes]:
    """As clients and engines write it."""
    chat = b'{"model":"m","messages":[{"role":"system","content":"be brief"},{"role":"user","content":[{"type":"text","text":"hi"}]}],"tools":[{}]}'
    image = b'{"model":"m","messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"data:image/png;base64,AAAA"}}]}]}'
    for number in range(3):
        yield seed(0, number, 2, text=chat)
        yield seed(0, number, 1, text=image)
        yield seed(1, number, 2, text=b'{"model":"m","prompt":[1,2,3]}')
        yield seed(2, number, 2, text=b'{"model":"m","input":["a","b"]}')
        yield seed(
            0,
            number,
            1,
            text=b'{"count":5,"max_model_len":2048,"tokens":[320,668,12,281,307],"token_strs":null}',
        )
