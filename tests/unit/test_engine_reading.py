"""Reading pages: sums and means over sets of labels, and what the next page adds."""

from __future__ import annotations

import pytest

from envoy_extproc.endpoints import EngineStats
from envoy_extproc.engines.dialects import DIALECTS, Dialect, dialects
from envoy_extproc.engines.exposition import _remembered
from envoy_extproc.engines.reading import WINDOW, PageError, Reading, read

VLLM = DIALECTS["vllm"]
QUEUE = dialects({"mine": {"queue_seconds": "e:wait"}})["mine"]


def page(**metrics: float | str) -> bytes:
    return "".join(f"vllm:{name} {value}\n" for name, value in metrics.items()).encode()


def queue(seconds: float, requests: int) -> bytes:
    return f"e:wait_sum {seconds}\ne:wait_count {requests}\n".encode()


def readings(dialect: Dialect, *pages: tuple[float, bytes]) -> list[EngineStats]:
    """What each page says, read one after the other; each with the second it arrived at."""
    told: list[EngineStats] = []
    previous: Reading | None = None
    for at, body in pages:
        previous = read(dialect, body, at, previous)
        told.append(previous.stats)
    return told


def test_data_parallel_engines_are_one_endpoint() -> None:
    body = b"""\
vllm:num_requests_running{engine="0"} 3
vllm:num_requests_running{engine="1"} 5
vllm:num_requests_waiting{engine="0"} 1
vllm:num_requests_waiting{engine="1"} 0
vllm:kv_cache_usage_perc{engine="0"} 0.2
vllm:kv_cache_usage_perc{engine="1"} 0.6
vllm:prefix_cache_hits_total{engine="0"} 90
vllm:prefix_cache_hits_total{engine="1"} 0
vllm:prefix_cache_queries_total{engine="0"} 100
vllm:prefix_cache_queries_total{engine="1"} 200
vllm:request_prompt_tokens_sum{engine="0"} 100
vllm:request_prompt_tokens_sum{engine="1"} 500
vllm:request_prompt_tokens_count{engine="0"} 1
vllm:request_prompt_tokens_count{engine="1"} 2
"""
    stats = read(VLLM, body, 0.0).stats
    assert (stats.running, stats.waiting) == (8.0, 1.0)
    assert stats.kv_cache_usage == pytest.approx(0.4)
    assert stats.prefix_cache_hit_rate == pytest.approx(0.3)  # of all queries, not the mean of two rates
    assert stats.prompt_tokens_per_request == 200.0


def test_rates_are_growth_over_the_time_between_two_pages() -> None:
    first, second = readings(
        VLLM,
        (10.0, page(generation_tokens_total=100, prompt_tokens_total=5, request_success_total=7)),
        (10.25, page(generation_tokens_total=150, prompt_tokens_total=5, request_success_total=8)),
    )
    assert (first.generation_tokens_per_second, first.requests_per_second) == (None, None)
    assert (second.generation_tokens_per_second, second.requests_per_second) == (200.0, 4.0)
    assert second.prompt_tokens_per_second == 0.0


def test_after_a_restart_there_is_no_rate_and_then_there_is_one_again() -> None:
    _, after, later = readings(
        VLLM,
        (10.0, page(generation_tokens_total=100, request_success_total=7)),
        # The tokens have already overtaken the old count; the requests tell that this is another engine.
        (11.0, page(generation_tokens_total=150, request_success_total=1)),
        (12.0, page(generation_tokens_total=160, request_success_total=1)),
    )
    assert (after.generation_tokens_per_second, after.requests_per_second) == (None, None)
    assert (later.generation_tokens_per_second, later.requests_per_second) == (10.0, 0.0)


@pytest.mark.parametrize(
    ("pages", "lives"),
    [
        ([{"t": 5}, {"t": 5}, {"t": 9}], [0, 0, 0]),
        ([{"t": 5}, {"t": 4}, {"t": 9}, {"t": 1}], [0, 1, 1, 2]),
        ([{"t": 5, "s": 100.5}, {"t": 9, "s": 100.5}, {"t": 12, "s": 160.5}], [0, 0, 1]),
        ([{"t": 5, "s": 100}, {"t": 4, "s": 160}], [0, 1]),
        ([{"t": 5}, {"t": 9, "s": 100}, {"t": 12}, {"t": 12, "s": 100}], [0, 0, 0, 0]),  # told now and then
    ],
)
def test_another_life_is_one_with_lower_counters_or_of_another_process(
    pages: list[dict[str, float]], lives: list[int]
) -> None:
    names = {"t": "vllm:generation_tokens_total", "s": "process_start_time_seconds"}
    bodies = ["".join(f"{names[key]} {value}\n" for key, value in each.items()).encode() for each in pages]
    told = readings(VLLM, *[(float(at), body) for at, body in enumerate(bodies)])
    assert [stats.life for stats in told] == lives
    assert [stats.started for stats in told] == [each.get("s") for each in pages]


