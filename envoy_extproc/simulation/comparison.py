"""What a policy is worth: the same conversations by one policy after the other, with the engines' caches empty before each.

Every conversation begins with the same system prompt and has a document of its own, about which it asks several questions.
So an engine that saw a conversation before has only the question to compute, any other the document as well.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping
from statistics import quantiles
from typing import Any

import aiohttp
import msgspec

from envoy_extproc.simulation.stack import StackError

POLICIES = ("round-robin", "least-request", "prefix-cache")
CONVERSATIONS = 20
"""No multiple of the pods, or round-robin would have each conversation on one pod by chance."""
QUESTIONS = ("What is this about?", "Who is named?", "And when was that?", "Say it in one sentence.")
READING_SECONDS = 0.06  # between an answer and the next question
STAGGER_SECONDS = 0.03  # between the beginnings of two conversations: nobody asks in the same moment

_SYSTEM = "You answer questions about documents, shortly, and you name the paragraph you found it in. " * 7
_PARAGRAPH = (
    "of document {0}: the {0} people who wrote it down {0} years ago had {0} reasons not to forget it. "
)
_PARAGRAPHS = 40
_ANSWER_TOKENS = 6
_QUERIES, _HITS = "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total"


class Compared(msgspec.Struct, frozen=True, kw_only=True):
    """How one policy did.

    Attributes:
        policy: its name.
        hit_rate: share of the prompt tokens that the engines found in their prefix caches, as they tell it; 0 to 1.
        ttfts: seconds to the first token of each request, as its client measured them.
        by_pod: how many requests each pod served.
    """

    policy: str
    hit_rate: float
    ttfts: tuple[float, ...]
    by_pod: Mapping[str, int]

    def ttft(self, tenth: int) -> float:
        """Seconds in which so many tenths of the requests had their first token, 1 to 9."""
        return quantiles(self.ttfts, n=10, method="inclusive")[tenth - 1]


class _Turn(msgspec.Struct, frozen=True):
    pod: str
    ttft: float
    text: str


async def compare(url: str, pods: Mapping[str, str], model: str) -> AsyncIterator[Compared]:
    """Has the conversations through the gateway at `url`, by each of `POLICIES`.

    Args:
        url: where clients connect.
        pods: names of the simulated engines behind it, and their addresses.
        model: what they serve.

    Raises:
        StackError: a request was not answered.
    """
    limitless = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, connector=limitless) as gateway, aiohttp.ClientSession() as direct:
        for policy in POLICIES:
            await _forget(direct, pods.values())
            queries, hits = await _looked_up(direct, pods.values())
            asked = (_converse(gateway, number, model, policy) for number in range(CONVERSATIONS))
            turns = [turn for each in await asyncio.gather(*asked) for turn in each]
            all_queries, all_hits = await _looked_up(direct, pods.values())
            served = Counter(turn.pod for turn in turns)
            yield Compared(
                policy=policy,
                hit_rate=(all_hits - hits) / (all_queries - queries),
                ttfts=tuple(turn.ttft for turn in turns),
                by_pod={pod: served[pod] for pod in pods},
            )


async def _converse(session: aiohttp.ClientSession, number: int, model: str, policy: str) -> list[_Turn]:
    document = _PARAGRAPH.format(number + 2) * _PARAGRAPHS
    messages = [{"role": "system", "content": _SYSTEM}]
    turns: list[_Turn] = []
    await asyncio.sleep(number * STAGGER_SECONDS)
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question if turns else f"{document}\n{question}"})
        body = {"model": model, "messages": messages, "stream": True, "max_tokens": _ANSWER_TOKENS}
        turn = await _ask(session, body, policy)
        turns.append(turn)
        messages.append({"role": "assistant", "content": turn.text})
        await asyncio.sleep(READING_SECONDS)
    return turns


async def _ask(session: aiohttp.ClientSession, body: Mapping[str, Any], policy: str) -> _Turn:
    clock = asyncio.get_running_loop().time
    asked = clock()
    headers = {"content-type": "application/json", "routing-strategy": policy}
    async with session.post(
        "/v1/chat/completions", data=msgspec.json.encode(body), headers=headers
    ) as answer:
        text = await answer.content.readany()
        ttft = clock() - asked
        text += await answer.content.read()
        if answer.status != 200:
            raise StackError(f"{policy}: status {answer.status}: {text.decode('utf-8', 'replace')}")
        return _Turn(pod=answer.headers["target-pod"], ttft=ttft, text=_content(text))


def _content(stream: bytes) -> str:
    lines = (line.removeprefix(b"data: ") for line in stream.splitlines())
    events = (msgspec.json.decode(line) for line in lines if line.startswith(b"{"))
    deltas = (choice["delta"] for event in events for choice in event["choices"])
    return "".join(delta["content"] for delta in deltas)


async def _forget(session: aiohttp.ClientSession, addresses: Iterable[str]) -> None:
    for address in addresses:
        async with session.post(f"http://{address}/reset_prefix_cache"):
            pass


async def _looked_up(session: aiohttp.ClientSession, addresses: Iterable[str]) -> tuple[float, float]:
    """Prompt tokens looked up in the engines' prefix caches, and found there, since they started."""
    totals = dict.fromkeys((_QUERIES, _HITS), 0.0)
    for address in addresses:
        async with session.get(f"http://{address}/metrics") as answer:
            for line in (await answer.text()).splitlines():
                name = line.partition("{")[0]
                if name in totals:
                    totals[name] += float(line.rpartition(" ")[2])
    return totals[_QUERIES], totals[_HITS]
