#!/usr/bin/env python3
"""Compile the `.proto` files in this directory into `envoy_extproc/_proto`; with `--check`, only compare.

The generated modules and their stubs are committed, so that neither a user nor the wheel needs a compiler.
"""

import argparse
import importlib.resources
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc  # type: ignore[import-untyped]

SOURCES = Path(__file__).resolve().parent
PROJECT = SOURCES.parent
PACKAGE = Path("envoy_extproc", "_proto")
GENERATED = ("*_pb2.py", "*_pb2.pyi")


def compile_into(root: Path) -> None:
    """Write the Python module and the type stub of every `.proto` file under `root`."""
    well_known = importlib.resources.files("grpc_tools") / "_proto"
    # The plugin stands beside the interpreter; a virtual environment need not be activated to be used.
    stub_plugin = Path(sys.executable).parent / "protoc-gen-mypy"
    arguments = [
        "protoc",
        f"--proto_path={SOURCES}",
        f"--proto_path={well_known}",
        f"--plugin=protoc-gen-mypy={stub_plugin}",
        f"--python_out={root}",
        f"--mypy_out=quiet:{root}",
        *(str(path) for path in sorted((SOURCES / PACKAGE).glob("*.proto"))),
    ]
    if status := protoc.main(arguments):
        sys.exit(status)


def generated(root: Path) -> dict[str, bytes]:
    """Return the generated files under `root`, by name."""
    return {path.name: path.read_bytes() for glob in GENERATED for path in (root / PACKAGE).glob(glob)}


def stale() -> list[str]:
    """Return the files in which the committed code and a fresh compilation differ, each with how."""
    with tempfile.TemporaryDirectory() as directory:
        compile_into(Path(directory))
        fresh = generated(Path(directory))
    committed = generated(PROJECT)
    return [
        *(f"{PACKAGE / name}: missing" for name in sorted(fresh.keys() - committed.keys())),
        *(f"{PACKAGE / name}: has no source" for name in sorted(committed.keys() - fresh.keys())),
        *(
            f"{PACKAGE / name}: differs"
            for name in sorted(fresh)
            if committed.get(name, fresh[name]) != fresh[name]
        ),
    ]


def main() -> None:
    """Generate, or compare and exit with 1 when something differs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if a file is stale")
    if not parser.parse_args().check:
        compile_into(PROJECT)
    elif differences := stale():
        sys.exit("\n".join([*differences, "run proto/generate.py"]))


if __name__ == "__main__":
    main()
