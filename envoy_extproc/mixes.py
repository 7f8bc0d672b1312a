"""How policies are written: a name, or several with weights that decide together (the syntax is AIBrix's).

    least-request
    least-kv-cache:2,least-request:1      twice the word for least-kv-cache
    least-kv-cache, least-request         a weight left out is 1
    least-kv-cache:0,least-request        one of 0 leaves a policy out
    queue-scorer,weighted-random-picker   a picker chooses by the scores, in place of the best score

A mixture adds up scores, so only policies that score can be in one, and one picker.
"""

from __future__ import annotations

from collections.abc import Collection

MAX_WEIGHT = 1_000_000

PICKING = frozenset({"random", "round-robin", "power-of-two"})
"""Policies that draw or take turns instead of scoring; they cannot be in a mixture."""

ALONE = frozenset({"pd"})
"""Policies that choose more than one endpoint; they cannot be in a mixture either."""

PICKERS = frozenset({"max-score-picker", "weighted-random-picker"})
"""Names that say how a mixture chooses by its scores; alone they have none to go by."""

_LONGEST = 512
"""Characters; every policy there is with its weight fits in, and a client's text is not kept beyond it."""


class MixError(ValueError):
    """The text names no policy and no mixture; the message is a sentence about it without a full stop."""


def parse(text: str, policies: Collection[str]) -> tuple[tuple[str, int], ...]:
    """The policies `text` names with their weights, those of weight 0 left out; a single name, or a picker, has weight 1.

    Args:
        text: as a client or the configuration wrote it.
        policies: the names there are.

    Raises:
        MixError: it cannot be read, or names what is not there or cannot be mixed.
    """
    if len(text) > _LONGEST:
        raise MixError(f"a policy is written in at most {_LONGEST} characters")
    name = text.strip()
    if "," not in name and ":" not in name:
        return ((_known(name, policies), 1),)
    members = [_member(part, policies) for part in text.split(",")]
    if len({member for member, _ in members}) < len(members):
        raise MixError("a mixture names a policy once")
    pickers = [name for name, _ in members if name in PICKERS]
    if len(pickers) > 1:
        raise MixError("a mixture has one picker")
    weighted = tuple(member for member in members if member[1])
    if len(weighted) == len(pickers):
        raise MixError("a mixture needs a weight above 0")
    return weighted


def canonical(members: Collection[tuple[str, int]]) -> str:
    """The one way to write a mixture: every weight given, no white space."""
    return ",".join(name if name in PICKERS else f"{name}:{weight}" for name, weight in members)


def _member(part: str, policies: Collection[str]) -> tuple[str, int]:
    name, colon, weight = part.partition(":")
    if name.strip() in PICKERS:
        if colon:
            raise MixError("a picker has no weight")
        return name.strip(), 1
    name = _known(name.strip(), policies)
    if name in PICKING:
        raise MixError(f"the policy {name!r} does not score, so it cannot be mixed with others")
    if name in ALONE:
        raise MixError(f"the policy {name!r} chooses pairs, so it cannot be mixed with others")
    return name, _weight(weight.strip()) if colon else 1


def _known(name: str, policies: Collection[str]) -> str:
    if name not in policies:
        raise MixError(f"no policy {name[:64]!r}; there are {', '.join(policies)}")
    return name


def _weight(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= len(str(MAX_WEIGHT))):
        raise MixError(f"a weight is a whole number from 0 to {MAX_WEIGHT}")
    weight = int(text)
    if weight > MAX_WEIGHT:
        raise MixError(f"a weight is a whole number from 0 to {MAX_WEIGHT}")
    return weight
