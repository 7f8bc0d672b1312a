"""The clients of the bench of prefixes: each request at its own time, whatever the others take. A process of its own.

One `Job` a line on standard input, one list of `Answer`s a line on standard output. An answer is good if its status is 200, it ends
with ``[DONE]`` and has as many tokens as were asked for.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

import aiohttp
import msgspec
import uvloop

from tests.support.workload import Arrival, SharedPrefixes

_NO_TOKENS = 2
"""Events without one: the first, which tells the role, and the last, ``[DONE]``."""

_HEADERS = {"content-type": "application/json"}
_PATIENCE = aiohttp.ClientTimeout(total=120.0)


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What to send.

    Attributes:
        url: of Envoy.
        policy: asked for in each request.
        workload: the requests.
        seed: of them.
    """

    url: str
    policy: str
    workload: SharedPrefixes
    seed: int


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one request; seconds.

    Attributes:
        at: when it was due, from the beginning.
        late: how much later it was sent.
        first: from the sending to the first token; None where it failed.
        took: likewise to the end.
        tokens: of the answer.
        pod: who served it.
        failed: what went wrong; empty where nothing did.
    """

    at: float
    late: float = 0.0
    first: float | None = None
    took: float = 0.0
    tokens: int = 0
    pod: str = ""
    failed: str = ""


async def ask(session: aiohttp.ClientSession, job: Job, arrival: Arrival, late: float) -> Answer:
    """One request."""
    clock = asyncio.get_running_loop().time
    sent, first, tail, events = clock(), None, b"", 0
    headers = {**_HEADERS, **arrival.headers, "routing-strategy": job.policy}
    try:
        async with session.post(
            f"{job.url}/v1/chat/completions", data=arrival.body, headers=headers
        ) as answer:
            async for part in answer.content.iter_any():
                events += (tail[-5:] + part).count(b"data: ")
                tail = (tail + part)[-32:]
                if first is None and events >= _NO_TOKENS:
                    first = clock() - sent
            whole = tail.endswith(b"data: [DONE]\n\n") and events == job.workload.answer_tokens + _NO_TOKENS
            failed = "" if answer.status == 200 and whole else f"{answer.status}, {events} events, {tail!r}"
            pod = answer.headers.get("target-pod", "")
    except (aiohttp.ClientError, TimeoutError) as error:
        return Answer(at=arrival.at, late=late, failed=repr(error))
    return Answer(
        at=arrival.at,
        late=late,
        first=None if failed else first,
        took=clock() - sent,
        tokens=max(0, events - _NO_TOKENS),
        pod=pod,
        failed=failed,
    )


async def perform(job: Job) -> Sequence[Answer]:
    """All of them; returns when the last answer is whole."""
    loop = asyncio.get_running_loop()
    arrivals = job.workload.arrivals(job.seed)
    connector = aiohttp.TCPConnector(limit=0)
    async with (
        aiohttp.ClientSession(connector=connector, timeout=_PATIENCE) as session,
        asyncio.TaskGroup() as group,
    ):
        began, tasks = loop.time(), []
        for arrival in arrivals:
            await asyncio.sleep(began + arrival.at - loop.time())
            late = loop.time() - began - arrival.at
            tasks.append(group.create_task(ask(session, job, arrival, late)))
    return [task.result() for task in tasks]


async def _serve() -> None:
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.buffer.readline):
        answers = await perform(msgspec.json.decode(line, type=Job))
        sys.stdout.buffer.write(msgspec.json.encode(answers) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve())
