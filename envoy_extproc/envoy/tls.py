"""TLS from Envoy to the ext_proc servers."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import msgspec

Json = dict[str, Any]


class ServerTls(msgspec.Struct, frozen=True, kw_only=True):
    """How Envoy speaks TLS to the servers. Paths are those of the machine where Envoy runs.

    Attributes:
        ca_file: who signs the servers' certificates.
        name: what their certificate must be for, besides being asked for by it; None for the hosts of `servers`.
        cert_file: Envoy's own certificate, for servers that ask for one; None for none.
        key_file: its key.
    """

    ca_file: Path
    name: str | None = None
    cert_file: Path | None = None
    key_file: Path | None = None


def transport_socket(tls: ServerTls, servers: Sequence[str]) -> Json:
    """The field of that name for a cluster of servers at ``host:port``; its health checks go this way, too."""
    names = [tls.name] if tls.name is not None else [_host(each) for each in servers]
    common: Json = {
        "alpn_protocols": ["h2"],  # gRPC refuses a connection that has not agreed on it
        "validation_context": {
            "trusted_ca": {"filename": str(tls.ca_file)},
            "match_typed_subject_alt_names": [_subject(name) for name in dict.fromkeys(names)],
        },
    }
    if tls.cert_file is not None:
        common["tls_certificates"] = [
            {
                "certificate_chain": {"filename": str(tls.cert_file)},
                "private_key": {"filename": str(tls.key_file)},
            }
        ]
    context: Json = {
        "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
        "common_tls_context": common,
    }
    if not _is_ip(names[0]):  # an address is no name to ask for
        context["sni"] = names[0]
    return {"transport_socket": {"name": "envoy.transport_sockets.tls", "typed_config": context}}


def _subject(name: str) -> Json:
    return {"san_type": "IP_ADDRESS" if _is_ip(name) else "DNS", "matcher": {"exact": name}}


def _host(address: str) -> str:
    return address.rpartition(":")[0].strip("[]")


def _is_ip(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
