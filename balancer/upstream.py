"""Getting a connection to a backend: an idle one, a fresh one, or the next backend's.

A session that needs one is a *seeker*. `Upstreams.obtain(seeker)` leases a backend and returns an idle connection to it
at once, or None; then exactly one of `seeker.connected(upstream)` and `seeker.unserved(...)` is called, now or later.
A backend to which no connection can be opened is reported to the pool, and another is tried that was not tried yet.
Opening a connection sends nothing of the request, so this is right for every method (RFC 9110 section 9.2.2).

A seeker that finds nothing may wait, in one of two places, until its `deadline`:
- in the queue, in order of arrival, while every backend that it has not tried is full; it is served by whoever gives a
  lease back;
- *stranded*, if `timeouts.no_backend` allows that, while there is none that it has not tried, or its retries are used
  up; when a backend changes, and every RETRY_PAUSE seconds, it may try one more, be it one that it tried before.

Who gets a connection holds the lease that comes with it, and ends it by `keep` or `discard`.
Everything here runs on the reactor's thread.
"""

from __future__ import annotations

import errno
import os
import socket
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from balancer.backend import READY, Backend, TlsFailure, connect_failure
from balancer.config import Limits, Timeouts
from balancer.explain import Trail
from balancer.handshake import Handshake, Handshaker
from balancer.pool import Pool
from balancer.proxy_protocol import Address, v1, v2
from balancer.pump import RESET
from balancer.reactor import DONTWAIT, NEVER, PEEK, READ, WRITE, Reactor
from balancer.stream import Stream

# Seconds that an idle connection is kept: less than the keep-alive of common application servers (uvicorn and Node
# close after 5), so that it is us who close, and not they at the moment when a request is on its way.
KEEP_IDLE = 4.0
MOST_IDLE = 1024  # idle connections kept for one backend
RETRY_PAUSE = 0.25  # seconds

_LOOK = PEEK | DONTWAIT

# Failures of ours, which no other backend would be spared.
_NO_DESCRIPTORS = frozenset((errno.EMFILE, errno.ENFILE))
_SHORTAGES = _NO_DESCRIPTORS | {errno.ENOBUFS, errno.ENOMEM}

Refusal = tuple[int, str, str]  # status, termination code, and the reason in words
NONE_AVAILABLE: Refusal = (503, "SC", "no backend is available")
QUEUED_IN_VAIN: Refusal = (503, "sQ", "no backend became free in time")
QUEUE_FULL: Refusal = (503, "PQ", "too many requests are waiting for a backend")


class Seeker(Protocol):
    """A session that needs a backend."""

    key: str  # what a policy may go by: the client's address, or what hash_on names
    wanted: Backend | None  # the one that it had before, if it is to stay with that
    tried: list[Backend]  # those to which no connection could be opened
    refusal: Refusal  # set while it waits: what it is told if that was in vain
    deadline: float
    attempt: Attempt | None  # the connection being opened, so that the seeker can cancel it
    trail: Trail | None  # what happened on the way, once something did

    def on_backend(self, mask: int) -> None: ...

    def connected(self, upstream: Upstream) -> None: ...

    def unserved(self, status: int, code: str, reason: str) -> None: ...

    def ends(self) -> tuple[Address, Address]:
        """The client's address, and ours that it is connected to."""

    def crashed(self, error: Exception) -> None: ...


