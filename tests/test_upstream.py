"""Getting a connection to a backend: idle ones, fresh ones, the next backend's; who waits for one, and for how long."""

from __future__ import annotations

import errno
import os
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import repeat
from typing import Any

import pytest

from balancer import upstream as upstream_module
from balancer.backend import Admin, Backend
from balancer.config import Limits, Server, Timeouts
from balancer.explain import Trail
from balancer.handshake import Handshaker
from balancer.pickers import RoundRobin
from balancer.pool import Pool
from balancer.reactor import DONTWAIT, NEVER, READ, Reactor
from balancer.upstream import NONE_AVAILABLE, QUEUE_FULL, QUEUED_IN_VAIN, Attempt, Refusal, Upstream, Upstreams
from conftest import PATIENCE, eventually


class Clock:
    """A clock that the test holds."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Seeker:
    """A session that only notes what it is told."""

    key = "127.0.0.1"
    wanted = None

    def __init__(self, name: str = "", when_connected: Callable[[Upstream], None] = lambda upstream: None) -> None:
        self.name = name
        self.when_connected = when_connected
        self.tried: list[Backend] = []
        self.refusal: Refusal = NONE_AVAILABLE
        self.deadline = NEVER
        self.attempt: Attempt | None = None
        self.trail: Trail | None = None
        self.upstream: Upstream | None = None
        self.told: queue.SimpleQueue[str | Refusal] = queue.SimpleQueue()

    def __repr__(self) -> str:
        return f"<Seeker {self.name}>"

    def on_backend(self, mask: int) -> None:
        """Nothing is read here; the handlers' table tells whose connection it is."""

    def connected(self, upstream: Upstream) -> None:
        self.upstream = upstream
        self.told.put(upstream.backend.id)
        self.when_connected(upstream)

    def unserved(self, status: int, code: str, reason: str) -> None:
        self.told.put((status, code, reason))

    def ends(self):
        return ("127.0.0.1", 1), ("127.0.0.1", 2)

    def crashed(self, error: Exception) -> None:
        self.told.put((0, "crashed", str(error)))

    def answer(self) -> str | Refusal:
        """The backend's id, or why there is none."""
        return self.told.get(timeout=PATIENCE)

    @property
    def waits(self) -> bool:
        return self.told.empty()


class Scene:
    """A reactor that runs by a clock which the test holds, a pool, and whatever backends the test makes."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.errors: list[str] = []
        self.reactor = Reactor(
            tick=0.01,
            clock=self.clock,
            on_error=lambda where, error: self.errors.append(f"{where}: {error!r}"),
        )
        self.stack = ExitStack()
        self.refused: list[str] = []
        self.reactor.start()

    def set_up(
        self, *servers: Server | socket.socket, retries: int = 3, limits: Limits | None = None, **timeouts: float
    ) -> list[Backend]:
        """A pool of these, each of which has passed a probe; a socket is the backend at its address."""
        self.backends = [
            Backend(server if isinstance(server, Server) else Server(str(number), *server.getsockname()[:2]))
            for number, server in enumerate(servers, 1)
        ]
        self.pool = Pool(self.backends, RoundRobin())
        for backend in self.backends:
            self.pool.report(backend, True, "L4OK")  # the first result would decide alone
        self.upstreams = Upstreams(
            self.reactor,
            self.pool,
            Timeouts(**timeouts),
            limits or Limits(),
            retries,
            Handshaker(self.reactor, 1, 10, lambda where, error: self.errors.append(f"{where}: {error!r}")),
            on_refused=lambda backend: self.refused.append(backend.id),
        )
        return self.backends

    def listener(self, host: str = "127.0.0.1") -> socket.socket:
        sock = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        sock.settimeout(PATIENCE)
        return self.stack.enter_context(sock)

    def accept(self, listener: socket.socket) -> socket.socket:
        sock, _ = listener.accept()
        sock.settimeout(PATIENCE)
        return self.stack.enter_context(sock)

    def dead(self) -> socket.socket:
        """A socket that holds a port on which nobody listens."""
        sock = self.stack.enter_context(socket.socket())
        sock.bind(("127.0.0.1", 0))
        return sock

    def hanging(self) -> socket.socket:
        """A listener that lets nobody in: its backlog is full, and who knocks gets no answer at all."""
        sock = self.stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):
            guest = self.stack.enter_context(socket.socket())
            guest.setblocking(False)
            guest.connect_ex(sock.getsockname())
        return sock

    def do(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call this on the reactor's thread, and return its answer; what it defers has been done by then."""
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.reactor.call_soon(lambda: answers.put(function(*arguments)))
        self.reactor.call_soon(lambda: answers.put(None))
        answer = answers.get(timeout=PATIENCE)
        answers.get(timeout=PATIENCE)
        return answer

    def obtain(self, seeker: Seeker) -> Seeker:
        """As sessions do it."""

        def obtain() -> None:
            upstream = self.upstreams.obtain(seeker)
            if upstream is not None:
                seeker.connected(upstream)

        self.do(obtain)
        return seeker

    def connection(self) -> Upstream:
        """One that was obtained."""
        seeker = self.obtain(Seeker())
        assert isinstance(seeker.answer(), str)
        assert seeker.upstream is not None
        return seeker.upstream

    def active(self) -> list[int]:
        return [backend.active for backend in self.backends]

    def pass_time(self, seconds: float) -> None:
        """Let the clock go on, and the reactor see to the deadlines that have passed."""
        self.clock.now += seconds
        self.do(lambda: None)  # the first batch in which the reactor's clock is there
        self.do(lambda: None)

    def close(self) -> None:
        for backend in self.backends:
            self.do(self.upstreams.drop_idle, backend)
        self.reactor.stop()
        self.stack.close()


