"""Each row of the rules for HTTP/1.1, through a running balancer: what the client gets, whether its connection stays,
and every octet that reaches the backend. M is RFC 9112, S is RFC 9110.

Messages are sent whole and octet by octet. One balancer and one backend serve the whole file; a test that needs its own
makes it.
"""

from __future__ import annotations

import http.client
import io
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from balancer.balancer import LoadBalancer
from balancing import connect, log_lines, running
from conftest import PATIENCE, eventually
from fakes import Answer, Connection, FakeBackend, read_lines, read_message, read_response
from messages import (
    HOSTILE_ANSWERS,
    HOSTILE_BODIES,
    HOSTILE_HEADS,
    REWRITTEN,
    Hostile,
    NotRead,
    Rewritten,
    forwarded,
    head,
    read_by_http_client,
    read_by_http_server,
)
from programs import free_ports

GET = head("GET / HTTP/1.1", "Host: a.test")
LAST = head("HTTP/1.1 204 No Content", "Connection: close")
OK = head("HTTP/1.1 200 OK", "Content-Length: 2") + b"ok"
QUIET = {"health_check": {"type": "tcp", "interval": 1000}}  # one probe at the start, which sends nothing


def whole(octets: bytes) -> list[bytes]:
    return [octets]


def octet_by_octet(octets: bytes) -> list[bytes]:
    return [octets[i : i + 1] for i in range(len(octets))]


Way = Callable[[bytes], list[bytes]]
WAYS: list[Way] = [whole, octet_by_octet]
both_ways = pytest.mark.parametrize("way", WAYS)


# The two ends ---------------------------------------------------------------------------------------------------------


class Backend:
    """Takes down every octet of each connection, and answers whatever http.server reads as one whole request."""

    def __init__(self) -> None:
        self.answer = [LAST]  # in pieces
        self._changed = threading.Condition()  # guards the two below
        self._taken: list[bytearray] = []
        self._ended = 0  # connections

    def begin(self, answer: list[bytes]) -> None:
        """Forget what came before, in case that a test failed before it asked."""
        self.answer = answer
        with self._changed:
            self._taken.clear()

    def serve(self, connection: Connection) -> None:
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        taken = bytearray()
        with self._changed:
            self._taken.append(taken)
        try:
            answered = 0
            while piece := connection.sock.recv(65536):
                with self._changed:
                    taken += piece
                    self._changed.notify_all()
                try:
                    request = read_by_http_server(bytes(taken[answered:]))
                except NotRead:
                    continue
                answered = len(taken) - len(request.rest)
                for piece in [LAST] if request.start[1] == "/marker" else self.answer:
                    connection.send(piece)
        finally:
            with self._changed:
                self._ended += 1
                self._changed.notify_all()

    def wait_for(self, octets: bytes) -> None:
        """Return once a connection has brought these."""
        with self._changed:
            came = self._changed.wait_for(lambda: any(octets in taken for taken in self._taken), PATIENCE)
            assert came, self._taken

    def taken(self, fake: FakeBackend) -> list[bytes]:
        """What each connection brought since the last call, once they have all ended."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._ended == fake.accepted, PATIENCE), "a connection that stays"
            octets = [bytes(taken) for taken in self._taken if taken]
            self._taken.clear()
        return [taken for taken in octets if not taken.startswith(b"GET /marker ")]


class Stand:
    """A balancer before one backend."""

    def __init__(self, balancer: LoadBalancer, fake: FakeBackend, backend: Backend) -> None:
        self.balancer = balancer
        self.backend = backend
        self._fake = fake

    def taken(self) -> list[bytes]:
        """What reached the backend since the last call, connection by connection.

        Connections are accepted in their order: once a last one has brought its request there is none on its way.
        """
        with connect(self.balancer) as sock:
            sock.sendall(head("GET /marker HTTP/1.1", "Host: marker.test"))
            assert read_response(sock).status == 204
        return self.backend.taken(self._fake)

    def sent(self, *lines: str, minor: int = 1) -> bytes:
        return forwarded(lines, minor=minor, client="127.0.0.1", port=self.balancer.port)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    backend = Backend()
    with (
        FakeBackend(backend.serve) as fake,
        running(tmp_path_factory.mktemp("rules"), [(fake.host, fake.port)], **QUIET) as balancer,
    ):
        yield Stand(balancer, fake, backend)


@pytest.fixture
def stand(shared: Stand) -> Stand:
    shared.backend.begin([LAST])
    return shared


@contextmanager
def fronting(tmp_path: Path, script: Any, **keys: Any) -> Iterator[tuple[LoadBalancer, FakeBackend]]:
    """A balancer of its own before one FakeBackend, which was probed and will not be probed again.

    `script` is as FakeBackend takes it, but a handler is not called for the probe, which sends nothing.
    """

    def handler(connection: Connection) -> None:
        if connection.file.peek(1):
            script(connection)

    with (
        FakeBackend(handler if callable(script) else script) as fake,
        running(tmp_path, [(fake.host, fake.port)], **QUIET, **keys) as balancer,
    ):
        eventually(lambda: all(backend.probed for backend in balancer.pool.backends), "the first probe")
        yield balancer, fake


def send(sock: socket.socket, pieces: Sequence[bytes]) -> None:
    """Send them one by one, to the end or until the other side has had enough."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        for piece in pieces:
            sock.sendall(piece)
    except (BrokenPipeError, ConnectionResetError):
        return


@contextmanager
def client(balancer: LoadBalancer) -> Iterator[tuple[socket.socket, io.BufferedReader]]:
    with connect(balancer) as sock, sock.makefile("rb") as file:
        yield sock, file


def refused(balancer: LoadBalancer, pieces: Sequence[bytes]) -> Answer:
    """The answer to a request, behind which the balancer must close."""
    with client(balancer) as (sock, file):
        send(sock, pieces)
        answer = read_response(file)
        assert file.read() == b""
    assert answer.headers["Connection"] == "close"
    return answer


