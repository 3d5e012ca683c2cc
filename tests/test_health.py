"""The probes: what each answer is called, when they come, what they cost nobody else."""

from __future__ import annotations

import errno
import os
import queue
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest

from balancer import health
from balancer.backend import Admin, Backend, Endpoint
from balancer.config import HealthCheck, Server
from balancer.health import HealthChecker
from balancer.pickers import RoundRobin
from balancer.pool import Pool
from balancer.version import __version__
from conftest import PATIENCE, eventually
from fakes import Connection, FakeBackend

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
FAILING = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n"
ONCE = HealthCheck(interval=3600, timeout=PATIENCE)  # only the first round
OFTEN = HealthCheck(interval=0.01, timeout=PATIENCE)


class Reports(Pool):
    """A pool that keeps what it is told, and lets a test wait for it."""

    def __init__(self, backends: Sequence[Backend], **options) -> None:
        self.changes: list[tuple[str, str, str]] = []
        super().__init__(backends, RoundRobin(), **{"on_change": self._changed, **options})
        self.all: list[tuple[str, bool, str]] = []
        self._queues = {backend.id: queue.SimpleQueue() for backend in backends}

    def _changed(self, backend: Backend, reason: str) -> None:
        self.changes.append((backend.id, backend.status, reason))

    def report(self, backend: Backend, passed: bool, check: str) -> None:
        super().report(backend, passed, check)
        self.all.append((backend.id, passed, check))
        self._queues[backend.id].put((passed, check))

    def next(self, backend: Backend) -> tuple[bool, str]:
        return self._queues[backend.id].get(timeout=PATIENCE)


def backend_at(port: int, host: str = "127.0.0.1", name: str = "1") -> Backend:
    return Backend(Server(name, host, port))


@contextmanager
def checking(pool: Pool, settings: HealthCheck = ONCE, **options) -> Iterator[HealthChecker]:
    checker = HealthChecker(pool, settings, **{"on_error": pytest.fail, **options})
    try:
        checker.start()
        yield checker
    finally:
        checker.stop()


def first_result(backend: Backend, settings: HealthCheck = ONCE, **options) -> tuple[bool, str]:
    pool = Reports([backend])
    with checking(pool, settings, **options):
        return pool.next(backend)


@contextmanager
def refusing() -> Iterator[int]:
    """A port that is taken and refuses connections, so that no other program can come to listen there."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


@contextmanager
def silent() -> Iterator[int]:
    """A port where the system answers no SYN: its backlog is full, and nobody accepts."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Handlers wait at it; it opens at the latest when the test ends."""
    event = threading.Event()
    yield event
    event.set()


def hanging(gate: threading.Event) -> Callable[[Connection], object]:
    """Accepts, reads the request, and says nothing until the gate opens."""

    def handler(connection: Connection) -> None:
        connection.read_request()
        gate.wait(PATIENCE)

    return handler


# What an answer is called -----------------------------------------------------------------------------------------

