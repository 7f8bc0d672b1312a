"""Which endpoint holds the KV cache of which prompts, as far as that can be told from what was sent there.

An engine that was sent a prompt holds its blocks until others push them out. So each endpoint is remembered with the blocks
(`openai.prompt`) of the prompts it was sent, as many as it is given room for (`caches`); behind that the ones go that were not
asked for again since they had their last chance (CLOCK; Corbató 1968), the end of a prompt before its beginning, as vLLM frees
them. It is a guess: an engine may have freed a block earlier, or hold more than is remembered here. What it generates is in
its cache as well; that is not remembered, but comes back with the conversation's next prompt.

The table has one entry for a block, whoever holds it: an integer with two bits for each endpoint, `has` and, beside it, `used`
(asked for since its last chance). Most blocks are one endpoint's, and all of those share one integer; an endpoint's own list of
blocks is an array. `tests/bench/decisions.py` measures what a block takes. Looking up is one step along the prompt for
all endpoints at once, and ends with the last block that anybody holds.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from itertools import compress

from envoy_extproc.endpoints import Endpoint
from envoy_extproc.openai.prompt import BlockRule
from envoy_extproc.scheduling.interfaces import Candidate, SchedulingRequest
from envoy_extproc.scheduling.roster import column

_NOBODY: Mapping[str, int] = {}
_FREE = ""
"""In place of an address: nobody has that place now."""

_BITS = bytes.maketrans(b"01", b"\0\1")
_SPARED = 4
"""Blocks that get another chance for each that is to go, at most: one prompt's learning stays short whatever was used."""


class _Holder:
    """An endpoint and its blocks, the oldest first.

    Attributes:
        endpoint: whose they are.
        place: of its bits in the table's integers.
        has: the bit for holding a block.
        used: the bit for having been asked for it again.
        both: the two of them. Most blocks are one endpoint's alone, and share these very integers.
        blocks: each block it holds, once; those before `first` are gone.
        first: where the oldest one is.
        room: blocks it may hold at most, whatever there is for all.
    """

    __slots__ = ("blocks", "both", "endpoint", "first", "has", "place", "room", "used")

    def __init__(self, endpoint: Endpoint, place: int, room: int) -> None:
        self.endpoint = endpoint
        self.place = place
        self.room = room
        self.has = 1 << 2 * place
        self.used = 2 << 2 * place
        self.both = self.has | self.used
        self.blocks = array("Q")
        self.first = 0

    def __len__(self) -> int:
        return len(self.blocks) - self.first

    def compact(self) -> None:
        """Lets go of those that are gone, once they are more than half."""
        if self.first * 2 > len(self.blocks):
            del self.blocks[: self.first]
            self.first = 0

    def take_out(self, blocks: AbstractSet[int]) -> None:
        """Takes out `blocks`, all of which it has: looked for from the end, since what it got last is there."""
        left, kept = len(blocks), array("Q")
        while left:
            block = self.blocks.pop()
            if block in blocks:
                left -= 1
            else:
                kept.append(block)
        kept.reverse()
        self.blocks.extend(kept)


