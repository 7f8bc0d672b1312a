"""Reading what engines say of their load, in each form; what is wrong is told in a word, and nothing raises."""

from __future__ import annotations

import base64
import json
import math
import struct
from typing import Any

import msgspec
import pytest
from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet
from hypothesis import given
from hypothesis import strategies as st

from envoy_extproc._proto import orca_pb2
from envoy_extproc.endpoints import EngineStats
from envoy_extproc.headers import Headers
from envoy_extproc.orca import MAX_LENGTH, MAX_METRICS, Flaw, LoadReport, of, parse, stats_of
from envoy_extproc.server import orca as written
from tests.support.builders import candidate
from tests.support.captures import FOLDER

FULL = LoadReport(
    application_utilization=1.5,
    cpu_utilization=0.25,
    mem_utilization=0.75,
    rps_fractional=12.5,
    eps=0.5,
    named_metrics={"queue": -3.0, "vllm:kv_cache_usage_perc": 0.125},
    utilization={"gpu": 0.5},
)
MESSAGE = orca_pb2.OrcaLoadReport(
    cpu_utilization=0.25,
    mem_utilization=0.75,
    rps=7,
    request_cost={"tokens": 5.0},
    utilization={"gpu": 0.5},
    rps_fractional=12.5,
    eps=0.5,
    named_metrics={"queue": -3.0, "vllm:kv_cache_usage_perc": 0.125},
    application_utilization=1.5,
).SerializeToString()
TEXT = (
    "application_utilization=1.5, cpu_utilization=0.25,mem_utilization = 0.75 , rps_fractional:12.5, eps: .5,"
    "named_metrics.queue=-3, named_metrics.vllm:kv_cache_usage_perc=1.25e-1, utilization.gpu=0.5,"
)
OBJECT = {
    "application_utilization": 1.5,
    "cpuUtilization": 0.25,
    "mem_utilization": 0.75,
    "rps": 7,
    "rpsFractional": "12.5",
    "eps": 0.5,
    "request_cost": {"tokens": 5},
    "utilization": {"gpu": 0.5},
    "namedMetrics": {"queue": -3, "vllm:kv_cache_usage_perc": 0.125},
}


def b64(message: bytes) -> str:
    return base64.b64encode(message).decode()


@pytest.mark.parametrize(
    "value",
    [
        f"TEXT {TEXT}",
        f"text  {TEXT}",
        TEXT,
        f"JSON {json.dumps(OBJECT)}",
        f"Json{json.dumps(OBJECT)}",
        f" {json.dumps(OBJECT, indent=1)} ",
        f"BIN {b64(MESSAGE)}",
        f"bin {b64(MESSAGE).rstrip('=')} ",
    ],
)
def test_the_forms_say_the_same(value: str) -> None:
    assert parse(value) == (FULL, None)


def test_the_binary_header_goes_first() -> None:
    headers = Headers([("Endpoint-Load-Metrics", "TEXT eps=9"), ("endpoint-load-metrics-bin", b64(MESSAGE))])
    assert of(headers) == (FULL, None)


def test_no_header_is_no_flaw() -> None:
    assert of(Headers([("content-type", "application/json")])) == (None, None)


@pytest.mark.parametrize("name", ["orca_chat_TEXT", "orca_chat_JSON"])
def test_what_vllm_writes(name: str) -> None:
    head = (FOLDER / f"{name}.raw").read_bytes().partition(b"\r\n\r\n")[0].decode()
    headers = Headers(
        [(key, value.strip()) for key, _, value in (line.partition(":") for line in head.split("\r\n"))]
    )
    report = of(headers).report
    assert report == LoadReport(named_metrics={"num_requests_waiting": 0.0, "kv_cache_usage_perc": 0.0})


def test_what_vllms_front_end_in_rust_writes() -> None:
    """Without the prefix, and without a space behind the comma."""
    report = parse("named_metrics.kv_cache_usage_perc=0.5,named_metrics.num_requests_waiting=2").report
    assert report == LoadReport(named_metrics={"kv_cache_usage_perc": 0.5, "num_requests_waiting": 2.0})


