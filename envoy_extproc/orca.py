"""ORCA: what an engine says of its load in the headers of an answer, read into a value; pure.

The fields are those of ``xds.data.orca.v3.OrcaLoadReport``. The header ``endpoint-load-metrics`` holds them as text, as
JSON or as base64 of the message, with the form's name in front; ``endpoint-load-metrics-bin`` holds the base64 alone,
and goes first where both are there, as in Envoy.

    TEXT cpu_utilization=0.3, named_metrics.queue=5       also with `:` for `=`, as Envoy 1.40 still takes
    JSON {"cpu_utilization": 0.3, "named_metrics": {"queue": 5}}
    BIN CTMzMzMzM9M/QhAKBXF1ZXVlEQAAAAAAABRA

Envoy insists on the prefix in capitals and on known names. Engines are less exact, so the prefix may be in any case or
missing here, and unknown names are passed over. What is wrong in itself makes the whole report unread: half a report is
a wrong one.
"""

from __future__ import annotations

import base64
import json
import math
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec

from envoy_extproc.endpoints import EngineStats
from envoy_extproc.headers import Headers

HEADER = "endpoint-load-metrics"
BINARY_HEADER = "endpoint-load-metrics-bin"
FORMAT_HEADER = "endpoint-load-metrics-format"
"""By which a request asks for a report."""

MAX_LENGTH = 8192
"""Characters of a value that is read: Envoy's own limit for all headers is 60 KB, and vLLM writes 90."""

MAX_METRICS = 64
"""Entries of a map that is read."""

_NOTHING: Mapping[str, float] = MappingProxyType({})
_SCALARS = ("application_utilization", "cpu_utilization", "mem_utilization", "rps_fractional", "eps")
_MAPS = ("named_metrics", "utilization")


