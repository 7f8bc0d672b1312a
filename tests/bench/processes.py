"""The processes of a bench: what they used of the machine, the pods, the load, and an Envoy that is only a proxy."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import yaml

from envoy_extproc.simulation.stack import ServerProcess, envoy_binary, free_port
from tests.bench.client import Load, Result

Process = asyncio.subprocess.Process

_ROOT = Path(__file__).parents[2]
_LONGEST_LINE = 16 * 1_048_576
_ROUND_ROBIN = "envoy.extensions.load_balancing_policies.round_robin.v3.RoundRobin"
_POSIX_CPU_CLOCK_OF_A_PROCESS = 2


def cpu(process: ServerProcess | None) -> float:
    """CPU seconds of a process so far, all its threads."""
    assert process is not None
    return cpu_of(process.pid)


def cpu_of(pid: int) -> float:
    """The same by the process's id: to the nanosecond on Linux; 0 elsewhere, and of a process that is gone."""
    if sys.platform != "linux":
        return 0.0
    with contextlib.suppress(OSError):
        # clock_getcpuclockid(3), which Python has for threads alone
        return time.clock_gettime((~pid << 3) | _POSIX_CPU_CLOCK_OF_A_PROCESS)
    return 0.0


def resident_bytes(pid: int) -> int:
    """Memory a process has in RAM; 0 where /proc does not tell."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text("utf-8").split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


@contextlib.asynccontextmanager
async def pods() -> AsyncIterator[list[int]]:
    """The canned engines; yields their ports."""
    async with python("tests.bench.engine") as process:
        assert process.stdout is not None
        yield msgspec.json.decode(await process.stdout.readline(), type=list[int])


@contextlib.asynccontextmanager
async def client() -> AsyncIterator[Callable[[Load], Any]]:
    """The load; yields what performs one."""
    async with python("tests.bench.client") as process:

        async def perform(load: Load) -> Result:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(msgspec.json.encode(load) + b"\n")
            return msgspec.json.decode(await process.stdout.readline(), type=Result)

        yield perform


@contextlib.asynccontextmanager
async def plain_envoy(directory: Path, printed: str) -> AsyncIterator[tuple[Process, int]]:
    """Envoy with the bootstrap `printed`, less what is there for us; yields it and the port clients connect to."""
    port, admin = free_port(), free_port()
    path = directory / "plain.yaml"
    bootstrap = without_ext_proc(yaml.safe_load(printed), port, admin)
    path.write_text(yaml.safe_dump(bootstrap), "utf-8")
    with (directory / "plain.log").open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            *(str(envoy_binary()), "-c", str(path), "--concurrency", "1"),
            *("--log-level", "warning", "--use-dynamic-base-id"),
            stdout=log,
            stderr=log,
        )
    try:
        await _ready(f"http://127.0.0.1:{admin}/ready")
        yield process, port
    finally:
        await _end(process)


def without_ext_proc(bootstrap: dict[str, Any], port: int, admin: int) -> dict[str, Any]:
    """The same listener and pods, chosen by Envoy's own balancing: no ext_proc, no Lua, no access log, no header of ours.

    In turn, because that spreads a closed loop's streams over the pods as evenly as our policies do: two streams of one pod
    wake Envoy together, so Envoy's own least-request, which draws two pods by chance, would be flattered per token.
    """
    plain = copy.deepcopy(bootstrap)
    plain["admin"]["address"]["socket_address"]["port_value"] = admin
    resources = plain["static_resources"]
    listener = resources["listeners"][0]
    listener["address"]["socket_address"]["port_value"] = port
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    manager["http_filters"] = [each for each in manager["http_filters"] if each["name"].endswith(".router")]
    for ours in ("access_log", "always_set_request_id_in_response"):
        manager.pop(ours, None)
    for host in manager["route_config"]["virtual_hosts"]:
        host.pop("response_headers_to_add", None)
    resources["clusters"] = [each for each in resources["clusters"] if each["name"] == "pods"]
    policy = {"@type": f"type.googleapis.com/{_ROUND_ROBIN}"}
    extension = {"name": "envoy.load_balancing_policies.round_robin", "typed_config": policy}
    resources["clusters"][0]["load_balancing_policy"] = {"policies": [{"typed_extension_config": extension}]}
    return plain


async def samples(url: str) -> list[tuple[str, float]]:
    """Name, with labels, and value of each line of an exposition page or of Envoy's own counters; other lines apart."""
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        lines = (await response.text()).splitlines()
    found = []
    for line in lines:
        name, _, value = line.rpartition(" ")
        with contextlib.suppress(ValueError):  # a comment, or one of Envoy's histograms
            found.append((name, float(value)))
    return found


async def post(url: str, body: bytes) -> None:
    """Sends `body`."""
    async with aiohttp.ClientSession() as session, session.post(url, data=body) as response:
        response.raise_for_status()


@contextlib.asynccontextmanager
async def python(module: str, *arguments: str) -> AsyncIterator[Process]:
    """A module of ours as a process, its standard input and output as pipes; it ends with the context."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, *arguments),
        cwd=_ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=_LONGEST_LINE,
    )
    try:
        yield process
    finally:
        await _end(process)


async def _ready(url: str) -> None:
    async with asyncio.timeout(20), aiohttp.ClientSession() as session:
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(url) as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(0.03)


async def _end(process: Process) -> None:
    if process.returncode is None:
        process.send_signal(signal.SIGTERM)
    await process.wait()