@pytest.fixture
def scene() -> Iterator[Scene]:
    made = Scene()
    yield made
    active, waiting = made.active(), made.upstreams.waiting
    made.close()
    assert (active, waiting, made.reactor.timed) == ([0] * len(active), 0, set())


def give_back(scene: Scene, *upstreams: Upstream) -> None:
    for upstream in upstreams:
        scene.do(scene.upstreams.discard, upstream)


# One connection ---------------------------------------------------------------------------------------------------


def test_a_fresh_connection_comes_with_a_lease_and_is_registered_for_its_seeker(scene):
    listener = scene.listener()
    scene.set_up(listener)
    seeker = scene.obtain(Seeker())
    assert seeker.answer() == "1"
    assert scene.active() == [1]
    upstream = seeker.upstream
    assert not upstream.reused
    assert upstream.sock.getblocking()
    assert scene.reactor.handlers[upstream.fd] == seeker.on_backend
    assert (seeker.attempt, seeker.tried) == (None, [])
    give_back(scene, upstream)
    assert scene.accept(listener).recv(1) == b""


def test_a_connection_that_is_kept_serves_the_next_seeker(scene):
    scene.set_up(scene.listener())
    first = scene.connection()
    scene.do(scene.upstreams.keep, first)
    assert scene.active() == [0]
    assert scene.upstreams.idle == 1
    second = scene.connection()
    assert second is first
    assert (second.reused, scene.upstreams.idle, scene.active()) == (True, 0, [1])
    give_back(scene, second)


def test_the_connection_that_was_kept_last_is_taken_first(scene):
    scene.set_up(scene.listener())
    one, two = scene.connection(), scene.connection()
    for upstream in (one, two):
        scene.do(scene.upstreams.keep, upstream)
    assert scene.connection() is two
    give_back(scene, two)


@pytest.mark.parametrize("last_words", [b"", b"HTTP/1.1 408 Request Timeout\r\n\r\n"], ids=["close", "words"])
def test_an_idle_connection_at_which_anything_happens_is_given_up(scene, last_words):
    """RFC 9112 section 9.5: nothing is due there. A server may say 408 before it closes."""
    listener = scene.listener()
    scene.set_up(listener)
    upstream = scene.connection()
    scene.do(scene.upstreams.keep, upstream)
    backend = scene.accept(listener)
    backend.sendall(last_words)
    backend.close()
    eventually(lambda: scene.upstreams.idle == 0, "no idle connection")
    assert scene.do(lambda: upstream not in scene.reactor.timed)


