"""The examples as they stand: every field is one that its schema knows, and they fit each other and what we print."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from lupa import lua51

from envoy_extproc.discovery.pods import decode, mapped
from envoy_extproc.envoy.bootstrap import native_lua
from envoy_extproc.openai import routes
from envoy_extproc.settings import KubernetesSource, Routing, Server
from tests.support.envoy_gateway import Places, bootstrap, documents
from tests.support.schemas.check import problems

Json = dict[str, Any]

EXAMPLES = Path(__file__).parents[2] / "examples"
GATEWAY = EXAMPLES / "envoy-gateway"
VLLM = EXAMPLES / "vllm"
READMES = sorted(EXAMPLES.rglob("README.md"))


def _all() -> list[tuple[str, Json]]:
    """Every Kubernetes resource, and those that stand as text in a ConfigMap, with a name for the test."""
    found: list[tuple[str, Json]] = []
    for file in sorted(EXAMPLES.rglob("*.yaml")):
        for each in documents(file):
            if "kind" in each:
                inner = [yaml.safe_load(text) for text in each.get("data", {}).values()]
                found += [(f"{file.relative_to(EXAMPLES)} {one['kind']}", one) for one in (each, *inner)]
    return found


RESOURCES = _all()


def _one(kind: str, *files: Path) -> Json:
    (found,) = [each for each in documents(*files) if each["kind"] == kind]
    return found


# -- fields ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resource", [each for _, each in RESOURCES], ids=[name for name, _ in RESOURCES])
def test_every_field_is_one_that_its_schema_knows(resource: Json) -> None:
    assert problems(resource) == []


@pytest.mark.parametrize(
    ("file", "kind", "break_it", "problem"),
    [
        (
            GATEWAY / "extension.yaml",
            "EnvoyExtensionPolicy",
            lambda spec: spec["extProc"][0].update(maxMessageTimeout="60s"),
            "EnvoyExtensionPolicy.spec.extProc[0]: no field maxMessageTimeout",
        ),
        (
            GATEWAY / "extension.yaml",
            "EnvoyExtensionPolicy",
            lambda spec: spec["extProc"][0]["processingMode"]["request"].update(body="Whole"),
            "EnvoyExtensionPolicy.spec.extProc[0].processingMode.request.body: 'Whole' is none of "
            + str(["Streamed", "Buffered", "BufferedPartial", "FullDuplexStreamed"]),
        ),
        (
            GATEWAY / "traffic.yaml",
            "BackendTrafficPolicy",
            lambda spec: spec["retry"].update(numRetries="2"),
            "BackendTrafficPolicy.spec.retry.numRetries: '2' is no integer",
        ),
        (
            GATEWAY / "gateway.yaml",
            "Gateway",
            lambda spec: spec.pop("gatewayClassName"),
            "Gateway.spec: gatewayClassName is missing",
        ),
        (
            GATEWAY / "route-all-models.yaml",
            "HTTPRoute",
            lambda spec: spec.update(rules={}),
            "HTTPRoute.spec.rules: {} is no list",
        ),
        (
            VLLM / "score.yaml",
            "Deployment",
            lambda spec: spec["template"]["spec"]["containers"][0].update(readynessProbe={}),
            "Deployment.spec.template.spec.containers[0]: no field readynessProbe",
        ),
    ],
)
def test_what_is_wrong_is_found(file: Path, kind: str, break_it: Callable[[Json], Any], problem: str) -> None:
    resource = _one(kind, file)
    break_it(resource["spec"])
    assert problems(resource) == [problem]


def test_no_resource_is_of_a_kind_nobody_knows() -> None:
    assert problems({"apiVersion": "v1", "kind": "Pot"}) == ["v1 Pot: no such kind"]


# -- Envoy by itself -------------------------------------------------------------------------------------------------------


@cache
def _text_printed() -> str:
    """What `config envoy` says of the example."""
    command = [sys.executable, "-m", "envoy_extproc", "config", "envoy", "-c"]
    file = EXAMPLES / "envoy" / "gateway.yaml"
    return subprocess.run([*command, str(file)], check=True, capture_output=True, text=True).stdout


def _printed() -> Json:
    printed: Json = yaml.safe_load(_text_printed())
    return printed


def _with_script(envoy: Json, source: Json) -> Json:
    (listener,) = envoy["static_resources"]["listeners"]
    lua = listener["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"][0]
    lua["typed_config"]["default_source_code"] = source
    return envoy


def test_the_commented_bootstrap_is_the_printed_one() -> None:
    written = yaml.safe_load((EXAMPLES / "envoy" / "envoy.yaml").read_text("utf-8"))
    assert written == _with_script(_printed(), {"filename": "native.lua"})


def test_the_bootstrap_for_kubernetes_differs_in_two_places() -> None:
    written = yaml.safe_load((EXAMPLES / "envoy" / "kubernetes" / "envoy.yaml").read_text("utf-8"))
    wanted = _with_script(_printed(), {"filename": "/etc/envoy/native.lua"})
    for cluster in wanted["static_resources"]["clusters"]:
        service, port = ("engines", 8000) if cluster["name"] == "pods" else ("envoy-extproc", 9002)
        host = {"address": f"{service}.inference.svc.cluster.local.", "port_value": port}
        (group,) = cluster["load_assignment"]["endpoints"]
        group["lb_endpoints"] = [{"endpoint": {"address": {"socket_address": host}}}]
        if cluster["name"] == "pods":
            cluster |= {"type": "STRICT_DNS", "dns_refresh_rate": "1s", "dns_lookup_family": "V4_ONLY"}
        else:
            cluster["outlier_detection"]["max_ejection_percent"] = 100  # of several servers
    assert written == wanted


# -- Envoy Gateway ---------------------------------------------------------------------------------------------------------


def _own_parts() -> Mapping[str, Any]:
    (listener,) = _printed()["static_resources"]["listeners"]
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    filters = {each["name"]: each["typed_config"] for each in manager["http_filters"]}
    (host,) = manager["route_config"]["virtual_hosts"]
    (hygiene,) = manager["early_header_mutation_extensions"]
    return {
        "ext_proc": filters["envoy.filters.http.ext_proc"],
        "removed": {each["remove"] for each in hygiene["typed_config"]["mutations"]},
        "retry": host["routes"][0]["route"]["retry_policy"],
        "served": host["response_headers_to_add"][0]["header"],
    }


def test_clients_are_kept_from_every_header_that_we_remove() -> None:
    headers = _one("ClientTrafficPolicy", GATEWAY / "gateway.yaml")["spec"]["headers"]
    assert set(headers["earlyRequestHeaders"]["remove"]) == _own_parts()["removed"] | {"model"}


def test_the_server_is_asked_as_our_own_bootstrap_asks_it() -> None:
    own = _own_parts()["ext_proc"]
    (written,) = _one("EnvoyExtensionPolicy", GATEWAY / "extension.yaml")["spec"]["extProc"]
    options = own["metadata_options"]
    assert written["metadata"] == {
        "accessibleNamespaces": options["forwarding_namespaces"]["untyped"],
        "writableNamespaces": options["receiving_namespaces"]["untyped"],
    }
    assert written["processingMode"]["response"] == {"attributes": own["response_attributes"]}
    assert written["messageTimeout"] == own["message_timeout"]


def test_pods_are_asked_as_our_own_bootstrap_asks_them() -> None:
    own = _own_parts()
    retry = _one("BackendTrafficPolicy", GATEWAY / "traffic.yaml")["spec"]["retry"]
    assert retry["numRetries"] == own["retry"]["num_retries"] == Routing().tries - 1
    assert ",".join(retry["retryOn"]["triggers"]) == own["retry"]["retry_on"]
    assert retry["retryOn"]["httpStatusCodes"] == own["retry"]["retriable_status_codes"]


@pytest.mark.parametrize("file", ["route-all-models.yaml", "route-per-model.yaml"])
def test_every_route_tells_who_served(file: str) -> None:
    served = _own_parts()["served"]
    for rule in _one("HTTPRoute", GATEWAY / file)["spec"]["rules"]:
        (each,) = rule["filters"]
        assert each["responseHeaderModifier"] == {"set": [{"name": served["key"], "value": served["value"]}]}


def test_bodies_up_to_the_servers_limit_pass() -> None:
    limit = _one("ClientTrafficPolicy", GATEWAY / "gateway.yaml")["spec"]["connection"]["bufferLimit"]
    assert limit == f"{Server().max_body_bytes >> 20}Mi"


def test_a_field_that_nothing_translates_is_no_example() -> None:
    files = ("gateway.yaml", "extension.yaml", "traffic.yaml", "route-all-models.yaml")
    resources = documents(*(GATEWAY / name for name in files))
    services = {"envoy-extproc": ["127.0.0.1:1"], "engines": ["127.0.0.1:2"]}
    places = Places("127.0.0.1:3", "127.0.0.1:4", services, {"envoy-extproc-native-lua": ""})
    bootstrap(resources, places)
    (policy,) = [each for each in resources if each["kind"] == "ClientTrafficPolicy"]
    policy["spec"]["http1"] = {"enableTrailers": True}
    with pytest.raises(ValueError, match=r"ClientTrafficPolicy inference: not translated: .*enableTrailers"):
        bootstrap(resources, places)


_STANDINS = """
require, load, loadstring, loadfile, dofile, setmetatable, getmetatable, rawget, rawset, debug, package, _G = nil
local map = { get = function() return "a text" end, set = function() end, remove = function() end }
map.replace = map.set
local info = { dynamicMetadata = function() return map end }
handle = { headers = function() return map end, streamInfo = function() return info end }
"""


@pytest.mark.parametrize("function", ["envoy_on_request", "envoy_on_response"])
def test_the_script_runs_on_stand_ins(function: str) -> None:
    """Envoy Gateway takes a script that runs where every answer is a text and most of Lua's globals are gone."""
    lua = lua51.LuaRuntime()
    lua.execute(f"{_STANDINS}\n{native_lua()}\n{function}(handle)")


