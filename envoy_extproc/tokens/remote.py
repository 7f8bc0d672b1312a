"""Counting by somebody else: ``POST /tokenize`` at a tokenizer of its own, or at the model's own pods, each in its turn.

A prompt is asked about once: whoever fails is left alone for a second, then two, up to half a minute, and one request in that time finds out
whether it is back. Nothing a client sends has a say in who is asked.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import aiohttp
import msgspec

from envoy_extproc.endpoints import Endpoint
from envoy_extproc.openai import texts, tokenize
from envoy_extproc.openai.prompt import TOKEN_BYTES
from envoy_extproc.scheduling.interfaces import SchedulingRequest
from envoy_extproc.tokens.counting import Uncounted

_FIRST_REST_SECONDS = 1.0
_LONGEST_REST_SECONDS = 30.0
_MOST_RESTING = 4096  # of whom many are gone; the oldest are forgotten

_NOBODYS_FAULT = frozenset({400, 413, 422})
"""Status of an answer that blames the request: its engine will refuse it as well."""

_TEMPLATE_TOKENS = 65_536
"""More than a template writes around a conversation, its own system prompt and words on tools among it."""

_LONG_BYTES = 65_536
"""A question so long may well take longer than it has: no sign of a failure. 16,000 tokens take an engine some 20 ms."""

_ANSWER_BYTES_A_BYTE = 8
"""Of the question, if each of its bytes is a token: an id of seven digits and a comma. Beside that there are:"""
_ANSWER_BYTES = 65_536


class RemoteRules(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of counting elsewhere.

    Attributes:
        timeout: seconds a decision waits.
        max_prompt_bytes: of a prompt that is counted.
        max_requests: under way at once.
        bearer_token: sent along; None for none.
    """

    timeout: float = 0.1
    max_prompt_bytes: int = 524_288
    max_requests: int = 64
    bearer_token: str | None = None


class Target(msgspec.Struct, frozen=True):
    """Somebody who can be asked, and in which form."""

    url: str
    form: tokenize.Form


class Targets(Protocol):
    """Who can be asked about prompts of a model."""

    def __call__(self, model: str, resting: Callable[[str], bool], /) -> Target:
        """One of them, another one each time.

        Raises:
            Uncounted: there is none, or none that is not `resting`, which is asked with a URL.
        """


class _Rest(msgspec.Struct):
    until: float
    seconds: float
    probed: bool = False


