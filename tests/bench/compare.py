"""A figure before and after: chosen cases in two checkouts in turn, A B B A, over the same pods and from the same client.

    python -m tests.bench.compare OTHER            # four minutes; --quick: one, good for nothing but to see that it runs

OTHER is before, this checkout is after. Each serves with its own interpreter, code and printed bootstrap; both are up at the
same time. A ratio is formed within a round, after / before; medians are over rounds. It never fails for a figure: the
status is 1 if an answer was not whole or is missing in a server's books.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table

from tests.bench.cases import JSON, LONG, SHORT
from tests.bench.processes import client, pods
from tests.bench.rounds import Case, Kind, Plan, Rounds
from tests.bench.targets import CONFIGS, NATIVE, STREAM, Books, Cost, Place, Target, endpoints

HERE = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results" / "compare.json"
BEFORE, AFTER = "before", "after"
KINDS: Mapping[str, Kind] = {"json": JSON, "128": SHORT, "1000": LONG}
PARTS: Mapping[str, Callable[[Cost], float]] = {
    "server": lambda cost: cost.server,
    "Envoy": lambda cost: cost.envoy,
    "both": lambda cost: cost.server + cost.envoy,
}
_START_SECONDS = 60.0
_WIDTH = 140


class CheckoutError(Exception):
    """A checkout cannot be run; the message says why."""


class Lane(msgspec.Struct, kw_only=True):
    """What was measured in one lane."""

    lane: str
    cases: list[Case]
    books: list[Books]


def interpreter(checkout: Path) -> Path:
    """The Python that a checkout's dependencies are installed for.

    Raises:
        CheckoutError: it has none.
    """
    python = checkout / ".venv" / "bin" / "python"
    if not (checkout / "envoy_extproc").is_dir():
        raise CheckoutError(f"{checkout}: no checkout of envoy-extproc")
    if not python.exists():
        raise CheckoutError(f"{checkout}: has no .venv; `ONCE=1 make demo` there makes one")
    return python


@contextlib.asynccontextmanager
async def held(checkout: Path, directory: Path, pod_ports: Sequence[int], lane: str) -> AsyncIterator[Place]:
    """A stack of the checkout's own code.

    Raises:
        CheckoutError: it does not come up; what it said is on standard error.
    """
    process = await asyncio.create_subprocess_exec(
        *(str(interpreter(checkout)), "-P", str(Path(__file__).with_name("hold.py"))),
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout)},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    asked = {"directory": str(directory), "endpoints": endpoints(pod_ports), "config": CONFIGS[lane]}
    process.stdin.write(msgspec.json.encode(asked) + b"\n")
    try:
        async with asyncio.timeout(_START_SECONDS):
            line = await process.stdout.readline()
        if not line:
            raise CheckoutError(f"{checkout}: the stack did not come up")
        yield msgspec.json.decode(line, type=Place)
    finally:
        process.stdin.close()
        await process.wait()


async def compare(other: Path, lanes: Sequence[str], kinds: Sequence[Kind], plan: Plan) -> list[Lane]:
    """Lane by lane.

    Raises:
        CheckoutError: a checkout cannot be run, or an answer was not whole.
    """
    with tempfile.TemporaryDirectory(prefix="envoy-extproc-compare-") as directory:
        return [await _lane(Path(directory, lane), other, lane, kinds, plan) for lane in lanes]


async def _lane(directory: Path, other: Path, lane: str, kinds: Sequence[Kind], plan: Plan) -> Lane:
    async with contextlib.AsyncExitStack() as stack:
        ports = await stack.enter_async_context(pods())
        both = []
        for variant, checkout in ((BEFORE, other), (AFTER, HERE)):
            place = await stack.enter_async_context(held(checkout, directory / variant, ports, lane))
            both.append(Target(variant, place))
        perform = await stack.enter_async_context(client())
        rounds = Rounds(perform, plan, lambda text: print(f"{lane}: {text}", file=sys.stderr))
        await rounds.warm_up(both)
        cases = [await rounds.case(kind, both) for kind in kinds]
        books = [await target.books() for target in both]
    if rounds.failures:
        raise CheckoutError(f"{rounds.failures} answers were not whole; the first: {rounds.failed}")
    return Lane(lane=lane, cases=cases, books=books)


# -- shown -------------------------------------------------------------------------------------------------------------


def ratios(case: Case, part: Callable[[Cost], float]) -> list[float]:
    """After / before, each within one round: what disturbs a round disturbs both."""
    return [
        after / before for before, after in zip(case.each(BEFORE, part), case.each(AFTER, part), strict=True)
    ]


def table(found: Sequence[Lane]) -> Table:
    """A row for each case and part."""
    drawn = Table(
        "what", "lane", "CPU of", title="before and after", title_justify="left", box=box.SIMPLE_HEAD
    )
    for name in ("unit", BEFORE, AFTER, "after / before", "rounds from", "to"):
        drawn.add_column(name, justify="right", no_wrap=True)
    for lane in found:
        for case in lane.cases:
            scale, unit = (1e6, "us/token") if case.per_event else (1e3, "ms/request")
            for name, part in PARTS.items():
                each = ratios(case, part)
                medians = (f"{case.median(variant, part) * scale:.3f}" for variant in (BEFORE, AFTER))
                share = (statistics.median(each), min(each), max(each))
                drawn.add_row(case.name, lane.lane, name, unit, *medians, *(f"{one:.2f}" for one in share))
    return drawn


def missing(found: Sequence[Lane]) -> list[str]:
    """What is not in a server's books."""
    return [
        f"{lane.lane}: {msgspec.structs.asdict(books)}"
        for lane in found
        for books in lane.books
        if not books.right
    ]


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.compare", description=__doc__.splitlines()[0]
    )
    parser.add_argument("other", type=Path, help="another checkout with its own .venv: before")
    parser.add_argument("--case", action="append", choices=KINDS, help="repeatable; all three if not given")
    parser.add_argument(
        "--lane", action="append", choices=(NATIVE, STREAM), help="repeatable; both if not given"
    )
    parser.add_argument(
        "--rounds", type=int, default=10, help="of each case in each lane; an even number is fair"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="of one round, in each checkout")
    parser.add_argument("--quick", action="store_true", help="two rounds of half a second")
    options = parser.parse_args()
    rounds, seconds = (2, 0.5) if options.quick else (options.rounds, options.seconds)
    plan = Plan(rounds=rounds, long_rounds=rounds, seconds=seconds)
    kinds = [KINDS[name] for name in options.case or KINDS]
    try:
        found = asyncio.run(compare(options.other.resolve(), options.lane or (NATIVE, STREAM), kinds, plan))
    except CheckoutError as error:
        print(error, file=sys.stderr)
        return 1
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=2))
    Console(width=None if sys.stdout.isatty() else _WIDTH).print(table(found))
    for line in missing(found):
        print(f"not accounted: {line}")
    return 1 if missing(found) else 0


if __name__ == "__main__":
    sys.exit(main())
