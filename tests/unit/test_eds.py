"""The file by which Envoy learns of pods: what is in it, how it is replaced, and what happens when that fails."""

from __future__ import annotations

import asyncio
import json
import stat
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from envoy_extproc.endpoints import Endpoint, Snapshot
from envoy_extproc.envoy.eds import EndpointsFile, discovery_response
from envoy_extproc.simulation.stack import Stack


def snapshot(*addresses: str) -> Snapshot:
    return Snapshot(Endpoint(name=address, address=address, models=("m",)) for address in addresses)


def written(path: Path) -> list[tuple[str, int]]:
    (resource,) = json.loads(path.read_text())["resources"]
    assert resource["@type"] == "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"
    assert resource["cluster_name"] == "pods"
    (group,) = resource["endpoints"]
    sockets = [host["endpoint"]["address"]["socket_address"] for host in group["lb_endpoints"]]
    return [(each["address"], each["port_value"]) for each in sockets]


def test_addresses(tmp_path: Path) -> None:
    path = tmp_path / "pods.json"
    file = EndpointsFile(path)
    file.write(snapshot("10.0.0.1:8000", "[fd00::1]:8001"))
    assert written(path) == [("10.0.0.1", 8000), ("fd00::1", 8001)]
    file.write(snapshot())
    assert written(path) == []


def test_the_text_depends_on_the_endpoints_alone() -> None:
    endpoints = snapshot("10.0.0.1:8000", "10.0.0.2:8000").endpoints
    assert discovery_response(endpoints) == discovery_response(endpoints)
    assert discovery_response(endpoints).endswith("}\n")


def test_a_reader_sees_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "pods.json"
    file = EndpointsFile(path)
    file.write(snapshot("10.0.0.1:8000"))
    with path.open() as old:
        file.write(snapshot("10.0.0.2:8000"))
        assert "10.0.0.1" in old.read()
    assert written(path) == [("10.0.0.2", 8000)]
    assert list(tmp_path.iterdir()) == [path]


def test_envoy_as_another_user_can_read_it(tmp_path: Path) -> None:
    plain, path = tmp_path / "plain", tmp_path / "pods.json"
    plain.touch()
    EndpointsFile(path).write(snapshot("10.0.0.1:8000"))
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


@pytest.mark.parametrize("name", ["nowhere/pods.json", "taken.json"])
def test_a_write_that_fails_is_logged(tmp_path: Path, name: str) -> None:
    (tmp_path / "taken.json").mkdir()
    with capture_logs() as lines:
        EndpointsFile(tmp_path / name).write(snapshot("10.0.0.1:8000"))
    (line,) = lines
    assert (line["event"], line["log_level"]) == ("endpoints_file_unwritable", "warning")
    assert line["file"] == str(tmp_path / name)
    assert line["reason"]
    assert [each.name for each in tmp_path.iterdir()] == ["taken.json"]


async def test_a_write_that_fails_does_not_end_the_server(tmp_path: Path) -> None:
    endpoints = [{"name": "pod-a", "address": "127.0.0.1:9", "models": ["m"]}]
    path = tmp_path / "nowhere" / "pods.json"
    stack = Stack(tmp_path, endpoints, config={"envoy": {"endpoints_file": str(path)}})
    try:
        await stack.start_server()
        (line,) = [line for line in stack.log_lines() if line["event"] == "endpoints_file_unwritable"]
        assert line["reason"] == "No such file or directory"
    finally:
        await stack.stop()


async def test_a_server_that_is_ready_has_written_the_file(tmp_path: Path) -> None:
    endpoints = [{"name": "pod-a", "address": "127.0.0.1:9", "models": ["m"]}]
    path = tmp_path / "pods.json"
    stack = Stack(tmp_path, endpoints, config={"envoy": {"endpoints_file": str(path)}})
    try:
        await stack.start_server()
        assert await asyncio.to_thread(written, path) == [("127.0.0.1", 9)]
    finally:
        await stack.stop()
