"""HTTP mode end to end, as ordinary clients and ordinary backends need it: real sockets on both sides."""

from __future__ import annotations

import base64
import hashlib
import http.client
import itertools
import json
import re
import resource
import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from backend_server import (
    BINARY,
    CLOSE,
    PING,
    PONG,
    TEXT,
    Backend,
    frame,
    make_server,
    mask,
    pattern,
    serving,
    websocket_accept,
)
from balancer import http_session
from balancer.balancer import LoadBalancer
from balancer.reactor import NEVER, READ
from balancing import connect, log_lines, running
from conftest import PATIENCE, eventually
from fakes import Answer, Connection, FakeBackend, Handler, hang_up, read_lines, read_response
from programs import LB, resident_kb, started

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
GET = b"GET / HTTP/1.1\r\nHost: lb.test\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n"
QUIET = {"health_check": {"type": "tcp", "interval": 1000}}  # one probe at the start, and it asks for nothing
BULK = 300_000_000
BLOCK = 262144
Script = Handler | Sequence[bytes] | bytes  # what FakeBackend takes


@pytest.fixture
def three() -> Iterator[list[Backend]]:
    """Three backends that call themselves 1, 2 and 3."""
    with ExitStack() as stack:
        yield [stack.enter_context(serving(make_server(name=name))) for name in "123"]


def at(*backends: Backend | FakeBackend) -> list[tuple[str, int]]:
    return [("127.0.0.1", backend.port) for backend in backends]


@contextmanager
def client(balancer: LoadBalancer) -> Iterator[http.client.HTTPConnection]:
    with closing(http.client.HTTPConnection(balancer.host, balancer.port, timeout=PATIENCE)) as connection:
        yield connection


def ask(
    connection: http.client.HTTPConnection,
    path: str = "/",
    method: str = "GET",
    body: bytes | Iterator[bytes] | None = None,
    fields: Mapping[str, str] | None = None,
) -> Answer:
    connection.request(method, path, body, fields or {})
    with connection.getresponse() as found:
        return Answer(found.status, found.reason, found.version, found.headers, found.read())


def ask_once(balancer: LoadBalancer, octets: bytes = GET) -> Answer:
    """The answer to a request on a connection of its own."""
    with connect(balancer) as sock:
        sock.sendall(octets)
        return read_response(sock)


@contextmanager
def fronting(tmp_path: Path, script: Script, **keys: Any) -> Iterator[tuple[LoadBalancer, FakeBackend]]:
    """A balancer before one FakeBackend, probed once and never again. All work is over at the end."""
    with FakeBackend(script) as fake, running(tmp_path, at(fake), **QUIET, **keys) as balancer:
        settled(balancer)
        yield balancer, fake
        leases_come_back(balancer)


@contextmanager
def fronting_one_at_a_time(tmp_path: Path, script: Script, **keys: Any) -> Iterator[tuple[LoadBalancer, FakeBackend]]:
    """The same, and the backend takes one request at a time."""
    with FakeBackend(script) as fake:
        server = {"host": fake.host, "port": fake.port, "max_connections": 1}
        with running(tmp_path, [server], **QUIET, **keys) as balancer:
            settled(balancer)
            yield balancer, fake
            leases_come_back(balancer)


def settled(balancer: LoadBalancer) -> None:
    """Wait until every backend was probed once: with QUIET nothing but requests changes a state after that."""
    eventually(lambda: all(backend.probed for backend in balancer.pool.backends), "the first probes")


def leases_come_back(balancer: LoadBalancer) -> None:
    eventually(lambda: not any(backend.active for backend in balancer.pool.backends), "every lease given back")


def reset(sock: socket.socket) -> None:
    """Close with a reset, as a client does that was killed with data unread."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def exchanges(tmp_path: Path) -> list[str]:
    """The log's lines about requests, each from the request line on and without its time; after the balancer's end."""
    return [
        re.sub(r" [\d.]+ms | id=\S+", " ", line[line.index('"') :]).rstrip()
        for line in log_lines(tmp_path)
        if " code=" in line
    ]


class Gate:
    """A handler for FakeBackend that answers each request when it is told to, and tells how many came."""

    def __init__(self, answer: bytes = OK) -> None:
        self.open = threading.Event()
        self.answer = answer
        self.arrived = threading.Semaphore(0)
        self._lock = threading.Lock()  # guards the two counts
        self._inside = 0
        self.most = 0  # requests in hand at once

    def __call__(self, connection: Connection) -> None:
        while connection.read_request():
            with self._lock:
                self._inside += 1
                self.most = max(self.most, self._inside)
            self.arrived.release()
            assert self.open.wait(PATIENCE)
            with self._lock:
                self._inside -= 1
            connection.send(self.answer)

    def wait_for_request(self) -> None:
        assert self.arrived.acquire(timeout=PATIENCE)


# Who answers ------------------------------------------------------------------------------------------------------


def test_each_request_of_a_kept_connection_is_balanced_by_itself(tmp_path, three):
    with running(tmp_path, at(*three)) as balancer, client(balancer) as connection:
        sock = None
        who = []
        for _ in range(6):
            who.append(ask(connection).headers["X-Backend"])
            sock = sock or connection.sock
            assert connection.sock is sock
        assert who == ["1", "2", "3", "1", "2", "3"]


def test_connections_to_a_backend_are_kept_and_used_again(tmp_path):
    with fronting(tmp_path, OK) as (balancer, fake):
        settled(balancer)
        for _ in range(5):
            with client(balancer) as connection:
                assert [ask(connection).body for _ in range(2)] == [b"ok", b"ok"]
        assert fake.accepted == 2  # the probe's, and one for all ten requests


def test_a_backend_that_closes_kept_connections_costs_no_request(tmp_path):
    """It answers one request on each connection and closes without having said so, as many do after a while.

    A GET is sent again (RFC 9110 section 9.2.2). A POST may not be, so it must not go out on such a connection at all;
    where the close comes while it is on its way nobody can help, hence the wait.
    """
    closed = threading.Semaphore(0)

    def one_only(connection: Connection) -> None:
        if connection.read_request():
            connection.send(OK)
            hang_up(connection.sock)
            closed.release()

    with fronting(tmp_path, one_only) as (balancer, fake), client(balancer) as connection:
        for method in ["GET", "POST", "GET", "PUT", "POST"] * 4:
            assert ask(connection, method=method, body=b"x" if method != "GET" else None).status == 200
            assert closed.acquire(timeout=PATIENCE)
        for _ in range(20):
            assert ask(connection).status == 200
    assert len(fake.requests) == 40


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_backends_are_reached_by_ipv6_and_by_name(tmp_path):
    try:
        six = make_server("::1", name="six")
    except OSError:
        pytest.skip("no IPv6 loopback here")
    with serving(six), serving(make_server(name="name")) as named:
        backends = [("::1", six.port), ("localhost", named.port)]
        with running(tmp_path, backends) as balancer, client(balancer) as connection:
            assert sorted(ask(connection).headers["X-Backend"] for _ in range(2)) == ["name", "six"]


# Bodies -----------------------------------------------------------------------------------------------------------


SIZES = [0, 1, 65535, 65536, 65537, 1_000_000]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_a_body_of_either_framing_goes_there_and_back_unchanged(tmp_path, three, size, chunked):
    """/echo answers in the request's framing. A second request on the same connection shows that nothing was left."""
    content = b"".join(pattern(size))
    fields = {"Transfer-Encoding": "chunked"} if chunked else {"Content-Length": str(size)}

    def blocks() -> Iterator[bytes]:
        return (content[start : start + 50_000] for start in range(0, size, 50_000))

    with running(tmp_path, at(*three)) as balancer, client(balancer) as connection:
        for _ in range(2):
            connection.request("POST", "/echo", blocks(), fields, encode_chunked=chunked)
            with connection.getresponse() as answer:
                assert (answer.status, answer.headers["Transfer-Encoding"]) == (200, "chunked" if chunked else None)
                assert answer.read() == content


def test_an_http_1_0_client_is_sent_a_chunked_answer_as_it_is_until_the_close(tmp_path, three):
    """RFC 9112 section 6.1: no chunks to HTTP/1.0."""
    with running(tmp_path, at(*three)) as balancer, connect(balancer) as sock, sock.makefile("rb") as file:
        sock.sendall(b"GET /bytes/100000?chunked HTTP/1.0\r\n\r\n")
        head = read_lines(file).lower()
        assert b"transfer-encoding" not in head
        assert file.read() == b"".join(pattern(100000))


@pytest.mark.parametrize("size", [10, 100_000])
def test_an_answer_that_ends_with_the_connection_is_chunked_to_the_client(tmp_path, size):
    """RFC 9112 section 6.3: to HTTP/1.1 its end must be told from a cut, and the client's connection stays."""

    def until_close(connection: Connection) -> None:
        if connection.read_request():
            connection.send(b"HTTP/1.1 200 OK\r\n\r\n" + bytes(size))

    with fronting(tmp_path, until_close) as (balancer, _), client(balancer) as connection:
        for _ in range(2):
            answer = ask(connection)
            assert (answer.headers["Transfer-Encoding"], answer.body) == ("chunked", bytes(size))


