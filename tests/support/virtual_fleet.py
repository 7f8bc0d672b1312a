"""A fleet on a virtual clock: the real director, policies, counts, breakers and reader of pages over the simulated engine's model.

No sockets and no waiting: a minute of eight engines takes about a second, and the same seed gives the same run. What Envoy and
the scraper do is told here in a few lines: an order's pods are asked one after the other until one accepts the connection,
engines are asked how they are at the scraper's pace, and a report comes with the end of its exchange.

    fleet = VirtualFleet("prefix-cache", pods=8)
    fleet.at(5.0, lambda: fleet.kill(3))
    fleet.run(arrivals, until=30.0)
    fleet.exchanges
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import count

import msgspec

from envoy_extproc.endpoints import Endpoint, EngineState, Snapshot
from envoy_extproc.engines.dialects import DIALECTS
from envoy_extproc.engines.pace import has_work, paced
from envoy_extproc.engines.reading import Reading, read
from envoy_extproc.engines.scraper import ScrapeSettings
from envoy_extproc.errors import GatewayError
from envoy_extproc.exchange.control import scheduling_request
from envoy_extproc.exchange.report import Report, routing_of
from envoy_extproc.headers import Headers
from envoy_extproc.openai import request, routes
from envoy_extproc.openai.answer import Usage
from envoy_extproc.scheduling import registry, session
from envoy_extproc.scheduling.interfaces import Decision, SchedulingRequest
from envoy_extproc.scheduling.registry import Tuning
from envoy_extproc.server.director import Director, RoutingRules
from envoy_extproc.simulation import service_time
from envoy_extproc.simulation.answers import Words
from envoy_extproc.simulation.options import EngineOptions
from envoy_extproc.simulation.requests import read_generation, rendered
from envoy_extproc.simulation.service_time import Batch
from envoy_extproc.state.breakers import BreakerRules, Breakers
from envoy_extproc.state.fairness import Fairness
from envoy_extproc.state.memory import InFlight
from envoy_extproc.state.prompts import Prompts
from envoy_extproc.telemetry import Hooks
from tests.support.builders import MODEL
from tests.support.reports import report
from tests.support.workload import Arrival

_ROUTE = next(route for route in routes.ROUTES if route.path == "/v1/chat/completions")
_SCRAPES = ScrapeSettings()
_HANDED_OVER_TOKENS = 16
"""What a decode pod computes of a prompt whose KV cache a prefill pod computed."""

QUICK = EngineOptions(ttft_seconds=0.01, tpot_seconds=0.02, max_running=64)
"""Engines that prefill 50,000 tokens a second: with prompts of 500 tokens, half a minute of them is soon simulated."""


@dataclass(slots=True, kw_only=True, eq=False)
class Exchange:
    """One request and what became of it. Times are seconds of the virtual clock.

    Attributes:
        arrival: as it came.
        user: who sent it.
        decision: where it was to go.
        in_flight: on each pod, by its name, when that was decided.
        asked: names of the pods that were asked, one after the other.
        outcome: `running`, `success`; `failed`: nobody took it, or its pod died; `refused`: nobody may be chosen.
        prompt_tokens: as the engine counts.
        cached_tokens: of these, found in the engine's cache.
    """

    arrival: Arrival
    user: str | None = None
    decision: Decision | None = None
    in_flight: dict[str, int] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    outcome: str = "running"
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    first_token_at: float | None = None
    ended_at: float | None = None
    release: Callable[[], None] = lambda: None

    @property
    def at(self) -> float:
        """When it came."""
        return self.arrival.at

    @property
    def pod(self) -> str:
        """Name of the pod that took it, or was the last one asked."""
        return self.asked[-1]

    @property
    def chosen(self) -> Decision:
        """The decision of a request that was not refused."""
        assert self.decision is not None
        return self.decision

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds; None where there was none."""
        return None if self.first_token_at is None else self.first_token_at - self.at


@dataclass(slots=True, kw_only=True, eq=False)
class Work(service_time.Sequence):
    """What an engine has of an exchange: all of it, or a prefill pod's part.

    Attributes:
        exchange: whose.
        done: called when its last token is out.
        lost: called if its engine dies before.
        first: called with the first token of an answer; None where that is not the client's.
    """

    exchange: Exchange
    done: Callable[[], None]
    lost: Callable[[], None]
    first: Callable[[], None] | None = None


