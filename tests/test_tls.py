"""TLS through a running balancer, towards clients, towards backends and on both sides at once: what each of these does
in the clear it does encrypted, and what only TLS has goes as its users and its attackers have it.

The certificates are those of tests/data/certificates. Connections are real; the balancer is one within the test, or a
program where files and signals are what matters.
"""

from __future__ import annotations

import gc
import http.client
import io
import json
import os
import re
import select
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pytest

from backend_server import BINARY, CLOSE, Backend, frame, mask, pattern, serving
from balancer import reload, upstream
from balancer.balancer import HANDSHAKE_THREADS, HANDSHAKES, LoadBalancer
from balancer.config import Config, load
from balancer.handshake import Handshake
from balancer.http_session import HttpSession
from balancer.stream import TlsStream
from balancing import connect, log_lines, running
from conftest import PATIENCE, eventually
from fakes import Answer, Connection, FakeBackend, hang_up, read_response
from lb import main
from mixture import KINDS, UPGRADE, Caller, UnrulyBackend
from programs import LB, Program, free_ports, run, started, write_settings
from tls_storm import Bystanders, Storm, client_hello

DATA = Path(__file__).resolve().parent / "data" / "certificates"
ROOT_CA = str(DATA / "root.pem")
TLS_1_2, TLS_1_3 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with a reset
GET = b"GET / HTTP/1.1\r\nHost: lb.test\r\n\r\n"
LAST = b"GET / HTTP/1.1\r\nHost: lb.test\r\nConnection: close\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"  # where Debian keeps nginx
KEY = b"\x37\xfa\x21\x3d"
ONE_PROBE = {"type": "tcp", "interval": 1000}  # at the start, and it asks for nothing
MEGABYTE = 1024 * 1024
LONG = 6 * MEGABYTE
NOT_KNOWN = "unable to get local issuer certificate"


# Keys, clients and backends ---------------------------------------------------------------------------------------


def pair(name: str, key: str = "ec") -> dict[str, str]:
    return {"cert": str(DATA / f"{name}.pem"), "key": str(DATA / f"{key}.key")}


def tls(*pairs: dict[str, str], **keys: Any) -> dict[str, Any]:
    """The key "tls" of servers.json, with the certificate of localhost unless another is named."""
    return {"certificates": list(pairs or [pair("local")]), **keys}


def trusting(**settings: Any) -> ssl.SSLContext:
    """A client that verifies, as all should."""
    context = ssl.create_default_context(cafile=ROOT_CA)
    for name, value in settings.items():
        setattr(context, name, value)
    return context


def secure(
    balancer: LoadBalancer | Program,
    name: str | None = "localhost",
    context: ssl.SSLContext | None = None,
    session: ssl.SSLSession | None = None,
) -> ssl.SSLSocket:
    """A client's connection. An end of it without close_notify is an SSLEOFError there."""
    sock = socket.create_connection(("127.0.0.1", balancer.port), timeout=PATIENCE)
    return (context or trusting()).wrap_socket(sock, server_hostname=name, session=session, suppress_ragged_eofs=False)


def ask(sock: socket.socket, octets: bytes = GET) -> Answer:
    sock.sendall(octets)
    return read_response(sock, octets.partition(b" ")[0].decode())


def ask_once(balancer: LoadBalancer | Program, octets: bytes = GET) -> Answer:
    """The answer to a request on a connection of its own."""
    with secure(balancer) as sock:
        return ask(sock, octets)


def shown(balancer: LoadBalancer | Program, name: str | None = "localhost") -> str:
    """The common name in the certificate that a client is shown which asks for that host."""
    context = trusting(check_hostname=False)
    with secure(balancer, name, context) as sock:
        subject = (sock.getpeercert() or {})["subject"]
    return dict(item for part in subject for item in part)["commonName"]


def read_to_the_end(sock: socket.socket) -> bytes:
    """Up to an orderly end: in TLS that is a close_notify."""
    received = bytearray()
    while piece := sock.recv(MEGABYTE):
        received += piece
    return bytes(received)


class Duplex:
    """An end that sends and receives at the same time and half-closes, for which an ssl.SSLSocket is not made.

    Without a context it is one that speaks in the clear.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext | None, *, server_side: bool = False) -> None:
        self.sock = sock
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._received = bytearray()
        self._ended = False
        self._tls: ssl.SSLObject | None = None
        if context is not None:
            name = None if server_side else "localhost"
            self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side, name)
            self._shake_hands(self._tls)

    def __enter__(self) -> Duplex:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def _shake_hands(self, tls: ssl.SSLObject) -> None:
        complete = False
        while not complete:
            try:
                tls.do_handshake()
                complete = True
            except ssl.SSLWantReadError:
                self.sock.sendall(self._outgoing.read())
                self._incoming.write(self.sock.recv(65536))
        self.sock.sendall(self._outgoing.read())
        self._decrypt(tls)

    def _take(self) -> None:
        """Wait for something, and decrypt all that it yields."""
        data = self.sock.recv(65536)
        if self._tls is None:
            self._received += data
            self._ended = not data
            return
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()
        self._decrypt(self._tls)

    def _decrypt(self, tls: ssl.SSLObject) -> None:
        try:
            while piece := tls.read(65536):
                self._received += piece
            self._ended = True
        except ssl.SSLWantReadError:
            return
        except ssl.SSLZeroReturnError:
            self._ended = True

    def _encrypted(self, data: bytes | memoryview) -> bytes:
        if self._tls is None:
            return bytes(data)
        self._tls.write(data)
        return self._outgoing.read()

    def send(self, data: bytes) -> None:
        self.sock.sendall(self._encrypted(data))

    def finish(self) -> None:
        """Send nothing more."""
        if self._tls is None:
            self.sock.shutdown(socket.SHUT_WR)
            return
        with suppress(ssl.SSLWantReadError):  # for the other side's close_notify, which may be long in coming
            self._tls.unwrap()
        self.sock.sendall(self._outgoing.read())

    def receive(self) -> bytes:
        """What there is next, b"" at an orderly end."""
        while not self._received and not self._ended:
            self._take()
        received = bytes(self._received)
        self._received.clear()
        return received

    def receive_all(self) -> bytes:
        """All up to an orderly end."""
        while not self._ended:
            self._take()
        return self.receive()

    def swap(self, data: bytes, *, finish: bool = False) -> bytes:
        """Send all of it, take what comes meanwhile, half-close if told to, and take the rest up to the end."""
        rest = memoryview(data)
        unsent = b""
        while rest or unsent:
            readable, writable, _ = select.select([self.sock], [self.sock], [], PATIENCE)
            assert readable or writable, f"it moves no more with {len(rest)} octets to send"
            if readable:
                self._take()
            if writable and not unsent:
                unsent, rest = self._encrypted(rest[:16384]), rest[16384:]
            if writable:
                with suppress(BlockingIOError):
                    unsent = unsent[self.sock.send(unsent, socket.MSG_DONTWAIT) :]
        if finish:
            self.finish()
        return self.receive_all()


def identity(name: str = "local", key: str = "ec", **settings: Any) -> ssl.SSLContext:
    """A backend's."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*pair(name, key).values())
    for setting, value in settings.items():
        setattr(context, setting, value)
    return context