ANSWERS = {
    "ok": (OK, True, "L7OK 200 in N ms"),
    "http-1.0": (b"HTTP/1.0 200 OK\r\n\r\n", True, "L7OK 200 in N ms"),
    "redirect": (b"HTTP/1.1 302 Found\r\nLocation: /x\r\n\r\n", True, "L7OK 302 in N ms"),
    "no-reason": (b"HTTP/1.1 204\r\n\r\n", True, "L7OK 204 in N ms"),
    "lone-lf": (b"HTTP/1.1 200 OK\nA: b\n\n", True, "L7OK 200 in N ms"),
    "interim": (b"HTTP/1.1 100 Continue\r\n\r\n" + OK, True, "L7OK 200 in N ms"),
    "interims": (b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" * 5 + FAILING, False, "L7STS 500"),
    "switching": (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", False, "L7STS 101"),
    "not-found": (b"HTTP/1.1 404 Not Found\r\n\r\n", False, "L7STS 404"),
    "failing": (FAILING, False, "L7STS 500"),
    "ssh": (b"SSH-2.0-OpenSSH_9.2p1\r\n", False, "L7RSP not HTTP"),
    "http-2": (b"\0\0\x12\x04\0\0\0\0\0", False, "L7RSP not HTTP"),
    "http-3-in-words": (b"HTTP/3 200 OK\r\n\r\n", False, "L7RSP not HTTP"),
    "four-digits": (b"HTTP/1.1 2000 OK\r\n\r\n", False, "L7RSP not HTTP"),
    "no-status": (b"HTTP/1.1 OK\r\n\r\n", False, "L7RSP not HTTP"),
    "nothing": (b"", False, "L7RSP closed before an answer"),
    "half-a-head": (b"HTTP/1.1 200 OK\r\nContent-", False, "L7RSP closed within its head"),
    "interim-only": (b"HTTP/1.1 100 Continue\r\n\r\n", False, "L7RSP closed before an answer"),
    "endless-head": (b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 20_000, False, "L7RSP head of more than 65536 octets"),
}


def whole(octets: bytes) -> list[bytes]:
    return [octets]


def piecemeal(octets: bytes) -> list[bytes]:
    """Byte by byte, or what is very long in odd pieces."""
    size = 1 if len(octets) < 1000 else 997
    return [octets[place : place + size] for place in range(0, len(octets), size)]


@pytest.mark.parametrize("cut", [whole, piecemeal])
@pytest.mark.parametrize(("answer", "passed", "check"), ANSWERS.values(), ids=ANSWERS)
def test_an_answer_is_judged_by_its_status(answer, passed, check, cut):
    def handler(connection: Connection) -> None:
        connection.read_request()
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in cut(answer):
            connection.send(piece)

    with FakeBackend(handler) as fake:
        result = first_result(backend_at(fake.port))
    assert (result[0], re.sub(r"in \d+ ms", "in N ms", result[1])) == (passed, check)


@pytest.mark.parametrize(
    ("expect", "status", "passed"),
    [
        (((200, 204),), 204, True),
        (((200, 204),), 205, False),
        (((200, 299), (404, 404)), 404, True),
        (((200, 299), (404, 404)), 301, False),
        (((500, 599),), 503, True),
    ],
)
def test_the_expected_statuses_are_those_of_the_configuration(expect, status, passed):
    with FakeBackend(b"HTTP/1.1 %d x\r\nContent-Length: 0\r\n\r\n" % status) as fake:
        assert first_result(backend_at(fake.port), replace(ONCE, expect=expect))[0] is passed


def test_the_request_is_a_plain_get_that_asks_to_close():
    with FakeBackend(OK) as fake:
        first_result(backend_at(fake.port), replace(ONCE, path="/health?deep=1"))
        assert fake.requests == [
            f"GET /health?deep=1 HTTP/1.1\r\nHost: 127.0.0.1:{fake.port}\r\n"
            f"User-Agent: lb-health/{__version__}\r\nConnection: close\r\n\r\n".encode()
        ]


def test_ipv6():
    try:
        fake = FakeBackend(OK, host="::1")
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    with fake:
        assert first_result(backend_at(fake.port, "::1"))[0]
        assert f"\r\nHost: [::1]:{fake.port}\r\n".encode() in fake.requests[0]


def test_a_refused_connection():
    with refusing() as port:
        assert first_result(backend_at(port)) == (False, "L4CON refused")


def test_a_reset_in_place_of_an_answer():
    def handler(connection: Connection) -> None:
        connection.read_request()
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.file.close()
        connection.sock.close()

    with FakeBackend(handler) as fake:
        assert first_result(backend_at(fake.port)) == (False, "L7RSP reset before an answer")


def test_no_answer_in_time(gate):
    with FakeBackend(hanging(gate)) as fake:
        assert first_result(backend_at(fake.port), replace(ONCE, timeout=0.05)) == (False, "L7TOUT")
        gate.set()


def test_no_connection_in_time():
    with silent() as port:
        assert first_result(backend_at(port), replace(ONCE, timeout=0.05)) == (False, "L4TOUT")


def test_a_head_that_never_ends_in_time(gate):
    def handler(connection: Connection) -> None:
        connection.send(b"HTTP/1.1 200 OK\r\n")
        gate.wait(PATIENCE)

    with FakeBackend(handler) as fake:
        assert first_result(backend_at(fake.port), replace(ONCE, timeout=0.05)) == (False, "L7TOUT")
        gate.set()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ECONNREFUSED, "L4CON refused"),
        (errno.ETIMEDOUT, "L4TOUT"),
        (errno.EHOSTUNREACH, "L4CON no route to host"),
        (errno.ENETUNREACH, "L4CON network is unreachable"),
    ],
    ids=["refused", "timed-out", "host", "network"],
)
def test_a_failed_connect_in_words(code, words):
    assert health.connect_failure(OSError(code, os.strerror(code))) == words


