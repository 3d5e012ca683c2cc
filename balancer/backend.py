"""One backend: where it is, whether it lives, how much it has in hand.

Six questions are kept apart: `healthy` is what probes and refused connections say; `admin` is what the operator says;
`leaving` is whether the configuration has it no longer; `full` is what its `max_connections` says; `eligible` is the
first three; `available` is all of them.

Rise and fall are one streak of results that contradict `healthy`; the first that agrees clears it, so with fall 3
"fail, fail, pass, fail" stays up. The very first result decides at once (HAProxy's init-state).

A backend belongs to a pool, and what several threads change here (`healthy`, `admin`, `active`, the streak) is
changed under that pool's lock only. `idle`, `answers`, `average` and most of `tally` are the reactor's alone.
"""

from __future__ import annotations

import enum
import errno
import math
import socket
import ssl
from typing import TYPE_CHECKING, Any

from balancer.config import Server
from balancer.http1 import AnswerReader, HeadLimits
from balancer.metrics import Tally

if TYPE_CHECKING:
    from collections.abc import Callable

Endpoint = tuple[int, Any]  # address family, and the address as `socket.connect` takes it

# How fast an answer time is forgotten: a backend that was slow once is worth another look after a while.
AVERAGE_HALF_LIFE = 10.0  # seconds
AVERAGE_SHARE = 0.2  # what the newest answer adds to the average
AVERAGE_FLOOR = 1 / 16  # of the average, and no less: after a quiet hour one that hangs must not look best of all


class Admin(enum.Enum):
    """What the operator wants of a backend (HAProxy's words)."""

    READY = "ready"  # serves
    DRAIN = "drain"  # gets no new work, keeps what it has
    MAINT = "maint"  # gets no work and no probes


READY = Admin.READY


class Backend:
    """A configured server and its state. `repr` is a status line."""

    __slots__ = (
        "active",
        "address",
        "admin",
        "answers",
        "average",
        "average_at",
        "backup",
        "changed_at",
        "check",
        "endpoints",
        "epoch",
        "failures",
        "healthy",
        "host",
        "id",
        "idle",
        "leaving",
        "max_connections",
        "port",
        "probed",
        "scaled",
        "send_proxy",
        "server_name",
        "streak",
        "tally",
        "tls_context",
        "turn",
        "weight",
    )

    def __init__(self, server: Server, head_limits: HeadLimits | None = None) -> None:
        self.host = server.host
        self.port = server.port
        self.address = server.address
        self.epoch = 0  # of its settings: a connection of an earlier one is not used again
        self.send_proxy = ""
        self.tls_context: ssl.SSLContext | None = None  # None: it is spoken to in the clear
        self.server_name = ""  # that its certificate must have
        self.configure(server)

        self.endpoints: tuple[Endpoint, ...] = literal_endpoints(server.host, server.port)
        self.healthy = True
        self.admin = Admin.READY
        self.leaving = False  # it was taken out of the configuration and ends what it has in hand
        self.scaled = False  # started by the load, and not of the configuration
        self.probed = False  # until the first result, which decides at once
        self.streak = 0  # results in a row that contradict `healthy`
        self.failures = 0  # failed results in a row, for the log
        self.check = "not probed yet"  # the last result in words: "L7OK 200 in 3 ms"
        self.changed_at: float | None = None  # wall clock of the last change of `healthy`
        self.active = 0  # leases out: exchanges or TCP connections

        self.turn = 0  # round robin's position: see pickers.RoundRobin
        self.average = 0.0  # seconds to the answer's head, decaying
        self.average_at = 0.0
        self.idle: list[Any] = []  # kept upstream connections, the newest last
        self.answers = AnswerReader(head_limits or HeadLimits())
        self.tally = Tally()

    def configure(self, server: Server) -> None:
        """Take on the settings of an entry with the same address. Once it is in a pool, that pool's lock is held."""
        self.id = server.id
        self.weight = server.weight
        self.backup = server.backup
        self.max_connections = server.max_connections
        if server.send_proxy != self.send_proxy:
            self.send_proxy = server.send_proxy
            self.epoch += 1

    def __repr__(self) -> str:
        kind = "backup" if self.backup else "backend"
        state = f"{self.status.lower()} weight={self.weight} active={self.active}"
        return f"<{kind.capitalize()} {self.id} {self.address} {state}>"

    @property
    def status(self) -> str:
        """UP, DOWN, DRAIN or MAINT: what the status page and the log call it."""
        if self.admin is not Admin.READY:
            return self.admin.name
        if self.leaving:
            return Admin.DRAIN.name
        return "UP" if self.healthy else "DOWN"

    @property
    def full(self) -> bool:
        return 0 < self.max_connections <= self.active

    @property
    def eligible(self) -> bool:
        """May it be given work as far as probes, the operator and the configuration are concerned?"""
        return self.healthy and self.admin is READY and not self.leaving

    @property
    def available(self) -> bool:
        return self.eligible and not self.full

    def observe(self, passed: bool, rise: int, fall: int) -> bool:
        """Count one result, and tell whether it changed `healthy`. The pool's lock is held."""
        self.failures = 0 if passed else self.failures + 1
        first, self.probed = not self.probed, True
        if passed == self.healthy:
            self.streak = 0
            return False
        self.streak += 1
        if self.streak < (rise if passed else fall) and not first:
            return False
        self.healthy = passed
        self.streak = 0
        return True

    def answered_in(self, seconds: float, now: float) -> None:
        """Feed the decaying average of the time to the answer's head; `now` is a monotonic clock's."""
        if self.average_at:
            self.average += (seconds - self.average) * AVERAGE_SHARE
        else:
            self.average = seconds
        self.average_at = now

    def expected_time(self, now: float) -> float:
        """Seconds an answer is expected to take; what was measured long ago counts less and less."""
        if not self.average_at:
            return 0.0
        return self.average * max(AVERAGE_FLOOR, math.pow(2.0, (self.average_at - now) / AVERAGE_HALF_LIFE))


