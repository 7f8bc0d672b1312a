"""What Envoy Gateway makes of the resources in examples/envoy-gateway: an Envoy bootstrap, as far as those files go.

After the translator of Envoy Gateway 1.9. What differs from our own bootstrap: filters stand in the listener under long
names, disabled, and are enabled on the route; the pod comes from a header; the log is written once a second. A field
that nothing here translates is an error, so a file cannot say more than was tried.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from envoy_extproc.envoy.eds import assignment, socket_address

Json = dict[str, Any]

_TYPE = "type.googleapis.com/envoy."
_HTTP = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
_UNITS = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}
_MISSING = object()


@dataclass(frozen=True, slots=True)
class Places:
    """What the cluster would tell: addresses instead of Services, texts instead of ConfigMaps.

    Attributes:
        listen: where clients connect, ``host:port``.
        admin: Envoy's own admin port.
        services: ready addresses by Service.
        texts: what a ConfigMap holds, by its name.
    """

    listen: str
    admin: str
    services: Mapping[str, Sequence[str]]
    texts: Mapping[str, str]


def documents(*files: Path) -> list[Json]:
    """Every resource in some files."""
    return [each for file in files for each in yaml.safe_load_all(file.read_text("utf-8"))]


def bootstrap(resources: Iterable[Json], places: Places) -> Json:
    """The bootstrap that the resources amount to.

    Raises:
        ValueError: a resource says something that is not translated here.
    """
    specs = [_Spec(each) for each in resources]
    by_kind: dict[str, list[_Spec]] = {}
    for spec in specs:
        by_kind.setdefault(spec.kind, []).append(spec)
    by_kind.pop("Service", None)
    (gateway,), (_,) = by_kind.pop("Gateway"), by_kind.pop("GatewayClass")
    gateway.ignore("gatewayClassName", "infrastructure", "listeners")
    (extension,), (client,), (proxy,) = (
        by_kind.pop(kind) for kind in ("EnvoyExtensionPolicy", "ClientTrafficPolicy", "EnvoyProxy")
    )
    policies = _policies(by_kind.pop("BackendTrafficPolicy"))
    routes = by_kind.pop("HTTPRoute")
    filters, clusters = _extensions(extension, places)
    log, log_cluster = _access_log(proxy, places)
    table: list[tuple[int, Json]] = []
    for route in routes:
        found, cluster = _route(route, policies, [each["name"] for each in filters], places)
        table += found
        clusters.append(cluster)
    ordered = [entry for _, entry in sorted(table, key=lambda each: -each[0])]
    listener = _listener(client, [*filters, _router()], log, ordered, places)
    for spec in specs:
        spec.check()
    if by_kind:
        raise ValueError(f"not translated: {sorted(by_kind)}")
    return {
        "admin": {"address": socket_address(places.admin)},
        "static_resources": {"listeners": [listener], "clusters": [*clusters, log_cluster]},
    }


class _Spec:
    """A resource's spec, from which each field is taken once."""

    def __init__(self, resource: Json) -> None:
        self.kind = resource["kind"]
        self.name = resource["metadata"]["name"]
        self._left = {} if self.kind in ("GatewayClass", "Service") else deepcopy(resource["spec"])

    def take(self, path: str, default: Any = _MISSING) -> Any:
        """The value at a dotted path, which is gone then; so are mappings that are empty for it.

        Raises:
            KeyError: it is not there, and there is no default.
        """
        return _take(self._left, path.split("."), default)

    def ignore(self, *names: str) -> None:
        """Takes fields that stand for nothing in a bootstrap."""
        for name in names:
            self.take(name, None)

    def check(self) -> None:
        """Raises ValueError where something was not taken."""
        if self._left:
            raise ValueError(f"{self.kind} {self.name}: not translated: {self._left}")


def _take(values: Json, path: Sequence[str], default: Any) -> Any:
    name, rest = path[0], path[1:]
    if name not in values:
        if default is _MISSING:
            raise KeyError(name)
        return default
    if not rest:
        return values.pop(name)
    found = _take(values[name], rest, default)
    if not values[name]:
        del values[name]
    return found


def _policies(policies: Sequence[_Spec]) -> Mapping[str, Json]:
    """What holds for a route: the gateway's policy under "", and what a route's own makes of it, by the route's name."""
    merged: dict[str, Json] = {}
    for policy in sorted(policies, key=lambda each: each.name != "inference"):
        (target,) = policy.take("targetRefs")
        merge = policy.take("mergeType", None)
        own, policy._left = policy._left, {}
        if target["kind"] == "Gateway":
            merged[""] = own
        else:
            merged[target["name"]] = _merge(merged[""], own) if merge == "StrategicMerge" else own
    return merged


