"""TLS through a running balancer, towards clients, towards backends and on both sides at once: what each of these does
in the clear it does encrypted, and what only TLS has goes as its users and its attackers have it.

The certificates are those of tests/data/certificates. Connections are real; the balancer is one within the test, or a
program where files and signals are what matters.
"""

from __future__ import annotations

import http.client
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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pytest

from backend_server import TEXT, Backend, frame, mask, pattern, serving
from balancer import reload
from balancer.balancer import LoadBalancer
from balancing import connect, log_lines, running
from conftest import PATIENCE, eventually
from fakes import Answer, Connection, FakeBackend, hang_up, read_lines, read_response
from mixture import KINDS, UPGRADE, Caller, UnrulyBackend
from programs import LB, Program, free_ports, run, started, write_settings

DATA = Path(__file__).resolve().parent / "data" / "certificates"
ROOT_CA = str(DATA / "root.pem")
TLS_1_2, TLS_1_3 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with a reset
GET = b"GET / HTTP/1.1\r\nHost: lb.test\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
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
    return (context or trusting()).wrap_socket(
        sock, server_hostname=name, session=session, suppress_ragged_eofs=False
    )


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
    """A client that sends and receives at the same time and half-closes, for which an ssl.SSLSocket is not made."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext | None, name: str = "localhost") -> None:
        self.sock = sock
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls: ssl.SSLObject | None = None
        self.ended = False  # in peace
        if context is not None:
            self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=name)
            self._do(self._tls.do_handshake)

    def __enter__(self) -> Duplex:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def _do(self, step: Callable[[], Any]) -> Any:
        while True:
            try:
                return step()
            except ssl.SSLWantReadError:
                self._flush()
                self._take()
            finally:
                self._flush()

    def _flush(self) -> None:
        if self._outgoing.pending:
            self.sock.sendall(self._outgoing.read())

    def _take(self) -> None:
        if data := self.sock.recv(65536):
            self._incoming.write(data)
        else:
            self._incoming.write_eof()

    def send(self, data: bytes) -> None:
        if self._tls is None:
            self.sock.sendall(data)
        else:
            self._tls.write(data)
            self._flush()

    def finish(self) -> None:
        """Send nothing more."""
        if self._tls is None:
            self.sock.shutdown(socket.SHUT_WR)
            return
        with suppress(ssl.SSLWantReadError):  # for the other side's close_notify, which may be long in coming
            self._tls.unwrap()
        self._flush()

    def receive(self) -> bytes:
        """What there is next, b"" at an orderly end."""
        if self._tls is None:
            return self.sock.recv(65536)
        try:
            return bytes(self._do(lambda: self._tls.read(65536)))
        except ssl.SSLZeroReturnError:
            return b""

    def receive_all(self) -> bytes:
        received = bytearray()
        while piece := self.receive():
            received += piece
        return bytes(received)

    def swap(self, data: bytes, *, finish: bool = False) -> bytes:
        """Send all of it, take what comes meanwhile, half-close if told to, and take the rest up to the end."""
        received = bytearray()
        rest = memoryview(data)
        while rest:
            readable, writable, _ = select.select([self.sock], [self.sock], [], PATIENCE)
            assert readable or writable, f"it moves no more with {len(rest)} octets to send"
            if readable:
                received += self.receive()
            elif writable:
                self.send(bytes(rest[:16384]))
                rest = rest[16384:]
        if finish:
            self.finish()
        return bytes(received) + self.receive_all()


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
    """Small and long bodies either way, both framings, pipelines, 100 Continue, HEAD, 304, WebSocket, refusals, cuts."""
    names = [name for name in sorted(KINDS) if not (way.clients and name == "head that ends")]  # see Duplex
    with serving(way.backend()) as one, serving(way.backend()) as other:
        with way.balancing(tmp_path, one, other) as balancer:
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
    with serving(way.backend()) as backend, way.balancing(tmp_path, backend) as balancer:
        with way.duplex(balancer) as client:
            received = client.swap(head + body)
    answer = read_response(Recorded(received))
    assert (answer.status, len(answer.body)) == (200, LONG)
    assert checksum(answer.body) == checksum(content)
    assert lines(tmp_path) == [f'"POST /echo HTTP/1.1" 200 {LONG} backend=1 code=-- tries=1']


class Recorded:
    """Octets that were received, as what `read_response` takes."""

    def __init__(self, octets: bytes) -> None:
        self._octets = octets

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