def test_an_idle_connection_ages(scene):
    scene.set_up(scene.listener())
    upstream = scene.connection()
    scene.do(scene.upstreams.keep, upstream)
    scene.pass_time(upstream_module.KEEP_IDLE - 0.5)
    assert scene.upstreams.idle == 1
    scene.pass_time(1.0)
    assert scene.upstreams.idle == 0


def test_a_backend_that_is_not_to_serve_keeps_no_connection(scene):
    (backend,) = scene.set_up(scene.listener())
    upstream = scene.connection()
    scene.pool.set_admin(backend, Admin.DRAIN, "a test")
    scene.do(scene.upstreams.keep, upstream)
    assert (scene.upstreams.idle, scene.active()) == (0, [0])


def test_so_many_idle_connections_are_kept_and_no_more(scene, monkeypatch):
    monkeypatch.setattr(upstream_module, "MOST_IDLE", 2)
    scene.set_up(scene.listener())
    for upstream in [scene.connection() for _ in range(3)]:
        scene.do(scene.upstreams.keep, upstream)
    assert (scene.upstreams.idle, scene.active()) == (2, [0])


def test_nothing_is_sent_to_a_backend_that_has_closed(scene):
    """A socket would take it, and it would never be known whether the backend has read it."""
    listener = scene.listener()
    scene.set_up(listener)
    upstream = scene.connection()
    backend = scene.accept(listener)
    assert scene.do(upstream.send, b"hello", DONTWAIT) == 5
    assert backend.recv(100) == b"hello"
    backend.shutdown(socket.SHUT_WR)
    eventually(upstream.is_stale)

    def send_again() -> None:
        with pytest.raises(ConnectionResetError):
            upstream.send(b"again", DONTWAIT)

    scene.do(send_again)
    assert scene.errors == []
    give_back(scene, upstream)
    assert backend.recv(100) == b""


def test_a_stale_connection_is_replaced_by_a_fresh_one_under_the_same_lease(scene):
    listener = scene.listener()
    scene.set_up(listener)
    stale = scene.connection()
    scene.accept(listener).close()
    eventually(stale.is_stale)
    seeker = Seeker()
    scene.do(scene.upstreams.renew, seeker, stale)
    assert seeker.answer() == "1"
    assert seeker.upstream is not stale
    assert scene.active() == [1]
    give_back(scene, seeker.upstream)


def test_closing_twice_takes_no_other_connections_descriptor(scene):
    """The number of the first is the second's by then."""
    scene.set_up(scene.listener())
    first = scene.connection()
    number = first.fd
    scene.do(scene.upstreams.forget, first)
    seeker = scene.obtain(Seeker())
    assert seeker.answer() == "1"
    assert seeker.upstream.fd == number
    scene.do(scene.upstreams.discard, first)
    assert scene.reactor.handlers[number] == seeker.on_backend
    give_back(scene, seeker.upstream)


# A connection that cannot be opened -------------------------------------------------------------------------------


def test_a_backend_that_refuses_is_reported_and_another_is_tried(scene):
    dead, alive = scene.set_up(scene.dead(), scene.listener())
    seeker = scene.obtain(Seeker())
    assert seeker.answer() == "2"
    assert (seeker.tried, scene.refused, dead.failures, alive.failures) == ([dead], ["1"], 1, 0)
    assert dead.check == "L4CON refused"
    assert scene.active() == [0, 1]
    give_back(scene, seeker.upstream)


def test_no_backend_is_tried_twice(scene):
    scene.set_up(*(scene.dead() for _ in range(4)), retries=10)
    seeker = scene.obtain(Seeker())
    assert seeker.answer() == (503, "SC", "no backend could be reached (tried 1, 2, 3, 4)")
    assert scene.refused == ["1", "2", "3", "4"]


@pytest.mark.parametrize(("retries", "tries"), [(0, ["1"]), (1, ["1", "2"])])
def test_only_so_many_others_are_tried_as_retries_allows(scene, retries, tries):
    scene.set_up(scene.dead(), scene.dead(), scene.listener(), retries=retries)
    seeker = scene.obtain(Seeker())
    assert seeker.answer()[:2] == (503, "SC")
    assert scene.refused == tries