def _merge(base: Json, more: Json) -> Json:
    merged = deepcopy(base)
    for key, value in more.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _seconds(text: str) -> str:
    """Envoy's duration of Gateway API's."""
    return f"{float(text[:-2]) / 1000:g}s" if text.endswith("ms") else text


def _bytes(text: str) -> int:
    return int(text[:-2]) * _UNITS[text[-2:]]


def _typed(name: str, kind: str, **config: Any) -> Json:
    return {"name": name, "typed_config": {"@type": _TYPE + kind, **config}}


# -- filters ---------------------------------------------------------------------------------------------------------------


def _extensions(policy: _Spec, places: Places) -> tuple[list[Json], list[Json]]:
    """Filters in Envoy Gateway's order, Lua before ext_proc, and the clusters they need."""
    policy.ignore("targetRefs")
    filters, clusters = [], []
    for number, each in enumerate(policy.take("lua", [])):
        name = f"envoy.filters.http.lua/envoyextensionpolicy/inference/{policy.name}/lua/{number}"
        code = {"inline_string": places.texts[each["valueRef"]["name"]]}
        lua = _typed(name, "extensions.filters.http.lua.v3.Lua", default_source_code=code)
        filters.append({**lua, "disabled": True})
    for number, each in enumerate(policy.take("extProc")):
        spec = _Spec({"kind": "extProc", "metadata": {"name": policy.name}, "spec": each})
        cluster = f"envoyextensionpolicy/inference/{policy.name}/extproc/{number}"
        filters.append(_ext_proc(spec, cluster))
        clusters.append(_server_cluster(spec, cluster, places))
        spec.check()
    return filters, clusters


def _ext_proc(spec: _Spec, cluster: str) -> Json:
    settings = _Spec(
        {"kind": "retry", "metadata": {"name": cluster}, "spec": spec.take("backendSettings.retry")}
    )
    service = {
        "envoy_grpc": {"cluster_name": cluster, "authority": "envoy-extproc.inference:9002"},
        "timeout": "10s",
        "retry_policy": {
            "retry_on": ",".join(settings.take("retryOn.triggers")),
            "num_retries": settings.take("numRetries"),
            "retry_back_off": _back_off(settings),
        },
    }
    settings.check()
    shown = spec.take("processingMode.response", None)
    mode = {
        "request_header_mode": "SEND",
        "request_body_mode": spec.take("processingMode.request.body").upper(),
        "request_trailer_mode": "SKIP",
        "response_header_mode": "SKIP" if shown is None else "SEND",
        "response_trailer_mode": "SKIP",
    }
    named = _typed(
        f"envoy.filters.http.ext_proc/{cluster}",
        "extensions.filters.http.ext_proc.v3.ExternalProcessor",
        grpc_service=service,
        failure_mode_allow=spec.take("failOpen"),
        message_timeout=_seconds(spec.take("messageTimeout")),
        status_on_error={"code": {503: "ServiceUnavailable"}[spec.take("statusOnError")]},
        allow_mode_override=spec.take("processingMode.allowModeOverride"),
        processing_mode=mode,
        response_attributes=[] if shown is None else shown["attributes"],
        metadata_options={
            "forwarding_namespaces": {"untyped": spec.take("metadata.accessibleNamespaces")},
            "receiving_namespaces": {"untyped": spec.take("metadata.writableNamespaces")},
        },
    )
    return {**named, "disabled": True}


def _router() -> Json:
    return _typed(
        "envoy.filters.http.router", "extensions.filters.http.router.v3.Router", suppress_envoy_headers=True
    )


# -- clusters --------------------------------------------------------------------------------------------------------------


def _backend(references: Sequence[Json], places: Places) -> Sequence[str]:
    (reference,) = references
    return places.services[reference["name"]]


def _cluster(name: str, addresses: Sequence[str], settings: _Spec, **more: Any) -> Json:
    limits = {
        "max_connections": "maxConnections",
        "max_pending_requests": "maxPendingRequests",
        "max_requests": "maxParallelRequests",
        "max_retries": "maxParallelRetries",
    }
    breakers = {ours: settings.take(f"circuitBreaker.{theirs}", 1024) for ours, theirs in limits.items()}
    return {
        "name": name,
        "type": "STATIC",  # EDS there; the same addresses
        "load_assignment": assignment(name, addresses),
        "connect_timeout": _seconds(settings.take("timeout.tcp.connectTimeout", "10s")),
        "per_connection_buffer_limit_bytes": _bytes(settings.take("connection.bufferLimit", "32Ki")),
        "ignore_health_on_host_removal": True,
        "circuit_breakers": {"thresholds": [breakers]},
        **more,
    }


def _least_request() -> Json:
    least = _typed(
        "envoy.load_balancing_policies.least_request",
        "extensions.load_balancing_policies.least_request.v3.LeastRequest",
    )
    return {"policies": [{"typed_extension_config": least}]}


