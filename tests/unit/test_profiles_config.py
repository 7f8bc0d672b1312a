"""A model's own configuration: how it is read, whose word counts, and which profile a request gets."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from envoy_extproc.endpoints import Endpoint, Snapshot
from envoy_extproc.errors import ModelNotFound, UnknownProfile, UnknownStrategy
from envoy_extproc.exchange.commands import Continue
from envoy_extproc.exchange.events import Scheduled
from envoy_extproc.scheduling import configs, registry
from envoy_extproc.scheduling.configs import ConfigError, ConfigProfile, Hints, ModelConfig
from envoy_extproc.scheduling.explain import Asked
from envoy_extproc.scheduling.interfaces import SchedulingRequest
from envoy_extproc.server import configured
from envoy_extproc.server.director import Director, RoutingRules
from envoy_extproc.settings import Settings, SettingsError, parse
from tests.support.builders import MODEL, decision, endpoint
from tests.support.playbook import Playbook, asked, handover, reply

TEXT = json.dumps(
    {
        "lockedRoutingStrategy": "",
        "defaultProfile": "short",
        "profiles": {
            "short": {"routingStrategy": "least-request", "routingConfig": {"promptTokensLt": 1000}},
            "long": {
                "routingStrategy": "random",
                "routingConfig": {"promptTokensGte": 1000, "combined": True},
            },
            "long-answers": {
                "routingStrategy": "least-kv-cache:2,least-request",
                "routingConfig": {"promptTokensGte": 1000, "maxTokensGte": 500},
            },
            "batch": {"routingStrategy": "power-of-two", "requestsPerSecond": 5},
            "plain": {},
        },
    }
)
CONFIG = configs.parse(TEXT)


# -- how it is read ------------------------------------------------------------------------------------------------


def test_aibrix_json_is_read() -> None:
    assert list(CONFIG.profiles) == ["short", "long", "long-answers", "batch", "plain"]
    assert CONFIG.default_profile == "short"
    assert CONFIG.profiles["long"] == ConfigProfile(
        routing_strategy="random", routing_config=Hints(prompt_tokens_gte=1000)
    )
    assert CONFIG.profiles["batch"].requests_per_second == 5
    assert list(CONFIG.policies) == [
        "least-request",
        "random",
        "least-kv-cache:2,least-request",
        "power-of-two",
    ]
    assert configs.parse("{}") == ModelConfig()


def test_null_is_nothing() -> None:
    nothing = {"lockedRoutingStrategy": None, "defaultProfile": None, "profiles": None}
    assert configs.parse(json.dumps(nothing)) == ModelConfig()
    profile = {"routingStrategy": None, "routingConfig": None, "requestsPerSecond": None}
    hints = {"routingConfig": {"promptTokensGte": None, "maxTokensLt": 9}}
    read = configs.parse(json.dumps({"profiles": {"a": profile, "b": hints, "c": None}}))
    assert read.profiles == {
        "a": ConfigProfile(),
        "b": ConfigProfile(routing_config=Hints(max_tokens_lt=9)),
        "c": ConfigProfile(),
    }


def test_the_example_of_the_documentation_can_be_read() -> None:
    page = (Path(__file__).parents[2] / "docs" / "routing.md").read_text(encoding="utf-8")
    text = page.partition("```json\n")[2].partition("```")[0]
    director(configs=of(text))
    assert list(configs.parse(text).profiles) == ["short", "long"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"profiles": []}',
        '{"profiles": {"a": {"routingConfig": {"promptTokensGte": "1"}}}}',
        '{"defaultProfile": "a"}',
        '{"lockedRoutingStrategy": 1}',
        "\udcff",
        '{"profiles": {"a": 1}}',
        '{"x": ' + "[" * 100_000 + "]" * 100_000 + "}",
        "[" * 100_000,
        '{"x": ' + "[" * 100_000,
        '{"profiles": {"a\\nb": {}}}',
        '{"profiles": {"ü": {}}}',
        '{"profiles": {"": {}}}',
        '{"profiles": {"' + "a" * 257 + '": {}}}',
    ],
)
def test_what_is_no_configuration(text: str) -> None:
    with pytest.raises(ConfigError):
        configs.parse(text)


# -- which profile -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("profile", "prompt", "most", "name"),
    [
        (None, 5000, None, "short"),
        ("batch", 0, None, "batch"),
        ("auto", 999, None, "short"),
        ("auto", 1000, None, "long"),
        ("auto", 1000, 499, "long"),
        ("auto", 1000, 500, "long-answers"),
        ("auto", 0, 500, "short"),  # how long the prompt is cannot be told: the default
    ],
)
def test_the_profile_of_a_request(profile: str | None, prompt: int, most: int | None, name: str) -> None:
    request = SchedulingRequest(profile=profile, prompt_tokens=prompt, max_output_tokens=most)
    found = configs.choose(CONFIG, request)
    assert found == (name, CONFIG.profiles[name])


@pytest.mark.parametrize(
    ("config", "profile", "name"),
    [
        ({"profiles": {"default": {}, "a": {}}}, None, "default"),
        ({"profiles": {"default": {}, "a": {}}}, "auto", "default"),
        ({"profiles": {"a": {}}}, None, None),
        ({"profiles": {"a": {}}}, "auto", None),
        ({"defaultProfile": "a", "profiles": {"default": {}, "a": {}}}, None, "a"),
        (None, None, None),
        (None, "auto", None),
        ({"profiles": {"auto": {}}}, "auto", None),
    ],
)
def test_without_one_for_it(config: dict[str, Any] | None, profile: str | None, name: str | None) -> None:
    read = None if config is None else msgspec.convert(config, ModelConfig)
    found = configs.choose(read, SchedulingRequest(profile=profile, prompt_tokens=5))
    assert (None if found is None else found[0]) == name


@pytest.mark.parametrize("word", ["auto", "Auto", " AUTO "])
def test_auto_is_a_word_in_any_case(word: str) -> None:
    book = Playbook()
    book.request(config_profile=word)
    assert asked(book.body(b'{"model":"llama-3-8b"}')).profile == "auto"


@pytest.mark.parametrize(
    ("one", "other", "counts"),
    [
        ({"promptTokensGte": 10}, {"promptTokensGte": 50}, 1),
        ({"promptTokensLt": 500}, {"promptTokensLt": 900}, 0),
        ({"maxTokensGte": 9}, {"maxTokensGte": 5}, 0),
        ({"maxTokensLt": 90}, {"maxTokensLt": 20}, 1),
        (
            {"promptTokensGte": 10},
            {"maxTokensGte": 5},
            0,
        ),  # one that speaks of the prompt before one that does not
        ({"promptTokensLt": 500}, {"promptTokensGte": 10}, 1),  # from where on before up to where
        (
            {"promptTokensGte": 50},
            {"maxTokensGte": 5, "maxTokensLt": 90},
            1,
        ),  # the number of hints before all
        ({"promptTokensGte": 10, "maxTokensLt": 90}, {"promptTokensGte": 10, "maxTokensLt": 20}, 1),
        ({"promptTokensGte": 0}, {"promptTokensGte": 0}, 0),  # the name
    ],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_of_several_matches_the_narrowest_counts(
    one: dict[str, int], other: dict[str, int], counts: int, swapped: bool
) -> None:
    hints = [("a", one), ("b", other)]
    profiles = {name: {"routingConfig": each} for name, each in (hints[::-1] if swapped else hints)}
    config = msgspec.convert({"profiles": profiles}, ModelConfig)
    request = SchedulingRequest(profile="auto", prompt_tokens=100, max_output_tokens=10)
    found = configs.choose(config, request)
    assert found is not None
    assert found[0] == "ab"[counts]


@pytest.mark.parametrize("config", [CONFIG, ModelConfig(), None])
@pytest.mark.parametrize("profile", ["none", "Short", "x" * 9999, "\udcff"])
def test_an_unknown_profile_is_refused(config: ModelConfig | None, profile: str) -> None:
    with pytest.raises(UnknownProfile) as refused:
        configs.choose(config, SchedulingRequest(profile=profile))
    assert (refused.value.status, refused.value.param) == (400, "config-profile")


# -- whose word counts ---------------------------------------------------------------------------------------------


def annotated(number: int, text: str | None, models: tuple[str, ...] = (MODEL,)) -> Endpoint:
    return msgspec.structs.replace(endpoint(number, models=models), config=text)


def labelled(number: int, text: str) -> Endpoint:
    return msgspec.structs.replace(endpoint(number), labels={configs.LABEL: text})


def director(*endpoints: Endpoint, **rules: Any) -> Director:
    made = Director(
        profiles=registry.build(),
        rules=RoutingRules(**rules),
        in_flight=lambda _: 0,
        states={},
        rng=random.Random(1),
    )
    made.update(Snapshot(endpoints or [endpoint(1), endpoint(2)]))
    return made


def of(text: str = TEXT) -> Mapping[str, ModelConfig]:
    return {MODEL: configs.parse(text)}


LOCKED = json.dumps(
    {"lockedRoutingStrategy": "round-robin", "profiles": {"a": {"routingStrategy": "random"}}}
)


@pytest.mark.parametrize(
    ("rules", "known", "said"),
    [
        ({"configs": of()}, {}, Asked("least-request", "profile")),
        ({"configs": of()}, {"profile": "long"}, Asked("random", "profile")),
        ({"configs": of()}, {"profile": "long", "policy": "round-robin"}, Asked("round-robin", "header")),
        (
            {"configs": of(), "allow_strategy_header": False},
            {"profile": "long", "policy": "round-robin"},
            Asked("random", "profile", "round-robin"),
        ),
        ({"configs": of(), "model_policies": {MODEL: "throughput"}}, {"profile": "long"}, Asked("random", "profile")),
        (
            {"configs": of(), "model_policies": {MODEL: "throughput"}},
            {"profile": "plain"},
            Asked("throughput", "model"),
        ),
        ({"configs": of(), "policy": "throughput"}, {"profile": "plain"}, Asked("throughput", "routing")),
        (
            {"configs": of(), "model_policies": {MODEL: "throughput"}, "locked": {MODEL}},
            {"profile": "long"},
            Asked("throughput", "locked"),
        ),
        (
            {"configs": of(LOCKED)},
            {"profile": "a", "policy": "random"},
            Asked("round-robin", "locked", "random"),
        ),
        (
            {"configs": of()},
            {"profile": "auto", "prompt_tokens": 2000},
            Asked("random", "profile", None, "long"),
        ),
        (
            {"configs": of()},
            {"profile": "auto", "prompt_tokens": 2000, "policy": "round-robin"},
            Asked("round-robin", "header", None, "long"),
        ),
    ],
)  # fmt: skip
def test_whose_word_counts(rules: dict[str, Any], known: dict[str, Any], said: Asked) -> None:
    made = director(**rules)
    request = SchedulingRequest(model=MODEL, **known)
    assert made.asked(request) == said
    decided = made.schedule(request, 0.0)
    assert decided.policy == registry.build().find(said.policy).name
    assert decided.profile == said.profile
    assert made.explain(request, 0.0).source == said.source


def test_an_unknown_profile_goes_nowhere() -> None:
    made = director(configs=of())
    for profile in ("none", "\udcff"):
        request = SchedulingRequest(model=MODEL, profile=profile)
        for decide in (made.schedule, made.explain):
            with pytest.raises(UnknownProfile):
                decide(request, 0.0)
    with pytest.raises(ModelNotFound):
        made.schedule(SchedulingRequest(model="none", profile="none"), 0.0)
    assert made.schedule(SchedulingRequest(profile="none"), 0.0).policy == "least-request"


def test_a_decision_can_be_looked_at_when_its_profile_is_gone() -> None:
    made = director(annotated(1, TEXT))
    made.schedule(SchedulingRequest(model=MODEL, profile="long"), 0.0)
    made.update(Snapshot([endpoint(1)]))
    assert made.asked(made.decisions[-1][1]) == Asked("least-request", "routing")


def test_mixtures_of_profiles_are_labels_by_name() -> None:
    made = director(configs=of())
    long_answers = SchedulingRequest(model=MODEL, profile="long-answers")
    assert made.schedule(long_answers, 0.0).label == "least-kv-cache:2,least-request:1"


# -- where it stands -----------------------------------------------------------------------------------------------


def policy(made: Director, **known: Any) -> str:
    return made.schedule(SchedulingRequest(**{"model": MODEL, **known}), 0.0).policy


RANDOM = '{"profiles": {"default": {"routingStrategy": "random"}}}'


def test_pods_say_it_by_their_annotation() -> None:
    made = director(annotated(2, RANDOM), annotated(1, TEXT), annotated(3, None))
    assert policy(made, profile="long") == "random"
    assert policy(made) == "least-request"  # the first by address
    made.update(Snapshot([annotated(2, RANDOM)]))
    assert policy(made) == "random"
    made.update(Snapshot([annotated(2, None)]))
    assert policy(made) == "least-request"


def test_an_endpoint_that_is_written_down_says_it_by_a_label() -> None:
    made = director(labelled(1, RANDOM))
    assert policy(made) == "random"
    made.update(Snapshot([msgspec.structs.replace(labelled(1, RANDOM), config=LOCKED)]))
    assert policy(made) == "round-robin"  # the annotation goes first


def test_each_model_has_its_own() -> None:
    made = director(
        annotated(1, RANDOM, ("a", "b")), annotated(2, LOCKED, ("b", "c")), annotated(3, None, ("d",))
    )
    assert [policy(made, model=model) for model in "abcd"] == [
        "random",
        "random",
        "round-robin",
        "least-request",
    ]


def test_the_operators_word_goes_first() -> None:
    made = director(annotated(1, RANDOM), configs=of(LOCKED))
    assert policy(made) == "round-robin"


@pytest.mark.parametrize(
    "text",
    [
        "{",
        '{"profiles": {"a": {"routingStrategy": "best"}}}',
        '{"defaultProfile": "x"}',
        '{"x": ' + "[" * 100_000,
        "short",
    ],
)
def test_an_annotation_that_is_wrong_is_passed_over_and_told_once(text: str) -> None:
    with capture_logs() as logs:
        made = director(annotated(1, text), annotated(2, RANDOM), annotated(3, text))
        made.update(Snapshot([annotated(1, text), annotated(2, RANDOM)]))
    assert policy(made) == "random"
    assert [(each["event"], each["endpoint"]) for each in logs] == [("model_config_ignored", "pod-1")]


def test_a_limit_in_an_annotation_is_told_to_be_none() -> None:
    with capture_logs() as logs:
        director(annotated(1, TEXT))
    assert [each["event"] for each in logs] == ["requests_per_second_ignored"]


def test_a_configuration_that_names_no_policy_is_a_mistake() -> None:
    with pytest.raises(UnknownStrategy):
        director(configs={MODEL: ModelConfig(locked_routing_strategy="best")})


# -- in the settings -----------------------------------------------------------------------------------------------

STATIC = {"static": {"endpoints": [{"name": "a", "address": "10.0.0.1:8000", "models": [MODEL]}]}}


def settings(config: Any) -> Settings:
    return parse({"discovery": STATIC, "models": {MODEL: {"config": config}}}, policies=registry.POLICIES)


def test_the_settings_have_the_same_shape() -> None:
    shape = json.loads(TEXT)
    del (
        shape["profiles"]["batch"]["requestsPerSecond"],
        shape["profiles"]["long"]["routingConfig"]["combined"],
    )
    rules = configured.rules(settings(shape))
    assert rules.configs == {MODEL: configs.parse(json.dumps(shape))}
    assert configured.rules(settings(None)).configs == {}


@pytest.mark.parametrize(
    ("config", "wrong"),
    [
        ({"lockedRoutingStrategy": "best"}, "config.lockedRoutingStrategy: no policy 'best'"),
        (
            {"profiles": {"a": {"routingStrategy": "random,least-request"}}},
            "config.profiles.a.routingStrategy: the policy 'random' does not score",
        ),
        ({"defaultProfile": "b", "profiles": {"a": {}}}, "config: defaultProfile: no profile 'b'"),
        ({"profiles": {"a": {"requestsPerSecond": 5}}}, "config.profiles.a.requestsPerSecond: "),
        ({"profiles": {"a\nb": {}}}, "profiles: 'a\\nb' has other than"),
        (
            {"profiles": {"a": {"routingConfig": {"promptTokens": 5}}}},
            "routingConfig.promptTokens: unknown key",
        ),
        ({"profiles": {"a": {"routingConfig": {"promptTokensLt": -5}}}}, "routingConfig.promptTokensLt: "),
        ({"locked_routing_strategy": "random"}, "config.locked_routing_strategy: unknown key"),
    ],
)
def test_settings_that_are_wrong_say_where(config: Any, wrong: str) -> None:
    with pytest.raises(SettingsError, match=f"models.{MODEL}.") as refused:
        settings(config)
    assert wrong in str(refused.value)


# -- in an exchange ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("profile", [None, "long"])
def test_an_answer_tells_the_profile_that_was_found(native: bool, profile: str | None) -> None:
    book = Playbook(native=native)
    book.request(config_profile="auto")
    request = asked(book.body(b'{"model":"llama-3-8b"}'))
    assert request.profile == "auto"
    decided = msgspec.structs.replace(decision(1), profile=profile)
    routed = reply(book.receive(Scheduled(book.now(), decided)))
    assert "config-profile" in routed.remove_headers
    told = () if profile is None else (("x-aibrix-config-profile", profile),)
    if native:
        assert handover(routed).extras == told
        return
    (*_, answer) = book.answer()
    assert isinstance(answer, Continue)
    assert set(told) == {pair for pair in answer.set_headers if pair[0] == "x-aibrix-config-profile"}