def test_tcp_wants_a_connection_and_says_nothing():
    heard = queue.SimpleQueue()
    with FakeBackend(lambda connection: heard.put(connection.sock.recv(100))) as fake:
        passed, check = first_result(backend_at(fake.port), replace(ONCE, type="tcp"))
        assert passed
        assert re.fullmatch(r"L4OK in \d+ ms", check)
        assert heard.get(timeout=PATIENCE) == b""


def test_tcp_that_is_refused():
    with refusing() as port:
        assert first_result(backend_at(port), replace(ONCE, type="tcp")) == (False, "L4CON refused")


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="Linux lets a socket connect to itself so")
def test_a_connection_to_itself_is_a_refused_one(monkeypatch):
    """TCP's simultaneous open: a port in the ephemeral range where nobody listens "answers" once in a while."""

    class Narcissus(socket.socket):
        def connect_ex(self, address):
            self.bind(address)
            return super().connect_ex(address)

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    monkeypatch.setattr(socket, "socket", Narcissus)
    assert first_result(backend_at(port), replace(ONCE, type="tcp")) == (False, "L4CON refused")


# Manners ----------------------------------------------------------------------------------------------------------


def test_a_head_decides_and_the_rest_is_read_so_that_the_backend_sees_no_reset(gate):
    ends = queue.SimpleQueue()

    def handler(connection: Connection) -> None:
        connection.read_request()
        connection.send(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        gate.wait(PATIENCE)
        connection.send(b"x" * 300_000)
        connection.sock.shutdown(socket.SHUT_WR)
        ends.put(connection.sock.recv(1))

    with FakeBackend(handler) as fake:
        backend = backend_at(fake.port)
        pool = Reports([backend])
        with checking(pool):
            assert pool.next(backend)[0]  # nothing of the body has been sent yet
            gate.set()
            assert ends.get(timeout=PATIENCE) == b""


def test_a_body_without_end_is_left_after_a_while(monkeypatch):
    monkeypatch.setattr(health, "REST_BYTES", 100_000)
    ended = threading.Event()

    def handler(connection: Connection) -> None:
        connection.read_request()
        try:
            connection.send(b"HTTP/1.1 200 OK\r\n\r\n")
            while True:
                connection.send(b"x" * 65536)
        except OSError:
            ended.set()

    with FakeBackend(handler) as fake:
        backend = backend_at(fake.port)
        pool = Reports([backend])
        with checking(pool):
            assert pool.next(backend)[0]
            assert ended.wait(PATIENCE)


def test_a_backend_that_does_not_close_is_left_when_the_next_probe_is_due():
    """A keep-alive server that ignores `Connection: close`."""
    with FakeBackend(OK) as fake:
        backend = backend_at(fake.port)
        pool = Reports([backend])
        with checking(pool, OFTEN):
            assert [pool.next(backend)[0] for _ in range(5)] == [True] * 5


# Nobody waits for another -----------------------------------------------------------------------------------------


def test_a_backend_that_hangs_delays_no_other(gate):
    with FakeBackend(hanging(gate)) as slow, FakeBackend(OK) as quick:
        backends = [backend_at(slow.port, name="slow"), backend_at(quick.port, name="quick")]
        pool = Reports(backends)
        with checking(pool, OFTEN):
            for _ in range(5):
                assert pool.next(backends[1])[0]
            assert {name for name, _, _ in pool.all} == {"quick"}
        gate.set()


def test_stop_is_prompt_while_probes_hang(gate):
    with FakeBackend(hanging(gate)) as fake, silent() as port:
        pool = Reports([backend_at(fake.port, name="answer"), backend_at(port, name="connect")])
        checker = HealthChecker(pool, ONCE)
        checker.start()
        eventually(lambda: fake.requests, "a probe that hangs")
        stopping = threading.Thread(target=checker.stop, name="stop")
        stopping.start()
        stopping.join(PATIENCE / 5)
        assert not stopping.is_alive()
        assert pool.all == []
        gate.set()


def test_stop_may_come_twice_or_without_a_start():
    pool = Reports([])
    with checking(pool) as checker:
        assert "health" in [thread.name for thread in threading.enumerate()]
        checker.stop()
    HealthChecker(pool, ONCE).stop()


def test_many_backends_at_once():
    with FakeBackend(OK) as fake:
        backends = [Backend(Server(str(number), f"127.0.0.{number}", fake.port)) for number in range(1, 101)]
        for backend in backends:
            backend.endpoints = ((socket.AF_INET, ("127.0.0.1", fake.port)),)
        pool = Reports(backends)
        with checking(pool):
            assert all(pool.next(backend)[0] for backend in backends)


# Rise and fall through real probes --------------------------------------------------------------------------------


def changes_after(answers: Sequence[bytes], **settings) -> list[tuple[str, str, str]]:
    with FakeBackend(answers) as fake:
        backend = backend_at(fake.port)
        settings = replace(OFTEN, **settings)
        pool = Reports([backend], rise=settings.rise, fall=settings.fall)
        with checking(pool, settings):
            for _ in answers:
                pool.next(backend)
            return list(pool.changes)


def test_fail_fail_pass_fail_stays_up():
    """STYLE.md, 7: the streak is cleared by the first probe that agrees."""
    assert changes_after([OK, FAILING, FAILING, OK, FAILING, OK], fall=3) == []


def test_down_after_fall_and_up_after_rise():
    changes = changes_after([OK, FAILING, FAILING, FAILING, OK, FAILING, OK, OK], fall=3, rise=2)
    assert [(status, re.sub(r"in \d+ ms", "in N ms", reason)) for _, status, reason in changes] == [
        ("DOWN", "L7STS 500, 3rd failure"),
        ("UP", "L7OK 200 in N ms"),
    ]


def test_the_first_probe_decides_at_once():
    assert changes_after([FAILING], fall=3) == [("1", "DOWN", "L7STS 500, 1st failure")]


def test_a_backend_that_comes_back_is_up_again():
    with refusing() as port:
        backend = backend_at(port)
        pool = Reports([backend])
        with checking(pool, OFTEN):
            assert not pool.next(backend)[0]
            with FakeBackend(OK) as fake:
                backend.endpoints = ((socket.AF_INET, (fake.host, fake.port)),)
                eventually(lambda: len(pool.changes) == 2, "UP")
    assert [status for _, status, _ in pool.changes] == ["DOWN", "UP"]


# Operators --------------------------------------------------------------------------------------------------------


def test_a_backend_in_maintenance_is_not_probed_until_it_is_ready():
    with FakeBackend(OK) as resting, FakeBackend(OK) as serving:
        backends = [backend_at(resting.port, name="resting"), backend_at(serving.port, name="serving")]
        pool = Reports(backends)
        pool.set_admin(backends[0], Admin.MAINT, "a test")
        with checking(pool, OFTEN):
            for _ in range(5):
                assert pool.next(backends[1])[0]
            assert resting.accepted == 0
            pool.set_admin(backends[0], Admin.READY, "a test")
            assert pool.next(backends[0])[0]


def test_a_draining_backend_is_probed():
    with FakeBackend(OK) as fake:
        backend = backend_at(fake.port)
        pool = Reports([backend])
        pool.set_admin(backend, Admin.DRAIN, "a test")
        with checking(pool):
            assert pool.next(backend)[0]


def test_a_result_that_comes_in_maintenance_is_dropped(gate):
    with FakeBackend(hanging(gate)) as fake, FakeBackend(OK) as other:
        backends = [backend_at(fake.port, name="maint"), backend_at(other.port, name="other")]
        pool = Reports(backends)
        with checking(pool) as checker:
            eventually(lambda: fake.requests, "a probe under way")
            pool.set_admin(backends[0], Admin.MAINT, "a test")
            gate.set()
            eventually(lambda: not [t for t in threading.enumerate() if t.name == f"fake-{fake.port}-1"], "its end")
            pool.next(backends[1])
            checker.probe_now(backends[1])
            pool.next(backends[1])
        assert {name for name, _, _ in pool.all} == {"other"}


# When probes come: a clock and a chance that the test holds --------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Chance:
    """A random source that always says the same."""

    def __init__(self, value: float) -> None:
        self.value = value

    def random(self) -> float:
        return self.value


class Rounds:
    """A checker without a thread, whose rounds are plain calls."""

    def __init__(self, pool: Reports, settings: HealthCheck, chance: float = 0.0, **options) -> None:
        self.clock = Clock()
        self.pool = pool
        self.checker = HealthChecker(pool, settings, clock=self.clock, rng=Chance(chance), **options)

    def until(self, predicate: Callable[[], object], what: str) -> None:
        def ask() -> object:
            self.checker.turn(0.01)
            return predicate()

        eventually(ask, what)

    def reports(self, count: int) -> None:
        """Rounds until there are so many reports; that there are no more of them."""
        self.until(lambda: len(self.pool.all) >= count, f"{count} reports")
        self.quiet(count)

    def quiet(self, count: int) -> None:
        for _ in range(5):
            self.checker.turn(0.001)
        assert len(self.pool.all) == count


@pytest.fixture
def rounds() -> Iterator[Callable[..., Rounds]]:
    with ExitStack() as stack:

        def make(pool: Reports, settings: HealthCheck, chance: float = 0.0, **options) -> Rounds:
            made = Rounds(pool, settings, chance, **options)
            stack.callback(made.checker.stop)
            return made

        yield make


@pytest.mark.parametrize(("chance", "due"), [(0.0, 2.0), (0.5, 1.9), (0.999, 1.8002)])
def test_the_first_round_is_at_once_and_the_next_never_late(rounds, chance, due):
    """A little sooner by chance, so that many backends drift apart; never later, so that a return is seen in time."""
    with refusing() as port:
        backends = [backend_at(port, name=str(number)) for number in range(5)]
        run = rounds(Reports(backends), HealthCheck(interval=2, timeout=1), chance)
        run.reports(5)
        run.clock.now = 1000 + due - 0.001
        run.quiet(5)
        run.clock.now = 1000 + due + 0.001
        run.reports(10)


def test_many_backends_are_spread_over_the_interval_and_begin_in_groups(rounds):
    """A thousand probes at once make requests wait, and so does a thread that wakes a thousand times."""
    with refusing() as port:
        backends = [backend_at(port, name=str(number)) for number in range(30)]
        run = rounds(Reports(backends), HealthCheck(interval=2, timeout=1), 0.63)
        run.reports(30)
        for due, reports in (1000.7, 60), (1002.5, 90):  # of 1000 + 2 * 0.37, and of 1000.7 + 2 * 0.937
            run.clock.now = due - 0.001
            run.quiet(reports - 30)
            run.clock.now = due + 0.001
            run.reports(reports)


def test_the_interval_counts_from_the_start_of_the_last_probe(rounds, gate):
    def handler(connection: Connection) -> None:
        connection.read_request()
        gate.wait(PATIENCE)
        connection.send(OK)

    with FakeBackend(handler) as fake:
        run = rounds(Reports([backend_at(fake.port)]), HealthCheck(interval=10, timeout=9))
        run.until(lambda: fake.requests, "the request")
        run.clock.now += 8
        gate.set()
        run.reports(1)
        assert run.pool.all == [("1", True, "L7OK 200 in 8000 ms")]
        run.clock.now += 1.9
        run.quiet(1)
        run.clock.now += 0.1
        run.reports(2)


def test_a_probe_that_outlasts_the_interval_is_followed_at_once_and_never_doubled(rounds, gate):
    with FakeBackend(hanging(gate)) as fake:
        run = rounds(Reports([backend_at(fake.port)]), HealthCheck(interval=1, timeout=5))
        run.until(lambda: fake.requests, "the request")
        run.clock.now += 4.9
        run.quiet(0)
        assert fake.accepted == 1
        run.clock.now += 0.1
        run.reports(1)
        assert run.pool.all == [("1", False, "L7TOUT")]
        run.until(lambda: fake.accepted == 2, "the next probe")
        gate.set()


def test_after_a_standstill_an_answer_that_came_in_time_counts(rounds):
    """A machine that was suspended: all deadlines have passed, and the answers are there."""
    answered = threading.Event()

    def handler(connection: Connection) -> None:
        connection.read_request()
        connection.send(OK)
        answered.set()

    with FakeBackend(handler) as fake:
        backend = backend_at(fake.port)
        run = rounds(Reports([backend]), HealthCheck(interval=10, timeout=1))
        run.checker.turn(0)  # connects
        run.checker.turn(PATIENCE)  # sends the request
        assert answered.wait(PATIENCE)
        run.clock.now += 1000
        run.checker.turn(0)
        assert [passed for _, passed, _ in run.pool.all] == [True]


def test_probe_now_is_at_once_but_bounded(rounds):
    """A thousand requests that are refused in one instant are one reason to look, not a thousand."""
    with refusing() as port:
        backend = backend_at(port)
        run = rounds(Reports([backend]), HealthCheck(interval=60, timeout=1))
        run.reports(1)
        run.clock.now += 1
        for _ in range(1000):
            run.checker.probe_now(backend)
        run.reports(2)
        run.checker.probe_now(backend)
        run.quiet(2)
        run.clock.now += health.SOONEST
        run.reports(3)
        run.clock.now += 59
        run.quiet(3)
        run.clock.now += 1
        run.reports(4)


def test_probe_now_of_one_that_is_under_way_comes_after_it(rounds, gate):
    with FakeBackend(hanging(gate)) as fake:
        backend = backend_at(fake.port)
        run = rounds(Reports([backend]), HealthCheck(interval=60, timeout=1))
        run.until(lambda: fake.requests, "the request")
        run.clock.now += 0.5
        run.checker.probe_now(backend)
        run.quiet(0)
        assert fake.accepted == 1
        gate.set()
        run.until(lambda: len(run.pool.all) == 2, "two results")


def test_probe_now_wakes_the_thread():
    with FakeBackend(OK) as fake:
        backend = backend_at(fake.port)
        pool = Reports([backend])
        with checking(pool) as checker:
            pool.next(backend)
            checker.probe_now(backend)
            assert pool.next(backend)[0]


def test_backends_join_and_leave(rounds, gate):
    """The set is the pool's at the time. Who left is not probed, and what is under way for it is given up."""

    class Changing(Reports):
        members: Sequence[Backend] = ()

        @property
        def backends(self) -> Sequence[Backend]:
            return self.members

    gone = threading.Event()

    def handler(connection: Connection) -> None:
        connection.read_request()
        connection.file.read()
        gone.set()

    with FakeBackend(handler) as leaving, FakeBackend(OK) as staying, FakeBackend(OK) as joining:
        leaver, stayer, joiner = (
            backend_at(fake.port, name=name)
            for fake, name in ((leaving, "leaver"), (staying, "stayer"), (joining, "joiner"))
        )
        pool = Changing([leaver, stayer, joiner])
        pool.members = (leaver, stayer)
        run = rounds(pool, HealthCheck(interval=60, timeout=50))
        run.until(lambda: leaving.requests, "the probe of the leaver")
        run.reports(1)
        pool.members = (stayer, joiner)
        run.checker.probe_now(joiner)
        run.checker.probe_now(leaver)
        run.reports(2)
        assert [name for name, _, _ in pool.all] == ["stayer", "joiner"]
        assert gone.wait(PATIENCE)
        run.clock.now += 59
        run.quiet(2)
        run.clock.now += 1
        run.reports(4)
        assert leaving.accepted == 1


# Several addresses, and names -------------------------------------------------------------------------------------


def endpoint(port: int, host: str = "127.0.0.1") -> Endpoint:
    return socket.AF_INET, (host, port)


class Names:
    """A resolver that answers as the test says; one name may be held back."""

    def __init__(self, *endpoints: Endpoint) -> None:
        self.endpoints: tuple[Endpoint, ...] = endpoints
        self.error: Exception | None = None
        self.asked: list[tuple[str, int]] = []
        self.hold: dict[str, threading.Event] = {}

    def __call__(self, host: str, port: int) -> tuple[Endpoint, ...]:
        self.asked.append((host, port))
        if host in self.hold:
            assert self.hold[host].wait(PATIENCE)
        if self.error:
            raise self.error
        return self.endpoints


def test_a_refused_address_is_followed_by_the_next_and_the_one_that_answers_comes_first():
    """`localhost` is ::1 and 127.0.0.1; most servers listen on one of them."""
    with refusing() as port, FakeBackend(OK) as fake:
        backend = backend_at(80, "two.test")
        assert first_result(backend, resolve=Names(endpoint(port), endpoint(fake.port)))[0]
        assert backend.endpoints == (endpoint(fake.port), endpoint(port))


def test_a_silent_address_leaves_time_for_the_next():
    with silent() as port, FakeBackend(OK) as fake:
        backend = backend_at(80, "two.test")
        assert first_result(backend, replace(ONCE, timeout=0.4), resolve=Names(endpoint(port), endpoint(fake.port)))[0]
        assert backend.endpoints[0] == endpoint(fake.port)


def test_the_silence_of_all_addresses_ends_in_time(rounds):
    with silent() as port:
        backend = backend_at(port)
        backend.endpoints = (endpoint(port), endpoint(port, "127.0.0.1"))
        run = rounds(Reports([backend]), HealthCheck(interval=10, timeout=2))
        run.quiet(0)
        run.clock.now += 1
        run.quiet(0)
        run.clock.now += 1
        run.reports(1)
        assert run.pool.all == [("1", False, "L4TOUT")]


def test_refused_says_more_than_what_else_went_wrong():
    """::1 where there is no IPv6 "cannot be assigned", which would only confuse."""
    with refusing() as port:
        backend = backend_at(port)
        backend.endpoints = ((9999, ("127.0.0.1", port)), endpoint(port))  # a family that the system does not know
        assert first_result(backend) == (False, "L4CON refused")


def test_localhost_has_addresses_when_start_returns():
    with FakeBackend(OK) as fake:
        backend = backend_at(fake.port, "localhost")
        pool = Reports([backend])
        with checking(pool):
            assert endpoint(fake.port) in backend.endpoints
            assert pool.next(backend)[0]


def test_a_name_that_does_not_resolve_is_down_and_tried_again():
    with FakeBackend(OK) as fake:
        names = Names(endpoint(fake.port))
        names.error = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        backend = backend_at(fake.port, "late.test")
        pool = Reports([backend])
        with checking(pool, OFTEN, resolve=names):
            assert pool.next(backend) == (False, "DNS name does not resolve")
            assert pool.next(backend) == (False, "DNS name does not resolve")
            names.error = None
            eventually(lambda: len(pool.changes) == 2, "UP")
        assert [status for _, status, _ in pool.changes] == ["DOWN", "UP"]
        assert set(names.asked) == {("late.test", fake.port)}


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (socket.gaierror(socket.EAI_AGAIN, "Temporary failure"), "DNS temporary failure"),
        (OSError(errno.EMFILE, "Too many open files"), "DNS too many open files"),
        (UnicodeError("label too long"), "DNS label too long"),
        (None, "DNS name does not resolve"),
    ],
    ids=["temporary", "descriptors", "idna", "empty"],
)
def test_why_a_name_did_not_resolve(error, words):
    names = Names()
    names.error = error
    assert first_result(backend_at(80, "odd.test"), resolve=names) == (False, words)


