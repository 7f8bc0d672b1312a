"""What the chart makes, switch by switch, by the real helm."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import yaml

from envoy_extproc.scheduling.registry import POLICIES
from envoy_extproc.server.health import Health
from envoy_extproc.settings import Settings, parse
from tests.chart.values import ALL, CASES, SWITCHES
from tests.support import helm, manifests
from tests.support.helm import FULL, NAMESPACE, Json, found, kinds, template

each_case = pytest.mark.parametrize("values", CASES.values(), ids=CASES.keys())


def _pod(objects: list[Json], name: str = FULL) -> Json:
    pod: Json = found(objects, "Deployment", name)["spec"]["template"]
    return pod


def _server(objects: list[Json], name: str = FULL) -> Json:
    (container,) = _pod(objects, name)["spec"]["containers"]
    assert isinstance(container, dict)
    return container


def _config(objects: list[Json]) -> Json:
    (text,) = [each["data"]["config.yaml"] for each in objects if "config.yaml" in each.get("data", {})]
    config: Json = yaml.safe_load(text)
    return config


def _settings(objects: list[Json]) -> Settings:
    return parse(_config(objects), policies=POLICIES)


def test_helm_finds_nothing_to_complain_of() -> None:
    for values in (ALL, {}):
        helm.run("helm", "lint", "--strict", str(helm.CHART), "--values", "-", text=yaml.safe_dump(values))


@each_case
def test_kubernetes_knows_every_field(values: Json) -> None:
    wrong = [
        f"{each['kind']} {each['metadata']['name']}{stray}"
        for each in template(values)
        if (model := manifests.model_of(each)) is not None
        for stray in manifests.strays(each, model)
    ]
    assert wrong == []


def test_a_field_that_kubernetes_does_not_know_is_found() -> None:
    account = {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": {"name": 1, "nmae": "a"},
        "secrets": {},
    }
    assert list(manifests.strays(account, "V1ServiceAccount")) == [
        ".metadata.name: 1 is no str",
        ".metadata.nmae: unknown",
        ".secrets: {} is no list",
    ]


@each_case
def test_kubectl_reads_what_is_made(values: Json) -> None:
    names = helm.run(
        "kubectl",
        "label",
        "--local",
        "--dry-run=client",
        "-o=name",
        "-f=-",
        "a=b",
        text=helm.rendered(values),
    )
    assert len(names.splitlines()) == len(template(values))


@each_case
def test_every_object_is_named_once_and_belongs_to_the_release(values: Json) -> None:
    objects = template(values)
    keys = [(each["kind"], each["metadata"].get("namespace"), each["metadata"]["name"]) for each in objects]
    assert len(keys) == len(set(keys))
    for each in objects:
        assert len(each["metadata"]["name"]) <= 63
        assert each["metadata"]["labels"]["app.kubernetes.io/instance"] == helm.RELEASE


@each_case
def test_what_selects_meets_what_is_selected(values: Json) -> None:
    objects = template(values)
    pods = {each["metadata"]["name"]: each for each in objects if each["kind"] == "Deployment"}
    labels = {name: each["spec"]["template"]["metadata"]["labels"] for name, each in pods.items()}
    for name, each in pods.items():
        assert each["spec"]["selector"]["matchLabels"].items() <= labels[name].items()
    for kind in ("Service", "PodDisruptionBudget"):
        for each in (each for each in objects if each["kind"] == kind):
            name = each["metadata"]["name"]
            if not name.endswith("-engines"):  # pods of somebody else
                selector = each["spec"]["selector"]
                selector = selector.get("matchLabels", selector)
                assert [pod for pod, have in labels.items() if selector.items() <= have.items()] == [name]


@each_case
def test_ports_lead_to_the_ports_of_the_configuration(values: Json) -> None:
    objects = template(values)
    (name,) = {each["metadata"]["name"] for each in objects if each["kind"] == "Deployment"} - {
        f"{FULL}-envoy"
    }
    server = _server(objects, name)
    ports = {each["name"]: each["containerPort"] for each in server["ports"]}
    said = _settings(objects).server
    assert ports == {
        "ext-proc": int(said.listen.rpartition(":")[2]),
        "admin": int(said.admin.rpartition(":")[2]),
    }
    service = found(objects, "Service", name)["spec"]
    assert {each["targetPort"]: each["port"] for each in service["ports"]} == ports


@each_case
def test_the_configuration_is_one_that_the_server_takes(values: Json) -> None:
    settings = _settings(template(values))
    said = values.get("config", {})
    for section, keys in said.items():
        if section not in ("discovery", "models"):
            for key, value in keys.items():
                assert getattr(getattr(settings, section), key) == value


def test_without_discovery_the_pods_of_the_namespace_are_watched() -> None:
    source = _settings(template()).discovery.kubernetes
    assert source is not None
    assert source.namespaces == ()


@each_case
def test_the_pod_may_do_as_little_as_possible(values: Json) -> None:
    for each in template(values):
        if each["kind"] == "Deployment":
            spec = each["spec"]["template"]["spec"]
            (container,) = spec["containers"]
            assert spec["securityContext"]["runAsNonRoot"] is True
            assert spec["securityContext"]["runAsUser"] > 0
            assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }


@pytest.mark.parametrize(
    ("switch", "mounted"),
    [("defaults", True), ("config", False), ("everywhere", True), ("kubeconfig", False)],
)
def test_a_token_is_there_only_to_read_pods(switch: str, mounted: bool) -> None:
    objects = template(SWITCHES[switch])
    assert _pod(objects)["spec"]["automountServiceAccountToken"] is mounted
    assert found(objects, "ServiceAccount")["automountServiceAccountToken"] is False
    assert ("Role" in kinds(objects) or "ClusterRole" in kinds(objects)) is mounted


def _rights(objects: list[Json]) -> dict[tuple[str, str], set[str]]:
    """Resources by the role's kind and namespace."""
    return {
        (each["kind"], each["metadata"].get("namespace", "")): {
            f"{group}/{name}"
            for rule in each["rules"]
            for group in rule["apiGroups"]
            for name in rule["resources"]
        }
        for each in objects
        if each["kind"] in ("Role", "ClusterRole")
    }


