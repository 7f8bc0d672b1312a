"""The simulated engine tells what a real vLLM does, under the names of its dialect."""

from __future__ import annotations

import aiohttp

from envoy_extproc.engines.dialects import DIALECTS
from envoy_extproc.engines.reading import read
from envoy_extproc.engines.served import served_models
from envoy_extproc.simulation.engine import Engine, EngineOptions

PROMPT = "one two three four five six seven eight"


async def test_everything_but_adapters() -> None:
    engine = Engine(EngineOptions(models=("a", "b"), ttft_seconds=0.02, tpot_seconds=0.001, max_running=1))
    await engine.start()
    try:
        async with aiohttp.ClientSession(f"http://{engine.address}") as http:
            body = {
                "model": "a",
                "prompt": [PROMPT, PROMPT],
                "max_tokens": 10,
            }  # the second waits for the first
            async with http.post("/v1/completions", json=body) as answer:
                usage = (await answer.json())["usage"]
            async with http.get("/metrics") as page:
                stats = read(DIALECTS["vllm"], await page.read(), 1.0).stats
            async with http.get("/v1/models") as models:
                served = served_models(await models.read())
    finally:
        await engine.stop()
    assert (stats.running, stats.waiting, stats.kv_cache_usage) == (0.0, 0.0, 0.0)
    assert stats.prompt_tokens_per_request == usage["prompt_tokens"] / 2
    assert stats.generation_tokens_per_request == 10.0
    assert stats.prefill_seconds is not None
    assert stats.prefill_seconds >= 0.02
    assert stats.decode_seconds is not None
    assert 0.009 <= stats.decode_seconds < 1
    assert stats.queue_seconds is not None
    assert 0.01 <= stats.queue_seconds < 1  # of two, one of which did not wait
    assert stats.time_to_first_token is not None
    assert stats.time_per_output_token is not None
    assert [model.id for model in served or ()] == ["a", "b"]