class Pod:
    """An engine, and what the scraper knows of it.

    Attributes:
        endpoint: who it is.
        alive: whether it accepts connections.
        telling: whether its page can be read; an answer that is no page comes where not.
        most: sequences it had at once, at most.
        started: when its engine did.
        kv_tokens: for how many its KV cache has room.
    """

    def __init__(self, endpoint: Endpoint, options: EngineOptions, started: float) -> None:
        self.endpoint = endpoint
        self.batch: Batch[Work] = Batch(options)
        self.work: dict[Work, None] = {}
        self.alive = True
        self.telling = True
        self.most = 0
        self.started = started
        self.kv_tokens = options.kv_blocks * options.block_size
        self.interval = _SCRAPES.interval
        self.chosen = False
        self.reading: Reading | None = None
        self.step_turn = 0  # a timer that is not of this turn was set anew
        self.scrape_turn = 0
        self.scrape_due = 0.0


class VirtualFleet:
    """Pods, Envoy, and this server.

    Args:
        policy: a name or a mixture.
        pods: how many, or who.
        options: of every engine.
        seed: of chance in policies, and of the scraper's phases.
        tuning: of policies.
        rules: of routing; its policy is `policy`.
        sessions: whether clients send the session of a conversation's last answer back.

    Attributes:
        now: seconds since the beginning.
        exchanges: all that came, in that order.
        pods: by name, those among them that were removed.
        states: what the scraper knows, by address.
    """

    def __init__(
        self,
        policy: str,
        *,
        pods: int | Sequence[Endpoint] = 8,
        options: EngineOptions = QUICK,
        seed: int = 0,
        tuning: Tuning | None = None,
        rules: RoutingRules | None = None,
        sessions: bool = True,
    ) -> None:
        self.now = 0.0
        self.exchanges: list[Exchange] = []
        self.pods: dict[str, Pod] = {}
        self.states: dict[str, EngineState] = {}
        self.in_flight = InFlight()
        self._options = options
        self._rng = random.Random(seed)
        self._order = count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._sessions: dict[int, str] | None = {} if sessions else None
        tuning = tuning or Tuning()
        self.breakers = Breakers(BreakerRules(), clock=lambda: self.now)
        self.fairness = Fairness(tuning.fairness, clock=lambda: self.now)
        self.policies = registry.build(tuning)
        self.prompts = Prompts(self.policies.prefixes)
        self._hooks = Hooks(self.breakers, self.fairness, self.prompts)
        self.director = Director(
            profiles=self.policies,
            rules=msgspec.structs.replace(rules or RoutingRules(), policy=policy),
            in_flight=self.in_flight.count,
            states=self.states,
            rng=random.Random(seed + 1),
            avoided=self.breakers.avoided,
            chosen=self._hurry,
            fairness=self.fairness,
            prompts=self.prompts,
        )
        self._endpoints: dict[str, Endpoint] = {}
        self.add(*([pod(number) for number in range(1, pods + 1)] if isinstance(pods, int) else pods))

    # -- what happens to pods ------------------------------------------------------------------------------------------

    def add(self, *endpoints: Endpoint) -> None:
        """Discovery lists these too from now on; each engine is new."""
        for endpoint in endpoints:
            new = self.pods[endpoint.name] = Pod(endpoint, self._options, self.now)
            self._endpoints[endpoint.address] = endpoint
            self.states[endpoint.address] = EngineState()
            self._scrape_at(new, self.now + self._rng.uniform(0, _SCRAPES.interval))
        self._discover()

    def remove(self, *names: str) -> None:
        """Discovery does not list these any more; they finish what they have."""
        for name in names:
            address = self.pods[name].endpoint.address
            self.pods[name].scrape_turn += 1
            del self._endpoints[address], self.states[address]
        self._discover()

    def kill(self, name: str) -> None:
        """Its connections break, and it refuses new ones."""
        dead = self.pods[name]
        dead.alive = False
        dead.step_turn += 1
        dead.batch, lost = Batch(self._options), list(dead.work)
        dead.work.clear()
        for work in lost:
            work.lost()

    def revive(self, name: str) -> None:
        """It is back, and its caches are empty."""
        self.pods[name].alive, self.pods[name].started = True, self.now

    def silence(self, *names: str, silent: bool = True) -> None:
        """Their pages cannot be read from now on, or can be again."""
        for name in names:
            self.pods[name].telling = not silent

    # -- time ----------------------------------------------------------------------------------------------------------

    def at(self, when: float, happen: Callable[[], None]) -> None:
        """Does something at a time."""
        heapq.heappush(self._events, (when, next(self._order), happen))

    def run(self, arrivals: Iterable[Arrival], until: float) -> None:
        """Lets time pass to `until`, with these requests."""
        for arrival in arrivals:
            self.at(arrival.at, partial(self._arrive, arrival))
        while self._events and self._events[0][0] <= until:
            self.now, _, happen = heapq.heappop(self._events)
            happen()
        self.now = until

    # -- a request -----------------------------------------------------------------------------------------------------

    def _arrive(self, arrival: Arrival) -> None:
        exchange = Exchange(arrival=arrival)
        self.exchanges.append(exchange)
        asked = self._read(arrival)
        exchange.user = asked.user
        exchange.in_flight = {
            each.name: self.in_flight.count(address) for address, each in self._endpoints.items()
        }
        try:
            decision = exchange.decision = self.director.schedule(asked, self.now)
        except GatewayError:
            exchange.outcome = "refused"
            return
        self._hooks.decided(decision, 0.0)
        lease = self.in_flight.acquire(decision.chosen.endpoint, MODEL)
        exchange.release = lease.release
        for endpoint in decision.order:
            exchange.asked.append(endpoint.name)
            if self.pods[endpoint.name].alive:
                self._submit(exchange, self.pods[endpoint.name], partial(lease.move, endpoint))
                return
        self._end(exchange, "failed", None)

    def _read(self, arrival: Arrival) -> SchedulingRequest:
        headers = dict(arrival.headers)
        if self._sessions and arrival.conversation in self._sessions:
            headers.setdefault(session.HEADER, self._sessions[arrival.conversation])
        inference, prompt = request.read(arrival.body, _ROUTE)
        return scheduling_request(
            Headers(headers.items()),
            model=inference.model,
            subset=None,
            inference=inference,
            prompt=prompt,
            trust_user=True,
        )

    def _submit(self, exchange: Exchange, pod: Pod, answered: Callable[[], None]) -> None:
        exchange.prompt_tokens, blocks, tokens = _prompt(exchange.arrival.body, self._options)

        def begin(prompt_tokens: int, blocks: tuple[int, ...]) -> None:
            work = Work(
                exchange=exchange,
                prompt_tokens=prompt_tokens,
                tokens=tokens,
                block_hashes=blocks,
                first=answered,
                done=lambda: self._answered(exchange, pod),
                lost=lambda: self._end(exchange, "failed", pod),
            )
            self._give(pod, work)

        prefill = exchange.chosen.prefill
        helper = None if prefill is None else self.pods[prefill.endpoint.name]
        if helper is None or not helper.alive:
            begin(exchange.prompt_tokens, blocks)
            return
        work = Work(
            exchange=exchange,
            prompt_tokens=exchange.prompt_tokens,
            tokens=1,
            block_hashes=blocks,
            done=lambda: begin(_HANDED_OVER_TOKENS, ()),
            lost=lambda: begin(exchange.prompt_tokens, blocks),
        )
        self._give(helper, work)

    def _give(self, pod: Pod, work: Work) -> None:
        pod.work[work] = None
        pod.most = max(pod.most, len(pod.work))
        pod.batch.submit([work], self.now)
        self._arm(pod)

    def _answered(self, exchange: Exchange, pod: Pod) -> None:
        if self._sessions is not None:
            self._sessions[exchange.arrival.conversation] = session.token(pod.endpoint.address)
        self._end(exchange, "success", pod)

    def _end(self, exchange: Exchange, outcome: str, pod: Pod | None) -> None:
        exchange.outcome = outcome
        exchange.ended_at = self.now
        exchange.release()
        self._hooks.finished(self._report(exchange, pod))

    def _report(self, exchange: Exchange, pod: Pod | None) -> Report:
        served = None if pod is None else pod.endpoint
        good = exchange.outcome == "success"
        cut = served is not None and not good
        return report(
            outcome="success" if good else "aborted" if cut else "error",
            error_type=None if good else "network",
            error=None if good else "upstream_reset_before_response_started",
            routing=routing_of(exchange.chosen),
            served_by=served,
            served_address=None if served is None else served.address,
            attempts=len(exchange.asked),
            usage=Usage(prompt_tokens=exchange.prompt_tokens, completion_tokens=exchange.tokens),
            duration=self.now - exchange.at,
        )

    # -- engines -------------------------------------------------------------------------------------------------------

    def _arm(self, pod: Pod) -> None:
        pod.step_turn += 1
        turn, due = pod.step_turn, pod.batch.next_step_at()
        if due is not None:
            self.at(max(due, self.now), lambda: self._step(pod, turn))

    def _step(self, pod: Pod, turn: int) -> None:
        if turn != pod.step_turn:
            return
        for work in pod.batch.step(self.now):
            self._token(pod, work)
        self._arm(pod)

    def _token(self, pod: Pod, work: Work) -> None:
        exchange = work.exchange
        if work.generated == 1:
            exchange.cached_tokens += work.cached_tokens
            if work.first is not None:
                exchange.first_token_at = self.now
                work.first()
        if work.finished:
            del pod.work[work]
            exchange.tokens = work.generated
            work.done()

    # -- the scraper ---------------------------------------------------------------------------------------------------

    def _hurry(self, address: str) -> None:
        pod = self.pods[self._endpoints[address].name]
        pod.chosen = True
        if pod.interval > _SCRAPES.interval:
            pod.interval = _SCRAPES.interval
            self._scrape_at(pod, min(pod.scrape_due, self.now + pod.interval))

    def _scrape_at(self, pod: Pod, when: float) -> None:
        pod.scrape_turn += 1
        turn, pod.scrape_due = pod.scrape_turn, when
        self.at(when, lambda: self._scrape(pod, turn))

    def _scrape(self, pod: Pod, turn: int) -> None:
        if turn != pod.scrape_turn:
            return
        address = pod.endpoint.address
        before, in_use = self.states[address], pod.chosen or self.in_flight.count(address) > 0
        if pod.alive and pod.telling:
            pod.reading = read(DIALECTS["vllm"], page(pod), self.now, pod.reading)
            self._pace(pod, busy=in_use or has_work(pod.reading.stats))
            self.states[address] = EngineState(stats=pod.reading.stats, interval=pod.interval)
        else:
            self._pace(pod, busy=pod.alive and in_use)
            self.states[address] = msgspec.structs.replace(
                before, failures=before.failures + 1, reachable=pod.alive
            )
        self._scrape_at(pod, self.now + pod.interval * (1 - self._rng.uniform(0, _SCRAPES.jitter)))

    @staticmethod
    def _pace(pod: Pod, *, busy: bool) -> None:
        pod.chosen = False
        pod.interval = paced(pod.interval, busy=busy, quick=_SCRAPES.interval, idle=_SCRAPES.idle_interval)

    def _discover(self) -> None:
        snapshot = Snapshot(self._endpoints.values())
        self.breakers.update(snapshot)
        self.director.update(snapshot)


