"""The chart's values: one frozen model per concern, each default with its reason.

From these `charts/generate.py` writes values.yaml, values.schema.json and the table in docs/helm.md, so that the three
cannot differ. `config` is `envoy_extproc.settings` itself, with nothing required.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

Object = dict[str, Any]
"""What is Kubernetes' own is passed through as it is, and checked by the API server."""


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        alias_generator=to_camel,
        populate_by_name=True,
    )


class Image(_Section):
    """The server's image."""

    repository: str = "envoy-extproc"
    """Where the image built from the Dockerfile was pushed to."""
    tag: str = ""
    """Empty: the chart's appVersion. Not read where there is a digest."""
    digest: str = Field(default="", pattern=r"^(sha256:[0-9a-f]{64})?$")
    """`sha256:...`: exactly this image, whatever its tag says later."""
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """Tags of releases do not move."""
    pull_secrets: list[Object] = []
    """`[{name: ...}]`."""


class SecretKey(_Section):
    """A value that stands in a Secret, and in no ConfigMap."""

    secret_name: str = ""
    """Empty: none."""
    key: str = "value"
    """The key in the Secret."""


class Tls(_Section):
    """TLS on the ext_proc port. Renewed files are read without a restart."""

    secret_name: str = ""
    """A Secret of type kubernetes.io/tls. Empty: no TLS, for a network that can be trusted. With it the probes ask the admin
    port, since the kubelet's gRPC probe speaks no TLS."""
    client_ca: bool = False
    """true: clients need a certificate by the Secret's `ca.crt`."""
    ca_config_map: str = ""
    """For `envoyGateway`: a ConfigMap in this namespace whose `ca.crt` Envoy verifies this server by."""


class ServiceAccount(_Section):
    """Who the pods are for the API server."""

    create: bool = True
    """false: `name` exists, or the namespace's default is taken."""
    name: str = ""
    """Empty: the release's full name."""
    annotations: dict[str, str] = {}
    """For identities of clouds."""


class Rbac(_Section):
    """What the pods may read. Nothing, and no token is mounted, without `config.discovery.kubernetes`."""

    create: bool = True
    """false: somebody else binds the roles that docs/helm.md names."""


class Service(_Section):
    """The Service of the ext_proc and the admin port."""

    headless: bool = True
    """Envoy must see each pod: it balances streams, not connections, and keeps one connection a worker and pod. Behind a
    virtual address all streams of a worker would stay on one pod, and a pod that drains could not be told apart."""
    annotations: dict[str, str] = {}
    """Passed on."""


class Resources(_Section):
    """What a pod needs."""

    requests: dict[str, str | int] = {"cpu": "1", "memory": "256Mi"}
    """One process, so one core: about 1,400 requests a second in the native lane. 80 MiB at rest, 27 KiB a stream."""
    limits: dict[str, str | int] = {"memory": "1Gi"}
    """Two dozen bodies of `server.max_body_bytes` at once. No CPU limit: a throttled event loop stands still for up to
    100 ms, and every request with it."""


class Autoscaling(_Section):
    """A HorizontalPodAutoscaler. CPU is the right measure: a stream that is held open costs none, a decision does."""

    enabled: bool = False
    """Needs a metrics server."""
    min_replicas: int = Field(default=2, ge=1)
    """One can always be replaced."""
    max_replicas: int = Field(default=8, ge=1)
    """Each scrapes every engine: more cost engines more than they bring."""
    cpu_utilization: int = Field(default=70, ge=1, le=100)
    """Per cent of the request; the rest is for bursts, which queue for one event loop."""
    metrics: list[Object] = []
    """Further ones, for example Pods `envoy_extproc_in_flight_requests` through an adapter."""
    scale_down_seconds: int = Field(default=300, ge=0, le=3600)
    """A pod that is taken away gives back its streams, so it should not come back at once."""


class PodDisruptionBudget(_Section):
    """Keeps a drain of nodes from taking all pods."""

    enabled: bool = True
    """Without effect on a single replica's node: see `maxUnavailable`."""
    max_unavailable: int | str = 1
    """Not minAvailable, which would block a drain for ever where there is one replica."""


class NetworkPolicy(_Section):
    """Who may connect."""

    enabled: bool = False
    """Whoever reaches the ext_proc port can route and write reports, so switch it on where the network enforces it."""
    envoys: list[Object] = [{"podSelector": {}}]
    """Peers for the ext_proc port. Default: this namespace."""
    scrapers: list[Object] = [{"namespaceSelector": {}}]
    """Peers for the admin port. Default: all; it serves metrics and health, and /debug only with the token."""
    egress: list[Object] = []
    """Rules, if not empty: then DNS, the API server, all engines and Redis must be among them."""


