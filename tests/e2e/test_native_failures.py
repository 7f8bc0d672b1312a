"""The native lane when something dies or leaves: what the client gets, and what is in the books. Real processes."""

from __future__ import annotations

import asyncio
import json
import signal
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from envoy_extproc.simulation.stack import free_port
from tests.e2e.test_failures import (
    CHAT,
    DONE,
    FIRST,
    SECOND,
    USAGE,
    Reading,
    Scene,
    engine_process,
    event,
    in_flight_gone,
    scene,
    terminate,
)
from tests.support import captures
from tests.support.canned import Answer, Canned, canned, stream
from tests.support.gateway import MODEL, Gateway, chat, eventually, new_id

NATIVE = {"accounting": "native"}
AUTO = {"accounting": "auto"}
WHOLE = FIRST + SECOND + DONE
PART = len(FIRST)
QUIET_SECONDS = 0.5  # Envoy sends its access log every 0.1 s


async def requests_of(gateway: Gateway, servers: Sequence[int] = (0,)) -> Counter[str]:
    """How often each request was reported, over these servers, once nothing more comes."""
    await asyncio.sleep(QUIET_SECONDS)
    return Counter(line["request_id"] for server in servers for line in gateway.reports(server))


async def only_report(gateway: Gateway, request_id: str, server: int = 0) -> Mapping[str, Any]:
    """The report of a request, which must be its only one."""
    report = await gateway.report(request_id, server=server)
    await asyncio.sleep(QUIET_SECONDS)
    assert sum(line["request_id"] == request_id for line in gateway.reports(server)) == 1
    return report


# -- the client leaves -------------------------------------------------------------------------------------------------

ROLE, TOKEN = captures.events("chat_stream_usage")[:2]
SHAPES: Mapping[str, Callable[[int], bytes]] = {
    "vLLM": lambda _: TOKEN,
    "short": lambda _: event("x"),
    "words": lambda number: event("w" * (1 + number * 7 % 12)),
}
TOKENS = (1, 2, 5, 6, 13, 14, 29, 60, 125, 250)


async def leave_after(at: Scene, tokens: Sequence[bytes]) -> str:
    """A client that reads so many tokens of a longer answer and closes its connection; returns the request's id."""
    never = asyncio.Event()
    async with at.reading(stream(ROLE, *tokens, never), stream=True) as reading:
        await reading.until(len(ROLE) + sum(map(len, tokens)))
        reading.response.close()
    return reading.request_id


@pytest.mark.parametrize("shape", SHAPES)
async def test_client_leaves_in_the_middle(directory: Path, shape: str) -> None:
    """Between two notes of the script the bytes delivered tell how many tokens there were."""
    async with scene(directory, responses=NATIVE) as at:
        answers = [[SHAPES[shape](number) for number in range(count)] for count in TOKENS]
        ids = await asyncio.gather(*(leave_after(at, tokens) for tokens in answers))
        assert await in_flight_gone(at.gateway, 1.0) < 1.0
        reports = [await at.gateway.report(each) for each in ids]
        counted = [report["gen_ai.usage.output_tokens"] for report in reports]
        print(f"{shape}: received {TOKENS}, estimated {counted}")
        for report in reports:
            assert (report["outcome"], report["error.type"]) == ("aborted", "client")
            assert (report["status"], report["usage_source"]) == (200, "estimated")
            assert report["gen_ai.usage.input_tokens"] > 0
        assert all(abs(received - told) <= 1 for received, told in zip(TOKENS, counted, strict=True))
        assert set((await requests_of(at.gateway)).values()) == {1}


async def test_client_leaves_before_the_first_byte(directory: Path) -> None:
    async with scene(directory, responses=NATIVE) as at:
        request_id = new_id()
        at.upstream.answers[request_id] = Answer((asyncio.Event(),))
        asking = asyncio.ensure_future(
            at.http.post(CHAT, json=chat(stream=True), headers={"x-request-id": request_id})
        )
        await eventually(lambda: request_id in at.upstream.requests)
        assert await at.gateway.metric("envoy_extproc_in_flight_requests") == 1
        asking.cancel()
        assert await in_flight_gone(at.gateway, 1.0) < 1.0
        report = await only_report(at.gateway, request_id)
        assert (report["outcome"], report["error.type"], report["status"]) == ("aborted", "client", None)
        assert (report["usage_source"], report["gen_ai.usage.output_tokens"]) == ("estimated", 0)


