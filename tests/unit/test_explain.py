"""Why a request goes where it does: the rows and sentences of an explanation, and questions asked by hand."""

from __future__ import annotations

import asyncio
import base64
import random
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from envoy_extproc import mixes
from envoy_extproc.endpoints import Endpoint, EngineState, EngineStats, Snapshot
from envoy_extproc.errors import BadRequest
from envoy_extproc.scheduling import registry
from envoy_extproc.scheduling.explain import Asked, Explanation, explain
from envoy_extproc.scheduling.interfaces import Candidate, SchedulingRequest
from envoy_extproc.server import explaining
from envoy_extproc.server.director import Director, RoutingRules
from envoy_extproc.server.explaining import Question, QuestionError
from tests.support.builders import MODEL, candidate, endpoint

REQUEST = SchedulingRequest(model=MODEL)
DEFAULT = Asked("least-request", "routing")


def explained(
    policy: str,
    candidates: Sequence[Candidate],
    asked: Asked = DEFAULT,
    *,
    left_out: dict[str, str] | None = None,
    others: Sequence[Candidate] = (),
) -> Explanation:
    decision = registry.build().find(policy).run(REQUEST, candidates, random.Random(1))
    return explain(decision, asked, [*others, *candidates], model=MODEL, left_out=left_out or {})


def explained_by_seed(policy: str, candidates: Sequence[Candidate], seed: int) -> str:
    """Why the chosen one."""
    decision = registry.build().find(policy).run(REQUEST, candidates, random.Random(seed))
    return explain(decision, DEFAULT, candidates, model=MODEL).because[-1]


def test_every_candidate_has_its_row() -> None:
    told = explained(
        "least-kv-cache:3,least-request:1",
        [candidate(1, 4, kv=0.2), candidate(2, 0, kv=0.6), candidate(3, 0, kv=0.1, reachable=False)],
        others=[candidate(4)],
        left_out={"10.0.0.4:8000": "external-filter"},
    )
    rows = [(row.name, row.place, row.left_out, row.scores, row.total) for row in told.endpoints]
    assert rows == [
        ("pod-1", 1, None, {"least-kv-cache": 1.0, "least-request": 0.0}, 0.75),
        ("pod-2", 2, None, {"least-kv-cache": 0.0, "least-request": 1.0}, 0.25),
        ("pod-3", None, "reachable", {}, None),
        ("pod-4", None, "external-filter", {}, None),
    ]
    assert told.weights == {"least-kv-cache": 3.0, "least-request": 1.0}
    assert (told.chosen, told.order) == ("pod-1", ("pod-1", "pod-2", "pod-1"))
    assert told.endpoints[0].stats == EngineStats(at=0.0, kv_cache_usage=0.2)
    assert told.because == (
        "The policy is least-kv-cache:3,least-request:1, from routing.policy in the configuration.",
        "Left out by external-filter: pod-4.",
        "Left out by reachable: pod-3.",
        "pod-1 has the best total, 0.750.",
    )


@pytest.mark.parametrize(
    ("policy", "candidates", "last"),
    [
        ("least-request", [candidate(1)], "pod-1 is the only one left."),
        ("round-robin", [candidate(1), candidate(2)], "round-robin picks pod-1; it does not score."),
        (
            "least-kv-cache",
            [candidate(1, 3, kv=0.5), candidate(2, 1, kv=0.5), candidate(3, 0, kv=0.6)],
            "2 endpoints have the best total, 0.500; pod-2 is chosen for having the fewest exchanges.",
        ),
    ],
)
def test_why_the_chosen_one(policy: str, candidates: list[Candidate], last: str) -> None:
    assert explained(policy, candidates).because[-1] == last


def test_chance_is_called_chance() -> None:
    told = explained("least-request", [candidate(1), candidate(2)])
    assert told.because[-1].startswith("2 endpoints have the best total, 1.000; pod-")
    assert told.because[-1].endswith(" is chosen by chance.")


