"""Candidates as a tuple that knows what filters and scorers would gather from each of them one by one.

A thousand candidates are looked through several times for every decision: for how busy each is, for whether it is reachable,
for who has a certain address. Where they come as a `Roster` that is known already. Functions here take any sequence of
candidates, so whoever filters or scores need not know which it is; what is left after a filter that knows nothing of it is
an ordinary list.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import compress

from envoy_extproc.scheduling.interfaces import Candidate


class Roster(tuple[Candidate, ...]):  # noqa: SLOT001  a tuple's length varies, so it can have no slots
    """All candidates of a pool at one moment, or those of them that filters left.

    Attributes:
        in_flight: of each.
        places: by address, of all of the pool.
        kept: the places in the pool of those that are here, ascending.
        all_reachable: whether each of them is.
        before: what it is the rest of, and which places of that were taken out; None where nothing was.
    """

    in_flight: Sequence[int]
    places: Mapping[str, int]
    kept: Sequence[int]
    all_reachable: bool
    before: tuple[Roster, Collection[int]] | None

    @classmethod
    def of(
        cls,
        candidates: Iterable[Candidate],
        *,
        in_flight: Sequence[int],
        places: Mapping[str, int],
        all_reachable: bool,
        kept: Sequence[int] | None = None,
        before: tuple[Roster, Collection[int]] | None = None,
    ) -> Roster:
        """One of `candidates`, whose attributes are those; without `kept` they are all of the pool."""
        made = cls(candidates)
        made.in_flight, made.places, made.all_reachable = in_flight, places, all_reachable
        made.kept = range(len(made)) if kept is None else kept
        made.before = before
        return made

    def only(self, addresses: Iterable[str]) -> Roster:
        """Those at some addresses, all of which are here."""
        places = set(map(self.places.__getitem__, addresses))
        return self.without([here for here, place in enumerate(self.kept) if place not in places])

    def without(self, gone: Collection[int]) -> Roster:
        """All but those at the places `gone` of this one."""
        stays = bytearray(b"\1") * len(self)
        for place in gone:
            stays[place] = 0
        return Roster.of(
            compress(self, stays),
            in_flight=list(compress(self.in_flight, stays)),
            places=self.places,
            all_reachable=self.all_reachable,
            kept=list(compress(self.kept, stays)),
            before=(self, gone),
        )

    def column(self, values: Mapping[str, float]) -> Sequence[float]:
        """See `column`."""
        whole = [0.0] * len(self.places)
        for place, value in zip(map(self.places.get, values), values.values(), strict=True):
            if place is not None:
                whole[place] = value
        return whole if len(self) == len(whole) else [whole[place] for place in self.kept]


def in_flight(candidates: Sequence[Candidate]) -> Sequence[int]:
    """How many exchanges each has."""
    if isinstance(candidates, Roster):
        return candidates.in_flight
    return [candidate.in_flight for candidate in candidates]


def column(candidates: Sequence[Candidate], values: Mapping[str, float]) -> Sequence[float]:
    """The value of each one's address; 0 where it has none."""
    if isinstance(candidates, Roster):
        return candidates.column(values)
    return [values.get(candidate.endpoint.address, 0.0) for candidate in candidates]


def without(candidates: Sequence[Candidate], gone: Collection[int]) -> Sequence[Candidate]:
    """All but those at the places `gone`."""
    if isinstance(candidates, Roster):
        return candidates.without(gone)
    out = set(gone)
    return [candidate for place, candidate in enumerate(candidates) if place not in out]


def names_of_others(candidates: Sequence[Candidate], left: Sequence[Candidate]) -> tuple[str, ...]:
    """Names of those that are not among `left`, which are some of them in their order."""
    if isinstance(left, Roster) and left.before is not None and left.before[0] is candidates:
        return tuple([candidates[place].endpoint.name for place in left.before[1]])
    kept = set(map(id, left))
    return tuple([each.endpoint.name for each in candidates if id(each) not in kept])
