"""A complete Envoy 1.40 bootstrap that fits a configuration: listener, ext_proc, pods, breakers, retries.

What it is careful about, and why:

- headers that steer routing are removed before any filter or route sees a client's own (`early_header_mutation`);
- the pod is taken from dynamic metadata, which no client can write, never from a header;
- every breaker is far above Envoy's default of 1,024: one ext_proc stream lives for each request, and with fail-open
  the default lets requests past this server, unrouted and unaccounted, while every client sees 200;
- what Envoy answers itself has OpenAI's error shape, since clients parse nothing else; its 503 says when to come again.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec
import yaml

from envoy_extproc.endpoints import Endpoint
from envoy_extproc.envoy.eds import CLUSTER, assignment, socket_address
from envoy_extproc.envoy.tls import ServerTls, transport_socket
from envoy_extproc.exchange.control import DESTINATION, SIDECARS

Json = dict[str, Any]

_TYPE = "type.googleapis.com/envoy."
_BREAKER = 1_000_000  # connections, requests, retries: no limit that a fleet reaches
_WINDOW = 1_048_576
_MOST_HEADERS, _MOST_HEADERS_KB = 128, 68
_LOG_CLUSTER = (
    "access_log"  # the same servers; a full breaker that lets requests past must not silence their log
)
_TRANSIENT = {"num_retries": 3, "retry_back_off": {"base_interval": "0.005s", "max_interval": "0.05s"}}


class _LocalReply(msgspec.Struct, frozen=True, kw_only=True):
    """What Envoy says instead of its own words.

    Attributes:
        when: CEL over Envoy's response code and its details.
        status: instead of Envoy's; None leaves it.
        retry_after: seconds for the header of that name, which OpenAI's clients wait for; None for no header.
    """

    when: str
    status: int | None = None
    message: str
    type: str = "api_error"
    code: str | None = "service_unavailable"
    retry_after: int | None = None


_NOT_OURS = (
    "!response.code_details.startsWith('envoy_extproc_')"  # answers of the ext_proc server stay as they are
)
_UNREACHABLE = "No model server could be reached, or it stopped answering."
_LOCAL_REPLIES = (  # the first that fits is taken
    _LocalReply(
        when="response.code_details == 'request_payload_too_large'",
        status=413,
        message="The request body is larger than this gateway accepts.",
        type="invalid_request_error",
        code="request_too_large",
    ),
    _LocalReply(
        when="response.code_details.startsWith('ext_proc_error')",
        status=503,
        message="The gateway cannot route requests at the moment.",
        retry_after=1,  # a server that was restarted is back in that time
    ),
    _LocalReply(
        when=f"response.code == 503 && {_NOT_OURS}",
        message=_UNREACHABLE,
        retry_after=1,  # the scraper has noticed pods that are gone by then
    ),
    _LocalReply(when=f"response.code >= 500 && {_NOT_OURS}", message=_UNREACHABLE),
    _LocalReply(
        when=f"response.code >= 400 && {_NOT_OURS}",
        message="The request could not be taken.",
        type="invalid_request_error",
        code=None,
    ),
)


class BootstrapOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the bootstrap is made from.

    Attributes:
        listen: where clients connect, ``host:port``.
        admin: Envoy's admin address.
        servers: addresses of the ext_proc servers, one for each process.
        endpoints: the pods Envoy may be sent to.
        fail_open: whether Envoy serves by fallback balancing while no server answers.
        max_body_bytes: of a request body, which Envoy buffers.
        tries: endpoints a decision names; retries walk them.
        message_timeout: seconds Envoy waits for a reply.
        endpoints_file: where Envoy reads the pods instead, as often as it is replaced; None for `endpoints` as they are.
        watched: whether pods may come and go while Envoy runs.
        server_tls: how the servers are spoken to in TLS; None for none.
    """

    listen: str
    admin: str
    servers: tuple[str, ...]
    endpoints: tuple[Endpoint, ...]
    fail_open: bool
    max_body_bytes: int
    tries: int = 3
    message_timeout: float = 10.0
    endpoints_file: Path | None = None
    watched: bool = False
    server_tls: ServerTls | None = None


def bootstrap(options: BootstrapOptions) -> str:
    """The bootstrap as YAML, with a comment that says what made it."""
    mode = "open" if options.fail_open else "closed"
    head = (
        "# Envoy 1.40 bootstrap, printed by `envoy-extproc config envoy`.\n"
        f"# ext_proc fails {mode}; {len(options.endpoints)} endpoint(s). {_advice(options)}"
    )
    return head + yaml.dump(as_dict(options), Dumper=_Dumper, sort_keys=False, width=110)


