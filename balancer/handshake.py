"""TLS handshakes: waiting is the reactor's, what costs time to compute is done by a few threads of their own.

A handshake reads by MSG_PEEK and takes from the kernel only what it consumed: data behind its last flight is announced
to whoever registers the descriptor next. While a thread computes, it owns the socket.

Handshakes with clients are bounded in time and in number, counted from their first octet. When there are too many, the
client that has kept us waiting the longest makes room, if that was long; else who comes waits unread.
"""

from __future__ import annotations

import queue
import socket
import ssl
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from balancer.backend import tls_in_words
from balancer.reactor import DONTWAIT, NEVER, PEEK, READ, WRITE, Reactor
from balancer.stream import TlsStream

FLIGHT = 16384  # octets of a handshake taken at once
MANNERS = 0.5  # seconds that a client may keep us waiting within its handshake while others wait for room
HTTP = "http"  # why a handshake failed: it was plain HTTP. The socket is open and unread
LATE = "not complete within"  # how the reason begins when time was over
CLOSED = "closed within the handshake"
UNUSED = "closed before a handshake"  # why it failed: nothing came at all


class _Failed(Exception):
    """A handshake cannot be completed. Its argument says why, in words."""


class Handshake:
    """One handshake under way. `step` is a worker's, everything else the reactor's."""

    __slots__ = (
        "_ends",
        "_first",
        "_home",
        "_incoming",
        "_make",
        "_on_done",
        "_on_failed",
        "_outgoing",
        "_over",
        "_sock",
        "_stepping",
        "_timeout",
        "_tls",
        "_unsent",
        "_watched",
        "admitted",
        "begun",
        "deadline",
        "server_side",
    )

    def __init__(
        self,
        home: Handshaker,
        sock: socket.socket,
        make: Callable[[ssl.MemoryBIO, ssl.MemoryBIO], ssl.SSLObject],
        *,
        server_side: bool,
        first: bytes,
        timeout: float,
        on_done: Callable[[TlsStream], Any],
        on_failed: Callable[[str], Any],
    ) -> None:
        self._home = home
        self._sock = sock
        self._make = make
        self.server_side = server_side
        self.admitted = False  # is it one of those that may be under way at once?
        self.begun = False  # has anything been said?
        self._first = first
        self._timeout = timeout
        self._on_done = on_done
        self._on_failed = on_failed
        self._tls: ssl.SSLObject | None = None  # not before something came: who says nothing costs a descriptor only
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._unsent = b""
        self._over = False
        self._stepping = False  # a worker has it, or will have it
        self._watched = False
        self._ends = self.deadline = home.reactor.now + timeout

    def start(self) -> None:
        self._home.reactor.timed.add(self)
        if self.server_side and not self._first:
            self._await(READ)
        else:
            self._home.admit(self)

    def cancel(self) -> None:
        """Close the connection, and call nobody. When it is over already, nothing happens."""
        if self._over:
            return
        if self._stepping:
            self._over = True  # a worker has the socket: `stepped` closes it
            self._home.reactor.timed.discard(self)
        else:
            self._leave()
            self._sock.close()

    def abandon(self) -> None:
        """The reactor and the workers have ended."""
        self._over = True
        self._sock.close()

    @property
    def stepping(self) -> bool:
        """Is it with a worker, and not with its client?"""
        return self._stepping

    def give_way(self) -> None:
        self._fail("not complete, and others wait")

    def expired(self, now: float) -> None:
        if not self._stepping:  # else `stepped` looks at the clock
            self._fail(f"{LATE} {self._timeout:g} s")

    def crashed(self, error: Exception) -> None:
        if not self._over:
            self._fail("an error within the balancer")

    def put(self, steps: queue.SimpleQueue[Handshake | None]) -> None:
        self._stepping = True
        steps.put(self)

    def stepped(self, mask: int, problem: str) -> None:
        """A worker has done what could be done; now `mask` is to be waited for, or nothing any more."""
        self._stepping = False
        if self._over:
            self._home.over(self)
            self._sock.close()
        elif problem:
            self._fail(problem)
        elif not mask:
            self._done()
        elif self._home.reactor.now >= self._ends:
            self.expired(self._ends)
        else:
            self._await(mask)

    def _await(self, mask: int) -> None:
        try:
            self._home.reactor.add(self._sock.fileno(), mask, self._ready)
        except OSError as error:
            self._fail(error.strerror or str(error))
        else:
            self._watched = True

    def _ready(self, mask: int) -> None:
        self._unwatch()
        self._home.admit(self)

    def _unwatch(self) -> None:
        if self._watched:
            self._watched = False
            self._home.reactor.remove(self._sock.fileno())

    def _leave(self) -> None:
        self._over = True
        self._home.reactor.timed.discard(self)
        self._unwatch()
        self._home.over(self)

    def _fail(self, problem: str) -> None:
        self._leave()
        if problem != HTTP:
            self._sock.close()
        self._home.reactor.call(self._on_failed, problem)

    def _done(self) -> None:
        self._leave()
        assert self._tls is not None
        stream = TlsStream(self._home, self._sock, self._tls, self._incoming, self._outgoing, self._unsent)
        self._home.reactor.call(self._on_done, stream)

    # ---- on a worker ----------------------------------------------------------------------------------------------

    def step(self) -> int:
        """Take what came and go on as far as that leads; the mask to wait for, or 0 when the handshake is complete."""
        if self._over:
            return READ
        if self._unsent:
            return self._send()
        arrived = b""
        if self._first:
            self._incoming.write(self._first)
        elif self.server_side or self._tls is not None:  # else we speak first
            try:
                arrived = self._sock.recv(FLIGHT, PEEK | DONTWAIT)
            except BlockingIOError:
                return READ
            if not arrived:
                raise _Failed(CLOSED if self._tls is not None else UNUSED)
            self._incoming.write(arrived)
        if self._tls is None:
            if self.server_side and (self._first or arrived)[:1].isalpha():
                raise _Failed(HTTP)
            self._tls = self._make(self._incoming, self._outgoing)
        self._first = b""
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._take(len(arrived))
            return self._send()
        except ssl.SSLError as error:
            self._take(len(arrived))  # or the close would be a reset, and take the alert away
            self._send()
            raise _Failed(tls_in_words(error)) from None
        # Nobody can have sent data before our own last flight: what is left came with `arrived`, and stays there.
        self._take(len(arrived) - self._incoming.pending)
        self._incoming.read()
        self._send()
        return 0

    def _take(self, octets: int) -> None:
        if octets > 0:
            self._sock.recv(octets, DONTWAIT)

    def _send(self) -> int:
        """Send what the handshake has to say, and return what is to be waited for then."""
        self._unsent += self._outgoing.read()
        if self._unsent:
            try:
                self._unsent = self._unsent[self._sock.send(self._unsent, DONTWAIT) :]
            except BlockingIOError:
                pass
        return WRITE if self._unsent else READ


