"""Servers that begin as copies of a process which has loaded their code: loading it is most of what a short test costs.

A copy runs `envoy_extproc.cli.main` with the arguments and the environment that the command would have, is a process by itself,
and ends as one. What is not tested this way is the interpreter's own start; the demo, the rolling restarts and the tests of the
command line begin with it.
"""

from __future__ import annotations

import asyncio
import json
import os
import selectors
import signal
import socket
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

_LARGEST = 1 << 20


def available() -> bool:
    """Whether this system tells of the end of a process by a descriptor; where it does not, servers start by themselves."""
    if sys.platform != "linux":
        return False
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:
        return False
    return True


class Copy:
    """One of them, as `asyncio.subprocess.Process` has it."""

    def __init__(self, pid: int, told: Path) -> None:
        self.pid = pid
        self._told = told

    @property
    def returncode(self) -> int | None:
        """Its exit status, negative where a signal ended it; None while it runs."""
        try:
            return int(self._told.read_text())
        except FileNotFoundError:
            return None

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


class Original:
    """The process that is copied."""

    def __init__(self, folder: Path, line: socket.socket) -> None:
        self._folder = folder
        self._line = line

    def copy(self, arguments: Sequence[str], log: int) -> Copy:
        """Starts a copy with these arguments, whose output goes to a file that is open."""
        told = json.dumps({"arguments": list(arguments), "environment": dict(os.environ)}).encode()
        socket.send_fds(self._line, [told], [log])
        pid = int(self._line.recv(_LARGEST))
        return Copy(pid, self._folder / str(pid))


@contextmanager
def original() -> Iterator[Original]:
    """Loads the code once; its copies that are left in the end are killed."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with TemporaryDirectory(prefix="copies-") as folder, ours:
        command = [sys.executable, "-m", "tests.support.forking", str(its.fileno()), folder]
        with its:
            process = Popen(command, pass_fds=[its.fileno()])
        try:
            yield Original(Path(folder), ours)
        finally:
            ours.close()
            process.wait()


# -- in that process -------------------------------------------------------------------------------------------------------


def _main(line: socket.socket, folder: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import envoy_extproc.cli  # noqa: F401, PLC0415  what the copies are to have

    copies: dict[int, int] = {}  # by the descriptor that tells of the end
    with selectors.DefaultSelector() as selector:
        selector.register(line, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fd != line.fileno():
                    selector.unregister(key.fd)
                    os.close(key.fd)
                    _tell(folder, copies.pop(key.fd))
                    continue
                message, logs, _, _ = socket.recv_fds(line, _LARGEST, 1)
                if not message:
                    for pid in copies.values():
                        os.kill(pid, signal.SIGKILL)
                    return
                pid = os.fork()
                if pid == 0:
                    _become(line, selector, logs[0], json.loads(message))
                os.close(logs[0])
                descriptor = os.pidfd_open(pid)
                copies[descriptor] = pid
                selector.register(descriptor, selectors.EVENT_READ)
                line.send(str(pid).encode())


def _tell(folder: Path, pid: int) -> None:
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    writing = folder / f"{pid}.writing"
    writing.write_text(str(status))
    writing.rename(folder / str(pid))


def _become(
    line: socket.socket, selector: selectors.BaseSelector, log: int, told: dict[str, Any]
) -> NoReturn:
    status = 1
    try:
        selector.close()
        line.close()
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.clear()
        os.environ.update(told["environment"])
        sys.argv = ["envoy-extproc", *told["arguments"]]
        from envoy_extproc import cli  # noqa: PLC0415  it is loaded

        cli.main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:  # noqa: BLE001  the outermost edge of a process: nothing is behind it
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _main(socket.socket(fileno=int(sys.argv[1])), Path(sys.argv[2]))