async def leave_at_once(gateway: Gateway, request_id: str, pause: float) -> None:
    body = json.dumps(chat(stream=True)).encode()
    lines = (
        f"POST {CHAT} HTTP/1.1",
        "host: x",
        f"content-length: {len(body)}",
        f"x-request-id: {request_id}",
        "\r\n",
    )
    _, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    writer.write("\r\n".join(lines).encode() + body)
    await writer.drain()
    if pause:
        await asyncio.sleep(pause)
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize("pauses", [[0.0], [0.0, 0.001, 0.003, 0.006, 0.02]], ids=["at-once", "soon"])
async def test_clients_that_leave_early(directory: Path, pauses: Sequence[float]) -> None:
    """Of one that leaves at once this server sees a stream without a message; others leave while the pod is asked."""
    async with scene(directory, responses=NATIVE) as at:
        at.upstream.default = stream(FIRST, SECOND, USAGE, DONE, pause=0.01)
        ids = [new_id() for _ in range(500)]
        for start in range(0, len(ids), 25):
            await asyncio.gather(
                *(
                    leave_at_once(at.gateway, each, pauses[number % len(pauses)])
                    for number, each in enumerate(ids[start : start + 25])
                )
            )
        assert await in_flight_gone(at.gateway, 5.0) < 5.0
        found = await requests_of(at.gateway)
        lines = at.gateway.reports()
        ends = Counter((line["outcome"], line["error"], line["status"], line["attempts"]) for line in lines)
        print(f"reports {found.total()}, of whom nothing is known {found['']}, {dict(ends)}")
        assert await at.gateway.envoy_stat("http.ingress.downstream_rq_total") == len(ids)
        assert found == Counter(ids)
        assert await at.gateway.metric("envoy_extproc_requests_total") == len(ids)
        assert await at.gateway.metric("envoy_extproc_native_unreported_exchanges") in range(-len(ids), 1)
        assert {line["error.type"] for line in lines if line["outcome"] == "aborted"} == {"client"}


# -- the pod dies ------------------------------------------------------------------------------------------------------


async def test_pod_killed_in_the_middle_of_a_stream(directory: Path) -> None:
    port = free_port()
    pod = {"name": "pod-a", "address": f"127.0.0.1:{port}", "models": [MODEL]}
    async with (
        engine_process(port) as engine,
        Gateway(directory, pods=[pod], config={"responses": NATIVE}) as gateway,
        aiohttp.ClientSession(gateway.url) as http,
    ):
        request_id = new_id()
        body = chat(stream=True, max_tokens=400)
        async with http.post(CHAT, json=body, headers={"x-request-id": request_id}) as response:
            reading = Reading(request_id, response)
            await reading.until(3000)
            engine.kill()
            with pytest.raises(aiohttp.ClientPayloadError):
                await reading.rest()
        assert await in_flight_gone(gateway, 1.0) < 1.0
        report = await only_report(gateway, request_id)
    assert (report["outcome"], report["error.type"], report["pod"]) == ("aborted", "network", "pod-a")
    assert (report["status"], report["usage_source"]) == (200, "estimated")
    received = reading.body.count(b'"content":"') - reading.body.count(b'"content":""')
    print(f"received {received}, estimated {report['gen_ai.usage.output_tokens']}")
    assert report["gen_ai.usage.output_tokens"] == pytest.approx(received, abs=1)


async def test_first_pod_refuses_and_the_second_serves(directory: Path) -> None:
    async with AsyncExitStack() as stack:
        second = await stack.enter_async_context(canned())
        async with canned() as first:
            gateway = Gateway(
                directory,
                pods=[{**pod, "engine": "generic"} for pod in (first.pod("pod-1"), second.pod("pod-2"))],
                config={"responses": NATIVE, "routing": {"policy": "round-robin"}},
            )
            await stack.enter_async_context(gateway)
        http = await stack.enter_async_context(aiohttp.ClientSession(gateway.url))
        second.default = stream(FIRST, SECOND, USAGE, DONE)
        attempts = Counter([await served_by_second(gateway, http, second) for _ in range(8)])
    assert attempts.keys() == {1, 2}  # a pod that refused may be left alone for a while


