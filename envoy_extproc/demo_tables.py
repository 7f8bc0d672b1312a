"""How the demo looks on a terminal: a line for each request as it ends, and the sums in the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from envoy_extproc.simulation.comparison import CONVERSATIONS, QUESTIONS, Compared
from envoy_extproc.simulation.demo import MODEL, Outcome
from envoy_extproc.simulation.stack import Stack

_COLUMNS = (
    ("request", 29, "left"),
    ("pod", 7, "left"),
    ("policy", 14, "left"),
    ("status", 6, "right"),
    ("in", 4, "right"),
    ("out", 4, "right"),
    ("TTFT", 7, "right"),
    ("TPOT", 7, "right"),
    ("usage", 11, "left"),
    ("outcome", 24, "left"),
)
_BAR = 16  # characters of a bar that means all
_COLOURS = {"success": "green", "refused": "yellow", "aborted": "magenta", "error": "red"}


class DemoTables:
    """Prints what the demo tells.

    Args:
        console: where to.
        once: whether the demo ends by itself.
    """

    def __init__(self, console: Console, *, once: bool) -> None:
        self._console = console
        self._once = once

    def starting(self, pods: Sequence[str]) -> None:
        """See `Narrator`."""
        self._console.print(
            f"Starting a real Envoy and envoy-extproc in front of {', '.join(pods)} ...", soft_wrap=True
        )

    def ready(self, stack: Stack) -> None:
        """See `Narrator`."""
        self._console.print(
            f"Ready: clients at [bold]{stack.url}[/], metrics at {stack.admin_url()}/metrics", soft_wrap=True
        )

    def section(self, title: str) -> None:
        """See `Narrator`."""
        self._console.print(f"\n[bold]{title}[/]")
        cells = [
            Text(name.ljust(width) if side == "left" else name.rjust(width)) for name, width, side in _COLUMNS
        ]
        self._console.print(Text(" ").join(cells), style="dim", soft_wrap=True)

    def outcome(self, outcome: Outcome) -> None:
        """See `Narrator`."""
        values = _row(outcome)
        colour = _COLOURS.get(outcome.report["outcome"], "white")
        cells = [
            Text(_fit(values[name], width, side), style=colour if name in ("status", "outcome") else "")
            for name, width, side in _COLUMNS
        ]
        self._console.print(Text(" ").join(cells), soft_wrap=True)
        if outcome.message is not None:
            self._console.print(
                Text(f"    the client saw: {outcome.message[:140]}", style="dim"), soft_wrap=True
            )

    def comparison(self, compared: Sequence[Compared]) -> None:
        """See `Narrator`."""
        self._console.print(f"\n[bold]{CONVERSATIONS} conversations, had again by each policy[/]")
        pods = ", ".join(compared[0].by_pod)
        head = f"{'policy':14} {'prompt tokens cached':{_BAR + 5}} {'TTFT p50':{_BAR + 9}} {'p90':>8} requests to {pods}"
        self._console.print(Text(head), style="dim", soft_wrap=True)
        slowest = max(each.ttft(5) for each in compared)
        for each in compared:
            self._console.print(_policy(each, slowest), soft_wrap=True)
        self._console.print(
            f"    one system prompt for all, a document and {len(QUESTIONS)} questions each; at first nothing is cached",
            style="dim",
            soft_wrap=True,
        )

    def summary(self, stack: Stack, metrics: Mapping[str, float], outcomes: Sequence[Outcome]) -> None:
        """See `Narrator`."""
        self._console.print()
        self._console.print(_sums(outcomes))
        in_flight = sum(
            value for name, value in metrics.items() if name.startswith("envoy_extproc_in_flight")
        )
        errors = {
            name.partition('error_type="')[2].partition('"')[0]: 0.0
            for name in metrics
            if name.startswith("envoy_extproc_errors_total")
        }
        for name, value in metrics.items():
            if name.startswith("envoy_extproc_errors_total"):
                errors[name.partition('error_type="')[2].partition('"')[0]] += value
        told = ", ".join(f"{kind} {count:g}" for kind, count in sorted(errors.items()))
        self._console.print(f"In flight now: {in_flight:g}.  Errors by whose fault: {told}.", soft_wrap=True)
        hidden = sum(1 for each in outcomes if each.report["stream"] and not each.saw_usage)
        self._console.print(
            f"{hidden} streams were accounted while their clients saw no usage, as they had asked."
        )
        if not self._once:
            self._console.print(
                f"\nStill up; Ctrl-C ends it. Try:\n  curl -N {stack.url}/v1/chat/completions -d "
                f'\'{{"model":"{MODEL}","stream":true,"messages":[{{"role":"user","content":"hello"}}]}}\'',
                soft_wrap=True,
            )


def _row(outcome: Outcome) -> Mapping[str, str]:
    report = outcome.report
    fallback = report.get("policy_fallback")
    policy = report.get("policy") or "-"
    known = report["usage_source"] != "none"
    what = (
        report["outcome"] if report["error.type"] is None else f"{report['outcome']}: {report['error.type']}"
    )
    retries = report["attempts"] - 1
    return {
        "request": outcome.sample.what,
        "pod": report["pod"] or "-",
        "policy": f"{policy}*" if fallback else policy,
        "status": "-" if outcome.status is None else str(outcome.status),
        "in": str(report["gen_ai.usage.input_tokens"]) if known else "-",
        "out": str(report["gen_ai.usage.output_tokens"]) if known else "-",
        "TTFT": _milliseconds(report["ttft"]),
        "TPOT": _milliseconds(report["tpot"]),
        "usage": report["usage_source"],
        "outcome": what if retries < 1 else f"{what} (try {retries + 1})",
    }


def _milliseconds(seconds: Any) -> str:
    return "-" if seconds is None else f"{1000 * float(seconds):.1f}ms"


def _fit(text: str, width: int, side: str) -> str:
    return text[:width].ljust(width) if side == "left" else text[:width].rjust(width)


def _policy(compared: Compared, slowest: float) -> Text:
    line = Text(f"{compared.policy:14} ")
    line.append(_bar(compared.hit_rate), style="green")
    line.append(f" {compared.hit_rate:4.0%} ")
    line.append(_bar(compared.ttft(5) / slowest), style="yellow")
    line.append(f" {_milliseconds(compared.ttft(5)):>8} {_milliseconds(compared.ttft(9)):>8} ")
    line.append(" ".join(f"{count:3}" for count in compared.by_pod.values()))
    return line


def _bar(share: float) -> str:
    return ("█" * round(share * _BAR)).ljust(_BAR, "·")


def _sums(outcomes: Sequence[Outcome]) -> Table:
    table = Table(title="By pod", title_justify="left", box=None, pad_edge=False)
    for name in ("pod", "requests", "input tokens", "output tokens"):
        table.add_column(name, justify="left" if name == "pod" else "right")
    for pod in sorted({outcome.report["pod"] for outcome in outcomes if outcome.report["pod"]}):
        reports = [outcome.report for outcome in outcomes if outcome.report["pod"] == pod]
        tokens = [
            sum(int(each[f"gen_ai.usage.{way}_tokens"]) for each in reports) for way in ("input", "output")
        ]
        table.add_row(pod, str(len(reports)), *(str(count) for count in tokens))
    return table
