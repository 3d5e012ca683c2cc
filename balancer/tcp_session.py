"""One client connection in TCP mode: a backend, a connection to it, a tunnel, a line in the log.

Nothing is read before the backend is connected, and nothing is parsed. With no backend to be had the client's
connection is closed.
"""

from __future__ import annotations

import time

from balancer.backend import Backend
from balancer.config import format_address
from balancer.explain import Trail
from balancer.frontend import Frontend, own_end
from balancer.proxy_protocol import Address
from balancer.reactor import NEVER
from balancer.stream import Stream
from balancer.tunnel import Tunnel
from balancer.upstream import NONE_AVAILABLE, Attempt, Upstream


class TcpSession:
    """Accepted by the listener, and closed here."""

    __slots__ = (
        "_began",
        "_client",
        "_connected_after",
        "_counted",
        "_finished",
        "_front",
        "_number",
        "_sock",
        "_source",
        "_tunnel",
        "_upstream",
        "attempt",
        "deadline",
        "key",
        "refusal",
        "trail",
        "tried",
        "wanted",
    )

    def __init__(self, front: Frontend, sock: Stream, address: tuple[str, int], number: int) -> None:
        self._front = front
        self._sock = sock
        self._number = number
        self._began = front.reactor.now
        self._upstream: Upstream | None = None
        self._tunnel: Tunnel | None = None
        self._finished = False
        self._connected_after = -1.0
        self.key = address[0]
        self._source = address
        self.wanted: Backend | None = None
        self._counted = False  # among the connections of its client
        self._client = format_address(address[0], address[1])
        self.tried: list[Backend] = []
        self.refusal = NONE_AVAILABLE
        self.attempt: Attempt | None = None
        self.trail: Trail | None = None
        self.deadline = NEVER

    def start(self) -> None:
        self._front.reactor.timed.add(self)
        if refusal := self._refusal():
            self._finish("PR", refusal)
            return
        upstream = self._front.upstreams.obtain(self)
        if upstream is not None:
            self.connected(upstream)

    def _refusal(self) -> str:
        """Why this connection is not to be, "" where it may."""
        admission = self._front.admission
        if admission.counts(self.key):
            self._counted = admission.connected(self.key)
            if not self._counted:
                return "too many connections from this address"
        refusal = admission.refusal(self.key, time.monotonic())
        return refusal.reason if refusal else ""

    def drain(self) -> None:
        """A connection in TCP mode is one piece of work: it goes on until it ends or is killed."""

    def configured(self) -> None:
        """A connection in TCP mode goes on as it began."""

    def backend_hung(self, backend: Backend) -> None:
        """A connection in TCP mode cannot be given to another backend, and may outlive a pause of its own."""

    def kill(self) -> None:
        if self._tunnel is not None:
            self._tunnel.kill()
        else:
            self._give_up("KC")

    def expired(self, now: float) -> None:
        self._give_up(self.refusal[1])

    def crashed(self, error: Exception) -> None:
        """A bug: this connection is lost, and nothing else is."""
        if self._tunnel is not None:
            self._tunnel.crashed(error)
        else:
            self._give_up("IC")

    def connected(self, upstream: Upstream) -> None:
        front = self._front
        self.deadline = NEVER
        self._upstream = upstream
        self._connected_after = front.reactor.now - self._began
        front.reactor.remove(upstream.fd)
        self._tunnel = Tunnel(
            front.reactor,
            front.pumps,
            self._sock,
            upstream.sock,
            name=f"conn-{self._number}",
            idle=front.timeouts.tunnel,
            on_end=self._tunnel_ended,
        )
        self._tunnel.start()

    def ends(self) -> tuple[Address, Address]:
        return self._source, own_end(self._sock)

    def unserved(self, status: int, code: str, reason: str) -> None:
        self._finish(code, reason)

    def on_backend(self, mask: int) -> None:
        """The tunnel owns the backend's side; nothing is registered for it here."""

    def _tunnel_ended(self, tunnel: Tunnel) -> None:
        self._finish(tunnel.code)

    def _give_up(self, code: str) -> None:
        """End it before there is a tunnel."""
        self._front.upstreams.cancel(self)
        self._finish(code)

    def _finish(self, code: str, reason: str = "") -> None:
        """Close, log and be gone. What else happens within this batch may ask for it once more."""
        if self._finished:
            return
        self._finished = True
        front = self._front
        front.reactor.timed.discard(self)
        upstream, tunnel, trail = self._upstream, self._tunnel, self.trail
        self._upstream = self._tunnel = None  # the tunnel refers to this session, too
        self._sock.close()
        if self._counted:
            front.admission.disconnected(self.key)
        octets_in = tunnel.up.flow.octets if tunnel else 0
        octets_out = tunnel.down.flow.octets if tunnel else 0
        total = front.reactor.now - self._began
        backend = upstream.backend if upstream else None
        (backend or front).tally.add(0, octets_in, octets_out, total, code)
        leased_after = 0.0 if upstream or self.tried else -1.0
        if trail is not None and trail.leased_at is not None:
            leased_after = trail.leased_at - self._began
        odd = code != "--" or trail is not None
        record = (
            time.time(),
            self._client,
            b"",
            0,
            octets_out,
            backend.id if backend else self.tried[-1].id if self.tried else "-",
            0.0,
            leased_after,
            self._connected_after,
            -1.0,
            total,
            code,
            len(self.tried) + (upstream is not None),
            front.request_id() if odd else "",
            octets_in,
            len(front.sessions),
            front.pool.in_hand,
            backend.active if backend else 0,
            trail.queued if trail is not None else 0,
        )
        front.record(record)
        if odd:
            front.explain(record, reason, self._began, trail)
        if upstream is not None:
            front.upstreams.discard(upstream)
        front.on_closed(self)