def test_unknown_names_are_passed_over() -> None:
    assert parse("TEXT queue_depth=3, eps=1").report == LoadReport(eps=1.0)
    assert parse('JSON {"queue_depth": [{}], "eps": 1, "cpu_utilization": null}').report == LoadReport(
        eps=1.0
    )
    # Field 15 as a varint, 14 as four bytes, and cpu_utilization as bytes, which it is not.
    more = b"\x78\x96\x01" + b"\x75abcd" + b"\x0a\x01x"
    assert parse(f"BIN {b64(more + MESSAGE)}").report == FULL


def entry(key: bytes, value: float, field: int = 8) -> bytes:
    """An entry of a map on the wire."""
    inner = b"\x0a" + bytes([len(key)]) + key + b"\x11" + struct.pack("<d", value)
    return bytes([field << 3 | 2, len(inner)]) + inner


MANY = {f"m{number}": 1.0 for number in range(MAX_METRICS + 1)}
NAN, INFINITE = b"\x09" + struct.pack("<d", math.nan), b"\x09" + struct.pack("<d", math.inf)


@pytest.mark.parametrize(
    ("flaw", "value"),
    [
        (Flaw.EMPTY, ""),
        (Flaw.EMPTY, "TEXT"),
        (Flaw.EMPTY, "JSON {}"),
        (Flaw.EMPTY, 'JSON {"cpu_utilization": null, "named_metrics": {}}'),
        (Flaw.EMPTY, "BIN "),
        (Flaw.EMPTY, "TEXT queue_depth=3"),
        (Flaw.MALFORMED, "garbage"),
        (Flaw.MALFORMED, "TEXT eps"),
        (Flaw.MALFORMED, "TEXT eps="),
        (Flaw.MALFORMED, "TEXT =1"),
        (Flaw.MALFORMED, "TEXT eps=1=2"),
        (Flaw.MALFORMED, "TEXT eps=0x10"),
        (Flaw.MALFORMED, "TEXT eps=1_000"),
        (Flaw.MALFORMED, "TEXT eps=\u0661"),
        (Flaw.MALFORMED, "TEXT queue_depth=many"),
        (Flaw.MALFORMED, "TEXT named_metrics.=1"),
        (Flaw.MALFORMED, "XML eps=1 2"),
        (Flaw.MALFORMED, "JSON"),
        (Flaw.MALFORMED, "JSON eps=1"),
        (Flaw.MALFORMED, "JSON [1]"),
        (Flaw.MALFORMED, "JSON " + "[" * 5000),
        (Flaw.MALFORMED, 'JSON {"eps": true}'),
        (Flaw.MALFORMED, 'JSON {"eps": {}}'),
        (Flaw.MALFORMED, 'JSON {"eps": "x"}'),
        (Flaw.MALFORMED, 'JSON {"named_metrics": [1]}'),
        (Flaw.MALFORMED, 'JSON {"named_metrics": {"a": null}}'),
        (Flaw.MALFORMED, 'JSON {"named_metrics": {"": 1}}'),
        (Flaw.MALFORMED, "BIN !"),
        (Flaw.MALFORMED, "BIN \u00e9"),
        (Flaw.MALFORMED, f"BIN {b64(MESSAGE[:-1])}"),
        (Flaw.MALFORMED, f"BIN {b64(entry(bytes([0xFF]), 1.0))}"),
        (Flaw.MALFORMED, f"BIN {b64(entry(b'', 1.0))}"),
        (Flaw.MALFORMED, f"BIN {b64(bytes([0x00, 0x01]))}"),
        (Flaw.MALFORMED, f"BIN {b64(bytes([0x80] * 11))}"),
        (Flaw.MALFORMED, f"BIN {b64(bytes([0x0B]))}"),
        (Flaw.NOT_FINITE, "TEXT eps=NaN"),
        (Flaw.NOT_FINITE, "TEXT eps=-inf"),
        (Flaw.NOT_FINITE, "TEXT named_metrics.a=1e999"),
        (Flaw.NOT_FINITE, 'JSON {"eps": NaN}'),
        (Flaw.NOT_FINITE, 'JSON {"eps": "Infinity"}'),
        (Flaw.NOT_FINITE, 'JSON {"eps": 1' + "0" * 400 + "}"),
        (Flaw.NOT_FINITE, f"BIN {b64(NAN)}"),
        (Flaw.NOT_FINITE, f"BIN {b64(INFINITE)}"),
        (Flaw.NOT_FINITE, f"BIN {b64(entry(b'a', math.nan))}"),
        (Flaw.OUT_OF_RANGE, "TEXT application_utilization=-0.1"),
        (Flaw.OUT_OF_RANGE, "TEXT cpu_utilization=-0.1"),
        (Flaw.OUT_OF_RANGE, "TEXT rps_fractional=-1"),
        (Flaw.OUT_OF_RANGE, "TEXT eps=-1"),
        (Flaw.OUT_OF_RANGE, "TEXT mem_utilization=1.01"),
        (Flaw.OUT_OF_RANGE, "TEXT utilization.gpu=1.01"),
        (Flaw.OUT_OF_RANGE, "TEXT utilization.gpu=-1"),
        (Flaw.DUPLICATE, "TEXT eps=1, eps=1"),
        (Flaw.DUPLICATE, "TEXT named_metrics.a=1, named_metrics.a:1"),
        (Flaw.DUPLICATE, 'JSON {"eps": 1, "eps": 1}'),
        (Flaw.DUPLICATE, 'JSON {"rpsFractional": 1, "rps_fractional": 1}'),
        (Flaw.DUPLICATE, 'JSON {"named_metrics": {"a": 1, "a": 1}}'),
        (Flaw.TOO_MANY, "TEXT " + ",".join(f"named_metrics.{name}=1" for name in MANY)),
        (Flaw.TOO_MANY, "JSON " + json.dumps({"utilization": MANY})),
        (Flaw.TOO_MANY, f"BIN {b64(b''.join(entry(name.encode(), 1.0) for name in MANY))}"),
        (Flaw.TOO_LONG, "TEXT eps=1" + " " * MAX_LENGTH + ",eps=2"),
        (Flaw.TOO_LONG, "JSON {" + " " * MAX_LENGTH + "}"),
        (Flaw.TOO_LONG, "BIN " + "A" * (MAX_LENGTH + 1)),
    ],
    ids=lambda value: repr(value[:40]),
)
def test_flaws(flaw: Flaw, value: str) -> None:
    assert parse(value) == (None, flaw)
    if value.startswith("BIN "):
        assert parse(None, value.removeprefix("BIN ")) == (None, flaw)


