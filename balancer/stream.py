"""TLS connections that are used like sockets, and the handshakes that they come from.

A `TlsStream` has the calls by which the rest uses a connection, with a socket's meaning: MSG_DONTWAIT, MSG_PEEK,
SO_RCVTIMEO and SO_SNDTIMEO, shutdown from another thread, half-closes, a reset by SO_LINGER. What differs:

- `recv` returns everything that the ciphertext it took yields, which may be more than was asked for, so that nothing
  lies here of which the kernel would not tell again. A connection that ends without close_notify raises `TlsTruncated`:
  what came may not be all that was sent (RFC 8446, section 6.1).
- `send` may count as sent what the kernel did not take: once encrypted, octets cannot be taken back. That is *due*.
  The next `send`, `shutdown` or `close` goes on with it, and where none comes the reactor does, without being asked.

The rules that keep this right:
- One thread receives and one sends, as with any connection (DESIGN.md), but both work on one SSL object, which two
  threads must never enter at once. `_lock` guards that object, its buffers and everything about sending.
- Records must leave in the order in which they were encrypted, and reading produces some, too: answers to key updates,
  alerts. Who holds the lock may offer the kernel what is due by MSG_DONTWAIT, which does not wait. A `send` that waits
  leaves the lock; while `_sending` says so, everybody else leaves what is due to that thread.
- So whenever the lock is free and something is due, either `_sending` is true, or `_armed`: the reactor watches a
  duplicate of the descriptor until it is writable. (A duplicate, for the descriptor itself may be registered by its
  owner; and it is unregistered before it is closed, since epoll forgets a connection only with its last descriptor.)
- What the SSL object is given it decrypts before the lock is left: it cannot write close_notify while data waits there.

A handshake reads by MSG_PEEK and takes from the kernel only what it consumed: data behind its last flight is announced
to whoever registers the descriptor next. While a thread of the `Handshaker` computes, it owns the socket.

The contexts that are used here should have OP_NO_RENEGOTIATION: to renegotiate is taken for a broken connection.
"""

from __future__ import annotations

import errno
import os
import queue
import socket
import ssl
import struct
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from balancer.backend import tls_in_words
from balancer.reactor import NEVER, READ, WRITE, Reactor

RECORD = 16384  # octets of content in one record at most (RFC 8446, section 5.1)
MOST = 65536  # octets that are encrypted ahead of the kernel, and for which the lock is held without a break
LEAST = RECORD + 512  # octets of ciphertext asked for at once: any record, however little the caller asks for
GULP = MOST + (MOST >> 4)  # octets of ciphertext asked for at once: what MOST octets become, and to spare
MOST_DUE = 2 * MOST  # octets that may be due: a peer that asks for key updates and does not read makes them more
FLIGHT = 16384  # octets of a handshake taken at once
MANNERS = 0.5  # seconds that a client may keep us waiting within its handshake while others wait for room
FLUSH = 60.0  # seconds that a connection which was closed may take to pass on what is due
RETRY = 0.2  # seconds until a duplicate descriptor is tried again, when none could be had

HTTP = "http"  # why a handshake failed: it was plain HTTP. The socket is open and unread
LATE = "not complete within"  # how the reason begins when time was over
CLOSED = "closed within the handshake"
UNUSED = "closed before a handshake"  # why it failed: nothing came at all

# Plain integers: an operator of the enumeration that these are of takes a microsecond.
_DONTWAIT = int(socket.MSG_DONTWAIT)
_PEEK = int(socket.MSG_PEEK)


class TlsTruncated(ConnectionResetError):
    """The connection ended without close_notify: somebody may have cut it."""


class TlsBroken(ConnectionResetError):
    """What came is not what the peer can have sent, or it said by an alert that this holds for us."""


