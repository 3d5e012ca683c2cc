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
from unittest import mock

import pytest

from balancer import stream as stream_module
from balancer.framing import LengthBody, as_is
from balancer.handshake import HTTP, UNUSED, Handshake, Handshaker
from balancer.pump import End, Flow, Pumps, relay_body, relay_stream
from balancer.reactor import READ, WRITE, Reactor
from balancer.stream import MOST, RECORD, TlsBroken, TlsStream, TlsTruncated
from conftest import PATIENCE, eventually

CERTIFICATES = Path(__file__).parent / "data" / "certificates"
DONTWAIT = socket.MSG_DONTWAIT
PEEK = socket.MSG_PEEK
RESET = struct.pack("ii", 1, 0)
SHORT = struct.pack("@ll", 0, 20_000)  # SO_RCVTIMEO, SO_SNDTIMEO: 20 ms
TLS12, TLS13 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3
SMALL = 30_000  # octets of the kernel's buffers
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


def connection(buffers: int = 0) -> tuple[socket.socket, socket.socket]:
    """A TCP connection's two ends: the peer's, which is patient, and ours. `buffers`: octets that the kernel holds.

    Left to itself it finds room for more after a while.
    """
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        theirs = stack.enter_context(socket.socket())
        theirs.settimeout(PATIENCE)
        if buffers:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffers)
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffers)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        theirs.connect(listener.getsockname())
        ours, _ = listener.accept()
        stack.pop_all()
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
            self.flush()
            self.fill()
        self.flush()

    def flush(self) -> None:
        if self.outgoing.pending:
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
                self.flush()
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


CAN_UPDATE = (
    sys.platform == "linux"
    and not (sysconfig.get_config_var("Py_DEBUG") or sysconfig.get_config_var("Py_GIL_DISABLED"))
    and "libssl" in Path("/proc/self/maps").read_text()
)
needs_key_update = pytest.mark.skipif(not CAN_UPDATE, reason="OpenSSL cannot be asked for a key update here")


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
        self.outcomes: list[Outcome] = []
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
        self.outcomes.append(outcome)

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

    def serve(self, context: ssl.SSLContext | None = None, *, buffers: int = 0, **how) -> tuple[socket.socket, Outcome]:
        """A client's connection that has said nothing yet, and what becomes of the handshake on our end."""
        theirs, ours = connection(buffers)
        self.peers.append(theirs)
        return theirs, self.begin(ours, context or server_context(), **how)

    def accept(self, version: ssl.TLSVersion = TLS13, *, buffers: int = 0) -> tuple[TlsStream, Peer]:
        """Our end of a client's connection, and the client."""
        theirs, outcome = self.serve(server_context(version), buffers=buffers)
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
        for outcome in self.outcomes:
            self.do(outcome.handshake.cancel)
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
    """Send what nobody reads, so that much more of it is due than the kernel could find room for; returns all of it."""
    data = random.Random(4).randbytes(20 * SMALL)
    with mock.patch.object(stream_module, "MOST", len(data)):
        assert stream.send(data, DONTWAIT) == len(data)
    with pytest.raises(BlockingIOError):
        stream.send(b"more", DONTWAIT)
    return data


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
    while readable(stream, 0):
        with pytest.raises(BlockingIOError):
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
        record = peer.seal(b"record")
        data += record[:-1] + bytes([record[-1] ^ 1])
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
    stream, peer = house.accept(buffers=SMALL)
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
    with contextlib.suppress(OSError):
        stream.shutdown(socket.SHUT_WR)
    with pytest.raises(OSError):
        stream.shutdown(socket.SHUT_WR)


# What is due ------------------------------------------------------------------------------------------------------


def test_what_is_due_goes_out_though_nobody_calls_again(any_house):
    stream, peer = any_house.accept(buffers=SMALL)
    sent = fill(stream)
    assert stream._due
    assert peer.read(len(sent)) == sent
    eventually(lambda: any_house.do(lambda: stream._watched < 0 and not stream._armed), "nobody watches any more")


def test_the_next_send_goes_on_with_what_is_due(house):
    stream, peer = house.accept(buffers=SMALL)
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
    stream, peer = house.accept(buffers=SMALL)
    sent = fill(stream)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, SHORT)
    with pytest.raises(BlockingIOError):
        stream.send(b"after")
    data = peer.read(100_000)
    data += peer.read(len(sent) - len(data))
    assert data == sent
    assert stream.send(b"after") == 5
    assert peer.read(5) == b"after"


class Narrow:
    """A socket that takes no more than so many octets at once, which may be none, and at every other time none."""

    def __init__(self, sock: socket.socket, takes: int) -> None:
        self.sock = sock
        self.takes = takes
        self.turns = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self.sock, name)

    def send(self, data: bytes, flags: int = 0) -> int:
        self.turns += 1
        if self.turns % 2 or not self.takes:
            raise BlockingIOError
        return self.sock.send(data[: self.takes], flags)


