"""Why a request goes, or would go, where it does: a decision told for people, as plain values that make JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Literal

import msgspec

from envoy_extproc.endpoints import EngineStats
from envoy_extproc.scheduling.interfaces import Candidate, Decision
from envoy_extproc.scheduling.pickers import WeightedRandomPicker
from envoy_extproc.scheduling.profile import totals

Source = Literal["locked", "header", "profile", "model", "routing"]
"""Where the policy was written: a model's that is locked, the header `routing-strategy`, a profile of the model's, a model's,
`routing.policy`."""

_NONE: Mapping[str, str] = MappingProxyType({})
_SOURCES: Mapping[Source, str] = {
    "locked": "the model's own policy in the configuration, which is locked",
    "header": "the header routing-strategy",
    "profile": "the profile of the model's configuration that counts for the request",
    "model": "the model's own policy in the configuration",
    "routing": "routing.policy in the configuration",
}
_REASONS: Mapping[str, str] = {
    "no-stats": "no engine tells what it decides by, or what they told is too old",
    "no-key": "the request has no session key, no user and no prompt to go by",
    "no-prompt": "the request has no prompt that can be read, or one shorter than a block",
    "no-user": "the request does not say whose it is",
    "no-session": "the request belongs to no session",
    "scorer-failed": "a scorer of another package failed, as the log tells",
    "session-gone": "the endpoint of the request's session is not among those it may go to",
}


class Asked(msgspec.Struct, frozen=True):
    """Whose word on the policy counts.

    Attributes:
        policy: a name or a mixture, as it was written.
        source: where.
        overruled: what the client asked for in vain; None where it did not.
        profile: the profile that `config-profile: auto` found; None where nobody asked so.
    """

    policy: str
    source: Source
    overruled: str | None = None
    profile: str | None = None


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One endpoint of the model.

    Attributes:
        name: the endpoint's.
        address: likewise.
        place: 1 for the chosen one, then the order in which the others are tried; None for one that is not tried.
        left_out: why it could not be chosen: a filter's name, `subset`, `external-filter` or `pin`; None where it could.
        scores: every scorer's word on it, by scorer; empty for one left out.
        total: their weighted mean; None where nothing was scored.
        in_flight: exchanges this server has on it.
        reachable: False while it refuses connections, or requests to it failed lately.
        stats: what its engine said last; None where that is missing or too old.
    """

    name: str
    address: str
    in_flight: int
    reachable: bool
    place: int | None = None
    left_out: str | None = None
    scores: Mapping[str, float] = msgspec.field(default_factory=dict)
    total: float | None = None
    stats: EngineStats | None = None


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """A decision and its reasons.

    Attributes:
        model: the model's name; None where the request tells none.
        policy: the policy that was to decide.
        source: where it was written.
        decided_by: the policy that did.
        fallback_reason: why it was another one; None where it was not.
        missing: the scorers that had no data.
        weights: how much each scorer counts.
        chosen: name of the endpoint.
        order: names of the endpoints to try, one a try.
        endpoints: everyone who serves the model: in the order of the tries, then who is not tried, then who is left out.
        because: sentences that tell the same.
        prompt_tokens: how long the prompt is; 0 where there is none that can be read.
        tokenizer: who counted them; None where they are estimated.
    """

    model: str | None
    policy: str
    source: Source
    decided_by: str
    fallback_reason: str | None
    missing: tuple[str, ...]
    weights: Mapping[str, float]
    chosen: str
    order: tuple[str, ...]
    endpoints: tuple[Row, ...]
    because: tuple[str, ...]
    prompt_tokens: int = 0
    tokenizer: str | None = None


def explain(
    decision: Decision,
    asked: Asked,
    candidates: Sequence[Candidate],
    *,
    model: str | None = None,
    prompt_tokens: int = 0,
    tokenizer: str | None = None,
    left_out: Mapping[str, str] = _NONE,
) -> Explanation:
    """The reasons of `decision`.

    Args:
        decision: what was decided.
        asked: whose policy counted.
        candidates: everyone to tell of, those left out included.
        model: the request's.
        prompt_tokens: likewise.
        tokenizer: likewise.
        left_out: why some were no candidates at all, by address.
    """
    rows = sorted(_rows(decision, candidates, left_out), key=_rank)
    return Explanation(
        model=model,
        policy=decision.policy,
        source=asked.source,
        decided_by=decision.decided_by,
        fallback_reason=decision.fallback_reason,
        missing=decision.missing,
        weights=_weights(decision),
        chosen=decision.chosen.endpoint.name,
        order=tuple([endpoint.name for endpoint in decision.order]),
        endpoints=tuple(rows),
        because=(*_sentences(decision, asked, rows), *_length(prompt_tokens, tokenizer)),
        prompt_tokens=prompt_tokens,
        tokenizer=tokenizer,
    )