class TlsStream:
    """A TLS connection whose handshake is complete. `close` it on the reactor's thread.

    version, cipher: as the log tells them, such as "TLSv1.3" and "TLS_AES_256_GCM_SHA384".
    """

    __slots__ = (
        "_armed",
        "_closed",
        "_due",
        "_ended",
        "_finishing",
        "_found",
        "_home",
        "_incoming",
        "_lock",
        "_mute",
        "_outgoing",
        "_problem",
        "_reactor",
        "_reset",
        "_sending",
        "_sock",
        "_tls",
        "_watched",
        "cipher",
        "deadline",
        "version",
    )

    def __init__(
        self,
        home: Handshaker,
        sock: socket.socket,
        tls: ssl.SSLObject,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        due: bytes = b"",
    ) -> None:
        self._home = home
        self._reactor = home.reactor
        self._sock = sock
        self._tls = tls
        self._incoming = incoming  # ciphertext that the SSL object has not looked at yet; empty when the lock is free
        self._outgoing = outgoing  # ciphertext that it has produced; goes after `_due`
        self._lock = threading.Lock()
        # The receiver's.
        self._found = b""  # by MSG_PEEK
        self._ended = False
        self._problem: tuple[type[ConnectionResetError], str] | None = None  # unless it ended in peace
        # The lock's.
        self._due = due
        self._sending = False  # a thread waits in `send`, outside of the lock
        self._armed = False  # the reactor will look at what is due
        self._mute = False  # nothing more is encrypted: shut down, or lost
        self._finishing = False  # the end of the stream goes out after what is due
        # The reactor's.
        self._watched = -1  # the descriptor that is registered for writing
        self._closed = False
        self._reset = False
        self.deadline = NEVER
        self.version = tls.version() or ""
        cipher = tls.cipher()
        self.cipher = cipher[0] if cipher else ""
        if due:
            with self._lock:
                self._arm()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"fd={self._sock.fileno()}"
        return f"<TlsStream {state} {self.version} {self.cipher} due={len(self._due)}>"

    # ---- a socket's calls: receiving ------------------------------------------------------------------------------

    def recv(self, size: int, flags: int = 0) -> bytes:
        """Take about `size` octets of ciphertext, and return all that they yield; b"" once the peer sent close_notify.

        Raises BlockingIOError as a socket does; with MSG_DONTWAIT also where what came was no data, or half a record.
        Raises TlsTruncated, TlsBroken or another OSError where the connection is lost. What MSG_PEEK found is kept for
        the next call.
        """
        flags = int(flags)
        if self._found:
            data = self._found
            if not flags & _PEEK:
                self._found = b""
            return data
        dontwait = flags & _DONTWAIT
        most = min(size + (size >> 4), GULP) if size > RECORD else LEAST
        while not self._ended:
            data = self._decrypt(self._sock.recv(most, dontwait))
            if data:
                if flags & _PEEK:
                    self._found = data
                return data
            if dontwait and not self._ended:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        if self._problem is None:
            return b""
        kind, text = self._problem
        raise kind(errno.ECONNRESET, text)

    def _decrypt(self, ciphertext: bytes) -> bytes:
        if not ciphertext:
            self._end((TlsTruncated, "the connection ended without close_notify"))
        if len(ciphertext) <= LEAST:
            return self._open(ciphertext)
        # By pieces: the SSL object's buffer never shrinks again, and each connection has one. And others want the lock.
        whole = memoryview(ciphertext)
        return b"".join([self._open(whole[start : start + LEAST]) for start in range(0, len(whole), LEAST)])

    def _open(self, ciphertext: bytes | memoryview) -> bytes:
        if self._ended:
            return b""
        incoming, read = self._incoming, self._tls.read
        data = b""
        before: list[bytes] = []
        with self._lock:
            incoming.write(ciphertext)
            try:
                data = read(RECORD)
                while incoming.pending:
                    before.append(data)
                    data = b""
                    data = read(RECORD)
                if not data:
                    self._end(None)
            except ssl.SSLWantReadError:
                pass  # what is left is the beginning of a record, or the last record was not data
            except ssl.SSLZeroReturnError:
                self._end(None)
            except ssl.SSLError as error:
                self._end((TlsBroken, tls_in_words(error)))
            if self._outgoing.pending:
                self._answer()
        return b"".join((*before, data)) if before else data

    def _end(self, problem: tuple[type[ConnectionResetError], str] | None) -> None:
        """Nothing more is received. The kernel is made to say so, too, or a reactor would not call again for it."""
        self._ended = True
        self._problem = problem
        try:
            self._sock.shutdown(socket.SHUT_RD)
        except OSError:
            return  # it has ended anyway

    def _answer(self) -> None:
        """Send what reading has produced. The lock is held."""
        if self._mute:
            self._outgoing.read()  # close_notify was the last
        elif len(self._due) + self._outgoing.pending > MOST_DUE:
            self._end((TlsBroken, "more key updates than it takes answers to"))
        elif not self._sending:
            try:
                self._flush()
            except OSError:
                return  # who sends will hear of it; there may still be something to receive

    # ---- a socket's calls: sending --------------------------------------------------------------------------------

    def send(self, data: bytes | memoryview, flags: int = 0) -> int:
        """Encrypt and send some of it, and return how much. A little of that may still be due.

        Raises BlockingIOError where the kernel took nothing, neither of this nor of what was due. Without MSG_DONTWAIT,
        0 means that it took some of what was due before the time of SO_SNDTIMEO was over.
        """
        if not int(flags) & _DONTWAIT:
            return self._send_waiting(data)
        size = len(data)
        with self._lock:
            if self._mute:
                raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
            if self._due and not self._flush():
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            taken = self._encrypt(data)
            while self._flush() and taken < size:
                taken += self._encrypt(data[taken:])
            return taken

    def _send_waiting(self, data: bytes | memoryview) -> int:
        taken = 0
        while not taken and data:
            with self._lock:
                if self._mute:
                    raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
                if not self._due:
                    taken = self._encrypt(data)
                due = memoryview(self._due + self._outgoing.read())
                self._due = b""
                self._sending = True
            left = self._wait(due)
            if left and left == len(due) and not taken:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            if left:
                break
        return taken

    def _wait(self, due: memoryview) -> int:
        """Send what is due, outside of the lock, and return how much was left when SO_SNDTIMEO was over."""
        try:
            while due:
                due = due[self._sock.send(due) :]
        except BlockingIOError:
            pass
        except OSError:
            with self._lock:
                self._sending = False
                self._silence()
            raise
        with self._lock:
            self._sending = False
            if not self._mute:
                self._due = bytes(due)
                self._flush()  # what reading has produced meanwhile
        return len(due)

    def _encrypt(self, data: bytes | memoryview) -> int:
        """Encrypt up to MOST octets. They are due then. The lock is held, and nothing was due."""
        write = self._tls.write
        try:
            if len(data) <= RECORD:
                return write(data) if data else 0
            # Record by record: the buffer of the SSL object never shrinks again, and each connection has one.
            whole = memoryview(data)[:MOST]
            records = []
            for start in range(0, len(whole), RECORD):
                write(whole[start : start + RECORD])
                records.append(self._outgoing.read())
        except ssl.SSLError as error:
            self._silence()
            raise TlsBroken(errno.ECONNRESET, tls_in_words(error)) from None
        self._due = b"".join(records)
        return len(whole)

    def _flush(self) -> bool:
        """Offer the kernel what is due; True where nothing is left. The lock is held, and nobody waits in `send`."""
        due = self._due
        if self._outgoing.pending:
            due = due + self._outgoing.read() if due else self._outgoing.read()
        try:
            if due:
                sent = self._sock.send(due, _DONTWAIT)
                due = due[sent:]
            if self._finishing and not due:
                self._finishing = False
                self._sock.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            pass  # it takes nothing: all of it stays due
        except OSError:
            self._silence()
            raise
        self._due = due
        if not due:
            return True
        self._arm()
        return False

    def _silence(self) -> None:
        """Send nothing more, not even what is due. The lock is held."""
        self._mute = True
        self._finishing = False
        self._due = b""
        self._outgoing.read()

    # ---- a socket's calls: the end --------------------------------------------------------------------------------

    def shutdown(self, how: int) -> None:
        """SHUT_WR: close_notify and the end of the stream, after what is due. Else at once, whoever waits wakes up.

        SHUT_WR while another thread waits in `send` ends that call, too, and then nothing but a cut is left.
        """
        if how == socket.SHUT_WR:
            with self._lock:
                if not self._sending:
                    self._finish()
                    return
        self._sock.shutdown(how)

    def _finish(self) -> None:
        """Say goodbye. The lock is held, and nobody waits in `send`."""
        if not self._mute:
            self._say_goodbye()
            self._finishing = True
            self._flush()
        elif not self._finishing:
            self._sock.shutdown(socket.SHUT_WR)  # which tells whether it is lost

    def _say_goodbye(self) -> None:
        self._mute = True
        try:
            self._tls.unwrap()
        except ssl.SSLError:
            pass  # it wants the peer's close_notify, which `recv` will find; ours is written, if it still can be
        if self._outgoing.pending:
            self._due += self._outgoing.read()

    def close(self) -> None:
        """Close in peace, which may take until FLUSH if something is due, or at once after a RESET was asked for."""
        if self._closed:
            return
        self._closed = True
        self._unwatch()
        with self._lock:
            if self._reset:
                self._silence()
            elif not self._mute:
                self._say_goodbye()
            try:
                through = self._flush()
            except OSError:
                through = True  # lost, and nobody is left to be told
        if through:
            self._sock.close()
        else:
            self._linger()

    def fileno(self) -> int:
        return -1 if self._closed else self._sock.fileno()

    def setsockopt(self, level: int, option: int, value: int | bytes) -> None:
        if level == socket.SOL_SOCKET and option == socket.SO_LINGER and isinstance(value, bytes):
            self._reset = struct.unpack("ii", value) == (1, 0)
        self._sock.setsockopt(level, option, value)

    def getsockname(self) -> Any:
        return self._sock.getsockname()

    def getpeername(self) -> Any:
        return self._sock.getpeername()

    # ---- what is due, and the reactor -----------------------------------------------------------------------------

    def _arm(self) -> None:
        """Have the reactor go on with what is due. The lock is held."""
        if not self._armed:
            self._armed = True
            self._reactor.call_soon(self._watch)

    def _watch(self) -> None:
        reactor = self._reactor
        if self._closed:
            return  # `close` has seen to it
        reactor.timed.discard(self)
        with self._lock:
            if not self._due:  # it went out already, or a thread that waits in `send` has it
                self._armed = False
                return
        fd = -1
        try:
            fd = os.dup(self._sock.fileno())
            reactor.add(fd, WRITE, self._writable)
        except OSError:
            if fd >= 0:
                os.close(fd)
            self.deadline = reactor.now + RETRY
            reactor.timed.add(self)
            return
        self._watched = fd

    def _unwatch(self) -> None:
        self._reactor.timed.discard(self)
        if self._watched >= 0:
            self._reactor.remove(self._watched)
            os.close(self._watched)
            self._watched = -1

    def _writable(self, mask: int) -> None:
        with self._lock:
            try:
                over = self._sending or self._flush()
            except OSError:
                over = True  # lost: whoever sends or receives next will hear of it
            if over:
                self._armed = False
        if not over:
            return
        if self._closed:
            self._drop()
        else:
            self._unwatch()

    def _linger(self) -> None:
        """Closed, but for what is due."""
        reactor, fd = self._reactor, self._sock.fileno()
        try:
            try:
                reactor.add(fd, WRITE, self._writable)
            except FileExistsError:  # `Reactor.forget` leaves it to the close to have the kernel forget
                reactor.handlers[fd] = self._writable
                reactor.watch(fd, WRITE)
        except OSError:
            self._sock.close()
            return
        self._watched = fd
        self.deadline = reactor.now + FLUSH
        reactor.timed.add(self)
        self._home.lingers(self)

    def _drop(self) -> None:
        """Close what was kept open for what was due."""
        self._reactor.timed.discard(self)
        self._reactor.forget(self._watched)
        self.abandon()

    def abandon(self) -> None:
        """Close it though something may be due. The reactor has forgotten it, or has ended."""
        self._sock.close()
        self._home.left(self)

    def expired(self, now: float) -> None:
        if self._closed:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)  # it takes nothing, and never will
            self._drop()
        else:
            self._watch()

    def crashed(self, error: Exception) -> None:
        with self._lock:
            self._silence()
            self._armed = False
        if self._closed:
            self._drop()
        else:
            self._unwatch()


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
                arrived = self._sock.recv(FLIGHT, _PEEK | _DONTWAIT)
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
            self._sock.recv(octets, _DONTWAIT)

    def _send(self) -> int:
        """Send what the handshake has to say, and return what is to be waited for then."""
        self._unsent += self._outgoing.read()
        if self._unsent:
            try:
                self._unsent = self._unsent[self._sock.send(self._unsent, _DONTWAIT) :]
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


Stream = socket.socket | TlsStream  # a connection as the rest sees it

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with a reset
