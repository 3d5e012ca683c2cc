"""TLS connections: that they are used like sockets, by several threads, and how they begin and end."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import random
import select
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from balancer import stream as stream_module
from balancer.framing import LengthBody, as_is
from balancer.pump import End, Flow, Pumps, relay_body, relay_stream
from balancer.reactor import READ, Reactor
from balancer.stream import HTTP, MOST, RECORD, UNUSED, Handshake, Handshaker, TlsBroken, TlsStream, TlsTruncated
from conftest import PATIENCE, eventually

CERTIFICATES = Path(__file__).parent / "data" / "certificates"
DONTWAIT = socket.MSG_DONTWAIT
PEEK = socket.MSG_PEEK
RESET = struct.pack("ii", 1, 0)
SHORT = struct.pack("@ll", 0, 20_000)  # SO_RCVTIMEO, SO_SNDTIMEO: 20 ms
TLS12, TLS13 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3
GARBAGE = bytes(range(128, 256)) * 4

needs_openssl = pytest.mark.skipif(not shutil.which("openssl"), reason="there is no openssl command")


# The two sides ----------------------------------------------------------------------------------------------------


def server_context(version: ssl.TLSVersion = TLS13) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATES / "local.pem", CERTIFICATES / "ec.key")
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.minimum_version, context.maximum_version = TLS12, version
    return context


def client_context(version: ssl.TLSVersion = TLS13) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(CERTIFICATES / "root.pem"))
    context.maximum_version = version
    return context


def connection() -> tuple[socket.socket, socket.socket]:
    """A TCP connection's two ends: the peer's, which is patient, and ours."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        theirs = socket.create_connection(listener.getsockname(), timeout=PATIENCE)
        ours, _ = listener.accept()
    for sock in (theirs, ours):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return theirs, ours


