"""One simulated vLLM 0.32 engine: an aiohttp web server around the pure model of `service_time`.

    engine = Engine(EngineOptions(models=("llama-3-8b",)))
    await engine.start()      # http://{engine.address}/v1/chat/completions
    await engine.stop()

One timer steps the whole batch and writes to every stream of it, so a token costs one write. What the header
`x-simulate` can make go wrong stands in `faults`.
"""

from __future__ import annotations

import asyncio
import secrets
import time
import zlib
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from aiohttp import web

from envoy_extproc.simulation.answers import (
    EventWriter,
    Head,
    Words,
    answer_id,
    embeddings_answer,
    encode,
    load_report,
    models_answer,
    tokens_answer,
    whole_answer,
)
from envoy_extproc.simulation.delivery import Answer, Choice, StreamAnswer
from envoy_extproc.simulation.faults import HEADER, NONE, Faults
from envoy_extproc.simulation.metrics import exposition
from envoy_extproc.simulation.options import EngineOptions as EngineOptions
from envoy_extproc.simulation.requests import (
    Refusal,
    read_embedding,
    read_generation,
    read_tokenizing,
    rendered,
)
from envoy_extproc.simulation.service_time import Batch, QueueFull

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from envoy_extproc.simulation.requests import Generation, Kind, Prompt

    Handler = Callable[[web.Request, bytes], Awaitable[web.StreamResponse]]

_HEADERS = {"server": "uvicorn", "vary": "Origin"}
_JSON = "application/json"
_EVENTS = "text/event-stream; charset=utf-8"
_EXPOSITION = "text/plain; version=1.0.0; charset=utf-8"
_BACKLOG = 4096  # thousands of streams may connect at once
_SHUTDOWN_SECONDS = 0.01  # nobody waits for a simulation to finish its answers


