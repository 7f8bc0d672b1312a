"""A Kubernetes API that remembers: versions, pages, watches from a version, bookmarks, 410; and what can go wrong with it.

kmock serves it over HTTP and knows the API's paths; its own emulator keeps no versions, so lists and watches are done here.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import kmock
import yaml
from aiohttp import web

from envoy_extproc.simulation.stack import free_port

NAMESPACE = "default"
LABEL = "model.aibrix.ai/name"
PODS = kmock.resource("", "v1", "pods")
ROUTES = kmock.resource("gateway.networking.k8s.io", "v1", "httproutes")

Object = dict[str, Any]
Fault = Callable[[kmock.Request], Any]
"""What is served instead of a list or watch: a response of kmock's; None for the real one."""


class Refusal(Exception):
    """An HTTP status, instead of an answer."""

    def __init__(self, code: int, body: bytes, headers: Mapping[str, str]) -> None:
        super().__init__(code)
        self.response = web.Response(status=code, body=body, headers=headers)


class Api(kmock.KubernetesScaffold):
    """kmock keeps a status that a function returned for whatever it returns next; so refusals are raised."""

    async def _render_error(self, exc: Exception) -> web.StreamResponse:
        return exc.response if isinstance(exc, Refusal) else await super()._render_error(exc)


def pod(
    name: str,
    ip: str = "10.0.0.1",
    *,
    namespace: str = NAMESPACE,
    ready: bool = True,
    phase: str = "Running",
    created: str = "2026-01-01T00:00:00Z",
    model: str | None = "m",
    labels: Mapping[str, str] | None = None,
    annotations: Mapping[str, str] | None = None,
    **metadata: Any,
) -> Object:
    """A pod as the API writes it, with members nobody reads."""
    named = {} if model is None else {LABEL: model}
    return {
        "kind": "Pod",
        "apiVersion": "v1",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "uid": f"uid-{name}",
            "creationTimestamp": created,
            "labels": named | dict(labels or {}),
            "annotations": dict(annotations or {}),
            "managedFields": [{"manager": "kubelet", "fieldsV1": {"f:status": {"f:podIP": {}}}}],
            **metadata,
        },
        "spec": {"containers": [{"name": "engine", "image": "vllm"}], "nodeName": "node-1"},
        "status": {
            "phase": phase,
            "podIP": ip,
            "podIPs": [{"ip": ip}],
            "conditions": [
                {"type": "Initialized", "status": "True", "lastProbeTime": None},
                {"type": "Ready", "status": "True" if ready else "False"},
            ],
        },
    }


