"""A request that Envoy serves without us is counted and said; the printed bootstrap lets none through."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp

from tests.support.gateway import Gateway, chat, eventually, fast_engines, new_id

CHAT = "/v1/chat/completions"
ADDRESSES = {
    *("target-pod", "x-gateway-destination-endpoint"),
    *("x-prefiller-host-port", "x-prefiller-url", "x-encoder-hosts-ports"),
    *("x-data-parallel-host-port", "x-kv-cache-source-host-port"),
}
"""Headers that name one."""


def with_low_breakers(bootstrap: str) -> str:
    """To this server, as an operator's own Envoy might have them; the default is 1,024."""
    pods, breaker, rest = bootstrap.rpartition("max_requests: 1000000")
    assert breaker
    assert "cluster_name: ext_proc" in rest
    return f"{pods}max_requests: 5{rest}"


async def hold(http: aiohttp.ClientSession, count: int) -> list[aiohttp.ClientResponse]:
    asked = [http.post(CHAT, json=chat(stream=True), headers={"x-simulate": "hang=1"}) for _ in range(count)]
    return list(await asyncio.gather(*asked))


async def test_requests_past_a_full_breaker_are_counted(directory: Path) -> None:
    async with (
        fast_engines(3) as engines,
        Gateway(directory, engines=engines, edit=with_low_breakers) as gateway,
    ):
        async with aiohttp.ClientSession(gateway.url) as http:
            held = await hold(http, 5)
            request_id = new_id()
            sent = {"x-request-id": request_id, **dict.fromkeys(ADDRESSES, "169.254.169.254:80")}
            passed = await http.post(CHAT, json=chat(max_tokens=1), headers=sent)
            assert passed.status == 200  # Envoy fails open: the client notices nothing
            assert "target-pod" not in passed.headers
            await passed.read()
            ((_, seen, _),) = gateway.received(request_id)
            assert not ADDRESSES & seen.keys()  # a sidecar would connect there
            async with asyncio.timeout(5):
                while await gateway.metric("envoy_extproc_bypassed_requests_total") < 1:
                    await asyncio.sleep(0.05)
            for answer in held:
                answer.close()
            await eventually(
                lambda: any(line["event"] == "requests_bypassed" for line in gateway.log_lines())
            )
            assert await gateway.metric("envoy_extproc_bypassed_requests_total") == 1


async def test_nothing_passes_the_printed_bootstrap(directory: Path) -> None:
    async with fast_engines(3) as engines, Gateway(directory, engines=engines) as gateway:
        async with aiohttp.ClientSession(gateway.url, connector=aiohttp.TCPConnector(limit=0)) as http:
            held = await hold(http, 40)
            assert all("target-pod" in answer.headers for answer in held)
            for answer in held:
                answer.close()
            await asyncio.sleep(0.5)  # the access log is flushed every 0.1 s
            assert await gateway.metric("envoy_extproc_bypassed_requests_total") == 0
            assert await gateway.envoy_stat("http.ingress.ext_proc.envoy_extproc.failure_mode_allowed") == 0
