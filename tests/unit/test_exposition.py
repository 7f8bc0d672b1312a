"""The exposition parser: what it picks, what it passes over, and that nothing upsets it."""

from __future__ import annotations

import math
import pathlib
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from envoy_extproc.engines.exposition import Sample, SampleReader

CAPTURES = pathlib.Path(__file__).parent.parent / "captures"
READER = SampleReader(["wanted", "vllm:wanted_total"])


def plain(sample: Sample) -> tuple[str, dict[str, str], float]:
    return sample.name, dict(sample.labels), sample.value


def one(line: bytes) -> Sample:
    samples = READER.read(line)
    assert len(samples) == 1
    return samples[0]


@pytest.mark.parametrize(
    ("line", "labels", "value"),
    [
        (b"wanted 1\n", {}, 1.0),
        (b"wanted\t-2.5e-3\n", {}, -0.0025),
        (b"wanted{} 3\n", {}, 3.0),
        (b'wanted{a="b"} 4\n', {"a": "b"}, 4.0),
        (b'wanted {a="b"} 4\n', {"a": "b"}, 4.0),
        (b'wanted{a="b",c="d"} 5\n', {"a": "b", "c": "d"}, 5.0),
        (b'wanted{ a = "b" , c = "d" , } 6\n', {"a": "b", "c": "d"}, 6.0),
        (b'wanted{a="with space, comma} and # hash"} 7\n', {"a": "with space, comma} and # hash"}, 7.0),
        (rb'wanted{a="C:\\x\"y\nz"} 8' + b"\n", {"a": 'C:\\x"y\nz'}, 8.0),
        (rb'wanted{a="\\n"} 9' + b"\n", {"a": "\\n"}, 9.0),
        (rb'wanted{a="\t"} 10' + b"\n", {"a": r"\t"}, 10.0),
        (b'wanted{a="c=\\"d\\"",e="f"} 11\n', {"a": 'c="d"', "e": "f"}, 11.0),
        ('wanted{a="größe"} 12\n'.encode(), {"a": "größe"}, 12.0),
        (b'wanted{a="\xff"} 13\n', {"a": "\ufffd"}, 13.0),
        (b"wanted 14 1700000000000\n", {}, 14.0),
        (b"wanted 15 -1\n", {}, 15.0),
        (b'wanted 16 # {trace_id="abc"} 0.5 1700000000.1\n', {}, 16.0),
        (b'wanted{a="b"} 17 1700000000 # {trace_id="abc"} 0.5\n', {"a": "b"}, 17.0),
        (b"wanted 18   \n", {}, 18.0),
        (b"wanted 19\r\n", {}, 19.0),
        (b'wanted{a="b"} 20 1700000000\r\n', {"a": "b"}, 20.0),
        (b"wanted +Inf\n", {}, math.inf),
        (b"wanted -Inf\n", {}, -math.inf),
    ],
)
def test_a_line(line: bytes, labels: dict[str, str], value: float) -> None:
    assert plain(one(line)) == ("wanted", labels, value)


def test_not_a_number_is_a_value() -> None:
    assert math.isnan(one(b"wanted NaN\n").value)


@pytest.mark.parametrize(
    "line",
    [
        b"wanted\n",
        b"wanted \n",
        b"wanted nonsense\n",
        b"wanted 1_000\n",
        b"wanted 1.2.3\n",
        b"wanted 1 2 3\n",
        b"wanted{ 1\n",
        b'wanted{a="b" 1\n',
        b'wanted{a="b} 1\n',
        b'wanted{a="b"c="d"} 1\n',
        b"wanted{a=b} 1\n",
        b'wanted{="b"} 1\n',
        b'wanted{a="b"}\n',
        b"wanted_more 1\n",
        b"unwanted 1\n",
        b"prefix:wanted 1\n",
        b"# HELP wanted 1\n",
        b"# TYPE wanted gauge\n",
        b"#wanted 1\n",
        b"WANTED 1\n",
        b"wanted1\n",
    ],
)
def test_a_line_that_is_passed_over(line: bytes) -> None:
    assert READER.read(line + b"vllm:wanted_total 2\n") == [Sample("vllm:wanted_total", b"", 2.0)]


