"""docs/routing.md keeps to what is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from envoy_extproc import mixes
from envoy_extproc.scheduling import registry, selectors

PAGE = (Path(__file__).parents[2] / "docs" / "routing.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return PAGE.partition(f"## {title}\n")[2].partition("\n## ")[0]


def first_cells(text: str) -> list[str]:
    return [
        name
        for row in re.findall(r"^\| (`.+?`) \|", text, re.MULTILINE)
        for name in re.findall("`(.+?)`", row)
    ]


def test_the_table_has_every_policy_and_no_other() -> None:
    assert sorted(first_cells(section("Policies"))) == sorted(registry.POLICIES)


def test_the_policies_that_cannot_be_mixed_are_named() -> None:
    (sentence,) = re.findall(r"[^.]*cannot be in a mixture\.", section("Mixtures"))
    assert set(re.findall("`(.+?)`", sentence)) == mixes.PICKING


@pytest.mark.parametrize("term", [*first_cells(section("Selecting by label")), "gpu in (a10,l4),!spot"])
def test_the_selectors_can_be_read(term: str) -> None:
    assert selectors.parse(term).requirements


def test_the_mixture_can_be_read() -> None:
    (text,) = re.findall(r"^    (\S+)$", section("Mixtures"), re.MULTILINE)
    assert registry.build().find(text).name == text
