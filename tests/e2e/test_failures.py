"""What is lost when something dies: clients' bytes, and what was counted. Real processes, real signals."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from envoy_extproc.simulation.stack import ServerProcess, free_port
from tests.support.canned import PAUSE, Answer, Canned, canned, head, stream
from tests.support.gateway import MODEL, Gateway, chat, eventually, fast_engines, new_id

CHAT = "/v1/chat/completions"
FAILED = "http.ingress.ext_proc.envoy_extproc.streams_failed"
ALLOWED = "http.ingress.ext_proc.envoy_extproc.failure_mode_allowed"
DONE = b"data: [DONE]\n\n"


def event(text: str) -> bytes:
    return b'data: {"choices":[{"index":0,"delta":{"content":"%b"}}]}\n\n' % text.encode()


USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":11,"completion_tokens":2,"total_tokens":13}}\n\n'
STREAM_LANE = {"responses": {"accounting": "stream"}}  # the native lane has a module of its own
FIRST, SECOND = event("first"), event("second")


@dataclass(slots=True)
class Reading:
    """An answer as a client reads it."""

    request_id: str
    response: aiohttp.ClientResponse
    body: bytearray = field(default_factory=bytearray)

    async def until(self, size: int) -> None:
        """Reads until so many bytes have come."""
        async with asyncio.timeout(10):
            while len(self.body) < size:
                piece = await self.response.content.readany()
                assert piece, "ended early"
                self.body += piece

    async def rest(self) -> bytes:
        """Reads to the end.

        Raises:
            aiohttp.ClientPayloadError: the answer is cut off.
        """
        async with asyncio.timeout(10):
            self.body += await self.response.content.read()
        return bytes(self.body)


@dataclass(slots=True)
class Scene:
    """A gateway before one canned upstream, and a client."""

    gateway: Gateway
    upstream: Canned
    http: aiohttp.ClientSession

    @asynccontextmanager
    async def reading(self, answer: Answer, path: str = CHAT, **more: Any) -> AsyncIterator[Reading]:
        request_id = new_id()
        self.upstream.answers[request_id] = answer
        async with (
            asyncio.timeout(30),
            self.http.post(path, json=chat(**more), headers={"x-request-id": request_id}) as response,
        ):
            assert response.status == 200
            yield Reading(request_id, response)

    async def held(self, resume: asyncio.Event) -> Answer:
        """A stream that stops after its first event, until told to resume."""
        return stream(FIRST, resume, SECOND, USAGE, DONE)

    async def ask(self, pause: float = PAUSE) -> tuple[int, Mapping[str, str], bytes, str]:
        request_id = new_id()
        self.upstream.answers[request_id] = stream(FIRST, SECOND, USAGE, DONE, pause=pause)
        async with (
            asyncio.timeout(10),
            self.http.post(CHAT, json=chat(stream=True), headers={"x-request-id": request_id}) as response,
        ):
            return response.status, response.headers, await response.read(), request_id


@asynccontextmanager
async def scene(directory: Path, *, servers: int = 1, **config: Mapping[str, Any]) -> AsyncIterator[Scene]:
    async with (
        canned() as upstream,
        Gateway(directory, pods=[upstream.pod()], config=STREAM_LANE | config, servers=servers) as gateway,
        aiohttp.ClientSession(gateway.url, connector=aiohttp.TCPConnector(limit=0)) as http,
    ):
        yield Scene(gateway, upstream, http)


def pid_gone(gateway: Gateway, server: int = 0) -> Callable[[], bool]:
    process = gateway.servers[server]
    assert process is not None
    return lambda: process.returncode is not None


def terminate(gateway: Gateway, server: int = 0) -> ServerProcess:
    process = gateway.servers[server]
    assert process is not None
    process.send_signal(signal.SIGTERM)
    return process


async def ready(gateway: Gateway, server: int = 0) -> int:
    """The status of /readyz."""
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{gateway.admin_url(server)}/readyz") as answer,
    ):
        return answer.status


async def health(gateway: Gateway, service: str) -> int:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{gateway.server_ports[0]}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
        return int(answer.status)


async def in_flight_gone(gateway: Gateway, seconds: float, server: int = 0) -> float:
    """Waits until the gauge is 0; returns the seconds it took."""
    clock = asyncio.get_running_loop().time
    began = clock()
    async with asyncio.timeout(seconds):
        while await gateway.metric("envoy_extproc_in_flight_requests", server):
            await asyncio.sleep(0.02)
    return clock() - began


# -- the server dies ---------------------------------------------------------------------------------------------------


async def test_server_killed_with_fail_open(directory: Path) -> None:
    async with scene(directory) as at:
        resume = asyncio.Event()
        async with at.reading(await at.held(resume), stream=True) as reading:
            await reading.until(len(FIRST))
            await at.gateway.kill_server()
            resume.set()
            # Nobody is left to hide the usage event that the server had asked for: the client sees it.
            assert await reading.rest() == FIRST + SECOND + USAGE + DONE

        before = await at.gateway.envoy_stat(ALLOWED)
        for _ in range(3):
            status, headers, body, request_id = await at.ask()
            assert (status, body) == (200, FIRST + SECOND + USAGE + DONE)
            assert "target-pod" not in headers
            assert b"stream_options" not in at.upstream.requests[request_id][0].body
        assert await at.gateway.envoy_stat(ALLOWED) == before + 3

        await at.gateway.start_server()
        status, headers, body, request_id = await at.ask()
        assert (status, body) == (200, FIRST + SECOND + DONE)
        assert headers["target-pod"] == "pod-canned"
        report = await at.gateway.report(request_id)
        assert (report["usage_source"], report["gen_ai.usage.output_tokens"]) == ("reported", 2)
        assert await at.gateway.envoy_stat(ALLOWED) == before + 3


async def test_server_killed_with_fail_closed(directory: Path) -> None:
    async with scene(directory, envoy={"fail_open": False}) as at:
        resume = asyncio.Event()
        async with at.reading(await at.held(resume), stream=True) as reading:
            await reading.until(len(FIRST))
            await at.gateway.kill_server()
            resume.set()
            with pytest.raises(aiohttp.ClientPayloadError):
                await reading.rest()

        status, headers, body, request_id = await at.ask()
        assert (status, headers["content-type"]) == (503, "application/json")
        error = json.loads(body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["code"] == "service_unavailable"
        assert request_id not in at.upstream.requests
        assert await at.gateway.envoy_stat(ALLOWED) == 0

        await at.gateway.start_server()
        status, _, body, request_id = await at.ask()
        assert (status, body) == (200, FIRST + SECOND + DONE)
        report = await at.gateway.report(request_id)
        assert (report["usage_source"], report["gen_ai.usage.output_tokens"]) == ("reported", 2)


# -- the server is told to stop ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fail_open", [True, False], ids=["open", "closed"])
async def test_drain_lets_a_stream_end(directory: Path, fail_open: bool) -> None:
    async with scene(directory, server={"drain_seconds": 20}, envoy={"fail_open": fail_open}) as at:
        resume = asyncio.Event()
        async with at.reading(await at.held(resume), stream=True) as reading:
            await reading.until(len(FIRST))
            serving = health_pb2.HealthCheckResponse.SERVING
            assert await ready(at.gateway) == 200
            assert await health(at.gateway, "readiness") == serving
            process = terminate(at.gateway)
            async with asyncio.timeout(5):
                while await ready(at.gateway) != 503:
                    await asyncio.sleep(0.01)
            assert await health(at.gateway, "readiness") == health_pb2.HealthCheckResponse.NOT_SERVING
            assert await health(at.gateway, "liveness") == serving
            resume.set()
            assert await reading.rest() == FIRST + SECOND + DONE
        async with asyncio.timeout(5):
            assert await process.wait() == 0
        report = await at.gateway.report(reading.request_id)
        assert report["outcome"] == "success"
        assert (report["usage_source"], report["gen_ai.usage.output_tokens"]) == ("reported", 2)


@pytest.mark.parametrize("fail_open", [True, False], ids=["open", "closed"])
@pytest.mark.parametrize("cut", [0, 20], ids=["between-events", "within-an-event"])
async def test_drain_that_ends_early_gives_the_stream_back(
    directory: Path, fail_open: bool, cut: int
) -> None:
    async with scene(directory, server={"drain_seconds": 0.3}, envoy={"fail_open": fail_open}) as at:
        resume = asyncio.Event()
        begun, rest = FIRST + SECOND[:cut], SECOND[cut:]
        answer = stream(begun, resume, rest, USAGE, DONE)
        async with at.reading(answer, stream=True) as reading:
            await reading.until(len(FIRST))
            process = terminate(at.gateway)
            if cut:
                # What is held back of an event can only go out as part of the next reply: the stream waits for it.
                await asyncio.sleep(0.6)
                assert process.returncode is None
                resume.set()
            async with asyncio.timeout(8):
                assert await process.wait() == 0
            resume.set()
            body = await reading.rest()
        report = await at.gateway.report(reading.request_id)
        assert report["error.type"] is None
        if cut and USAGE not in body:  # all of it came before the stream was given back
            assert body == FIRST + SECOND + DONE
            assert report["usage_source"] == "reported"
        else:
            # The server is gone: nobody hides the usage event that it had asked for.
            assert body == FIRST + SECOND + USAGE + DONE
            assert (report["outcome"], report["usage_source"]) == ("drained", "estimated")


@pytest.mark.parametrize("fail_open", [True, False], ids=["open", "closed"])
async def test_drain_gives_a_held_stream_back_at_once(directory: Path, fail_open: bool) -> None:
    async with scene(directory, server={"drain_seconds": 20}, envoy={"fail_open": fail_open}) as at:
        resume = asyncio.Event()
        answer = Answer((head("text/plain", "content-length: 10"), b"hello", resume, b"world"))
        async with at.reading(answer, "/v1/audio/speech") as reading:
            await reading.until(5)
            process = terminate(at.gateway)
            async with asyncio.timeout(5):
                assert await process.wait() == 0
            resume.set()
            assert await reading.rest() == b"helloworld"
        report = await at.gateway.report(reading.request_id)
        assert (report["outcome"], report["pod"]) == ("success", "pod-canned")


@dataclass(slots=True)
class Load:
    """Clients that ask again and again, each once it has its answer.

    Attributes:
        answered: answers that came.
        wrong: what was not as it should be.
    """

    scene: Scene
    answered: int = 0
    wrong: list[object] = field(default_factory=list)
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    @asynccontextmanager
    async def running(self, clients: int) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as group:
            for number in range(clients):
                group.create_task(self._loop(0.1 if number % 2 else PAUSE))
            try:
                yield
            finally:
                self.stop.set()

    async def _loop(self, pause: float) -> None:
        while not self.stop.is_set():
            try:
                status, _, body, _ = await self.scene.ask(pause)
            except (aiohttp.ClientError, TimeoutError) as error:
                self.wrong.append(error)
                continue
            self.answered += 1
            if (status, body) != (200, FIRST + SECOND + DONE):
                self.wrong.append((status, body))


async def test_one_of_two_servers_restarted_under_load(directory: Path) -> None:
    """Twenty clients in a loop, fail-closed: none of them notices."""
    async with scene(directory, servers=2, server={"drain_seconds": 3}, envoy={"fail_open": False}) as at:
        load = Load(at)
        async with load.running(20):
            await asyncio.sleep(0.7)
            process = terminate(at.gateway)
            async with asyncio.timeout(12):
                assert await process.wait() == 0
            before = load.answered
            await asyncio.sleep(0.5)
            assert load.answered > before
            await at.gateway.start_server()
            await asyncio.sleep(1.5)
        assert load.wrong == []

        def accounted() -> int:
            return sum(len(at.gateway.reports(server)) for server in (0, 1))

        await eventually(lambda: accounted() >= load.answered)  # a report comes after its answer
        print(f"requests {load.answered}, reports {[len(at.gateway.reports(each)) for each in (0, 1)]}")
        assert accounted() == load.answered  # each by one of them
        assert (
            await at.gateway.metric("envoy_extproc_requests_total", 0) > 0
        )  # the restarted one serves again


# -- a pod dies --------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def engine_process(port: int) -> AsyncIterator[asyncio.subprocess.Process]:
    command = (sys.executable, "-m", "envoy_extproc", "engine", "--port", str(port), "--model", MODEL)
    process = await asyncio.create_subprocess_exec(
        *command, "--tpot", "0.02", stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        async with asyncio.timeout(20), aiohttp.ClientSession() as session:
            while not await answers(session, f"http://127.0.0.1:{port}/health"):
                await asyncio.sleep(0.03)
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def answers(session: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with session.get(url) as response:
            return response.status == 200
    except aiohttp.ClientError:
        return False


async def test_pod_killed_in_the_middle_of_a_stream(directory: Path) -> None:
    ports = {"pod-a": free_port(), "pod-b": free_port()}
    pods: list[dict[str, Any]] = [
        {"name": name, "address": f"127.0.0.1:{port}", "models": [MODEL]} for name, port in ports.items()
    ]
    async with (
        engine_process(ports["pod-a"]) as a,
        engine_process(ports["pod-b"]) as b,
        # One that hears of the death from nobody, since it scrapes nobody, and one that asks often.
        Gateway(directory / "deaf", pods=[pod | {"engine": "generic"} for pod in pods]) as deaf,
        Gateway(directory / "told", pods=pods, config={"engines": {"scrape_interval_ms": 50}}) as told,
        aiohttp.ClientSession() as http,
    ):
        dead = await killed_while_it_serves(deaf, http, {"pod-a": a, "pod-b": b})
        (alive,) = ports.keys() - {dead}

        # At once: Envoy finds out by itself, and takes the next pod of the list. Ties go to either.
        at_once = [await served(deaf, http) for _ in range(16)]
        assert {pod for pod, _ in at_once} == {alive}
        assert {attempts for _, attempts in at_once} == {1, 2}

        async with asyncio.timeout(10):
            while await reachable(told, dead):
                await asyncio.sleep(0.05)
        assert [await served(told, http) for _ in range(16)] == [(alive, 1)] * 16


async def served(gateway: Gateway, http: aiohttp.ClientSession) -> tuple[str, int]:
    """Who answers a request, and after how many attempts."""
    request_id = new_id()
    headers = {"x-request-id": request_id}
    async with http.post(gateway.url + CHAT, json=chat(max_tokens=1), headers=headers) as answer:
        assert answer.status == 200, await answer.text()
        report = await gateway.report(request_id)
        assert report["pod"] == answer.headers["target-pod"]
        assert report["outcome"] == "success"
        return answer.headers["target-pod"], report["attempts"]


async def killed_while_it_serves(
    gateway: Gateway, http: aiohttp.ClientSession, processes: Mapping[str, asyncio.subprocess.Process]
) -> str:
    """Kills the pod that serves a stream, and checks what becomes of the stream; returns the pod's name."""
    request_id = new_id()
    headers = {"x-request-id": request_id}
    body = chat(stream=True, max_tokens=400)
    async with http.post(gateway.url + CHAT, json=body, headers=headers) as answer:
        reading = Reading(request_id, answer)
        await reading.until(1500)
        dead = answer.headers["target-pod"]
        assert await gateway.metric("envoy_extproc_in_flight_requests", endpoint=dead) == 1
        processes[dead].kill()
        with pytest.raises(aiohttp.ClientPayloadError):
            await reading.rest()
    report = await gateway.report(request_id)
    assert (report["outcome"], report["error.type"], report["pod"]) == ("aborted", "network", dead)
    assert report["usage_source"] == "estimated"
    assert report["gen_ai.usage.output_tokens"] > 0
    assert await in_flight_gone(gateway, 1.0) < 1.0
    return dead