def test_the_order_of_the_page_is_kept_and_neighbours_do_not_hide_each_other() -> None:
    page = b"vllm:wanted_total 1\r\nwanted 2\nwanted 3\r\n\nwanted 4\nother 5\nvllm:wanted_total 6\n# EOF\n"
    assert [(sample.name, sample.value) for sample in READER.read(page)] == [
        ("vllm:wanted_total", 1.0),
        ("wanted", 2.0),
        ("wanted", 3.0),
        ("wanted", 4.0),
        ("vllm:wanted_total", 6.0),
    ]


def test_a_last_line_that_was_cut_is_not_believed() -> None:
    whole = b"wanted 1\nwanted 1234\n"
    for cut in range(len(b"wanted 1\n"), len(whole)):
        assert [sample.value for sample in READER.read(whole[:cut])] == [1.0]


def test_a_name_is_not_a_pattern() -> None:
    assert SampleReader(["a.b"]).read(b"aXb 1\n") == []


@given(st.sets(st.text("ab:", min_size=1, max_size=6), min_size=1), st.text("ab:", min_size=1, max_size=6))
def test_exactly_the_wanted_names_are_read(names: set[str], other: str) -> None:
    page = "".join(f"{name} 1\n" for name in sorted({*names, other}))
    read = [sample.name for sample in SampleReader(names).read(page.encode())]
    assert read == sorted(names)


def test_nobody_wants_anything() -> None:
    assert SampleReader([]).read(b"wanted 1\n\n 2\n") == []


@pytest.mark.parametrize("name", ["vllm-0.32-metrics.txt", "vllm-0.32-metrics-under-load.txt"])
def test_every_metric_of_a_recorded_page_reads_as_the_official_parser_reads_it(name: str) -> None:
    body = (CAPTURES / name).read_bytes()
    families = list(text_string_to_metric_families(body.decode()))
    expected = [(each.name, each.labels, each.value) for family in families for each in family.samples]
    samples = [plain(sample) for sample in SampleReader({name for name, _, _ in expected}).read(body)]
    assert len(expected) > 300
    assert sorted(samples, key=repr) == sorted(expected, key=repr)


@given(st.binary())
def test_arbitrary_bytes_never_raise(body: bytes) -> None:
    READER.read(body)


@given(
    st.lists(
        st.sampled_from(
            [b"wanted", b"{", b"}", b'a="', b'"', b"\\", b",", b" ", b"1", b"#", b"\r", b"\n", b"\xff"]
        )
    )
)
def test_broken_lines_never_raise(pieces: list[bytes]) -> None:
    READER.read(b"".join(pieces))


@given(st.dictionaries(st.from_regex(r"[a-zA-Z_][a-zA-Z0-9_]*", fullmatch=True), st.text()), st.floats())
def test_what_was_written_is_read(labels: dict[str, str], value: float) -> None:
    escaped = {
        key: text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        for key, text in labels.items()
    }
    pairs = ",".join(f'{key}="{text}"' for key, text in escaped.items())
    sample = one(f"wanted{{{pairs}}} {value!r}\n".encode())
    assert sample.labels == labels
    assert sample.value == value or (math.isnan(sample.value) and math.isnan(value))


@pytest.mark.parametrize(
    "body",
    [
        b'wanted{a="b",' + b'a="b",' * 300_000,
        b"wanted" + b" " * 2_000_000,
        b"wanted " * 300_000,
        b'wanted{a="' + b"\\" * 2_000_000,
    ],
)
def test_a_hostile_page_costs_linear_time(body: bytes) -> None:
    begin = time.process_time()
    assert READER.read(body) == []
    assert time.process_time() - begin < 2  # seconds; milliseconds in truth, hours if it were quadratic