class Peer:
    """The other side of a connection, on one thread; it can be stopped between any two steps of TLS."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, *, server_side: bool = False) -> None:
        self.sock = sock
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        name = None if server_side else "localhost"
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_side, name)

    def handshake(self) -> None:
        while not self.hello():
            self.sock.sendall(self.outgoing.read())
            self.fill()
        self.sock.sendall(self.outgoing.read())

    def hello(self) -> bool:
        """Go on with the handshake; False where more must come first."""
        try:
            self.tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        return True

    def fill(self) -> None:
        data = self.sock.recv(65536)
        if data:
            self.incoming.write(data)
        else:
            self.incoming.write_eof()

    def seal(self, data: bytes) -> bytes:
        self.tls.write(data)
        return self.outgoing.read()

    def send(self, data: bytes) -> None:
        self.sock.sendall(self.seal(data))

    def recv(self) -> bytes:
        """What comes next; b"" after close_notify."""
        while True:
            try:
                return self.tls.read(65536)
            except ssl.SSLZeroReturnError:
                return b""
            except ssl.SSLWantReadError:
                self.sock.sendall(self.outgoing.read())
                self.fill()

    def read(self, octets: int) -> bytes:
        data = b""
        while len(data) < octets:
            piece = self.recv()
            assert piece, "it ended early"
            data += piece
        return data

    def rest(self) -> bytes:
        """All that comes until close_notify."""
        return b"".join(iter(self.recv, b""))

    def goodbye(self) -> bytes:
        """close_notify, for the caller to send."""
        with contextlib.suppress(ssl.SSLWantReadError):
            self.tls.unwrap()
        return self.outgoing.read()

    def update_keys(self, requested: bool = True) -> bytes:
        """A key update (RFC 8446, section 4.6.3), for the caller to send; `requested` asks for one in return.

        Python has no call for it, so OpenSSL's own is called, with the pointer that the SSL object begins with.
        """
        pointer = ctypes.c_void_p.from_address(id(self.tls._sslobj) + object.__basicsize__ + struct.calcsize("P"))
        assert libssl().SSL_key_update(pointer, int(requested)) == 1
        assert self.hello()
        return self.outgoing.read()

    def close(self) -> None:
        self.sock.close()


def libssl() -> ctypes.CDLL:
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libssl" in line}
    return ctypes.CDLL(mapped.pop())


needs_key_update = pytest.mark.skipif(
    sys.platform != "linux"
    or bool(sysconfig.get_config_var("Py_DEBUG") or sysconfig.get_config_var("Py_GIL_DISABLED"))
    or "libssl" not in Path("/proc/self/maps").read_text(),
    reason="OpenSSL cannot be asked for a key update here",
)


# Ours -------------------------------------------------------------------------------------------------------------


class Outcome:
    """How a handshake ended; as a session would be told."""

    def __init__(self) -> None:
        self.stream: TlsStream | None = None
        self.reason = ""
        self.handshake: Handshake | None = None
        self.calls = 0
        self._over = threading.Event()

    def on_done(self, stream: TlsStream) -> None:
        self.stream = stream
        self._end()

    def on_failed(self, reason: str) -> None:
        self.reason = reason
        self._end()

    def _end(self) -> None:
        self.calls += 1
        self._over.set()

    @property
    def over(self) -> bool:
        return self._over.is_set()

    def wait(self) -> TlsStream:
        assert self._over.wait(PATIENCE), "the handshake never ended"
        assert self.stream is not None, self.reason
        return self.stream

    def failure(self) -> str:
        assert self._over.wait(PATIENCE), "the handshake never ended"
        assert self.stream is None
        return self.reason


class House:
    """A reactor and a handshaker that run, and whatever lives with them."""

    def __init__(self, *, portable: bool = False, threads: int = 2, most: int = 1000) -> None:
        self.errors: list[str] = []
        self.reactor = Reactor(tick=0.01, on_error=self._complain, portable=portable)
        self.home = Handshaker(self.reactor, threads, most, self._complain)
        self.peers: list[Peer | socket.socket] = []
        self.streams: list[TlsStream] = []
        self.reactor.start()

    def _complain(self, where: str, error: Exception) -> None:
        self.errors.append(f"{where}: {error!r}")

    def do(self, function: Callable[[], object]) -> object:
        """Call this on the reactor's thread, and return its answer."""
        answers: list[object] = []
        done = threading.Event()

        def work() -> None:
            try:
                answers.append(function())
            finally:
                done.set()

        self.reactor.call_soon(work)
        assert done.wait(PATIENCE)
        assert answers, self.errors
        return answers[0]

    def begin(self, sock: socket.socket, context: ssl.SSLContext, *, outcome: Outcome | None = None, **how) -> Outcome:
        outcome = outcome or Outcome()

        def begin() -> None:
            outcome.handshake = self.home.begin(
                sock,
                context,
                **{"server_side": True, "timeout": PATIENCE, **how},
                on_done=outcome.on_done,
                on_failed=outcome.on_failed,
            )

        self.do(begin)
        return outcome

    def serve(self, context: ssl.SSLContext | None = None, **how) -> tuple[socket.socket, Outcome]:
        """A client's connection that has said nothing yet, and what becomes of the handshake on our end."""
        theirs, ours = connection()
        self.peers.append(theirs)
        return theirs, self.begin(ours, context or server_context(), **how)

    def accept(self, version: ssl.TLSVersion = TLS13) -> tuple[TlsStream, Peer]:
        """Our end of a client's connection, and the client."""
        theirs, outcome = self.serve(server_context(version))
        peer = Peer(theirs, client_context(version))
        peer.handshake()
        return self.keep(outcome.wait()), peer

    def connect(self, version: ssl.TLSVersion = TLS13) -> tuple[TlsStream, Peer]:
        """Our end of a connection to a backend, and the backend."""
        theirs, ours = connection()
        self.peers.append(theirs)
        outcome = self.begin(ours, client_context(), server_side=False, server_hostname="localhost")
        peer = Peer(theirs, server_context(version), server_side=True)
        peer.handshake()
        return self.keep(outcome.wait()), peer

    def keep(self, stream: TlsStream) -> TlsStream:
        self.streams.append(stream)
        return stream

    def close(self, stream: TlsStream) -> None:
        self.do(stream.close)

    def stop(self) -> None:
        for stream in self.streams:
            self.close(stream)
        for peer in self.peers:
            peer.close()
        assert self.home.settle(PATIENCE)
        self.do(lambda: None)  # what the last close has asked for
        left = len(self.reactor.handlers) - 1, len(self.reactor.timed)
        self.reactor.stop()
        self.home.stop()
        assert not self.errors
        assert left == (0, 0)


@pytest.fixture
def house() -> Iterator[House]:
    house = House()
    yield house
    house.stop()


@pytest.fixture(params=[False, True], ids=["own poller", "portable poller"])
def any_house(request) -> Iterator[House]:
    if not request.param and not hasattr(select, "epoll"):
        pytest.skip("there is no epoll")
    house = House(portable=request.param)
    yield house
    house.stop()


@pytest.fixture(params=[TLS12, TLS13], ids=["TLS 1.2", "TLS 1.3"])
def version(request) -> ssl.TLSVersion:
    return request.param