def _weights(decision: Decision) -> Mapping[str, float]:
    """By scorer; one that a mixture names twice, under an old name and a new one, has the sum."""
    weights: dict[str, float] = {}
    for each in decision.scores:
        weights[each.scorer] = weights.get(each.scorer, 0.0) + each.weight
    return weights


def _rows(decision: Decision, candidates: Sequence[Candidate], left_out: Mapping[str, str]) -> Sequence[Row]:
    scored = [each.endpoint.address for each in decision.candidates]
    weighted = totals(decision.scores, len(scored)) if decision.scores else ()
    total = dict(zip(scored, weighted, strict=False))
    word = {
        address: {each.scorer: each.values[place] for each in decision.scores}
        for place, address in enumerate(scored)
    }
    places: dict[str, int] = {}
    for endpoint in decision.order:
        places.setdefault(endpoint.address, len(places) + 1)
    filtered = {name: step for step, names in decision.filtered for name in names}
    return [
        Row(
            name=each.endpoint.name,
            address=each.endpoint.address,
            in_flight=each.in_flight,
            reachable=each.reachable,
            place=places.get(each.endpoint.address),
            left_out=left_out.get(each.endpoint.address) or filtered.get(each.endpoint.name),
            scores=word.get(each.endpoint.address, {}),
            total=total.get(each.endpoint.address),
            stats=each.stats,
        )
        for each in candidates
    ]


def _rank(row: Row) -> tuple[bool, float, float, str]:
    """Left out last; else by place, then by total."""
    place = float("inf") if row.place is None else float(row.place)
    return row.left_out is not None, place, -(row.total or 0.0), row.address


def _sentences(decision: Decision, asked: Asked, rows: Sequence[Row]) -> tuple[str, ...]:
    said = [f"The policy is {decision.policy}, from {_SOURCES[asked.source]}."]
    if asked.overruled is not None:
        said.append(
            f"The client asked for {asked.overruled[:64]!r} by routing-strategy, which does not count here."
        )
    if decision.fallback_reason is not None:
        reason = _REASONS.get(decision.fallback_reason, decision.fallback_reason)
        said.append(f"It was {decision.decided_by} that decided: {reason}.")
    elif decision.missing:
        said.append(f"Left out of the mixture, for want of data: {', '.join(decision.missing)}.")
    said += [f"Left out by {step}: {', '.join(names)}." for step, names in _left_out(decision, rows)]
    said.append(_choice(decision, rows))
    if decision.prefill is not None:
        said.append(f"{decision.prefill.endpoint.name} prefills its prompt.")
    return tuple(said)


def _length(prompt_tokens: int, tokenizer: str | None) -> tuple[str, ...]:
    """Said of a prompt that was counted; estimates are as good as the rule that makes them."""
    return () if tokenizer is None else (f"The prompt has {prompt_tokens} tokens, counted by {tokenizer}.",)


def _left_out(decision: Decision, rows: Sequence[Row]) -> Sequence[tuple[str, Sequence[str]]]:
    """By whom, and who: first those that were no candidates at all."""
    filters = {step for step, _ in decision.filtered}
    steps = dict.fromkeys(row.left_out for row in rows if row.left_out is not None)
    early = [
        (step, [row.name for row in rows if row.left_out == step]) for step in steps if step not in filters
    ]
    return [*early, *decision.filtered]


def _choice(decision: Decision, rows: Sequence[Row]) -> str:
    name = decision.chosen.endpoint.name
    if len(decision.candidates) == 1:
        return f"{name} is the only one left."
    if not decision.scores:
        return f"{decision.decided_by} picks {name}; it does not score."
    whole = sum(row.total or 0.0 for row in rows)
    if whole and WeightedRandomPicker.name in decision.decided_by:
        return f"{name} is drawn by its total, {_number(rows[0].total)} of {_number(whole)} that all have."
    equals = [row for row in rows if row.total is not None and row.total == rows[0].total]
    if len(equals) == 1:
        return f"{name} has the best total, {_number(rows[0].total)}."
    least = min(row.in_flight for row in equals)
    how = (
        "for having the fewest exchanges"
        if sum(row.in_flight == least for row in equals) == 1
        else "by chance"
    )
    return f"{len(equals)} endpoints have the best total, {_number(rows[0].total)}; {name} is chosen {how}."


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
