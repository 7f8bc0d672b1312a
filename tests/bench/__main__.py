"""`make bench`: one table, goals beside the figures. It never fails for a figure; README.md says how to read it."""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table

from tests.bench import micro
from tests.bench.cases import FULL, QUICK, Bench, Case, Measured, Usage

RESULTS = Path(__file__).parent / "results" / "bench.json"

_WIDTH = 140  # columns, where the table goes to a file
JSON_GOAL = 1.0  # ms of server CPU for a request
LONG_PROMPT_GOAL = 10.0  # ms of server CPU for a prompt of 1 MB


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the table; what a line does not have is None."""

    name: str
    unit: str
    plain: float | None = None
    envoy: float | None = None
    server: float | None = None
    ratio: float | None = None
    added: float | None = None
    spread: float | None = None
    goal: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the server's figure is within its goal."""
        return None if self.goal is None or self.server is None else self.server <= self.goal


def rows(measured: Measured, single: list[tuple[str, float]]) -> Iterator[Row]:
    """All of them, in the table's order."""
    for case in measured.cases:
        goal = None
        if not case.per_event:
            goal = LONG_PROMPT_GOAL if case.name.startswith("1 MB") else JSON_GOAL
        yield _case_row(case, goal)
    yield from _latency_rows(measured)
    yield Row(
        name="idle CPU: 8 pods scraped at 200 ms, small page",
        unit="% core",
        server=measured.idle * 100,
    )
    yield Row(
        name="idle CPU: 8 pods scraped at 200 ms, vLLM's 60 KB page",
        unit="% core",
        server=measured.idle_real_page * 100,
    )
    kib = 1024
    yield Row(
        name="memory per held stream (RSS)",
        unit="KiB",
        envoy=measured.held_envoy / kib,
        server=measured.held_server / kib,
    )
    for name, figure in single:
        yield Row(name=f"in process: {name}", unit="us", server=figure)


def _case_row(case: Case, goal: float | None) -> Row:
    scale = 1e6 if case.per_event else 1e3
    return Row(
        name=f"CPU per {'token' if case.per_event else 'request'}: {case.name}",
        unit="us" if case.per_event else "ms",
        plain=case.median(lambda usage: usage.envoy, case.plain) * scale,
        envoy=case.median(lambda usage: usage.envoy, case.ours) * scale,
        server=case.median(lambda usage: usage.server, case.ours) * scale,
        ratio=case.ratio,
        spread=case.spread * 100,
        goal=goal,
    )


def _latency_rows(measured: Measured) -> Iterator[Row]:
    plain, ours = measured.latencies
    for share in (0.5, 0.99):
        before, after = (each[int(share * (len(each) - 1))] * 1e3 for each in (plain, ours))
        yield Row(
            name=f"latency p{share * 100:.0f}: sequential, non-stream JSON, 2 KB prompt",
            unit="ms",
            plain=before,
            envoy=after,
            added=after - before,
        )


def table(shown: list[Row]) -> Table:
    """For people."""
    drawn = Table(title="envoy-extproc bench", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    drawn.add_column("what", no_wrap=True)
    drawn.add_column("unit", no_wrap=True)
    for name in ("plain Envoy", "Envoy", "server", "all / plain", "spread", "goal"):
        drawn.add_column(name, justify="right", no_wrap=True)
    for row in shown:
        effect = _figure(row.ratio, "x") if row.added is None else f"+{row.added:.2f}"
        spread = "" if row.spread is None else f"{row.spread:.0f} %"
        drawn.add_row(
            *(row.name, row.unit, _figure(row.plain), _figure(row.envoy), _figure(row.server)),
            *(effect, spread, _goal(row)),
        )
    return drawn


def _figure(value: float | None, unit: str = "") -> str:
    if value is None:
        return ""
    digits = 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f}{unit}"


def _goal(row: Row) -> str:
    if row.goal is None:
        return ""
    return f"[green]<= {row.goal:g} ✓[/]" if row.met else f"[red]<= {row.goal:g} ✗[/]"


def notes(measured: Measured) -> Iterator[str]:
    """What has to be known to believe the table."""
    yield (
        "CPU is of whole processes, user and kernel; medians of rounds in turn. Idle CPU of the server is subtracted "
        "from its figures and stands in its own row. spread: of the server's figure over the rounds, (max - min) / median."
    )
    for case in measured.cases:
        if case.per_event:
            yield f"{case.name}: {_messages(case.ours):.2f} messages to the server for each token, all of them counted."
    yield (
        f"Through Envoy with us {measured.sent} requests were answered in full; the server has seen "
        f"{measured.served:.0f} of them, {measured.reported:.0f} with the engine's own usage."
    )
    if measured.failures:
        yield f"{measured.failures} answers were not whole; the first: {measured.failed}"


def _messages(rounds: tuple[Usage, ...]) -> float:
    """Well below 1 if Envoy, hurried, reads several events at once: then a token is cheaper than in life."""
    return statistics.median(each.messages / each.events for each in rounds)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short round each: about 30 seconds")
    plan = QUICK if parser.parse_args().quick else FULL
    console = Console()
    if not console.is_terminal:
        console.width = _WIDTH
    began = time.monotonic()
    with (
        console.status("processes") as status,
        tempfile.TemporaryDirectory(prefix="envoy-extproc-bench-") as directory,
    ):
        measured = asyncio.run(Bench(plan, status.update).run(Path(directory)))
        status.update("in-process figures")
        single = list(micro.figures())
    shown = list(rows(measured, single))
    console.print(table(shown))
    for note in notes(measured):
        console.print(note, highlight=False)
    console.print(
        f"{time.monotonic() - began:.0f} s; figures of each round in {RESULTS.relative_to(Path(__file__).parents[2])}"
    )
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_bytes(
        msgspec.json.format(msgspec.json.encode({"rows": shown, "measured": measured}), indent=2)
    )


if __name__ == "__main__":
    main()
