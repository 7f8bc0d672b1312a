"""The command line: what it prints, and how it ends."""

from __future__ import annotations

import asyncio
import importlib.metadata
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import aiohttp
import pytest
import yaml

from envoy_extproc.envoy.eds import discovery_response
from envoy_extproc.simulation.stack import envoy_binary, free_port

VALID = """
discovery:
  static:
    endpoints:
    - {name: pod-a, address: "127.0.0.1:8001", models: [llama-3-8b, lora-1]}
    - {name: pod-b, address: "[::1]:8002", models: [llama-3-8b]}
routing: {policy: round-robin}
"""


def run(*arguments: str, config: Path | None = None) -> subprocess.CompletedProcess[str]:
    options = [] if config is None else ["-c", str(config)]
    command = [sys.executable, "-m", "envoy_extproc", *arguments, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "gateway.yaml"
    path.write_text(VALID)
    return path


def test_check_says_what_a_configuration_means(config: Path) -> None:
    done = run("config", "check", config=config)
    assert done.returncode == 0
    assert "valid" in done.stdout
    assert "round-robin" in done.stdout
    assert "pod-b [::1]:8002" in done.stdout


BAD = {
    "sever: {}": "sever: unknown key",
    "server: {drain: 3}": "server.drain: unknown key",
    "routing: {policy: guess}": "no policy 'guess'",
    "discovery: {static: {endpoints: [{address: 'pod-a:80', models: [m]}]}}": "endpoints[0].address",
    "discovery: {static: {endpoints: [{address: '1.2.3.4:80', models: [m], engine: x}]}}": "endpoints[0].engine",
    "discovery: {static: {file: nowhere.yaml}}": "does not exist",
    "- a list": "sections",
    "a: [": "YAML",
    "auth: {mode: api-key}": "auth.mode",
    "server: {listen: '9002'}": "host:port",
}


@pytest.mark.parametrize("text", BAD)
@pytest.mark.parametrize("command", ["check", "serve"])
def test_a_wrong_configuration_is_named(tmp_path: Path, text: str, command: str) -> None:
    path = tmp_path / "gateway.yaml"
    whole = yaml.safe_load(VALID)
    try:
        part = yaml.safe_load(text)
        path.write_text(yaml.safe_dump(whole | part if isinstance(part, dict) else part))
    except yaml.YAMLError:
        path.write_text(text)
    done = run(*(["config", "check"] if command == "check" else ["serve"]), config=path)
    assert done.returncode == 2
    assert BAD[text] in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    done = run("config", "check", config=tmp_path / "none.yaml")
    assert done.returncode == 2
    assert "none.yaml" in done.stderr


def test_no_local_variable_gets_into_the_log() -> None:
    """A defect is logged with its traceback; a request's headers and body are locals of the frames in it."""
    defect = """
from envoy_extproc.cli import _log_as_json
import structlog
_log_as_json()
def handle(authorization):
    raise ValueError("a defect")
try:
    handle("Bearer sk-" + "secret")
except ValueError:
    structlog.get_logger().exception("exchange_failed")
"""
    done = subprocess.run(
        [sys.executable, "-c", defect], capture_output=True, text=True, timeout=30, check=True
    )
    assert "a defect" in done.stdout
    assert "handle" in done.stdout
    assert "sk-secret" not in done.stdout + done.stderr


def validate(text: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """What Envoy says of a bootstrap."""
    path = directory / "envoy.yaml"
    path.write_text(text)
    command = [str(envoy_binary()), "--mode", "validate", "-c", str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.parametrize("fail_open", [True, False])
def test_bootstrap_is_valid_for_envoy(config: Path, tmp_path: Path, fail_open: bool) -> None:
    config.write_text(
        f"{VALID}\nenvoy: {{fail_open: {str(fail_open).lower()}, servers: ['127.0.0.1:9003']}}\n"
    )
    done = run("config", "envoy", config=config)
    assert done.returncode == 0
    bootstrap = yaml.safe_load(done.stdout)
    clusters = {cluster["name"]: cluster for cluster in bootstrap["static_resources"]["clusters"]}
    for cluster in clusters.values():
        (limits,) = cluster["circuit_breakers"]["thresholds"]
        assert all(limit > 100_000 for limit in limits.values())
    assert len(clusters["ext_proc"]["load_assignment"]["endpoints"][0]["lb_endpoints"]) == 2
    assert f"failure_mode_allow: {str(fail_open).lower()}" in done.stdout
    validated = validate(done.stdout, tmp_path)
    assert validated.returncode == 0, validated.stderr


def test_bootstrap_with_a_file_of_endpoints_is_valid_once_the_file_is_there(
    config: Path, tmp_path: Path
) -> None:
    pods = tmp_path / "pods.json"
    config.write_text(f"{VALID}\nenvoy: {{endpoints_file: '{pods}'}}\n")
    done = run("config", "envoy", config=config)
    assert done.returncode == 0
    refused = validate(done.stdout, tmp_path)
    assert refused.returncode != 0  # so the comment in it says to start the server first
    assert str(pods) in refused.stderr
    pods.write_text(discovery_response(()))
    validated = validate(done.stdout, tmp_path)
    assert validated.returncode == 0, validated.stderr


def test_serve_says_when_a_port_is_taken(config: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config.write_text(f"{VALID}\nserver: {{listen: '127.0.0.1:{port}', admin: '127.0.0.1:0'}}\n")
        done = run("serve", config=config)
    assert done.returncode == 2
    assert str(port) in done.stderr
    assert "Traceback" not in done.stderr


def test_version_is_the_packages() -> None:
    assert run("version").stdout.strip() == importlib.metadata.version("envoy-extproc")


async def test_engine_serves_until_it_is_told_to_stop() -> None:
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        *(
            sys.executable,
            "-m",
            "envoy_extproc",
            "engine",
            "--port",
            str(port),
            "--model",
            "a",
            "--model",
            "b",
            *("--max-num-seqs", "8", "--max-num-batched-tokens", "512", "--max-queued", "3"),
            *("--num-gpu-blocks-override", "99", "--block-size", "32", "--no-enable-prefix-caching"),
            *("--max-model-len", "1000"),
        )
    )
    async with asyncio.timeout(20), aiohttp.ClientSession() as session:
        listed: list[dict[str, object]] = []
        while not listed:
            await asyncio.sleep(0.05)
            with suppress(aiohttp.ClientConnectionError):
                async with session.get(f"http://127.0.0.1:{port}/v1/models") as answer:
                    listed = (await answer.json())["data"]
        assert [model["id"] for model in listed] == ["a", "b"]
        assert listed[0]["max_model_len"] == 1000
        async with session.get(f"http://127.0.0.1:{port}/metrics") as answer:
            page = await answer.text()
        for label in ('num_gpu_blocks="99"', 'block_size="32"', 'enable_prefix_caching="False"'):
            assert label in page
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (
            ("--max-num-batched-tokens", "100"),
            "max_num_batched_tokens (100) must be at least max_num_seqs (256)",
        ),
        (("--max-running", "4096"), "max_num_batched_tokens (2048) must be at least max_num_seqs (4096)"),
        (("--num-gpu-blocks-override", "1"), "--num-gpu-blocks-override"),
    ],
)
def test_engine_says_what_is_wrong_with_its_options(options: tuple[str, ...], fault: str) -> None:
    done = run("engine", *options)
    assert done.returncode == 2
    assert fault in done.stderr
    assert "Traceback" not in done.stderr


def test_engine_says_when_its_port_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run("engine", "--port", str(taken.getsockname()[1]))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