def readable(stream: TlsStream | socket.socket, within: float = PATIENCE) -> bool:
    poller = select.poll()
    poller.register(stream.fileno(), select.POLLIN)
    return bool(poller.poll(within * 1000))


def receive(stream: TlsStream) -> bytes:
    """What a reactor's turn gives once the kernel has announced something; control records give nothing."""
    while True:
        assert readable(stream)
        try:
            return stream.recv(65536, DONTWAIT)
        except BlockingIOError:
            continue


def receive_all(stream: TlsStream) -> bytes:
    return b"".join(iter(partial(receive, stream), b""))


def fill(stream: TlsStream) -> bytes:
    """Send what nobody reads, until neither the kernel nor the stream takes more; returns all that counts as sent."""
    sent = b""
    block = random.Random(4).randbytes(100_000)
    while True:
        try:
            sent += block[: stream.send(block, DONTWAIT)]
        except BlockingIOError:
            return sent


def in_thread(work: Callable[[], object]) -> Callable[[], object]:
    """Run this beside the test. What is returned waits for its result, or the error that it raised."""
    results: list[object] = []

    def run() -> None:
        try:
            results.append(work())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def result() -> object:
        thread.join(PATIENCE)
        assert not thread.is_alive()
        return results[0]

    return result


# Receiving --------------------------------------------------------------------------------------------------------


def test_data_goes_both_ways_and_the_log_can_name_version_and_cipher(house, version):
    for stream, peer in (house.accept(version), house.connect(version)):
        peer.send(b"question")
        assert receive(stream) == b"question"
        assert stream.send(b"answer", DONTWAIT) == 6
        assert peer.read(6) == b"answer"
        assert stream.version == peer.tls.version() == {TLS12: "TLSv1.2", TLS13: "TLSv1.3"}[version]
        assert stream.cipher == peer.tls.cipher()[0]


def test_session_tickets_after_the_handshake_are_no_data(house):
    """RFC 8446, section 4.6.1: OpenSSL sends two of them right behind the handshake."""
    stream, peer = house.connect()
    assert readable(stream)
    with pytest.raises(BlockingIOError):
        while True:
            stream.recv(1, PEEK | DONTWAIT)
    peer.send(b"answer")
    assert receive(stream) == b"answer"


def test_half_a_record_is_nothing_and_the_other_half_is_all(house, version):
    stream, peer = house.accept(version)
    record = peer.seal(b"x" * 1000)
    for piece in (record[:3], record[3:500]):
        peer.sock.sendall(piece)
        assert readable(stream)
        with pytest.raises(BlockingIOError):
            stream.recv(65536, DONTWAIT)
    peer.sock.sendall(record[500:])
    assert receive(stream) == b"x" * 1000


def test_a_recv_that_waits_does_so_until_a_record_is_whole(house, version):
    stream, peer = house.accept(version)
    record = peer.seal(b"whole")
    peer.sock.sendall(record[:7])
    result = in_thread(partial(stream.recv, 65536))
    eventually(lambda: not readable(stream, 0), "the first half was taken")
    peer.sock.sendall(record[7:])
    assert result() == b"whole"


def test_a_recv_that_waits_in_vain_says_so(house):
    stream, _ = house.accept()
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, SHORT)
    with pytest.raises(BlockingIOError):
        stream.recv(65536)


@pytest.mark.parametrize("flags", [0, DONTWAIT], ids=["waiting", "not waiting"])
def test_nothing_is_left_behind_of_which_the_kernel_would_not_tell(house, flags):
    """Whoever asks for one octet gets all of the record, and of its neighbours."""
    stream, peer = house.accept()
    peer.sock.sendall(b"".join(peer.seal(b"%04d" % number) for number in range(1000)))
    eventually(lambda: len(stream._sock.recv(65536, PEEK)) == 1000 * 26)
    received = b""
    while readable(stream, 0):
        with contextlib.suppress(BlockingIOError):
            received += stream.recv(1, flags)
    assert received == b"".join(b"%04d" % number for number in range(1000))


def test_records_of_any_size_arrive_in_order(house, version):
    stream, peer = house.accept(version)
    rng = random.Random(5)
    pieces = [rng.randbytes(rng.choice((1, 100, 5000, RECORD, 60_000))) for _ in range(100)]

    def talk() -> None:
        for piece in pieces:
            peer.send(piece)
        peer.sock.sendall(peer.goodbye())

    result = in_thread(talk)
    assert receive_all(stream) == b"".join(pieces)
    assert result() is None


