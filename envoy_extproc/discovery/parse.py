"""Reads a list of endpoints as people write it, strictly: what is wrong is named with its place.

A list is either bare or under the only key ``endpoints``; an item is

    {name: pod-a, address: "10.0.0.1:8000", models: [llama-3-8b], engine: vllm, labels: {gpu: a10}}

of which `address` and `models` are required; a name defaults to the address, the engine to vLLM. `metrics_port` is
for an engine whose metrics page is on another port than its dialect says.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Any

from envoy_extproc.endpoints import Endpoint

Path = tuple[str | int, ...]
"""Where something stands in the data: keys and indices from the top."""

_DEFAULT_ENGINE = "vllm"  # the engine this server knows best, and Endpoint's own default
_KEYS = ("address", "engine", "labels", "metrics_port", "models", "name")
_CONTROL = frozenset({"Cc", "Cs"})  # control characters, and surrogates, which no header can carry

_host_and_port = re.compile(r"(?:\[([^\]]*)\]|([^:\[\]]*)):([0-9]{1,5})")


class EndpointError(ValueError):
    """A list of endpoints that cannot be used; its text names the place and says why.

    Attributes:
        path: the place in the data, such as ``("endpoints", 2, "address")``.
        reason: the text without the place.
    """

    def __init__(self, reason: str, path: Path = ()) -> None:
        super().__init__(f"{place(path)}: {reason}" if path else reason)
        self.path = path
        self.reason = reason


def place(path: Path) -> str:
    """A path as people read it: ``endpoints[2].address``."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).lstrip(".")


def parse_endpoints(data: Any, *, engines: Collection[str]) -> tuple[Endpoint, ...]:
    """The endpoints of decoded YAML or JSON `data`, in its order; `engines` are the names an engine may have.

    Addresses come back as Envoy writes them: IPv6 in brackets and in its short, lower-case form.

    Raises:
        EndpointError: the data is not such a list; the first thing that is wrong is told.
    """
    items = _items(data)
    endpoints = tuple(
        _endpoint(item, ("endpoints", index), frozenset(engines)) for index, item in enumerate(items)
    )
    _check_unique("name", (endpoint.name for endpoint in endpoints))
    _check_unique("address", (endpoint.address for endpoint in endpoints))
    return endpoints


def _items(data: Any) -> list[Any]:
    if isinstance(data, Mapping):
        for key in data:
            if key != "endpoints":
                raise EndpointError("unknown key; the only one here is endpoints", (str(key),))
        data = data.get("endpoints")
    if not isinstance(data, list):
        raise EndpointError(f"must be a list, not {_kind(data)}", ("endpoints",))
    return data


def _endpoint(item: Any, path: Path, engines: Collection[str]) -> Endpoint:
    if not isinstance(item, Mapping):
        raise EndpointError(f"must be a mapping with {', '.join(_KEYS)}, not {_kind(item)}", path)
    for key in item:
        if key not in _KEYS:
            raise EndpointError(f"unknown key; known are {', '.join(_KEYS)}", (*path, str(key)))
    address = _address(_required(item, "address", path), (*path, "address"))
    return Endpoint(
        name=_optional(item, "name", path, _text, address),
        address=address,
        models=_models(_required(item, "models", path), (*path, "models")),
        engine=_engine(item.get("engine", _DEFAULT_ENGINE), (*path, "engine"), engines),
        labels=_optional(item, "labels", path, _labels, MappingProxyType({})),
        metrics_port=_optional(item, "metrics_port", path, _port, None),
    )


def _required(item: Mapping[str, Any], key: str, path: Path) -> Any:
    if key not in item:
        raise EndpointError("is missing", (*path, key))
    return item[key]


def _optional(
    item: Mapping[str, Any], key: str, path: Path, parse: Callable[[Any, Path], Any], absent: Any
) -> Any:
    return parse(item[key], (*path, key)) if key in item else absent


def _text(value: Any, path: Path) -> str:
    if not isinstance(value, str):
        raise EndpointError(f"must be text, not {_kind(value)}; quote it if it is meant as text", path)
    if not value.strip():
        raise EndpointError("must not be empty", path)
    if any(unicodedata.category(character) in _CONTROL for character in value):
        raise EndpointError(f"{value!r} has a control character", path)
    return value


def _address(value: Any, path: Path) -> str:
    text = _text(value, path)
    match = _host_and_port.fullmatch(text)
    if match is None:
        raise EndpointError(f"{text!r} is not ip:port (IPv6 in brackets)", path)
    port = int(match[3])
    if not 1 <= port <= 65535:
        raise EndpointError(f"{text!r} has a port outside 1 to 65535", path)
    return f"{_host(match[1], match[2], text, path)}:{port}"


def _host(bracketed: str | None, bare: str | None, text: str, path: Path) -> str:
    try:
        if bracketed is not None:
            # As Envoy writes it, for Envoy compares the text; it has no zones. ::ffff:1.2.3.4 keeps its dots so.
            packed = ipaddress.IPv6Address(bracketed).packed
            if "%" in bracketed:
                raise EndpointError(f"{text!r} has a zone, which Envoy's addresses have not", path)
            return f"[{socket.inet_ntop(socket.AF_INET6, packed)}]"
        return str(ipaddress.IPv4Address(bare))
    except ipaddress.AddressValueError:
        raise EndpointError(
            f"{text!r} has no IP address before its port; a host name cannot stand here, "
            "because Envoy's override_host compares addresses",
            path,
        ) from None


def _models(value: Any, path: Path) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise EndpointError(f"must be a list of model names, not {_kind(value)}", path)
    if not value:
        raise EndpointError("must name at least one model", path)
    models = tuple(_text(model, (*path, index)) for index, model in enumerate(value))
    for index, model in enumerate(models):
        if model in models[:index]:
            raise EndpointError(f"{model!r} is named twice", (*path, index))
    return models


def _engine(value: Any, path: Path, engines: Collection[str]) -> str:
    engine = _text(value, path)
    if engine not in engines:
        raise EndpointError(f"{engine!r} is not known; known are {', '.join(sorted(engines))}", path)
    return engine


def _port(value: Any, path: Path) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 65535:
        raise EndpointError(f"must be a port from 1 to 65535, not {value!r}", path)
    return value


def _labels(value: Any, path: Path) -> Mapping[str, str]:
    if not isinstance(value, Mapping):
        raise EndpointError(f"must be a mapping of text to text, not {_kind(value)}", path)
    return MappingProxyType(
        {_text(key, path): _label(label, (*path, str(key))) for key, label in value.items()}
    )


def _label(value: Any, path: Path) -> str:
    return "" if value == "" else _text(value, path)  # Kubernetes allows a label without a value


def _check_unique(key: str, values: Iterable[str]) -> None:
    first: dict[str, int] = {}
    for index, value in enumerate(values):
        if first.setdefault(value, index) != index:
            reason = f"{value!r} is already the {key} of endpoints[{first[value]}]"
            raise EndpointError(reason, ("endpoints", index, key))


def _kind(value: Any) -> str:
    kinds = {type(None): "nothing", str: "text", bool: "a boolean", list: "a list", dict: "a mapping"}
    number = "a number" if isinstance(value, int | float) else f"a {type(value).__name__}"
    return kinds.get(type(value), number)
