"""`discovery.kubernetes`: what may stand there, and what is said where it cannot be."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from envoy_extproc.discovery.kubernetes import KubernetesDiscovery
from envoy_extproc.settings import KubernetesSource, SettingsError, parse

POLICIES = ("least-request",)


def test_all_keys_have_defaults() -> None:
    source = parse({"discovery": {"kubernetes": {}}}, policies=POLICIES).discovery.kubernetes
    assert source == KubernetesSource()
    assert source.label_selector == "model.aibrix.ai/name"


def test_namespaces_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENVOY_EXTPROC_DISCOVERY__KUBERNETES__NAMESPACES", '["a", "b"]')
    source = parse({}, policies=POLICIES).discovery.kubernetes
    assert source is not None
    assert source.namespaces == ("a", "b")


@pytest.mark.parametrize(
    ("discovery", "message"),
    [
        ({}, "discovery: give `static` or `kubernetes`: nobody can be chosen otherwise"),
        ({"kubernetes": None}, "discovery: give `static` or `kubernetes`: nobody can be chosen otherwise"),
        (
            {"kubernetes": {}, "static": {"endpoints": []}},
            "discovery: give either `static` or `kubernetes`, not both",
        ),
        ({"kubernetes": {"nope": 1}}, "discovery.kubernetes.nope: unknown key"),
        ({"kubernetes": {"namespaces": ["A"]}}, "'A' is no namespace"),
        ({"kubernetes": {"namespaces": ["a", "*"]}}, "'*' is no namespace; all of them are [\"*\"] alone"),
        ({"kubernetes": {"namespaces": ["a", "a"]}}, "a namespace is named twice"),
        ({"kubernetes": {"context": "x"}}, "context: is one of a kubeconfig"),
        ({"kubernetes": {"debounce_ms": -1}}, "discovery.kubernetes.debounce_ms"),
    ],
)
def test_what_cannot_be(discovery: Mapping[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse({"discovery": discovery}, policies=POLICIES)
    assert message in str(caught.value)


def without_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "kubernetes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "kubernetes", None)  # how Python notes that there is none
    importlib.invalidate_caches()


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    without_the_client(monkeypatch)
    with pytest.raises(SettingsError, match=r"pip install 'envoy-extproc\[kubernetes\]'"):
        KubernetesDiscovery(KubernetesSource(), engines=["vllm"])


def test_serve_says_so_and_ends(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("discovery: {kubernetes: {}}\nserver: {listen: '127.0.0.1:0', admin: '127.0.0.1:0'}\n")
    program = "import sys; sys.modules['kubernetes'] = None; from envoy_extproc.cli import main; main()"
    ended = subprocess.run(
        [sys.executable, "-c", program, "serve", "-c", str(path)], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert "pip install 'envoy-extproc[kubernetes]'" in ended.stderr