def _protocol(**options: Any) -> Json:
    return {_HTTP: {"@type": f"type.googleapis.com/{_HTTP}", **options}}


def _server_cluster(spec: _Spec, name: str, places: Places) -> Json:
    """The cluster of this server: gRPC, with whatever `backendSettings` says."""
    addresses = _backend(spec.take("backendRefs"), places)
    settings = _Spec(
        {"kind": "backendSettings", "metadata": {"name": name}, "spec": spec.take("backendSettings", {})}
    )
    settings.ignore("loadBalancer")  # LeastRequest, the default
    http2: Json = {
        "initial_stream_window_size": _bytes(settings.take("http2.initialStreamWindowSize", "64Ki")),
        "initial_connection_window_size": _bytes(settings.take("http2.initialConnectionWindowSize", "1Mi")),
    }
    streams = settings.take("http2.maxConcurrentStreams", None)
    if streams is not None:
        http2["max_concurrent_streams"] = streams
    more: Json = {**_health(settings), "load_balancing_policy": _least_request()}
    more["typed_extension_protocol_options"] = _protocol(
        explicit_http_config={"http2_protocol_options": http2}
    )
    cluster = _cluster(name, addresses, settings, **more)
    settings.check()
    return cluster


def _health(settings: _Spec) -> Json:
    active, passive = settings.take("healthCheck.active", None), settings.take("healthCheck.passive", None)
    health: Json = {}
    if active is not None:
        check = {
            "timeout": active["timeout"],
            "interval": active["interval"],
            "unhealthy_threshold": active["unhealthyThreshold"],
            "healthy_threshold": active["healthyThreshold"],
            "grpc_health_check": {"service_name": active["grpc"]["service"]},
        }
        health["health_checks"] = [check]
    if passive is not None:
        health["outlier_detection"] = {
            "split_external_local_origin_errors": passive["splitExternalLocalOriginErrors"],
            "consecutive_local_origin_failure": passive["consecutiveLocalOriginFailures"],
            "base_ejection_time": passive["baseEjectionTime"],
            "interval": _seconds(passive["interval"]),
            "max_ejection_percent": passive["maxEjectionPercent"],
        }
    return health


# -- the log ---------------------------------------------------------------------------------------------------------------


def _access_log(proxy: _Spec, places: Places) -> tuple[Json, Json]:
    """The entry for each request; Envoy Gateway leaves Envoy's own interval and buffer: 1 s and 16 KiB."""
    proxy.ignore("provider")
    (setting,) = proxy.take("telemetry.accessLog.settings")
    (sink,) = setting.pop("sinks")
    assert (setting, sink.pop("type")) == ({"type": "Route"}, "ALS")
    spec = _Spec({"kind": "als", "metadata": {"name": "log"}, "spec": sink.pop("als")})
    name = "accesslog_als_0_0"
    cluster = _server_cluster(spec, name, places)
    common = {
        "log_name": spec.take("logName"),
        "transport_api_version": "V3",
        "grpc_service": {"envoy_grpc": {"cluster_name": name}},
    }
    assert spec.take("type") == "HTTP"
    spec.check()
    kind = "extensions.access_loggers.grpc.v3.HttpGrpcAccessLogConfig"
    return _typed("envoy.access_loggers.http_grpc", kind, common_config=common), cluster


# -- routes ----------------------------------------------------------------------------------------------------------------


def _route(
    route: _Spec, policies: Mapping[str, Json], filters: Sequence[str], places: Places
) -> tuple[list[tuple[int, Json]], Json]:
    """An HTTPRoute's entries, each with the number of headers it asks for, and its cluster."""
    route.ignore("parentRefs")
    (rule,) = route.take("rules")
    policy = _Spec(
        {
            "kind": "BackendTrafficPolicy",
            "metadata": {"name": route.name},
            "spec": policies.get(route.name, policies[""]),
        }
    )
    name = f"httproute/inference/{route.name}/rule/0"
    action = {
        "cluster": name,
        "timeout": policy.take("timeout.http.requestTimeout"),
        "idle_timeout": policy.take("timeout.http.streamIdleTimeout"),
        "retry_policy": _retry(policy),
        "upgrade_configs": [{"upgrade_type": "websocket"}],
    }
    common = {
        "route": action,
        "response_headers_to_add": _set_headers(rule.pop("filters", [])),
        "typed_per_filter_config": {
            each: {"@type": _TYPE + "config.route.v3.FilterConfig", "config": {}} for each in filters
        },
    }
    cluster = _pods(name, _backend(rule.pop("backendRefs"), places), policy)
    policy.check()
    entries = []
    for match in rule.pop("matches", [{}]):
        headers = [_header(each) for each in match.get("headers", [])]
        entries.append((len(headers), {"match": {"prefix": "/", "headers": headers}, **common}))
    assert not rule, rule
    return entries, cluster


