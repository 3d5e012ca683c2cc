"""What a configuration has in files of their own: certificates and keys, authorities, the secret of a cookie.

All of it is read before anything is changed, so that a file that is not right leaves a running balancer as it is. What
did not change is taken over, which keeps the tickets of clients that were here before.
"""

from __future__ import annotations

import os
import secrets
import ssl
import time
from collections.abc import Sequence

from balancer.certificates import BadCertificate, Certificates, backend_context, state
from balancer.config import BackendTls, Config, ConfigError, Server
from balancer.sticky import Sticky

LONGEST_SECRET = 4096  # octets

Signature = tuple[tuple[int, ...], ...]


class Keys:
    """Of one configuration. Raises ConfigError, which names the file and the mend."""

    def __init__(self, config: Config, former: Keys | None = None) -> None:
        self._config = config
        settings = {server.tls for server in config.servers if server.tls is not None}
        self._files = [tls.ca for tls in settings if tls.ca]
        if config.sticky and config.sticky.secret_file:
            self._files.append(config.sticky.secret_file)
        self._state = state(self._files)
        self.certificates: Certificates | None = None
        if former is not None and former._config.tls == config.tls and not former._certificates_changed():
            self.certificates = former.certificates
        elif config.tls is not None:
            try:
                self.certificates = Certificates(config.tls, http=config.mode == "http")
            except BadCertificate as error:
                raise ConfigError(f"{config.source}: tls: {error}") from None
        self._made_up: bytes = former._made_up if former is not None else secrets.token_bytes(32)
        self.sticky = self._make_sticky()
        same = former is not None and former._state == self._state
        self._contexts = {tls: self._make_context(tls, former if same else None) for tls in settings}

    @property
    def context(self) -> ssl.SSLContext | None:
        """For connections of clients; None where they speak in the clear."""
        return self.certificates.context if self.certificates else None

    @property
    def warnings(self) -> Sequence[str]:
        """Lines for people about what works, and perhaps should not."""
        ending = self.certificates.expiring(time.time()) if self.certificates else []
        unverified = [server for server in self._config.servers if server.tls and not server.tls.verify]
        return [
            *(self.certificates.warnings if self.certificates else ()),
            *(
                f"{expiry.file}: the certificate of {', '.join(expiry.names)} ends on "
                f"{time.strftime('%Y-%m-%d', time.gmtime(expiry.at))}; have it renewed"
                for expiry in ending
            ),
            *(
                f"backend {server.id} {server.address}: its certificate is NOT verified (tls.verify is false): whoever "
                "can come between may read and change everything"
                for server in unverified
            ),
        ]

    def backend_context(self, server: Server) -> ssl.SSLContext | None:
        """For connections to this backend; None where they are in the clear."""
        return self._contexts[server.tls] if server.tls else None

    def state(self) -> Signature:
        """Something else whenever one of the files is another."""
        pairs = self._config.tls.certificates if self._config.tls else ()
        return state([*self._files, *(file for pair in pairs for file in (pair.cert, pair.key))])

    def _certificates_changed(self) -> bool:
        return self.certificates is not None and self.certificates.changed()

    def _make_sticky(self) -> Sticky | None:
        settings = self._config.sticky
        if settings is None:
            return None
        place = f"{self._config.source}: sticky"
        secret = self._made_up
        if settings.secret_file:
            try:
                with open(settings.secret_file, "rb", opener=_without_waiting) as file:
                    secret = file.read(LONGEST_SECRET).strip()
            except OSError as error:
                raise ConfigError(f"{place}.secret_file: {settings.secret_file}: {error.strerror}") from None
        try:
            return Sticky(settings.cookie, secret, secure=self._config.tls is not None)
        except ValueError as error:
            raise ConfigError(f"{place}: {error}") from None

    def _make_context(self, tls: BackendTls, former: Keys | None) -> ssl.SSLContext:
        if former is not None and tls in former._contexts:
            return former._contexts[tls]
        try:
            return backend_context(tls, http=self._config.mode == "http")
        except BadCertificate as error:
            raise ConfigError(f"{self._config.source}: servers[].tls.ca: {error}") from None


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe would keep us waiting for its writer
