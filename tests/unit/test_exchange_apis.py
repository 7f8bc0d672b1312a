"""The exchange on every path of the API: what is read, what is asked for, what the report says of it."""

from __future__ import annotations

import json

import msgspec
import pytest

from envoy_extproc.exchange.commands import BodyMode, ListModels, Phase, Respond, Schedule
from envoy_extproc.exchange.events import Listed
from envoy_extproc.exchange.exchange import ExchangeSettings, State
from envoy_extproc.exchange.native import Facts
from envoy_extproc.openai import routes
from envoy_extproc.openai.answer import Usage
from envoy_extproc.scheduling.interfaces import SchedulingRequest
from tests.support.builders import MODEL
from tests.support.playbook import Playbook, reply

FORM = "multipart/form-data; boundary=b"
ROUTE = {route.path: route for route in routes.ROUTES}


def body_to(route: routes.Route, **members: object) -> tuple[bytes, str]:
    """A body that names the model, and its content type."""
    values = {"model": MODEL, **members}
    if route.body is routes.Body.FORM:
        parts = "".join(
            f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
            for name, value in values.items()
        )
        return f"{parts}--b--\r\n".encode(), FORM
    return json.dumps(values).encode(), "application/json"


def ask(book: Playbook, route: routes.Route, **members: object) -> SchedulingRequest:
    body, content_type = body_to(route, **members)
    book.request(route.path, content_type=content_type)
    (command,) = book.body(body)
    assert isinstance(command, Schedule)
    return command.request


@pytest.mark.parametrize("route", routes.ROUTES, ids=lambda route: route.path)
def test_every_path_is_routed_by_its_model(route: routes.Route) -> None:
    book = Playbook()
    assert ask(book, route).model == MODEL
    routed = book.scheduled()
    assert routed.body is None
    headers = dict(routed.set_headers)
    assert headers["model"] == MODEL
    read = route.accounting is not routes.Accounting.NOTHING
    assert ("accept-encoding" in headers) is read
    answered = reply(book.answer(content_type="application/json"))
    assert answered.response_body is (BodyMode.STREAMED if read else None)
    if read:
        book.data(b'{"usage":{"prompt_tokens":5}}', end=True)
    report = book.closed()
    assert (report.operation, report.model, report.outcome) == (route.operation, MODEL, "success")
    assert (report.usage_source, report.usage.prompt_tokens) == (("reported", 5) if read else ("none", 0))


@pytest.mark.parametrize("route", routes.ROUTES, ids=lambda route: route.path)
def test_every_path_is_handed_over(route: routes.Route) -> None:
    book = Playbook(native=True)
    ask(book, route)
    routed = book.scheduled()
    assert routed.handover is not None
    told = msgspec.json.decode(routed.handover.facts, type=Facts)
    read = route.accounting is not routes.Accounting.NOTHING
    assert (told.operation, told.read, told.opaque) == (route.operation, read, route.opaque)
    assert (routed.handover.read, routed.handover.hide) == (read, False)


@pytest.mark.parametrize(
    "route", [route for route in routes.ROUTES if route.streams], ids=lambda route: route.path
)
def test_who_is_asked_for_usage_in_streams(route: routes.Route) -> None:
    book = Playbook(native=True)
    ask(book, route, stream=True)
    routed = book.scheduled()
    asked = route.accounting is routes.Accounting.ASKED
    assert (routed.body is not None) is asked
    assert routed.handover is not None
    assert routed.handover.hide is asked
    assert msgspec.json.decode(routed.handover.facts, type=Facts).stream


@pytest.mark.parametrize(
    "route", [each for each in routes.ROUTES if not each.needs_model], ids=lambda r: r.path
)
def test_without_a_model_what_the_header_says_counts(route: routes.Route) -> None:
    for header, model in (("", None), ("other", "other")):
        book = Playbook()
        book.request(route.path, x_model=header)
        (command,) = book.body(b"{}")
        assert isinstance(command, Schedule)
        assert command.request.model == model


def test_what_choosing_is_told_of_the_request() -> None:
    asked = ask(Playbook(), ROUTE["/v1/messages"], messages="x" * 398, max_tokens=7)
    assert (asked.prompt_tokens, asked.max_output_tokens) == (100, 7)


@pytest.mark.parametrize(
    "route", [route for route in routes.ROUTES if route.opaque], ids=lambda route: route.path
)
def test_an_opaque_answer_is_none_to_be_wondered_at(route: routes.Route) -> None:
    book = Playbook()
    ask(book, route)
    book.scheduled()
    assert reply(book.answer(content_type="audio/mpeg")).response_body is BodyMode.NONE
    report = book.closed()
    assert (report.outcome, report.unread, report.usage_source) == ("success", None, "estimated")


def test_accounting_switched_off_reads_nothing() -> None:
    book = Playbook(ExchangeSettings(accounting=False))
    ask(book, ROUTE["/v1/responses"], stream=True)
    assert "accept-encoding" not in dict(book.scheduled().set_headers)
    assert reply(book.answer()).response_body is None
    assert book.closed().usage == Usage()


# -- the list of models --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(("path", "name"), [("/v1/models", ""), ("/x/v1/models/a%2Fb?y", "a/b")])
def test_models_are_listed_here(path: str, name: str, native: bool) -> None:
    book = Playbook(native=native)
    assert book.request(path, end=True) == (ListModels(name),)
    (answer,) = book.receive(Listed(book.now(), b'{"object":"list"}'))
    assert isinstance(answer, Respond)
    assert (answer.status, answer.body) == (200, b'{"object":"list"}')
    assert dict(answer.headers) == {
        "content-type": "application/json",
        "x-request-id": "id-1",
        "request-id": "id-1",
    }
    assert book.state is State.ANSWERED
    report = book.closed()
    assert (report.outcome, report.status, report.routing) == ("success", 200, None)
    assert (report.usage_source, report.attempts) == ("none", 0)


def test_a_model_nobody_serves_is_not_found() -> None:
    book = Playbook()
    book.request("/v1/models/x", end=True)
    (answer,) = book.receive(Listed(book.now(), None))
    assert isinstance(answer, Respond)
    assert answer.status == 404
    assert json.loads(answer.body)["error"]["code"] == "model_not_found"
    assert book.closed().outcome == "refused"


@pytest.mark.parametrize("method", ["POST", "HEAD", "DELETE"])
def test_other_methods_pass_to_a_pod(method: str) -> None:
    (command,) = Playbook().request("/v1/models", end=True, method=method)
    assert isinstance(command, Schedule)


def test_a_get_with_a_body_passes_to_a_pod() -> None:
    book = Playbook()
    (command,) = book.request("/v1/models", method="GET")
    assert isinstance(command, Schedule)
    assert book.scheduled().phase is Phase.REQUEST_HEADERS