def test_a_process_that_began_anew_has_no_rates_though_its_counters_are_higher() -> None:
    first = page(generation_tokens_total=10) + b"process_start_time_seconds 100\n"
    second = page(generation_tokens_total=99) + b"process_start_time_seconds 200\n"
    _, after = readings(VLLM, (1.0, first), (2.0, second))
    assert after.generation_tokens_per_second is None


def test_a_life_goes_on_though_the_clock_does_not() -> None:
    told = readings(
        VLLM,
        (2.0, page(generation_tokens_total=5)),
        (3.0, page(generation_tokens_total=1)),
        (3.0, page(generation_tokens_total=2)),
    )
    assert [stats.life for stats in told] == [0, 1, 1]


@pytest.mark.parametrize("at", [10.0, 9.0])
def test_no_time_has_passed(at: float) -> None:
    _, second = readings(
        VLLM, (10.0, page(generation_tokens_total=100)), (at, page(generation_tokens_total=150))
    )
    assert second.generation_tokens_per_second is None


def test_a_counter_that_appears_has_no_rate_yet() -> None:
    first = read(VLLM, page(num_requests_running=1), 10.0)
    second = read(VLLM, page(generation_tokens_total=100), 11.0, first)
    assert second.stats.generation_tokens_per_second is None
    assert second.counters == {"vllm:generation_tokens_total": 100.0}


def test_a_mean_is_over_what_finished_lately() -> None:
    told = readings(
        QUEUE,
        (0.0, queue(100, 100)),  # a life of 1 s each
        (1.0, queue(100, 100)),  # nothing finished: still that
        (2.0, queue(108, 102)),  # two of 4 s
        (3.0, queue(108, 102)),  # they are still lately
        (4.0, queue(110, 103)),  # with one of 2 s
    )
    assert [stats.queue_seconds for stats in told] == [1.0, 1.0, 4.0, 4.0, pytest.approx(10 / 3)]


def test_what_was_lately_goes_out_of_sight_and_its_mean_stays_until_another_finishes() -> None:
    told = readings(
        QUEUE,
        (0.0, queue(100, 100)),
        (1.0, queue(108, 102)),
        (1 + WINDOW, queue(108, 102)),
        (1 + 2 * WINDOW, queue(108, 102)),
        (1 + 9 * WINDOW, queue(108, 102)),
        (1 + 9 * WINDOW + 1, queue(109, 103)),
    )
    assert [stats.queue_seconds for stats in told] == [1.0, 4.0, 4.0, 4.0, 4.0, 1.0]


def test_lately_is_one_to_two_windows() -> None:
    beats = [(0.5 * beat, queue(0.5 * beat * beat, beat)) for beat in range(1, 100)]  # each waits longer
    last = readings(QUEUE, *beats)[-1]
    covered = [0.5 * (2 * beat - 1) for beat in range(100 - int(4 * WINDOW), 100)]
    assert min(covered) <= (last.queue_seconds or 0) <= max(covered)
    assert (last.queue_seconds or 0) > 80 * 0.5


def test_a_restart_begins_a_new_life() -> None:
    told = readings(
        QUEUE,
        (0.0, queue(100, 100)),
        (1.0, queue(108, 102)),
        (2.0, queue(6, 2)),
        (3.0, queue(7, 3)),
    )
    assert [stats.queue_seconds for stats in told] == [1.0, 4.0, 3.0, 1.0]


def test_a_histogram_that_appears_began_at_nothing() -> None:
    told = readings(QUEUE, (0.0, queue(0, 0)), (1.0, queue(6, 2)))
    assert [stats.queue_seconds for stats in told] == [None, 3.0]
    labelled = b'e:wait_sum{model="m"} 6\ne:wait_count{model="m"} 2\n'
    mine = dialects({"mine": {"running": "e:running", "queue_seconds": "e:wait"}})["mine"]
    both = readings(mine, (0.0, b"e:running 0\n"), (1.0, b"e:running 0\n" + labelled))
    assert [stats.queue_seconds for stats in both] == [None, 3.0]


def test_what_the_engine_does_not_tell_is_none() -> None:
    assert read(VLLM, page(num_requests_waiting=2), 1.0).stats == EngineStats(at=1.0, waiting=2.0)