def encrypted(
    handler: Callable[[Connection], object], context: ssl.SSLContext, *, clean: bool = True
) -> Callable[[Connection], None]:
    """What makes a FakeBackend speak TLS. `clean`: it says goodbye by close_notify."""

    def serve(connection: Connection) -> None:
        # A duplicate, so that the fake still has something to hang up on.
        with context.wrap_socket(connection.sock.dup(), server_side=True) as sock, sock.makefile("rb") as file:
            connection.sock, connection.file = sock, file
            handler(connection)
            if clean:
                say_goodbye(sock)

    return serve


def say_goodbye(sock: ssl.SSLSocket) -> None:
    """Send close_notify; whether one is answered is of no interest."""
    sock.settimeout(PATIENCE)
    with suppress(OSError, ValueError):
        sock.unwrap()


def answering(*answers: bytes) -> Callable[[Connection], None]:
    """A handler that gives these answers in turn on each connection, the last for ever; b"" hangs up."""

    def serve(connection: Connection) -> None:
        left = list(answers)
        while connection.read_request() and (answer := left.pop(0) if len(left) > 1 else left[0]):
            connection.send(answer)

    return serve


class TlsBackend(Backend):
    """backend_server.py behind TLS, which it does not speak itself."""

    def __init__(self, context: ssl.SSLContext, **keys: Any) -> None:
        super().__init__(**keys)
        self._context = context
        self.handshakes = 0  # begun, each by a single operation
        if not keys.get("tcp"):
            self.RequestHandlerClass = UnrulyBackend

    def get_request(self) -> tuple[socket.socket, Any]:
        sock, address = super().get_request()
        self.handshakes += 1
        return self._context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False), address

    def finish_request(self, request: Any, client_address: Any) -> None:
        request.do_handshake()
        super().finish_request(request, client_address)
        say_goodbye(request)


class Way(NamedTuple):
    """Where TLS is spoken."""

    clients: bool
    backends: bool

    def fake(self, handler: Callable[[Connection], object], *, clean: bool = True) -> FakeBackend:
        return FakeBackend(encrypted(handler, identity(), clean=clean) if self.backends else handler)

    def backend(self, **keys: Any) -> Backend:
        if self.backends:
            return TlsBackend(identity(), **keys)
        plain = Backend(**keys)
        if not keys.get("tcp"):
            plain.RequestHandlerClass = UnrulyBackend
        return plain

    @contextmanager
    def balancing(self, tmp_path: Path, *backends: Backend | FakeBackend, **keys: Any) -> Iterator[LoadBalancer]:
        servers = [
            {"host": "127.0.0.1", "port": backend.port, **({"tls": {"ca": ROOT_CA}} if self.backends else {})}
            for backend in backends
        ]
        settings = {"health_check": ONE_PROBE, **({"tls": tls()} if self.clients else {}), **keys}
        with running(tmp_path, servers, **settings) as balancer:
            probed(balancer)
            yield balancer
            eventually(lambda: not any(backend.active for backend in balancer.pool.backends), "every lease given back")

    def connect(self, balancer: LoadBalancer) -> socket.socket:
        return secure(balancer) if self.clients else connect(balancer)

    def duplex(self, balancer: LoadBalancer) -> Duplex:
        return Duplex(connect(balancer), trusting() if self.clients else None)


TO_CLIENTS, TO_BACKENDS, BOTH = WAYS = Way(True, False), Way(False, True), Way(True, True)
each_way = pytest.mark.parametrize("way", WAYS, ids=["to clients", "to backends", "both"])


@contextmanager
def terminating(tmp_path: Path, handler: Callable[[Connection], object], **keys: Any) -> Iterator[LoadBalancer]:
    """A balancer that speaks TLS to clients, before one backend that does not."""
    with FakeBackend(handler) as fake, TO_CLIENTS.balancing(tmp_path, fake, **keys) as balancer:
        yield balancer


def probed(balancer: LoadBalancer) -> None:
    eventually(lambda: all(backend.probed for backend in balancer.pool.backends), "the first probes")


def lines(tmp_path: Path, log: str = "lb.log") -> list[str]:
    """The log's lines about requests and connections, without times and names that differ with each run."""
    return [
        re.sub(r"^\S+ \S+ \S+ 127\.0\.0\.1:\d+ | [\d.]+ms| id=\S+", "", line)
        for line in (tmp_path / log).read_text().splitlines()
        if " code=" in line
    ]


def parsed(octets: bytes) -> Answer:
    """An answer that was received whole."""
    return read_response(io.BufferedReader(io.BytesIO(octets)))  # type: ignore[arg-type]


def checksum(data: bytes) -> str:
    return sha256(data).hexdigest()


# Whatever is asked for --------------------------------------------------------------------------------------------


class SecureCaller(Caller):
    """As the client of the mixture, by TLS."""

    def __init__(self, balancer: LoadBalancer) -> None:
        super().__init__((balancer.host, balancer.port))
        self._context = trusting()

    @property
    def sock(self) -> socket.socket:
        if self._sock is None:
            self._sock = self._context.wrap_socket(
                socket.create_connection(self._address, timeout=PATIENCE), server_hostname="localhost"
            )
            self.file = self._sock.makefile("rb")
        return self._sock


@each_way
def test_every_kind_of_exchange_goes_as_it_does_in_the_clear(tmp_path, way):
    """Small and long bodies either way, both framings, pipelines, 100 Continue, HEAD, 304, WebSocket, cuts."""
    names = [name for name in sorted(KINDS) if not (way.clients and name == "head that ends")]  # see Duplex
    with (
        serving(way.backend()) as one,
        serving(way.backend()) as other,
        way.balancing(tmp_path, one, other) as balancer,
    ):
        caller = SecureCaller(balancer) if way.clients else Caller((balancer.host, balancer.port))
        assert [name for name in names if not KINDS[name](caller)] == []
        Random(5).shuffle(names)
        assert [name for name in names if not KINDS[name](caller)] == []
        caller.leave()
    assert " IH " not in "".join(lines(tmp_path))


@pytest.mark.parametrize("version", [TLS_1_2, TLS_1_3], ids=["1.2", "1.3"])
def test_a_connection_is_kept_for_many_requests_and_used_ahead_of_the_answers(tmp_path, version):
    with terminating(tmp_path, answering(OK)) as balancer:
        context = trusting(minimum_version=version, maximum_version=version)
        with secure(balancer, context=context) as sock, sock.makefile("rb") as file:
            assert sock.version() == ("TLSv1.2" if version == TLS_1_2 else "TLSv1.3")
            for _ in range(20):
                assert ask(sock).body == b"ok"
            sock.sendall(GET * 20)
            assert [read_response(file).body for _ in range(20)] == [b"ok"] * 20
        assert balancer.listener.accepted == 1


@each_way
@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_a_long_body_goes_both_ways_at_once_unchanged(tmp_path, way, chunked):
    content = Random(7).randbytes(LONG)
    framing = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {LONG}"
    body = content
    if chunked:
        pieces = [content[start : start + 100_000] for start in range(0, LONG, 100_000)]
        body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    head = f"POST /echo HTTP/1.1\r\nHost: lb.test\r\nConnection: close\r\n{framing}\r\n\r\n".encode()
    with (
        serving(way.backend()) as backend,
        way.balancing(tmp_path, backend) as balancer,
        way.duplex(balancer) as client,
    ):
        received = client.swap(head + body)
    answer = parsed(received)
    assert (answer.status, len(answer.body)) == (200, LONG)
    assert checksum(answer.body) == checksum(content)
    assert lines(tmp_path) == [f'"POST /echo HTTP/1.1" 200 {LONG} backend=1 code=-- tries=1']


