"""A short run of every fuzz target, always the same one; and every seed by itself, also where there is no fuzzer."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from tests.fuzz.draw import stretched
from tests.fuzz.run import Finished, report_of, run
from tests.fuzz.targets import TARGETS, load

RUNS = {"sse": 2000, "stream": 800, "lua": 1500, "page": 1000}
"""Inputs for the slower targets: some two seconds each."""
MOST_RUNS = 6000

with_fuzzer = pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None,
    reason="atheris has wheels for CPython 3.11 to 3.13 on x86-64 Linux alone",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, Future[Finished]]]:
    """All targets, two at a time, from the first test that asks."""
    folder = tmp_path_factory.mktemp("fuzz")
    with ThreadPoolExecutor(2) as pool:
        yield {
            name: pool.submit(run, name, folder, "-seed=1", f"-runs={RUNS.get(name, MOST_RUNS)}")
            for name in (*TARGETS, "planted")
        }


@with_fuzzer
@pytest.mark.parametrize("name", TARGETS)
def test_a_short_run_finds_nothing(runs: Mapping[str, Future[Finished]], name: str) -> None:
    finished = runs[name].result()
    assert not finished.found, report_of(name, finished)
    assert finished.executions >= RUNS.get(name, MOST_RUNS)
    assert finished.edges > 5


@with_fuzzer
def test_a_run_finds_what_is_there_to_be_found(runs: Mapping[str, Future[Finished]]) -> None:
    finished = runs["planted"].result()
    assert finished.found
    report = report_of("planted", finished)
    assert "input as base64: " in report
    assert "a planted defect" in report
    assert all(b"[DONE]" in data for data in finished.inputs)


@pytest.mark.parametrize("name", TARGETS)
def test_every_seed_holds(name: str) -> None:
    target = load(name)
    for data in target.seeds():
        target.check(data)


@pytest.mark.parametrize("name", TARGETS)
def test_time_is_linear_in_what_is_repeated(name: str) -> None:
    target = load(name)
    seeds = list(target.seeds())
    for data in seeds[:: max(1, len(seeds) // 8)]:
        for longer in stretched(data, target.CHOICES):
            target.check(longer)


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_and_one_byte_are_inputs_too(name: str) -> None:
    target = load(name)
    for data in (b"", *(bytes((number,)) * 8 for number in range(256))):
        target.check(data)