def answered(balancer: LoadBalancer, pieces: Sequence[bytes], method: str = "GET") -> Answer:
    """The answer to a request that is its client's last."""
    with client(balancer) as (sock, file):
        send(sock, pieces)
        answer = read_response(file, method)
        sock.shutdown(socket.SHUT_WR)
        assert file.read() == b""
    return answer


def all_that_comes(balancer: LoadBalancer, pieces: Sequence[bytes]) -> bytes:
    """Every octet that a client gets that sends no more behind this."""
    octets = b""
    with connect(balancer) as sock:
        send(sock, pieces)
        sock.shutdown(socket.SHUT_WR)
        try:
            while piece := sock.recv(65536):
                octets += piece
        except ConnectionResetError:
            return octets
    return octets


@contextmanager
def held_up(balancer: LoadBalancer) -> Iterator[None]:
    """Whatever comes meanwhile, the reactor finds in one batch afterwards, in the order in which it came."""
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        release.wait(PATIENCE)

    balancer.reactor.call_soon(hold)
    assert held.wait(PATIENCE)
    try:
        yield
    finally:
        release.set()


def body_for(rewritten: Rewritten) -> bytes:
    """A body as this request's framing has it."""
    if "Transfer-Encoding: chunked" in rewritten.forwarded:
        return b"5\r\nhello\r\n0\r\n\r\n"
    lengths = [line.partition(":")[2] for line in rewritten.forwarded if line.startswith("Content-Length:")]
    return b"x" * int(lengths[0]) if lengths else b""


# Reading a request ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hostile", HOSTILE_HEADS, ids=str)
def test_a_refused_head_leaves_no_octet_at_a_backend(stand: Stand, hostile: Hostile) -> None:
    for way in WAYS:
        assert refused(stand.balancer, way(hostile.octets)).status == hostile.status
    assert stand.taken() == []


@pytest.mark.parametrize("hostile", HOSTILE_BODIES, ids=str)
def test_chunks_that_are_none_never_become_a_request(stand: Stand, hostile: Hostile) -> None:
    """M 7.1: 400 while nothing was forwarded; what was forwarded in part is cut off on both sides."""
    assert refused(stand.balancer, whole(hostile.octets)).status == 400
    assert stand.taken() == []
    forwarded_head = stand.sent("POST / HTTP/1.1", "Host: a.test", "Transfer-Encoding: chunked")
    with client(stand.balancer) as (sock, file):
        head_alone, end, chunks = hostile.octets.partition(b"\r\n\r\n")
        send(sock, octet_by_octet(head_alone + end))
        stand.backend.wait_for(forwarded_head)
        send(sock, octet_by_octet(chunks))
        assert read_response(file).status == 400
        assert file.read() == b""
    (cut,) = stand.taken()
    assert cut.startswith(forwarded_head)
    with pytest.raises(NotRead):
        read_by_http_server(cut)


@pytest.mark.parametrize("rewritten", REWRITTEN, ids=str)
def test_a_good_request_reaches_the_backend_as_the_rules_have_it(stand: Stand, rewritten: Rewritten) -> None:
    own = f"{stand.balancer.host}:{stand.balancer.port}"
    lines = [line.replace("lb.test:8080", own) for line in rewritten.forwarded]
    body = body_for(rewritten)
    for way in WAYS:
        method = rewritten.lines[0].partition(" ")[0]
        assert answered(stand.balancer, way(head(*rewritten.lines) + body), method).status == 204
        (octets,) = stand.taken()
        wanted = stand.sent(*lines, minor=rewritten.minor)
        assert octets[: len(wanted)] == wanted
        request = read_by_http_server(octets)
        assert request.body == (b"hello" if body.endswith(b"0\r\n\r\n") else body)
        assert request.rest == b""


LONG_LINE = "GET /" + "a" * 300 + " HTTP/1.1"


