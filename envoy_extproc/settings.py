"""The settings: one frozen model per concern, each default with its reason. The only reader of file and environment.

Every key can also come from the environment as ``ENVOY_EXTPROC_<SECTION>__<KEY>``, which wins over the file. An
unknown key, in file or environment, is an error that names it. Variables of other shapes are somebody else's: for a
Service called envoy-extproc Kubernetes puts ``ENVOY_EXTPROC_SERVICE_HOST`` and the like into every pod.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.alias_generators import to_camel
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict
from pydantic_settings import SettingsError as UnreadableVariable

from envoy_extproc import mixes

ENV_PREFIX = "ENVOY_EXTPROC_"

Seconds = Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)]


def _checked_address(value: str) -> str:
    host, colon, port = value.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 <= int(port) <= 65_535:
        raise ValueError("must be host:port")
    return value


Address = Annotated[str, AfterValidator(_checked_address)]


def _checked_json_file(value: Path) -> Path:
    if value.suffix != ".json":
        raise ValueError("must end in .json")
    return value


JsonFile = Annotated[Path, AfterValidator(_checked_json_file)]


class SettingsError(ValueError):
    """The configuration is wrong; the message says which key and why, a line each."""


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", str_strip_whitespace=True, use_attribute_docstrings=True
    )


class Tls(_Section):
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


class Server(_Section):
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


class StaticSource(_Section):
    """Endpoints written down."""

    endpoints: tuple[Mapping[str, Any], ...] | None = None
    """A list of {name, address, models, engine, labels}; `discovery.parse` checks each."""
    file: Path | None = None
    """A YAML file of the same, reread when it changes."""

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.endpoints is None) == (self.file is None):
            raise ValueError("give either `endpoints` or `file`")
        return self


_namespace = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


def _checked_namespaces(value: tuple[str, ...]) -> tuple[str, ...]:
    if value == ("*",):
        return value
    for each in value:
        if _namespace.fullmatch(each) is None:
            raise ValueError(f'{each!r} is no namespace; all of them are ["*"] alone')
    if len(set(value)) < len(value):
        raise ValueError("a namespace is named twice")
    return value


Namespaces = Annotated[tuple[str, ...], AfterValidator(_checked_namespaces)]


class KubernetesSource(_Section):
    """Pods of a Kubernetes cluster, by label."""

    namespaces: Namespaces = ()
    """Where pods are looked for. Empty: in the server's own, which needs no rights in others; `["*"]`: in all."""
    label_selector: str = "model.aibrix.ai/name"
    """Which pods: a Kubernetes label selector, applied by the API. By default those that AIBrix would find."""
    kubeconfig: Path | None = None
    """The file that says where the cluster is. null: the pod's own service account."""
    context: str | None = None
    """Of that file. null: its current one."""
    debounce_ms: int = Field(default=50, ge=0, le=10_000)
    """Changes that come within it are told together: a rollout is a hundred in a second, and each list is for everyone."""
    page_size: int = Field(default=500, ge=1, le=10_000)
    """Objects in one page of a list; kubectl's own figure."""
    routes: bool = False
    """Watch HTTPRoutes too, and tell of models whose route is not accepted: needs the right to read them."""
    route_namespaces: Namespaces = ()
    """Where routes are looked for; AIBrix keeps them in a namespace of their own. Empty: where pods are."""

    @model_validator(mode="after")
    def _context_of_a_file(self) -> Self:
        if self.context is not None and self.kubeconfig is None:
            raise ValueError("context: is one of a kubeconfig, so give `kubeconfig` too")
        return self


