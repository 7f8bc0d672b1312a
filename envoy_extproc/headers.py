"""A read-only, case-insensitive multimap of HTTP headers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


class Headers:
    """HTTP headers as they came: order and repetitions kept, names compared in lower case.

    Envoy hands over lower-case names, HTTP/2 pseudo headers (``:path``) among them. Values are text; bytes that
    are not UTF-8 arrive as surrogate escapes, so nothing is lost and nothing raises.
    """

    __slots__ = ("_first", "_items")

    def __init__(self, items: Iterable[tuple[str, str]] = ()) -> None:
        self._items = [(name.lower(), value) for name, value in items]
        # Written back to front, so that of repeated names the first one stays.
        self._first = dict(reversed(self._items))

    def get(self, name: str) -> str | None:
        """The first value of a lower-case `name`, or None."""
        return self._first.get(name)

    def get_all(self, name: str) -> list[str]:
        """Every value of a lower-case `name`, in order."""
        return [value for known, value in self._items if known == name]

    def __contains__(self, name: object) -> bool:
        return name in self._first

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    @property
    def size(self) -> int:
        """Characters of all names and values."""
        return sum([len(name) + len(value) for name, value in self._items])

    @property
    def names(self) -> Iterable[str]:
        """The distinct names."""
        return self._first.keys()

    def __repr__(self) -> str:
        return f"Headers({[name for name, _ in self._items]})"  # names alone: values can hold secrets
