"""Scorers of other packages at the command line: what is said of them, and how a command ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import yaml

from envoy_extproc.simulation.stack import free_port
from tests.support.distributions import files, unpack
from tests.support.pages import block, example_scorer, section

BROKEN = files("broken-one", {"broken": "import no_such_module"}, {"broken": "broken:Scorer"})
TELLTALE = files("loud-one", {"loud": "raise SystemExit('imported')"}, {"loud": "loud:Scorer"})

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs a command in an environment that has a package, by a configuration with a policy."""

    def command(*arguments: str, policy: str, package: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        unpack(tmp_path / "packages", package)
        path = tmp_path / "gateway.yaml"
        endpoints = [
            {"name": name, "address": f"127.0.0.1:{free_port()}", "models": ["m"], "labels": {"price": price}}
            for name, price in (("dear", "3"), ("cheap", "0.25"))
        ]
        config = {
            "server": {"listen": "127.0.0.1:1", "admin": "127.0.0.1:1"},
            "discovery": {"static": {"endpoints": endpoints}},
            "routing": {"policy": policy},
        }
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        return subprocess.run(
            [sys.executable, "-m", "envoy_extproc", *arguments, "-c", str(path)],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
            env=os.environ | {"PYTHONPATH": str(tmp_path / "packages")},
        )

    return command


@pytest.mark.parametrize("command", [("config", "check"), ("serve",), ("explain",)], ids=" ".join)
def test_one_that_is_named_and_cannot_be_used_ends_the_command(
    run: Run, tmp_path: Path, command: tuple[str, ...]
) -> None:
    done = run(*command, policy="broken:2,least-request", package=BROKEN)
    assert done.returncode == 2
    assert done.stderr == (
        "routing.policy: the scorer 'broken' of broken-one 1.0 (broken:Scorer) cannot be imported: "
        f"ModuleNotFoundError: No module named 'no_such_module' ({tmp_path}/packages/broken.py, line 1)\n"
    )
    assert done.stdout == ""


@pytest.mark.parametrize("command", [("config", "check"), ("explain",)], ids=" ".join)
def test_one_that_nobody_names_is_passed_over(run: Run, command: tuple[str, ...]) -> None:
    done = run(*command, policy="random", package=BROKEN)
    assert done.returncode == 0
    assert done.stderr.startswith("passed over: the scorer 'broken' of broken-one 1.0 (broken:Scorer) ")
    assert "Traceback" not in done.stderr


def test_a_server_logs_what_it_passes_over(run: Run) -> None:
    done = run("serve", policy="random", package=BROKEN)
    assert done.returncode == 2, "no port for it"
    line = json.loads(done.stdout.splitlines()[0])
    assert (line["event"], line["level"]) == ("scorer_passed_over", "warning")
    assert "broken-one 1.0" in line["text"]
    assert "broken" not in done.stderr


def test_a_check_tells_what_is_installed(run: Run) -> None:
    done = run("config", "check", policy="cheapest-first", package=example_scorer())
    assert (done.returncode, done.stderr) == (0, "")
    assert "  scorer cheapest-first of night-shift 1.0\n" in done.stdout


@pytest.mark.parametrize("command", ["config envoy", "healthcheck"])
def test_who_only_reads_the_configuration_imports_nothing(run: Run, command: str) -> None:
    done = run(*command.split(), policy="loud", package=TELLTALE)
    assert "imported" not in done.stderr + done.stdout
    assert "no policy" not in done.stderr
    assert done.returncode == (1 if command == "healthcheck" else 0)


def test_explain_shows_its_scores(run: Run) -> None:
    done = run("explain", "--json", policy="cheapest-first", package=example_scorer())
    told = json.loads(done.stdout)
    assert (told["policy"], told["decided_by"], told["chosen"]) == (
        "cheapest-first",
        "cheapest-first",
        "cheap",
    )
    scores = {row["name"]: row["scores"] for row in told["endpoints"]}
    assert scores == {"cheap": {"cheapest-first": 0.8}, "dear": {"cheapest-first": 0.25}}


def test_the_example_is_as_short_as_it_is_said_to_be() -> None:
    lines = block(section("routing.md", "A scorer of your own"), "python").splitlines()
    assert len(lines) <= 10
