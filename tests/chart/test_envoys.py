"""The chart's two Envoys: what they are told is what `config envoy` and the examples say."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from envoy_extproc.envoy.bootstrap import BootstrapOptions, as_dict, native_lua
from envoy_extproc.simulation.stack import envoy_binary
from tests.chart.values import SWITCHES, merged
from tests.support.helm import CHART, FULL, NAMESPACE, Json, found, template

EXAMPLES = Path(__file__).parents[2] / "examples" / "envoy-gateway"
ENVOY = f"{FULL}-envoy"


def _bootstrap(values: Json | None = None) -> Json:
    config_map = found(template(merged(SWITCHES["envoy"], values or {})), "ConfigMap", ENVOY)
    made: Json = yaml.safe_load(config_map["data"]["envoy.yaml"])
    return made


def _manager(bootstrap: Json) -> Json:
    manager: Json = bootstrap["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0][
        "typed_config"
    ]
    return manager


def test_the_script_is_that_of_the_package() -> None:
    objects = template(merged(SWITCHES["envoy"], SWITCHES["gateway"]))
    for name, key in ((ENVOY, "native.lua"), (f"{FULL}-native-lua", "lua")):
        assert found(objects, "ConfigMap", name)["data"][key] == native_lua()


def test_envoy_takes_its_bootstrap(tmp_path: Path) -> None:
    made = _bootstrap()
    lua = _manager(made)["http_filters"][0]["typed_config"]["default_source_code"]
    assert lua == {"filename": "/etc/envoy/native.lua"}
    lua["filename"] = str(CHART / "files" / "native.lua")
    (tmp_path / "envoy.yaml").write_text(yaml.safe_dump(made), "utf-8")
    arguments = ("--mode", "validate", "--config-path", tmp_path / "envoy.yaml", "--log-level", "error")
    done = subprocess.run([envoy_binary(), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_it_is_the_bootstrap_of_config_envoy() -> None:
    values = {"config": {"routing": {"tries": 5}, "server": {"max_body_bytes": 1_048_577}}}
    made = _bootstrap(
        merged(values, {"config": {"envoy": {"message_timeout_seconds": 2.5, "fail_open": False}}})
    )
    server = f"{FULL}.{NAMESPACE}.svc.cluster.local:9002"
    options = BootstrapOptions(
        listen="0.0.0.0:8080",
        admin="127.0.0.1:9901",
        servers=(server, server),
        endpoints=(),
        fail_open=False,
        max_body_bytes=1_048_577,
        tries=5,
        message_timeout=2.5,
    )
    ours = as_dict(options)
    _manager(ours)["http_filters"][0]["typed_config"]["default_source_code"] = {
        "filename": "/etc/envoy/native.lua"
    }
    pods, *servers = ours["static_resources"]["clusters"]
    for cluster in servers:  # one name, of all of them
        del cluster["load_assignment"]["endpoints"][0]["lb_endpoints"][1]
    addresses = [(f"llama.{NAMESPACE}.svc.cluster.local", 8000), ("qwen.other.svc.cluster.local", 9000)]
    hosts = [
        {"endpoint": {"address": {"socket_address": {"address": address, "port_value": port}}}}
        for address, port in addresses
    ]
    pods |= {"type": "STRICT_DNS", "dns_refresh_rate": "1s"}
    pods["load_assignment"]["endpoints"] = [{"lb_endpoints": hosts}]
    *clusters, admin = made["static_resources"]["clusters"]
    listener, stats = made["static_resources"]["listeners"]
    assert clusters == ours["static_resources"]["clusters"]
    assert [listener] == ours["static_resources"]["listeners"]
    assert made["admin"] == ours["admin"]
    assert (admin["name"], stats["name"]) == ("admin", "stats")


def test_of_envoys_admin_port_only_two_pages_can_be_seen() -> None:
    bootstrap = _bootstrap()
    stats = bootstrap["static_resources"]["listeners"][1]
    routes = stats["filter_chains"][0]["filters"][0]["typed_config"]["route_config"]["virtual_hosts"][0][
        "routes"
    ]
    assert [each["match"] for each in routes] == [{"path": "/ready"}, {"path": "/stats/prometheus"}]
    assert bootstrap["admin"]["address"]["socket_address"]["address"] == "127.0.0.1"


def test_envoys_ports_are_those_of_its_bootstrap() -> None:
    objects = template(SWITCHES["envoy"])
    (container,) = found(objects, "Deployment", ENVOY)["spec"]["template"]["spec"]["containers"]
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    listeners = _bootstrap()["static_resources"]["listeners"]
    assert list(ports.values()) == [each["address"]["socket_address"]["port_value"] for each in listeners]
    assert {each["targetPort"] for each in found(objects, "Service", ENVOY)["spec"]["ports"]} == ports.keys()


@pytest.mark.parametrize(("said", "open_"), [(None, True), ("auto", True), (True, True), (False, False)])
def test_fail_open_is_what_the_server_makes_of_it(said: Any, open_: bool) -> None:
    values = {} if said is None else {"config": {"envoy": {"fail_open": said}}}
    assert _manager(_bootstrap(values))["http_filters"][1]["typed_config"]["failure_mode_allow"] is open_
    policy = found(template(merged(SWITCHES["gateway"], values)), "EnvoyExtensionPolicy")
    assert policy["spec"]["extProc"][0]["failOpen"] is open_


def _examples(*names: str) -> list[Json]:
    return [each for name in names for each in yaml.safe_load_all((EXAMPLES / name).read_text("utf-8"))]


def _renamed(each: Any, names: dict[str, str]) -> Any:
    if isinstance(each, dict):
        return {key: _renamed(value, names) for key, value in each.items()}
    if isinstance(each, list):
        return [_renamed(value, names) for value in each]
    return names.get(each, each) if isinstance(each, str) else each


def _specs(objects: list[Json], names: dict[str, str]) -> dict[tuple[str, str], Any]:
    return {
        (each["kind"], names.get(each["metadata"]["name"], each["metadata"]["name"])): _renamed(
            each["spec"], names
        )
        for each in objects
        if "gateway" in each["apiVersion"]
    }


def test_the_resources_are_those_of_the_examples() -> None:
    values = {
        "config": {"routing": {"clear_route_cache": True}},
        "envoyGateway": {
            "enabled": True,
            "gatewayClass": {"create": True, "name": "envoy-extproc"},
            "gateway": {"name": "inference"},
            "pool": {"service": "engines"},
            "models": [{"name": "llama-3-8b", "service": "llama-3-8b", "aliases": ["llama-3-8b-sql"]}],
        },
    }
    ours = _specs(
        template(values),
        {FULL: "one", "inference": "one", f"{FULL}-native-lua": "lua", f"{FULL}-llama-3-8b": "llama-3-8b"},
    )
    names = dict.fromkeys(("inference", "all-models", "envoy-extproc"), "one") | {
        "envoy-extproc-native-lua": "lua"
    }
    theirs = _specs(
        _examples(
            "gateway.yaml", "extension.yaml", "route-all-models.yaml", "route-per-model.yaml", "traffic.yaml"
        ),
        names,
    )
    del theirs["BackendTrafficPolicy", "llama-3-8b"]  # what one model has of its own is left to its owner
    ours["GatewayClass", "one"] = ours.pop(("GatewayClass", "envoy-extproc"))
    ours["Gateway", "one"]["gatewayClassName"] = "one"
    assert ours == theirs


def test_the_gateway_is_told_what_the_bootstrap_says() -> None:
    """Where both can say it: the modes of ext_proc, what is read and written, and what clients may not say."""
    objects = template(SWITCHES["gateway"])
    (processor,) = found(objects, "EnvoyExtensionPolicy")["spec"]["extProc"]
    ours = _manager(_bootstrap())
    filter_ = ours["http_filters"][1]["typed_config"]
    assert (
        processor["processingMode"]["request"]["body"].upper()
        == filter_["processing_mode"]["request_body_mode"]
    )
    assert "body" not in processor["processingMode"]["response"]
    assert filter_["processing_mode"]["response_body_mode"] == "NONE"
    assert processor["processingMode"]["response"]["attributes"] == filter_["response_attributes"]
    assert processor["processingMode"]["allowModeOverride"] is filter_["allow_mode_override"] is True
    options = filter_["metadata_options"]
    assert processor["metadata"] == {
        "accessibleNamespaces": options["forwarding_namespaces"]["untyped"],
        "writableNamespaces": options["receiving_namespaces"]["untyped"],
    }
    assert processor["messageTimeout"] == filter_["message_timeout"]
    removed = found(objects, "ClientTrafficPolicy")["spec"]["headers"]["earlyRequestHeaders"]["remove"]
    mutations = ours["early_header_mutation_extensions"][0]["typed_config"]["mutations"]
    assert {each["remove"] for each in mutations} < set(removed)
    retry = found(objects, "BackendTrafficPolicy")["spec"]["retry"]
    route = ours["route_config"]["virtual_hosts"][0]["routes"][0]["route"]
    assert ",".join(retry["retryOn"]["triggers"]) == route["retry_policy"]["retry_on"]
    assert retry["numRetries"] == route["retry_policy"]["num_retries"]


def test_a_shared_gateway_keeps_its_other_routes() -> None:
    objects = template(SWITCHES["gateway-shared"])
    assert not {each["kind"] for each in objects} & {"Gateway", "GatewayClass", "EnvoyProxy"}
    for kind in ("EnvoyExtensionPolicy", "BackendTrafficPolicy"):
        (target,) = found(objects, kind)["spec"]["targetRefs"]
        assert (target["kind"], target["name"]) == ("HTTPRoute", FULL)
    assert "lua" not in found(objects, "EnvoyExtensionPolicy")["spec"]


def test_the_backends_of_the_gateway_are_services_that_there_are() -> None:
    objects = template(SWITCHES["gateway"])
    service = found(objects, "Service")
    ports = {each["port"] for each in service["spec"]["ports"]}
    (processor,) = found(objects, "EnvoyExtensionPolicy")["spec"]["extProc"]
    sinks = found(objects, "EnvoyProxy")["spec"]["telemetry"]["accessLog"]["settings"][0]["sinks"]
    for backend in (*processor["backendRefs"], *sinks[0]["als"]["backendRefs"]):
        assert backend["name"] == FULL
        assert backend["port"] in ports
    (pool,) = found(objects, "HTTPRoute")["spec"]["rules"][0]["backendRefs"]
    assert pool["port"] in {each["port"] for each in found(objects, "Service", pool["name"])["spec"]["ports"]}
