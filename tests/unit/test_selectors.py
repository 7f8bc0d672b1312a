"""Label selectors: what they select, as a table; where a wrong one is wrong; and that nothing else ever happens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envoy_extproc.endpoints import Endpoint, Snapshot
from envoy_extproc.errors import BadSelector, NoReadyEndpoint
from envoy_extproc.scheduling import selectors
from envoy_extproc.scheduling.interfaces import SchedulingRequest
from envoy_extproc.scheduling.pool import pool

PODS = {
    "a10": {"gpu": "a10", "zone": "eu-1", "example.com/tier": "gold"},
    "l4": {"gpu": "l4", "zone": "eu-2"},
    "spot": {"gpu": "a10", "spot": ""},
    "bare": {},
}
EVERYONE = set(PODS)


def selected(text: str) -> set[str]:
    selector = selectors.parse(text)
    return {name for name, labels in PODS.items() if selector.matches(labels)}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("gpu=a10", {"a10", "spot"}),
        ("gpu==a10", {"a10", "spot"}),
        ("gpu = a10", {"a10", "spot"}),
        ("gpu!=a10", {"l4", "bare"}),
        ("gpu in (a10)", {"a10", "spot"}),
        ("gpu in (a10, l4)", {"a10", "l4", "spot"}),
        ("gpu in(a10,l4)", {"a10", "l4", "spot"}),
        ("gpu notin (a10)", {"l4", "bare"}),
        ("gpu notin (a10,l4)", {"bare"}),
        ("gpu", {"a10", "l4", "spot"}),
        ("!gpu", {"bare"}),
        ("! gpu", {"bare"}),
        ("spot=", {"spot"}),
        ("spot!=", {"a10", "l4", "bare"}),
        ("spot in (,x)", {"spot"}),
        ("spot in (x,)", {"spot"}),
        ("gpu=a10,spot", {"spot"}),
        ("gpu=a10,!spot", {"a10"}),
        ("spot=,gpu=a10", {"spot"}),
        (" gpu=a10 ,\tzone in (eu-1, eu-2) ", {"a10"}),
        ("example.com/tier=gold", {"a10"}),
        ("gpu=A10", set()),
        ("GPU", set()),
        ("in", set()),
        ("notin notin (in)", EVERYONE),
        ("in in (notin)", set()),
        ("", EVERYONE),
        ("  \t", EVERYONE),
    ],
)
def test_what_is_selected(text: str, names: set[str]) -> None:
    assert selected(text) == names


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("=", "at character 1 is '=', expected the key of a label"),
        ("gpu=a10,", "at character 9 is the end, expected the key of a label"),
        (",gpu", "at character 1 is ',', expected the key of a label"),
        ("gpu=a10 l4", "at character 9 is 'l4', expected `,` or the end"),
        ("gpu a10", "at character 5 is 'a10', expected `=`, `==`, `!=`, `in`, `notin`, `,` or the end"),
        ("gpu in a10", "at character 8 is 'a10', expected `(`"),
        ("gpu in ()", "at character 9 is ')', expected a value"),
        ("gpu in (a10", "at character 12 is the end, expected `,` or `)`"),
        ("gpu in (a10 l4)", "at character 13 is 'l4', expected `,` or `)`"),
        ("gpu=!a10", "at character 5 is '!', expected `,` or the end"),
        ("!", "at character 2 is the end, expected the key of a label"),
        ("!!gpu", "at character 2 is '!', expected the key of a label"),
        ("!gpu=a10", "at character 5 is '=', expected `,` or the end"),
        ("gpu===a10", "at character 6 is '=', expected `,` or the end"),
        ("gpu>1", "at character 1 is 'gpu>1', expected the key of a label"),
        ("-gpu", "at character 1 is '-gpu', expected the key of a label"),
        ("/gpu", "at character 1 is '/gpu', expected the key of a label"),
        ("Ex.com/gpu", "at character 1 is 'Ex.com/gpu', expected the key of a label"),
        ("a/b/c", "at character 1 is 'a/b/c', expected the key of a label"),
        ("gpu=a10-", "at character 5 is 'a10-', expected the value of a label"),
        ("gpu=ä", "at character 5 is 'ä', expected the value of a label"),
        ("gpu=a\n", "at character 5 is 'a\\n', expected the value of a label"),
        ("gpu=\udcff", "at character 5 is '\\udcff', expected the value of a label"),
        ("g" * 64, "expected the key of a label"),
        ("gpu=" + "a" * 64, "expected the value of a label"),
        ("a" * 254 + "/gpu", "expected the key of a label"),
        ("a" * 1025, "longer than 1024 characters"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(text: str, where: str) -> None:
    with pytest.raises(BadSelector) as refused:
        selectors.parse(text)
    assert where in refused.value.message
    assert len(refused.value.message) < 300
    assert refused.value.param == "external-filter"


@pytest.mark.parametrize("text", ["g" * 63, "gpu=" + "a" * 63, "a" * 63 + "." + "b" * 63 + "/gpu", "a" * 0])
def test_the_longest_that_kubernetes_allows(text: str) -> None:
    selectors.parse(text)


def test_remembers_a_bounded_number() -> None:
    for number in range(1000):
        selectors.parse(f"gpu=a{number}")
    assert selectors.parse.cache_info().currsize <= 256


WORDS = st.sampled_from(
    ["gpu", "zone", "spot", "a10", "in", "notin", "(", ")", ",", "=", "==", "!=", "!", " ", "x"]
)
TEXTS = (
    st.text(max_size=40)
    | st.lists(WORDS, max_size=12).map("".join)
    | st.lists(WORDS, max_size=12).map(" ".join)
)
MODEL = "m"
SNAPSHOT = Snapshot(
    Endpoint(name=name, address=f"10.0.0.{number}:8000", models=(MODEL,), labels=labels)
    for number, (name, labels) in enumerate(PODS.items())
)


@given(TEXTS)
def test_never_another_error_and_never_a_pod_outside(text: str) -> None:
    request = SchedulingRequest(model=MODEL, selector=text)
    try:
        chosen = {endpoint.name for endpoint in pool(SNAPSHOT, request)}
    except BadSelector:
        return
    except NoReadyEndpoint:
        chosen = set()
    assert chosen == selected(text)


TERMS = st.tuples(
    st.sampled_from(["gpu", "zone", "spot", "none"]),
    st.sampled_from(["=", "!=", " in ", " notin ", "", "!"]),
    st.frozensets(st.sampled_from(["a10", "l4", "eu-1", ""]), min_size=1),
)


def written(key: str, operator: str, values: frozenset[str]) -> str:
    if operator == "":
        return key
    if operator == "!":
        return f"!{key}"
    if operator in ("=", "!="):
        return f"{key}{operator}{min(values)}"
    return f"{key}{operator}({',' if values == {''} else ','.join(sorted(values))})"


def meant(key: str, operator: str, values: frozenset[str], labels: dict[str, str]) -> bool:
    """What the documentation of Kubernetes says, case by case."""
    if operator in ("", "!"):
        return (key in labels) == (operator == "")
    allowed = values if "in" in operator else {min(values)}
    equal = key in labels and labels[key] in allowed
    return equal if operator in ("=", " in ") else not equal


@given(st.lists(TERMS, max_size=4))
def test_terms_mean_what_kubernetes_says(terms: list[tuple[str, str, frozenset[str]]]) -> None:
    text = ",".join(written(*term) for term in terms)
    expected = {name for name, labels in PODS.items() if all(meant(*term, labels) for term in terms)}
    assert selected(text) == expected
