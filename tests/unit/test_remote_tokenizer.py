"""Counting by somebody else: what is asked of whom, every way an answer can fail, and who is left alone for it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest

from envoy_extproc.endpoints import Endpoint
from envoy_extproc.openai.prompt import Prompt
from envoy_extproc.openai.request import estimate_tokens
from envoy_extproc.openai.routes import Turns
from envoy_extproc.openai.tokenize import Form
from envoy_extproc.scheduling.interfaces import SchedulingRequest
from envoy_extproc.simulation.stack import free_port
from envoy_extproc.tokens.counting import Uncounted
from envoy_extproc.tokens.remote import OneTarget, PodTargets, RemoteRules, RemoteTokenizer, Rests, Targets
from tests.support.builders import MODEL
from tests.support.gateway import eventually
from tests.support.tokenizer import Tokenizer, counted, tokenizer

PATIENT = RemoteRules(timeout=30.0)


@dataclass
class Clock:
    """Seconds that pass when a test says so."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def request(text: str = "hello there", *, model: str = MODEL, **more: Any) -> SchedulingRequest:
    raw = json.dumps([{"role": "user", "content": text}]).encode()
    made = {
        "prompt_tokens": estimate_tokens(raw),
        "prompt": Prompt({"messages": msgspec.Raw(raw)}, turns=Turns.CHAT),
    }
    return SchedulingRequest(model=model, **{**made, **more})


COUNT = len(counted({"messages": [{"content": "hello there"}]})["tokens"])


@asynccontextmanager
async def asking(
    targets: Targets, rules: RemoteRules = PATIENT, clock: Callable[[], float] | None = None
) -> AsyncIterator[RemoteTokenizer]:
    made = RemoteTokenizer(rules, targets, clock=clock or Clock())
    await made.open()
    try:
        yield made
        assert made.under_way == 0
    finally:
        await made.close()


async def reason(made: RemoteTokenizer, asked: SchedulingRequest | None = None) -> str:
    with pytest.raises(Uncounted) as refused:
        await made.count(asked or request())
    return refused.value.reason


def pod(number: int, asked: Tokenizer | None = None, engine: str = "vllm") -> Endpoint:
    address = f"10.0.0.{number}:8000" if asked is None else asked.address
    return Endpoint(name=f"pod-{number}", address=address, models=(MODEL,), engine=engine)


def pods(
    *endpoints: Endpoint,
    form: Form | None = Form.MESSAGES,
    ready: Callable[[Endpoint], bool] = lambda _: True,
) -> PodTargets:
    return PodTargets(lambda model: endpoints if model == MODEL else (), form=lambda _: form, ready=ready)


# -- what is asked -------------------------------------------------------------------------------------------------


async def test_a_tokenizer_of_its_own_is_asked_in_the_form_of_vllm() -> None:
    async with tokenizer() as there, asking(OneTarget(there.url)) as made:
        assert await made.count(request()) == COUNT
        ((headers, asked),) = there.requests
        assert asked == {"model": MODEL, "messages": [{"role": "user", "content": "hello there"}]}
        assert headers["content-type"] == "application/json"
        assert "authorization" not in headers


@pytest.mark.parametrize(
    ("form", "keys", "count"),
    [
        (Form.MESSAGES, {"model", "messages"}, 2 + 5 + 3),
        (Form.PROMPT, {"model", "prompt"}, 2 + 4 + 3),
        (Form.CONTENT, {"content", "add_special"}, 2 + 4 + 3),
    ],
)
async def test_a_pod_is_asked_in_the_form_of_its_engine(form: Form, keys: set[str], count: int) -> None:
    async with tokenizer() as there, asking(pods(pod(1, there), form=form)) as made:
        assert await made.count(request()) == count
        assert there.requests[0][1].keys() == keys


async def test_a_key_for_engines_goes_along() -> None:
    rules = msgspec.structs.replace(PATIENT, bearer_token="secret")
    async with tokenizer() as there, asking(OneTarget(there.url), rules) as made:
        await made.count(request())
        assert there.requests[0][0]["authorization"] == "Bearer secret"


async def test_pods_take_turns_and_one_connection_serves_many() -> None:
    async with tokenizer() as one, tokenizer() as two, asking(pods(pod(1, one), pod(2, two))) as made:
        for _ in range(10):
            await made.count(request())
        assert (len(one.requests), len(two.requests)) == (5, 5)