def test_no_prefix_was_looked_up_yet() -> None:
    body = page(prefix_cache_hits_total=0, prefix_cache_queries_total=0)
    assert read(VLLM, body, 1.0).stats.prefix_cache_hit_rate is None


@pytest.mark.parametrize(
    ("body", "rate"),
    [
        (page(gpu_prefix_cache_hits_total=1, gpu_prefix_cache_queries_total=4), 0.25),
        (page(gpu_prefix_cache_hit_rate=0.5), 0.5),
        (page(gpu_prefix_cache_hit_rate=-1), None),  # prefix caching is off
    ],
)
def test_names_of_older_versions(body: bytes, rate: float | None) -> None:
    assert read(VLLM, body, 1.0).stats.prefix_cache_hit_rate == rate


@pytest.mark.parametrize("value", ["NaN", "+Inf", "-Inf"])
def test_what_is_no_number_is_as_if_absent(value: str) -> None:
    stats = read(VLLM, page(num_requests_running=value, num_requests_waiting=1), 1.0).stats
    assert (stats.running, stats.waiting) == (None, 1.0)


@pytest.mark.parametrize(("value", "share"), [("-1", None), ("0", 0.0), ("0.5", 0.5), ("1.11", 1.0)])
def test_shares_are_held_between_nothing_and_all(value: str, share: float | None) -> None:
    assert read(VLLM, page(kv_cache_usage_perc=value), 1.0).stats.kv_cache_usage == share


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>not here</html>",
        b"python_info 1.0\n",
        b"process_start_time_seconds 1.7e9\n",  # any Python program's
        b"vllm:num_requests_running NaN\n",
    ],
)
def test_a_page_of_something_else(body: bytes) -> None:
    with pytest.raises(PageError, match="no metric"):
        read(VLLM, body, 1.0)


def test_the_newest_set_of_adapters_counts_wherever_it_stands() -> None:
    old = 'vllm:lora_requests_info{max_lora="2",running_lora_adapters="a",waiting_lora_adapters=""} 1.5e9\n'
    new = (
        'vllm:lora_requests_info{max_lora="2",running_lora_adapters="b,c",waiting_lora_adapters="a"} 1.6e9\n'
    )
    for body in (old + new, new + old):
        stats = read(VLLM, body.encode(), 1.0).stats
        assert (stats.loras, stats.waiting_loras, stats.max_loras) == (
            frozenset({"b", "c"}),
            frozenset({"a"}),
            2,
        )


def test_an_engine_of_its_own_ways() -> None:
    mine = dialects(
        {
            "mine": {
                "running": 'e:requests{state="running"}',
                "waiting": 'e:requests{state=waiting,queue=""}',
                "kv_cache_usage": "e:blocks_used / e:blocks",
                "prefix_cache_hit_rate": "e:hit_percent / 100",
                "generation_tokens_per_second": "gauge(e:throughput)",
                "requests_per_second": "e:done",
                "mem_utilization": "e:memory",
                "utilization": "e:load if e:limit",
                "queue_seconds": "e:queue_ms / 1000",
                "prefill_seconds": "gauge(e:prefill_ms) / 1000",
                "decode_seconds": "e:busy_us / e:done / 1e6",
                "time_to_first_token": ["e:first", "e:ttft{kind=chat}"],
                "loras": "e:adapters[running]",
                "max_loras": "e:slots",
            }
        }
    )["mine"]
    body = b"""\
e:requests{state="running",queue=""} 2
e:requests{state="running",queue="slow"} 1
e:requests{state="waiting"} 5
e:requests{state="waiting",queue="slow"} 7
e:blocks_used 1
e:blocks 4
e:hit_percent 50
e:throughput 99
e:done 4
e:memory 0.9
e:load 0.3
e:queue_ms_sum 3000
e:queue_ms_count 2
e:prefill_ms 250
e:busy_us 8000000
e:ttft_sum{kind="chat"} 3
e:ttft_count{kind="chat"} 6
e:ttft_sum{kind="other"} 300
e:ttft_count{kind="other"} 6
e:adapters{running="x"} 1
e:slots 4
"""
    first = read(mine, body, 1.0)
    assert read(mine, body, 2.0, first).stats == EngineStats(
        at=2.0,
        running=3.0,
        waiting=5.0,
        kv_cache_usage=0.25,
        prefix_cache_hit_rate=0.5,
        generation_tokens_per_second=99.0,
        requests_per_second=0.0,
        mem_utilization=0.9,
        queue_seconds=1.5,
        prefill_seconds=0.25,
        decode_seconds=2.0,
        time_to_first_token=0.5,
        loras=frozenset({"x"}),
        max_loras=4,
    )
    assert read(mine, body + b"e:limit 8\n", 3.0).stats.utilization == 0.3


