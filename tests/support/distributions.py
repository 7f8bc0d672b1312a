"""Packages of other people's, made on the spot: a wheel as pip installs it, or what is in one, unpacked."""

from __future__ import annotations

import base64
import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

from envoy_extproc.server.plugins import GROUP


def files(
    name: str, modules: Mapping[str, str], scorers: Mapping[str, str], *, version: str = "1.0"
) -> dict[str, str]:
    """The files of a distribution by path.

    Args:
        name: of the distribution.
        modules: source by name.
        scorers: entry points of our group, by name.
        version: likewise.
    """
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    points = "".join(f"{point} = {target}\n" for point, target in scorers.items())
    return {f"{module}.py": source for module, source in modules.items()} | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": f"[{GROUP}]\n{points}",
    }


def unpack(directory: Path, distribution: Mapping[str, str]) -> None:
    """Puts the files of a distribution where they are found once `directory` is on `sys.path`."""
    for path, text in distribution.items():
        file = directory / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")


def install(directory: Path, distribution: Mapping[str, str]) -> None:
    """Has pip install the distribution into `directory`, from a wheel and from nowhere else."""
    info = next(path.partition("/")[0] for path in distribution if ".dist-info/" in path)
    wheel = directory.parent / f"{info.removesuffix('.dist-info')}-py3-none-any.whl"
    rows = [f"{path},sha256={_digest(text)},{len(text.encode())}" for path, text in distribution.items()]
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in distribution.items():
            archive.writestr(path, text)
        archive.writestr(f"{info}/RECORD", "\n".join([*rows, f"{info}/RECORD,,", ""]))
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
    options = ["--no-index", "--no-deps", "--target", str(directory), str(wheel)]
    subprocess.run([*command, *options], check=True, timeout=60)


def _digest(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
