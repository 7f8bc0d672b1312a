"""The main job on one machine: OpenAI traffic through a real Envoy, steered by this server, and what came of it.

Nothing here prints: `run` tells what happens through a `Narrator`, which the command line shows.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import aiohttp
import msgspec
import yaml

from envoy_extproc.simulation.comparison import Compared, compare
from envoy_extproc.simulation.engine import Engine
from envoy_extproc.simulation.options import EngineOptions
from envoy_extproc.simulation.stack import Stack, StackError

MODEL = "llama-3-8b"
PODS = 3
_DISCOVERY_SECONDS = 10.0
_NOBODY = "192.0.2.1:8000"  # of a net that is for documentation alone
_PROMPTS = (
    "What is a KV cache, in one sentence?",
    "Write a haiku about load balancing.",
    "Name three prime numbers above 100.",
    "Why do tokens stream one at a time?",
)


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One request of the demo.

    Attributes:
        what: for the reader.
        body: the request; bytes to send them as they are.
        headers: further headers.
        leave_after: events after which the client hangs up; None for a client that stays.
        simulated: whether it needs the simulated engine's faults.
    """

    what: str
    body: Mapping[str, Any] | bytes
    headers: Mapping[str, str] = {}
    path: str = "/v1/chat/completions"
    leave_after: int | None = None
    simulated: bool = False


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a sample: what the client saw, and what the server says of it.

    Attributes:
        sample: what was asked.
        status: HTTP status the client saw; None if it saw none.
        saw_usage: whether usage was in the client's stream or answer.
        message: the error message the client saw, if any.
        report: the server's line about it.
    """

    sample: Sample
    status: int | None
    saw_usage: bool
    message: str | None
    report: Mapping[str, Any]


class Narrator(Protocol):
    """Tells the reader."""

    def starting(self, pods: Sequence[str]) -> None:
        """Processes are being started in front of these pods."""

    def ready(self, stack: Stack) -> None:
        """Everything is up."""

    def section(self, title: str) -> None:
        """A group of requests follows."""

    def outcome(self, outcome: Outcome) -> None:
        """One request is over."""

    def comparison(self, compared: Sequence[Compared]) -> None:
        """The same conversations were had by one policy after the other."""

    def summary(self, stack: Stack, metrics: Mapping[str, float], outcomes: Sequence[Outcome]) -> None:
        """The traffic is over; `metrics` are samples of the server's exposition by name and labels."""


async def run(narrator: Narrator, directory: Path, *, engines: Sequence[str], stop: asyncio.Event) -> None:
    """Starts everything, sends the samples, stays until `stop` is set, and takes everything down.

    Args:
        narrator: is told what happens.
        directory: for configuration and logs.
        engines: URLs of real engines; none for simulated ones.
        stop: ends it; set from the start, it ends after the traffic.

    Raises:
        StackError: something did not come up, or an engine of `engines` does not answer.
    """
    async with AsyncExitStack() as exits:
        pods = [await _real(url) for url in engines] or [await _simulated(exits, n) for n in range(PODS)]
        narrator.starting([f"{pod['name']} ({pod['address']})" for pod in pods])
        file = directory / "endpoints.yaml"
        _list(file, pods)
        config = {**_CONFIG, "discovery": {"static": {"file": str(file)}}}
        stack = await exits.enter_async_context(Stack(directory, (), config=config))
        narrator.ready(stack)
        session = await exits.enter_async_context(aiohttp.ClientSession(stack.url))
        model = pods[0]["models"][0]
        # First, because the metrics of a model and its pods go when they do.
        outcomes = [await _without_pods(narrator, stack, session, model, file=file, pods=pods)]
        outcomes += [outcome async for outcome in _streaming(narrator, stack, session, model)]
        if not engines:
            addresses = {pod["name"]: pod["address"] for pod in pods}
            narrator.comparison([each async for each in compare(stack.url, addresses, model)])
        outcomes += [
            outcome async for outcome in _one_by_one(narrator, stack, session, model, simulated=not engines)
        ]
        narrator.summary(stack, await _metrics(stack), outcomes)
        await stop.wait()


