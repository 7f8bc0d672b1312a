"""What engines said in answers beside what they said to the scraper, and how often requests go to each."""

from __future__ import annotations

import math

import pytest

from envoy_extproc.endpoints import EngineStats, Snapshot
from envoy_extproc.orca import LoadReport
from envoy_extproc.state.load_reports import LoadReports
from envoy_extproc.state.rates import Rates
from tests.support.builders import endpoint

ONE, TWO = endpoint(1), endpoint(2)
SCRAPED = EngineStats(at=5.0, running=3.0, waiting=2.0, kv_cache_usage=0.5)
BUSY = LoadReport(named_metrics={"kv_cache_usage_perc": 0.75})
IDLE = LoadReport(named_metrics={"kv_cache_usage_perc": 0.0})


def reports() -> LoadReports:
    """Of two endpoints."""
    known = LoadReports()
    known.update(Snapshot([ONE, TWO]))
    return known


@pytest.mark.parametrize("scraped", [None, SCRAPED])
def test_without_a_report_the_scrape_counts(scraped: EngineStats | None) -> None:
    known = reports()
    known.note(TWO.address, BUSY, 9.0)
    assert known.fresher(ONE.address, scraped) is scraped


def test_a_newer_report_goes_into_the_scrape() -> None:
    known = reports()
    known.note(ONE.address, BUSY, 6.0)
    joined = EngineStats(at=6.0, running=3.0, waiting=2.0, kv_cache_usage=0.75)
    assert known.fresher(ONE.address, SCRAPED) == joined
    assert known.fresher(ONE.address, SCRAPED) is known.fresher(ONE.address, SCRAPED)
    again = EngineStats(at=5.5, running=4.0)
    assert known.fresher(ONE.address, again) == EngineStats(at=6.0, running=4.0, kv_cache_usage=0.75)


def test_a_scrape_too_old_to_believe_does_not_live_on_in_a_report() -> None:
    known = reports()
    known.note(ONE.address, BUSY, 6.0)
    assert known.fresher(ONE.address, SCRAPED) is not None
    assert known.fresher(ONE.address, None) == EngineStats(at=6.0, kv_cache_usage=0.75)


@pytest.mark.parametrize("at", [4.9, 5.0])
def test_an_older_report_says_nothing(at: float) -> None:
    known = reports()
    known.note(ONE.address, BUSY, at)
    assert known.fresher(ONE.address, SCRAPED) is SCRAPED


def test_the_last_report_counts_in_whatever_order_they_come() -> None:
    known = reports()
    for report, at in ((BUSY, 6.0), (IDLE, 8.0), (BUSY, 7.0)):
        known.note(ONE.address, report, at)
    assert known.fresher(ONE.address, SCRAPED) == EngineStats(
        at=8.0, running=3.0, waiting=2.0, kv_cache_usage=0.0
    )
    known.note(ONE.address, BUSY, 9.0)
    assert known.fresher(ONE.address, SCRAPED) == EngineStats(
        at=9.0, running=3.0, waiting=2.0, kv_cache_usage=0.75
    )


def test_a_report_of_nothing_known_is_no_news() -> None:
    known = reports()
    known.note(ONE.address, BUSY, 6.0)
    known.note(ONE.address, LoadReport(named_metrics={"queue": 3.0}), 9.0)
    assert known.fresher(ONE.address, None) == EngineStats(at=6.0, kv_cache_usage=0.75)


def test_only_endpoints_that_are_there_are_remembered() -> None:
    known = reports()
    known.note(ONE.address, BUSY, 6.0)
    known.note(TWO.address, BUSY, 6.0)
    for number in range(3, 200):
        known.note(endpoint(number).address, BUSY, 6.0)
    known.update(Snapshot([TWO, endpoint(3)]))
    assert [known.fresher(endpoint(number).address, None) is None for number in (1, 2, 3)] == [
        True,
        False,
        True,
    ]
    known.update(Snapshot([ONE, TWO]))
    assert known.fresher(ONE.address, None) is None


def test_another_pod_at_an_address_has_said_nothing() -> None:
    known = reports()
    known.note(ONE.address, BUSY, 6.0)
    known.update(Snapshot([endpoint(1, models=("another",))]))
    assert known.fresher(ONE.address, None) is not None
    known.update(Snapshot([endpoint(1, name="another")]))
    assert known.fresher(ONE.address, None) is None


# -- rates -------------------------------------------------------------------------------------------------------------


def rates() -> Rates:
    """Of two endpoints."""
    known = Rates()
    known.update(Snapshot([ONE, TWO]))
    return known


@pytest.mark.parametrize("per_second", [0.5, 10.0, 200.0])
def test_a_steady_rate_shows_within_a_minute(per_second: float) -> None:
    known = rates()
    rate = 0.0
    for number in range(round(60 * per_second)):
        rate = known.add(ONE.address, number / per_second)
    # Right behind a request the rate is highest, by half of that request's own part.
    assert rate == pytest.approx(per_second + 0.05, rel=0.02)
    assert known.add(TWO.address, 60.0) == pytest.approx(0.1)


def test_a_rate_fades() -> None:
    known = rates()
    high = [known.add(ONE.address, 60 + number / 100) for number in range(1000)][-1]
    assert known.add(ONE.address, 70 + 10 - 0.01) == pytest.approx(high / math.e + 0.1, rel=0.001)


def test_a_clock_that_stands_still_counts_all_the_same() -> None:
    known = rates()
    assert known.add(ONE.address, 5.0) == pytest.approx(0.1)
    assert known.add(ONE.address, 4.0) == pytest.approx(0.2)
    assert known.add(ONE.address, 5.0) == pytest.approx(0.3)


def test_rates_of_endpoints_that_left_are_forgotten() -> None:
    known = rates()
    for number in range(1, 200):
        assert known.add(endpoint(number).address, 1.0) == pytest.approx(0.1)
    known.update(Snapshot([TWO, endpoint(3)]))
    assert known.add(TWO.address, 1.0) == pytest.approx(0.2)
    assert known.add(endpoint(3).address, 1.0) == pytest.approx(0.1)
    known.update(Snapshot([ONE, TWO]))
    assert known.add(ONE.address, 1.0) == pytest.approx(0.1)


def test_when_each_said_something_last() -> None:
    known = LoadReports()
    latest = known.latest
    known.update(Snapshot([ONE, TWO]))
    known.note(ONE.address, BUSY, 5.0)
    known.note(TWO.address, BUSY, 6.0)
    known.note(TWO.address, IDLE, 4.0)  # came late
    assert latest == {ONE.address: 5.0, TWO.address: 6.0}
    known.update(Snapshot([ONE]))
    assert known.latest is latest
    assert latest == {ONE.address: 5.0}
