"""Two directions of any bytes: half-closes, rest and waking, silence, breaks, and being killed in every state."""

from __future__ import annotations

import hashlib
import random
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from balancer import tunnel as tunnel_module
from balancer.pump import End, Flow, Pumps
from balancer.reactor import NEVER, READ, Reactor
from balancer.tunnel import Tunnel
from conftest import PATIENCE, eventually

REST_AFTER = 0.02  # seconds, in place of the two that are usual
IDLE = 3600.0
RESET = struct.pack("ii", 1, 0)


# By hand: no thread runs, the test plays reactor and pumps ---------------------------------------------------------


class HandReactor:
    """What a tunnel asks of a reactor, recorded."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.timed: set[object] = set()
        self.watched: dict[int, Callable[[int], None]] = {}
        self.calls: list[tuple[Callable[..., None], tuple[object, ...]]] = []

    def add(self, fd: int, mask: int, handler: Callable[[int], None]) -> None:
        assert fd not in self.watched
        self.watched[fd] = handler

    def remove(self, fd: int) -> None:
        del self.watched[fd]

    def call_soon(self, function: Callable[..., None], *arguments: object) -> None:
        self.calls.append((function, arguments))


class HandPumps:
    """Accepts work and leaves it to the test; `free` is how many more pieces find a thread."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.works: list[Callable[[], None]] = []
        self.free = 1000

    def run(self, name: str, work: Callable[[], None]) -> None:
        if not self.free:
            raise RuntimeError("all are busy")
        self.free -= 1
        self.names.append(name)
        self.works.append(work)


class Narrow:
    """A sink that takes no more than so many octets at once, and none as long as `takes` is 0."""

    def __init__(self, sock: socket.socket, takes: int) -> None:
        self.sock = sock
        self.takes = takes

    def __getattr__(self, name: str) -> object:
        return getattr(self.sock, name)

    def send(self, data: bytes, flags: int = 0) -> int:
        if not self.takes:
            raise BlockingIOError
        return self.sock.send(data[: self.takes], flags)


class ByHand:
    """A tunnel between two connections, whose pumps end how and when the test says."""

    def __init__(self, idle: float = 100.0) -> None:
        self.reactor = HandReactor()
        self.pumps = HandPumps()
        self.client, self._client_end = connection()
        self.backend, self._backend_end = connection()
        self.ended = 0
        self.tunnel = Tunnel(
            self.reactor,
            self.pumps,
            self._client_end,
            self._backend_end,
            name="conn-1",
            idle=idle,
            on_end=self._on_end,
        )

    def _on_end(self, tunnel: Tunnel) -> None:
        """As a session does."""
        assert tunnel is self.tunnel
        assert not self.reactor.watched
        self.ended += 1
        self._client_end.close()
        self._backend_end.close()

    def start(self) -> None:
        self.tunnel.start()

    def source_peer(self, way: str) -> socket.socket:
        return {"up": self.client, "down": self.backend}[way]

    def sink_peer(self, way: str) -> socket.socket:
        return {"up": self.backend, "down": self.client}[way]

    def ready(self, way: str, octets: int = 0) -> None:
        """Wait until so many octets, or the end, are there, and let the reactor see it."""
        source = getattr(self.tunnel, way).flow.source
        assert select.select([source], [], [], PATIENCE)[0]
        eventually(lambda: len(peek(source, octets)) == octets, "what was sent")
        self.reactor.watched[source.fileno()](READ)

    def say(self, way: str, octets: int) -> None:
        self.source_peer(way).sendall(bytes(octets))
        self.ready(way, octets)

    def much(self, way: str) -> None:
        """So much that it is worth a pump; it arrives."""
        self.say(way, tunnel_module.TURN)
        assert receive(self.sink_peer(way), tunnel_module.TURN) == bytes(tunnel_module.TURN)

    def pump_ends(self, way: str, end: End) -> None:
        direction = getattr(self.tunnel, way)
        assert direction.pumped
        direction.flow.end = end
        self.tunnel._pump_ended(direction)

    def expire(self) -> None:
        self.tunnel.deadline = NEVER
        self.tunnel.expired(self.reactor.now)

    def lose(self, way: str) -> None:
        """Reset the connection that this direction sends to, and wait until the tunnel's end of it has heard."""
        reset(self.sink_peer(way))
        assert select.select([getattr(self.tunnel, way).flow.sink], [], [], PATIENCE)[0]

    def bring_to(self, state: str) -> None:
        """Up's state, a slash, down's: `pumped/resting`."""
        self.start()
        for way, wanted in zip(("up", "down"), state.split("/"), strict=True):
            if wanted == "pumped":
                self.much(way)
            elif wanted == "ended":
                self.source_peer(way).shutdown(socket.SHUT_WR)
                self.ready(way)

    def close(self) -> None:
        for sock in (self.client, self._client_end, self.backend, self._backend_end):
            sock.close()


