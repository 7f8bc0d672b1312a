"""When a simulated engine does what: a pure model of vLLM V1's continuous batching. The clock is handed in.

The theory, each rule as in vLLM's V1 scheduler:

1. The engine works in steps. A step is planned when it begins, and all it computed is there when it ends; what arrives
   meanwhile waits for the next one. Only what arrives in the very moment a step begins is still part of it.
2. A step has a budget of tokens. The running sequences are served first, in order of admission: one token for a decode,
   for a prompt as much of it as the budget allows. With what is left, waiting ones are admitted, first come first served,
   while there are places in the batch and KV blocks for the whole prompt.
3. What the prefix cache holds of a prompt is not computed, except that the last token always is. Blocks are allocated as
   tokens are computed; a prompt's full ones can be hits from the step on that computes them, an answer's once they are full.
4. When a running sequence needs a block and none is free, the one admitted last is preempted: its blocks go, it waits
   before all others, and what it had, its answer too, is computed again, as far as it is not a hit by then.
5. A step takes the longer the more sequences decode in it and the more prompt tokens it computes. So prefills wait for each
   other and slow decodes down: that is what makes a hit worth having.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from math import ceil, inf
from typing import TYPE_CHECKING, Generic, TypeVar

from envoy_extproc.simulation.kv_cache import BlockTable, KvCache
from envoy_extproc.simulation.metrics import Gauges, Stats

if TYPE_CHECKING:
    from envoy_extproc.simulation.options import EngineOptions

PREFILL_TOKENS_PER_TTFT = 500
"""So many prompt tokens cost another `ttft_seconds`: with its default of 0.05 s that is 10,000 tokens a second, what an A10
does with an 8B model in 8 bits (16 GFLOP a token, of 250 TOPS about 60 % are to be had)."""

STEP_GROWTH = 0.01
"""Each further sequence that decodes in a step makes it longer by this share: decoding is bound by memory, not by the batch."""


class QueueFull(Exception):
    """`max_queued` requests wait already."""


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """One prompt and the answer to it, on its way through the engine. Times are seconds of the handed-in clock.

    Attributes:
        prompt_tokens: length of the prompt.
        tokens: how many tokens the answer will have, at least 1.
        block_hashes: the chained hash of each full block: of the prompt and then, where a later prompt may repeat it, of
            the answer.
        finish_reason: what the last token says: `length` or `stop`.
        pooled: an embedding: no token is generated.
        held: takes no part in the next step: its reader is slow, or it hangs for good.
        generated: tokens of the answer so far.
        computed: tokens of prompt and answer whose keys and values are there.
        scheduled: how many more the step under way computes.
        capacity: tokens its blocks have room for.
        blocks: its KV blocks.
        cached_tokens: prompt tokens that were hits when it was first admitted.
        created_tokens: prompt tokens it was the first to put into the prefix cache.
        preemptions: how often it lost its blocks.
        arrived: when it was submitted.
        admitted_at: when its first step began.
        ready_at: when its first token leaves the engine.
        first_token_at: when that was.
        last_token_at: when the latest token came.
    """

    prompt_tokens: int
    tokens: int
    block_hashes: tuple[int, ...] = ()
    finish_reason: str = "length"
    pooled: bool = False
    held: bool = False
    generated: int = 0
    computed: int = 0
    scheduled: int = 0
    capacity: int = 0
    blocks: BlockTable = field(default_factory=BlockTable)
    cached_tokens: int = 0
    created_tokens: int = 0
    preemptions: int = 0
    arrived: float = 0.0
    admitted_at: float = 0.0
    ready_at: float = 0.0
    first_token_at: float = 0.0
    last_token_at: float = 0.0

    @property
    def finished(self) -> bool:
        """Whether the last token is out."""
        return self.generated >= self.tokens

    @property
    def known(self) -> int:
        """Tokens there are: those of the prompt and those generated."""
        return self.prompt_tokens + self.generated


@dataclass(frozen=True, slots=True)
class Pace:
    """How long steps take, from what a single request on an idle engine would measure. Times are seconds.

    A step that only decodes takes `tpot` for a batch of one. A prompt costs time by the token in any step. What then
    lacks to `ttft` is latency: HTTP, tokenizer, sampling. It delays a first token, and the steps of others go on beside it.
    """

    ttft: float
    tpot: float

    def step(self, decoding: int, prefilled: int) -> float:
        """A step in which so many sequences decode and so many prompt tokens are computed."""
        base = self.tpot * (1 + STEP_GROWTH * (decoding - 1)) if decoding else min(self.ttft, self.tpot)
        return base + prefilled * self.ttft / PREFILL_TOKENS_PER_TTFT

    @property
    def latency(self) -> float:
        """What a first token waits after the step that computed it."""
        return max(0.0, self.ttft - self.tpot)


_S = TypeVar("_S", bound=Sequence)


@dataclass(slots=True)
class _Step(Generic[_S]):
    """A step under way."""

    began: float
    budget: int
    sequences: list[_S] = field(default_factory=list)
    decoding: int = 0
    prefilled: int = 0
    ends: float = 0.0

    def add(self, sequence: _S, tokens: int) -> None:
        """Has a sequence compute so many tokens in this step."""
        sequence.scheduled = tokens
        self.sequences.append(sequence)
        self.budget -= tokens
        if tokens == 1 and sequence.generated:
            self.decoding += 1
        else:
            self.prefilled += tokens


class Batch(Generic[_S]):
    """The scheduler of one engine.

    `next_step_at` says when to call `step`, with the time it is by then; `submit` and `abort` may come at any time between,
    and may make the next step earlier. Time must not go back.
    """

    def __init__(self, options: EngineOptions) -> None:
        self._options = options
        self._pace = Pace(options.ttft_seconds, options.tpot_seconds)
        self._running: dict[_S, None] = {}  # a set that keeps the order of admission
        self._waiting: deque[_S] = deque()
        self._arriving = 0  # of the waiting, those whom no step could have admitted yet
        self._leaving: deque[_S] = deque()  # computed, and their first token is on its way
        self._cache = KvCache(options.kv_blocks - 1, prefix_caching=options.prefix_caching)
        self._step: _Step[_S] | None = None
        self._now = -inf
        self.stats = Stats()

    @property
    def gauges(self) -> Gauges:
        """The engine as its last step saw it; who has arrived since is not yet among the waiting, as in vLLM."""
        return Gauges(len(self._running), len(self._waiting) - self._arriving, self._cache.usage)

    @property
    def unfinished(self) -> int:
        """Sequences that are here, in whatever state."""
        return len(self._running) + len(self._waiting)

    def submit(self, sequences: list[_S], now: float) -> None:
        """Takes a request's sequences in, all or none.

        Raises:
            QueueFull: more than `max_queued` sequences would wait.
            ValueError: a sequence needs more blocks than there are.
        """
        for sequence in sequences:
            if self._blocks(sequence.prompt_tokens + sequence.tokens - 1) > self._cache.blocks:
                raise ValueError(
                    f"{sequence.prompt_tokens + sequence.tokens} tokens need more KV blocks than there are"
                )
        full = len(self._waiting) > self._arriving  # a step has left some over
        places = 0 if full else self._options.max_running - len(self._running)
        waiting = len(self._waiting) + len(sequences) - places
        if self._options.max_queued is not None and waiting > self._options.max_queued:
            self.stats.rejections += 1
            raise QueueFull
        for sequence in sequences:
            sequence.arrived = now
            self._waiting.append(sequence)
        self._arriving += len(sequences)
        self._wake(now)

    def abort(self, sequence: _S, now: float) -> None:
        """Drops a sequence wherever it is; one that has finished stays finished."""
        if sequence in self._running:
            del self._running[sequence]
            self._drop(sequence)
            self._wake(now)
        elif not sequence.finished and sequence in self._waiting:
            self._waiting.remove(sequence)
            self._arriving = min(self._arriving, len(self._waiting))

    def reset_prefix_cache(self) -> bool:
        """Forgets what is cached; does nothing, and says so, while a sequence has any block."""
        return self._cache.reset()

    def next_step_at(self) -> float | None:
        """When `step` is due; None while nobody can take a token."""
        due = inf if self._step is None else self._step.ends
        if self._leaving:
            due = min(due, self._leaving[0].ready_at)
        if self._step is None and any(not each.held and each.known > each.computed for each in self._running):
            return self._now  # one of them was held until now
        return None if due == inf else due

    def step(self, now: float) -> list[_S]:
        """Ends the step that is due, begins the next, and returns who has a token, in order of admission."""
        self._now = now
        took = self._first_tokens(now) if self._leaving else []
        if self._step is not None and self._step.ends <= now:
            took += self._end_step(self._step, now)
            self._step = None
        for sequence in took:
            if sequence.generated >= sequence.tokens:
                self._finish(sequence, now)
        if self._step is None:
            self._begin_step(now)
        return took

    # A step ends

    def _end_step(self, step: _Step[_S], now: float) -> list[_S]:
        took = []
        for sequence in step.sequences:
            tokens, sequence.scheduled = sequence.scheduled, 0
            if sequence.held or not tokens:
                continue  # what was computed for it is computed again, or it has been aborted
            sequence.computed += tokens
            if sequence.computed < sequence.prompt_tokens + sequence.generated:
                continue
            if sequence.generated or not self._pace.latency:
                self._token(sequence, now)
                took.append(sequence)
            else:
                sequence.ready_at = now + self._pace.latency
                self._leaving.append(sequence)
        return took

    def _first_tokens(self, now: float) -> list[_S]:
        took = []
        while self._leaving and self._leaving[0].ready_at <= now:
            sequence = self._leaving.popleft()
            if sequence.held:
                sequence.computed -= 1  # so that it comes back when it is no longer
            else:
                self._token(sequence, now)
                took.append(sequence)
        return took

    def _token(self, sequence: _S, now: float) -> None:
        sequence.generated += 1
        if sequence.generated > 1:
            self.stats.inter_token_latency.observe(now - sequence.last_token_at)
        else:
            sequence.first_token_at = now
            self.stats.first_token(sequence.prompt_tokens, sequence.cached_tokens, now - sequence.arrived)
        sequence.last_token_at = now
        if not sequence.pooled:
            self.stats.generation_tokens += 1

    def _finish(self, sequence: _S, now: float) -> None:
        del self._running[sequence]
        self._publish(sequence, sequence.computed)
        self._cache.release(sequence.blocks)
        self.stats.request_ended(sequence, now)

    # A step begins

    def _wake(self, now: float) -> None:
        """Begins a step if none is under way, or lets those who have just arrived join the one that begins now."""
        self._now = now
        step = self._step
        if step is None:
            self._begin_step(now)
        elif step.began == now:
            self._admit(step)
            step.ends = now + self._pace.step(step.decoding, step.prefilled)

    def _begin_step(self, now: float) -> None:
        step: _Step[_S] = _Step(now, self._options.max_batched_tokens)
        self._serve_running(step)
        self._admit(step)
        if step.sequences:
            step.ends = now + self._pace.step(step.decoding, step.prefilled)
            self._step = step
            self.stats.iteration_tokens.observe(step.decoding + step.prefilled)

    def _serve_running(self, step: _Step[_S]) -> None:
        order = list(self._running)
        for sequence in order:  # `_extend` shortens it from behind
            if sequence.held:
                continue
            computed, generated = sequence.computed, sequence.generated
            tokens = sequence.prompt_tokens + generated - computed
            if tokens == 1 and generated and computed < sequence.capacity and step.budget:
                sequence.scheduled = 1  # as in `_Step.add`: most tokens come along here
                step.sequences.append(sequence)
                step.budget -= 1
                step.decoding += 1
                continue
            tokens = min(tokens, step.budget)
            if computed + tokens > sequence.capacity and not self._extend(sequence, tokens, order):
                return
            if tokens:
                step.add(sequence, tokens)

    def _extend(self, sequence: _S, tokens: int, order: list[_S]) -> bool:
        """Has blocks for so many more tokens; preempts for them those admitted last, in the end the sequence itself.

        Nobody is admitted in a step that preempts: the one at the head of the queue needs as many blocks as it just lost.
        """
        missing = self._blocks(sequence.computed + tokens) - len(sequence.blocks)
        while missing > self._cache.free:
            last = order.pop()
            del self._running[last]
            self._preempt(last)
            if last is sequence:
                return False
        self._allocate(sequence, missing, tokens)
        return True

    def _preempt(self, sequence: _S) -> None:
        self._drop(sequence)
        sequence.computed = sequence.capacity = 0
        sequence.preemptions += 1
        self.stats.preemptions += 1
        self._waiting.appendleft(sequence)

    def _admit(self, step: _Step[_S]) -> None:
        self._arriving = 0
        while self._waiting and step.budget and len(self._running) < self._options.max_running:
            sequence = self._waiting[0]
            size, known = self._options.block_size, sequence.known
            # At least one token is always computed, so the last block of a prompt that ends with it is no hit.
            hits = self._cache.hits(sequence.block_hashes[: (known - 1) // size])
            found = sequence.block_hashes[:hits]
            if not self._cache.room(found, self._blocks(known) - hits):
                return
            self._cache.adopt(sequence.blocks, found)
            sequence.computed = hits * size
            tokens = min(known - sequence.computed, step.budget)
            self._allocate(sequence, self._blocks(sequence.computed + tokens) - hits, tokens)
            self._running[self._waiting.popleft()] = None
            self._count_admission(sequence, step.began)
            step.add(sequence, tokens)

    def _count_admission(self, sequence: _S, now: float) -> None:
        """Counts queries and hits of a request once, however often it is preempted, as vLLM does."""
        if sequence.preemptions:
            return
        sequence.admitted_at = now
        sequence.cached_tokens = sequence.computed
        if self._options.prefix_caching:
            self.stats.prefix_queries += sequence.prompt_tokens
            self.stats.prefix_hits += sequence.cached_tokens

    # Blocks

    def _allocate(self, sequence: _S, blocks: int, tokens: int) -> None:
        self._cache.grow(sequence.blocks, blocks)
        sequence.capacity = len(sequence.blocks) * self._options.block_size
        self._publish(sequence, sequence.computed + tokens)

    def _publish(self, sequence: _S, tokens: int) -> None:
        """Makes the full blocks of the first so many tokens hits for others."""
        full = sequence.block_hashes[sequence.blocks.seen : tokens // self._options.block_size]
        if full:
            of_prompt = sequence.prompt_tokens // self._options.block_size - sequence.blocks.seen
            new = self._cache.publish(sequence.blocks, full)
            if not sequence.preemptions:
                sequence.created_tokens += max(0, min(new, of_prompt)) * self._options.block_size

    def _drop(self, sequence: _S) -> None:
        """Takes a sequence out of the step under way and gives its blocks back."""
        sequence.scheduled = 0
        if sequence in self._leaving:
            self._leaving.remove(sequence)
        self._cache.release(sequence.blocks)

    def _blocks(self, tokens: int) -> int:
        return ceil(tokens / self._options.block_size)
