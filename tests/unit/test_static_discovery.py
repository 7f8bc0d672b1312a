"""Endpoints that people wrote down: when a file counts as changed, and what a broken one does."""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
from collections.abc import AsyncGenerator, AsyncIterator, MutableMapping
from typing import Any, cast

import pytest
import structlog.testing

from envoy_extproc.discovery import Discovery
from envoy_extproc.discovery.static import EndpointFileError, FileDiscovery, StaticDiscovery
from envoy_extproc.endpoints import Endpoint, Snapshot

POLL = 0.01  # seconds
Logs = list[MutableMapping[str, Any]]


def text(*ports: int) -> str:
    items = "".join(f"- {{address: '10.0.0.1:{port}', models: [m]}}\n" for port in ports)
    return f"endpoints:\n{items}" if ports else "[]\n"


def snapshot(*ports: int) -> Snapshot:
    addresses = [f"10.0.0.1:{port}" for port in ports]
    return Snapshot(Endpoint(name=address, address=address, models=("m",)) for address in addresses)


def discovery(path: pathlib.Path) -> FileDiscovery:
    return FileDiscovery(path, engines={"vllm"}, poll_seconds=POLL)


@contextlib.asynccontextmanager
async def following(source: Discovery) -> AsyncIterator[AsyncIterator[Snapshot]]:
    snapshots = source.snapshots()
    async with contextlib.aclosing(cast("AsyncGenerator[Snapshot]", snapshots)):
        yield snapshots


async def following_snapshot(snapshots: AsyncIterator[Snapshot]) -> Snapshot:
    return await asyncio.wait_for(anext(snapshots), timeout=5)


async def logged(logs: Logs, count: int) -> None:
    async with asyncio.timeout(5):
        while len(logs) < count:
            await asyncio.sleep(POLL)


async def test_static_endpoints_come_once() -> None:
    async with following(
        StaticDiscovery([Endpoint(name="a", address="10.0.0.1:1", models=("m",))])
    ) as snapshots:
        assert [each.name for each in (await following_snapshot(snapshots)).endpoints] == ["a"]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(snapshots), timeout=3 * POLL)


