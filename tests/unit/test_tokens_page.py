"""What docs/routing.md says of tokens is so."""

from __future__ import annotations

import re
from typing import get_args

import yaml

from envoy_extproc.engines.dialects import ENGINES
from envoy_extproc.openai.tokenize import Form
from envoy_extproc.scheduling.registry import POLICIES
from envoy_extproc.settings import parse
from envoy_extproc.settings.tokens import TokensMode
from envoy_extproc.tokens.counting import Reason
from tests.support.pages import section

TOKENS = section("routing.md", "Tokens")
SENT = {
    Form.MESSAGES: "{model, messages, tools}",
    Form.PROMPT: "{model, prompt}",
    Form.CONTENT: "{content, add_special}",
}


def test_every_mode_reason_and_engine_of_counting_is_told() -> None:
    engines = [name for name, dialect in ENGINES.items() if dialect.tokenize is not None]
    cells = re.findall(r"^\| `(.+?)` \|", TOKENS, re.MULTILINE)
    assert sorted(cells) == sorted([*get_args(TokensMode), *get_args(Reason), *engines])


def test_the_form_of_each_engine_is_told() -> None:
    for name, dialect in ENGINES.items():
        if dialect.tokenize is not None:
            assert f"| `{name}` | `{SENT[dialect.tokenize]}`" in TOKENS


def test_the_configuration_is_a_valid_one() -> None:
    text = TOKENS.partition("```yaml\n")[2].partition("```")[0]
    endpoints = [{"name": "a", "address": "10.0.0.1:8000", "models": ["m"]}]
    discovery = {"static": {"endpoints": endpoints}}
    made = parse({**yaml.safe_load(text), "discovery": discovery}, policies=POLICIES)
    assert made.models["llama-3-8b"].encoding == "llama3"