_CONFIG: Mapping[str, Mapping[str, Any]] = {
    "server": {"max_body_bytes": 262_144, "drain_seconds": 2},  # so that a body too large is quickly sent
    "engines": {"scrape_interval_ms": 100},
    "routing": {"allow_pinning": True},  # so that a pin is refused for what it says
}


def _list(file: Path, pods: Sequence[Mapping[str, Any]]) -> None:
    """Writes the file of endpoints that discovery watches."""
    file.write_text(yaml.safe_dump({"endpoints": [dict(pod) for pod in pods]}), encoding="utf-8")


async def _simulated(exits: AsyncExitStack, number: int) -> Mapping[str, Any]:
    name = f"pod-{'abc'[number]}"
    engine = Engine(EngineOptions(models=(MODEL,), name=name, ttft_seconds=0.04, tpot_seconds=0.01))
    await engine.start()
    exits.push_async_callback(engine.stop)
    return {"name": name, "address": engine.address, "models": [MODEL]}


async def _real(url: str) -> Mapping[str, Any]:
    target = urlsplit(url if "//" in url else f"//{url}", scheme="http")
    if target.scheme != "http":
        raise StackError(f"{url}: the demo's Envoy speaks plain HTTP to an engine, so give an http:// URL")
    try:
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://{target.netloc}/v1/models") as answer,
        ):
            models = [model["id"] for model in (await answer.json())["data"]]
    except (aiohttp.ClientError, KeyError, TypeError, ValueError) as error:
        raise StackError(f"{url}: no list of models: {error}") from None
    loop = asyncio.get_running_loop()
    port = target.port or 80
    address = (await loop.getaddrinfo(target.hostname, port))[0][4][0]
    bracketed = f"[{address}]" if ":" in str(address) else str(address)
    return {"name": target.netloc, "address": f"{bracketed}:{port}", "models": models}


async def _streaming(
    narrator: Narrator, stack: Stack, session: aiohttp.ClientSession, model: str
) -> AsyncIterator[Outcome]:
    narrator.section("Streams, several at a time: the pod with the fewest in flight")
    tasks = [_send(stack, session, sample) for sample in _streams(model)]
    for task in asyncio.as_completed(tasks):
        outcome = await task
        narrator.outcome(outcome)
        yield outcome


async def _one_by_one(
    narrator: Narrator, stack: Stack, session: aiohttp.ClientSession, model: str, *, simulated: bool
) -> AsyncIterator[Outcome]:
    for title, samples in (("Other requests", _others(model)), ("What goes wrong", _errors(model))):
        narrator.section(title)
        for sample in samples:
            if simulated or not sample.simulated:
                outcome = await _send(stack, session, sample)
                narrator.outcome(outcome)
                yield outcome


async def _without_pods(
    narrator: Narrator,
    stack: Stack,
    session: aiohttp.ClientSession,
    model: str,
    *,
    file: Path,
    pods: Sequence[Mapping[str, Any]],
) -> Outcome:
    """A request while discovery lists nobody; the pods are back when it is over."""
    narrator.section("The list of endpoints is empty for a moment")
    _list(file, ())
    await _discovered(stack, 0)
    outcome = await _send(stack, session, Sample(what="no pod is ready", body=_chat(model, _PROMPTS[0])))
    narrator.outcome(outcome)
    _list(file, pods)
    await _discovered(stack, len(pods))
    return outcome


async def _discovered(stack: Stack, count: int) -> None:
    """Waits until the server knows so many endpoints; discovery looks at its file once a second.

    Raises:
        StackError: it does not.
    """
    try:
        async with asyncio.timeout(_DISCOVERY_SECONDS), aiohttp.ClientSession(stack.admin_url()) as session:
            while True:
                async with session.get("/debug/endpoints") as answer:
                    if len(await answer.json()) == count:
                        return
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise StackError(
            f"the server does not know {count} endpoints after {_DISCOVERY_SECONDS:g} s"
        ) from None