class Upstream:
    """An open connection to a backend."""

    __slots__ = ("_owner", "backend", "deadline", "epoch", "fd", "reused", "sock")

    def __init__(self, owner: Upstreams, backend: Backend, sock: Stream, epoch: int) -> None:
        self._owner = owner
        self.backend = backend
        self.epoch = epoch  # of the backend's settings, when it was begun
        self.sock = sock
        self.fd = sock.fileno()
        self.reused = False
        self.deadline = NEVER

    def is_stale(self) -> bool:
        """Has the backend closed it, or said something that nobody asked for?"""
        try:
            self.sock.recv(1, _LOOK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def send(self, data: bytes, flags: int) -> int:
        """Send, after a look whether the backend has closed the connection; ConnectionResetError where it has."""
        if self._owner.reactor.may_be_ready(self.fd) and self.is_stale():
            raise ConnectionResetError
        return self.sock.send(data, flags)

    def on_idle(self, mask: int) -> None:
        """Nothing is due on an idle connection: whatever happens there ends it (RFC 9112 section 9.5)."""
        if self.is_stale():
            self._owner.forget(self)

    def expired(self, now: float) -> None:
        if self in self.backend.idle:  # else it was taken since, and its deadline left as it was
            self._owner.forget(self)

    def crashed(self, error: Exception) -> None:
        self._owner.forget(self)


class Attempt:
    """One connection being opened to one backend, address after address, each for its share of the time."""

    def __init__(self, owner: Upstreams, seeker: Seeker, backend: Backend) -> None:
        self._owner = owner
        self._seeker = seeker
        self._backend = backend
        self._epoch = backend.epoch
        self._endpoints = list(backend.endpoints)
        self._sock: socket.socket | None = None
        self._handshake: Handshake | None = None
        self._gives_up = owner.reactor.now + owner.timeouts.connect
        self.deadline = NEVER

    def begin(self, error: int = errno.EHOSTUNREACH) -> None:
        """Go on to the next address. `error` is why there is no connection yet: that a name has none, to begin with."""
        reactor = self._owner.reactor
        while self._endpoints:
            share = (self._gives_up - reactor.now) / len(self._endpoints)
            family, address = self._endpoints.pop(0)
            try:
                self._sock = sock = socket.socket(family, socket.SOCK_STREAM)
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                error = sock.connect_ex(address)
                if error in (0, errno.EINPROGRESS):
                    reactor.add(sock.fileno(), WRITE, self._ready)
                    self.deadline = reactor.now + share
                    reactor.timed.add(self)
                    return
            except OSError as failure:
                error = failure.errno or errno.EINVAL
            self._drop_socket()
            if error in _NO_DESCRIPTORS and self._owner.drop_oldest_idle():
                self._endpoints.insert(0, (family, address))
            elif error in _SHORTAGES:
                break
        self._fail(error)

    def cancel(self) -> None:
        """The seeker has gone."""
        self._drop_socket()
        self._owner.release(self._backend)

    def expired(self, now: float) -> None:
        self._drop_socket()
        self.begin(errno.ETIMEDOUT)

    def crashed(self, error: Exception) -> None:
        self._seeker.crashed(error)

    def _ready(self, mask: int) -> None:
        sock = self._sock
        assert sock is not None
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if not error:
            try:
                if sock.getpeername() == sock.getsockname():
                    # A port that nobody listens on was given to this very socket, which so has reached itself. The
                    # reset leaves the port free for its owner.
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                    error = errno.ECONNREFUSED
            except OSError as failure:
                if failure.errno == errno.ENOTCONN:
                    return  # the readiness of another socket, which had this number earlier in this batch
                error = failure.errno or errno.EINVAL
        if error:
            self._drop_socket()
            self.begin(error)
            return
        backend, owner = self._backend, self._owner
        owner.reactor.timed.discard(self)
        sock.setblocking(True)
        if backend.send_proxy:
            build = v2 if backend.send_proxy == "v2" else v1
            with suppress(OSError):  # it is lost, which whatever comes next will notice
                sock.send(build(*self._seeker.ends()), DONTWAIT)  # a fresh connection takes it whole
        if backend.tls_context is None:
            self._opened(sock)
            return
        owner.reactor.remove(sock.fileno())
        self._sock = None  # it is the handshake's
        self._handshake = owner.handshaker.begin(
            sock,
            backend.tls_context,
            server_side=False,
            server_hostname=backend.server_name,
            timeout=max(0.001, self._gives_up - owner.reactor.now),
            on_done=self._opened,
            on_failed=self._not_encrypted,
        )

    def _opened(self, stream: Stream) -> None:
        reactor = self._owner.reactor
        upstream = Upstream(self._owner, self._backend, stream, self._epoch)
        if upstream.fd in reactor.handlers:
            reactor.handlers[upstream.fd] = self._seeker.on_backend
            reactor.watch(upstream.fd, READ)
        else:
            reactor.add(upstream.fd, READ, self._seeker.on_backend)
        reactor.timed.add(upstream)
        self._seeker.attempt = None
        self._seeker.connected(upstream)

    def _not_encrypted(self, reason: str) -> None:
        self._handshake = None
        self._seeker.attempt = None
        late = self._owner.reactor.now >= self._gives_up
        self._owner.connect_failed(
            self._seeker, self._backend, TlsFailure(errno.ETIMEDOUT if late else errno.EPROTO, reason)
        )

    def _drop_socket(self) -> None:
        sock, self._sock = self._sock, None
        if self._handshake is not None:
            self._handshake.cancel()
            self._handshake = None
        if sock is not None:
            reactor = self._owner.reactor
            reactor.timed.discard(self)
            if sock.fileno() in reactor.handlers:
                reactor.remove(sock.fileno())
            sock.close()

    def _fail(self, error: int) -> None:
        self._seeker.attempt = None
        self._owner.connect_failed(self._seeker, self._backend, OSError(error, os.strerror(error)))


class Upstreams:
    """All connections to backends that are idle or being opened, and the seekers that wait for one."""

    def __init__(
        self,
        reactor: Reactor,
        pool: Pool,
        timeouts: Timeouts,
        limits: Limits,
        retries: int,
        handshaker: Handshaker,
        on_refused: Callable[[Backend], None] = lambda backend: None,
    ) -> None:
        self.reactor = reactor
        self.timeouts = timeouts
        self.limits = limits
        self.retries = retries
        self.handshaker = handshaker
        self.worth_waiting: Callable[[], float] = lambda: 0.0  # asked where none is available: for how many seconds?
        self._pool = pool
        self._on_refused = on_refused
        self._queue: deque[Seeker] = deque()
        self._serving = False  # is the queue being served, somewhere down the stack?
        self._stranded: deque[Seeker] = deque()
        self.deadline = NEVER  # when those that are stranded may try again

    def __repr__(self) -> str:
        return f"<Upstreams {self.idle} idle, {self.waiting} waiting>"

    @property
    def idle(self) -> int:
        return sum(len(backend.idle) for backend in self._pool.backends)

    @property
    def waiting(self) -> int:
        return len(self._queue) + len(self._stranded)

    def obtain(self, seeker: Seeker) -> Upstream | None:
        """An idle connection to the backend that is next, or None: see the head of this file."""
        backend = self._pool.lease(seeker.key, seeker.tried, seeker.wanted)
        if backend is not None:
            upstream = self._take_idle(seeker, backend)
            if upstream is not None:
                return upstream
        seeker.deadline = NEVER
        if backend is None:
            self._wait(seeker, None)
        else:
            self._open(seeker, backend)
        return None

    def renew(self, seeker: Seeker, stale: Upstream) -> None:
        """Replace a kept connection that turned out to be closed by a fresh one to the same backend."""
        self.forget(stale)
        stale.backend.tally.retries += 1
        self.note(seeker, "a kept connection turned out to be closed; a fresh one is opened", stale.backend)
        self._open(seeker, stale.backend)

    def seek_another(self, seeker: Seeker, failed: Upstream, refusal: Refusal) -> None:
        """No answer came from this one, and the request may be sent again: let another backend have it.

        `refusal` is what the client is told when there is no other. Once the retries are used up it is told at once: a
        backend that takes each request and answers none would else be asked for as long as there is patience.
        """
        seeker.tried.append(failed.backend)
        failed.backend.tally.response_errors += 1
        self.note(seeker, refusal[2], failed.backend)
        self.discard(failed)
        if len(seeker.tried) > self.retries:
            seeker.unserved(*refusal)
        else:
            self._try_next(seeker, refusal)

    def keep(self, upstream: Upstream) -> None:
        """Its exchange is over, and it may serve another."""
        backend = upstream.backend
        if (
            backend.healthy and backend.admin is READY and not backend.leaving  # `eligible`, without a call
            and upstream.epoch == backend.epoch
            and not backend.send_proxy  # one that was begun with a PROXY header is for one client only
            and len(backend.idle) < MOST_IDLE
        ):  # fmt: skip
            reactor = self.reactor
            reactor.handlers[upstream.fd] = upstream.on_idle
            upstream.reused = True
            upstream.deadline = reactor.now + KEEP_IDLE
            backend.idle.append(upstream)
        else:
            self._close(upstream)
        self._pool.release(backend)
        if self._queue:
            self._serve_queue()

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

    def drop_oldest_idle(self) -> bool:
        """Make do with one idle connection less. False when there is none."""
        idle = max((backend.idle for backend in self._pool.backends), key=len, default=[])
        if idle:
            self._close(idle.pop(0))
            return True
        return False

    def release(self, backend: Backend) -> None:
        """Give a lease back."""
        self._pool.release(backend)
        if self._queue:
            self._serve_queue()

    def note(self, seeker: Seeker, text: str, backend: Backend | None = None) -> None:
        """Leave on the seeker's trail what has happened."""
        if seeker.trail is None:
            seeker.trail = Trail()
        name = backend.id if backend is not None else ""
        seeker.trail.note(self.reactor.now, text, name, seeker.tried, self._pool.standings())

    def cancel(self, seeker: Seeker) -> None:
        """The seeker has gone, or waited long enough."""
        if seeker.attempt is not None:
            attempt, seeker.attempt = seeker.attempt, None
            attempt.cancel()
        elif seeker in self._queue:
            self._queue.remove(seeker)
        elif seeker in self._stranded:
            self._stranded.remove(seeker)

    def serve_waiting(self) -> None:
        """A backend changed: look whether those who wait can be served."""
        self._serve_queue()
        self._serve_stranded()

    def expired(self, now: float) -> None:
        """RETRY_PAUSE is over."""
        self._serve_stranded()

    def crashed(self, error: Exception) -> None:
        """Nothing is lost: those who are stranded have deadlines of their own."""

    def _serve_queue(self) -> None:
        """Serve those who wait for a lease, in order; but one that could only have what it has tried blocks nobody."""
        if self._serving:
            return  # a lease that was given back by somebody whom we serve: the loop below finds it
        self._serving = True
        try:
            place = 0
            while place < len(self._queue):
                seeker = self._queue[place]
                backend = self._pool.lease(seeker.key, seeker.tried, seeker.wanted)
                if backend is not None:
                    del self._queue[place]
                    self._serve(seeker, backend)
                elif seeker.tried:
                    place += 1
                else:
                    break
        finally:
            self._serving = False

    def _serve_stranded(self) -> None:
        for _ in range(len(self._stranded)):
            backend = self._pool.lease(self._stranded[0].key, (), self._stranded[0].wanted)
            if backend is None:
                break
            self._serve(self._stranded.popleft(), backend)
        self._pause()

    def _pause(self) -> None:
        """See to it that those who are stranded are looked at again."""
        if self._stranded:
            self.deadline = self.reactor.now + RETRY_PAUSE
            self.reactor.timed.add(self)
        else:
            self.deadline = NEVER
            self.reactor.timed.discard(self)

    def _serve(self, seeker: Seeker, backend: Backend) -> None:
        """Let one who waited have this lease. Whatever comes of that concerns nobody but that seeker."""
        if seeker.trail is not None:
            seeker.trail.leased_at = self.reactor.now
        if not seeker.tried:
            seeker.deadline = NEVER  # else it holds until there is a connection, or there would be no end of it
        self._connect(seeker, backend)

    def connect_failed(self, seeker: Seeker, backend: Backend, error: OSError) -> None:
        """Try the next one, if there is one and the configuration allows another try."""
        if error.errno in _SHORTAGES:
            self.release(backend)
            seeker.unserved(503, "RC", f"the balancer is short of something: {error.strerror}")
            return
        if error.errno != errno.EADDRNOTAVAIL:  # our ports towards this address are used up: no fault of its own
            self._pool.report(backend, False, connect_failure(error))
            self._on_refused(backend)
        backend.tally.connect_errors += 1
        seeker.tried.append(backend)
        self.note(seeker, connect_failure(error), backend)
        self.release(backend)
        names = ", ".join(backend.id for backend in seeker.tried)
        if error.errno == errno.ETIMEDOUT:
            refusal = (504, "sC", f"no connection to a backend within the time allowed (tried {names})")
        else:
            refusal = (503, "SC", f"no backend could be reached (tried {names})")
        self._try_next(seeker, refusal)

    def _try_next(self, seeker: Seeker, refusal: Refusal) -> None:
        backend = None
        if len(seeker.tried) <= self.retries:
            backend = self._pool.lease(seeker.key, seeker.tried, seeker.wanted)
        if backend is None:
            self._wait(seeker, refusal)
        else:
            seeker.tried[-1].tally.redispatches += 1
            self._connect(seeker, backend)

    def _connect(self, seeker: Seeker, backend: Backend) -> None:
        upstream = self._take_idle(seeker, backend)
        if upstream is not None:
            self.reactor.call(seeker.connected, upstream)
        else:
            self._open(seeker, backend)

    def _take_idle(self, seeker: Seeker, backend: Backend) -> Upstream | None:
        """The newest idle connection on which nothing has happened: an answer to nothing must not become anybody's."""
        reactor = self.reactor
        while backend.idle:
            upstream: Upstream = backend.idle.pop()
            fd = upstream.fd
            if upstream.epoch == backend.epoch and (fd not in reactor.ready or not upstream.is_stale()):
                reactor.handlers[fd] = seeker.on_backend
                return upstream
            self._close(upstream)
        return None

    def _open(self, seeker: Seeker, backend: Backend) -> None:
        seeker.attempt = attempt = Attempt(self, seeker, backend)
        self.reactor.call(attempt.begin)

    def _wait(self, seeker: Seeker, refusal: Refusal | None) -> None:
        """There is nothing for this seeker now. `refusal` is what came of its last try, None before the first."""
        if len(seeker.tried) <= self.retries and self._pool.only_full(seeker.tried):
            place, patience, seeker.refusal = self._queue, self.timeouts.queue, QUEUED_IN_VAIN
            why = "every backend that was not tried is full"
        else:
            patience = max(self.timeouts.no_backend, self.worth_waiting())
            place, seeker.refusal = self._stranded, refusal or NONE_AVAILABLE
            why = "no backend is available that was not tried" if seeker.tried else "no backend is available"
        if not patience:
            self.note(seeker, why)
            seeker.unserved(*(refusal or seeker.refusal))
        elif self.waiting >= self.limits.queue:
            self.note(seeker, f"{why}, and {self.waiting} wait already")
            seeker.unserved(*(refusal or QUEUE_FULL))
        else:
            self.note(seeker, f"{why}; it waits, {self.waiting} before it")
            assert seeker.trail is not None
            seeker.trail.queued = self.waiting
            if seeker.deadline == NEVER:
                seeker.deadline = self.reactor.now + patience
            place.append(seeker)
            if place is self._stranded and self.deadline == NEVER:
                self._pause()

    def _close(self, upstream: Upstream) -> None:
        reactor = self.reactor
        reactor.timed.discard(upstream)
        if upstream.fd in reactor.handlers:
            reactor.remove(upstream.fd)
        upstream.fd = -1  # the number may be another connection's from here on
        upstream.sock.close()
