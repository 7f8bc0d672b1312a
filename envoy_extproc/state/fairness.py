"""What each user has been served lately: virtual token counters over a sliding window.

A request is charged with an estimate when it is decided, so that a burst counts at once, and with what it really used, in
place of that, when its report comes. A user who comes, or comes back when nothing of theirs is left in the window, begins with
the least counter of those who have requests under way: what was left unused is not saved up, and nothing is owed for it
(the lift of Sheng et al. 2024; theirs also lifts who has no request for a moment, which in a queue costs nothing, but
here would make everybody with one request at a time look as heavy as the heaviest).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import msgspec

from envoy_extproc.exchange.report import Report
from envoy_extproc.scheduling.fairness import FairnessRules
from envoy_extproc.scheduling.interfaces import Decision, Standing

_SLOTS = 10
"""Parts of the window; what leaves it does so a tenth at a time. Each takes up to 300 bytes a user."""

_OUTPUT_PER_INPUT = 1.5
"""Tokens of an answer for each of its prompt, until it is known: AIBrix's guess."""

_PATIENCE_SECONDS = 3600.0
"""For the report of a request: none is under way for longer."""

_MOST_UNDER_WAY = 65_536
"""Charges that wait for their reports; of more than that, the oldest stand as they were estimated."""

_TOGETHER = ""
"""Whose counter those are on for whom there is none: no user has an empty name."""


class _Charge(msgspec.Struct):
    user: str
    slot: int
    tokens: float
    at: float
    under_way: bool = True