def connection() -> tuple[socket.socket, socket.socket]:
    """Both ends of a TCP connection: the test's, which is patient, and the tunnel's, which blocks."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname(), timeout=PATIENCE)
        other, _ = listener.accept()
    return one, other


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    sock.close()


@pytest.fixture
def hand() -> Iterator[ByHand]:
    made = ByHand()
    yield made
    made.close()


def peek(sock: socket.socket, count: int) -> bytes:
    return sock.recv(count, socket.MSG_PEEK | socket.MSG_DONTWAIT) if count else b""


def test_both_directions_begin_at_rest(hand):
    hand.start()
    assert hand.pumps.names == []
    assert len(hand.reactor.watched) == 2
    assert hand.tunnel in hand.reactor.timed
    assert hand.tunnel.deadline == hand.reactor.now + 100


def test_it_ends_when_both_directions_have_ended_and_says_so_once(hand):
    hand.start()
    hand.client.shutdown(socket.SHUT_WR)
    hand.ready("up")
    assert hand.ended == 0
    assert hand.backend.recv(1) == b"", "the end is passed on as a half-close"
    hand.backend.sendall(b"answer")
    hand.backend.shutdown(socket.SHUT_WR)
    hand.ready("down", 6)
    assert hand.ended == 0
    hand.ready("down")
    assert receive_all(hand.client) == b"answer"
    assert hand.ended == 1
    assert hand.tunnel.code == "--"
    assert hand.reactor.timed == set()
    assert hand.reactor.watched == {}


def test_a_little_is_passed_on_without_a_pump(hand):
    hand.start()
    for _ in range(3):
        hand.say("up", 100)
        assert receive(hand.backend, 100) == bytes(100)
    assert hand.pumps.names == []
    assert hand.tunnel.up.flow.octets == 300


def test_much_starts_a_pump_and_its_silence_ends_that(hand):
    hand.start()
    hand.much("down")
    assert hand.pumps.names == ["conn-1-down"]
    assert list(hand.reactor.watched) == [hand.tunnel.up.flow.source.fileno()]
    hand.pump_ends("down", End.SILENT)
    hand.say("down", 1)
    assert hand.pumps.names == ["conn-1-down"]
    hand.much("down")
    assert hand.pumps.names == ["conn-1-down"] * 2


def test_a_sink_that_does_not_take_all_is_left_to_a_pump(hand):
    hand.start()
    sent = 0
    while not hand.tunnel.up.pumped:
        hand.say("up", 1000)
        sent += 1000
    assert hand.pumps.names == ["conn-1-up"]
    assert 0 < sent - hand.tunnel.up.flow.octets <= 1000, "what is left is the pump's to send"


@pytest.mark.parametrize("takes", [0, 1, 999, 1000])
@pytest.mark.parametrize("way", ["up", "down"])
def test_a_pump_sends_what_the_sink_left_and_nothing_twice(hand, way, takes):
    hand.start()
    flow = getattr(hand.tunnel, way).flow
    flow.sink = sink = Narrow(flow.sink, takes)
    data = random.Random(2).randbytes(3000)
    hand.source_peer(way).sendall(data[:1000])
    hand.ready(way, 1000)
    assert flow.octets == takes
    hand.source_peer(way).sendall(data[1000:])
    hand.source_peer(way).shutdown(socket.SHUT_WR)
    if takes == 1000:
        assert hand.pumps.works == []
        hand.ready(way, 2000)
    sink.takes = 100
    pumps = Pumps()
    for work in hand.pumps.works:
        pumps.run("conn-1", work)
    pumps.stop()
    assert hand.reactor.calls == [(hand.tunnel._pump_ended, (getattr(hand.tunnel, way),))]
    assert receive_all(hand.sink_peer(way)) == data
    assert (flow.octets, flow.end) == (3000, End.DONE)


@pytest.mark.parametrize(("octets", "names"), [(-1, []), (0, ["conn-1-down"]), (1, ["conn-1-down"])])
def test_a_full_piece_is_worth_a_pump_and_less_is_not(hand, octets, names):
    hand.start()
    hand.say("down", tunnel_module.TURN + octets)
    assert hand.pumps.names == names
    assert hand.tunnel.down.flow.octets == tunnel_module.TURN + min(octets, 0)


def test_a_turn_takes_one_piece_and_leaves_the_rest_for_the_next(hand, monkeypatch):
    """However much lies there, the others that are ready have their turns before it."""
    hand.start()
    hand.client.sendall(bytes(1000))
    source = hand.tunnel.up.flow.source
    eventually(lambda: len(peek(source, 1000)) == 1000, "what was sent")
    monkeypatch.setattr(tunnel_module, "TURN", 600)
    hand.ready("up", 600)
    assert hand.tunnel.up.flow.octets == 600
    assert len(peek(source, 1000)) == 400


def test_what_was_received_before_goes_first(hand):
    hand.tunnel.start(b"early", b"hello")
    assert receive(hand.backend, 5) + receive(hand.client, 5) == b"earlyhello"
    assert hand.pumps.names == []


def test_much_that_was_received_before_is_worth_a_pump(hand):
    hand.tunnel.start(up_first=bytes(tunnel_module.TURN))
    assert hand.pumps.names == ["conn-1-up"]
    assert receive(hand.backend, tunnel_module.TURN) == bytes(tunnel_module.TURN)
    assert (hand.tunnel.up.resting, hand.tunnel.down.resting, hand.tunnel.deadline) == (False, True, NEVER)


def test_without_a_thread_for_what_was_received_before_it_ends_at_its_start(hand):
    hand.pumps.free = 0
    hand.tunnel.start(bytes(tunnel_module.TURN), b"hello")
    assert (hand.ended, hand.tunnel.code, hand.reactor.timed) == (1, "RD", set())


def test_a_backend_that_is_lost_before_the_start_leaves_what_it_said(hand):
    hand.lose("up")
    hand.tunnel.start(b"early", b"hello")
    assert (hand.ended, list(hand.reactor.watched)) == (0, [hand.tunnel.down.flow.source.fileno()])
    assert receive(hand.client, 5) == b"hello"
    hand.ready("down")
    assert (hand.ended, hand.tunnel.code) == (1, "SD")


# How long it may be silent: the later of any octet either way ------------------------------------------------------


def test_each_octet_either_way_starts_the_silence_anew(hand):
    hand.start()
    for way in ("up", "down"):
        hand.reactor.now += 50
        hand.say(way, 1)
        assert hand.tunnel.deadline == hand.reactor.now + 100


def test_a_direction_that_is_pumped_keeps_the_other_ones_silence_from_counting(hand):
    """A long stream one way must not be cut because nothing goes the other way."""
    hand.bring_to("resting/pumped")
    assert hand.tunnel.deadline == NEVER
    hand.say("up", 1)
    assert hand.tunnel.deadline == NEVER


def test_a_pump_that_waited_in_vain_heard_its_last_octet_before(hand):
    hand.bring_to("pumped/pumped")
    hand.pump_ends("up", End.SILENT)
    assert hand.tunnel.deadline == NEVER
    hand.reactor.now += 500
    hand.pump_ends("down", End.SILENT)
    assert hand.tunnel.deadline == hand.reactor.now - tunnel_module.REST_AFTER + 100


def test_what_came_the_other_way_while_a_pump_waited_in_vain_counts(hand):
    """Where the silence allowed is short, the pump waits for all of it, and a tunnel in use would be cut."""
    hand.bring_to("pumped/resting")
    hand.reactor.now += 500
    hand.say("down", 1)
    heard = hand.reactor.now
    hand.reactor.now += 1
    hand.pump_ends("up", End.SILENT)
    assert hand.tunnel.deadline == heard + 100


@pytest.mark.parametrize("by_pump", [False, True])
def test_silence_counts_when_only_one_direction_is_left(hand, by_pump):
    """The backend has closed: a client that never closes must not keep the connection for ever."""
    hand.start()
    if by_pump:
        hand.much("down")
        hand.reactor.now += 500
        hand.pump_ends("down", End.DONE)
    else:
        hand.reactor.now += 50
        hand.backend.shutdown(socket.SHUT_WR)
        hand.ready("down")
    assert hand.tunnel.deadline == hand.reactor.now + 100
    assert hand.ended == 0


# How it can be ended ----------------------------------------------------------------------------------------------


STATES = [
    f"{up}/{down}"
    for up in ("pumped", "resting", "ended")
    for down in ("pumped", "resting", "ended")
    if not up == down == "ended"
]


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(
    ("how", "code"),
    [
        (lambda hand: hand.tunnel.kill(), "KD"),
        (lambda hand: hand.expire(), "cD"),
        (lambda hand: hand.tunnel.crashed(ValueError("a bug")), "ID"),
    ],
    ids=["killed", "timed out", "crashed"],
)
def test_it_can_be_ended_in_every_state(hand, state, how, code):
    hand.bring_to(state)
    how(hand)
    for way in ("up", "down"):
        if getattr(hand.tunnel, way).pumped:
            assert hand.ended == 0, "a socket that a pump still uses must not be closed"
            hand.pump_ends(way, End.DONE)
    assert hand.ended == 1
    assert hand.tunnel.code == code
    assert hand.reactor.watched == {}
    assert hand.reactor.timed == set()
    assert hand.client.recv(1) == hand.backend.recv(1) == b""


@pytest.mark.parametrize("end", [End.SILENT, End.SOURCE_LOST, End.SINK_LOST, End.SINK_STUCK, End.FAILED, End.DONE])
def test_how_a_pump_ends_after_a_kill_changes_nothing(hand, end):
    hand.bring_to("pumped/ended")
    hand.tunnel.kill()
    hand.tunnel.kill()
    hand.pump_ends("up", end)
    assert (hand.ended, hand.tunnel.code, hand.reactor.watched) == (1, "KD", {})


@pytest.mark.parametrize("other_state", ["pumped", "resting"])
@pytest.mark.parametrize(
    ("way", "end", "code"),
    [
        ("up", End.SOURCE_LOST, "CD"),
        ("up", End.SINK_STUCK, "sD"),
        ("up", End.FAILED, "ID"),
        ("down", End.SOURCE_LOST, "SD"),
        ("down", End.SINK_STUCK, "cD"),
        ("down", End.FAILED, "ID"),
    ],
)
def test_a_pump_that_breaks_off_ends_the_other_way_and_names_who_broke_it(hand, way, end, code, other_state):
    other = {"up": "down", "down": "up"}[way]
    hand.bring_to(f"pumped/{other_state}" if way == "up" else f"{other_state}/pumped")
    hand.pump_ends(way, end)
    if other_state == "pumped":
        assert getattr(hand.tunnel, other).flow.source.recv(1) == b"", "a pump that waits there wakes"
        assert hand.ended == 0
        hand.pump_ends(other, End.SINK_LOST)
    assert (hand.ended, hand.tunnel.code) == (1, code)


@pytest.mark.parametrize(("way", "code"), [("up", "SD"), ("down", "CD")])
def test_a_sink_that_is_lost_leaves_what_it_sent_before_to_be_delivered(hand, way, code):
    """A server that answers without reading the rest resets the connection as it closes; its answer is here already."""
    other = {"up": "down", "down": "up"}[way]
    hand.bring_to("pumped/resting" if way == "up" else "resting/pumped")
    hand.source_peer(other).sendall(b"answer")
    hand.pump_ends(way, End.SINK_LOST)
    assert hand.ended == 0
    assert hand.tunnel.deadline < NEVER, "and it cannot stay for ever"
    hand.ready(other, 6)
    hand.source_peer(other).close()
    hand.ready(other)
    assert receive_all(hand.sink_peer(other)) == b"answer"
    assert (hand.ended, hand.tunnel.code) == (1, code)


@pytest.mark.parametrize("heard_by", ["data", "end"])
@pytest.mark.parametrize(("way", "code"), [("up", "SD"), ("down", "CD")])
def test_a_reset_that_is_heard_of_in_sending_is_passed_on_as_one(hand, way, code, heard_by):
    """The kernel tells of it once; who receives after that meets an end that looks like any other."""
    other = {"up": "down", "down": "up"}[way]
    hand.start()
    hand.say(other, 100)
    hand.lose(way)
    if heard_by == "data":
        hand.say(way, 1)
    else:
        hand.source_peer(way).shutdown(socket.SHUT_WR)
        hand.ready(way)
    assert (hand.ended, hand.tunnel.code) == (0, code)
    hand.ready(other)
    assert (hand.ended, hand.tunnel.code) == (1, code)
    with pytest.raises(ConnectionResetError):
        receive_all(hand.source_peer(way))


def test_an_answer_that_is_complete_stays_so_when_its_server_hears_no_more(hand):
    """It closes with octets unread, behind its answer and its end: what comes for it later is answered by a reset."""
    hand.start()
    hand.say("up", 1)
    hand.backend.sendall(b"answer")
    hand.backend.shutdown(socket.SHUT_WR)
    source = hand.tunnel.down.flow.source
    eventually(lambda: len(peek(source, 6)) == 6, "the answer")
    hand.backend.close()
    poll = select.poll()
    poll.register(source, 0)
    assert poll.poll(PATIENCE * 1000), "the reset"
    hand.say("up", 1)
    assert (hand.tunnel.up.ended, hand.ended) == (True, 0)
    hand.ready("down", 6)
    hand.ready("down")
    assert receive_all(hand.client) == b"answer"
    assert (hand.ended, hand.tunnel.code) == (1, "SD")


def test_a_reset_seen_at_rest_ends_the_other_way(hand):
    hand.start()
    reset(hand.client)
    hand.ready("up")
    assert (hand.ended, hand.tunnel.code, hand.reactor.watched) == (1, "CD", {})


def test_readiness_that_was_another_sockets_is_no_end(hand):
    """A descriptor's number may have been given away within the batch in which it was ready."""
    hand.start()
    hand.reactor.watched[hand.tunnel.up.flow.source.fileno()](READ)
    assert hand.tunnel.up.resting
    assert hand.ended == 0