async def reachable(gateway: Gateway, pod: str) -> bool:
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{gateway.admin_url()}/debug/endpoints") as answer,
    ):
        return bool(next(each for each in await answer.json() if each["name"] == pod)["reachable"])


# -- the client leaves -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [0, 3], ids=["before-the-first-token", "mid-stream"])
async def test_client_leaves(directory: Path, tokens: int) -> None:
    async with fast_engines(1) as engines, Gateway(directory, engines=engines) as gateway:
        (engine,) = engines
        request_id = new_id()
        headers = {"x-request-id": request_id, "x-simulate": f"hang={tokens}"}
        body = json.dumps(chat(stream=True)).encode()
        lines = [
            f"POST {CHAT} HTTP/1.1",
            "host: x",
            f"content-length: {len(body)}",
            *map(": ".join, headers.items()),
        ]
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write("\r\n".join((*lines, "\r\n")).encode() + body)
        await eventually(lambda: engine.running == 1)
        if tokens:
            async with asyncio.timeout(5):
                for _ in range(tokens):
                    await reader.readuntil(b'"content":"')
        assert await gateway.metric("envoy_extproc_in_flight_requests") == 1
        writer.close()
        seconds = await in_flight_gone(gateway, 1.0)
        await eventually(lambda: engine.running == 0, 1.0)
        report = await gateway.report(request_id)
        print(f"in-flight back to 0 after {seconds:.3f} s")
        assert report["outcome"] == "aborted"
        assert report["usage_source"] == "estimated"
        assert report["gen_ai.usage.input_tokens"] > 0
        assert (report["gen_ai.usage.output_tokens"] > 0) == (tokens > 0)