class ServiceMonitor(_Section):
    """A ServiceMonitor of the Prometheus operator."""

    enabled: bool = False
    """Needs the operator's CRDs."""
    interval: str = "15s"
    """Alerts look at 5 minutes."""
    labels: dict[str, str] = {}
    """What the operator selects by."""


class PrometheusRule(_Section):
    """A PrometheusRule with the alerts of docs/operations.md; they read the ServiceMonitor's labels."""

    enabled: bool = False
    """Needs the operator's CRDs."""
    labels: dict[str, str] = {}
    """What the operator selects by."""
    runbook_url: str = "docs/operations.md"
    """What the runbook links begin with."""


class Dashboard(_Section):
    """A Grafana dashboard in a ConfigMap, for Grafana's sidecar."""

    enabled: bool = False
    """files/dashboard.json can also be imported by hand."""
    labels: dict[str, str] = {"grafana_dashboard": "1"}
    """What the sidecar selects by."""
    annotations: dict[str, str] = {}
    """For a folder, for example."""


class ModelService(_Section):
    """A model and the Service of its pods."""

    name: str = Field(min_length=1)
    """As clients write it in `model`."""
    service: str = Field(min_length=1)
    """Selects the model's pods, in this namespace."""
    port: int = Field(default=8000, ge=1, le=65_535)
    """The Service's port."""
    aliases: list[str] = []
    """Further names that go there, its adapters for example."""


class Pool(_Section):
    """One Service over the pods of all models, for requests whose model has no route of its own.

    Of several Services Envoy Gateway may choose before it looks for the pod, as soon as one of them has none.
    """

    service: str = ""
    """It exists under this name. Empty: it is made from `selector`."""
    selector: dict[str, str] = {}
    """Labels that all engines have."""
    port: int = Field(default=8000, ge=1, le=65_535)
    """The Service's port."""
    target_port: int | str = 8000
    """The engines' port."""


class GatewayClass(_Section):
    """Whose class the Gateway is."""

    create: bool = False
    """It belongs to the whole cluster and often exists."""
    name: str = "envoy-gateway"
    """Its name."""
    controller_name: str = "gateway.envoyproxy.io/gatewayclass-controller"
    """Envoy Gateway's own default."""


class Gateway(_Section):
    """Where clients connect."""

    create: bool = True
    """false: `name` exists. Its EnvoyProxy must then write the access log to this server; see docs/helm.md."""
    name: str = ""
    """Empty: the release's full name."""
    port: int = Field(default=80, ge=1, le=65_535)
    """HTTP, or HTTPS where `tlsSecretName` is set."""
    tls_secret_name: str = ""
    """A certificate for clients."""
    hostname: str = ""
    """Empty: any."""


class EnvoyGateway(_Section):
    """Resources for Envoy Gateway: Gateway, EnvoyProxy, routes, and policies that say what `config envoy` says.

    Envoy Gateway itself needs `extensionApis.enableLua: true` for the native lane.
    """

    enabled: bool = False
    """Needs Envoy Gateway's CRDs."""
    gateway_class: GatewayClass = GatewayClass()
    gateway: Gateway = Gateway()
    image: str = "docker.io/envoyproxy/envoy:distroless-v1.40.0"
    """The Envoy this server is tested with. Empty: Envoy Gateway's own."""
    lua: bool = True
    """The native lane. false where Envoy Gateway does not allow Lua: everything works by the stream lane."""
    lua_validation: Literal["Strict", "InsecureSyntax", "Disabled"] = "Strict"
    """Envoy Gateway's default, which native.lua passes."""
    pool: Pool = Pool()
    models: list[ModelService] = []
    """`[{name, service, port: 8000, aliases: []}]`: models with a route of their own, matched by the header `model`, which
    the server sets. Needs `config.routing.clear_route_cache: true`. A route takes policies that the others do not have."""


class PodsOfEnvoy(_Section):
    """Where the plain Envoy finds pods."""

    name: str = Field(min_length=1)
    """A headless Service of this namespace, or a host name."""
    port: int = Field(ge=1, le=65_535)
    """The engines' port."""


