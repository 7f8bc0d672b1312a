"""docs/errors.md and what it is about: the rows of the end-to-end test, the words of the code, the metrics there are."""

from __future__ import annotations

from typing import get_args

from envoy_extproc import errors
from envoy_extproc.errors import ErrorType, GatewayError
from envoy_extproc.exchange.report import Outcome
from envoy_extproc.telemetry.prometheus import PrometheusMetrics
from tests.e2e.test_errors import ALLOWED, CASES, COUNTED, LANES
from tests.support.errors_doc import PAGE, Row, Said, rows

ROWS = rows()
SAID = [said for row in ROWS.values() for said in row.said.values()]
UNSEEN = {"internal"}
"""Errors that no request meets: a defect ends the stream, and Envoy answers."""


def test_each_row_is_tested_and_each_test_has_a_row() -> None:
    assert len(ROWS) > 50
    assert set(ROWS) == set(CASES)


def test_a_row_is_read_as_it_is_meant() -> None:
    row = ROWS["client-leaves-in-stream"]
    assert row == Row(
        status=200,
        body="cut off",
        headers={},
        said={
            "stream": Said("aborted", "network", "closed-before-end"),
            "native": Said("aborted", "client", "closed-before-end"),
        },
        counts={},
    )
    assert ROWS["nobody-ready"].headers == {"x-error-no-model-backends": "true", "retry-after": "1"}
    assert ROWS["pods-refuse"].counts == {"envoy_extproc_retries_total": 2}
    assert ROWS["late-open"].said["native"] == Said(None, None, None)
    assert set(row.said) == set(LANES)


def test_words_are_those_of_the_code() -> None:
    assert {said.outcome for said in SAID} - {None} <= set(get_args(Outcome))
    assert {said.error_type for said in SAID} - {None} <= set(get_args(ErrorType))
    assert {row.body for row in ROWS.values()} == {"ours", "Envoy's", "pod's", "cut off", "none"}
    for said in SAID:
        assert (said.error_type is None) == (said.outcome in {None, "success"})


def test_every_fault_is_explained() -> None:
    listed = [
        line.split("|")[1].strip() for line in PAGE.read_text("utf-8").splitlines() if line[:3] == "| `"
    ]
    assert [each.strip("`") for each in listed] == sorted(get_args(ErrorType), key=_place)


def _place(fault: str) -> int:
    return ["client", "network", "model_server", "content", "overload", "limit", "internal"].index(fault)


def _classes(of: type[GatewayError]) -> set[type[GatewayError]]:
    return {of, *(each for direct in of.__subclasses__() for each in _classes(direct))}


def test_each_error_of_ours_has_a_row_that_says_what_its_class_says() -> None:
    told = {
        (row.status, said.error_type, said.error, row.headers.get("retry-after"), _x_error(row))
        for row in ROWS.values()
        for said in row.said.values()
        if said.outcome == "refused"
    }
    ours = {each for each in _classes(GatewayError) if each.__module__ == errors.__name__}
    assert told == {
        (
            each.status,
            each.error_type,
            each.detail,
            None if each.retry_after is None else str(each.retry_after),
            None if each.header is None else each.header[0],
        )
        for each in ours
        if each.detail not in UNSEEN
    }


def _x_error(row: Row) -> str | None:
    return next((name for name in row.headers if name.startswith("x-error-")), None)


def test_metrics_exist() -> None:
    metrics = PrometheusMetrics(list, known=lambda _: True)
    known = {f"{family.name}_total" for family in metrics.registry.collect() if family.type == "counter"}
    named = {name for row in ROWS.values() for name in row.counts}
    assert named - {ALLOWED} <= known
    assert set(COUNTED) <= known
    assert named <= {*COUNTED, ALLOWED}