class Fairness:
    """The counters of all users of one server.

    Args:
        rules: how service is counted.
        name: sets the tickets of this server apart from others'.
        clock: monotonic seconds, the same that are handed in.
        accounting: whether answers are read for their usage; where they are not, estimates stand.
    """

    def __init__(
        self,
        rules: FairnessRules,
        *,
        name: str = "",
        clock: Callable[[], float] = time.monotonic,
        accounting: bool = True,
    ) -> None:
        self._rules = rules
        self._accounting = accounting
        self._name = name
        self._clock = clock
        self._width = rules.window_seconds / _SLOTS
        self._slots: deque[tuple[int, dict[str, float]]] = deque()
        self._totals: dict[str, float] = {}
        self._under_way: dict[str, int] = {}
        self._active: dict[
            str, float
        ] = {}  # the totals of those under way: looked through for every decision
        self._charges: dict[str, _Charge] = {}
        self._issued = 0

    def standing(self, user: str, now: float) -> Standing:
        """How `user` stands among those with requests under way."""
        self._pass_time(now)
        account = self._account(user)
        own, totals = self._lifted(account), self._active.values()
        others = len(totals) - (account in self._active)
        less, alike = sum(map(own.__gt__, totals)), others - len(totals) + sum(map(own.__eq__, totals))
        return Standing(
            own=own,
            least=min(own, min(totals, default=own)),
            most=max(own, max(totals, default=own)),
            below=(less + alike / 2) / others if others else 0.0,
        )

    def charge(self, user: str, prompt_tokens: int, max_output_tokens: int | None, now: float) -> str:
        """Charges a request that is decided with what it is expected to use; returns the ticket of its report."""
        self._pass_time(now)
        account = self._account(user)
        self._make_room(account)
        self._lift(account)
        under_way = self._under_way.get(account, 0)
        self._under_way[account] = under_way + 1
        output = prompt_tokens * _OUTPUT_PER_INPUT
        if max_output_tokens is not None:
            output = min(output, max_output_tokens)
        tokens = self._weighed(prompt_tokens, output)
        self._add(account, tokens)
        self._issued += 1
        ticket = f"{self._name}-{self._issued}"
        self._charges[ticket] = _Charge(account, self._slots[-1][0], tokens, now)
        return ticket

    def left(self, ticket: str) -> None:
        """The request of that ticket is over; its report may come to this server or to another, or not at all."""
        charge = self._charges.get(ticket)
        if charge is not None and charge.under_way:
            self._pass_time(self._clock())
            self._leave(charge)

    def decided(self, decision: Decision, seconds: float) -> None:
        """See `Hook`. A decision is charged by `charge`, before it is told of."""

    def finished(self, report: Report) -> None:
        """See `Hook`: the real usage takes the place of the estimate. A report with another server's ticket is passed over."""
        ticket = None if report.routing is None else report.routing.ticket
        if ticket is None:
            return
        self._pass_time(self._clock())
        charge = self._charges.pop(ticket, None)
        if charge is None:
            return
        if charge.user in self._totals:  # else another took the place of one that was idle
            used = self._used(report, charge)
            self._take_back(charge)
            self._add(charge.user, used)
        self._leave(charge)

    def _used(self, report: Report, charge: _Charge) -> float:
        if not self._accounting and (report.status is None or report.status < 300):
            return charge.tokens
        return self._weighed(report.usage.prompt_tokens, report.usage.completion_tokens)

    def _weighed(self, prompt: float, output: float) -> float:
        return self._rules.input_weight * prompt + self._rules.output_weight * output

    def _account(self, user: str) -> str:
        """Whose counter `user` is on: another's only where all that there may be are in use."""
        known, idle = len(self._totals), len(self._totals) - len(self._under_way)
        return user if user in self._totals or known < self._rules.max_users or idle else _TOGETHER

    def _lifted(self, account: str) -> float:
        """A counter as it is, or would begin."""
        total = self._totals.get(account)
        return min(self._active.values(), default=0.0) if total is None else total

    def _lift(self, account: str) -> None:
        """One that begins had what the least served of those under way had, and when: both forget it at the same time."""
        if account in self._totals or not self._active:
            return
        least = min(self._active, key=self._active.__getitem__)
        self._totals[account] = self._active[least]
        for _, slot in self._slots:
            if least in slot:
                slot[account] = slot[least]

    def _add(self, account: str, tokens: float) -> None:
        slot = self._slots[-1][1]
        slot[account] = slot.get(account, 0.0) + tokens
        total = self._totals[account] = max(0.0, self._totals.get(account, 0.0) + tokens)
        if account in self._under_way:
            self._active[account] = total

    def _take_back(self, charge: _Charge) -> None:
        for number, slot in self._slots:
            if number == charge.slot and charge.user in slot:
                taken = min(charge.tokens, slot[charge.user])  # who was forgotten since has less there
                slot[charge.user] -= taken
                self._totals[charge.user] -= taken

    def _leave(self, charge: _Charge) -> None:
        """One request of an account is over, if it was not already; after its last one the account is idle."""
        if not charge.under_way:
            return
        charge.under_way = False
        account = charge.user
        rest = self._under_way[account] - 1
        if rest:
            self._under_way[account] = rest
            return
        del self._under_way[account], self._active[account]
        self._slots[-1][1].setdefault(account, 0.0)  # with which it is forgotten

    def _pass_time(self, now: float) -> None:
        """Begins a new slot where one is due, and forgets what lies before the window."""
        number = int(now // self._width)
        if self._slots and number <= self._slots[-1][0]:
            return
        self._slots.append((number, {}))
        while self._slots[0][0] <= number - _SLOTS:
            self._expire(self._slots.popleft()[1])
        while self._charges and (
            len(self._charges) > _MOST_UNDER_WAY
            or next(iter(self._charges.values())).at < now - _PATIENCE_SECONDS
        ):
            self._leave(self._charges.pop(next(iter(self._charges))))

    def _expire(self, slot: dict[str, float]) -> None:
        still = {user for _, later in self._slots for user in later}
        for user, tokens in slot.items():
            if user in self._under_way:
                self._active[user] = self._totals[user] = max(0.0, self._totals[user] - tokens)
            elif user not in still:
                self._totals.pop(user, None)
            else:
                self._totals[user] = max(0.0, self._totals[user] - tokens)

    def _make_room(self, account: str) -> None:
        """Forgets an idle user where a new one would be one too many."""
        if account in self._totals or len(self._totals) < self._rules.max_users:
            return
        idle = next((user for user in self._totals if user not in self._under_way), None)
        if idle is not None:
            del self._totals[idle]
            for _, slot in self._slots:
                slot.pop(idle, None)
