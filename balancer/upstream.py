"""Getting a connection to a backend: an idle one, a fresh one, or the next backend's.

A session that needs one is a *seeker*. `Upstreams.obtain(seeker)` leases a backend and returns an idle connection to it
at once, or None; then exactly one of `seeker.connected(upstream)` and `seeker.unserved(...)` is called, now or later.
A backend to which no connection can be opened is reported to the pool, and another is tried that was not tried yet.
Opening a connection sends nothing of the request, so this is right for every method (RFC 9110 section 9.2.2).

Who gets a connection holds the lease that comes with it, and ends it by `keep` or `discard`.
Everything here runs on the reactor's thread.
"""

from __future__ import annotations

import errno
import os
import socket
from collections import deque
from collections.abc import Callable
from typing import Protocol

from balancer.backend import Backend
from balancer.config import Limits, Timeouts
from balancer.pool import Pool
from balancer.reactor import NEVER, READ, WRITE, Reactor

# Seconds that an idle connection is kept: less than the keep-alive of common application servers (uvicorn and Node
# close after 5), so that it is us who close, and not they at the moment when a request is on its way.
KEEP_IDLE = 4.0
MOST_IDLE = 1024  # idle connections kept for one backend

# Failures of ours, not the backend's: no descriptors, no memory, no ports.
_OWN_FAILURES = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL))


class Seeker(Protocol):
    """A session that needs a backend."""

    client_ip: str
    tried: list[Backend]  # those to which no connection could be opened
    deadline: float
    attempt: Attempt | None  # the connection being opened, so that the seeker can cancel it

    def on_backend(self, mask: int) -> None: ...

    def connected(self, upstream: Upstream) -> None: ...

    def unserved(self, status: int, code: str, reason: str) -> None: ...

    def crashed(self, error: Exception) -> None: ...


class Upstream:
    """An open connection to a backend."""

    __slots__ = ("_owner", "backend", "connect_seconds", "deadline", "fd", "reused", "sock")

    def __init__(self, owner: Upstreams, backend: Backend, sock: socket.socket, connect_seconds: float) -> None:
        self._owner = owner
        self.backend = backend
        self.sock = sock
        self.fd = sock.fileno()
        self.connect_seconds = connect_seconds
        self.reused = False
        self.deadline = NEVER

    def is_stale(self) -> bool:
        """Has the backend closed it, or said something that nobody asked for?"""
        try:
            self.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def on_idle(self, mask: int) -> None:
        """Nothing is due on an idle connection: whatever happens there ends it (RFC 9112 section 9.5)."""
        if self.is_stale():
            self._owner.forget(self)

    def expired(self, now: float) -> None:
        self._owner.forget(self)

    def crashed(self, error: Exception) -> None:
        self._owner.forget(self)


class Attempt:
    """One connection being opened to one backend, address after address."""

    def __init__(self, owner: Upstreams, seeker: Seeker, backend: Backend) -> None:
        self._owner = owner
        self._seeker = seeker
        self._backend = backend
        self._endpoints = list(backend.endpoints)
        self._sock: socket.socket | None = None
        self._began = owner.reactor.now
        self.deadline = NEVER

    def begin(self) -> None:
        error = errno.EHOSTUNREACH  # what a name without an address amounts to
        while self._endpoints:
            family, address = self._endpoints.pop(0)
            try:
                sock = socket.socket(family, socket.SOCK_STREAM)
            except OSError as failure:
                self._fail(failure.errno or errno.EMFILE)
                return
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            error = sock.connect_ex(address)
            if error in (0, errno.EINPROGRESS):
                self._sock = sock
                reactor = self._owner.reactor
                self.deadline = reactor.now + self._owner.timeouts.connect
                reactor.timed.add(self)
                reactor.add(sock.fileno(), WRITE, self._ready)
                return
            sock.close()
        self._fail(error)

    def cancel(self) -> None:
        """The seeker has gone."""
        self._drop_socket()
        self._owner.release(self._backend)

    def expired(self, now: float) -> None:
        self._fail(errno.ETIMEDOUT)

    def crashed(self, error: Exception) -> None:
        self._seeker.crashed(error)

    def _ready(self, mask: int) -> None:
        sock = self._sock
        assert sock is not None
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        reactor = self._owner.reactor
        if error:
            self._drop_socket()
            if self._endpoints:
                self.begin()
            else:
                self._fail(error)
            return
        reactor.timed.discard(self)
        sock.setblocking(True)
        upstream = Upstream(self._owner, self._backend, sock, reactor.now - self._began)
        reactor.handlers[upstream.fd] = self._seeker.on_backend
        reactor.watch(upstream.fd, READ)
        reactor.timed.add(upstream)
        self._seeker.attempt = None
        self._seeker.connected(upstream)

    def _drop_socket(self) -> None:
        if self._sock is not None:
            reactor = self._owner.reactor
            reactor.timed.discard(self)
            reactor.remove(self._sock.fileno())
            self._sock.close()
            self._sock = None

    def _fail(self, error: int) -> None:
        self._drop_socket()
        self._seeker.attempt = None
        self._owner.connect_failed(self._seeker, self._backend, error)


