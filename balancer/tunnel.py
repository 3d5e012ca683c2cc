"""Two directions of any bytes between a client and a backend: a TCP connection, or what follows a granted Upgrade.

Each direction is by itself in one of three states. *Resting*: the reactor watches its source, and passes on what comes
as long as that is little at a time and the sink takes it: waking a thread for each line of a dialogue would cost more
than the line. *Pumped*: much came at once, or the sink made it wait, so a pump thread shuttles the direction, until its
source is silent for a while. *Ended*: its source closed, and that was passed on as a half-close, or it broke; the other
direction goes on. A tunnel that is silent, or only talks, thus costs two registered descriptors and no thread.

How a direction that breaks ends the other one:
- A sink that is lost sends nothing new, but what it sent before may still lie here, such as the answer of a server that
  did not want the rest of a request: the other direction goes on, and soon comes to that end by itself.
- A source that is lost has reset its connection: what it sent must not look complete, so the reset is passed on.
  A socket tells of its reset once, and from then on of an end like any other: where sending heard of it, the direction
  that receives from there has to be told.
- Whatever else happens, both sockets are shut down, which ends the pumps that still run.

When both directions have ended the session is told; the session closes the sockets.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from functools import partial

from balancer.pump import RESET, End, Flow, Pumps, half_close, relay_stream
from balancer.reactor import DONTWAIT, NEVER, READ, Reactor
from balancer.stream import Stream

TURN = 32768  # octets that are asked for at once; when that many are there, a pump is worth its start
REST_AFTER = 2.0  # seconds of silence after which a direction gives its thread back


class Direction:
    """One of the two ways through a tunnel."""

    __slots__ = ("codes", "ended", "flow", "name", "pumped", "reset", "resting")

    def __init__(self, source: Stream, sink: Stream, name: str, codes: dict[End, str]) -> None:
        self.flow = Flow(source, sink)
        self.name = name
        self.codes = codes
        self.pumped = False
        self.resting = False
        self.ended = False
        self.reset = False  # the source, as the other direction heard in sending


class Tunnel:
    """Both directions. Everything but the pumps' own work runs on the reactor's thread.

    idle: seconds of silence in both directions after which it is cut. on_end: called once, when both have ended.
    Neither socket is registered with the reactor when it is handed over, nor when `on_end` is called.
    """

    __slots__ = (
        "_cut",
        "_heard",
        "_idle",
        "_on_end",
        "_pumps",
        "_reactor",
        "_rest_after",
        "code",
        "deadline",
        "down",
        "up",
    )

    def __init__(
        self,
        reactor: Reactor,
        pumps: Pumps,
        client: Stream,
        backend: Stream,
        *,
        name: str,
        idle: float,
        on_end: Callable[[Tunnel], None],
    ) -> None:
        self._reactor = reactor
        self._pumps = pumps
        self._idle = idle
        self._rest_after = min(REST_AFTER, idle)
        self._on_end = on_end
        self._heard = reactor.now  # when the last octet, or the end of a direction, came, as far as the reactor knows
        self.up = Direction(client, backend, f"{name}-up", _UP_CODES)
        self.down = Direction(backend, client, f"{name}-down", _DOWN_CODES)
        self.deadline = NEVER
        self.code = "--"  # what ended it first, as the log says it
        self._cut = False

    def start(self, up_first: bytes = b"", down_first: bytes = b"") -> None:
        """Begin, with bytes that were received already. Called once."""
        self._reactor.timed.add(self)
        self._hear(self._reactor.now)
        for direction in (self.up, self.down):
            self._rest(direction)
        for direction, first in ((self.up, up_first), (self.down, down_first)):
            if first and direction.resting:
                self._pass_on(direction, first)

    def kill(self) -> None:
        """End it now: an operator's word, or the balancer's stop."""
        self._break_off("KD")

    def expired(self, now: float) -> None:
        self._break_off("cD")

    def crashed(self, error: Exception) -> None:
        self._break_off("ID")

    def _pump(self, direction: Direction, first: bytes) -> None:
        direction.pumped = True
        self.deadline = NEVER
        direction.flow.wait_at_most(self._rest_after, self._idle)
        try:
            self._pumps.run(direction.name, partial(self._run, direction, first))
        except RuntimeError:
            direction.pumped = False
            self._break_off("RD")

    def _run(self, direction: Direction, first: bytes) -> None:
        """On a pump thread: move bytes, then hand the direction back to the reactor, however that ended."""
        try:
            relay_stream(direction.flow, first)
        finally:
            self._reactor.call_soon(self._pump_ended, direction)

    def _pump_ended(self, direction: Direction) -> None:
        direction.pumped = False
        silent = direction.flow.end is End.SILENT
        if silent and not self._cut:
            self._rest(direction)
        else:
            self._ended(direction, direction.flow.end)
        self._hear(self._reactor.now - (self._rest_after if silent else 0.0))

    def _ended(self, direction: Direction, end: End) -> None:
        direction.ended = True
        if not self._cut and end is not End.DONE:
            self._follow(direction, end)
        self._end_if_both_did()

    def _follow(self, broken: Direction, end: End) -> None:
        """Have the other direction end as well: see the head of this file."""
        code = broken.codes[end]
        if end is End.SINK_LOST:
            self._note(code)
        elif end is End.SOURCE_LOST:
            _reset_at_close(broken.flow.sink)
            if not isinstance(broken.flow.source, socket.socket):
                _reset_at_close(broken.flow.source)  # or it would be told by TLS's goodbye that it has heard all
            self._break_off(code, socket.SHUT_RD)  # both would send the end of the stream, ahead of the reset
        else:
            self._break_off(code)

    def _rest(self, direction: Direction) -> None:
        self._reactor.add(direction.flow.source.fileno(), READ, partial(self._turn, direction))
        direction.resting = True

    def _wake(self, direction: Direction) -> None:
        self._reactor.remove(direction.flow.source.fileno())
        direction.resting = False

    def _turn(self, direction: Direction, mask: int) -> None:
        """Something came from a source that rests."""
        try:
            data = direction.flow.source.recv(TURN, DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            self._source_ended(direction, End.SOURCE_LOST)
            return
        if data:
            self._pass_on(direction, data)
        else:
            self._source_ended(direction, End.DONE)

    def _source_ended(self, direction: Direction, end: End) -> None:
        """The source of a direction that rests has nothing more to say, or was lost."""
        self._wake(direction)
        self._hear(self._reactor.now)
        if direction.reset:
            end = End.SOURCE_LOST
        elif end is End.DONE and not half_close(direction.flow.sink):
            end = End.SINK_LOST
        self._ended(direction, end)

    def _pass_on(self, direction: Direction, data: bytes) -> None:
        flow = direction.flow
        try:
            sent = flow.sink.send(data, DONTWAIT)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            # EPIPE is told where the sink had sent all that it had, and its end, before it was lost.
            other = self.down if direction is self.up else self.up
            other.reset = not isinstance(error, BrokenPipeError)
            self._wake(direction)
            self._ended(direction, End.SINK_LOST)
            return
        flow.octets += sent
        if sent == len(data) < TURN:
            now = self._heard = self._reactor.now
            if self.deadline < NEVER:  # nothing is pumped
                self.deadline = now + self._idle
        else:
            self._wake(direction)
            self._pump(direction, data[sent:])

    def _hear(self, moment: float) -> None:
        """Count the silence from here. While a direction is pumped nobody does: its pump reports its own silence."""
        self._heard = max(self._heard, moment)
        self.deadline = NEVER if self.up.pumped or self.down.pumped else self._heard + self._idle

    def _note(self, code: str) -> None:
        if self.code == "--":
            self.code = code

    def _break_off(self, code: str, how: int = socket.SHUT_RDWR) -> None:
        """Shut both sockets down, which ends the pumps that run; directions that rest end here."""
        self._note(code)
        self._cut = True
        for direction in (self.up, self.down):
            if direction.resting:
                self._wake(direction)
            if not direction.pumped:
                direction.ended = True
            try:
                direction.flow.source.shutdown(how)
            except OSError:
                continue  # it is gone already, and its pump with it
        self._end_if_both_did()

    def _end_if_both_did(self) -> None:
        if self.up.ended and self.down.ended and self in self._reactor.timed:
            self._reactor.timed.discard(self)
            self._on_end(self)


def _reset_at_close(sock: Stream) -> None:
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    except OSError:
        return  # macOS refuses this for a connection that is dead, and there is nobody left to be told


# How the end of a direction is told: who it was, as the first letter of a termination code, and that it was in the
# data.
_UP_CODES = {
    End.SOURCE_LOST: "CD",
    End.SINK_LOST: "SD",
    End.SINK_STUCK: "sD",
    End.FAILED: "ID",
}
_DOWN_CODES = {
    End.SOURCE_LOST: "SD",
    End.SINK_LOST: "CD",
    End.SINK_STUCK: "cD",
    End.FAILED: "ID",
}