def test_without_a_thread_for_one_direction_neither_goes_on(hand):
    hand.bring_to("pumped/resting")
    hand.pumps.free = 0
    hand.say("down", tunnel_module.TURN)
    assert hand.ended == 0
    assert receive_all(hand.client) == bytes(tunnel_module.TURN)
    hand.pump_ends("up", End.DONE)
    assert (hand.ended, hand.tunnel.code, hand.reactor.watched) == (1, "RD", {})


def test_without_any_thread_short_messages_still_pass(hand):
    hand.pumps.free = 0
    hand.start()
    hand.say("up", 100)
    assert receive(hand.backend, 100) == bytes(100)
    hand.say("up", tunnel_module.TURN)
    assert (hand.ended, hand.tunnel.code, hand.pumps.names, hand.reactor.watched) == (1, "RD", [], {})


def test_a_pump_that_breaks_still_reports(hand, monkeypatch):
    def broken(flow: Flow, first: bytes) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(tunnel_module, "relay_stream", broken)
    with pytest.raises(ZeroDivisionError):
        hand.tunnel._run(hand.tunnel.up, b"")
    assert hand.reactor.calls == [(hand.tunnel._pump_ended, (hand.tunnel.up,))]
    assert hand.tunnel.up.flow.end is End.FAILED