@pytest.mark.parametrize(
    ("octets", "status"),
    [
        pytest.param(head(LONG_LINE, "Host: a.test"), 414, id="M 3 line"),
        pytest.param(LONG_LINE.encode(), 414, id="M 3 line without an end"),
        pytest.param(head("GET / HTTP/1.1", "Host: a.test", "A: " + "a" * 1024), 431, id="S 5.4 head"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: a.test\r\nA: " + b"a" * 1024, 431, id="S 5.4 head without an end"),
        pytest.param(head("GET / HTTP/1.1", "Host: a.test", *["A: 1"] * 10), 431, id="S 5.4 fields"),
    ],
)
def test_what_is_too_long_is_refused(tmp_path: Path, octets: bytes, status: int) -> None:
    limits = {"request_line_bytes": 256, "head_bytes": 1024, "fields": 10}
    with fronting(tmp_path, OK, limits=limits) as (balancer, fake):
        for way in WAYS:
            assert refused(balancer, way(octets)).status == status
        assert fake.requests == []


@both_ways
def test_a_request_line_of_8000_octets_is_served(stand: Stand, way: Way) -> None:
    """M 3"""
    line = "GET /" + "a" * (8000 - 14) + " HTTP/1.1"
    assert len(line) == 8000
    assert answered(stand.balancer, way(head(line, "Host: a.test"))).status == 204
    assert stand.taken() == [stand.sent(line, "Host: a.test")]


@both_ways
def test_half_a_head_and_then_silence_is_a_408(tmp_path: Path, way: Way) -> None:
    """M 9.6, S 15.5.9"""
    with fronting(tmp_path, OK, timeouts={"request_head": 0.1}) as (balancer, fake):
        assert refused(balancer, way(GET[:-1])).status == 408
        assert fake.requests == []


def test_silence_from_the_start_is_closed_without_a_word(tmp_path: Path) -> None:
    """S 15.5.9: nobody asked, so nobody is answered. Browsers open connections ahead of need."""
    with (
        fronting(tmp_path, OK, timeouts={"client_idle": 0.1}) as (balancer, _),
        client(balancer) as (_, file),
    ):
        assert file.read() == b""
    assert not [line for line in log_lines(tmp_path) if " code=" in line]


@both_ways
def test_the_head_of_an_expectation_goes_on_at_once_and_the_backends_100_comes_back(tmp_path: Path, way: Way) -> None:
    """S 10.1.1"""
    heads: list[bytes] = []

    def expectant(connection: Connection) -> None:
        heads.append(read_lines(connection.file))
        connection.send(head("HTTP/1.1 100 Continue"))
        assert connection.file.read(5) == b"hello"
        connection.send(OK)

    octets = head("POST / HTTP/1.1", "Host: a.test", "Content-Length: 5", "Expect: 100-continue")
    with fronting(tmp_path, expectant) as (balancer, _), client(balancer) as (sock, file):
        send(sock, way(octets))
        assert read_lines(file) == head("HTTP/1.1 100 Continue")
        send(sock, way(b"hello"))
        assert read_response(file).body == b"ok"
        lines = ["POST / HTTP/1.1", "Host: a.test", "Content-Length: 5", "Expect: 100-continue"]
        assert heads == [forwarded(lines, minor=1, client="127.0.0.1", port=balancer.port)]


@both_ways
def test_a_final_answer_to_an_expectation_comes_back_and_the_connection_ends(tmp_path: Path, way: Way) -> None:
    """S 10.1.1: whether the body follows or the next request cannot be known."""
    heads: list[bytes] = []

    def unwilling(connection: Connection) -> None:
        heads.append(read_lines(connection.file))
        connection.send(head("HTTP/1.1 403 Forbidden", "Content-Length: 0"))
        heads.append(connection.file.read())

    octets = head("POST / HTTP/1.1", "Host: a.test", "Content-Length: 5", "Expect: 100-continue")
    with fronting(tmp_path, unwilling) as (balancer, _), client(balancer) as (sock, file):
        send(sock, way(octets))
        answer = read_response(file)
        assert (answer.status, answer.headers["Connection"]) == (403, "close")
        sock.shutdown(socket.SHUT_WR)
        assert file.read() == b""
    assert heads[1:] == [b""]


@both_ways
def test_an_http_1_0_client_never_sees_an_interim_answer(tmp_path: Path, way: Way) -> None:
    """S 15.2, S 10.1.1"""
    script = head("HTTP/1.1 100 Continue") + head("HTTP/1.1 103 Early Hints", "Link: a") + OK
    octets = head("POST / HTTP/1.0", "Host: a.test", "Content-Length: 5", "Expect: 100-continue") + b"hello"
    with fronting(tmp_path, script) as (balancer, fake):
        answer = read_by_http_client(all_that_comes(balancer, way(octets)))
        assert (answer.start, answer.body, answer.rest) == (("200", "OK"), b"ok", b"")
        assert b"Expect" not in fake.requests[0]


def test_chunk_extensions_and_trailers_go_no_further(stand: Stand) -> None:
    """M 7.1.1, 7.1.2"""
    octets = head("POST / HTTP/1.1", "Host: a.test", "Trailer: X-A", "Transfer-Encoding: chunked")
    octets += b'5;a="b"\r\nhello\r\n0;c\r\nX-A: 1\r\nContent-Length: 3\r\n\r\n'
    wanted = stand.sent("POST / HTTP/1.1", "Host: a.test", "Transfer-Encoding: chunked")
    answered(stand.balancer, whole(octets))
    assert stand.taken() == [wanted + b"5\r\nhello\r\n0\r\n\r\n"]
    answered(stand.balancer, octet_by_octet(octets))
    (taken,) = stand.taken()
    assert taken.startswith(wanted)
    assert read_by_http_server(taken).body == b"hello"
    assert b"X-A" not in taken


@pytest.mark.parametrize("offered", [[], ["Content-Length: 5"]], ids=["", "with a body"])
@both_ways
def test_options_without_hops_left_are_ours_to_answer(stand: Stand, way: Way, offered: list[str]) -> None:
    """S 7.6.2"""
    octets = head("OPTIONS * HTTP/1.1", "Host: a.test", "Max-Forwards: 0", *offered) + (b"hello" if offered else b"")
    answer = refused(stand.balancer, way(octets))
    assert answer.status == 200
    assert "GET" in answer.headers["Allow"]
    assert stand.taken() == []


@both_ways
def test_a_trace_without_hops_left_is_not_echoed(stand: Stand, way: Way) -> None:
    """S 7.6.2, 9.3.8: what it holds may not be for its sender's scripts."""
    answer = refused(stand.balancer, way(head("TRACE / HTTP/1.1", "Host: a.test", "Max-Forwards: 0", "Cookie: secret")))
    assert answer.status == 405
    assert "TRACE" not in answer.headers["Allow"]
    assert b"secret" not in answer.body
    assert stand.taken() == []


# Writing to the backend -----------------------------------------------------------------------------------------------


@both_ways
def test_a_body_that_was_not_granted_its_upgrade_stays_http(stand: Stand, way: Way) -> None:
    """S 7.8: until a 101 has come, what follows is requests, not a tunnel's (CVE-2019-12420 and its kin)."""
    stand.backend.answer = [OK]
    upgrade = ["Host: a.test", "Connection: Upgrade", "Upgrade: websocket"]
    octets = head("GET /up HTTP/1.1", *upgrade) + head("GET /on HTTP/1.1", "Host: b.test", "X-Forwarded-For: 1")
    with client(stand.balancer) as (sock, file):
        send(sock, way(octets + b"\x81\x05hello\r\n\r\n"))
        assert [read_response(file).status for _ in range(3)] == [200, 200, 400]
        assert file.read() == b""
    stand.balancer.reactor.call_soon(drop_idle, stand.balancer)
    assert b"".join(stand.taken()) == stand.sent("GET /up HTTP/1.1", *upgrade) + stand.sent(
        "GET /on HTTP/1.1", "Host: b.test"
    )


def drop_idle(balancer: LoadBalancer) -> None:
    for backend in balancer.pool.backends:
        balancer.upstreams.drop_idle(backend)


@both_ways
def test_a_post_is_never_sent_twice(tmp_path: Path, way: Way) -> None:
    """S 9.2.2: the kept connection is closed as the request comes, and whether it was acted on nobody knows."""
    with fronting(tmp_path, [OK, b"", OK]) as (balancer, fake), client(balancer) as (sock, file):
        sock.sendall(GET)
        assert read_response(file).status == 200
        send(sock, way(head("POST / HTTP/1.1", "Host: a.test", "Content-Length: 5") + b"hello"))
        assert read_response(file).status == 502
        assert [request.split()[0] for request in fake.requests] == [b"GET", b"POST"]


@both_ways
def test_a_get_on_a_connection_that_closes_is_sent_again(tmp_path: Path, way: Way) -> None:
    """S 9.2.2"""
    with fronting(tmp_path, [OK, b"", OK]) as (balancer, fake), client(balancer) as (sock, file):
        for _ in range(2):
            send(sock, way(GET))
            assert read_response(file).status == 200
        assert [request.split()[0] for request in fake.requests] == [b"GET"] * 3


def test_a_connection_that_could_not_be_opened_was_no_sending(tmp_path: Path) -> None:
    """S 9.2.2: so a POST may go to the next backend."""
    (gone,) = free_ports(1)
    with FakeBackend(OK) as fake:
        servers = [("127.0.0.1", gone), (fake.host, fake.port)]
        with running(tmp_path, servers, health_check={"type": "tcp", "interval": 1000, "fall": 100}) as balancer:
            for _ in range(2):
                octets = head("POST / HTTP/1.1", "Host: a.test", "Content-Length: 5") + b"hello"
                assert answered(balancer, whole(octets)).status == 200
        assert len(fake.requests) == 2


@pytest.mark.parametrize(
    ("framing", "body", "sent"),
    [
        ([], b"", []),
        (["Content-Length: 0"], b"", ["0"]),
        (["content-length:002"], b"hi", ["2"]),
        (["Transfer-Encoding: chunked"], b"0\r\n\r\n", ["chunked"]),
    ],
)
@both_ways
def test_a_backend_is_given_one_framing(
    stand: Stand, framing: list[str], body: bytes, sent: list[str], way: Way
) -> None:
    """M 6.2: never a length beside chunks; M 6.3: neither is no body."""
    answered(stand.balancer, way(head("POST / HTTP/1.1", "Host: a.test", *framing) + body))
    (request,) = map(read_by_http_server, stand.taken())
    assert request.values("content-length") + request.values("transfer-encoding") == sent


# Reading the answer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hostile", HOSTILE_ANSWERS, ids=str)
def test_a_hostile_answer_is_a_502_and_ends_the_backends_connection(stand: Stand, hostile: Hostile) -> None:
    for way in WAYS:
        stand.backend.answer = way(hostile.octets)
        answer = answered(stand.balancer, whole(GET))
        assert answer.status == hostile.status
        assert b"hello" not in answer.body
        assert stand.taken() == [stand.sent("GET / HTTP/1.1", "Host: a.test")]


@pytest.mark.parametrize("hostile", HOSTILE_BODIES, ids=str)
def test_an_answer_in_chunks_that_are_none_never_looks_complete(stand: Stand, hostile: Hostile) -> None:
    """M 7.1, M 8"""
    chunks = hostile.octets.partition(b"\r\n\r\n")[2]
    for way in WAYS:
        stand.backend.answer = way(head("HTTP/1.1 200 OK", "Transfer-Encoding: chunked") + chunks)
        octets = all_that_comes(stand.balancer, whole(GET))
        if not octets.startswith(b"HTTP/1.1 502 "):
            with pytest.raises(NotRead):
                read_by_http_client(octets)
        assert len(stand.taken()) == 1


MANY_CHUNKS = b"8000\r\n" + b"x" * 0x8000 + b"\r\n"


@pytest.mark.parametrize("end", [b"3\r\nhello\r\n", b"+5\r\nhello\r\n", b"5\nhello\r\n", b"0\nA: 1\r\n\r\n"])
def test_a_long_body_of_chunks_that_then_are_none_is_cut_off_on_both_sides(tmp_path: Path, end: bytes) -> None:
    """M 7.1: a pump, which moves long bodies, keeps to the same rules."""
    taken: list[bytes] = []

    def taking(connection: Connection) -> None:
        taken.append(connection.file.read())

    with fronting(tmp_path, taking) as (balancer, _), client(balancer) as (sock, file):
        send(sock, [head("POST / HTTP/1.1", "Host: a.test", "Transfer-Encoding: chunked")])
        send(sock, [MANY_CHUNKS] * 20)
        send(sock, [end])
        assert read_response(file).status == 400
        assert file.read() == b""
        eventually(lambda: taken, "the backend's connection has ended")
    assert len(taken[0]) > 10 * len(MANY_CHUNKS)
    with pytest.raises(NotRead):
        read_by_http_server(taken[0])
    with fronting(tmp_path, head("HTTP/1.1 200 OK", "Transfer-Encoding: chunked") + MANY_CHUNKS * 20 + end) as (
        balancer,
        _,
    ):
        octets = all_that_comes(balancer, whole(GET))
    assert len(octets) > 10 * len(MANY_CHUNKS)
    with pytest.raises(NotRead):
        read_by_http_client(octets)


BODILESS = [
    pytest.param("HEAD", head("HTTP/1.1 200 OK", "Content-Length: 5"), "5", id="HEAD with a length"),
    pytest.param("HEAD", head("HTTP/1.1 200 OK", "Transfer-Encoding: chunked"), None, id="HEAD in chunks"),
    pytest.param("HEAD", head("HTTP/1.1 200 OK"), None, id="HEAD without either"),
    pytest.param("GET", head("HTTP/1.1 204 No Content", "Content-Length: 5"), None, id="204 with a length"),
    pytest.param("GET", head("HTTP/1.1 204 No Content", "Transfer-Encoding: chunked"), None, id="204 in chunks"),
    pytest.param("GET", head("HTTP/1.1 304 Not Modified", "Content-Length: 5"), "5", id="304 with a length"),
    pytest.param("GET", head("HTTP/1.1 304 Not Modified"), None, id="304 without one"),
]


@pytest.mark.parametrize(("method", "script", "length"), BODILESS)
@both_ways
def test_what_has_no_body_has_none_whatever_it_says(
    tmp_path: Path, method: str, script: bytes, length: str | None, way: Way
) -> None:
    """M 6.3: and both connections go on behind it."""

    def answering(connection: Connection) -> None:
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while connection.read_request():
            for piece in way(script):
                connection.send(piece)

    with fronting(tmp_path, answering) as (balancer, fake), client(balancer) as (sock, file):
        for _ in range(3):
            send(sock, way(head(f"{method} / HTTP/1.1", "Host: a.test")))
            answer = read_response(file, method)
            assert (answer.headers["Content-Length"], answer.headers["Transfer-Encoding"]) == (length, None)
            assert answer.body == b""
        assert fake.accepted == 2  # the probe's, and one for all three


UNTIL_CLOSE = head("HTTP/1.1 200 OK", "A: 1") + b"hello"
CHUNKS = head("HTTP/1.1 200 OK", "Transfer-Encoding: chunked", "A: 1") + b"2;x\r\nhe\r\n3\r\nllo\r\n0\r\nB: 2\r\n\r\n"


def saying(octets: bytes, way: Way) -> Callable[[Connection], None]:
    """A backend that reads one request, says this and closes."""

    def handler(connection: Connection) -> None:
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.read_request()
        for piece in way(octets):
            connection.send(piece)

    return handler


@pytest.mark.parametrize("script", [UNTIL_CLOSE, CHUNKS], ids=["until the close", "in chunks"])
@both_ways
def test_a_body_of_no_known_length_is_chunked_to_http_1_1(tmp_path: Path, script: bytes, way: Way) -> None:
    """M 6.3, rule 8: and the client's connection stays."""
    with fronting(tmp_path, saying(script, way)) as (balancer, _), client(balancer) as (sock, file):
        for _ in range(2):
            send(sock, way(GET))
            answer = read_response(file)
            assert (answer.status, answer.body) == (200, b"hello")
            assert answer.headers["Transfer-Encoding"] == "chunked"
            assert answer.headers["Content-Length"] is None
            assert answer.headers["Connection"] is None
            assert (answer.headers["A"], answer.headers["B"]) == ("1", None)


@pytest.mark.parametrize("script", [UNTIL_CLOSE, CHUNKS], ids=["until the close", "in chunks"])
@both_ways
def test_a_body_of_no_known_length_goes_until_the_close_to_http_1_0(tmp_path: Path, script: bytes, way: Way) -> None:
    """M 6.1: HTTP/1.0 knows no chunks, and asking to be kept alive does not change that."""
    octets = head("GET / HTTP/1.0", "Host: a.test", "Connection: keep-alive")
    with fronting(tmp_path, saying(script, way)) as (balancer, _), client(balancer) as (sock, file):
        send(sock, way(octets))
        answer, body = read_lines(file), file.read()
    assert body == b"hello"
    fields = answer.lower().split(b"\r\n")
    assert b"connection: close" in fields
    assert not [field for field in fields if field.startswith((b"transfer-encoding", b"content-length"))]


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(head("HTTP/1.1 200 OK", "Content-Length: 9") + b"hello", id="a length"),
        pytest.param(head("HTTP/1.1 200 OK", "Transfer-Encoding: chunked") + b"5\r\nhello\r\n", id="chunks"),
        pytest.param(head("HTTP/1.1 200 OK", "Transfer-Encoding: chunked") + b"5\r\nhello\r\n0\r\n", id="chunks' end"),
    ],
)
@pytest.mark.parametrize("version", ["1.1", "1.0"])
@both_ways
def test_an_answer_that_the_backend_cuts_never_looks_complete(
    tmp_path: Path, script: bytes, version: str, way: Way
) -> None:
    """M 8"""
    with fronting(tmp_path, saying(script, way)) as (balancer, _), connect(balancer) as sock:
        send(sock, way(head(f"GET / HTTP/{version}", "Host: a.test")))
        octets, was_reset = b"", False
        try:
            while piece := sock.recv(65536):
                octets += piece
        except ConnectionResetError:
            was_reset = True
    if version == "1.0" and b"Content-Length" not in octets:
        assert was_reset  # its body ends with the connection, so only a reset tells that this is not the end
    elif octets:
        with pytest.raises(NotRead):
            read_by_http_client(octets)


