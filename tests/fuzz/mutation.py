"""Mutations by words instead of bytes: strings, numbers, brackets and line ends change places, go, or come twice.

libFuzzer's own mutations break JSON nearly always; these keep it whole often enough to get behind the parser.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from random import Random

_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"\s*:?|[-+.\w]+|\s+|.', re.DOTALL)
_WHOLE = re.compile(rb"\[[^\[\]]*\]|\{[^{}]*\}", re.DOTALL)


def mutated(text: bytes, words: Sequence[bytes], rng: Random) -> bytes:
    """`text` with one to three tokens, or values in brackets, changed."""
    for _ in range(rng.randint(1, 3)):
        spans = [found.span() for found in rng.choice((_TOKEN, _TOKEN, _WHOLE)).finditer(text)]
        if not spans:
            return text + rng.choice(words)
        start, end = rng.choice(spans)
        other_start, other_end = rng.choice(spans)
        instead = rng.choice(
            (
                b"",
                text[start:end] * 2,
                text[other_start:other_end],
                rng.choice(words),
                text[start:end] + rng.choice(words),
                rng.choice(words) + text[start:end],
            )
        )
        text = text[:start] + instead + text[end:]
    return text


def mutator(
    words: Sequence[bytes], behind: int, usual: Callable[[bytes, int], bytes]
) -> Callable[[bytes, int, int], bytes]:
    """What libFuzzer calls: half of the time by words, else as usual.

    Args:
        words: of the target's language.
        behind: bytes of choices in front, which are not words.
        usual: libFuzzer's own mutation.
    """

    def mutate(data: bytes, most: int, number: int) -> bytes:
        rng = Random(number)
        if len(data) <= behind or rng.random() < 0.5:
            return usual(data, most)
        return (data[:behind] + mutated(data[behind:], words, rng))[:most]

    return mutate