def pod(number: int, **labels: str) -> Endpoint:
    """``pod-01`` at 10.0.0.1:8000, and so on; names are in the order of addresses."""
    named = {name.replace("_", "-"): value for name, value in labels.items()}
    return Endpoint(
        name=f"pod-{number:02}", address=f"10.0.0.{number:02}:8000", models=(MODEL,), labels=named
    )


def page(pod: Pod) -> bytes:
    """What the engine's page says, as far as it is read: the real page takes ten times as long to write."""
    gauges, stats = pod.batch.gauges, pod.batch.stats
    values: dict[str, float] = {
        "num_requests_running": gauges.running,
        "num_requests_waiting": gauges.waiting,
        "kv_cache_usage_perc": gauges.kv_cache_usage,
        "prefix_cache_queries_total": stats.prefix_queries,
        "prefix_cache_hits_total": stats.prefix_hits,
        "prompt_tokens_cached_total": stats.cached_tokens,
        "prompt_tokens_total": stats.prompt_tokens,
        "generation_tokens_total": stats.generation_tokens,
        "request_success_total": sum(stats.finished.values()),
    }
    for name, histogram in (
        ("request_queue_time_seconds", stats.queue_time),
        ("request_prefill_time_seconds", stats.prefill_time),
        ("request_decode_time_seconds", stats.decode_time),
        ("time_to_first_token_seconds", stats.time_to_first_token),
        ("inter_token_latency_seconds", stats.inter_token_latency),
        ("request_prompt_tokens", stats.request_prompt_tokens),
        ("request_generation_tokens", stats.request_generation_tokens),
    ):
        values[f"{name}_sum"] = histogram.total
        values[f"{name}_count"] = sum(histogram.counts)
    lines = [f"vllm:{name} {value}\n" for name, value in values.items()]
    lines.append(f'vllm:cache_config_info{{kv_cache_size_tokens="{pod.kv_tokens}"}} 1\n')
    lines.append(f"process_start_time_seconds {pod.started}\n")
    return "".join(lines).encode()


@lru_cache(maxsize=8192)
def _prompt(body: bytes, options: EngineOptions) -> tuple[int, tuple[int, ...], int]:
    """Tokens of the prompt, blocks of prompt and answer, tokens of the answer: as the engine reads a body."""
    asked = read_generation("chat", body, options)
    (prompt,) = asked.prompts
    answer = rendered("assistant", Words(asked.seed, chat=True).whole(asked.tokens))
    return prompt.tokens, prompt.block_hashes(options.block_size, answer), asked.tokens