@each_way
def test_frames_of_a_websocket_cross_each_other_unchanged(tmp_path, way):
    """Whole ones and parts, from two octets to 100,000, then each side's Close and an orderly end."""
    dice = Random(3)
    messages = [dice.randbytes(size) for size in [1, 125, 126, 65535, 65536, 100_000] * 5]
    sent = b"".join(masked(BINARY, message) for message in messages) + masked(CLOSE, b"\x03\xe8")
    echoed = b"".join(frame(BINARY, message) for message in messages) + frame(CLOSE, b"\x03\xe8")
    with (
        serving(way.backend()) as backend,
        way.balancing(tmp_path, backend) as balancer,
        way.duplex(balancer) as client,
    ):
        client.send(UPGRADE)
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += client.receive()
        assert head.startswith(b"HTTP/1.1 101 ")
        assert client.swap(sent, finish=True) == echoed
    assert [line.split()[-2:] for line in lines(tmp_path)] == [["code=--", "tries=1"]]


def masked(opcode: int, payload: bytes) -> bytes:
    """A client's frame."""
    head = frame(opcode, payload)[: -len(payload)]
    return bytes([head[0], head[1] | 0x80]) + head[2:] + KEY + mask(payload, KEY)


@each_way
def test_events_reach_the_client_one_by_one(tmp_path, way):
    """Each is sent when the one before it was received."""
    turn = threading.Semaphore(0)

    def events(connection: Connection) -> None:
        if not connection.read_request():
            return
        connection.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
        for number in range(5):
            assert turn.acquire(timeout=PATIENCE)
            connection.send(b"data: %d\n\n" % number)

    with (
        way.fake(events) as fake,
        way.balancing(tmp_path, fake) as balancer,
        way.connect(balancer) as sock,
        closing(http.client.HTTPResponse(sock)) as answer,
    ):
        sock.sendall(GET)
        answer.begin()
        for number in range(5):
            turn.release()
            assert answer.readline() + answer.readline() == b"data: %d\n\n" % number
        assert answer.read() == b""


# Where an answer ends ---------------------------------------------------------------------------------------------


@each_way
@pytest.mark.parametrize("size", [10, 2 * MEGABYTE])
def test_an_answer_that_ends_with_the_backends_goodbye_is_complete(tmp_path, way, size):
    content = Random(size).randbytes(size)

    def until_close(connection: Connection) -> None:
        if connection.read_request():
            connection.send(b"HTTP/1.1 200 OK\r\n\r\n" + content)

    with way.fake(until_close) as fake, way.balancing(tmp_path, fake) as balancer:
        with way.connect(balancer) as sock:
            for _ in range(2):
                answer = ask(sock)
                assert (answer.headers["Transfer-Encoding"], answer.body) == ("chunked", content)
        with way.connect(balancer) as sock:
            sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert read_to_the_end(sock).partition(b"\r\n\r\n")[2] == content
    assert [line.split("code=")[1] for line in lines(tmp_path)] == ["-- tries=1"] * 3


@pytest.mark.parametrize("way", [TO_BACKENDS, BOTH], ids=["to backends", "both"])
@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
@pytest.mark.parametrize("size", [10, 2 * MEGABYTE])
def test_an_answer_that_ends_without_a_goodbye_is_cut_for_the_client_too(tmp_path, way, version, size):
    """RFC 8446 section 6.1, RFC 9112 section 9.8: somebody may have cut it, and nobody may take it for whole."""

    def truncate(connection: Connection) -> None:
        if connection.read_request():
            connection.send(b"HTTP/1.1 200 OK\r\n\r\n" + bytes(size))

    read = read_response if version == b"1.1" else read_to_the_end
    with (
        way.fake(truncate, clean=False) as fake,
        way.balancing(tmp_path, fake) as balancer,
        way.connect(balancer) as sock,
    ):
        sock.sendall(b"GET / HTTP/%b\r\nHost: lb.test\r\n\r\n" % version)
        with pytest.raises((OSError, http.client.IncompleteRead)):
            read(sock)
    assert [re.findall(r"code=\S\S", line) for line in lines(tmp_path)] == [["code=SD"]]


# TCP mode ---------------------------------------------------------------------------------------------------------


@each_way
def test_in_tcp_mode_a_long_stream_comes_back_unchanged_after_a_half_close(tmp_path, way):
    content = Random(11).randbytes(LONG)
    with (
        serving(way.backend(tcp=True)) as echo,
        way.balancing(tmp_path, echo, mode="tcp") as balancer,
        way.duplex(balancer) as client,
    ):
        assert checksum(client.swap(content, finish=True)) == checksum(content)
    assert lines(tmp_path) == [f"tcp {LONG}/{LONG} backend=1 code=-- tries=1"]


@each_way
@pytest.mark.parametrize("first", ["client", "backend"])
def test_in_tcp_mode_either_side_may_end_first_and_still_be_spoken_to(tmp_path, way, first):
    """close_notify is for one direction (RFC 8446 section 6.1), and becomes a half-close in the clear, and back."""
    heard = []

    def play(end: Duplex, begins: bool) -> None:
        if begins:
            end.send(b"the last words")
            end.finish()
        if received := end.receive_all():  # a probe says nothing
            heard.append(received)
        if not begins:
            end.send(b"an answer to them")
            end.finish()

    def serve(connection: Connection) -> None:
        play(Duplex(connection.sock, identity() if way.backends else None, server_side=True), first == "backend")

    with (
        FakeBackend(serve) as fake,
        way.balancing(tmp_path, fake, mode="tcp") as balancer,
        way.duplex(balancer) as client,
    ):
        play(client, first == "client")
    assert sorted(heard) == [b"an answer to them", b"the last words"]


def test_in_tcp_mode_a_client_that_is_cut_off_is_not_taken_for_one_that_ended(tmp_path):
    """What the backend has received may not be all, so it sees a reset, where a whole stream ends in peace."""
    ends: list[tuple[bytes, str]] = []

    def serve(connection: Connection) -> None:
        connection.send(b"go ahead")
        received, end = b"", "in peace"
        try:
            while piece := connection.sock.recv(100):
                received += piece
        except ConnectionResetError:
            end = "reset"
        ends.append((received, end))

    with terminating(tmp_path, serve, mode="tcp") as balancer, TO_CLIENTS.duplex(balancer) as client:
        assert client.receive() == b"go ahead"
        client.send(b"half of wh")
        client.sock.shutdown(socket.SHUT_WR)
        with pytest.raises(OSError):
            client.receive_all()
    assert [line.split()[3] for line in lines(tmp_path)] == ["code=CD"]
    assert [end for received, end in ends if received] == ["reset"]


def test_in_tcp_mode_a_backend_that_is_cut_off_is_not_taken_for_one_that_ended(tmp_path):
    def serve(connection: Connection) -> None:
        connection.send(b"half of wh")

    with (
        TO_BACKENDS.fake(serve, clean=False) as fake,
        TO_BACKENDS.balancing(tmp_path, fake, mode="tcp") as balancer,
        connect(balancer) as client,
        pytest.raises(ConnectionResetError),
    ):
        read_to_the_end(client)
    assert [line.split()[3] for line in lines(tmp_path)] == ["code=SD"]