def _chat(model: str, prompt: str, **more: Any) -> Mapping[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": 24, **more}


def _streams(model: str) -> list[Sample]:
    return [Sample(what="stream", body=_chat(model, _PROMPTS[n % 4], stream=True)) for n in range(6)]


def _others(model: str) -> list[Sample]:
    usage = {"include_usage": True}
    samples = [
        Sample(
            what="stream, usage asked for", body=_chat(model, _PROMPTS[0], stream=True, stream_options=usage)
        ),
        Sample(what="not a stream", body=_chat(model, _PROMPTS[1])),
        Sample(
            what="completion",
            path="/v1/completions",
            body={"model": model, "prompt": "Once upon", "max_tokens": 16, "stream": True},
        ),
        Sample(
            what="embedding", path="/v1/embeddings", body={"model": model, "input": "a word"}, simulated=True
        ),
    ]
    policies = ("random", "round-robin", "power-of-two", "least-kv-cache")
    return samples + [
        Sample(what=policy, body=_chat(model, _PROMPTS[2], stream=True), headers={"routing-strategy": policy})
        for policy in policies
    ]


def _errors(model: str) -> list[Sample]:
    stream = _chat(model, _PROMPTS[3], stream=True)

    def fault(what: str, switch: str, body: Mapping[str, Any] = stream) -> Sample:
        return Sample(what=what, body=body, headers={"x-simulate": switch}, simulated=True)

    return [
        Sample(what="body is no JSON", body=b'{"model": "llama'),
        Sample(what="no model", body={"messages": []}),
        Sample(what="unknown model", body=_chat("no-such-model", _PROMPTS[0])),
        Sample(what="unknown policy", body=stream, headers={"routing-strategy": "guess"}),
        Sample(what="pin to no known pod", body=stream, headers={"target-pod-ip": _NOBODY}),
        Sample(what="body too large", body=_chat(model, "x" * 300_000)),
        fault("engine fails", "error=500", _chat(model, _PROMPTS[0])),
        fault("engine is full, on every pod", "error=503", _chat(model, _PROMPTS[0])),
        fault("engine fails in a stream", "error-event=3"),
        fault("pod dies in a stream", "reset=3"),
        fault("stream without its end", "no-done"),
        Sample(what="client hangs up", body=stream, leave_after=4),
    ]


async def _send(stack: Stack, session: aiohttp.ClientSession, sample: Sample) -> Outcome:
    body = sample.body if isinstance(sample.body, bytes) else msgspec.json.encode(sample.body)
    request_id = f"demo-{id(sample):x}"
    headers = {"content-type": "application/json", "x-request-id": request_id, **sample.headers}
    status, text = None, b""
    try:
        async with session.post(sample.path, data=body, headers=headers) as answer:
            status = answer.status
            events = 0
            async for part in answer.content.iter_any():
                text += part
                events += part.count(b"\n\n")
                if sample.leave_after is not None and events >= sample.leave_after:
                    break  # and with the block the connection is closed
    except aiohttp.ClientError as error:
        text += f"\n{type(error).__name__}".encode()
    return Outcome(
        sample=sample,
        status=status,
        saw_usage=b'"usage":{' in text,
        message=_message(text),
        report=await stack.report(request_id),
    )


def _message(text: bytes) -> str | None:
    start = text.find(b'{"error":')
    if start < 0:
        last = text.rpartition(b"\n")[2].decode("utf-8", "replace")
        return last if last.endswith("Error") else None
    try:
        return str(msgspec.json.decode(text[start:].partition(b"\n")[0])["error"]["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return None


async def _metrics(stack: Stack) -> Mapping[str, float]:
    async with aiohttp.ClientSession() as session, session.get(f"{stack.admin_url()}/metrics") as answer:
        lines = (await answer.text()).splitlines()
    pairs = [line.rpartition(" ") for line in lines if not line.startswith("#")]
    return {name: float(value) for name, _, value in pairs}