class Upstreams:
    """All connections to backends that are idle or being opened, and the seekers that wait for one."""

    def __init__(
        self,
        reactor: Reactor,
        pool: Pool,
        timeouts: Timeouts,
        limits: Limits,
        retries: int,
        on_refused: Callable[[Backend], None] = lambda backend: None,
    ) -> None:
        self.reactor = reactor
        self.timeouts = timeouts
        self._pool = pool
        self._limits = limits
        self._retries = retries
        self._on_refused = on_refused
        self._waiting: deque[Seeker] = deque()  # in the order in which they came

    def __repr__(self) -> str:
        return f"<Upstreams {self.idle} idle, {len(self._waiting)} waiting>"

    @property
    def idle(self) -> int:
        return sum(len(backend.idle) for backend in self._pool.backends)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def obtain(self, seeker: Seeker) -> Upstream | None:
        """An idle connection to the backend that is next, or None: see the head of this file."""
        backend = self._pool.lease(seeker.client_ip, seeker.tried)
        if backend is None:
            self._none_available(seeker)
            return None
        if backend.idle:
            return self._take_idle(seeker, backend)
        self._open(seeker, backend)
        return None

    def renew(self, seeker: Seeker, stale: Upstream) -> None:
        """Replace a kept connection that turned out to be closed by a fresh one to the same backend."""
        self.forget(stale)
        self._open(seeker, stale.backend)

    def seek_another(self, seeker: Seeker, failed: Upstream) -> None:
        """The connection broke before an answer, and the request may be sent again: let another backend have it."""
        seeker.tried.append(failed.backend)
        self.discard(failed)
        self._try_next(seeker, errno.ECONNRESET)

    def keep(self, upstream: Upstream) -> None:
        """Its exchange is over, and it may serve another."""
        backend = upstream.backend
        if backend.eligible and len(backend.idle) < MOST_IDLE:
            upstream.deadline = self.reactor.now + KEEP_IDLE
            self.reactor.handlers[upstream.fd] = upstream.on_idle
            backend.idle.append(upstream)
        else:
            self._close(upstream)
        self.release(backend)

    def discard(self, upstream: Upstream) -> None:
        """Its exchange is over, and so is the connection."""
        self._close(upstream)
        self.release(upstream.backend)

    def forget(self, upstream: Upstream) -> None:
        """Close a connection, idle or not, without ending a lease."""
        if upstream in upstream.backend.idle:
            upstream.backend.idle.remove(upstream)
        self._close(upstream)

    def drop_idle(self, backend: Backend) -> None:
        """A backend that is away keeps no idle connections."""
        while backend.idle:
            self._close(backend.idle.pop())

    def release(self, backend: Backend) -> None:
        self._pool.release(backend)
        if self._waiting:
            self.serve_waiting()

    def cancel(self, seeker: Seeker) -> None:
        """The seeker has gone, or waited long enough."""
        if seeker.attempt is not None:
            attempt, seeker.attempt = seeker.attempt, None
            attempt.cancel()
        elif seeker in self._waiting:
            self._waiting.remove(seeker)

    def serve_waiting(self) -> None:
        """Somebody was released or came back: give work to those who wait, in the order in which they came."""
        while self._waiting:
            seeker = self._waiting[0]
            backend = self._pool.lease(seeker.client_ip, seeker.tried)
            if backend is None:
                return
            self._waiting.popleft()
            seeker.deadline = NEVER
            if backend.idle:
                seeker.connected(self._take_idle(seeker, backend))
            else:
                self._open(seeker, backend)

    def connect_failed(self, seeker: Seeker, backend: Backend, error: int) -> None:
        """Try the next one, if there is one and the configuration allows another try."""
        if error in _OWN_FAILURES:
            self.release(backend)
            seeker.unserved(503, "RC", f"the balancer is short of something: {os.strerror(error)}")
            return
        self._pool.report(backend, False, connect_failure(error))
        self._on_refused(backend)
        self.release(backend)
        seeker.tried.append(backend)
        self._try_next(seeker, error)

    def _try_next(self, seeker: Seeker, error: int) -> None:
        if len(seeker.tried) > self._retries:
            self._give_up(seeker, error)
            return
        upstream = self.obtain(seeker)
        if upstream is not None:
            seeker.connected(upstream)

    def _take_idle(self, seeker: Seeker, backend: Backend) -> Upstream:
        upstream: Upstream = backend.idle.pop()
        upstream.deadline = NEVER
        upstream.reused = True
        upstream.connect_seconds = 0.0
        self.reactor.handlers[upstream.fd] = seeker.on_backend
        return upstream

    def _open(self, seeker: Seeker, backend: Backend) -> None:
        seeker.attempt = attempt = Attempt(self, seeker, backend)
        attempt.begin()

    def _none_available(self, seeker: Seeker) -> None:
        if self._pool.only_full():
            patience, problem = self.timeouts.queue, "every backend is full"
        else:
            patience, problem = self.timeouts.no_backend, "no backend is available"
        if patience and len(self._waiting) < self._limits.queue:
            seeker.deadline = self.reactor.now + patience
            self._waiting.append(seeker)
        elif seeker.tried:
            self._give_up(seeker, errno.ECONNREFUSED)
        else:
            seeker.unserved(503, "SC" if patience == 0 else "PQ", problem)

    def _give_up(self, seeker: Seeker, error: int) -> None:
        names = ", ".join(backend.id for backend in seeker.tried)
        if error == errno.ETIMEDOUT:
            seeker.unserved(504, "sC", f"no connection to a backend within the time allowed (tried {names})")
        else:
            seeker.unserved(503, "SC", f"no backend could be reached (tried {names})")

    def _close(self, upstream: Upstream) -> None:
        reactor = self.reactor
        reactor.timed.discard(upstream)
        if upstream.fd in reactor.handlers:
            reactor.remove(upstream.fd)
        upstream.sock.close()


def connect_failure(error: int) -> str:
    """A failed connect in the words of the checks: `L4CON refused`, `L4TOUT`."""
    if error == errno.ETIMEDOUT:
        return "L4TOUT"
    return f"L4CON {'refused' if error == errno.ECONNREFUSED else os.strerror(error).lower()}"