@pytest.mark.parametrize(
    ("text", "limit"), [("4", 4), ("", None), ("x", None), ("-1", None), ("4.5", None), ("9" * 5000, None)]
)
def test_a_limit_in_a_label(text: str, limit: int | None) -> None:
    body = f'vllm:lora_requests_info{{max_lora="{text}"}} 1\n'.encode()
    assert read(VLLM, body, 1.0).stats.max_loras == limit


# -- the room in its cache -------------------------------------------------------------------------------------------


def config(**labels: object) -> str:
    return (
        "vllm:cache_config_info{" + ",".join(f'{name}="{value}"' for name, value in labels.items()) + "} 1\n"
    )


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        (config(kv_cache_size_tokens=5120, num_gpu_blocks=40, block_size=128), 5120.0),
        (config(kv_cache_size_tokens="None", num_gpu_blocks=40, block_size=128), 5120.0),
        (
            config(kv_cache_size_tokens=3000, num_gpu_blocks=40, block_size=128),
            3000.0,
        ),  # kinds of attention share
        (config(num_gpu_blocks=40, block_size=16), 640.0),
        (config(num_gpu_blocks="None", block_size=16), None),
        (config(num_gpu_blocks=40), None),
        # Data parallelism: each has a cache of its own.
        (
            config(engine=0, num_gpu_blocks=40, block_size=16)
            + config(engine=1, num_gpu_blocks=20, block_size=16),
            960.0,
        ),
        (config(engine=0, kv_cache_size_tokens=100) + config(engine=1, kv_cache_size_tokens=200), 300.0),
        ("", None),
    ],
)
def test_room_in_labels(text: str, tokens: float | None) -> None:
    assert read(VLLM, page(num_requests_running=1) + text.encode(), 1.0).stats.kv_cache_tokens == tokens


def test_room_in_two_gauges() -> None:
    body = b"""\
trtllm_kv_cache_max_blocks{rank="0"} 100
trtllm_kv_cache_max_blocks{rank="1"} 100
trtllm_kv_cache_tokens_per_block{rank="0"} 32
trtllm_kv_cache_tokens_per_block{rank="1"} 32
"""
    assert read(DIALECTS["trtllm"], body, 1.0).stats.kv_cache_tokens == 6400.0
    alone = b"trtllm_kv_cache_max_blocks 100\n"
    assert read(DIALECTS["trtllm"], alone, 1.0).stats.kv_cache_tokens is None


def test_room_is_read_again_after_some_seconds_and_at_once_while_it_is_not_known() -> None:
    def body(tokens: object) -> bytes:
        return page(num_requests_running=1) + config(kv_cache_size_tokens=tokens).encode()

    told = readings(
        VLLM,
        (0.0, body("None")),
        (1.0, body(10)),
        (2.0, body(20)),
        (1 + WINDOW, body(30)),
        (2 + WINDOW, page(num_requests_running=1)),
        (1 + 2 * WINDOW, page(num_requests_running=1)),
    )
    assert [stats.kv_cache_tokens for stats in told] == [None, 10.0, 10.0, 30.0, 30.0, None]


def test_another_life_has_its_own_room() -> None:
    def body(started: int, tokens: int) -> bytes:
        text = config(kv_cache_size_tokens=tokens) + f"process_start_time_seconds {started}\n"
        return page(num_requests_running=1) + text.encode()

    told = readings(VLLM, (0.0, body(1, 10)), (0.2, body(2, 20)), (0.4, body(2, 20)))
    assert [stats.kv_cache_tokens for stats in told] == [10.0, None, 20.0]  # the next page tells


def test_a_page_that_tells_of_nothing_but_room_is_one() -> None:
    told = readings(
        VLLM, (0.0, config(kv_cache_size_tokens=10).encode()), (0.2, config(kv_cache_size_tokens=20).encode())
    )
    assert [stats.kv_cache_tokens for stats in told] == [10.0, 20.0]


def test_very_long_labels_are_read_and_not_remembered() -> None:
    text = config(num_gpu_blocks=4, block_size=2, note="x" * 10_000)
    before = _remembered.cache_info()
    assert read(VLLM, text.encode(), 1.0).stats.kv_cache_tokens == 8.0
    assert _remembered.cache_info() == before
