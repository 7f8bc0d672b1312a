"""KV blocks and the prefix cache: what is shared, what is evicted, and that no block is ever had twice."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from envoy_extproc.simulation.kv_cache import BlockTable, KvCache


def used(cache: KvCache, *hashes: int, private: int = 0) -> BlockTable:
    """The blocks of a sequence whose prompt is so many full blocks, which it has computed as far as they are no hits."""
    table = BlockTable()
    hits = cache.hits(hashes)
    assert cache.room(hashes[:hits], len(hashes) - hits + private)
    cache.adopt(table, hashes[:hits])
    cache.grow(table, len(hashes) - hits + private)
    cache.publish(table, hashes[hits:])
    return table


def left(cache: KvCache, *hashes: int) -> None:
    """The same, and the sequence is gone."""
    cache.release(used(cache, *hashes))


def test_blocks_are_shared_and_counted_once() -> None:
    cache = KvCache(10)
    one, two = used(cache, 1, 2, 3, private=1), used(cache, 1, 2, 4)
    assert (len(one), len(two), cache.used, cache.free) == (4, 3, 5, 5)
    assert cache.usage == pytest.approx(0.5)
    cache.release(one)
    assert (cache.used, cache.cached) == (3, 4)
    cache.release(two)
    assert (cache.used, cache.cached) == (0, 4)
    assert (len(one), len(two)) == (0, 0)


@pytest.mark.parametrize(
    ("prompt", "hits"), [((1, 2, 3), 3), ((1, 2, 9), 2), ((9, 2, 3), 0), ((1, 2, 3, 4), 3), ((), 0)]
)
def test_hits_are_at_the_front(prompt: tuple[int, ...], hits: int) -> None:
    cache = KvCache(10)
    left(cache, 1, 2, 3)
    assert cache.hits(prompt) == hits


def test_the_least_recently_used_blocks_go_first() -> None:
    cache = KvCache(4)
    for block in (1, 2, 3, 4):
        left(cache, block)
    left(cache, 1)
    used(cache, 5, private=1)
    assert [cache.hits((block,)) for block in (1, 2, 3, 4, 5)] == [1, 0, 0, 1, 1]
    assert cache.used == 2


def test_of_one_prompt_the_end_goes_first() -> None:
    cache = KvCache(4)
    left(cache, 1, 2, 3)
    used(cache, private=2)
    assert cache.hits((1, 2, 3)) == 2


def test_who_computes_the_same_block_at_once_has_a_block_of_its_own() -> None:
    cache = KvCache(10)
    tables = [BlockTable(), BlockTable()]
    for table in tables:
        cache.grow(table, 2)  # neither found it
    assert [cache.publish(table, (1, 2)) for table in tables] == [2, 0]
    assert cache.used == 4
    cache.release(tables[1])
    assert (cache.used, cache.hits((1, 2))) == (2, 2)


def test_hits_that_nobody_uses_take_from_what_is_free() -> None:
    cache = KvCache(4)
    left(cache, 1, 2, 3)
    assert cache.room((), 4)
    assert not cache.room((1, 2), 3)
    assert cache.room((1, 2), 2)


def test_without_prefix_caching_nothing_is_shared() -> None:
    cache = KvCache(10, prefix_caching=False)
    left(cache, 1, 2)
    assert cache.hits((1, 2)) == cache.cached == 0
    assert used(cache, 1, 2).private == 2


def test_a_reset_waits_until_nobody_uses_a_block() -> None:
    cache = KvCache(10)
    table = used(cache, 1, 2)
    assert not cache.reset()
    assert cache.hits((1, 2)) == 2
    cache.release(table)
    assert cache.reset()
    assert cache.hits((1, 2)) == 0


BLOCKS = 12


class Cache(RuleBasedStateMachine):
    """Sequences come, grow and go in any order; `content` is what each block that was ever published is about."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = KvCache(BLOCKS)
        self.tables: list[tuple[BlockTable, tuple[int, ...]]] = []
        self.computed: set[int] = set()

    @rule(prompt=st.text("ab", max_size=8), private=st.integers(0, 3))
    def come(self, prompt: str, private: int) -> None:
        hashes = tuple(hash(prompt[: end + 1]) for end in range(len(prompt)))
        hits = self.cache.hits(hashes)
        assert set(hashes[:hits]) <= self.computed
        if self.cache.room(hashes[:hits], len(hashes) - hits + private):
            self.tables.append((used(self.cache, *hashes, private=private), hashes))
            self.computed |= set(hashes)
            assert self.cache.hits(hashes) == len(hashes)

    @precondition(lambda self: self.tables)
    @rule(which=st.integers(0, 9), blocks=st.integers(1, 4))
    def grow(self, which: int, blocks: int) -> None:
        table, _ = self.tables[which % len(self.tables)]
        if blocks <= self.cache.free:
            self.cache.grow(table, blocks)

    @precondition(lambda self: self.tables)
    @rule(which=st.integers(0, 9))
    def go(self, which: int) -> None:
        table, _ = self.tables.pop(which % len(self.tables))
        self.cache.release(table)

    @rule()
    def reset(self) -> None:
        if self.cache.reset():
            self.computed.clear()

    @invariant()
    def no_block_is_had_twice(self) -> None:
        shared = {block for table, _ in self.tables for block in table.published}
        assert self.cache.used == len(shared) + sum(table.private for table, _ in self.tables)
        assert self.cache.cached - len(shared) <= self.cache.free
        assert 0 <= self.cache.used <= BLOCKS

    @invariant()
    def what_is_used_stays(self) -> None:
        for _, hashes in self.tables:
            assert self.cache.hits(hashes) == len(hashes)


Cache.TestCase.settings = settings(stateful_step_count=40, deadline=None)
TestCache = Cache.TestCase
