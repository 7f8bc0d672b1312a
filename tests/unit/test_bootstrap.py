"""The bootstrap: where Envoy has its pods from, and what the comment at its head advises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from envoy_extproc.cli import bootstrap_options
from envoy_extproc.endpoints import Endpoint
from envoy_extproc.envoy.bootstrap import as_dict, bootstrap
from envoy_extproc.scheduling.registry import POLICIES
from envoy_extproc.settings import parse

POD = {"name": "a", "address": "10.0.0.1:8000", "models": ["m"]}
WATCHED = {"file": "endpoints.yaml"}


def printed(static: dict[str, Any], **envoy: Any) -> tuple[str, dict[str, Any]]:
    """The comment at the head, on one line, and the cluster of pods."""
    settings = parse({"discovery": {"static": static}, "envoy": envoy}, policies=POLICIES)
    endpoint = Endpoint(name="a", address="10.0.0.1:8000", models=("m",))
    text = bootstrap(bootstrap_options(settings, (endpoint,)))
    head = " ".join(line.removeprefix("# ") for line in text.splitlines() if line.startswith("#"))
    clusters = yaml.safe_load(text)["static_resources"]["clusters"]
    return head, next(each for each in clusters if each["name"] == "pods")


@pytest.mark.parametrize("static", [{"endpoints": [POD]}, WATCHED])
def test_pods_from_a_file_that_envoy_watches(static: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "pods.json"
    head, pods = printed(static, endpoints_file=str(path))
    assert pods["type"] == "EDS"
    assert "load_assignment" not in pods
    assert pods["eds_cluster_config"]["eds_config"] == {
        "path_config_source": {"path": str(path), "watched_directory": {"path": str(tmp_path)}},
        "resource_api_version": "V3",
    }
    assert "Start `serve` first" in head
    assert not path.exists()  # printing writes nothing


def test_a_path_is_printed_whole() -> None:
    _, pods = printed(WATCHED, endpoints_file="pods.json")
    source = pods["eds_cluster_config"]["eds_config"]["path_config_source"]
    assert source["path"] == str(Path.cwd() / "pods.json")
    assert source["watched_directory"]["path"] == str(Path.cwd())


def test_a_watched_file_that_envoy_does_not_hear_of() -> None:
    head, pods = printed(WATCHED)
    assert pods["type"] == "STATIC"
    assert "does not know pods added later until this is printed again" in head
    assert "Set `envoy.endpoints_file`" in head


def test_endpoints_that_only_a_new_configuration_changes() -> None:
    head, pods = printed({"endpoints": [POD]})
    (group,) = pods["load_assignment"]["endpoints"]
    assert len(group["lb_endpoints"]) == 1
    assert "Print it again when endpoints change" in head


def test_a_name_for_envoy_only_where_it_needs_one() -> None:
    def node(**envoy: Any) -> bool:
        settings = parse({"discovery": {"static": WATCHED}, "envoy": envoy}, policies=POLICIES)
        return "node" in as_dict(bootstrap_options(settings, ()))

    assert (node(), node(endpoints_file="pods.json")) == (False, True)
