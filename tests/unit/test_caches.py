"""What engines say of their caches: their room, and when what is remembered of one is worth nothing any more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from envoy_extproc.endpoints import EngineState, EngineStats
from envoy_extproc.openai.prompt import BlockRule
from envoy_extproc.scheduling.caches import Caches
from envoy_extproc.scheduling.prefix import PrefixIndex
from tests.support.builders import endpoint

A, B = endpoint(1).address, endpoint(2).address


def state(at: float = 0.0, *, reachable: bool = True, **told: Any) -> EngineState:
    return EngineState(stats=EngineStats(at=at, **told), reachable=reachable)


def taught() -> tuple[PrefixIndex, Caches]:
    index = PrefixIndex(BlockRule(tokens=10), per_endpoint=100)
    for number in (1, 2):
        index.learn(range(50), endpoint(number))
    return index, Caches(index)


FULL = state(prefix_cache_hit_rate=0.5)


@pytest.mark.parametrize(
    ("before", "now", "forgotten"),
    [
        ({A: FULL}, {A: state(prefix_cache_hit_rate=0.25)}, {}),
        ({A: FULL}, {A: state()}, {A: "emptied"}),
        ({A: state()}, {A: state()}, {}),
        ({A: state()}, {A: FULL}, {}),
        ({A: FULL}, {A: EngineState()}, {}),
        ({}, {A: state()}, {}),
        ({}, {A: state(life=3)}, {}),
        ({A: EngineState()}, {A: state(life=3)}, {}),
        ({A: FULL}, {}, {}),
        ({A: state(life=0)}, {A: state(life=1)}, {A: "restarted"}),
        ({A: state(life=1), B: FULL}, {A: state(life=3), B: state()}, {A: "restarted", B: "emptied"}),
        ({A: FULL}, {A: state(life=1)}, {A: "restarted"}),
        ({A: FULL}, {A: state(reachable=False, prefix_cache_hit_rate=0.5), B: FULL}, {A: "unreachable"}),
        ({}, {A: EngineState(reachable=False)}, {A: "unreachable"}),
        ({"10.9.9.9:1": FULL}, {"10.9.9.9:1": state()}, {}),  # nothing was remembered of it
    ],
)
def test_whose_prompts_are_forgotten(
    before: Mapping[str, EngineState], now: Mapping[str, EngineState], forgotten: Mapping[str, str]
) -> None:
    index, caches = taught()
    caches.look(before)
    caches.look(now)
    assert index.held().keys() == {A, B} - forgotten.keys()
    counted = dict.fromkeys(("unreachable", "restarted", "emptied", "unfound"), 0)
    for reason in forgotten.values():
        counted[reason] += 1
    assert caches.forgotten == counted
    caches.look(now)  # and said once is said once
    assert caches.forgotten == counted


def test_an_engine_that_was_seen_to_begin_anew_twice_between_two_looks_did_so_once() -> None:
    index, caches = taught()
    for life in (0, 2):
        caches.look({A: state(life=life)})
    assert A not in index.held()
    index.learn(range(50), endpoint(1))
    caches.look({A: state(at=1.0, life=2)})
    assert A in index.held()


def test_room_is_twice_what_the_engine_says() -> None:
    index, caches = taught()
    caches.look({A: state(kv_cache_tokens=150.0), B: state()})
    assert (index.held(), index.limit(A), index.limit(B)) == ({A: 30, B: 50}, 30, 100)
    caches.look({A: state(kv_cache_tokens=450.0), B: state()})
    assert (index.held(), index.limit(A)) == ({A: 30, B: 50}, 90)


# -- promises ------------------------------------------------------------------------------------------------------


class Engine:
    """An engine of which it is told at which second what has been found in its cache."""

    def __init__(self) -> None:
        self.index, self.caches = taught()

    def says(self, at: float, found: float | None, **told: Any) -> None:
        self.caches.look({A: state(at, prefix_cache_hits=found, **told)})

    def answers(self, count: int, tokens: float = 1000.0, began: float = 10.0, now: float = 20.0) -> None:
        for _ in range(count):
            self.caches.promise(A, tokens, began, now)

    @property
    def forgotten(self) -> int:
        return self.caches.forgotten["unfound"]


def watched(found: float | None = 5000.0) -> Engine:
    """One of which something has been promised before, so that its count is followed since second 5."""
    engine = Engine()
    engine.says(0.0, found)
    engine.answers(1, began=0.0, now=1.0)
    engine.says(5.0, found)
    return engine


@pytest.mark.parametrize(
    ("answers", "found", "broken"),
    [
        (16, 5000.0, True),
        (16, 8999.0, True),
        (16, 9000.0, False),  # a quarter of 16 * 1000
        (16, 21_000.0, False),
        (16, 99_000.0, False),  # others' requests count, too
        (15, 5000.0, False),
        (40, 5000.0, True),
        (40, 9000.0, False),  # of the first sixteen
    ],
)
def test_what_was_promised_and_not_found_is_forgotten(answers: int, found: float, broken: bool) -> None:
    engine = watched()
    engine.answers(answers)
    engine.says(30.0, found)
    assert engine.forgotten == broken
    assert (A in engine.index.held()) is not broken
    assert B in engine.index.held()


def test_small_promises_prove_nothing() -> None:
    engine = watched()
    engine.answers(100, tokens=255.0)
    engine.says(30.0, 5000.0)
    assert engine.forgotten == 0


def test_answers_to_requests_from_before_the_page_prove_nothing() -> None:
    engine = watched()
    engine.answers(100, began=4.9)
    engine.says(30.0, 5000.0)
    assert engine.forgotten == 0


@pytest.mark.parametrize(("at", "broken"), [(15.0, False), (21.9, False), (22.0, True)])
def test_the_page_that_tells_is_from_after_the_answers(at: float, broken: bool) -> None:
    engine = watched()
    engine.answers(16)
    engine.says(at, 5000.0)
    assert engine.forgotten == broken


def test_it_is_looked_again_and_again() -> None:
    engine = watched()
    for begin, found in ((10.0, 21_000.0), (110.0, 22_000.0), (210.0, 38_000.0), (310.0, 38_000.0)):
        engine.answers(16, began=begin, now=begin + 10)
        engine.says(begin + 20, found)
    assert engine.forgotten == 1  # the second time; in the end nothing was remembered any more
    assert A not in engine.index.held()


@pytest.mark.parametrize("found", [[None, 0.0], [5000.0, None]])
def test_an_engine_that_does_not_count_breaks_no_promise(found: Sequence[float | None]) -> None:
    engine = watched(found[0])
    engine.answers(16)
    engine.says(30.0, found[1])
    assert engine.forgotten == 0


def test_an_engine_that_began_anew_has_broken_none() -> None:
    engine = watched()
    engine.answers(16)
    engine.says(30.0, 0.0, life=1)
    assert engine.caches.forgotten == {"unreachable": 0, "restarted": 1, "emptied": 0, "unfound": 0}
    engine.index.learn(range(50), endpoint(1))
    engine.answers(16, began=31.0, now=40.0)
    engine.says(50.0, 16_000.0, life=1)
    assert engine.forgotten == 0
    engine.answers(16, began=51.0, now=60.0)
    engine.says(70.0, 16_000.0, life=1)
    assert engine.forgotten == 1


def test_what_an_engine_promised_in_another_life_does_not_count() -> None:
    engine = watched()
    engine.answers(10)
    engine.says(30.0, 0.0, life=1)
    engine.index.learn(range(50), endpoint(1))
    engine.answers(16, began=31.0, now=40.0)
    engine.says(50.0, 5000.0, life=1)
    assert engine.forgotten == 0


def test_promises_of_those_who_left_are_let_go() -> None:
    engine = watched()
    engine.caches.look({B: FULL})
    engine.caches.keep([B])
    assert not engine.caches._promises
    engine.answers(16)
    assert not engine.caches._promises
    assert engine.caches._seen == {B: FULL}


def test_an_endpoint_that_comes_back_is_told_its_room_again() -> None:
    index, caches = taught()
    for _ in range(2):
        caches.look({A: state(kv_cache_tokens=150.0, prefix_cache_hit_rate=0.5)})
        assert index.limit(A) == 30
        index.keep({})
        caches.keep({})
