"""When a simulated engine does what: a pure model of vLLM's continuous batching. The clock is handed in.

The theory: a sequence waits, first come first served, until the batch has a place and its KV blocks are free. It then
prefills, longer the more of its prompt is not in the prefix cache, and from there on takes one token in every step of
the batch. A step is the longer the more sequences decode in it.

Where vLLM preempts a running sequence when blocks run out, this model reserves the blocks of the whole answer on
admission, so nobody is ever preempted; what it reports as used grows token by token all the same.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass
from math import ceil, inf
from typing import TYPE_CHECKING, Generic, TypeVar

from envoy_extproc.simulation.metrics import Gauges, Stats

if TYPE_CHECKING:
    from envoy_extproc.simulation.options import EngineOptions

PREFILL_TOKENS_PER_TTFT = 1000
"""So many uncached prompt tokens add one more `ttft_seconds`: an A10 prefills an 8B model at some 10,000 a second,
and the default of 0.05 s leaves half of that for others."""

STEP_GROWTH = 0.01
"""Each further sequence in a step makes it longer by this share: decoding is bound by memory, not by the batch."""


class QueueFull(Exception):
    """`max_queued` requests wait already."""


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """One prompt and the answer to it, on its way through the engine. Times are seconds of the handed-in clock.

    Attributes:
        prompt_tokens: length of the prompt.
        tokens: how many tokens the answer will have, at least 1.
        block_hashes: the chained hash of each full block of the prompt.
        finish_reason: what the last token says: `length` or `stop`.
        pooled: an embedding: no token is generated.
        held: takes no part in the next step: its reader is slow, or it hangs for good.
        created_tokens: prompt tokens this sequence was the first to put into the prefix cache.
    """

    prompt_tokens: int
    tokens: int
    block_hashes: tuple[int, ...] = ()
    finish_reason: str = "length"
    pooled: bool = False
    held: bool = False
    generated: int = 0
    cached_tokens: int = 0
    created_tokens: int = 0
    private_blocks: int = 0
    arrived: float = 0.0
    ready_at: float = 0.0
    last_token_at: float = 0.0

    @property
    def finished(self) -> bool:
        """Whether the last token is out."""
        return self.generated >= self.tokens


class KvCache:
    """KV blocks: shared ones by the hash of their prefix, private ones by number; what nobody uses is kept, LRU."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._shared: dict[int, int] = {}  # hash -> how many running sequences use it
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._private = 0

    @property
    def used(self) -> int:
        """Blocks that running sequences use."""
        return len(self._shared) + self._private

    @property
    def usage(self) -> float:
        """Share of the blocks in use, 0 to 1."""
        return min(1.0, self.used / self.blocks)

    def hits(self, hashes: tuple[int, ...]) -> int:
        """How many blocks at the front of a prompt are here already."""
        for index, block in enumerate(hashes):
            if block not in self._shared and block not in self._idle:
                return index
        return len(hashes)

    def acquire(self, hashes: tuple[int, ...], private: int) -> None:
        """Takes a prompt's blocks into use, evicting idle ones for them."""
        for block in hashes:
            self._idle.pop(block, None)
            self._shared[block] = self._shared.get(block, 0) + 1
        self.grow(private)

    def grow(self, private: int = 1) -> None:
        """Takes further private blocks into use."""
        self._private += private
        while self._idle and len(self._idle) + self.used > self.blocks:
            self._idle.popitem(last=False)

    def release(self, hashes: tuple[int, ...], private: int) -> None:
        """Gives blocks back; the end of a chain goes idle first, so that it is also evicted first."""
        self._private -= private
        for block in reversed(hashes):
            self._shared[block] -= 1
            if not self._shared[block]:
                del self._shared[block]
                self._idle[block] = None


_S = TypeVar("_S", bound=Sequence)


