"""What stands in docs/, for tests that hold a page to it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from envoy_extproc.server.plugins import GROUP
from tests.support import distributions

DOCS = Path(__file__).parents[2] / "docs"


def section(page: str, title: str) -> str:
    """The text under a heading of the second level."""
    text = (DOCS / page).read_text(encoding="utf-8").partition(f"\n## {title}\n")[2]
    assert text, title
    return text.partition("\n## ")[0]


def block(text: str, language: str) -> str:
    """The only block of code in that language."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return str(found)


def example_scorer() -> dict[str, str]:
    """The package that docs/routing.md shows, as files of its distribution."""
    text = section("routing.md", "A scorer of your own")
    project = tomllib.loads(block(text, "toml"))["project"]
    points = project["entry-points"][GROUP]
    (module,) = {target.partition(":")[0] for target in points.values()}
    return distributions.files(
        project["name"], {module: block(text, "python")}, points, version=project["version"]
    )
