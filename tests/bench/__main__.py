"""`make bench`: one table, goals beside the figures. It never fails for a figure; README.md says how to read it."""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path

import msgspec
from rich.console import Console

from tests.bench import micro, plot, report
from tests.bench.cases import FULL, LONG, NULLS, QUICK, SHORT, Bench, Measured

_ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
PUBLISHED = _ROOT / "docs" / "bench.svg"
README = _ROOT / "README.md"

_WIDTH = 160  # columns, where the table goes to a file
_MARKS = "<!-- bench: written by `make bench PUBLISH=1` -->", "<!-- /bench -->"


def main() -> None:
    """The command. Its status is 1 if an answer was not whole or is missing in the books: then no figure counts."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short round each: about a minute")
    parser.add_argument("--publish", action="store_true", help="table and plot into README.md and docs/ too")
    options = parser.parse_args()
    console = Console()
    if not console.is_terminal:
        console.width = _WIDTH
    began = time.monotonic()
    with (
        console.status("processes") as status,
        tempfile.TemporaryDirectory(prefix="envoy-extproc-bench-") as directory,
    ):
        bench = Bench(QUICK if options.quick else FULL, status.update)
        measured = asyncio.run(bench.run(Path(directory)))
        status.update("in-process figures")
        shown = list(report.rows(measured, list(micro.figures())))
    console.print(report.table(shown), report.books(measured))
    for note in report.notes(measured):
        console.print(note, highlight=False)
    _write(shown, measured, publish=options.publish)
    console.print(
        f"{time.monotonic() - began:.0f} s; rounds: {_short('bench.json')}, plot: {_short('bench.svg')}"
    )
    sys.exit(0 if measured.right else 1)


def _write(shown: list[report.Row], measured: Measured, *, publish: bool) -> None:
    RESULTS.mkdir(exist_ok=True)
    everything = msgspec.json.encode({"rows": shown, "measured": measured})
    (RESULTS / "bench.json").write_bytes(msgspec.json.format(everything, indent=2))
    picture = plot.svg(report.bars(measured, (SHORT, LONG, NULLS)))
    (RESULTS / "bench.svg").write_text(picture, "utf-8")
    if publish:
        PUBLISHED.write_text(picture, "utf-8")
        start, end = _MARKS
        before, _, rest = README.read_text("utf-8").partition(start)
        _, _, after = rest.partition(end)
        README.write_text(f"{before}{start}\n\n{report.markdown(shown)}\n\n{end}{after}", "utf-8")


def _short(name: str) -> Path:
    return (RESULTS / name).relative_to(_ROOT)


if __name__ == "__main__":
    main()
