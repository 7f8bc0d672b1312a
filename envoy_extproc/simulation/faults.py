"""The header `x-simulate`: what a test or the demo wants to go wrong, as a comma list of `key` or `key=value`.

An engine that is to fail whatever it is asked has the same as `EngineOptions.faults`; the header wins.

| key | the engine |
|---|---|
| `error=STATUS` | answers with vLLM's JSON error of that status, streams too |
| `error-event=N` | after N tokens writes an SSE error event with code 500, then [DONE]; without a stream: 500 |
| `reset=N` | after N tokens resets the TCP connection; 0 is before the status line |
| `hang=N` | after N tokens writes nothing more and closes nothing; 0 is before the status line |
| `no-done` | leaves out `data: [DONE]` |
| `no-usage` | never reports usage |
| `tail` | ends the last event without any line end, so also without its blank line |
| `crlf` | ends lines with CR LF |
| `gzip` | compresses the answer, whatever `accept-encoding` said |
| `lookalike` | puts `"usage":{"prompt_tokens":999}` in content, in tool arguments and in a nested object |
| `tokens=N` | answers with N tokens |
| `delay=SECONDS` | waits so long before it looks at the request |
| `big-event=BYTES` | makes the first token's text so long |
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

HEADER = "x-simulate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """What goes wrong with one answer. Counts are tokens, of all choices together."""

    error: int | None = None
    error_event: int | None = None
    reset: int | None = None
    hang: int | None = None
    no_done: bool = False
    no_usage: bool = False
    tail: bool = False
    crlf: bool = False
    gzip: bool = False
    lookalike: bool = False
    tokens: int | None = None
    delay: float = 0.0
    big_event: int = 0

    @classmethod
    def parse(cls, header: str) -> Faults:
        """Reads the header's value.

        Raises:
            ValueError: an unknown key, or a value that does not fit it.
        """
        values: dict[str, Any] = {}
        for item in filter(None, map(str.strip, header.split(","))):
            key, equals, value = item.partition("=")
            name = key.replace("-", "_")
            if name not in _NAMES or (name in _READERS) != bool(equals):
                raise ValueError(f"{HEADER}: what is {item!r}?")
            values[name] = _READERS[name](value) if equals else True
        return cls(**values)


def _count(value: str) -> int:
    if not value.isdecimal():
        raise ValueError(f"{HEADER}: {value!r} is no count")
    return int(value)


def _status(value: str) -> int:
    return int(HTTPStatus(_count(value)))


_READERS: dict[str, Callable[[str], int | float]] = {
    "error": _status,
    "error_event": _count,
    "reset": _count,
    "hang": _count,
    "tokens": lambda value: max(1, _count(value)),
    "delay": float,
    "big_event": _count,
}
_NAMES = frozenset(field.name for field in fields(Faults))
NONE = Faults()
