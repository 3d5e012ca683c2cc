"""Faults: what a backend, a client or the system may do, and what it may cost."""

from __future__ import annotations

import queue
import re
import select
import socket
import threading
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

import faults
from backend_server import Backend, serving
from balancer import http_session
from balancer.balancer import LoadBalancer
from balancer.upstream import Upstream
from balancing import connect, log_lines, running
from conftest import PATIENCE, eventually
from fakes import Connection, FakeBackend, read_lines, read_response
from slow_clients import SlowClients

GET = b"GET / HTTP/1.1\r\nHost: lb.test\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: lb.test\r\nContent-Length: 4\r\n\r\nbody"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
PART = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf"
CHUNK = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n"


# Under load, whole programs ---------------------------------------------------------------------------------------


@pytest.mark.program
@pytest.mark.parametrize(
    "scenario",
    [
        faults.killed,
        faults.killed_new_connections,
        faults.rolling_restart,
        faults.all_away_patience,
        faults.overloaded,
        faults.capped,
    ],
    ids=lambda scenario: scenario.__name__,
)
def test_costs_no_get(scenario, tmp_path):
    row = scenario(tmp_path)
    assert row.requests > 0
    assert (row.failed, row.errors, row.codes) == (0, Counter(), Counter())


@pytest.mark.program
def test_a_killed_backend_costs_only_the_posts_that_it_had_in_hand(tmp_path):
    """A POST whose octets have left is never sent twice (RFC 9110 section 9.2.2)."""
    row = faults.killed_posts(tmp_path)
    assert row.failed <= faults.CLIENTS
    assert set(row.errors) <= {"status 502"}
    assert set(row.codes) <= {"SH"}
    assert row.errors["status 502"] == row.codes["SH"]


@pytest.mark.program
@pytest.mark.parametrize("scenario", [faults.stopped, faults.stopped_new_connections], ids=lambda it: it.__name__)
def test_a_stop_answers_all_that_was_accepted(scenario, tmp_path):
    row = scenario(tmp_path)
    assert (row.failed, row.codes, row.note) == (0, Counter(), "exit status 0")


@pytest.mark.program
def test_with_all_backends_away_the_answer_is_503_at_once(tmp_path):
    row = faults.all_away(tmp_path)
    assert row.failed > 0
    assert set(row.errors) <= {"status 503", "status 502"}
    assert set(row.codes) <= {"SC", "SH"}, "SH: it was in hand at the last backend when that was killed"


@pytest.mark.program
def test_a_queue_that_is_not_served_in_time_answers_503(tmp_path):
    row = faults.overloaded_for_long(tmp_path)
    assert set(row.errors) == {"status 503"}
    assert set(row.codes) == {"sQ"}


@pytest.mark.program
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs prlimit, which is Linux's")
def test_a_want_of_descriptors_passes(tmp_path):
    row = faults.short_of_descriptors(tmp_path)
    assert set(row.errors) <= {"status 503"}
    assert set(row.codes) <= {"RC"}


# One backend that misbehaves --------------------------------------------------------------------------------------


def resets(connection: Connection) -> None:
    """Close with a reset, the request unread in part."""
    connection.read_request()
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.file.close()
    connection.sock.close()


def resets_within_the_body(connection: Connection) -> None:
    connection.read_request()
    connection.send(PART)
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.file.close()
    connection.sock.close()


def says(*octets: bytes):
    """Send this and close."""

    def handler(connection: Connection) -> None:
        connection.read_request()
        for piece in octets:
            connection.send(piece)

    return handler


def never_ends(*octets: bytes):
    """Send this, and then nothing until the other side closes."""

    def handler(connection: Connection) -> None:
        connection.read_request()
        for piece in octets:
            connection.send(piece)
        connection.file.read(1)

    return handler


