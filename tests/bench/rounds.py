"""Rounds: the same load put on each of several targets in turn, and what each used for it."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Awaitable, Callable, Mapping, Sequence

import msgspec

from tests.bench.client import Load, Result
from tests.bench.targets import PLAIN, Cost, Target

_LOG_SECONDS = 0.2  # until the access log of a round has been written and read: its cost belongs to the round


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How much of everything.

    Attributes:
        rounds: of each variant in each case.
        long_rounds: likewise of streams of 1,000 tokens, where the difference looked for is smallest.
        seconds: of one round; streams that began in it are waited for.
        latencies: requests one after the other, to each of both.
        load_rounds: of latency under load, to each of both.
        idle_seconds: for each idle figure.
        held: streams at once, for memory.
    """

    rounds: int
    long_rounds: int
    seconds: float
    latencies: int = 0
    load_rounds: int = 0
    idle_seconds: float = 0.0
    held: int = 0


class Kind(msgspec.Struct, frozen=True, kw_only=True):
    """A load, and the variants it is put on besides plain Envoy."""

    name: str
    load: Load
    variants: tuple[str, ...]

    @property
    def per_event(self) -> bool:
        """Whether tokens are counted, not requests."""
        return (self.load.tokens or 0) > 1

    @property
    def long(self) -> bool:
        """Whether one answer takes longer than a round should."""
        return (self.load.tokens or 0) > 500


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What one round used, and what was done with it.

    Attributes:
        cost: CPU seconds for the load alone.
        idle: CPU seconds a second that were subtracted: what the same processes used while others of the round had the load.
        messages: to the servers, in ext_proc.
    """

    cost: Cost
    idle: Cost
    requests: int
    events: int
    seconds: float
    messages: float


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """The time in which one variant had the load.

    Attributes:
        seconds: its length, until the access log was written.
        costs: CPU seconds of every variant of the case in that time.
    """

    seconds: float
    costs: dict[str, Cost]
    result: Result
    messages: float


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """The rounds of one load, by variant and in their order; plain Envoy's are the first."""

    name: str
    per_event: bool
    rounds: dict[str, list[Usage]]

    def each(self, variant: str, part: Callable[[Cost], float]) -> list[float]:
        """CPU seconds per request or token, round by round."""
        return [
            part(usage.cost) / max(1, usage.events if self.per_event else usage.requests)
            for usage in self.rounds[variant]
        ]

    def median(self, variant: str, part: Callable[[Cost], float]) -> float:
        """CPU seconds per request or token."""
        return statistics.median(self.each(variant, part))

    def ratios(self, variant: str) -> list[float]:
        """(Envoy + server) / plain Envoy, each within one round: what disturbs a round disturbs both."""
        ours = self.each(variant, lambda cost: cost.envoy + cost.server)
        plain = self.each(PLAIN, lambda cost: cost.envoy)
        return [one / other for one, other in zip(ours, plain, strict=True)]

    def rate(self, variant: str) -> float:
        """Requests a second."""
        return statistics.median(usage.requests / usage.seconds for usage in self.rounds[variant])


class Rounds:
    """Performs them.

    Args:
        perform: has the client process do what a load says.
        plan: how much of everything.
        say: told what comes next.

    Attributes:
        failures: answers that were not whole.
        failed: what the first failure was.
    """

    def __init__(
        self, perform: Callable[[Load], Awaitable[Result]], plan: Plan, say: Callable[[str], None]
    ) -> None:
        self.failures = 0
        self.failed = ""
        self._perform = perform
        self._plan = plan
        self._say = say

    async def warm_up(self, found: Sequence[Target]) -> None:
        """Some load on each, that counts for nothing but the books."""
        self._say("warm-up")
        for target in found:
            for tokens in (None, 16):
                load = Load(kind="closed-loop", connections=32, seconds=0.4, tokens=tokens)
                await self.load(load, target)

    async def case(self, kind: Kind, taking_part: list[Target]) -> Case:
        """The rounds of one load, on each of these in turn."""
        case = Case(
            name=kind.name, per_event=kind.per_event, rounds={each.variant: [] for each in taking_part}
        )
        load = msgspec.structs.replace(kind.load, seconds=self._plan.seconds)
        count = self._plan.long_rounds if kind.long else self._plan.rounds
        for number in range(count):
            self._say(f"{kind.name}: round {number + 1} of {count}")
            # Another one begins each time, so that none is always the farthest from the first.
            first = number % len(taking_part)
            windows = {
                target.variant: await self._window(load, target, taking_part)
                for target in taking_part[first:] + taking_part[:first]
            }
            for variant in windows:
                case.rounds[variant].append(_usage(variant, windows))
        return case

    async def _window(self, load: Load, target: Target, watched: Sequence[Target]) -> Window:
        loop = asyncio.get_running_loop()
        messages = await target.messages()
        began, before = loop.time(), [each.cpu() for each in watched]
        result = await self.load(load, target)
        if target.variant != PLAIN:
            await asyncio.sleep(_LOG_SECONDS)
        seconds, after = loop.time() - began, [each.cpu() for each in watched]
        return Window(
            seconds=seconds,
            costs={each.variant: now - then for each, then, now in zip(watched, before, after, strict=True)},
            result=result,
            messages=await target.messages() - messages,
        )

    async def load(self, load: Load, target: Target) -> Result:
        """Has one performed; its whole answers are in the target's books."""
        result = await self.perform(msgspec.structs.replace(load, ports=(target.port,)))
        target.sent += result.requests
        return result

    async def perform(self, load: Load) -> Result:
        """Has one performed that is no single target's."""
        result = await self._perform(load)
        self.failures += result.failures
        self.failed = self.failed or result.failed
        return result


def _usage(variant: str, windows: Mapping[str, Window]) -> Usage:
    """What a variant used for its load.

    Scraping goes on all the time, and for 4,000 tokens a second it is not little. What it costs is taken from the other
    windows of the same round: there the variant is idle, and the machine is as fast and as busy as it was for the load.
    """
    own = windows[variant]
    others = [window for other, window in windows.items() if other != variant]
    idle = Cost(
        sum(window.costs[variant].envoy for window in others),
        sum(window.costs[variant].server for window in others),
    ).times(1 / sum(window.seconds for window in others))
    return Usage(
        cost=own.costs[variant] - idle.times(own.seconds),
        idle=idle,
        requests=own.result.requests,
        events=max(0, own.result.events - 2 * own.result.requests),
        seconds=own.result.seconds,
        messages=own.messages,
    )


def messages_per_event(rounds: Sequence[Usage]) -> float:
    """Well below 1 if Envoy, hurried, reads several events at once: then a token is cheaper than in life."""
    return statistics.median(each.messages / max(1, each.events) for each in rounds)