# What comes to a TLS port -----------------------------------------------------------------------------------------


def test_plain_http_on_the_tls_port_is_told_so_in_plain_http(tmp_path):
    with terminating(tmp_path, answering(OK)) as balancer:
        for octets in [GET, b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n" + bytes(100_000), b"G"]:
            with connect(balancer) as sock:
                sock.sendall(octets)
                answer = read_response(sock)
                assert (answer.status, answer.headers["Connection"]) == (400, "close")
                assert b"https" in answer.body
        assert ask_once(balancer).body == b"ok"
    told = [re.findall(r"400 .* code=\S\S", line) for line in lines(tmp_path)]
    assert told == [["400 112 backend=- code=PR"]] * 3 + [[]]


@pytest.mark.parametrize("mode", ["http", "tcp"])
@pytest.mark.parametrize(
    "octets",
    [
        bytes(100),
        b"\x16\x03\x01\x00\x05hello",
        b"\x16\x03\x01\xff\xff" + bytes(70000),
        b"\x80\x2e\x01\x00\x02" + bytes(43),
    ],
    ids=["zeros", "no hello", "record too long", "SSL 2"],
)
def test_what_is_no_tls_is_hung_up_on_and_logged(tmp_path, mode, octets):
    with terminating(tmp_path, answering(OK), mode=mode) as balancer:
        with connect(balancer) as sock, suppress(OSError):
            sock.sendall(octets)
            read_to_the_end(sock)
        eventually(lambda: not balancer.listener.sessions)
        with TO_CLIENTS.duplex(balancer) as client:
            assert client.swap(LAST, finish=True).endswith(b"\r\n\r\nok")
    assert [re.findall(r"code=\S\S", line) for line in lines(tmp_path)] == [["code=PR"], ["code=--"]]


def test_a_handshake_has_its_time_and_a_silent_connection_leaves_no_line(tmp_path):
    hello = client_hello()
    with terminating(tmp_path, answering(OK), timeouts={"handshake": 0.2}) as balancer:
        with ExitStack() as stack:
            for octets in [b"", hello[:1], hello[:-1], hello]:
                stack.enter_context(connect(balancer)).sendall(octets)
            eventually(lambda: balancer.listener.accepted == 4)
            eventually(lambda: not balancer.listener.sessions, "all of them closed")
        assert ask_once(balancer).body == b"ok"
    assert len(lines(tmp_path)) == 4  # of the three that said something, and of the request


def test_handshakes_that_are_left_half_way_keep_nobody_out(tmp_path):
    """However many there are: they wait for their clients, not for us, and others need not wait with them."""
    hello = client_hello()
    patience = {"handshake": 2 * PATIENCE}
    with terminating(tmp_path, answering(OK), timeouts=patience) as balancer, ExitStack() as stack:
        for _ in range(HANDSHAKES + 50):
            stack.enter_context(connect(balancer)).sendall(hello)
        assert ask_once(balancer).body == b"ok"


def test_a_storm_of_handshakes_harms_nobody_and_leaves_nothing(tmp_path, monkeypatch):
    """A small one of those that tests/tls_storm.py makes; what it costs in time is measured there."""
    monkeypatch.setattr(upstream, "KEEP_IDLE", 0.1)
    with serving(Backend()) as backend, TO_CLIENTS.balancing(tmp_path, backend) as balancer:
        with Bystanders(balancer.port, 4) as bystanders, Storm(balancer.port, 300, 500, bad=True, silent=50) as storm:
            storm.blow()
        seen = bystanders.seen
        assert (storm.good.failed, seen.failed) == (Counter(), Counter())
        assert len(storm.good.latencies) == 200
        assert seen.latencies
        eventually(lambda: not balancer.listener.sessions, "everybody has gone")
        eventually(lambda: len(balancer.reactor.timed) == 1, "nothing but the listener has a deadline")
        del storm, bystanders
        balancer.reactor.wake()  # its loop still holds whom it called last
        eventually(lambda: in_memory(TlsStream, HttpSession) == 0, "no connection in memory")
        assert in_memory(Handshake) <= HANDSHAKE_THREADS  # each of which holds its last one


def in_memory(*kinds: type) -> int:
    return sum(isinstance(thing, kinds) for thing in gc.get_objects())


def test_the_backend_is_told_that_the_client_came_by_https(tmp_path):
    told = b"GET / HTTP/1.1\r\nHost: lb.test\r\nX-Forwarded-Proto: http\r\nX-Forwarded-Port: 80\r\n\r\n"
    with FakeBackend(OK) as fake, TO_CLIENTS.balancing(tmp_path, fake, forwarded=True) as balancer:
        assert ask_once(balancer, told).body == b"ok"
        fields = fake.requests[-1].decode().lower().split("\r\n")
        assert [field for field in fields if field.startswith("x-forwarded-p")] == [
            "x-forwarded-proto: https",
            f"x-forwarded-port: {balancer.port}",
        ]
        assert any("proto=https" in field for field in fields if field.startswith("forwarded:"))


def test_the_proxy_protocol_stands_before_tls_on_either_side(tmp_path):
    """The header names the client; it is taken to the octet, and the backend is told by one before its handshake."""
    peers = []

    def serve(connection: Connection) -> None:
        line = b""
        while not line.endswith(b"\n"):
            line += connection.sock.recv(1)
        peers.append(line)
        encrypted(answering(OK), identity())(connection)

    with FakeBackend(serve) as fake:
        server = {"host": "127.0.0.1", "port": fake.port, "tls": {"ca": ROOT_CA}, "send_proxy": "v1"}
        keys: dict[str, Any] = {"health_check": ONE_PROBE, "tls": tls(), "proxy_protocol_from": ["127.0.0.0/8"]}
        with running(tmp_path, [server], **keys) as balancer:
            probed(balancer)
            with connect(balancer) as sock:
                sock.sendall(b"PROXY TCP4 192.0.2.7 192.0.2.1 4711 443\r\n")
                with trusting().wrap_socket(sock, server_hostname="localhost") as client:
                    assert ask(client).body == b"ok"
    assert peers[0].startswith(b"PROXY UNKNOWN")
    assert peers[1].startswith(b"PROXY TCP4 192.0.2.7 ")
    assert b"X-Forwarded-For: 192.0.2.7\r\n" in fake.requests[-1]


# Plain HTTP that is sent to https ---------------------------------------------------------------------------------


def test_a_second_listener_sends_clients_of_plain_http_to_https(tmp_path):
    """308 keeps the method and the body (RFC 9110 section 15.4.9). The port is that where TLS is."""
    port = free_ports(1)[0]
    settings = tls(redirect_from=f"127.0.0.1:{port}")
    with FakeBackend(OK) as fake, TO_CLIENTS.balancing(tmp_path, fake, tls=settings) as balancer:
        for line, fields, place in [
            (b"GET /a?b=c%20d HTTP/1.1", b"Host: site.test", "site.test:{}/a?b=c%20d"),
            (b"HEAD / HTTP/1.1", b"Host: site.test:8080", "site.test:{}/"),
            (b"POST /form HTTP/1.1", b"Content-Length: 0\r\nHost: [::1]", "[::1]:{}/form"),
            (b"GET / HTTP/1.1", b"Host: [2001:db8::1]:8080", "[2001:db8::1]:{}/"),
        ]:
            with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as sock:
                answer = ask(sock, line + b"\r\n" + fields + b"\r\n\r\n")
                assert answer.status == 308
                assert answer.headers["Location"] == "https://" + place.format(balancer.port)
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as sock:
            sock.sendall(b"PUT / HTTP/1.1\r\nHost: site.test\r\nContent-Length: 1000000\r\n\r\n" + bytes(1_000_000))
            assert read_response(sock).status == 308
        assert fake.requests == []


# Which certificate, and which version -----------------------------------------------------------------------------


def test_the_name_that_a_client_asks_for_chooses_the_certificate(tmp_path):
    with terminating(tmp_path, answering(OK), tls=tls(pair("local"), pair("site"), pair("wildcard"))) as balancer:
        asked = ["localhost", "www.site.test", "a.wild.test", "unknown.test", None]
        assert [shown(balancer, name) for name in asked] == ["local", "site.test", "wild.test", "local", "local"]
        with secure(balancer, "www.site.test") as sock:  # whose name is verified
            assert ask(sock).body == b"ok"


@pytest.mark.parametrize(
    ("offered", "chosen"), [(["h2", "http/1.1"], "http/1.1"), (["http/1.1"], "http/1.1"), (["h2"], None), ([], None)]
)
def test_http_1_1_is_chosen_by_alpn(tmp_path, offered, chosen):
    context = trusting()
    if offered:
        context.set_alpn_protocols(offered)
    with terminating(tmp_path, answering(OK)) as balancer, secure(balancer, context=context) as sock:
        assert sock.selected_alpn_protocol() == chosen
        assert ask(sock).body == b"ok"


@pytest.mark.parametrize("version", [TLS_1_2, TLS_1_3], ids=["1.2", "1.3"])
def test_a_client_resumes_its_session_on_another_connection(tmp_path, version):
    context = trusting(minimum_version=version, maximum_version=version)
    with terminating(tmp_path, answering(OK)) as balancer:
        with secure(balancer, context=context) as sock:
            ask(sock)
            assert not sock.session_reused
            session = sock.session
        for _ in range(3):
            with secure(balancer, context=context, session=session) as sock:
                assert sock.session_reused
                assert ask(sock).body == b"ok"


def test_min_version_1_3_keeps_out_what_speaks_1_2(tmp_path):
    with terminating(tmp_path, answering(OK), tls=tls(min_version="1.3")) as balancer:
        with pytest.raises(ssl.SSLError, match="ALERT_PROTOCOL_VERSION"):
            secure(balancer, context=trusting(maximum_version=TLS_1_2))
        assert ask_once(balancer).body == b"ok"


# Other people's programs ------------------------------------------------------------------------------------------


def program(name: str) -> Any:
    return pytest.mark.skipif(shutil.which(name, path=PATH) is None, reason=f"no {name} here")


@program("curl")
@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_curl_downloads_and_uploads(tmp_path, version):
    source = tmp_path / "source"
    source.write_bytes(Random(1).randbytes(LONG))
    with serving(Backend()) as backend, TO_CLIENTS.balancing(tmp_path, backend) as balancer:
        url = f"https://localhost:{balancer.port}"
        words = ["curl", "-sS", "--fail", "--cacert", ROOT_CA, f"--tlsv{version}", "--tls-max", version]
        words += ["--max-time", str(PATIENCE), "--resolve", f"localhost:{balancer.port}:127.0.0.1"]
        down = subprocess.run([*words, f"{url}/bytes/{LONG}", f"{url}/bytes/7"], capture_output=True, check=True).stdout
        up = subprocess.run([*words, "-T", source, f"{url}/sink"], capture_output=True, check=True).stdout
    assert checksum(down) == checksum(b"".join((*pattern(LONG), *pattern(7))))
    assert json.loads(up)["sha256"] == checksum(source.read_bytes())


def s_client(balancer: LoadBalancer, *words: str, request: bytes = b"") -> str:
    """What `openssl s_client` says of a connection, and what it received."""
    place = f"127.0.0.1:{balancer.port}"
    found = subprocess.run(
        ["openssl", "s_client", "-connect", place, "-CAfile", ROOT_CA, "-servername", "localhost", *words],
        input=request,
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )
    return found.stdout.decode()


@program("openssl")
@pytest.mark.parametrize("version", ["1_2", "1_3"])
def test_openssl_s_client_resumes_its_session(tmp_path, version):
    session = str(tmp_path / "session")
    with terminating(tmp_path, answering(OK)) as balancer:
        said = s_client(balancer, f"-tls{version}", "-ign_eof", "-sess_out", session, request=LAST)
        assert "\nNew, TLSv" + version.replace("_", ".") in said
        assert "Verify return code: 0 (ok)" in said
        assert "HTTP/1.1 200 OK" in said
        again = s_client(balancer, f"-tls{version}", "-ign_eof", "-sess_in", session, request=LAST)
        assert "\nReused, TLSv" + version.replace("_", ".") in again
        assert "HTTP/1.1 200 OK" in again
        if version == "1_2":  # in 1.3 it does not wait for tickets
            assert s_client(balancer, "-tls1_2", "-reconnect").count("\nReused, ") == 5


@program("openssl")
def test_nothing_older_than_1_2_is_spoken(tmp_path):
    with terminating(tmp_path, answering(OK)) as balancer:
        for version in ("-tls1", "-tls1_1"):
            assert "Cipher is (NONE)" in s_client(balancer, version, "-cipher", "ALL:@SECLEVEL=0")
        assert ask_once(balancer).body == b"ok"


NGINX = """
daemon off; master_process off; pid {directory}/nginx.pid; error_log {directory}/error.log;
events {{ worker_connections 100; }}
http {{
    access_log {directory}/access.log;
    client_body_temp_path {directory}/a; proxy_temp_path {directory}/b; fastcgi_temp_path {directory}/c;
    uwsgi_temp_path {directory}/d; scgi_temp_path {directory}/e;
    server {{
        listen 127.0.0.1:{port} ssl; server_name localhost; root {directory}/www; ssl_protocols TLSv1.2 TLSv1.3;
        ssl_certificate {cert}; ssl_certificate_key {key};
        location /who {{ return 200 "$ssl_protocol $ssl_server_name $http_x_forwarded_proto $connection\\n"; }}
    }}
}}
"""


@contextmanager
def nginx(directory: Path) -> Iterator[int]:
    """It serves `directory`/www, and /who; its port."""
    port = free_ports(1)[0]
    (directory / "www").mkdir()
    (directory / "nginx.conf").write_text(NGINX.format(directory=directory, port=port, **pair("local")))
    binary = shutil.which("nginx", path=PATH) or "nginx"
    words = [binary, "-c", f"{directory}/nginx.conf", "-e", f"{directory}/error.log"]
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE)


