"""Where a key belongs: rendezvous hashing, plain and with bounded loads.

Every endpoint has a weight for a key, and the key belongs to the heaviest (Thaler and Ravishankar 1998). An endpoint that
leaves moves its own keys and nobody else's, one that comes takes an equal share from everybody, and all servers agree
without a word between them.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence

from envoy_extproc.openai.prompt import BlockRule
from envoy_extproc.scheduling.interfaces import Candidate, MissingDataError, SchedulingRequest

_MAX_KEY = 256
"""Bytes of a key that are hashed as they are, as in AIBrix; of a longer one its digest is the key."""

_BYTES = 8
_RANGE = float(1 << 8 * _BYTES)


def key(text: str) -> bytes:
    """What a client wrote, as a key of at most 256 bytes."""
    written = text.encode("utf-8", "surrogatepass")
    return written if len(written) <= _MAX_KEY else hashlib.blake2b(written).digest()


def name(text: str) -> str:
    """Whom a client says it is, in at most 256 characters: it is remembered."""
    return text if len(text) <= _MAX_KEY else key(text).hex()  # more bytes than characters, so it is a digest


def weights(key: bytes, candidates: Sequence[Candidate]) -> list[float]:
    """How heavy each candidate is for `key`, 0 to 1: 64 bits of BLAKE2b over the key, a zero byte and the address."""
    begun = hashlib.blake2b(key + b"\0", digest_size=_BYTES)
    digests = []
    for candidate in candidates:
        hashed = begun.copy()
        hashed.update(candidate.endpoint.address.encode())
        digests.append(hashed.digest())
    return [int.from_bytes(digest) / _RANGE for digest in digests]


def capacity(factor: float, candidates: Sequence[Candidate]) -> int:
    """How many exchanges a candidate may have, one that comes now included: ``ceil(factor * mean)``.

    The mean counts the one that comes, so whatever a `factor` from 1 on, somebody has room (Mirrokni, Thorup and
    Zadimoghaddam 2016).
    """
    in_flight = sum([candidate.in_flight for candidate in candidates])
    return math.ceil(factor * (in_flight + 1) / len(candidates))


class BoundedLoadScorer:
    """Consistent hashing with bounded loads: the heaviest for the request's key that has room, then the next one.

    A candidate with room scores ``0.5 + weight / 2``, one without ``weight / 2``, so those come last. The key is that of the
    session, else the user, else the first blocks of the prompt.

    Args:
        factor: of the mean load, above 1. Near 1 loads are even and keys move; far above, keys stay and loads do not.
        rule: how prompts are cut into blocks; the same as that of whoever else reads them.
    """

    name = "bounded-load"

    def __init__(self, factor: float = 1.25, rule: BlockRule | None = None) -> None:
        self._factor = factor
        self._rule = rule or BlockRule()

    def score(self, request: SchedulingRequest, candidates: Sequence[Candidate]) -> Sequence[float]:
        """See `Scorer`.

        Raises:
            MissingDataError: `no-key`: nothing in the request can be a key.
        """
        key = _key(request, self._rule)
        if key is None:
            raise MissingDataError("no-key")
        bound = capacity(self._factor, candidates)
        return [
            weight / 2 + (0.5 if candidate.in_flight < bound else 0.0)
            for weight, candidate in zip(weights(key, candidates), candidates, strict=True)
        ]


class BoundedRandomPicker:
    """Any order among those that have room, then any among the others: hashing with bounded loads of a random key."""

    name = "bounded-random-picker"

    def __init__(self, factor: float = 1.25) -> None:
        self._factor = factor

    def pick(
        self,
        request: SchedulingRequest,
        candidates: Sequence[Candidate],
        scores: Sequence[float],
        rng: random.Random,
    ) -> list[Candidate]:
        """See `Picker`."""
        bound = capacity(self._factor, candidates)
        mixed = rng.sample(candidates, len(candidates))
        return sorted(mixed, key=lambda candidate: candidate.in_flight >= bound)


def _key(request: SchedulingRequest, rule: BlockRule) -> bytes | None:
    if request.session_key is not None:
        return request.session_key
    if request.user is not None:
        return key(request.user)
    head = b"" if request.prompt is None else request.prompt.head(rule, request.model)
    return hashlib.blake2b(head).digest() if head else None
