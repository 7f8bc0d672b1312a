"""Answers on their way: what one token of the batch becomes on the wire, and the faults that happen after so many.

The batch's timer calls `Answer.token` for each sequence that took one; nothing here waits. A stream writes its own
chunked framing straight to the transport, one chunk for an event, because a coroutine per token and stream would cost
several times as much as the token.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from envoy_extproc.simulation.answers import DONE, Usage, error_event
from envoy_extproc.simulation.requests import Refusal
from envoy_extproc.simulation.service_time import Sequence

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp import web

    from envoy_extproc.simulation.answers import EventWriter, Words
    from envoy_extproc.simulation.faults import Faults

HIGH_WATER = 65_536  # bytes: asyncio's own; a reader this far behind takes part in no further steps
DRAIN_POLL_SECONDS = 0.005  # until a slow reader is looked at again: well under a step of a real engine
RESET_GRACE_SECONDS = 0.02  # a reset drops what is not yet sent, and the tokens before it shall arrive


@dataclass(slots=True, kw_only=True, eq=False)
class Choice(Sequence):
    """One choice of an answer, or one vector of an embeddings answer."""

    index: int
    answer: Answer
    words: Words | None = None


class Answer:
    """An answer that is sent when it is whole. `done` then tells why it failed, or None.

    Args:
        faults: what shall go wrong.
        transport: the client's connection; None when it has gone already.
        copies: choices for each prompt.
    """

    def __init__(self, faults: Faults, transport: asyncio.Transport | None, *, copies: int = 1) -> None:
        self._loop = asyncio.get_running_loop()
        self.choices: list[Choice] = []
        self.done: asyncio.Future[Refusal | None] = self._loop.create_future()
        self._faults = faults
        self._transport = transport
        self._copies = copies
        self._tokens = 0
        self._ended = (
            0  # choices whose last token was delivered; a step may have finished more of them already
        )
        self._broken = False

    def begin(self) -> None:
        """The request was taken in: the moment for faults after no token."""
        self._break_now()

    def token(self, choice: Choice) -> None:
        """`choice` has taken a token."""
        if self._broken:
            return
        self._tokens += 1
        self._ended += choice.finished
        self._deliver(choice)
        if not self._break_now() and self._ended == len(self.choices):
            self._close()

    def fail(self, refusal: Refusal) -> None:
        """Ends the answer with an error."""
        _settle(self.done, refusal)

    def usage(self) -> Usage:
        """Tokens so far; a prompt counts once, however many choices it has."""
        first = self.choices[:: self._copies]
        return Usage(
            sum(choice.prompt_tokens for choice in first),
            sum(choice.generated for choice in self.choices),
            sum(choice.cached_tokens for choice in first),
            sum(choice.created_tokens for choice in first),
        )

    def _deliver(self, choice: Choice) -> None:
        pass  # a whole answer has nothing to say yet

    def _close(self) -> None:
        _settle(self.done, None)

    def _break_now(self) -> bool:
        """Lets the fault of this count of tokens happen, and tells whether there was one."""
        faults = self._faults
        if self._tokens not in (faults.error_event, faults.reset, faults.hang):
            return False
        self._broken = True
        for choice in self.choices:
            choice.held = True
        if self._tokens == faults.error_event:
            self.fail(Refusal.of_status(500))
        elif self._tokens == faults.reset:
            self._loop.call_later(RESET_GRACE_SECONDS, _reset, self._transport)
        return True


class StreamAnswer(Answer):
    """An answer that is sent event by event.

    `begun` is done with the first event: only then, as from an engine, come status and headers. The handler that waits
    for it opens the stream; what is written until then is kept.

    Args:
        writer: makes the events.
        resume: to be called when a sequence is no longer held.
    """

    def __init__(
        self,
        faults: Faults,
        transport: asyncio.Transport | None,
        *,
        copies: int,
        writer: EventWriter,
        resume: Callable[[], None],
    ) -> None:
        super().__init__(faults, transport, copies=copies)
        self.begun: asyncio.Future[Refusal | None] = self._loop.create_future()
        self._writer = writer
        self._resume = resume
        self._kept: list[bytes] = []
        self._open = False
        self._compressor = zlib.compressobj(wbits=31) if faults.gzip else None
        self._edited = faults.crlf or faults.gzip

    async def open(self, response: web.StreamResponse) -> None:
        """Sends the kept events: the first through `response`, whose headers go before it; from now on, directly."""
        await response.write(self._kept.pop(0))
        self._open = True
        kept, self._kept = self._kept, []
        for event in kept:
            self._send(event)

    def fail(self, refusal: Refusal) -> None:
        """Ends the stream with an error event."""
        self._write([error_event(refusal.error), DONE], end=True)

    def _deliver(self, choice: Choice) -> None:
        assert choice.words is not None
        if self._tokens == 1 and self._writer.has_opening:
            openings = [self._writer.opening(each.index, each.prompt_tokens) for each in self.choices]
            self._write(openings)
        text = choice.words.member(choice.generated - 1)
        write = self._writer.last if choice.finished else self._writer.token
        event = write(choice.index, text, choice.prompt_tokens, choice.generated)
        closing = self._closing() if choice.finished else None
        if closing is None:
            self._write([event])
        else:
            self._write([event, *closing], end=True)

    def _closing(self) -> list[bytes] | None:
        """What follows the last token of all; None while there are more, or where a fault comes instead."""
        breaks = self._tokens in (self._faults.error_event, self._faults.reset, self._faults.hang)
        if breaks or self._ended < len(self.choices):
            return None
        usage = [self._writer.usage(self.usage())] if self._writer.reports else []
        return usage if self._faults.no_done else [*usage, DONE]

    def _write(self, events: list[bytes], *, end: bool = False) -> None:
        if end and self._faults.tail:
            events[-1] = events[-1].rstrip(b"\n")
        if self._edited:
            events = [self._edit(event, last=end and event is events[-1]) for event in events]
        if self._open:
            for event in events:
                self._send(event)
        else:
            self._kept += events
            _settle(self.begun, None)
        if end:
            _settle(self.done, None)

    def _edit(self, event: bytes, *, last: bool) -> bytes:
        if self._faults.crlf:
            event = event.replace(b"\n", b"\r\n")
        if self._compressor is None:
            return event
        flush = zlib.Z_FINISH if last else zlib.Z_SYNC_FLUSH
        return self._compressor.compress(event) + self._compressor.flush(flush)

    def _send(self, event: bytes) -> None:
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        transport.write(b"%x\r\n%b\r\n" % (len(event), event))
        if transport.get_write_buffer_size() > HIGH_WATER and not self.choices[0].held:
            self._hold(held=True)

    def _hold(self, *, held: bool) -> None:
        for choice in self.choices:
            choice.held = held
        if held:
            self._loop.call_later(DRAIN_POLL_SECONDS, self._look_again)

    def _look_again(self) -> None:
        if self._broken or self.done.done() or self._transport is None:
            return
        behind = self._transport.get_write_buffer_size() > HIGH_WATER
        self._hold(held=behind)
        if not behind:
            self._resume()


def _settle(future: asyncio.Future[Refusal | None], refusal: Refusal | None) -> None:
    """Sets a future's result, unless it has one or was cancelled with its handler."""
    if not future.done():
        future.set_result(refusal)


def _reset(transport: asyncio.Transport | None) -> None:
    """Drops the connection with an RST, as of a process that was killed."""
    if transport is None or transport.is_closing():
        return
    known = transport.get_extra_info("socket")
    # A second descriptor of the same socket, as uvloop's stand-in takes no options.
    with socket.socket(fileno=socket.dup(known.fileno())) as same:
        same.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()
