"""A prompt as a tokenizer takes it: its texts, and what is known of the rest without one.

It is rendered as for its hashes (see `prompt`), so what counts is what a model reads: no JSON around it. Images, sounds and files
are no text; nobody counts them here.
"""

from __future__ import annotations

import msgspec

from envoy_extproc.openai.prompt import MOST_VALUES, TOKEN_BYTES, TURN, Digest, Ids, Prompt, pieces
from envoy_extproc.openai.routes import Turns

_PER_TURN, _ANSWER = 4, 3
"""Tokens that a template writes around a turn, its role among them, and to begin the answer: of OpenAI's own models. Others
write one or two more."""


class Texts(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be counted of one prompt.

    Attributes:
        pieces: the texts, in their order.
        known: tokens that need no counting: ids, and what a template writes around turns.
        others: images, sounds and files in it.
    """

    pieces: tuple[str, ...] = ()
    known: int = 0
    others: int = 0


def read(prompt: Prompt, most: int) -> Texts | None:
    """The texts of `prompt`, none where it cannot be read; None where it is longer than `most` bytes."""
    rendered = pieces(prompt.members, most + 1, _weight)
    if sum(map(_weight, rendered)) > most:
        return None
    texts = [piece for piece in rendered if type(piece) is bytes]
    ids = sum(len(piece) for piece in rendered if type(piece) is Ids) // TOKEN_BYTES
    if ids >= MOST_VALUES:
        return None  # no more of them were read
    turns = 0 if prompt.turns is Turns.NONE else sum(piece is TURN for piece in rendered)
    return Texts(
        pieces=tuple([piece.decode("utf-8", "replace") for piece in texts]),
        known=ids + (turns * _PER_TURN + _ANSWER if turns else 0),
        others=sum(type(piece) is Digest for piece in rendered),
    )


def _weight(piece: bytes) -> int:
    return 0 if type(piece) is Digest else len(piece)
