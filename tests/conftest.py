"""Settings of every test run: hypothesis draws the same examples each time, and slow machines fail nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator

import coverage
import pytest
from hypothesis import HealthCheck, settings

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.pop(
        "COVERAGE_PROCESS_START", None
    )  # this process is measured already, those it starts are not

settings.register_profile(
    "project",
    derandomize=True,
    max_examples=100,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("project")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Stops measuring while a test runs that is marked so."""
    measuring = coverage.Coverage.current()
    if measuring is None or item.get_closest_marker("unmeasured") is None:
        return (yield)
    measuring.stop()
    try:
        return (yield)
    finally:
        measuring.start()