def test_a_resolver_that_hangs_holds_up_nobody(monkeypatch, gate):
    """getaddrinfo may block for minutes; `start`, `stop` and all other backends do not wait for it."""
    monkeypatch.setattr(health, "NAME_PATIENCE", 0.01)
    with FakeBackend(OK) as fake:
        names = Names(endpoint(fake.port))
        names.hold["stuck.test"] = gate
        stuck, named, literal = (
            backend_at(fake.port, host, name=host) for host in ("stuck.test", "good.test", "127.0.0.1")
        )
        pool = Reports([stuck, named, literal])
        with checking(pool, replace(ONCE, timeout=0.3), resolve=names):
            assert pool.next(literal)[0]
            assert pool.next(named)[0]
            assert pool.next(stuck) == (False, "DNS no answer in time")
        gate.set()


def test_a_name_that_hung_is_taken_when_it_comes(monkeypatch, gate):
    monkeypatch.setattr(health, "NAME_PATIENCE", 0.01)
    with FakeBackend(OK) as fake:
        names = Names(endpoint(fake.port))
        names.hold["stuck.test"] = gate
        backend = backend_at(fake.port, "stuck.test")
        pool = Reports([backend])
        with checking(pool, replace(OFTEN, timeout=0.01), resolve=names):
            assert not pool.next(backend)[0]
            assert not pool.next(backend)[0]
            assert len(names.asked) == 1
            gate.set()
            eventually(lambda: "UP" in [status for _, status, _ in pool.changes], "UP")