@pytest.mark.parametrize(
    ("switch", "rights"),
    [
        ("defaults", {("Role", NAMESPACE): {"/pods"}}),
        ("everywhere", {("ClusterRole", ""): {"/pods"}}),
        (
            "namespaces",
            {
                ("Role", "a"): {"/pods"},
                ("Role", "b"): {"/pods", "gateway.networking.k8s.io/httproutes"},
                ("Role", "aibrix-system"): {"gateway.networking.k8s.io/httproutes"},
            },
        ),
        ("kubeconfig", {}),
        ("config", {}),
        ("account", {}),
    ],
)
def test_rights_are_to_list_and_watch_where_it_looks(switch: str, rights: dict[Any, Any]) -> None:
    objects = template(SWITCHES[switch])
    assert _rights(objects) == rights
    roles = [each for each in objects if each["kind"].endswith("Role")]
    assert all(rule["verbs"] == ["list", "watch"] for each in roles for rule in each["rules"])
    for role in roles:
        (binding,) = [
            each
            for each in objects
            if each["kind"] == f"{role['kind']}Binding"
            and each["metadata"].get("namespace") == role["metadata"].get("namespace")
        ]
        assert binding["roleRef"]["name"] == role["metadata"]["name"]
        (subject,) = binding["subjects"]
        assert subject == {"kind": "ServiceAccount", "name": FULL, "namespace": NAMESPACE}


async def test_probes_ask_for_services_that_there_are() -> None:
    health = Health()
    await health.start()
    known = health._servicer._server_status
    server = _server(template())
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert server[probe]["grpc"]["port"] == 9002
        assert server[probe]["grpc"]["service"] in known