def test_what_a_peek_finds_is_kept_for_the_next_recv(house, version):
    stream, peer = house.accept(version)
    with pytest.raises(BlockingIOError):
        stream.recv(1, PEEK | DONTWAIT)
    peer.send(b"found")
    assert readable(stream)
    assert stream.recv(1, PEEK | DONTWAIT) == b"found"
    assert stream.recv(1, PEEK | DONTWAIT) == b"found"
    assert stream.recv(1, DONTWAIT) == b"found"
    with pytest.raises(BlockingIOError):
        stream.recv(1, DONTWAIT)
    peer.sock.sendall(peer.goodbye())
    assert readable(stream)
    assert stream.recv(1, PEEK | DONTWAIT) == b""
    assert stream.recv(1, DONTWAIT) == b""


# How receiving ends -----------------------------------------------------------------------------------------------


def test_an_end_that_came_with_the_last_data_is_announced_by_the_kernel_too(house, version):
    """The peer waits for our answer, and its TCP connection stays open: nothing else would call a reactor again."""
    stream, peer = house.accept(version)
    peer.sock.sendall(peer.seal(b"last words") + peer.goodbye())
    eventually(lambda: len(stream._sock.recv(65536, PEEK)) > 50, "both are there")
    assert stream.recv(65536, DONTWAIT) == b"last words"
    assert readable(stream, 0)
    assert stream.recv(65536, DONTWAIT) == b""
    assert stream.recv(65536) == b""
    stream.send(b"answer", DONTWAIT)
    assert peer.read(6) == b"answer"


def test_an_end_without_close_notify_is_not_taken_for_one(house, version):
    """RFC 8446, section 6.1: truncation."""
    stream, peer = house.accept(version)
    peer.send(b"some of it")
    peer.sock.shutdown(socket.SHUT_WR)
    assert receive(stream) == b"some of it"
    for _ in range(2):
        with pytest.raises(TlsTruncated):
            receive(stream)


def test_an_end_within_a_record_is_a_truncation(house, version):
    stream, peer = house.accept(version)
    peer.sock.sendall(peer.seal(b"record")[:-1])
    peer.sock.shutdown(socket.SHUT_WR)
    with pytest.raises(TlsTruncated):
        receive(stream)


@pytest.mark.parametrize("kind", ["garbage", "tampered", "an alert"])
def test_what_cannot_be_decrypted_is_an_error_after_the_data_before_it(house, version, kind):
    stream, peer = house.accept(version)
    data = peer.seal(b"good")
    if kind == "garbage":
        data += GARBAGE
    elif kind == "tampered":
        data += peer.seal(b"record")[:-1] + b"\0"
    else:
        peer.incoming.write(GARBAGE)
        with pytest.raises(ssl.SSLError):
            peer.tls.read(1)
        data += peer.outgoing.read()
    peer.sock.sendall(data)
    eventually(lambda: len(stream._sock.recv(65536, PEEK)) == len(data))
    assert stream.recv(65536, DONTWAIT) == b"good"
    for _ in range(2):
        with pytest.raises(TlsBroken) as caught:
            receive(stream)
        assert caught.value.strerror
    if kind != "an alert":
        with pytest.raises(ssl.SSLError, match="alert"):
            peer.rest()
    with pytest.raises(OSError):
        stream.send(b"more", DONTWAIT)


def test_a_reset_is_told(house, version):
    stream, peer = house.accept(version)
    peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    peer.close()
    with pytest.raises(ConnectionResetError):
        receive(stream)
    with pytest.raises(OSError):
        stream.send(b"more", DONTWAIT)


# Half-closes ------------------------------------------------------------------------------------------------------


def test_our_half_close_leaves_the_other_direction_as_it_is(house, version):
    stream, peer = house.accept(version)
    stream.send(b"request", DONTWAIT)
    stream.shutdown(socket.SHUT_WR)
    stream.shutdown(socket.SHUT_WR)
    assert peer.rest() == b"request"
    for flags in (0, DONTWAIT):
        with pytest.raises(BrokenPipeError):
            stream.send(b"more", flags)
    peer.send(b"answer")
    assert receive(stream) == b"answer"
    peer.sock.sendall(peer.goodbye())
    assert receive(stream) == b""


def test_our_half_close_within_a_record_that_comes_loses_nothing_of_it(house, version):
    """OpenSSL looks for the peer's close_notify as it sends ours, and takes data that it finds then for a fault."""
    stream, peer = house.accept(version)
    record = peer.seal(b"answer")
    peer.sock.sendall(record[:9])
    assert readable(stream)
    with pytest.raises(BlockingIOError):
        stream.recv(65536, DONTWAIT)
    stream.shutdown(socket.SHUT_WR)
    peer.sock.sendall(record[9:])
    assert receive(stream) == b"answer"


