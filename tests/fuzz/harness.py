"""One target under atheris, in a process of its own: ``python -m tests.fuzz.harness TARGET FLAG... CORPUS``.

Only the package is instrumented, so coverage counts the code under test alone. A finding ends the process with a status
other than 0; its input stands in the folder that libFuzzer's ``-artifact_prefix`` names.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import atheris

from tests.fuzz.targets import load

with atheris.instrument_imports(include=["envoy_extproc"]):
    target = load(sys.argv[1])

from tests.fuzz.draw import CHOICES, short
from tests.fuzz.mutation import mutator


def dictionary(words: Sequence[bytes]) -> str:
    r"""A dictionary for libFuzzer: a quoted word a line, ``\xAB`` for what is not a letter."""
    lines = (
        "".join(chr(c) if 0x30 <= c < 0x7F and chr(c).isalnum() else f"\\x{c:02x}" for c in word)
        for word in words
    )
    return "".join(f'"{line}"\n' for line in lines)


def _usual(data: bytes, most: int) -> bytes:
    mutated: bytes = atheris.Mutate(data, most)  # looked up late: there is none before `Fuzz` runs
    return mutated


def main() -> None:
    """Runs until libFuzzer's bounds or a finding end the process."""
    *flags, corpus = sys.argv[2:]
    folder = Path(corpus)
    for number, data in enumerate(target.seeds()):
        (folder / f"seed-{number:03}").write_bytes(data)
    words = folder.parent / f"{sys.argv[1]}.dict"
    words.write_text(dictionary(target.WORDS))
    atheris.Setup(
        [sys.argv[0], f"-dict={words}", *flags, corpus],
        lambda data: target.check(short(data, target.CHOICES)),
        custom_mutator=mutator(target.WORDS, target.CHOICES + CHOICES, _usual),
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
