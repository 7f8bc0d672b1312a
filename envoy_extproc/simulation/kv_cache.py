"""The KV blocks of one simulated GPU, and the prefix cache that lives in those nobody uses.

A block belongs to one sequence until it is full. Then it is published under the hash of the prompt up to its end, and
from there on whoever has the same prefix uses it too. When its last user leaves it is idle: still a hit, and evicted
when a block is needed, the least recently used first, of one prompt the end before the beginning.

Two sequences that compute the same block at once each have their own; only the first is published, as vLLM does not
merge them either. Where vLLM takes idle blocks from one queue whether they are cached or not, here one that holds nothing
goes first.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(slots=True)
class BlockTable:
    """The blocks of one sequence.

    Attributes:
        published: hashes of those that others may use, from the front of the prompt on.
        private: how many more it has.
        seen: how many hashes of its prompt and answer were found or published, or found published by another.
    """

    published: list[int] = field(default_factory=list)
    private: int = 0
    seen: int = 0

    def __len__(self) -> int:
        return len(self.published) + self.private


class KvCache:
    """All blocks of an engine.

    Args:
        blocks: how many there are.
        prefix_caching: whether full blocks are published at all.
    """

    def __init__(self, blocks: int, *, prefix_caching: bool = True) -> None:
        self.blocks = blocks
        self._prefix_caching = prefix_caching
        self._published: dict[int, int] = {}  # hash -> how many sequences use it
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._private = 0

    @property
    def used(self) -> int:
        """Blocks that sequences use."""
        return len(self._published) + self._private

    @property
    def free(self) -> int:
        """Blocks that can be had, those of the prefix cache that nobody uses among them."""
        return self.blocks - self.used

    @property
    def cached(self) -> int:
        """Blocks that would be hits, used or idle."""
        return len(self._published) + len(self._idle)

    @property
    def usage(self) -> float:
        """Share of the blocks in use, 0 to 1."""
        return self.used / self.blocks

    def hits(self, hashes: Sequence[int]) -> int:
        """How many blocks at the front of a prompt are here already."""
        for index, block in enumerate(hashes):
            if block not in self._published and block not in self._idle:
                return index
        return len(hashes)

    def room(self, hits: Sequence[int], blocks: int) -> bool:
        """Whether so many blocks can be had beyond these hits."""
        return blocks + sum(block in self._idle for block in hits) <= self.free

    def adopt(self, table: BlockTable, hits: Sequence[int]) -> None:
        """Takes the hits of a sequence's prompt into use for it."""
        for block in hits:
            self._idle.pop(block, None)
            self._published[block] = self._published.get(block, 0) + 1
        table.published += hits
        table.seen = len(hits)

    def grow(self, table: BlockTable, blocks: int) -> None:
        """Gives a sequence so many new blocks, for which there is `room`."""
        table.private += blocks
        self._private += blocks
        while self._idle and len(self._idle) > self.free:
            self._idle.popitem(last=False)

    def publish(self, table: BlockTable, hashes: Sequence[int]) -> int:
        """Publishes full blocks of a sequence, `hashes` being those from the first unseen one on; how many were new."""
        if not self._prefix_caching:
            return 0
        new = [block for block in hashes if block not in self._published and block not in self._idle]
        self._published.update(dict.fromkeys(new, 1))
        self._private -= len(new)
        table.private -= len(new)
        table.published += new
        table.seen += len(hashes)
        return len(new)

    def release(self, table: BlockTable) -> None:
        """Takes a sequence's blocks back; the end of a prompt goes idle first, so that it is also evicted first."""
        self._private -= table.private
        for block in reversed(table.published):
            self._published[block] -= 1
            if not self._published[block]:
                del self._published[block]
                self._idle[block] = None
        table.published.clear()
        table.private = table.seen = 0

    def reset(self) -> bool:
        """Forgets what is cached; does nothing, and says so, while any block is in use."""
        if self.used:
            return False
        self._idle.clear()
        return True