def _header(match: Json) -> Json:
    assert match.get("type", "Exact") == "Exact"
    return {"name": match["name"], "string_match": {"exact": match["value"]}}


def _set_headers(filters: Sequence[Json]) -> list[Json]:
    """Values go to Envoy as they stand, so what it substitutes in them it does here too."""
    return [
        {
            "header": {"key": header["name"], "value": header["value"]},
            "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
        }
        for each in filters
        for header in each["responseHeaderModifier"]["set"]
    ]


def _back_off(settings: _Spec) -> Json:
    return {
        "base_interval": _seconds(settings.take("perRetry.backOff.baseInterval")),
        "max_interval": _seconds(settings.take("perRetry.backOff.maxInterval")),
    }


def _retry(policy: _Spec) -> Json:
    retry = _Spec({"kind": "retry", "metadata": {"name": policy.name}, "spec": policy.take("retry")})
    previous = _typed(
        "envoy.retry_host_predicates.previous_hosts",
        "extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate",
    )
    made = {
        "retry_on": ",".join(retry.take("retryOn.triggers")),
        "retriable_status_codes": retry.take("retryOn.httpStatusCodes"),
        "num_retries": retry.take("numRetries"),
        "retry_back_off": _back_off(retry),
        "retry_host_predicate": [previous],
        "host_selection_retry_max_attempts": 5,
    }
    retry.check()
    return made


def _pods(name: str, addresses: Sequence[str], policy: _Spec) -> Json:
    sources = [
        {"header": each["header"]} for each in policy.take("loadBalancer.endpointOverride.extractFrom")
    ]
    assert policy.take("loadBalancer.type") == "LeastRequest"
    override = _typed(
        "envoy.load_balancing_policies.override_host",
        "extensions.load_balancing_policies.override_host.v3.OverrideHost",
        override_host_sources=sources,
        fallback_policy=_least_request(),
    )
    idle = {"idle_timeout": policy.take("timeout.http.connectionIdleTimeout")}
    options = _protocol(common_http_protocol_options=idle, explicit_http_config={"http_protocol_options": {}})
    return _cluster(
        name,
        addresses,
        policy,
        load_balancing_policy={"policies": [{"typed_extension_config": override}]},
        typed_extension_protocol_options=options,
    )


# -- the listener ----------------------------------------------------------------------------------------------------------


def _listener(
    client: _Spec, filters: Sequence[Json], log: Json, routes: Sequence[Json], places: Places
) -> Json:
    client.ignore("targetRefs")
    hosts = [{"name": "all", "domains": ["*"], "routes": list(routes)}]
    manager = _typed(
        "envoy.filters.network.http_connection_manager",
        "extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix="http-10080",
        use_remote_address=True,
        server_header_transformation="PASS_THROUGH",
        normalize_path=True,
        common_http_protocol_options={"headers_with_underscores_action": "REJECT_REQUEST"},
        **_client_settings(client),
        route_config={"name": "http", "virtual_hosts": hosts},
        http_filters=list(filters),
        access_log=[log],
    )
    return {
        "name": "inference/inference/http",
        "address": socket_address(places.listen),
        "per_connection_buffer_limit_bytes": _bytes(client.take("connection.bufferLimit")),
        "filter_chains": [{"filters": [manager]}],
    }


def _client_settings(client: _Spec) -> Json:
    """What a ClientTrafficPolicy says of the connection manager."""
    assert client.take("headers.requestID") == "PreserveOrGenerate"
    hygiene = _typed(
        "envoy.http.early_header_mutation.header_mutation",
        "extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation",
        mutations=[{"remove": name} for name in client.take("headers.earlyRequestHeaders.remove")],
    )
    timeouts = {
        "request_headers_timeout": "requestHeadersReceivedTimeout",
        "request_timeout": "requestReceivedTimeout",
        "stream_idle_timeout": "streamIdleTimeout",
    }
    slashes = {"KeepUnchanged": "KEEP_UNCHANGED"}
    return {
        "generate_request_id": True,
        "preserve_external_request_id": True,
        "merge_slashes": not client.take("path.disableMergeSlashes"),
        "path_with_escaped_slashes_action": slashes[client.take("path.escapedSlashesAction")],
        "http2_protocol_options": {
            "max_concurrent_streams": client.take("http2.maxConcurrentStreams"),
            "initial_stream_window_size": _bytes(client.take("http2.initialStreamWindowSize")),
            "initial_connection_window_size": _bytes(client.take("http2.initialConnectionWindowSize")),
        },
        **{ours: client.take(f"timeout.http.{theirs}") for ours, theirs in timeouts.items()},
        "early_header_mutation_extensions": [hygiene],
    }