class Doomed(Narrow):
    """A socket that is lost once it has taken something."""

    def send(self, data: bytes, flags: int = 0) -> int:
        self.turns += 1
        if self.turns > 1:
            raise ConnectionResetError
        return self.sock.send(data, flags)


def test_a_send_that_raises_has_sent_nothing(house):
    """As with a socket: whoever hears of an error may send all of it elsewhere. What is longer goes in pieces."""
    stream, peer = house.accept()
    result = in_thread(lambda: peer.read(65536))
    stream._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    stream._sock = Doomed(stream._sock, 0)
    assert stream.send(bytes(100_000), DONTWAIT) == 65536
    assert result() == bytes(65536)
    with pytest.raises(BrokenPipeError):
        stream.send(bytes(100_000), DONTWAIT)


def test_a_sender_that_only_gets_on_with_what_is_due_hears_so(house):
    stream, peer = house.accept()

    def on_the_reactor() -> None:  # which therefore does not get on with it by itself
        narrow = stream._sock = Narrow(stream._sock, 100)
        assert stream.send(b"x" * 1000, DONTWAIT) == 1000
        narrow.turns = 0
        with pytest.raises(BlockingIOError):
            stream.send(b"after")
        narrow.turns = 1
        assert stream.send(b"after") == 0

    house.do(on_the_reactor)
    send_all(stream, b"after")
    assert peer.read(1005) == b"x" * 1000 + b"after"


def test_a_connection_that_takes_little_at_a_time_gets_everything(house, version):
    stream, peer = house.accept(version)
    data = random.Random(6).randbytes(100_000)
    stream._sock = Narrow(stream._sock, 1999)
    result = in_thread(peer.rest)
    rest = data
    while rest:
        with contextlib.suppress(BlockingIOError):
            rest = rest[stream.send(rest[:20_000], DONTWAIT) :]
    stream.shutdown(socket.SHUT_WR)
    assert result() == data


def test_a_half_close_comes_after_what_is_due(house, version):
    stream, peer = house.accept(version, buffers=SMALL)
    sent = fill(stream)
    stream.shutdown(socket.SHUT_WR)
    stream.shutdown(socket.SHUT_WR)
    assert stream._due
    assert peer.rest() == sent
    peer.send(b"still here")
    assert receive(stream) == b"still here"


@pytest.mark.parametrize("said", [False, True], ids=["close", "half-close, close"])
@pytest.mark.parametrize("registered", ["never", "forgotten", "watched"])
def test_a_close_loses_nothing_that_is_due(any_house, registered, said):
    """`Reactor.forget` leaves the kernel's registration in place, since a close follows; but this one comes later."""
    stream, peer = any_house.accept(buffers=SMALL)
    calls = []
    if registered != "never":
        any_house.do(lambda: any_house.reactor.add(stream.fileno(), READ, calls.append))
    sent = fill(stream)
    fd = stream.fileno()

    def close() -> None:
        if registered != "never":
            any_house.reactor.forget(fd)
        if said:
            stream.shutdown(socket.SHUT_WR)
        stream.close()
        assert stream.fileno() == -1

    if registered == "watched":
        eventually(lambda: any_house.do(lambda: stream._watched >= 0))
    any_house.do(close)
    assert not any_house.home.settle(0)
    assert peer.rest() == sent
    assert any_house.home.settle(PATIENCE)
    assert not calls
    any_house.close(stream)


def test_a_close_after_a_reset_was_asked_for_is_one(house):
    stream, peer = house.accept(buffers=SMALL)
    fill(stream)
    eventually(lambda: house.do(lambda: stream._watched >= 0), "its descriptor was duplicated")
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    house.close(stream)
    assert house.home.settle(0)
    with pytest.raises(ConnectionResetError):
        peer.rest()


def test_a_close_says_goodbye(house, version):
    stream, peer = house.accept(version)
    stream.send(b"answer", DONTWAIT)
    house.close(stream)
    assert peer.rest() == b"answer"


def test_a_close_of_a_lost_connection_is_quiet(house):
    stream, peer = house.accept(buffers=SMALL)
    fill(stream)
    peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    peer.close()
    eventually(lambda: not house.do(lambda: stream._armed), "the reactor has noticed")
    house.close(stream)


def test_a_peer_that_is_lost_ends_a_close_that_lasts(house):
    stream, peer = house.accept(buffers=SMALL)
    fill(stream)
    house.close(stream)
    assert not house.home.settle(0)
    peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    peer.close()
    assert house.home.settle(PATIENCE)


def test_a_close_does_not_wait_for_ever(house, monkeypatch):
    monkeypatch.setattr(stream_module, "FLUSH", 0.05)
    stream, peer = house.accept(buffers=SMALL)
    fill(stream)
    house.close(stream)
    assert house.home.settle(PATIENCE)
    with pytest.raises(ConnectionResetError):
        peer.rest()


