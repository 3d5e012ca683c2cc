"""Two directions of any bytes: half-closes, rest and waking, silence, breaks, and being killed in every state."""

from __future__ import annotations

import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from balancer import tunnel as tunnel_module
from balancer.pump import End, Flow, Pumps
from balancer.reactor import NEVER, Reactor
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
    """Accepts work and does none of it; `free` is how many more pieces find a thread."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.free = 1000

    def run(self, name: str, work: Callable[[], None]) -> None:
        if not self.free:
            raise RuntimeError("all are busy")
        self.free -= 1
        self.names.append(name)


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
        assert tunnel is self.tunnel
        self.ended += 1

    def start(self) -> None:
        self.tunnel.start()

    def pump_ends(self, way: str, end: End) -> None:
        direction = getattr(self.tunnel, way)
        assert direction.pumped
        direction.flow.end = end
        self.tunnel._pump_ended(direction)

    def first_byte(self, way: str) -> None:
        direction = getattr(self.tunnel, way)
        self.reactor.watched[direction.flow.source.fileno()](1)

    def expire(self) -> None:
        self.tunnel.deadline = NEVER
        self.tunnel.expired(self.reactor.now)

    def bring_to(self, state: str) -> None:
        """Up's state, a slash, down's: `pumped/resting`."""
        self.start()
        ends = {"resting": End.SILENT, "ended": End.DONE}
        for way, wanted in zip(("up", "down"), state.split("/"), strict=True):
            if wanted != "pumped":
                self.pump_ends(way, ends[wanted])

    def close(self) -> None:
        for sock in (self.client, self._client_end, self.backend, self._backend_end):
            sock.close()


def connection() -> tuple[socket.socket, socket.socket]:
    """Both ends of a TCP connection: the test's, which is patient, and the tunnel's, which blocks."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname(), timeout=PATIENCE)
        other, _ = listener.accept()
    return one, other


@pytest.fixture
def hand() -> Iterator[ByHand]:
    made = ByHand()
    yield made
    made.close()


def test_both_directions_begin_on_pumps_of_their_own(hand):
    hand.start()
    assert hand.pumps.names == ["conn-1-up", "conn-1-down"]
    assert hand.tunnel.deadline == NEVER
    assert hand.tunnel in hand.reactor.timed


def test_it_ends_when_both_directions_have_ended_and_says_so_once(hand):
    hand.start()
    hand.pump_ends("up", End.DONE)
    assert hand.ended == 0
    hand.pump_ends("down", End.DONE)
    assert hand.ended == 1
    assert hand.tunnel.code == "--"
    assert hand.reactor.timed == set()


def test_a_silent_direction_rests_and_its_first_byte_starts_a_pump_again(hand):
    hand.start()
    hand.pump_ends("down", End.SILENT)
    assert list(hand.reactor.watched) == [hand.tunnel.down.flow.source.fileno()]
    hand.first_byte("down")
    assert hand.reactor.watched == {}
    assert hand.pumps.names == ["conn-1-up", "conn-1-down", "conn-1-down"]


def test_a_direction_that_is_pumped_keeps_the_other_ones_silence_from_counting(hand):
    """A long stream one way must not be cut because nothing goes the other way."""
    hand.start()
    hand.pump_ends("up", End.SILENT)
    assert hand.tunnel.deadline == NEVER


def test_silence_counts_from_the_last_octet_either_way(hand):
    """The later of the two pumps has waited in vain since then."""
    hand.start()
    hand.pump_ends("up", End.SILENT)
    hand.reactor.now += 500
    hand.pump_ends("down", End.SILENT)
    assert hand.tunnel.deadline == hand.reactor.now - tunnel_module.REST_AFTER + 100
    hand.reactor.now += 50
    hand.first_byte("up")
    assert hand.tunnel.deadline == NEVER
    hand.reactor.now += 500
    hand.pump_ends("up", End.SILENT)
    assert hand.tunnel.deadline == hand.reactor.now - tunnel_module.REST_AFTER + 100


def test_silence_counts_after_the_other_direction_has_ended_too(hand):
    """The client rests, the backend closes: a client that never closes must not keep the connection for ever."""
    hand.start()
    hand.pump_ends("up", End.SILENT)
    hand.reactor.now += 500
    hand.pump_ends("down", End.DONE)
    assert hand.tunnel.deadline == hand.reactor.now + 100