def test_a_name_is_looked_up_again_only_when_it_is_old(rounds):
    with FakeBackend(OK) as fake:
        names = Names(endpoint(fake.port))
        run = rounds(Reports([backend_at(80, "good.test")]), HealthCheck(interval=20, timeout=5), resolve=names)
        run.reports(1)
        run.clock.now += 20
        run.reports(2)
        assert len(names.asked) == 1
        run.clock.now += 20
        run.reports(3)
        run.until(lambda: len(names.asked) == 2, "the second look-up")


def test_a_name_that_leads_elsewhere_is_followed_and_keeps_what_works_first(monkeypatch):
    monkeypatch.setattr(health, "NAME_AGE", 0.0)
    with FakeBackend(OK) as old, FakeBackend(OK) as new, refusing() as port:
        names = Names(endpoint(port), endpoint(old.port))
        backend = backend_at(80, "moves.test")
        pool = Reports([backend])
        with checking(pool, OFTEN, resolve=names):
            for _ in range(5):
                assert pool.next(backend)[0]
                assert backend.endpoints == (endpoint(old.port), endpoint(port))
            names.endpoints = (endpoint(new.port),)
            eventually(lambda: new.accepted, "a probe at the new address")
            assert backend.endpoints == (endpoint(new.port),)
        assert pool.changes == []