@pytest.mark.parametrize("behind", [b"x", OK, b"\r\n"], ids=["an octet", "another answer", "an empty line"])
@both_ways
def test_octets_behind_an_answer_go_nowhere(tmp_path: Path, behind: bytes, way: Way) -> None:
    """M 6.3, 9.2: a second answer there would be taken for the next client's."""
    said = threading.Event()

    def talkative(connection: Connection) -> None:
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        request = connection.read_request()
        number = request.split()[1].strip(b"/")
        answer = head("HTTP/1.1 200 OK", "Content-Length: 1") + number
        send(connection.sock, way(answer + behind) if way is whole else [answer, *way(behind)])
        said.set()
        connection.read_request()

    with fronting(tmp_path, talkative) as (balancer, fake), client(balancer) as (sock, file):
        for number in (b"1", b"2", b"3"):
            said.clear()
            send(sock, way(head(f"GET /{number.decode()} HTTP/1.1", "Host: a.test")))
            assert read_response(file).body == number
            assert said.wait(PATIENCE)
            eventually(lambda: balancer.upstreams.idle == 0, "the connection was dropped")
        assert [request.split()[1] for request in fake.requests] == [b"/1", b"/2", b"/3"]


@pytest.mark.parametrize(
    ("method", "answer"),
    [
        ("HEAD", head("HTTP/1.1 200 OK", "Content-Length: 5")),
        ("GET", head("HTTP/1.1 204 No Content")),
        ("GET", head("HTTP/1.1 304 Not Modified", "Content-Length: 5")),
    ],
    ids=["HEAD", "204", "304"],
)
@both_ways
def test_a_body_where_there_is_none_goes_nowhere(tmp_path: Path, method: str, answer: bytes, way: Way) -> None:
    """M 6.3"""
    with fronting(tmp_path, saying(answer + b"hello", way)) as (balancer, fake), client(balancer) as (sock, file):
        for _ in range(3):
            send(sock, way(head(f"{method} / HTTP/1.1", "Host: a.test")))
            assert read_lines(file).startswith(answer.partition(b"\r\n")[0])
            eventually(lambda: balancer.upstreams.idle == 0, "the connection was dropped")
        assert len(fake.requests) == 3


