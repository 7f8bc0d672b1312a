"""Sessions: read and told, followed where they can be, in both lanes."""

from __future__ import annotations

import base64
import random
from collections import Counter
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from envoy_extproc.exchange.commands import Continue
from envoy_extproc.exchange.events import Scheduled
from envoy_extproc.exchange.states import ExchangeSettings
from envoy_extproc.scheduling import hashing, registry, session
from envoy_extproc.scheduling.interfaces import Candidate, Decision, MissingDataError, SchedulingRequest
from envoy_extproc.scheduling.session import SessionAffinityScorer
from tests.support.builders import MODEL, candidate, endpoint
from tests.support.lua import STREAM, Script
from tests.support.playbook import Playbook, asked, handover, reply

pytestmark = pytest.mark.unmeasured

REQUEST = SchedulingRequest(model=MODEL)
THREE = [candidate(1), candidate(2, 5), candidate(3, 9)]
BODY = b'{"model":"llama-3-8b","stream":true}'


def of(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def decided(policy: str, candidates: Sequence[Candidate] = THREE, **known: object) -> Decision:
    request = SchedulingRequest(model=MODEL, **known)  # type: ignore[arg-type]  # fields by name
    return registry.build().find(policy).run(request, candidates, random.Random(1))


# -- what a client writes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "address"),
    [
        (of("10.0.0.1:8000"), "10.0.0.1:8000"),
        (of("[2001:db8::1]:8000"), "[2001:db8::1]:8000"),
        ("", None),
        ("not base64", None),
        ("MTA", None),  # its padding is missing
        (of("\u00e9"), None),
        (base64.b64encode(b"\xff\xfe").decode(), None),
        ("\udcff", None),
        (of("x" * 96), "x" * 96),
        (of("x" * 97), None),
    ],
)
def test_a_session_is_an_address_in_base64(written: str, address: str | None) -> None:
    assert session.address(written) == address


def test_a_session_is_written_as_it_is_read() -> None:
    for address in ("10.0.0.1:8000", "[2001:db8:1:2:3:4:5:6]:65535"):
        assert session.address(session.token(address)) == address
    assert session.token("10.0.0.1:8000") == "MTAuMC4wLjE6ODAwMA=="


@given(st.text(max_size=200))
def test_no_text_harms(text: str) -> None:
    session.address(text)
    assert len(hashing.key(text)) <= 256


@pytest.mark.parametrize(
    ("written", "key"), [("abc", b"abc"), ("x" * 256, b"x" * 256), ("\udcff", b"\xed\xb3\xbf")]
)
def test_a_key_is_what_a_client_wrote(written: str, key: bytes) -> None:
    assert hashing.key(written) == key


def test_a_long_name_is_remembered_by_its_digest() -> None:
    assert hashing.name("\u00e9" * 256) == "\u00e9" * 256
    assert len(hashing.name("x" * 257)) == 128
    assert hashing.name("x" * 257) != hashing.name("x" * 258)


def test_a_long_key_is_hashed_first() -> None:
    long, other = hashing.key("x" * 257), hashing.key("x" * 257 + "y")
    assert len(long) == len(other) == 64
    assert long != other


# -- who is chosen -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_session_stays_whatever_the_load(number: int) -> None:
    decision = decided("session-affinity", session=f"10.0.0.{number}:8000", session_key=b"other")
    assert decision.chosen.endpoint.name == f"pod-{number}"
    assert decision.scores[0].values == tuple(float(number == place) for place in (1, 2, 3))


@pytest.mark.parametrize("gone", ["10.9.9.9:8000", "10.0.0.1:22", "10.0.0.1", "evil.example:80", "\n"])
def test_an_address_that_is_no_candidate_counts_for_nothing(gone: str) -> None:
    decision = decided("session-affinity", session=gone)
    assert (decision.decided_by, decision.fallback_reason) == ("least-request", "session-gone")
    assert decision.chosen.endpoint.name == "pod-1"
    keyed = decided("session-affinity", session=gone, session_key=b"k")
    assert keyed.order == decided("session-affinity", session_key=b"k").order


def test_a_pod_that_is_unreachable_loses_its_sessions() -> None:
    candidates = [candidate(1), candidate(2, reachable=False)]
    decision = decided("session-affinity", candidates, session="10.0.0.2:8000")
    assert decision.chosen.endpoint.name == "pod-1"


def test_without_a_session_it_says_so() -> None:
    with pytest.raises(MissingDataError) as missing:
        SessionAffinityScorer().score(REQUEST, THREE)
    assert missing.value.reason == "no-session"
    decision = decided("session-affinity")
    assert (decision.decided_by, decision.fallback_reason) == ("least-request", "no-session")


@pytest.mark.parametrize(
    ("policy", "at", "chosen"),
    [
        ("session-affinity:2,least-request:1", "10.0.0.3:8000", "pod-3"),
        ("session-affinity:1,least-request:2", "10.0.0.3:8000", "pod-1"),
        ("session-affinity:9,least-request:1", None, "pod-1"),
    ],
)
def test_in_a_mixture(policy: str, at: str | None, chosen: str) -> None:
    assert decided(policy, session=at).chosen.endpoint.name == chosen


