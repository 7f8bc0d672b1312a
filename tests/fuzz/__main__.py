"""``make fuzz``: the targets, one after the other; ``SECONDS=600 TARGET=sse`` one of them for so long.

A finding is printed as base64, and its input kept in the folder named.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.fuzz.run import report_of, run, stretch
from tests.fuzz.targets import TARGETS


def main() -> int:
    """The command; its status is 1 if something was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--target", choices=TARGETS, action="append", help="by default all")
    parser.add_argument("--folder", type=Path, help="keeps corpora and findings; by default a new one")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="envoy-extproc-fuzz-"))
    status = 0
    for target in options.target or TARGETS:
        finished = run(target, folder, f"-max_total_time={options.seconds}")
        print(report_of(target, finished), flush=True)
        repeated = stretch(target, folder)
        if repeated.found:
            print(f"{target}, repeated: FOUND\n{repeated.log}", flush=True)
        status |= finished.found or repeated.found
    print(f"corpora and findings: {folder}")
    return status


if __name__ == "__main__":
    sys.exit(main())