class TlsFailure(OSError):
    """The connection is there, and TLS is not; its strerror says why. ETIMEDOUT where nothing came in time."""


def connect_failure(error: OSError) -> str:
    """Why there is no connection: "L4CON refused", "L4CON no route to host", "L4TOUT", "L6RSP no TLS"."""
    if isinstance(error, TlsFailure):
        return "L6TOUT" if error.errno == errno.ETIMEDOUT else f"L6RSP {error.strerror}"
    if isinstance(error, TimeoutError):
        return "L4TOUT"
    return "L4CON refused" if isinstance(error, ConnectionRefusedError) else f"L4CON {in_words(error)}"


def in_words(error: OSError) -> str:
    """The system's text for an error, fit for the middle of a line."""
    text = error.strerror or str(error) or type(error).__name__
    return text[:1].lower() + text[1:]


def tls_in_words(error: ssl.SSLError) -> str:
    """Why a handshake failed: "certificate has expired", "wrong version number"."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message or "certificate verify failed"
    return (error.reason or str(error)).lower().replace("_", " ")


def literal_endpoints(host: str, port: int) -> tuple[Endpoint, ...]:
    """The endpoint of a literal IPv4 or IPv6 address; empty for a name, which takes a look-up that may block."""
    try:
        return _endpoints(host, port, socket.AI_NUMERICHOST)
    except socket.gaierror:
        return ()


def resolve(host: str, port: int, getaddrinfo: Callable[..., list[Any]] = socket.getaddrinfo) -> tuple[Endpoint, ...]:
    """All endpoints of a name, in the resolver's order. Blocks; raises OSError where it does not resolve."""
    return _endpoints(host, port, 0, getaddrinfo)


def _endpoints(
    host: str, port: int, flags: int, getaddrinfo: Callable[..., list[Any]] = socket.getaddrinfo
) -> tuple[Endpoint, ...]:
    found = getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=flags)
    return tuple(dict.fromkeys((family, address) for family, _, _, _, address in found))
