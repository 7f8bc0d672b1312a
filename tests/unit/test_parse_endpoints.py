"""The list of endpoints as people write it: what is taken, and how a mistake is named."""

from __future__ import annotations

from typing import Any

import pytest

from envoy_extproc.discovery.parse import EndpointError, parse_endpoints, place
from envoy_extproc.endpoints import Endpoint

ENGINES = ("vllm", "other")


def parse(*items: Any) -> tuple[Endpoint, ...]:
    return parse_endpoints(list(items), engines=ENGINES)


def item(**changes: Any) -> dict[str, Any]:
    return {"address": "10.0.0.1:8000", "models": ["m"], **changes}


def test_a_whole_item() -> None:
    whole = item(name="pod-a", models=["m", "lora"], engine="other", labels={"gpu": "a10", "empty": ""})
    assert parse(whole) == (
        Endpoint(
            name="pod-a",
            address="10.0.0.1:8000",
            models=("m", "lora"),
            engine="other",
            labels={"gpu": "a10", "empty": ""},
        ),
    )


def test_what_may_be_left_out() -> None:
    assert parse(item()) == (Endpoint(name="10.0.0.1:8000", address="10.0.0.1:8000", models=("m",)),)


def test_metrics_can_be_on_another_port() -> None:
    assert parse(item(metrics_port=8002))[0].metrics_port == 8002


def test_under_its_key_or_bare() -> None:
    assert parse_endpoints({"endpoints": [item()]}, engines=ENGINES) == parse(item())


def test_nobody_is_a_list_too() -> None:
    assert parse() == ()


def test_the_order_is_kept() -> None:
    addresses = ["10.0.0.2:1", "10.0.0.1:65535", "10.0.0.2:8000"]
    assert [endpoint.address for endpoint in parse(*(item(address=each) for each in addresses))] == addresses


