"""One client connection in TCP mode: a backend, a connection to it, a tunnel, a line in the log.

Nothing is read before the backend is connected, and nothing is parsed. With no backend to be had the client's
connection is closed.
"""

from __future__ import annotations

import socket
import time

from balancer.backend import Backend
from balancer.config import format_address
from balancer.frontend import Frontend
from balancer.pump import End
from balancer.reactor import NEVER
from balancer.tunnel import Direction, Tunnel
from balancer.upstream import Attempt, Upstream


class TcpSession:
    """Accepted by the listener, and closed here."""

    def __init__(self, front: Frontend, sock: socket.socket, address: tuple[str, int], number: int) -> None:
        self._front = front
        self._sock = sock
        self._number = number
        self._began = front.reactor.now
        self._upstream: Upstream | None = None
        self._tunnel: Tunnel | None = None
        self._connected_after = -1.0
        self.client_ip = address[0]
        self._client = format_address(address[0], address[1])
        self.tried: list[Backend] = []
        self.attempt: Attempt | None = None
        self.deadline = NEVER

    def start(self) -> None:
        self._front.reactor.timed.add(self)
        self._front.upstreams.obtain(self)

    def drain(self) -> None:
        """A connection in TCP mode is one piece of work: it goes on until it ends or is killed."""

    def kill(self) -> None:
        if self._tunnel is not None:
            self._tunnel.kill()
        else:
            self._front.upstreams.cancel(self)
            self._finish("KC")

    def expired(self, now: float) -> None:
        self._front.upstreams.cancel(self)
        self._finish("sQ")

    def crashed(self, error: Exception) -> None:
        self.kill()

    def connected(self, upstream: Upstream) -> None:
        front = self._front
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

    def unserved(self, status: int, code: str, reason: str) -> None:
        self._finish(code)

    def on_backend(self, mask: int) -> None:
        """The tunnel owns the backend's side; nothing is registered for it here."""

    def _tunnel_ended(self, tunnel: Tunnel) -> None:
        self._finish(tunnel_code(tunnel))

    def _finish(self, code: str) -> None:
        front = self._front
        front.reactor.timed.discard(self)
        upstream, tunnel = self._upstream, self._tunnel
        self._sock.close()
        if upstream is not None:
            front.upstreams.discard(upstream)
        backend = upstream.backend.id if upstream else self.tried[-1].id if self.tried else "-"
        front.record(
            (
                time.time(),
                self._client,
                b"",
                0,
                tunnel.down.flow.octets if tunnel else 0,
                backend,
                -1.0,
                self._connected_after,
                -1.0,
                front.reactor.now - self._began,
                code,
                len(self.tried) + (upstream is not None),
                "",
                tunnel.up.flow.octets if tunnel else 0,
            )
        )
        front.on_closed(self)


def tunnel_code(tunnel: Tunnel) -> str:
    """The termination code of a tunnel that has ended."""
    if tunnel.killed:
        return "KD"
    if tunnel.timed_out:
        return "cD"
    if tunnel.no_thread:
        return "RD"
    broken: Direction | None = tunnel.broken
    if broken is None:
        return "--"
    end = broken.flow.end
    from_client = broken is tunnel.up
    if end is End.SINK_STUCK:
        return "sD" if from_client else "cD"
    if end is End.SOURCE_LOST:
        return "CD" if from_client else "SD"
    return "SD" if from_client else "CD"