async def test_nothing_of_a_request_picks_who_is_asked() -> None:
    async with tokenizer() as there, tokenizer() as elsewhere, asking(pods(pod(1, there))) as made:
        asked = request(
            pin=elsewhere.address,
            subset=(elsewhere.address,),
            session=elsewhere.address,
            selector="x",
            profile=elsewhere.url,
        )
        assert await made.count(asked) == COUNT
        assert await reason(made, request(model=elsewhere.url)) == "no-pod"
        assert (len(there.requests), len(elsewhere.requests)) == (1, 0)


@pytest.mark.parametrize(
    ("endpoints", "form", "ready"),
    [((), Form.MESSAGES, True), ((pod(1),), None, True), ((pod(1), pod(2)), Form.MESSAGES, False)],
)
async def test_where_nobody_can_count(
    endpoints: tuple[Endpoint, ...], form: Form | None, ready: bool
) -> None:
    async with asking(pods(*endpoints, form=form, ready=lambda _: ready)) as made:
        assert await reason(made) == "no-pod"


async def test_only_ready_pods_are_asked() -> None:
    async with tokenizer() as there:
        ready = pod(2, there)
        async with asking(pods(pod(1), ready, pod(3), ready=lambda each: each is ready)) as made:
            for _ in range(4):
                assert await made.count(request()) == COUNT


async def test_ids_are_not_asked_about() -> None:
    prompt = Prompt({"prompt": msgspec.Raw(b"[1,2,3]")})
    async with tokenizer() as there, asking(OneTarget(there.url)) as made:
        assert await made.count(SchedulingRequest(model=MODEL, prompt=prompt)) == 3
        assert (
            await reason(made, SchedulingRequest(model=MODEL, prompt=Prompt({"prompt": msgspec.Raw(b"[]")})))
            == "no-text"
        )
        assert there.requests == []


@pytest.mark.parametrize(("length", "refused"), [(50, False), (5000, True)])
async def test_long_prompts_are_not_sent(length: int, refused: bool) -> None:
    rules = msgspec.structs.replace(PATIENT, max_prompt_bytes=1000)
    async with tokenizer() as there, asking(OneTarget(there.url), rules) as made:
        if refused:
            assert await reason(made, request("x" * length)) == "too-long"
            assert await reason(made, request("x" * length, prompt_tokens=1)) == "too-long"
        else:
            await made.count(request("x" * length))
        assert len(there.requests) == (0 if refused else 1)


# -- what comes back -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [201, 204, 301, 302, 307, 401, 403, 404, 405, 429, 500, 501, 503])
async def test_any_other_status_rests_who_gave_it(status: int) -> None:
    async with (
        tokenizer(status=status, headers={"location": "/tokenize"}) as there,
        asking(OneTarget(there.url)) as made,
    ):
        assert await reason(made) == "status"
        assert await reason(made) == "resting"
        assert len(there.requests) == 1  # nor was the redirect followed


@pytest.mark.parametrize("status", [400, 413, 422])
async def test_a_request_that_is_wrong_is_nobodys_fault(status: int) -> None:
    async with tokenizer(status=status) as there, asking(OneTarget(there.url)) as made:
        assert [await reason(made) for _ in range(3)] == ["status"] * 3


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"<html>",
        b"{}",
        b'{"count":-1}',
        b'{"count":"5"}',
        b'{"count":1e99}',
        b'{"count":99999999}',
        b"\xff",
        b'{"count":5',
    ],
)
async def test_garbage_is_no_count(body: bytes) -> None:
    async with tokenizer(body=body) as there, asking(OneTarget(there.url)) as made:
        assert await reason(made) == "unreadable"
        assert await reason(made) == "resting"


async def test_a_huge_answer_is_not_read_to_its_end() -> None:
    huge = b'{"count":5,"tokens":[' + b"1," * 20_000_000 + b"1]}"
    async with tokenizer(body=huge) as there, asking(OneTarget(there.url)) as made:
        assert await reason(made) == "unreadable"


async def test_the_answer_about_a_long_prompt_may_be_long() -> None:
    text = "a." * 100_000
    async with tokenizer() as there, asking(OneTarget(there.url)) as made:
        assert await made.count(request(text)) == 200_000 + 8


async def test_one_who_does_not_answer_in_time_is_left_alone() -> None:
    rules = msgspec.structs.replace(PATIENT, timeout=0.05)
    async with tokenizer(delay=30) as there, asking(OneTarget(there.url), rules) as made:
        assert await reason(made) == "timeout"
        assert await reason(made) == "resting"
        assert len(there.requests) == 1
        await eventually(lambda: there.gone == 1)