class Received(NamedTuple):
    """A request as the engine got it: path with query, header names in lower case, repeated ones joined by comma."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class Engine:
    """One engine; it lives in the event loop that called `start`.

    Attributes:
        options: what it was made with.
        requests: what it received, whatever the path, the latest `kept_requests` of it.
        faults: what goes wrong with every answer to a request that asks for no faults itself; `/health` and `/metrics`
            stay as they are. It may be changed at any time, for the requests from then on.
    """

    def __init__(self, options: EngineOptions) -> None:
        self.options = options
        self.faults = options.faults
        self.requests: deque[Received] = deque(maxlen=options.kept_requests)
        self._batch: Batch[Choice] = Batch(options)
        self._started = time.time()
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0  # of the timer; uvloop's own handles do not always know
        self._runner: web.AppRunner | None = None
        self._routes: dict[str, dict[str, Handler]] = {
            "/v1/chat/completions": {"POST": self._chat},
            "/v1/completions": {"POST": self._completions},
            "/v1/embeddings": {"POST": self._embeddings},
            "/v1/models": {"GET": self._models},
            "/tokenize": {"POST": self._tokenize},
            "/reset_prefix_cache": {"POST": self._reset_prefix_cache},
            "/health": {"GET": self._empty},
            "/ping": {"GET": self._empty, "POST": self._empty},
            "/load": {"GET": self._load},
            "/version": {"GET": self._version},
            "/metrics": {"GET": self._metrics},
        }

    @property
    def address(self) -> str:
        """`host:port` it listens on.

        Raises:
            RuntimeError: it is not started.
        """
        if self._runner is None:
            raise RuntimeError("the engine is not started")
        host, port = self._runner.addresses[0][:2]
        return f"{host}:{port}"

    @property
    def running(self) -> int:
        """Sequences in the batch."""
        return self._batch.gauges.running

    @property
    def waiting(self) -> int:
        """Sequences in the queue."""
        return self._batch.gauges.waiting

    async def start(self) -> None:
        """Listens; after `stop` it is a new process, with nothing cached and nothing counted.

        Raises:
            OSError: the port is taken.
        """
        app = web.Application(client_max_size=0)  # no limit: what a body may be is the gateway's business
        app.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(
            app, access_log=None, handler_cancellation=True, shutdown_timeout=_SHUTDOWN_SECONDS
        )
        await runner.setup()
        try:
            await web.TCPSite(runner, self.options.host, self.options.port, backlog=_BACKLOG).start()
        except OSError:
            await runner.cleanup()
            raise
        self._runner = runner
        self._batch = Batch(self.options)
        self._started = time.time()

    async def stop(self) -> None:
        """Closes the listener and every connection, in the middle of answers too."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # The batch

    def _submit(self, choices: list[Choice]) -> None:
        self._batch.submit(choices, self._now())
        self._arm()

    def _drop(self, choices: list[Choice]) -> None:
        unfinished = [choice for choice in choices if not choice.finished]
        for choice in unfinished:
            self._batch.abort(choice, self._now())
        if unfinished:
            self._arm()

    def _arm(self) -> None:
        """Sets the timer to the next step, or leaves it when it is early enough."""
        if self._timer is not None and self._due <= self._now():
            return
        due = self._batch.next_step_at()
        if due is None or (self._timer is not None and self._due <= due):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(due, self._step)
        self._due = due

    def _step(self) -> None:
        self._timer = None
        now = self._now()
        due = self._batch.next_step_at()
        try:
            if due is not None and due <= now:
                for choice in self._batch.step(now):
                    choice.answer.token(choice)
        finally:
            self._arm()

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()

    # HTTP

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        headers: dict[str, str] = {}
        for name, value in request.headers.items():
            known = headers.get(name.lower())
            headers[name.lower()] = value if known is None else f"{known}, {value}"
        self.requests.append(Received(request.method, request.path_qs, headers, body))
        methods = self._routes.get(request.path)
        if methods is None:
            return _json(encode({"detail": "Not Found"}), status=404)
        handler = methods.get(request.method)
        if handler is None:
            allow = {"allow": ", ".join(methods)}
            return _json(encode({"detail": "Method Not Allowed"}), status=405, headers=allow)
        try:
            return await handler(request, body)
        except Refusal as refusal:
            return _json(encode(refusal.error), status=refusal.status)

    async def _chat(self, request: web.Request, body: bytes) -> web.StreamResponse:
        return await self._generate("chat", request, body)

    async def _completions(self, request: web.Request, body: bytes) -> web.StreamResponse:
        return await self._generate("completions", request, body)

    async def _generate(self, kind: Kind, request: web.Request, body: bytes) -> web.StreamResponse:
        faults = await self._faults(request)
        asked = read_generation(kind, body, self.options, faults.tokens)
        head = self._head(answer_id(kind, _request_id(request)), asked.model)
        if asked.stream:
            return await self._stream(request, asked, faults, head)
        answer = Answer(faults, request.transport, copies=asked.n)
        choices = self._choices(asked, faults, answer)
        await self._whole(answer)
        texts = [choice.words for choice in choices if choice.words is not None]
        usage = None if faults.no_usage else answer.usage()
        report = load_report(request.headers.get("endpoint-load-metrics-format", ""), self._batch.gauges)
        headers = {} if report is None else {"endpoint-load-metrics": report}
        return _json(whole_answer(head, asked, texts, usage), headers=headers, faults=faults)

    async def _embeddings(self, request: web.Request, body: bytes) -> web.StreamResponse:
        faults = await self._faults(request)
        asked = read_embedding(body, self.options)
        answer = Answer(faults, request.transport)
        answer.choices = [
            Choice(
                index=index,
                answer=answer,
                tokens=1,
                pooled=True,
                finish_reason="stop",
                prompt_tokens=prompt.tokens,
                block_hashes=prompt.block_hashes(self.options.block_size),
            )
            for index, prompt in enumerate(asked.prompts)
        ]
        await self._whole(answer)
        head = self._head(f"embd-{_request_id(request)}", asked.model)
        return _json(embeddings_answer(head, asked), faults=faults)

    async def _whole(self, answer: Answer) -> None:
        """Waits until the answer is whole.

        Raises:
            Refusal: the queue is full, or a fault was asked for.
        """
        try:
            self._submit(answer.choices)
            answer.begin()
            refusal = await answer.done
        except QueueFull:
            raise Refusal.of_status(503) from None
        finally:
            self._drop(answer.choices)
        if refusal is not None:
            raise refusal

    async def _stream(
        self, request: web.Request, asked: Generation, faults: Faults, head: Head
    ) -> web.StreamResponse:
        writer = EventWriter(head, asked, usage=not faults.no_usage, usage_null=self.options.usage_null)
        answer = StreamAnswer(faults, request.transport, copies=asked.n, writer=writer, resume=self._arm)
        self._choices(asked, faults, answer)
        try:
            self._submit(answer.choices)
            answer.begin()
        except QueueFull:
            answer.fail(Refusal.of_status(503))
        response = web.StreamResponse(headers={**_HEADERS, "content-type": _EVENTS, **_encoding(faults)})
        response.enable_chunked_encoding()
        try:
            await answer.begun
            await response.prepare(request)
            await answer.open(response)
            await answer.done
            await response.write_eof()
        finally:
            self._drop(answer.choices)
        return response

    def _choices(self, asked: Generation, faults: Faults, answer: Answer) -> list[Choice]:
        chat = asked.kind == "chat"
        answer.choices = [
            Choice(
                index=index,
                answer=answer,
                words=(words := Words(asked.seed + 7 * index, chat, faults.big_event, faults.lookalike)),
                tokens=asked.tokens,
                finish_reason=asked.finish_reason,
                prompt_tokens=prompt.tokens,
                block_hashes=self._hashes(asked, prompt, words),
            )
            for index, prompt in enumerate(prompt for prompt in asked.prompts for _ in range(asked.n))
        ]
        return answer.choices

    def _hashes(self, asked: Generation, prompt: Prompt, words: Words) -> tuple[int, ...]:
        """Of prompt and answer, as the next turn of the conversation has them in its prompt."""
        if not self.options.prefix_caching:
            return ()
        text = words.whole(asked.tokens)
        answer = rendered("assistant", text) if asked.kind == "chat" else text
        return prompt.block_hashes(self.options.block_size, answer, asked.salt)

    async def _faults(self, request: web.Request) -> Faults:
        """The faults asked for; lets those happen that come before the request is looked at."""
        asked = request.headers.get(HEADER)
        try:
            faults = self.faults if asked is None else Faults.parse(asked)
        except ValueError as error:
            raise Refusal(str(error)) from None
        if faults.delay:
            await asyncio.sleep(faults.delay)
        if faults.error is not None:
            raise Refusal.of_status(faults.error)
        return faults

    def _head(self, name: str, model: str) -> Head:
        return Head(name, int(time.time()), model, self.options.fingerprint)

    async def _models(self, request: web.Request, body: bytes) -> web.StreamResponse:
        permission = secrets.token_hex(8)
        return _json(models_answer(self.options.models, self.options.model_len, int(time.time()), permission))

    async def _tokenize(self, request: web.Request, body: bytes) -> web.StreamResponse:
        await self._faults(request)
        return _json(tokens_answer(read_tokenizing(body, self.options), self.options.model_len))

    async def _reset_prefix_cache(self, request: web.Request, body: bytes) -> web.StreamResponse:
        self._batch.reset_prefix_cache()  # vLLM, too, does not say whether blocks in use were in the way
        return await self._empty(request, body)

    async def _load(self, request: web.Request, body: bytes) -> web.StreamResponse:
        return _json(encode({"server_load": self._batch.unfinished}))

    async def _version(self, request: web.Request, body: bytes) -> web.StreamResponse:
        return _json(encode({"version": "0.32.0"}))

    async def _empty(self, request: web.Request, body: bytes) -> web.StreamResponse:
        return web.Response(headers=_HEADERS)

    async def _metrics(self, request: web.Request, body: bytes) -> web.StreamResponse:
        text = exposition(self.options, self._batch.gauges, self._batch.stats, self._started)
        return web.Response(body=text, headers={**_HEADERS, "content-type": _EXPOSITION})


async def run_engine(options: EngineOptions, *, started: asyncio.Event | None = None) -> None:
    """Serves until cancelled; sets `started` when it listens.

    Raises:
        OSError: the port is taken.
    """
    engine = Engine(options)
    await engine.start()
    if started is not None:
        started.set()
    try:
        await asyncio.Event().wait()
    finally:
        await engine.stop()


def _request_id(request: web.Request) -> str:
    return request.headers.get("x-request-id") or secrets.token_hex(8)


def _encoding(faults: Faults) -> dict[str, str]:
    return {"content-encoding": "gzip"} if faults.gzip else {}


def _json(
    body: bytes, *, status: int = 200, headers: Mapping[str, str] | None = None, faults: Faults = NONE
) -> web.Response:
    if faults.gzip:
        body = zlib.compress(body, wbits=31)
    fields = {**_HEADERS, **(headers or {}), **_encoding(faults), "content-type": _JSON}
    return web.Response(body=body, status=status, headers=fields)