# With threads -----------------------------------------------------------------------------------------------------


class Running:
    """A reactor, pumps, and tunnels between pairs of connections of which the test holds the outer ends."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.reactor = Reactor(tick=0.01, on_error=lambda where, error: self.errors.append(f"{where}: {error!r}"))
        self.pumps = Pumps(idle_seconds=0.02, on_error=lambda where, error: self.errors.append(f"{where}: {error!r}"))
        self.reactor.start()
        self.socks: list[socket.socket] = []
        self.ended: list[Tunnel] = []

    def tunnel(
        self, idle: float = IDLE, up_first: bytes = b"", down_first: bytes = b""
    ) -> tuple[socket.socket, socket.socket, Tunnel]:
        """The client's end, the backend's end and what is between them."""
        client, client_end = connection()
        backend, backend_end = connection()
        self.socks += [client, client_end, backend, backend_end]
        made = Tunnel(
            self.reactor,
            self.pumps,
            client_end,
            backend_end,
            name=f"conn-{len(self.socks) // 4}",
            idle=idle,
            on_end=self._on_end,
        )
        self.reactor.call_soon(made.start, up_first, down_first)
        return client, backend, made

    def _on_end(self, tunnel: Tunnel) -> None:
        """As a session does."""
        for sock in (tunnel.up.flow.source, tunnel.down.flow.source):
            assert sock.fileno() not in self.reactor.handlers
            sock.close()
        self.ended.append(tunnel)

    def wait_for(self, tunnel: Tunnel) -> None:
        eventually(lambda: tunnel in self.ended, "the tunnel's end")
        assert self.ended.count(tunnel) == 1
        assert tunnel not in self.reactor.timed

    def close(self) -> None:
        for sock in self.socks:
            if sock.fileno() >= 0:
                sock.settimeout(0)  # whoever blocks in it has failed already
                try:
                    sock.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue
        self.pumps.stop()
        self.reactor.stop()
        for sock in self.socks:
            sock.close()


@pytest.fixture
def run(monkeypatch) -> Iterator[Running]:
    monkeypatch.setattr(tunnel_module, "REST_AFTER", REST_AFTER)
    made = Running()
    yield made
    made.close()
    assert made.errors == []


def receive(sock: socket.socket, count: int) -> bytes:
    """So many octets and not one more; fewer where the stream ends before."""
    got = b""
    while len(got) < count and (data := sock.recv(min(count - len(got), 65536))):
        got += data
    return got


def receive_all(sock: socket.socket) -> bytes:
    return receive(sock, sys.maxsize)


def rest(running: Running, tunnel: Tunnel) -> None:
    eventually(lambda: tunnel.up.resting and tunnel.down.resting, "a tunnel that rests")
    eventually(lambda: running.pumps.threads == 0, "no thread")


def test_bytes_go_both_ways_behind_what_was_received_before(run):
    client, backend, tunnel = run.tunnel(up_first=b"early ", down_first=b"hello ")
    client.sendall(b"question")
    assert receive(backend, 14) == b"early question"
    backend.sendall(b"answer")
    assert receive(client, 12) == b"hello answer"
    for sock in (client, backend):
        sock.close()
    run.wait_for(tunnel)
    assert (tunnel.up.flow.octets, tunnel.down.flow.octets, tunnel.code) == (14, 12, "--")


def test_a_client_that_half_closes_first_gets_its_answer(run):
    client, backend, tunnel = run.tunnel()
    client.sendall(b"question")
    client.shutdown(socket.SHUT_WR)
    assert receive_all(backend) == b"question"
    backend.sendall(b"answer")
    backend.close()
    assert receive_all(client) == b"answer"
    run.wait_for(tunnel)
    assert tunnel.code == "--"


def test_a_backend_that_half_closes_first_is_heard_to_the_end(run):
    client, backend, tunnel = run.tunnel()
    backend.sendall(b"greeting")
    backend.shutdown(socket.SHUT_WR)
    assert receive_all(client) == b"greeting"
    client.sendall(b"thanks")
    client.close()
    assert receive_all(backend) == b"thanks"
    run.wait_for(tunnel)
    assert tunnel.code == "--"


def test_a_tunnel_that_rests_holds_no_thread_and_wakes_from_either_side(run):
    client, backend, tunnel = run.tunnel()
    for _ in range(2):
        rest(run, tunnel)
        client.sendall(b"ping")
        assert receive(backend, 4) == b"ping"
        backend.sendall(b"pong")
        assert receive(client, 4) == b"pong"
        pump(tunnel, client, backend)
    rest(run, tunnel)
    client.close()
    assert receive_all(backend) == b""
    backend.close()
    run.wait_for(tunnel)
    assert tunnel.code == "--"
    assert min(tunnel.up.flow.octets, tunnel.down.flow.octets) >= 2 * (tunnel_module.TURN + 4)


def test_a_direction_that_rests_does_not_hinder_the_other(run):
    client, backend, tunnel = run.tunnel()
    stop = threading.Event()

    def stream() -> None:
        while not stop.is_set():
            backend.sendall(bytes(1_000_000))
        backend.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=stream, name="stream")
    thread.start()
    try:
        while not tunnel.down.pumped:
            assert receive(client, 100_000) == bytes(100_000)
        assert tunnel.up.resting
        client.sendall(b"stop")
        while not select.select([backend], [], [], 0)[0]:
            assert receive(client, 100_000) == bytes(100_000)
        assert receive(backend, 4) == b"stop"
    finally:
        stop.set()
        received = receive_all(client)
        thread.join()
    assert set(received) <= {0}


def test_a_sink_that_makes_it_wait_loses_nothing(run):
    """The reactor hands over to a pump in the middle of a piece."""
    client, backend, tunnel = run.tunnel()
    data = random.Random(1).randbytes(20_000_000)

    def send() -> None:
        for place in range(0, len(data), 10_000):
            client.sendall(data[place : place + 10_000])
        client.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=send, name="send")
    thread.start()
    eventually(lambda: tunnel.up.pumped, "a pump")
    assert hashlib.sha256(receive_all(backend)).digest() == hashlib.sha256(data).digest()
    thread.join()
    backend.close()
    run.wait_for(tunnel)
    assert (tunnel.code, tunnel.up.flow.octets) == ("--", len(data))


def test_turns_and_pumps_that_relieve_each_other_lose_nothing(run):
    client, backend, tunnel = run.tunnel()
    chance = random.Random(3)
    told = {"up": 0, "down": 0}
    for _ in range(30):
        way, source, sink = chance.choice([("up", client, backend), ("down", backend, client)])
        data = chance.randbytes(chance.choice([1, 1000, tunnel_module.TURN, 5 * tunnel_module.TURN]))
        thread = threading.Thread(target=source.sendall, args=(data,), name="send")
        thread.start()
        assert receive(sink, len(data)) == data
        thread.join()
        told[way] += len(data)
        if chance.random() < 0.5:
            eventually(lambda: tunnel.up.resting and tunnel.down.resting, "a tunnel that rests")
    for sock in (client, backend):
        sock.close()
    run.wait_for(tunnel)
    assert {"up": tunnel.up.flow.octets, "down": tunnel.down.flow.octets} == told


def test_a_dialogue_goes_on_beside_a_stream(run):
    client, backend, stream = run.tunnel()
    stop = threading.Event()

    def send() -> None:
        while not stop.is_set():
            client.sendall(bytes(10_000))
        client.shutdown(socket.SHUT_WR)

    threads = [
        threading.Thread(target=send, name="send"),
        threading.Thread(target=drain, args=(backend,), name="receive"),
    ]
    for thread in threads:
        thread.start()
    try:
        one, other, dialogue = run.tunnel()
        for _ in range(50):
            for source, sink in ((one, other), (other, one)):
                source.sendall(b"x")
                assert receive(sink, 1) == b"x"
        assert dialogue.up.resting
        assert dialogue.down.resting
        assert stream not in run.ended
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def drain(sock: socket.socket) -> None:
    """Receive to the end, and forget it."""
    while sock.recv(65536):
        continue


def test_a_tunnel_that_is_silent_both_ways_for_too_long_is_cut(run):
    client, backend, tunnel = run.tunnel(idle=0.1)
    assert receive_all(client) == receive_all(backend) == b""
    run.wait_for(tunnel)
    assert tunnel.code == "cD"


def test_a_stream_one_way_is_not_cut_however_long_the_other_way_is_silent(run):
    idle = 0.1
    client, backend, tunnel = run.tunnel(idle=idle)
    until = time.monotonic() + 5 * idle
    while time.monotonic() < until:
        backend.sendall(b"x" * 1000)
        assert receive(client, 1000) == b"x" * 1000
    assert receive_all(client) == b"", "and is cut once the stream has ceased"
    run.wait_for(tunnel)
    assert tunnel.code == "cD"


def test_a_tunnel_half_of_which_has_ended_is_cut_when_the_rest_is_silent(run):
    client, backend, tunnel = run.tunnel(idle=0.1)
    eventually(lambda: tunnel.up.resting or tunnel in run.ended, "a direction that rests")
    backend.close()
    assert receive_all(client) == b""
    run.wait_for(tunnel)
    assert tunnel.code == "cD"


@pytest.mark.parametrize("pumped", [False, True], ids=["resting", "pumped"])
@pytest.mark.parametrize(("who", "code"), [("client", "CD"), ("backend", "SD")])
def test_a_reset_is_passed_on_as_a_reset(run, monkeypatch, who, code, pumped):
    """What was sent before it must not look complete."""
    monkeypatch.setattr(tunnel_module, "REST_AFTER", PATIENCE)
    client, backend, tunnel = run.tunnel()
    culprit, other = (client, backend) if who == "client" else (backend, client)
    if pumped:
        pump(tunnel, client, backend)
    reset(culprit)
    with pytest.raises(ConnectionResetError):
        other.recv(1)
    run.wait_for(tunnel)
    assert tunnel.code == code


def test_an_answer_that_came_before_the_backend_refused_the_rest_is_delivered(run):
    """A server that closes with octets unread sends a reset behind its answer."""
    client, backend, tunnel = run.tunnel()
    answer = b"413 " + bytes(20_000)  # no more than a receiver's first window, or the reset destroys the rest
    client.sendall(b"part of a long request")
    eventually(lambda: backend.recv(1, socket.MSG_PEEK), "octets that nobody reads")
    backend.sendall(answer)
    backend.close()
    assert receive(client, len(answer)) == answer
    client.close()
    run.wait_for(tunnel)


def pump(tunnel: Tunnel, client: socket.socket, backend: socket.socket) -> None:
    """Have both directions pumped."""
    for source, sink, direction in ((client, backend, tunnel.up), (backend, client, tunnel.down)):
        while not direction.pumped:
            source.sendall(bytes(tunnel_module.TURN))
            assert receive(sink, tunnel_module.TURN) == bytes(tunnel_module.TURN)


def test_a_kill_wakes_pumps_that_wait_for_their_sources(run, monkeypatch):
    monkeypatch.setattr(tunnel_module, "REST_AFTER", PATIENCE)
    client, backend, tunnel = run.tunnel()
    pump(tunnel, client, backend)
    run.reactor.call_soon(tunnel.kill)
    assert receive_all(client) == receive_all(backend) == b""
    run.wait_for(tunnel)
    assert tunnel.code == "KD"


def test_a_kill_wakes_pumps_that_wait_for_their_sinks(run):
    client, backend, tunnel = run.tunnel()
    floods = [threading.Thread(target=flood, args=(sock,), name="flood") for sock in (client, backend)]
    for thread in floods:
        thread.start()
    for direction in (tunnel.up, tunnel.down):
        eventually(lambda flow=direction.flow: stuck(flow), "a sink that is full")
    run.reactor.call_soon(tunnel.kill)
    run.wait_for(tunnel)
    for thread in floods:
        thread.join()
    assert tunnel.code == "KD"


def flood(sock: socket.socket) -> None:
    try:
        while True:
            sock.sendall(bytes(65536))
    except OSError:
        return


def stuck(flow: Flow) -> bool:
    """Has the count stood still for a moment, with something in it?"""
    before = flow.octets
    threading.Event().wait(0.02)
    return 0 < before == flow.octets


def test_a_sink_that_takes_nothing_for_as_long_as_the_silence_lasts_is_cut(run):
    client, backend, tunnel = run.tunnel(idle=0.1)
    thread = threading.Thread(target=flood, args=(client,), name="flood")
    thread.start()
    run.wait_for(tunnel)
    thread.join()
    assert tunnel.code == "sD"
    assert backend.recv(1) == b"\0"


def test_at_the_limit_of_threads_a_tunnel_ends_and_the_others_go_on(run, monkeypatch):
    monkeypatch.setattr(tunnel_module, "REST_AFTER", PATIENCE)
    run.pumps._limit = 2
    client, backend, first = run.tunnel()
    pump(first, client, backend)
    other_client, _, second = run.tunnel()
    flood(other_client)
    run.wait_for(second)
    assert second.code == "RD"
    for source, sink in ((client, backend), (backend, client)):
        source.sendall(b"x")
        assert receive(sink, 1) == b"x"
    assert first not in run.ended
