"""What a fleet without work costs a server: `python -m tests.bench.idle_pods`.

A hundred pods, one port on as many loopback addresses in a process of its own, serve a page recorded from vLLM 0.32 and
a list of models. One `serve` after the other follows them: with engines that tell nothing, so that only the lists are
asked for, then at a fixed 200 ms, then with the defaults, that is at a pace that slackens. What is told is CPU time of
the serving process, user and system, over the time that passed, once the pace has settled; no request is sent.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import yaml

from envoy_extproc.simulation.stack import free_port
from tests.bench.processes import cpu

Process = asyncio.subprocess.Process

GOAL = 0.05
"""Of a core, for a hundred."""

_SETTLING = 6.0  # seconds: from 0.2 s to 2 s the interval doubles four times
_TESTS = Path(__file__).parents[1]
_PAGE = _TESTS / "captures" / "vllm-0.32-metrics.txt"
_MODELS = b'{"object":"list","data":[{"id":"tiny","object":"model","owned_by":"vllm","root":"model","parent":null}]}'
_HEAD = b"HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: text/plain\r\ncontent-length: %d\r\n\r\n"


class Pod(asyncio.Protocol):
    """Answers each request on a kept connection."""

    answers: dict[bytes, bytes]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._received = b""

    def data_received(self, data: bytes) -> None:
        self._received += data
        while b"\r\n\r\n" in self._received:
            request, _, self._received = self._received.partition(b"\r\n\r\n")
            self._transport.write(self.answers[request.split(b" ", 2)[1]])


async def serve_pods(port: int) -> None:
    """Serves until it is ended."""
    bodies = {b"/metrics": _PAGE.read_bytes(), b"/v1/models": _MODELS}
    Pod.answers = {path: _HEAD % len(body) + body for path, body in bodies.items()}
    server = await asyncio.get_running_loop().create_server(Pod, "0.0.0.0", port, backlog=1024)
    print("ready", flush=True)
    await server.serve_forever()


@contextlib.asynccontextmanager
async def process(*arguments: str) -> AsyncIterator[Process]:
    """A Python process; ended on leaving."""
    started = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, cwd=_TESTS.parent, stdout=asyncio.subprocess.PIPE
    )
    try:
        yield started
    finally:
        if started.returncode is None:
            started.terminate()
        await started.wait()


async def cores(directory: Path, pods: int, port: int, seconds: float, engine: str, **engines: int) -> float:
    """CPU seconds that one server uses each second, following `pods` pods without work."""
    endpoints = [
        {"address": f"127.0.0.{index}:{port}", "models": ["tiny"], "engine": engine}
        for index in range(1, pods + 1)
    ]
    settings: dict[str, Any] = {
        "server": {"listen": f"127.0.0.1:{free_port()}", "admin": f"127.0.0.1:{free_port()}"},
        "discovery": {"static": {"endpoints": endpoints}},
        "engines": engines,
    }
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(settings), "utf-8")
    async with process("-m", "envoy_extproc", "serve", "-c", str(path)) as server:
        await asyncio.sleep(_SETTLING)
        used, begin = cpu(server), time.monotonic()
        await asyncio.sleep(seconds)
        if server.returncode is not None:
            raise RuntimeError("the server has ended")
        return (cpu(server) - used) / (time.monotonic() - begin)


async def measure(pods: int, seconds: float) -> None:
    """Measures and prints."""
    port = free_port()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        async with process("-m", "tests.bench.idle_pods", "--serve", str(port)) as fleet:
            assert fleet.stdout is not None
            await fleet.stdout.readline()
            none = await cores(directory, pods, port, seconds, "generic")
            fixed = await cores(directory, pods, port, seconds, "vllm", idle_interval_ms=200)
            paced = await cores(directory, pods, port, seconds, "vllm")
    print(f"{pods} pods without work, {_PAGE.stat().st_size} bytes a page, over {seconds:g} s each")
    print(f"no page asked for      {none:.3f} cores")
    print(f"fixed 200 ms           {fixed:.3f} cores")
    print(f"with the defaults      {paced:.3f} cores, the goal for 100 is {GOAL}")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pods", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--serve", type=int, metavar="PORT", help="be the pods")
    asked = parser.parse_args()
    asyncio.run(measure(asked.pods, asked.seconds) if asked.serve is None else serve_pods(asked.serve))


if __name__ == "__main__":
    main()
