"""The verdict on an exchange from what was noted of it: the early ends, where the lanes know different things."""

from __future__ import annotations

from typing import Any

import pytest

from envoy_extproc.exchange.events import StreamClosed
from envoy_extproc.exchange.record import Record
from envoy_extproc.openai.answer import EngineError, Seen

DIED = EngineError(message="EngineCore died", code=500)


def seen(*, done: bool = False, error: EngineError | None = None) -> Seen:
    made = Seen()
    made.done, made.error = done, error
    return made


def verdict(*, draining: bool = False, **noted: Any) -> tuple[str, str | None, str | None]:
    """Outcome, fault and word of an exchange whose answer had not come to its end."""
    record = Record(accounting=True)
    for name, value in {"status": 200, **noted}.items():
        setattr(record, name, value)
    report = record.report(StreamClosed(1.0, draining=draining))
    return report.outcome, report.error_type, report.error


@pytest.mark.parametrize("cut_by", [None, "client", "network", "model_server", "internal"])
def test_a_stream_that_had_its_done_is_whole_whoever_closed_it(cut_by: str | None) -> None:
    assert verdict(seen=seen(done=True), cut_by=cut_by) == ("success", None, None)
    assert verdict(seen=seen(done=True, error=DIED), cut_by=cut_by)[0] == "error"


@pytest.mark.parametrize("cut_by", ["client", "network"])
def test_but_not_where_the_script_broke_and_nobody_knows(cut_by: str) -> None:
    told = verdict(seen=seen(done=True), cut_by=cut_by, unread="script")
    assert told == ("aborted", cut_by, "closed-before-end")


@pytest.mark.parametrize("cut_by", [None, "network", "model_server"])
def test_an_engine_that_tells_of_its_error_and_breaks_off_is_judged_by_what_it_told(
    cut_by: str | None,
) -> None:
    assert verdict(seen=seen(error=DIED), cut_by=cut_by) == ("error", "model_server", "error-in-answer")


def test_a_client_that_leaves_over_an_error_has_left() -> None:
    assert verdict(seen=seen(error=DIED), cut_by="client") == ("aborted", "client", "closed-before-end")


@pytest.mark.parametrize("fault", ["client", "network", "model_server", "internal"])
def test_who_cut_it_off_is_told_where_it_is_known(fault: str) -> None:
    assert verdict(seen=seen(), cut_by=fault) == ("aborted", fault, "closed-before-end")
    assert verdict(seen=seen(), cut_by=fault, status=None) == ("aborted", fault, "closed-before-answer")


@pytest.mark.parametrize(
    ("length", "received", "whole"), [(None, 10, False), (10, 9, False), (10, 10, True), (0, 0, True)]
)
def test_an_answer_with_a_length_is_whole_when_so_much_has_come(
    length: int | None, received: int, whole: bool
) -> None:
    record = Record(accounting=True)
    assert not record.whole
    record.length, record.received = length, received
    assert record.whole is whole


def test_who_cut_it_off_is_guessed_where_it_is_not() -> None:
    assert verdict(seen=seen()) == ("aborted", "network", "closed-before-end")
    assert verdict(status=None) == ("aborted", "client", "closed-before-answer")
    assert verdict(seen=seen(), draining=True) == ("drained", None, None)
    assert verdict(status=None, draining=True) == ("drained", None, None)


@pytest.mark.parametrize(
    ("status", "details", "expected"),
    [
        (504, "response_timeout", ("error", "model_server", "response_timeout")),
        (504, "stream_idle_timeout", ("error", "model_server", "stream_idle_timeout")),
        (408, "stream_idle_timeout", ("error", "client", "stream_idle_timeout")),
        (503, "ext_proc_error_gRPC_error_14{x}", ("error", "internal", "ext_proc_error_gRPC_error_14")),
        (429, "request_rate_limited", ("error", "limit", "request_rate_limited")),
        (418, "", ("error", "client", "envoy-418")),
    ],
)
def test_what_envoy_answers_itself_is_judged_by_its_word(
    status: int, details: str, expected: tuple[str, str, str]
) -> None:
    assert verdict(status=status, local_reply=details, answer_ended=True) == expected