def test_silence_counts_for_the_direction_that_is_left(hand):
    hand.start()
    hand.pump_ends("up", End.DONE)
    assert hand.tunnel.deadline == NEVER
    hand.reactor.now += 500
    hand.pump_ends("down", End.SILENT)
    assert hand.tunnel.deadline == hand.reactor.now - tunnel_module.REST_AFTER + 100


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
def test_a_direction_that_breaks_wakes_the_other_and_names_who_broke_it(hand, way, end, code):
    hand.start()
    other = {"up": "down", "down": "up"}[way]
    hand.pump_ends(way, end)
    assert getattr(hand.tunnel, other).flow.source.recv(1) == b"", "what the other pump waits for has come"
    hand.pump_ends(other, End.SINK_LOST)
    assert (hand.ended, hand.tunnel.code) == (1, code)


@pytest.mark.parametrize(("way", "code"), [("up", "SD"), ("down", "CD")])
def test_a_sink_that_is_lost_leaves_what_it_sent_before_to_be_delivered(hand, way, code):
    """A server that answers without reading the rest resets the connection as it closes; its answer is here already."""
    other = {"up": "down", "down": "up"}[way]
    hand.start()
    hand.pump_ends(other, End.SILENT)
    hand.pump_ends(way, End.SINK_LOST)
    assert hand.ended == 0
    assert hand.tunnel.deadline < NEVER, "and it cannot stay for ever"
    hand.first_byte(other)
    hand.pump_ends(other, End.DONE)
    assert (hand.ended, hand.tunnel.code) == (1, code)


def test_without_a_thread_for_one_direction_neither_goes_on(hand):
    hand.pumps.free = 1
    hand.start()
    assert hand.ended == 0
    assert hand.client.recv(1) == hand.backend.recv(1) == b""
    hand.pump_ends("up", End.DONE)
    assert (hand.ended, hand.tunnel.code) == (1, "RD")


def test_without_any_thread_it_ends_at_once(hand):
    hand.pumps.free = 0
    hand.start()
    assert (hand.ended, hand.tunnel.code, hand.pumps.names) == (1, "RD", [])


def test_without_a_thread_to_wake_to_it_ends(hand):
    hand.bring_to("resting/resting")
    hand.pumps.free = 0
    hand.first_byte("up")
    assert (hand.ended, hand.tunnel.code, hand.reactor.watched) == (1, "RD", {})


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
        rest(run, tunnel)
        backend.sendall(b"pong")
        assert receive(client, 4) == b"pong"
    rest(run, tunnel)
    client.close()
    assert receive_all(backend) == b""
    backend.close()
    run.wait_for(tunnel)
    assert (tunnel.code, tunnel.up.flow.octets, tunnel.down.flow.octets) == ("--", 8, 8)


def test_a_direction_that_rests_does_not_hinder_the_other(run):
    client, backend, tunnel = run.tunnel()
    streaming = threading.Event()

    def stream() -> None:
        while not streaming.is_set():
            backend.sendall(b"x" * 1000)

    thread = threading.Thread(target=stream, name="stream")
    thread.start()
    try:
        with client.makefile("rb") as file:
            while not tunnel.up.resting:
                assert file.read(1000) == b"x" * 1000
            client.sendall(b"stop")
            assert receive(backend, 4) == b"stop"
            streaming.set()
            backend_done = threading.Thread(target=lambda: (thread.join(), backend.close()), name="close")
            backend_done.start()
            assert set(file.read()) <= set(b"x")
            backend_done.join()
    finally:
        streaming.set()
        thread.join()


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


@pytest.mark.parametrize("resting", [False, True], ids=["pumped", "resting"])
@pytest.mark.parametrize(("who", "code"), [("client", "CD"), ("backend", "SD")])
def test_a_reset_is_passed_on_as_a_reset(run, who, code, resting):
    """What was sent before it must not look complete."""
    client, backend, tunnel = run.tunnel()
    if resting:
        rest(run, tunnel)
    culprit, other = (client, backend) if who == "client" else (backend, client)
    culprit.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    culprit.close()
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


def test_a_kill_wakes_pumps_that_wait_for_their_sources(run):
    client, backend, tunnel = run.tunnel(up_first=b"x", down_first=b"y")
    assert receive(backend, 1) + receive(client, 1) == b"xy"
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
    run.pumps._limit = 3
    client, backend, first = run.tunnel()
    client.sendall(b"x")
    assert receive(backend, 1) == b"x"
    other_client, other_backend, second = run.tunnel()
    assert receive_all(other_client) == receive_all(other_backend) == b""
    run.wait_for(second)
    assert second.code == "RD"
    client.sendall(b"y")
    assert receive(backend, 1) == b"y"
    assert first not in run.ended