class Discovery(_Section):
    """Who may be chosen."""

    static: StaticSource | None = None
    kubernetes: KubernetesSource | None = None
    """Instead of `static`: docs/kubernetes.md. All of its keys have defaults: `kubernetes: {}`."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.static is None and self.kubernetes is None:
            raise ValueError("give `static` or `kubernetes`: nobody can be chosen otherwise")
        if self.static is not None and self.kubernetes is not None:
            raise ValueError("give either `static` or `kubernetes`, not both")
        return self


class Breaker(_Section):
    """When a pod that fails is left alone, as the answers to requests themselves tell."""

    enabled: bool = True
    """A pod can fail every request and look healthy: vLLM that is told to stop answers 500, and `/health` 200."""
    consecutive_errors: int = Field(default=3, ge=1, le=1000)
    """One error can be the request's own doing, two a coincidence; a pod that fails everything is known after three.
    A connection refused or broken before an answer is nobody else's doing and needs no second one."""
    silent_seconds: float = Field(default=5, gt=0, le=86_400)
    """Clients that leave earlier have changed their mind; a pod that gave no answer to anybody for so long hangs, or its
    queue is such that others are better. Less than clients wait, or nothing is learnt of it."""
    first_seconds: float = Field(default=1, gt=0, le=86_400)
    """A moment of overload is over by then, and a probe a second costs little."""
    longest_seconds: float = Field(default=30, gt=0, le=86_400)
    """A pod that stays broken costs two requests a minute, and one that is well again waits half a minute at most."""

    @model_validator(mode="after")
    def _longest_is_no_less(self) -> Self:
        if self.longest_seconds < self.first_seconds:
            raise ValueError("longest_seconds must not be less than first_seconds")
        return self


class Fairness(_Section):
    """How `vtc-basic` counts what users are served, and what it makes of it."""

    window_seconds: float = Field(default=300, ge=1, le=86_400)
    """AIBrix's: who was busy five minutes ago is like anybody else now."""
    input_weight: float = Field(default=1, ge=0, le=1000)
    """Of a prompt token."""
    output_weight: float = Field(default=2, ge=0, le=1000)
    """Of a token of the answer: it costs a pass of its own, so the field counts it twice."""
    apart_tokens: float = Field(default=8000, gt=0, le=1e12)
    """Weighted tokens between the least and the most served user from which on they are kept apart altogether: AIBrix's
    largest bucket. Some requests of a few hundred tokens are no reason."""
    fairness_weight: float = Field(default=1, ge=0, le=1000)
    """How much keeping users apart counts beside load."""
    load_weight: float = Field(default=1, gt=0, le=1000)
    """How much load does."""
    max_users: int = Field(default=4096, ge=1, le=1_000_000)
    """Counted by themselves, in 4 KB each at most. Of more than that, idle ones are forgotten, and those beyond share one."""


class PrefixCache(_Section):
    """What `prefix-cache` remembers of prompts, to send each where its beginning is in the KV cache."""

    block_tokens: int = Field(default=64, ge=16, le=4096)
    """Tokens that are told apart as one, at 4 bytes each. vLLM's block has 16; four of them cost a quarter, and a match is
    seen 24 tokens too short on average."""
    max_prompt_blocks: int = Field(default=2048, ge=1, le=65_536)
    """131,072 tokens; prompts that are alike for so long go to one endpoint whatever comes then."""
    blocks_per_endpoint: int = Field(default=31_250, ge=1, le=100_000_000)
    """2 million tokens: the endpoint picker's bound too. An engine's KV cache has room for some hundred thousand; what is
    remembered beyond it are matches that are none."""
    max_blocks: int = Field(default=1_000_000, ge=1, le=1_000_000_000)
    """For all endpoints together, each of which has an equal share: 86 MB where no two hold the same, 111 MB where four do."""
    seed: int | None = Field(default=None, ge=0, lt=2**64)
    """Of all hashes. null: another one in every process, so that nobody can make up prompts that look alike."""


class Routing(_Section):
    """How an endpoint is chosen."""

    policy: str = "least-request"
    """Needs no data but our own, and no workload is bad for it. Several with weights decide together:
    `least-kv-cache:2,least-request:1`."""
    allow_strategy_header: bool = True
    """A client knows best what its request is like. false: `routing-strategy` is not looked at, where tenants are not
    to choose for each other."""
    tries: int = Field(default=3, ge=1, le=10)
    """Endpoints named to Envoy, the first choice and fallbacks for retries: two dead pods lose no request."""
    allow_pinning: bool = False
    """`target-pod-ip` lets clients choose, so it must be wanted."""
    clear_route_cache: bool = False
    """Let Envoy choose its route again by the `model` header: for one route per model; one route for all needs none."""
    load_bound: float = Field(default=1.25, gt=1, le=1000)
    """With `bounded-load` no endpoint gets more than so many times the mean load. A quarter above it is little to wait for;
    nearer to 1, keys leave their home more often."""
    fairness: Fairness = Fairness()
    """See `vtc-basic` in docs/routing.md."""
    prefix_cache: PrefixCache = PrefixCache()
    breaker: Breaker = Breaker()