def test_without_a_descriptor_to_spare_what_is_due_goes_out_later(house, monkeypatch):
    monkeypatch.setattr(stream_module, "RETRY", 0.01)
    refused = threading.Event()
    dup = os.dup

    def refuse_once(fd: int) -> int:
        if refused.is_set():
            return dup(fd)
        refused.set()
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "dup", refuse_once)
    stream, peer = house.accept(buffers=SMALL)
    sent = fill(stream)
    assert refused.wait(PATIENCE)
    assert peer.read(len(sent)) == sent


@pytest.mark.parametrize("closed", [False, True], ids=["open", "closed"])
def test_a_bug_in_what_the_reactor_does_for_it_costs_this_connection_only(house, monkeypatch, closed):
    stream, peer = house.accept(buffers=SMALL)
    fill(stream)
    if closed:
        house.close(stream)
    house.do(lambda: stream.crashed(ValueError("bug")))
    house.close(stream)
    assert house.home.settle(0)
    with pytest.raises((ssl.SSLEOFError, ConnectionResetError)):
        peer.rest()


# Key updates ------------------------------------------------------------------------------------------------------


@needs_key_update
def test_a_key_update_is_answered_and_is_no_data(house):
    stream, peer = house.accept()
    for requested in (True, False, True):
        peer.sock.sendall(peer.update_keys(requested))
        assert readable(stream)
        with pytest.raises(BlockingIOError):
            stream.recv(65536, DONTWAIT)
        peer.send(b"question")
        assert receive(stream) == b"question"
        stream.send(b"answer", DONTWAIT)
        assert peer.read(6) == b"answer"


@needs_key_update
def test_the_answer_to_a_key_update_waits_for_whoever_is_sending(house):
    """It was encrypted after what that thread still sends, and must arrive after it."""
    stream, peer = house.accept(buffers=SMALL)
    sent = fill(stream)
    more = random.Random(7).randbytes(MOST)
    result = in_thread(partial(send_all, stream, more))
    eventually(lambda: stream._sending, "it waits")
    for _ in range(2):  # OpenSSL answers one with the next that it encrypts, or reading the next update
        peer.sock.sendall(peer.update_keys() + peer.seal(b"question"))
        assert receive(stream) == b"question"
    house.do(lambda: stream._writable(WRITE))  # as it may come to pass between two of the peer's reads
    with stream._lock:
        assert stream._outgoing.pending
        assert stream._sending
    assert peer.read(len(sent) + len(more)) == sent + more
    assert result() is None
    stream.send(b"under the next key", DONTWAIT)
    assert peer.read(18) == b"under the next key"


@needs_key_update
def test_no_answer_follows_close_notify(house):
    stream, peer = house.accept(buffers=SMALL)
    sent = fill(stream)
    stream.shutdown(socket.SHUT_WR)
    due = stream._due
    for _ in range(3):
        peer.sock.sendall(peer.update_keys() + peer.seal(b"data"))
        assert receive(stream) == b"data"
    assert due.endswith(stream._due)
    assert peer.rest() == sent
    assert not peer.incoming.pending
    assert peer.sock.recv(1) == b""


@needs_key_update
def test_key_updates_whose_answers_nobody_reads_end_the_connection(house, monkeypatch):
    """OpenSSL answers any number of them; what is kept for the peer must stay bounded."""
    monkeypatch.setattr(stream_module, "MOST_DUE", 10_000)
    stream, peer = house.accept()
    stream._sock = Narrow(stream._sock, 0)

    def flood() -> None:
        while True:
            peer.sock.sendall(b"".join(peer.update_keys() for _ in range(100)))

    result = in_thread(flood)
    with pytest.raises(TlsBroken):
        receive_all(stream)
    assert len(stream._due) <= stream_module.MOST_DUE + stream_module.LEAST
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    house.close(stream)
    assert isinstance(result(), OSError)


# Pumps ------------------------------------------------------------------------------------------------------------

BLOCK = random.Random(8).randbytes(1_000_003)


