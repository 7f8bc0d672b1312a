"""Whether the native lane may be used, and what became of the exchanges that went by it.

An exchange in the native lane is over for this server when its stream ends; its report comes with Envoy's access-log entry,
to whichever replica Envoy's log stream goes. If entries do not come at all, because nobody wired the access log, nothing
would be accounted: so the lane closes when many exchanges have ended in it and no log was heard of, and opens again with
the first message of a log.

That the log goes to another replica looks the same from here. So a server that has heard nothing for some seconds says so
with each request it decides about, as a plea in the request's metadata; the entry brings it to the replica that reads, which
then leaves its log stream to the next one (see `access_log`).
"""

from __future__ import annotations

from typing import Literal

import structlog

from envoy_extproc.state.memory import Lease

log = structlog.get_logger()

Accounting = Literal["auto", "stream", "native", "none"]

_SILENCE_SECONDS = 30.0
_SILENCE_EXCHANGES = 20
_PLEA_SECONDS = 5.0  # of silence, until others are asked; and how old such a plea may be


class NativeLane:
    """Counts, and the switch.

    Args:
        accounting: `auto` closes the lane where no log is heard of; `stream` keeps it closed.
        name: this server's; no other has it.
        lease_seconds: after how long in-flight of an exchange that was not held is given up.

    Attributes:
        ended: exchanges whose report was left to Envoy's access log.
        reported: entries that brought a report, this server's exchanges or another's.
    """

    def __init__(self, accounting: Accounting, *, name: str = "", lease_seconds: float = 3600.0) -> None:
        self.ended = 0
        self.reported = 0
        self._name = name
        self._accounting = accounting
        self._open = accounting != "stream"
        self._silent_since: float | None = None
        self._silent_exchanges = 0
        self._lease_seconds = lease_seconds
        self._leases: dict[str, tuple[float, Lease]] = {}

    @property
    def open(self) -> bool:
        """Whether answers may be left to Envoy now."""
        return self._open

    @property
    def missing(self) -> int:
        """Reports that have not come to this server; negative where it got those of others."""
        return self.ended - self.reported

    def end(self, now: float) -> None:
        """The stream of such an exchange is at its end, at `now`."""
        self.ended += 1
        if self._silent_since is None:
            self._silent_since = now
        self._silent_exchanges += 1
        silent = now - self._silent_since > _SILENCE_SECONDS and self._silent_exchanges >= _SILENCE_EXCHANGES
        if silent and self._open and self._may_close:
            self._open = False
            log.warning(
                "native_lane_closed",
                exchanges=self._silent_exchanges,
                hint="Envoy's gRPC access log does not reach this server: answers are read in the stream lane now",
            )

    def heard(self) -> None:
        """A message of an access log came: it is wired."""
        self._silent_since = None
        self._silent_exchanges = 0
        if not self._open and self._may_close:
            self._open = True
            log.info("native_lane_open")

    @property
    def _may_close(self) -> bool:
        return self._accounting in ("auto", "none")

    # -- whose turn it is to read -----------------------------------------------------------------------------------

    def plea(self, now: float) -> str:
        """This server's name, while it waits for a log in vain; empty while it need not."""
        since = self._silent_since
        return self._name if since is not None and now - since > _PLEA_SECONDS and self._may_close else ""

    def moved_by(self, plea: str, age: float) -> bool:
        """Whether an entry's plea, made so many seconds ago, is another server's and may be true still."""
        return plea not in ("", self._name) and age < _PLEA_SECONDS

    # -- exchanges that are not held --------------------------------------------------------------------------------

    def keep(self, request_id: str, lease: Lease, now: float) -> None:
        """The exchange goes on without its stream: its place in the counts is kept until its entry comes."""
        known = self._leases.pop(request_id, None)
        if known is not None:
            known[
                1
            ].release()  # a client that reuses an id; the entry that comes first would free the wrong one
        self._leases[request_id] = (now, lease)
        self._expire(now)

    def report(self, request_id: str) -> None:
        """An entry brought a report."""
        self.reported += 1
        kept = self._leases.pop(request_id, None)
        if kept is not None:
            kept[1].release()

    def _expire(self, now: float) -> None:
        """The oldest come first; an entry that never comes must not count for ever."""
        while self._leases:
            request_id, (at, lease) = next(iter(self._leases.items()))
            if now - at < self._lease_seconds:
                return
            del self._leases[request_id]
            lease.release()
