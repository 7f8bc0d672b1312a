"""Endpoints that people wrote down: in the config, or in a file of their own that is reread when it changes."""

from __future__ import annotations

import asyncio
import pathlib
from collections.abc import AsyncIterator, Collection, Iterable
from typing import Any, NamedTuple

import structlog
import yaml

from envoy_extproc.discovery.parse import EndpointError, Path, parse_endpoints
from envoy_extproc.endpoints import Endpoint, Snapshot

log = structlog.get_logger()

# The loader in C is ten times as fast, and is in every wheel; one built without libyaml lacks it.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_MAX_DEPTH = 32  # a valid list is 4 deep

_Signature = tuple[int, ...]


class EndpointFileError(EndpointError):
    """A file of endpoints that cannot be read or used; its text names the file, the line and the place.

    Attributes:
        line: the line it stands in, from 1; None where the file as a whole is meant.
    """

    def __init__(self, file: pathlib.Path, reason: str, line: int | None = None) -> None:
        super().__init__(f"{file}{'' if line is None else f', line {line}'}: {reason}")
        self.reason = reason
        self.line = line


class StaticDiscovery:
    """The endpoints of the config; they never change."""

    def __init__(self, endpoints: Iterable[Endpoint]) -> None:
        self._snapshot = Snapshot(endpoints)

    async def snapshots(self) -> AsyncIterator[Snapshot]:
        """Yields the one Snapshot, then waits until it is cancelled."""
        yield self._snapshot
        await asyncio.Event().wait()


class _Look(NamedTuple):
    """What one look at the file gave. A signature of None means: look again whatever the file's stat says."""

    signature: _Signature | None
    answer: Snapshot | EndpointFileError


class FileDiscovery:
    """The endpoints of a YAML file, reread when it changes: edited, renamed into place, or a ConfigMap's link swapped.

    Args:
        path: the file; links are followed at each look.
        engines: the names an endpoint's engine may have.
        poll_seconds: between two looks. A kubelet takes up to a minute to swap a ConfigMap, so a second adds
            nothing to notice and costs one stat.
    """

    def __init__(
        self, path: str | pathlib.Path, *, engines: Collection[str], poll_seconds: float = 1.0
    ) -> None:
        self._path = pathlib.Path(path)
        self._engines = frozenset(engines)
        self._poll_seconds = poll_seconds

    async def snapshots(self) -> AsyncIterator[Snapshot]:
        """Yields the file's Snapshot, and another whenever its content gives a different one.

        A new file that is broken, or none, leaves the old Snapshot in force and is logged once per change.

        Raises:
            EndpointFileError: the file is missing or broken at the first look.
        """
        signature, answer = await asyncio.to_thread(self._look)
        if isinstance(answer, EndpointFileError):
            raise answer
        snapshot, complaint = answer, None
        yield snapshot
        while True:
            await asyncio.sleep(self._poll_seconds)
            look = await asyncio.to_thread(
                self._look_again, signature
            )  # a large file would hold up the streams
            if look is None:
                continue
            signature, answer = look
            if isinstance(answer, EndpointFileError):
                complaint = self._complain(signature, answer, complaint)
                continue
            complaint = None
            if answer != snapshot:
                snapshot = answer
                yield snapshot

    def _complain(
        self, signature: _Signature | None, error: EndpointFileError, last: tuple[Any, ...] | None
    ) -> tuple[Any, ...]:
        complaint = (signature, error.line, error.reason)
        if complaint != last:
            log.warning(
                "endpoint_file_unusable",
                file=str(self._path),
                line=error.line,
                reason=error.reason,
                kept="the old list",
            )
        return complaint

    def _look_again(self, seen: _Signature | None) -> _Look | None:
        signature = self._signature()
        return None if signature is not None and signature == seen else self._look()

    def _look(self) -> _Look:
        # The stat comes before the reading: what is written in between shows as a change at the next look.
        signature = self._signature()
        try:
            return _Look(signature, load(self._path, engines=self._engines))
        except EndpointFileError as error:
            unread = isinstance(error.__cause__, OSError)
            return _Look(None if unread else signature, error)

    def _signature(self) -> _Signature | None:
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return (stat.st_mtime_ns, stat.st_size, stat.st_ino, stat.st_dev)


def load(path: pathlib.Path, *, engines: Collection[str]) -> Snapshot:
    """Reads a file of endpoints.

    Raises:
        EndpointFileError: it is missing, unreadable, no YAML, or no valid list of endpoints.
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError as error:
        raise EndpointFileError(path, "the file of endpoints does not exist") from error
    except OSError as error:
        raise EndpointFileError(path, f"the file of endpoints cannot be read: {error.strerror}") from error
    root, data = _decode(path, text)
    try:
        return Snapshot(parse_endpoints(data, engines=engines))
    except EndpointError as error:
        raise EndpointFileError(path, str(error), _line(root, error.path)) from error


def _decode(path: pathlib.Path, text: bytes) -> tuple[yaml.Node | None, Any]:
    """The YAML tree, which knows its lines, and the values it stands for."""
    try:
        _check_depth(text)
        loader = _Loader(text)
        try:
            root = loader.get_single_node()
            return root, None if root is None else loader.construct_document(root)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        line = None if error.problem_mark is None else error.problem_mark.line + 1
        raise EndpointFileError(path, f"bad YAML: {error.problem or error.context}", line) from error
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
    ) as error:  # bad UTF-8, an impossible date, endless nesting
        raise EndpointFileError(path, f"bad YAML: {' '.join(str(error).split())}") from error


def _check_depth(text: bytes) -> None:
    """Refuses nesting on which the loader in C would overrun its stack and take the process with it."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            mark: Any = event.start_mark  # the C loader has a Mark class of its own, with the same fields
            raise yaml.MarkedYAMLError(problem=f"nested more than {_MAX_DEPTH} deep", problem_mark=mark)


def _line(node: yaml.Node | None, path: Path) -> int | None:
    """The line, from 1, of what stands at `path`, or of the nearest thing above it."""
    if node is None:
        return None
    line = int(node.start_mark.line) + 1
    steps = path if isinstance(node, yaml.MappingNode) else path[1:]  # a bare list has no key `endpoints`
    for step in steps:
        found = _child(node, step)
        if found is None:
            break
        line, node = found
    return line


def _child(node: yaml.Node, step: str | int) -> tuple[int, yaml.Node] | None:
    """The line and the node of one step down; of a pair, the line of its key."""
    if isinstance(node, yaml.SequenceNode) and isinstance(step, int):
        item = node.value[step]
        return int(item.start_mark.line) + 1, item
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.value == step:
                return int(key.start_mark.line) + 1, value
    return None
