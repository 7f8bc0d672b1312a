"""Pods of a Kubernetes cluster: watched by label, told as whole Snapshots. Read only, and nothing is asked per request."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from envoy_extproc.discovery import pods
from envoy_extproc.discovery.fleet import ALL, Fleet
from envoy_extproc.discovery.kubernetes_api import KubernetesApi
from envoy_extproc.discovery.pods import Pod
from envoy_extproc.discovery.watch import Health, Pace, Watch
from envoy_extproc.endpoints import Snapshot
from envoy_extproc.settings import KubernetesSource

EVERYWHERE = ("*",)

_LATEST_SECONDS = 0.5
"""How far behind the cluster a Snapshot may be when changes do not stop."""

_SHARE = 10
"""Times as long as a Snapshot took everyone to take up, the next one waits: a tenth of a core, however large the fleet."""


class KubernetesDiscovery:
    """The pods that carry a label, in some namespaces or in all.

    Args:
        source: where and which.
        engines: the names an engine may have.
        pace: how long things take.
        rng: jitters; chance itself by default.

    Attributes:
        healths: how the watches do, one for each namespace.

    Raises:
        SettingsError: the Kubernetes client is not installed.
    """

    def __init__(
        self,
        source: KubernetesSource,
        *,
        engines: Collection[str],
        pace: Pace | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._source = source
        self._pace = pace or Pace(page=source.page_size)
        self._rng = rng or random.Random()  # noqa: S311  sets servers apart
        self._api = KubernetesApi(source.kubeconfig, source.context)
        self._fleet = Fleet(engines=engines, qualified=_several(source.namespaces))
        self._changed = asyncio.Event()
        self.healths: tuple[Health, ...] = ()

    @property
    def unusable(self) -> Mapping[str, int]:
        """How many pods are ready but make no sense, by reason."""
        return self._fleet.unusable

    async def snapshots(self) -> AsyncIterator[Snapshot]:
        """Yields the first complete list, and another Snapshot a moment after something changed.

        A moment is `debounce_ms`, so that changes that come together are told together; longer where a Snapshot of the
        fleet costs more, up to half a second. While the API is out of reach the last Snapshot stays.

        Raises:
            SettingsError: the cluster's configuration cannot be used.
        """
        async with self._watching() as tasks:
            snapshot, wait = None, 0.0
            while True:
                await self._changed.wait()
                await asyncio.sleep(wait)
                self._changed.clear()
                raise_what_ended(tasks)
                if not all(health.listed for health in self.healths):
                    continue
                began = time.perf_counter()
                now = self._fleet.snapshot()
                if now != snapshot:
                    snapshot = now
                    yield snapshot
                wait = self._wait(time.perf_counter() - began)

    def _wait(self, cost: float) -> float:
        debounce = self._source.debounce_ms / 1000
        return max(debounce, min(_SHARE * cost, _LATEST_SECONDS))

    @asynccontextmanager
    async def _watching(self) -> AsyncIterator[Sequence[asyncio.Future[Any]]]:
        async with AsyncExitStack() as stack:
            api = await stack.enter_async_context(self._api)
            scopes = scopes_of(self._source.namespaces, api.namespace)
            self.healths = tuple(Health(called("pods", scope)) for scope in scopes)
            tasks = [
                asyncio.ensure_future(self._watch(api, scope, health).run())
                for scope, health in zip(scopes, self.healths, strict=True)
            ]
            stack.push_async_callback(cancelled, tasks)
            for task in tasks:
                task.add_done_callback(lambda _: self._changed.set())
            yield tasks

    def _watch(self, api: KubernetesApi, scope: str, health: Health) -> Watch[Pod]:
        return Watch(
            api,
            path("/api/v1", scope, "pods"),
            decode=pods.decode,
            receiver=_Scope(self._fleet, scope, self._changed),
            health=health,
            selector=self._source.label_selector,
            pace=self._pace,
            rng=self._rng,
        )


class _Scope:
    """Hands what one watch is told to the fleet."""

    def __init__(self, fleet: Fleet, scope: str, changed: asyncio.Event) -> None:
        self._fleet = fleet
        self._scope = scope
        self._changed = changed

    def listed(self, objects: Iterable[Pod]) -> None:
        self._fleet.replace(self._scope, objects)
        self._changed.set()  # the first list is news, even of nobody

    def changed(self, each: Pod) -> None:
        if self._fleet.put(each):
            self._changed.set()

    def deleted(self, each: Pod) -> None:
        if self._fleet.remove(each):
            self._changed.set()


def _several(namespaces: Sequence[str]) -> bool:
    return len(namespaces) > 1 or tuple(namespaces) == EVERYWHERE


def scopes_of(namespaces: Sequence[str], own: str) -> tuple[str, ...]:
    """What is watched: namespaces, or `ALL`."""
    if tuple(namespaces) == EVERYWHERE:
        return (ALL,)
    return tuple(namespaces) or (own,)


def path(group: str, scope: str, plural: str) -> str:
    """Of the list of a kind in a scope."""
    return f"{group}/{plural}" if scope == ALL else f"{group}/namespaces/{scope}/{plural}"


def called(plural: str, scope: str) -> str:
    """How people call what is watched."""
    return plural if scope == ALL else f"{plural} of {scope}"


async def cancelled(tasks: Iterable[asyncio.Future[Any]]) -> None:
    """Ends tasks that would not end by themselves."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def raise_what_ended(tasks: Iterable[asyncio.Future[Any]]) -> None:
    """A watch never ends; if it does that is a defect, and shall be seen."""
    for task in tasks:
        if task.done():
            task.result()
