"""Counting with an encoding, here: short prompts at once, longer ones in a thread, for tiktoken lets go of the interpreter's lock.

A prompt is counted chunk by chunk. Between two chunks it is given up if nobody waits any more, which no thread can be made to do in the
middle of one; and the patterns and merges of tiktoken, whose cost is more than linear in the length of a word and which fail on
blanks by the hundred thousand, get no longer word than a chunk. Texts are cut before a blank that follows a word, which every pattern in use
does as well; where there is none, a cut can add a token.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import msgspec
import structlog

from envoy_extproc.openai import texts
from envoy_extproc.openai.prompt import TOKEN_BYTES, Prompt
from envoy_extproc.scheduling.interfaces import SchedulingRequest
from envoy_extproc.tokens.counting import Uncounted
from envoy_extproc.tokens.encodings import Encode

log = structlog.get_logger()

_AT_ONCE_BYTES = 2048
"""0.1 ms of the event loop, 0.5 ms at the worst; to hand it to a thread and back costs as much."""

_CHUNK = 8192
"""Characters. Half a millisecond, two at the worst; chunks of half the length cost a twentieth more."""

_MOST_ESCAPED = 6  # bytes of JSON for one of text
_LOOK_BACK = 256
_WORD_END = re.compile(r"(?<=\S) ")


class LocalRules(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of counting here.

    Attributes:
        timeout: seconds a decision waits.
        max_prompt_bytes: of a prompt that is counted.
        max_waiting_bytes: of all prompts that wait for a thread, or are being counted in one.
        threads: that count.
    """

    timeout: float = 0.1
    max_prompt_bytes: int = 524_288
    max_waiting_bytes: int = 4_194_304
    threads: int = 2


class Workers:
    """Threads that count, and how much waits for them.

    Attributes:
        rules: the bounds.
    """

    def __init__(self, rules: LocalRules) -> None:
        self.rules = rules
        self._pool = ThreadPoolExecutor(rules.threads, thread_name_prefix="tokens")
        self._waiting = 0
        self._lock = threading.Lock()

    @property
    def waiting(self) -> int:
        """Bytes of prompts that are not done with."""
        return self._waiting

    async def run(self, job: _Job, size: int) -> int:
        """What `job`, a prompt of `size` bytes, comes to.

        Raises:
            Uncounted: there is no room, or no time.
        """
        if self._waiting and self._waiting + size > self.rules.max_waiting_bytes:
            raise Uncounted("busy")
        self._add(size)
        future = self._pool.submit(job.run)
        future.add_done_callback(lambda _: self._add(-size))  # however it ends, and in whatever thread
        try:
            async with asyncio.timeout(self.rules.timeout):
                return await asyncio.wrap_future(future)
        except TimeoutError:
            raise Uncounted("timeout") from None
        finally:
            job.abandoned = True

    def close(self) -> None:
        """No more of it: what waits is dropped, what is being counted ends by itself."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _add(self, size: int) -> None:
        with self._lock:
            self._waiting += size


class LocalTokenizer:
    """Counts by one encoding.

    Args:
        encode: the encoding.
        workers: shared with the tokenizers of other encodings.
    """

    name = "tiktoken"

    def __init__(self, encode: Encode, workers: Workers) -> None:
        self._encode = encode
        self._workers = workers

    async def open(self) -> None:
        """See `Tokenizer`."""

    async def close(self) -> None:
        """See `Tokenizer`."""
        self._workers.close()

    async def count(self, request: SchedulingRequest) -> int:
        """See `Tokenizer`."""
        prompt, most = request.prompt, self._workers.rules.max_prompt_bytes
        assert prompt is not None
        if (
            request.prompt_tokens * TOKEN_BYTES > 2 * most
        ):  # by far, JSON around it and all; images are not in it
            raise Uncounted("too-long")
        size = sum(map(len, prompt.members.values()))
        job = _Job(self._encode, prompt, most)
        return job.run() if size <= _AT_ONCE_BYTES else await self._workers.run(job, size)


class _Job:
    """One prompt to be counted.

    Attributes:
        abandoned: whether nobody waits for it any more.
    """

    __slots__ = ("_encode", "_most", "_prompt", "abandoned")

    def __init__(self, encode: Encode, prompt: Prompt, most: int) -> None:
        self._encode = encode
        self._prompt = prompt
        self._most = most
        self.abandoned = False

    def run(self) -> int:
        """Its tokens.

        Raises:
            Uncounted: it is too long, has no text, or nobody waits for it any more.
        """
        if self.abandoned:
            raise Uncounted("timeout")
        found = texts.read(self._prompt, self._most)
        if found is None:
            raise Uncounted("too-long")
        if not found.pieces and not found.known:
            raise Uncounted("no-text")
        try:
            return found.known + sum(map(self._count, found.pieces))
        except (Uncounted, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001  panics of Rust are no `Exception`, and would end all they pass
            _log_once(type(error).__name__, str(error).partition("\n")[0])
            raise Uncounted("failed") from None

    def _count(self, text: str) -> int:
        tokens = 0
        for chunk in chunks(text):
            if self.abandoned:
                raise Uncounted("timeout")
            tokens += len(self._encode(chunk))
        return tokens


@lru_cache(16)
def _log_once(kind: str, message: str) -> None:
    """The metric counts each; who sends a text on which tiktoken breaks is not to fill the log."""
    log.warning("tokenizer_failed", error=f"{kind}: {message}")


def chunks(text: str, size: int = _CHUNK) -> Iterator[str]:
    """`text` in pieces of `size` characters or some fewer."""
    start = 0
    while len(text) - start > size:
        end = start + size
        for found in _WORD_END.finditer(text, end - min(_LOOK_BACK, size - 1), end):
            end = found.start()
        yield text[start:end]
        start = end
    yield text[start:]
