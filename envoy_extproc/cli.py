"""The command line: the only place that prints."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import msgspec
import structlog
import typer
from rich.console import Console

from envoy_extproc import __version__
from envoy_extproc import explain as explaining
from envoy_extproc.demo_tables import DemoTables
from envoy_extproc.discovery.parse import EndpointError
from envoy_extproc.discovery.static import load as load_endpoint_file
from envoy_extproc.endpoints import Endpoint
from envoy_extproc.engines.dialects import dialects
from envoy_extproc.envoy.bootstrap import BootstrapOptions, bootstrap
from envoy_extproc.envoy.eds import EndpointsFile
from envoy_extproc.envoy.tls import ServerTls
from envoy_extproc.server import plugins
from envoy_extproc.server.app import App, static_endpoints
from envoy_extproc.server.healthcheck import NotAnswering, ask_health
from envoy_extproc.server.plugins import Plugins
from envoy_extproc.settings import ENV_PREFIX, Settings, SettingsError
from envoy_extproc.settings import load as load_settings
from envoy_extproc.simulation.demo import run as run_demo
from envoy_extproc.simulation.engine import run_engine
from envoy_extproc.simulation.options import EngineOptions
from envoy_extproc.simulation.stack import StackError
from envoy_extproc.telemetry.log import sanitise
from envoy_extproc.tokens.building import load_encodings

cli = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="The brain beside Envoy: picks the model pod, rewrites the request, accounts the stream to the token.",
)
config = typer.Typer(
    no_args_is_help=True, help="Checks a configuration, or prints the Envoy bootstrap for it."
)
cli.add_typer(config, name="config")

T = TypeVar("T")
_ENGINE = EngineOptions()

ConfigFile = Annotated[
    Path, typer.Option("-c", "--config", metavar="FILE", help="The configuration, in YAML.")
]


def main() -> None:
    """The console script."""
    cli()


@cli.command()
def version() -> None:
    """Prints the version."""
    typer.echo(__version__)


@cli.command()
def serve(config_file: ConfigFile) -> None:
    """Runs the server until SIGTERM or Ctrl-C, then drains."""
    settings = _settings(config_file)
    installed = _plugins(settings)
    _log_as_json()
    _log_plugins(installed)
    try:
        _run(_serve(settings, installed))
    except* (EndpointError, SettingsError, OSError) as group:
        _fail("\n".join(str(error) for error in group.exceptions))


MaxNumSeqs = Annotated[
    int, typer.Option("--max-num-seqs", "--max-running", min=1, help="Requests in the batch at once.")
]
MaxNumQueuedReqs = Annotated[
    int | None,
    typer.Option("--max-num-queued-reqs", "--max-queued", min=0, help="Requests that may wait before 503."),
]
Ttft = Annotated[float, typer.Option(min=0, help="Seconds to the first token of a short prompt.")]
Tpot = Annotated[float, typer.Option(min=0, help="Seconds per further token.")]
StepTokens = Annotated[int, typer.Option(min=1, help="Tokens in one step of the batch.")]
KvBlocks = Annotated[int, typer.Option(min=2, help="KV blocks on the GPU.")]
BlockSize = Annotated[int, typer.Option(min=1, help="Tokens in a KV block.")]
PrefixCaching = Annotated[bool, typer.Option(help="Prompts share what they begin with.")]
MaxModelLen = Annotated[int, typer.Option(min=2, help="Tokens of prompt and answer.")]


@cli.command()
def engine(
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0 takes any free port.")] = 8000,
    model: Annotated[list[str] | None, typer.Option(help="A model to serve; repeatable.")] = None,
    host: Annotated[str, typer.Option()] = "127.0.0.1",
    ttft: Ttft = _ENGINE.ttft_seconds,
    tpot: Tpot = _ENGINE.tpot_seconds,
    max_num_seqs: MaxNumSeqs = _ENGINE.max_running,
    max_num_batched_tokens: StepTokens = _ENGINE.max_batched_tokens,
    num_gpu_blocks_override: KvBlocks = _ENGINE.kv_blocks,
    block_size: BlockSize = _ENGINE.block_size,
    enable_prefix_caching: PrefixCaching = _ENGINE.prefix_caching,
    max_model_len: MaxModelLen = _ENGINE.max_model_len,
    max_num_queued_reqs: MaxNumQueuedReqs = _ENGINE.max_queued,
    usage_null: Annotated[bool, typer.Option(help='Write "usage":null as OpenAI does.')] = False,
) -> None:
    """Runs one simulated vLLM engine. Options that vLLM has, too, have its names."""
    options = _engine_options(
        host=host,
        port=port,
        models=tuple(model or _ENGINE.models),
        name=f"engine-{port}",
        ttft_seconds=ttft,
        tpot_seconds=tpot,
        max_running=max_num_seqs,
        max_batched_tokens=max_num_batched_tokens,
        kv_blocks=num_gpu_blocks_override,
        block_size=block_size,
        prefix_caching=enable_prefix_caching,
        max_model_len=max_model_len,
        max_queued=max_num_queued_reqs,
        usage_null=usage_null,
    )
    _log_as_json()
    try:
        _run(_engine(options))
    except OSError as error:
        _fail(str(error))


def _engine_options(**values: Any) -> EngineOptions:
    try:
        return EngineOptions(**values)
    except ValueError as error:
        _fail(str(error))


@cli.command()
def demo(
    once: Annotated[bool, typer.Option("--once", help="Exit 0 after the traffic.")] = False,
    engine_url: Annotated[
        list[str] | None, typer.Option("--engine", metavar="URL", help="A real engine; repeatable.")
    ] = None,
) -> None:
    """Real Envoy, engines and this server on one machine: sends traffic and shows what happened."""
    with tempfile.TemporaryDirectory(prefix="envoy-extproc-demo-") as directory:
        try:
            _run(_demo(Path(directory), tuple(engine_url or ()), once=once))
        except StackError as error:
            _fail(str(error))


async def _demo(directory: Path, engines: tuple[str, ...], *, once: bool) -> None:
    stop = asyncio.Event()
    if once:
        stop.set()
    task = asyncio.current_task()
    assert task is not None
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    try:
        await run_demo(DemoTables(Console(), once=once), directory, engines=engines, stop=stop)
    except asyncio.CancelledError:
        typer.echo("\nstopped")


@cli.command()
def explain(
    config_file: Annotated[
        Path | None,
        typer.Option("-c", "--config", metavar="FILE", help="Decide here, by this configuration."),
    ] = None,
    server: Annotated[
        str | None, typer.Option(metavar="URL", help="Let a running server decide: its admin port.")
    ] = None,
    body: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The request's body; - is standard input.")
    ] = None,
    path: Annotated[str, typer.Option(help="The request's path.")] = "/v1/chat/completions",
    header: Annotated[list[str] | None, typer.Option(metavar="'NAME: VALUE'", help="Repeatable.")] = None,
    token: Annotated[
        str | None, typer.Option(envvar=f"{ENV_PREFIX}SERVER__DEBUG_TOKEN", help="For a server elsewhere.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The explanation in JSON.")] = False,
) -> None:
    """Says where a request would go, and why: each endpoint, each score. Exits 1 if it would be refused."""
    if (config_file is None) == (server is None):
        _fail("give either --config or --server")
    try:
        asked = explaining.question(path, header or (), _read(body))
        settled = None if config_file is None else _settings(config_file)
        installed = Plugins() if settled is None else _plugins(settled)
        _warn_of(installed)
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
        asking = (
            explaining.there(server or "", asked, token)
            if settled is None
            else explaining.here(settled, asked, installed.scorers)
        )
        answer = _run(asking)
    except (EndpointError, explaining.ServerError, OSError, ValueError) as error:
        _fail(str(error))
    if as_json:
        typer.echo(msgspec.json.format(answer.body, indent=2))
    else:
        explaining.show(answer, Console())
    raise typer.Exit(0 if answer.explanation is not None else 1)


def _read(path: Path | None) -> bytes:
    if path is None:
        return b""
    return sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()


@config.command("check")
def config_check(config_file: ConfigFile) -> None:
    """Validates a configuration; says what it means, or what is wrong with it."""
    settings = _settings(config_file)
    endpoints = _endpoints(settings)
    installed = _plugins(settings)
    _warn_of(installed)
    typer.echo(f"{config_file}: valid")
    typer.echo(f"  ext_proc {settings.server.listen}, admin {settings.server.admin}")
    typer.echo(f"  policy {settings.routing.policy}, accounting {settings.responses.accounting}")
    typer.echo(f"  Envoy fails {'open' if settings.fail_open else 'closed'} while this server is down")
    for plugin in installed.usable:
        typer.echo(f"  scorer {plugin.name} of {plugin.distribution}")
    for line in _tokens(settings):
        typer.echo(f"  {line}")
    for endpoint in endpoints:
        typer.echo(
            f"  endpoint {endpoint.name} {endpoint.address} {endpoint.engine}: {', '.join(endpoint.models)}"
        )


def _tokens(settings: Settings) -> Iterator[str]:
    """Who counts prompts, and which encodings are not to be had here."""
    mode, url = settings.tokens.mode, settings.tokens.url
    where = {"remote": f" by {url or 'the pods'}", "tiktoken": f" by {settings.tokens.encoding}"}
    yield f"prompts counted: {mode}{where.get(mode, '')}"
    for encoding, flaw in load_encodings(settings).flaws.items():
        yield f"encoding {encoding}: {flaw}; its prompts are estimated by their bytes"


@config.command("envoy")
def config_envoy(config_file: ConfigFile) -> None:
    """Prints a complete Envoy bootstrap that fits a configuration."""
    settings = _settings(config_file)
    typer.echo(bootstrap(bootstrap_options(settings, _endpoints(settings))), nl=False)


def bootstrap_options(settings: Settings, endpoints: tuple[Endpoint, ...]) -> BootstrapOptions:
    """What a bootstrap for these settings is made from."""
    return BootstrapOptions(
        listen=settings.envoy.listen,
        admin=settings.envoy.admin,
        servers=tuple(_reachable(each) for each in (settings.server.listen, *settings.envoy.servers)),
        endpoints=endpoints,
        fail_open=settings.fail_open,
        max_body_bytes=settings.server.max_body_bytes,
        tries=settings.routing.tries,
        message_timeout=settings.envoy.message_timeout_seconds,
        endpoints_file=settings.envoy.endpoints_file,
        watched=settings.discovery.static is None or settings.discovery.static.file is not None,
        server_tls=_server_tls(settings),
    )


def _server_tls(settings: Settings) -> ServerTls | None:
    tls, envoy = settings.server.tls, settings.envoy
    if tls is None:
        return None
    if envoy.server_ca_file is None:
        _fail("envoy.server_ca_file: Envoy needs it where server.tls is set, to know its servers")
    if tls.client_ca_file is not None and envoy.client_cert_file is None:
        _fail("envoy.client_cert_file: Envoy needs it where server.tls.client_ca_file is set")
    return ServerTls(
        ca_file=envoy.server_ca_file,
        name=envoy.server_name,
        cert_file=envoy.client_cert_file,
        key_file=envoy.client_key_file,
    )


@cli.command()
def healthcheck(
    config_file: ConfigFile,
    service: Annotated[str, typer.Option(help="liveness, or readiness, which the empty name is too.")] = "",
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds.")] = 2.0,
) -> None:
    """Asks the server of this configuration on this machine whether it is ready. Exits 0 or 1, for HEALTHCHECK."""
    try:
        settings = load_settings(config_file, policies=plugins.policies())
        status = _run(ask_health(settings, _reachable(settings.server.listen), service, timeout))
    except (SettingsError, NotAnswering) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None  # Docker keeps 2 for itself
    typer.echo(status)
    raise typer.Exit(0 if status == "SERVING" else 1)


def _reachable(address: str) -> str:
    """Where a server that listens everywhere is reached from the same machine."""
    host, _, port = address.rpartition(":")
    return f"127.0.0.1:{port}" if host in ("0.0.0.0", "[::]", "*") else address  # noqa: S104  compared, not bound


async def _serve(settings: Settings, installed: Plugins) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    path, scorers = settings.envoy.endpoints_file, installed.scorers
    app = (
        App(settings, scorers=scorers)
        if path is None
        else App(settings, scorers=scorers, on_snapshot=EndpointsFile(path).write)
    )
    await app.run(stop)


async def _engine(options: EngineOptions) -> None:
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    try:
        await run_engine(options)
    except asyncio.CancelledError:
        return


def _run(main_coroutine: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(main_coroutine)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    if sys.platform == "win32":
        return asyncio.new_event_loop
    import uvloop  # noqa: PLC0415  not there on Windows

    return uvloop.new_event_loop


def _settings(path: Path) -> Settings:
    try:
        return load_settings(path, policies=plugins.policies())
    except SettingsError as error:
        _fail(str(error))


def _plugins(settings: Settings) -> Plugins:
    try:
        return plugins.load(settings)
    except SettingsError as error:
        _fail(str(error))


def _warn_of(installed: Plugins) -> None:
    for plugin in installed.unusable:
        typer.echo(f"passed over: {plugin}", err=True)


def _log_plugins(installed: Plugins) -> None:
    log = structlog.get_logger()
    for plugin in installed.usable:
        log.info("scorer", name=plugin.name, distribution=plugin.distribution)
    for plugin in installed.unusable:
        log.warning("scorer_passed_over", text=str(plugin))


def _endpoints(settings: Settings) -> tuple[Endpoint, ...]:
    source = settings.discovery.static
    try:
        if source is not None and source.file is not None:
            engines = dialects(settings.engines.dialects).keys()
            return load_endpoint_file(source.file, engines=engines).endpoints
        return static_endpoints(settings)
    except (EndpointError, SettingsError) as error:
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(2)


def _log_as_json() -> None:
    """One JSON object a line on standard output, as log collectors expect it."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            # Without the local variables of the frames: a request's headers and body are among them.
            structlog.processors.ExceptionRenderer(
                structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
            ),
            sanitise,  # right before the renderer: what is no UTF-8 would lose the line
            structlog.processors.JSONRenderer(serializer=lambda line, **_: msgspec.json.encode(line)),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.BytesLoggerFactory(sys.stdout.buffer),
        cache_logger_on_first_use=True,
    )
