"""What has been seen of an answer: the books that the readers write and the report is made from."""

from __future__ import annotations

import msgspec

from envoy_extproc.openai.request import BYTES_PER_TOKEN
from envoy_extproc.openai.usage import Told, Usage, merged, usage_of


class EngineError(msgspec.Struct, frozen=True, kw_only=True):
    """An error the engine told of in a body, perhaps in the middle of a 200.

    Attributes:
        message: the engine's sentence.
        type: the engine's error type.
        code: an HTTP-like status, 500 where the engine gave none that is known.
    """

    message: str = ""
    type: str = ""
    code: int = 500


class Seen:
    """What has been seen of an answer so far.

    Attributes:
        usage: as the engine last reported it; None until then.
        begun: the half of it that a message's start tells: the prompt's tokens count, the others are to come.
        first_token_at: when the first content, reasoning or tool call came, in the clock of `feed`; None until then.
        last_token_at: when the last such one came.
        token_events: how many pieces of text, reasoning or tool call came, each choice for itself.
        text_length: characters of text in them.
        error: the last error told of in the body.
        done: whether the event that ends a stream, or the end of a JSON body that could be read, came.
        oversized: events or bodies beyond the limit, passed unparsed.
        unreadable: events or bodies that are not JSON of a shape known.
        removed_events: usage events taken out.
    """

    __slots__ = (
        "_half",
        "begun",
        "done",
        "error",
        "first_token_at",
        "last_token_at",
        "oversized",
        "removed_events",
        "text_length",
        "token_events",
        "unreadable",
        "usage",
    )

    def __init__(self) -> None:
        self.usage: Usage | None = None
        self.begun: Usage | None = None
        self._half: Told | None = None
        self.first_token_at: float | None = None
        self.last_token_at: float | None = None
        self.token_events = 0
        self.text_length = 0
        self.error: EngineError | None = None
        self.done = False
        self.oversized = 0
        self.unreadable = 0
        self.removed_events = 0

    @property
    def completion_tokens_estimate(self) -> int:
        """Tokens guessed from what came.

        Engines write an event a token as long as they are not hurried. Where the text is twice as long as that allows,
        several tokens share an event, and the length of the text is the better guess.
        """
        by_length = self.text_length // BYTES_PER_TOKEN
        return by_length if by_length > 2 * self.token_events else self.token_events

    def came(self, now: float) -> None:
        """Something came that a user was waiting for, and no text."""
        self.last_token_at = now
        if self.first_token_at is None:
            self.first_token_at = now

    def piece(self, length: int, now: float) -> None:
        """A piece of text of so many characters came."""
        self.token_events += 1
        self.text_length += length
        self.last_token_at = now
        if self.first_token_at is None:
            self.first_token_at = now

    def told(self, usage: Told) -> None:
        """The engine told usage: all of it, or the half that was missing."""
        tokens = usage_of(usage if self._half is None else merged(self._half, usage))
        if tokens is not None:
            self.usage = tokens

    def told_first_half(self, usage: Told | None) -> None:
        """The engine told usage as far as it is known before there is text; None: it told none."""
        if usage is not None:
            self._half, self.begun = usage, usage_of(usage)


_STATUS = {"rate_limit_exceeded": 429, "invalid_prompt": 400}
"""Codes of the responses API, which have neither a number nor a type beside them."""


def engine_error(error: object) -> EngineError:
    """An ``error`` member of any shape seen in the wild: an object, or a sentence."""
    if not isinstance(error, dict):
        return EngineError(message=str(error))
    return EngineError(
        message=str(error.get("message") or ""),
        type=str(error.get("type") or ""),
        code=_status(error.get("code")),
    )


def _status(code: object) -> int:
    if isinstance(code, int) and not isinstance(code, bool):
        return code
    if isinstance(code, str) and code.isdecimal():
        return int(code[:6])
    return _STATUS.get(str(code), 500)
