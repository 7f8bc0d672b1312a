"""Code that may not reach the network: whatever it tries, through Python's sockets, ends with an error instead.

tiktoken downloads an encoding that it does not find, and a package that brings some may do as it likes. Python tells an audit hook
(PEP 578) of every connection and every question to DNS before it happens, and the hook can refuse.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

_REFUSED = frozenset(
    {
        "socket.connect",
        "socket.getaddrinfo",
        "socket.gethostbyaddr",
        "socket.gethostbyname",
        "socket.sendmsg",
        "socket.sendto",
    }
)


class NetworkNeeded(RuntimeError):
    """Code that must do without wanted to reach the network. No `OSError`: clients of the network try again after those."""


class _Thread(threading.local):
    offline = False


_thread = _Thread()


@contextmanager
def offline() -> Iterator[None]:
    """Keeps this thread off the network.

    Raises:
        NetworkNeeded: from within, instead of a connection or a question to DNS.
    """
    _install()
    _thread.offline = True
    try:
        yield
    finally:
        _thread.offline = False


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if _thread.offline and event in _REFUSED:
        raise NetworkNeeded(f"it tries to reach {_target(event, arguments)}")


def _target(event: str, arguments: tuple[Any, ...]) -> str:
    """Whom, as far as the event tells: events that begin with a socket have the address behind it."""
    places = (
        arguments[-1:] if event in ("socket.connect", "socket.sendto", "socket.sendmsg") else arguments[:1]
    )
    return str(places[0]) if places else "the network"


@cache  # a hook stays for good
def _install() -> None:
    sys.addaudithook(_refuse)