def test_a_name_without_an_address_is_passed_over(scene):
    nameless, _ = scene.set_up(Server("name", "no.such.name.invalid", 80), scene.listener())
    seeker = scene.obtain(Seeker())
    assert seeker.answer() == "2"
    assert seeker.tried == [nameless]
    give_back(scene, seeker.upstream)


def test_a_backend_that_hangs_is_given_up_after_the_connect_timeout(scene):
    (backend,) = scene.set_up(scene.hanging(), connect=5.0)
    seeker = scene.obtain(Seeker())
    scene.pass_time(4.5)
    assert seeker.waits
    scene.pass_time(1.0)
    assert seeker.answer() == (504, "sC", "no connection to a backend within the time allowed (tried 1)")
    assert backend.check == "L4TOUT"


def test_a_backend_that_hangs_is_not_the_last_word(scene):
    scene.set_up(scene.hanging(), scene.listener(), connect=5.0)
    seeker = scene.obtain(Seeker())
    scene.pass_time(6.0)
    assert seeker.answer() == "2"
    give_back(scene, seeker.upstream)


@pytest.mark.parametrize("first", ["dead", "unsupported"])
def test_each_address_of_a_name_is_tried(scene, first):
    """A name may have an IPv6 address on a machine that has none of its own, or on which nobody listens."""
    listener = scene.listener()
    (backend,) = scene.set_up(listener)
    bad = {
        "dead": (socket.AF_INET, scene.dead().getsockname()),
        "unsupported": (socket.AF_APPLETALK, ("127.0.0.1", 1)),
    }
    backend.endpoints = (bad[first], *backend.endpoints)
    seeker = scene.obtain(Seeker())
    assert seeker.answer() == "1"
    assert (seeker.tried, backend.failures) == ([], 0)
    give_back(scene, seeker.upstream)


def test_an_address_that_hangs_leaves_the_others_their_share_of_the_time(scene):
    listener = scene.listener()
    (backend,) = scene.set_up(listener, connect=4.0)
    hanging = scene.hanging().getsockname()
    backend.endpoints = ((socket.AF_INET, hanging), *backend.endpoints)
    seeker = scene.obtain(Seeker())
    scene.pass_time(2.1)
    assert seeker.answer() == "1"
    give_back(scene, seeker.upstream)


def test_a_connection_to_itself_is_a_refusal(scene, monkeypatch):
    """The port of a backend that is gone may be given to the very socket that calls it; TCP lets the two meet."""
    sock = scene.dead()
    port = sock.getsockname()[1]
    sock.close()

    class Bound(socket.socket):
        def connect_ex(self, address: Any) -> int:
            self.bind(address)
            return super().connect_ex(address)

    scene.set_up(Server("1", "127.0.0.1", port))
    with monkeypatch.context() as patch:
        patch.setattr(upstream_module.socket, "socket", Bound)
        seeker = scene.obtain(Seeker())
        assert seeker.answer() == (503, "SC", "no backend could be reached (tried 1)")
    with socket.socket() as again:
        again.bind(("127.0.0.1", port))  # which would fail while the port rests in TIME_WAIT


def test_readiness_that_was_another_sockets_is_not_taken_for_a_connection(scene):
    """A descriptor's number may have been given away within the batch in which it was ready."""
    scene.set_up(scene.hanging())
    seeker = scene.obtain(Seeker())
    fd = seeker.attempt._sock.fileno()
    scene.do(scene.reactor.handlers[fd], READ)
    assert seeker.waits
    scene.do(scene.upstreams.cancel, seeker)


def test_who_goes_while_connecting_leaves_nothing_behind(scene):
    scene.set_up(scene.hanging())
    seeker = scene.obtain(Seeker())
    fd = seeker.attempt._sock.fileno()
    scene.do(scene.upstreams.cancel, seeker)
    assert scene.active() == [0]
    assert fd not in scene.reactor.handlers
    scene.pass_time(100.0)
    assert seeker.waits, "and is told nothing any more"