# -- vLLM ------------------------------------------------------------------------------------------------------------------

DEPLOYMENTS = sorted(VLLM.glob("*.yaml"))


def _flags(container: Json) -> Mapping[str, str]:
    return dict(each[2:].split("=", 1) for each in container["args"] if re.match("--[^=]+=", each))


@pytest.mark.parametrize("file", DEPLOYMENTS, ids=lambda file: file.stem)
def test_a_pod_says_what_its_engine_does(file: Path) -> None:
    deployment, service = _one("Deployment", file)["spec"], _one("Service", file)["spec"]
    pod = deployment["template"]
    (container,) = pod["spec"]["containers"]
    labels, flags = pod["metadata"]["labels"], _flags(container)
    assert flags["served-model-name"] == labels["model.aibrix.ai/name"]
    (port,) = container["ports"]
    assert (
        {flags["port"], labels["model.aibrix.ai/port"], labels["model.aibrix.ai/metric-port"]}
        == {str(port["containerPort"])}
        == {"8000"}
    )
    assert labels["model.aibrix.ai/engine"] == "vllm"
    for selector in (deployment["selector"]["matchLabels"], service["selector"], _engines_selector()):
        assert selector.items() <= labels.items()
    assert all(
        container[f"{probe}Probe"]["httpGet"]["port"] == port["name"] for probe in ("startup", "readiness")
    )


