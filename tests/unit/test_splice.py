"""JSON edited in place: the scanner finds what a decoder finds, and an edit leaves every other byte alone."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from envoy_extproc.openai import splice

pytestmark = pytest.mark.unmeasured

SPACE = st.text(" \t\r\n", max_size=3)
KEY = st.sampled_from(["a", "b", "usage", "stream_options", "", 'q"', "\\", "{", "é\u2028😀"]) | st.text(
    max_size=6
)
NUMBER = st.sampled_from(["0", "-0", "-1.5e+10", "1E400", "123456789012345678901234567890", "0.1"])
WORD = st.sampled_from(["null", "true", "false", "NaN", "Infinity", "-Infinity"])


@st.composite
def quoted(draw: st.DrawFn, text: st.SearchStrategy[str]) -> str:
    return json.dumps(draw(text), ensure_ascii=draw(st.booleans()))


@st.composite
def values(draw: st.DrawFn, depth: int = 3) -> str:
    kinds = [NUMBER, WORD, quoted(KEY)]
    if depth:
        kinds += [arrays(depth - 1), objects(depth - 1)]
    return draw(st.one_of(kinds))


@st.composite
def arrays(draw: st.DrawFn, depth: int) -> str:
    inner = [draw(SPACE) + each + draw(SPACE) for each in draw(st.lists(values(depth), max_size=3))]
    return "[" + (",".join(inner) or draw(SPACE)) + "]"


@st.composite
def objects(draw: st.DrawFn, depth: int = 3) -> str:
    inner = [
        f"{draw(SPACE)}{draw(quoted(KEY))}{draw(SPACE)}:{draw(SPACE)}{draw(values(depth))}{draw(SPACE)}"
        for _ in range(draw(st.integers(0, 4)))
    ]
    return "{" + (",".join(inner) or draw(SPACE)) + "}"


@st.composite
def documents(draw: st.DrawFn) -> bytes:
    text = draw(SPACE) + draw(objects()) + draw(SPACE)
    return text.encode("utf-8", "replace")


def pairs(text: bytes) -> list[tuple[str, object]]:
    """The members as Python's decoder finds them; NaN made comparable."""
    found: list[tuple[str, object]] = json.loads(
        text, object_pairs_hook=list, parse_constant=str, parse_float=str, parse_int=str
    )
    return found


def value_of(text: bytes) -> object:
    return json.loads(text, object_pairs_hook=list, parse_constant=str, parse_float=str, parse_int=str)


@given(documents())
def test_members_are_those_a_decoder_finds(text: bytes) -> None:
    found = [(each.key, value_of(text[each.value : each.end])) for each in splice.members(text)]
    assert found == pairs(text)


@given(documents())
def test_members_stand_where_they_say(text: bytes) -> None:
    for each in splice.members(text):
        assert text[each.start : each.start + 1] == b'"'
        value = text[each.value : each.end]
        assert value == value.strip(b" \t\r\n")
        assert value


@given(documents())
def test_find_takes_the_last(text: bytes) -> None:
    for key, _ in pairs(text):
        member = splice.find(text, key)
        assert member is not None
        assert (
            value_of(text[member.value : member.end])
            == [each[1] for each in pairs(text) if each[0] == key][-1]
        )
    assert splice.find(text, "no such key") is None


@given(documents(), st.data())
def test_replace_changes_one_value_alone(text: bytes, data: st.DataObject) -> None:
    members = list(splice.members(text))
    if not members:
        return
    place = data.draw(st.integers(0, len(members) - 1))
    member = members[place]
    edited = splice.replace(text, member.value, member.end, b'"new"')
    assert edited[: member.value] == text[: member.value]
    assert edited[member.value + 5 :] == text[member.end :]
    wanted = pairs(text)
    wanted[place] = (member.key, "new")
    assert pairs(edited) == wanted


