"""What all sessions of one listener share: the machinery they use, the settings they keep to, who they are."""

from __future__ import annotations

import secrets
import ssl
from collections.abc import Callable, Collection
from itertools import count
from typing import Protocol

from balancer.admission import Admission
from balancer.backend import Backend
from balancer.clients import plain_address
from balancer.config import Config
from balancer.explain import Incident, Incidents, Trail
from balancer.handshake import Handshaker
from balancer.http1 import HeadLimits, Known, RequestReader
from balancer.journal import Exchange, Journal
from balancer.metrics import Tally
from balancer.pool import Pool
from balancer.proxy_protocol import Address
from balancer.pump import Pumps
from balancer.reactor import Reactor, Timed
from balancer.sticky import Sticky
from balancer.stream import Stream
from balancer.upstream import Upstreams

# Seconds that a kept-alive connection without a request is left open when a stop begins: a request that is on its way
# is answered, with `Connection: close`, where a close at once would lose it.
DRAIN_GRACE = 0.25
MOST_READERS = 1024  # addresses whose last head is remembered


def own_end(stream: Stream) -> Address:
    """Our address on a client's connection."""
    host, port = stream.getsockname()[:2]
    return plain_address(host.partition("%")[0]), port


class Session(Timed, Protocol):
    """One client connection, as the listener sees it."""

    def start(self) -> None:
        """Take the connection over. It is not registered with the reactor."""

    def drain(self) -> None:
        """End after what is in hand; at once if nothing is."""

    def configured(self) -> None:
        """The settings are others from here on."""

    def backend_hung(self, backend: Backend) -> None:
        """A backend was taken out because it says nothing any more."""

    def kill(self) -> None:
        """End now, whatever is in hand."""


MakeSession = Callable[["Frontend", Stream, Address, int], Session]


class Frontend:
    """Shared by the sessions of one listener. `draining` makes each answer the last of its connection."""

    def __init__(
        self,
        config: Config,
        reactor: Reactor,
        pool: Pool,
        upstreams: Upstreams,
        pumps: Pumps,
        handshaker: Handshaker,
        journal: Journal,
        sessions: Collection[Session],
        on_closed: Callable[[Session], None],
    ) -> None:
        self.reactor = reactor
        self.pool = pool
        self.upstreams = upstreams
        self.pumps = pumps
        self.handshaker = handshaker
        self.tls_context: ssl.SSLContext | None = None  # None: clients speak in the clear
        self.redirects_to: bytes | None = None  # ":PORT" of https://, or nothing for 443: clients are sent there
        self.sticky: Sticky | None = None
        self.sticks: dict[str, Backend] = {}  # by the value of the cookie
        self.make_refusal: MakeSession | None = None  # a session for those who speak HTTP where TLS is due
        self._journal = journal
        self.sessions = sessions  # all of the listener's
        self.on_closed = on_closed
        self.tally = Tally()  # of what no backend had to do with
        self.incidents = Incidents()
        self.configure(config, Admission(config))
        self.authority = b""  # host:port as the listener has it, for clients that name no host
        self.draining = False
        self.drain_grace = DRAIN_GRACE
        self._id_prefix = secrets.token_hex(4)
        self._ids = count(1)

    def configure(self, config: Config, admission: Admission) -> None:
        """Go by these settings from the next request on, once the sessions were told to."""
        self.timeouts = config.timeouts
        self.limits = config.limits
        limits = config.limits
        self._head_limits = HeadLimits(limits.head_bytes, limits.request_line_bytes, limits.fields)
        self._known = Known()  # what lines say depends on the limits
        self._readers: dict[str, RequestReader] = {}  # by the client's address
        admission.begin()
        self.admission = admission
        self.proxied = admission.proxied
        self.forwarded = config.forwarded
        self.guarded = admission.looks_at_requests or self.redirects_to is not None
        self.hash_on = config.hash_on if config.algorithm == "hash" else ""
        self.keyed = bool(self.hash_on) or self.sticky is not None
        self.policy = config.algorithm
        self.slow = config.log.slow
        self.record: Callable[[Exchange], None] = self._journal.exchange

    def explain(self, record: Exchange, told: str, began: float, trail: Trail | None) -> None:
        """Keep what there is to say about an exchange that failed, was retried or was slow."""
        steps = tuple(trail.steps) if trail is not None else ()
        self.incidents.keep(Incident(record, self.policy, told, began, steps, self.pool.standings()))

    def reader(self, peer: str) -> RequestReader:
        """What reads the requests of all connections from this address, until the settings are others."""
        reader = self._readers.get(peer)
        if reader is None:
            if len(self._readers) >= MOST_READERS:
                self._readers.clear()
            reader = self._readers[peer] = RequestReader(
                peer.encode(),
                b"http" if self.tls_context is None else b"https",
                self.authority,
                self._head_limits,
                self._known,
                trusts=peer in self.admission.trusted,
                forwarded=self.forwarded,
            )
        return reader

    def request_id(self) -> str:
        """A name for one exchange, for the client and the log, unlike any other of this or another run."""
        return f"{self._id_prefix}-{next(self._ids):x}"
