"""The Dockerfile as instructions, and its build without Docker: the same commands, in folders of one's own.

`python -m tests.support.image` does that. It fetches packages from an index, so it is no part of the test run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from envoy_extproc.simulation.stack import free_port

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Instruction:
    """One of a stage: its word, in capitals, and what follows."""

    word: str
    text: str

    @property
    def arguments(self) -> list[str]:
        """Without options."""
        if self.text.startswith("["):
            return [str(each) for each in json.loads(self.text)]
        return [each for each in self.text.split() if not each.startswith("--")]


def stages() -> list[list[Instruction]]:
    """What stands before the first FROM, then each stage from its FROM on."""
    text = (ROOT / "Dockerfile").read_text("utf-8")
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    found: list[list[Instruction]] = [[]]
    for line in joined.splitlines():
        word, _, rest = line.partition(" ")
        if word.upper() == "FROM":
            found.append([])
        found[-1].append(Instruction(word.upper(), rest.strip()))
    return found


def build(folder: Path) -> Path:
    """Does what the build stage says in `folder`; returns the environment it leaves for the last stage."""
    source, target = folder / "src", folder / "opt"
    source.mkdir()
    for each in stages()[1]:
        if each.word == "COPY":
            *names, place = each.arguments
            for name in names:
                _copy(ROOT / name, source / place / ("" if place != "./" else name))
        elif each.word == "RUN":
            command = each.text.replace("/src", str(source)).replace("/opt", str(target))
            environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
            subprocess.run(["/bin/sh", "-euc", command], cwd=source, env=environment, check=True)
    return target / "envoy-extproc"


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    else:
        shutil.copy(source, target)


def _serves(command: Path, folder: Path) -> bool:
    config = folder / "config.yaml"
    endpoint = "{name: a, address: '127.0.0.1:1', models: [m]}"
    config.write_text(
        f"server: {{listen: '127.0.0.1:{free_port()}', admin: '127.0.0.1:0'}}\n"
        f"discovery: {{static: {{endpoints: [{endpoint}]}}}}\n"
    )
    server = subprocess.Popen([command, "serve", "--config", config])
    try:
        for _ in range(30):
            check: list[str | Path] = [command, "healthcheck", "--config", config, "--service", "liveness"]
            if subprocess.run(check, check=False).returncode == 0:
                return True
            time.sleep(0.5)
        return False
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0


def main() -> int:
    """Builds, then runs what was built."""
    with tempfile.TemporaryDirectory(prefix="envoy-extproc-image-") as made:
        folder = Path(made)
        environment = build(folder)
        command = environment / "bin" / "envoy-extproc"
        subprocess.run([command, "version"], check=True)
        absent = ("pip", "grpc_tools", "pytest", "envoy")
        packages = next(environment.glob("lib/python*/site-packages"))
        there = [name for name in absent if (packages / name).exists()]
        size = sum(each.stat().st_size for each in packages.rglob("*") if each.is_file())
        print(f"{size / 1e6:.0f} MB of packages; {there or 'nothing'} that should not be there")
        return int(bool(there) or not _serves(command, folder))


if __name__ == "__main__":
    sys.exit(main())