# -- rendezvous hashing --------------------------------------------------------------------------------------------

MANY = [candidate(number) for number in range(1, 11)]


def home(key: str, candidates: Sequence[Candidate]) -> str:
    return decided("session-affinity", candidates, session_key=key.encode()).chosen.endpoint.name


def test_a_key_has_the_same_home_on_every_server_for_ever() -> None:
    assert [home(f"session-{number}", MANY) for number in range(6)] == HOMES
    assert [home(f"session-{number}", MANY[::-1]) for number in range(6)] == HOMES


HOMES = ["pod-1", "pod-5", "pod-6", "pod-5", "pod-3", "pod-2"]


def test_keys_spread_evenly() -> None:
    count = Counter(home(str(number), MANY) for number in range(2000))
    assert len(count) == 10
    assert all(140 < each < 260 for each in count.values())  # 200 each, standard deviation 13


def test_only_the_keys_of_a_pod_that_leaves_move() -> None:
    before = {str(number): home(str(number), MANY) for number in range(300)}
    after = {key: home(key, MANY[1:]) for key in before}
    assert {key for key in before if before[key] != after[key]} == {
        key for key in before if before[key] == "pod-1"
    }


def test_weights_are_of_the_key_and_the_address_apart() -> None:
    def weight(key: bytes, address: str) -> float:
        one = Candidate(msgspec.structs.replace(endpoint(1), address=address))
        return hashing.weights(key, [one])[0]

    assert weight(b"a", "b") != weight(b"ab", "")
    assert 0 <= weight(b"", "") <= 1


# -- in an exchange ------------------------------------------------------------------------------------------------


def test_what_the_headers_let_choosing_know() -> None:
    book = Playbook(ExchangeSettings(trust_user=True))
    book.request(user="ann", x_session_id=of("10.0.0.2:8000"), x_aibrix_session_key="k" * 300)
    request = asked(book.body(BODY))
    assert (request.user, request.session) == ("ann", "10.0.0.2:8000")
    assert request.session_key == hashing.key("k" * 300)
    book = Playbook()
    book.request(user="nobody asked", x_session_id="nonsense", x_aibrix_session_key="")
    request = asked(book.body(BODY))
    assert (request.user, request.session, request.session_key) == (None, None, None)


def routed(policy: str, *, native: bool = False) -> tuple[Playbook, Continue]:
    book = Playbook(native=native)
    book.request()
    asked(book.body(BODY))
    return book, reply(book.receive(Scheduled(book.now(), decided(policy, session="10.0.0.2:8000"))))


@pytest.mark.parametrize("policy", ["session-affinity", "least-request:9,session-affinity"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_answer_names_the_session_of_who_served(policy: str, number: int) -> None:
    book, _ = routed(policy)
    served = f"10.0.0.{number}:8000"
    (*_, answer) = book.answer(upstream=served)
    assert isinstance(answer, Continue)
    assert dict(answer.set_headers)["x-session-id"] == of(served)


def test_other_policies_leave_sessions_alone() -> None:
    book, _ = routed("least-request")
    assert "x-session-id" not in dict(reply(book.answer()).set_headers)
    _, handed = routed("least-request", native=True)
    assert handover(handed).sessions == ()


def test_a_session_begins_where_there_was_none() -> None:
    book = Playbook()
    book.request()
    asked(book.body(BODY))
    book.receive(Scheduled(book.now(), decided("session-affinity")))
    assert dict(reply(book.answer()).set_headers)["x-session-id"] == of("10.0.0.1:8000")


@pytest.mark.parametrize("upstream", [None, "10.9.9.9:1"])
def test_nobody_is_told_a_session_of_a_pod_that_is_not_ours(upstream: str | None) -> None:
    book, _ = routed("session-affinity")
    (*_, answer) = book.answer(upstream=upstream)
    assert isinstance(answer, Continue)
    assert "x-session-id" not in dict(answer.set_headers)


def test_in_the_native_lane_the_script_tells_it() -> None:
    _, handed = routed("session-affinity", native=True)
    sessions = handover(handed).sessions
    assert sessions == tuple((f"10.0.0.{number}:8000", of(f"10.0.0.{number}:8000")) for number in (2, 1, 3))


@pytest.mark.parametrize(
    ("served", "told"),
    [("10.0.0.2:8000", "two"), ("10.0.0.1:8000", "one"), ("10.0.0.2:800", None), (None, None)],
)
def test_the_script_finds_the_session_of_who_served(served: str | None, told: str | None) -> None:
    sent = {} if served is None else {"x-envoy-extproc-served": served}
    lines = "10.0.0.1:8000 one\n10.0.0.2:8000 two"
    answer = Script().respond([b"data: [DONE]\n\n"], headers={**STREAM, **sent}, sessions=lines)
    assert answer.headers.get("x-session-id") == told


def test_the_script_sets_what_it_is_given_besides() -> None:
    extras = "x-aibrix-config-profile long prompts\nprefill-target-pod pod-3"
    answer = Script().respond([b"data: [DONE]\n\n"], extras=extras)
    assert answer.headers["x-aibrix-config-profile"] == "long prompts"
    assert answer.headers["prefill-target-pod"] == "pod-3"
