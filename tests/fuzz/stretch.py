"""Whether time stays linear: ``python -m tests.fuzz.stretch TARGET CORPUS`` repeats parts of each input of a corpus.

Apart from the fuzzer, which would keep every long input for the counts in it, and then try little else.
"""

from __future__ import annotations

import base64
import sys
from pathlib import Path

from tests.fuzz.draw import stretched
from tests.fuzz.targets import load


def main() -> None:
    """Checks them all.

    Raises:
        AssertionError: what the first one that does not hold has raised.
    """
    target = load(sys.argv[1])
    for path in sorted(Path(sys.argv[2]).iterdir()):
        for data in stretched(path.read_bytes(), target.CHOICES):
            try:
                target.check(data)
            except BaseException:
                print(f"input as base64: {base64.b64encode(data).decode()}")
                raise


if __name__ == "__main__":
    main()
