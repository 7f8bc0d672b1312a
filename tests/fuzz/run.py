"""Runs one target in a process of its own, and tells what came of it."""

from __future__ import annotations

import base64
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
LENGTH = 4096  # bytes of an input; what is longer is made by repeating a part
_FIGURES = re.compile(r"#(\d+)\s+\w+\s+cov: (\d+)")


@dataclass(frozen=True, slots=True)
class Finished:
    """What a run told.

    Attributes:
        status: the process's; 0 where nothing was found.
        log: libFuzzer's words, and a traceback.
        inputs: those that failed.
    """

    status: int
    log: str
    inputs: Sequence[bytes]

    @property
    def found(self) -> bool:
        """Whether a property does not hold."""
        return self.status != 0

    @property
    def executions(self) -> int:
        """Inputs that were tried."""
        return self._figures[0]

    @property
    def edges(self) -> int:
        """Branches of the package that were taken."""
        return self._figures[1]

    @property
    def _figures(self) -> tuple[int, int]:
        *_, last = _FIGURES.findall(self.log) or [("0", "0")]
        return int(last[0]), int(last[1])


def run(target: str, folder: Path, *flags: str) -> Finished:
    """A run of `target` with libFuzzer's `flags`; its corpus and findings stay in `folder`."""
    corpus, findings = folder / target, folder / "findings" / target
    for each in (corpus, findings):
        each.mkdir(parents=True, exist_ok=True)
    bounds = (f"-max_len={LENGTH}", "-timeout=20", "-rss_limit_mb=2048", f"-artifact_prefix={findings}/")
    ended = _python("tests.fuzz.harness", target, *bounds, *flags, str(corpus))
    inputs = [path.read_bytes() for path in sorted(findings.iterdir())] if ended.returncode else []
    return Finished(ended.returncode, ended.stdout.decode(errors="replace"), inputs)


def stretch(target: str, folder: Path) -> Finished:
    """Every input of a run's corpus, with parts of it repeated."""
    ended = _python("tests.fuzz.stretch", target, str(folder / target))
    return Finished(ended.returncode, ended.stdout.decode(errors="replace"), [])


def _python(*command: str) -> subprocess.CompletedProcess[bytes]:
    # Coverage of its own, and no draw of a hash: the same inputs take the same branches each time.
    env = {name: value for name, value in os.environ.items() if not name.startswith(("COVERAGE", "COV_"))}
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env={**env, "PYTHONHASHSEED": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )


def report_of(target: str, finished: Finished) -> str:
    """A line of figures; of a finding also its inputs as base64 and the end of the log."""
    line = f"{target}: {finished.executions} inputs, {finished.edges} edges"
    if not finished.found:
        return line
    shown = "\n".join(f"input as base64: {base64.b64encode(each).decode()}" for each in finished.inputs)
    tail = "\n".join(line for line in finished.log.splitlines()[-60:] if not line.startswith("#"))
    return f"{line}, FOUND:\n{shown}\n{tail}"