class Engines(_Section):
    """How engines are asked about themselves."""

    scrape_interval_ms: int = Field(default=200, ge=20, le=60_000)
    """A decision is then at most this much behind the engine; a tenth of a long prefill."""
    idle_interval_ms: int = Field(default=2000, ge=20, le=60_000)
    """What the interval grows to for an engine without work, which has nothing new to say, and for one that is out of
    reach: 100 idle pods then cost 4 % of a core, and one that is back is seen within 2 seconds."""
    models_interval_ms: int = Field(default=30_000, ge=100, le=3_600_000)
    """For the list of models an engine serves. Adapters are loaded by people and operators, so half a minute late is
    early; a pod that comes back is asked at once."""
    scrape_timeout_ms: int = Field(default=1000, ge=20, le=60_000)
    """An engine busy with a long prefill can take hundreds of milliseconds to answer."""
    max_stats_age_ms: int = Field(default=2000, ge=20, le=600_000)
    """Ten missed scrapes; older numbers say nothing about now."""
    max_scrape_bytes: int = Field(default=4_194_304, ge=4096)
    """vLLM's page is 60 KB; a page of this size is no metrics page."""
    dialects: Mapping[str, Mapping[str, Any]] = Field(default_factory=dict)
    """Engines of other names, or other metrics for a known one: {my-engine: {base: vllm, waiting: "my:queue"}};
    `engines.dialects` checks each. docs/engines.md has the fields and the notation."""


class Responses(_Section):
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


class EnvoySettings(_Section):
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


class State(_Section):
    """Where state is kept."""

    redis_url: None = None
    """Reserved: only null, which keeps state in memory, is there yet."""


class Limits(_Section):
    """Reserved: request and token limits are not there yet."""


class Auth(_Section):
    """Who a client is."""

    mode: Literal["none", "header"] = "none"
    """header: the header `user` says who a client is; for gateways that set it themselves, since anybody can send one. none: it
    is not read. `api-key` is reserved: it is not there yet."""


class _AIBrixSection(_Section):
    """Its keys are written as AIBrix writes them."""

    model_config = ConfigDict(alias_generator=to_camel)


class ProfileHints(_AIBrixSection):
    """What requests a profile is meant for."""

    prompt_tokens_gte: int | None = Field(default=None, ge=0)
    """The prompt has at least so many tokens."""
    prompt_tokens_lt: int | None = Field(default=None, ge=0)
    """It has fewer."""
    max_tokens_gte: int | None = Field(default=None, ge=0)
    """The request allows at least so many for its answer."""
    max_tokens_lt: int | None = Field(default=None, ge=0)
    """It allows fewer."""


class ModelProfile(_AIBrixSection):
    """One profile of a model."""

    routing_strategy: str | None = None
    """A name or a mixture, as in `routing.policy`."""
    routing_config: ProfileHints = ProfileHints()
    """For `config-profile: auto`."""
    requests_per_second: None = None
    """Reserved: limits are not there yet."""


class ModelConfig(_AIBrixSection):
    """AIBrix's `model.aibrix.ai/config`."""

    locked_routing_strategy: str | None = None
    """Decides, whatever clients ask for."""
    default_profile: str | None = None
    """For requests that ask for none; null: the one of the name `default`, if there is one."""
    profiles: Mapping[str, ModelProfile] = Field(default_factory=dict)
    """By the names that the header `config-profile` may have."""

    @model_validator(mode="after")
    def _default_is_there(self) -> Self:
        if self.default_profile and self.default_profile not in self.profiles:
            raise ValueError(f"defaultProfile: no profile {self.default_profile!r}")
        return self

    def named(self) -> Mapping[str, str]:
        """Every policy that is named in it, by key."""
        named = {
            f"profiles.{name}.routingStrategy": profile.routing_strategy
            for name, profile in self.profiles.items()
        } | {"lockedRoutingStrategy": self.locked_routing_strategy}
        return {key: policy for key, policy in named.items() if policy}


class Model(_Section):
    """What is different for one model, under its name."""

    policy: str | None = None
    """Instead of `routing.policy`; a client's `routing-strategy` still wins, unless `locked`."""
    locked: bool = False
    """true: `policy` decides, whatever clients ask for by `routing-strategy`."""
    config: ModelConfig | None = None
    """`{lockedRoutingStrategy, defaultProfile, profiles: {name: {routingStrategy, routingConfig}}}` in AIBrix's shape, instead of
    the annotation `model.aibrix.ai/config` of the model's pods; docs/routing.md has what it means."""

    @model_validator(mode="after")
    def _locked_to_a_policy(self) -> Self:
        if self.locked and self.policy is None:
            raise ValueError("locked: true needs a policy")
        return self