def test_a_name_server_that_breaks_takes_no_running_backend_away(monkeypatch):
    monkeypatch.setattr(health, "NAME_AGE", 0.0)
    with FakeBackend(OK) as fake:
        names = Names(endpoint(fake.port))
        backend = backend_at(80, "good.test")
        pool = Reports([backend])
        with checking(pool, OFTEN, resolve=names):
            assert pool.next(backend)[0]
            names.error = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
            asked = len(names.asked)
            eventually(lambda: len(names.asked) > asked + 3, "failed look-ups")
            pool.next(backend)
        assert all(passed for _, passed, _ in pool.all)


# What goes wrong here and not there -------------------------------------------------------------------------------


def test_a_shortage_of_descriptors_is_no_fault_of_the_backend(rounds, monkeypatch):
    class Short(socket.socket):
        def __init__(self, *arguments, **options):
            raise OSError(errno.EMFILE, "Too many open files")

    errors = []
    with FakeBackend(OK) as fake:
        backend = backend_at(fake.port)
        run = rounds(Reports([backend]), HealthCheck(interval=60, timeout=5), on_error=errors.append)
        with monkeypatch.context() as patch:
            patch.setattr(socket, "socket", Short)
            for _ in range(3):
                run.quiet(0)
                run.clock.now += health.SHORTAGE_PAUSE
        assert errors == ["health checks wait: too many open files"]
        run.reports(1)
        assert run.pool.all[0][1]


