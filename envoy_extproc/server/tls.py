"""TLS on the ext_proc port: a certificate renewed on disk is used without a restart, and no stream notices.

gRPC asks before each handshake, on a thread of its own, which certificate it shall show. So the files are looked at when
somebody connects and not otherwise, and connections that are open keep what they were made with. Whoever renews the files
may replace one after the other, or swap the link to their directory as Kubernetes does: what does not fit together yet
is left alone, and looked at again with a later connection.
"""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import msgspec
import structlog

from envoy_extproc.settings import SettingsError, Tls

log = structlog.get_logger()

_LOOKS = 3
"""How often files that are replaced while they are read are looked at. A renewal is one move; three in one reading are none."""


class Files(msgspec.Struct, frozen=True):
    """What was read: PEM, each."""

    cert: bytes
    key: bytes
    client_ca: bytes | None = None

    def configuration(self) -> grpc.ServerCertificateConfiguration:
        """As gRPC takes it."""
        return grpc.ssl_server_certificate_configuration([(self.key, self.cert)], self.client_ca)


class Certificates:
    """The certificate of the port, and who may connect.

    Args:
        tls: where the files are.
        clock: monotonic seconds.

    Raises:
        SettingsError: a file cannot be used; the message names its key.
    """

    def __init__(self, tls: Tls, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._tls = tls
        self._clock = clock
        self._used = read(tls)
        self._looked = clock()
        self._complaint = ""
        self._looking = threading.Lock()

    def credentials(self) -> grpc.ServerCredentials:
        """For a port of a gRPC server."""
        return grpc.dynamic_ssl_server_credentials(
            self._used.configuration(),
            self.renewed,  # type: ignore[arg-type]  # None is documented; grpc-stubs do not know it
            require_client_authentication=self._tls.client_ca_file is not None,
        )

    def renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """What is new on disk; None where nothing is, or nothing that could be used. Any thread may ask."""
        if not self._looking.acquire(blocking=False):
            return None  # another handshake is reading
        try:
            return self._look() if self._clock() - self._looked >= self._tls.reload_seconds else None
        finally:
            self._looking.release()

    def _look(self) -> grpc.ServerCertificateConfiguration | None:
        self._looked = self._clock()
        try:
            found = read(self._tls)
        except SettingsError as error:
            self._complain(str(error))
            return None
        self._complaint = ""
        if found == self._used:
            return None
        self._used = found
        log.info("tls_renewed", cert_file=str(self._tls.cert_file))
        return found.configuration()

    def _complain(self, reason: str) -> None:
        """Once for each reason: connections are tried again and again."""
        if reason != self._complaint:
            self._complaint = reason
            log.warning("tls_unusable", reason=reason, kept="the certificate in use")


def read(tls: Tls) -> Files:
    """The files, which fit together. What was replaced in the middle says nothing of either version: it is read again.

    Raises:
        SettingsError: they do not, or one of them cannot be read; the message names its key.
    """
    for _ in range(_LOOKS - 1):
        before = _versions(tls)
        try:
            return _read(tls)
        except SettingsError:
            if _versions(tls) == before:
                raise
    return _read(tls)


def _versions(tls: Tls) -> list[tuple[int, ...] | None]:
    """Other ones when a file or a link on the way to it was replaced; None where there is no file."""
    paths = (tls.cert_file, tls.key_file, tls.client_ca_file)
    return [_version(path) for path in paths if path is not None]


def _version(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def _read(tls: Tls) -> Files:
    found = _contents(tls)
    _check(tls)
    if _contents(tls) != found:
        raise SettingsError("server.tls.cert_file: was replaced while it was read")
    return found


def _contents(tls: Tls) -> Files:
    ca = tls.client_ca_file
    return Files(
        content("server.tls.cert_file", tls.cert_file),
        content("server.tls.key_file", tls.key_file),
        None if ca is None else content("server.tls.client_ca_file", ca),
    )


def content(key: str, path: Path) -> bytes:
    """What is in the file that `key` of the configuration names.

    Raises:
        SettingsError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingsError(f"{key}: {path}: {error.strerror}") from None


def _check(tls: Tls) -> None:
    """By OpenSSL, which says what is wrong; gRPC would only say that the port cannot be had."""
    _check_certificates("server.tls.cert_file", tls.cert_file)
    if tls.client_ca_file is not None:
        _check_certificates("server.tls.client_ca_file", tls.client_ca_file)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(tls.cert_file, tls.key_file, _no_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise SettingsError(
                f"server.tls.key_file: {tls.key_file}: is not the key of {tls.cert_file}"
            ) from None
        raise SettingsError(f"server.tls.key_file: {tls.key_file}: no key in PEM{_because(error)}") from None
    except OSError as error:
        raise SettingsError(f"server.tls.key_file: {tls.key_file}: {error.strerror}") from None


def _check_certificates(key: str, path: Path) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except ssl.SSLError as error:
        raise SettingsError(f"{key}: {path}: no certificate in PEM{_because(error)}") from None
    except OSError as error:
        raise SettingsError(f"{key}: {path}: {error.strerror}") from None


def _because(error: ssl.SSLError) -> str:
    return f" ({error.reason})" if error.reason else ""


def _no_password() -> str:
    """OpenSSL would ask on the terminal."""
    return ""
