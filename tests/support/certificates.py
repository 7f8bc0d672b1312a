"""Certificates on disk as a cluster has them, from a CA of the test's own."""

from __future__ import annotations

import os
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import trustme

NAME = "envoy-extproc.gateway.svc"


class Secret:
    """A directory as Kubernetes mounts a secret: the files are links through `..data`, which is replaced as one move.

    Attributes:
        directory: where the files are.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._version = 0
        directory.mkdir(parents=True)

    @property
    def cert(self) -> Path:
        return self.directory / "tls.crt"

    @property
    def key(self) -> Path:
        return self.directory / "tls.key"

    @property
    def ca(self) -> Path:
        return self.directory / "ca.crt"

    def put(self, leaf: trustme.LeafCert, ca: trustme.CA) -> None:
        """Puts a certificate there, instead of the one before."""
        self.put_bytes(chain(leaf), leaf.private_key_pem.bytes(), ca.cert_pem.bytes())

    def put_bytes(self, cert: bytes, key: bytes, ca: bytes) -> None:
        """Likewise."""
        old = self.directory / f"..{self._version}"
        self._version += 1
        new = self.directory / f"..{self._version}"
        new.mkdir()
        for path, data in ((self.cert, cert), (self.key, key), (self.ca, ca)):
            (new / path.name).write_bytes(data)
            if not path.is_symlink():
                path.symlink_to(Path("..data", path.name))
        link = self.directory / "..data_tmp"
        link.symlink_to(new.name)
        os.replace(link, self.directory / "..data")  # noqa: PTH105  as the kubelet does it
        shutil.rmtree(old, ignore_errors=True)


def chain(leaf: trustme.LeafCert) -> bytes:
    """The certificate and what is between it and its CA."""
    return b"".join(each.bytes() for each in leaf.cert_chain_pems)


def expired(ca: trustme.CA, name: str = NAME) -> trustme.LeafCert:
    """A certificate of yesterday."""
    return ca.issue_cert(name, not_after=datetime.now(UTC) - timedelta(days=1))
