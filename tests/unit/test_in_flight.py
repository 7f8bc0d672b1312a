"""Counts change through leases alone, so nothing leaks and nothing goes below zero."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from envoy_extproc.state.memory import InFlight, Lease
from tests.support.builders import endpoint


def test_a_lease_counts_until_it_is_released() -> None:
    counts = InFlight()
    one, other = counts.acquire(endpoint(1), "m"), counts.acquire(endpoint(1), "n")
    assert counts.count("10.0.0.1:8000") == counts.total == 2
    assert sorted(counts) == [("m", "10.0.0.1:8000", 1), ("n", "10.0.0.1:8000", 1)]
    one.release()
    assert list(counts) == [("n", "10.0.0.1:8000", 1)]
    other.release()
    assert (counts.total, list(counts)) == (0, [])


def test_a_release_counts_once() -> None:
    counts = InFlight()
    lease, _ = counts.acquire(endpoint(1), "m"), counts.acquire(endpoint(1), "m")
    for _ in range(3):
        lease.release()
    assert counts.count("10.0.0.1:8000") == 1


def test_a_lease_moves() -> None:
    counts = InFlight()
    lease = counts.acquire(endpoint(1), "m")
    lease.move(endpoint(2))
    lease.move(endpoint(2))
    assert list(counts) == [("m", "10.0.0.2:8000", 1)]
    lease.release()
    lease.move(endpoint(1))
    assert list(counts) == []


def test_nobody_is_counted_at_an_address_never_seen() -> None:
    assert InFlight().count("nowhere") == 0


@given(
    st.lists(
        st.tuples(st.sampled_from(["acquire", "move", "release"]), st.integers(0, 9), st.integers(1, 3)),
        max_size=60,
    )
)
def test_any_interleaving(steps: list[tuple[str, int, int]]) -> None:
    counts = InFlight()
    leases: list[Lease] = []
    held: dict[int, tuple[str, str]] = {}
    for verb, which, where in steps:
        there = endpoint(where)
        place = which % len(leases) if leases else 0
        if verb == "acquire":
            model = f"m{which % 2}"
            held[len(leases)] = (model, there.address)
            leases.append(counts.acquire(there, model))
        elif leases and verb == "move":
            leases[place].move(there)
            if place in held:
                held[place] = (held[place][0], there.address)
        elif leases:
            leases[place].release()
            held.pop(place, None)
        assert {(model, address): count for model, address, count in counts} == Counter(held.values())
        assert counts.total == len(held)
        by_address = Counter(address for _, address in held.values())
        assert all(
            counts.count(endpoint(each).address) == by_address[endpoint(each).address] for each in (1, 2, 3)
        )
    for lease in leases:
        lease.release()
    assert (counts.total, list(counts)) == (0, [])
