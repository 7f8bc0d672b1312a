"""A tokenizer over HTTP: words and signs are tokens. It answers in the forms of vLLM, SGLang and llama.cpp, or fails as it is told.

It is a pod, too: of an engine that answers every chat with one word and tells no usage.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from tests.support.builders import MODEL

PER_TURN, ANSWER = 5, 3


@dataclass
class Tokenizer:
    """One of them.

    Attributes:
        requests: headers and body of each question that came.
        chats: bodies of the others.
        status: of the answers.
        delay: seconds before each.
        body: of the answers, instead of a count.
        headers: likewise.
        gone: requests whose client left before the answer.
    """

    requests: list[tuple[Mapping[str, str], dict[str, Any]]] = field(default_factory=list)
    chats: list[dict[str, Any]] = field(default_factory=list)
    status: int = 200
    delay: float = 0.0
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    gone: int = 0
    address: str = ""

    @property
    def url(self) -> str:
        return f"http://{self.address}/tokenize"

    async def answer(self, request: web.Request) -> web.Response:
        asked = json.loads(await request.read())
        self.requests.append((request.headers, asked))
        try:
            await asyncio.sleep(self.delay)
        except asyncio.CancelledError:
            self.gone += 1
            raise
        body = json.dumps(counted(asked)).encode() if self.body is None else self.body
        return web.Response(
            status=self.status, body=body, content_type="application/json", headers=self.headers
        )

    async def chat(self, request: web.Request) -> web.Response:
        self.chats.append(json.loads(await request.read()))
        message = {"role": "assistant", "content": "yes"}
        choice = {"index": 0, "message": message, "text": "yes", "finish_reason": "stop"}
        return web.json_response({"id": "1", "object": "chat.completion", "choices": [choice]})

    def pod(self, name: str, **more: Any) -> dict[str, Any]:
        """As in `discovery.static.endpoints`."""
        return {"name": name, "address": self.address, "models": [MODEL], **more}


def tokens(text: str) -> list[int]:
    """The ids of a text: how long each word is."""
    return [len(word) for word in re.findall(r"\w+|[^\w\s]", text)]


def counted(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What is answered to a question."""
    if "content" in asked:
        return {"tokens": tokens(asked["content"])}
    if "prompt" in asked:
        found = tokens(asked["prompt"])
    else:
        found = [0] * ANSWER
        for message in asked["messages"]:
            content = message["content"]
            parts = [{"text": content}] if isinstance(content, str) else content
            found += [0] * PER_TURN + [each for part in parts for each in tokens(part["text"])]
        found += tokens(json.dumps(asked["tools"])) if asked.get("tools") else []
    return {"count": len(found), "max_model_len": 8192, "tokens": found, "token_strs": None}


@asynccontextmanager
async def tokenizer(**options: Any) -> AsyncIterator[Tokenizer]:
    """One that listens on all of loopback, so that it can be several pods."""
    made = Tokenizer(**options)
    app = web.Application(client_max_size=2**28)
    app.router.add_post("/tokenize", made.answer)
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/messages"):
        app.router.add_post(path, made.chat)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "0.0.0.0", 0).start()
    made.address = f"127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield made
    finally:
        await runner.cleanup()
