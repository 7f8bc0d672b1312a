"""Which models there are: what discovery says, what engines list, who is ready."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest

from envoy_extproc.endpoints import EngineState, ServedModel, Snapshot
from envoy_extproc.server.catalogue import Catalogue
from tests.support.builders import endpoint

BASE = b'{"id":"m","object":"model","created":7,"owned_by":"vllm", "max_model_len":2048}'
ADAPTER = b'{"id":"ad","object":"model","created":7,"owned_by":"vllm","parent":"m"}'
LISTED = (ServedModel(id="m", entry=BASE), ServedModel(id="ad", parent="m", entry=ADAPTER))
ONE, TWO = endpoint(1, models=("m",)), endpoint(2, models=("m", "other"))
BOTH = Snapshot([ONE, TWO])


def state(*served: ServedModel, reachable: bool = True) -> EngineState:
    return EngineState(served=served, reachable=reachable)


def ids(answer: bytes | None) -> list[str]:
    assert answer is not None
    return [model["id"] for model in json.loads(answer)["data"]]


def test_an_entry_is_the_engines_own_byte_for_byte() -> None:
    catalogue = Catalogue({ONE.address: state(*LISTED)}, created=5)
    answer = catalogue.answer(Snapshot([ONE]), "", 0.0)
    assert answer == b'{"object":"list","data":[' + BASE + b"]}"
    assert catalogue.answer(Snapshot([ONE]), "m", 0.0) == BASE


def test_a_model_no_engine_lists_is_listed_all_the_same() -> None:
    answer = Catalogue({}, created=5).answer(BOTH, "other", 0.0)
    assert answer is not None
    assert json.loads(answer) == {"id": "other", "object": "model", "created": 5, "owned_by": "envoy-extproc"}


def test_the_union_sorted() -> None:
    assert ids(Catalogue({}).answer(BOTH, "", 0.0)) == ["m", "other"]
    assert ids(Catalogue({}).answer(Snapshot(), "", 0.0)) == []


@pytest.mark.parametrize(
    "states", [{TWO.address: state(reachable=False)}, {TWO.address: state(*LISTED, reachable=False)}]
)
def test_a_pod_that_is_not_ready_serves_nothing(states: Mapping[str, EngineState]) -> None:
    assert ids(Catalogue(states).answer(BOTH, "", 0.0)) == ["m"]
    assert Catalogue(states).answer(BOTH, "other", 0.0) is None


def test_a_pod_that_failed_lately_serves_nothing() -> None:
    catalogue = Catalogue({}, avoided=lambda address, now: address == TWO.address and now < 5)
    assert ids(catalogue.answer(BOTH, "", 4.0)) == ["m"]
    assert ids(catalogue.answer(BOTH, "", 6.0)) == ["m", "other"]


def test_a_name_that_discovery_does_not_route_is_not_listed() -> None:
    states = {ONE.address: state(ServedModel(id="alias", entry=b"{}"))}
    assert ids(Catalogue(states).answer(Snapshot([ONE]), "", 0.0)) == ["m"]


def test_adapters_are_served_where_their_parent_is() -> None:
    catalogue = Catalogue({ONE.address: state(*LISTED)})
    snapshot = catalogue.with_adapters(BOTH)
    assert snapshot.by_model["ad"] == (snapshot.by_address[ONE.address],)
    assert snapshot.by_address[ONE.address].models == ("m", "ad")
    assert snapshot.by_address[TWO.address] is TWO
    assert catalogue.answer(snapshot, "ad", 0.0) == ADAPTER


@pytest.mark.parametrize(
    "served",
    [
        (),
        LISTED[:1],
        (ServedModel(id="ad", parent="unknown", entry=ADAPTER),),
        (ServedModel(id="m", parent="m"),),
    ],
)
def test_without_adapters_nothing_changes(served: tuple[ServedModel, ...]) -> None:
    assert Catalogue({ONE.address: EngineState(served=served)}).with_adapters(BOTH) is BOTH


def test_an_adapter_that_is_gone_is_served_no_more() -> None:
    states = {ONE.address: state(*LISTED)}
    catalogue = Catalogue(states)
    assert "ad" in catalogue.with_adapters(BOTH).by_model
    states[ONE.address] = state(*LISTED[:1])
    assert "ad" not in catalogue.with_adapters(BOTH).by_model
