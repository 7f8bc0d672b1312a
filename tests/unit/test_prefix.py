"""Who holds which prompt: the index, the scorer, the bound on load, and the policy as a whole."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from envoy_extproc.endpoints import Endpoint, EngineState, EngineStats, Snapshot
from envoy_extproc.exchange.report import routing_of
from envoy_extproc.openai.answer import Usage
from envoy_extproc.openai.prompt import BlockRule, Prompt
from envoy_extproc.scheduling import registry
from envoy_extproc.scheduling.fairness import FairnessRules
from envoy_extproc.scheduling.interfaces import Candidate, MissingDataError, SchedulingRequest
from envoy_extproc.scheduling.pickers import MaxScorePicker
from envoy_extproc.scheduling.prefix import PrefixIndex
from envoy_extproc.scheduling.scorers_prefix import PrefixCacheScorer, PrefixLoadFilter
from envoy_extproc.server import orca
from envoy_extproc.server.director import Director, RoutingRules
from envoy_extproc.state.fairness import Fairness
from tests.support.builders import MODEL, candidate, endpoint
from tests.support.reports import report

RULE = BlockRule(tokens=4)
BLOCK = 16  # bytes
TEXT = "".join(f"{number:015d} " for number in range(40))


def asking(text: str, model: str = MODEL, policy: str | None = None) -> SchedulingRequest:
    """For a completion of `text`."""
    prompt = Prompt({"prompt": msgspec.Raw(json.dumps(text).encode())})
    return SchedulingRequest(model=model, prompt=prompt, policy=policy)


def blocks(count: int, text: str = TEXT) -> str:
    return text[: count * BLOCK]


def taught(**held: int) -> PrefixIndex:
    """``p1=3``: pod 1 holds three blocks of the text."""
    index = PrefixIndex(RULE)
    for name, count in held.items():
        index.learn(index.blocks(asking(blocks(count))), endpoint(int(name[1:])))
    return index


# -- the index -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("held", "asked", "shares"),
    [
        ({}, 4, [0.0, 0.0, 0.0]),
        ({"p1": 4}, 4, [1.0, 0.0, 0.0]),
        ({"p1": 4}, 8, [0.5, 0.0, 0.0]),
        ({"p1": 8}, 4, [1.0, 0.0, 0.0]),
        ({"p1": 1, "p2": 2, "p3": 3}, 4, [0.25, 0.5, 0.75]),
        ({"p1": 4, "p2": 4, "p3": 1}, 4, [1.0, 1.0, 0.25]),
    ],
)
def test_the_longest_chain_of_each(held: dict[str, int], asked: int, shares: list[float]) -> None:
    candidates = [candidate(number) for number in (1, 2, 3)]
    assert taught(**held).shares(asking(blocks(asked)), candidates) == shares


def test_a_gap_ends_a_match() -> None:
    index = PrefixIndex(RULE)
    index.learn([1, 3], endpoint(1))
    index.learn([2, 3], endpoint(2))
    assert index.match([1, 2, 3]) == {"10.0.0.1:8000": 1}


@pytest.mark.parametrize("request_", [SchedulingRequest(model=MODEL), asking(""), asking("x" * (BLOCK - 1))])
def test_nothing_to_ask_for(request_: SchedulingRequest) -> None:
    index = taught(p1=4)
    assert index.shares(request_, [candidate(1)]) == [0.0]
    with pytest.raises(MissingDataError) as missing:
        PrefixCacheScorer(index).score(request_, [candidate(1)])
    assert missing.value.reason == "no-prompt"
    before = len(index)
    PrefixCacheScorer(index).remember(request_, candidate(2))
    assert len(index) == before


def test_models_share_nothing() -> None:
    index = taught(p1=4)
    assert index.shares(asking(blocks(4), model="lora-1"), [candidate(1)]) == [0.0]


def test_what_was_not_asked_for_again_goes_first_and_its_end_before_its_beginning() -> None:
    index = PrefixIndex(RULE, per_endpoint=6)
    one = endpoint(1)
    index.learn([1, 2, 3], one)
    index.learn([11, 12, 13], one)
    index.learn([1, 2], one)  # asked for again
    index.learn([21, 22], one)
    assert index.match([1, 2, 3]) == {one.address: 2}
    assert index.match([11, 12, 13]) == {one.address: 2}
    assert index.match([21, 22]) == {one.address: 2}
    assert len(index) == 6


def test_of_a_prompt_longer_than_there_is_room_the_beginning_is_kept() -> None:
    index = PrefixIndex(RULE, per_endpoint=3)
    index.learn([1, 2, 3, 4, 5], endpoint(1))
    assert index.match([1, 2, 3, 4, 5]) == {"10.0.0.1:8000": 3}


def test_all_together_share_a_bound() -> None:
    index = PrefixIndex(RULE, per_endpoint=10, in_all=12)
    for number in range(1, 5):
        index.learn(range(100 * number, 100 * number + 10), endpoint(number))
        assert len(index) <= 12
        assert index.limit(endpoint(number).address) == min(10, 12 // number)
    assert [len(index.match([100 * number])) for number in range(1, 5)] == [1] * 4


def test_a_pod_that_takes_over_an_address_holds_nothing() -> None:
    index = taught(p1=4)
    heir = endpoint(1, name="heir")
    index.keep({heir.address: heir})
    assert (len(index), index.distinct) == (0, 0)
    index = taught(p1=4)
    index.learn([7], heir)
    assert (len(index), index.match([7])) == (1, {heir.address: 1})


@pytest.mark.parametrize(
    ("told", "room"),
    [
        (None, 100),  # it does not tell
        (0.0, 100),  # nor yet
        (4 * 100.0, 100),
        (4 * 1000.0, 100),
        (4 * 30.0, 30),
        (4 * 30.0 + 3, 30),
        (1.0, 1),
    ],
)
def test_an_endpoint_is_remembered_with_as_much_as_its_cache_has_room_for(
    told: float | None, room: int
) -> None:
    index, one = PrefixIndex(RULE, per_endpoint=100, in_all=1000), endpoint(1)
    index.fit(one.address, told)
    assert index.limit(one.address) == room
    index.learn(range(200), one)
    assert index.held() == {one.address: room}
    assert index.match(range(200)) == {one.address: room}


def test_an_endpoint_with_less_room_forgets_what_is_too_much() -> None:
    index, one = PrefixIndex(RULE, per_endpoint=100), endpoint(1)
    index.learn(range(100), one)
    assert index.match(range(100)) == {one.address: 100}
    index.fit(one.address, 4 * 40.0)
    assert index.match(range(100)) == {one.address: 40}  # the end of the prompt goes first
    index.fit(one.address, None)
    index.learn(range(100), one)
    assert index.match(range(100)) == {one.address: 100}


def test_room_that_some_do_not_need_is_the_others() -> None:
    index = PrefixIndex(RULE, per_endpoint=100, in_all=90)
    index.fit(endpoint(1).address, 4 * 10.0)
    for number in (1, 2, 3):
        index.learn(range(1000 * number, 1000 * number + 100), endpoint(number))
    assert list(index.held().values()) == [10, 40, 40]
    index.fit(endpoint(2).address, 4 * 20.0)
    index.learn(range(3000, 3100), endpoint(3))
    assert list(index.held().values()) == [10, 20, 60]
    index.fit(endpoint(1).address, None)
    index.learn(range(1000, 1100), endpoint(1))
    assert list(index.held().values()) == [35, 20, 35]


def test_what_an_endpoint_did_not_compute_it_does_not_hold() -> None:
    index, one, two = PrefixIndex(RULE), endpoint(1), endpoint(2)
    index.learn([1, 2, 3, 4], one)
    index.learn([1, 2], two)
    index.learn([11, 12], one)
    index.unlearn([3, 4, 99], one.address)
    index.unlearn([1], "10.9.9.9:8000")
    assert index.match([1, 2, 3, 4]) == {one.address: 2, two.address: 2}
    assert index.match([11, 12]) == {one.address: 2}
    assert (len(index), index.distinct) == (6, 4)


def test_what_is_left_of_an_endpoint_stays_in_its_order() -> None:
    index, one = PrefixIndex(RULE, per_endpoint=6), endpoint(1)
    index.learn([1, 2, 3, 4], one)
    index.learn([11, 12], one)
    index.unlearn([3, 4], one.address)
    index.learn([21, 22, 23, 24], one)
    assert (index.match([1]), index.match([11, 12])) == ({}, {one.address: 2})


def test_four_blocks_that_were_used_are_spared_for_each_that_goes() -> None:
    index, one = PrefixIndex(RULE, per_endpoint=12), endpoint(1)
    for block in [*range(1, 13), *range(1, 13)]:
        index.learn([block], one)
    index.learn([99], one)
    assert [block for block in range(1, 13) if not index.match([block])] == [5]
    index.learn([100], one)
    assert [block for block in range(1, 13) if not index.match([block])] == [5, 10]


def test_an_address_has_its_own_room_when_another_pod_takes_it_over() -> None:
    index = PrefixIndex(RULE, per_endpoint=100)
    index.fit(endpoint(1).address, 4 * 10.0)
    index.keep({})
    assert index.limit(endpoint(1).address) == 100


class Plain:
    """The plainest index there is: for each endpoint a list of its blocks, the oldest first, and those used again."""

    def __init__(self, per_endpoint: int, in_all: int) -> None:
        self.per_endpoint = per_endpoint
        self.in_all = in_all
        self.held: dict[str, list[int]] = {}
        self.used: dict[str, set[int]] = {}
        self.rooms: dict[str, int] = {}

    def limit(self, address: str) -> int:
        rooms = [self.rooms.get(each, self.per_endpoint) for each in self.held]
        level = max(
            level for level in range(self.in_all + 1) if sum(min(level, r) for r in rooms) <= self.in_all
        )
        return max(1, min(level, self.rooms.get(address, self.per_endpoint)))

    def learn(self, chain: Sequence[int], address: str) -> None:
        if not chain:
            return
        if address not in self.held:
            self.held[address], self.used[address] = [], set()
            self.trim()
        limit = self.limit(address)
        held, blocks = self.held[address], list(chain[:limit])
        fresh = [each for each in dict.fromkeys(blocks) if each not in held]
        self.used[address] |= {each for each in blocks if each in held}
        if len(held) + len(fresh) > limit:
            self.make_room(address, limit - len(fresh), set(blocks))
        held.extend(reversed(fresh))

    def make_room(self, address: str, most: int, keep: set[int] = frozenset()) -> None:  # type: ignore[assignment]
        held, used = self.held[address], self.used[address]
        spared = 4 * (len(held) - most)
        while len(held) > most:
            block = held.pop(0)
            if block in keep:
                held.append(block)
            elif block in used and spared:
                spared -= 1
                used.remove(block)
                held.append(block)
            else:
                used.discard(block)

    def trim(self) -> None:
        for address, held in self.held.items():
            if len(held) > self.limit(address):
                self.make_room(address, self.limit(address))

    def unlearn(self, chain: Sequence[int], address: str) -> None:
        if address in self.held:
            self.held[address] = [each for each in self.held[address] if each not in chain]
            self.used[address] -= set(chain)

    def fit(self, address: str, room: int | None) -> None:
        self.rooms[address] = self.per_endpoint if room is None else max(1, min(room, self.per_endpoint))
        self.trim()

    def forget(self, address: str) -> None:
        self.held.pop(address, None)

    def match(self, chain: Sequence[int]) -> dict[str, int]:
        matched = {}
        for address, held in self.held.items():
            gap = next((place for place, each in enumerate(chain) if each not in held), len(chain))
            if gap:
                matched[address] = gap
        return matched


NUMBERS = st.integers(1, 5)


class Learning(RuleBasedStateMachine):
    """The index against the plainest one."""

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex(RULE, per_endpoint=12, in_all=40)
        self.plain = Plain(12, 40)

    @rule(
        number=NUMBERS,
        family=st.integers(0, 3),
        length=st.integers(0, 16),
        branch=st.integers(0, 16),
    )
    def learn(self, number: int, family: int, length: int, branch: int) -> None:
        chain = [family * 100 + (place if place < branch else place + 50) for place in range(length)]
        self.index.learn(chain, endpoint(number))
        self.plain.learn(chain, endpoint(number).address)
        held = self.index.match(chain).get(endpoint(number).address, 0)
        assert held == min(length, self.index.limit(endpoint(number).address))

    @rule(number=NUMBERS, family=st.integers(0, 3), begin=st.integers(0, 16), length=st.integers(0, 16))
    def unlearn(self, number: int, family: int, begin: int, length: int) -> None:
        chain = [family * 100 + begin + place for place in range(length)]
        self.index.unlearn(chain, endpoint(number).address)
        self.plain.unlearn(chain, endpoint(number).address)

    @rule(number=NUMBERS, room=st.none() | st.integers(0, 20))
    def fit(self, number: int, room: int | None) -> None:
        self.index.fit(endpoint(number).address, None if room is None else 4.0 * room)
        self.plain.fit(endpoint(number).address, room or None)

    @rule(number=NUMBERS)
    def forget(self, number: int) -> None:
        known = endpoint(number).address in self.plain.held
        assert self.index.forget(endpoint(number).address) == known
        self.plain.forget(endpoint(number).address)

    @rule(stay=st.sets(NUMBERS))
    def keep(self, stay: set[int]) -> None:
        left = {endpoint(number).address: endpoint(number) for number in stay}
        self.index.keep(left)
        for address in self.plain.held.keys() - left:
            self.plain.forget(address)
        self.plain.rooms = {address: room for address, room in self.plain.rooms.items() if address in left}

    @invariant()
    def bounds_hold(self) -> None:
        index = self.index
        assert len(index) <= 40
        assert index.distinct <= len(index)
        assert all(len(holder) <= index.limit(address) for address, holder in index._holders.items())

    @invariant()
    def both_hold_the_same(self) -> None:
        index = self.index
        held = {address: list(each.blocks[each.first :]) for address, each in index._holders.items()}
        assert held == self.plain.held
        assert index.held() == {address: len(blocks) for address, blocks in held.items()}
        assert {address: index.limit(address) for address in held} == {
            address: self.plain.limit(address) for address in held
        }

    @invariant()
    def the_table_is_what_the_holders_hold(self) -> None:
        masks: Counter[int] = Counter()
        for address, holder in self.index._holders.items():
            for block in self.plain.held[address]:
                masks[block] |= holder.has | (holder.used if block in self.plain.used[address] else 0)
        assert self.index._table == masks  # and nothing is left of those who are forgotten

    @invariant()
    def both_match_the_same(self) -> None:
        for family in range(4):
            for branch in (0, 3, 16):
                chain = [family * 100 + (place if place < branch else place + 50) for place in range(16)]
                assert dict(self.index.match(chain)) == self.plain.match(chain)


TestLearning = Learning.TestCase
TestLearning.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=30, unique=True), st.data())
def test_a_conversation_is_found_where_it_was_and_more_of_it_every_turn(chain: list[int], data: Any) -> None:
    index = PrefixIndex(RULE)
    known = 0
    while known < len(chain):
        found = index.match(chain).get(endpoint(1).address, 0)
        assert found == known
        known = data.draw(st.integers(known + 1, len(chain)))
        index.learn(chain[:known], endpoint(1))
    assert index.match(chain) == {endpoint(1).address: len(chain)}


# -- the bound on load ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("held", "in_flight", "left"),
    [
        ({}, [99, 0, 0], [1, 2, 3]),  # nobody holds any: load alone decides anyway
        ({"p1": 4}, [0, 0, 0], [1, 2, 3]),
        ({"p1": 4}, [14, 0, 0], [1, 2, 3]),  # 1.25 * 15 / 3 + 8 = 14.25
        ({"p1": 4}, [15, 0, 0], [2, 3]),  # 1.25 * 16 / 3 + 8 = 14.67
        ({"p1": 2}, [8, 0, 0], [2, 3]),  # 1.25 * 9 / 3 + 4 = 7.75
        ({"p1": 2}, [7, 0, 0], [1, 2, 3]),
        ({"p1": 4}, [50, 50, 50], [1, 2, 3]),
        ({"p1": 4}, [60, 60, 10], [1, 3]),  # 54.58 for one that holds nothing
    ],
)
def test_how_busy_the_holder_of_a_prompt_may_be(
    held: dict[str, int], in_flight: list[int], left: list[int]
) -> None:
    candidates = [candidate(number, count) for number, count in enumerate(in_flight, 1)]
    stay = PrefixLoadFilter(taught(**held)).filter(asking(blocks(4)), candidates)
    assert [each.endpoint.name for each in stay] == [f"pod-{number}" for number in left]


@given(
    st.lists(st.tuples(st.integers(0, 200), st.integers(0, 8)), min_size=1, max_size=8),
    st.sampled_from([1.01, 1.25, 3.0]),
)
def test_the_idlest_always_stays(rows: list[tuple[int, int]], bound: float) -> None:
    index = taught(**{f"p{number}": count for number, (_, count) in enumerate(rows, 1)})
    candidates = [candidate(number, count) for number, (count, _) in enumerate(rows, 1)]
    stay = PrefixLoadFilter(index, bound).filter(asking(blocks(8)), candidates)
    idlest = min(count for count, _ in rows)
    assert {number for number, each in enumerate(candidates) if each.in_flight == idlest} <= {
        candidates.index(each) for each in stay
    }


# -- the policy ----------------------------------------------------------------------------------------------------


def director(
    count: int = 3,
    in_flight: Mapping[str, int] | None = None,
    states: Mapping[str, EngineState] | None = None,
    policy: str = "prefix-cache",
    fairness: Fairness | None = None,
) -> Director:
    loads = {} if in_flight is None else in_flight
    made = Director(
        profiles=registry.build(registry.Tuning(prefix_rule=RULE)),
        rules=RoutingRules(policy=policy),
        in_flight=lambda address: loads.get(address, 0),
        states={} if states is None else states,
        rng=random.Random(1),
        fairness=fairness,
    )
    made.update(Snapshot([endpoint(number) for number in range(1, count + 1)]))
    return made


def test_a_conversation_stays_where_it_began() -> None:
    made = director(8)
    first = made.schedule(asking(blocks(3)), 0.0)
    assert (first.decided_by, first.chosen.prefix_match) == ("prefix-cache", 0.0)
    for turn in range(4, 20):
        decision = made.schedule(asking(blocks(turn)), 0.0)
        assert decision.chosen.endpoint == first.chosen.endpoint
        assert decision.chosen.prefix_match == (turn - 1) / turn
        (scores,) = decision.scores
        assert scores.scorer == "prefix-cache"
        assert sorted(scores.values) == [0.0] * 7 + [(turn - 1) / turn]


@pytest.mark.parametrize(
    "policy", ["prefix-cache", "prefix-cache:9,least-request", "prefix-cache-scorer:9,session-affinity"]
)
def test_a_popular_prompt_spreads_before_a_pod_melts(policy: str) -> None:
    loads: Counter[str] = Counter()
    made = director(4, loads, policy=policy)
    for _ in range(80):
        loads[made.schedule(asking(blocks(8)), 0.0).chosen.endpoint.address] += 1
    assert len(loads) == 3  # as few as hold the prompt within the bound
    assert max(loads.values()) <= 1.25 * 80 / 4 + 8


def test_prompts_with_nothing_in_common_go_as_by_least_request() -> None:
    loads: Counter[str] = Counter()
    made = director(4, loads)
    for number in range(80):
        decision = made.schedule(asking(blocks(8, f"{number:016d}" + TEXT)), 0.0)
        loads[decision.chosen.endpoint.address] += 1
        assert decision.filtered == ()
    assert set(loads.values()) == {20}


def test_explaining_teaches_nothing() -> None:
    made = director()
    assert made.explain(asking(blocks(4)), 0.0).decided_by == "prefix-cache"
    assert made.schedule(asking(blocks(4)), 0.0).chosen.prefix_match == 0.0
    rows = made.explain(asking(blocks(4)), 0.0).endpoints
    assert [row.scores["prefix-cache"] for row in rows] == [1.0, 0.0, 0.0]


def test_of_a_prompt_that_is_only_a_key_no_match_is_told() -> None:
    made = director()
    made.schedule(asking(blocks(4)), 0.0)
    request = asking(blocks(4), policy="bounded-load")
    decision = made.schedule(request, 0.0)
    assert (decision.decided_by, decision.chosen.prefix_match) == ("bounded-load", None)
    mixed = made.schedule(asking(blocks(4), policy="bounded-load,prefix-cache:9"), 0.0)
    assert mixed.chosen.prefix_match == 1.0


def test_other_policies_read_no_prompt() -> None:
    made = director()
    request = asking(blocks(4), policy="least-request")
    decision = made.schedule(request, 0.0)
    assert request.prompt is not None
    assert not request.prompt.was_read
    assert decision.chosen.prefix_match is None
    assert made.decisions[-1][1] == SchedulingRequest(
        model=MODEL, policy="least-request"
    )  # the text is let go


def test_without_a_prompt_load_decides() -> None:
    decision = director(in_flight={endpoint(1).address: 1}).schedule(SchedulingRequest(model=MODEL), 0.0)
    assert (decision.decided_by, decision.fallback_reason) == ("least-request", "no-prompt")
    assert decision.chosen.endpoint != endpoint(1)


@pytest.mark.parametrize("end", ["left", "refused", "restarted"])
def test_what_is_gone_is_forgotten(end: str) -> None:
    stats = EngineStats(at=0.0, running=1.0)
    states = {endpoint(number).address: EngineState(stats=stats) for number in (1, 2, 3)}
    made = director(states=states)
    first = made.schedule(asking(blocks(4)), 0.0).chosen.endpoint
    held = made._profiles.prefixes
    assert len(held) == 4
    if end == "left":
        made.update(Snapshot([endpoint(number) for number in (1, 2, 3) if endpoint(number) != first]))
    else:
        states[first.address] = EngineState(
            stats=msgspec.structs.replace(stats, life=int(end == "restarted")), reachable=end != "refused"
        )
        made.schedule(SchedulingRequest(model=MODEL), 3.0)
    assert (len(held), held.distinct) == (0, 0)


@pytest.mark.parametrize(
    ("policy", "knows"),
    [
        ("prefix-cache", True),
        ("prefix-cache:1,least-request:1", True),
        ("bounded-load", False),
        ("least-request", False),
    ],
)
def test_after_a_retry_the_next_turn_goes_to_the_pod_that_served(policy: str, knows: bool) -> None:
    made = director()
    first = made.schedule(asking(blocks(4), policy=policy), 0.0)
    assert (first.ticket is not None) == (first.chosen.prefix_match is not None) == knows
    served = next(each for each in made.snapshot.endpoints if each != first.chosen.endpoint)
    made._prompts.finished(
        report(routing=routing_of(first), served_by=served, served_address=served.address, attempts=2)
    )
    held = made._profiles.prefixes.held()
    assert held == ({first.chosen.endpoint.address: 0, served.address: 4} if knows else {})
    again = made.schedule(asking(blocks(5)), 0.0).chosen
    assert again.prefix_match == (0.8 if knows else 0.0)
    assert again.endpoint == served or not knows


def test_a_prompt_too_short_for_a_block_has_no_ticket() -> None:
    decision = director().schedule(asking("short"), 0.0)
    assert (decision.ticket, decision.chosen.prefix_match) == (None, None)


def test_a_user_and_a_prompt_have_one_ticket() -> None:
    fairness = Fairness(FairnessRules(), name="me", clock=lambda: 0.0)
    made = director(fairness=fairness)
    request = msgspec.structs.replace(asking(blocks(4), policy="prefix-cache,vtc-basic"), user="ann")
    decision = made.schedule(request, 0.0)
    assert decision.ticket == "me-1"
    fairness.finished(report(routing=routing_of(decision), usage=Usage(prompt_tokens=10)))
    assert fairness.standing("ann", 0.0).own == 10.0
    assert len(made._prompts) == 1
    made._prompts.finished(report(routing=routing_of(decision)))
    assert len(made._prompts) == 0


def test_an_endpoint_is_remembered_as_far_as_its_engine_has_room() -> None:
    small = EngineState(stats=EngineStats(at=0.0, kv_cache_tokens=6.0))
    made = director(1, states={endpoint(1).address: small})
    for _ in range(2):
        made.schedule(asking(blocks(8)), 0.0)
    assert made._profiles.prefixes.held() == {endpoint(1).address: 3}
    assert made.schedule(asking(blocks(8)), 0.0).chosen.prefix_match == 3 / 8


def test_in_a_mixture_a_small_match_counts_little() -> None:
    made = director(2, {endpoint(1).address: 1})
    made._profiles.prefixes.learn(made._profiles.prefixes.blocks(asking(blocks(1))), endpoint(1))
    mixture = "prefix-cache:1,least-request:1"
    decision = made.schedule(asking(blocks(20), policy=mixture), 0.0)
    assert [each.values for each in decision.scores] == [(0.05, 0.0), (0.0, 1.0)]
    assert decision.chosen.endpoint == endpoint(2)


def test_the_match_is_told_in_the_load_report() -> None:
    made = director()
    made.schedule(asking(blocks(4)), 0.0)
    chosen = made.schedule(asking(blocks(8)), 0.0).chosen
    assert orca.fields(chosen)["named_metrics.prefix_match_ratio"] == 0.5
    assert "named_metrics.prefix_match_ratio" not in orca.fields(candidate(1))


CANDIDATES = st.lists(st.tuples(st.integers(0, 30), st.booleans()), min_size=1, max_size=14).map(
    lambda rows: [
        candidate(number, count, reachable=reachable) for number, (count, reachable) in enumerate(rows)
    ]
)


@given(
    CANDIDATES, st.lists(st.tuples(st.integers(0, 15), st.integers(0, 20)), max_size=10), st.integers(0, 20)
)
def test_what_holds_of_every_decision(
    candidates: list[Candidate], history: Sequence[tuple[int, int]], length: int
) -> None:
    policies = registry.build(registry.Tuning(prefix_rule=RULE))
    for number, count in history:
        policies.prefixes.learn(policies.prefixes.blocks(asking(blocks(count))), endpoint(number))
    decision = policies["prefix-cache"].run(asking(blocks(length)), candidates, random.Random(1))
    assert any(decision.chosen is each for each in candidates)
    assert {each.address for each in decision.order} <= {
        each.endpoint.address for each in decision.candidates
    }
    for scores in decision.scores:
        assert len(scores.values) == len(decision.candidates)
        assert all(0 <= value <= 1 for value in scores.values)
    if any(each.reachable for each in candidates):
        assert decision.chosen.reachable


def test_many_candidates_are_ordered_like_few() -> None:
    """Only the first ten of an order are ever tried, so only they are put in order."""
    rng = random.Random(3)
    picker = MaxScorePicker()
    for _ in range(200):
        many = [candidate(number, rng.randint(0, 3)) for number in range(40)]
        scores = [rng.choice([0.0, 0.5, 1.0]) for _ in many]
        picked = picker.pick(SchedulingRequest(), many, scores, rng)
        rank = {id(each): (-score, each.in_flight) for each, score in zip(many, scores, strict=True)}
        assert [rank[id(each)] for each in picked] == sorted(rank.values())[:10]
        assert len({id(each) for each in picked}) == 10


def test_of_many_equals_each_is_as_likely() -> None:
    rng, picks = random.Random(5), Counter[str]()
    many = [candidate(number, 1 if number < 20 else 2) for number in range(25)]
    for _ in range(4000):
        picks[MaxScorePicker().pick(SchedulingRequest(), many, [1.0] * 25, rng)[0].endpoint.name] += 1
    assert len(picks) == 20
    assert sum((count - 200) ** 2 / 200 for count in picks.values()) < 43.8  # 19 degrees of freedom, 0.1 %


def test_both_names_share_what_is_known() -> None:
    made = director()
    chosen = made.schedule(asking(blocks(4)), 0.0).chosen.endpoint
    again = made.schedule(asking(blocks(4), policy="prefix-cache-scorer"), 0.0)
    assert (again.policy, again.chosen.endpoint, again.chosen.prefix_match) == (
        "prefix-cache-scorer",
        chosen,
        1.0,
    )


def test_endpoints_of_one_name_at_two_addresses_are_two() -> None:
    index = PrefixIndex(RULE)
    one, two = (Endpoint(name="pod", address=f"10.0.0.1:{port}", models=(MODEL,)) for port in (1, 2))
    index.learn([1], one)
    assert index.match([1]) == {one.address: 1}
    index.learn([1], two)
    assert index.match([1]) == {one.address: 1, two.address: 1}