@program("nginx")
@pytest.mark.parametrize("way", [TO_BACKENDS, BOTH], ids=["to backends", "both"])
def test_a_real_nginx_is_a_tls_backend(tmp_path, way):
    with nginx(tmp_path) as port:
        content = Random(9).randbytes(LONG)
        (tmp_path / "www" / "long").write_bytes(content)
        server = {"host": "127.0.0.1", "port": port, "tls": {"ca": ROOT_CA, "server_name": "localhost"}}
        check = {"path": "/who", "interval": 0.05, "rise": 1}
        keys = {"tls": tls()} if way.clients else {}
        with running(tmp_path, [server], health_check=check, **keys) as balancer:
            eventually(lambda: "L7OK 200" in balancer.pool.backends[0].check, "nginx is up")
            with way.connect(balancer) as sock:
                who = [ask(sock, GET.replace(b"/ ", b"/who ")).body.split() for _ in range(5)]
                assert {tuple(words[:3]) for words in who} == {
                    (b"TLSv1.3", b"localhost", b"https" if way.clients else b"http")
                }
                assert len({words[3] for words in who}) == 1  # its connection is kept
                assert checksum(ask(sock, GET.replace(b"/ ", b"/long ")).body) == checksum(content)
                assert ask(sock, GET.replace(b"/ ", b"/nothing ")).status == 404


