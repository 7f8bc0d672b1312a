"""Holds the stack of the checkout that it runs in, for `compare`: its own server, its own printed bootstrap.

Started with the interpreter and the modules of that checkout, whose bench may be older than this file: so it imports
nothing but the stack. A line of JSON on standard input says what to start, one on standard output where it is, as
`targets.Place`; it ends with standard input.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from envoy_extproc.simulation.stack import Stack


def place(stack: Stack) -> dict[str, Any]:
    """What `targets.Place` is read from."""
    assert stack.envoy is not None
    return {
        "port": stack.port,
        "envoy": stack.envoy.pid,
        "servers": [server.pid for server in stack.servers if server is not None],
        "envoy_admin": stack.envoy_admin_url,
        "admins": [stack.admin_url(number) for number in range(len(stack.servers))],
    }


async def hold(directory: Path, endpoints: list[dict[str, Any]], config: dict[str, Any]) -> None:
    """Runs it until standard input ends."""
    async with Stack(directory, endpoints, config=config) as stack:
        print(json.dumps(place(stack)), flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asked = json.loads(sys.stdin.readline())
    asyncio.run(hold(Path(asked["directory"]), asked["endpoints"], asked["config"]))
