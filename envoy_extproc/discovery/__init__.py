"""Who may be chosen: each source yields whole Snapshots, the first at once, the next whenever something changed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from envoy_extproc.endpoints import Snapshot


class Discovery(Protocol):
    """A source of endpoints."""

    def snapshots(self) -> AsyncIterator[Snapshot]:
        """Yields everyone who may be chosen, as often as that changes; does not end by itself."""
        ...