def test_who_breaks_as_it_is_connected_is_the_only_one(scene):
    def fail(upstream: Upstream) -> None:
        raise ZeroDivisionError("a bug")

    scene.set_up(scene.listener())
    seeker = scene.obtain(Seeker(when_connected=fail))
    assert seeker.answer() == "1"
    assert seeker.answer() == (0, "crashed", "a bug")
    other = scene.connection()
    give_back(scene, seeker.upstream, other)


# What the balancer itself is short of -----------------------------------------------------------------------------


class Shortage:
    """What comes of the next sockets that the reactor's thread asks for, one after the other: an errno, 0 for none."""

    def __init__(self) -> None:
        self.errors: Iterator[int] = iter(())


@pytest.fixture
def shortage(monkeypatch) -> Shortage:
    made = Shortage()

    class Scarce(socket.socket):
        def __init__(self, *arguments: Any, **more: Any) -> None:
            number = next(made.errors, 0) if threading.current_thread().name == "reactor" else 0
            if number:
                raise OSError(number, os.strerror(number))
            super().__init__(*arguments, **more)

    monkeypatch.setattr(upstream_module.socket, "socket", Scarce)
    return made


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
def test_a_shortage_of_ours_is_no_backends_fault(scene, shortage, number):
    shortage.errors = repeat(number)
    backends = scene.set_up(scene.listener(), scene.listener())
    seeker = scene.obtain(Seeker())
    status, code, reason = seeker.answer()
    assert (status, code) == (503, "RC")
    assert os.strerror(number) in reason
    assert [backend.failures for backend in backends] == [0, 0]
    assert scene.refused == []


def test_an_idle_connection_makes_room_for_one_that_is_needed(scene, shortage):
    """Kept connections to one backend must not be what another cannot be reached for."""
    scene.set_up(scene.listener(), scene.listener())
    kept = scene.connection()
    scene.do(scene.upstreams.keep, kept)
    shortage.errors = iter([errno.EMFILE])
    seeker = scene.obtain(Seeker())
    assert seeker.answer() == "2"
    assert scene.upstreams.idle == 0
    give_back(scene, seeker.upstream)


def test_ports_that_are_used_up_towards_one_backend_leave_the_others(scene, monkeypatch):
    """EADDRNOTAVAIL: each local port is taken for that address, or rests there in TIME_WAIT."""
    listener = scene.listener()
    one, _ = scene.set_up(scene.dead(), listener)
    crowded = one.endpoints[0][1]

    class Crowded(socket.socket):
        def connect_ex(self, address: Any) -> int:
            return errno.EADDRNOTAVAIL if address == crowded else super().connect_ex(address)

    monkeypatch.setattr(upstream_module.socket, "socket", Crowded)
    seeker = scene.obtain(Seeker())
    assert seeker.answer() == "2"
    assert (seeker.tried, one.failures, scene.refused) == ([one], 0, [])
    give_back(scene, seeker.upstream)


# The queue --------------------------------------------------------------------------------------------------------


def full(scene: Scene, *more: Server | socket.socket, **keys: Any) -> Upstream:
    """Make the first backend one with a single connection, and take that."""
    host, port = scene.listener().getsockname()
    scene.set_up(Server("1", host, port, max_connections=1), *more, **keys)
    return scene.connection()


def test_who_finds_every_backend_full_waits_and_is_served_in_order(scene):
    taken = full(scene, queue=5.0)
    seekers = [scene.obtain(Seeker(str(number))) for number in range(3)]
    assert all(seeker.waits for seeker in seekers)
    assert [seeker.deadline for seeker in seekers] == [scene.clock.now + 5.0] * 3
    assert seekers[0].refusal == QUEUED_IN_VAIN
    for place, seeker in enumerate(seekers):
        scene.do(scene.upstreams.keep, taken)
        assert seeker.answer() == "1"
        assert seeker.upstream is taken, "which needs no other connection"
        assert seeker.deadline == NEVER
        assert all(other.waits for other in seekers[place + 1 :])
    give_back(scene, taken)


def test_a_connection_that_is_discarded_makes_room_too(scene):
    taken = full(scene)
    seeker = scene.obtain(Seeker())
    give_back(scene, taken)
    assert seeker.answer() == "1"
    assert seeker.upstream is not taken
    give_back(scene, seeker.upstream)