async def test_a_long_prompt_that_takes_long_is_no_failure() -> None:
    rules = msgspec.structs.replace(PATIENT, timeout=0.2)
    async with tokenizer(delay=30) as there, asking(OneTarget(there.url), rules) as made:
        assert await reason(made, request("hello " * 20_000)) == "timeout"
        there.delay = 0
        assert await made.count(request()) == COUNT


async def test_nobody_there() -> None:
    async with asking(OneTarget(f"http://127.0.0.1:{free_port()}/tokenize")) as made:
        assert await reason(made) == "unreachable"
        assert await reason(made) == "resting"


async def test_one_who_hangs_up_in_the_answer() -> None:
    async def half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b'HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{"count":5')
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(half, "127.0.0.1", 0)
    async with (
        server,
        asking(OneTarget(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/tokenize")) as made,
    ):
        assert await reason(made) == "unreachable"


# -- bounds and rests ----------------------------------------------------------------------------------------------


async def test_beyond_the_bound_nobody_waits() -> None:
    rules = msgspec.structs.replace(PATIENT, max_requests=3)
    async with tokenizer(delay=0.3) as there, asking(OneTarget(there.url), rules) as made:
        counting = [asyncio.ensure_future(made.count(request())) for _ in range(3)]
        await eventually(lambda: made.under_way == 3)
        assert await reason(made) == "busy"
        assert await asyncio.gather(*counting) == [COUNT] * 3
        assert await made.count(request()) == COUNT


async def test_a_client_that_leaves_takes_its_question_along() -> None:
    async with tokenizer(delay=30) as there, asking(OneTarget(there.url)) as made:
        counting = asyncio.ensure_future(made.count(request()))
        await eventually(lambda: len(there.requests) == 1)
        counting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await counting
        assert made.under_way == 0
        await eventually(lambda: there.gone == 1)
        there.delay = 0
        assert await made.count(request()) == COUNT  # which was no failure


async def test_another_pod_is_asked_while_one_rests() -> None:
    clock = Clock()
    async with (
        tokenizer(status=500) as bad,
        tokenizer() as good,
        asking(pods(pod(1, bad), pod(2, good)), clock=clock) as made,
    ):
        counts = []
        for _ in range(10):
            with contextlib.suppress(Uncounted):
                counts.append(await made.count(request()))
        assert counts == [COUNT] * 9
        bad.status, clock.now = 200, 1.5
        for _ in range(10):
            assert await made.count(request()) == COUNT
        assert len(bad.requests) == 1 + 5


async def test_many_that_fail_together_are_one_failure_and_one_finds_out_whether_it_is_over() -> None:
    clock = Clock()
    async with tokenizer(status=500, delay=0.05) as there, asking(OneTarget(there.url), clock=clock) as made:

        async def together() -> dict[str, int]:
            ended = await asyncio.gather(*(reason(made) for _ in range(20)))
            return {each: ended.count(each) for each in ended}

        assert await together() == {"status": 20}
        clock.now = 0.9
        assert await together() == {"resting": 20}
        clock.now = 1.1
        assert await together() == {"status": 1, "resting": 19}
        clock.now = 3.0
        assert await together() == {"resting": 20}
        clock.now, there.status = 3.2, 200
        counting = [asyncio.ensure_future(made.count(request())) for _ in range(20)]
        ended = await asyncio.gather(*counting, return_exceptions=True)
        assert sum(each == COUNT for each in ended) == 1
        assert await made.count(request()) == COUNT


def test_rests_grow_to_half_a_minute() -> None:
    clock = Clock()
    rests = Rests(clock)
    lengths = []
    for _ in range(8):
        rests.asked("a")
        rests.failed("a")
        began = clock.now
        while rests.resting("a"):
            clock.now += 0.5
        lengths.append(clock.now - began)
    assert lengths == [1, 2, 4, 8, 16, 30, 30, 30]
    rests.answered("a")
    rests.failed("a")
    clock.now += 1
    assert not rests.resting("a")


def test_no_more_than_so_many_are_remembered() -> None:
    rests = Rests(Clock())
    for number in range(10_000):
        rests.failed(f"http://10.0.0.1:{number}")
    assert not rests.resting("http://10.0.0.1:0")
    assert rests.resting("http://10.0.0.1:9999")
    assert len(rests._rests) == 4096
