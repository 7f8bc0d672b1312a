"""What choosing works on and returns, and what a filter, a scorer and a picker are (names of the endpoint picker)."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from typing import Protocol, runtime_checkable

import msgspec

from envoy_extproc.endpoints import Endpoint, EngineStats
from envoy_extproc.openai.prompt import Prompt


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """What a user has been served lately, in weighted tokens, and what others have who have requests under way.

    Attributes:
        own: the user's.
        least: of them all, the user included.
        most: likewise.
        below: share of the others who have been served less, 0 to 1; who is alike counts half, and 0 where there is nobody.
    """

    own: float
    least: float
    most: float
    below: float


class SchedulingRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a request lets choosing know.

    Attributes:
        model: the model's name; None where the request tells none.
        policy: the policy the client asks for by `routing-strategy`; None where it leaves that to us.
        profile: the profile of the model's configuration it asks for by `config-profile`; likewise.
        pin: address from `target-pod-ip`; None where the client does not ask for one.
        subset: the addresses the picker protocol allows; None where it allows all, empty where it allows none.
        selector: the label selector of `external-filter`; None where the client sends none.
        prompt_tokens: how long its prompt is; 0 where it has none that can be read.
        tokenizer: who counted them; None where they are estimated.
        prompt: the prompt itself, read only by who asks for it; None where it has none that can be read.
        max_output_tokens: how long its answer may become; None where it does not say.
        adapter: whether `model` is a LoRA adapter; who chooses finds that out.
        user: who sends it, by the header `user`; None where that is not told.
        session: the address its session is at, by `x-session-id`; None where it tells none. Anything may stand there.
        session_key: the key of its session, by `x-aibrix-session-key`; None where it has none.
        standing: what its user has been served; None where that is not told. Who chooses finds that out.
    """

    model: str | None = None
    policy: str | None = None
    profile: str | None = None
    pin: str | None = None
    subset: tuple[str, ...] | None = None
    selector: str | None = None
    prompt_tokens: int = 0
    tokenizer: str | None = None
    prompt: Prompt | None = None
    max_output_tokens: int | None = None
    adapter: bool = False
    user: str | None = None
    session: str | None = None
    session_key: bytes | None = None
    standing: Standing | None = None


MOST_TRIES = 10
"""Endpoints that one request names to Envoy, at most; who comes after them in an order is never looked at."""


class Candidate(msgspec.Struct, frozen=True, gc=False):
    """An endpoint at the moment of decision.

    There is one for each endpoint and request, so the garbage collector is spared them: nothing in them refers back.

    Attributes:
        endpoint: who it is.
        in_flight: exchanges this server has on it now.
        stats: what its engine said last; None where that is missing or too old to believe.
        reachable: False while its metrics port refuses connections, or requests to it failed lately.
        prefix_match: share of the prompt whose KV cache it was thought to hold, 0 to 1, told of the chosen one; None where
            no policy asked.
    """

    endpoint: Endpoint
    in_flight: int = 0
    stats: EngineStats | None = None
    reachable: bool = True
    prefix_match: float | None = None


class Scores(msgspec.Struct, frozen=True):
    """One scorer's word: a number for each candidate that was left, in their order; higher is better, 0 to 1."""

    scorer: str
    weight: float
    values: tuple[float, ...]


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """Where a request goes, and why.

    Attributes:
        policy: the policy that was to decide.
        decided_by: the policy that did: another one where data was missing.
        fallback_reason: why it was another one; None where it was not.
        chosen: the candidate picked, as it was then.
        order: the endpoints to try, the chosen one first; one comes again where there are fewer than tries.
        candidates: who was left after filtering.
        filtered: names of endpoints taken out, by filter.
        scores: every scorer's word on the candidates.
        missing: the scorers that had no data: some of a mixture, or all where another policy decided.
        improvised: whether `policy` is a mixture that only this request's client wrote.
        prefill: who computes the prompt's KV cache for the chosen one, as it was then; None where that one does it itself.
        profile: the profile that `config-profile: auto` found; None where nobody asked so.
        ticket: by which its report is known here: it finds its user's account and its prompt. None where nobody waits for it.
    """

    policy: str
    decided_by: str
    chosen: Candidate
    order: tuple[Endpoint, ...]
    fallback_reason: str | None = None
    candidates: tuple[Candidate, ...] = ()
    filtered: tuple[tuple[str, tuple[str, ...]], ...] = ()
    scores: tuple[Scores, ...] = ()
    missing: tuple[str, ...] = ()
    improvised: bool = False
    prefill: Candidate | None = None
    profile: str | None = None
    ticket: str | None = None

    @property
    def label(self) -> str:
        """`policy` as a metric may show it: clients write any number of mixtures, so theirs are all `mix`."""
        return "mix" if self.improvised else self.policy

    def weighs(self, scorer: str) -> bool:
        """Whether a scorer of that name belongs to `policy`, whatever it had to say."""
        return scorer in self.missing or any(each.scorer == scorer for each in self.scores)


class MissingDataError(Exception):
    """A scorer lacks what it scores by.

    Attributes:
        reason: a word or two for a metric's label: `no-stats`, `no-prompt`, `no-session`, `session-gone`, `no-key`,
            `no-user`.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Filter(Protocol):
    """Takes candidates out."""

    name: str

    def filter(self, request: SchedulingRequest, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        """Those that stay, in their order. Never empty if `candidates` is not."""


class Scorer(Protocol):
    """Says how good each candidate is."""

    name: str

    def score(self, request: SchedulingRequest, candidates: Sequence[Candidate]) -> Sequence[float]:
        """A finite number from 0 to 1 for each candidate, higher is better.

        Raises:
            MissingDataError: what it scores by is not known of any candidate.
        """


class Picker(Protocol):
    """Puts scored candidates in the order in which they are to be tried."""

    name: str

    def pick(
        self,
        request: SchedulingRequest,
        candidates: Sequence[Candidate],
        scores: Sequence[float],
        rng: random.Random,
    ) -> list[Candidate]:
        """The `candidates`, the chosen one first: all, or as many as are ever tried."""


@runtime_checkable
class Remembering(Protocol):
    """A filter, scorer or picker that remembers something by model, which must not outlive the model.

    It learns from `remember` alone, so that a decision which is only explained leaves no trace.
    """

    def remember(self, request: SchedulingRequest, chosen: Candidate) -> None:
        """Learns that `request` goes to `chosen`."""

    def keep_models(self, models: Collection[str]) -> None:
        """Forgets what it remembers of models other than these."""
