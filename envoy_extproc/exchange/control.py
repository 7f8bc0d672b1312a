"""Headers by which clients and the picker protocol steer this server, and which no pod should see."""

from __future__ import annotations

from envoy_extproc.headers import Headers
from envoy_extproc.openai.prompt import Prompt
from envoy_extproc.openai.request import InferenceRequest
from envoy_extproc.scheduling import configs, hashing, session
from envoy_extproc.scheduling.interfaces import SchedulingRequest

DESTINATION = "x-gateway-destination-endpoint"
"""Header and dynamic-metadata key of the endpoint picker protocol: ``ip:port[,ip:port...]``."""

TARGET_POD = "target-pod"

PREFILLER = "x-prefiller-host-port"
"""Request header: the address that a decode pod's sidecar has prefill the prompt (the endpoint picker's name)."""

SIDECARS = (
    PREFILLER,
    "x-prefiller-url",
    "x-encoder-hosts-ports",
    "x-data-parallel-host-port",
    "x-kv-cache-source-host-port",
)
"""A sidecar connects to whatever stands in these: they are ours to write, or nobody's."""

_REMOVED = frozenset(
    {
        *SIDECARS,
        "config-profile",
        "endpoint-load-metrics-format",
        "external-filter",
        "routing-strategy",
        "target-pod-ip",
        "x-aibrix-session-key",
        "x-gateway-destination-endpoint-subset",
        "x-gateway-model-name-rewrite",
        "x-model",
        session.HEADER,
        "x-slo-tpot-ms",
        "x-slo-ttft-ms",
    }
)
_MOST_HEADERS = 110
_MOST_HEADER_BYTES = 61_440 + 1024
_REMOVED_PREFIXES = ("x-llm-d-", "x-gateway-inference-")


def to_remove(headers: Headers, *, model_known: bool, prefiller_set: bool = False) -> tuple[str, ...]:
    """The control headers among `headers`; with the model unknown, also what a client pretends it to be.

    One that is set anew, in place of the client's, is not among them.
    """
    return tuple(
        name
        for name in headers.names
        if (name in _REMOVED and not (prefiller_set and name == PREFILLER))
        or name.startswith(_REMOVED_PREFIXES)
        or (not model_known and name in ("model", "x-gateway-model-name"))
    )


def scheduling_request(
    headers: Headers,
    *,
    model: str | None,
    subset: tuple[str, ...] | None,
    inference: InferenceRequest | None = None,
    prompt: Prompt | None = None,
    trust_user: bool = False,
) -> SchedulingRequest:
    """What the headers, and the body where it is read, let choosing know."""
    user = headers.get("user") if trust_user else None
    return SchedulingRequest(
        model=model or headers.get("x-model") or None,
        policy=headers.get("routing-strategy") or None,
        profile=_profile(headers.get("config-profile") or ""),
        pin=headers.get("target-pod-ip") or None,
        subset=subset,
        selector=headers.get("external-filter") or None,
        prompt_tokens=0 if inference is None else inference.prompt_tokens_estimate,
        prompt=prompt,
        max_output_tokens=None if inference is None else inference.max_output_tokens,
        user=hashing.name(user) if user else None,
        session=session.address(headers.get(session.HEADER) or ""),
        session_key=hashing.key(key) if (key := headers.get("x-aibrix-session-key")) else None,
    )


def _profile(written: str) -> str | None:
    """The profile a client names; `auto` is a word in any case, as in AIBrix."""
    name = written.strip()
    return configs.AUTO if name.lower() == configs.AUTO else name or None


def load_report_form(headers: Headers) -> str | None:
    """The form of ORCA report the client asks for; None where it does not, or asks for one there is not."""
    form = (headers.get("endpoint-load-metrics-format") or "").strip().upper()
    return form if form in ("TEXT", "JSON", "BIN") else None


def body_is_encoded(headers: Headers) -> bool:
    """Whether a body is compressed, so that it cannot be read."""
    return (headers.get("content-encoding") or "identity").strip().lower() not in ("", "identity")


def too_many(headers: Headers) -> bool:
    """Whether Envoy would refuse to add ours: its own limits are 100 headers and 60 KiB, and it has added some itself."""
    return len(headers) > _MOST_HEADERS or headers.size > _MOST_HEADER_BYTES


def content_length(headers: Headers) -> int | None:
    """The announced length of the body; None where there is none that is a number."""
    length = headers.get("content-length")
    return int(length) if length is not None and length.isdecimal() and len(length) < 20 else None


def status(headers: Headers) -> int | None:
    """The status of an answer; None where there is none that is a number."""
    value = headers.get(":status") or ""
    return int(value) if value.isdecimal() and len(value) == 3 else None