def test_a_client_that_goes_away_frees_its_place_and_its_slot(scene):
    taken = full(scene)
    first, second = scene.obtain(Seeker()), scene.obtain(Seeker())
    scene.do(scene.upstreams.cancel, first)
    give_back(scene, taken)
    assert second.answer() == "1"
    assert first.waits
    give_back(scene, second.upstream)


def test_a_queue_that_is_full_takes_no_more(scene):
    taken = full(scene, limits=Limits(queue=1))
    first, second = scene.obtain(Seeker()), scene.obtain(Seeker())
    assert second.answer() == QUEUE_FULL
    assert first.waits
    scene.do(scene.upstreams.cancel, first)
    give_back(scene, taken)


def test_without_patience_nobody_waits(scene):
    taken = full(scene, queue=0.0)
    assert scene.obtain(Seeker()).answer()[0] == 503
    give_back(scene, taken)


def test_a_backend_that_is_full_is_waited_for_after_another_refused(scene):
    dead = scene.dead()
    taken = full(scene, dead, queue=5.0)
    seeker = scene.obtain(Seeker())
    eventually(lambda: scene.upstreams.waiting, "a place in the queue")
    assert [backend.id for backend in seeker.tried] == ["2"]
    scene.do(scene.upstreams.keep, taken)
    assert seeker.answer() == "1"
    give_back(scene, taken)


def test_who_could_only_have_what_it_tried_holds_nobody_up(scene):
    """The first waits for backend 1 and has tried backend 2, which is the one that becomes free."""
    two = scene.listener()
    taken = full(scene, Server("2", *two.getsockname(), max_connections=1))
    also_taken = scene.connection()
    first, second = Seeker("first"), Seeker("second")
    first.tried.append(scene.backends[1])
    scene.obtain(first)
    scene.obtain(second)
    give_back(scene, also_taken)
    assert second.answer() == "2"
    assert first.waits
    give_back(scene, taken)
    assert first.answer() == "1"
    give_back(scene, first.upstream, second.upstream)


def test_many_who_wait_in_vain_do_not_exhaust_the_stack(scene, shortage):
    """Each one's failure gives back the lease that the next one is served with."""
    taken = full(scene, limits=Limits(queue=2000))
    seekers = [scene.obtain(Seeker()) for _ in range(1000)]
    shortage.errors = repeat(errno.EMFILE)
    give_back(scene, taken)
    assert {seeker.answer()[1] for seeker in seekers} == {"RC"}
    assert scene.errors == []


def test_one_who_breaks_as_it_is_served_is_not_the_givers_fault(scene):
    def fail(upstream: Upstream) -> None:
        raise ZeroDivisionError("a bug")

    taken = full(scene)
    broken, next_one = scene.obtain(Seeker(when_connected=fail)), scene.obtain(Seeker())
    assert scene.do(lambda: scene.upstreams.keep(taken) or "went on") == "went on"
    assert [broken.answer(), broken.answer()] == ["1", (0, "crashed", "a bug")]
    scene.do(scene.upstreams.keep, taken)
    assert next_one.answer() == "1"
    give_back(scene, taken)


# Waiting for a backend to come back -------------------------------------------------------------------------------


def take_out(scene: Scene, backend: Backend) -> None:
    for _ in range(3):
        scene.pool.report(backend, False, "L4CON refused")
    assert not backend.healthy


def bring_back(scene: Scene, backend: Backend) -> None:
    for _ in range(2):
        scene.pool.report(backend, True, "L4OK")
    scene.do(scene.upstreams.serve_waiting)


def test_without_a_backend_it_is_said_at_once(scene):
    (backend,) = scene.set_up(scene.listener())
    take_out(scene, backend)
    assert scene.obtain(Seeker()).answer() == NONE_AVAILABLE


def test_who_may_wait_for_a_backend_is_served_when_one_comes_back(scene):
    (backend,) = scene.set_up(scene.listener(), no_backend=5.0)
    take_out(scene, backend)
    seekers = [scene.obtain(Seeker()) for _ in range(3)]
    assert {seeker.deadline for seeker in seekers} == {scene.clock.now + 5.0}
    bring_back(scene, backend)
    assert [seeker.answer() for seeker in seekers] == ["1"] * 3
    give_back(scene, *(seeker.upstream for seeker in seekers))


