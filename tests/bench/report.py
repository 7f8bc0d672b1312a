"""What was measured, for people: the table, what has to be known to believe it, and the README's part of it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Literal

import msgspec
from rich import box
from rich.table import Table

from tests.bench.cases import JSON, LONG, PROMPT, SHORT, Measured
from tests.bench.rounds import Case, Kind, messages_per_event
from tests.bench.targets import NATIVE, NONE, PLAIN, STREAM

_KIB = 1024
_DRAWN = (PLAIN, NATIVE, STREAM, NONE)
_Part = Literal["server", "ratio", "added"]


class Goal(msgspec.Struct, frozen=True):
    """The most that one of a row's figures should be."""

    part: _Part
    most: float


GOALS: dict[tuple[str, str], Goal] = {
    (JSON.name, NATIVE): Goal("server", 0.7),
    (JSON.name, STREAM): Goal("server", 1.0),
    (SHORT.name, NATIVE): Goal("ratio", 1.5),
    (LONG.name, NATIVE): Goal("ratio", 1.1),
    (PROMPT.name, NATIVE): Goal("server", 10.0),
    (PROMPT.name, STREAM): Goal("server", 10.0),
}
LATENCY_GOAL = Goal("added", 2.0)  # ms, at the median


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the table; what a line does not have is None. `spread` is of `ratio`, in percent."""

    name: str
    unit: str
    variant: str = ""
    plain: float | None = None
    envoy: float | None = None
    server: float | None = None
    ratio: float | None = None
    added: float | None = None
    spread: float | None = None
    goal: Goal | None = None

    @property
    def met(self) -> bool:
        """Whether the figure is within its goal."""
        value = None if self.goal is None else getattr(self, self.goal.part)
        return value is not None and self.goal is not None and value <= self.goal.most


def rows(measured: Measured, single: list[tuple[str, float]]) -> Iterator[Row]:
    """All of them, in the table's order."""
    for case in measured.cases:
        for variant in case.rounds:
            if variant != PLAIN:
                yield _case_row(case, variant)
    yield from _latency_rows(measured)
    yield from _idle_rows(measured)
    for variant, held in measured.held.items():
        yield Row(
            name="memory per stream held open (RSS)",
            variant=variant,
            unit="KiB",
            envoy=held.envoy / _KIB,
            server=held.server / _KIB,
        )
    for name, figure in single:
        yield Row(name=f"in process: {name}", unit="us", server=figure)


def _case_row(case: Case, variant: str) -> Row:
    scale = 1e6 if case.per_event else 1e3
    ratios = case.ratios(variant)
    return Row(
        name=f"CPU per {'token' if case.per_event else 'request'}: {case.name}",
        variant=variant,
        unit="us" if case.per_event else "ms",
        plain=case.median(PLAIN, lambda cost: cost.envoy) * scale,
        envoy=case.median(variant, lambda cost: cost.envoy) * scale,
        server=case.median(variant, lambda cost: cost.server) * scale,
        ratio=statistics.median(ratios),
        spread=_spread(ratios),
        goal=GOALS.get((case.name, variant)),
    )


def _spread(values: list[float]) -> float | None:
    """The interquartile range in percent of the median; None of a single round."""
    if len(values) < 2:
        return None
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / middle * 100


def _latency_rows(measured: Measured) -> Iterator[Row]:
    """Under load, of each round's percentile the median over rounds; what is added likewise."""
    loads = (
        ("one request at a time", [measured.sequential]),
        (f"{measured.rate:.0f} requests/s", measured.loaded),
    )
    for name, pairs in loads:
        for share in (0.5, 0.99):
            each = [pair.at(share) for pair in pairs]
            sequential = pairs[0] is measured.sequential
            yield Row(
                name=f"latency p{share * 100:.0f}: {name}",
                variant=NATIVE,
                unit="ms",
                plain=statistics.median(plain for plain, _ in each) * 1e3,
                envoy=statistics.median(ours for _, ours in each) * 1e3,
                added=statistics.median(ours - plain for plain, ours in each) * 1e3,
                goal=LATENCY_GOAL if sequential and share == 0.5 else None,
            )


def _idle_rows(measured: Measured) -> Iterator[Row]:
    pages = (("small page", measured.idle), ("vLLM's 60 KB page", measured.idle_real_page))
    for page, shares in pages:
        if shares:
            yield Row(
                name=f"idle CPU: 8 pods scraped at 200 ms, {page}",
                variant=NATIVE,
                unit="% core",
                plain=shares[PLAIN].envoy * 100,
                envoy=shares[NATIVE].envoy * 100,
                server=shares[NATIVE].server * 100,
            )