def _advice(options: BootstrapOptions) -> str:
    """What to do when endpoints change."""
    if options.endpoints_file is not None:
        return (
            "Envoy reads them from `envoy.endpoints_file`, as often as\n"
            "# `envoy-extproc serve` replaces it. Start `serve` first: Envoy does not start without the file.\n"
        )
    if options.watched:
        return (
            "Endpoints are watched here, but not by Envoy:\n"
            "# it does not know pods added later until this is printed again and Envoy restarted, and gives their\n"
            "# requests to a pod of its own choice. Set `envoy.endpoints_file`, and Envoy learns of them at once.\n"
        )
    return "Print it again when endpoints change:\n# Envoy can only be sent to pods it knows.\n"


class _Dumper(yaml.SafeDumper):
    """Writes a text of several lines as a block, so that the script in the bootstrap can be read."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)


def as_dict(options: BootstrapOptions) -> Json:
    """The bootstrap as plain values."""
    # Envoy wants a name as soon as it is told of anything while it runs, by a file too.
    node = {} if options.endpoints_file is None else {"node": {"id": "gateway", "cluster": "gateway"}}
    return {
        **node,
        "admin": {"address": socket_address(options.admin)},
        "static_resources": {
            "listeners": [_listener(options)],
            "clusters": [
                _pods(options),
                _server_cluster(_LOG_CLUSTER, options),
                _server_cluster("ext_proc", options),
            ],
        },
    }


def _listener(options: BootstrapOptions) -> Json:
    manager = {
        "@type": _TYPE + "extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "ingress",
        "use_remote_address": True,
        "always_set_request_id_in_response": True,  # also where Envoy answers by itself
        "preserve_external_request_id": True,  # engines build their ids from the client's own x-request-id
        "stream_idle_timeout": "600s",  # the longest silence before or between two tokens
        "request_headers_timeout": "10s",
        # Envoy's own limits of 100 and 60 KiB hold for clients, at this server; what it adds comes on top of them.
        "common_http_protocol_options": {"max_headers_count": _MOST_HEADERS},
        "max_request_headers_kb": _MOST_HEADERS_KB,
        "request_timeout": "60s",  # for the upload of the request
        "http2_protocol_options": {
            "max_concurrent_streams": 1000,
            "initial_stream_window_size": _WINDOW,
            "initial_connection_window_size": 16 * _WINDOW,
        },
        "early_header_mutation_extensions": [_hygiene()],
        "local_reply_config": {"mappers": [_mapper(each) for each in _LOCAL_REPLIES]},
        "route_config": _routes(options),
        # Lua first: it announces itself before ext_proc asks, and sees the answer last.
        "http_filters": [_lua_filter(), _ext_proc_filter(options), _router()],
        "access_log": [_access_log()],
    }
    chain = {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
    return {
        "name": "gateway",
        "address": socket_address(options.listen),
        "per_connection_buffer_limit_bytes": _WINDOW,
        "filter_chains": [chain],
    }


def _hygiene() -> Json:
    """What a client may not say, removed before anything reads it: also where Envoy lets a request past this server."""
    mutations: list[Json] = [
        {"remove": name}
        for name in (
            DESTINATION,
            "x-gateway-destination-endpoint-subset",
            "target-pod",
            "x-gateway-model-name",
            *SIDECARS,
        )
    ]
    return {
        "name": "envoy.http.early_header_mutation.header_mutation",
        "typed_config": {
            "@type": _TYPE + "extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation",
            "mutations": mutations,
        },
    }


def _mapper(reply: _LocalReply) -> Json:
    error = {"message": reply.message, "type": reply.type, "param": None, "code": reply.code}
    body = msgspec.json.encode({"error": error}).decode()
    mapper: Json = {
        "filter": {
            "extension_filter": {
                "name": "envoy.access_loggers.extension_filters.cel",
                "typed_config": {
                    "@type": _TYPE + "extensions.access_loggers.filters.cel.v3.ExpressionFilter",
                    "expression": reply.when,
                },
            }
        },
        "body_format_override": {
            "text_format_source": {"inline_string": body.replace("%", "%%")},
            "content_type": "application/json",
        },
    }
    if reply.status is not None:
        mapper["status_code"] = reply.status
    if reply.retry_after is not None:
        header = {"key": "retry-after", "value": str(reply.retry_after)}
        mapper["headers_to_add"] = [{"header": header, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}]
    return mapper


def _access_log() -> Json:
    """One entry for each request that reached a pod, to the same server: how it learns of requests it never saw."""
    return {
        "name": "envoy.access_loggers.http_grpc",
        "typed_config": {
            "@type": _TYPE + "extensions.access_loggers.grpc.v3.HttpGrpcAccessLogConfig",
            "common_config": {
                "log_name": "envoy_extproc",
                "transport_api_version": "V3",
                "grpc_service": {"envoy_grpc": {"cluster_name": _LOG_CLUSTER}},
                "buffer_flush_interval": "0.1s",
                # Written every 0.1 s and not before. Envoy drops entries that find this full and its connection too:
                # 2,000 streams that end at once are 3 MB.
                "buffer_size_bytes": 16 * _WINDOW,
            },
        },
    }


def _routes(options: BootstrapOptions) -> Json:
    route = {
        "cluster": CLUSTER,
        "timeout": "0s",  # the default of 15 s ends long answers
        "idle_timeout": "600s",
        "retry_policy": {
            "retry_on": "connect-failure,refused-stream,reset-before-request,retriable-status-codes",
            "retriable_status_codes": [503],
            "num_retries": max(0, options.tries - 1),
            "retry_back_off": _TRANSIENT["retry_back_off"],
        },
    }
    host = {
        "name": "models",
        "domains": ["*"],
        "request_body_buffer_limit": options.max_body_bytes,
        # Who answered, for native.lua, which cannot see it and takes it off again. Where Envoy answers itself, it adds
        # this too, with the address that it tried last: the details tell that from a pod's answer.
        "response_headers_to_add": [
            {
                "header": {
                    "key": "x-envoy-extproc-served",
                    "value": "%UPSTREAM_REMOTE_ADDRESS% %RESPONSE_CODE_DETAILS%",
                },
                "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
            }
        ],
        "routes": [{"match": {"prefix": "/"}, "route": route}],
    }
    return {"name": "models", "virtual_hosts": [host]}


def _lua_filter() -> Json:
    return {
        "name": "envoy.filters.http.lua",
        "typed_config": {
            "@type": _TYPE + "extensions.filters.http.lua.v3.Lua",
            "default_source_code": {"inline_string": native_lua()},
        },
    }


def native_lua() -> str:
    """The script of the native lane, as Envoy's Lua filter takes it."""
    return files(__package__).joinpath("native.lua").read_text("utf-8")


