"""Follows one kind of Kubernetes object: a complete list, then its changes, for ever.

Theory of operation, after "Efficient detection of changes" in Kubernetes' API concepts:

1. LIST, in pages, gives every object and a resourceVersion; WATCH from that version gives what changed since. Each event,
   and each bookmark, brings the version to go on from.
2. A watch ends: the API ends it after `timeoutSeconds`, a balancer cuts it, an API server restarts. The next one goes on
   from the last version, so nothing is missed. A line that was cut is thrown away: the next watch brings it whole.
3. 410, as a status or as an event, means that the version is forgotten: list again. What the list no longer has is gone.
4. A version can also be of another time: after a restore the API may refuse it, or worse, take it. So a few failures in a
   row end in a list, too.
5. A connection that died without a word is noticed by its silence, since bookmarks come about once a minute.
6. Every attempt waits its turn, jittered, so that servers do not come back all at once. The wait doubles until a watch
   has brought something, or has lasted.

While all that fails the receiver keeps what it has: it is told of complete lists and of changes, never of failures.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Generic, NoReturn, Protocol, TypeVar

import msgspec
import structlog

log = structlog.get_logger()

UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError)
"""What `msgspec` raises of text that is no JSON, or not what it should be."""

_FAILURES_BEFORE_LIST = 3
_LONGEST_LINE = 16 * 1024 * 1024
"""Bytes of an event. An object is 1.5 MiB at most (etcd's limit); the rest is room for how JSON writes it."""


class ApiError(Exception):
    """The API did not do what was asked.

    Attributes:
        kind: one of few words, a metric's label: ``unreachable``, ``timeout``, ``cut``, ``gone``, ``unreadable``,
            ``config``, or the HTTP status.
        retry_after: seconds the API asks to wait.
    """

    def __init__(self, kind: str, text: str, *, retry_after: float = 0.0) -> None:
        super().__init__(text)
        self.kind = kind
        self.retry_after = retry_after


class Gone(ApiError):
    """The version that was asked for is forgotten."""

    def __init__(self, text: str) -> None:
        super().__init__("gone", text)


class Api(Protocol):
    """What is needed of the API."""

    def get(
        self, path: str, query: Mapping[str, str], *, silence: float
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """The pieces of an answer as they come; ApiError, also while they do, if there is none or it is no good.

        Args:
            path: of the URL.
            query: its parameters.
            silence: seconds without a byte after which the answer counts as lost.
        """
        ...


class Version(Protocol):
    """What is read of an object's metadata."""

    resource_version: str


class Versioned(Protocol):
    """An object of the API."""

    @property
    def metadata(self) -> Version:
        """Its metadata."""
        ...


T = TypeVar("T", bound=Versioned)
T_contra = TypeVar("T_contra", contravariant=True)


class Receiver(Protocol[T_contra]):
    """Whoever wants to know."""

    def listed(self, objects: Iterable[T_contra]) -> None:
        """These are all there are."""

    def changed(self, each: T_contra) -> None:
        """This one is new or different."""

    def deleted(self, each: T_contra) -> None:
        """This one is no more."""


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """How long things take; seconds, each with its reason."""

    first: float = 0.1
    """An API server that restarts behind a balancer is back at once."""
    longest: float = 30.0
    """What is down for long is asked twice a minute, and noticed soon enough when it is back."""
    lasted: float = 5.0
    """A watch that lived so long was a good one: the next wait is the first again."""
    watch: float = 300.0
    """A watch is ended by the API after four fifths of this to all of it, so that no server keeps one connection for ever."""
    silence: float = 90.0
    """Bookmarks come about once a minute: one may be late."""
    answer: float = 30.0
    """Silence in a list; etcd under pressure can take seconds for a page."""
    page: int = 500
    """Objects; kubectl's own. 5 MB of pods, which take 20 ms to read."""


class Backoff:
    """How long to wait: doubled each time, half of it by chance."""

    def __init__(self, pace: Pace, rng: random.Random) -> None:
        self._pace = pace
        self._rng = rng
        self._next = pace.first

    def next(self) -> float:
        """Seconds to wait now."""
        wait, self._next = self._next, min(2 * self._next, self._pace.longest)
        return wait * self._rng.uniform(0.5, 1.0)

    def reset(self) -> None:
        """All is well: the next wait is the first."""
        self._next = self._pace.first


class Health:
    """How a watch does.

    Attributes:
        what: that is watched, such as ``pods`` or ``pods of default``.
        listed: whether a complete list has come.
        heard: monotonic seconds at which the API last said anything; before the first time, when watching began.
        failures: attempts that failed, by `ApiError.kind`.
        trouble: why the last attempt failed; None while all is well.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.listed = False
        self.heard = time.monotonic()
        self.failures: Counter[str] = Counter()
        self.trouble: str | None = None

    @property
    def silent(self) -> float:
        """Seconds since `heard`."""
        return time.monotonic() - self.heard

    def well(self) -> None:
        """The API has answered, or said something."""
        self.heard = time.monotonic()
        if self.trouble is not None:
            self.trouble = None
            log.info("kubernetes_answers_again", watched=self.what)

    def failed(self, error: ApiError) -> None:
        """An attempt failed. The log is told when the reason is another one than before."""
        self.failures[error.kind] += 1
        if isinstance(error, Gone):
            log.info("kubernetes_list_again", watched=self.what, reason=str(error))
        elif self.trouble != error.kind:
            self.trouble = error.kind
            kept = "the last list" if self.listed else "nothing, and not ready: waiting for the first list"
            log.warning("kubernetes_failed", watched=self.what, kind=error.kind, reason=str(error), kept=kept)


class _Page(msgspec.Struct):
    class Meta(msgspec.Struct, rename={"version": "resourceVersion", "more": "continue"}):
        version: str = ""
        more: str = ""

    metadata: Meta
    items: list[msgspec.Raw] | None = None


class _Event(msgspec.Struct):
    type: str
    object: msgspec.Raw


class _Bookmark(msgspec.Struct):
    class Meta(msgspec.Struct, rename="camel"):
        resource_version: str

    metadata: Meta


class _Status(msgspec.Struct):
    code: int = 0
    reason: str = ""
    message: str = ""


_pages = msgspec.json.Decoder(_Page)
_events = msgspec.json.Decoder(_Event)
_bookmarks = msgspec.json.Decoder(_Bookmark)
_statuses = msgspec.json.Decoder(_Status)


class Lines:
    """Cuts a stream into lines; what has no end yet waits for the rest.

    Args:
        longest: bytes a line may have.
    """

    def __init__(self, longest: int = _LONGEST_LINE) -> None:
        self._longest = longest
        self._rest: list[bytes] = []
        self._size = 0

    def feed(self, piece: bytes) -> list[bytes]:
        """The lines that are complete now, without those that are empty.

        Raises:
            ApiError: a line is too long.
        """
        *complete, rest = piece.split(b"\n")
        if complete:
            complete[0] = b"".join((*self._rest, complete[0]))
            self._rest, self._size = [], 0
        self._rest.append(rest)
        self._size += len(rest)
        if self._size > self._longest:
            raise ApiError("unreadable", f"an event of more than {self._longest} bytes")
        return [line for line in complete if line.strip()]

    def end(self) -> None:
        """The stream is over.

        Raises:
            ApiError: in the middle of a line.
        """
        if self._size:
            raise ApiError("cut", "the answer ended in the middle of an event")


class Watch(Generic[T]):
    """One list and its changes.

    Args:
        api: answers.
        path: of the list.
        decode: reads an object; may raise `UNREADABLE`.
        receiver: is told.
        health: is kept.
        selector: which labels the objects must have; empty for any.
        pace: how long things take.
        rng: jitters.
    """

    def __init__(
        self,
        api: Api,
        path: str,
        *,
        decode: Callable[[msgspec.Raw], T],
        receiver: Receiver[T],
        health: Health,
        selector: str = "",
        pace: Pace,
        rng: random.Random,
    ) -> None:
        self._api = api
        self._path = path
        self._decode = decode
        self._receiver = receiver
        self._health = health
        self._selector = {"labelSelector": selector} if selector else {}
        self._pace = pace
        self._rng = rng
        self._version: str | None = None
        self._in_row = 0  # failures
        self._paged = True
        self._progress = False
        self._since = math.inf  # when the API took up the watch

    async def run(self) -> NoReturn:
        """Follows until it is cancelled; a failure is a state, never an exception."""
        backoff = Backoff(self._pace, self._rng)
        while True:
            error = await self._round()
            if self._progress or time.monotonic() - self._since > self._pace.lasted:
                backoff.reset()
                self._in_row = 0
            if error is not None:
                self._failed(error)
            asked_to_wait = 0.0 if error is None else min(error.retry_after, self._pace.longest)
            await asyncio.sleep(max(asked_to_wait, backoff.next()))

    async def _round(self) -> ApiError | None:
        self._progress, self._since = False, math.inf
        try:
            if self._version is None:
                await self._list()
            await self._watch()
        except ApiError as error:
            return error
        return None

    def _failed(self, error: ApiError) -> None:
        self._health.failed(error)
        self._in_row += 1
        if isinstance(error, Gone) or self._in_row >= _FAILURES_BEFORE_LIST:
            self._version = None

    async def _list(self) -> None:
        """A complete list, or none: objects are told when the last page is there."""
        objects: list[T] = []
        query = dict(self._selector)
        if self._paged:
            query["limit"] = str(self._pace.page)
        while True:
            page = await self._page(query)
            objects += [self._read(item) for item in page.items or ()]
            if not page.metadata.more:
                break
            query["continue"] = page.metadata.more
        self._paged = True
        self._health.listed = True
        log.info("kubernetes_listed", watched=self._health.what, objects=len(objects))
        self._version = page.metadata.version
        self._receiver.listed(objects)

    async def _page(self, query: Mapping[str, str]) -> _Page:
        try:
            async with self._api.get(self._path, query, silence=self._pace.answer) as pieces:
                text = b"".join([piece async for piece in pieces])
        except Gone:
            # The list is older than what the API remembers: so many pages take too long. All at once, then.
            self._paged = False
            raise
        self._health.well()
        try:
            return _pages.decode(text)
        except UNREADABLE as error:
            raise ApiError("unreadable", f"a list that cannot be read: {error}") from None

    async def _watch(self) -> None:
        seconds = self._pace.watch * self._rng.uniform(0.8, 1.0)
        query = self._selector | {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": self._version or "",
            "timeoutSeconds": str(max(1, round(seconds))),
        }
        lines = Lines()
        async with self._api.get(self._path, query, silence=self._pace.silence) as pieces:
            self._health.well()
            self._since = time.monotonic()
            async for piece in pieces:
                for line in lines.feed(piece):
                    self._take(line)
        lines.end()

    def _take(self, line: bytes) -> None:
        try:
            event = _events.decode(line)
            match event.type:
                case "ADDED" | "MODIFIED" | "DELETED":
                    self._tell(event.type, self._decode(event.object))
                case "BOOKMARK":
                    self._version = _bookmarks.decode(event.object).metadata.resource_version or self._version
                case "ERROR":
                    raise _error(_statuses.decode(event.object))
        except UNREADABLE as error:
            raise ApiError("unreadable", f"an event that cannot be read: {error}") from None
        self._progress = True
        self._health.well()

    def _tell(self, kind: str, each: T) -> None:
        if kind == "DELETED":
            self._receiver.deleted(each)
        else:
            self._receiver.changed(each)
        self._version = each.metadata.resource_version or self._version

    def _read(self, item: msgspec.Raw) -> T:
        try:
            return self._decode(item)
        except UNREADABLE as error:
            raise ApiError("unreadable", f"a list that cannot be read: {error}") from None


def _error(status: _Status) -> ApiError:
    text = status.message or status.reason
    if status.code == 410 or status.reason in ("Expired", "Gone"):
        return Gone(text)
    return ApiError(str(status.code or "unreadable"), text)


def refusal(code: int, body: bytes, *, retry_after: float = 0.0) -> ApiError:
    """What an HTTP status other than 200 means; `body` is the API's Status, or whatever a proxy wrote."""
    try:
        text = _statuses.decode(body).message
    except UNREADABLE:
        text = ""
    text = f"status {code}: {text or body[:200].decode('utf-8', 'replace').strip() or 'no reason given'}"
    return Gone(text) if code == 410 else ApiError(str(code), text, retry_after=retry_after)
