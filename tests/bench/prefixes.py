"""What routing by prompts is worth: the same requests by each policy, through a real Envoy to eight simulated engines.

    python -m tests.bench.prefixes             # five minutes
    python -m tests.bench.prefixes --quick     # one
    python -m tests.bench.prefixes --virtual   # the same requests on the virtual fleet: a minute, no process but this one
    python -m tests.bench.prefixes --publish   # picture and table into docs/ and README.md as well

It never fails for a figure; its status is 1 if an answer was not whole.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import structlog
from rich import box
from rich.console import Console
from rich.table import Table

from tests.bench import prefix_plot
from tests.bench.prefix_runs import (
    ALONE,
    PODS,
    POLICIES,
    SHARING,
    Case,
    Figures,
    capacity,
    measured,
    simulated,
)

_ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
PICTURE = _ROOT / "docs" / "prefixes.svg"
PAGE = _ROOT / "docs" / "routing.md"
_MARKS = "<!-- prefixes: written by `python -m tests.bench.prefixes --publish` -->", "<!-- /prefixes -->"
_WIDTH = 170  # columns, where the table goes to a file

BOUND = 0.5
"""Seconds within which 95 of 100 first tokens are to be there."""

HOPELESS = 10.0
"""Seconds beyond which a policy is not asked for more."""


class Plan(NamedTuple):
    """How long and how often. `sweep`: the rates on the virtual fleet, for the curve and the highest within the bound."""

    rates: tuple[float, ...]
    policies: tuple[str, ...]
    seconds: float
    warm: float
    sweep: tuple[float, ...]


FULL = Plan((24, 40), POLICIES, 22, 8, (8, 16, 24, 32, 40, 48, 64, 80, 96, 112, 128, 144))
QUICK = Plan((40,), POLICIES, 9, 4, (16, 32, 48, 64))


def cases(plan: Plan) -> list[Case]:
    """All that is compared; at each rate another policy begins."""
    found = []
    for turn, rate in enumerate(plan.rates):
        shift = turn % len(plan.policies)
        turns = (*plan.policies[shift:], *plan.policies[:shift])
        found += [sharing(plan, policy, rate) for policy in turns]
    alone = msgspec.structs.replace(ALONE, seconds=min(ALONE.seconds, plan.seconds))
    return found + [
        Case(name="nothing shared", policy=policy, workload=alone, warm=min(2.0, plan.warm))
        for policy in ("least-request", "prefix-cache")
    ]


def sharing(plan: Plan, policy: str, rate: float) -> Case:
    """Conversations with common system prompts."""
    workload = msgspec.structs.replace(SHARING, rate=rate, seconds=plan.seconds)
    return Case(name="shared prompts", policy=policy, workload=workload, warm=plan.warm)


def ordered(figures: Sequence[Figures]) -> list[Figures]:
    """By workload and rate, within them by policy."""
    return sorted(
        figures,
        key=lambda each: (
            each.case.name != "shared prompts",
            each.case.workload.rate,
            POLICIES.index(each.case.policy),
        ),
    )


def sweep(plan: Plan) -> Iterator[Figures]:
    """Each policy at ever higher rates on the virtual fleet, until it is hopeless."""
    for policy in plan.policies:
        for rate in plan.sweep:
            figures = simulated(sharing(plan, policy, rate))
            yield figures
            if figures.percentile(95) > HOPELESS:
                break


def table(figures: Sequence[Figures], beside: Sequence[Figures]) -> Table:
    """A row for each run, and what the virtual fleet says beside."""
    simulated_ = {_key(each): each for each in beside}
    shown = Table(box=box.SIMPLE_HEAD, title=f"{PODS} engines, TTFT in milliseconds")
    for name in ("workload", "requests/s", "of capacity", "policy"):
        shown.add_column(name, no_wrap=True)
    for name in (
        "hit rate",
        "p50",
        "p95",
        "p99",
        "answers/s",
        "tokens/s",
        "busiest pod",
        "virtual: hits",
        "p95",
    ):
        shown.add_column(name, justify="right")
    before = None
    for each in ordered(figures):
        what = (each.case.name, f"{each.case.workload.rate:g}", f"{capacity(each.case.workload):.0%}")
        if before is not None and what != before:
            shown.add_section()
        other = simulated_.get(_key(each))
        shown.add_row(
            *(what if what != before else ("", "", "")),
            each.case.policy + ("  (disturbed)" if each.disturbed else ""),
            f"{each.hit_rate:.1%}",
            *(f"{1000 * each.percentile(percent):.0f}" for percent in (50, 95, 99)),
            f"{each.completed:.1f}",
            f"{each.tokens:.0f}",
            f"{each.busiest:.2f}",
            *(("", "") if other is None else (f"{other.hit_rate:.1%}", f"{1000 * other.percentile(95):.0f}")),
        )
        before = what
    return shown


def _key(each: Figures) -> tuple[str, float, str]:
    return each.case.name, each.case.workload.rate, each.case.policy


def highest(swept: Sequence[Figures]) -> Mapping[str, float]:
    """The highest rate up to which 95 of 100 first tokens are there within the bound, by policy; 0 where none is."""
    found = dict.fromkeys((each.case.policy for each in swept), 0.0)
    over = set()
    for each in sorted(swept, key=lambda each: each.case.workload.rate):
        policy = each.case.policy
        if each.percentile(95) > BOUND:
            over.add(policy)
        elif policy not in over:
            found[policy] = each.case.workload.rate
    return found


def notes(figures: Sequence[Figures], swept: Sequence[Figures]) -> Iterator[str]:
    """What one has to know to believe it."""
    real = [each for each in figures if not each.virtual]
    busiest: dict[str, float] = {}
    for each in real:
        for name, percent in each.cpu.items():
            busiest[name] = max(busiest.get(name, 0.0), percent)
    if busiest:
        yield "CPU, percent of a core, of the run that took most: " + ", ".join(
            f"{name} {percent:.0f}" for name, percent in busiest.items()
        )
        late = max(each.late for each in real)
        yield f"requests were sent at most {1000 * late:.0f} ms late (99th percentile of the worst run)"
    rates = ", ".join(f"{policy} {rate:g}" for policy, rate in highest(swept).items())
    yield f"highest rate with p95 within {1000 * BOUND:.0f} ms, virtual fleet: {rates}"
    load = os.getloadavg()[0]
    cores, python = os.cpu_count(), platform.python_version()
    yield f"{platform.system()} {platform.machine()}, {cores} cores, Python {python}, load average {load:.1f} in the end"
    for each in figures:
        if each.failures:
            yield f"{each.failures} answers were not whole, {each.case.policy}: {each.failed}"


def picture(figures: Sequence[Figures], swept: Sequence[Figures], rate: float) -> str:
    """Of the runs with shared prompts; bars are those at `rate`."""
    shared = [each for each in ordered(figures) if each.case.name == "shared prompts"]
    hits = {each.case.policy: each.hit_rate for each in shared if each.case.workload.rate == rate}
    return prefix_plot.svg(hits, _points(swept), _points([each for each in shared if not each.virtual]), rate)


def _points(figures: Sequence[Figures]) -> Mapping[str, Sequence[prefix_plot.Point]]:
    found: dict[str, list[prefix_plot.Point]] = {}
    for each in figures:
        found.setdefault(each.case.policy, []).append((each.case.workload.rate, each.percentile(95)))
    return found


def markdown(figures: Sequence[Figures], swept: Sequence[Figures]) -> Iterator[str]:
    """The table for docs/routing.md."""
    best = highest(swept)
    yield f"| requests/s | policy | hit rate | TTFT p50 | p95 | p99 | busiest pod | requests/s with p95 up to {BOUND:g} s |"
    yield "|--:|---|--:|--:|--:|--:|--:|--:|"
    for each in ordered(figures):
        shared = each.case.name == "shared prompts"
        times = (f"{1000 * each.percentile(percent):,.0f} ms" for percent in (50, 95, 99))
        cells = (
            f"{each.case.workload.rate:g}{'' if shared else ', nothing shared'}",
            f"`{each.case.policy}`",
            f"{each.hit_rate:.0%}",
            *times,
            f"{each.busiest:.2f}",
            f"{best[each.case.policy]:g}" if shared else "",
        )
        yield f"| {' | '.join(cells)} |"
    most = max((percent for each in figures for percent in each.cpu.values()), default=0.0)
    cores, load = os.cpu_count(), os.getloadavg()[0]
    yield ""
    yield (
        f"Taken on {cores} cores with a load average of {load:.1f} in the end; no process of the bench used more than "
        f"{most:.0f} % of one core."
    )


def publish(figures: Sequence[Figures], swept: Sequence[Figures], drawn: str) -> None:
    """Picture and table into docs/."""
    PICTURE.write_text(drawn, "utf-8")
    start, end = _MARKS
    before, _, rest = PAGE.read_text("utf-8").partition(start)
    _, _, after = rest.partition(end)
    lines = "\n".join(markdown(figures, swept))
    PAGE.write_text(f"{before}{start}\n\n{lines}\n\n{end}{after}", "utf-8")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.prefixes", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="short runs: good for nothing but to see that it runs"
    )
    parser.add_argument("--virtual", action="store_true", help="on the virtual fleet alone")
    parser.add_argument("--publish", action="store_true", help="picture and table into docs/ too")
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    console = Console()
    if not console.is_terminal:
        console.width = _WIDTH
    began, plan = time.monotonic(), QUICK if options.quick else FULL
    with (
        console.status("virtual fleet") as status,
        tempfile.TemporaryDirectory(prefix="prefixes-") as directory,
    ):
        planned = cases(plan)
        virtual = [simulated(case) for case in planned]
        swept = list(sweep(plan))
        figures = (
            virtual if options.virtual else asyncio.run(measured(planned, Path(directory), status.update))
        )
    console.print(table(figures, [] if options.virtual else virtual))
    for note in notes(figures, swept):
        console.print(note, highlight=False)
    drawn = picture(figures, swept, plan.rates[-1])
    _write(figures, virtual, swept, drawn)
    if options.publish:
        publish(figures, swept, drawn)
    console.print(
        f"{time.monotonic() - began:.0f} s; runs: results/prefixes.json, picture: results/prefixes.svg"
    )
    sys.exit(any(each.failures for each in figures))


def _write(
    figures: Sequence[Figures], virtual: Sequence[Figures], swept: Sequence[Figures], drawn: str
) -> None:
    RESULTS.mkdir(exist_ok=True)
    everything = msgspec.json.encode({"runs": figures, "virtual": virtual, "sweep": swept})
    (RESULTS / "prefixes.json").write_bytes(msgspec.json.format(everything, indent=2))
    (RESULTS / "prefixes.svg").write_text(drawn, "utf-8")


if __name__ == "__main__":
    main()