def _ext_proc_filter(options: BootstrapOptions) -> Json:
    return {
        "name": "envoy.filters.http.ext_proc",
        "typed_config": {
            "@type": _TYPE + "extensions.filters.http.ext_proc.v3.ExternalProcessor",
            "stat_prefix": "envoy_extproc",
            "grpc_service": {
                "envoy_grpc": {"cluster_name": "ext_proc"},
                "timeout": "0s",
                "retry_policy": {
                    "retry_on": "connect-failure,refused-stream,unavailable,reset",
                    **_TRANSIENT,
                },
            },
            "failure_mode_allow": options.fail_open,
            "status_on_error": {"code": "ServiceUnavailable"},
            "message_timeout": f"{options.message_timeout:g}s",
            "max_message_timeout": "60s",
            "allow_mode_override": True,
            "processing_mode": {
                "request_header_mode": "SEND",
                "request_body_mode": "BUFFERED",
                "response_header_mode": "SKIP",  # asked for by the reply to request headers where it must be seen
                "response_body_mode": "NONE",
                "request_trailer_mode": "SEND",
                "response_trailer_mode": "SKIP",
            },
            "response_attributes": [
                "upstream.address",
                "upstream.request_attempt_count",
                "response.code_details",
            ],
            "mutation_rules": {"allow_all_routing": False, "allow_envoy": False},
            "metadata_options": {
                "forwarding_namespaces": {"untyped": ["envoy.lb.subset_hint", "envoy_extproc_lua"]},
                "receiving_namespaces": {"untyped": ["envoy.lb", "envoy_extproc"]},
            },
        },
    }


def _router() -> Json:
    return {
        "name": "envoy.filters.http.router",
        "typed_config": {"@type": _TYPE + "extensions.filters.http.router.v3.Router"},
    }