class FullDuplex:
    """A peer that sends and receives at the same time, on a thread of its own, and updates its keys now and then."""

    def __init__(self, peer: Peer, blocks: int, *, updates: bool) -> None:
        self.peer = peer
        self.left = blocks
        self.updates = updates
        self.out = b""
        self.received = hashlib.sha256()
        self.octets = 0

    def run(self) -> tuple[int, str]:
        sock = self.peer.sock
        sock.setblocking(False)
        ended = said = False
        while not (ended and said and not self.out):
            events = (select.POLLOUT if self.out or not said else 0) | (0 if ended else select.POLLIN)
            poller = select.poll()
            poller.register(sock, events)
            ready = poller.poll(PATIENCE * 1000)
            assert ready, "neither side gets on"
            if ready[0][1] & (select.POLLIN | select.POLLHUP) and not ended:
                ended = self.receive()
            if ready[0][1] & select.POLLOUT:
                if not self.out and not said:
                    said = self.produce()
                self.send()
        return self.octets, self.received.hexdigest()

    def produce(self) -> bool:
        if not self.left:
            self.out += self.peer.goodbye()
            return True
        self.left -= 1
        self.out += self.peer.seal(BLOCK)
        if self.updates:
            self.out += self.peer.update_keys()
        return False

    def send(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self.out = self.out[self.peer.sock.send(self.out) :]

    def receive(self) -> bool:
        self.peer.fill()
        while True:
            try:
                data = self.peer.tls.read(65536)
            except ssl.SSLWantReadError:
                self.out += self.peer.outgoing.read()
                return False
            except ssl.SSLZeroReturnError:
                return True
            if not data:
                return True
            self.received.update(data)
            self.octets += len(data)


@pytest.mark.parametrize("updates", [False, pytest.param(True, marks=needs_key_update)], ids=["", "key updates"])
def test_pumps_relay_both_ways_at_once(house, updates):
    """50 MB each way; with key updates, each thread that receives has something to say in the other's direction."""
    client, client_peer = house.accept()
    backend, backend_peer = house.connect()
    blocks = 50
    pumps = Pumps()
    flows = [Flow(client, backend), Flow(backend, client)]
    for flow in flows:
        flow.wait_at_most(PATIENCE, PATIENCE)
        pumps.run("pump", partial(relay_stream, flow))
    results = [in_thread(FullDuplex(peer, blocks, updates=updates).run) for peer in (client_peer, backend_peer)]
    expected = hashlib.sha256()
    for _ in range(blocks):
        expected.update(BLOCK)
    for result in results:
        assert result() == (blocks * len(BLOCK), expected.hexdigest())
    pumps.stop()
    assert [(flow.end, flow.octets) for flow in flows] == [(End.DONE, blocks * len(BLOCK))] * 2


def test_a_body_of_known_length_ends_where_it_ends_though_more_came_with_it(house):
    """One record holds the end of a body and the next request: that must never go to the first one's backend."""
    client, peer = house.accept()
    theirs, ours = connection()
    with theirs, ours:
        body = LengthBody(1000)
        flow = Flow(client, ours)
        flow.wait_at_most(PATIENCE, PATIENCE)
        peer.send(b"x" * 1000 + b"GET / HTTP/1.1")
        relay_body(flow, body, as_is)
        ours.shutdown(socket.SHUT_WR)
        assert flow.end is End.DONE
        assert body.rest == b"GET / HTTP/1.1"
        assert theirs.recv(65536) == b"x" * 1000
        assert theirs.recv(65536) == b""


def test_a_truncated_stream_is_a_source_that_was_lost(house):
    """What a body that only a close ends may be lacking."""
    client, peer = house.accept()
    backend, backend_peer = house.connect()
    peer.send(b"some of it")
    peer.sock.shutdown(socket.SHUT_WR)
    flow = Flow(client, backend)
    flow.wait_at_most(PATIENCE, PATIENCE)
    relay_stream(flow)
    assert flow.end is End.SOURCE_LOST
    assert backend_peer.read(10) == b"some of it"


def test_a_slow_sink_is_not_stuck_and_one_that_takes_nothing_is(house):
    client, _ = house.accept(buffers=SMALL)
    theirs, ours = connection()
    with theirs, ours:
        flow = Flow(ours, client)
        flow.wait_at_most(PATIENCE, 0.08)
        fill(client)
        theirs.sendall(b"x" * 100_000)
        relay_stream(flow)
        assert flow.end is End.SINK_STUCK
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)


@pytest.mark.parametrize("seed", range(4))
def test_directions_change_hands_and_nothing_is_lost_or_stays_behind(house, seed):
    """Sends that wait and sends that do not, while a thread receives, keys change and the peer reads as it likes.

    In the end nobody calls any more, and what is due must go out all the same.
    """
    stream, peer = house.accept(buffers=SMALL)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", 0, 1000))
    rng = random.Random(seed)
    data = rng.randbytes(1_500_000)

    def play_peer() -> str:
        mine = random.Random(-seed)
        received = hashlib.sha256()
        while piece := peer.recv():
            received.update(piece)
            if mine.random() < 0.05 and CAN_UPDATE:
                peer.sock.sendall(peer.update_keys() + peer.seal(b"tick"))
        peer.sock.sendall(peer.goodbye())
        return received.hexdigest()

    receiver = in_thread(lambda: b"".join(iter(partial(stream.recv, 65536), b"")))
    result = in_thread(play_peer)
    rest = memoryview(data)
    while rest:
        piece = rest[: rng.choice((1, 1000, 20_000, 200_000))]
        with contextlib.suppress(BlockingIOError):
            rest = rest[stream.send(piece, rng.choice((0, DONTWAIT))) :]
        with stream._lock:
            assert stream._armed or not (stream._due or stream._outgoing.pending)
    stream.shutdown(socket.SHUT_WR)
    assert result() == hashlib.sha256(data).hexdigest()
    assert set(receiver()) <= set(b"tick")


