"""Values that many tests start from."""

from __future__ import annotations

import msgspec

from envoy_extproc.endpoints import Endpoint, EngineStats
from envoy_extproc.headers import Headers
from envoy_extproc.scheduling.interfaces import Candidate, Decision

MODEL = "llama-3-8b"


def endpoint(number: int, *, models: tuple[str, ...] = (MODEL,), name: str | None = None) -> Endpoint:
    """``pod-1`` at 10.0.0.1:8000, and so on."""
    return Endpoint(name=name or f"pod-{number}", address=f"10.0.0.{number}:8000", models=models)


def candidate(
    number: int, in_flight: int = 0, *, kv: float | None = None, reachable: bool = True
) -> Candidate:
    """The endpoint of that number; with `kv` its engine has been scraped."""
    stats = None if kv is None else EngineStats(at=0.0, kv_cache_usage=kv)
    return Candidate(endpoint(number), in_flight, stats, reachable)


def decision(*numbers: int, policy: str = "least-request") -> Decision:
    """Endpoints to try in that order."""
    order = [candidate(number) for number in numbers or (1,)]
    return Decision(
        policy=policy,
        decided_by=policy,
        chosen=order[0],
        order=tuple(each.endpoint for each in order),
        candidates=tuple(order),
    )


def headers(**values: str | int) -> Headers:
    """Headers by name, underscores for dashes; ``path``, ``method`` and ``status`` are pseudo headers."""
    pseudo = ("path", "method", "status")
    return Headers(
        [
            (f":{name}" if name in pseudo else name.replace("_", "-"), str(value))
            for name, value in values.items()
        ]
    )


def sse(*events: object) -> bytes:
    """Events as engines write them; text stands for itself."""
    return b"".join(
        b"data: " + (event.encode() if isinstance(event, str) else msgspec.json.encode(event)) + b"\n\n"
        for event in events
    )


def token(text: str = "x") -> dict[str, object]:
    """A chat event with a piece of text."""
    return {"choices": [{"index": 0, "delta": {"content": text}}]}


def usage(prompt: int, completion: int) -> dict[str, object]:
    """A usage event."""
    total = prompt + completion
    tokens = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": total}
    return {"choices": [], "usage": tokens}