_HEADINGS = ("plain Envoy", "Envoy", "server", "all / plain", "spread", "goal")


def table(shown: list[Row]) -> Table:
    """For people."""
    drawn = Table(title="envoy-extproc bench", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("what", "variant", "unit"):
        drawn.add_column(name, no_wrap=True)
    for name in _HEADINGS:
        drawn.add_column(name, justify="right", no_wrap=True)
    before = ""
    for row in shown:
        goal = _goal(row)
        if goal:
            goal = f"[green]{goal} ✓[/]" if row.met else f"[red]{goal} ✗[/]"
        drawn.add_row("" if row.name == before else row.name, row.variant, row.unit, *_figures(row), goal)
        before = row.name
    return drawn


def _figures(row: Row) -> tuple[str, ...]:
    effect = "" if row.ratio is None else f"{row.ratio:.2f}x"
    if row.added is not None:
        effect = f"{row.added:+.2f}"
    spread = "" if row.spread is None else f"{row.spread:.0f} %"
    return (*map(_figure, (row.plain, row.envoy, row.server)), effect, spread)


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.{1 if abs(value) >= 10 else 2}f}"


def _goal(row: Row) -> str:
    if row.goal is None:
        return ""
    return f"<= {row.goal.most:.2f}x" if row.goal.part == "ratio" else f"<= {row.goal.most:g} {row.unit}"


def books(measured: Measured) -> Table:
    """Whether each answer that a client had is in the books of a server."""
    drawn = Table(title="every request accounted?", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    drawn.add_column("variant")
    for name in ("whole answers", "reported good", "engine's usage", "native: ended", "reported", "bypassed"):
        drawn.add_column(name, justify="right")
    drawn.add_column("")
    for each in measured.books:
        counts = (each.sent, each.served, each.usages, each.ended, each.reported, each.bypassed)
        verdict = "[green]✓[/]" if each.right else "[red]✗[/]"
        drawn.add_row(each.variant, *(f"{count:,.0f}" for count in counts), verdict)
    return drawn


def notes(measured: Measured) -> Iterator[str]:
    """What has to be known to believe the table."""
    yield (
        "CPU is of whole processes, user and kernel, less what they use without load, which has its own rows. "
        "Figures are medians over the rounds, all / plain is the median of the rounds' own ratios, spread its "
        "interquartile range. server: all server processes together. Latency stands under Envoy, what is added under all / plain."
    )
    for kind in (SHORT, LONG):
        share = messages_per_event(measured.case(kind).rounds[STREAM])
        yield f"{kind.name}: in the stream lane {share:.2f} messages to the server for each token."
    rates = measured.case(JSON)
    each = ", ".join(f"{variant} {rates.rate(variant):,.0f}" for variant in rates.rounds)
    yield f"{JSON.name}, closed loop, requests/s (the load itself takes its part of the machine): {each}."
    if measured.failures:
        yield f"{measured.failures} answers were not whole; the first: {measured.failed}"


def markdown(shown: list[Row]) -> str:
    """The README's table: the two lanes, without what only who works on this needs."""
    lines = ["| | lane | plain Envoy | Envoy with us | server | all / plain |", "|---|---|--:|--:|--:|--:|"]
    before = ""
    for row in shown:
        if row.variant not in (NATIVE, STREAM):
            continue
        cells = [f"{cell} {row.unit}".strip() if cell else "" for cell in _figures(row)[:3]]
        effect = _figures(row)[3] + (" ms" if row.added is not None else "")
        name = "" if row.name == before else row.name
        lines.append(f"| {' | '.join([name, row.variant, *cells, effect])} |")
        before = row.name
    return "\n".join(lines)


def bars(measured: Measured, kinds: tuple[Kind, ...]) -> list[tuple[str, list[tuple[str, float, float]]]]:
    """Groups for the plot: the case, and of each variant its name and the CPU of Envoy and server, us per token."""
    groups = []
    for kind in kinds:
        case = measured.case(kind)
        each = [
            (
                variant,
                case.median(variant, lambda cost: cost.envoy) * 1e6,
                case.median(variant, lambda cost: cost.server) * 1e6,
            )
            for variant in _DRAWN
        ]
        groups.append((kind.name, each))
    return groups