def test_who_has_tried_them_all_tries_again_after_a_pause(scene):
    """A restart that is quicker than three failed probes never takes the backend out, so no change is ever told."""
    port = scene.dead()
    scene.set_up(port, no_backend=5.0)
    seeker = scene.obtain(Seeker())
    eventually(lambda: scene.upstreams.waiting, "one who waits")
    deadline = seeker.deadline
    assert deadline == scene.clock.now + 5.0
    scene.pass_time(upstream_module.RETRY_PAUSE + 0.01)
    eventually(lambda: len(seeker.tried) == 2 and scene.upstreams.waiting, "one who has tried again")
    assert seeker.deadline == deadline, "which is no reason to wait for longer"
    port.listen()
    scene.pass_time(upstream_module.RETRY_PAUSE + 0.01)
    assert seeker.answer() == "1"
    give_back(scene, seeker.upstream)


def test_retries_that_are_used_up_do_not_end_the_wait(scene):
    """With four dead backends and three tries, the fourth may be the one that comes back first."""
    ports = [scene.dead() for _ in range(4)]
    scene.set_up(*ports, retries=2, no_backend=5.0)
    seeker = scene.obtain(Seeker())
    eventually(lambda: scene.upstreams.waiting, "one who waits")
    assert len(seeker.tried) == 3
    for port in ports:
        port.listen()
    scene.pass_time(upstream_module.RETRY_PAUSE + 0.01)
    assert seeker.answer() == "4"
    give_back(scene, seeker.upstream)


def test_one_who_comes_later_starts_the_pause_again_after_all_were_served(scene):
    """The pause must not be held to be running when it was ended by a backend's return."""
    port = scene.dead()
    (backend,) = scene.set_up(port, no_backend=50.0)
    first = scene.obtain(Seeker())
    eventually(lambda: scene.upstreams.waiting, "one who waits")
    port.listen()
    bring_back(scene, backend)
    assert first.answer() == "1"
    give_back(scene, first.upstream)
    take_out(scene, backend)
    second = scene.obtain(Seeker())
    for _ in range(2):
        scene.pool.report(backend, True, "L4OK")
    scene.pass_time(upstream_module.RETRY_PAUSE + 0.01)
    assert second.answer() == "1"
    give_back(scene, second.upstream)


def test_who_goes_while_it_is_stranded_is_forgotten(scene):
    (backend,) = scene.set_up(scene.listener(), no_backend=5.0)
    take_out(scene, backend)
    first, second = scene.obtain(Seeker()), scene.obtain(Seeker())
    scene.do(scene.upstreams.cancel, first)
    bring_back(scene, backend)
    assert second.answer() == "1"
    assert first.waits
    give_back(scene, second.upstream)


# An answer that did not come --------------------------------------------------------------------------------------

NO_ANSWER: Refusal = (502, "SH", "no answer")


def test_a_request_without_an_answer_goes_to_a_backend_that_was_not_tried(scene):
    one, _ = scene.set_up(scene.listener(), scene.listener())
    seeker = scene.obtain(Seeker())
    assert seeker.answer() == "1"
    scene.do(scene.upstreams.seek_another, seeker, seeker.upstream, NO_ANSWER)
    assert seeker.answer() == "2"
    assert (seeker.tried, scene.active(), one.failures) == ([one], [0, 1], 0)
    scene.do(scene.upstreams.seek_another, seeker, seeker.upstream, NO_ANSWER)
    assert seeker.answer() == NO_ANSWER


def test_a_backend_that_takes_requests_and_answers_none_is_not_asked_for_ever(scene):
    """Waiting for a backend is for those that cannot be reached."""
    scene.set_up(scene.listener(), retries=2, no_backend=50.0)
    seeker = scene.obtain(Seeker())
    asked = 0
    while seeker.answer() == "1":
        asked += 1
        seeker.deadline = NEVER  # as sessions have it while they seek
        scene.do(scene.upstreams.seek_another, seeker, seeker.upstream, NO_ANSWER)
        scene.pass_time(upstream_module.RETRY_PAUSE + 0.01)
    assert asked == 3
