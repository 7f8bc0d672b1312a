"""Which endpoints can be counted on, by model."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from envoy_extproc.endpoints import Endpoint, EngineState, Snapshot
from envoy_extproc.server.readiness import STATES, by_model
from tests.support.builders import endpoint

UP, DOWN = EngineState(), EngineState(reachable=False, failures=2)


@pytest.mark.parametrize(
    ("state", "breaker", "expected"),
    [
        (None, None, "ready"),  # just found: nobody has said a word against it
        (UP, "closed", "ready"),
        (UP, "half-open", "failing"),
        (UP, "open", "failing"),
        (DOWN, "closed", "unreachable"),
        (DOWN, "open", "unreachable"),
    ],
)
def test_an_endpoint_is_in_one_state(state: EngineState | None, breaker: str | None, expected: str) -> None:
    one = endpoint(1, models=("m",))
    states = {} if state is None else {one.address: state}
    ((model, counts),) = by_model(Snapshot([one]), states, lambda _: breaker)
    assert model == "m"
    assert counts == {each: int(each == expected) for each in STATES}


def counted(endpoints: list[Endpoint], down: set[str]) -> Mapping[str, Mapping[str, int]]:
    states = {each.address: DOWN if each.address in down else UP for each in endpoints}
    return dict(by_model(Snapshot(endpoints), states, lambda _: "closed"))


def test_an_endpoint_counts_for_each_of_its_models() -> None:
    one, two, three = (
        endpoint(1, models=("a", "b")),
        endpoint(2, models=("a",)),
        endpoint(3, models=("b",)),
    )
    assert counted([one, two, three], {one.address}) == {
        "a": {"ready": 1, "failing": 0, "unreachable": 1},
        "b": {"ready": 1, "failing": 0, "unreachable": 1},
    }


def test_nobody_is_nothing() -> None:
    assert counted([], set()) == {}