class Envoy(_Section):
    """A plain Envoy with the bootstrap of `config envoy`, for clusters without Envoy Gateway. Its pods are read from DNS."""

    enabled: bool = False
    """Needs `service.headless`."""
    image: str = "docker.io/envoyproxy/envoy:distroless-v1.40.0"
    """The Envoy this server is tested with."""
    replicas: int = Field(default=2, ge=1)
    """One can always be replaced."""
    workers: int = Field(default=1, ge=1, le=64)
    """As many as the CPUs it asks for: by itself Envoy takes one for each core of the node."""
    services: list[PodsOfEnvoy] = []
    """`[{name, port}]`: headless Services of the engines, in this namespace or as host names. Envoy can only be sent to pods
    that it knows."""
    service_type: Literal["ClusterIP", "LoadBalancer", "NodePort"] = "ClusterIP"
    """Where clients connect, on port 80."""
    drain_seconds: int = Field(default=300, ge=1, le=3600)
    """How long a pod that is told to stop keeps running for the streams it has: Envoy cuts them off when it ends."""
    resources: Object = {
        "requests": {"cpu": "1", "memory": "512Mi"},
        "limits": {"memory": "2Gi"},
    }
    """Each request buffers its body, up to `server.max_body_bytes`."""


class Values(_Section):
    """All of them."""

    name_override: str = ""
    """Instead of the chart's name."""
    fullname_override: str = ""
    """Instead of release and chart."""
    cluster_domain: str = "cluster.local"
    """For the names that Envoy looks up."""
    replicas: int = Field(default=2, ge=1)
    """One process a pod, one core each; two, so that one can be replaced. Each counts its own requests in flight."""
    image: Image = Image()
    config: Object = {}
    """The server's configuration file: every key of docs/configuration.md. Without `discovery` it is
    `kubernetes: {}`, the pods of this namespace. Secrets do not belong here."""
    debug_token: SecretKey = SecretKey(key="token")
    """`server.debug_token`, from a Secret."""
    redis: SecretKey = SecretKey(key="url")
    """`state.redis_url`, from a Secret: it has a password in it."""
    tls: Tls = Tls()
    service_account: ServiceAccount = ServiceAccount()
    rbac: Rbac = Rbac()
    service: Service = Service()
    resources: Resources = Resources()
    autoscaling: Autoscaling = Autoscaling()
    pod_disruption_budget: PodDisruptionBudget = PodDisruptionBudget()
    pre_stop_seconds: int = Field(default=5, ge=0, le=300)
    """Between leaving the Service and being told to stop: Envoy hears of it later than the server, whose own patience is
    `server.linger_seconds`."""
    min_ready_seconds: int = Field(default=10, ge=0, le=3600)
    """A new pod must have been ready for so long before the next old one is told to stop: Envoy learns of it by its next look
    at the name, behind what the cluster's DNS remembers."""
    topology_spread_constraints: list[Object] | None = None
    """null: spread over nodes and zones where possible."""
    pod_security_context: Object = {
        "runAsNonRoot": True,
        "runAsUser": 10001,
        "runAsGroup": 10001,
        "fsGroup": 10001,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    """The image's own user. Where the platform gives user ids, as OpenShift does, set the three numbers to null."""
    security_context: Object = {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    """Nothing is written but to /tmp, which is memory."""
    network_policy: NetworkPolicy = NetworkPolicy()
    service_monitor: ServiceMonitor = ServiceMonitor()
    prometheus_rule: PrometheusRule = PrometheusRule()
    dashboard: Dashboard = Dashboard()
    envoy_gateway: EnvoyGateway = EnvoyGateway()
    envoy: Envoy = Envoy()
    pod_annotations: dict[str, str] = {}
    """Passed on."""
    pod_labels: dict[str, str] = {}
    """Passed on."""
    node_selector: dict[str, str] = {}
    """Passed on."""
    tolerations: list[Object] = []
    """Passed on."""
    affinity: Object = {}
    """Passed on."""
    priority_class_name: str = ""
    """Worth one above the engines': without this server nothing is routed or, fail-open, nothing is accounted."""
    extra_env: list[Object] = []
    """Every key of the configuration is also `ENVOY_EXTPROC_<SECTION>__<KEY>`."""
    extra_volumes: list[Object] = []
    """For endpoint files, for example."""
    extra_volume_mounts: list[Object] = []
    """Where they are."""
    globals_: Object = Field(default_factory=dict, alias="global")
    """Helm's own, where this is a subchart. Not read."""
