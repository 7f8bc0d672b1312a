"""Asks the Kubernetes API. Who we are, and where it is, is the business of the official client.

That client is an extra, and its import costs 20 MB: it is made only when it is needed. Of its own watch nothing is used: it
goes on after errors without a pause, takes 410 for a reason to ask the same again, and decodes each pod twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlencode

import aiohttp

from envoy_extproc.discovery.watch import ApiError, refusal
from envoy_extproc.settings import SettingsError

_CONNECT_SECONDS = 5.0
"""The API is in the cluster; its load balancer answers in milliseconds or not at all."""

_LONGEST_REFUSAL = 16_384  # bytes; a Status is a few hundred
_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_INSTALL = "discovery.kubernetes needs the Kubernetes client: pip install 'envoy-extproc[kubernetes]'"


def _client(module: str) -> Any:
    """A part of the official client.

    Raises:
        SettingsError: it is not installed.
    """
    try:
        return importlib.import_module(f"kubernetes.aio.{module}")
    except ImportError as error:
        raise SettingsError(f"{_INSTALL} ({error})") from None


class KubernetesApi:
    """One cluster.

    Args:
        kubeconfig: the file that says where it is and who we are; None inside a pod of that cluster.
        context: of that file; None for its current one.

    Attributes:
        namespace: our own: the pod's, or the context's.

    Raises:
        SettingsError: the client is not installed.
    """

    def __init__(self, kubeconfig: Path | None = None, context: str | None = None) -> None:
        self._kubeconfig = kubeconfig
        self._context = context
        self._configs = _client("config")
        self._clients = _client("client")
        self._session: _Session | None = None
        self._loading = asyncio.Lock()
        self.namespace = "default"

    async def __aenter__(self) -> Self:
        """Reads the configuration once.

        Raises:
            SettingsError: it cannot be used.
        """
        try:
            await self._current()
        except ApiError as error:
            raise SettingsError(f"discovery.kubernetes: {error}") from None
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.rest.close()
            self._session = None

    @contextlib.asynccontextmanager
    async def get(
        self, path: str, query: Mapping[str, str], *, silence: float
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """See `watch.Api`. After 401, or when certificates do not fit, the configuration is read again."""
        session = await self._current()
        async with session.used():
            try:
                response = await self._ask(session, path, query, silence)
                try:
                    if response.status != 200:
                        raise await _refused(response)
                    yield response.content.iter_any()
                finally:
                    response.close()  # what is left of it is not wanted, and a watch has no end
            except (aiohttp.ClientSSLError, aiohttp.ServerFingerprintMismatch) as error:
                self._forget(session)
                raise ApiError("unreachable", f"TLS: {error}") from None
            except TimeoutError as error:
                raise ApiError("timeout", str(error) or f"not a byte for {silence:g} seconds") from None
            except aiohttp.ClientConnectorError as error:
                raise ApiError("unreachable", str(error)) from None
            except (aiohttp.ClientError, OSError) as error:
                raise ApiError("cut", f"{type(error).__name__}: {error}") from None
            except ApiError as error:
                if error.kind == "401":
                    self._forget(session)
                raise

    async def _ask(
        self, session: _Session, path: str, query: Mapping[str, str], silence: float
    ) -> aiohttp.ClientResponse:
        headers = {"accept": "application/json", **await self._authorization(session)}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=silence)
        url = f"{session.configuration.host}{path}?{urlencode(query)}"
        answer = await session.rest.request("GET", url, headers=headers, _request_timeout=timeout)
        response: aiohttp.ClientResponse = answer.response
        return response

    async def _authorization(self, session: _Session) -> dict[str, str]:
        """A service account's token is read again by the client once a minute: it is renewed under our hands."""
        try:
            settings = await session.configuration.auth_settings()
        except (self._configs.ConfigException, OSError) as error:
            raise ApiError("config", str(error)) from None
        return {each["key"]: each["value"].strip() for each in settings.values() if each["value"]}

    async def _current(self) -> _Session:
        async with self._loading:
            if self._session is None:
                configuration = self._clients.Configuration()
                try:
                    await self._fill(configuration)
                    rest = self._clients.ApiClient(configuration).rest_client
                # Whatever is wrong in files that others write: a kubeconfig has many shapes.
                except Exception as error:  # noqa: BLE001  each is the same to us, and is told
                    raise ApiError("config", f"{type(error).__name__}: {error}") from None
                self._session = _Session(configuration, rest)
            return self._session

    async def _fill(self, configuration: Any) -> None:
        if self._kubeconfig is None:
            self._configs.load_incluster_config(client_configuration=configuration)
            with contextlib.suppress(OSError):
                text = await asyncio.to_thread(_NAMESPACE_FILE.read_text, "utf-8")
                self.namespace = text.strip() or self.namespace
            return
        loader = await self._configs.load_kube_config(
            config_file=str(self._kubeconfig.expanduser()),
            context=self._context,
            client_configuration=configuration,
            persist_config=False,
        )
        self.namespace = loader.current_context["context"].get("namespace") or self.namespace

    def _forget(self, session: _Session) -> None:
        """The next request begins with a fresh configuration."""
        session.retired = True
        if self._session is session:
            self._session = None


class _Session:
    """Connections by one reading of the configuration.

    Attributes:
        retired: it is not used again, and closed behind the last answer under way: that may be another watch's.
    """

    def __init__(self, configuration: Any, rest: Any) -> None:
        self.configuration = configuration
        self.rest = rest
        self.retired = False
        self._users = 0

    @contextlib.asynccontextmanager
    async def used(self) -> AsyncIterator[None]:
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if self.retired and not self._users:
                await self.rest.close()


async def _refused(response: aiohttp.ClientResponse) -> ApiError:
    body = await response.content.read(_LONGEST_REFUSAL)
    wait = response.headers.get("retry-after", "")
    return refusal(response.status, body, retry_after=float(wait) if wait.isdecimal() else 0.0)