@pytest.mark.parametrize("size", [1000, 1_000_000])
@pytest.mark.parametrize("framing", ["Content-Length: 2000000", "Transfer-Encoding: chunked"])
def test_an_answer_that_the_backend_cuts_never_looks_complete(tmp_path, framing, size):
    """RFC 9112 section 8."""
    start = b"%x\r\n" % 2_000_000 if "chunked" in framing else b""

    def cut(connection: Connection) -> None:
        if connection.read_request():
            connection.send(f"HTTP/1.1 200 OK\r\n{framing}\r\n\r\n".encode() + start + bytes(size))

    with (
        fronting(tmp_path, cut) as (balancer, _),
        client(balancer) as connection,
        pytest.raises(http.client.IncompleteRead),
    ):
        ask(connection)
    assert exchanges(tmp_path) == [f'"GET / HTTP/1.1" 200 {size} backend=1 code=SD tries=1']


@pytest.mark.parametrize("size", [10, 1_000_000])
def test_to_an_http_1_0_client_a_cut_is_a_reset(tmp_path, size):
    """An orderly close is how a whole answer ends there, so a cut must look otherwise (RFC 9112 section 8)."""

    def cut(connection: Connection) -> None:
        if connection.read_request():
            head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
            connection.send(head + b"%x\r\n%b\r\n" % (size, bytes(size)))

    with fronting(tmp_path, cut) as (balancer, _), connect(balancer) as sock:
        sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        with pytest.raises(ConnectionResetError):
            deque(iter(lambda: sock.recv(BLOCK), b""), maxlen=0)


def test_head_204_and_304_have_no_body_and_the_connection_goes_on(tmp_path, three):
    """RFC 9112 section 6.3: whatever their fields say."""
    with running(tmp_path, at(*three)) as balancer, client(balancer) as connection:
        sock = None
        for method, path, length in [
            ("HEAD", "/bytes/1000", "1000"),
            ("HEAD", "/bytes/1000?chunked", None),
            ("GET", "/status/204", None),
            ("GET", "/status/304", None),
            ("POST", "/status/205", "0"),
        ]:
            answer = ask(connection, path, method)
            assert (answer.headers["Content-Length"], answer.body) == (length, b""), path
            sock = sock or connection.sock
        assert ask(connection, "/bytes/3").body == b"\x00\x01\x02"
        assert connection.sock is sock


def test_a_length_on_a_204_or_304_is_not_waited_for(tmp_path):
    """nginx and others do send Content-Length on a 304; it tells what a GET would have had."""
    answers = [b"HTTP/1.1 304 Not Modified\r\nContent-Length: 99\r\n\r\n", b"HTTP/1.1 204 No Content\r\n\r\n", OK]
    with fronting(tmp_path, answers) as (balancer, _), client(balancer) as connection:
        assert [ask(connection).status for _ in range(3)] == [304, 204, 200]


@pytest.mark.program
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_300_mb_each_way_are_identical_and_held_nowhere(tmp_path, chunked):
    """The balancer is a process of its own here, so that its memory can be told from the test's."""
    with (
        serving(make_server()) as backend,
        started(LB, f"127.0.0.1:{backend.port}", "--port", 0, directory=tmp_path) as lb,
        closing(http.client.HTTPConnection("127.0.0.1", lb.port, timeout=PATIENCE)) as connection,
    ):
        ask(connection)
        before = resident_kb(lb.pid)

        connection.request("GET", f"/bytes/{BULK}" + ("?chunked" if chunked else ""))
        came, received = hashlib.sha256(), 0
        block = bytearray(BLOCK)
        with connection.getresponse() as answer:
            while count := answer.readinto(block):
                came.update(memoryview(block)[:count])
                received += count
        assert received == BULK

        sent = hashlib.sha256()
        fields = {} if chunked else {"Content-Length": str(BULK)}
        answer = ask(connection, "/sink", "POST", hashing(sent), fields)
        assert json.loads(answer.body) == {"backend": backend.name, "bytes": BULK, "sha256": sent.hexdigest()}

        assert came.digest() == sent.digest()
        assert resident_kb(lb.pid, "VmHWM") - before < 30_000


def hashing(digest: hashlib._Hash) -> Iterator[bytes]:
    for block in pattern(BULK):
        digest.update(block)
        yield block


# Expect, interim answers, answers before their time ---------------------------------------------------------------


def test_expect_100_continue_waits_for_the_backends_word(tmp_path, three):
    """RFC 9110 section 10.1.1: the 100 is the backend's, and the body follows it."""
    with running(tmp_path, at(*three)) as balancer, connect(balancer) as sock, sock.makefile("rb") as file:
        for _ in range(2):
            sock.sendall(b"POST /echo HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")
            assert read_lines(file) == b"HTTP/1.1 100 Continue\r\n\r\n"
            sock.sendall(b"hello")
            assert read_response(file).body == b"hello"


def test_a_final_answer_in_place_of_the_100_ends_the_connection(tmp_path, three):
    """Whether the body comes all the same is open, so nothing that follows could be read."""
    with running(tmp_path, at(*three)) as balancer, connect(balancer) as sock, sock.makefile("rb") as file:
        sock.sendall(b"POST /status/403 HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")
        assert read_lines(file).startswith(b"HTTP/1.1 403 Forbidden\r\n")
        assert file.read() == b"backend 1 answers 403\n"


@pytest.mark.skipif(not shutil.which("curl"), reason="no curl")
def test_curl_uploads_after_its_100_continue(tmp_path, three):
    """Without a 100 curl would wait for longer than the test does."""
    body, back = tmp_path / "body", tmp_path / "back"
    body.write_bytes(b"".join(pattern(2_000_000)))
    with running(tmp_path, at(*three)) as balancer:
        flags = ["-sSf", "--expect100-timeout", str(2 * PATIENCE), "-H", "Expect: 100-continue", "-T", str(body)]
        subprocess.run(["curl", *flags, "-o", str(back), f"{balancer.url}/echo"], timeout=PATIENCE, check=True)
    assert back.read_bytes() == body.read_bytes()


