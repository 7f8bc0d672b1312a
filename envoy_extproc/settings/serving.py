"""The settings of the server itself, of Envoy in front of it, and of what both do with answers."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from envoy_extproc.settings.base import Address, JsonFile, Seconds, Section


class Tls(Section):
    """TLS on the ext_proc port. The files are read again when they have changed, for connections made from then on."""

    cert_file: Path
    """The certificate and what is between it and its CA, in PEM."""
    key_file: Path
    """Its key, in PEM, not encrypted."""
    client_ca_file: Path | None = None
    """Whose certificates clients must have: whoever reaches the port can route, and can write reports. null asks for none."""
    reload_seconds: float = Field(default=1, ge=0, le=3600)
    """A client that connects has the files looked at, at most so often: connections are few, and a flood is not to read
    files. Renewed certificates overlap by days."""


class Server(Section):
    """This server's ports and bounds."""

    listen: Address = "0.0.0.0:9002"
    """The port the endpoint pickers of the field use for ext_proc."""
    admin: Address = "0.0.0.0:9090"
    """Metrics and health over HTTP; 9090 is where Prometheus operators look first."""
    drain_seconds: Seconds = 30
    """Kubernetes' default termination grace; a stream still open then is given back to Envoy, not cut."""
    linger_seconds: Seconds = 1.5
    """A server that drains takes new streams for at least so long, within `drain_seconds`: until Envoy has asked for its
    health, each second. 5 where Envoy learns of it by a control plane or DNS alone, which needs a moment longer."""
    max_body_bytes: int = Field(default=33_554_432, ge=1024, le=1_073_741_824)
    """32 MiB: a dozen images in base64. Envoy buffers as much for each request it has under way."""
    tls: Tls | None = None
    """{cert_file, key_file, client_ca_file: null, reload_seconds: 1}: TLS on the ext_proc port, read again when renewed on
    disk; with a client CA, clients must have a certificate too. null: ext_proc stays within a network that can be trusted."""
    debug_token: str | None = Field(default=None, min_length=8, repr=False)
    """Opens /debug to others than loopback; without one, loopback alone."""


class Responses(Section):
    """How answers are read."""

    accounting: Literal["auto", "stream", "native", "none"] = "auto"
    """Who reads the answers. native: `native.lua` inside Envoy, whose access log brings the figures. stream: this server,
    each chunk as it passes. auto: native wherever Envoy announces the script and its access log is heard of, else
    stream. none: nobody, and no tokens are counted."""
    hold_streams: bool = True
    """In the native lane the stream to Envoy stays open to the end of the request, which frees its place in the counts at
    once. false: it ends with the decision, so that a client outlives a server that is killed though Envoy fails closed;
    its place is then freed by the access-log entry, 0.1 s late, and that must reach this server: no `envoy.servers`."""
    load_report: Literal["TEXT", "JSON", "BIN"] | None = None
    """An ORCA report of the pod on every answer, in this form, for an Envoy in front that cannot ask for one by
    `endpoint-load-metrics-format`; what a client asks for goes first. null: it tells of pods, so only whoever asks gets it."""
    max_event_bytes: int = Field(default=1_048_576, ge=1024)
    """An event with log-probabilities or an image is tens of KB."""
    max_json_bytes: int = Field(default=16_777_216, ge=1024)
    """A batch of 1,000 embeddings in floats is about 10 MB."""


class EnvoySettings(Section):
    """What `config envoy` and `demo` write into Envoy's bootstrap."""

    listen: Address = "0.0.0.0:8080"
    """Where clients connect."""
    admin: Address = "127.0.0.1:9901"
    """Envoy's admin port can stop it: loopback alone."""
    servers: tuple[Address, ...] = ()
    """Further ext_proc addresses besides `server.listen`."""
    server_ca_file: Path | None = None
    """With `server.tls`: the CA by which Envoy knows the servers, as a path where Envoy runs."""
    server_name: str | None = Field(default=None, min_length=1)
    """With `server.tls`: the name in the servers' certificate. null: the host of their addresses."""
    client_cert_file: Path | None = None
    """With `server.tls.client_ca_file`: Envoy's own certificate, as a path where Envoy runs."""
    client_key_file: Path | None = None
    """Its key."""
    message_timeout_seconds: float = Field(default=10, gt=0, le=600)
    """How long Envoy waits for a reply. 2,000 requests that arrive at once take a server on a busy core 2 seconds; with
    less time than that Envoy would let some of them past. A server that is dead is noticed by its connection."""
    endpoints_file: JsonFile | None = None
    """Where `serve` writes the endpoints for Envoy to read, at the start and whenever they change; .json, for Envoy reads
    it by its ending. null: they stand in the bootstrap, and Envoy knows no others."""
    fail_open: Literal["auto"] | bool = "auto"
    """auto: open while neither authentication nor limits are on, since then nothing is guarded by being closed."""

    @model_validator(mode="after")
    def _certificate_and_key(self) -> Self:
        if (self.client_cert_file is None) != (self.client_key_file is None):
            raise ValueError("give both client_cert_file and client_key_file, or neither")
        return self


class State(Section):
    """Where state is kept."""

    redis_url: None = None
    """Reserved: only null, which keeps state in memory, is there yet."""


class Limits(Section):
    """Reserved: request and token limits are not there yet."""


class Auth(Section):
    """Who a client is."""

    mode: Literal["none", "header"] = "none"
    """header: the header `user` says who a client is; for gateways that set it themselves, since anybody can send one. none: it
    is not read. `api-key` is reserved: it is not there yet."""