def test_as_many_metrics_as_there_may_be() -> None:
    names = list(MANY)[:MAX_METRICS]
    report = parse("TEXT " + ",".join(f"named_metrics.{name}=1" for name in names)).report
    assert report is not None
    assert list(report.named_metrics) == names


# -- any report, any bytes -------------------------------------------------------------------------------------------

AT_LEAST_0 = st.floats(0, 1e9)
SHARE = st.floats(0, 1)
NAME = st.text(
    st.characters(min_codepoint=33, max_codepoint=126, exclude_characters=',="'), min_size=1, max_size=20
)
REPORTS = st.builds(
    LoadReport,
    application_utilization=AT_LEAST_0,
    cpu_utilization=AT_LEAST_0,
    mem_utilization=SHARE,
    rps_fractional=AT_LEAST_0,
    eps=AT_LEAST_0,
    named_metrics=st.dictionaries(NAME, st.floats(allow_nan=False, allow_infinity=False), max_size=10),
    utilization=st.dictionaries(NAME, SHARE, max_size=10),
)


def scalars(report: LoadReport) -> dict[str, Any]:
    return {name: value for name, value in msgspec.structs.asdict(report).items() if isinstance(value, float)}


def as_text(report: LoadReport) -> str:
    told = scalars(report)
    told |= {f"named_metrics.{name}": value for name, value in report.named_metrics.items()}
    told |= {f"utilization.{name}": value for name, value in report.utilization.items()}
    return "TEXT " + ", ".join(f"{name}={value!r}" for name, value in told.items())


def as_json(report: LoadReport) -> str:
    return "JSON " + json.dumps(
        {
            **scalars(report),
            "named_metrics": dict(report.named_metrics),
            "utilization": dict(report.utilization),
        }
    )


def as_binary(report: LoadReport) -> str:
    return f"BIN {b64(orca_pb2.OrcaLoadReport(**msgspec.structs.asdict(report)).SerializeToString())}"