class Rests:
    """Who failed lately, and until when each is left alone.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._rests: dict[str, _Rest] = {}

    def resting(self, url: str) -> bool:
        """Whether it is to be left alone now."""
        rest = self._rests.get(url)
        return rest is not None and self._clock() < rest.until

    def asked(self, url: str) -> None:
        """It is asked. If it failed before, nobody else asks until it has answered, or as long again."""
        rest = self._rests.get(url)
        if rest is not None:
            rest.until, rest.probed = self._clock() + rest.seconds, True

    def failed(self, url: str) -> None:
        """It failed. Of many requests that it fails at a time, the first one counts."""
        rest = self._rests.pop(url, None) or _Rest(0.0, 0.0)
        if rest.probed or not self._clock() < rest.until:
            seconds = min(max(_FIRST_REST_SECONDS, 2 * rest.seconds), _LONGEST_REST_SECONDS)
            rest = _Rest(self._clock() + seconds, seconds)
        self._rests[url] = rest
        if len(self._rests) > _MOST_RESTING:
            del self._rests[next(iter(self._rests))]

    def answered(self, url: str) -> None:
        """It answered."""
        self._rests.pop(url, None)


class RemoteTokenizer:
    """Counts by asking.

    Args:
        rules: bounds.
        targets: who can be asked.
        clock: monotonic seconds.
    """

    name = "remote"

    def __init__(
        self, rules: RemoteRules, targets: Targets, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rules = rules
        self._targets = targets
        self._rests = Rests(clock)
        self._under_way = 0
        self._session: aiohttp.ClientSession | None = None

    @property
    def under_way(self) -> int:
        """Requests that have not been answered."""
        return self._under_way

    async def open(self) -> None:
        """See `Tokenizer`."""
        headers = {"accept-encoding": "identity", "content-type": "application/json"}
        if self._rules.bearer_token is not None:
            headers["authorization"] = f"Bearer {self._rules.bearer_token}"
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),  # bounded here: those beyond are not to wait
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=None),
        )

    async def close(self) -> None:
        """See `Tokenizer`."""
        if self._session is not None:
            await self._session.close()

    async def count(self, request: SchedulingRequest) -> int:
        """See `Tokenizer`."""
        prompt, most = request.prompt, self._rules.max_prompt_bytes
        assert prompt is not None
        model = request.model or ""
        if request.prompt_tokens * TOKEN_BYTES > most:  # as JSON: what is sent, but for images
            raise Uncounted("too-long")
        if self._under_way >= self._rules.max_requests:
            raise Uncounted("busy")
        target = self._targets(model, self._rests.resting)
        found = texts.read(prompt, most)
        if found is None:
            raise Uncounted("too-long")
        asked = tokenize.question(target.form, model, prompt, found)
        if asked is None:
            return _known(found)
        answer = await self._ask(target, asked.body)
        return asked.known + self._read(target, answer, len(asked.body) + _TEMPLATE_TOKENS)

    def _read(self, target: Target, answer: bytes, most: int) -> int:
        try:
            tokens = tokenize.count(target.form, answer, most)
        except tokenize.Unusable:
            self._rests.failed(target.url)
            raise Uncounted("unreadable") from None
        self._rests.answered(target.url)
        return tokens

    async def _ask(self, target: Target, body: bytes) -> bytes:
        self._rests.asked(target.url)
        self._under_way += 1
        try:
            async with asyncio.timeout(self._rules.timeout):
                return await self._post(target, body)
        except TimeoutError:
            if len(body) < _LONG_BYTES:
                self._rests.failed(target.url)
            raise Uncounted("timeout") from None
        except (aiohttp.ClientError, OSError, ValueError):
            self._rests.failed(target.url)
            raise Uncounted("unreachable") from None
        finally:
            self._under_way -= 1

    async def _post(self, target: Target, body: bytes) -> bytes:
        assert self._session is not None
        most = _ANSWER_BYTES + _ANSWER_BYTES_A_BYTE * len(body)
        async with self._session.post(target.url, data=body, allow_redirects=False) as answer:
            if answer.status != 200:
                if answer.status not in _NOBODYS_FAULT:
                    self._rests.failed(target.url)
                raise Uncounted("status")
            read = bytearray()
            async for part in answer.content.iter_any():
                read += part
                if len(read) > most:
                    self._rests.failed(target.url)
                    raise Uncounted("unreadable")
            return bytes(read)


def _known(found: texts.Texts) -> int:
    """What a prompt without text comes to."""
    if not found.known:
        raise Uncounted("no-text")
    return found.known


class PodTargets:
    """The pods of each model, in turn.

    Args:
        endpoints: of a model.
        form: the form of an endpoint's engine; None where it cannot count.
        ready: whether it can be asked now.
    """

    def __init__(
        self,
        endpoints: Callable[[str], Sequence[Endpoint]],
        *,
        form: Callable[[Endpoint], tokenize.Form | None],
        ready: Callable[[Endpoint], bool],
    ) -> None:
        self._endpoints = endpoints
        self._form = form
        self._ready = ready
        self._turn = 0

    def __call__(self, model: str, resting: Callable[[str], bool]) -> Target:
        """See `Targets`."""
        endpoints = self._endpoints(model)
        able = False
        for step in range(len(endpoints)):
            endpoint = endpoints[(self._turn + step) % len(endpoints)]
            form = self._form(endpoint)
            if form is None or not self._ready(endpoint):
                continue
            able = True
            url = f"http://{endpoint.address}{tokenize.PATH}"
            if not resting(url):
                self._turn = (self._turn + step + 1) % len(endpoints)
                return Target(url, form)
        raise Uncounted("resting" if able else "no-pod")


class OneTarget:
    """A tokenizer of its own, for all models, in vLLM's form.

    Args:
        url: where it is asked.
    """

    def __init__(self, url: str) -> None:
        self._target = Target(url, tokenize.Form.MESSAGES)

    def __call__(self, model: str, resting: Callable[[str], bool]) -> Target:
        """See `Targets`."""
        if resting(self._target.url):
            raise Uncounted("resting")
        return self._target