class PrefixIndex:
    """What each endpoint holds. Blocks of unlike models, and of unlike salts, are unlike.

    Args:
        rule: how prompts are cut into blocks.
        per_endpoint: blocks remembered of one endpoint at most, and of one whose engine does not tell the room in its cache.
            The default, the endpoint picker's, is 2 million tokens.
        in_all: blocks remembered of all endpoints together. Each has an equal share, and what one has no room for the
            others share (max-min fairness).
    """

    def __init__(
        self, rule: BlockRule | None = None, *, per_endpoint: int = 31_250, in_all: int = 1_000_000
    ) -> None:
        self.rule = rule or BlockRule()
        self._per_endpoint = per_endpoint
        self._in_all = in_all
        self._table: dict[int, int] = {}
        self._holders: dict[str, _Holder] = {}
        self._addresses: list[str] = []
        self._rooms: dict[str, int] = {}
        self._level: int | None = None
        self._everyone = 0
        self._asked: Sequence[int] = ()
        self._answer: Mapping[str, int] | None = None

    def __len__(self) -> int:
        """Blocks remembered, one that several endpoints hold counted for each."""
        return sum(map(len, self._holders.values()))

    @property
    def distinct(self) -> int:
        """Blocks remembered, each counted once."""
        return len(self._table)

    def limit(self, address: str) -> int:
        """Blocks that the endpoint at `address` may have now."""
        holder = self._holders.get(address)
        return self._limit(self._rooms.get(address, self._per_endpoint) if holder is None else holder.room)

    def held(self) -> Mapping[str, int]:
        """How many blocks are remembered of each endpoint, by address."""
        return {address: len(holder) for address, holder in self._holders.items()}

    def blocks(self, request: SchedulingRequest) -> Sequence[int]:
        """The blocks of the request's prompt; none where it has no prompt, or one shorter than a block."""
        return () if request.prompt is None else request.prompt.hashes(self.rule, request.model)

    def shares(self, request: SchedulingRequest, candidates: Sequence[Candidate]) -> Sequence[float]:
        """The share of the prompt, 0 to 1, that each candidate holds; all 0 where nobody holds any."""
        blocks = self.blocks(request)
        matched = self.match(blocks)
        share = {count: count / len(blocks) for count in set(matched.values())}
        return column(candidates, {address: share[count] for address, count in matched.items()})

    def match(self, blocks: Sequence[int]) -> Mapping[str, int]:
        """How many of `blocks`, from the first on without a gap, each endpoint holds; those that hold none are left out."""
        if self._answer is None or self._asked is not blocks:  # a filter and a scorer ask the same
            self._asked, self._answer = blocks, self._match(blocks)
        return self._answer

    def _match(self, blocks: Sequence[int]) -> Mapping[str, int]:
        holding, table = self._everyone, self._table
        matched: dict[str, int] = {}
        last: int | None = None
        depth = 0
        for block in blocks:
            mask = table.get(block, 0)
            if mask is not last:  # blocks side by side share one integer
                left = mask & holding
                if left != holding:
                    if depth:
                        self._note(matched, holding ^ left, depth)
                    holding = left
                    if not left:
                        return matched or _NOBODY
                last = mask
            depth += 1
        if depth:
            self._note(matched, holding, depth)
        return matched

    def _note(self, matched: dict[str, int], holding: int, depth: int) -> None:
        has = bin(holding)[:1:-1][::2].encode().translate(_BITS)
        matched.update(dict.fromkeys(compress(self._addresses, has), depth))

    def learn(self, blocks: Sequence[int], endpoint: Endpoint) -> None:
        """`endpoint` is sent a prompt of these blocks. Of a prompt longer than its share the beginning counts."""
        if not blocks:
            return
        self._answer = None
        holder = self._holders.get(endpoint.address)
        if holder is None or not _same(holder.endpoint, endpoint):
            holder = self._welcome(endpoint)
        limit = self._limit(holder.room)
        if len(blocks) > limit:
            blocks = blocks[:limit]
        fresh = self._give(holder, blocks)
        if len(holder) + len(fresh) > limit:
            self._make_room(holder, limit - len(fresh), keep=set(blocks))
        holder.blocks.extend(reversed(fresh))

    def _give(self, holder: _Holder, blocks: Sequence[int]) -> Sequence[int]:
        """Marks in the table what is held already, and that the others are held now; returns these.

        They go behind all others in the holder's own list, the end first, so that it goes before the beginning, without
        which it is of no use. Looking a block up takes as long as the memory does, so it is looked up once, and since
        blocks side by side mostly share one integer, what is made of the last one is made of the next.
        """
        table, has, both = self._table, holder.has, holder.both
        settled: int | None = None
        marked: int | None = None
        shared: int | None = None
        with_use = with_hold = 0
        fresh = []
        for block in blocks:
            mask = table.get(block)
            if mask is None:
                table[block] = has
                fresh.append(block)
            elif mask is marked:
                table[block] = with_use
            elif mask is shared:
                table[block] = with_hold
                fresh.append(block)
            elif mask is settled:
                continue
            elif not mask & has:
                shared, with_hold = mask, mask | has
                table[block] = with_hold
                fresh.append(block)
            elif mask & both == both:
                settled = mask
            else:
                marked, with_use = mask, both if mask == has else mask | both
                table[block] = with_use
        return fresh

    def _make_room(self, holder: _Holder, most: int, keep: AbstractSet[int] = frozenset()) -> None:
        """Forgets until at most `most` blocks are held, none of those to `keep`, which are no more than that."""
        table, blocks, first, used = self._table, holder.blocks, holder.first, holder.used
        has, both, others = holder.has, holder.both, ~holder.both
        left = len(holder)
        spared = _SPARED * max(0, left - most)
        while left > most:
            block = blocks[first]
            first += 1
            mask = table[block]
            if block in keep:
                blocks.append(block)
            elif spared and mask & used:
                spared -= 1
                table[block] = has if mask == both else mask ^ used
                blocks.append(block)
            else:
                left -= 1
                rest = mask & others
                if rest:
                    table[block] = rest
                else:
                    del table[block]
        holder.first = first
        holder.compact()

    def _drop(self, holder: _Holder, block: int) -> None:
        left = self._table[block] & ~holder.both
        if left:
            self._table[block] = left
        else:
            del self._table[block]

    def forget(self, address: str) -> bool:
        """Everything of the endpoint at `address`: it left, or its engine began anew. False if nothing was known of it."""
        self._answer = None
        holder = self._holders.pop(address, None)
        if holder is None:
            return False
        for block in holder.blocks[holder.first :]:
            self._drop(holder, block)
        self._addresses[holder.place] = _FREE
        self._everyone ^= holder.has
        self._level = None
        return True

    def unlearn(self, blocks: Sequence[int], address: str) -> None:
        """The endpoint at `address` was to get these blocks and did not compute them."""
        holder = self._holders.get(address)
        gone = set() if holder is None else {each for each in blocks if self._table.get(each, 0) & holder.has}
        if holder is None or not gone:
            return
        self._answer = None
        holder.take_out(gone)
        for block in gone:
            self._drop(holder, block)

    def fit(self, address: str, tokens: float | None) -> None:
        """So many tokens are to be remembered of the engine at `address`; None where its cache's size is not known."""
        room = self._per_endpoint
        if tokens is not None and 0 < tokens < room * self.rule.tokens:
            room = max(1, int(tokens // self.rule.tokens))
        self._rooms[address] = room
        holder = self._holders.get(address)
        if holder is not None and holder.room != room:
            self._answer = self._level = None
            holder.room = room
            self._trim()

    def keep(self, endpoints: Mapping[str, Endpoint]) -> None:
        """Forgets all but `endpoints`, by address, and what earlier owners of their addresses had."""
        for address, holder in list(self._holders.items()):
            now = endpoints.get(address)
            if now is None or not _same(holder.endpoint, now):
                self.forget(address)
        self._rooms = {address: room for address, room in self._rooms.items() if address in endpoints}

    def _welcome(self, endpoint: Endpoint) -> _Holder:
        """A holder of no blocks, in the lowest place that is free; everybody's share is smaller from now on."""
        self.forget(endpoint.address)
        if _FREE not in self._addresses:
            self._addresses.append(_FREE)
        place = self._addresses.index(_FREE)
        self._addresses[place] = endpoint.address
        room = self._rooms.get(endpoint.address, self._per_endpoint)
        holder = self._holders[endpoint.address] = _Holder(endpoint, place, room)
        self._everyone |= holder.has
        self._level = None
        self._trim()
        return holder

    def _trim(self) -> None:
        for holder in self._holders.values():
            limit = self._limit(holder.room)
            if len(holder) > limit:
                self._make_room(holder, limit)

    def _limit(self, room: int) -> int:
        if self._level is None:
            self._level = _level([holder.room for holder in self._holders.values()], self._in_all)
        return max(1, min(room, self._level))


def _level(rooms: Iterable[int], in_all: int) -> int:
    """What each may have at most so that all together have no more than `in_all`: water filled in up to this level."""
    left, level = in_all, in_all
    ascending = sorted(rooms)
    for number, room in enumerate(ascending):
        level = left // (len(ascending) - number)
        if room > level:
            return level
        left -= room
    return in_all


def _same(one: Endpoint, other: Endpoint) -> bool:
    """Whether it is one engine: another pod may have got the address of one that is gone."""
    return (one.name, one.engine) == (other.name, other.engine)