async def served_by_second(gateway: Gateway, http: aiohttp.ClientSession, second: Canned) -> int:
    """How many pods were asked for a request, in the end the second."""
    request_id = new_id()
    async with http.post(CHAT, json=chat(stream=True), headers={"x-request-id": request_id}) as answer:
        assert (answer.status, await answer.read()) == (200, WHOLE)
        served = answer.headers["target-pod"], answer.headers["target-pod-ip"]
    report = await gateway.report(request_id)
    assert served == (report["pod"], report["address"]) == ("pod-2", second.address)
    assert (report["outcome"], report["gen_ai.usage.output_tokens"]) == ("success", 2)
    assert report["chosen"] == ("pod-2" if report["attempts"] == 1 else "pod-1")
    return int(report["attempts"])


@pytest.mark.parametrize("streamed", [True, False])
async def test_pod_breaks_off_before_any_byte(directory: Path, streamed: bool) -> None:
    async with scene(directory, responses=NATIVE) as at:
        request_id = new_id()
        at.upstream.answers[request_id] = Answer((), close=True)
        headers = {"x-request-id": request_id}
        async with at.http.post(CHAT, json=chat(stream=streamed), headers=headers) as answer:
            assert (answer.status, answer.headers["retry-after"]) == (503, "1")
            assert json.loads(await answer.read())["error"]["code"] == "service_unavailable"
            assert answer.headers["x-request-id"] == request_id
            assert "target-pod" not in answer.headers
        report = await only_report(at.gateway, request_id)
        assert (report["outcome"], report["error.type"], report["status"]) == ("error", "network", 503)
        assert (report["usage_source"], report["pod"], report["attempts"]) == ("none", None, 1)
        assert await in_flight_gone(at.gateway, 1.0) < 1.0


# -- the server dies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fail_open", [True, False], ids=["open", "closed"])
@pytest.mark.parametrize("hold", [True, False], ids=["held", "not-held"])
async def test_server_killed_in_the_middle_of_a_stream(directory: Path, fail_open: bool, hold: bool) -> None:
    """The server is not needed any more, unless its stream is held and Envoy takes its end for a failure."""
    responses = {**NATIVE, "hold_streams": hold}
    async with scene(directory, responses=responses, envoy={"fail_open": fail_open}) as at:
        resume = asyncio.Event()
        async with at.reading(await at.held(resume), stream=True) as reading:
            await reading.until(PART)
            await at.gateway.kill_server()
            resume.set()
            if hold and not fail_open:
                with pytest.raises(aiohttp.ClientPayloadError):
                    await reading.rest()
                assert bytes(reading.body) == FIRST
            else:
                assert await reading.rest() == WHOLE  # usage is hidden without the server, too
        await at.gateway.start_server()
        status, _, body, request_id = await at.ask()
        assert (status, body) == (200, WHOLE)
        report = await only_report(at.gateway, request_id)
        assert (report["usage_source"], report["gen_ai.usage.output_tokens"]) == ("reported", 2)


async def test_server_that_comes_back_reports_what_another_decided(directory: Path) -> None:
    """All that is known of an exchange travels with it."""
    async with scene(directory, responses=NATIVE, envoy={"fail_open": True}) as at:
        resume = asyncio.Event()
        async with at.reading(await at.held(resume), stream=True) as reading:
            await reading.until(PART)
            await at.gateway.kill_server()
            await at.gateway.start_server()
            await asyncio.sleep(2.0)  # Envoy leaves a server alone for a second that has just refused it
            resume.set()
            assert await reading.rest() == WHOLE
        report = await only_report(at.gateway, reading.request_id)
        assert (report["outcome"], report["pod"], report["policy"]) == (
            "success",
            "pod-canned",
            "least-request",
        )
        assert (report["usage_source"], report["gen_ai.usage.output_tokens"]) == ("reported", 2)
        assert await at.gateway.metric("envoy_extproc_in_flight_requests") == 0


async def test_in_flight_is_freed_by_the_entry_where_streams_are_not_held(directory: Path) -> None:
    async with scene(directory, responses={**NATIVE, "hold_streams": False}) as at:
        resume = asyncio.Event()
        async with at.reading(await at.held(resume), stream=True) as reading:
            await reading.until(PART)
            await asyncio.sleep(QUIET_SECONDS)
            assert await at.gateway.metric("envoy_extproc_in_flight_requests") == 1
            resume.set()
            assert await reading.rest() == WHOLE
        assert await in_flight_gone(at.gateway, 1.0) < 1.0
        assert (await only_report(at.gateway, reading.request_id))["outcome"] == "success"


