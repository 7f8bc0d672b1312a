"""TLS between a real Envoy and the server: both lanes, what is refused, and certificates that are renewed under load."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme
import yaml

from tests.e2e.test_failures import ALLOWED, DONE, FIRST, SECOND, USAGE, Scene
from tests.support.canned import canned
from tests.support.certificates import NAME, Secret, chain, expired
from tests.support.gateway import Gateway, eventually

WHOLE = FIRST + SECOND + DONE
PASSED_BY = FIRST + SECOND + USAGE + DONE
CA, OTHER_CA = trustme.CA(), trustme.CA()
REFUSED = "cluster.ext_proc.ssl.fail_verify_error"
_RECYCLED = 5  # requests on one connection, where a test wants many handshakes


class Files:
    """The server's secret and Envoy's."""

    def __init__(self, directory: Path) -> None:
        self.server = Secret(directory / "server-secret")
        self.envoy = Secret(directory / "envoy-secret")
        self.server.put(CA.issue_cert(NAME), CA)
        self.envoy.put(CA.issue_cert("envoy"), CA)

    def config(self, *, mutual: bool = False, **server_tls: Any) -> dict[str, dict[str, Any]]:
        tls = {"cert_file": str(self.server.cert), "key_file": str(self.server.key), **server_tls}
        envoy = {"server_ca_file": str(self.envoy.ca), "server_name": NAME}
        if mutual:
            tls["client_ca_file"] = str(self.server.ca)
            envoy |= {"client_cert_file": str(self.envoy.cert), "client_key_file": str(self.envoy.key)}
        return {"server": {"tls": tls}, "envoy": envoy}


@asynccontextmanager
async def scene(
    directory: Path, config: Mapping[str, Mapping[str, Any]], edit: Callable[[str], str] = str
) -> AsyncIterator[Scene]:
    async with (
        canned() as upstream,
        Gateway(directory, pods=[upstream.pod()], config=config, edit=edit) as gateway,
        aiohttp.ClientSession(gateway.url) as http,
    ):
        yield Scene(gateway, upstream, http)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.mark.parametrize("mutual", [False, True], ids=["tls", "mutual"])
@pytest.mark.parametrize("lane", ["native", "stream"])
async def test_requests_are_routed_and_reported(
    directory: Path, files: Files, lane: str, mutual: bool
) -> None:
    async with scene(directory, {"responses": {"accounting": lane}, **files.config(mutual=mutual)}) as at:
        for _ in range(3):
            status, headers, body, request_id = await at.ask()
            assert (status, body, headers["target-pod"]) == (200, WHOLE, "pod-canned")
            report = await at.gateway.report(request_id)
            assert (report["usage_source"], report["gen_ai.usage.output_tokens"]) == ("reported", 2)
        assert await at.gateway.envoy_stat("cluster.ext_proc.ssl.handshake") >= 1
        assert await at.gateway.envoy_stat(ALLOWED) == 0
        # Nobody reaches the port in the clear.
        reader, writer = await asyncio.open_connection("127.0.0.1", at.gateway.server_ports[0])
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        assert await asyncio.wait_for(reader.read(), 5) in (b"", b"\x15\x03\x01\x00\x02\x02\x46")
        writer.close()


async def refused(at: Scene, *, fail_open: bool) -> None:
    """What a client sees where Envoy and the server do not trust each other."""
    status, headers, body, _ = await at.ask()
    if fail_open:
        assert (status, body) == (200, PASSED_BY)
        assert await at.gateway.envoy_stat(ALLOWED) > 0
    else:
        assert (status, headers["retry-after"]) == (503, "1")
        assert json.loads(body)["error"]["code"] == "service_unavailable"
        assert await at.gateway.envoy_stat(ALLOWED) == 0
    assert "target-pod" not in headers
    assert at.gateway.reports() == []


@pytest.mark.parametrize("fail_open", [True, False], ids=["open", "closed"])
@pytest.mark.parametrize("wrong", ["ca", "name"])
async def test_envoy_refuses_a_server_it_does_not_know(
    directory: Path, files: Files, wrong: str, fail_open: bool
) -> None:
    issuer, name = (OTHER_CA, NAME) if wrong == "ca" else (CA, "somebody-else")
    files.server.put(issuer.issue_cert(name), issuer)
    config = files.config()
    config["envoy"]["fail_open"] = fail_open
    async with scene(directory, config) as at:
        await refused(at, fail_open=fail_open)
        stat = REFUSED if wrong == "ca" else "cluster.ext_proc.ssl.fail_verify_san"
        assert await at.gateway.envoy_stat(stat) > 0


@pytest.mark.parametrize("fail_open", [True, False], ids=["open", "closed"])
@pytest.mark.parametrize("wrong", ["ca", "none"])
async def test_the_server_refuses_an_envoy_it_does_not_know(
    directory: Path, files: Files, wrong: str, fail_open: bool
) -> None:
    if wrong == "ca":
        files.envoy.put(OTHER_CA.issue_cert("envoy"), CA)
    config = files.config(mutual=True)
    config["envoy"]["fail_open"] = fail_open
    edit = _without_certificate if wrong == "none" else str
    async with scene(directory, config, edit) as at:
        await refused(at, fail_open=fail_open)


def _clusters(bootstrap: str) -> tuple[Any, list[dict[str, Any]]]:
    """The bootstrap, and its clusters towards servers."""
    tree = yaml.safe_load(bootstrap)
    named = {each["name"]: each for each in tree["static_resources"]["clusters"]}
    return tree, [named["ext_proc"], named["access_log"]]


def _without_certificate(bootstrap: str) -> str:
    tree, clusters = _clusters(bootstrap)
    for cluster in clusters:
        del cluster["transport_socket"]["typed_config"]["common_tls_context"]["tls_certificates"]
    return yaml.safe_dump(tree)


def _with_short_connections(bootstrap: str) -> str:
    tree, clusters = _clusters(bootstrap)
    for cluster in clusters:
        (options,) = cluster["typed_extension_protocol_options"].values()
        options["common_http_protocol_options"] = {"max_requests_per_connection": _RECYCLED}
    return yaml.safe_dump(tree)


# -- renewal -----------------------------------------------------------------------------------------------------------


async def shown(gateway: Gateway) -> bytes:
    """The certificate that a new connection is shown, in DER."""
    address = ("127.0.0.1", gateway.server_ports[0])
    return ssl.PEM_cert_to_DER_cert(await asyncio.to_thread(ssl.get_server_certificate, address))


def der(leaf: trustme.LeafCert) -> bytes:
    return ssl.PEM_cert_to_DER_cert(leaf.cert_chain_pems[0].bytes().decode())


class Load:
    """Clients that ask one request after the other, and remember what went wrong."""

    def __init__(self, at: Scene, clients: int = 4) -> None:
        self.ids: list[str] = []
        self.wrong: list[tuple[int, Mapping[str, str], bytes]] = []
        self._at = at
        self._stop = False
        self._clients = [asyncio.ensure_future(self._client()) for _ in range(clients)]

    async def _client(self) -> None:
        while not self._stop:
            status, headers, body, request_id = await self._at.ask()
            self.ids.append(request_id)
            if (status, body, headers.get("target-pod")) != (200, WHOLE, "pod-canned"):
                self.wrong.append((status, headers, body))

    async def more(self, count: int = 40) -> None:
        """Waits for so many more requests."""
        until = len(self.ids) + count
        async with asyncio.timeout(30):
            while len(self.ids) < until:
                await asyncio.sleep(0.01)

    async def end(self) -> None:
        self._stop = True
        await asyncio.gather(*self._clients)


def said(gateway: Gateway) -> tuple[int, int]:
    """How often the server has told of a renewal, and of files that it cannot use."""
    events = Counter(line["event"] for line in gateway.log_lines())
    return events["tls_renewed"], events["tls_unusable"]


@pytest.mark.parametrize("mutual", [False, True], ids=["tls", "mutual"])
async def test_renewal_under_load_loses_nothing(directory: Path, files: Files, mutual: bool) -> None:
    config = files.config(mutual=mutual, reload_seconds=0.1)
    async with scene(directory, config, _with_short_connections) as at:
        resume = asyncio.Event()
        async with at.reading(await at.held(resume), stream=True) as reading:
            await reading.until(len(FIRST))
            load = Load(at)
            await load.more()
            for round_ in range(3):
                new = CA.issue_cert(NAME)
                # First the certificate alone, as somebody does it who copies files: it does not fit the key yet.
                old_key = files.server.key.read_bytes()
                files.server.put_bytes(chain(new), old_key, CA.cert_pem.bytes())
                await eventually(lambda: said(at.gateway) == (round_, round_ + 1), 30)  # noqa: B023  awaited here
                await load.more()
                files.server.put(new, CA)
                await eventually(lambda: said(at.gateway) == (round_ + 1, round_ + 1), 30)  # noqa: B023  likewise
                await load.more()
                assert await shown(at.gateway) == der(new)
            await load.end()
            resume.set()
            assert await reading.rest() == WHOLE  # on a connection that was there before all this
        assert load.wrong == []
        assert await at.gateway.envoy_stat("cluster.ext_proc.ssl.handshake") >= len(load.ids) / _RECYCLED
        assert await at.gateway.envoy_stat(ALLOWED) == 0
        await eventually(lambda: len(at.gateway.reports()) > len(load.ids), 30)
    # Envoy and the server have ended: nothing more can come.
    assert said(at.gateway) == (3, 3)  # a look in the middle of a swap is no complaint
    found = Counter(line["request_id"] for line in at.gateway.reports())
    assert found == Counter([*load.ids, reading.request_id])


@pytest.mark.parametrize("fail_open", [True, False], ids=["open", "closed"])
async def test_an_expired_certificate_is_refused_until_it_is_renewed(
    directory: Path, files: Files, fail_open: bool
) -> None:
    files.server.put(expired(CA), CA)
    config = files.config()
    config["envoy"]["fail_open"] = fail_open
    async with scene(directory, config) as at:
        await refused(at, fail_open=fail_open)
        assert await at.gateway.envoy_stat(REFUSED) > 0
        files.server.put(CA.issue_cert(NAME), CA)
        async with asyncio.timeout(10):
            while (answer := await at.ask())[1].get("target-pod") is None:
                await asyncio.sleep(0.1)
        assert (answer[0], answer[2]) == (200, WHOLE)
        assert (await at.gateway.report(answer[3]))["usage_source"] == "reported"


# -- Envoy's own files -------------------------------------------------------------------------------------------------

_SECRET = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"


def _with_secrets_from(directory: Path, secret: Secret) -> Callable[[str], str]:
    """The printed bootstrap with the certificate and the CA in a file of a secret each, as docs/operations.md has it."""
    watched = {"watched_directory": {"path": str(secret.directory)}}
    chain_and_key = {
        "certificate_chain": {"filename": str(secret.cert)},
        "private_key": {"filename": str(secret.key)},
    }
    own = _secret(directory, "own", tls_certificate={**chain_and_key, **watched})
    ca = _secret(directory, "ca", validation_context={"trusted_ca": {"filename": str(secret.ca)}, **watched})

    def edit(bootstrap: str) -> str:
        tree, clusters = _clusters(bootstrap)
        tree["node"] = {"id": "gateway", "cluster": "gateway"}
        for cluster in clusters:
            common = cluster["transport_socket"]["typed_config"]["common_tls_context"]
            del common["tls_certificates"]
            common["tls_certificate_sds_secret_configs"] = [own]
            names = common.pop("validation_context")["match_typed_subject_alt_names"]
            common["combined_validation_context"] = {
                "default_validation_context": {"match_typed_subject_alt_names": names},
                "validation_context_sds_secret_config": ca,
            }
        return yaml.safe_dump(tree)

    return edit


def _secret(directory: Path, name: str, **content: Any) -> dict[str, Any]:
    """Writes the file, in which Envoy takes one secret and no more; returns what refers to it."""
    path = directory / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"resources": [{"@type": _SECRET, "name": name, **content}]}))
    config = {"path_config_source": {"path": str(path)}, "resource_api_version": "V3"}
    return {"name": name, "sds_config": config}


@pytest.mark.parametrize("wrong", ["own", "ca"])
async def test_envoy_renews_its_files_too_where_it_watches_them(
    directory: Path, files: Files, wrong: str, tmp_path: Path
) -> None:
    if wrong == "own":
        files.envoy.put(expired(CA, "envoy"), CA)
    else:
        files.envoy.put(CA.issue_cert("envoy"), OTHER_CA)
    config = files.config(mutual=True)
    config["envoy"]["fail_open"] = False
    async with scene(directory, config, _with_secrets_from(tmp_path, files.envoy)) as at:
        await refused(at, fail_open=False)
        files.envoy.put(CA.issue_cert("envoy"), CA)
        async with asyncio.timeout(10):
            while (answer := await at.ask())[0] != 200:
                await asyncio.sleep(0.1)
        assert (answer[1]["target-pod"], answer[2]) == ("pod-canned", WHOLE)