def test_over_tls_the_probes_ask_the_admin_port() -> None:
    objects = template(SWITCHES["tls"])
    server = _server(objects)
    paths = [server[probe]["httpGet"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")]
    assert paths == [{"port": "admin", "path": path} for path in ("/healthz", "/healthz", "/readyz")]
    tls = _settings(objects).server.tls
    assert tls is not None
    mounts = {each["name"]: each["mountPath"] for each in server["volumeMounts"]}
    assert {str(tls.cert_file.parent), str(tls.key_file.parent)} == {mounts["tls"]}
    assert tls.client_ca_file is not None


@pytest.mark.parametrize(
    ("switch", "seconds"), [("defaults", 45), ("config", 5 + 13 + 10), ("placement", 40)]
)
def test_the_kubelet_waits_longer_than_the_server_takes_to_stop(switch: str, seconds: int) -> None:
    objects = template(SWITCHES[switch])
    assert _pod(objects)["spec"]["terminationGracePeriodSeconds"] == seconds
    sleep = _server(objects).get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    assert seconds > sleep + _settings(objects).server.drain_seconds + 5.5


def test_a_new_configuration_rolls_the_pods() -> None:
    sums = [
        _pod(template(values))["metadata"]["annotations"]["checksum/config"]
        for values in (SWITCHES["defaults"], SWITCHES["config"], SWITCHES["everywhere"])
    ]
    assert len(set(sums)) == 3


def test_no_pod_is_missed_while_pods_are_replaced() -> None:
    spec = found(template(), "Deployment")["spec"]
    assert spec["minReadySeconds"] == 10
    strategy = spec["strategy"]
    assert strategy == {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}}


def test_envoy_sees_each_pod_unless_it_is_told_otherwise() -> None:
    assert found(template(), "Service")["spec"]["clusterIP"] == "None"
    assert "clusterIP" not in found(template(SWITCHES["service"]), "Service")["spec"]


def test_an_image_by_digest_has_no_tag() -> None:
    assert _server(template())["image"] == "envoy-extproc:0.1.0"
    assert _server(template(SWITCHES["digest"]))["image"] == f"here/brain@sha256:{'0' * 64}"


def test_secrets_are_referred_to() -> None:
    objects = template({**SWITCHES["secrets"], **SWITCHES["redis"]})
    environment = {each["name"]: each.get("valueFrom", each.get("value")) for each in _server(objects)["env"]}
    assert environment == {
        "ENVOY_EXTPROC_SERVER__DEBUG_TOKEN": {"secretKeyRef": {"name": "s", "key": "token"}},
        "ENVOY_EXTPROC_STATE__REDIS_URL": {"secretKeyRef": {"name": "s", "key": "url"}},
        "A": "b",
    }


def test_the_autoscaler_owns_the_number_of_pods() -> None:
    objects = template(SWITCHES["autoscaling"])
    assert "replicas" not in found(objects, "Deployment")["spec"]
    spec = found(objects, "HorizontalPodAutoscaler")["spec"]
    assert spec["scaleTargetRef"]["name"] == found(objects, "Deployment")["metadata"]["name"]
    assert spec["minReplicas"] < spec["maxReplicas"]
    assert "cpu" in _server(objects)["resources"]["requests"]  # what a utilization is of


def test_the_network_policy_names_the_ports_of_the_pod() -> None:
    objects = template(SWITCHES["network"])
    spec = found(objects, "NetworkPolicy")["spec"]
    named = [port["port"] for rule in spec["ingress"] for port in rule["ports"]]
    assert named == [each["name"] for each in _server(objects)["ports"]]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    quiet = found(template({"networkPolicy": {"enabled": True}}), "NetworkPolicy")["spec"]
    assert quiet["policyTypes"] == ["Ingress"]
    assert "egress" not in quiet


def test_pods_spread() -> None:
    spread = _pod(template())["spec"]["topologySpreadConstraints"]
    assert [each["topologyKey"] for each in spread] == [
        "kubernetes.io/hostname",
        "topology.kubernetes.io/zone",
    ]
    assert _pod(template(SWITCHES["placement"]))["spec"]["topologySpreadConstraints"] == []


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"config": {"server": {"listen": "127.0.0.1:9002"}}}, "cannot be reached from outside"),
        ({"config": {"responses": {"hold_streams": False}}}, "hold_streams"),
        ({"envoy": {"enabled": True}}, "envoy.services"),
        ({**SWITCHES["service"], **SWITCHES["envoy"]}, "service.headless"),
        ({**SWITCHES["tls"], **SWITCHES["envoy"]}, "TLS"),
        ({"envoyGateway": {"enabled": True}}, "envoyGateway.pool"),
        (
            {
                "envoyGateway": {
                    "enabled": True,
                    "pool": {"service": "e"},
                    "models": [{"name": "m", "service": "s"}],
                }
            },
            "clear_route_cache",
        ),
        ({**SWITCHES["gateway"], **SWITCHES["tls"]}, "tls.caConfigMap"),
    ],
)
def test_what_cannot_work_is_refused(values: Json, complaint: str) -> None:
    with pytest.raises(helm.HelmError, match=complaint):
        template(values)


def test_one_server_may_give_back_its_streams_early() -> None:
    objects = template({"replicas": 1, "config": {"responses": {"hold_streams": False}}})
    assert _settings(objects).responses.hold_streams is False


def test_the_cases_differ() -> None:
    assert all(helm.rendered(one) != helm.rendered(other) for one, other in pairwise(CASES.values()))