# -- several servers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stopped", [False, True], ids=["both-live", "one-stopped"])
async def test_every_request_is_reported_by_one_of_two_servers(directory: Path, stopped: bool) -> None:
    """An entry goes to whichever server Envoy's log stream goes to, not to the one that decided."""
    async with scene(directory, servers=2, responses=NATIVE, server={"drain_seconds": 3}) as at:
        gate, ids = asyncio.Semaphore(20), []

        async def one() -> None:
            async with gate:
                status, _, body, request_id = await at.ask(0.08)
            assert (status, body) == (200, WHOLE)
            ids.append(request_id)

        requests = [asyncio.ensure_future(one()) for _ in range(200)]
        if stopped:
            await eventually(lambda: len(ids) >= 60)
            server = 0 if at.gateway.reports(0) else 1  # the one that Envoy's log goes to at the moment
            assert await terminate(at.gateway, server).wait() == 0
        await asyncio.gather(*requests)
        found = await requests_of(at.gateway, (0, 1))
        sums = [len(at.gateway.reports(server)) for server in (0, 1)]
        bypassed = [
            line for server in (0, 1) for line in at.gateway.log_lines(server) if "bypass" in line["event"]
        ]
        print(f"reports by server {sums}, missing {len(set(ids) - found.keys())}")
        assert bypassed == []
        assert found == Counter(ids)


async def test_a_server_that_does_not_come_to_its_work_loses_no_report(directory: Path) -> None:
    """Envoy's messages wait for it meanwhile, one behind another."""
    async with scene(directory, responses=AUTO) as at:
        server = at.gateway.servers[0]
        assert server is not None
        clock = asyncio.get_running_loop().time
        until, ids = clock() + 8.0, []
        while clock() < until:
            asked = [asyncio.ensure_future(at.ask(0.008 * number)) for number in range(1, 9)]
            await asyncio.sleep(0.03)  # each is decided about; their ends are told while nobody takes it
            server.send_signal(signal.SIGSTOP)
            await asyncio.sleep(0.4)
            server.send_signal(signal.SIGCONT)
            ids += [each[3] for each in await asyncio.gather(*asked)]
        assert await requests_of(at.gateway) == Counter(ids)


async def test_servers_that_hear_of_no_log_get_it_from_the_one_that_does(directory: Path) -> None:
    """Envoy's one worker keeps its log at one server, which leaves it to one that has been waiting for five seconds."""
    async with scene(directory, servers=2, responses=AUTO) as at:
        ids = []
        async with asyncio.timeout(30):
            while not all(map(at.gateway.reports, (0, 1))):
                ids += [each[3] for each in await asyncio.gather(*(at.ask(0.02) for _ in range(4)))]
                await asyncio.sleep(0.05)
        assert await requests_of(at.gateway, (0, 1)) == Counter(ids)


# -- nobody wired the access log ---------------------------------------------------------------------------------------


def without_access_log(bootstrap: str) -> str:
    tree = yaml.safe_load(bootstrap)
    (chain,) = tree["static_resources"]["listeners"][0]["filter_chains"]
    del chain["filters"][0]["typed_config"]["access_log"]
    return yaml.safe_dump(tree)


async def test_without_an_access_log_the_stream_lane_takes_over(directory: Path) -> None:
    """It takes half a minute and twenty requests to be sure; what ended until then is in no book, and that is told."""
    async with canned() as upstream:
        gateway = Gateway(directory, pods=[upstream.pod()], edit=without_access_log)
        async with gateway, aiohttp.ClientSession(gateway.url) as http:
            at = Scene(gateway, upstream, http)
            for _ in range(30):
                assert (await at.ask())[2] == WHOLE
            await asyncio.sleep(30.5)
            for _ in range(5):
                assert (await at.ask())[2] == WHOLE
            later = [(await at.ask())[3] for _ in range(20)]
            for request_id in later:
                report = await gateway.report(request_id)
                assert (report["usage_source"], report["gen_ai.usage.output_tokens"]) == ("reported", 2)
            said = [line for line in gateway.log_lines() if line["event"] == "native_lane_closed"]
            assert len(said) == 1
            unreported = await gateway.metric("envoy_extproc_native_unreported_exchanges")
            assert unreported + len(gateway.reports()) == 55
            assert len(gateway.reports()) >= 24
            assert await gateway.metric("envoy_extproc_in_flight_requests") == 0
