"""Which tokenizer counts for which model, and what is said of those prompts that none can count."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Literal, Protocol, Self

import msgspec

from envoy_extproc.scheduling.interfaces import SchedulingRequest

Reason = Literal[
    "busy",
    "failed",
    "no-encoding",
    "no-pod",
    "no-text",
    "resting",
    "status",
    "timeout",
    "too-long",
    "unreachable",
    "unreadable",
]
"""Why a prompt was not counted. busy: too much is being counted. failed: the tokenizer broke on it. no-encoding: there is none since the
start. no-pod: no ready pod that can count. no-text: nothing in it to count. resting: whoever could count failed lately, and is left
alone. status: HTTP status other than 200. timeout: it took too long. too-long: beyond `tokens.max_prompt_bytes`. unreachable: no
connection. unreadable: an answer without a count."""


class Uncounted(Exception):
    """A prompt was not counted.

    Attributes:
        reason: why.
    """

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason


class Tokenizer(Protocol):
    """Counts prompts.

    Attributes:
        name: for a metric's label.
    """

    name: str

    async def count(self, request: SchedulingRequest) -> int:
        """The tokens of the prompt of `request`, which has one.

        Raises:
            Uncounted: it could not, or not in time.
        """

    async def open(self) -> None:
        """Is called before the first count, where counts will run."""

    async def close(self) -> None:
        """Is called behind the last one."""


class Missing:
    """Stands for a tokenizer that there is not.

    Args:
        name: of that one.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    async def count(self, request: SchedulingRequest) -> int:
        """See `Tokenizer`."""
        raise Uncounted("no-encoding")

    async def open(self) -> None:
        """See `Tokenizer`."""

    async def close(self) -> None:
        """See `Tokenizer`."""


class Told(Protocol):
    """Hears of every prompt that was to be counted."""

    def __call__(self, tokenizer: str, seconds: float, reason: Reason | None, /) -> None:
        """It took so long; `reason` is None where it was counted."""


class PromptCounter:
    """Counts the prompts of all models that have a tokenizer; opened and closed as a context.

    Args:
        default: counts for models that are not in `by_model`; None where the estimate will do for them.
        by_model: likewise, for each.
        known: whether a model is served; for others nothing is counted, since their requests go nowhere.
        told: hears of each.
        clock: seconds.
    """

    def __init__(
        self,
        default: Tokenizer | None,
        by_model: Mapping[str, Tokenizer | None],
        *,
        known: Callable[[str], bool],
        told: Told,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._default = default
        self._by_model = by_model
        self._known = known
        self._told = told
        self._clock = clock

    async def __aenter__(self) -> Self:
        for each in self._all():
            await each.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each in self._all():
            await each.close()

    def counts(self, request: SchedulingRequest) -> bool:
        """Whether the prompt of `request` is to be counted."""
        return (
            request.prompt is not None
            and request.model is not None
            and self._of(request.model) is not None
            and self._known(request.model)
        )

    async def counted(self, request: SchedulingRequest) -> SchedulingRequest:
        """`request` with its prompt counted; as it is, estimated, where that cannot be."""
        tokenizer = self._of(request.model or "") if self.counts(request) else None
        if tokenizer is None:
            return request
        began = self._clock()
        try:
            tokens = await tokenizer.count(request)
        except Uncounted as error:
            self._told(tokenizer.name, self._clock() - began, error.reason)
            return request
        self._told(tokenizer.name, self._clock() - began, None)
        return msgspec.structs.replace(request, prompt_tokens=tokens, tokenizer=tokenizer.name)

    def _of(self, model: str) -> Tokenizer | None:
        return self._by_model.get(model, self._default)

    def _all(self) -> set[Tokenizer]:
        return {each for each in (self._default, *self._by_model.values()) if each is not None}
