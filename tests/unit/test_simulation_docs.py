"""docs/simulation.md says what the simulated engine is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup

from envoy_extproc.cli import cli
from envoy_extproc.simulation.engine import Engine
from envoy_extproc.simulation.options import EngineOptions
from envoy_extproc.simulation.service_time import PREFILL_TOKENS_PER_TTFT, STEP_GROWTH

PAGE = (Path(__file__).parents[2] / "docs" / "simulation.md").read_text("utf-8")
TABLE = "".join(line for line in PAGE.splitlines(keepends=True) if line.startswith("| `--"))


def option_names() -> set[str]:
    group = typer.main.get_command(cli)
    assert isinstance(group, TyperGroup)
    declared = (option for option in group.commands["engine"].params if option.name != "help")
    return {name for option in declared for name in (*option.opts, *option.secondary_opts)}


def test_every_option_is_there() -> None:
    implied = {"--enable-prefix-caching", "--no-usage-null"}  # the defaults
    assert set(re.findall(r"`(--[a-z-]+)`", TABLE)) == option_names() - implied


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--ttft", EngineOptions().ttft_seconds),
        ("--tpot", EngineOptions().tpot_seconds),
        ("--max-num-seqs", EngineOptions().max_running),
        ("--max-num-batched-tokens", EngineOptions().max_batched_tokens),
        ("--num-gpu-blocks-override", EngineOptions().kv_blocks),
        ("--block-size", EngineOptions().block_size),
        ("--max-model-len", EngineOptions().max_model_len),
    ],
)
def test_defaults_are_right(option: str, value: float) -> None:
    (row,) = [line for line in TABLE.splitlines() if f"`{option}`" in line]
    assert row.split("|")[2].strip() == f"{value:g}"


def test_every_path_is_there() -> None:
    paths = PAGE.partition("Paths: ")[2].partition("\n\n")[0]
    assert all(f"`{path}`" in paths for path in Engine(EngineOptions())._routes)


def test_the_formula_is_the_models() -> None:
    assert f"* ttft / {PREFILL_TOKENS_PER_TTFT}\n" in PAGE
    assert f"tpot * (1 + {STEP_GROWTH} * (decoding - 1))" in PAGE


def test_the_example_runs_as_it_says() -> None:
    example = PAGE.partition("```python\n")[2].partition("```")[0]
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == example.rpartition("# ")[2].strip().split(", then ")