def test_the_peers_half_close_leaves_our_direction_as_it_is(house, version):
    stream, peer = house.accept(version)
    peer.sock.sendall(peer.goodbye())
    peer.sock.shutdown(socket.SHUT_WR)
    assert receive(stream) == b""
    stream.send(b"answer", DONTWAIT)
    stream.shutdown(socket.SHUT_WR)
    assert peer.rest() == b"answer"


@pytest.mark.parametrize("how", [socket.SHUT_RD, socket.SHUT_RDWR])
def test_a_shutdown_wakes_a_thread_that_waits_in_recv(house, how):
    stream, _ = house.accept()
    stream.shutdown(socket.SHUT_WR)
    result = in_thread(partial(stream.recv, 65536))
    stream.shutdown(how)
    assert isinstance(result(), TlsTruncated)


@pytest.mark.parametrize("how", [socket.SHUT_WR, socket.SHUT_RDWR])
def test_a_shutdown_wakes_a_thread_that_waits_in_send_and_the_peer_sees_no_complete_stream(house, how):
    stream, peer = house.accept()
    fill(stream)
    result = in_thread(partial(stream.send, bytes(100_000)))
    eventually(lambda: stream._sending, "it waits")
    stream.shutdown(how)
    assert isinstance(result(), OSError)
    with pytest.raises(BrokenPipeError):
        stream.send(b"more", DONTWAIT)
    with pytest.raises((ssl.SSLEOFError, ConnectionResetError)):
        peer.rest()


def test_the_end_of_a_lost_connection_can_be_passed_to_nobody(house):
    stream, peer = house.accept()
    peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    peer.close()
    assert readable(stream)
    with pytest.raises(OSError):
        stream.shutdown(socket.SHUT_WR)
        stream.shutdown(socket.SHUT_WR)


# What is due ------------------------------------------------------------------------------------------------------


def test_what_is_due_goes_out_though_nobody_calls_again(any_house):
    stream, peer = any_house.accept()
    sent = fill(stream)
    assert stream._due
    assert peer.read(len(sent)) == sent
    eventually(lambda: any_house.do(lambda: stream._watched < 0 and not stream._armed), "nobody watches any more")


def test_the_next_send_goes_on_with_what_is_due(house):
    stream, peer = house.accept()
    sent = fill(stream)
    result = in_thread(lambda: peer.read(len(sent) + 5))
    waited = in_thread(lambda: send_all(stream, b"after"))
    assert waited() is None
    assert result() == sent + b"after"


def send_all(stream: TlsStream, data: bytes) -> None:
    """As a pump does, however long it takes."""
    while data:
        with contextlib.suppress(BlockingIOError):
            data = data[stream.send(data) :]


def test_a_send_that_waits_in_vain_says_so_and_one_that_gets_on_does_not(house):
    """A pump takes a sink for stuck that has taken nothing for some time; a slow one must be told from that."""
    stream, peer = house.accept()
    sent = fill(stream)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, SHORT)
    with pytest.raises(BlockingIOError):
        stream.send(b"after")
    with stream._lock:
        due = len(stream._due)
    assert due > MOST // 2
    data = peer.read(100_000)
    data += peer.read(len(sent) - len(data))
    assert data == sent
    assert stream.send(b"after") == 5
    assert peer.read(5) == b"after"


class Narrow:
    """A socket that takes no more than so many octets at once, and at every other time none."""

    def __init__(self, sock: socket.socket, takes: int) -> None:
        self.sock = sock
        self.takes = takes
        self.turns = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self.sock, name)

    def send(self, data: bytes, flags: int = 0) -> int:
        self.turns += 1
        if self.turns % 2:
            raise BlockingIOError
        return self.sock.send(data[: self.takes], flags)


def test_a_sender_that_only_gets_on_with_what_is_due_hears_so(house):
    stream, peer = house.accept()
    sent = fill(stream)
    stream._sock = Narrow(stream._sock, 100)
    with pytest.raises(BlockingIOError):
        stream.send(b"after")
    peer.read(1)
    stream._sock.takes = 1
    stream._sock.turns = 1
    assert stream.send(b"after") == 0
    stream._sock = stream._sock.sock
    assert len(peer.rest_of(sent)) if hasattr(peer, "rest_of") else True