@given(REPORTS)
def test_any_report_is_read_again(report: LoadReport) -> None:
    assert parse(as_text(report)) == (report, None)
    assert parse(as_json(report)) == (report, None)
    nothing = report == LoadReport()
    assert parse(as_binary(report)) == ((None, Flaw.EMPTY) if nothing else (report, None))


@given(
    st.sampled_from(["", "TEXT ", "JSON ", "BIN ", "{"]).flatmap(
        lambda prefix: st.text(max_size=80).map(lambda text: prefix + text)
    ),
    st.none() | st.text(max_size=40),
)
def test_any_text_is_a_report_or_has_a_flaw(value: str, binary: str | None) -> None:
    report, flaw = parse(value, binary)
    assert (report is None) != (flaw is None)


NUMBER = st.builds(lambda value: struct.pack("<d", value), st.floats())
PIECE = st.one_of(
    st.builds(lambda field, value: bytes([field << 3 | 1]) + value, st.integers(1, 15), NUMBER),
    st.builds(
        lambda field, key, value: entry(key, value, field),
        st.integers(1, 15),
        st.binary(max_size=3),
        st.floats(),
    ),
    st.binary(max_size=6),
)


_GROUP = 3  # a wire type that no proto3 message has; protobuf passes over it


@given(st.lists(PIECE, max_size=6).map(b"".join))
def test_any_bytes_read_as_protobuf_reads_them(data: bytes) -> None:
    """Protobuf's own parser for an oracle; what it takes for no message is none here, and the other way round."""
    report, flaw = parse(None, b64(data))
    try:
        message = orca_pb2.OrcaLoadReport.FromString(data)
    except DecodeError:
        assert flaw is not None
        return
    if report is not None:
        assert message.application_utilization == report.application_utilization
        assert message.cpu_utilization == report.cpu_utilization
        assert message.mem_utilization == report.mem_utilization
        assert (message.rps_fractional, message.eps) == (report.rps_fractional, report.eps)
        assert dict(message.named_metrics) == report.named_metrics
        assert dict(message.utilization) == report.utilization
    elif flaw is Flaw.EMPTY:
        message.ClearField("rps")
        message.ClearField("request_cost")
        message.DiscardUnknownFields()
        assert message == orca_pb2.OrcaLoadReport()
    elif flaw is Flaw.MALFORMED:
        unknown = UnknownFieldSet(message)
        grouped = any(unknown[index].wire_type == _GROUP for index in range(len(unknown)))
        assert grouped or "" in message.named_metrics or "" in message.utilization


# -- what it says of an engine ---------------------------------------------------------------------------------------

SCRAPED = EngineStats(at=5.0, running=3.0, waiting=2.0, kv_cache_usage=0.5, prefix_cache_hit_rate=0.25)


@pytest.mark.parametrize(
    ("told", "fields"),
    [
        ("named_metrics.kv_cache_usage_perc=0.75", {"kv_cache_usage": 0.75}),
        ("named_metrics.vllm:gpu_cache_usage_perc=0.75", {"kv_cache_usage": 0.75}),
        ("named_metrics.sglang:token_usage=0.75", {"kv_cache_usage": 0.75}),
        ("named_metrics.kv_cache_utilization=0.75", {"kv_cache_usage": 0.75}),
        ("named_metrics.vllm:num_requests_running=7", {"running": 7.0}),
        ("named_metrics.num_running_reqs=7", {"running": 7.0}),
        ("named_metrics.num_requests_waiting=0", {"waiting": 0.0}),
        ("named_metrics.num_queue_reqs=7", {"waiting": 7.0}),
        ("named_metrics.prefix_cache_hit_rate=1", {"prefix_cache_hit_rate": 1.0}),
        ("named_metrics.tokens_per_second=99", {"generation_tokens_per_second": 99.0}),
        ("cpu_utilization=0.3", {"utilization": 0.3}),
        ("cpu_utilization=0.3, application_utilization=0.4", {"utilization": 0.4}),
        ("application_utilization=1.4", {"utilization": 1.0}),
        ("mem_utilization=0.6", {"mem_utilization": 0.6}),
        ("rps_fractional=2.5", {"requests_per_second": 2.5}),
    ],
)
def test_fields_of_a_report(told: str, fields: dict[str, float]) -> None:
    report = parse(f"TEXT {told}").report
    assert report is not None
    assert stats_of(report, 9.0, None) == EngineStats(at=9.0, **fields)  # type: ignore[arg-type]  # floats only
    assert stats_of(report, 9.0, SCRAPED) == msgspec.structs.replace(SCRAPED, at=9.0, **fields)