class LoadReport(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine told. A number that is 0 was not told: protobuf knows no difference.

    Attributes:
        application_utilization: how busy the engine says it is; beyond 1 it has more to do than it can.
        cpu_utilization: share of its CPUs in use; beyond 1 likewise.
        mem_utilization: share of its memory in use, 0 to 1.
        rps_fractional: requests per second it serves.
        eps: errors per second among them.
        named_metrics: anything else, by the engine's own names.
        utilization: shares of further resources, 0 to 1.
    """

    application_utilization: float = 0.0
    cpu_utilization: float = 0.0
    mem_utilization: float = 0.0
    rps_fractional: float = 0.0
    eps: float = 0.0
    named_metrics: Mapping[str, float] = _NOTHING
    utilization: Mapping[str, float] = _NOTHING


class Flaw(StrEnum):
    """Why a report was not read: the value of a metric's label."""

    TOO_LONG = "too-long"
    MALFORMED = "malformed"
    NOT_FINITE = "not-finite"
    OUT_OF_RANGE = "out-of-range"
    DUPLICATE = "duplicate"
    TOO_MANY = "too-many"
    EMPTY = "empty"


class Parsed(NamedTuple):
    """A report, or why there is none; neither where no header came."""

    report: LoadReport | None = None
    flaw: Flaw | None = None


class _FlawError(Exception):
    def __init__(self, flaw: Flaw) -> None:
        super().__init__(flaw)
        self.flaw = flaw


Told = tuple[str, Any]
"""A name and what stands for its value; within a map, ``named_metrics.queue``."""

ABSENT = Parsed()
"""What no header makes."""

_FORMS = re.compile(r"(TEXT|JSON|BIN)(?=[\s{]|$)", re.IGNORECASE)
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?", re.IGNORECASE | re.ASCII)
_NOT_FINITE = re.compile(r"[+-]?(?:nan|inf|infinity)", re.IGNORECASE)


def of(headers: Headers) -> Parsed:
    """The report among the headers of an answer."""
    return parse(headers.get(HEADER), headers.get(BINARY_HEADER))


def parse(value: str | None, binary: str | None = None) -> Parsed:
    """The report in the values of ``endpoint-load-metrics`` and ``endpoint-load-metrics-bin``; raises nothing."""
    if value is None and binary is None:
        return ABSENT
    try:
        return Parsed(_report(_told(value or "") if binary is None else _from_binary(binary)))
    except _FlawError as error:
        return Parsed(flaw=error.flaw)


def _told(value: str) -> Iterable[Told]:
    value = value.strip()
    prefix = _FORMS.match(value)
    rest = value if prefix is None else value[prefix.end() :].strip()
    form = "" if prefix is None else prefix[0].upper()
    if form == "BIN":
        return _from_binary(rest)
    return _from_json(rest) if form == "JSON" or (not form and rest.startswith("{")) else _from_text(rest)


def _report(told: Iterable[Told]) -> LoadReport:
    """Puts what was told into its fields, each value checked.

    Raises:
        _FlawError: something in it is wrong.
    """
    fields: dict[str, Any] = {}
    for name, value in told:
        field, dot, key = name.partition(".")
        number = _number(value)
        if dot and field in _MAPS:
            _put(fields.setdefault(field, {}), key, number if field == "named_metrics" else _share(number))
        elif name in _SCALARS:
            fields[name] = _share(number) if name == "mem_utilization" else _at_least_0(number)
    if not fields:
        raise _FlawError(Flaw.EMPTY)
    return LoadReport(**fields)


def _put(metrics: dict[str, float], key: str, value: float) -> None:
    if not key:
        raise _FlawError(Flaw.MALFORMED)
    metrics[key] = value
    if len(metrics) > MAX_METRICS:
        raise _FlawError(Flaw.TOO_MANY)


def _number(value: Any) -> float:
    """A number, or its text: protobuf's JSON form takes either."""
    if isinstance(value, str):
        if _NUMBER.fullmatch(value) is None:
            raise _FlawError(Flaw.NOT_FINITE if _NOT_FINITE.fullmatch(value) else Flaw.MALFORMED)
        value = float(value)
    if not isinstance(value, float):
        raise _FlawError(Flaw.MALFORMED)
    if not math.isfinite(value):
        raise _FlawError(Flaw.NOT_FINITE)
    return value


def _at_least_0(value: float) -> float:
    if value < 0:
        raise _FlawError(Flaw.OUT_OF_RANGE)
    return value


def _share(value: float) -> float:
    if not 0 <= value <= 1:
        raise _FlawError(Flaw.OUT_OF_RANGE)
    return value


# -- the three forms ---------------------------------------------------------------------------------------------------


def _bounded(value: str) -> str:
    if len(value) > MAX_LENGTH:
        raise _FlawError(Flaw.TOO_LONG)
    return value


def _from_text(value: str) -> Iterator[Told]:
    """``name=value, name=value``; a colon for the sign, too, but names may hold colons: ``vllm:kv_cache_usage_perc``."""
    seen: set[str] = set()
    for pair in _bounded(value).split(","):
        name, sign, number = pair.partition("=") if "=" in pair else pair.rpartition(":")
        name = name.strip()
        if not sign and not pair.strip():
            continue  # behind the last comma
        if not name:
            raise _FlawError(Flaw.MALFORMED)
        if name in seen:
            raise _FlawError(Flaw.DUPLICATE)
        seen.add(name)
        yield name, number.strip()


def _from_json(value: str) -> Iterator[Told]:
    """Protobuf's JSON form: names as they are or in camel case, null for what is not told."""
    try:
        # Every number as a float, so that one of 400 digits is infinite and no error.
        told = json.loads(_bounded(value), object_pairs_hook=_pairs, parse_int=float)
    except (ValueError, RecursionError):
        raise _FlawError(Flaw.MALFORMED) from None
    if not isinstance(told, dict):
        raise _FlawError(Flaw.MALFORMED)
    for name, content in _pairs(
        [(_SNAKE.get(name, name), content) for name, content in told.items()]
    ).items():
        if name in _MAPS and content is not None:
            yield from _entries(name, content)
        elif name in _SCALARS and content is not None:
            yield name, content


_SNAKE: Mapping[str, str] = {
    re.sub("_(.)", lambda match: match[1].upper(), name): name for name in (*_SCALARS, *_MAPS)
}
"""Fields by their names in camel case."""


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise _FlawError(Flaw.DUPLICATE)
    return members


def _entries(name: str, content: Any) -> Iterator[Told]:
    if not isinstance(content, dict):
        raise _FlawError(Flaw.MALFORMED)
    return ((f"{name}.{key}", value) for key, value in content.items())


_VARINT, _DOUBLE, _BYTES = 0, 1, 2
_WIDTHS: Mapping[int, int] = {_DOUBLE: 8, 5: 4}  # of wire types of fixed width
_SCALAR_NUMBERS: Mapping[int, str] = {
    1: "cpu_utilization",
    2: "mem_utilization",
    6: "rps_fractional",
    7: "eps",
    9: "application_utilization",
}
_MAP_NUMBERS: Mapping[int, str] = {4: "request_cost", 5: "utilization", 8: "named_metrics"}


def _from_binary(value: str) -> Iterator[Told]:
    """Base64 of the message, padded or not. Of a field that is there twice the last counts, as in protobuf."""
    value = _bounded(value).strip()
    try:
        data = base64.b64decode(value.rstrip("=") + "=" * (-len(value.rstrip("=")) % 4), validate=True)
        for number, kind, content in _fields(data):
            if kind == _DOUBLE and number in _SCALAR_NUMBERS:
                yield _SCALAR_NUMBERS[number], struct.unpack("<d", content)[0]
            elif kind == _BYTES and number in _MAP_NUMBERS:
                key, number_told = _entry(content)
                yield f"{_MAP_NUMBERS[number]}.{key}", number_told
    except ValueError:
        raise _FlawError(Flaw.MALFORMED) from None


def _entry(data: bytes) -> tuple[str, float]:
    """An entry of a map: the key in field 1, the value in field 2."""
    key, value = "", 0.0
    for number, kind, content in _fields(data):
        if (number, kind) == (1, _BYTES):
            key = content.decode()
        elif (number, kind) == (2, _DOUBLE):
            value = struct.unpack("<d", content)[0]
    return key, value


def _fields(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(number, wire type, content) of each field of a message.

    Raises:
        ValueError: it is no message.
    """
    at = 0
    while at < len(data):
        tag, begin = _varint(data, at)
        number, kind = tag >> 3, tag & 7
        if not 0 < number < 1 << 29:
            raise ValueError(f"no field has the number {number}")
        length = 0
        if kind == _VARINT:
            _, begin = _varint(data, begin)
        elif kind == _BYTES:
            length, begin = _varint(data, begin)
        elif kind in _WIDTHS:
            length = _WIDTHS[kind]
        else:
            raise ValueError(f"there is no wire type {kind}")  # or one of groups, which no proto3 message has
        at = begin + length
        if at > len(data):
            raise ValueError("the message is cut off")
        yield number, kind, data[begin:at]


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number and where the bytes behind it begin.

    Raises:
        ValueError: it has no end.
    """
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("the message is cut off")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number of more than ten bytes")


# -- what it says of an engine -----------------------------------------------------------------------------------------

_COUNTS: Mapping[str, str] = {
    "num_requests_running": "running",
    "num_running_reqs": "running",
    "num_requests_waiting": "waiting",
    "num_queue_reqs": "waiting",
    "tokens_per_second": "generation_tokens_per_second",
}
"""Fields of `EngineStats` by the names that engines, and gateways like this one, use for them."""

_SHARES: Mapping[str, str] = {
    "kv_cache_usage_perc": "kv_cache_usage",  # vLLM; a share, for all its name
    "gpu_cache_usage_perc": "kv_cache_usage",  # vLLM's older engine
    "token_usage": "kv_cache_usage",  # SGLang
    "kv_cache_utilization": "kv_cache_usage",  # TensorRT-LLM
    "prefix_cache_hit_rate": "prefix_cache_hit_rate",
}
"""Likewise, from 0 to 1."""


def stats_of(report: LoadReport, at: float, before: EngineStats | None) -> EngineStats | None:
    """What is known of an engine that told `report` at monotonic second `at`.

    Args:
        report: what it told.
        at: when.
        before: what it said until then; fields that the report does not tell stay.

    Returns:
        `before` itself where the report tells nothing that is known here.
    """
    told: dict[str, Any] = dict(_fields_told(report))
    if not told:
        return before
    return EngineStats(at=at, **told) if before is None else msgspec.structs.replace(before, at=at, **told)


def _fields_told(report: LoadReport) -> Iterator[tuple[str, float]]:
    for name, value in report.named_metrics.items():
        plain = name.rpartition(":")[2]  # vllm:kv_cache_usage_perc
        if plain in _COUNTS and value >= 0:
            yield _COUNTS[plain], value
        elif plain in _SHARES and 0 <= value <= 1:
            yield _SHARES[plain], value
    # In Envoy's order. 0 is not told; whoever is idle shows it by the rest.
    busy = report.application_utilization or report.cpu_utilization
    if busy:
        yield "utilization", min(busy, 1.0)
    if report.mem_utilization:
        yield "mem_utilization", report.mem_utilization
    if report.rps_fractional:
        yield "requests_per_second", report.rps_fractional
