"""When the native lane is open, and what it keeps of exchanges whose stream is not held."""

from __future__ import annotations

import pytest
from structlog.testing import capture_logs

from envoy_extproc.server.native_lane import Accounting, NativeLane
from envoy_extproc.state.memory import InFlight, Lease
from tests.support.builders import MODEL, endpoint


def ended(lane: NativeLane, exchanges: int, *, seconds: float) -> None:
    """So many exchanges, spread evenly from now on over that time, both ends included."""
    for number in range(exchanges):
        lane.end(1000.0 + seconds * number / max(1, exchanges - 1))


# -- the switch ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accounting", "at_first", "in_silence"),
    [("auto", True, False), ("native", True, True), ("stream", False, False), ("none", True, False)],
)
def test_when_it_is_open(accounting: Accounting, at_first: bool, in_silence: bool) -> None:
    lane = NativeLane(accounting)
    assert lane.open is at_first
    ended(lane, 50, seconds=60.0)
    assert lane.open is in_silence


@pytest.mark.parametrize(
    ("exchanges", "seconds", "is_open"),
    [
        (50, 29.0, True),
        (50, 30.0, True),
        (50, 30.1, False),
        (20, 31.0, False),
        (19, 3600.0, True),
        (1, 0.0, True),
    ],
)
def test_silence_is_long_and_of_many_exchanges(exchanges: int, seconds: float, is_open: bool) -> None:
    lane = NativeLane("auto")
    ended(lane, exchanges, seconds=seconds)
    assert lane.open is is_open


def test_a_message_of_the_log_ends_the_silence() -> None:
    lane = NativeLane("auto")
    ended(lane, 50, seconds=25.0)
    lane.heard()
    for number in range(19):
        lane.end(1026.0 + 100 * number)
    assert lane.open
    lane.end(5000.0)
    assert not lane.open


def test_it_opens_again_with_the_first_message_and_says_both_once() -> None:
    lane = NativeLane("auto")
    with capture_logs() as logs:
        for _ in range(2):
            ended(lane, 50, seconds=60.0)
            ended(lane, 50, seconds=60.0)
            lane.heard()
            lane.heard()
            assert lane.open
    assert [line["event"] for line in logs] == ["native_lane_closed", "native_lane_open"] * 2


# -- who is to read ------------------------------------------------------------------------------------------------


def test_one_that_hears_nothing_says_so_until_it_does() -> None:
    lane = NativeLane("auto", name="me")
    assert lane.plea(1000.0) == ""  # nothing has ended yet
    lane.end(1000.0)
    assert lane.plea(1005.0) == ""
    assert lane.plea(1005.1) == "me"
    ended(lane, 50, seconds=60.0)
    assert not lane.open
    assert lane.plea(1060.0) == "me"
    lane.heard()
    assert lane.plea(1060.0) == ""


@pytest.mark.parametrize("accounting", ["stream", "native"])
def test_one_that_need_not_hear_does_not_ask(accounting: Accounting) -> None:
    lane = NativeLane(accounting, name="me")
    lane.end(1000.0)
    assert lane.plea(2000.0) == ""


@pytest.mark.parametrize(
    ("plea", "age", "moved"),
    [("other", 4.9, True), ("other", 5.0, False), ("me", 0.0, False), ("", 0.0, False)],
)
def test_whose_plea_is_heard(plea: str, age: float, moved: bool) -> None:
    assert NativeLane("auto", name="me").moved_by(plea, age) is moved


# -- the other lanes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accounting", ["stream", "native"])
def test_elsewhere_the_log_changes_nothing(accounting: Accounting) -> None:
    lane = NativeLane(accounting)
    before = lane.open
    with capture_logs() as logs:
        ended(lane, 50, seconds=60.0)
        lane.heard()
    assert (lane.open, logs) == (before, [])


def test_the_books() -> None:
    lane = NativeLane("auto")
    ended(lane, 3, seconds=1.0)
    lane.report("id-1")
    assert (lane.ended, lane.reported, lane.missing) == (3, 1, 2)
    for _ in range(4):
        lane.report("another server's")
    assert lane.missing == -2


# -- exchanges that are not held -----------------------------------------------------------------------------------


@pytest.fixture
def in_flight() -> InFlight:
    return InFlight()


def lease(in_flight: InFlight) -> Lease:
    return in_flight.acquire(endpoint(1), MODEL)


def test_a_place_is_kept_until_its_entry_comes(in_flight: InFlight) -> None:
    lane = NativeLane("auto")
    lane.keep("id-1", lease(in_flight), 1.0)
    lane.keep("id-2", lease(in_flight), 1.0)
    lane.report("id-3")
    assert in_flight.total == 2
    lane.report("id-1")
    lane.report("id-1")
    assert in_flight.total == 1
    lane.report("id-2")
    assert in_flight.total == 0


def test_a_place_whose_entry_never_comes_is_given_up(in_flight: InFlight) -> None:
    lane = NativeLane("auto", lease_seconds=10.0)
    lane.keep("id-1", lease(in_flight), 0.0)
    lane.keep("id-2", lease(in_flight), 5.0)
    lane.keep("id-3", lease(in_flight), 9.9)
    assert in_flight.total == 3
    lane.keep("id-4", lease(in_flight), 10.0)
    assert in_flight.total == 3
    lane.keep("id-5", lease(in_flight), 100.0)
    assert in_flight.total == 1
    lane.report("id-1")  # late: it changes nothing any more
    assert in_flight.total == 1


def test_an_id_that_is_used_again_counts_once(in_flight: InFlight) -> None:
    lane = NativeLane("auto", lease_seconds=10.0)
    lane.keep("id-1", lease(in_flight), 0.0)
    lane.keep("id-2", lease(in_flight), 1.0)
    lane.keep("id-1", lease(in_flight), 9.0)
    assert in_flight.total == 2
    lane.keep("id-3", lease(in_flight), 11.0)  # id-1 is younger than id-2 now
    assert in_flight.total == 2
    lane.report("id-1")
    lane.report("id-3")
    assert in_flight.total == 0