class Batch(Generic[_S]):
    """The scheduler of one engine."""

    def __init__(self, options: EngineOptions) -> None:
        self._options = options
        self._running: dict[_S, None] = {}  # a set that keeps the order of admission
        self._waiting: deque[_S] = deque()
        self._cache = KvCache(options.kv_blocks)
        self._reserved = 0
        self._last_step = -inf
        self.stats = Stats()

    @property
    def gauges(self) -> Gauges:
        """The engine as it is now."""
        return Gauges(len(self._running), len(self._waiting), self._cache.usage)

    def submit(self, sequences: list[_S], now: float) -> None:
        """Takes a request's sequences in, all or none.

        Raises:
            QueueFull: more than `max_queued` sequences would wait.
        """
        free = 0 if self._waiting else self._options.max_running - len(self._running)
        waiting = len(self._waiting) + max(0, len(sequences) - free)
        if self._options.max_queued is not None and waiting > self._options.max_queued:
            self.stats.rejections += 1
            raise QueueFull
        for sequence in sequences:
            sequence.arrived = now
            self._waiting.append(sequence)
        self._admit(now)

    def abort(self, sequence: _S, now: float) -> None:
        """Drops a sequence wherever it is; one that has finished stays finished."""
        if sequence in self._running:
            self._leave(sequence)
            self._admit(now)
        elif not sequence.finished and sequence in self._waiting:
            self._waiting.remove(sequence)

    def next_step_at(self) -> float | None:
        """When `step` is due; None while nobody can take a token."""
        decoding = 0
        ready_at = inf
        for sequence in self._running:
            if sequence.held:
                continue
            if sequence.generated:
                decoding += 1
            elif sequence.ready_at < ready_at:
                ready_at = sequence.ready_at
        if decoding:
            return self._last_step + self.step_seconds(decoding)
        return None if ready_at == inf else ready_at

    def step(self, now: float) -> list[_S]:
        """Gives one token to each sequence that is past its prefill, and returns these in order of admission."""
        self._last_step = now
        took = [sequence for sequence in self._running if sequence.ready_at <= now and not sequence.held]
        for sequence in took:
            self._token(sequence, now)
        for sequence in took:
            if sequence.finished:
                self._leave(sequence)
                self.stats.finished[sequence.finish_reason] += 1
                self.stats.e2e_latency.observe(now - sequence.arrived)
        self._admit(now)
        return took

    def prefill_seconds(self, uncached_tokens: int) -> float:
        """How long a prompt takes from admission to its first token."""
        return self._options.ttft_seconds * (1 + uncached_tokens / PREFILL_TOKENS_PER_TTFT)

    def step_seconds(self, decoding: int) -> float:
        """How long a step takes in which so many sequences decode."""
        return self._options.tpot_seconds * (1 + STEP_GROWTH * (decoding - 1))

    def _admit(self, now: float) -> None:
        while self._waiting and len(self._running) < self._options.max_running:
            blocks = self._blocks(self._waiting[0])
            if self._running and self._reserved + blocks > self._options.kv_blocks:
                return
            sequence = self._waiting.popleft()
            self._reserved += blocks
            self._running[sequence] = None
            self._prefill(sequence, now)

    def _prefill(self, sequence: _S, now: float) -> None:
        size = self._options.block_size
        # At least one token is always computed, so the last block of a prompt that ends with it is no hit.
        hits = self._cache.hits(sequence.block_hashes[: (sequence.prompt_tokens - 1) // size])
        sequence.cached_tokens = hits * size
        known = self._cache.hits(sequence.block_hashes)
        sequence.created_tokens = (len(sequence.block_hashes) - known) * size
        sequence.private_blocks = ceil(sequence.prompt_tokens / size) - len(sequence.block_hashes)
        self._cache.acquire(sequence.block_hashes, sequence.private_blocks)
        self.stats.prefix_queries += sequence.prompt_tokens
        self.stats.prefix_hits += sequence.cached_tokens
        sequence.ready_at = now + self.prefill_seconds(sequence.prompt_tokens - sequence.cached_tokens)

    def _token(self, sequence: _S, now: float) -> None:
        sequence.generated += 1
        if sequence.generated == 1:
            self.stats.prompt_tokens += sequence.prompt_tokens
            self.stats.time_to_first_token.observe(now - sequence.arrived)
        else:
            self.stats.inter_token_latency.observe(now - sequence.last_token_at)
        sequence.last_token_at = now
        if sequence.pooled:
            return
        self.stats.generation_tokens += 1
        if (sequence.prompt_tokens + sequence.generated - 1) % self._options.block_size == 0:
            sequence.private_blocks += 1
            self._cache.grow()

    def _leave(self, sequence: _S) -> None:
        del self._running[sequence]
        self._reserved -= self._blocks(sequence)
        self._cache.release(sequence.block_hashes, sequence.private_blocks)

    def _blocks(self, sequence: _S) -> int:
        return ceil((sequence.prompt_tokens + sequence.tokens) / self._options.block_size)
