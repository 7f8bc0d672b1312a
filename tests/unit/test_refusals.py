"""Pods that lately failed, as reports tell: who is avoided, and for how long."""

from __future__ import annotations

from typing import Any

import pytest

from envoy_extproc.exchange.report import routing_of
from envoy_extproc.state.refusals import Refusals
from tests.support.builders import decision
from tests.support.reports import report

FIRST, SECOND, THIRD = (f"10.0.0.{number}:8000" for number in (1, 2, 3))


class Scene:
    """What is remembered, and a clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0
        self.refusals = Refusals(lambda: self.now)

    def told(self, **changes: Any) -> None:
        self.refusals.finished(report(routing=routing_of(decision(1, 2, 3)), **changes))

    def avoided(self, after: float = 0.0) -> set[str]:
        return {each for each in (FIRST, SECOND, THIRD) if self.refusals.avoided(each, self.now + after)}


NETWORK = {"outcome": "error", "error_type": "network", "served_by": None, "served_address": None}
OVERLOAD = {"outcome": "error", "error_type": "overload", "status": 503}


@pytest.mark.parametrize(
    ("changes", "avoided"),
    [
        ({"served_address": FIRST, "attempts": 1}, set()),
        ({"served_address": SECOND, "attempts": 2}, {FIRST}),
        ({"served_address": THIRD, "attempts": 3}, {FIRST, SECOND}),
        ({**NETWORK, "attempts": 1}, {FIRST}),
        ({**NETWORK, "attempts": 3}, {FIRST, SECOND, THIRD}),
        ({**OVERLOAD, "served_address": THIRD, "attempts": 3}, {FIRST, SECOND, THIRD}),
        ({"outcome": "error", "error_type": "model_server", "served_address": FIRST}, set()),
        ({"outcome": "aborted", "error_type": "client", "served_address": None, "attempts": 1}, set()),
        ({"routing": None, **NETWORK, "attempts": 1}, set()),
        ({**NETWORK, "attempts": 0}, set()),
    ],
)
def test_who_is_avoided(changes: dict[str, Any], avoided: set[str]) -> None:
    scene = Scene()
    if "routing" in changes:
        scene.refusals.finished(report(**changes))
    else:
        scene.told(**changes)
    assert scene.avoided() == avoided


def test_longer_each_time_and_not_for_ever() -> None:
    scene = Scene()
    for seconds in (1, 2, 4, 8, 16, 30, 30):
        scene.told(**NETWORK, attempts=1)
        assert scene.avoided(seconds - 0.01) == {FIRST}
        assert scene.avoided(seconds) == set()


def test_trusted_again_with_the_first_answer() -> None:
    scene = Scene()
    for _ in range(4):
        scene.told(**NETWORK, attempts=1)
    scene.told(served_address=FIRST, attempts=1)
    assert scene.avoided() == set()
    scene.told(**NETWORK, attempts=1)
    assert scene.avoided(1.0) == set()


def test_a_pod_alone_is_not_avoided_by_its_own_retry() -> None:
    scene = Scene()
    scene.refusals.finished(report(routing=routing_of(decision(1, 1, 1)), served_address=FIRST, attempts=2))
    assert scene.avoided() == set()


def test_addresses_do_not_pile_up() -> None:
    scene = Scene()
    for number in range(10_500):
        address = f"10.1.{number // 250}.{number % 250}:80"
        scene.refusals._note(address)
    assert len(scene.refusals._failed) <= 10_000