def test_an_answer_to_nothing_ends_the_idle_connection(tmp_path: Path) -> None:
    """M 9.2"""
    go = threading.Event()

    def talkative(connection: Connection) -> None:
        connection.read_request()
        connection.send(OK)
        assert go.wait(PATIENCE)
        connection.send(head("HTTP/1.1 200 OK", "Content-Length: 4") + b"evil")
        connection.read_request()

    with fronting(tmp_path, talkative) as (balancer, _), client(balancer) as (sock, file):
        sock.sendall(GET)
        assert read_response(file).body == b"ok"
        eventually(lambda: balancer.upstreams.idle == 1, "the connection is kept")
        go.set()
        eventually(lambda: balancer.upstreams.idle == 0, "the connection was dropped")
        sock.sendall(GET)
        assert read_response(file).body == b"ok"


@pytest.mark.parametrize("first", ["request", "answer"])
def test_an_answer_to_nothing_is_never_taken_for_the_next_clients(tmp_path: Path, first: str) -> None:
    """M 9.2: nor when it comes while the next request does, in one batch of the reactor."""
    go, said = threading.Event(), threading.Event()

    def talkative(connection: Connection) -> None:
        connection.read_request()
        connection.send(OK)
        assert go.wait(PATIENCE)
        connection.send(head("HTTP/1.1 200 OK", "Content-Length: 4") + b"evil")
        said.set()
        while connection.read_request():
            connection.send(OK)

    with fronting(tmp_path, talkative) as (balancer, _), client(balancer) as (sock, file):
        sock.sendall(GET)
        assert read_response(file).body == b"ok"
        eventually(lambda: balancer.upstreams.idle == 1, "the connection is kept")
        with held_up(balancer):
            if first == "request":
                sock.sendall(GET)
            go.set()
            assert said.wait(PATIENCE)
            if first == "answer":
                sock.sendall(GET)
        assert read_response(file).body == b"ok"


