"""The configuration: what it becomes, and the sentence that names the key which is wrong."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from envoy_extproc.engines.scraper import ScrapeSettings
from envoy_extproc.exchange.exchange import ExchangeSettings
from envoy_extproc.scheduling.registry import POLICIES
from envoy_extproc.server import configured
from envoy_extproc.server.director import RoutingRules
from envoy_extproc.settings import ENV_PREFIX, Settings, SettingsError, load, parse

ENDPOINTS: dict[str, Any] = {
    "static": {"endpoints": [{"name": "a", "address": "10.0.0.1:8000", "models": ["m"]}]}
}
LEAST: dict[str, Any] = {"discovery": ENDPOINTS}


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.upper().startswith(ENV_PREFIX):
            monkeypatch.delenv(name)


def parsed(data: Mapping[str, Any]) -> Settings:
    return parse(data, policies=POLICIES)


def refusal(data: Mapping[str, Any]) -> list[str]:
    with pytest.raises(SettingsError) as refused:
        parsed(data)
    return str(refused.value).splitlines()


def test_the_least_configuration() -> None:
    settings = parsed(LEAST)
    assert settings.server.listen == "0.0.0.0:9002"
    assert settings.server.max_body_bytes == 33_554_432
    assert settings.routing.policy == "least-request"
    assert settings.responses.accounting == "auto"
    assert settings.fail_open is True


@pytest.mark.parametrize(
    ("section", "wrong"),
    [
        ({"nope": 1}, "configuration: nope: unknown key"),
        ({"server": {"nope": 1}}, "configuration: server.nope: unknown key"),
        ({"server": {"listen": "9002"}}, "configuration: server.listen: must be host:port"),
        ({"server": {"listen": ":9002"}}, "configuration: server.listen: must be host:port"),
        ({"server": {"listen": "a:70000"}}, "configuration: server.listen: must be host:port"),
        ({"server": {"listen": "a:-1"}}, "configuration: server.listen: must be host:port"),
        (
            {"server": {"tls": {"cert_file": "c"}}},
            "configuration: server.tls.key_file: Field required",
        ),
        (
            {"routing": {"policy": "best"}},
            f"configuration: routing.policy: no policy 'best'; there are {', '.join(POLICIES)}",
        ),
        (
            {"models": {"m": {"policy": "best"}}},
            f"configuration: models.m.policy: no policy 'best'; there are {', '.join(POLICIES)}",
        ),
        ({"models": {"m": {"nope": 1}}}, "configuration: models.m.nope: unknown key"),
        ({"limits": {"rpm": 1}}, "configuration: limits.rpm: unknown key"),
        ({"auth": {"mode": "api-key"}}, "configuration: auth.mode: Input should be 'none' or 'header'"),
        (
            {"envoy": {"endpoints_file": "pods.yaml"}},
            "configuration: envoy.endpoints_file: must end in .json",
        ),
        (
            {"discovery": {}},
            "configuration: discovery: give `static` or `kubernetes`: nobody can be chosen otherwise",
        ),
        ({"discovery": {"static": {}}}, "configuration: discovery.static: give either `endpoints` or `file`"),
        ({"_env_file": "x"}, "configuration: _env_file: unknown key"),
        ({"_cli_parse_args": True}, "configuration: _cli_parse_args: unknown key"),
    ],
)
def test_what_is_wrong_is_named(section: dict[str, Any], wrong: str) -> None:
    assert refusal(LEAST | section) == [wrong]


@pytest.mark.parametrize(
    "section",
    [
        {"server": {"drain_seconds": -1}},
        {"server": {"drain_seconds": float("nan")}},
        {"server": {"drain_seconds": "soon"}},
        {"server": {"max_body_bytes": 0}},
        {"server": {"debug_token": "short"}},
        {"routing": {"tries": 0}},
        {"engines": {"scrape_interval_ms": 1}},
        {"responses": {"accounting": "lua"}},
        {"envoy": {"fail_open": "maybe"}},
        {"server": None},
        {"server": []},
    ],
)
def test_values_out_of_bounds_are_refused(section: dict[str, Any]) -> None:
    (name,) = section
    (line,) = {line.split(": ")[1].split(".")[0] for line in refusal(LEAST | section)}
    assert line == name


def test_the_parts_have_the_same_defaults() -> None:
    settings = parsed(LEAST)
    assert configured.scraping(settings) == ScrapeSettings()
    assert configured.rules(settings) == RoutingRules()
    assert configured.exchange(settings) == ExchangeSettings()


def test_everything_wrong_is_said_at_once() -> None:
    assert len(refusal(LEAST | {"server": {"nope": 1}, "routing": {"tries": 0}, "other": 1})) == 3


def test_a_secret_is_not_repeated() -> None:
    assert "hunter2" not in "".join(refusal(LEAST | {"server": {"debug_token": "hunter2"}}))
    assert "hunter2hunter2" not in repr(parsed(LEAST | {"server": {"debug_token": "hunter2hunter2"}}))


@pytest.mark.parametrize(("value", "is_open"), [("auto", True), (True, True), (False, False)])
def test_fail_open(value: object, is_open: bool) -> None:
    assert parsed(LEAST | {"envoy": {"fail_open": value}}).fail_open is is_open


@pytest.mark.parametrize(("mode", "is_open"), [("none", True), ("header", False)])
def test_who_relies_on_us_fails_closed(mode: str, is_open: bool) -> None:
    assert parsed(LEAST | {"auth": {"mode": mode}}).fail_open is is_open


@pytest.mark.parametrize("address", ["[::]:9002", "localhost:1", "10.0.0.1:0"])
def test_addresses(address: str) -> None:
    assert parsed(LEAST | {"server": {"listen": address}}).server.listen == address


# -- environment ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "path", "expected"),
    [
        ("SERVER__LISTEN", "1.1.1.1:5", ("server", "listen"), "1.1.1.1:5"),
        ("ROUTING__POLICY", "random", ("routing", "policy"), "random"),
        ("ROUTING__ALLOW_PINNING", "true", ("routing", "allow_pinning"), True),
        ("ENGINES__SCRAPE_INTERVAL_MS", "50", ("engines", "scrape_interval_ms"), 50),
        ("ENVOY__FAIL_OPEN", "false", ("envoy", "fail_open"), False),
        ("ENVOY__SERVERS", '["a:1"]', ("envoy", "servers"), ("a:1",)),
        ("ENVOY__ENDPOINTS_FILE", "pods.json", ("envoy", "endpoints_file"), Path("pods.json")),
    ],
)
def test_the_environment_wins_over_the_file(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, path: tuple[str, str], expected: object
) -> None:
    monkeypatch.setenv(ENV_PREFIX + name, value)
    data = LEAST | {
        "server": {"listen": "9.9.9.9:9", "drain_seconds": 7},
        "routing": {"policy": "round-robin", "tries": 2},
    }
    settings = parsed(data)
    section, key = path
    assert getattr(getattr(settings, section), key) == expected
    assert (settings.server.drain_seconds, settings.routing.tries) == (7, 2)  # what it does not name stays


def test_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_PREFIX + "DISCOVERY__STATIC__FILE", "endpoints.yaml")
    settings = load(None, policies=POLICIES)
    assert settings.discovery.static is not None
    assert settings.discovery.static.file == Path("endpoints.yaml")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SERVICE_HOST", "10.96.0.1"),
        ("SERVICE_PORT", "9002"),
        ("SERVICE_PORT_GRPC", "9002"),
        ("PORT", "tcp://10.96.0.1:9002"),
        ("PORT_9002_TCP", "tcp://10.96.0.1:9002"),
        ("PORT_9002_TCP_PROTO", "tcp"),
        ("PORT_9002_TCP_PORT", "9002"),
        ("PORT_9002_TCP_ADDR", "10.96.0.1"),
        ("SERVER_SERVICE_HOST", "10.96.0.1"),  # of a Service called envoy-extproc-server
        ("SERVER_PORT", "tcp://10.96.0.1:9002"),
    ],
)
def test_what_kubernetes_tells_of_services_is_not_ours(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    expected = parsed(LEAST)
    monkeypatch.setenv(ENV_PREFIX + name, value)
    assert parsed(LEAST) == expected


def test_a_whole_section_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_PREFIX + "ROUTING", '{"policy": "random"}')
    assert parsed(LEAST).routing.policy == "random"


def test_names_in_the_environment_have_no_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_PREFIX + "routing__policy", "random")
    assert parsed(LEAST).routing.policy == "random"


@pytest.mark.parametrize(
    ("name", "value", "wrong"),
    [
        ("NOPE__X", "1", "ENVOY_EXTPROC_NOPE__X: unknown key"),
        ("nope__x", "1", "ENVOY_EXTPROC_nope__x: unknown key"),
        ("SERVER_PORT__X", "1", "ENVOY_EXTPROC_SERVER_PORT__X: unknown key"),
        ("SERVER__NOPE", "1", "server.nope: unknown key"),
        ("ROUTING__POLICY", "best", "routing.policy: no policy 'best'"),
        ("ENVOY__SERVERS", "a:1", "envoy"),
        ("SERVER", "not json", "server"),
    ],
)
def test_what_is_wrong_in_the_environment_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, wrong: str
) -> None:
    monkeypatch.setenv(ENV_PREFIX + name, value)
    (line,) = refusal(LEAST)
    assert wrong in line


# -- file ----------------------------------------------------------------------------------------------------------

FILE = "discovery: {static: {file: e.yaml}}\nmodels: {llama: {policy: random}}\n"


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(FILE)
    assert load(path, policies=POLICIES).models["llama"].policy == "random"


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        (b"", "discovery: Field required"),
        (b"[]", "must hold sections"),
        (b"7", "must hold sections"),
        (b"1: 2", "must hold sections"),
        (b"a: [", "not YAML"),
        (b"\xff\xfe\xff", "not YAML"),
        (b"!!python/object:os.system {}", "not YAML"),
        (FILE.encode() + b"nope: 1", "nope: unknown key"),
    ],
)
def test_a_file_that_is_wrong(tmp_path: Path, text: bytes, wrong: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(text)
    with pytest.raises(SettingsError, match=wrong) as refused:
        load(path, policies=POLICIES)
    assert str(refused.value).startswith(str(path))


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="No such file"):
        load(tmp_path / "none.yaml", policies=POLICIES)
