"""The demo's comparison of policies: what it says of them, and what it does when an answer does not come."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from envoy_extproc.demo_tables import DemoTables
from envoy_extproc.simulation.comparison import POLICIES, Compared, compare
from envoy_extproc.simulation.engine import Engine
from envoy_extproc.simulation.faults import Faults
from envoy_extproc.simulation.options import EngineOptions
from envoy_extproc.simulation.stack import StackError


def compared(policy: str, hit_rate: float, *milliseconds: float) -> Compared:
    ttfts = tuple(each / 1000 for each in milliseconds)
    return Compared(policy=policy, hit_rate=hit_rate, ttfts=ttfts, by_pod={"pod-a": 3, "pod-b": 120})


@pytest.mark.parametrize(("tenth", "seconds"), [(1, 0.02), (5, 0.06), (9, 0.1)])
def test_ttft_by_tenths(tenth: int, seconds: float) -> None:
    of = compared("random", 0.0, *range(110, 0, -10))
    assert of.ttft(tenth) == pytest.approx(seconds)


def test_a_line_for_each_policy() -> None:
    shown = io.StringIO()
    tables = DemoTables(Console(file=shown, width=80), once=True)
    tables.comparison([compared("round-robin", 0.25, 200, 200), compared("prefix-cache", 1.0, 50, 50)])
    _, _, head, robin, prefix, _ = shown.getvalue().splitlines()
    assert head.endswith("requests to pod-a, pod-b")
    assert robin.split() == ["round-robin", "████············", "25%", "█" * 16, *["200.0ms"] * 2, "3", "120"]
    assert prefix.split() == [
        "prefix-cache",
        "█" * 16,
        "100%",
        "████············",
        *["50.0ms"] * 2,
        "3",
        "120",
    ]
    assert robin.index("200.0ms") == prefix.index("50.0ms") - 1


async def test_an_answer_that_does_not_come_ends_it() -> None:
    engine = Engine(EngineOptions(faults=Faults(error=500)))
    await engine.start()
    answers = compare(f"http://{engine.address}", {"pod-a": engine.address}, "llama-3-8b")
    try:
        with pytest.raises(StackError, match=f"^{POLICIES[0]}: status 500: .*InternalServerError"):
            await anext(answers)
    finally:
        await engine.stop()