class Settings(BaseSettings):
    """The whole configuration."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        nested_model_default_partial_update=True,
    )

    server: Server = Server()
    discovery: Discovery
    routing: Routing = Routing()
    engines: Engines = Engines()
    responses: Responses = Responses()
    envoy: EnvoySettings = EnvoySettings()
    state: State = State()
    limits: Limits = Limits()
    auth: Auth = Auth()
    models: Mapping[str, Model] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_server_frees_what_it_counts(self) -> Self:
        if not self.responses.hold_streams and self.envoy.servers:
            raise ValueError(
                "responses.hold_streams: false needs the access log of every request at this server, so no envoy.servers"
            )
        return self

    @property
    def fail_open(self) -> bool:
        """`envoy.fail_open` with `auto` decided."""
        return self.auth.mode == "none" if self.envoy.fail_open == "auto" else self.envoy.fail_open

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003  pydantic-settings passes all by name
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003  likewise
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003  likewise
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment wins over the file; no .env file and no secrets directory is read."""
        return env_settings, init_settings


def load(path: Path | None, *, policies: tuple[str, ...]) -> Settings:
    """The settings of the file at `path`, with what the environment says instead.

    Args:
        path: a YAML file; None for the environment alone.
        policies: the names a policy may have.

    Raises:
        SettingsError: something in it is wrong.
    """
    return parse({} if path is None else _read(path), policies=policies, source=str(path or "environment"))


def parse(data: Mapping[str, Any], *, policies: tuple[str, ...], source: str = "configuration") -> Settings:
    """The settings in `data`; see `load`."""
    _check_environment(os.environ)
    private = [key for key in data if key.startswith("_")]  # pydantic-settings has arguments of such names
    if private:
        raise SettingsError("\n".join(f"{source}: {key}: unknown key" for key in private))
    try:
        settings = Settings(**data)
    except UnreadableVariable as error:
        raise SettingsError(f"environment: {error}: lists and whole sections are written in JSON") from None
    except ValidationError as error:
        raise SettingsError("\n".join(_sentences(source, error))) from None
    _check_policies(settings, policies, source)
    return settings


def _read(path: Path) -> Mapping[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: not YAML: {error}") from None
    if data is None:
        return {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise SettingsError(f"{path}: the file must hold sections: server, discovery, routing, ...")
    return data


def _sentences(source: str, error: ValidationError) -> list[str]:
    lines = []
    for each in error.errors(include_url=False, include_input=False):
        key = ".".join(str(part) for part in each["loc"])
        message = (
            "unknown key" if each["type"] == "extra_forbidden" else each["msg"].removeprefix("Value error, ")
        )
        lines.append(f"{source}: {key}: {message}")
    return lines


def _check_policies(settings: Settings, policies: tuple[str, ...], source: str) -> None:
    named = {"routing.policy": settings.routing.policy}
    named |= {
        f"models.{name}.policy": model.policy
        for name, model in settings.models.items()
        if model.policy is not None
    }
    for name, model in settings.models.items():
        if model.config is not None:
            named |= {f"models.{name}.config.{key}": policy for key, policy in model.config.named().items()}
    wrong = []
    for key, policy in named.items():
        try:
            mixes.parse(policy, policies)
        except mixes.MixError as error:
            wrong.append(f"{source}: {key}: {error}")
    if wrong:
        raise SettingsError("\n".join(wrong))


def _check_environment(environment: Mapping[str, str]) -> None:
    """pydantic-settings passes over variables whose section it does not know; those that are ours must not be.

    Ours has ``__`` behind the prefix. A whole section, which has none, is known by its name alone, and any other name
    without it is no mistake: it may be one of Kubernetes' service links.
    """
    sections = {name.upper() for name in Settings.model_fields}
    for name in environment:
        if name.upper().startswith(ENV_PREFIX):
            section, delimiter, _ = name.upper().removeprefix(ENV_PREFIX).partition("__")
            if delimiter and section not in sections:
                raise SettingsError(f"environment: {name}: unknown key")
