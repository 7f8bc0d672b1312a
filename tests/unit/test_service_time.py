"""The pure model of an engine: who runs, who waits, when the next token comes, what the caches hold."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envoy_extproc.simulation.metrics import Histogram
from envoy_extproc.simulation.options import EngineOptions
from envoy_extproc.simulation.requests import Prompt
from envoy_extproc.simulation.service_time import Batch, KvCache, QueueFull, Sequence


def sequence(text: str = "x" * 16, tokens: int = 3) -> Sequence:
    prompt = Prompt(text)
    return Sequence(prompt_tokens=prompt.tokens, tokens=tokens, block_hashes=prompt.block_hashes(4))


def batch(max_running: int = 2, kv_blocks: int = 100, max_queued: int | None = None) -> Batch[Sequence]:
    options = EngineOptions(
        ttft_seconds=1.0,
        tpot_seconds=0.1,
        block_size=4,
        max_running=max_running,
        kv_blocks=kv_blocks,
        max_queued=max_queued,
    )
    return Batch(options)


def due(model: Batch[Sequence]) -> float:
    at = model.next_step_at()
    assert at is not None
    return at


def run(model: Batch[Sequence]) -> float:
    """Steps to the end; when that was."""
    now = 0.0
    while (at := model.next_step_at()) is not None:
        now = at
        model.step(now)
    return now


def test_an_idle_engine_has_no_step() -> None:
    assert batch().next_step_at() is None


def test_a_sequence_prefills_then_takes_a_token_each_step() -> None:
    model, one = batch(), sequence(tokens=3)
    model.submit([one], now=10.0)
    assert due(model) == pytest.approx(10 + 1.0 * 1.004)
    assert model.step(10.5) == []
    first = due(model)
    assert model.step(first) == [one]
    assert due(model) == pytest.approx(first + 0.1)
    model.step(due(model))
    model.step(due(model))
    assert one.finished
    assert model.next_step_at() is None
    assert model.gauges.running == 0
    assert model.stats.finished["length"] == 1


@pytest.mark.parametrize(("tokens", "seconds"), [(0, 1.0), (500, 1.5), (1000, 2.0), (4000, 5.0)])
def test_ttft_grows_with_the_uncached_prompt(tokens: int, seconds: float) -> None:
    assert batch().prefill_seconds(tokens) == pytest.approx(seconds)


@pytest.mark.parametrize(("decoding", "seconds"), [(1, 0.1), (2, 0.101), (101, 0.2)])
def test_a_step_grows_mildly_with_the_batch(decoding: int, seconds: float) -> None:
    assert batch().step_seconds(decoding) == pytest.approx(seconds)


def test_the_queue_is_first_come_first_served() -> None:
    model = batch()
    sequences = [sequence(str(number) * 16, tokens=1) for number in range(4)]
    for each in sequences:
        model.submit([each], now=0.0)
    assert (model.gauges.running, model.gauges.waiting) == (2, 2)
    assert model.step(due(model)) == sequences[:2]
    assert (model.gauges.running, model.gauges.waiting) == (2, 0)
    assert model.step(due(model)) == sequences[2:]
    assert sequences[3].last_token_at > 2.0  # the wait is part of its TTFT
    assert model.stats.time_to_first_token.total > 6.0


@pytest.mark.parametrize(("max_queued", "taken"), [(0, 2), (1, 3), (3, 5)])
def test_a_full_queue_refuses(max_queued: int, taken: int) -> None:
    model = batch(max_queued=max_queued)
    for _ in range(taken):
        model.submit([sequence()], now=0.0)
    with pytest.raises(QueueFull):
        model.submit([sequence()], now=0.0)
    assert model.stats.rejections == 1
    assert model.gauges.running + model.gauges.waiting == taken


def test_sequences_of_a_request_are_taken_all_or_none() -> None:
    model = batch(max_queued=1)
    with pytest.raises(QueueFull):
        model.submit([sequence() for _ in range(4)], now=0.0)
    assert model.gauges.running == 0


def test_a_sequence_waits_for_blocks() -> None:
    model = batch(kv_blocks=10)
    large = [sequence(letter * 80, tokens=8) for letter in "ab"]  # 20 + 8 tokens are 7 blocks
    model.submit(large, now=0.0)
    assert (model.gauges.running, model.gauges.waiting) == (1, 1)
    run(model)
    assert all(each.finished for each in large)


def test_a_request_larger_than_the_cache_runs_alone() -> None:
    model = batch(kv_blocks=2)
    model.submit([sequence(tokens=50)], now=0.0)
    run(model)
    assert model.stats.generation_tokens == 50
    assert model.gauges.kv_cache_usage == 0.0


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_an_abort_frees_the_place_at_once_and_counts_nowhere(steps: int) -> None:
    model = batch()
    sequences = [sequence(letter * 16) for letter in "abc"]
    model.submit(sequences, now=0.0)
    for _ in range(steps):
        model.step(due(model))
    model.abort(sequences[0], now=5.0)
    model.abort(sequences[0], now=5.0)
    assert (model.gauges.running, model.gauges.waiting) == (2, 0)
    run(model)
    assert model.stats.finished == {"stop": 0, "length": 2, "abort": 0, "error": 0, "repetition": 0}
    assert sum(model.stats.e2e_latency.counts) == 2


def test_an_abort_in_the_queue() -> None:
    model = batch()
    sequences = [sequence() for _ in range(3)]
    model.submit(sequences, now=0.0)
    model.abort(sequences[2], now=0.0)
    assert model.gauges.waiting == 0


def test_a_held_sequence_takes_no_token_and_keeps_its_place() -> None:
    model, one, other = batch(), sequence("a" * 16), sequence("b" * 16)
    model.submit([one, other], now=0.0)
    one.held = True
    run(model)
    assert (one.generated, other.generated) == (0, 3)
    assert model.gauges.running == 1
    one.held = False
    run(model)
    assert one.finished


def test_usage_grows_by_the_token() -> None:
    model, one = batch(), sequence("x" * 16, tokens=6)  # a prompt of one whole block
    model.submit([one], now=0.0)
    seen = [model.gauges.kv_cache_usage]
    while (at := model.next_step_at()) is not None:
        model.step(at)
        seen.append(model.gauges.kv_cache_usage)
    assert seen == pytest.approx([0.01, 0.02, 0.02, 0.02, 0.02, 0.03, 0.0])


@pytest.mark.parametrize(
    ("first", "second", "cached"),
    [
        ("a" * 64, "a" * 64, 12),  # never the whole prompt
        ("a" * 64, "a" * 65, 16),
        ("a" * 64, "a" * 32 + "b" * 32, 8),
        ("a" * 64, "b" + "a" * 63, 0),
        ("a" * 15, "a" * 15, 0),  # no full block
    ],
)
def test_the_prefix_cache_knows_leading_blocks(first: str, second: str, cached: int) -> None:
    model = batch()
    for text in (first, second):
        model.submit([sequence(text, tokens=1)], now=0.0)
        run(model)
    assert model.stats.prefix_hits == cached
    assert model.stats.prefix_queries == Prompt(first).tokens + Prompt(second).tokens


def test_a_cached_prompt_prefills_faster() -> None:
    model = batch(kv_blocks=10_000)
    times = []
    for _ in range(2):
        one = sequence("long " * 1000, tokens=1)
        model.submit([one], now=0.0)
        times.append(due(model))
        run(model)
    assert times[1] < times[0] / 2


def test_the_least_recently_used_blocks_go_first() -> None:
    cache = KvCache(4)
    for block in (1, 2, 3, 4):
        cache.acquire((block,), 0)
        cache.release((block,), 0)
    cache.acquire((1,), 0)
    cache.release((1,), 0)
    cache.acquire((5,), 1)
    assert [cache.hits((block,)) for block in (1, 2, 3, 4, 5)] == [1, 0, 0, 1, 1]
    assert cache.used == 2


def test_token_ids_are_counted_as_they_are() -> None:
    prompt = Prompt(tuple(range(9)))
    assert prompt.tokens == 9
    assert len(prompt.block_hashes(4)) == 2


def test_a_histogram_counts_up_to_and_with_its_bound() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(value)
    assert histogram.cumulative() == [("1.0", 2), ("2.0", 3), ("+Inf", 4)]


@given(
    requests=st.lists(
        st.tuples(st.text("ab", max_size=60), st.integers(1, 9), st.integers(0, 12)), max_size=25
    ),
    kv_blocks=st.integers(1, 30),
)
def test_whatever_comes_nothing_is_lost(requests: list[tuple[str, int, int]], kv_blocks: int) -> None:
    """Sequences come and go in any order: places and blocks are all given back, and each is finished or aborted."""
    model = batch(kv_blocks=kv_blocks, max_running=3)
    aborted = 0
    for text, tokens, steps in requests:
        one = sequence(text, tokens)
        model.submit([one], now=0.0)
        for _ in range(steps):
            if (at := model.next_step_at()) is not None:
                model.step(at)
            assert model.gauges.running <= 3
        if steps % 3 == 2 and not one.finished:
            model.abort(one, now=0.0)
            aborted += 1
    run(model)
    assert (model.gauges.running, model.gauges.waiting, model.gauges.kv_cache_usage) == (0, 0, 0.0)
    assert model.stats.finished["length"] == len(requests) - aborted
    assert model._reserved == 0
