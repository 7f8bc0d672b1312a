"""What a simulated engine is started with."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from envoy_extproc.simulation.faults import NONE, Faults


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Settings of one engine. Times are seconds.

    Attributes:
        host: address to listen on.
        port: TCP port; 0 takes a free one, which `Engine.address` tells.
        models: names served, the first labels the metrics.
        name: tells one engine from another: it makes the suffix of `system_fingerprint`.
        ttft_seconds: time to the first token of a short prompt on an idle engine.
        tpot_seconds: time per output token of a batch of one; 0 streams as fast as readers read.
        max_running: sequences in the batch at once (vLLM's max_num_seqs).
        max_batched_tokens: tokens computed in one step, of decodes and prefills together (max_num_batched_tokens).
        kv_blocks: KV blocks on the simulated GPU (num_gpu_blocks); one of them is never given out, as in vLLM.
        block_size: tokens per KV block.
        prefix_caching: whether prompts share the blocks they have in common (enable_prefix_caching).
        max_queued: requests that may wait before others are refused; None is no limit (max_num_queued_reqs).
        max_model_len: tokens of prompt and answer together; see `model_len`.
        answer_tokens: length of an answer to which the request sets no limit.
        usage_null: write `"usage":null` in the events without usage once usage is asked for, as OpenAI does.
        kept_requests: how many received requests, the latest, stay in `Engine.requests`.
        faults: what goes wrong with every answer, from the start.
    """

    host: str = "127.0.0.1"  # a simulation is nobody else's business
    port: int = 0  # tests and fleets want any free port
    models: tuple[str, ...] = ("llama-3-8b",)  # the model of the examples
    name: str = "engine"
    ttft_seconds: float = 0.05  # an 8B model on an A10 with a prompt of some 200 tokens
    tpot_seconds: float = 0.02  # 50 tokens per second, the same machine
    max_running: int = 256  # vLLM's own default for a server on less than 70 GB
    max_batched_tokens: int = 2048  # likewise; 8192 on an H100, where a step of so many takes no longer
    kv_blocks: int = 4096  # 65,536 tokens: what an 8B model leaves free on 24 GB
    block_size: int = 16  # vLLM's default on CUDA
    prefix_caching: bool = True  # vLLM's default
    max_queued: int | None = None  # vLLM's default: nobody is refused
    max_model_len: int = 8192  # Llama 3 8B's context
    answer_tokens: int = 64  # long enough to see it stream, short enough to wait for
    usage_null: bool = False  # vLLM 0.32 writes no usage key there
    kept_requests: int = 10_000  # a 2,000-stream test five times over
    faults: Faults = NONE  # an engine that works

    def __post_init__(self) -> None:
        if self.kv_blocks < 2:
            raise ValueError("num_gpu_blocks must be at least 2: one is never given out")
        if self.max_batched_tokens < self.max_running:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_running}): each sequence of the batch wants a token in each step"
            )

    @property
    def model_len(self) -> int:
        """`max_model_len`, or less where the KV blocks hold less: vLLM serves no request it cannot hold whole."""
        return min(self.max_model_len, (self.kv_blocks - 1) * self.block_size)

    @property
    def fingerprint(self) -> str:
        """The `system_fingerprint` of every answer: vLLM's form, the hash taken over the engine's name."""
        return f"vllm-0.32.0-{zlib.crc32(self.name.encode()):08x}"
