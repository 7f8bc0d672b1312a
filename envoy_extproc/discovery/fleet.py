"""The pods that are known, and the endpoints they come to: only a pod that changed is mapped anew."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping

import msgspec
import structlog

from envoy_extproc.discovery.pods import NOT_LISTED, Mapped, Pod, PodError, mapped
from envoy_extproc.endpoints import Endpoint, Snapshot

log = structlog.get_logger()

ALL = ""
"""The scope of all namespaces."""

_Key = tuple[str, str]  # namespace and name


class _Known(msgspec.Struct, frozen=True):
    """A pod as it is kept.

    Attributes:
        created: its creationTimestamp; a pod that is newer has the later one.
        version: its resourceVersion; the same one is the same pod.
    """

    endpoints: tuple[Endpoint, ...]
    created: str
    version: str


_UNKNOWN = _Known((), "", "")


class Fleet:
    """All pods of the scopes that are watched.

    Args:
        engines: the names an engine may have.
        qualified: whether names tell the namespace.
    """

    def __init__(self, *, engines: Collection[str], qualified: bool) -> None:
        self._engines = frozenset(engines)
        self._qualified = qualified
        self._pods: dict[_Key, _Known] = {}
        self._flaws: dict[_Key, str] = {}
        self._told: dict[_Key, set[str]] = {}
        self._engines_told: set[str] = set()
        self._lost: frozenset[tuple[str, str]] = frozenset()

    @property
    def unusable(self) -> Mapping[str, int]:
        """How many pods that are ready cannot be used, by the reason of `PodError`."""
        return Counter(self._flaws.values())

    def replace(self, scope: str, pods: Iterable[Pod]) -> bool:
        """Takes a complete list of a scope, a namespace or `ALL`; says whether any endpoint came, went or changed."""
        listed = {_key(pod): pod for pod in pods}
        gone = [key for key in self._pods if scope in (ALL, key[0]) and key not in listed]
        changes = [self._remove(key) for key in gone] + [self.put(pod) for pod in listed.values()]
        return any(changes)

    def put(self, pod: Pod) -> bool:
        """Takes a pod that is new or different; says likewise whether that is anything to us."""
        key, meta = _key(pod), pod.metadata
        before = self._pods.get(key, _UNKNOWN)
        if meta.resource_version and meta.resource_version == before.version:
            return False
        endpoints = self._mapped(key, pod).endpoints
        same = endpoints == before.endpoints
        kept = before.endpoints if same else endpoints  # the very same objects are quick to compare
        self._pods[key] = _Known(kept, meta.creation_timestamp or "", meta.resource_version)
        return not same

    def remove(self, pod: Pod) -> bool:
        """Forgets a pod that was deleted; says likewise."""
        return self._remove(_key(pod))

    def snapshot(self) -> Snapshot:
        """Everyone who may be chosen. Of pods with the same address the newer one counts: the other is about to go."""
        endpoints = [endpoint for known in self._pods.values() for endpoint in known.endpoints]
        if len({endpoint.address for endpoint in endpoints}) < len(endpoints):
            return Snapshot(self._settled())
        self._lost = frozenset()
        return Snapshot(endpoints)

    def _remove(self, key: _Key) -> bool:
        self._flaws.pop(key, None)
        self._told.pop(key, None)
        known = self._pods.pop(key, None)
        return known is not None and bool(known.endpoints)

    def _mapped(self, key: _Key, pod: Pod) -> Mapped:
        self._flaws.pop(key, None)
        try:
            found = mapped(pod, engines=self._engines, qualified=self._qualified)
        except PodError as error:
            self._complain(key, error)
            return NOT_LISTED
        if found.unknown_engine is not None and found.unknown_engine not in self._engines_told:
            self._engines_told.add(found.unknown_engine)
            log.warning(
                "pod_engine_unknown", pod="/".join(key), engine=found.unknown_engine, read_as="generic"
            )
        return found

    def _complain(self, key: _Key, error: PodError) -> None:
        self._flaws[key] = error.reason
        told = self._told.setdefault(key, set())
        if error.reason not in told:
            told.add(error.reason)
            log.warning("pod_unusable", pod="/".join(key), reason=error.reason, text=str(error))

    def _settled(self) -> Iterable[Endpoint]:
        holders: dict[str, tuple[str, _Key, Endpoint]] = {}
        lost = set()
        for key, known in self._pods.items():
            for endpoint in known.endpoints:
                claims = (known.created, key, endpoint)
                other = holders.get(endpoint.address, claims)
                winner, loser = (other, claims) if other[:2] > claims[:2] else (claims, other)
                holders[endpoint.address] = winner
                if loser is not winner:
                    lost.add((winner[2].name, loser[2].name))
                    self._tell(winner[2], loser[2])
        self._lost = frozenset(lost)
        return (endpoint for _, _, endpoint in holders.values())

    def _tell(self, winner: Endpoint, loser: Endpoint) -> None:
        if (winner.name, loser.name) not in self._lost:
            log.warning("pod_address_taken", address=winner.address, by=winner.name, left_out=loser.name)


def _key(pod: Pod) -> _Key:
    return pod.metadata.namespace, pod.metadata.name
