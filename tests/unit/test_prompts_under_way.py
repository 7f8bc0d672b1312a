"""Prompts under way: who is thought to hold one when its report has come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from envoy_extproc.endpoints import EngineState, EngineStats
from envoy_extproc.exchange.report import Report
from envoy_extproc.openai.answer import Usage
from envoy_extproc.openai.prompt import BlockRule
from envoy_extproc.scheduling.prefix import PrefixIndex
from envoy_extproc.state.prompts import Prompts
from tests.support.builders import decision, endpoint
from tests.support.reports import report

PROMPT = [1, 2, 3, 4]
CHOSEN, SERVED = endpoint(1), endpoint(2)


class Server:
    """An index, and prompts on their way to endpoints."""

    def __init__(self, *, most_blocks: int = 1000, tokens: int = 100) -> None:
        self.index = PrefixIndex(BlockRule(tokens=tokens))
        self.now = 0.0
        self.prompts = Prompts(self.index, name="me", clock=lambda: self.now, most_blocks=most_blocks)

    def send(self, blocks: Sequence[int] = PROMPT, ticket: str | None = None) -> str:
        """Decides for the chosen one, as the director does."""
        held = self.index.match(blocks).get(CHOSEN.address, 0)
        ticket = self.prompts.sent(blocks, CHOSEN, held / len(blocks), self.now, ticket)
        self.index.learn(blocks, CHOSEN)
        return ticket

    def says(self, at: float) -> None:
        """Its engine has found nothing in its cache so far."""
        stats = EngineStats(at=at, prefix_cache_hits=0.0)
        self.prompts.look({CHOSEN.address: EngineState(stats=stats)})

    def holders(self, blocks: Sequence[int] = PROMPT) -> dict[str, int]:
        return {address[7]: count for address, count in self.index.match(blocks).items()}


def told(ticket: str | None, **changes: Any) -> Report:
    routing = report().routing
    assert routing is not None
    return report(routing=msgspec.structs.replace(routing, ticket=ticket), **changes)


BY_SERVED = {"served_by": SERVED, "served_address": SERVED.address, "attempts": 2}
BY_NOBODY = {"served_by": None, "served_address": None, "attempts": 0}
NOTHING_SAID = Usage(prompt_tokens=400)


@pytest.mark.parametrize(
    ("changes", "holders"),
    [
        ({}, {"1": 4}),
        (BY_SERVED, {"2": 4}),
        # One whose address nobody knows any more learns nothing, and the chosen one did not serve.
        ({**BY_SERVED, "served_by": None}, {}),
        ({**BY_SERVED, "status": 503, "outcome": "error"}, {}),
        ({"status": 503, "outcome": "error"}, {}),
        ({"status": 400, "outcome": "error"}, {}),
        ({**BY_NOBODY, "status": 503, "outcome": "error"}, {}),
        ({**BY_NOBODY, "status": None, "outcome": "aborted"}, {"1": 4}),  # nobody knows how far it came
        ({"outcome": "aborted"}, {"1": 4}),
        ({"outcome": "error", "usage": NOTHING_SAID}, {}),  # full, it says inside a 200
        ({"outcome": "error"}, {"1": 4}),  # it broke off in the middle of the answer
        ({"usage": NOTHING_SAID}, {"1": 4}),  # an embedding has no tokens of an answer
    ],
)
def test_who_holds_a_prompt_in_the_end(changes: dict[str, Any], holders: dict[str, int]) -> None:
    server = Server()
    ticket = server.send()
    assert server.holders() == {"1": 4}
    server.prompts.finished(told(ticket, **changes))
    assert server.holders() == holders
    assert len(server.prompts) == 0


def test_what_the_chosen_one_held_before_it_holds_still() -> None:
    server = Server()
    server.prompts.finished(told(server.send(PROMPT[:2])))
    server.prompts.finished(told(server.send(), **BY_SERVED))
    assert server.holders() == {"1": 2, "2": 4}


def test_a_report_that_is_not_ours_changes_nothing() -> None:
    server = Server()
    server.send()
    for each in (report(routing=None), told(None, **BY_SERVED), told("other-p1", **BY_SERVED)):
        server.prompts.finished(each)
    assert server.holders() == {"1": 4}
    assert len(server.prompts) == 1


def test_a_report_counts_once() -> None:
    server = Server()
    ticket = server.send()
    server.prompts.finished(told(ticket, **BY_SERVED))
    server.index.learn(PROMPT, CHOSEN)
    server.prompts.finished(told(ticket, **BY_SERVED))
    assert server.holders() == {"1": 4, "2": 4}


def test_tickets() -> None:
    server = Server()
    assert [server.send(), server.send(), server.send(ticket="me-7")] == ["me-p1", "me-p2", "me-7"]
    server.prompts.finished(told("me-7", **BY_SERVED))
    assert server.holders() == {"1": 4, "2": 4}


def test_prompts_under_way_are_bounded_and_the_oldest_go_first() -> None:
    server = Server(most_blocks=10)
    tickets = [server.send([100 * number + place for place in range(4)]) for number in range(3)]
    assert len(server.prompts) == 2
    for ticket in tickets:
        server.prompts.finished(told(ticket, **BY_SERVED))
    held = [server.holders([100 * number + place for place in range(4)]) for number in range(3)]
    assert held == [{"1": 4}, {"2": 4}, {"2": 4}]
    assert server.prompts._blocks == 0


def test_a_prompt_longer_than_the_bound_is_not_kept() -> None:
    server = Server(most_blocks=3)
    server.prompts.finished(told(server.send(), **BY_SERVED))
    assert server.holders() == {"1": 4}
    assert server.prompts._blocks == 0


@pytest.mark.parametrize(
    ("tokens", "promised"),
    [
        (4000, 3000.0),
        (40_000, 3000.0),  # an image among them: no more than the blocks stand for
        (2000, 1500.0),  # fewer than 4 bytes make a token
    ],
)
def test_what_an_answer_should_have_found_in_the_cache(tokens: int, promised: float) -> None:
    server = Server(tokens=1000)
    server.says(0.0)
    server.prompts.finished(told(server.send(PROMPT[:3])))
    server.says(1.0)
    server.now = 5.0
    ticket = server.send()
    server.prompts.finished(told(ticket, usage=Usage(prompt_tokens=tokens, completion_tokens=1)))
    assert server.prompts.caches._promises[CHOSEN.address].tokens == promised


def test_an_engine_that_finds_nothing_of_what_it_should_is_forgotten() -> None:
    server = Server(tokens=1000)
    usage = Usage(prompt_tokens=4000, completion_tokens=1)
    server.says(0.0)
    for _ in range(17):
        server.prompts.finished(told(server.send(), usage=usage))
        server.now += 1.0
        server.says(server.now)
    assert server.holders() == {"1": 4}
    server.now += 2.0
    server.says(server.now)
    assert server.holders() == {}
    assert server.prompts.caches.forgotten["unfound"] == 1


def test_a_decision_is_nothing_to_it() -> None:
    server = Server()
    server.prompts.decided(decision(1), 0.001)
    assert len(server.prompts) == 0
