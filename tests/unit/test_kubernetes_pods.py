"""What a pod says of itself, as endpoints: labels and annotations in, values out; and the fleet they come to."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import Any

import msgspec
import pytest
import structlog.testing
from hypothesis import given
from hypothesis import strategies as st

from envoy_extproc.discovery import pods
from envoy_extproc.discovery.fleet import ALL, Fleet
from envoy_extproc.discovery.pods import Mapped, Pod, PodError
from envoy_extproc.endpoints import Endpoint, Snapshot
from tests.support.cluster import LABEL, Object, pod

ENGINES = frozenset({"vllm", "sglang", "generic"})
PREFIX = "model.aibrix.ai/"


def decoded(each: Object) -> Pod:
    return pods.decode(json.dumps(each).encode())


def mapped(each: Object, *, qualified: bool = False) -> Mapped:
    return pods.mapped(decoded(each), engines=ENGINES, qualified=qualified)


def only(each: Object) -> Endpoint:
    (endpoint,) = mapped(each).endpoints
    return endpoint


def test_a_pod_with_a_name_alone() -> None:
    assert mapped(pod("a", "10.0.0.1", model="llama-3-8b")) == Mapped(
        (Endpoint(name="a", address="10.0.0.1:8000", models=("llama-3-8b",), labels={LABEL: "llama-3-8b"}),)
    )


def test_a_pod_that_says_everything() -> None:
    labels = {"port": "8001", "metric-port": "9000", "engine": "SGLang"}
    endpoint = only(pod("a", labels={PREFIX + key: value for key, value in labels.items()} | {"gpu": "a10"}))
    assert (endpoint.address, endpoint.metrics_port, endpoint.engine) == ("10.0.0.1:8001", 9000, "sglang")
    assert endpoint.labels["gpu"] == "a10"
    assert endpoint.labels[f"{PREFIX}engine"] == "SGLang"


@pytest.mark.parametrize(
    ("label", "annotations", "models"),
    [
        (None, {"name": "meta-llama/Llama-3-8B"}, ("meta-llama/Llama-3-8B",)),
        ("short", {"name": "long"}, ("short",)),
        ("", {"name": "long"}, ("long",)),
        ("short", {"models": '["a/b", "c"]'}, ("a/b", "c")),
        (None, {"models": '["a"]'}, ("a",)),
    ],
)
def test_names_of_models(label: str | None, annotations: Mapping[str, str], models: tuple[str, ...]) -> None:
    prefixed = {PREFIX + key: value for key, value in annotations.items()}
    assert only(pod("a", model=label, annotations=prefixed)).models == models


CONFIG = f"{PREFIX}config"
WRITTEN = '{\n  "profiles": {"default": {"routingStrategy": "random"}}\n}'


@pytest.mark.parametrize(
    ("labels", "annotations", "config"),
    [
        ({}, {}, None),
        ({}, {CONFIG: WRITTEN}, WRITTEN),
        ({}, {CONFIG: f"{WRITTEN}\n"}, WRITTEN),
        ({CONFIG: "short"}, {}, "short"),
        ({CONFIG: "short"}, {CONFIG: WRITTEN}, WRITTEN),
        ({CONFIG: "short"}, {CONFIG: " "}, "short"),
        ({CONFIG: ""}, {CONFIG: ""}, None),
    ],
)
def test_the_configuration_of_a_model(
    labels: Mapping[str, str], annotations: Mapping[str, str], config: str | None
) -> None:
    ports = {f"{PREFIX}port": "8000,8001"}
    endpoints = mapped(pod("a", labels=labels, annotations=ports | dict(annotations))).endpoints
    assert [each.config for each in endpoints] == [config, config]
    assert endpoints[0].labels == {LABEL: "m"} | dict(labels), "no label that the pod has not"


def test_another_configuration_is_another_endpoint() -> None:
    ours = fleet()
    assert ours.put(decoded(pod("a")))
    assert ours.put(decoded(pod("a", annotations={CONFIG: WRITTEN})))
    assert not ours.put(decoded(pod("a", annotations={CONFIG: WRITTEN, "other": "x"})))
    assert ours.put(decoded(pod("a", annotations={CONFIG: "{}"})))
    assert ours.put(decoded(pod("a")))


def test_a_pod_with_several_ports_is_as_many_endpoints() -> None:
    each = pod(
        "a", annotations={f"{PREFIX}port": "8000, 8001", f"{PREFIX}models": '["m", "n"]'}, labels={"x": "y"}
    )
    endpoints = mapped(each, qualified=True).endpoints
    assert [(each.name, each.address) for each in endpoints] == [
        ("default/a:8000", "10.0.0.1:8000"),
        ("default/a:8001", "10.0.0.1:8001"),
    ]
    assert {each.models for each in endpoints} == {("m", "n")}
    assert {each.labels["x"] for each in endpoints} == {"y"}


def test_other_annotations_are_no_labels() -> None:
    assert set(only(pod("a", annotations={"owner": "me"})).labels) == {LABEL}


@pytest.mark.parametrize(
    ("metric_ports", "expected"), [("9000", [9000, 9000]), ("9000,9001", [9000, 9001]), (None, [None, None])]
)
def test_metric_ports_of_several_ports(metric_ports: str | None, expected: list[int | None]) -> None:
    annotations = {f"{PREFIX}port": "8000,8001"}
    if metric_ports is not None:
        annotations[f"{PREFIX}metric-port"] = metric_ports
    assert [each.metrics_port for each in mapped(pod("a", annotations=annotations)).endpoints] == expected


@pytest.mark.parametrize(
    ("ip", "address"),
    [
        ("10.0.0.1", "10.0.0.1:8000"),
        ("fd00::1", "[fd00::1]:8000"),
        ("FD00:0:0::00A1", "[fd00::a1]:8000"),
        ("::ffff:10.0.0.1", "[::ffff:10.0.0.1]:8000"),
    ],
)
def test_addresses_come_as_envoy_writes_them(ip: str, address: str) -> None:
    assert only(pod("a", ip)).address == address


def changed(**changes: Any) -> Object:
    each = pod("a")
    for key, value in changes.items():
        each["status"][key] = value
    return each


@pytest.mark.parametrize(
    "each",
    [
        pod("a", ready=False),
        pod("a", phase="Pending"),
        pod("a", phase="Succeeded"),
        pod("a", deletionTimestamp="2026-01-01T00:00:00Z"),
        changed(podIP=""),
        changed(conditions=[]),
        changed(conditions=None),
        changed(conditions=[{"type": "Ready", "status": "Unknown"}]),
        changed(conditions=[{"type": "ContainersReady", "status": "True"}]),
        {"metadata": {"name": "a", "namespace": "default", "labels": {LABEL: "m"}}},
        pod("a", labels={"ray.io/node-type": "worker"}),
        pod("a", labels={"stormservice.orchestration.aibrix.ai/pod-group-index": "1"}),
        pod("a", ready=False, annotations={f"{PREFIX}models": "nonsense"}),
    ],
)
def test_who_is_not_listed(each: Object) -> None:
    assert mapped(each) == Mapped(())


@pytest.mark.parametrize(
    "labels",
    [
        {"ray.io/node-type": "head"},
        {"stormservice.orchestration.aibrix.ai/pod-group-index": "0"},
        {"stormservice.orchestration.aibrix.ai/pod-group-index": "x"},
    ],
)
def test_who_is_listed_all_the_same(labels: Mapping[str, str]) -> None:
    assert len(mapped(pod("a", labels=labels)).endpoints) == 1


@pytest.mark.parametrize(
    ("annotations", "reason", "text"),
    [
        ({"models": "m"}, "models", "no JSON list of names"),
        ({"models": '"m"'}, "models", "no JSON list of names"),
        ({"models": '["m", 1]'}, "models", "no JSON list of names"),
        ({"models": "[]"}, "models", "at least one model"),
        ({"models": '["m", "m"]'}, "models", "named twice"),
        ({"models": '[""]'}, "models", "must not be empty"),
        ({"models": '["a\\nb"]'}, "models", "control character"),
        ({"models": ""}, "models", "no JSON list of names"),
        ({"port": "http"}, "port", "'http' is no port"),
        ({"port": "0"}, "port", "'0' is no port"),
        ({"port": "65536"}, "port", "'65536' is no port"),
        ({"port": "٨٠"}, "port", "is no port"),
        ({"port": "8000,"}, "port", "'' is no port"),
        ({"port": "8000,8000"}, "port", "is already the name of"),
        ({"port": ",".join(map(str, range(1, 66)))}, "port", "names 65 ports, at most 64 can be"),
        ({"metric-port": "x"}, "metric-port", "'x' is no port"),
        ({"port": "1,2", "metric-port": "1,2,3"}, "metric-port", "names 3 ports for 2"),
    ],
)
def test_a_pod_that_makes_no_sense(annotations: Mapping[str, str], reason: str, text: str) -> None:
    each = pod("a", annotations={PREFIX + key: value for key, value in annotations.items()})
    with pytest.raises(PodError) as caught:
        mapped(each)
    assert caught.value.reason == reason
    assert text in str(caught.value)


@pytest.mark.parametrize("ip", ["host", "10.0.0", "fe80::1%eth0", "10.0.0.1:8000", "010.0.0.1"])
def test_an_address_that_makes_no_sense(ip: str) -> None:
    with pytest.raises(PodError) as caught:
        mapped(pod("a", ip))
    assert caught.value.reason == "address"


def test_a_pod_without_a_model() -> None:
    with pytest.raises(PodError, match=r"neither model\.aibrix\.ai/name nor model.aibrix.ai/models"):
        mapped(pod("a", model=None))


def test_an_engine_nobody_knows_is_read_as_one_that_says_nothing() -> None:
    found = mapped(pod("a", labels={f"{PREFIX}engine": "mystery"}))
    assert found.unknown_engine == "mystery"
    assert [each.engine for each in found.endpoints] == ["generic"]


@pytest.mark.parametrize(
    "broken",
    [{"status": 7}, {"metadata": {"labels": {"a": 1}}}, {"status": {"conditions": "x"}}],
)
def test_an_object_of_another_shape_is_known_by_name(broken: Mapping[str, Any]) -> None:
    each = pod("a", namespace="other")
    for key, value in broken.items():
        each[key] = each[key] | value if isinstance(value, dict) else value
    found = decoded(each)
    assert (found.metadata.namespace, found.metadata.name) == ("other", "a")
    with pytest.raises(PodError) as caught:
        pods.mapped(found, engines=ENGINES, qualified=False)
    assert caught.value.reason == "object"


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"metadata": 1}'])
def test_what_has_no_name_is_no_object(text: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        pods.decode(text)


# The fleet.


def fleet(*, qualified: bool = False) -> Fleet:
    return Fleet(engines=ENGINES, qualified=qualified)


def names(snapshot: Snapshot) -> list[str]:
    return [each.name for each in snapshot.endpoints]


def test_what_changes_nothing_is_no_change() -> None:
    ours = fleet()
    assert ours.put(decoded(pod("a")))
    first = ours.snapshot()
    assert not ours.put(decoded(pod("a", resourceVersion="7")))
    assert not ours.put(decoded(pod("b", ready=False)))
    assert ours.snapshot() == first
    assert not ours.remove(decoded(pod("b")))
    assert not ours.remove(decoded(pod("never seen")))
    assert ours.remove(decoded(pod("a")))
    assert names(ours.snapshot()) == []


def test_only_a_pod_that_changed_is_mapped_anew() -> None:
    ours = fleet()
    listed = [pod("a", resourceVersion="1"), pod("b", "10.0.0.2", resourceVersion="1")]
    assert ours.replace("default", map(decoded, listed))
    first = ours.snapshot().endpoints
    listed[1] = pod("b", "10.0.0.3", resourceVersion="2")
    assert ours.replace("default", map(decoded, listed))
    listed[0] = pod("a", resourceVersion="3")  # as a kubelet's heartbeat does
    assert not ours.replace("default", map(decoded, listed))
    again = ours.snapshot().endpoints
    assert again[0] is first[0]
    assert again[1].address == "10.0.0.3:8000"


def test_a_list_replaces_its_own_scope_alone() -> None:
    ours = fleet(qualified=True)
    ours.replace("x", [decoded(pod("a", "10.0.0.1", namespace="x"))])
    ours.replace("y", [decoded(pod("a", "10.0.0.2", namespace="y"))])
    assert names(ours.snapshot()) == ["x/a", "y/a"]
    assert not ours.replace("x", [decoded(pod("a", "10.0.0.1", namespace="x"))])
    assert ours.replace("x", [])
    assert names(ours.snapshot()) == ["y/a"]
    assert ours.replace(ALL, [decoded(pod("b", namespace="z"))])
    assert names(ours.snapshot()) == ["z/b"]


def test_one_bad_pod_hides_no_other_and_is_told_once_per_reason() -> None:
    ours = fleet()
    bad = {f"{PREFIX}port": "x"}
    with structlog.testing.capture_logs() as logs:
        ours.replace(
            "default",
            [decoded(pod("a")), decoded(pod("bad", annotations=bad)), decoded(pod("b", "10.0.0.2"))],
        )
        assert names(ours.snapshot()) == ["a", "b"]
        assert ours.unusable == {"port": 1}
        ours.put(decoded(pod("bad", resourceVersion="2", annotations=bad)))
        ours.put(decoded(pod("bad", model=None)))
        assert ours.unusable == {"models": 1}
        ours.put(decoded(pod("bad", "10.0.0.3")))
        assert (names(ours.snapshot()), ours.unusable) == (["a", "b", "bad"], {})
        ours.put(decoded(pod("bad", annotations=bad)))
        ours.remove(decoded(pod("bad")))
    assert [(log["pod"], log["reason"]) for log in logs] == [
        ("default/bad", "port"),
        ("default/bad", "models"),
    ]
    assert ours.unusable == {}


def test_an_unknown_engine_is_told_once() -> None:
    ours = fleet()
    with structlog.testing.capture_logs() as logs:
        for number in range(3):
            ours.put(decoded(pod(f"a{number}", f"10.0.0.{number}", labels={f"{PREFIX}engine": "mystery"})))
    assert [(log["event"], log["engine"]) for log in logs] == [("pod_engine_unknown", "mystery")]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_newer_pod_has_the_address(order: tuple[int, ...]) -> None:
    claims = [
        pod("old", created="2026-01-01T00:00:00Z"),
        pod("new", created="2026-01-02T00:00:00Z"),
        pod("older", created="2025-01-01T00:00:00Z"),
    ]
    ours = fleet()
    with structlog.testing.capture_logs() as logs:
        for index in order:
            ours.put(decoded(claims[index]))
        assert names(ours.snapshot()) == ["new"]
        assert names(ours.snapshot()) == ["new"]
        ours.remove(decoded(claims[1]))
        assert names(ours.snapshot()) == ["old"]
    assert {log["event"] for log in logs} == {"pod_address_taken"}
    assert ("new", "old") in {(log["by"], log["left_out"]) for log in logs} or order[0] == 2
    assert len({(log["by"], log["left_out"]) for log in logs}) == len(logs), "told once"


pod_lists = st.lists(
    st.builds(
        pod,
        st.sampled_from("abcd"),
        st.sampled_from(["10.0.0.1", "10.0.0.2", "fd00::1"]),
        ready=st.booleans(),
        created=st.sampled_from(["2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"]),
        model=st.sampled_from(["m", "n", None]),
    ),
    max_size=12,
)


@given(pod_lists, st.lists(st.sampled_from("abcd")))
def test_the_way_to_a_fleet_does_not_matter(seen: list[Object], gone: list[str]) -> None:
    one, state = fleet(), {}
    for each in seen:
        one.put(decoded(each))
        state[each["metadata"]["name"]] = each
    for name in gone:
        one.remove(decoded(pod(name)))
        state.pop(name, None)
    other = fleet()
    other.replace("default", map(decoded, reversed(state.values())))
    assert one.snapshot() == other.snapshot()
    assert one.unusable == other.unusable
    addresses = [each.address for each in one.snapshot().endpoints]
    assert len(set(addresses)) == len(addresses)