def test_who_is_drawn_by_its_total_need_not_have_the_best() -> None:
    candidates = [candidate(1, kv=0.7), candidate(2, kv=0.4), candidate(3, kv=0.9)]
    last = {
        explained_by_seed("kv-cache-utilization-scorer,weighted-random-picker", candidates, seed)
        for seed in range(60)
    }
    assert last == {
        "pod-1 is drawn by its total, 0.300 of 1.000 that all have.",
        "pod-2 is drawn by its total, 0.600 of 1.000 that all have.",
        "pod-3 is drawn by its total, 0.100 of 1.000 that all have.",
    }
    full = [candidate(1, kv=1.0), candidate(2, kv=1.0)]
    last = {
        explained_by_seed("kv-cache-utilization-scorer,weighted-random-picker", full, seed)
        for seed in range(60)
    }
    assert last == {
        "2 endpoints have the best total, 0.000; pod-1 is chosen by chance.",
        "2 endpoints have the best total, 0.000; pod-2 is chosen by chance.",
    }


def test_a_scorer_under_two_names_weighs_what_both_do() -> None:
    told = explained(
        "least-gpu-cache:1,least-kv-cache:3,least-request:4", [candidate(1, kv=0.2), candidate(2, kv=0.6)]
    )
    assert told.weights == {"least-kv-cache": 4.0, "least-request": 4.0}
    assert [(row.scores, row.total) for row in told.endpoints] == [
        ({"least-kv-cache": 1.0, "least-request": 1.0}, 1.0),
        ({"least-kv-cache": 0.0, "least-request": 1.0}, 0.5),
    ]


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (
            Asked("random", "locked"),
            "The policy is least-request, from the model's own policy in the configuration, which is locked.",
        ),
        (Asked("random", "header"), "The policy is least-request, from the header routing-strategy."),
        (
            Asked("random", "model"),
            "The policy is least-request, from the model's own policy in the configuration.",
        ),
        (Asked("random", "routing", "b\udcff" * 99), "The client asked for 'b\\udcff"),
    ],
)
def test_where_the_policy_comes_from(asked: Asked, sentence: str) -> None:
    told = explained("least-request", [candidate(1)], asked)
    said = told.because[1 if asked.overruled else 0]
    assert said.startswith(sentence)
    assert len(said) < 600
    msgspec.json.encode(told)


def test_what_was_missing_is_said() -> None:
    fallen = explained("least-kv-cache", [candidate(1), candidate(2, 1)])
    assert (fallen.policy, fallen.decided_by, fallen.missing) == (
        "least-kv-cache",
        "least-request",
        ("least-kv-cache",),
    )
    assert "It was least-request that decided: no engine tells" in fallen.because[1]
    partly = explained("least-latency,least-request", [candidate(1), candidate(2, 1)])
    assert partly.because[1] == "Left out of the mixture, for want of data: least-latency."


@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.none() | st.floats(0, 1), st.booleans()), min_size=1, max_size=6
    ),
    st.sampled_from([*sorted(set(registry.POLICIES) - mixes.ALONE), "least-kv-cache:2,least-request"]),
)
def test_an_explanation_is_json_and_tells_of_everybody(
    rows: list[tuple[int, float | None, bool]], policy: str
) -> None:
    candidates = [candidate(n, sent, kv=kv, reachable=ok) for n, (sent, kv, ok) in enumerate(rows)]
    told = explained(policy, candidates)
    assert {row.name for row in told.endpoints} == {each.endpoint.name for each in candidates}
    assert told.endpoints[0].name == told.chosen
    assert all((row.left_out is None) or row.place is None for row in told.endpoints)
    assert msgspec.json.decode(msgspec.json.encode(told), type=Explanation) == told


# -- questions -----------------------------------------------------------------------------------------------------

BODY = b'{"model": "llama-3-8b", "max_tokens": 7, "messages": [{"role": "user", "content": "hello there"}]}'


