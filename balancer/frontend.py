"""What all sessions of one listener share: the machinery they use, the settings they keep to, who they are."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from itertools import count
from typing import Any, Protocol

from balancer.backend import Backend
from balancer.config import Config
from balancer.http1 import HeadLimits, KnownFields
from balancer.journal import Journal
from balancer.pool import Pool
from balancer.pump import Pumps
from balancer.reactor import Reactor, Timed
from balancer.upstream import Upstreams

# Seconds that a kept-alive connection without a request is left open when a stop begins: a request that is on its way
# is answered, with `Connection: close`, where a close at once would lose it.
DRAIN_GRACE = 0.25


class Session(Timed, Protocol):
    """One client connection, as the listener sees it."""

    def start(self) -> None:
        """Take the connection over. It is not registered with the reactor."""

    def drain(self) -> None:
        """End after what is in hand; at once if nothing is."""

    def backend_hung(self, backend: Backend) -> None:
        """A backend was taken out because it says nothing any more."""

    def kill(self) -> None:
        """End now, whatever is in hand."""


class Frontend:
    """Shared by the sessions of one listener. `draining` makes each answer the last of its connection."""

    def __init__(
        self,
        config: Config,
        reactor: Reactor,
        pool: Pool,
        upstreams: Upstreams,
        pumps: Pumps,
        journal: Journal,
        on_closed: Callable[[Session], None],
    ) -> None:
        self.reactor = reactor
        self.pool = pool
        self.upstreams = upstreams
        self.pumps = pumps
        self.timeouts = config.timeouts
        self.limits = config.limits
        self.head_limits = HeadLimits(
            config.limits.head_bytes, config.limits.request_line_bytes, config.limits.fields
        )
        self.known_fields: KnownFields = {}
        self.record: Callable[[tuple[Any, ...]], None] = journal.exchange
        self.on_closed = on_closed
        self.proto = b"http"
        self.authority = b""  # host:port as the listener has it, for clients that name no host
        self.draining = False
        self.drain_grace = DRAIN_GRACE
        self._id_prefix = secrets.token_hex(4)
        self._ids = count(1)

    def request_id(self) -> str:
        """A name for one exchange, for the client and the log, unlike any other of this or another run."""
        return f"{self._id_prefix}-{next(self._ids):x}"
