"""Scorers of other packages: how they are found, what is said of those that cannot be used, and what they cannot break."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from envoy_extproc.scheduling import registry
from envoy_extproc.scheduling.interfaces import (
    Candidate,
    Decision,
    MissingDataError,
    Remembering,
    SchedulingRequest,
    Scorer,
)
from envoy_extproc.server import plugins
from envoy_extproc.server.guard import GuardedScorer, guarded
from envoy_extproc.settings import Settings, SettingsError, parse
from tests.support.builders import MODEL, candidate
from tests.support.distributions import files, unpack

REQUEST = SchedulingRequest(model=MODEL)
GOOD = """
class Good:
    def score(self, request, candidates):
        return [1.0 for _ in candidates]
"""
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Installs a package with one module, `strange`, and these entry points."""
    monkeypatch.syspath_prepend(tmp_path)

    def put(source: str = GOOD, *, name: str = "strange-one", **scorers: str) -> None:
        points = {point.replace("_", "-"): target for point, target in scorers.items()}
        unpack(tmp_path, files(name, {"strange": source}, points))

    yield put
    sys.modules.pop("strange", None)


def settings(**sections: Any) -> Settings:
    endpoint = {"name": "a", "address": "10.0.0.1:8000", "models": [MODEL]}
    data = {"discovery": {"static": {"endpoints": [endpoint]}}, **sections}
    return parse(data, policies=plugins.policies())


# -- finding and loading -------------------------------------------------------------------------------------------


def test_without_any_there_are_the_policies_of_our_own() -> None:
    assert plugins.policies() == registry.POLICIES
    assert plugins.load(settings()).installed == ()


@pytest.mark.parametrize("target", ["strange:Good", "strange:make", "strange : Good"])
def test_a_class_or_a_function_gives_a_scorer(install: Install, target: str) -> None:
    install(GOOD + "\nmake = lambda: Good()", good=target)
    assert plugins.policies() == (*registry.POLICIES, "good")
    loaded = plugins.load(settings(routing={"policy": "good:2,least-request"}))
    (plugin,) = loaded.usable
    assert str(plugin) == f"the scorer 'good' of strange-one 1.0 ({target})"
    assert loaded.unusable == ()
    assert loaded.scorers["good"].score(REQUEST, [candidate(1)]) == [1.0]


def test_names_are_known_without_an_import(install: Install) -> None:
    install("raise SystemExit(3)", later="strange:Later")
    assert "later" in plugins.policies()
    assert settings(routing={"policy": "later"}).policies == {"routing.policy": "later"}
    assert "strange" not in sys.modules


FLAWS = {
    "import": (
        "import no_such_module",
        "strange:Good",
        "cannot be imported: ModuleNotFoundError: No module named",
    ),
    "place": ("x = 1\ny = x / 0", "strange:Good", "ZeroDivisionError: division by zero (/"),
    "exit": ("raise SystemExit('gone')", "strange:Good", "cannot be imported: SystemExit: gone"),
    "syntax": ("def", "strange:Good", "cannot be imported: File"),
    "attribute": (GOOD, "strange:Bad", "cannot be imported: AttributeError"),
    "nowhere": (GOOD, "strange Good", "an entry point is written module:name"),
    "module": (GOOD, "strange", "an entry point is written module:name"),
    "value": ("Good = 3", "strange:Good", "leads to an object of type int, which is no class"),
    "arguments": ("class Good:\n  def __init__(self, x): ...", "strange:Good", "cannot be made: TypeError"),
    "none": (
        "def Good(): ...",
        "strange:Good",
        "gives an object of type NoneType, which has no method score",
    ),
    "no score": ("class Good:\n  score = 1", "strange:Good", "which has no method score"),
    "async": ("class Good:\n  async def score(self, r, c): ...", "strange:Good", "must be awaited"),
    "takes": (
        "class Good:\n  def score(self, r): ...",
        "strange:Good",
        "does not take (request, candidates)",
    ),
    "memory": (GOOD + "    def remember(self, r, c): ...", "strange:Good", "has remember alone"),
}


