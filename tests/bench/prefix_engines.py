"""Simulated engines, several in one process, for the bench of prefixes: `python -m tests.bench.prefix_engines COUNT OPTIONS`.

`OPTIONS` are those of `EngineOptions` in JSON. One line on standard output: the addresses, a JSON list. It serves until it is ended.
"""

from __future__ import annotations

import asyncio
import json
import sys

import uvloop

from envoy_extproc.simulation.engine import Engine, EngineOptions


async def serve(count: int, options: EngineOptions) -> None:
    """Starts them, tells where they are, and serves."""
    engines = [Engine(options) for _ in range(count)]
    for engine in engines:
        await engine.start()
    print(json.dumps([engine.address for engine in engines]), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(int(sys.argv[1]), EngineOptions(**json.loads(sys.argv[2]))))