# Certificates that are replaced -----------------------------------------------------------------------------------


class Files:
    """A certificate and its key where a program renews them, as links to what it has at present."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.pair = {"cert": str(directory / "cert.pem"), "key": str(directory / "cert.key")}
        self.become("local")

    def become(self, name: str, key: str = "ec") -> None:
        for link, target in zip(self.pair.values(), pair(name, key).values(), strict=True):
            fresh = Path(link + ".new")
            fresh.symlink_to(target)
            fresh.replace(link)


class Reloading:
    """A balancer that watches its file, and how often it has read it."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
        monkeypatch.setattr(reload, "PERIOD", 0.02)
        monkeypatch.setattr(reload, "RETRY", 0.05)
        keys = {"listen": {"port": 0}, "admin": {"address": "off"}, "health_check": ONE_PROBE, **settings}
        self._file = write_settings(directory, {"log": {"file": str(directory / "lb.log")}, **keys})
        self.loads = 0

    def load(self) -> Config:
        self.loads += 1
        return load(self._file)

    @contextmanager
    def running(self) -> Iterator[LoadBalancer]:
        balancer = LoadBalancer(self.load(), load=self.load)
        balancer.start()
        try:
            yield balancer
        finally:
            balancer.stop(patience=0.0)

    def has_looked_again(self) -> None:
        """Several times, since this was called."""
        enough = self.loads + 5
        eventually(lambda: self.loads > enough, "more looks")


def test_a_renewed_certificate_is_shown_to_who_comes_and_nobody_is_disturbed(tmp_path, monkeypatch):
    files = Files(tmp_path)
    more = threading.Event()

    def slowly(connection: Connection) -> None:
        while b"/slow" in (request := connection.read_request()):
            connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nsl")
            assert more.wait(PATIENCE)
            connection.send(b"ow")
        if request:
            connection.send(OK)

    with FakeBackend(slowly) as fake:
        servers = [{"host": "127.0.0.1", "port": fake.port}]
        stand = Reloading(tmp_path, monkeypatch, servers=servers, tls=tls(files.pair))
        with stand.running() as balancer, secure(balancer) as kept, secure(balancer) as busy:
            busy.sendall(GET.replace(b"/ ", b"/slow "))
            answer = http.client.HTTPResponse(busy)
            answer.begin()
            assert answer.read(2) == b"sl"
            assert shown(balancer) == "local"
            for name, key, common_name in [("rsa", "rsa", "site.test"), ("wildcard", "ec", "wild.test")]:
                files.become(name, key)
                eventually(lambda: shown(balancer) == common_name, f"{name} is shown")  # noqa: B023
                assert ask(kept).body == b"ok"
            more.set()
            assert answer.read() == b"ow"
            answer.close()
            assert ask(busy).body == b"ok"
    assert {line.split("code=")[1] for line in lines(tmp_path)} == {"-- tries=1"}


def test_a_certificate_that_is_not_right_is_told_once_and_the_old_one_goes_on_until_it_is_mended(tmp_path, monkeypatch):
    files = Files(tmp_path)
    with FakeBackend(OK) as fake:
        servers = [{"host": "127.0.0.1", "port": fake.port}]
        stand = Reloading(tmp_path, monkeypatch, servers=servers, tls=tls(files.pair))
        with stand.running() as balancer:
            for name, words in [
                ("rsa", "is not for the key in"),
                ("expired", "expired on 2024-01-01"),
            ]:
                files.become(name)
                eventually(lambda: words in (balancer.config_error or ""), words)  # noqa: B023
                stand.has_looked_again()
                assert shown(balancer) == "local"
                assert ask_once(balancer).body == b"ok"
            Path(files.pair["cert"]).unlink()
            eventually(lambda: "cannot be read" in (balancer.config_error or ""), "it is missed")
            files.become("wildcard")
            eventually(lambda: shown(balancer) == "wild.test", "it is mended")
            eventually(lambda: balancer.config_error is None, "that is told")
    events = [line for line in log_lines(tmp_path) if "former configuration goes on" in line or "right again" in line]
    assert [re.findall("not for the key|expired|cannot be read|right again", line) for line in events] == [
        ["not for the key"],
        ["expired"],
        ["cannot be read"],
        ["right again"],
    ]


def test_the_authorities_of_a_backend_are_read_again_too(tmp_path, monkeypatch):
    authorities = tmp_path / "authorities.pem"
    authorities.write_bytes((DATA / "self_signed.pem").read_bytes())
    with TO_BACKENDS.fake(answering(OK)) as fake:
        servers = [{"host": "127.0.0.1", "port": fake.port, "tls": {"ca": str(authorities)}}]
        probes = {"type": "tcp", "interval": 0.05, "rise": 1}
        stand = Reloading(tmp_path, monkeypatch, servers=servers, health_check=probes)
        with stand.running() as balancer:
            backend = balancer.pool.backends[0]
            eventually(lambda: not backend.healthy, "it cannot be verified")
            authorities.write_bytes(Path(ROOT_CA).read_bytes())
            eventually(lambda: backend.healthy, "it can")
            with connect(balancer) as sock:
                assert ask(sock).body == b"ok"


@pytest.mark.program
def test_a_sighup_has_a_renewed_certificate_read(tmp_path):
    """The balancer has its backends and its certificate from the command line here."""
    files = Files(tmp_path)
    with FakeBackend(OK) as fake:
        flags = ["--tls-cert", files.pair["cert"], "--tls-key", files.pair["key"], "--port", 0, "--admin", "off"]
        with started(LB, *flags, fake.address, directory=tmp_path) as lb, secure(lb) as kept:
            assert ask(kept).body == b"ok"
            files.become("rsa", "rsa")
            lb.process.send_signal(signal.SIGHUP)
            eventually(lambda: shown(lb) == "site.test", "the renewed one is shown")
            assert ask(kept).body == b"ok"