@pytest.mark.parametrize("case", FLAWS)
def test_one_that_cannot_be_used(install: Install, case: str) -> None:
    source, target, why = FLAWS[case]
    install(source, good=target)
    passed_over = plugins.load(settings())
    assert passed_over.scorers == {}
    (plugin,) = passed_over.unusable
    assert plugin.flaw is not None
    assert why in plugin.flaw
    assert "\n" not in plugin.flaw
    for config, key in (
        ({"routing": {"policy": "good"}}, "routing.policy"),
        ({"routing": {"policy": "least-request, good : 3"}}, "routing.policy"),
        ({"models": {"m": {"policy": "good"}}}, "models.m.policy"),
        ({"models": {"m": {"config": {"profiles": {"p": {"routingStrategy": "good"}}}}}},
         "models.m.config.profiles.p.routingStrategy"),
    ):  # fmt: skip
        with pytest.raises(SettingsError) as wrong:
            plugins.load(settings(**config))
        assert str(wrong.value).startswith(f"{key}: the scorer 'good' of strange-one 1.0 ({target}) ")
        assert why in str(wrong.value)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("least-request", "has the name of a built-in policy"),
        ("pd", "has the name of a built-in policy"),
        ("max-score-picker", "has the name of a built-in policy or picker"),
        ("mix", "so metrics call"),
        ("Good", "has no name for a policy"),
        ("good one", "has no name for a policy"),
        ("good,better", "has no name for a policy"),
        ("-good", "has no name for a policy"),
        ("g" * 64, "has no name for a policy"),
        ("güt", "has no name for a policy"),
    ],
)
def test_a_name_that_no_policy_can_have(install: Install, name: str, why: str) -> None:
    install(**{name: "strange:Good"})
    assert plugins.policies() == registry.POLICIES
    (plugin,) = plugins.load(settings(routing={"policy": "random"})).unusable
    assert plugin.flaw is not None
    assert why in plugin.flaw
    assert plugin.scorer is None


@pytest.mark.parametrize("policy", ["prefix-cache", "random", "least-kv-cache:1,prefix-cache"])
def test_nobody_takes_a_name_that_is_used(install: Install, policy: str) -> None:
    install(prefix_cache="strange:Good", random="strange:Good")
    with pytest.raises(
        SettingsError, match=r"routing\.policy: the scorer .* has the name of a built-in policy"
    ):
        plugins.load(settings(routing={"policy": policy}))


def test_two_of_one_name_are_none(install: Install) -> None:
    install(good="strange:Good")
    install(name="other-one", good="strange:Good")
    loaded = plugins.load(settings())
    assert [plugin.distribution for plugin in loaded.unusable] == ["other-one 1.0", "strange-one 1.0"]
    assert loaded.scorers == {}
    with pytest.raises(SettingsError) as wrong:
        plugins.load(settings(routing={"policy": "good"}))
    assert str(wrong.value).splitlines() == [
        f"routing.policy: the scorer 'good' of {name} 1.0 (strange:Good) is not the only one of that name: uninstall the others"
        for name in ("other-one", "strange-one")
    ]


def test_a_broken_one_takes_no_other_with_it(install: Install) -> None:
    install(good="strange:Good", bad="strange:Bad")
    loaded = plugins.load(settings(routing={"policy": "good"}))
    assert list(loaded.scorers) == ["good"]
    assert [plugin.name for plugin in loaded.unusable] == ["bad"]
    with pytest.raises(SettingsError, match=r"there are random, .*, bad, good$"):
        settings(routing={"policy": "ugly"})


# -- what they cannot break ----------------------------------------------------------------------------------------


class Plugged:
    """A scorer that does what it is told."""

    name = "its own name does not count"

    def __init__(self, does: Callable[[Sequence[Candidate]], Any]) -> None:
        self._does = does

    def score(self, request: SchedulingRequest, candidates: Sequence[Candidate]) -> Any:
        return self._does(candidates)


