"""What a connection begins with before it is a session's: the PROXY header of a peer that may send one, then TLS.

A greeting stands in for its session among the listener's, and hands over to it when it is done. The header is taken
from the socket to the octet, so that whoever reads next finds what follows it.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

from balancer.backend import Backend
from balancer.checks import format_address
from balancer.frontend import Frontend, MakeSession, Session
from balancer.handshake import CLOSED, HTTP, LATE, UNUSED, Handshake
from balancer.proxy_protocol import Address, ProxyError, parse
from balancer.reactor import DONTWAIT, NEVER, PEEK, READ
from balancer.stream import Stream

LONGEST_HEADER = 65551  # octets of a PROXY header


class Greeting:
    """Accepted by the listener; closed here, or handed over by `on_done(greeting, session)`."""

    def __init__(
        self,
        front: Frontend,
        sock: socket.socket,
        address: Address,
        number: int,
        make_session: MakeSession,
        on_done: Callable[[Greeting, Session], None],
    ) -> None:
        self._front = front
        self._sock = sock
        self._address = address
        self._number = number
        self._make_session = make_session
        self._on_done = on_done
        self._began = front.reactor.now
        self._header = b""  # the beginning of one
        self._handshake: Handshake | None = None
        self._ended = False
        self._counted = False  # among the connections of its client
        self.deadline = NEVER

    def start(self) -> None:
        front = self._front
        if self._address[0] in front.proxied:
            # It comes for others: whether it is let in is asked when its header has named one of them.
            self.deadline = front.reactor.now + front.timeouts.handshake
            front.reactor.timed.add(self)
            front.reactor.add(self._sock.fileno(), READ, self._on_header)
        else:
            self._encrypt()

    def drain(self) -> None:
        """What has begun may still become a request, which is answered. Who has said nothing is let go, soon."""
        if not self._begun:
            self.deadline = self._front.reactor.now + self._front.drain_grace
            self._front.reactor.timed.add(self)

    @property
    def _begun(self) -> bool:
        """Has the client said anything?"""
        return bool(self._header) or (self._handshake is not None and self._handshake.begun)

    def configured(self) -> None:
        """Its session will know."""

    def backend_hung(self, backend: Backend) -> None:
        """It has no backend yet."""

    def kill(self) -> None:
        self._give_up("KR", "the balancer stops", quietly=not self._header)

    def expired(self, now: float) -> None:
        if self._handshake is None or not self._begun:  # else it is the handshake that has a deadline
            self._give_up("cR", "no PROXY header came in time")

    def crashed(self, error: Exception) -> None:
        self._give_up("IR", "an error within the balancer")

    def _let_in(self) -> bool:
        """Is there room for one more of this client? Who begins a handshake takes some, and is told nothing."""
        peer, admission = self._address[0], self._front.admission
        if not admission.lets_in(peer):
            self._give_up("PR", "this address is not let in")
        elif admission.counts(peer):
            self._counted = admission.connected(peer)
            if not self._counted:
                self._give_up("PR", "too many connections from this address")
        return not self._ended

    def _let_go(self) -> None:
        """Whoever comes next is counted anew."""
        if self._counted:
            self._counted = False
            self._front.admission.disconnected(self._address[0])

    def _on_header(self, mask: int) -> None:
        sock = self._sock
        try:
            seen = sock.recv(LONGEST_HEADER, PEEK | DONTWAIT)
            header = parse(self._header + seen) if seen else None
            # All of what is there belongs to a header that is not complete yet.
            taken = header.length - len(self._header) if header else len(seen)
            self._header += sock.recv(taken, DONTWAIT) if taken else b""
        except BlockingIOError:
            return
        except ProxyError as error:
            self._give_up("PR", f"a PROXY header was due: {error}")
            return
        except OSError:
            seen, header = b"", None
        if not seen:
            self._give_up("CR", "the connection ended within its PROXY header")
        elif header is not None:
            self._front.reactor.timed.discard(self)
            self._front.reactor.remove(sock.fileno())
            self._address = header.source or self._address
            self._encrypt()

    def _encrypt(self) -> None:
        front = self._front
        if front.tls_context is None:
            self._hand_over(self._sock)  # the session knows whether it is let in, and how to say that it is not
            return
        if not self._let_in():
            return
        self._handshake = front.handshaker.begin(
            self._sock,
            front.tls_context,
            server_side=True,
            timeout=front.timeouts.handshake,
            on_done=self._hand_over,
            on_failed=self._not_encrypted,
        )

    def _not_encrypted(self, reason: str) -> None:
        begun = self._begun and reason != UNUSED
        self._handshake = None
        refusal = self._front.make_refusal
        if reason == HTTP and refusal is not None:
            self._make_session = refusal
            self._hand_over(self._sock)
        else:
            code = "cR" if reason.startswith(LATE) else "CR" if reason == CLOSED else "PR"
            self._give_up(code, f"TLS: {reason}", quietly=not begun)

    def _hand_over(self, stream: Stream) -> None:
        self._ended = True
        self._handshake = None
        self._let_go()
        session = self._make_session(self._front, stream, self._address, self._number)
        self._on_done(self, session)
        self._front.reactor.call(session.start)

    def _give_up(self, code: str, reason: str, *, quietly: bool | None = None) -> None:
        """Close, and say so in the log; but a connection on which nothing came is no error (browsers open some)."""
        if quietly is None:
            quietly = code != "PR" and not self._begun
        if self._ended:
            return
        self._ended = True
        self._let_go()
        front = self._front
        front.reactor.timed.discard(self)
        handshake, self._handshake = self._handshake, None
        if handshake is not None:
            handshake.cancel()  # which closes it, when the thread that computes has let go of it
        else:
            if self._sock.fileno() in front.reactor.handlers:
                front.reactor.remove(self._sock.fileno())
            self._sock.close()
        if not quietly:
            record = (
                time.time(),
                format_address(*self._address),
                b"",
                0,
                0,
                "-",
                -1.0,
                -1.0,
                -1.0,
                -1.0,
                front.reactor.now - self._began,
                code,
                0,
                front.request_id(),
                len(self._header),
                len(front.sessions),
                front.pool.in_hand,
                0,
                0,
            )
            front.record(record)
            front.explain(record, reason, self._began, None)
        front.on_closed(self)