# Certificates that are no good from the beginning -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("cert", "key", "words"),
    [
        ("expired.pem", "ec.key", "expired on 2024-01-01"),
        ("future.pem", "ec.key", "is not valid before 2100-01-01"),
        ("site.pem", "rsa.key", "is not for the key in"),
        ("missing.pem", "ec.key", "No such file"),
        ("site.pem", "missing.key", "No such file"),
        ("site.pem", "encrypted.key", "is encrypted"),
        ("ec.key", "site.pem", "has no certificate"),
    ],
)
def test_check_tells_in_one_line_what_is_wrong_with_a_certificate(tmp_path, capsys, cert, key, words):
    """By the flags, from the file, and at a start without --check: the same line, and status 2."""
    found = {"cert": str(DATA / cert), "key": str(DATA / key)}
    server = {"host": "127.0.0.1", "port": 9}
    config = write_settings(tmp_path, {"servers": [server], "admin": {"address": "off"}, "tls": tls(found)})
    flags = ["--tls-cert", found["cert"], "--tls-key", found["key"], "--admin", "off", "127.0.0.1:9"]
    for arguments in [["--check", *flags], ["--check", "--config", str(config)], flags]:
        assert main(arguments) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.count("\n") == 1
        assert words in said.err
        assert cert in said.err or key in said.err


@pytest.mark.program
def test_check_of_a_program_never_asks_for_a_password(tmp_path):
    flags = ["--tls-cert", DATA / "site.pem", "--tls-key", DATA / "encrypted.key", "127.0.0.1:9"]
    ended = run(LB, "--check", *flags, directory=tmp_path)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert "decrypt it" in ended.stderr


# To backends ------------------------------------------------------------------------------------------------------


def not_encrypted(connection: Connection) -> None:
    """What an HTTP server says to a ClientHello."""
    connection.sock.recv(1)
    connection.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")


@pytest.mark.parametrize(
    ("settings", "context", "words"),
    [
        (True, ("local",), NOT_KNOWN),
        ({"ca": ROOT_CA}, ("self_signed", "self_signed"), "self-signed certificate"),
        ({"ca": ROOT_CA}, ("site",), "IP address mismatch, certificate is not valid for '127.0.0.1'"),
        ({"ca": ROOT_CA, "server_name": "other.test"}, ("site",), "Hostname mismatch"),
        ({"ca": ROOT_CA, "server_name": "expired.test"}, ("expired",), "certificate has expired"),
        ({"ca": ROOT_CA, "server_name": "client.test"}, ("client",), "unsuitable certificate purpose"),
        ({"ca": ROOT_CA}, None, "wrong version number"),
    ],
    ids=["unknown authority", "self-signed", "another address", "another name", "expired", "of a client", "no TLS"],
)
def test_a_backend_that_is_not_who_it_should_be_is_down_and_gets_no_request(tmp_path, settings, context, words):
    handler = encrypted(answering(OK), identity(*context)) if context else not_encrypted
    with FakeBackend(handler) as fake:
        server = {"host": "127.0.0.1", "port": fake.port, "tls": settings}
        with running(tmp_path, [server], health_check=ONE_PROBE | {"fall": 1}) as balancer:
            backend = balancer.pool.backends[0]
            eventually(lambda: not backend.healthy, "it is down")
            assert backend.check.startswith(f"L6RSP {words}")
            with connect(balancer) as sock:
                assert ask(sock).status == 503
        assert not any(b"GET" in request for request in fake.requests)
    assert any(f"DOWN: L6RSP {words}" in line for line in log_lines(tmp_path))


def test_a_request_finds_out_before_a_probe_does_who_a_backend_is_not(tmp_path):
    """It was right when it was probed, and then another stands in its place: nothing of a request reaches that."""
    contexts = [identity(), identity("site")]

    def serve(connection: Connection) -> None:
        encrypted(answering(OK), contexts[0] if len(contexts) == 1 else contexts.pop(0))(connection)

    with FakeBackend(serve) as fake, TO_BACKENDS.balancing(tmp_path, fake) as balancer:
        with connect(balancer) as sock:
            answer = ask(sock, b"POST / HTTP/1.1\r\nHost: lb.test\r\nContent-Length: 5\r\n\r\nhello")
            assert answer.status == 503
        assert balancer.pool.backends[0].check.startswith("L6RSP IP address mismatch")
        assert fake.requests == []


def test_verification_can_be_done_without_and_that_is_said_loudly(tmp_path):
    with FakeBackend(encrypted(answering(OK), identity("self_signed", "self_signed"))) as fake:
        server = {"host": "127.0.0.1", "port": fake.port, "tls": {"verify": False}}
        with running(tmp_path, [server], health_check=ONE_PROBE) as balancer, connect(balancer) as sock:
            assert ask(sock).body == b"ok"
            probed(balancer)
            assert balancer.pool.backends[0].healthy
    warned = [line for line in log_lines(tmp_path) if " WARNING " in line]
    assert len(warned) == 1
    assert f"backend 1 {fake.address}: its certificate is NOT verified" in warned[0]


@pytest.mark.parametrize(
    ("host", "name", "certificate", "asked_for"),
    [
        ("127.0.0.1", {}, "local", None),
        ("localhost", {}, "local", "localhost"),
        ("127.0.0.1", {"server_name": "site.test"}, "site", "site.test"),
    ],
)
def test_a_backend_is_asked_for_by_the_name_that_it_must_have(tmp_path, host, name, certificate, asked_for):
    """An address is no name (RFC 6066 section 3)."""
    names: list[str | None] = []
    context = identity(certificate)
    context.sni_callback = lambda connection, name, _: names.append(name)
    with FakeBackend(encrypted(answering(OK), context)) as fake:
        server = {"host": host, "port": fake.port, "tls": {"ca": ROOT_CA, **name}}
        with running(tmp_path, [server], health_check=ONE_PROBE) as balancer, connect(balancer) as sock:
            probed(balancer)
            assert ask(sock).body == b"ok"
    assert names == [asked_for] * 2


@pytest.mark.parametrize("probe", ["http", "tcp"])
def test_probes_speak_tls_too(tmp_path, probe):
    check = {"type": probe, "path": "/health", "interval": 1000}
    with TO_BACKENDS.fake(answering(OK)) as fake, TO_BACKENDS.balancing(tmp_path, fake, health_check=check) as balancer:
        backend = balancer.pool.backends[0]
        assert backend.healthy
        assert backend.check.startswith("L7OK 200 in " if probe == "http" else "L6OK in ")
    assert [request.splitlines()[0] for request in fake.requests] == [b"GET /health HTTP/1.1"] * (probe == "http")


def test_a_backend_that_says_nothing_to_a_probe_is_out_of_time(tmp_path):
    silence = threading.Event()
    with FakeBackend(lambda connection: silence.wait(PATIENCE)) as fake:
        server = {"host": "127.0.0.1", "port": fake.port, "tls": {"ca": ROOT_CA}}
        check = {"interval": 1000, "timeout": 0.1, "fall": 1}
        with running(tmp_path, [server], health_check=check) as balancer:
            eventually(lambda: balancer.pool.backends[0].check == "L6TOUT")
        silence.set()


def closes(connection: Connection) -> None:
    connection.sock.recv(1)


def resets(connection: Connection) -> None:
    connection.sock.recv(1)
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    connection.file.close()
    connection.sock.close()


def babbles(connection: Connection) -> None:
    connection.send(b"220 mail.example ESMTP\r\n")


def hangs(connection: Connection) -> None:
    while connection.sock.recv(100):
        continue


def hangs_up(connection: Connection) -> None:
    encrypted(lambda inner: inner.read_request(), identity(), clean=False)(connection)


