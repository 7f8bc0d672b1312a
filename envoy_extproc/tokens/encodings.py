"""Encodings of tiktoken: loaded once, at the start, from packages and from a directory; never from the network.

tiktoken knows its own encodings by the URL of a file, whose copy it keeps under the SHA-1 of that URL, and checks by a SHA-256. We let it
do so, but hand it the file ourselves, and where there is none it is told so. A file that is broken is not touched; tiktoken
would delete it and fetch another.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from envoy_extproc.tokens.offline import offline

Encode = Callable[[str], Sequence[int]]
"""The tokens of a text, special tokens in it taken for text."""

_MAX_FILE_BYTES = 67_108_864  # the largest in use has 4 MB
_BORROWED = "cl100k_base"
_TRIAL = "A text, 12345 and \N{GRINNING FACE}.\n"
_SUFFIX = ".tiktoken"

_loading = threading.Lock()


class EncodingError(Exception):
    """An encoding that cannot be had; the message says why, and what would help."""


class Shelf:
    """Where files of encodings are looked for.

    Args:
        directory: holds them under tiktoken's names for what it downloads, or under their own; None for none.
        patterns: by name of an encoding that tiktoken does not know: its pattern, or whose pattern it has.
    """

    def __init__(self, directory: Path | None = None, patterns: Mapping[str, str] | None = None) -> None:
        self._directory = directory
        self._patterns = patterns or {}

    def load(self, name: str) -> Encode:
        """The encoding of that name.

        Raises:
            EncodingError: it cannot be had without the network, or not at all.
        """
        try:
            import tiktoken  # noqa: F401, PLC0415  optional, and half a second
        except ImportError as error:
            raise EncodingError(
                f"tiktoken is not installed ({error}): pip install 'envoy-extproc[tiktoken]'"
            ) from None
        try:
            with _loading, offline():
                return self._loaded(name)
        except (EncodingError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001  a package's own code, and panics of Rust, which are no `Exception`
            raise EncodingError(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}") from None

    def _loaded(self, name: str) -> Encode:
        import tiktoken  # noqa: PLC0415

        constructors = _constructors()
        if name in constructors:
            with _files_from(self._read):
                found = constructors[name]()
            pattern, ranks = found["pat_str"], found["mergeable_ranks"]
        else:
            ranks = self._ranks(name)
            pattern = self._pattern(name, constructors)
        _check(ranks)
        # Special tokens are left out: what a client writes is text, also where it looks like one of them.
        encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        encoding.encode_ordinary(_TRIAL)
        return encoding.encode_ordinary

    def _ranks(self, name: str) -> dict[bytes, int]:
        from tiktoken.load import load_tiktoken_bpe  # noqa: PLC0415

        path = self._find(name + _SUFFIX)
        if path is None:
            known = ", ".join(sorted(_constructors()))
            raise EncodingError(
                f"no installed package has it, and there is no file {name}{_SUFFIX} in {self._place}; packages have {known}"
            )
        with _files_from(self._read):
            return load_tiktoken_bpe(str(path))

    def _pattern(self, name: str, constructors: Mapping[str, Callable[[], dict[str, Any]]]) -> str:
        pattern = self._patterns.get(name, _BORROWED)
        if pattern not in constructors:
            return pattern
        with _files_from(lambda _path, _hash: b""):  # only its pattern is wanted
            borrowed: str = constructors[pattern]()["pat_str"]
        return borrowed

    def _read(self, source: str, sha256: str | None) -> bytes:
        """The bytes of a file that tiktoken knows by its URL, or a package by its path."""
        if "://" not in source:
            return _checked(Path(source), sha256)
        kept, own = (
            hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest(),
            source.rpartition("/")[2],
        )
        path = self._find(kept) or self._find(own)
        if path is None:
            raise EncodingError(
                f"its file is not there: {own}, or {kept} as tiktoken calls it, in {self._place}"
            )
        return _checked(path, sha256)

    def _find(self, file: str) -> Path | None:
        path = None if self._directory is None else self._directory / file
        return path if path is not None and path.is_file() else None

    @property
    def _place(self) -> str:
        return "tokens.cache_dir, which is not set" if self._directory is None else str(self._directory)


def _check(ranks: Mapping[bytes, int]) -> None:
    """Tiktoken takes such faults for impossible, and panics: over the second at once, over the first with some text."""
    missing = sum(bytes([each]) not in ranks for each in range(256))
    if missing:
        raise EncodingError(f"it has no token for {missing} of the 256 bytes, so it cannot encode every text")
    if len(set(ranks.values())) < len(ranks):
        raise EncodingError("two of its tokens have one rank")


def _checked(path: Path, sha256: str | None) -> bytes:
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise EncodingError(f"{path} is too large for an encoding")
        data = path.read_bytes()
    except OSError as error:
        raise EncodingError(f"{path}: {error.strerror}") from None
    found = hashlib.sha256(data).hexdigest()
    if sha256 is not None and found != sha256:
        raise EncodingError(f"{path} is broken: its sha256 is {found}, and should be {sha256}")
    return data


def _constructors() -> Mapping[str, Callable[[], dict[str, Any]]]:
    """What makes the parameters of each encoding that a package has, by name."""
    from tiktoken import registry  # noqa: PLC0415

    registry.list_encoding_names()  # which imports the packages
    return registry.ENCODING_CONSTRUCTORS or {}


@contextmanager
def _files_from(read: Callable[[str, str | None], bytes]) -> Iterator[None]:
    """Has tiktoken read its files by `read`, where it would look into its own cache and then download."""
    from tiktoken import load  # noqa: PLC0415

    def read_file_cached(blobpath: str, expected_hash: str | None = None) -> bytes:
        return read(blobpath, expected_hash)

    before, load.read_file_cached = load.read_file_cached, read_file_cached
    try:
        yield
    finally:
        load.read_file_cached = before