@given(documents(), st.data())
def test_remove_takes_one_member_out_and_leaves_json(text: bytes, data: st.DataObject) -> None:
    members = list(splice.members(text))
    if not members:
        return
    place = data.draw(st.integers(0, len(members) - 1))
    edited = splice.remove(text, members[place])
    wanted = pairs(text)
    del wanted[place]
    assert pairs(edited) == wanted
    kept = [text[each.start : each.end] for each in members]
    del kept[place]
    assert [edited[each.start : each.end] for each in splice.members(edited)] == kept


@given(documents())
def test_append_adds_one_member_and_touches_no_byte(text: bytes) -> None:
    edited = splice.append(text, b'"new":[1]')
    assert pairs(edited) == [*pairs(text), ("new", ["1"])]
    brace = text.rindex(b"}")
    assert edited.startswith(text[:brace])
    assert edited.endswith(text[brace:])
    assert len(edited) - len(text) in (9, 10)


@given(documents())
def test_what_was_appended_can_be_removed(text: bytes) -> None:
    edited = splice.append(text, b'"new":1')
    member = list(splice.members(edited))[-1]
    assert pairs(splice.remove(edited, member)) == pairs(text)


@pytest.mark.parametrize(
    ("text", "key", "rest"),
    [
        (b'{"a":1}', "a", b"{}"),
        (b'{"a":1,"b":2}', "a", b'{"b":2}'),
        (b'{"a":1,"b":2}', "b", b'{"a":1}'),
        (b'{"a":1,"b":2,"c":3}', "b", b'{"a":1,"c":3}'),
        (b'{ "a" : 1 , "b" : 2 }', "b", b'{ "a" : 1  }'),
        (b'{ "a" : 1 , "b" : 2 }', "a", b'{  "b" : 2 }'),
        (b'{"a":1,"a":2}', "a", b'{"a":1}'),
        (b'{"a":{"a":1}}', "a", b"{}"),
        (b'{"b":"}\\"","a":1}', "a", b'{"b":"}\\""}'),
    ],
)
def test_remove(text: bytes, key: str, rest: bytes) -> None:
    member = splice.find(text, key)
    assert member is not None
    assert splice.remove(text, member) == rest


@pytest.mark.parametrize(
    ("text", "longer"),
    [
        (b"{}", b'{"x":1}'),
        (b"{ }\n", b'{ "x":1}\n'),
        (b'{"a":1}', b'{"a":1,"x":1}'),
        (b'{"a":{}}', b'{"a":{},"x":1}'),
    ],
)
def test_append(text: bytes, longer: bytes) -> None:
    assert splice.append(text, b'"x":1') == longer


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        (b'{"a":1,"\\u0061":2}', ["a", "a"]),
        (b'{"\\ud800":1}', ["\ud800"]),
        (b'{"\xff":1,"b":2}', ["\ufffd", "b"]),
        (b'{"\\n\xff":1,"b":2}', ["\\n\ufffd", "b"]),
        (b'{"\\n\x01":1,"b":2}', ["\\n\x01", "b"]),
        (b"{}", []),
    ],
)
def test_keys(text: bytes, keys: list[str]) -> None:
    assert [each.key for each in splice.members(text)] == keys


def test_the_object_at_an_offset() -> None:
    text = b'{"a":{"b":1}}'
    assert [each.key for each in splice.members(text, 1)] == ["b"]


def test_a_megabyte_of_text_is_stepped_over() -> None:
    text = b'{"a":"' + b'\\"x' * 400_000 + b'","b":[' + b"[" * 10_000 + b"]" * 10_000 + b'],"c":1}'
    member = splice.find(text, "c")
    assert member is not None
    assert text[member.value : member.end] == b"1"


@given(st.binary(max_size=40))
def test_whatever_msgspec_takes_for_an_object_can_be_searched(junk: bytes) -> None:
    text = b'{"x\\n' + junk + b'":1,"usage":null}'
    try:
        value = msgspec.json.decode(text, type=_Usage)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return
    member = splice.find(text, "usage")
    if member is not None and value.usage is None:
        assert text[member.value : member.end] == b"null"


class _Usage(msgspec.Struct):
    usage: object = 0
