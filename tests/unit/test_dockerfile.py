"""Rules for the image, read off the Dockerfile."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator

import pytest
import yaml
from typer.testing import CliRunner

from envoy_extproc import __version__
from envoy_extproc.cli import cli
from envoy_extproc.settings import Server
from tests.support.image import ROOT, Instruction, stages

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def _of(word: str, stage: list[Instruction]) -> list[str]:
    return [each.text for each in stage if each.word == word]


def _last() -> list[Instruction]:
    return stages()[-1]


def _one(word: str) -> str:
    (found,) = _of(word, _last())
    return found


def test_both_stages_are_of_one_image_with_a_tag() -> None:
    before, *made = stages()
    (default,) = _of("ARG", before)
    assert re.fullmatch(r"PYTHON_IMAGE=python:3\.\d+-slim-\w+", default)
    assert [_of("FROM", each)[0].split()[0] for each in made] == ["${PYTHON_IMAGE}"] * 2
    assert f">={default.partition(':')[2].partition('-')[0]}" == PROJECT["requires-python"]


def test_the_user_is_a_number_and_not_root() -> None:
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", _one("USER"))
    values = yaml.safe_load((ROOT / "charts/envoy-extproc/values.yaml").read_text("utf-8"))
    context = values["podSecurityContext"]
    assert _one("USER") == f"{context['runAsUser']}:{context['runAsGroup']}"


def test_in_the_last_stage_nothing_is_run_and_little_is_copied() -> None:
    assert _of("RUN", _last()) == []  # no package manager, so no compiler
    assert _of("COPY", _last()) == ["--from=build /opt/envoy-extproc /opt/envoy-extproc"]
    assert _of("ADD", _last()) == []


def test_nobody_compiles_and_versions_are_those_that_were_tested() -> None:
    (command,) = _of("RUN", stages()[1])
    assert "--only-binary :all:" in command
    assert "--constraint constraints.txt" in command
    assert "apt" not in command
    assert "--without-pip" in command


def test_what_is_installed_has_no_demo() -> None:
    (command,) = _of("RUN", stages()[1])
    extras = re.findall(r"\.whl\)\[([^\]]+)\]", command)
    assert extras == ["kubernetes,tiktoken"]
    assert set(extras[0].split(",")) <= PROJECT["optional-dependencies"].keys()


def test_no_secret_is_asked_for() -> None:
    names = [text for stage in stages() for word in ("ARG", "ENV") for text in _of(word, stage)]
    assert names
    assert [
        each for each in names if re.search("token|password|secret|credential", each, re.IGNORECASE)
    ] == []


def test_its_labels_say_what_it_is() -> None:
    labels = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="([^"]+)"', _one("LABEL")))
    assert labels.keys() == {"title", "description", "licenses", "version", "revision"}
    assert (labels["title"], labels["licenses"]) == (PROJECT["name"], PROJECT["license"])
    assert f"VERSION={__version__}" in _of("ARG", _last())


def test_its_ports_are_the_defaults() -> None:
    defaults = [each.rpartition(":")[2] for each in (Server().listen, Server().admin)]
    assert _one("EXPOSE").split() == defaults


def _commands() -> Iterator[list[str]]:
    text = _one("HEALTHCHECK")
    check = Instruction("CMD", text[text.index("[") :]).arguments
    assert check.pop(0) == "envoy-extproc"
    yield check
    yield Instruction("CMD", _one("CMD")).arguments


@pytest.mark.parametrize("index", [0, 1], ids=["healthcheck", "serve"])
def test_its_commands_are_ours(index: int) -> None:
    words = list(_commands())[index]
    shown = CliRunner().invoke(cli, [words[0], "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    assert all(word in shown.output for word in words if word.startswith("--"))
    assert "/etc/envoy-extproc/config.yaml" in words


def test_it_starts_as_the_chart_starts_it() -> None:
    template = (ROOT / "charts/envoy-extproc/templates/deployment.yaml").read_text("utf-8")
    _, serve = _commands()
    assert f"args: [{', '.join(serve)}]" in template
    assert _one("ENTRYPOINT") == '["envoy-extproc"]'


def test_docker_is_given_what_is_copied_and_nothing_else() -> None:
    lines = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    copied = [each.arguments[:-1] for each in stages()[1] if each.word == "COPY"]
    assert {rule[1:] for rule in rules if rule.startswith("!")} == {
        name for names in copied for name in names
    }
    assert all((ROOT / name).exists() for names in copied for name in names)
