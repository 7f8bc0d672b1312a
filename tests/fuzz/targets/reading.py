"""What the targets that read answers have in common."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType

from envoy_extproc.openai.answer import Reader, Seen
from tests.fuzz.draw import bounded

FACTS = ("usage", "error", "done", "token_events", "text_length", "oversized", "unreadable", "removed_events")
WORDS = [
    b"data: ", b"\n\n", b"\r\n\r\n", b"[DONE]", b'"usage"', b'"usage":null', b',"usage":null}', b'{"prompt_tokens":5,"completion_tokens":7}',
    b'"choices":', b'{"delta":{"content":"x"}}', b'"delta":', b'"text":"x"', b'"error":', b'{"message":"m","type":"t","code":500}',
    b'"type":', b'"message_start"', b'"message_delta"', b'"message_stop"', b'"content_block_delta"', b'"response.completed"',
    b'"response.failed"', b'"response.output_text.delta"', b'"response"', b'"message"', b'"tool_calls":[{}]', b'"function_call":{}',
    b'"input_tokens":3', b'"output_tokens":4', b'"cached_tokens":2', b'"object":"error"', b"null", b"true", b"[]", b"{}", b"-1",
    b"1e400", b"NaN", b'"\\ud800"', b"99999999999999999999", b'"7"', b"7.0", b",", b'"', b"\\", b"[", b"{", b'"duration"',
]  # fmt: skip

_NOT_DATA = (type, ModuleType, FunctionType, BuiltinFunctionType, MethodType)


def played(reader: Reader, pieces: Sequence[bytes], limit: int, let_go_at: int | None = None) -> bytes:
    """All that is delivered of `pieces`; what the reader keeps meanwhile is bounded by `limit`."""
    delivered = []
    with bounded():
        for number, piece in enumerate(pieces):
            if number == let_go_at:
                reader.let_go()
            shown = reader.feed(piece, float(number))
            delivered.append(piece if shown is None else shown)
            if number % 8 == 0:
                assert kept(reader) <= max(limit, 3), "more is kept than the limit allows"
        delivered.append(reader.finish(float(len(pieces))))
    return b"".join(delivered)


def kept(reader: object) -> int:
    """Bytes that a reader holds."""
    total, known, todo = 0, set(), [reader]
    while todo:
        each = todo.pop()
        if isinstance(each, bytes | bytearray):
            total += len(each)
        elif id(each) not in known and not isinstance(each, _NOT_DATA):
            known.add(id(each))
            todo += gc.get_referents(each)
    return total


def facts(seen: Seen) -> Mapping[str, object]:
    """What was seen, times aside: they depend on the cuts."""
    return {name: getattr(seen, name) for name in FACTS}