def test_an_unexpected_error_in_one_probe_is_told_and_costs_no_other():
    errors = queue.SimpleQueue()
    with FakeBackend(OK) as fake:
        backends = [backend_at(fake.port, name="odd"), backend_at(fake.port, name="good")]
        backends[0].endpoints = ((socket.AF_INET, "no address at all"),)
        pool = Reports(backends)
        with checking(pool, OFTEN, on_error=errors.put):
            passed, check = pool.next(backends[0])
            assert not passed
            assert check.startswith("internal error: TypeError: ")
            assert errors.get(timeout=PATIENCE).startswith(f"health check of backend odd 127.0.0.1:{fake.port}: TypeEr")
            for _ in range(3):
                assert pool.next(backends[1])[0]


def test_an_error_of_the_listener_does_not_end_the_thread(monkeypatch):
    monkeypatch.setattr(health, "SHORTAGE_PAUSE", 0.01)
    errors = queue.SimpleQueue()

    def broken(backend: Backend, reason: str) -> None:
        raise KeyError("listener")

    with FakeBackend([FAILING, OK]) as fake:
        backend = backend_at(fake.port)
        pool = Reports([backend], on_change=broken)
        with checking(pool, OFTEN, on_error=errors.put):
            assert errors.get(timeout=PATIENCE).startswith("health checks: KeyError: 'listener' (")
            eventually(lambda: backend.healthy, "UP")