class Elephant(Plugged):
    """One that remembers, as badly as it is told."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__(lambda candidates: [0.5] * len(candidates))
        self.error = error
        self.chosen: list[str] = []
        self.models: list[Collection[str]] = []

    def remember(self, request: SchedulingRequest, chosen: Candidate) -> None:
        if self.error is not None:
            raise self.error
        self.chosen.append(chosen.endpoint.name)

    def keep_models(self, models: Collection[str]) -> None:
        if self.error is not None:
            raise self.error
        self.models.append(models)


def raising(error: BaseException) -> Callable[[Sequence[Candidate]], Any]:
    def fail(_: Sequence[Candidate]) -> Any:
        raise error

    return fail


def endless(_: Sequence[Candidate]) -> Iterator[float]:
    while True:
        yield 1.0


class Wrapped:
    """A guarded scorer, its failures and its clock."""

    def __init__(self, scorer: Scorer) -> None:
        self.failures: list[str] = []
        self.now = 0.0
        self.guarded = guarded("plugged", scorer, self.failures.append, lambda: self.now)

    def decide(self, policy: str, candidates: Sequence[Candidate]) -> Decision:
        built = registry.build(scorers={"plugged": self.guarded})
        profile = built.find(policy)
        decision = profile.run(REQUEST, candidates, random.Random(1))
        profile.remember(REQUEST, decision)
        return decision


FAILURES: Mapping[str, Callable[[Sequence[Candidate]], Any]] = {
    "raises": raising(ValueError("no")),
    "raises what is no error": raising(SystemExit(1)),
    "recurses": raising(RecursionError()),
    "too few": lambda candidates: [1.0] * (len(candidates) - 1),
    "too many": lambda candidates: [1.0] * (len(candidates) + 1),
    "endless": endless,
    "nothing": lambda _: None,
    "a number": lambda _: 1.0,
    "NaN": lambda candidates: [math.nan] * len(candidates),
    "infinite": lambda candidates: [math.inf] * len(candidates),
    "minus infinite": lambda candidates: [-math.inf] * len(candidates),
    "above 1": lambda candidates: [1.1] * len(candidates),
    "below 0": lambda candidates: [-0.1] * len(candidates),
    "huge": lambda candidates: [10**400] * len(candidates),
    "text": lambda candidates: ["1"] * len(candidates),
    "one text": lambda candidates: "1" * len(candidates),
    "None": lambda candidates: [None] * len(candidates),
    "complex": lambda candidates: [1j] * len(candidates),
    "by address": lambda candidates: {each.endpoint.address: 1.0 for each in candidates},
    "sorts candidates": lambda candidates: candidates.sort(),  # type: ignore[attr-defined]
    "changes candidates": lambda candidates: setattr(candidates[0], "in_flight", 0),
}
TWO = [candidate(1, 5), candidate(2, 3)]


@pytest.mark.parametrize("does", FAILURES.values(), ids=FAILURES)
def test_whatever_it_does_the_fallback_decides(does: Callable[[Sequence[Candidate]], Any]) -> None:
    wrapped = Wrapped(Plugged(does))
    with capture_logs() as logs:
        decision = wrapped.decide("plugged", TWO)
    assert (decision.policy, decision.decided_by) == ("plugged", "least-request")
    assert (decision.fallback_reason, decision.missing) == ("scorer-failed", ("plugged",))
    assert decision.chosen is TWO[1]
    assert wrapped.failures == ["plugged"]
    (line,) = logs
    assert (line["event"], line["scorer"], line["method"]) == ("scorer_failed", "plugged", "score")
    assert isinstance(line["exc_info"], BaseException)


@pytest.mark.parametrize("does", FAILURES.values(), ids=FAILURES)
def test_a_mixture_goes_on_without_it(does: Callable[[Sequence[Candidate]], Any]) -> None:
    wrapped = Wrapped(Plugged(does))
    with capture_logs():
        decision = wrapped.decide("plugged:9,least-request:1", TWO)
    assert (decision.fallback_reason, decision.missing) == (None, ("plugged",))
    assert [each.scorer for each in decision.scores] == ["least-request"]
    assert decision.chosen is TWO[1]
    assert wrapped.failures == ["plugged"]


@pytest.mark.parametrize(
    "values", [[1, 0], (1.0, 0.0), iter([True, False]), [Fraction(1), Fraction(0)], [1 + 1e-9, -1e-9]]
)
def test_numbers_are_numbers(values: Any) -> None:
    wrapped = Wrapped(Plugged(lambda _: values))
    decision = wrapped.decide("plugged", TWO)
    assert decision.scores[0].values == (1.0, 0.0)
    assert all(type(value) is float for value in decision.scores[0].values)
    assert (decision.scores[0].scorer, decision.chosen) == ("plugged", TWO[0])
    assert wrapped.failures == []


def test_a_mixture_spreads_its_scores() -> None:
    wrapped = Wrapped(Plugged(lambda _: [0.51, 0.50]))
    decision = wrapped.decide("plugged:2,least-request", TWO)
    assert [(each.scorer, each.values) for each in decision.scores] == [
        ("plugged", (1.0, 0.0)),
        ("least-request", (0.0, 1.0)),
    ]
    assert decision.chosen is TWO[0]


@pytest.mark.parametrize(
    ("reason", "label"),
    [
        ("no-price", "no-price"),
        ("No price!", "no-data"),
        ("", "no-data"),
        ("x" * 33, "no-data"),
        (3, "no-data"),
    ],
)
def test_it_may_say_that_it_lacks_data(reason: Any, label: str) -> None:
    wrapped = Wrapped(Plugged(raising(MissingDataError(reason))))
    with capture_logs() as logs:
        decision = wrapped.decide("plugged", TWO)
    assert (decision.decided_by, decision.fallback_reason) == ("least-request", label)
    assert (logs, wrapped.failures) == ([], [])


def test_reasons_are_few() -> None:
    numbers = iter(range(1000))
    wrapped = Wrapped(Plugged(lambda _: raising(MissingDataError(f"user-{next(numbers)}"))([])))
    reasons = [wrapped.decide("plugged", TWO).fallback_reason for _ in range(100)]
    assert set(reasons) == {*[f"user-{number}" for number in range(8)], "no-data"}
    assert reasons[:8] == [f"user-{number}" for number in range(8)]


def test_the_log_is_not_flooded() -> None:
    wrapped = Wrapped(Plugged(raising(ValueError("no"))))
    with capture_logs() as logs:
        for wrapped.now in (0.0, 1.0, 59.9, 60.0, 61.0):
            wrapped.decide("plugged", TWO)
    assert [line["failures"] for line in logs] == [1, 3]
    assert len(wrapped.failures) == 5


def test_one_that_remembers_is_told_what_was_chosen() -> None:
    elephant = Elephant()
    wrapped = Wrapped(elephant)
    assert isinstance(wrapped.guarded, Remembering)
    assert not isinstance(guarded("plugged", Plugged(raising(ValueError())), print), Remembering)
    wrapped.decide("plugged", TWO)
    wrapped.decide("plugged,least-kv-cache", TWO)
    registry.build(scorers={"plugged": wrapped.guarded}).keep_models({MODEL: ()}.keys())
    assert elephant.chosen == ["pod-2", "pod-2"]
    assert elephant.models == [{MODEL}]


def test_one_that_remembers_badly_is_passed_over() -> None:
    wrapped = Wrapped(Elephant(KeyError("lost")))
    with capture_logs() as logs:
        assert wrapped.decide("plugged", TWO).fallback_reason is None
        wrapped.now = 100.0
        registry.build(scorers={"plugged": wrapped.guarded}).keep_models([])
    assert [line["method"] for line in logs] == ["remember", "keep_models"]
    assert wrapped.failures == ["plugged", "plugged"]


def test_scorers_of_our_own_are_not_looked_after() -> None:
    built = registry.build(scorers={"plugged": guarded("plugged", Plugged(lambda _: []), print)})
    assert [name for name, scorer in built._scorers.items() if isinstance(scorer, GuardedScorer)] == [
        "plugged"
    ]
