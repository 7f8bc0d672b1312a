"""The ports that processes of one machine are given."""

from __future__ import annotations

import socket
import sys
from subprocess import check_output

from envoy_extproc.simulation.stack import free_port

MANY = 40


def test_no_port_is_given_twice_soon() -> None:
    assert len({free_port() for _ in range(MANY)}) == MANY


def test_two_processes_take_from_different_shares() -> None:
    script = (
        f"from envoy_extproc.simulation.stack import free_port; print(*[free_port() for _ in range({MANY})])"
    )
    first, second = (set(check_output([sys.executable, "-c", script]).split()) for _ in range(2))
    assert not first & second


def test_one_that_somebody_listens_on_is_passed_over() -> None:
    port = free_port()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", port + 1))
        listener.listen()
        given = [free_port() for _ in range(MANY)]
    assert port + 1 not in given
    assert max(given) < 32_768