async def test_a_file_is_read_at_once_and_again_when_it_is_edited(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "endpoints.yaml"
    path.write_text(text(1))
    async with following(discovery(path)) as snapshots:
        assert await following_snapshot(snapshots) == snapshot(1)
        path.write_text(text(1, 2))
        assert await following_snapshot(snapshots) == snapshot(1, 2)
        path.write_text(text())
        assert await following_snapshot(snapshots) == snapshot()


async def test_a_file_that_is_renamed_into_place(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "endpoints.yaml"
    path.write_text(text(1))
    async with following(discovery(path)) as snapshots:
        await following_snapshot(snapshots)
        (tmp_path / "new").write_text(text(2))
        (tmp_path / "new").rename(path)
        assert await following_snapshot(snapshots) == snapshot(2)


async def test_a_configmap_whose_link_is_swapped(tmp_path: pathlib.Path) -> None:
    for version, port in (("..v1", 1), ("..v2", 2)):
        (tmp_path / version).mkdir()
        (tmp_path / version / "endpoints.yaml").write_text(text(port))
    (tmp_path / "..data").symlink_to("..v1")
    (tmp_path / "endpoints.yaml").symlink_to("..data/endpoints.yaml")
    async with following(discovery(tmp_path / "endpoints.yaml")) as snapshots:
        assert await following_snapshot(snapshots) == snapshot(1)
        (tmp_path / "..data_tmp").symlink_to("..v2")
        (tmp_path / "..data_tmp").rename(tmp_path / "..data")
        (tmp_path / "..v1" / "endpoints.yaml").unlink()
        assert await following_snapshot(snapshots) == snapshot(2)


async def test_a_change_that_changes_nothing_is_not_told(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "endpoints.yaml"
    path.write_text(text(1))
    async with following(discovery(path)) as snapshots:
        await following_snapshot(snapshots)
        path.write_text(f"# the same\n{text(1)}")
        waiting = asyncio.ensure_future(following_snapshot(snapshots))
        await asyncio.sleep(5 * POLL)
        assert not waiting.done()
        path.write_text(text(1, 2, 3))
        assert await waiting == snapshot(1, 2, 3)


def put(path: pathlib.Path, content: str) -> None:
    """Changes a file at once: one that is written in place is seen empty now and then."""
    written = path.with_suffix(".new")
    written.write_text(content)
    written.replace(path)


async def test_a_broken_file_keeps_the_old_endpoints_and_is_logged_once_per_change(
    tmp_path: pathlib.Path,
) -> None:
    path = tmp_path / "endpoints.yaml"
    path.write_text(text(1))
    async with following(discovery(path)) as snapshots:
        await following_snapshot(snapshots)
        with structlog.testing.capture_logs() as logs:
            waiting = asyncio.ensure_future(following_snapshot(snapshots))
            put(path, "endpoints:\n- address: host:8000\n")
            await logged(logs, 1)
            put(path, "endpoints:\n- models: [m]\n  address: pod-a:8000\n")
            await logged(logs, 2)
            await asyncio.sleep(5 * POLL)
            put(path, text(1, 2))
            assert await waiting == snapshot(1, 2)
    assert [(log["log_level"], log["line"]) for log in logs] == [("warning", 2), ("warning", 3)]
    assert "endpoints[0].address: 'pod-a:8000' has no IP address" in logs[1]["reason"]


async def test_a_file_that_vanishes_keeps_the_old_endpoints(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "endpoints.yaml"
    path.write_text(text(1))
    async with following(discovery(path)) as snapshots:
        await following_snapshot(snapshots)
        with structlog.testing.capture_logs() as logs:
            waiting = asyncio.ensure_future(following_snapshot(snapshots))
            path.unlink()
            await logged(logs, 1)
            await asyncio.sleep(5 * POLL)
            path.write_text(text(2))
            assert await waiting == snapshot(2)
    assert [log["reason"] for log in logs] == ["the file of endpoints does not exist"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "endpoints:\n- {address: '1.2.3.4:1', models: [m]}\n- {address: '1.2.3.4:1', models: [m]}\n",
            ", line 3: endpoints[1].name: ",
        ),
        (
            "- address: '1.2.3.4:1'\n  models:\n  - m\n  - 7\n",
            ", line 4: endpoints[0].models[1]: must be text",
        ),
        ("- address: '1.2.3.4:1'\n  modles: [m]\n", ", line 2: endpoints[0].modles: unknown key"),
        ("- models: [m]\n\n- models: [m]\n", ", line 1: endpoints[0].address: is missing"),
        ("a: 1\n", ", line 1: a: unknown key"),
        ("endpoints:\n  - [\n", ", line 3: bad YAML: "),
        ("endpoints: \x00", ": bad YAML: "),
        ("- 2001-99-99\n", ": bad YAML: month must be in 1..12"),
        ("\n" + "[" * 300_000 + "]" * 300_000, ", line 2: bad YAML: nested more than 32 deep"),
        ("", ": endpoints: must be a list, not nothing"),
    ],
)
async def test_a_file_that_is_broken_at_the_start(tmp_path: pathlib.Path, content: str, message: str) -> None:
    path = tmp_path / "endpoints.yaml"
    path.write_text(content)
    async with following(discovery(path)) as snapshots:
        with pytest.raises(EndpointFileError) as caught:
            await following_snapshot(snapshots)
    assert str(caught.value).startswith(f"{path}{message}")


async def test_a_file_that_is_missing_at_the_start(tmp_path: pathlib.Path) -> None:
    async with following(discovery(tmp_path / "none.yaml")) as snapshots:
        with pytest.raises(EndpointFileError, match=r"none\.yaml: the file of endpoints does not exist$"):
            await following_snapshot(snapshots)


async def test_a_directory_is_no_file(tmp_path: pathlib.Path) -> None:
    async with following(discovery(tmp_path)) as snapshots:
        with pytest.raises(EndpointFileError, match="cannot be read: Is a directory"):
            await following_snapshot(snapshots)
