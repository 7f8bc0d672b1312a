"""What a pod says of itself, as endpoints: pure, and decoded only as far as it is needed.

Labels and annotations are AIBrix's (``model.aibrix.ai/...``); docs/kubernetes.md has the table. Where a label cannot hold
a value, for it has 63 characters, no slash and no comma, the annotation of the same name can.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Mapping
from typing import Any

import msgspec

from envoy_extproc.discovery.parse import EndpointError, parse_endpoints
from envoy_extproc.endpoints import Endpoint
from envoy_extproc.scheduling.configs import LABEL as _CONFIG

GENERIC = "generic"
"""The engine of a pod that names one nobody knows: requests reach it, its metrics are not read."""

_PREFIX = "model.aibrix.ai/"
_NAME = f"{_PREFIX}name"
_MODELS = f"{_PREFIX}models"
_PORT = f"{_PREFIX}port"
_METRIC_PORT = f"{_PREFIX}metric-port"
_ENGINE = f"{_PREFIX}engine"

_DEFAULT_PORT = "8000"  # vLLM's own
_DEFAULT_ENGINE = "vllm"
_MOST_PORTS = 64
"""More than a pod has accelerators, and so ranks; a longer list is a mistake that would fill the snapshot."""

# Pods of a group that do not answer requests themselves; AIBrix passes them over likewise.
_RAY_NODE = "ray.io/node-type"
_GROUP_INDEX = "stormservice.orchestration.aibrix.ai/pod-group-index"


class Meta(msgspec.Struct, rename="camel"):
    """ObjectMeta, the part that counts. Times are RFC 3339 in UTC, which sort as text."""

    name: str = ""
    namespace: str = ""
    resource_version: str = ""
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None


class Condition(msgspec.Struct):
    """A condition of any kind of object."""

    type: str = ""
    status: str = ""


class Status(msgspec.Struct, rename={"pod_ip": "podIP"}):
    """PodStatus, likewise."""

    phase: str = ""
    pod_ip: str = ""
    conditions: list[Condition] | None = None


class Pod(msgspec.Struct):
    """A pod, likewise.

    Attributes:
        flaw: why nothing but its name could be read; None where all could.
    """

    metadata: Meta = msgspec.field(default_factory=Meta)
    status: Status = msgspec.field(default_factory=Status)
    flaw: str | None = None


class _Identity(msgspec.Struct, rename="camel"):
    name: str = ""
    namespace: str = ""
    resource_version: str = ""


class _Identified(msgspec.Struct):
    metadata: _Identity


class PodError(ValueError):
    """A pod that is ready but cannot be used.

    Attributes:
        reason: one of few words, a metric's label: ``models``, ``port``, ``metric-port``, ``address``, ``labels``, ``object``.
    """

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class Mapped(msgspec.Struct, frozen=True):
    """What a pod is to us.

    Attributes:
        endpoints: one for each of its ports; none while it is not ready.
        unknown_engine: the engine it names, where nobody knows that.
    """

    endpoints: tuple[Endpoint, ...] = ()
    unknown_engine: str | None = None


NOT_LISTED = Mapped()

_pods = msgspec.json.Decoder(Pod)
_identities = msgspec.json.Decoder(_Identified)
_names = msgspec.json.Decoder(list[str])


def decode(text: msgspec.Raw | bytes) -> Pod:
    """A pod of the API's JSON; one that is no such thing comes back with its name and its flaw.

    Raises:
        msgspec.DecodeError: it is no JSON, or an object without a name.
        UnicodeDecodeError: not even its name is text.
    """
    try:
        return _pods.decode(text)
    except (msgspec.ValidationError, UnicodeDecodeError) as error:
        known = _identities.decode(text).metadata
        meta = Meta(name=known.name, namespace=known.namespace, resource_version=known.resource_version)
        return Pod(metadata=meta, flaw=str(error))


def mapped(pod: Pod, *, engines: Collection[str], qualified: bool) -> Mapped:
    """The endpoints of a pod.

    Args:
        pod: as the API has it.
        engines: the names an engine may have.
        qualified: whether names tell the namespace.

    Raises:
        PodError: it is ready, but what it says of itself makes no sense.
    """
    if pod.flaw is not None:
        raise PodError("object", pod.flaw)
    if not _ready(pod) or _follower(pod.metadata.labels or {}):
        return NOT_LISTED
    ports = _ports(pod, _PORT, _DEFAULT_PORT)
    metric_ports = _metric_ports(pod, len(ports))
    engine = (_said(pod, _ENGINE) or _DEFAULT_ENGINE).lower()
    known = engine in engines
    shared = {
        "models": _model_names(pod),
        "engine": engine if known else GENERIC,
        "labels": pod.metadata.labels or {},
    }
    name, host = _name(pod.metadata, qualified=qualified), _host(pod.status.pod_ip)
    items = [
        {"name": f"{name}:{port}" if len(ports) > 1 else name, "address": f"{host}:{port}"}
        | shared
        | ({} if metric_port is None else {"metrics_port": metric_port})
        for port, metric_port in zip(ports, metric_ports, strict=True)
    ]
    endpoints = _checked(items, engines)
    config = _listed(pod, _CONFIG)
    if config is not None:
        endpoints = tuple([msgspec.structs.replace(each, config=config) for each in endpoints])
    return Mapped(endpoints, None if known else engine)


def _ready(pod: Pod) -> bool:
    status = pod.status
    return (
        status.phase == "Running"
        and bool(status.pod_ip)
        and pod.metadata.deletion_timestamp is None
        and any(each.type == "Ready" and each.status == "True" for each in status.conditions or ())
    )


def _follower(labels: Mapping[str, str]) -> bool:
    """Whether another pod of its group takes the requests."""
    index = labels.get(_GROUP_INDEX, "0")
    return labels.get(_RAY_NODE) == "worker" or (index.isdecimal() and int(index) > 0)


def _said(pod: Pod, key: str) -> str | None:
    """A label, else the annotation of its name; blank is nothing."""
    for source in (pod.metadata.labels, pod.metadata.annotations):
        text = (source or {}).get(key, "").strip()
        if text:
            return text
    return None


def _listed(pod: Pod, key: str) -> str | None:
    """The other way round: an annotation can be a list or JSON, which a label is too narrow for."""
    text = (pod.metadata.annotations or {}).get(key, "").strip()
    return text or _said(pod, key)


def _model_names(pod: Pod) -> list[str]:
    written = (pod.metadata.annotations or {}).get(_MODELS)
    if written is None:
        name = _said(pod, _NAME)
        if name is None:
            raise PodError("models", f"neither {_NAME} nor {_MODELS} names a model")
        return [name]
    try:
        return _names.decode(written)
    except msgspec.DecodeError as error:
        raise PodError("models", f"{_MODELS} is no JSON list of names: {error}") from None


def _ports(pod: Pod, key: str, default: str) -> list[int]:
    reason = key.removeprefix(_PREFIX)
    parts = [part.strip() for part in (_listed(pod, key) or default).split(",")]
    for part in parts:
        if not (part.isascii() and part.isdecimal() and len(part) <= 5 and 1 <= int(part) <= 65_535):
            raise PodError(reason, f"{key}: {part!r} is no port from 1 to 65535")
    if len(parts) > _MOST_PORTS:
        raise PodError(reason, f"{key} names {len(parts)} ports, at most {_MOST_PORTS} can be")
    return [int(part) for part in parts]


def _metric_ports(pod: Pod, count: int) -> list[int | None]:
    """One for all of `count` ports, or one for each; None where the engine's dialect knows."""
    if _listed(pod, _METRIC_PORT) is None:
        return [None] * count
    ports = _ports(pod, _METRIC_PORT, "")
    if len(ports) == 1:
        return [*ports] * count
    if len(ports) != count:
        raise PodError("metric-port", f"{_METRIC_PORT} names {len(ports)} ports for {count}")
    return [*ports]


def _name(meta: Meta, *, qualified: bool) -> str:
    return f"{meta.namespace}/{meta.name}" if qualified else meta.name


def _host(pod_ip: str) -> str:
    try:
        return f"[{pod_ip}]" if ipaddress.ip_address(pod_ip).version == 6 else pod_ip
    except ValueError:
        raise PodError("address", f"{pod_ip!r} is no IP address") from None


def _checked(items: list[dict[str, Any]], engines: Collection[str]) -> tuple[Endpoint, ...]:
    """The same rules hold for pods as for endpoints that people write."""
    try:
        return parse_endpoints(items, engines={*engines, GENERIC})
    except EndpointError as error:
        fields = [step for step in error.path if isinstance(step, str)]
        field = fields[1] if len(fields) > 1 else "object"
        reason = "port" if field == "name" else field  # names of one pod differ by their ports alone
        raise PodError(reason, f"{field}: {error.reason}") from None