@pytest.mark.parametrize(
    ("written", "address"),
    [
        ("127.0.0.1:1", "127.0.0.1:1"),
        ("[::1]:8000", "[::1]:8000"),
        ("[2001:DB8:0:0::1]:8000", "[2001:db8::1]:8000"),
        ("[::ffff:10.0.0.1]:8000", "[::ffff:10.0.0.1]:8000"),
        ("10.0.0.1:08000", "10.0.0.1:8000"),
    ],
)
def test_addresses_come_as_envoy_writes_them(written: str, address: str) -> None:
    assert parse(item(address=written))[0].address == address


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("10.0.0.1", "not ip:port"),
        ("10.0.0.1:", "not ip:port"),
        ("10.0.0.1:http", "not ip:port"),
        ("10.0.0.1:-1", "not ip:port"),
        ("10.0.0.1:123456", "not ip:port"),
        ("http://10.0.0.1:8000", "not ip:port"),
        ("::1:8000", "not ip:port"),
        ("10.0.0.1:8000\n", "control character"),
        ("10.0.0.1:٨", "not ip:port"),
        ("10.0.0.1:0", "port outside 1 to 65535"),
        ("10.0.0.1:65536", "port outside 1 to 65535"),
        (
            "pod-a.default.svc:8000",
            "host name cannot stand here, because Envoy's override_host compares addresses",
        ),
        (":8000", "no IP address"),
        ("10.0.0:8000", "no IP address"),
        ("10.0.0.256:8000", "no IP address"),
        ("010.0.0.1:8000", "no IP address"),
        ("[10.0.0.1]:8000", "no IP address"),
        ("[fe80::1%eth0]:8000", "zone"),
        ("", "must not be empty"),
        (8000, "must be text, not a number"),
        ([["::1"]], "must be text, not a list"),
    ],
)
def test_an_address_that_cannot_be_one(address: Any, why: str) -> None:
    with pytest.raises(EndpointError) as caught:
        parse(item(), item(address="10.0.0.2:1"), item(address=address))
    assert str(caught.value).startswith("endpoints[2].address: ")
    assert why in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"adress": "x"},
            "endpoints[0].adress: unknown key; known are address, engine, labels, metrics_port, models, name",
        ),
        (
            {7: "x"},
            "endpoints[0].7: unknown key; known are address, engine, labels, metrics_port, models, name",
        ),
        ({"name": ""}, "endpoints[0].name: must not be empty"),
        ({"name": None}, "endpoints[0].name: must be text, not nothing; quote it if it is meant as text"),
        ({"name": "a\tb"}, "endpoints[0].name: 'a\\tb' has a control character"),
        ({"models": []}, "endpoints[0].models: must name at least one model"),
        ({"models": "m"}, "endpoints[0].models: must be a list of model names, not text"),
        ({"models": ["m", " "]}, "endpoints[0].models[1]: must not be empty"),
        ({"models": ["m\x00"]}, "endpoints[0].models[0]: 'm\\x00' has a control character"),
        ({"models": ["m\ud800"]}, "endpoints[0].models[0]: 'm\\ud800' has a control character"),
        (
            {"models": [True]},
            "endpoints[0].models[0]: must be text, not a boolean; quote it if it is meant as text",
        ),
        ({"models": ["a", "b", "a"]}, "endpoints[0].models[2]: 'a' is named twice"),
        ({"metrics_port": "8002"}, "endpoints[0].metrics_port: must be a port from 1 to 65535, not '8002'"),
        ({"metrics_port": 0}, "endpoints[0].metrics_port: must be a port from 1 to 65535, not 0"),
        ({"metrics_port": True}, "endpoints[0].metrics_port: must be a port from 1 to 65535, not True"),
        ({"engine": "vlm"}, "endpoints[0].engine: 'vlm' is not known; known are other, vllm"),
        ({"labels": ["x"]}, "endpoints[0].labels: must be a mapping of text to text, not a list"),
        (
            {"labels": {"x": 1}},
            "endpoints[0].labels.x: must be text, not a number; quote it if it is meant as text",
        ),
    ],
)
def test_a_mistake_names_its_place(changes: dict[Any, Any], message: str) -> None:
    with pytest.raises(EndpointError) as caught:
        parse({**item(), **changes})
    assert str(caught.value) == message
    assert f"{place(caught.value.path)}: {caught.value.reason}" == message


@pytest.mark.parametrize("key", ["address", "models"])
def test_what_may_not_be_left_out(key: str) -> None:
    without = item()
    del without[key]
    with pytest.raises(EndpointError, match=rf"^endpoints\[0\].{key}: is missing$"):
        parse(without)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "endpoints: must be a list, not nothing"),
        ("text", "endpoints: must be a list, not text"),
        ({}, "endpoints: must be a list, not nothing"),
        ({"endpoints": {"a": 1}}, "endpoints: must be a list, not a mapping"),
        ({"endpoint": []}, "endpoint: unknown key; the only one here is endpoints"),
        (
            ["10.0.0.1:8000"],
            "endpoints[0]: must be a mapping with address, engine, labels, metrics_port, models, name, not text",
        ),
    ],
)
def test_what_is_no_list_of_endpoints(data: Any, message: str) -> None:
    with pytest.raises(EndpointError) as caught:
        parse_endpoints(data, engines=ENGINES)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (
            {"name": "a", "address": "10.0.0.2:1"},
            "endpoints[1].name: 'a' is already the name of endpoints[0]",
        ),
        ({"name": "b"}, "endpoints[1].address: '10.0.0.1:8000' is already the address of endpoints[0]"),
        (
            {"name": "b", "address": "10.0.0.1:08000"},
            "endpoints[1].address: '10.0.0.1:8000' is already the address of endpoints[0]",
        ),
    ],
)
def test_names_and_addresses_are_unique(second: dict[str, Any], message: str) -> None:
    with pytest.raises(EndpointError) as caught:
        parse(item(name="a"), item(**second))
    assert str(caught.value) == message