@both_ways
def test_any_number_of_interim_answers_comes_first(tmp_path: Path, way: Way) -> None:
    """S 15.2"""
    hints = [
        head("HTTP/1.1 100 Continue"),
        head("HTTP/1.1 103 Early Hints", "Link: a"),
        head("HTTP/1.1 102 Processing"),
    ]
    script = saying(b"".join(hints) * 3 + OK, way)
    with fronting(tmp_path, script) as (balancer, _), client(balancer) as (sock, file):
        send(sock, way(GET))
        assert [read_lines(file) for _ in range(9)] == hints * 3
        assert read_response(file).body == b"ok"


@both_ways
def test_an_answer_is_given_a_date_if_it_has_none(tmp_path: Path, way: Way) -> None:
    """S 6.6.1"""
    date = "Sun, 09 Sep 2001 01:46:40 GMT"
    dated = head("HTTP/1.1 200 OK", f"Date: {date}", "Content-Length: 0")
    with fronting(tmp_path, [dated, OK, dated]) as (balancer, _), client(balancer) as (sock, file):
        dates = []
        for _ in range(3):
            send(sock, way(GET))
            dates.append(read_response(file).headers.get_all("Date"))
    assert dates[0] == dates[2] == [date]
    assert len(dates[1]) == 1
    assert dates[1] != [date]


@both_ways
def test_hop_by_hop_fields_of_an_answer_go_no_further(stand: Stand, way: Way) -> None:
    """S 7.6.1"""
    hops = ["Connection: X-A, close", "Keep-Alive: timeout=5", "Proxy-Connection: close", "TE: x", "Trailer: x"]
    stand.backend.answer = way(
        head("HTTP/1.1 200 OK", "B: 1", *hops, "Upgrade: h2", "X-A: 1", "B: 2", "Date: x", "Content-Length: 0")
    )
    octets = all_that_comes(stand.balancer, way(GET))
    assert octets == head("HTTP/1.1 200 OK", "B: 1", "B: 2", "Date: x", "Content-Length: 0")
    stand.taken()


@both_ways
def test_an_answer_that_comes_before_the_end_of_the_request_is_passed_on_at_once(tmp_path: Path, way: Way) -> None:
    """S 7.5, M 9.5: and the body goes on until the backend closes."""
    bodies: list[bytes] = []

    def hasty(connection: Connection) -> None:
        read_lines(connection.file)
        bodies.append(connection.file.read(2))
        connection.send(head("HTTP/1.1 200 OK", "Content-Length: 2") + b"ok")
        bodies.append(connection.file.read(3))

    octets = head("POST / HTTP/1.1", "Host: a.test", "Content-Length: 5")
    with fronting(tmp_path, hasty) as (balancer, _), client(balancer) as (sock, file):
        send(sock, way(octets + b"he"))
        answer = read_response(file)
        assert (answer.body, answer.headers["Connection"]) == (b"ok", "close")
        send(sock, way(b"llo"))
        assert file.read() == b""
    assert bodies == [b"he", b"llo"]