class Handshaker:
    """Makes TLS connections of TCP connections, and sees those off that were closed with something due.

    threads: how many compute. most: handshakes with clients that are under way at once, counted from their first octet;
    the others wait unread. on_error: is told, on a worker's thread, of a bug. But for `settle` and `stop` everything is
    called on the reactor's thread.
    """

    def __init__(self, reactor: Reactor, threads: int, most: int, on_error: Callable[[str, Exception], None]) -> None:
        self.reactor = reactor
        self._number = threads
        self._most = most
        self._on_error = on_error
        self._threads: list[threading.Thread] = []
        self._steps: queue.SimpleQueue[Handshake | None] = queue.SimpleQueue()
        self._handshakes: set[Handshake] = set()  # all, until their sockets are somebody else's or closed
        self._waiting: dict[Handshake, None] = {}  # in order, for want of room
        self._under_way: dict[Handshake, float] = {}  # with clients, and since when, in that order
        self.deadline = NEVER  # when those that wait may look for room again
        self._lingering: set[TlsStream] = set()
        self._settled = threading.Event()  # none is lingering
        self._settled.set()

    def __repr__(self) -> str:
        return (
            f"<Handshaker {len(self._handshakes)} in hand, {len(self._under_way)} of {self._most} admitted, "
            f"{len(self._waiting)} waiting, {len(self._lingering)} lingering>"
        )

    def begin(
        self,
        sock: socket.socket,
        context: ssl.SSLContext,
        *,
        server_side: bool,
        server_hostname: str | None = None,
        first: bytes = b"",
        timeout: float,
        on_done: Callable[[TlsStream], Any],
        on_failed: Callable[[str], Any],
    ) -> Handshake:
        """Begin a handshake on a connection that nobody has registered. It is the handshake's until that is over.

        Then one of these is called: `on_done(stream)`, or `on_failed(reason)` with the connection closed; but where the
        reason is HTTP it is open, and what came is unread, save `first`, which the caller had received before.
        """
        handshake = Handshake(
            self,
            sock,
            partial(context.wrap_bio, server_side=server_side, server_hostname=server_hostname),
            server_side=server_side,
            first=first,
            timeout=timeout,
            on_done=on_done,
            on_failed=on_failed,
        )
        self._handshakes.add(handshake)
        handshake.start()
        return handshake

    def settle(self, patience: float) -> bool:
        """Wait, on any other thread than the reactor's, until nothing is due on any connection that was closed."""
        return self._settled.wait(patience)

    def stop(self) -> None:
        """End the workers, and close whatever is left. Called once, when the reactor has ended."""
        for _ in self._threads:
            self._steps.put(None)
        for thread in self._threads:
            thread.join()
        for handshake in self._handshakes:
            handshake.abandon()
        for stream in list(self._lingering):
            stream.abandon()

    def admit(self, handshake: Handshake) -> None:
        """Let a handshake go on: at once, or when there is room for it."""
        handshake.begun = True
        if handshake.server_side and not handshake.admitted:
            if len(self._under_way) >= self._most and not self._make_room():
                self._waiting[handshake] = None
                self.deadline = self.reactor.now + MANNERS
                self.reactor.timed.add(self)
                return
            self._under_way[handshake] = self.reactor.now
            handshake.admitted = True
        while len(self._threads) < self._number:
            thread = threading.Thread(target=self._work, name=f"tls-{len(self._threads) + 1}")
            thread.start()
            self._threads.append(thread)
        handshake.put(self._steps)

    def over(self, handshake: Handshake) -> None:
        self._handshakes.discard(handshake)
        self._waiting.pop(handshake, None)
        if handshake.admitted:
            handshake.admitted = False
            del self._under_way[handshake]
            self._admit_next()
        if not self._waiting:
            self.reactor.timed.discard(self)

    def expired(self, now: float) -> None:
        """Some wait for room, and some of those that have it may have had it long enough."""
        self.reactor.timed.discard(self)
        for _ in range(len(self._waiting)):
            self._admit_next()

    def crashed(self, error: Exception) -> None:
        """Those that wait have deadlines of their own."""

    def _admit_next(self) -> None:
        if self._waiting:
            following = next(iter(self._waiting))
            del self._waiting[following]
            self.admit(following)

    def _make_room(self) -> bool:
        """End the handshake whose client has kept us waiting the longest, if that is long. False when there is none."""
        for handshake, since in self._under_way.items():
            if self.reactor.now - since < MANNERS:
                return False
            if not handshake.stepping:
                handshake.give_way()
                return len(self._under_way) < self._most
        return False

    def lingers(self, stream: TlsStream) -> None:
        self._lingering.add(stream)
        self._settled.clear()

    def left(self, stream: TlsStream) -> None:
        self._lingering.discard(stream)
        if not self._lingering:
            self._settled.set()

    def _work(self) -> None:
        while (handshake := self._steps.get()) is not None:
            mask, problem = 0, ""
            try:
                mask = handshake.step()
            except _Failed as failed:
                problem = failed.args[0]
            except OSError as error:
                problem = error.strerror or str(error)
            except Exception as error:  # a bug, or a name that is none: this connection is lost, and nothing else is
                problem = "an error within the balancer"
                self._on_error("TLS handshake", error)
            self.reactor.call_soon(handshake.stepped, mask, problem)
