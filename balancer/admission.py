"""Whether a client, and what it asks for, is let in: networks, rates, connections at once, size of bodies.

The client is the peer, or, where that is a trusted proxy, whom it names in X-Forwarded-For. Everything here is called
on the reactor's thread.
"""

from __future__ import annotations

import math

from balancer.clients import Access, Connections, Networks, Rates, client_of
from balancer.config import Config
from balancer.http1 import HttpError, Request


class Admission:
    """The rules of one configuration. `former` are those before it, whose counts go on where the rule is the same.

    It may be made on any thread, which takes a while where many networks are named; then `begin` makes it hold.
    """

    def __init__(self, config: Config, former: Admission | None = None) -> None:
        limits = config.limits
        self._config = config
        self.trusted: Networks
        self.proxied: Networks
        self._access: Access
        if former is not None and _networks(former._config) == _networks(config):
            self.trusted, self.proxied, self._access = former.trusted, former.proxied, former._access
        else:
            self.trusted, self.proxied = Networks(config.trusted_proxies), Networks(config.proxy_protocol_from)
            self._access = Access(Networks(config.allow), Networks(config.deny))
        self._is_open = not config.allow and not config.deny
        self._body_bytes = limits.body_bytes
        self._connections: Connections = former._connections if former else Connections(limits.client_connections)
        self._rate = limits.client_rate, limits.client_burst or max(1, math.ceil(limits.client_rate))
        self._rates: Rates | None = None
        if limits.client_rate:
            self._rates = former._rates if former and former._rate == self._rate else Rates(*self._rate)
        self.looks_at_requests = bool(self.trusted or not self._is_open or self._rates is not None or self._body_bytes)

    def begin(self) -> None:
        """From here on these rules hold."""
        self._connections.most = self._config.limits.client_connections

    def lets_in(self, peer: str) -> bool:
        """May this one connect? Whether a trusted proxy's client may ask is only known when it does."""
        return self._is_open or peer in self.trusted or self._access.permits(peer)

    def counts(self, peer: str) -> bool:
        """Are this one's connections counted? Proxies that are trusted may have any number."""
        return self._connections.most > 0 and peer not in self.trusted

    def connected(self, peer: str) -> bool:
        """Count a connection, unless the client has as many as it may."""
        return self._connections.open(peer)

    def disconnected(self, peer: str) -> None:
        """One that was counted has ended."""
        self._connections.close(peer)

    def client(self, peer: str, request: Request) -> str:
        """Who asks."""
        if not request.forwarded_for:
            return peer
        return client_of(peer, request.forwarded_for.decode("ascii", "replace"), self.trusted)

    def refusal(self, client: str, now: float) -> HttpError | None:
        """Why this client may not ask, or not now; None where it may, and then that is counted. `now` is monotonic."""
        if not self._is_open and not self._access.permits(client):
            return HttpError(403, "this address is not let in")
        if self._rates is not None and (wait := self._rates.take(client, now)):
            return HttpError(429, "too many requests from this address", f"Retry-After: {math.ceil(wait)}")
        return None

    def body_refusal(self, request: Request) -> HttpError | None:
        """Why this request is too large, as far as it says how large it is."""
        if 0 < self._body_bytes < request.length:
            return HttpError(413, f"a body may have at most {self._body_bytes} octets here")
        return None


def _networks(config: Config) -> tuple[tuple[str, ...], ...]:
    return config.trusted_proxies, config.proxy_protocol_from, config.allow, config.deny