@pytest.mark.parametrize(
    "told",
    [
        "eps=1",
        "named_metrics.queue=1",
        "named_metrics.kv_cache_usage_perc=75",
        "named_metrics.num_requests_waiting=-1",
        "cpu_utilization=0",
        "utilization.gpu=0.5",
    ],
)
def test_a_report_that_says_nothing_makes_nothing_newer(told: str) -> None:
    report = parse(f"TEXT {told}").report
    assert report is not None
    assert stats_of(report, 9.0, SCRAPED) is SCRAPED
    assert stats_of(report, 9.0, None) is None


# -- our own report ----------------------------------------------------------------------------------------------------


def told_of(rate: float | None, **stats: float) -> dict[str, float]:
    known = msgspec.structs.replace(candidate(1, 4), stats=EngineStats(at=0.0, **stats))  # type: ignore[arg-type]
    return dict(written.fields(known, rate))


@pytest.mark.parametrize(
    ("rate", "stats", "weighed"),
    [
        # what is scarcer, KV cache or a place in the batch; the engine's own word before both
        (2.0, {"kv_cache_usage": 0.5, "running": 3.0, "waiting": 1.0}, (2.0, 0.5)),
        (2.0, {"kv_cache_usage": 0.5, "running": 1.0, "waiting": 3.0}, (2.0, 0.75)),
        (2.0, {"kv_cache_usage": 0.5, "waiting": 3.0}, (2.0, 0.5)),
        (2.0, {"kv_cache_usage": 0.5, "utilization": 0.25}, (2.0, 0.25)),
        # an idle engine is at least as busy as its requests make it, and never weighs as if it had no limit
        (2.0, {"kv_cache_usage": 0.0, "running": 0.0, "waiting": 0.0}, (2.0, 0.002)),
        (2.0, {"utilization": 0.0}, (2.0, 0.002)),
        # others' requests count where the engine tells of more than were sent from here
        (2.0, {"kv_cache_usage": 0.5, "requests_per_second": 6.0}, (6.0, 0.5)),
        (2.0, {"kv_cache_usage": 0.5, "requests_per_second": 0.0}, (2.0, 0.5)),
        (0.0, {"kv_cache_usage": 0.5}, (None, 0.5)),
        # an engine that does not say how busy it is is not weighed
        (2.0, {"running": 3.0}, (2.0, None)),
        (None, {"kv_cache_usage": 0.5, "requests_per_second": 6.0}, (6.0, None)),
    ],
)
def test_what_a_weight_is_taken_from(
    rate: float | None, stats: dict[str, float], weighed: tuple[float | None, float | None]
) -> None:
    told = told_of(rate, **stats)
    assert (told.get("rps_fractional"), told.get("application_utilization")) == weighed


def test_an_endpoint_of_which_nothing_is_known() -> None:
    known = written.fields(candidate(1, 4), 2.0)
    assert known == {"rps_fractional": 2.0, "named_metrics.in_flight_requests": 4.0}


def test_a_number_that_is_none_is_left_out() -> None:
    told = told_of(2.0, kv_cache_usage=math.nan, waiting=math.inf, running=1.0)
    assert told.keys() == {
        "rps_fractional",
        "named_metrics.num_requests_running",
        "named_metrics.in_flight_requests",
    }


def test_our_own_report_is_read_again_by_a_gateway_in_front() -> None:
    told = told_of(2.0, kv_cache_usage=0.5, running=3.0, waiting=1.0, mem_utilization=0.9)
    for value in (written.text(told), written.json(told)):
        report = parse(value).report
        assert report is not None
        assert stats_of(report, 1.0, None) == EngineStats(
            at=1.0,
            running=3.0,
            waiting=1.0,
            kv_cache_usage=0.5,
            utilization=0.5,
            mem_utilization=0.9,
            requests_per_second=2.0,
        )