# Handshakes -------------------------------------------------------------------------------------------------------


def test_data_behind_the_last_flight_is_announced_to_whoever_registers_next(house, version):
    """A client's request may follow its Finished so closely that both arrive in one piece."""
    theirs, outcome = house.serve(server_context(version))
    peer = Peer(theirs, client_context(version))
    assert not peer.hello()
    theirs.sendall(peer.outgoing.read())
    while not peer.hello():
        if peer.outgoing.pending:  # TLS 1.2: the Finished comes before the server's
            theirs.sendall(peer.outgoing.read())
        peer.fill()
    theirs.sendall(peer.outgoing.read() + peer.seal(b"GET / HTTP/1.1\r\n") + peer.seal(b"\r\n"))
    stream = house.keep(outcome.wait())
    assert receive(stream) + (receive(stream) if readable(stream, 0) else b"") == b"GET / HTTP/1.1\r\n\r\n"


@pytest.mark.parametrize("octets", [1, 100, 10_000], ids=["an octet", "some", "all"])
def test_what_the_caller_had_received_before_counts(house, version, octets):
    theirs, ours = connection()
    house.peers.append(theirs)
    peer = Peer(theirs, client_context(version))
    peer.hello()
    hello = peer.outgoing.read()
    outcome = house.begin(ours, server_context(version), first=hello[:octets])
    theirs.sendall(hello[octets:])
    peer.handshake()
    stream = house.keep(outcome.wait())
    stream.send(b"answer", DONTWAIT)
    assert peer.read(6) == b"answer"


def test_a_handshake_may_come_octet_by_octet(house, version):
    theirs, outcome = house.serve(server_context(version))
    peer = Peer(theirs, client_context(version))
    while not peer.hello():
        for octet in peer.outgoing.read():
            theirs.sendall(bytes((octet,)))
        peer.fill()
    for octet in peer.outgoing.read():
        theirs.sendall(bytes((octet,)))
    house.keep(outcome.wait())


def test_a_flight_that_the_kernel_does_not_take_at_once_is_sent_in_pieces(house, version):
    theirs, ours = connection()
    house.peers.append(theirs)
    outcome = house.begin(Narrow(ours, 333), server_context(version))
    peer = Peer(theirs, client_context(version))
    peer.handshake()
    stream = house.keep(outcome.wait())
    peer.send(b"question")
    assert receive(stream) == b"question"
    send_all(stream, b"answer")
    assert peer.read(6) == b"answer"


@pytest.mark.parametrize("first", [b"", b"GET"], ids=["unread", "begun"])
def test_plain_http_is_told_with_the_connection_open_and_the_request_in_it(house, first):
    theirs, ours = connection()
    with theirs, ours:
        theirs.sendall(b"GET / HTTP/1.1\r\n\r\n"[len(first) :])
        outcome = house.begin(ours, server_context(), first=first)
        assert outcome.failure() is HTTP
        assert first + ours.recv(65536, DONTWAIT) == b"GET / HTTP/1.1\r\n\r\n"
        ours.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        assert theirs.recv(65536).startswith(b"HTTP/1.1 400")


def break_off_unused(theirs: socket.socket) -> None:
    theirs.close()


def break_off_half_sent(theirs: socket.socket) -> None:
    peer = Peer(theirs, client_context())
    peer.hello()
    theirs.sendall(peer.outgoing.read()[:100])
    theirs.close()


def break_off_half_way(theirs: socket.socket) -> None:
    peer = Peer(theirs, client_context())
    peer.hello()
    theirs.sendall(peer.outgoing.read())
    peer.fill()
    theirs.close()


def break_off_by_reset(theirs: socket.socket) -> None:
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    break_off_half_sent(theirs)


def send_garbage(theirs: socket.socket) -> None:
    theirs.sendall(GARBAGE)


def send_a_broken_hello(theirs: socket.socket) -> None:
    theirs.sendall(b"\x16\x03\x01\x00\x20" + GARBAGE[:32])


def send_garbage_after_the_hello(theirs: socket.socket) -> None:
    peer = Peer(theirs, client_context())
    peer.hello()
    theirs.sendall(peer.outgoing.read() + GARBAGE)


def refuse_the_certificate(theirs: socket.socket) -> None:
    peer = Peer(theirs, ssl.create_default_context())
    with pytest.raises(ssl.SSLCertVerificationError):
        peer.handshake()
    theirs.sendall(peer.outgoing.read())


