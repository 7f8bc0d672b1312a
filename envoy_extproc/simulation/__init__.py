"""Engines that behave like a vLLM 0.32 server without a model: for demos, tests and replays.

    options.py       what an engine is started with; every default with its reason
    service_time.py  the pure model: queue, steps of the batch, preemption; the clock is handed in
    kv_cache.py      its KV blocks and the prefix cache in them
    metrics.py       what the model counts, and the exposition of it
    requests.py      bodies in, values out; the refusals of vLLM
    faults.py        the header `x-simulate`
    answers.py       values in, bytes out
    comparison.py    the same conversations by one policy after the other, for the demo
    engine.py        the aiohttp shell: one timer per step of the batch writes to every stream

Nothing here is imported by the server, and nothing here imports it.
"""
