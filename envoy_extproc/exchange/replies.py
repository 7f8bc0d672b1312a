"""What is said to Envoy in an exchange: headers, refusals and handovers, made of what its record holds."""

from __future__ import annotations

import msgspec

from envoy_extproc import orca
from envoy_extproc.errors import GatewayError
from envoy_extproc.exchange import control
from envoy_extproc.exchange.commands import Handover, LoadReport, Respond
from envoy_extproc.exchange.native import MAX_TEXT, Facts
from envoy_extproc.exchange.record import Record
from envoy_extproc.headers import Headers
from envoy_extproc.openai.error_body import error_body
from envoy_extproc.scheduling import session
from envoy_extproc.scheduling.interfaces import Decision

HeaderList = tuple[tuple[str, str], ...]

_JSON = ("content-type", "application/json")


def routed_headers(record: Record, headers: Headers, decision: Decision, body: bytes | None) -> HeaderList:
    """What a routed request carries; `body` is what takes the place of the client's."""
    listed = [
        (control.DESTINATION, ",".join([endpoint.address for endpoint in decision.order])),
        (control.TARGET_POD, decision.order[0].address),
    ]
    if decision.prefill is not None:
        listed.append((control.PREFILLER, decision.prefill.endpoint.address))
    if headers.get("x-request-id") != record.request_id:
        listed.append(("x-request-id", record.request_id))
    if record.model is not None:
        listed += [("model", record.model), ("x-gateway-model-name", record.model)]
    if record.inference is not None:
        listed.append((orca.FORMAT_HEADER, "TEXT"))  # which all that can tell can write
    if record.inference is not None and record.accounting:
        listed.append(("accept-encoding", "identity"))
    if body is not None:
        listed.append(("content-length", str(len(body))))
    return tuple(listed)


def removed_headers(record: Record, headers: Headers, decision: Decision) -> tuple[str, ...]:
    """What a routed request does not carry any more."""
    return control.to_remove(
        headers, model_known=record.model is not None, prefiller_set=decision.prefill is not None
    )


def answer_headers(record: Record, decision: Decision | None) -> HeaderList:
    """What a routed answer carries; `decision` is None where Envoy answered before there was one."""
    listed = [("x-request-id", record.request_id), ("request-id", record.request_id)]
    if record.routing is not None:
        listed.append(("routing-strategy", record.routing.decided_by))
    if record.served_address is not None:
        name = record.served_address if record.served_by is None else record.served_by.name
        listed += [("target-pod", name), ("target-pod-ip", record.served_address)]
    if decision is not None:
        listed += _extras(decision)
        if record.served_address is not None:
            tokens = dict(_sessions(decision))
            if record.served_address in tokens:
                listed.append((session.HEADER, tokens[record.served_address]))
    return tuple(listed)


def _extras(decision: Decision) -> HeaderList:
    """What an answer tells of a decision, whoever serves it."""
    listed: list[tuple[str, str]] = []
    if decision.prefill is not None:
        listed.append(("prefill-target-pod", decision.prefill.endpoint.name))
        listed.append(("prefill-target-pod-ip", decision.prefill.endpoint.address))
    if decision.profile is not None:
        listed.append(("x-aibrix-config-profile", decision.profile))
    return tuple(listed)


def _sessions(decision: Decision) -> HeaderList:
    """Address of each endpoint that may serve, and the session that stays there; none where sessions do not count."""
    if not decision.weighs(session.SessionAffinityScorer.name):
        return ()
    return tuple([(endpoint.address, session.token(endpoint.address)) for endpoint in decision.order])


def refusal(record: Record, error: GatewayError) -> Respond:
    """The answer that says why there is no other."""
    headers = [_JSON, ("x-request-id", record.request_id), ("request-id", record.request_id)]
    if error.header is not None:
        headers.append(error.header)
    if error.retry_after is not None:
        headers.append(("retry-after", str(error.retry_after)))
    details = f"envoy_extproc_{error.detail}"
    return Respond(status=error.status, headers=tuple(headers), body=error_body(error), details=details)


def listing(record: Record, body: bytes) -> Respond:
    """The list of models, or one of them."""
    headers = (_JSON, ("x-request-id", record.request_id), ("request-id", record.request_id))
    return Respond(status=200, headers=headers, body=body, details="envoy_extproc_models")


def handover(
    record: Record, decision: Decision, *, hide: bool, max_bytes: int, load_report: LoadReport | None
) -> Handover:
    """What `native.lua` is to do; `max_bytes` bounds an event of a stream, or a JSON answer."""
    inference = record.inference
    read = inference is not None and record.accounting
    assert record.routing is not None
    facts = Facts(
        request_id=clean(record.request_id),
        path=clean(record.path),
        routing=record.routing,
        operation=record.operation,
        model=None if record.model is None else clean(record.model),
        stream=inference is not None and inference.stream,
        read=read,
        opaque=record.opaque,
        prompt_tokens_estimate=0 if inference is None else inference.prompt_tokens_estimate,
        unexpected=record.unexpected,
    )
    return Handover(
        request_id=record.request_id,
        policy=decision.decided_by,
        pods=tuple([(endpoint.address, endpoint.name) for endpoint in decision.order]),
        read=read,
        hide=hide,
        max_event_bytes=max_bytes,
        facts=msgspec.json.encode(facts),
        load_report=load_report,
        sessions=_sessions(decision),
        extras=_extras(decision),
    )


def clean(text: str) -> str:
    """A client's words, cut short; what is no UTF-8 in them, replaced, since metadata cannot carry it."""
    text = text[:MAX_TEXT]
    return text if text.isascii() else text.encode("utf-8", "replace").decode()