class Cluster:
    """Objects of one kind and their history, served at a port of loopback.

    Attributes:
        objects: by namespace and name.
        faults: served instead, one for each request that comes, lists and watches in turn.
        asked: how often, by ``list`` and ``watch``.
        seen: every request.
        live: watches that are open.
    """

    def __init__(self, resource: kmock.resource = PODS) -> None:
        self.objects: dict[tuple[str, str], Object] = {}
        self.faults: deque[Fault] = deque()
        self.asked: Counter[str] = Counter()
        self.seen: list[kmock.Request] = []
        self.live = 0
        self.version = 100
        self._history: list[tuple[int, str, Object]] = []
        self._forgotten = 0
        self._news = asyncio.Condition()
        self._cuts: set[asyncio.Event] = set()
        self._pages: dict[str, tuple[int, list[Object]]] = {}
        self._handler = Api()
        self._server = kmock.Server(self._handler, port=free_port())
        self._handler["list", resource] << self._list
        self._handler["watch", resource] << self._watch

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(self._handler)
            await stack.enter_async_context(self._server)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cut()
        await asyncio.sleep(0)
        await self._stack.aclose()

    async def down(self) -> None:
        """Nobody listens any more."""
        self.cut()
        await self._server.__aexit__(None, None, None)

    async def up(self) -> None:
        """Listens again, where it did."""
        await self._server.__aenter__()

    @property
    def url(self) -> str:
        return str(self._server.url).rstrip("/")

    def kubeconfig(self, directory: Path, **user: Any) -> Path:
        """A file that leads here."""
        path = directory / "kubeconfig"
        path.write_text(
            yaml.safe_dump(
                {
                    "current-context": "test",
                    "contexts": [{"name": "test", "context": {"cluster": "c", "user": "u"}}],
                    "clusters": [{"name": "c", "cluster": {"server": self.url}}],
                    "users": [{"name": "u", "user": {"token": "secret", **user}}],
                }
            )
        )
        return path

    async def put(self, each: Object) -> None:
        """Adds or changes an object."""
        key = each["metadata"]["namespace"], each["metadata"]["name"]
        await self._happened("MODIFIED" if key in self.objects else "ADDED", each)
        self.objects[key] = each

    async def delete(self, name: str, namespace: str = NAMESPACE) -> None:
        await self._happened("DELETED", copy.deepcopy(self.objects.pop((namespace, name))))

    async def bookmark(self) -> None:
        """Tells watches of the present version, whatever it was of."""
        self.version += 1
        await self._tell("BOOKMARK", {"kind": "Pod", "metadata": {"resourceVersion": str(self.version)}})

    def forget(self) -> None:
        """No watch can begin before now."""
        self._forgotten = self.version
        self._history.clear()

    def cut(self) -> None:
        """Breaks every watch that is open."""
        for each in self._cuts:
            each.set()

    async def wake(self) -> None:
        async with self._news:
            self._news.notify_all()

    async def _happened(self, kind: str, each: Object) -> None:
        self.version += 1
        each["metadata"]["resourceVersion"] = str(self.version)
        await self._tell(kind, copy.deepcopy(each))

    async def _tell(self, kind: str, each: Object) -> None:
        async with self._news:
            self._history.append((self.version, kind, each))
            self._news.notify_all()

    def _fault(self, request: kmock.Request) -> Any:
        self.seen.append(request)
        return self.faults.popleft()(request) if self.faults else None

    def _list(self, request: kmock.Request) -> Any:
        self.asked["list"] += 1
        fault = self._fault(request)
        if fault is not None:
            return fault
        limit, token = int(request.params.get("limit", 0)), request.params.get("continue")
        if token is None:
            version, rest = self.version, [copy.deepcopy(each) for each in self._selected(request)]
        else:
            version, rest = self._pages.pop(token)
            if version < self._forgotten:
                return status(410, "Expired", "The provided continue parameter is too old")
        page, rest = (rest[:limit], rest[limit:]) if limit else (rest, [])
        metadata = {"resourceVersion": str(version)}
        if rest:
            metadata["continue"] = f"token-{len(self._pages)}-{version}"
            self._pages[metadata["continue"]] = (version, rest)
        return {"kind": "PodList", "apiVersion": "v1", "metadata": metadata, "items": page or None}

    def _selected(self, request: kmock.Request) -> Iterator[Object]:
        for (namespace, _), each in self.objects.items():
            if request.namespace in (None, namespace) and _matches(request, each):
                yield each

    def _watch(self, request: kmock.Request) -> Any:
        self.asked["watch"] += 1
        fault = self._fault(request)
        if fault is not None:
            return fault
        since = int(request.params["resourceVersion"])
        if since < self._forgotten:
            return event("ERROR", code=410, reason="Expired", message="too old resource version")
        return self._events(request, since)

    async def _events(self, request: kmock.Request, since: int) -> AsyncIterator[bytes]:
        cut, self.live = asyncio.Event(), self.live + 1
        self._cuts.add(cut)
        waiting = asyncio.ensure_future(_abort(cut, request, self))
        begun = self._forgotten
        try:
            yield b""  # the headers, at once
            position = 0
            while not cut.is_set():
                if begun != self._forgotten:
                    begun, position = self._forgotten, 0
                while position < len(self._history):
                    version, kind, each = self._history[position]
                    position += 1
                    if version > since and (kind == "BOOKMARK" or self._concerns(request, each)):
                        since = version
                        yield line(kind, each)
                async with self._news:
                    if position >= len(self._history) and not cut.is_set():
                        await self._news.wait()
        finally:
            self.live -= 1
            self._cuts.discard(cut)
            waiting.cancel()

    def _concerns(self, request: kmock.Request, each: Object) -> bool:
        return request.namespace in (None, each["metadata"]["namespace"]) and _matches(request, each)


async def _abort(cut: asyncio.Event, request: kmock.Request, cluster: Cluster) -> None:
    await cut.wait()
    abort(request)
    await cluster.wake()


def abort(request: kmock.Request) -> None:
    """Breaks the connection of a request as it is."""
    raw = request._raw_request
    if raw is not None and raw.transport is not None:
        raw.transport.abort()


def _matches(request: kmock.Request, each: Object) -> bool:
    """Selectors that ask whether a label is there are all that is needed here."""
    selector = request.params.get("labelSelector", "")
    return not selector or selector in (each["metadata"].get("labels") or {})


def line(kind: str, each: Object) -> bytes:
    """An event as it is on the wire."""
    return json.dumps({"type": kind, "object": each}, separators=(",", ":")).encode() + b"\n"


def event(kind: str, **fields: Any) -> tuple[bytes]:
    """A watch of one event, ended as it should be."""
    return (line(kind, {"kind": "Status", **fields}),)


def status(code: int, reason: str = "", message: str = "", **headers: str) -> Refusal:
    """A Status instead of an answer."""
    body = json.dumps({"kind": "Status", "code": code, "reason": reason, "message": message})
    return Refusal(code, body.encode(), headers)
