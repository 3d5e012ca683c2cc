"""Two directions of any bytes between a client and a backend: a TCP connection, or what follows a granted Upgrade.

Each direction is by itself in one of three states. *Pumped*: a pump thread shuttles it. *Resting*: its source was
silent for a while, so the pump was given back and the reactor watches the source; the first byte starts a pump again.
*Ended*: its source closed, and that was passed on as a half-close; the other direction goes on.
A tunnel that is silent thus costs two registered descriptors and no thread.

When one direction breaks, or both were silent for too long, both sockets are shut down, which ends the other pump.
When both directions have ended the session is told; the session closes the sockets.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from functools import partial

from balancer.pump import End, Flow, Pumps, relay_stream, wait_at_most
from balancer.reactor import NEVER, READ, Reactor

REST_AFTER = 2.0  # seconds of silence after which a direction gives its thread back


class Direction:
    """One of the two ways through a tunnel."""

    __slots__ = ("ended", "flow", "name", "pumped", "resting_since")

    def __init__(self, source: socket.socket, sink: socket.socket, name: str) -> None:
        self.flow = Flow(source, sink)
        self.name = name
        self.pumped = False
        self.ended = False
        self.resting_since = 0.0


class Tunnel:
    """Both directions. Everything but the pumps' own work runs on the reactor's thread.

    idle: seconds of silence in both directions after which it is cut. on_end: called once, when both have ended.
    Neither socket is registered with the reactor when it is handed over, nor when `on_end` is called.
    """

    def __init__(
        self,
        reactor: Reactor,
        pumps: Pumps,
        client: socket.socket,
        backend: socket.socket,
        *,
        name: str,
        idle: float,
        on_end: Callable[[Tunnel], None],
    ) -> None:
        self._reactor = reactor
        self._pumps = pumps
        self._idle = idle
        self._on_end = on_end
        self.up = Direction(client, backend, f"{name}-up")
        self.down = Direction(backend, client, f"{name}-down")
        self.deadline = NEVER
        self.broken: Direction | None = None  # the one that failed first
        self.timed_out = False
        self.killed = False
        self.no_thread = False

    def start(self, up_first: bytes = b"", down_first: bytes = b"") -> None:
        """Begin, with bytes that were received already. Called once."""
        rest_after = min(REST_AFTER, self._idle)
        for direction in (self.up, self.down):
            wait_at_most(direction.flow.source, direction.flow.sink, rest_after, self._idle)
        self._reactor.timed.add(self)
        self._pump(self.up, up_first)
        self._pump(self.down, down_first)

    def kill(self) -> None:
        """End it now: an operator's word, or the balancer's stop."""
        self.killed = True
        self._break_off()

    def expired(self, now: float) -> None:
        self.timed_out = True
        self._break_off()

    def crashed(self, error: Exception) -> None:
        self._break_off()

    def _pump(self, direction: Direction, first: bytes = b"") -> None:
        if direction.ended:
            return
        direction.pumped = True
        self.deadline = NEVER  # a pump reports its own silence
        try:
            self._pumps.run(direction.name, partial(self._run, direction, first))
        except RuntimeError:
            direction.pumped = False
            self.no_thread = True
            self._break_off()

    def _run(self, direction: Direction, first: bytes) -> None:
        """On a pump thread: move bytes, then hand the direction back to the reactor, however that ended."""
        try:
            relay_stream(direction.flow, first)
        finally:
            self._reactor.call_soon(self._pump_ended, direction)

    def _pump_ended(self, direction: Direction) -> None:
        direction.pumped = False
        end = direction.flow.end
        if end is End.SILENT and not self._over:
            self._rest(direction)
            return
        direction.ended = True
        if end is not End.DONE and not self._over:
            self.broken = direction
            self._break_off()
        self._end_if_both_did()

    @property
    def _over(self) -> bool:
        return self.broken is not None or self.timed_out or self.killed or self.no_thread

    def _rest(self, direction: Direction) -> None:
        now = self._reactor.now
        direction.resting_since = now
        self._reactor.add(direction.flow.source.fileno(), READ, partial(self._woken, direction))
        if not (self.up.pumped or self.down.pumped):
            self.deadline = now + self._idle - min(REST_AFTER, self._idle)

    def _woken(self, direction: Direction, mask: int) -> None:
        self._reactor.remove(direction.flow.source.fileno())
        direction.resting_since = 0.0
        self._pump(direction)

    def _break_off(self) -> None:
        """Shut both sockets down: pumps that run end by themselves, directions that rest end here."""
        for direction in (self.up, self.down):
            if direction.resting_since:
                self._reactor.remove(direction.flow.source.fileno())
                direction.resting_since = 0.0
            if not direction.pumped:
                direction.ended = True
            try:
                direction.flow.source.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # it is gone already, and its pump with it
        self._end_if_both_did()

    def _end_if_both_did(self) -> None:
        if self.up.ended and self.down.ended and self in self._reactor.timed:
            self._reactor.timed.discard(self)
            self._on_end(self)
