"""Servers that begin as copies of a process which has loaded their code: loading it is most of what a short test costs.

The copies are `multiprocessing`'s, by its fork server. One runs `envoy_extproc.cli.main` with the arguments and the environment
that the command would have, is a process by itself, and ends as one. What is not tested this way is the interpreter's own start;
the demo, the rolling restarts and the tests of the command line begin with it.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

AVAILABLE = "forkserver" in multiprocessing.get_all_start_methods()


class Copy:
    """One of them, as `asyncio.subprocess.Process` has it. It is killed with the process that made it.

    Args:
        arguments: of the command line.
        log: a file to which its output is added.
    """

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["envoy_extproc.cli"])
        self._process = context.Process(target=_run, args=(arguments, log, dict(os.environ)), daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        """Its number."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit status, negative where a signal ended it; None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Raises ProcessLookupError: it has ended."""
        if self.returncode is not None:
            raise ProcessLookupError
        os.kill(self.pid, number)

    async def wait(self) -> int:
        """Waits for its end."""
        while (status := self.returncode) is None:
            await asyncio.sleep(0.005)
        return status


def _run(arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["envoy-extproc", *arguments]
    from envoy_extproc import cli  # noqa: PLC0415  it is loaded

    cli.main()