def speak_an_old_version(theirs: socket.socket) -> None:
    context = client_context()
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    peer = Peer(theirs, context)
    peer.hello()
    theirs.sendall(peer.outgoing.read())


FAULTS = [
    (break_off_unused, UNUSED),
    (break_off_half_sent, "closed within the handshake"),
    (break_off_half_way, ""),
    (break_off_by_reset, "Connection reset by peer"),
    (send_garbage, ""),
    (send_a_broken_hello, ""),
    (send_garbage_after_the_hello, ""),
    (refuse_the_certificate, "unknown ca"),
    (speak_an_old_version, "unsupported protocol"),
]


@pytest.mark.parametrize(("fault", "reason"), FAULTS, ids=[fault.__name__ for fault, _ in FAULTS])
def test_a_handshake_that_fails_is_told_in_words_and_leaves_nothing(house, fault, reason):
    theirs, outcome = house.serve()
    fault(theirs)
    assert reason in outcome.failure()
    assert outcome.failure()
    assert outcome.calls == 1
    if theirs.fileno() >= 0:
        assert ended(theirs)


def test_the_client_hears_by_an_alert_why_it_is_refused(house):
    theirs, outcome = house.serve()
    speak_an_old_version(theirs)
    outcome.failure()
    alert = theirs.recv(65536)
    assert (alert[0], alert[5:7]) == (21, b"\x02\x46")  # fatal, protocol_version
    assert theirs.recv(1) == b""


@pytest.mark.parametrize(
    ("name", "make_context", "reason"),
    [
        ("elsewhere.test", client_context, "elsewhere.test"),
        ("localhost", ssl.create_default_context, "issuer certificate"),
        ("localhost", partial(client_context, TLS12), "version"),
    ],
    ids=["another name", "unknown issuer", "no common version"],
)
def test_a_backend_that_cannot_be_trusted_is_refused(house, name, make_context, reason):
    theirs, ours = connection()
    house.peers.append(theirs)
    outcome = house.begin(ours, make_context(), server_side=False, server_hostname=name)
    context = server_context()
    context.minimum_version = TLS13
    peer = Peer(theirs, context, server_side=True)
    with pytest.raises(ssl.SSLError):
        peer.handshake()
    peer.flush()
    assert reason in outcome.failure().lower()


def test_a_handshake_is_bounded_in_time(house):
    silent, first = house.serve(timeout=0.05)
    slow, second = house.serve(timeout=0.05)
    slow.sendall(b"\x16\x03\x01")
    for outcome in (first, second):
        assert outcome.failure() == "not complete within 0.05 s"
    assert silent.recv(1) == b""
    assert slow.recv(1) == b""


class Gate:
    """A server's context whose handshakes stop in the middle of a worker's step until they are let go."""

    def __init__(self) -> None:
        self.context = server_context()
        self.context.sni_callback = self._stop
        self.entered = threading.Semaphore(0)
        self.opened = threading.Event()

    def _stop(self, tls: ssl.SSLObject, name: str, context: ssl.SSLContext) -> None:
        self.entered.release()
        assert self.opened.wait(PATIENCE)

    def wait(self) -> None:
        assert self.entered.acquire(timeout=PATIENCE)


def say_hello(theirs: socket.socket) -> Peer:
    peer = Peer(theirs, client_context())
    peer.hello()
    theirs.sendall(peer.outgoing.read())
    return peer


def test_a_handshake_whose_time_is_over_while_it_is_computed_ends_after_that(house):
    gate = Gate()
    theirs, outcome = house.serve(gate.context)
    say_hello(theirs)
    gate.wait()
    handshake = outcome.handshake
    handshake._ends = handshake.deadline = 0.0
    eventually(lambda: house.do(lambda: handshake.deadline > 0.0), "it was noticed")
    assert not outcome.over
    gate.opened.set()
    assert outcome.failure() == f"not complete within {PATIENCE:g} s"


def test_handshakes_do_not_hold_up_the_reactor(house):
    """Both workers stand still, and it goes on."""
    gate = Gate()
    outcomes = []
    for _ in range(2):
        theirs, outcome = house.serve(gate.context)
        outcomes.append((say_hello(theirs), outcome))
        gate.wait()
    assert house.do(lambda: "alive") == "alive"
    gate.opened.set()
    for peer, outcome in outcomes:
        peer.fill()
        peer.handshake()
        house.keep(outcome.wait())