def test_interim_answers_reach_http_1_1_and_no_older_client(tmp_path, three):
    """RFC 9110 section 15.2."""
    with running(tmp_path, at(*three)) as balancer, connect(balancer) as sock, sock.makefile("rb") as file:
        sock.sendall(b"GET /status/103 HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_lines(file) == b"HTTP/1.1 103 Early Hints\r\n\r\n"
        assert read_response(file).status == 200
        sock.sendall(b"GET /status/103 HTTP/1.0\r\n\r\n")
        assert read_lines(file).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("sent_first", [10, 100_000, 2_000_000])
def test_an_answer_that_comes_before_the_upload_is_done_is_passed_on_at_once(tmp_path, sent_first):
    """RFC 9110 section 7.5. The rest of the body goes on to the backend, which reads it here."""
    length = 3_000_000
    received = threading.Event()

    def hasty(connection: Connection) -> None:
        if read_lines(connection.file):
            connection.send(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 3\r\n\r\nno\n")
            if len(connection.file.read(length)) == length:
                received.set()

    with fronting(tmp_path, hasty) as (balancer, _), connect(balancer) as sock, sock.makefile("rb") as file:
        sock.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % length + bytes(sent_first))
        answer = read_response(file)
        assert (answer.status, answer.headers["Connection"], answer.body) == (403, "close", b"no\n")
        sock.sendall(bytes(length - sent_first))
        assert received.wait(PATIENCE)
        assert file.read() == b""
    assert exchanges(tmp_path) == ['"POST / HTTP/1.1" 403 3 backend=1 code=-- tries=1']


@pytest.mark.parametrize("length", [100, 50_000_000])
def test_a_refusal_by_a_backend_that_then_closes_reaches_a_client_that_still_sends(tmp_path, length):
    """A large upload that is refused with 413: the answer must not be lost to a reset (RFC 9112 section 9.6)."""

    def refuse(connection: Connection) -> None:
        if read_lines(connection.file):
            connection.send(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 4\r\nConnection: close\r\n\r\nbig\n")

    with fronting(tmp_path, refuse) as (balancer, _), connect(balancer) as sock, ThreadPoolExecutor(1) as uploader:
        sock.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % length)
        upload = uploader.submit(send_what_is_taken, sock, length - 1)
        answer = read_response(sock)
        assert (answer.status, answer.body) == (413, b"big\n")
        hang_up(sock)
        upload.result(PATIENCE)


def send_what_is_taken(sock: socket.socket, octets: int) -> None:
    try:
        for block in pattern(octets):
            sock.sendall(block)
    except OSError:
        return  # the balancer listens no more, which is its right


# Streams and tunnels ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "until-close"])
def test_each_server_sent_event_arrives_as_it_is_sent(tmp_path, chunked):
    """The backend sends the next event only when the client has the last one: one that is held back ends the test."""
    seen = threading.Semaphore(0)
    events = [f"id: {number}\ndata: hello\n\n".encode() for number in range(5)]

    def tell(connection: Connection) -> None:
        if not connection.read_request():
            return
        framing = b"Transfer-Encoding: chunked\r\n" if chunked else b""
        connection.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n" + framing + b"\r\n")
        for event in events:
            connection.send(b"%x\r\n%b\r\n" % (len(event), event) if chunked else event)
            assert seen.acquire(timeout=PATIENCE)
        connection.send(b"0\r\n\r\n" if chunked else b"")

    with fronting(tmp_path, tell) as (balancer, _), client(balancer) as connection:
        connection.request("GET", "/")
        with connection.getresponse() as answer:
            for event in events:
                assert b"".join(answer.readline() for _ in range(3)) == event
                seen.release()
            assert answer.read() == b""


def test_events_of_a_stream_of_backend_server(tmp_path, three):
    with running(tmp_path, at(*three)) as balancer, client(balancer) as connection:
        answer = ask(connection, "/stream?n=3&interval=0.01")
        assert answer.headers["Content-Type"] == "text/event-stream"
        assert answer.body.count(b"data: backend 1 event") == 3


def masked(opcode: int, payload: bytes) -> bytes:
    """A frame as clients send it (RFC 6455 section 5.3)."""
    plain, key = frame(opcode, payload), b"\x37\xfa\x21\x3d"
    head = plain[: len(plain) - len(payload)]
    return bytes([head[0], head[1] | 0x80]) + head[2:] + key + mask(payload, key)


HANDSHAKE_KEY = base64.b64encode(bytes(range(16))).decode()
HANDSHAKE = (
    "GET /ws HTTP/1.1\r\nHost: x\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n"
    f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {HANDSHAKE_KEY}\r\n\r\n"
).encode()


@pytest.mark.parametrize("hasty", [False, True], ids=["after-101", "with-the-handshake"])
def test_a_websocket_echo(tmp_path, three, hasty):
    """RFC 6455. A hasty client sends its first frame behind the handshake, before the 101 has come."""
    first = masked(TEXT, b"first")
    with running(tmp_path, at(*three)) as balancer:
        with connect(balancer) as sock, sock.makefile("rb") as file:
            sock.sendall(HANDSHAKE + (first if hasty else b""))
            head = read_lines(file)
            assert head.startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
            assert f"sec-websocket-accept: {websocket_accept(HANDSHAKE_KEY)}\r\n".lower().encode() in head.lower()
            if not hasty:
                sock.sendall(first)
            assert file.read(len(frame(TEXT, b"first"))) == frame(TEXT, b"first")
            for opcode, payload, answer in [
                (TEXT, "zwölf".encode(), TEXT),
                (BINARY, b"".join(pattern(1_000_000)), BINARY),
                (PING, b"there?", PONG),
                (CLOSE, b"\x03\xe8", CLOSE),
            ]:
                with ThreadPoolExecutor(1) as sender:  # a megabyte fits into no buffer, so its echo is read meanwhile
                    sent = sender.submit(sock.sendall, masked(opcode, payload))
                    assert file.read(len(frame(answer, payload))) == frame(answer, payload)
                    sent.result(PATIENCE)
            assert file.read() == b""
        leases_come_back(balancer)
    (line,) = exchanges(tmp_path)
    assert re.fullmatch(r'"GET /ws HTTP/1.1" 101 \d+ backend=1 code=-- tries=1', line)


def test_a_websocket_half_closes_both_ways(tmp_path):
    """The client ends first and still hears the rest; then the backend ends, which the client sees."""
    ended = threading.Event()

    def switch(connection: Connection) -> None:
        if connection.read_request():
            connection.send(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
            assert connection.file.read() == b"ping"
            ended.set()
            connection.send(b"pong")

    with fronting(tmp_path, switch) as (balancer, _), connect(balancer) as sock, sock.makefile("rb") as file:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n")
        assert read_lines(file).startswith(b"HTTP/1.1 101 ")
        sock.sendall(b"ping")
        sock.shutdown(socket.SHUT_WR)
        assert file.read() == b"pong"
        assert ended.is_set()


def test_after_an_upgrade_that_was_not_granted_the_connection_is_http_still(tmp_path):
    """RFC 9110 section 7.8: a tunnel opened before the 101 let requests past other proxies unseen."""
    with fronting(tmp_path, OK) as (balancer, _), connect(balancer) as sock, sock.makefile("rb") as file:
        sock.sendall(HANDSHAKE + GET)
        assert [read_response(file).body for _ in range(2)] == [b"ok", b"ok"]
    assert len(exchanges(tmp_path)) == 2


@pytest.mark.parametrize("size", [2, 500_000])
def test_a_client_that_half_closes_before_the_answer_gets_it(tmp_path, size):
    """RFC 9112 section 9.6: a half-close is no cancelled request (`nc`, scripts and some agents do it)."""
    gate = Gate(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + bytes(size))
    with fronting(tmp_path, gate) as (balancer, _), connect(balancer) as sock:
        sock.sendall(GET)
        gate.wait_for_request()
        sock.shutdown(socket.SHUT_WR)
        gate.open.set()
        assert read_response(sock).body == bytes(size)
    assert exchanges(tmp_path) == [f'"GET / HTTP/1.1" 200 {size} backend=1 code=-- tries=1']


# Fields -----------------------------------------------------------------------------------------------------------


def test_what_a_backend_is_told_of_the_client_cannot_be_forged(tmp_path, three):
    forged = {
        "Host": "shop.example",
        "X-Forwarded-For": "10.0.0.1",
        "X-Forwarded-Proto": "https",
        "X-Forwarded-Host": "evil.example",
        "X-Forwarded-Port": "443",
        "Via": "1.0 fred",
        "X-Kept": "yes",
    }
    with running(tmp_path, at(*three)) as balancer, client(balancer) as connection:
        for fields in ({"Host": "shop.example"}, forged):
            told = json.loads(ask(connection, "/headers", fields=fields).body)
            arrived = {name.lower(): value for name, value in told["fields"]}
            assert len(arrived) == len(told["fields"]) - ("Via" in fields)
            assert arrived["host"] == arrived["x-forwarded-host"] == "shop.example"
            assert arrived["x-forwarded-for"] == "127.0.0.1"
            assert arrived["x-forwarded-proto"] == "http"
            assert arrived["x-forwarded-port"] == str(balancer.port)
        vias = [value for name, value in told["fields"] if name.lower() == "via"]
        assert vias == ["1.0 fred", "1.1 lb"]
        assert arrived["x-kept"] == "yes"


def test_hop_by_hop_fields_are_dropped_both_ways(tmp_path):
    """RFC 9110 section 7.6.1, and `Connection: X-Forwarded-For` must not strip ours."""
    back = (
        b"HTTP/1.1 200 OK\r\nConnection: keep-alive, X-Inner\r\nKeep-Alive: timeout=5\r\nX-Inner: 1\r\n"
        b"Proxy-Connection: keep-alive\r\nX-Outer: 2\r\nContent-Length: 0\r\n\r\n"
    )
    with fronting(tmp_path, back) as (balancer, fake), client(balancer) as connection:
        fields = {
            "Connection": "keep-alive, X-Secret, X-Forwarded-For, close-not",
            "Keep-Alive": "timeout=5",
            "Proxy-Connection": "keep-alive",
            "TE": "trailers",
            "X-Secret": "1",
            "X-Public": "2",
        }
        answer = ask(connection, fields=fields)
        sent = {name for name, _ in (line.split(b": ", 1) for line in fake.requests[0].split(b"\r\n")[1:-2])}
        assert sent == {
            b"Host", b"Accept-Encoding", b"X-Public", b"Via",
            b"X-Forwarded-For", b"X-Forwarded-Proto", b"X-Forwarded-Host", b"X-Forwarded-Port",
        }  # fmt: skip
        assert {name.lower() for name in answer.headers} == {"x-outer", "content-length", "date"}


# When something is missing ----------------------------------------------------------------------------------------


@pytest.fixture
def refusing() -> Iterator[Callable[[], FakeBackend]]:
    """Makes backends that pass their first probe; `close` them and every connection is refused from then on."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(FakeBackend(OK))


STAYS_UP = {"health_check": {"type": "tcp", "interval": 1000, "fall": 100}}


def test_a_refused_connection_is_tried_on_the_next_backend(tmp_path, three, refusing):
    dead = refusing()
    with running(tmp_path, [*at(dead), *at(three[1])], **STAYS_UP) as balancer:
        settled(balancer)
        dead.close()
        with client(balancer) as connection:
            answer = ask(connection, "/echo", "POST", b"not idempotent, and not sent either")
            assert (answer.headers["X-Backend"], answer.body) == ("2", b"not idempotent, and not sent either")
    assert exchanges(tmp_path) == ['"POST /echo HTTP/1.1" 200 35 backend=2 code=-- tries=2']


def test_refused_connections_count_as_failed_probes_at_once(tmp_path, three, refusing):
    """With one probe an hour, requests alone find out that a backend has gone; and none of them fails."""
    dead = refusing()
    with running(tmp_path, [*at(dead), *at(three[1])], **QUIET) as balancer, client(balancer) as connection:
        settled(balancer)
        dead.close()
        assert {ask(connection).headers["X-Backend"] for _ in range(10)} == {"2"}
        assert balancer.pool.backends[0].status == "DOWN"
    assert sum("tries=2" in line for line in exchanges(tmp_path)) <= 3
    changes = [line for line in log_lines(tmp_path) if " DOWN: " in line]
    assert len(changes) == 1
    assert "L4CON refused, 3rd failure" in changes[0]


def test_a_refused_connection_has_the_backend_probed_at_once(tmp_path, three, refusing):
    """One refusal and that probe are two failures, an hour before the next probe would have been."""
    dead = refusing()
    settings = {"health_check": {"type": "tcp", "interval": 3600, "fall": 2}}
    with running(tmp_path, [*at(dead), *at(three[1])], **settings) as balancer:
        settled(balancer)
        dead.close()
        assert ask_once(balancer).status == 200
        eventually(lambda: balancer.pool.backends[0].status == "DOWN", "the probe's result")


@pytest.mark.parametrize(("retries", "tries"), [(0, 1), (1, 2), (3, 3)])
def test_no_backend_is_tried_twice_and_none_beyond_the_retries(tmp_path, refusing, retries, tries):
    dead = [refusing() for _ in range(3)]
    with running(tmp_path, at(*dead), retries=retries, **STAYS_UP) as balancer:
        settled(balancer)
        for one in dead:
            one.close()
        answer = ask_once(balancer)
        assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
        tried = re.search(rb"\(tried (.*)\)", answer.body)
        assert tried
        assert tried[1].split(b", ") == [b"1", b"2", b"3"][:tries]
        leases_come_back(balancer)
    (line,) = exchanges(tmp_path)
    assert line.endswith(f"code=SC tries={tries}")


def test_without_any_backend_the_answer_is_a_readable_503(tmp_path, refusing):
    dead = refusing()
    dead.close()
    with running(tmp_path, at(dead), **QUIET) as balancer:
        settled(balancer)
        assert balancer.pool.backends[0].status == "DOWN"
        with client(balancer) as connection:
            for method in ("GET", "HEAD", "GET"):
                answer = ask(connection, method=method)
                assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
            name = answer.headers["X-Request-Id"]
            text = f"503 Service Unavailable: no backend is available\ncode: SC, request id: {name}\n"
            assert answer.body.decode() == text
    assert any(line.endswith(f" code=SC tries=0 id={name}") for line in log_lines(tmp_path))


def test_requests_that_wait_for_a_backend_are_served_when_one_comes_back(tmp_path, refusing):
    """`timeouts.no_backend`: how long a request waits where every backend is down."""
    dead = refusing()
    dead.close()
    settings = {"type": "tcp", "interval": 0.05, "rise": 1}
    with running(tmp_path, at(dead), timeouts={"no_backend": PATIENCE}, health_check=settings) as balancer:
        settled(balancer)
        with connect(balancer) as sock:
            sock.sendall(GET)
            eventually(lambda: balancer.upstreams.waiting, "a request that waits")
            with serving(make_server(port=dead.port, name="back")):
                assert read_response(sock).headers["X-Backend"] == "back"


def test_a_full_backend_makes_requests_wait_in_their_order(tmp_path):
    gate = Gate()
    with fronting_one_at_a_time(tmp_path, gate) as (balancer, fake), ThreadPoolExecutor(5) as clients:
        answers = []
        for number in range(5):
            answers.append(clients.submit(ask_once, balancer, GET.replace(b"/ ", b"/%d " % number, 1)))
            eventually(lambda n=number: balancer.upstreams.waiting == n, "one more that waits")
            if number == 0:
                gate.wait_for_request()
        assert balancer.pool.backends[0].active == 1
        gate.open.set()
        assert [answer.result(PATIENCE).status for answer in answers] == [200] * 5
        leases_come_back(balancer)
        assert gate.most == 1
        assert [request.split()[1] for request in fake.requests] == [b"/0", b"/1", b"/2", b"/3", b"/4"]


@pytest.mark.parametrize(
    ("settings", "code"),
    [({"timeouts": {"queue": 0.05}}, "sQ"), ({"limits": {"queue": 0}}, "PQ")],
    ids=["too-long", "queue-full"],
)
def test_the_queue_has_an_end(tmp_path, settings, code):
    gate = Gate()
    with fronting_one_at_a_time(tmp_path, gate, **settings) as (balancer, _), ThreadPoolExecutor(1) as clients:
        first = clients.submit(ask_once, balancer)
        gate.wait_for_request()
        answer = ask_once(balancer)
        assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
        gate.open.set()
        assert first.result(PATIENCE).status == 200
    assert [line for line in exchanges(tmp_path) if f"code={code}" in line]


@pytest.mark.parametrize(
    ("request_head", "status", "code"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 400, "PR"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400, "PR"),
        (b"GET /" + b"x" * 20000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414, "PR"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X-Long: " + b"x" * 70000 + b"\r\n\r\n", 431, "PR"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X-Many: 1\r\n" * 200 + b"\r\n", 431, "PR"),
        (b"GET / HTTP/2.0\r\nHost: x\r\n\r\n", 505, "PR"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", 501, "PR"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nExpect: more\r\n\r\n", 417, "PR"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400, "PR"),
        (b"GET / HTTP/1.1\r\nHo", 408, "cR"),
    ],
    ids=["host", "lengths", "line", "head", "fields", "version", "coding", "expect", "chunk", "half"],
)
def test_what_is_no_request_is_refused_with_its_status_and_never_reaches_a_backend(
    tmp_path, request_head, status, code
):
    with fronting(tmp_path, OK, timeouts={"request_head": 0.1}) as (balancer, fake):
        with connect(balancer) as sock, sock.makefile("rb") as file:
            sock.sendall(request_head)
            answer = read_response(file)
            assert (answer.status, answer.headers["Connection"]) == (status, "close")
            assert answer.headers["X-Request-Id"].encode() in answer.body
            assert answer.headers["Date"]
            assert file.read() == b""
        assert fake.requests == []
    (line,) = exchanges(tmp_path)
    assert f" {status} " in line
    assert line.endswith(f"backend=- code={code} tries=0")


def hang(connection: Connection) -> None:
    connection.read_request()
    connection.file.read()


@pytest.mark.parametrize(
    ("script", "request_octets", "status", "code"),
    [
        (b"", GET.replace(b"GET", b"POST"), 502, "SH"),
        (b"220 mail.example ESMTP\r\n", GET, 502, "PH"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", GET, 502, "PH"),
        (hang, GET, 504, "sH"),
        (hang, GET.replace(b"GET", b"POST").replace(b"\r\n\r\n", b"\r\nContent-Length: 9\r\n\r\nhalf"), 408, "cD"),
    ],
    ids=["closes", "no-http", "lengths", "silent", "half-upload"],
)
def test_a_backend_or_upload_that_fails_is_named_by_its_status(tmp_path, script, request_octets, status, code):
    timeouts = {"server": 0.15, "client": 0.1}
    with fronting(tmp_path, script, timeouts=timeouts) as (balancer, fake):
        answer = ask_once(balancer, request_octets)
        assert answer.status == status
        assert len(fake.requests) <= 1
    (line,) = exchanges(tmp_path)
    assert line.endswith(f"backend=1 code={code} tries=1")


@pytest.mark.parametrize("taken", [10, 100_000, 2_000_000])
def test_a_client_that_is_answered_502_within_its_upload_is_not_reset(tmp_path, taken, monkeypatch):
    """RFC 9112 section 9.6: a reset may destroy the answer before it is read, so what still comes is taken first.

    The larger uploads are a pump's by the time the backend says something that is not HTTP.
    """
    monkeypatch.setattr(http_session, "REST_AFTER", 0.1)  # how long that pump waits for more

    def babble(connection: Connection) -> None:
        if read_lines(connection.file):
            connection.file.read(taken)
            connection.send(b"220 mail.example ESMTP\r\n")
            connection.file.read()

    with fronting(tmp_path, babble) as (balancer, _):
        with connect(balancer) as sock, sock.makefile("rb") as file:
            sock.sendall(POST + bytes(taken))
            answer = read_response(file)
            assert (answer.status, answer.headers["Connection"]) == (502, "close")
            leases_come_back(balancer)
            for _ in range(50):
                sock.sendall(bytes(10_000))
            sock.shutdown(socket.SHUT_WR)
            assert file.read() == b""
        eventually(lambda: not balancer.listener.sessions, "no session")
    (line,) = exchanges(tmp_path)
    assert line.endswith("backend=1 code=PH tries=1")


def test_an_answer_that_is_none_ends_an_upload_too(tmp_path):
    """The upload's pump waits for the client at that moment."""

    def babble(connection: Connection) -> None:
        if read_lines(connection.file):
            connection.file.read(1_000_000)
            connection.send(b"220 mail.example ESMTP\r\n")
            connection.file.read()

    with fronting(tmp_path, babble) as (balancer, _), connect(balancer) as sock:
        sock.sendall(POST + bytes(1_000_000))
        answer = read_response(sock)
        assert (answer.status, answer.headers["Connection"]) == (502, "close")
    (line,) = exchanges(tmp_path)
    assert line.endswith("backend=1 code=PH tries=1")


@pytest.mark.parametrize(("method", "tries"), [("GET", 3), ("POST", 1)])
def test_only_what_may_be_repeated_is_sent_again_when_no_answer_came(tmp_path, method, tries):
    """RFC 9110 section 9.2.2; here every backend takes the request and hangs up, and none is asked twice."""
    with ExitStack() as stack:
        fakes = [stack.enter_context(FakeBackend(b"")) for _ in range(3)]
        balancer = stack.enter_context(running(tmp_path, at(*fakes), retries=2, **QUIET))
        settled(balancer)
        assert ask_once(balancer, GET.replace(b"GET", method.encode())).status == 502
        leases_come_back(balancer)
        assert sorted(len(fake.requests) for fake in fakes) == [0] * (3 - tries) + [1] * tries
    (line,) = exchanges(tmp_path)
    assert line.endswith(f"code=SH tries={tries}")


def test_retries_bound_how_often_a_request_is_sent(tmp_path):
    with ExitStack() as stack:
        fakes = [stack.enter_context(FakeBackend(b"")) for _ in range(3)]
        balancer = stack.enter_context(running(tmp_path, at(*fakes), retries=1, **QUIET))
        settled(balancer)
        assert ask_once(balancer).status == 502
        assert sum(len(fake.requests) for fake in fakes) == 2


# Clients that go away ---------------------------------------------------------------------------------------------


def fill_backlog(listener: socket.socket, stack: ExitStack) -> None:
    """Make connections to a listener hang: its backlog is full, and the kernel drops what comes."""
    for _ in range(8):
        sock = stack.enter_context(socket.socket())
        sock.setblocking(False)
        sock.connect_ex(listener.getsockname())


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a full backlog refuses")
def test_a_client_that_goes_away_while_its_backend_is_being_connected_gives_the_lease_back(tmp_path):
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        fill_backlog(listener, stack)
        settings = {"health_check": {"type": "tcp", "interval": 1000, "timeout": 1000}}
        balancer = stack.enter_context(running(tmp_path, [listener.getsockname()], **settings))
        sock = connect(balancer)
        sock.sendall(GET)
        eventually(lambda: balancer.pool.backends[0].active, "a lease")
        reset(sock)
        leases_come_back(balancer)
    assert exchanges(tmp_path) == ['"GET / HTTP/1.1" - 0 backend=- code=CC tries=0']


def test_a_client_that_goes_away_from_the_queue_is_forgotten(tmp_path):
    gate = Gate()
    with fronting_one_at_a_time(tmp_path, gate) as (balancer, fake), ThreadPoolExecutor(1) as clients:
        first = clients.submit(ask_once, balancer)
        gate.wait_for_request()
        sock = connect(balancer)
        sock.sendall(GET)
        eventually(lambda: balancer.upstreams.waiting, "a request that waits")
        reset(sock)
        eventually(lambda: not balancer.upstreams.waiting, "an empty queue")
        gate.open.set()
        assert first.result(PATIENCE).status == 200
        leases_come_back(balancer)
        assert len(fake.requests) == 1


def begins_to_answer(octets: int) -> Callable[[Connection], None]:
    """A backend that sends so much of a longer answer, and then waits until it is hung up on."""

    def handler(connection: Connection) -> None:
        if connection.read_request():
            connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (octets + 1) + bytes(octets))
            connection.file.read()

    return handler


def switches(connection: Connection) -> None:
    if connection.read_request():
        connection.send(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
        connection.file.read()


UPGRADE = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n"


class Watched:
    """A handler that tells when a request has come."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self.reached = threading.Semaphore(0)

    def __call__(self, connection: Connection) -> None:
        if connection.file.peek(1):
            self.reached.release()
            self._handler(connection)


@pytest.mark.parametrize(
    ("handler", "octets", "pumps", "begun"),
    [
        (hang, GET, False, False),
        (hang, POST + bytes(10), False, False),
        (hang, POST + bytes(2_000_000), True, False),
        (begins_to_answer(10), GET, False, True),
        (begins_to_answer(100_000), GET, True, True),
        (begins_to_answer(30_000_000), GET, True, True),
        (switches, UPGRADE, False, True),
    ],
    ids=["waiting", "uploading", "upload-pumped", "answering", "answer-pumped", "answer-not-taken", "tunnel"],
)
def test_a_client_that_goes_away_gives_its_lease_back_whatever_was_going_on(tmp_path, handler, octets, pumps, begun):
    watched = Watched(handler)
    with fronting(tmp_path, watched) as (balancer, _):
        sock = connect(balancer)
        sock.sendall(octets)
        assert watched.reached.acquire(timeout=PATIENCE)
        if begun:
            assert sock.recv(1) == b"H"
        if pumps:
            eventually(lambda: balancer.pumps.threads, "a pump")
        assert balancer.pool.backends[0].active == 1
        reset(sock)
        leases_come_back(balancer)
        eventually(lambda: not balancer.listener.sessions, "no session")
    (line,) = exchanges(tmp_path)
    assert re.search(r"code=C[HD] tries=1", line), line


def test_a_client_that_closes_within_its_upload_gives_its_lease_back(tmp_path):
    """An orderly close this time: the body can never be whole."""
    watched = Watched(hang)
    with fronting(tmp_path, watched) as (balancer, _):
        for octets in (POST, POST + bytes(10), POST + bytes(2_000_000)):
            with connect(balancer) as sock:
                sock.sendall(octets)
                assert watched.reached.acquire(timeout=PATIENCE)
                assert balancer.pool.backends[0].active == 1
            leases_come_back(balancer)
    assert [line.split("code=")[1] for line in exchanges(tmp_path)] == ["CD tries=1"] * 3


# The same again and again -----------------------------------------------------------------------------------------

# Nearly all exchanges are like the one before them, and go a shorter way. Here they are interrupted by others: whatever
# comes between, each is answered, logged and counted as if it stood alone.


def dated(content: bytes = b"ok", fields: bytes = b"", status: bytes = b"200 OK") -> bytes:
    """An answer that can be passed on as it is."""
    head = b"HTTP/1.1 %b\r\nDate: today\r\n%bContent-Length: %d\r\n\r\n" % (status, fields, len(content))
    return head + content


def at_once(sock: socket.socket) -> None:
    """Have each piece sent when it is handed over, and not wait for the last one's receipt."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class Play:
    """One client and one backend, both played by the test, and the balancer between them."""

    def __init__(self, balancer: LoadBalancer, listener: socket.socket, stack: ExitStack) -> None:
        self.balancer = balancer
        self.listener = listener
        self.stack = stack
        self.client = stack.enter_context(connect(balancer))
        at_once(self.client)
        self.heard = stack.enter_context(self.client.makefile("rb"))
        self.backend: Connection | None = None
        self.asked: list[bytes] = []  # what came to the backend
        self.connections = 0  # that the backend accepted for requests

    def accept(self) -> Connection:
        sock, _ = self.listener.accept()
        sock.settimeout(PATIENCE)
        at_once(sock)
        self.backend = Connection(self.stack.enter_context(sock), self.asked)
        self.stack.enter_context(self.backend.file)
        self.connections += 1
        return self.backend

    def next_request(self) -> bytes:
        """The next request at the backend, on the connection that is there or, if that has ended, on a fresh one."""
        return (self.backend and self.backend.read_request()) or self.accept().read_request()

    def answer(self, *pieces: bytes) -> None:
        """Send this, a piece when all before it was dealt with."""
        assert self.backend
        for piece in pieces:
            self.backend.send(piece)
            self.turn()

    def turn(self) -> None:
        """Wait until the balancer has dealt with all that was there."""
        over = threading.Event()
        self.balancer.reactor.call_soon(over.set)
        assert over.wait(PATIENCE)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Whatever happens within comes to the balancer at once, at the end."""
        began, go_on = threading.Event(), threading.Event()

        def hold() -> None:
            began.set()
            assert go_on.wait(PATIENCE)

        self.balancer.reactor.call_soon(hold)
        assert began.wait(PATIENCE)
        try:
            yield
        finally:
            go_on.set()

    @contextmanager
    def held_within_a_batch(self, begin: Callable[[], object]) -> Iterator[None]:
        """What `begin` has done was read by then, and nothing was sent yet that comes of it."""
        reactor = self.balancer.reactor
        ours, theirs = socket.socketpair()
        began, go_on = threading.Event(), threading.Event()

        def hold(mask: int) -> None:
            reactor.remove(ours.fileno())
            began.set()
            assert go_on.wait(PATIENCE)

        with ours, theirs:
            reactor.call_soon(reactor.add, ours.fileno(), READ, hold)
            self.turn()
            with self.held():
                begin()
                theirs.send(b"x")
            assert began.wait(PATIENCE)
            try:
                yield
            finally:
                go_on.set()
                self.turn()

    def exchange(self, request: bytes = GET, answer: bytes = dated(), method: str = "GET") -> Answer:
        self.client.sendall(request)
        self.next_request()
        self.answer(answer)
        return read_response(self.heard, method)

    def plain_ones(self) -> None:
        """A few that are all the same."""
        assert [self.exchange().body for _ in range(3)] == [b"ok"] * 3


@contextmanager
def played(tmp_path: Path, **keys: Any) -> Iterator[Play]:
    """At its end each line of the log names the client, and the counters say what the log says."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        listener.settimeout(PATIENCE)
        balancer = stack.enter_context(running(tmp_path, [listener.getsockname()], **{**QUIET, **keys}))
        settled(balancer)
        listener.accept()[0].close()  # the probe's
        play = Play(balancer, listener, stack)
        port = play.client.getsockname()[1]
        yield play
        play.heard.close()  # which shares the client's descriptor
        play.client.close()
        if play.backend:
            hang_up(play.backend.sock)
        leases_come_back(balancer)
        eventually(lambda: not balancer.listener.sessions, "no session")
        (backend,) = balancer.pool.backends
        tally, own = backend.tally, balancer.listener.front.tally
        assert backend.active == balancer.pool.in_hand == 0
    lines = [line for line in log_lines(tmp_path) if " code=" in line]
    assert all(f" 127.0.0.1:{port} " in line for line in lines)
    assert sum(tally.responses) + sum(own.responses) == len(lines)
    octets = [int(re.search(r'" (?:\d+|-) (\d+) ', line)[1]) for line in lines]  # type: ignore[index]
    assert tally.octets_out + own.octets_out == sum(octets)
    if all("code=--" in line for line in lines):
        bodies = [request.partition(b"\r\n\r\n")[2] for request in play.asked]
        assert tally.octets_in == sum(2 if body == CHUNKS else len(body) for body in bodies)


CHUNKS = b"2\r\nab\r\n0\r\n\r\n"
PLAIN_LINE = '"GET / HTTP/1.1" 200 2 backend=1 code=-- tries=1'
FIVE = b"POST /five HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n"
NESTED = b"POST /nested HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(GET)

# The pieces that a client sends, and the requests that they are: request line and content.
SAID: dict[str, tuple[list[bytes], list[tuple[bytes, bytes]]]] = {
    "the same": ([GET], [(b"GET /", b"")]),
    "two, one after the other": ([GET, GET], [(b"GET /", b"")] * 2),
    "a head that ends with another": ([b"GET /long HTTP/1.1\r\nX-Inner: ", GET], [(b"GET /long", b"")]),
    "in two pieces": ([GET[:20], GET[20:]], [(b"GET /", b"")]),
    "after an empty line": ([b"\r\n" + GET], [(b"GET /", b"")]),
    "two at once": ([GET + GET], [(b"GET /", b"")] * 2),
    "one and a half": ([GET + GET[:20], GET[20:]], [(b"GET /", b"")] * 2),
    "another behind it": ([GET + FIVE + b"hello"], [(b"GET /", b""), (b"POST /five", b"hello")]),
    "a body": ([FIVE + b"hello"], [(b"POST /five", b"hello")]),
    "another body": ([FIVE + b"\0\r\n\r\n"], [(b"POST /five", b"\0\r\n\r\n")]),
    "a body in two pieces": ([FIVE + b"he", b"llo"], [(b"POST /five", b"hello")]),
    "a body behind its head": ([FIVE, b"world"], [(b"POST /five", b"world")]),
    "a body and more": ([FIVE + b"hello" + GET], [(b"POST /five", b"hello"), (b"GET /", b"")]),
    "two bodies": ([(FIVE + b"hello") + FIVE + b"world"], [(b"POST /five", b"hello"), (b"POST /five", b"world")]),
    "a body that looks like a request": ([NESTED + GET], [(b"POST /nested", GET)]),
    "chunks": (
        [b"POST /chunks HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKS],
        [(b"POST /chunks", CHUNKS)],
    ),
    "HTTP/1.0 kept": ([b"GET /old HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"], [(b"GET /old", b"")]),
}


@pytest.mark.parametrize(("pieces", "requests"), SAID.values(), ids=SAID)
def test_whatever_a_client_says_between_requests_that_are_the_same(tmp_path, pieces, requests):
    """Twice, as the second time it is known; the answers differ each time, so that none can be mistaken."""
    with played(tmp_path) as play:
        for turn in range(2):
            play.plain_ones()
            for piece in pieces:
                play.client.sendall(piece)
                play.turn()
            for number, (line, content) in enumerate(requests):
                head, _, body = play.next_request().partition(b"\r\n\r\n")
                assert head.startswith(line + b" HTTP/1.1\r\n")
                assert body == content
                answer = b"%d %d" % (turn, number)
                play.answer(dated(answer))
                found = read_response(play.heard)
                assert found.body == answer
                assert found.headers["Connection"] == ("keep-alive" if line == b"GET /old" else None)
        play.plain_ones()
        assert play.connections == 1
    lines = exchanges(tmp_path)
    assert [line for line in lines if line != PLAIN_LINE] == 2 * [
        f'"{line.decode()} HTTP/1.{int(line != b"GET /old")}" 200 3 backend=1 code=-- tries=1' for line, _ in requests
    ]


@pytest.mark.parametrize(
    ("octets", "method"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", "GET"),
        (b"GET / HTTP/1.0\r\n\r\n", "GET"),
        (b"HEAD / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", "HEAD"),
        (GET + b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" + GET, "GET"),
    ],
    ids=["close", "HTTP/1.0", "HEAD", "close among others"],
)
def test_the_last_request_after_many_that_were_the_same_ends_the_connection(tmp_path, octets, method):
    with played(tmp_path) as play:
        play.plain_ones()
        play.client.sendall(octets)
        if octets.startswith(GET):
            play.next_request()
            play.answer(dated())
            assert "Connection" not in read_response(play.heard).headers
        play.next_request()
        play.answer(dated(b"" if method == "HEAD" else b"ok"))
        answer = read_response(play.heard, method)
        assert (answer.status, answer.headers["Connection"]) == (200, "close")
        assert play.heard.read() == b""
    assert len(exchanges(tmp_path)) == 4 + octets.startswith(GET)


def test_head_between_requests_that_are_the_same_has_no_body(tmp_path):
    """Its answer has the head of the others' answers, and their length."""
    with played(tmp_path) as play:
        for _ in range(2):
            play.plain_ones()
            answer = play.exchange(GET.replace(b"GET", b"HEAD"), dated()[:-2], "HEAD")
            assert (answer.headers["Content-Length"], answer.body) == ("2", b"")
        play.plain_ones()
    assert exchanges(tmp_path).count('"HEAD / HTTP/1.1" 200 0 backend=1 code=-- tries=1') == 2


@pytest.mark.parametrize("when", ["with it", "before the answer", "with the answer"])
@pytest.mark.parametrize("octets", [GET, FIVE + b"hello"], ids=["GET", "POST"])
def test_a_client_that_half_closes_behind_a_request_it_has_sent_before_gets_its_answer(tmp_path, octets, when):
    """RFC 9112 section 9.6."""
    with played(tmp_path) as play:
        for _ in range(3):
            play.exchange(octets)
        with play.held() if when == "with it" else ExitStack():
            play.client.sendall(octets)
            if when == "with it":
                play.client.shutdown(socket.SHUT_WR)
        play.next_request()
        if when == "before the answer":
            play.client.shutdown(socket.SHUT_WR)
            play.turn()
        with play.held() if when == "with the answer" else ExitStack():
            play.backend.send(dated())
            if when == "with the answer":
                play.client.shutdown(socket.SHUT_WR)
        assert read_response(play.heard).body == b"ok"
        assert play.heard.read() == b""
    assert [line.split(" ", 3)[3] for line in exchanges(tmp_path)] == ["200 2 backend=1 code=-- tries=1"] * 4


def test_a_client_that_half_closes_while_its_backend_is_being_connected_gets_its_answer(tmp_path):
    """It is not listened to from then on, and must be once more to be let go."""
    with played(tmp_path) as play:
        with play.held_within_a_batch(lambda: play.client.sendall(GET)):
            play.client.shutdown(socket.SHUT_WR)
        play.next_request()
        play.answer(dated())
        assert read_response(play.heard).body == b"ok"
        assert play.heard.read() == b""
    assert exchanges(tmp_path) == [PLAIN_LINE]


@pytest.mark.parametrize("order", ["request first", "answer first"])
def test_a_request_that_comes_at_the_moment_of_an_answer_is_the_next(tmp_path, order):
    with played(tmp_path) as play:
        play.plain_ones()
        play.client.sendall(GET)
        play.next_request()
        acts = [lambda: play.client.sendall(FIVE + b"hello"), lambda: play.backend.send(dated(b"first"))]
        with play.held():
            for act in acts if order == "request first" else reversed(acts):
                act()
        assert read_response(play.heard).body == b"first"
        assert play.next_request().endswith(b"\r\n\r\nhello")
        play.answer(dated(b"second"))
        assert read_response(play.heard).body == b"second"
        play.plain_ones()


OTHER = dated(b"other", b"X-Other: 1\r\n", b"201 Created")
HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n"

# The pieces of an answer; then status and content that the client reads, and whether the backend's connection stays.
TOLD: dict[str, tuple[list[bytes], int, bytes, bool]] = {
    "the same": ([dated()], 200, b"ok", True),
    "other content": ([dated(b"no")], 200, b"no", True),
    "another length": ([dated(b"longer")], 200, b"longer", True),
    "no content": ([dated(b"")], 200, b"", True),
    "another head": ([OTHER], 201, b"other", True),
    "head in two pieces": ([dated()[:20], dated()[20:]], 200, b"ok", True),
    "head but for its last octets": ([dated()[:-4], dated()[-4:]], 200, b"ok", True),
    "another head in two pieces": ([OTHER[:20], OTHER[20:]], 201, b"other", True),
    "octet by octet": ([bytes([octet]) for octet in OTHER], 201, b"other", True),
    "body in two pieces": ([dated()[:-1], dated()[-1:]], 200, b"ok", True),
    "head, then body": ([dated()[:-2], b"ok"], 200, b"ok", True),
    "a piece that looks like a whole one": ([b"HTTP/1.1 404 No\r\nX-Other: ", dated()], 404, b"ok", True),
    "octets behind it": ([dated() + b"HTTP/1.1 200 OK\r\n"], 200, b"ok", False),
    "another answer behind it": ([dated() + OTHER], 200, b"ok", False),
    "interim before it": ([HINTS + dated()], 200, b"ok", True),
    "interim, then it": ([HINTS, dated()], 200, b"ok", True),
    "interim, then another": ([HINTS, HINTS, OTHER], 201, b"other", True),
    "interim with a length": ([dated(b"", status=b"103 Hints")] * 2 + [OTHER], 201, b"other", True),
    "no date": ([OK], 200, b"ok", True),
    "chunks": ([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"], 200, b"ok", True),
    "close": ([dated(fields=b"Connection: close\r\n")], 200, b"ok", False),
    "204": ([b"HTTP/1.1 204 No Content\r\nDate: today\r\n\r\n"], 204, b"", True),
    "304": ([dated(status=b"304 Not Modified")[:-2]], 304, b"", True),
}  # fmt: skip


@pytest.mark.parametrize(("pieces", "status", "content", "stays"), TOLD.values(), ids=TOLD)
@pytest.mark.parametrize("octets", [GET, FIVE + b"hello"], ids=["GET", "POST"])
def test_whatever_a_backend_answers_between_answers_that_are_the_same(tmp_path, octets, pieces, status, content, stays):
    with played(tmp_path) as play:
        for _ in range(2):
            for _ in range(2):
                assert play.exchange(octets).body == b"ok"
            play.client.sendall(octets)
            play.next_request()
            play.answer(*pieces)
            for _ in range(b"".join(pieces).count(b"HTTP/1.1 103 ")):
                assert read_lines(play.heard).startswith(b"HTTP/1.1 103 ")
            answer = read_response(play.heard)
            assert (answer.status, answer.body) == (status, content)
            assert ("X-Other" in answer.headers) == (status in (201, 404))
        again = play.exchange(octets, OTHER)
        assert (again.status, again.body, again.headers["X-Other"]) == (201, b"other", "1")
        assert play.connections == (1 if stays else 3)
    line = octets.partition(b"\r\n")[0].decode()
    assert exchanges(tmp_path) == [
        f'"{line}" {status} {octets_out} backend=1 code=-- tries=1'
        for status, octets_out in [*[(200, 2), (200, 2), (status, len(content))] * 2, (201, 5)]
    ]


def test_an_interim_answer_that_another_client_has_just_been_given_is_not_taken_for_a_final_one(tmp_path):
    """It has all that a final one would have, though a length has no business there (RFC 9110 section 8.6)."""
    told = threading.Event()

    def hint(connection: Connection) -> None:
        while connection.read_request():
            connection.send(dated(b"", status=b"103 Early Hints"))
            assert told.wait(PATIENCE)
            connection.send(dated())

    with fronting(tmp_path, hint) as (balancer, _), ExitStack() as stack:
        files = []
        for _ in range(2):
            sock = stack.enter_context(connect(balancer))
            files.append(stack.enter_context(sock.makefile("rb")))
            sock.sendall(GET)
            assert read_lines(files[-1]) == b"HTTP/1.1 103 Early Hints\r\nDate: today\r\n\r\n"
        told.set()
        assert [read_response(file).body for file in files] == [b"ok", b"ok"]
    assert exchanges(tmp_path) == [PLAIN_LINE] * 2


@pytest.mark.parametrize("before", [dated(), HINTS + dated()], ids=["", "after an interim answer"])
@pytest.mark.parametrize(("octets", "again"), [(GET, True), (FIVE + b"hello", False)], ids=["GET", "POST"])
def test_a_request_that_has_reached_a_backend_is_sent_again_only_if_it_may_be(tmp_path, octets, again, before):
    """RFC 9110 section 9.2.2: the backend takes it from a kept connection and closes without an answer."""
    with played(tmp_path) as play:
        play.exchange(octets, dated())
        play.client.sendall(octets)
        play.next_request()
        play.answer(before)
        if before.startswith(HINTS):
            assert read_lines(play.heard) == HINTS
        assert read_response(play.heard).body == b"ok"
        play.client.sendall(octets)
        assert play.next_request()
        hang_up(play.backend.sock)
        if again:
            assert play.next_request()
            play.answer(dated(b"again"))
        answer = read_response(play.heard)
        assert answer.status == (200 if again else 502)
        assert answer.body == b"again" or not again
        assert len(play.asked) == 3 + again
        assert play.balancer.pool.backends[0].tally.retries == again


@pytest.mark.parametrize("octets", [GET, FIVE + b"hello"], ids=["GET", "POST"])
@pytest.mark.parametrize("moment", ["before the request", "with the request", "before it is sent"])
def test_a_request_on_a_kept_connection_that_was_closed_meanwhile_reaches_the_backend_once(tmp_path, octets, moment):
    """Nothing of a POST may be sent where it could be lost: it goes out on a fresh connection, and once."""
    with played(tmp_path) as play:
        for _ in range(3):
            play.exchange(octets)

        def begin() -> None:
            if moment == "before the request":
                hang_up(play.backend.sock)
            play.client.sendall(octets)
            if moment == "with the request":
                hang_up(play.backend.sock)

        with play.held_within_a_batch(begin):
            if moment == "before it is sent":
                hang_up(play.backend.sock)
        play.accept()
        head, _, body = play.backend.read_request().partition(b"\r\n\r\n")
        assert octets.startswith(head.partition(b"\r\n")[0])
        assert octets.endswith(b"\r\n\r\n" + body)
        play.answer(dated(b"fresh"))
        assert read_response(play.heard).body == b"fresh"
        assert play.exchange(octets, dated(b"after")).body == b"after"
        assert (len(play.asked), play.connections) == (5, 2)
    line = octets.partition(b"\r\n")[0].decode()
    lines = [line.split(" id=")[0] for line in exchanges(tmp_path)]
    assert lines[:3] == [f'"{line}" 200 2 backend=1 code=-- tries=1'] * 3
    assert lines[3:] == [f'"{line}" 200 5 backend=1 code=-- tries=1'] * 2


def test_each_slow_exchange_has_a_name_and_the_connection_goes_on(tmp_path):
    """Whatever takes any time is slow here; the backend's name for one stands."""
    with played(tmp_path) as play:
        play.plain_ones()
        play.balancer.listener.front.slow = 0.0
        names = [play.exchange().headers["X-Request-Id"] for _ in range(4)]
        assert len(set(names)) == 4
        assert play.exchange(answer=dated(fields=b"X-Request-Id: mine\r\n")).headers.get_all("X-Request-Id") == ["mine"]
        play.balancer.listener.front.slow = NEVER
        play.plain_ones()
        assert play.connections == 1
    lines = [line for line in log_lines(tmp_path) if " code=--" in line]
    assert [line.partition(" id=")[2] for line in lines] == [*[""] * 3, *names, "mine", *[""] * 3]


LARGE = dated(bytes(60_000))


def fill_up(play: Play) -> int:
    """Ask until the client's connection takes no more of the answers, of which it reads none. How many it asked for?"""
    for number in range(1, 500):
        play.client.sendall(GET)
        assert play.next_request()
        with play.held():
            play.backend.send(LARGE)
        play.turn()
        if play.balancer.pumps.threads:
            return number
    pytest.fail("a connection that takes everything")


def test_a_client_that_takes_an_answer_late_gets_it_whole(tmp_path):
    """What its connection has no room for is a pump's to send; then all is as before."""
    with played(tmp_path) as play:
        play.plain_ones()
        count = fill_up(play)
        for _ in range(count):
            assert read_response(play.heard).body == bytes(60_000)
        play.plain_ones()
        assert play.connections == 1
    large = '"GET / HTTP/1.1" 200 60000 backend=1 code=-- tries=1'
    assert exchanges(tmp_path) == [PLAIN_LINE] * 3 + [large] * count + [PLAIN_LINE] * 3


def test_a_client_that_resets_while_an_answer_waits_for_it_costs_nobody_else_anything(tmp_path):
    with played(tmp_path) as play:
        play.plain_ones()
        count = fill_up(play)
        play.heard.close()
        reset(play.client)
        leases_come_back(play.balancer)
    lines = exchanges(tmp_path)
    assert len(lines) == 3 + count
    assert lines[-1].endswith("backend=1 code=CD tries=1")


CUT_AT = [("-", "CH"), ("200", "CD")]  # status and code of an exchange that the client has cut before and in its answer


@pytest.mark.parametrize("moment", ["before the answer", "with the answer", "before it is sent"])
def test_a_client_that_resets_at_the_moment_of_its_answer_gives_the_lease_back(tmp_path, moment):
    with played(tmp_path) as play:
        play.plain_ones()
        play.client.sendall(GET)
        play.next_request()
        play.heard.close()

        def begin() -> None:
            if moment == "before the answer":
                reset(play.client)
            play.backend.send(dated())
            if moment == "with the answer":
                reset(play.client)

        with play.held_within_a_batch(begin):
            if moment == "before it is sent":
                reset(play.client)
        leases_come_back(play.balancer)
        eventually(lambda: not play.balancer.listener.sessions, "no session")
    *before, last = exchanges(tmp_path)
    assert before == [PLAIN_LINE] * 3
    before_it, within_it = [f'"GET / HTTP/1.1" {told} 0 backend=1 code={code} tries=1' for told, code in CUT_AT]
    assert last == within_it or (last == before_it and moment != "before it is sent")


def test_a_request_that_comes_again_after_another_goes_where_it_went(tmp_path, three):
    """What the policy goes by is the request's own, even if the one between is none that is remembered."""

    def asked_by(user: int) -> bytes:
        head = b"POST /echo HTTP/1.1\r\nHost: x\r\nX-User: %d\r\n" % user
        if user % 2:
            return head + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
        return head + b"Content-Length: 5\r\n\r\nhello"

    with (
        running(tmp_path, at(*three), algorithm="hash", hash_on="header:X-User") as balancer,
        connect(balancer) as sock,
        sock.makefile("rb") as file,
    ):
        where: dict[int, str] = {}
        for first, second in itertools.permutations(range(8), 2):
            for user in (first, first, second, first):
                sock.sendall(asked_by(user))
                name = read_response(file).headers["X-Backend"]
                assert where.setdefault(user, name) == name
        assert len(set(where.values())) > 1


def test_the_times_of_an_exchange_are_its_own(tmp_path):
    """What a failed one never came to is null in the log, whatever the one before it came to."""
    log = {"file": str(tmp_path / "lb.log"), "format": "json"}
    with FakeBackend([dated(), b"", dated()]) as fake, running(tmp_path, at(fake), log=log, **QUIET) as balancer:
        settled(balancer)
        for octets in (FIVE + b"hello", b"NOTHING\r\n\r\n"):
            with connect(balancer) as sock, sock.makefile("rb") as file:
                sock.sendall(GET)
                assert read_response(file).body == b"ok"
                sock.sendall(octets)
                assert read_response(file).status >= 400
    found = [json.loads(line) for line in log_lines(tmp_path) if '"code"' in line]
    times = [[each[name] is not None for name in ("head_ms", "queue_ms", "connect_ms", "answer_ms")] for each in found]
    assert [each["code"] for each in found] == ["--", "SH", "--", "PR"]
    assert times[0] == times[2] == [True] * 4
    assert times[1] == [True, True, True, False]
    assert times[3] == [False] * 4


# Many requests, many connections ----------------------------------------------------------------------------------


def test_pipelined_requests_are_answered_in_order(tmp_path, three):
    """RFC 9112 section 9.3.2: three backends of different speed take turns, and the answers keep their places."""
    three[0].delay = 0.02
    requests = [b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n%02d" % number for number in range(30)]
    with running(tmp_path, at(*three)) as balancer, connect(balancer) as sock, sock.makefile("rb") as file:
        sock.sendall(b"".join(requests))
        answers = [read_response(file) for _ in requests]
    assert [int(answer.body) for answer in answers] == list(range(30))
    assert [answer.headers["X-Backend"] for answer in answers] == ["1", "2", "3"] * 10


def test_thousands_of_pipelined_requests_are_answered(tmp_path):
    """More than may be taken in at once, and more than there are levels of recursion."""
    count = 5000
    with (
        fronting(tmp_path, OK) as (balancer, fake),
        ThreadPoolExecutor(1) as sender,
        connect(balancer) as sock,
        sock.makefile("rb") as file,
    ):
        sent = sender.submit(sock.sendall, GET * count)
        for _ in range(count):
            assert read_lines(file).startswith(b"HTTP/1.1 200 OK\r\n")
            assert file.read(2) == b"ok"
        sent.result(PATIENCE)
    assert len(fake.requests) == count


def test_thousands_of_pipelined_requests_are_refused_one_by_one(tmp_path, refusing):
    """Nothing waits for a backend here, so each answer could begin the next request within its own call."""
    count = 5000
    dead = refusing()
    dead.close()
    with (
        running(tmp_path, at(dead), **QUIET) as balancer,
        ThreadPoolExecutor(1) as sender,
        connect(balancer) as sock,
        sock.makefile("rb") as file,
    ):
        settled(balancer)
        sent = sender.submit(sock.sendall, GET * count)
        assert {read_response(file).status for _ in range(count)} == {503}
        sent.result(PATIENCE)


def test_2000_idle_connections_hold_no_thread_and_new_requests_are_served_beside_them(tmp_path, three):
    count = 2000
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < 2 * count + 500:
        pytest.skip(f"only {hard} descriptors are allowed here")
    with running(tmp_path, at(*three)) as balancer, ExitStack() as stack:  # which has raised the soft limit
        with client(balancer) as connection:
            ask(connection)
        eventually(lambda: not balancer.listener.sessions, "no session")
        before = threading.active_count()
        for _ in range(count):
            sock = stack.enter_context(connect(balancer))
            sock.sendall(GET)
            assert sock.recv(4096).startswith(b"HTTP/1.1 200 ")
        assert len(balancer.listener.sessions) == count
        backends_threads = sum(len(backend.connections) for backend in three)  # backend_server has one for each
        assert threading.active_count() <= before + backends_threads
        assert balancer.pumps.threads == 0
        with client(balancer) as connection:
            assert [ask(connection).status for _ in range(10)] == [200] * 10


def test_the_cap_on_connections_makes_clients_wait_and_loses_none(tmp_path, three):
    with running(tmp_path, at(*three), limits={"connections": 2}) as balancer, ExitStack() as stack:
        first, second, third = [stack.enter_context(connect(balancer)) for _ in range(3)]
        for sock in (first, second, third):
            sock.sendall(GET)
        assert [read_response(sock).status for sock in (first, second)] == [200, 200]
        assert len(balancer.listener.sessions) == 2
        first.close()
        assert read_response(third).status == 200


def test_trailers_and_chunk_extensions_go_no_further(tmp_path):
    with fronting(tmp_path, OK) as (balancer, fake):
        body = b"3;name=value\r\nabc\r\n0\r\nX-Trailer: 1\r\n\r\n"
        head = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nTrailer: X-Trailer\r\n\r\n"
        assert ask_once(balancer, head + body).status == 200
    head, _, chunks = fake.requests[0].partition(b"\r\n\r\n")
    assert chunks == b"3\r\nabc\r\n0\r\n\r\n"
    assert b"railer" not in head