def _engines_selector() -> Mapping[str, str]:
    both = [
        next(
            each["spec"]["selector"]
            for each in documents(file)
            if each["kind"] == "Service" and each["metadata"]["name"] == "engines"
        )
        for file in (GATEWAY / "route-all-models.yaml", EXAMPLES / "envoy" / "kubernetes" / "deployment.yaml")
    ]
    assert both[0] == both[1]
    return dict(both[0])


@pytest.mark.parametrize("file", DEPLOYMENTS, ids=lambda file: file.stem)
def test_a_pod_is_found_by_its_labels(file: Path) -> None:
    """What discovery makes of such a pod once it is ready."""
    meta = _one("Deployment", file)["spec"]["template"]["metadata"]
    ready = {"phase": "Running", "podIP": "10.0.0.7", "conditions": [{"type": "Ready", "status": "True"}]}
    pod = {"metadata": {"name": "pod-a", "namespace": "inference", **meta}, "status": ready}
    found = mapped(decode(json.dumps(pod).encode()), engines=["vllm"], qualified=False)
    (endpoint,) = found.endpoints
    assert (endpoint.name, endpoint.address, endpoint.engine) == ("pod-a", "10.0.0.7:8000", "vllm")
    assert list(endpoint.models) == [meta["labels"]["model.aibrix.ai/name"]]
    assert meta["labels"].keys() >= {KubernetesSource().label_selector}


@pytest.mark.parametrize("file", DEPLOYMENTS, ids=lambda file: file.stem)
def test_a_pod_has_the_time_that_its_end_takes(file: Path) -> None:
    spec = _one("Deployment", file)["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    wait = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    drain = int(_flags(container)["shutdown-timeout"])
    assert drain > 0
    assert wait >= 5
    assert wait + drain < spec["terminationGracePeriodSeconds"]


def test_routes_of_a_model_name_its_service_and_an_adapter() -> None:
    (rule,) = _one("HTTPRoute", GATEWAY / "route-per-model.yaml")["spec"]["rules"]
    (backend,) = rule["backendRefs"]
    assert backend["name"] == _one("Service", VLLM / "chat.yaml")["metadata"]["name"]
    (container,) = _one("Deployment", VLLM / "chat.yaml")["spec"]["template"]["spec"]["containers"]
    adapters = {each.partition("=")[0] for each in container["args"] if "=/adapters/" in each}
    matched = {match["headers"][0]["value"] for match in rule["matches"]}
    assert matched <= adapters | {_flags(container)["served-model-name"]}


# -- pages -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", READMES, ids=lambda page: page.parent.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)", page.read_text("utf-8"))
    assert links
    missing = [link for link in links if not link.startswith("http") and not (page.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("page", READMES[1:], ids=lambda page: page.parent.name)
def test_requests_in_the_pages_are_of_the_api(page: Path) -> None:
    paths = set(re.findall(r"(?:localhost:8080|\$ADDRESS)(/[a-z0-9_/]+)", page.read_text("utf-8")))
    assert paths - {"/v1/models"}
    assert [path for path in paths if path != "/v1/models" and routes.find(path) is None] == []
