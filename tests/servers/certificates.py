"""Certificates for servers that tests start with TLS: an authority, what it has signed, and one that nobody trusts."""

from __future__ import annotations

import ssl
from pathlib import Path

import trustme

NAMES = ("localhost", "127.0.0.1")  # what the server's certificate is for


class Certificates:
    """Files in PEM form, in a folder of their own, as a server's configuration and a URL name them.

    `server` and `client` are certificate chains, `server_key` and `client_key` their keys; `authority` signed both.
    `stranger` is an authority that signed nothing: a client that trusts only it must refuse the server. `elsewhere`
    and `elsewhere_key` are a server's that is well signed, for another name.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        authority, stranger = trustme.CA(), trustme.CA()
        self.authority = folder / "authority.pem"
        self.stranger = folder / "stranger.pem"
        authority.cert_pem.write_to_path(str(self.authority))
        stranger.cert_pem.write_to_path(str(self.stranger))
        self.server, self.server_key = self._write(authority.issue_cert(*NAMES, common_name="localhost"), "server")
        self.client, self.client_key = self._write(authority.issue_cert("client@test.invalid"), "client")
        self.elsewhere, self.elsewhere_key = self._write(authority.issue_cert("elsewhere.test.invalid"), "elsewhere")

    def _write(self, made: trustme.LeafCert, name: str) -> tuple[Path, Path]:
        chain, key = self.folder / f"{name}.pem", self.folder / f"{name}-key.pem"
        chain.write_bytes(b"".join(part.bytes() for part in made.cert_chain_pems))
        key.touch(0o600)
        key.write_bytes(made.private_key_pem.bytes())
        return chain, key

    def server_context(self, *, ask_client: bool = False) -> ssl.SSLContext:
        """For a server in Python. With `ask_client` it takes only clients that the authority has signed."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(self.authority))
        context.load_cert_chain(self.server, self.server_key)
        context.verify_mode = ssl.CERT_REQUIRED if ask_client else ssl.CERT_NONE
        return context