@both_ways
def test_a_granted_upgrade_is_a_tunnel_from_there_on(tmp_path: Path, way: Way) -> None:
    """S 7.8, 9.3.6: octets that came with either head belong to it, and each side may end by itself."""
    granted = head("HTTP/1.1 101 Switching Protocols", "Connection: Upgrade", "Upgrade: echo")

    def echo(connection: Connection) -> None:
        read_lines(connection.file)
        connection.send(granted + b"welcome")
        connection.send(connection.file.read().upper())

    octets = head("GET / HTTP/1.1", "Host: a.test", "Connection: Upgrade", "Upgrade: echo")
    with fronting(tmp_path, echo) as (balancer, _), client(balancer) as (sock, file):
        send(sock, way(octets + b"GET / hello"))
        assert read_lines(file) == granted
        assert file.read(7) == b"welcome"
        send(sock, way(b"\r\n\r\nmore"))
        sock.shutdown(socket.SHUT_WR)
        assert file.read() == b"GET / HELLO\r\n\r\nMORE"


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@both_ways
def test_a_switch_that_nobody_asked_for_is_a_502(stand: Stand, version: str, way: Way) -> None:
    """S 15.2.2: in HTTP/1.0 an Upgrade is not even asked for."""
    stand.backend.answer = way(
        head("HTTP/1.1 101 Switching Protocols", "Connection: Upgrade", "Upgrade: x") + b"octets"
    )
    upgrade = ["Connection: Upgrade", "Upgrade: x"] if version == "1.0" else []
    answer = answered(stand.balancer, way(head(f"GET / HTTP/{version}", "Host: a.test", *upgrade)))
    assert answer.status == 502
    assert b"octets" not in answer.body
    stand.taken()


# Keeping connections --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "fields", "stays"),
    [
        ("1.1", [], True),
        ("1.1", ["Connection: close"], False),
        ("1.1", ["Connection: a", "Connection: CLOSE, b"], False),
        ("1.0", [], False),
        ("1.0", ["Connection: keep-alive"], True),
        ("1.0", ["Connection: keep-alive, close"], False),
    ],
)
@both_ways
def test_whether_a_connection_stays(stand: Stand, version: str, fields: list[str], stays: bool, way: Way) -> None:
    """M 9.3"""
    stand.backend.answer = [head("HTTP/1.1 200 OK", "Content-Length: 0", "Connection: close")]
    octets = head(f"GET / HTTP/{version}", "Host: a.test", *fields)
    with client(stand.balancer) as (sock, file):
        send(sock, way(octets))
        first = read_response(file)
        if stays:
            send(sock, way(octets))
            assert first.headers["Connection"] == ("keep-alive" if version == "1.0" else None)
            assert read_response(file).status == 200
        else:
            assert first.headers["Connection"] == "close"
            assert file.read() == b""
    wanted = stand.sent("GET / HTTP/1.1", "Host: a.test", minor=int(version[-1]))
    assert stand.taken() == [wanted] * (2 if stays else 1)


@both_ways
def test_nothing_behind_a_close_is_read(stand: Stand, way: Way) -> None:
    """M 9.6: a request that was said to be the last is the last."""
    octets = head("GET /1 HTTP/1.1", "Host: a.test", "Connection: close") + head("GET /2 HTTP/1.1", "Host: a.test")
    refused(stand.balancer, way(octets))
    assert stand.taken() == [stand.sent("GET /1 HTTP/1.1", "Host: a.test")]


@both_ways
def test_nothing_behind_a_refusal_is_read(stand: Stand, way: Way) -> None:
    """M 9.6: where a refused message ends nobody knows."""
    refused(stand.balancer, way(head("GET /1 HTTP/1.1") + GET))
    assert stand.taken() == []


@both_ways
def test_pipelined_requests_are_answered_in_order(tmp_path: Path, way: Way) -> None:
    """M 9.3.2: of any kind, the one behind a body too."""

    def naming(connection: Connection) -> None:
        while request := connection.read_request():
            connection.send(head("HTTP/1.1 200 OK", "Content-Length: 1") + request.split()[1].strip(b"/"))

    octets = (
        head("GET /1 HTTP/1.1", "Host: a.test")
        + head("POST /2 HTTP/1.1", "Host: a.test", "Content-Length: 5")
        + b"GET /"
        + head("POST /3 HTTP/1.1", "Host: a.test", "Transfer-Encoding: chunked")
        + b"5\r\nGET /\r\n0\r\n\r\n"
        + b"\r\n"
        + head("GET /4 HTTP/1.1", "Host: a.test")
    )
    with fronting(tmp_path, naming) as (balancer, fake), client(balancer) as (sock, file):
        send(sock, way(octets))
        assert [read_response(file).body for _ in range(4)] == [b"1", b"2", b"3", b"4"]
        read = [read_by_http_server(request) for request in fake.requests]
        assert [request.start[1] for request in read] == ["/1", "/2", "/3", "/4"]
        assert [request.body for request in read] == [b"", b"GET /", b"GET /", b""]


def test_idle_connections_are_watched_for_a_close_on_both_sides(tmp_path: Path) -> None:
    """M 9.5"""
    go = threading.Event()

    def closing(connection: Connection) -> None:
        connection.read_request()
        connection.send(OK)
        assert go.wait(PATIENCE)

    with fronting(tmp_path, closing) as (balancer, _):
        with client(balancer) as (sock, file):
            sock.sendall(GET)
            assert read_response(file).status == 200
            eventually(lambda: balancer.upstreams.idle == 1, "the connection is kept")
            go.set()
            eventually(lambda: balancer.upstreams.idle == 0, "the backend's close was seen")
            assert len(balancer.listener.sessions) == 1
        eventually(lambda: not balancer.listener.sessions, "the client's close was seen")


def test_an_answer_is_not_lost_to_the_reset_of_what_was_not_read(stand: Stand) -> None:
    """M 9.6: a close with octets unread is a reset, which takes the answer with it; so it is staged."""
    octets = head("POST / HTTP/1.1", "Content-Length: 1000000") + b"x" * 1_000_000
    with client(stand.balancer) as (sock, file):
        sender = threading.Thread(target=send, args=(sock, [octets]), name="sender")
        sender.start()
        answer = read_response(file)
        assert file.read() == b""
        sender.join(PATIENCE)
    assert answer.status == 400
    assert stand.taken() == []


@both_ways
def test_a_half_close_is_no_cancelled_request(stand: Stand, way: Way) -> None:
    """M 9.6"""
    answer = read_by_http_client(all_that_comes(stand.balancer, way(GET + GET)))
    assert answer.start[0] == "204"
    assert read_by_http_client(answer.rest).start[0] == "204"
    assert stand.taken() == [stand.sent("GET / HTTP/1.1", "Host: a.test")] * 2