def test_beyond_the_most_at_once_handshakes_wait_unread_and_those_that_are_silent_do_not_count():
    house = House(threads=2, most=1)
    gate = Gate()
    for _ in range(20):
        house.serve()
    begun: list[tuple[Peer, Outcome]] = []
    for number in range(4):
        theirs, outcome = house.serve(gate.context, timeout=0.05 if number == 2 else PATIENCE)
        begun.append((say_hello(theirs), outcome))
        if number == 0:
            gate.wait()
    assert begun[2][1].failure() == "not complete within 0.05 s"
    house.connect()  # to a backend: that is never held up by clients
    assert "1 of 1 admitted, 2 waiting" in house.do(lambda: repr(house.home))
    gate.opened.set()
    for number in (0, 1, 3):
        peer, outcome = begun[number]
        peer.fill()
        peer.handshake()
        house.keep(outcome.wait())
    house.stop()


def cancel(house: House, outcome: Outcome) -> None:
    house.do(outcome.handshake.cancel)
    house.do(outcome.handshake.cancel)


@pytest.mark.parametrize("said", ["nothing", "a part", "its hello", "all"])
def test_a_handshake_can_be_cancelled_while_the_peer_is_waited_for(house, said):
    theirs, outcome = house.serve()
    if said == "a part":
        theirs.sendall(b"\x16\x03\x01")
        eventually(lambda: not readable(outcome.handshake._sock, 0), "it was taken")
    elif said == "its hello":
        say_hello(theirs).fill()
    elif said == "all":
        Peer(theirs, client_context()).handshake()
        house.keep(outcome.wait())
    cancel(house, outcome)
    if said == "all":
        outcome.stream.send(b"answer", DONTWAIT)
    else:
        assert ended(theirs)
        assert not outcome.over


def ended(theirs: socket.socket) -> bool:
    with contextlib.suppress(ConnectionResetError):
        while theirs.recv(65536):
            pass
    return True


@pytest.mark.parametrize("where", ["in a worker's hands", "before a worker", "for want of room"])
def test_a_handshake_can_be_cancelled_while_it_is_computed_or_waits_for_that(where):
    """A worker has the socket then, and a descriptor that is closed under its hands may become another connection's."""
    house = House(threads=1, most=1 if where == "for want of room" else 10)
    gate = Gate()
    theirs, outcome = house.serve(gate.context)
    say_hello(theirs)
    gate.wait()
    if where != "in a worker's hands":
        theirs, outcome = house.serve(gate.context)
        say_hello(theirs)
        eventually(lambda: house.do(lambda: not outcome.handshake._watched), "it was noticed")
    cancel(house, outcome)
    assert (outcome.handshake._sock.fileno() < 0) == (where == "for want of room")
    gate.opened.set()
    assert ended(theirs)
    eventually(lambda: house.do(lambda: not house.home._handshakes or where != "in a worker's hands"))
    assert not outcome.over
    house.stop()


def test_the_end_of_everything_finds_handshakes_and_closes_in_every_state():
    """The reactor has ended already, as it does when a balancer stops."""
    house = House(threads=1)
    lingering, _ = house.accept(buffers=SMALL)
    fill(lingering)
    house.close(lingering)
    gate = Gate()
    for say in (lambda theirs: None, lambda theirs: theirs.sendall(b"\x16"), say_hello, say_hello):
        theirs, outcome = house.serve(gate.context)
        say(theirs)
        if say is say_hello:
            eventually(lambda outcome=outcome: house.do(lambda: not outcome.handshake._watched), "it was noticed")
    gate.wait()
    cancel(house, outcome)
    house.reactor.stop()
    gate.opened.set()
    house.home.stop()
    for peer in house.peers:
        assert ended(peer)
        peer.close()
    assert not house.errors


def test_a_handshaker_that_was_never_asked_for_anything_stops():
    reactor = Reactor(on_error=print)
    reactor.stop()
    Handshaker(reactor, 2, 10, print).stop()


class Clumsy(Outcome):
    """An owner with a bug, which is told so."""

    def __init__(self) -> None:
        super().__init__()
        self.crashes: list[str] = []

    def on_done(self, stream: TlsStream) -> None:
        super().on_done(stream)
        raise ValueError("bug")

    def crashed(self, error: Exception) -> None:
        self.crashes.append(str(error))


def test_an_owner_that_fails_at_its_connection_is_told_so(house):
    outcome = Clumsy()
    theirs, _ = house.serve(outcome=outcome)
    Peer(theirs, client_context()).handshake()
    house.keep(outcome.wait())
    house.do(lambda: None)
    assert outcome.crashes == ["bug"]
    assert len(house.errors) == 1
    house.errors.clear()


def test_a_bug_within_a_handshake_is_reported_and_costs_one_connection(house):
    theirs, ours = connection()
    house.peers.append(theirs)
    outcome = house.begin(ours, client_context(), server_side=False, server_hostname="no\0name")
    assert outcome.failure() == "an error within the balancer"
    assert len(house.errors) == 1
    house.errors.clear()
    house.accept()


def test_a_bug_in_the_reactors_part_of_a_handshake_ends_it(house):
    theirs, outcome = house.serve()
    house.do(lambda: outcome.handshake.crashed(ValueError("bug")))
    house.do(lambda: outcome.handshake.crashed(ValueError("bug")))
    assert outcome.failure() == "an error within the balancer"
    assert outcome.calls == 1
    assert ended(theirs)


