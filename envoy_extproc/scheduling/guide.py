"""The policies in words, for docs/routing.md, which is written from here and from what `registry` makes of each.

A formula is arithmetic over the names of the page's example, so that a test can work it out. ``x of y`` is x where `mine` is
this endpoint's y, and `most`, `fewest` or `least` that of all.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec


class Words(msgspec.Struct, frozen=True, kw_only=True):
    """What people are told of a policy.

    Attributes:
        score: whom it prefers, and by which formula.
        needs: the data it goes by.
        use: what it is for.
        lacks: the reasons for which another policy decides, as the metric's label has them.
        otherwise: what is to be known of that other one, or of there being none.
    """

    score: str
    needs: str
    use: str
    lacks: tuple[str, ...] = ()
    otherwise: str = ""


_FEWEST = "`(most - mine) / (most - fewest)`"

GUIDE: Mapping[str, Words] = {
    "least-request": Words(
        score=f"the fewest in flight: {_FEWEST} of `in_flight`",
        needs="own counts",
        use="anything: the default",
    ),
    "prefix-cache": Words(
        score="who holds most of the prompt's beginning and is not too busy: `held / blocks`; "
        "see [below](#prompts-that-begin-alike)",
        needs="the prompts sent so far",
        use="conversations, agents, common system prompts, retrieval: prompts that begin alike",
        lacks=("no-prompt",),
    ),
    "session-affinity": Words(
        score="where the request's session is: 1, others 0; see [below](#sessions)",
        needs="`x-session-id`, `x-aibrix-session-key`",
        use="clients that keep a header: their prefix is cached where the last turn was",
        lacks=("no-session", "session-gone"),
    ),
    "bounded-load": Words(
        score="where the request's key belongs, while that is not too busy: `0.5 + hash / 2`, or `hash / 2` for who is; "
        "see [below](#bounded-loads)",
        needs="session key, else `user`, else the prompt; own counts",
        use="tenants or sessions that stay together without a hot spot",
        lacks=("no-key",),
        otherwise="among those not too busy",
    ),
    "least-latency": Words(
        score="the fewest seconds for this request: `least / mine` of `expected`; see [below](#how-long-a-request-will-take)",
        needs="prefill and decode times, running, waiting; own counts",
        use="unlike engines or GPUs; prompts and answers of unlike length",
        lacks=("no-stats",),
    ),
    "least-kv-cache": Words(
        score="the most free KV cache: `1 - kv_cache_usage`",
        needs="KV-cache usage",
        use="long contexts, where memory ends before compute",
        lacks=("no-stats",),
    ),
    "least-utilization": Words(
        score="the idlest engine: `1 - min(1, utilization)`; of an engine without such a figure "
        "`1 - min(1, max(waiting / 5, kv_cache_usage / 0.8))`",
        needs="utilization, else waiting and KV-cache usage",
        use="engines that others send work to past this gateway",
        lacks=("no-stats",),
    ),
    "throughput": Words(
        score=f"the least work a second: {_FEWEST} of `2 * prompt_tokens_per_second + generation_tokens_per_second`",
        needs="tokens per second",
        use="even wear under steady load",
        lacks=("no-stats",),
    ),
    "lora-affinity": Words(
        score="the readiest for an adapter: 1.0 it runs, 0.8 there is room for it, 0.6 it waits, 0.0 otherwise; "
        "for other models all 1",
        needs="adapters running and waiting",
        use="many adapters on few pods, in a mixture; the other policies filter by the same",
        lacks=("no-stats",),
    ),
    "vtc-basic": Words(
        score="endpoints apart for users who were served much and little lately, and idle ones; "
        "see [below](#fairness-between-users)",
        needs="tokens by `user`, own counts",
        use="tenants who are not to wait behind each other",
        lacks=("no-user",),
    ),
    "pd": Words(
        score="the least loaded pair of a prefill and a decode endpoint; see [below](#prefill-and-decode)",
        needs="labels, running and waiting, own counts",
        use="prefill and decode in pods of their own",
        otherwise="503",
    ),
    "power-of-two": Words(
        score="of two drawn at random the one with fewer in flight",
        needs="own counts",
        use="many servers that do not know of each other's requests",
    ),
    "round-robin": Words(
        score="the next in the order of addresses, each model by itself",
        needs="nothing",
        use="equal requests on equal pods; comparing others with it",
    ),
    "random": Words(score="nobody", needs="nothing", use="comparing others with it"),
    "queue-scorer": Words(
        score=f"the fewest waiting in the engine: {_FEWEST} of `waiting`",
        needs="requests waiting",
        use="configurations of the endpoint picker",
        lacks=("no-stats",),
    ),
    "running-requests-size-scorer": Words(
        score=f"the fewest running in the engine: {_FEWEST} of `running`",
        needs="requests running",
        use="likewise",
        lacks=("no-stats",),
    ),
    "load-aware-scorer": Words(
        score="the fewest waiting: `0.5 * (1 - min(waiting, 128) / 128)`",
        needs="requests waiting",
        use="likewise",
        lacks=("no-stats",),
    ),
}
"""Every policy that is not another one's name, those people should look at first before the others."""


class Alias(msgspec.Struct, frozen=True):
    """Another name of a policy, and who comes with it."""

    policy: str
    whose: str


_PICKER = "the endpoint picker's"

ALIASES: Mapping[str, Alias] = {
    "prefix-cache-scorer": Alias("prefix-cache", f"{_PICKER}; both go by one index"),
    "kv-cache-utilization-scorer": Alias("least-kv-cache", _PICKER),
    "lora-affinity-scorer": Alias("lora-affinity", _PICKER),
    "least-gpu-cache": Alias("least-kv-cache", "AIBrix's older one"),
    "least-busy-time": Alias(
        "least-utilization", "AIBrix's for the share of time a GPU is busy, which no engine tells"
    ),
}