# -- Envoy dies --------------------------------------------------------------------------------------------------------


async def test_envoy_restarted_leaks_nothing(directory: Path) -> None:
    async with scene(directory) as at:
        resume = asyncio.Event()
        ids = []
        for _ in range(5):
            request_id = new_id()
            ids.append(request_id)
            at.upstream.answers[request_id] = await at.held(resume)

        async def read(request_id: str) -> None:
            async with at.http.post(
                CHAT, json=chat(stream=True), headers={"x-request-id": request_id}
            ) as answer:
                await answer.read()

        tasks = [asyncio.ensure_future(read(each)) for each in ids]
        async with asyncio.timeout(5):
            while await at.gateway.metric("envoy_extproc_in_flight_requests") != 5:
                await asyncio.sleep(0.02)
        await eventually(lambda: len(at.upstream.requests) == 5)
        envoy = at.gateway.envoy
        assert envoy is not None
        envoy.kill()
        await envoy.wait()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(each, aiohttp.ClientError) for each in ended)
        assert await in_flight_gone(at.gateway, 2.0) < 2.0
        for each in ids:
            assert (await at.gateway.report(each))["outcome"] == "aborted"
        resume.set()
        await at.gateway._start_envoy()
        status, _, body, request_id = await at.ask()
        assert (status, body) == (200, FIRST + SECOND + DONE)
        assert (await at.gateway.report(request_id))["outcome"] == "success"
        assert await in_flight_gone(at.gateway, 1.0) < 1.0
