"""The simulated engine's KV blocks, prefix cache and metrics, from outside; a recorded page of a real vLLM is the measure."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.simulated import CHAT, COMPLETIONS, EMBEDDINGS, Client, serving, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from prometheus_client.core import Metric

CAPTURES = Path(__file__).parents[1] / "captures"
RECORDED = CAPTURES / "vllm-0.32-metrics-under-load.txt"
SYSTEM = {"role": "system", "content": "You are the assistant of a large shop. " * 20}
QUESTION = {"role": "user", "content": "Where is my parcel, and when will it be here?"}


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    async with serving() as started:
        yield started


def families(text: str) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(text)}


def labels(family: Metric) -> set[str]:
    return {name for sample in family.samples for name in sample.labels}


def cached(answer: Any) -> int:
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


async def page(client: Client) -> dict[str, Metric]:
    async with client.request("/metrics") as response:
        return families(await response.text())


# Metrics


async def test_metrics_are_some_of_vllms_in_its_types_and_labels(client: Client) -> None:
    ours, theirs = await page(client), families(RECORDED.read_text(encoding="utf-8"))
    assert ours.keys() <= theirs.keys()
    for name, family in ours.items():
        known = theirs[name]
        assert family.type == known.type, name
        assert labels(family) <= labels(known), name
        assert labels(family) == labels(known) or name == "vllm:cache_config_info"


async def test_values_of_labels_are_vllms(client: Client) -> None:
    ours, theirs = await page(client), families(RECORDED.read_text(encoding="utf-8"))
    of_the_model_length = {"vllm:request_prompt_tokens", "vllm:request_generation_tokens"}
    for name in ours.keys() - {"vllm:request_prefill_kv_computed_tokens"} - of_the_model_length:
        for label in ("le", "source", "reason", "finished_reason"):
            said, known = (
                {sample.labels.get(label) for sample in each[name].samples} for each in (ours, theirs)
            )
            assert said <= known, (name, label)
            assert label == "reason" or said == known, (name, label)


async def test_each_engine_of_a_process_tells_its_own_start() -> None:
    before = time.time()
    async with serving() as one:
        await asyncio.sleep(0.02)
        async with serving() as two:
            starts = [(await each.metrics())["process_start_time_seconds"] for each in (one, two)]
    assert before <= starts[0] <= starts[1] - 0.02 <= time.time()


async def test_a_started_again_engine_is_a_new_process(client: Client) -> None:
    body = {"messages": [SYSTEM, QUESTION]}
    await client.json(CHAT, body)
    before = await client.metrics()
    await client.engine.stop()
    await client.engine.start()
    after = await client.metrics()
    assert before["prompt_tokens_total"] > after["prompt_tokens_total"] == 0
    assert before["process_start_time_seconds"] < after["process_start_time_seconds"]
    assert cached(await client.json(CHAT, body)) == 0


async def test_sources_of_prompt_tokens_add_up(client: Client) -> None:
    answers = [await client.json(CHAT, {"messages": [SYSTEM, QUESTION]}) for _ in range(3)]
    counted = await page(client)
    by_source = {
        sample.labels["source"]: sample.value
        for sample in counted["vllm:prompt_tokens_by_source"].samples
        if sample.name.endswith("_total")
    }
    metrics = await client.metrics()
    hits = sum(map(cached, answers))
    assert hits > 0
    assert by_source["local_cache_hit"] == metrics["prefix_cache_hits_total"] == hits
    assert by_source["local_compute"] == metrics["prompt_tokens_total"] - hits
    assert metrics["request_prefill_kv_computed_tokens_sum"] == by_source["local_compute"]


# The prefix cache


@pytest.mark.parametrize("stream", [False, True])
async def test_the_next_turn_finds_the_answer_in_the_cache(client: Client, stream: bool) -> None:
    first = {"messages": [SYSTEM, QUESTION], "max_tokens": 80, "stream": stream, "seed": 7}
    async with client.request(CHAT, first) as response:
        text = await response.text()
    if stream:
        told = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        content = "".join(each["choices"][0]["delta"]["content"] for each in told)
    else:
        content = json.loads(text)["choices"][0]["message"]["content"]
    prompt = (await client.metrics())["prompt_tokens_total"]
    turn = [SYSTEM, QUESTION, {"role": "assistant", "content": content}, {"role": "user", "content": "?"}]
    answer = await client.json(CHAT, {"messages": turn})
    # 79 tokens of the answer have keys and values: from within the last block of the prompt, at least four blocks.
    assert cached(answer) >= prompt // 16 * 16 + 4 * 16
    other = [*turn[:2], {"role": "assistant", "content": content.upper()}, turn[3]]
    assert cached(await client.json(CHAT, {"messages": other})) <= prompt


async def test_a_completion_goes_on_from_its_text(client: Client) -> None:
    prompt = "Once upon a time there was a cache. " * 10
    answer = await client.json(COMPLETIONS, {"prompt": prompt, "max_tokens": 64, "seed": 3})
    longer = prompt + answer["choices"][0]["text"]
    assert cached(await client.json(COMPLETIONS, {"prompt": longer})) > len(prompt) // 4


async def test_prompts_of_unlike_salts_share_nothing(client: Client) -> None:
    found = []
    for salt in (None, "a", "a", "b", None):
        body: dict[str, Any] = {"messages": [SYSTEM]}
        found.append(cached(await client.json(CHAT, body if salt is None else {**body, "cache_salt": salt})))
    assert [hits > 0 for hits in found] == [False, False, True, False, True]


@pytest.mark.parametrize("salt", ["", 5])
async def test_a_salt_is_some_text(client: Client, salt: Any) -> None:
    async with client.request(CHAT, {"messages": [SYSTEM], "cache_salt": salt}) as response:
        assert response.status == 400
        assert "cache_salt" in await response.text()


async def test_embeddings_share_what_they_begin_with(client: Client) -> None:
    for _ in range(2):
        await client.json(EMBEDDINGS, {"input": SYSTEM["content"]})
    assert (await client.metrics())["prefix_cache_hits_total"] > 100


async def test_without_prefix_caching_nothing_is_found() -> None:
    async with serving(prefix_caching=False) as client:
        answers = [await client.json(CHAT, {"messages": [SYSTEM]}) for _ in range(2)]
        assert [cached(answer) for answer in answers] == [0, 0]
        metrics = await client.metrics()
        info = (await page(client))["vllm:cache_config_info"].samples[0].labels
    assert metrics["prefix_cache_queries_total"] == 0
    assert info["enable_prefix_caching"] == "False"


async def test_a_reset_forgets_it_unless_a_request_runs(client: Client) -> None:
    body = {"messages": [SYSTEM, QUESTION]}

    async def reset() -> tuple[int, bytes]:
        async with client.request("/reset_prefix_cache", "") as response:
            return response.status, await response.read()

    await client.json(CHAT, body)
    async with client.request(CHAT, {**body, "stream": True}, simulate="hang=1"):
        assert await reset() == (200, b"")
        assert cached(await client.json(CHAT, body)) > 0
    await until(lambda: client.engine.running == 0)
    assert await reset() == (200, b"")
    assert cached(await client.json(CHAT, body)) == 0


# KV blocks


async def test_too_few_blocks_preempt() -> None:
    async with serving(kv_blocks=17, max_model_len=2048) as client:
        prompts = [letter * 256 for letter in "abcd"]  # four blocks each, and as many for the answer
        answer = await client.json(COMPLETIONS, {"prompt": prompts, "max_tokens": 64, "seed": 1})
        assert answer["usage"]["completion_tokens"] == 256
        metrics = await client.metrics()
        again = await client.json(COMPLETIONS, {"prompt": prompts[0], "max_tokens": 64, "seed": 1})
    assert metrics["num_preemptions_total"] == metrics["request_num_preemptions_sum"] > 0
    assert metrics["prefix_cache_queries_total"] == metrics["prompt_tokens_total"] == 256
    assert metrics["kv_cache_usage_perc"] == 0
    assert again["choices"][0]["text"] == answer["choices"][0]["text"]  # a preempted answer is no other


async def test_usage_is_of_the_blocks_that_can_be_had() -> None:
    async with serving(kv_blocks=40, block_size=128, max_model_len=8192) as client:
        body = {"prompt": "x" * 4 * 3000, "max_tokens": 900, "stream": True}
        async with client.request(COMPLETIONS, body, simulate="hang=1"):
            metrics = await client.metrics()
    assert metrics["kv_cache_usage_perc"] == pytest.approx(24 / 39)  # as vLLM: one block is never given out


async def test_a_context_larger_than_the_blocks_is_cut_to_them() -> None:
    async with serving(kv_blocks=33, max_model_len=2048) as client:
        assert (await client.json("/v1/models"))["data"][0]["max_model_len"] == 512
        async with client.request(COMPLETIONS, {"prompt": "x" * 2048}) as response:
            assert response.status == 400
            assert "maximum context length is 512 tokens" in await response.text()
        answer = await client.json(COMPLETIONS, {"prompt": "x" * 2040, "max_tokens": 2})
        assert answer["usage"]["total_tokens"] == 512


# Tokens


async def test_tokens_are_answered_in_vllms_shape(client: Client) -> None:
    body = {"prompt": "def read(self):", "return_token_strs": True}
    recorded = (CAPTURES / "vllm-0.32" / "tokenize.raw").read_bytes().partition(b"\r\n\r\n")[2]
    told, known = await client.json("/tokenize", body), json.loads(recorded)
    assert list(told) == list(known)
    assert (told["count"], told["max_model_len"]) == (4, 2048)
    assert told["token_strs"] == ["def ", "read", "(sel", "f):"]
    assert len(set(told["tokens"])) == 4
    assert all(0 <= token < 128_256 for token in told["tokens"])
    again = await client.json("/tokenize", {"prompt": "read"})
    assert again == {"count": 1, "max_model_len": 2048, "tokens": told["tokens"][1:2], "token_strs": None}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {"prompt": "x" * 77}),
        (CHAT, {"messages": [SYSTEM, QUESTION]}),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "雪" * 9}]}]}),
    ],
)
async def test_as_many_tokens_as_usage_will_say(client: Client, path: str, body: dict[str, Any]) -> None:
    told = await client.json("/tokenize", {"model": "tiny", **body})
    answer = await client.json(path, body)
    assert told["count"] == len(told["tokens"]) == answer["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ("{}", 400, "Field required"),
        ('{"prompt": 5}', 400, "Input should be a valid string"),
        ('{"prompt": [5, 6]}', 400, "Input should be a valid string"),
        ('{"messages": "x"}', 400, "Input should be a valid list"),
        ('{"prompt": "x", "model": "nope"}', 404, "The model `nope` does not exist."),
        ("{", 400, "JSON decode error"),
    ],
)
async def test_tokens_of_what_cannot_be_understood(
    client: Client, body: str, status: int, message: str
) -> None:
    async with client.request("/tokenize", body) as response:
        assert response.status == status
        assert message in await response.text()


@pytest.mark.parametrize("path", ["/tokenize", "/reset_prefix_cache"])
async def test_they_are_posted_to(client: Client, path: str) -> None:
    async with client.request(path) as response:
        assert response.status == 405
