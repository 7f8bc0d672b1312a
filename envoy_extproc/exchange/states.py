"""What an exchange can wait for, and what is the same for every one."""

from __future__ import annotations

from enum import Enum, auto

import msgspec


class State(Enum):
    """What the exchange waits for."""

    AWAIT_REQUEST_HEADERS = auto()
    AWAIT_REQUEST_BODY = auto()
    AWAIT_DECISION = auto()
    AWAIT_RESPONSE_HEADERS = auto()
    AWAIT_RESPONSE_BODY = auto()
    HELD = auto()
    HANDED_OVER = auto()
    ANSWERED = auto()
    CLOSED = auto()


class ExchangeSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What is the same for every exchange.

    Attributes:
        max_body_bytes: a request body beyond this is refused with 413.
        accounting: whether answers are read for their usage.
        max_event_bytes: an event of a stream beyond this passes unparsed.
        max_json_bytes: a JSON answer beyond this passes unparsed.
        clear_route_cache: whether Envoy chooses its route again once the model is known.
        trust_user: whether the header `user` says who a client is.
        load_report: form of the ORCA report on an answer whose client asks for none; None for no report then.
    """

    max_body_bytes: int = 33_554_432
    accounting: bool = True
    max_event_bytes: int = 1_048_576
    max_json_bytes: int = 16_777_216
    clear_route_cache: bool = False
    trust_user: bool = False
    load_report: str | None = None