@pytest.mark.parametrize(
    ("question", "request_"),
    [
        (Question(), SchedulingRequest()),
        (Question(path="/v1/rare", headers=(("X-Model", "m"),), body=b"..."), SchedulingRequest(model="m")),
        (
            Question(path="/health", headers=(("External-Filter", "gpu=a10"), ("target-pod-ip", "10.0.0.1"))),
            SchedulingRequest(selector="gpu=a10", pin="10.0.0.1"),
        ),
        (
            Question(headers=(("routing-strategy", "random"),), body=BODY),
            SchedulingRequest(model=MODEL, policy="random", max_output_tokens=7),
        ),
    ],
)
def test_a_question_is_read_as_an_exchange_reads_it(question: Question, request_: SchedulingRequest) -> None:
    read = explaining.read(question)
    assert msgspec.structs.replace(read, prompt_tokens=0, prompt=None) == request_
    assert (read.prompt_tokens > 0) is (read.prompt is not None) is (question.body == BODY)


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (Question(body=b"{}"), "model"),
        (Question(body=b"{"), "JSON"),
        (Question(headers=(("content-encoding", "gzip"),), body=BODY), "content-encoding"),
    ],
)
def test_a_body_nobody_can_read(question: Question, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        explaining.read(question)


@pytest.mark.parametrize(
    ("text", "question"),
    [
        (b"{}", Question()),
        (b'{"path": "/v1/completions"}', Question(path="/v1/completions")),
        (b'{"headers": {"A": "b"}}', Question(headers=(("A", "b"),))),
        (b'{"headers": [["A", "b"], ["A", "c"]]}', Question(headers=(("A", "b"), ("A", "c")))),
        (b'{"body": {"model":  "m"}}', Question(body=b'{"model":  "m"}')),
        (b'{"body": "{\\"model\\": \\"m\\"}"}', Question(body=b'{"model": "m"}')),
        (b'{"body_base64": "/w=="}', Question(body=b"\xff")),
    ],
)
def test_how_questions_are_written(text: bytes, question: Question) -> None:
    assert explaining.decode(text) == question
    assert explaining.decode(explaining.encode(question)) == question


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"{",
        b'{"nope": 1}',
        b'{"path": 1}',
        b'{"headers": [["a"]]}',
        b'{"body_base64": "?"}',
        b"\xff",
    ],
)
def test_what_is_no_question(text: bytes) -> None:
    with pytest.raises(QuestionError):
        explaining.decode(text)


@given(st.binary(max_size=60) | st.builds(lambda body: b'{"body": ' + body + b"}", st.binary(max_size=40)))
def test_any_bytes_are_a_question_or_a_refusal(text: bytes) -> None:
    try:
        question = explaining.decode(text)
    except QuestionError:
        return
    answer = asyncio.run(explaining.answer(question, director().explain_at_zero))
    assert answer.status in (200, 400, 404)


class _Director(Director):
    def explain_at_zero(self, request: SchedulingRequest) -> Explanation:
        return self.explain(request, 0.0)


def director(**rules: Any) -> _Director:
    made = _Director(
        profiles=registry.build(),
        rules=RoutingRules(**rules),
        in_flight=lambda _: 0,
        states={"10.0.0.1:8000": EngineState()},
        rng=random.Random(1),
    )
    made.update(Snapshot([endpoint(1), Endpoint(name="six", address="[fd00::1]:8000", models=("other",))]))
    return made


@pytest.mark.parametrize(
    ("question", "status", "code", "headers"),
    [
        (Question(body=BODY), 200, None, {}),
        (
            Question(body=b'{"model": "none"}'),
            404,
            "model_not_found",
            {"x-error-no-model-backends": "true"},
        ),
        (
            Question(headers=(("routing-strategy", "best"),), body=BODY),
            400,
            None,
            {"x-error-routing": "true"},
        ),
        (
            Question(headers=(("external-filter", "gpu"),), body=BODY),
            503,
            "service_unavailable",
            {"retry-after": "1", "x-error-no-model-backends": "true"},
        ),
    ],
)
def test_a_refusal_is_what_the_client_would_get(
    question: Question, status: int, code: str | None, headers: dict[str, str]
) -> None:
    answer = asyncio.run(explaining.answer(question, director().explain_at_zero))
    assert (answer.status, dict(answer.headers)) == (status, headers)
    if status == 200:
        assert msgspec.json.decode(answer.body)["chosen"] == "pod-1"
    else:
        assert answer.explanation is None
        assert msgspec.json.decode(answer.body)["error"]["code"] == code


def test_base64_carries_any_bytes() -> None:
    body = bytes(range(256))
    sent = msgspec.json.decode(explaining.encode(Question(body=body)))
    assert base64.b64decode(sent["body_base64"]) == body


@pytest.mark.parametrize(("trusted", "user"), [(True, "ann"), (False, None)])
@pytest.mark.parametrize("body", [b"", b'{"model":"m"}'])
def test_the_user_counts_where_it_counts_for_requests(trusted: bool, user: str | None, body: bytes) -> None:
    question = explaining.Question(headers=(("user", "ann"),), body=body)
    assert explaining.read(question, trust_user=trusted).user == user