@pytest.mark.parametrize("misbehave", [closes, resets, babbles, hangs, hangs_up])
def test_no_request_fails_for_a_tls_backend_that_is_no_good(tmp_path, misbehave):
    """Another takes over; any request where none of it was sent, one that may be sent twice where it was."""
    broken = threading.Event()

    def serve(connection: Connection) -> None:
        (misbehave if broken.is_set() else encrypted(answering(OK), identity()))(connection)

    with (
        FakeBackend(serve) as bad,
        BOTH.fake(answering(OK)) as good,
        BOTH.balancing(tmp_path, bad, good, timeouts={"connect": 0.3}) as balancer,
    ):
        broken.set()
        method = b"GET" if misbehave is hangs_up else b"POST"
        with secure(balancer) as sock:
            for _ in range(6):
                answer = ask(sock, method + b" / HTTP/1.1\r\nHost: lb.test\r\nContent-Length: 0\r\n\r\n")
                assert answer.body == b"ok"
        assert len([request for request in good.requests if request.startswith(method)]) == 6


def test_a_connection_to_a_tls_backend_is_kept_for_the_next_request(tmp_path):
    with serving(BOTH.backend()) as backend, BOTH.balancing(tmp_path, backend) as balancer:
        assert backend.handshakes == 1  # the probe's
        for _ in range(5):
            with secure(balancer) as sock:
                assert [ask(sock).status for _ in range(10)] == [200] * 10
        assert backend.handshakes == 2


@pytest.mark.parametrize("clean", [True, False], ids=["with close_notify", "without"])
def test_a_kept_connection_that_the_tls_backend_closed_is_replaced(tmp_path, clean):
    """It answers one request on each connection and closes without having said so; no request is lost by that."""
    closed = threading.Semaphore(0)

    def one_only(connection: Connection) -> None:
        if connection.read_request():
            connection.send(OK)
            if clean:
                say_goodbye(connection.sock)
            hang_up(connection.sock)
            closed.release()

    with (
        TO_BACKENDS.fake(one_only, clean=False) as fake,
        TO_BACKENDS.balancing(tmp_path, fake) as balancer,
        connect(balancer) as sock,
    ):
        for method in [b"GET", b"POST", b"GET", b"PUT", b"POST"] * 3:
            octets = method + b" / HTTP/1.1\r\nHost: lb.test\r\nContent-Length: 1\r\n\r\nx"
            assert ask(sock, octets).status == 200
            assert closed.acquire(timeout=PATIENCE)
    assert len(fake.requests) == 15


# Clients that take their time, and the end ------------------------------------------------------------------------


def test_a_client_that_does_not_take_its_answer_is_cut_off(tmp_path):
    with (
        serving(Backend()) as backend,
        TO_CLIENTS.balancing(tmp_path, backend, timeouts={"client": 0.3}) as balancer,
        secure(balancer) as sock,
    ):
        sock.sendall(GET.replace(b"/ ", b"/bytes/100000000 "))
        eventually(lambda: not balancer.listener.sessions, "it is cut off")
        with pytest.raises(OSError):
            read_to_the_end(sock)
    assert [re.findall(r"code=\S\S", line) for line in lines(tmp_path)] == [["code=cD"]]


def test_a_stop_lets_requests_end_and_says_goodbye_to_who_is_idle(tmp_path):
    arrived, go_on = threading.Event(), threading.Event()

    def wait(connection: Connection) -> None:
        while b"/wait" in connection.read_request():
            arrived.set()
            assert go_on.wait(PATIENCE)
            connection.send(OK)

    drained = threading.Event()
    with terminating(tmp_path, wait) as balancer, secure(balancer) as idle, secure(balancer) as busy:
        busy.sendall(GET.replace(b"/ ", b"/wait "))
        assert arrived.wait(PATIENCE)
        balancer.drain(drained.set)
        assert read_to_the_end(idle) == b""
        assert not drained.is_set()
        go_on.set()
        answer = read_response(busy)
        assert (answer.body, answer.headers["Connection"]) == (b"ok", "close")
        assert busy.recv(1) == b""
        busy.close()
        assert drained.wait(PATIENCE)


def test_a_stop_does_not_wait_for_who_never_began_a_handshake(tmp_path):
    """A browser opens connections ahead of need, and may leave them so for long."""
    drained = threading.Event()
    with terminating(tmp_path, answering(OK), timeouts={"handshake": 2 * PATIENCE}) as balancer:
        with connect(balancer) as silent:
            eventually(lambda: balancer.listener.sessions, "it is accepted")
            balancer.drain(drained.set)
            assert read_to_the_end(silent) == b""
        assert drained.wait(PATIENCE)


def test_who_is_cut_at_the_end_of_a_stop_is_not_told_that_it_was_all(tmp_path):
    """Within a handshake, before the answer, and within an answer that only its end can end."""
    more = threading.Event()

    def serve(connection: Connection) -> None:
        request = connection.read_request()
        if b"/half" in request:
            connection.send(b"HTTP/1.1 200 OK\r\n\r\nhalf")
        if request:
            more.wait(PATIENCE)

    with FakeBackend(serve) as fake, ExitStack() as stack:
        with running(tmp_path, [(fake.host, fake.port)], tls=tls(), health_check=ONE_PROBE) as balancer:
            probed(balancer)
            waits, half = (stack.enter_context(secure(balancer)) for _ in range(2))
            waits.sendall(GET)
            half.sendall(b"GET /half HTTP/1.0\r\n\r\n")
            received = b""
            while not received.endswith(b"half"):
                received += half.recv(1000)
            eventually(lambda: len(fake.requests) == 2, "both are there")
            begun = stack.enter_context(connect(balancer))
            begun.sendall(client_hello())
            assert begun.recv(1)
        assert read_to_the_end(waits) == b""  # which is no answer
        with pytest.raises(OSError):
            read_to_the_end(half)
        more.set()
    assert sorted(re.findall(r"code=\S\S", " ".join(lines(tmp_path)))) == ["code=KD", "code=KH"]
    assert log_lines(tmp_path)[-1].endswith("stop: done, 3 connections cut")


@pytest.mark.program
def test_a_second_signal_ends_a_stop_that_waits_for_a_tls_connection(tmp_path):
    arrived, more = threading.Event(), threading.Event()

    def serve(connection: Connection) -> None:
        if connection.read_request().startswith(b"GET / "):
            arrived.set()
            more.wait(PATIENCE)

    with FakeBackend(serve) as fake:
        servers = [{"host": "127.0.0.1", "port": fake.port}]
        keys = {"listen": {"port": 0}, "admin": {"address": "off"}, "health_check": ONE_PROBE, "tls": tls()}
        write_settings(tmp_path, {"servers": servers, **keys})
        with started(LB, directory=tmp_path) as lb, secure(lb) as busy:
            busy.sendall(GET)
            assert arrived.wait(PATIENCE)
            lb.process.send_signal(signal.SIGTERM)
            log = tmp_path / "load_balancer.log"
            eventually(lambda: "accepting no more" in log.read_text(), "it stops")
            assert lb.process.poll() is None
            assert lb.stop() == 0
            assert read_to_the_end(busy) == b""  # which is no answer
            assert lb.err == "lb: stopped, 1 connection cut\n"
        more.set()
