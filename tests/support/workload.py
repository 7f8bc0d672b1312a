"""What clients ask, and when: requests that share prompts as real ones do, the same for every policy and every run of a seed."""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import accumulate

import msgspec

from envoy_extproc.simulation.answers import Words
from tests.support.builders import MODEL

_WORD_BYTES = 8  # two tokens, as the simulated engine and the index count them


class Arrival(msgspec.Struct, frozen=True, kw_only=True):
    """A chat request.

    Attributes:
        at: seconds from the beginning.
        body: as the client sends it.
        headers: besides those that every request has.
        conversation: of which it is a turn; those of one number share their prompts' beginning.
    """

    at: float
    body: bytes
    headers: Mapping[str, str] = {}
    conversation: int = 0


class SharedPrefixes(msgspec.Struct, frozen=True, kw_only=True):
    """Conversations that begin with one of several system prompts, some of which are much more popular than others.

    Conversations begin at random times (Poisson); each turn comes some seconds after the last one, whatever the answers take,
    so every policy meets the same requests at the same times. A turn holds those before it and what the simulated engine answered.

    Attributes:
        rate: requests a second, on average.
        seconds: for how long they come.
        system_prompts: how many there are. 0: none, no two conversations have anything in common.
        skew: of Zipf's law: the k-th most popular one is asked for `k ** -skew` times as often as the first.
        system_tokens: length of each.
        turns: of a conversation.
        user_tokens: what a turn adds, of the user.
        answer_tokens: likewise of the assistant, and what an answer has.
        think_seconds: between two turns, on average; at least half as long.
        salt: makes other prompts of the same lengths.
    """

    rate: float
    seconds: float
    system_prompts: int = 48
    skew: float = 1.0
    system_tokens: int = 3000
    turns: int = 4
    user_tokens: int = 100
    answer_tokens: int = 24
    think_seconds: float = 4.0
    salt: str = ""

    def arrivals(self, seed: int) -> list[Arrival]:
        """All of them, in the order of their times; the first conversations are met in the middle."""
        rng = random.Random(seed)
        lead = self.turns * self.think_seconds
        found, number, begins = list[Arrival](), 0, -lead
        while begins < self.seconds:
            found += [each for each in self._conversation(number, begins, rng) if 0 <= each.at < self.seconds]
            number += 1
            begins += rng.expovariate(self.rate / self.turns)
        return sorted(found, key=lambda each: each.at)

    def _conversation(self, number: int, begins: float, rng: random.Random) -> Iterator[Arrival]:
        system = self._system(number, rng)
        messages = [] if system is None else [{"role": "system", "content": system}]
        at, headers = begins, {"x-aibrix-session-key": f"conversation-{number}"}
        for turn in range(self.turns):
            name = f"{self.salt} conversation {number} turn {turn} "
            messages.append({"role": "user", "content": text(name, self._length(turn, system))})
            asked = body(messages, self.answer_tokens, seed=turn + 1)
            yield Arrival(at=at, body=asked, headers=headers, conversation=number)
            answer = Words(turn + 1, chat=True).whole(self.answer_tokens)
            messages.append({"role": "assistant", "content": answer})
            at += self.think_seconds * (0.5 + rng.expovariate(2.0))

    def _system(self, number: int, rng: random.Random) -> str | None:
        if not self.system_prompts:
            return None
        weights = list(accumulate(rank**-self.skew for rank in range(1, self.system_prompts + 1)))
        which = bisect(weights, rng.random() * weights[-1])
        return text(f"{self.salt} system prompt {which} ", self.system_tokens)

    def _length(self, turn: int, system: str | None) -> int:
        """Where there is no system prompt, the first turn is as long as it and the user's words together."""
        return self.user_tokens + (self.system_tokens if system is None and not turn else 0)


def alike(
    rate: float, seconds: float, *, seed: int, share: float = 0.0, answer_tokens: int = 40
) -> list[Arrival]:
    """Requests of 560 tokens that have nothing in common, but for a `share` of them, which begin with the same 500.

    Those are of one session, the others each of their own; all are of ten users.
    """
    rng, at, found = random.Random(seed), 0.0, list[Arrival]()
    while (at := at + rng.expovariate(rate)) < seconds:
        number = len(found) + 1
        session = "hot" if rng.random() < share else f"session-{number}"
        messages = [
            {"role": "system", "content": text(f"{session} ", 500)},
            {"role": "user", "content": text(f"question {number} ", 60)},
        ]
        headers = {"x-aibrix-session-key": session, "user": f"user-{number % 10}"}
        found.append(Arrival(at=at, body=body(messages, answer_tokens), headers=headers, conversation=number))
    return found


def flood(heavy: float, light: float, seconds: float, *, seed: int) -> list[Arrival]:
    """Requests of 500 tokens that have nothing in common, of two users at so many a second each."""
    rng, found = random.Random(seed), list[Arrival]()
    for user, rate in (("heavy", heavy), ("light", light)):
        at = 0.0
        while (at := at + rng.expovariate(rate)) < seconds:
            number = len(found) + 1
            asked = body([{"role": "user", "content": text(f"question {number} ", 500)}], 40)
            found.append(Arrival(at=at, body=asked, headers={"user": user}, conversation=number))
    return sorted(found, key=lambda each: each.at)


@lru_cache(maxsize=512)
def text(begin: str, tokens: int) -> str:
    """A text of so many tokens that is not like another that begins otherwise."""
    rng, length = random.Random(begin), tokens * 4
    words = [begin, *(f"{rng.getrandbits(28):07x} " for _ in range(length // _WORD_BYTES + 1))]
    return "".join(words)[:length]


def body(messages: list[dict[str, str]], answer_tokens: int, seed: int = 1) -> bytes:
    """A chat request that streams; by the `seed`, 1 or more, the simulated engine's answer is known beforehand."""
    asked = {"model": MODEL, "messages": messages, "max_tokens": answer_tokens, "stream": True, "seed": seed}
    return msgspec.json.encode(asked)
