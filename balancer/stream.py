"""TLS connections that are used like sockets.

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

The contexts that are used here should have OP_NO_RENEGOTIATION: to renegotiate is taken for a broken connection.
"""

from __future__ import annotations

import errno
import os
import socket
import ssl
import struct
import threading
from typing import Any, Protocol

from balancer.backend import tls_in_words
from balancer.reactor import DONTWAIT, NEVER, PEEK, WRITE, Reactor

RECORD = 16384  # octets of content in one record at most (RFC 8446, section 5.1)
MOST = 65536  # octets that are encrypted ahead of the kernel, and for which the lock is held without a break
LEAST = RECORD + 512  # octets of ciphertext asked for at once: any record, however little the caller asks for
GULP = MOST + (MOST >> 4)  # octets of ciphertext asked for at once: what MOST octets become, and to spare
MOST_DUE = 2 * MOST  # octets that may be due: a peer that asks for key updates and does not read makes them more
FLUSH = 60.0  # seconds that a connection which was closed may take to pass on what is due
RETRY = 0.2  # seconds until a duplicate descriptor is tried again, when none could be had


class TlsTruncated(ConnectionResetError):
    """The connection ended without close_notify: somebody may have cut it."""


class TlsBroken(ConnectionResetError):
    """What came is not what the peer can have sent, or it said by an alert that this holds for us."""


class Home(Protocol):
    """Who made a connection, and sees it off when it was closed with something due."""

    @property
    def reactor(self) -> Reactor: ...

    def lingers(self, stream: TlsStream) -> None:
        """It is closed, but for what is due."""

    def left(self, stream: TlsStream) -> None:
        """It was closed for good."""


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
        home: Home,
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
            if not flags & PEEK:
                self._found = b""
            return data
        dontwait = flags & DONTWAIT
        most = min(size + (size >> 4), GULP) if size > RECORD else LEAST
        while not self._ended:
            data = self._decrypt(self._sock.recv(most, dontwait))
            if data:
                if flags & PEEK:
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
        if not int(flags) & DONTWAIT:
            return self._send_waiting(data)
        size = len(data)
        with self._lock:
            if self._mute:
                raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
            if self._due and not self._flush():
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            taken = left = 0
            try:
                taken = self._encrypt(data)
                while self._flush() and taken < size:
                    left = taken
                    taken += self._encrypt(data[taken:])
            except OSError:
                if not left:
                    raise
                return left  # the next call raises: an error says that nothing has left, so that it may go elsewhere
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
                sent = self._sock.send(due, DONTWAIT)
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


Stream = socket.socket | TlsStream  # a connection as the rest sees it

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with a reset
