"""The pure model of an engine: who runs, who waits, when the next token comes, what the prefix cache saves."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envoy_extproc.simulation.metrics import Histogram
from envoy_extproc.simulation.options import EngineOptions
from envoy_extproc.simulation.requests import Prompt
from envoy_extproc.simulation.service_time import Batch, Pace, QueueFull, Sequence

SIZE = 4
"""Tokens of a block here; four characters are a token."""


def sequence(text: str = "x" * 16, tokens: int = 3, answer: str = "") -> Sequence:
    prompt = Prompt(text)
    return Sequence(
        prompt_tokens=prompt.tokens, tokens=tokens, block_hashes=prompt.block_hashes(SIZE, answer)
    )


def batch(**changes: Any) -> Batch[Sequence]:
    """An engine with 99 blocks for use, a TTFT of 1 s and a TPOT of 0.1 s: 500 prompt tokens take another second."""
    values: dict[str, Any] = {"max_running": 2, "kv_blocks": 100, **changes}
    return Batch(EngineOptions(**{"ttft_seconds": 1.0, "tpot_seconds": 0.1, "block_size": SIZE, **values}))


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


def first_tokens(model: Batch[Sequence], sequences: list[Sequence]) -> list[float]:
    """When each of these, all submitted at 0, has its first token."""
    model.submit(sequences, now=0.0)
    run(model)
    return [each.first_token_at for each in sequences]


def served(model: Batch[Sequence], text: str, tokens: int = 1, answer: str = "") -> Sequence:
    """A request that comes when the one before it has gone."""
    one = sequence(text, tokens, answer)
    model.submit([one], now=0.0)
    run(model)
    return one


def gauges(model: Batch[Sequence]) -> tuple[int, int]:
    return model.gauges.running, model.gauges.waiting


def test_an_idle_engine_has_no_step() -> None:
    assert batch().next_step_at() is None


# Time


def test_a_sequence_prefills_then_takes_a_token_each_step() -> None:
    model, one = batch(), sequence(tokens=3)
    model.submit([one], now=10.0)
    assert model.step(10.05) == []
    assert due(model) == pytest.approx(10.1 + 4 / 500)  # the step that computes the prompt
    assert model.step(due(model)) == []
    first = due(model)
    assert first == pytest.approx(10 + 1.0 + 4 / 500)
    assert model.step(first) == [one]
    for number in (1, 2):
        assert due(model) == pytest.approx(first + number * 0.1)
        assert model.step(due(model)) == [one]
    assert one.finished
    assert model.next_step_at() is None
    assert gauges(model) == (0, 0)
    assert model.stats.finished["length"] == 1


@pytest.mark.parametrize(("prefilled", "seconds"), [(0, 0.1), (500, 1.1), (2000, 4.1)])
def test_a_step_is_the_longer_the_more_of_a_prompt_it_computes(prefilled: int, seconds: float) -> None:
    assert Pace(ttft=1.0, tpot=0.1).step(1, prefilled) == pytest.approx(seconds)


@pytest.mark.parametrize(("decoding", "seconds"), [(1, 0.1), (2, 0.101), (101, 0.2)])
def test_a_step_grows_mildly_with_the_batch(decoding: int, seconds: float) -> None:
    assert Pace(ttft=1.0, tpot=0.1).step(decoding, 0) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("ttft", "tpot", "tokens", "seconds"),
    [
        (1.0, 0.1, 500, 2.0),
        (1.0, 0.1, 1000, 3.0),
        (1.0, 0.1, 4000, 9.1),  # two steps
        (0.1, 1.0, 500, 0.2),
        (0.0, 1.0, 1000, 0.0),
        (0.0, 0.0, 1000, 0.0),
        (1.0, 0.0, 500, 2.0),
    ],
)
def test_ttft_of_an_idle_engine_grows_with_the_prompt(
    ttft: float, tpot: float, tokens: int, seconds: float
) -> None:
    model = batch(ttft_seconds=ttft, tpot_seconds=tpot, kv_blocks=2000)
    assert first_tokens(model, [sequence("x" * 4 * tokens)]) == pytest.approx([seconds])


def test_prefills_wait_for_each_other() -> None:
    alone, *_ = first_tokens(batch(kv_blocks=2000), [sequence("a" * 2000)])
    ten = [sequence(letter * 2000, tokens=1) for letter in "abcdefghij"]
    together = first_tokens(batch(kv_blocks=2000, max_running=10), ten)
    assert alone == pytest.approx(2.0)
    # The budget of the first step ends within the fifth prompt, that of the second within the ninth.
    assert together == pytest.approx([5.096] * 4 + [9.292] * 4 + [11.2] * 2)


def test_a_prefill_delays_those_who_decode() -> None:
    model, one = batch(kv_blocks=2000), sequence(tokens=50)
    model.submit([one], now=0.0)
    while one.generated < 10:
        model.step(due(model))
    quiet = one.last_token_at
    model.submit([sequence("p" * 4000)], now=quiet + 0.01)
    model.step(due(model))
    assert one.last_token_at == pytest.approx(quiet + 0.1)  # the step had begun
    model.step(due(model))
    assert one.last_token_at == pytest.approx(quiet + 0.1 + 0.1 + 2.0)
    model.step(due(model))
    assert one.last_token_at == pytest.approx(quiet + 2.3)


def test_a_first_token_does_not_wait_for_the_step_of_others() -> None:
    model, one = batch(kv_blocks=2000), sequence(tokens=2)
    model.submit([one], now=0.0)
    model.step(due(model))
    model.submit([sequence("p" * 4000)], now=0.5)
    assert model.step(due(model)) == [one]
    assert one.first_token_at == pytest.approx(1.008)
    assert due(model) == pytest.approx(0.6 + 2.0)
    assert model.step(due(model)) == []  # it was not in that step
    assert model.step(due(model)) == [one]
    assert one.last_token_at == pytest.approx(2.7)


def test_a_budget_smaller_than_the_batch_serves_the_first() -> None:
    model = batch(max_batched_tokens=3, max_running=3, ttft_seconds=0.0)
    sequences = [sequence(c * 4, tokens=4) for c in "abc"]
    model.submit(sequences, now=0.0)
    assert model.step(due(model)) == sequences  # a token of prompt each
    late = sequence("d" * 32, tokens=1)
    model.abort(sequences[2], now=0.0)
    model.submit([late], now=0.0)
    seen = []
    while late.computed < late.prompt_tokens:
        model.step(due(model))
        seen.append(late.computed)
    assert seen == [0, 1, 2, 5, 8]  # what two decodes leave, then all of it


def test_a_chunked_prompt_goes_on_before_others_begin() -> None:
    model = batch(max_batched_tokens=8, kv_blocks=2000)
    first, second = first_tokens(model, [sequence("a" * 80), sequence("b" * 80)])
    assert first == pytest.approx(
        3 * 0.1 + 24 / 500 + 0.9
    )  # the third step has room for four tokens of the other
    assert second == pytest.approx(5 * 0.1 + 40 / 500 + 0.9)


def test_who_was_admitted_first_has_the_budget_first() -> None:
    model, prompt, writer = batch(max_batched_tokens=3), sequence("a" * 80), sequence("b" * 4, tokens=90)
    model.submit([prompt], now=0.0)
    prompt.held = True  # so that the other is admitted while this is not done
    model.submit([writer], now=0.01)
    while writer.generated < 2:
        model.step(due(model))
    prompt.held = False
    model.step(due(model))
    written, computed = writer.generated, prompt.computed
    for _ in range(3):
        model.step(due(model))
    assert (prompt.computed - computed, writer.generated - written) == (9, 0)


@pytest.mark.parametrize("budget", [7, 8])
def test_the_last_token_of_a_prompt_is_no_decode(budget: int) -> None:
    model = batch(max_batched_tokens=budget)
    (first,) = first_tokens(model, [sequence("a" * 32)])
    assert first == pytest.approx((2 if budget < 8 else 1) * 0.1 + 8 / 500 + 0.9)


# Queue


def test_the_queue_is_first_come_first_served() -> None:
    model = batch()
    sequences = [sequence(str(number) * 16, tokens=1) for number in range(4)]
    for each in sequences:
        model.submit([each], now=0.0)
    assert gauges(model) == (2, 2)
    run(model)
    assert sequences[0].first_token_at == sequences[1].first_token_at
    assert sequences[1].first_token_at < sequences[2].first_token_at
    assert sequences[3].first_token_at > 2.0  # the wait is part of its TTFT
    assert model.stats.time_to_first_token.total > 6.0
    assert model.stats.queue_time.total == pytest.approx(2 * sequences[1].first_token_at)


def test_who_comes_while_a_step_is_under_way_is_no_queue_yet() -> None:
    model = batch()
    model.submit([sequence("a" * 16)], now=0.0)
    model.submit([sequence("b" * 16)], now=0.01)
    gone = sequence("c" * 16)
    model.submit([gone], now=0.02)
    assert gauges(model) == (1, 0)
    assert model.unfinished == 3
    model.abort(gone, now=0.03)
    assert gauges(model) == (1, 0)
    model.step(due(model))
    assert gauges(model) == (2, 0)


@pytest.mark.parametrize("apart", [0.0, 0.01])
@pytest.mark.parametrize(("max_queued", "taken"), [(0, 2), (1, 3), (3, 5)])
def test_a_full_queue_refuses(max_queued: int, taken: int, apart: float) -> None:
    model = batch(max_queued=max_queued)
    for number in range(taken):
        model.submit([sequence()], now=apart * number)
    with pytest.raises(QueueFull):
        model.submit([sequence()], now=apart * taken)
    assert model.stats.rejections == 1
    assert model.unfinished == taken


def test_sequences_of_a_request_are_taken_all_or_none() -> None:
    model = batch(max_queued=1)
    with pytest.raises(QueueFull):
        model.submit([sequence() for _ in range(4)], now=0.0)
    assert model.unfinished == 0


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_an_abort_frees_the_place_and_counts_nowhere(steps: int) -> None:
    model, now = batch(), 0.0
    sequences = [sequence(letter * 16, tokens=5) for letter in "abc"]
    model.submit(sequences, now)
    for _ in range(steps):
        now = due(model)
        model.step(now)
    model.abort(sequences[0], now)
    model.abort(sequences[0], now)
    assert model.unfinished == 2
    model.step(due(model))
    assert gauges(model) == (2, 0)
    run(model)
    assert sequences[0].generated == max(0, steps - 1)
    assert model.stats.finished == {"stop": 0, "length": 2, "abort": 0, "error": 0, "repetition": 0}
    assert sum(model.stats.e2e_latency.counts) == 2


def test_an_abort_in_the_queue() -> None:
    model = batch()
    sequences = [sequence() for _ in range(3)]
    model.submit(sequences, now=0.0)
    model.abort(sequences[2], now=0.0)
    assert gauges(model) == (2, 0)


def test_a_held_sequence_takes_no_token_and_keeps_its_place() -> None:
    model, one, other = batch(), sequence("a" * 16), sequence("b" * 16)
    model.submit([one, other], now=0.0)
    one.held = True
    run(model)
    assert (one.generated, other.generated) == (0, 3)
    assert gauges(model) == (1, 0)
    one.held = False
    run(model)
    assert one.finished


@pytest.mark.parametrize("steps", range(5))
def test_a_sequence_may_be_held_for_a_while_at_any_time(steps: int) -> None:
    model, one = batch(), sequence(tokens=3)
    model.submit([one], now=0.0)
    for _ in range(steps):
        if (at := model.next_step_at()) is not None:
            model.step(at)
    one.held = True
    taken = one.generated
    run(model)
    assert one.generated == taken
    one.held = False
    run(model)
    assert one.finished
    assert model.stats.generation_tokens == 3


# KV blocks


def test_usage_grows_by_the_token() -> None:
    model, one = batch(), sequence("x" * 16, tokens=6)  # a prompt of one whole block
    model.submit([one], now=0.0)
    seen = [model.gauges.kv_cache_usage]
    while (at := model.next_step_at()) is not None:
        model.step(at)
        seen.append(model.gauges.kv_cache_usage)
    assert seen == pytest.approx([each / 99 for each in (1, 1, 2, 2, 2, 2, 3, 0)])


def test_a_prompt_waits_until_its_blocks_are_free() -> None:
    model = batch(kv_blocks=11)
    large = [sequence(letter * 96, tokens=2) for letter in "ab"]  # six blocks each, and one for the answer
    model.submit(large, now=0.0)
    assert gauges(model) == (1, 1)
    run(model)
    assert large[0].last_token_at < large[1].admitted_at + 0.01
    assert all(each.finished for each in large)
    assert model.stats.preemptions == 0


def test_a_prompt_whose_first_chunk_would_fit_waits_too() -> None:
    model = batch(kv_blocks=11, max_batched_tokens=16)
    model.submit([sequence("a" * 96), sequence("b" * 96)], now=0.0)
    model.step(due(model))
    assert gauges(model) == (1, 1)


def test_blocks_that_an_abort_frees_are_had_at_once() -> None:
    model, hog, other = batch(kv_blocks=11), sequence("a" * 144), sequence("b" * 96)
    model.submit([hog, other], now=0.0)
    hog.held = True
    run(model)
    assert gauges(model) == (1, 1)
    model.abort(hog, now=9.0)
    assert gauges(model) == (1, 0)
    assert due(model) == pytest.approx(9.1 + 24 / 500)


def test_what_can_never_fit_is_refused() -> None:
    model = batch(kv_blocks=3)
    model.submit([sequence(tokens=5)], now=0.0)  # the last token is never computed
    with pytest.raises(ValueError, match="more KV blocks than there are"):
        model.submit([sequence(tokens=6)], now=0.0)
    run(model)
    assert model.stats.generation_tokens == 5


def test_who_was_admitted_last_is_preempted_and_starts_again() -> None:
    model = batch(kv_blocks=7, max_running=3)
    sequences = [
        sequence(letter * 32, tokens=9) for letter in "abc"
    ]  # two blocks each, and two for the answer
    model.submit(sequences, now=0.0)
    while not model.stats.preemptions:
        model.step(due(model))
    assert [each.preemptions for each in sequences] == [0, 0, 1]
    assert gauges(model) == (2, 1)
    assert sequences[2].generated == 1
    assert (sequences[2].cached_tokens, sequences[2].created_tokens) == (0, 8)
    run(model)
    assert [each.generated for each in sequences] == [9, 9, 9]
    assert sequences[0].last_token_at <= sequences[1].last_token_at < sequences[2].last_token_at
    assert [each.created_tokens for each in sequences] == [8, 8, 8]
    assert model.stats.prefix_queries == 24  # once each
    assert model.stats.prompt_tokens == 24
    assert model.stats.generation_tokens == 27
    assert model.stats.request_preemptions.total == model.stats.preemptions


def test_the_preempted_wait_before_all_others() -> None:
    model = batch(kv_blocks=7, max_running=3)
    first = [sequence(letter * 32, tokens=9) for letter in "abc"]
    model.submit(first, now=0.0)
    late = sequence("d" * 16, tokens=1)  # its one block would fit earlier
    model.submit([late], now=0.01)
    run(model)
    assert first[2].preemptions == 1
    assert late.admitted_at >= first[0].last_token_at


def test_only_blocks_in_use_are_in_the_way() -> None:
    model = batch(kv_blocks=7)
    for letter in "abcdef":
        assert served(model, letter * 64, tokens=3).finished
    assert model.stats.preemptions == 0


# The prefix cache


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
    one, two = served(model, first), served(model, second)
    assert (one.cached_tokens, two.cached_tokens) == (0, cached)
    assert one.created_tokens == len(first) // 16 * SIZE
    assert model.stats.prefix_hits == model.stats.cached_tokens == cached
    assert model.stats.prefix_queries == Prompt(first).tokens + Prompt(second).tokens
    assert model.stats.request_computed_tokens.total == model.stats.prompt_tokens - cached


def test_without_prefix_caching_there_are_no_hits() -> None:
    model = batch(prefix_caching=False)
    for _ in range(2):
        assert served(model, "a" * 64).cached_tokens == 0
    assert model.stats.prefix_queries == model.stats.prefix_hits == 0


def test_a_cached_prompt_prefills_faster() -> None:
    model = batch(kv_blocks=10_000)
    times = [served(model, "long " * 1000).first_token_at for _ in range(2)]
    assert times == pytest.approx([3.5, 1.004])  # 1,250 tokens, and two


def test_a_hit_is_one_while_the_first_still_runs() -> None:
    model, one, two = batch(kv_blocks=1000), sequence("a" * 400, tokens=90), sequence("a" * 400)
    model.submit([one], now=0.0)
    model.step(due(model))
    model.submit([two], now=0.5)
    run(model)
    assert two.cached_tokens == 96
    assert two.first_token_at < one.last_token_at


def test_prompts_of_one_step_share_what_they_have_in_common() -> None:
    model, sequences = batch(), [sequence("a" * 64 + letter * 64) for letter in "bc"]
    model.submit(sequences, now=0.0)
    assert [each.cached_tokens for each in sequences] == [0, 16]
    assert model.gauges.kv_cache_usage == pytest.approx(12 / 99)


def test_an_answer_is_cached_for_the_next_turn() -> None:
    model, question, answer = batch(), "q" * 70, "w" * 100
    served(model, question, tokens=30, answer=answer)  # 18 + 29 tokens have keys and values: 11 full blocks
    next_turn = served(model, f"{question}{answer}{'n' * 30}")
    assert next_turn.cached_tokens == 40  # the 170 characters of question and answer fill ten


def test_the_block_an_answer_ends_with_is_cached_too() -> None:
    model, question, answer = batch(), "q" * 16, "w" * 16
    served(model, question, tokens=5, answer=answer)  # the fifth has no keys and values yet
    assert served(model, f"{question}{answer}next").cached_tokens == 8


def test_an_answer_is_not_cached_before_it_is_there() -> None:
    model, question, answer = batch(), "q" * 64, "w" * 100
    one = sequence(question, tokens=30, answer=answer)
    model.submit([one], now=0.0)
    while one.generated < 10:
        model.step(due(model))
    two = sequence(f"{question}{answer}")
    model.submit([two], now=one.last_token_at)
    model.step(due(model))
    assert two.cached_tokens == 24  # 16 + 9 tokens are computed


def test_a_preempted_answer_is_a_hit_when_it_comes_back() -> None:
    model = batch(kv_blocks=31, max_running=2, ttft_seconds=0.1)
    long, short = sequence("a" * 16, tokens=110), sequence("b" * 16, tokens=60, answer="w" * 400)
    model.submit([long, short], now=0.0)
    while not short.preemptions:
        model.step(due(model))
    had, work = short.generated, model.stats.iteration_tokens.total
    assert had > 50
    run(model)
    assert short.generated == 60
    assert model.stats.iteration_tokens.total - work < 110 + had  # so part of it was not computed again


def test_a_reset_forgets_the_prefixes() -> None:
    model, one = batch(), sequence("a" * 64)
    model.submit([one], now=0.0)
    assert not model.reset_prefix_cache()
    run(model)
    assert model.reset_prefix_cache()
    assert served(model, "a" * 64).cached_tokens == 0


# Values


def test_token_ids_are_counted_as_they_are() -> None:
    prompt = Prompt(tuple(range(9)))
    assert prompt.tokens == 9
    assert len(prompt.block_hashes(4)) == 2
    assert prompt.block_hashes(4, "an answer has no ids") == prompt.block_hashes(4)


def test_a_histogram_counts_up_to_and_with_its_bound() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(value)
    assert histogram.cumulative() == [("1.0", 2), ("2.0", 3), ("+Inf", 4)]


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"kv_blocks": 1}, "num_gpu_blocks must be at least 2"),
        ({"max_batched_tokens": 255}, "max_num_batched_tokens .255. must be at least max_num_seqs .256."),
    ],
)
def test_options_that_make_no_engine(options: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        EngineOptions(**options)


@pytest.mark.parametrize(("kv_blocks", "tokens"), [(4096, 8192), (513, 8192), (65, 1024), (2, 16)])
def test_no_request_may_be_longer_than_the_blocks_hold(kv_blocks: int, tokens: int) -> None:
    assert EngineOptions(kv_blocks=kv_blocks).model_len == tokens


# Whatever comes

EVENTS = st.lists(
    st.tuples(
        st.text("ab", max_size=60),
        st.integers(1, 12),  # tokens
        st.integers(0, 9),  # steps before the next event
        st.sampled_from(("stays", "stays", "leaves", "is slow")),
    ),
    max_size=25,
)


@given(events=EVENTS, kv_blocks=st.integers(8, 30), max_batched_tokens=st.integers(3, 40), zero=st.booleans())
def test_whatever_comes_nothing_is_lost(
    events: list[tuple[str, int, int, str]], kv_blocks: int, max_batched_tokens: int, zero: bool
) -> None:
    """Sequences come and go in any order: places and blocks are all given back, and each is finished or aborted."""
    times = {"ttft_seconds": 0.0, "tpot_seconds": 0.0} if zero else {}
    model = batch(kv_blocks=kv_blocks, max_running=3, max_batched_tokens=max_batched_tokens, **times)
    taken: list[Sequence] = []
    now, aborted, computed = 0.0, 0, 0

    def forward() -> None:
        nonlocal now
        if (at := model.next_step_at()) is not None:
            now = max(now, at)
            model.step(now)
        assert model.gauges.running <= 3
        assert model.gauges.waiting >= 0
        step = model._step
        assert step is None or step.decoding + step.prefilled <= max_batched_tokens
        assert 0 <= model.gauges.kv_cache_usage <= 1

    for text, tokens, steps, fate in events:
        one = sequence(text, tokens, answer="w" * 40)
        model.submit([one], now)
        taken.append(one)
        one.held = fate == "is slow"
        for _ in range(steps):
            forward()
        if fate == "leaves" and not one.finished:
            model.abort(one, now)
            aborted += 1
        one.held = False
        computed += one.prompt_tokens
        assert model.stats.prefix_hits <= computed
    for _ in range(3000):
        forward()
    assert (model.unfinished, model.gauges.kv_cache_usage) == (0, 0.0)
    assert model.stats.finished["length"] == len(events) - aborted
    assert all(0 <= each.cached_tokens < each.prompt_tokens for each in taken)


@given(
    requests=st.lists(st.tuples(st.text("ab", max_size=60), st.integers(1, 12)), min_size=1, max_size=25),
    kv_blocks=st.integers(8, 30),
)
def test_whoever_comes_first_is_admitted_and_served_first(
    requests: list[tuple[str, int]], kv_blocks: int
) -> None:
    model = batch(kv_blocks=kv_blocks, max_running=3)
    sequences = [sequence(text, tokens) for text, tokens in requests]
    for number, each in enumerate(sequences):
        model.submit([each], now=0.001 * number)
    run(model)
    admitted = [each.admitted_at for each in sequences]
    assert admitted == sorted(admitted)
    firsts = [each.first_token_at for each in sequences if not each.preemptions]
    assert firsts == sorted(firsts)
