"""Scorers of other packages, found by entry point and loaded once, at the start.

    [project.entry-points."envoy_extproc.scorers"]
    cheapest-first = "night_shift:CheapestFirst"

The name of the entry point is the policy's; what it leads to is called without arguments and gives a `Scorer`. Every one that
is installed is loaded, for clients and pods may ask for any policy there is. One that cannot be used is a mistake where the
configuration names it, and passed over where not: a package that nobody asked for stops no server.
"""

from __future__ import annotations

import inspect
import re
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import msgspec

from envoy_extproc import mixes
from envoy_extproc.scheduling.interfaces import Scorer
from envoy_extproc.scheduling.registry import POLICIES
from envoy_extproc.settings import Settings, SettingsError

GROUP = "envoy_extproc.scorers"

_TAKEN = frozenset({*POLICIES, *mixes.PICKERS})
_MIX = "mix"  # what metrics call mixtures that only clients wrote

_name = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_target = re.compile(r"\w+(\.\w+)*\s*:\s*\w+(\.\w+)*")

_IMPORTING = ("<frozen ", "importlib")
"""Files whose frames in a traceback say nothing of what went wrong."""


class Unusable(ValueError):
    """An entry point that gives no policy; the message is the rest of a sentence that begins with it."""


class Plugin(msgspec.Struct, frozen=True, kw_only=True):
    """An entry point of the group.

    Attributes:
        name: of the entry point, and so of the policy.
        distribution: name and version of the package that brought it.
        target: what it leads to, as it is written.
        scorer: what came of it; None where it cannot be used.
        flaw: why it cannot; None where it can.
    """

    name: str
    distribution: str
    target: str
    scorer: Scorer | None = None
    flaw: str | None = None

    def __str__(self) -> str:
        """The plugin and, where there is one, its flaw, in a sentence without a full stop."""
        said = f"the scorer {self.name[:64]!r} of {self.distribution} ({self.target})"
        return said if self.flaw is None else f"{said} {self.flaw}"


class Plugins(msgspec.Struct, frozen=True):
    """Those that are installed, by name."""

    installed: tuple[Plugin, ...] = ()

    @property
    def scorers(self) -> Mapping[str, Scorer]:
        """The scorers that can be used, by the names of their policies."""
        return {each.name: each.scorer for each in self.installed if each.scorer is not None}

    @property
    def usable(self) -> tuple[Plugin, ...]:
        """Those that can be used."""
        return tuple([each for each in self.installed if each.flaw is None])

    @property
    def unusable(self) -> tuple[Plugin, ...]:
        """Those that cannot."""
        return tuple([each for each in self.installed if each.flaw is not None])


def policies() -> tuple[str, ...]:
    """Every name a policy may have here: the built-in ones, and those of the plugins. Nothing is imported for it."""
    return _policies(_entry_points())


def load(settings: Settings) -> Plugins:
    """Imports every plugin.

    Raises:
        SettingsError: the settings name one that cannot be used; the message has a line for each.
    """
    found = _entry_points()
    times = Counter(each.name for each in found)
    plugins = Plugins(tuple([_loaded(each, times) for each in found]))
    _check(settings, plugins.unusable, _policies(found))
    return plugins


def _policies(found: Collection[EntryPoint]) -> tuple[str, ...]:
    names = {each.name for each in found if _name.fullmatch(each.name)}
    return *POLICIES, *sorted(names - _TAKEN - {_MIX})


def _entry_points() -> list[EntryPoint]:
    return sorted(entry_points(group=GROUP), key=lambda each: (each.name, _distribution(each)))


def _distribution(entry: EntryPoint) -> str:
    return "an unknown package" if entry.dist is None else f"{entry.dist.name} {entry.dist.version}"


def _loaded(entry: EntryPoint, times: Mapping[str, int]) -> Plugin:
    plugin = Plugin(name=entry.name, distribution=_distribution(entry), target=entry.value)
    try:
        _check_name(entry.name, times)
        return msgspec.structs.replace(plugin, scorer=_scorer(entry))
    except Unusable as error:
        return msgspec.structs.replace(plugin, flaw=str(error))


def _check_name(name: str, times: Mapping[str, int]) -> None:
    if name in _TAKEN:
        raise Unusable("has the name of a built-in policy or picker")
    if name == _MIX:
        raise Unusable(f"cannot be called {_MIX}: so metrics call the mixtures of clients")
    if not _name.fullmatch(name):
        raise Unusable(
            "has no name for a policy: at most 63 lower-case letters, digits, dashes, dots and underscores, "
            "a letter or digit first"
        )
    if times[name] > 1:
        raise Unusable("is not the only one of that name: uninstall the others")


def _scorer(entry: EntryPoint) -> Scorer:
    if not _target.fullmatch(entry.value):
        raise Unusable("does not lead anywhere: an entry point is written module:name")
    make = _tried(entry.load, "cannot be imported")
    if not callable(make):
        raise Unusable(f"leads to {_kind(make)}, which is no class or function that gives a scorer")
    scorer = _tried(make, "cannot be made")
    _check_scorer(scorer)
    return scorer  # type: ignore[no-any-return]  # it has just been looked at


def _tried(step: Callable[[], Any], failure: str) -> Any:
    try:
        return step()
    except (Exception, SystemExit) as error:  # noqa: BLE001  whatever a stranger's code does, we say whose it was
        raise Unusable(f"{failure}: {_one_line(error)}{_place(error)}") from None


def _check_scorer(scorer: object) -> None:
    score = getattr(scorer, "score", None)
    if not callable(score):
        raise Unusable(f"gives {_kind(scorer)}, which has no method score")
    if inspect.iscoroutinefunction(score) or inspect.isasyncgenfunction(score):
        raise Unusable("has a score that must be awaited, but a decision waits for nothing")
    try:
        inspect.signature(score).bind(None, None)
    except TypeError:
        raise Unusable("has a score that does not take (request, candidates)") from None
    except ValueError:
        pass  # written in C, it does not tell what it takes
    remembers = [name for name in ("remember", "keep_models") if callable(getattr(scorer, name, None))]
    if len(remembers) == 1:
        raise Unusable(f"has {remembers[0]} alone: remember and keep_models belong together")


def _check(settings: Settings, unusable: Collection[Plugin], policies: Collection[str]) -> None:
    wrong = [
        f"{key}: {plugin}"
        for key, text in settings.policies.items()
        for plugin in unusable
        if plugin.name in [name for name, _ in mixes.parse(text, policies)]
    ]
    if wrong:
        raise SettingsError("\n".join(wrong))


def _kind(value: object) -> str:
    return f"an object of type {type(value).__name__}"


def _one_line(error: BaseException) -> str:
    return " ".join("".join(traceback.format_exception_only(error)).split())


def _place(error: BaseException) -> str:
    """Where in the plugin it happened; nothing where it did not get so far."""
    frames = [
        each
        for each in traceback.extract_tb(error.__traceback__)[1:]
        if not any(part in each.filename for part in _IMPORTING)
    ]
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