def test_hundreds_of_handshakes_of_which_a_third_fail_among_silent_connections(house):
    """The rest of them work, and nothing is left of the others, nor of those that never say anything."""
    rng = random.Random(9)
    faults = [fault for fault, _ in FAULTS if fault is not speak_an_old_version]
    silent = [house.serve() for _ in range(50)]
    works: list[Callable[[], object]] = []

    def succeed(theirs: socket.socket, outcome: Outcome, number: int) -> None:
        peer = Peer(theirs, client_context(rng.choice((TLS12, TLS13))))
        peer.handshake()
        peer.send(b"%d" % number)
        assert receive(house.keep(outcome.wait())) == b"%d" % number

    def fail(theirs: socket.socket, outcome: Outcome, number: int) -> None:
        faults[number % len(faults)](theirs)
        assert outcome.failure()

    for number in range(300):
        theirs, outcome = house.serve()
        works.append(partial(fail if number % 3 == 0 else succeed, theirs, outcome, number))
    rng.shuffle(works)

    def work() -> None:
        while works:
            works.pop()()

    results = [in_thread(work) for _ in range(3)]
    assert [result() for result in results] == [None] * 3
    assert not any(outcome.over for _, outcome in silent)


# A foreign client -------------------------------------------------------------------------------------------------


CONTEXT = server_context()  # one for all, so that its tickets are good for the next connection


class Shouter:
    """Answers each line in capitals, on the reactor, as a session would."""

    def __init__(self, house: House) -> None:
        self.house = house
        self.ended = threading.Event()

    def on_done(self, stream: TlsStream) -> None:
        self.stream = self.house.keep(stream)
        self.house.reactor.add(stream.fileno(), READ, self.on_ready)

    def on_failed(self, reason: str) -> None:
        self.house.errors.append(reason)
        self.ended.set()

    def on_ready(self, mask: int) -> None:
        try:
            data = self.stream.recv(65536, DONTWAIT)
        except BlockingIOError:
            return
        except ConnectionResetError:
            data = b""
        if data:
            self.stream.send(data.upper(), DONTWAIT)
        else:
            self.house.reactor.forget(self.stream.fileno())
            self.stream.close()
            self.ended.set()


@pytest.fixture
def shout(house) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Has `openssl s_client` connect to a Shouter."""
    with contextlib.ExitStack() as stack:

        def connect(*options: str) -> subprocess.Popen[str]:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            listener.settimeout(PATIENCE)
            port = listener.getsockname()[1]
            command = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-servername", "localhost"]
            command += ["-CAfile", str(CERTIFICATES / "root.pem"), "-verify_return_error", *options]
            client = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                bufsize=1,
            )
            stack.enter_context(client)
            stack.callback(client.kill)
            sock, _ = listener.accept()
            sock.setblocking(True)
            client.shouter = Shouter(house)
            house.begin(sock, CONTEXT, outcome=client.shouter)
            return client

        yield connect


def read_until(client: subprocess.Popen[str], text: str) -> str:
    """The client's output up to the line that has this text. (A client that hangs is ended by pytest's time limit.)"""
    lines = []
    for line in client.stdout:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError(f"no {text!r} in: {''.join(lines)}")


def say(client: subprocess.Popen[str], line: str) -> None:
    client.stdin.write(line + "\n")
    client.stdin.flush()


@needs_openssl
@pytest.mark.parametrize("option", ["-tls1_2", "-tls1_3"])
def test_openssl_talks_updates_keys_and_says_goodbye(house, shout, option):
    client = shout(option)
    read_until(client, "Verify return code: 0")
    say(client, "hello")
    read_until(client, "HELLO")
    if option == "-tls1_3":
        for command in ("K", "k", "K"):
            say(client, command)
            read_until(client, "KEYUPDATE")
            say(client, "and on")
            read_until(client, "AND ON")
    say(client, "Q")
    assert client.shouter.ended.wait(PATIENCE)
    assert client.wait(PATIENCE) == 0


@needs_openssl
@pytest.mark.parametrize("option", ["-tls1_2", "-tls1_3"])
def test_a_ticket_resumes_a_session(house, shout, option, tmp_path):
    first = shout(option, "-sess_out", str(tmp_path / "session"))
    say(first, "hello")
    assert "New, TLSv1." in read_until(first, "HELLO")
    say(first, "Q")
    first.wait(PATIENCE)
    second = shout(option, "-sess_in", str(tmp_path / "session"))
    say(second, "again")
    assert "Reused, TLSv1." in read_until(second, "AGAIN")
    say(second, "Q")
    assert second.shouter.ended.wait(PATIENCE)
    second.wait(PATIENCE)
