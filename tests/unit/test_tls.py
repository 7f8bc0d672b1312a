"""TLS: the files, what is wrong with them, when they are read again, what Envoy is told, and the container's check."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path, PosixPath
from typing import Any

import grpc
import pytest
import structlog
import trustme
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from typer import Exit

from envoy_extproc.cli import bootstrap_options
from envoy_extproc.envoy.bootstrap import as_dict
from envoy_extproc.scheduling.registry import POLICIES
from envoy_extproc.server.app import App
from envoy_extproc.server.tls import Certificates, read
from envoy_extproc.settings import Settings, SettingsError, Tls, parse
from tests.support.certificates import NAME, Secret, chain

POD = {"name": "a", "address": "127.0.0.1:1", "models": ["m"]}
CA, OTHER_CA = trustme.CA(), trustme.CA()
LEAF, OTHER = CA.issue_cert(NAME, "127.0.0.1"), CA.issue_cert("other")
KEY = LEAF.private_key_pem.bytes()


@pytest.fixture
def secret(tmp_path: Path) -> Secret:
    made = Secret(tmp_path / "secret")
    made.put(LEAF, CA)
    return made


def tls_of(secret: Secret, *, mutual: bool = False, reload_seconds: float = 0) -> Tls:
    return Tls(
        cert_file=secret.cert,
        key_file=secret.key,
        client_ca_file=secret.ca if mutual else None,
        reload_seconds=reload_seconds,
    )


def settings_of(tls: dict[str, Any], *, listen: str = "127.0.0.1:0", **envoy: Any) -> Settings:
    server = {"listen": listen, "admin": "127.0.0.1:0", "tls": tls}
    data = {"discovery": {"static": {"endpoints": [POD]}}, "server": server, "envoy": envoy}
    return parse(data, policies=POLICIES)


# -- files that cannot be used -----------------------------------------------------------------------------------------


def test_files_that_fit(secret: Secret) -> None:
    files = read(tls_of(secret, mutual=True))
    assert (files.cert, files.key, files.client_ca) == (chain(LEAF), KEY, CA.cert_pem.bytes())
    assert read(tls_of(secret)).client_ca is None


JUNK = b"junk\n"
TORN = chain(LEAF)[: len(chain(LEAF)) // 2]
WRONG: dict[str, tuple[str, bytes | None, str, str]] = {
    "no-cert": ("cert", None, "server.tls.cert_file", "No such file or directory"),
    "no-key": ("key", None, "server.tls.key_file", "No such file or directory"),
    "no-ca": ("ca", None, "server.tls.client_ca_file", "No such file or directory"),
    "cert-of-junk": ("cert", JUNK, "server.tls.cert_file", "no certificate in PEM"),
    "cert-torn": ("cert", TORN, "server.tls.cert_file", "no certificate in PEM"),
    "cert-is-a-key": ("cert", KEY, "server.tls.cert_file", "no certificate in PEM"),
    "key-of-junk": ("key", JUNK, "server.tls.key_file", "no key in PEM"),
    "key-of-another": ("key", OTHER.private_key_pem.bytes(), "server.tls.key_file", "is not the key of"),
    "ca-empty": ("ca", b"", "server.tls.client_ca_file", "no certificate in PEM"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_named_by_its_key(secret: Secret, case: str) -> None:
    name, data, key, reason = WRONG[case]
    path: Path = getattr(secret, name)
    path.unlink()
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(SettingsError, match=f"^{key}: {path}: {reason}"):
        read(tls_of(secret, mutual=True))


def test_an_encrypted_key_asks_nobody(secret: Secret, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization as as_  # noqa: PLC0415  of this test alone

    encrypted = as_.load_pem_private_key(KEY, None).private_bytes(
        as_.Encoding.PEM, as_.PrivateFormat.PKCS8, as_.BestAvailableEncryption(b"word")
    )
    path = tmp_path / "encrypted.key"
    path.write_bytes(encrypted)
    with pytest.raises(SettingsError, match=r"^server\.tls\.key_file: .*: no key in PEM"):
        read(Tls(cert_file=secret.cert, key_file=path))


def test_serve_ends_at_once_and_says_which_key(secret: Secret, tmp_path: Path) -> None:
    path = tmp_path / "gateway.yaml"
    secret.key.unlink()
    path.write_text(yaml.safe_dump(document(secret)))
    done = run("serve", path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"server.tls.key_file: {secret.key}: No such file or directory\n"


def document(secret: Secret, *, port: int = 1, **envoy: Any) -> dict[str, Any]:
    server = {
        "listen": f"0.0.0.0:{port}",
        "admin": "127.0.0.1:0",
        "tls": {"cert_file": str(secret.cert), "key_file": str(secret.key)},
    }
    return {"discovery": {"static": {"endpoints": [POD]}}, "server": server, "envoy": envoy}


def run(command: str, path: Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "envoy_extproc", command, "-c", str(path)]
    return subprocess.run(line, capture_output=True, text=True, timeout=30, check=False)


# -- renewal -----------------------------------------------------------------------------------------------------------


def test_unchanged_files_are_nothing_new(secret: Secret) -> None:
    certificates = Certificates(tls_of(secret))
    secret.put(LEAF, CA)  # the same bytes at another inode
    assert certificates.renewed() is None


def test_a_renewed_file_is_told_once(secret: Secret) -> None:
    certificates = Certificates(tls_of(secret))
    secret.put(OTHER, CA)
    with structlog.testing.capture_logs() as lines:
        assert certificates.renewed() is not None
        assert certificates.renewed() is None
    assert [line["event"] for line in lines] == ["tls_renewed"]


def test_a_client_ca_is_renewed_too(secret: Secret) -> None:
    certificates = Certificates(tls_of(secret, mutual=True))
    secret.put_bytes(chain(LEAF), KEY, CA.cert_pem.bytes() + OTHER_CA.cert_pem.bytes())
    assert certificates.renewed() is not None


def test_files_are_not_looked_at_more_often_than_wanted(secret: Secret) -> None:
    now = 100.0
    certificates = Certificates(tls_of(secret, reload_seconds=1), clock=lambda: now)
    secret.put(OTHER, CA)
    assert certificates.renewed() is None
    now = 100.9
    assert certificates.renewed() is None
    now = 101.0
    assert certificates.renewed() is not None
    secret.put(LEAF, CA)
    now = 101.5
    assert certificates.renewed() is None


def test_bad_files_keep_the_old_ones_and_are_said_once(secret: Secret) -> None:
    certificates = Certificates(tls_of(secret))
    with structlog.testing.capture_logs() as lines:
        secret.put_bytes(chain(OTHER), KEY, b"")  # the key is still the old one
        assert [certificates.renewed() for _ in range(3)] == [None] * 3
        secret.put_bytes(JUNK, KEY, b"")
        assert [certificates.renewed() for _ in range(3)] == [None] * 3
        secret.put(OTHER, CA)
        assert certificates.renewed() is not None
        secret.put_bytes(JUNK, KEY, b"")  # again, after a good one: said again
        assert certificates.renewed() is None
    said = [(line["event"], line.get("reason", "").partition(":")[0]) for line in lines]
    assert said == [
        ("tls_unusable", "server.tls.key_file"),
        ("tls_unusable", "server.tls.cert_file"),
        ("tls_renewed", ""),
        ("tls_unusable", "server.tls.cert_file"),
    ]


class Moving(PosixPath):
    """A file of a secret that is replaced right after each of its first readings, so many as there are `steps`."""

    steps: Iterator[Callable[[], None]] = iter(())

    def read_bytes(self) -> bytes:
        found = super().read_bytes()
        next(self.steps, lambda: None)()
        return found


def moving(secret: Secret, name: str, *leaves: trustme.LeafCert) -> Tls:
    """Where `name` is read, the next of `leaves` takes the place of the one that is there."""
    path = Moving(getattr(secret, name))
    path.steps = iter([partial(secret.put, leaf, CA) for leaf in leaves])
    tls = tls_of(secret)
    return Tls.model_construct(**{**dict(tls), f"{name}_file": path})


@pytest.mark.parametrize("name", ["cert", "key"])
def test_a_pair_that_is_replaced_while_it_is_read_is_the_new_one(secret: Secret, name: str) -> None:
    files = read(moving(secret, name, OTHER))
    assert (files.cert, files.key) == (chain(OTHER), OTHER.private_key_pem.bytes())


def test_a_renewal_in_the_middle_of_a_reading_is_no_complaint(secret: Secret) -> None:
    certificates = Certificates(moving(secret, "cert"))
    secret.put(OTHER, CA)
    certificates._tls = moving(secret, "cert", CA.issue_cert("third"))
    with structlog.testing.capture_logs() as lines:
        assert certificates.renewed() is not None
        assert certificates.renewed() is None
    assert [line["event"] for line in lines] == ["tls_renewed"]


def test_files_that_never_stand_still_are_said_so(secret: Secret) -> None:
    leaves = [LEAF, OTHER] * 5
    with pytest.raises(SettingsError, match=r"^server\.tls\.cert_file: was replaced while it was read$"):
        read(moving(secret, "cert", *leaves))


def test_a_second_handshake_does_not_wait_for_the_first_to_read(secret: Secret) -> None:
    inner: list[object] = []

    def clock() -> float:
        if made:
            inner.append(made[0].renewed())  # asked while the first one holds the files
        return 0.0

    made: list[Certificates] = []
    certificates = Certificates(tls_of(secret), clock=clock)
    secret.put(OTHER, CA)
    made.append(certificates)
    assert certificates.renewed() is not None
    assert set(inner) == {None}


# -- a server ----------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[App]:
    app, stop = App(settings), asyncio.Event()
    running = asyncio.ensure_future(app.run(stop))
    try:
        async with asyncio.timeout(10):
            while not app._health.ready:
                assert not running.done() or running.result()
                await asyncio.sleep(0.01)
        yield app
    finally:
        stop.set()
        await running


async def asked(app: App, client: trustme.LeafCert | None = None, name: str = NAME) -> int | str:
    """The health, or why there is no connection."""
    own = (None, None) if client is None else (client.private_key_pem.bytes(), chain(client))
    credentials = grpc.ssl_channel_credentials(CA.cert_pem.bytes(), *own)
    options = [("grpc.ssl_target_name_override", name), ("grpc.use_local_subchannel_pool", 1)]
    address = f"127.0.0.1:{app.ext_proc_port}"
    async with grpc.aio.secure_channel(address, credentials, options) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            return int((await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)).status)
        except grpc.aio.AioRpcError as error:
            return error.code().name


def dumped(tls: Tls) -> dict[str, Any]:
    return tls.model_dump(mode="json")


async def test_a_connection_shows_what_is_on_disk_and_an_old_one_goes_on(secret: Secret) -> None:
    async with serving(settings_of(dumped(tls_of(secret)))) as app:
        credentials = grpc.ssl_channel_credentials(CA.cert_pem.bytes())
        async with grpc.aio.secure_channel(f"127.0.0.1:{app.ext_proc_port}", credentials) as old:
            stub = health_pb2_grpc.HealthStub(old)
            assert (await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)).status == 1
            secret.put(OTHER, CA)
            assert (await asked(app), await asked(app, name="other")) == ("UNAVAILABLE", 1)
            secret.put_bytes(JUNK, KEY, JUNK)
            assert await asked(app, name="other") == 1
            assert (await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)).status == 1


async def test_clients_need_a_certificate_of_their_ca(secret: Secret) -> None:
    async with serving(settings_of(dumped(tls_of(secret, mutual=True)))) as app:
        assert await asked(app) == "UNAVAILABLE"
        assert await asked(app, OTHER_CA.issue_cert("envoy")) == "UNAVAILABLE"
        assert await asked(app, CA.issue_cert("envoy")) == 1


# -- what Envoy is told ------------------------------------------------------------------------------------------------


def clusters_of(settings: Settings) -> dict[str, dict[str, Any]]:
    return {
        each["name"]: each
        for each in as_dict(bootstrap_options(settings, ()))["static_resources"]["clusters"]
    }


FILES = {"cert_file": "c", "key_file": "k"}


def context_of(settings: Settings) -> dict[str, Any]:
    clusters = clusters_of(settings)
    assert "transport_socket" not in clusters["pods"]
    assert clusters["access_log"]["transport_socket"] == clusters["ext_proc"]["transport_socket"]
    context: dict[str, Any] = clusters["ext_proc"]["transport_socket"]["typed_config"]
    return context


def test_envoy_asks_by_name() -> None:
    context = context_of(settings_of(FILES, server_ca_file="/ca.pem", server_name=NAME))
    common = context["common_tls_context"]
    assert (context["sni"], common["alpn_protocols"]) == (NAME, ["h2"])
    assert common["validation_context"] == {
        "trusted_ca": {"filename": "/ca.pem"},
        "match_typed_subject_alt_names": [{"san_type": "DNS", "matcher": {"exact": NAME}}],
    }
    assert "tls_certificates" not in common


@pytest.mark.parametrize(
    ("listen", "servers", "kind", "hosts"),
    [
        ("extproc:9002", ["extproc:9003"], "DNS", ["extproc"]),
        ("0.0.0.0:9002", [], "IP_ADDRESS", ["127.0.0.1"]),
        ("[fd00::1]:9002", [], "IP_ADDRESS", ["fd00::1"]),
        ("a.svc:9002", ["b.svc:9002"], "DNS", ["a.svc", "b.svc"]),
    ],
)
def test_without_a_name_the_hosts_are_the_names(
    listen: str, servers: list[str], kind: str, hosts: list[str]
) -> None:
    context = context_of(settings_of(FILES, listen=listen, server_ca_file="/ca.pem", servers=servers))
    names = context["common_tls_context"]["validation_context"]["match_typed_subject_alt_names"]
    assert names == [{"san_type": kind, "matcher": {"exact": host}} for host in hosts]
    assert context.get("sni") == (hosts[0] if kind == "DNS" else None)


def test_envoys_own_certificate() -> None:
    files = {**FILES, "client_ca_file": "x"}
    settings = settings_of(files, server_ca_file="/ca", client_cert_file="/c", client_key_file="/k")
    (own,) = context_of(settings)["common_tls_context"]["tls_certificates"]
    assert own == {"certificate_chain": {"filename": "/c"}, "private_key": {"filename": "/k"}}


@pytest.mark.parametrize(
    ("tls", "envoy", "key"),
    [
        (FILES, {}, "envoy.server_ca_file"),
        ({**FILES, "client_ca_file": "x"}, {"server_ca_file": "y"}, "envoy.client_cert_file"),
    ],
)
def test_what_envoy_needs_must_be_there(
    tls: dict[str, Any], envoy: dict[str, Any], key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Exit):
        bootstrap_options(settings_of(tls, **envoy), ())
    assert capsys.readouterr().err.startswith(f"{key}: ")


@pytest.mark.parametrize(
    ("server", "envoy", "key"),
    [
        ({"tls": {}}, {}, "server.tls.cert_file"),
        ({"tls": {"cert_file": "c"}}, {}, "server.tls.key_file"),
        ({"tls": {**FILES, "nope": 1}}, {}, "server.tls.nope"),
        ({}, {"client_cert_file": "c"}, "envoy"),
        ({}, {"client_key_file": "k"}, "envoy"),
    ],
)
def test_settings_that_are_refused(server: dict[str, Any], envoy: dict[str, Any], key: str) -> None:
    data = {"discovery": {"static": {"endpoints": [POD]}}, "server": server, "envoy": envoy}
    with pytest.raises(SettingsError, match=f"^configuration: {key}: "):
        parse(data, policies=POLICIES)


# -- the container's check ---------------------------------------------------------------------------------------------


async def check(path: Path, data: dict[str, Any], *options: str) -> tuple[int | None, str, str]:
    await asyncio.to_thread(path.write_text, yaml.safe_dump(data))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "envoy_extproc", "healthcheck", "-c", str(path), *options),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


@pytest.mark.parametrize("how", ["plain", "tls", "envoys-files", "mutual", "mutual-envoys-files"])
async def test_healthcheck_of_a_server(secret: Secret, tmp_path: Path, how: str) -> None:
    envoy: dict[str, Any] = {"server_name": NAME}
    if "envoys" in how:
        own = Secret(tmp_path / "envoy")
        own.put(CA.issue_cert("envoy"), CA)
        envoy |= {key: str(path) for key, path in envoys(own).items()}
    tls = None if how == "plain" else dumped(tls_of(secret, mutual="mutual" in how))
    data = document(secret, **envoy)
    data["server"] |= {"listen": "127.0.0.1:0", "tls": tls}
    async with serving(parse(data, policies=POLICIES)) as app:
        data["server"]["listen"] = f"0.0.0.0:{app.ext_proc_port}"
        path = tmp_path / "gateway.yaml"
        assert await check(path, data) == (0, "SERVING\n", "")
        assert await check(path, data, "--service", "liveness") == (0, "SERVING\n", "")
        await app._health.set_ready(False)
        assert await check(path, data) == (1, "NOT_SERVING\n", "")
        code, out, err = await check(path, data, "--service", "nobody")
        assert (code, out) == (1, "")
        assert "NOT_FOUND" in err


def envoys(own: Secret) -> dict[str, Path]:
    return {"server_ca_file": own.ca, "client_cert_file": own.cert, "client_key_file": own.key}


UNWELL: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "nobody": (
        lambda data: data["server"].update(listen="127.0.0.1:1", tls=None),
        "127.0.0.1:1: UNAVAILABLE",
    ),
    "bad-key": (lambda data: data.update(sever={}), "unknown key"),
    "no-file": (
        lambda data: data["server"]["tls"].update(cert_file="/nowhere"),
        "server.tls.cert_file: /nowhere",
    ),
}


@pytest.mark.parametrize("case", UNWELL)
async def test_healthcheck_without_an_answer(secret: Secret, tmp_path: Path, case: str) -> None:
    edit, reason = UNWELL[case]
    data = document(secret)
    edit(data)
    code, out, err = await check(tmp_path / "gateway.yaml", data, "--timeout", "0.5")
    assert (code, out) == (1, "")
    assert reason in err
    assert len(err.splitlines()) == 1


async def test_healthcheck_of_a_server_that_hangs(secret: Secret, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connects, and says nothing
        data = document(secret, port=silent.getsockname()[1])
        data["server"]["tls"] = None
        code, _, err = await check(tmp_path / "gateway.yaml", data, "--timeout", "0.5")
    assert code == 1
    assert "DEADLINE_EXCEEDED" in err


class Patience(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # grpc_health ships no types
    """Serves, and keeps how many seconds it was given."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    async def Check(  # noqa: N802  as gRPC names it
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> health_pb2.HealthCheckResponse:
        self.seconds.append(context.time_remaining())
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)


async def test_healthcheck_waits_as_long_as_it_is_told(secret: Secret, tmp_path: Path) -> None:
    server, patience = grpc.aio.server(), Patience()
    health_pb2_grpc.add_HealthServicer_to_server(patience, server)
    data = document(secret, port=server.add_insecure_port("127.0.0.1:0"))
    data["server"]["tls"] = None
    await server.start()
    assert await check(tmp_path / "gateway.yaml", data, "--timeout", "36000") == (0, "SERVING\n", "")
    await server.stop(None)
    assert [round(seconds / 3600) for seconds in patience.seconds] == [10]


@pytest.mark.skipif(os.getuid() == 0, reason="root reads everything")
def test_a_key_that_may_not_be_read(secret: Secret) -> None:
    secret.key.resolve().chmod(stat.S_IWUSR)
    with pytest.raises(SettingsError, match=r"^server\.tls\.key_file: .*: Permission denied"):
        read(tls_of(secret))