def _pods(options: BootstrapOptions) -> Json:
    fallback = {
        "name": "envoy.load_balancing_policies.least_request",
        "typed_config": {"@type": _TYPE + "extensions.load_balancing_policies.least_request.v3.LeastRequest"},
    }
    override = {
        "name": "envoy.load_balancing_policies.override_host",
        "typed_config": {
            "@type": _TYPE + "extensions.load_balancing_policies.override_host.v3.OverrideHost",
            "override_host_sources": [{"metadata": {"key": "envoy.lb", "path": [{"key": DESTINATION}]}}],
            "fallback_policy": {"policies": [{"typed_extension_config": fallback}]},
        },
    }
    protocol = {
        # Python servers close an idle connection after 5 s; Envoy must be first, or a request meets the close.
        "common_http_protocol_options": {
            "idle_timeout": "4s",
            "max_headers_count": _MOST_HEADERS,
            "max_response_headers_kb": _MOST_HEADERS_KB,
        },
        "explicit_http_config": {"http_protocol_options": {}},
    }
    return {
        "name": CLUSTER,
        **_members(options),
        "connect_timeout": "1s",
        "per_connection_buffer_limit_bytes": _WINDOW,
        "circuit_breakers": _breakers(),
        "load_balancing_policy": {"policies": [{"typed_extension_config": override}]},
        "typed_extension_protocol_options": _protocol_options(protocol),
    }


def _members(options: BootstrapOptions) -> Json:
    """Who is in the cluster of pods: as it is written here, or as the file says at the moment."""
    if options.endpoints_file is None:
        addresses = [endpoint.address for endpoint in options.endpoints]
        return {"type": "STATIC", "load_assignment": assignment(CLUSTER, addresses)}
    path = options.endpoints_file.absolute()  # Envoy may be started in another directory
    source = {"path": str(path), "watched_directory": {"path": str(path.parent)}}
    config = {"path_config_source": source, "resource_api_version": "V3"}
    return {"type": "EDS", "eds_cluster_config": {"eds_config": config}}


def _server_cluster(name: str, options: BootstrapOptions) -> Json:
    http2 = {
        "initial_stream_window_size": _WINDOW,
        "initial_connection_window_size": 16 * _WINDOW,
        "max_concurrent_streams": _BREAKER,
        # Each exchange that ends sends one RST_STREAM. More than 1,000 of them queued at once, and Envoy's flood
        # protection would take this server for an attacker and fail the streams that are left.
        "max_outbound_frames": _BREAKER,
        "max_outbound_control_frames": _BREAKER,
        "connection_keepalive": {"interval": "30s", "timeout": "5s"},
    }
    return {
        "name": name,
        "type": "STRICT_DNS",
        "connect_timeout": "0.25s",
        # Log streams go round, so that every server hears that the log is wired.
        "lb_policy": "ROUND_ROBIN" if name == _LOG_CLUSTER else "LEAST_REQUEST",
        "circuit_breakers": _breakers(),
        # A server that drains says so, and gets no new requests while another one is ready.
        "health_checks": [_health_check()],
        # A server that refuses or resets is left alone for a moment, so a restart costs no request.
        "outlier_detection": {
            "split_external_local_origin_errors": True,
            "consecutive_local_origin_failure": 1,
            "enforcing_consecutive_local_origin_failure": 100,
            "base_ejection_time": "1s",
            "interval": "0.5s",
            "max_ejection_percent": 100 if len(options.servers) > 1 else 0,
        },
        "typed_extension_protocol_options": _protocol_options(
            {"explicit_http_config": {"http2_protocol_options": http2}}
        ),
        **({} if options.server_tls is None else transport_socket(options.server_tls, options.servers)),
        "load_assignment": assignment(name, options.servers),
    }


def _health_check() -> Json:
    often = "1s"
    return {
        "timeout": often,
        "interval": often,
        "no_traffic_interval": often,
        "unhealthy_threshold": 1,
        "healthy_threshold": 1,
        "grpc_health_check": {"service_name": "envoy.service.ext_proc.v3.ExternalProcessor"},
    }


def _breakers() -> Json:
    limits = ("max_connections", "max_pending_requests", "max_requests", "max_retries")
    return {"thresholds": [dict.fromkeys(limits, _BREAKER)]}


def _protocol_options(options: Mapping[str, Any]) -> Json:
    name = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    return {name: {"@type": f"type.googleapis.com/{name}", **options}}