REFUSED = {
    "resets before the answer": (resets, 502, "SH"),
    "closes without an answer": (says(), 502, "SH"),
    "closes within the head": (says(b"HTTP/1.1 200 OK\r\nContent-"), 502, "SH"),
    "sends garbage": (says(b"\x16\x03\x01 this is no HTTP\r\n\r\n"), 502, "PH"),
    "sends a head of 1 MB": (never_ends(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 1_000_000), 502, "PH"),
    "sends two lengths": (says(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok"), 502, "PH"),
    "begins with a chunk that is none": (
        says(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxx\r\n"),
        502,
        "PH",
    ),
    "switches protocols unasked": (says(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n"), 502, "PH"),
    "never answers": (never_ends(), 504, "sH"),
    "never ends its head": (never_ends(b"HTTP/1.1 200 OK\r\nServer: slow\r\n"), 504, "sH"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("request_octets", [GET, POST], ids=["GET", "POST"])
def test_a_backend_that(name, request_octets, tmp_path):
    """Before the answer has begun the client is told, with the code that stands in the log."""
    handler, status, code = REFUSED[name]
    with (
        FakeBackend(handler) as backend,
        running(
            tmp_path,
            [(backend.host, backend.port)],
            timeouts={"server": 0.2},
            health_check={"type": "tcp", "interval": 1000},
        ) as balancer,
        connect(balancer) as client,
    ):
        client.sendall(request_octets)
        answer = read_response(client)
        assert answer.status == status
        identity = dict(answer.headers)["X-Request-Id"]
        assert identity.encode() in answer.body
        eventually(lambda: [backend.active for backend in balancer.pool.backends] == [0])
    lines = [line for line in log_lines(tmp_path) if identity in line]
    assert len(lines) == 1
    assert f" {status} " in lines[0]
    assert f"code={code}" in lines[0]


half_seen = threading.Event()


def breaks_its_chunks(connection: Connection) -> None:
    """Only once the client has the beginning, for before that the answer is refused."""
    half_seen.clear()
    connection.read_request()
    connection.send(CHUNK)
    half_seen.wait(PATIENCE)
    connection.send(b"zz\r\n")


CUT = {
    "resets within the body": (resets_within_the_body, "SD"),
    "ends its body early": (says(PART), "SD"),
    "ends within the chunks": (says(CHUNK), "SD"),
    "falls silent within the body": (never_ends(PART), "sD"),
    "breaks its chunks": (breaks_its_chunks, "PD"),
    "falls silent after 200 KB": (
        never_ends(b"HTTP/1.1 200 OK\r\nContent-Length: 999999\r\n\r\n" + b"x" * 200_000),
        "sD",
    ),
    "ends its long body early": (says(b"HTTP/1.1 200 OK\r\nContent-Length: 999999\r\n\r\n" + b"x" * 200_000), "SD"),
}


@pytest.mark.parametrize("name", CUT)
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_body_that_is_cut_is_never_made_to_look_complete(name, version, tmp_path):
    """RFC 9112 section 8: whoever closes early leaves a message that can be seen to be incomplete."""
    handler, code = CUT[name]
    with (
        FakeBackend(handler) as backend,
        running(
            tmp_path,
            [(backend.host, backend.port)],
            timeouts={"server": 0.2},
            health_check={"type": "tcp", "interval": 1000},
        ) as balancer,
        connect(balancer) as client,
    ):
        client.sendall(GET.replace(b"1.1", version.encode()))
        received, reset = read_to_the_end(client)
        head, _, body = received.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK")
        if b"chunked" in head:
            assert not body.endswith(b"0\r\n\r\n")
        elif b"Content-Length" in head:
            assert len(body) < int(head.partition(b"Content-Length: ")[2].split()[0])
        else:
            assert reset, "a close would be the end of this body"
        eventually(lambda: [backend.active for backend in balancer.pool.backends] == [0])
    assert any(f"code={code}" in line for line in log_lines(tmp_path)), log_lines(tmp_path)


def read_to_the_end(sock: socket.socket) -> tuple[bytes, bool]:
    """What came until the other side closed, and whether it did so with a reset."""
    received = b""
    try:
        while piece := sock.recv(65536):
            received += piece
            if b"half" in received:
                half_seen.set()
    except ConnectionResetError:
        return received, True
    return received, False


def test_octets_behind_an_answer_go_nowhere(tmp_path):
    """RFC 9112 section 6.3: the connection that they came on is not used again."""
    with (
        FakeBackend(OK + b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nwrong") as backend,
        running(tmp_path, [(backend.host, backend.port)], health_check={"type": "tcp", "interval": 1000}) as balancer,
        connect(balancer) as client,
        client.makefile("rb") as file,
    ):
        eventually(lambda: backend.accepted == 1, "the first probe")
        for _ in range(3):
            client.sendall(GET)
            assert read_response(file).body == b"ok"
        assert backend.accepted == 4


def test_a_kept_connection_that_the_backend_closes_is_replaced(tmp_path):
    """RFC 9112 section 9.3.1: a backend may close between two requests, and an idempotent one is repeated."""

    def once(connection: Connection) -> None:
        connection.read_request()
        connection.send(OK)
        connection.read_request()  # and hangs up on the second

    with (
        FakeBackend(once) as backend,
        running(tmp_path, [(backend.host, backend.port)], health_check={"type": "tcp", "interval": 1000}) as balancer,
        connect(balancer) as client,
        client.makefile("rb") as file,
    ):
        for _ in range(4):
            client.sendall(GET)
            assert read_response(file).status == 200
        assert [octets[:3] for octets in backend.requests].count(b"GET") > 4


def test_a_post_is_never_sent_twice(tmp_path):
    """RFC 9110 section 9.2.2."""

    def once(connection: Connection) -> None:
        connection.read_request()
        connection.send(OK)
        connection.read_request()

    with (
        FakeBackend(once) as backend,
        running(tmp_path, [(backend.host, backend.port)], health_check={"type": "tcp", "interval": 1000}) as balancer,
        connect(balancer) as client,
        client.makefile("rb") as file,
    ):
        client.sendall(POST)
        assert read_response(file).status == 200
        client.sendall(POST)
        assert read_response(file).status == 502
        assert len(backend.requests) == 2


def test_an_exchange_without_a_thread_for_its_body_is_refused_and_the_rest_goes_on(tmp_path):
    with (
        FakeBackend(OK) as backend,
        running(tmp_path, [(backend.host, backend.port)], health_check={"type": "tcp", "interval": 1000}) as balancer,
        connect(balancer) as client,
        connect(balancer) as other,
    ):
        balancer.pumps._limit = 0
        client.sendall(b"PUT / HTTP/1.1\r\nHost: lb.test\r\nContent-Length: 10000000\r\n\r\n" + b"x" * 300_000)
        answer = read_response(client)
        assert answer.status == 503
        other.sendall(GET)
        assert read_response(other).status == 200
        eventually(lambda: [backend.active for backend in balancer.pool.backends] == [0])


# Slow clients -----------------------------------------------------------------------------------------------------


def test_clients_that_take_their_time_are_cut_and_the_others_are_served(tmp_path):
    """Slowloris, both ways: a head that never ends, an answer that is not taken."""
    with (
        serving(Backend()) as backend,
        running(
            tmp_path,
            [("127.0.0.1", backend.port)],
            timeouts={"request_head": 0.3, "client": 0.2},
            health_check={"type": "tcp", "interval": 1000},
        ) as balancer,
        SlowClients(balancer.port, heads=50, readers=10, interval=0.05, again=False) as slow,
        faults.Load(balancer.port, clients=2) as others,
    ):
        eventually(lambda: slow.seen["408"] == 50, "every head is told")
        eventually(lambda: codes(tmp_path)["cD"] == 10, "every reader is cut")
        others.more(100)
        eventually(lambda: balancer.pool.backends[0].active <= 2, "what the readers held is free again")
    assert others.failed == 0
    assert set(slow.seen) == {"408"}
    assert codes(tmp_path) == {"cR": 50, "cD": 10}


def codes(tmp_path: Path) -> Counter[str]:
    """Termination codes of those exchanges that did not end well."""
    found = Counter(line.partition("code=")[2][:2] for line in log_lines(tmp_path) if " code=" in line)
    del found["--"]
    return found


@pytest.mark.soak
@pytest.mark.program
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="reads /proc")
def test_2200_slow_clients_do_not_double_the_p99_of_the_others(tmp_path):
    row = faults.slowloris(tmp_path)
    assert (row.failed, row.errors) == (0, Counter())
    assert set(row.codes) <= {"cR", "cD", "CR", "CD"}, "C: hung up on, at the end of each round"
    assert row.codes["cR"] > 2000
    assert row.codes["cD"] > 200
    ratio = re.search(r"ratio ([\d.]+)", row.note)
    assert ratio
    assert float(ratio[1]) <= 2, row.note


# What is left ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("requests", [1200, pytest.param(20_000, marks=pytest.mark.soak)])
def test_requests_of_every_kind_leave_nothing_behind(requests, tmp_path):
    """Neither a descriptor nor a thread, a lease, a connection, a session, or an object of theirs."""
    row = faults.leaks(tmp_path, requests)
    assert (row.requests, row.failed, row.errors, row.note) == (requests, 0, Counter(), "nothing left behind")
    assert not [line for line in log_lines(tmp_path) if "bug in" in line or "code=I" in line]


# The cap on connections -------------------------------------------------------------------------------------------


def test_beyond_the_cap_clients_wait_in_the_backlog_until_one_leaves(tmp_path):
    """Kept-alive clients hold their places, and are served all the while; each that leaves makes room for one."""
    with (
        FakeBackend(OK) as backend,
        running(
            tmp_path,
            [(backend.host, backend.port)],
            limits={"connections": 4},
            health_check={"type": "tcp", "interval": 1000},
        ) as balancer,
        ExitStack() as stack,
    ):
        clients = [stack.enter_context(connect(balancer)) for _ in range(10)]
        for client in clients:
            client.sendall(GET)
        waiting = deque(clients[4:])
        inside = deque(clients[:4])
        for client in inside:
            assert read_response(client).status == 200
        while waiting:
            for client in inside:
                client.sendall(GET)
                assert read_response(client).status == 200
            assert len(balancer.listener.sessions) == 4
            assert not select.select(waiting, [], [], 0)[0], "nobody beyond the cap was told anything"
            inside.popleft().close()
            inside.append(waiting.popleft())
            assert read_response(inside[-1]).status == 200
    assert sum(" 200 " in line for line in log_lines(tmp_path)) == 10 + 6 * 4


# A backend that is taken out while it has work in hand -------------------------------------------------------------


@pytest.mark.program
def test_posts_that_a_frozen_backend_holds_are_told_and_no_get_fails(tmp_path):
    """RFC 9110 section 9.2.2: they may have been carried out, so they go to no other."""
    row = faults.frozen_posts(tmp_path)
    assert 0 < row.failed <= faults.CLIENTS
    assert set(row.errors) == {"status 504"}
    assert row.codes == {"DH": row.failed}
    assert row.note.startswith("0 of ")


@pytest.mark.program
def test_a_backend_that_calls_itself_unwell_finishes_what_it_has_in_hand(tmp_path):
    row = faults.unwell(tmp_path)
    assert row.requests > 0
    assert (row.failed, row.errors, row.codes) == (0, Counter(), Counter())


LONG_POST = b"POST / HTTP/1.1\r\nHost: lb.test\r\nContent-Length: 100000000\r\n\r\n"
PUT = POST.replace(b"POST", b"PUT")
BEFORE_ITS_HEAD = [(GET, "other"), (PUT, "other"), (POST, 504), (LONG_POST, 504)]


@pytest.mark.parametrize(("octets", "outcome"), BEFORE_ITS_HEAD, ids=["GET", "PUT", "POST", "long POST"])
def test_a_backend_that_hangs_loses_what_it_has_not_answered(octets, outcome, tmp_path, monkeypatch):
    """What changes nothing by being repeated goes to another (RFC 9110 section 9.2.2); the rest is told."""
    monkeypatch.setattr(http_session, "REST_AFTER", 0.1)  # how long a pump waits for more of the long one
    with held(tmp_path) as (balancer, client, hung):
        client.sendall(octets)
        wait_for(hung)
        if octets is LONG_POST:
            client.sendall(bytes(2_000_000))
            eventually(lambda: balancer.pumps.threads == 1, "a pump")
        take_out(balancer, "L7TOUT")
        answer = read_response(client)
        if outcome == "other":
            assert (answer.status, answer.body) == (200, b"ok")
        else:
            assert (answer.status, b"code: DH" in answer.body) == (504, True)
        eventually(lambda: not any(backend.active for backend in balancer.pool.backends), "every lease given back")
    assert codes(tmp_path) == ({} if outcome == "other" else {"DH": 1})


@pytest.mark.parametrize("check", ["L7TOUT", "L7STS 503", "L4CON refused"])
def test_an_answer_that_has_begun_goes_on_whatever_the_probes_say(check, tmp_path):
    with held(tmp_path) as (balancer, client, hung), client.makefile("rb") as file:
        client.sendall(GET)
        connection = wait_for(hung)
        connection.send(PART)
        assert read_lines(file).startswith(b"HTTP/1.1 200 ")
        take_out(balancer, check)
        connection.send(b" whole")
        assert file.read(10) == b"half whole"
        client.sendall(GET)
        assert read_response(file).body == b"ok"
    assert codes(tmp_path) == {}


@pytest.mark.parametrize("octets", [GET, POST], ids=["GET", "POST"])
@pytest.mark.parametrize("check", ["L7STS 503", "L4CON refused"])
def test_a_backend_that_is_unwell_may_still_answer_what_it_has_in_hand(octets, check, tmp_path):
    with held(tmp_path) as (balancer, client, hung):
        client.sendall(octets)
        connection = wait_for(hung)
        take_out(balancer, check)
        connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nlate")
        assert read_response(client).body == b"late"
    assert codes(tmp_path) == {}


Hung = queue.SimpleQueue[Connection]


@contextmanager
def held(tmp_path: Path) -> Iterator[tuple[LoadBalancer, socket.socket, Hung]]:
    """A balancer, a client, and the connections on which the first of two backends has a request and says nothing."""
    hung: Hung = queue.SimpleQueue()

    def hangs(connection: Connection) -> None:
        if read_lines(connection.file):
            hung.put(connection)
            left.wait(PATIENCE)

    left = threading.Event()
    with (
        FakeBackend(hangs) as first,
        FakeBackend(OK) as second,
        running(
            tmp_path,
            [(first.host, first.port), (second.host, second.port)],
            health_check={"type": "tcp", "interval": 1000},
        ) as balancer,
        connect(balancer) as client,
    ):
        eventually(lambda: all(backend.probed for backend in balancer.pool.backends), "the first probes")
        try:
            yield balancer, client, hung
        finally:
            left.set()


def wait_for(hung: Hung) -> Connection:
    return hung.get(timeout=PATIENCE)


def take_out(balancer: LoadBalancer, check: str) -> None:
    """As its probes do when they end like this."""
    backend = balancer.pool.backends[0]
    for _ in range(balancer.config.health_check.fall):
        balancer.pool.report(backend, False, check)
    assert backend.status == "DOWN"


# What is given back -----------------------------------------------------------------------------------------------


def test_a_lease_whose_connection_was_renewed_in_vain_is_given_back_once(tmp_path, monkeypatch):
    quiet = {"type": "tcp", "interval": 1000}
    with (
        FakeBackend(OK) as backend,
        running(tmp_path, [(backend.host, backend.port)], health_check=quiet) as balancer,
    ):
        with connect(balancer) as client, client.makefile("rb") as file:
            client.sendall(GET)
            assert read_response(file).status == 200
            eventually(lambda: balancer.upstreams.idle == 1, "the connection is kept")
            # Closed just before it is sent to.
            monkeypatch.setattr(balancer.reactor, "may_be_ready", lambda fd: True)
            monkeypatch.setattr(Upstream, "is_stale", lambda upstream: True)
            balancer.pool.backends[0].endpoints = ()  # and no other can be opened
            client.sendall(POST)
            assert read_response(file).status == 503
        eventually(lambda: not balancer.listener.sessions, "the session has ended")
        assert balancer.pool.backends[0].active == 0


def test_a_client_that_takes_nothing_is_reset(tmp_path):
    """Behind an orderly close megabytes would lie in the kernel for as long as that client likes."""
    octets = b"HTTP/1.1 200 OK\r\nContent-Length: 50000000\r\n\r\n" + bytes(50_000_000)
    with (
        FakeBackend(octets) as backend,
        running(
            tmp_path,
            [(backend.host, backend.port)],
            timeouts={"client": 0.2},
            health_check={"type": "tcp", "interval": 1000},
        ) as balancer,
        socket.socket() as client,
    ):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(PATIENCE)
        client.connect((balancer.host, balancer.port))
        client.sendall(GET)
        eventually(lambda: any("code=cD" in line for line in log_lines(tmp_path)), "it is cut")
        eventually(lambda: balancer.pool.backends[0].active == 0, "its lease is given back")
        received, reset = read_to_the_end(client)
        assert reset
        assert len(received) < len(octets)
