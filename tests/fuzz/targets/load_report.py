"""An engine's own load report in a header: read into finite numbers in their ranges, or a flaw is named; never an error."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator

from envoy_extproc import orca
from tests.fuzz.draw import Draw, bounded, seed

CHOICES = 1
WORDS = [
    b"TEXT ", b"JSON ", b"BIN ", b"cpu_utilization", b"mem_utilization", b"named_metrics.", b"utilization.", b"rps_fractional", b"=",
    b":", b", ", b"0.5", b"-1", b"nan", b"inf", b"1e999", b'"namedMetrics"', b'"', b"{", b"}", b"null", b"true", b"[", b"\xff",
]  # fmt: skip


def check(data: bytes) -> None:
    """As either header, as it is or as base64 of it."""
    draw = Draw(data)
    form, text = draw.byte() % 3, draw.text()
    if form:
        text = base64.b64encode(text)
    value = text.decode("utf-8", "surrogateescape")
    with bounded():
        parsed = orca.parse(*((value,), ("BIN " + value,), (None, value))[form])
    assert (parsed.report is None) != (parsed.flaw is None), "a report, or why there is none"
    if parsed.report is not None:
        _check(parsed.report)


def _check(report: orca.LoadReport) -> None:
    for value in (report.cpu_utilization, report.application_utilization, report.rps_fractional, report.eps):
        assert 0 <= value < math.inf
    assert 0 <= report.mem_utilization <= 1
    assert all(math.isfinite(value) for value in report.named_metrics.values())
    assert all(0 <= value <= 1 for value in report.utilization.values())
    for metrics in (report.named_metrics, report.utilization):
        assert len(metrics) <= orca.MAX_METRICS
        assert all(metrics)


def seeds() -> Iterator[bytes]:
    """Each form once; the JSON and TEXT ones are vLLM's."""
    yield seed(0, text=b"TEXT named_metrics.kv_cache_usage_perc=0.0, named_metrics.num_requests_waiting=0.0")
    yield seed(0, text=b'JSON {"named_metrics": {"kv_cache_usage_perc": 0.0, "num_requests_waiting": 0}}')
    yield seed(0, text=b'{"cpuUtilization": 0.5, "mem_utilization": "0.25", "utilization": {"x": 1}}')
    message = b"\x09\x00\x00\x00\x00\x00\x00\xe0?B\x0e\n\x05queue\x11\x00\x00\x00\x00\x00\x00\x14@"
    yield seed(1, text=message)
    yield seed(2, text=message)
