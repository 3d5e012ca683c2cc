"""The listening socket: bind, accept, keep to the limits, and the sessions that came of it, until they have ended.

No connection is accepted that could not be served: at the cap, and while descriptors are short, accepting pauses and
clients wait in the kernel's backlog, where they lose nothing.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Callable

from balancer.clients import plain_address
from balancer.config import format_address
from balancer.frontend import Frontend, MakeSession, Session
from balancer.greeting import Greeting
from balancer.reactor import NEVER, READ, Reactor

BACKLOG = 4096
ACCEPTS = 64  # connections taken in one turn, so that those that are being served get theirs
SHORT_OF_DESCRIPTORS = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))
LINUX = sys.platform == "linux"
PAUSE = 0.2  # seconds without accepting when descriptors are short


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises OSError with a line for people."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except socket.gaierror as error:
        raise OSError(f"cannot listen on {format_address(host, port)}: {error.strerror}") from None
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # what is accepted inherits it
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise OSError(f"cannot listen on {format_address(host, port)}: {os.strerror(error.errno or 0)}") from None
    sock.setblocking(False)
    return sock


class Listener:
    """Accepts connections and makes sessions of them, on the reactor's thread."""

    def __init__(
        self,
        reactor: Reactor,
        sock: socket.socket,
        make_session: MakeSession,
        most: int,
        on_event: Callable[[str, str], None],
    ) -> None:
        self._reactor = reactor
        self._sock = sock
        self._make_session = make_session
        self.most = most  # connections at once
        self.accepted = 0  # connections ever
        self._on_event = on_event
        self._accepting = False
        self._closed = False
        self._was_short = False
        self.front: Frontend | None = None
        self.sessions: set[Session] = set()
        self.deadline = NEVER
        self.on_drained: Callable[[], None] = lambda: None  # no longer accepting, and every session has ended

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens, with the port that port 0 became."""
        host, port = self._sock.getsockname()[:2]
        return host, port

    @property
    def drained(self) -> bool:
        """No longer accepting, and every session has ended."""
        return self._closed and not self.sessions

    def discard(self) -> None:
        """Close one that was never started."""
        self._sock.close()

    def start(self) -> None:
        self._reactor.timed.add(self)
        self._accept_again()

    def stop(self) -> None:
        """Accept no more; what is in hand may end in peace."""
        if self._closed:
            return
        # Who stands in the backlog has been greeted by the kernel: it is served, not reset.
        while self._accept_one():
            pass
        self._closed = True
        self._reactor.timed.discard(self)
        self._pause()
        self._sock.close()
        for session in list(self.sessions):
            session.drain()
        self._tell_if_drained()

    def allow(self, most: int) -> None:
        """Have at most so many connections at once; who is here already stays."""
        self.most = most
        if self in self._reactor.timed and len(self.sessions) < most and self.deadline is NEVER:
            self._accept_again()

    def kill(self) -> int:
        """End every session now, and accept no more. Returns how many there were."""
        self.stop()
        sessions = list(self.sessions)
        for session in sessions:
            session.kill()
        self._tell_if_drained()
        return len(sessions)

    def session_closed(self, session: Session) -> None:
        self.sessions.discard(session)
        if self._closed:
            self._tell_if_drained()
        elif not self._accepting and len(self.sessions) < self.most and self.deadline is NEVER:
            self._accept_again()

    def expired(self, now: float) -> None:
        """The pause for want of descriptors is over."""
        self._accept_again()

    def crashed(self, error: Exception) -> None:
        self._pause()
        self.deadline = self._reactor.now + PAUSE

    def _accept_again(self) -> None:
        if not self._accepting and not self._closed:
            self._accepting = True
            self._reactor.add(self._sock.fileno(), READ, self._readable)

    def _pause(self) -> None:
        if self._accepting:
            self._accepting = False
            self._reactor.remove(self._sock.fileno())

    def _readable(self, mask: int) -> None:
        for _ in range(ACCEPTS):
            if not self._accept_one():
                return

    def _accept_one(self) -> bool:
        """Take one connection. False when there is none, or when no more may be taken for now."""
        if len(self.sessions) >= self.most:
            self._pause()
            return False
        try:
            sock, address = self._sock.accept()
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in SHORT_OF_DESCRIPTORS:
                return True  # that client has gone again (accept(2)); there may be others
            if not self._was_short:
                self._was_short = True
                self._on_event("error", f"accepting pauses: {error.strerror} ({len(self.sessions)} connections)")
            self._pause()
            self.deadline = self._reactor.now + PAUSE
            return False
        if self._was_short:
            self._was_short = False
            self._on_event("info", "accepting again")
        if not LINUX:
            sock.setblocking(True)  # elsewhere it inherits the listener's mode
        front = self.front
        assert front is not None
        self.accepted += 1
        host = plain_address(address[0].partition("%")[0]) if ":" in address[0] else address[0]
        session: Session
        if front.tls_context is None and host not in front.proxied:
            session = self._make_session(front, sock, (host, address[1]), self.accepted)
        else:
            session = Greeting(front, sock, (host, address[1]), self.accepted, self._make_session, self._greeted)
        self.sessions.add(session)
        self._reactor.call(session.start)
        return True

    def _greeted(self, greeting: Greeting, session: Session) -> None:
        """What was a greeting is a session now."""
        self.sessions.discard(greeting)
        self.sessions.add(session)
        if self._closed:
            self._reactor.defer(session.drain)

    def _tell_if_drained(self) -> None:
        if not self.sessions:
            self.on_drained()