@pytest.mark.parametrize("first", ["half-close", "answer"])
def test_a_half_close_cancels_no_pipelined_request(tmp_path: Path, first: str) -> None:
    """M 9.3.2, 9.6: nor when it comes with the answer to the one before, in one batch of the reactor."""
    asked, go, said = threading.Event(), threading.Event(), threading.Event()

    def gated(connection: Connection) -> None:
        while connection.read_request():
            asked.set()
            assert go.wait(PATIENCE)
            connection.send(OK)
            said.set()

    with fronting(tmp_path, gated) as (balancer, _), client(balancer) as (sock, file):
        sock.sendall(GET + GET)
        assert asked.wait(PATIENCE)
        with held_up(balancer):
            if first == "half-close":
                sock.shutdown(socket.SHUT_WR)
            go.set()
            assert said.wait(PATIENCE)
            if first == "answer":
                sock.shutdown(socket.SHUT_WR)
        assert [read_response(file).status for _ in range(2)] == [200, 200]
        assert file.read() == b""


@both_ways
def test_an_end_within_the_head_is_no_request(stand: Stand, way: Way) -> None:
    """M 8: what was cut is not acted on."""
    for end in (1, 20, len(GET) - 1):
        assert read_by_http_client(all_that_comes(stand.balancer, way(GET[:end]))).start[0] == "400"
    assert stand.taken() == []


@pytest.mark.parametrize("framing", ["Content-Length: 9", "Transfer-Encoding: chunked"])
@both_ways
def test_an_end_within_the_body_never_becomes_a_request(stand: Stand, framing: str, way: Way) -> None:
    """M 8"""
    octets = head("POST / HTTP/1.1", "Host: a.test", framing) + b"5\r\nhell"
    assert read_by_http_client(all_that_comes(stand.balancer, way(octets))).start[0] == "400"
    for taken in stand.taken():
        with pytest.raises(NotRead):
            read_by_http_server(taken)


@pytest.mark.parametrize(
    "octets",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"\r\n", id="an empty line"),
    ],
)
def test_a_client_that_asks_for_nothing_and_goes_is_told_nothing(tmp_path: Path, octets: bytes) -> None:
    """M 2.2: an old client sends an empty line behind its last body; it is no request, begun or otherwise."""
    with fronting(tmp_path, OK) as (balancer, _):
        body = head("POST / HTTP/1.1", "Host: a.test", "Content-Length: 2") + b"hi"
        answer = read_by_http_client(all_that_comes(balancer, [body, octets]))
        assert (answer.start[0], answer.rest) == ("200", b"")
    assert [line for line in log_lines(tmp_path) if " code=" in line and " code=-- " not in line] == []


# Our own answers ------------------------------------------------------------------------------------------------------


def silent(connection: Connection) -> None:
    read_message(connection.file)
    connection.file.read()


OURS = [
    pytest.param(head("GET / HTTP/1.1"), OK, 400, id="400"),
    pytest.param(head("CONNECT a.test:1 HTTP/1.1", "Host: a.test"), OK, 405, id="405"),
    pytest.param(b"GET", OK, 408, id="408"),
    pytest.param(head("GET /" + "a" * 300 + " HTTP/1.1", "Host: a.test"), OK, 414, id="414"),
    pytest.param(head("GET / HTTP/1.1", "Host: a.test", "Expect: x"), OK, 417, id="417"),
    pytest.param(head("GET / HTTP/1.1", "Host: a.test", *["A: 1"] * 10), OK, 431, id="431"),
    pytest.param(head("GET / HTTP/1.1", "Host: a.test", "Transfer-Encoding: a, chunked"), OK, 501, id="501"),
    pytest.param(GET, b"", 502, id="502"),
    pytest.param(GET, silent, 504, id="504"),
    pytest.param(head("GET / HTTP/2.0", "Host: a.test"), OK, 505, id="505"),
]


@pytest.mark.parametrize(("octets", "script", "status"), OURS)
def test_our_own_answers_say_why_and_are_in_the_log(tmp_path: Path, octets: bytes, script: Any, status: int) -> None:
    limits = {"request_line_bytes": 256, "fields": 10}
    timeouts = {408: {"request_head": 0.1}, 504: {"server": 0.1}}.get(status, {})
    with (
        fronting(tmp_path, script, limits=limits, timeouts=timeouts) as (balancer, _),
        client(balancer) as (sock, file),
    ):
        sock.sendall(octets)
        answer = read_response(file)
    assert_ours(answer, status, tmp_path)


def test_a_503_says_when_to_come_again(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    with running(tmp_path, [("127.0.0.1", port)], **QUIET) as balancer:
        answer = answered(balancer, whole(GET))
    assert_ours(answer, 503, tmp_path)
    assert int(answer.headers["Retry-After"]) > 0


@both_ways
def test_our_own_answer_to_head_has_no_body(stand: Stand, way: Way) -> None:
    """S 9.3.2: and what follows on the connection is read as the next answer."""
    stand.backend.answer = [b"junk\r\n\r\n"]
    with client(stand.balancer) as (sock, file):
        for _ in range(2):
            send(sock, way(head("HEAD / HTTP/1.1", "Host: a.test")))
            answer = read_response(file, "HEAD")
            assert (answer.status, answer.body) == (502, b"")
            assert int(answer.headers["Content-Length"]) > 0
    assert len(stand.taken()) == 2


def assert_ours(answer: Answer, status: int, tmp_path: Path) -> None:
    assert answer.status == status
    assert answer.headers["Date"]
    assert answer.headers["Content-Length"] == str(len(answer.body))
    identity = answer.headers["X-Request-Id"]
    text = answer.body.decode()
    assert text.startswith(f"{status} {http.client.responses[status]}: ")
    assert identity in text
    (line,) = [line for line in log_lines(tmp_path) if identity in line]
    assert f" {status} " in line
