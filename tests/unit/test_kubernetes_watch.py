"""Discovery over a Kubernetes API that breaks in every way it can: over HTTP, and what is left is the truth."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import random
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Self

import kmock
import msgspec
import pytest
import structlog.testing
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from envoy_extproc.discovery import kubernetes_api
from envoy_extproc.discovery.fleet import Fleet
from envoy_extproc.discovery.kubernetes import KubernetesDiscovery
from envoy_extproc.discovery.pods import decode
from envoy_extproc.discovery.watch import ApiError, Backoff, Lines, Pace
from envoy_extproc.endpoints import Snapshot
from envoy_extproc.scheduling import registry
from envoy_extproc.server.model_configs import ModelConfigs
from envoy_extproc.settings import KubernetesSource, SettingsError
from tests.support.cluster import Cluster, Fault, Refusal, abort, event, line, pod, status
from tests.support.gateway import eventually

FAST = Pace(first=0.002, longest=0.02, lasted=5, watch=300, silence=5, answer=5, page=500)
ENGINES = frozenset({"vllm", "generic"})


class Following:
    """A discovery at work, and the last Snapshot it told.

    Attributes:
        told: every Snapshot.
    """

    def __init__(
        self, cluster: Cluster, directory: Path, pace: Pace = FAST, *, debounce_ms: int = 5, **source: Any
    ) -> None:
        kubeconfig = cluster.kubeconfig(directory)
        self.discovery = KubernetesDiscovery(
            KubernetesSource(kubeconfig=kubeconfig, debounce_ms=debounce_ms, **source),
            engines=ENGINES,
            pace=pace,
            rng=random.Random(1),
        )
        self.told: list[Snapshot] = []

    async def __aenter__(self) -> Self:
        self._task = asyncio.ensure_future(self._follow())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _follow(self) -> None:
        async with contextlib.aclosing(self.discovery.snapshots()) as snapshots:  # type: ignore[type-var]  # a generator
            async for snapshot in snapshots:
                self.told.append(snapshot)

    @property
    def names(self) -> list[str] | None:
        return sorted(each.name for each in self.told[-1].endpoints) if self.told else None

    async def has(self, *names: str) -> None:
        try:
            await eventually(lambda: self.names == sorted(names))
        except TimeoutError:
            raise AssertionError(f"{self.names} and not {names}") from None

    @property
    def failures(self) -> dict[str, int]:
        return dict(self.discovery.healths[0].failures)


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with Cluster() as made:
        yield made


def ip(number: int) -> str:
    return f"10.0.{number // 250}.{number % 250 + 1}"


async def filled(cluster: Cluster, *names: str) -> None:
    for name in names:
        await cluster.put(pod(name, ip(ord(name[-1]))))


async def watching(cluster: Cluster, count: int = 1) -> None:
    await eventually(lambda: cluster.live == count)


async def test_a_list_and_its_changes(cluster: Cluster, tmp_path: Path) -> None:
    await filled(cluster, "a", "b")
    async with Following(cluster, tmp_path) as ours:
        await ours.has("a", "b")
        await watching(cluster)
        await filled(cluster, "c")
        await ours.has("a", "b", "c")
        await cluster.delete("a")
        await ours.has("b", "c")
        await cluster.put(pod("b", ip(98), ready=False))
        await ours.has("c")
        assert cluster.asked == {"list": 1, "watch": 1}
        assert ours.failures == {}
        assert ours.told[0].endpoints[0].address == "10.0.0.98:8000"


def routed(policy: str) -> dict[str, str]:
    profiles = {"default": {"routingStrategy": policy}}
    return {"model.aibrix.ai/config": json.dumps({"profiles": profiles}, indent=2)}


async def test_a_configuration_that_changes_on_a_live_pod_takes_effect(
    cluster: Cluster, tmp_path: Path
) -> None:
    configs = ModelConfigs({}, registry.build().find)

    def policies() -> list[str]:
        if ours.told:
            configs.update(ours.told[-1])
        return list(configs.policies)

    async with Following(cluster, tmp_path) as ours:
        await cluster.put(pod("a", annotations=routed("random")))
        await eventually(lambda: policies() == ["random"])
        await cluster.put(pod("a", annotations=routed("round-robin")))
        await eventually(lambda: policies() == ["round-robin"])
        with structlog.testing.capture_logs() as logs:
            await cluster.put(pod("a", annotations=routed("no-such-policy")))
            await eventually(lambda: policies() == [])
            await filled(cluster, "z")
            await ours.has("a", "z")
            assert policies() == []
        assert [(log["event"], log["endpoint"]) for log in logs if log["log_level"] == "warning"] == [
            ("model_config_ignored", "a")
        ]
        await cluster.put(pod("a", annotations=routed("power-of-two")))
        await eventually(lambda: policies() == ["power-of-two"])
        await cluster.put(pod("a"))
        await eventually(lambda: policies() == [])
        assert ours.names == ["a", "z"]


async def test_nobody_is_a_list_too(cluster: Cluster, tmp_path: Path) -> None:
    async with Following(cluster, tmp_path) as ours:
        await ours.has()


async def test_what_is_asked_of_the_api(cluster: Cluster, tmp_path: Path) -> None:
    await filled(cluster, "a")
    async with Following(cluster, tmp_path) as ours:
        await ours.has("a")
        await watching(cluster)
    listed, watched = cluster.seen
    assert listed.url.path == "/api/v1/namespaces/default/pods"
    assert listed.params == {"labelSelector": "model.aibrix.ai/name", "limit": "500"}
    assert listed.headers["Authorization"] == "Bearer secret"
    seconds = int(watched.params["timeoutSeconds"])
    assert 240 <= seconds <= 300
    assert dict(watched.params) | {"timeoutSeconds": ""} == {
        "labelSelector": "model.aibrix.ai/name",
        "watch": "true",
        "allowWatchBookmarks": "true",
        "resourceVersion": "101",
        "timeoutSeconds": "",
    }


async def test_pages(cluster: Cluster, tmp_path: Path) -> None:
    await filled(cluster, *"abcde")
    async with Following(cluster, tmp_path, pace=msgspec.structs.replace(FAST, page=2)) as ours:
        await ours.has(*"abcde")
        assert cluster.asked["list"] == 3
        assert len(ours.told) == 1


async def test_pages_that_grow_too_old_are_asked_for_at_once(cluster: Cluster, tmp_path: Path) -> None:
    await filled(cluster, *"abcde")

    def forgetful(_: kmock.Request) -> None:
        cluster.version += 1
        cluster.forget()

    cluster.faults.extend([lambda _: None, forgetful])
    async with Following(cluster, tmp_path, pace=msgspec.structs.replace(FAST, page=2)) as ours:
        await ours.has(*"abcde")
        assert ours.failures == {"gone": 1}
    assert [request.params.get("limit") for request in cluster.seen][:3] == ["2", "2", None]


async def test_several_namespaces_and_all(cluster: Cluster, tmp_path: Path) -> None:
    for number, namespace in enumerate(("x", "y", "z")):
        await cluster.put(pod("a", ip(number), namespace=namespace))
    async with Following(cluster, tmp_path, namespaces=("x", "y")) as ours:
        await ours.has("x/a", "y/a")
        await watching(cluster, 2)
        await cluster.delete("a", "x")
        await ours.has("y/a")
    async with Following(cluster, tmp_path, namespaces=("*",)) as ours:
        await ours.has("y/a", "z/a")
        assert cluster.seen[-1].url.path == "/api/v1/pods"
    async with Following(cluster, tmp_path, namespaces=("z",)) as ours:
        await ours.has("a")


async def test_no_snapshot_before_every_namespace_is_listed(cluster: Cluster, tmp_path: Path) -> None:
    await cluster.put(pod("a", namespace="x"))
    cluster.faults.extend(lambda r: status(403) if r.namespace == "y" else None for _ in range(12))
    async with Following(cluster, tmp_path, namespaces=("x", "y")) as ours:
        await eventually(lambda: len(cluster.faults) < 6)
        assert ours.told == []
        assert [each.listed for each in ours.discovery.healths] == [True, False]
        await ours.has("x/a")


async def test_the_last_snapshot_stays_while_the_api_is_away(cluster: Cluster, tmp_path: Path) -> None:
    await filled(cluster, "a", "b")
    async with Following(cluster, tmp_path) as ours:
        await ours.has("a", "b")
        await watching(cluster)
        cluster.faults.extend([lambda _: status(503, message="etcd is away")] * 20)
        cluster.cut()
        await eventually(lambda: ours.failures.get("503", 0) >= 10)
        assert len(ours.told) == 1
        assert ours.discovery.healths[0].trouble == "503"
        await cluster.delete("a")
        await ours.has("b")
        assert ours.discovery.healths[0].trouble is None


async def test_an_api_that_is_down_at_the_start(cluster: Cluster, tmp_path: Path) -> None:
    await filled(cluster, "a")
    ours = Following(cluster, tmp_path)
    await cluster.down()
    with structlog.testing.capture_logs() as logs:
        async with ours:
            await eventually(lambda: bool(ours.discovery.healths) and ours.failures.get("unreachable", 0) > 3)
            assert ours.told == []
            await cluster.up()
            await ours.has("a")
    assert [log["kind"] for log in logs if log["event"] == "kubernetes_failed"] == ["unreachable"]
    assert "waiting for the first list" in logs[0]["kept"]


async def test_an_api_that_restarts(cluster: Cluster, tmp_path: Path) -> None:
    await filled(cluster, "a")
    async with Following(cluster, tmp_path) as ours:
        await ours.has("a")
        await watching(cluster)
        await cluster.down()
        await eventually(lambda: ours.failures.get("unreachable", 0) > 3)
        await filled(cluster, "b")
        await cluster.up()
        await ours.has("a", "b")
        assert len(ours.told) == 2


def stream(*pieces: Any) -> Fault:
    """A watch of these pieces; the last may be a function, that is called at the end."""

    async def served(request: kmock.Request) -> AsyncIterator[bytes]:
        yield b""
        for piece in pieces:
            if callable(piece):
                await asyncio.sleep(0.02)  # what was written shall arrive
                result = piece(request)
                if result is not None:
                    await result
            else:
                yield piece

    return served


def stall(_: kmock.Request) -> Any:
    return asyncio.sleep(30)


def added(name: str, version: int = 0) -> bytes:
    each = pod(name, ip(ord(name[-1])))
    each["metadata"]["resourceVersion"] = str(version)
    return line("ADDED", each)


HALF = added("c", 102)[:200]
BOOKMARK = line("BOOKMARK", {"metadata": {"resourceVersion": "101"}})

BROKEN: dict[str, tuple[list[Fault], set[str]]] = {
    "ended": ([stream()], set()),
    "cut at once": ([stream(abort)], {"cut"}),
    "cut in a line": ([stream(HALF, abort)], {"cut"}),
    "cut in a line behind a whole one": ([stream(BOOKMARK + HALF, abort)], {"cut"}),
    "half a line": ([stream(HALF)], {"cut"}),
    "a line without its end": ([stream(added("c", 102)[:-1])], {"cut"}),
    "no JSON": ([stream(b"<html>\n")], {"unreadable"}),
    "JSON, but no event": ([stream(b"[1]\n")], {"unreadable"}),
    "an event of nothing": ([stream(b'{"type":"ADDED","object":{"metadata":4}}\n')], {"unreadable"}),
    "an event of no known type": ([stream(b'{"type":"NEW","object":{}}\n')], set()),
    "empty lines": ([stream(b"\n\n", BOOKMARK, b"\n")], set()),
    "bytes that are no text": ([stream(b'{"type":"\xff"}\n')], {"unreadable"}),
    "an error event": ([lambda _: event("ERROR", code=500, reason="InternalError", message="etcd")], {"500"}),
    "an error event that says nothing": ([lambda _: event("ERROR")], {"unreadable"}),
    "410 in the stream": ([lambda _: event("ERROR", code=410, reason="Expired")], {"gone"}),
    "expired without a code": ([lambda _: event("ERROR", reason="Expired")], {"gone"}),
    "410 as status": ([lambda _: status(410, "Gone")], {"gone"}),
    "410 and then 500 for the list": ([lambda _: status(410), lambda _: status(500)], {"gone", "500"}),
    "410 and a list that is cut": ([lambda _: status(410), stream(b'{"metadata":', abort)], {"gone", "cut"}),
    "410 and a list that is no list": ([lambda _: status(410), lambda _: b"<html>"], {"gone", "unreadable"}),
    "410 and a list of nonsense": (
        [lambda _: status(410), lambda _: {"metadata": {"resourceVersion": "101"}, "items": [1]}],
        {"gone", "unreadable"},
    ),
    "500 once": ([lambda _: status(500)], {"500"}),
    "500 for long": ([lambda _: status(500)] * 5, {"500"}),
    "too large a version": ([lambda _: status(504, "Timeout", "Too large resource version")] * 9, {"504"}),
    "401 and then well": ([lambda _: status(401, "Unauthorized")], {"401"}),
    "403 of a proxy": ([lambda _: Refusal(403, b"<h1>no</h1>", {})], {"403"}),
    "429": ([lambda _: status(429, **{"retry-after": "0"})], {"429"}),
    "a list instead of a watch": ([lambda _: {"metadata": {}, "items": []}], {"cut"}),
    "silence": ([stream(BOOKMARK, stall)], {"timeout"}),
    "silence in a line": ([stream(HALF, stall)], {"timeout"}),
}


@pytest.mark.parametrize("name", BROKEN)
async def test_a_watch_that_breaks_loses_nothing(cluster: Cluster, tmp_path: Path, name: str) -> None:
    faults, kinds = BROKEN[name]
    await filled(cluster, "a", "b")
    cluster.faults.extend([lambda _: None, *faults])
    quick = msgspec.structs.replace(FAST, silence=0.15, answer=0.15)
    async with Following(cluster, tmp_path, pace=quick) as ours:
        await ours.has("a", "b")
        await cluster.delete("a")
        await filled(cluster, "c", "d")
        await ours.has("b", "c", "d")
        await eventually(lambda: not cluster.faults)
        await watching(cluster)
        await cluster.delete("d")
        await ours.has("b", "c")
        assert kinds <= set(ours.failures), ours.failures
        assert set(ours.failures) <= kinds | {"timeout"}, ours.failures


async def test_a_line_in_many_pieces(cluster: Cluster, tmp_path: Path) -> None:
    text = added("c", 102) + added("d", 103)
    pieces = [text[at : at + 7] for at in range(0, len(text), 7)]
    cluster.faults.extend([lambda _: None, stream(*pieces, stall)])
    async with Following(cluster, tmp_path) as ours:
        await ours.has("c", "d")


async def test_a_watch_goes_on_from_the_last_event(cluster: Cluster, tmp_path: Path) -> None:
    await filled(cluster, "a")
    async with Following(cluster, tmp_path) as ours:
        await ours.has("a")
        await watching(cluster)
        await filled(cluster, "b")
        await ours.has("a", "b")
        cluster.cut()
        await eventually(lambda: cluster.asked["watch"] == 2)
        assert [request.params.get("resourceVersion") for request in cluster.seen] == [None, "101", "102"]


async def test_a_bookmark_moves_the_version(cluster: Cluster, tmp_path: Path) -> None:
    await filled(cluster, "a")
    async with Following(cluster, tmp_path) as ours:
        await ours.has("a")
        await watching(cluster)
        cluster.version = 900
        await cluster.bookmark()
        await asyncio.sleep(0.05)
        cluster.forget()  # what was listed is forgotten; the bookmark is not
        cluster.cut()
        await filled(cluster, "b")
        await ours.has("a", "b")
        assert cluster.seen[-1].params["resourceVersion"] == "901"
        assert cluster.asked["list"] == 1


async def test_versions_of_another_time_end_in_a_list(cluster: Cluster, tmp_path: Path) -> None:
    """After a restore from a backup a version is never known again, and the API need not say 410."""
    await filled(cluster, "a")
    cluster.faults.extend([lambda _: None, *[lambda _: status(504, "Timeout")] * 3])
    async with Following(cluster, tmp_path) as ours:
        await ours.has("a")
        await watching(cluster)
        assert cluster.asked == {"list": 2, "watch": 4}


async def test_401_reads_the_configuration_again(cluster: Cluster, tmp_path: Path) -> None:
    await filled(cluster, "a")

    def renew(_: kmock.Request) -> Any:
        cluster.kubeconfig(tmp_path, token="renewed")
        return status(401)

    cluster.faults.extend([lambda _: None, renew])
    async with Following(cluster, tmp_path) as ours:
        await ours.has("a")
        await watching(cluster)
        assert cluster.seen[-1].headers["Authorization"] == "Bearer renewed"


async def test_401_for_several_watches_at_once(cluster: Cluster, tmp_path: Path) -> None:
    for number, namespace in enumerate("xyz"):
        await cluster.put(pod("a", ip(number), namespace=namespace))
    cluster.faults.extend([lambda _: status(401)] * 20)
    async with Following(cluster, tmp_path, namespaces=("x", "y", "z")) as ours:
        await ours.has("x/a", "y/a", "z/a")


async def test_tls_that_does_not_fit_is_a_failure_like_others(cluster: Cluster, tmp_path: Path) -> None:
    ours = Following(cluster, tmp_path)
    path = tmp_path / "kubeconfig"
    path.write_text(path.read_text().replace("http:", "https:"))
    async with ours:
        await eventually(lambda: bool(ours.discovery.healths) and ours.failures.get("unreachable", 0) > 2)
        path.write_text(path.read_text().replace("https:", "http:"))
        await ours.has()


async def test_the_service_account_of_a_pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("kubernetes.aio.config.incluster_config")
    for name, text in (("token", "first\n"), ("ca.crt", "x"), ("namespace", "llm\n")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(module, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr(module, "SERVICE_CERT_FILENAME", certifi_file())
    monkeypatch.setattr(kubernetes_api, "_NAMESPACE_FILE", tmp_path / "namespace")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "fd00::1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    async with kubernetes_api.KubernetesApi() as api:
        assert api.namespace == "llm"
        session = await api._current()
        assert session.configuration.host == "https://[fd00::1]:443"
        assert await api._authorization(session) == {"authorization": "bearer first"}


def certifi_file() -> str:
    """Any certificate will do."""
    return str(importlib.import_module("certifi").where())


async def test_an_api_that_refuses_everything_is_not_stormed(cluster: Cluster, tmp_path: Path) -> None:
    pace = msgspec.structs.replace(FAST, first=0.05, longest=10)
    cluster.faults.extend([lambda _: None, *[lambda _: event("ERROR", code=410)] * 1000])
    cluster.faults.extend([lambda _: None] * 10)
    begin = time.monotonic()
    async with Following(cluster, tmp_path, pace=pace) as ours:
        await asyncio.sleep(1)
        seconds = time.monotonic() - begin
        assert 3 <= sum(ours.failures.values()) <= 6 + seconds


async def test_the_api_says_how_long_to_wait(cluster: Cluster, tmp_path: Path) -> None:
    pace = msgspec.structs.replace(FAST, longest=0.3)
    cluster.faults.append(lambda _: status(429, **{"retry-after": "3600"}))
    begin = time.monotonic()
    async with Following(cluster, tmp_path, pace=pace) as ours:
        await ours.has()
        assert time.monotonic() - begin >= 0.3


async def test_pods_that_flap_are_told_together(cluster: Cluster, tmp_path: Path) -> None:
    await filled(cluster, "a", "b")
    async with Following(cluster, tmp_path, debounce_ms=100) as ours:
        await ours.has("a", "b")
        await watching(cluster)
        for number in range(41):
            await cluster.put(pod("a", ip(97), ready=number % 2 == 1))
            await asyncio.sleep(0.01)
        await ours.has("b")
        assert len(ours.told) <= 12


async def test_a_flap_within_the_moment_is_no_news(cluster: Cluster, tmp_path: Path) -> None:
    await filled(cluster, "a")
    async with Following(cluster, tmp_path, debounce_ms=200) as ours:
        await ours.has("a")
        await watching(cluster)
        await cluster.put(pod("a", ip(97), ready=False))
        await filled(cluster, "a")
        await asyncio.sleep(0.4)
        assert len(ours.told) == 1


async def test_an_address_that_is_used_again(cluster: Cluster, tmp_path: Path) -> None:
    await cluster.put(pod("old", "10.0.0.1", created="2026-01-01T00:00:00Z"))
    async with Following(cluster, tmp_path) as ours:
        await ours.has("old")
        await cluster.put(pod("new", "10.0.0.1", created="2026-01-02T00:00:00Z"))
        await ours.has("new")
        await cluster.delete("old")
        await filled(cluster, "z")
        await ours.has("new", "z")


async def test_a_pod_of_the_same_name_anew(cluster: Cluster, tmp_path: Path) -> None:
    await cluster.put(pod("engine-0", "10.0.0.1"))
    async with Following(cluster, tmp_path) as ours:
        await ours.has("engine-0")
        await watching(cluster)
        await cluster.delete("engine-0")
        await cluster.put(pod("engine-0", "fd00::2"))
        await eventually(lambda: list(ours.told[-1].by_address) == ["[fd00::2]:8000"])


async def test_one_bad_pod_hides_no_other(cluster: Cluster, tmp_path: Path) -> None:
    bad = pod("bad", annotations={"model.aibrix.ai/models": "{"})
    broken = pod("broken", "10.0.0.9")
    broken["status"]["conditions"] = "none"
    for each in (bad, broken):
        await cluster.put(each)
    await filled(cluster, "a")
    async with Following(cluster, tmp_path) as ours:
        await ours.has("a")
        assert ours.discovery.unusable == {"models": 1, "object": 1}
        await cluster.put(pod("bad", "10.0.0.8"))
        await ours.has("bad", "a")
        assert ours.discovery.unusable == {"object": 1}


Step = tuple[str, ...]
steps = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.sampled_from("abcde"), st.sampled_from("1234"), st.booleans()),
        st.tuples(st.just("delete"), st.sampled_from("abcde")),
        st.tuples(st.sampled_from(["cut", "cut", "forget", "bookmark", "wait", "half", "500", "gone"])),
    ),
    max_size=25,
)


async def play(cluster: Cluster, step: Sequence[Any]) -> None:
    match step:
        case "put", name, number, ready:
            await cluster.put(pod(name, ip(int(number)), ready=ready))
        case "delete", name if ("default", name) in cluster.objects:
            await cluster.delete(name)
        case ("cut",):
            cluster.cut()
        case ("forget",):
            cluster.forget()
            cluster.cut()
        case ("bookmark",):
            await cluster.bookmark()
        case ("wait",):
            await asyncio.sleep(0.005)
        case ("half" | "500" | "gone" as what,):
            faults: dict[str, Fault] = {
                "half": stream(HALF, abort),
                "500": lambda _: status(500),
                "gone": lambda _: status(410),
            }
            cluster.faults.append(faults[what])
            cluster.cut()


async def final(script: Sequence[Sequence[Any]]) -> tuple[Snapshot, Snapshot]:
    """What discovery has after a script, and what it should have."""
    async with Cluster() as cluster:
        await cluster.put(pod("a", ip(1)))
        pages = msgspec.structs.replace(FAST, page=2)
        with tempfile.TemporaryDirectory() as directory:
            async with Following(cluster, Path(directory), pace=pages, debounce_ms=1) as ours:
                for step in script:
                    await play(cluster, step)
                await cluster.put(pod("end", ip(200)))
                await eventually(lambda: ours.names is not None and "end" in ours.names)
        truth = Fleet(engines=ENGINES, qualified=False)
        truth.replace("default", [decode(msgspec.json.encode(each)) for each in cluster.objects.values()])
        return ours.told[-1], truth.snapshot()


# Not shrunk: an example that fails takes seconds to do so.
@settings(max_examples=60, phases=[Phase.explicit, Phase.generate])
@given(steps)
def test_any_history_with_any_cuts_ends_in_the_final_state(script: list[Sequence[Any]]) -> None:
    has, should = asyncio.run(final(script))
    assert has == should


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "kubernetes: ParserError"),
        ("{}", "ConfigException"),
        (json.dumps({"current-context": "x", "contexts": []}), "ConfigException"),
    ],
)
async def test_a_kubeconfig_that_cannot_be_used_ends_the_start(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "kubeconfig"
    path.write_text(text)
    with pytest.raises(SettingsError, match=message):
        await started(KubernetesSource(kubeconfig=path))


async def test_outside_of_a_cluster_without_a_kubeconfig(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(SettingsError, match="Service host/port is not set"):
        await started(KubernetesSource())


async def started(source: KubernetesSource) -> None:
    await anext(KubernetesDiscovery(source, engines=ENGINES).snapshots())


def test_backoff_doubles_up_to_a_longest_with_jitter() -> None:
    waits = Backoff(Pace(first=1, longest=5), random.Random(3))
    seen = [waits.next() for _ in range(5)]
    assert all(full / 2 <= wait <= full for wait, full in zip(seen, (1, 2, 4, 5, 5), strict=True))
    waits.reset()
    assert waits.next() <= 1
    assert len({Backoff(Pace(), random.Random(seed)).next() for seed in range(9)}) == 9


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_lines(size: int) -> None:
    text, lines = b"one\n\ntwo\r\n  \nthree\nfo", Lines()
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    assert [each.strip() for piece in pieces for each in lines.feed(piece)] == [b"one", b"two", b"three"]
    with pytest.raises(ApiError, match="in the middle of an event"):
        lines.end()
    lines.feed(b"\n")
    lines.end()


def test_a_line_without_end_is_given_up() -> None:
    lines = Lines(longest=10)
    lines.feed(b"12345\n1234567890")
    with pytest.raises(ApiError) as caught:
        lines.feed(b"1")
    assert caught.value.kind == "unreadable"
