"""The beginning of a connection from a peer that sends PROXY headers: whole, broken, late, slow, or none at all.

Sections are those of HAProxy's proxy-protocol.txt. The connections are real and so is the balancer; what it says of
them is read from its log and at the operator's port.
"""

from __future__ import annotations

import json
import re
import socket
import ssl
import struct
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from balancer.balancer import LoadBalancer
from balancer.greeting import Greeting
from balancer.proxy_protocol import LOCAL_V2, SIGNATURE, UNKNOWN_V1, Address, v1, v2
from balancing import connect, log_lines, running
from conftest import PATIENCE, eventually
from fakes import Answer, Connection, FakeBackend, read_response
from test_certificates import DATA
from test_http_mode import GET, OK, QUIET, at, leases_come_back, settled

CLIENT, CLIENT6 = ("192.0.2.1", 56324), ("2001:db8::1", 56324)
FRONT, FRONT6 = ("198.51.100.7", 443), ("2001:db8:ffff::7", 443)
NAMED = {"proxy_protocol_from": ["127.0.0.1"]}
ADMIN = {"admin": {"address": "127.0.0.1:0"}}
SHORT = {"timeouts": {"handshake": 0.2}}
SOON = 0.05  # seconds between two pieces that come too slowly
TLS = {"tls": {"certificates": [{"cert": str(DATA / "local.pem"), "key": str(DATA / "ec.key")}]}}
WITH_TLVS = SIGNATURE + struct.pack("!BBH4s4sHH", 0x21, 0x11, 12 + 7, b"\xc0\0\2\1", b"\xc6\x33\x64\7", 56324, 443)
WITH_TLVS += b"\x02\0\4host"


@contextmanager
def greeting(tmp_path: Path, script: Any = OK, **keys: Any) -> Iterator[tuple[LoadBalancer, FakeBackend]]:
    """A balancer that expects headers from this machine, and its backend, which was probed. All is over at the end."""
    with FakeBackend(script) as backend, running(tmp_path, at(backend), **(QUIET | NAMED | ADMIN | keys)) as balancer:
        settled(balancer)
        yield balancer, backend
        leases_come_back(balancer)


def ask(balancer: LoadBalancer, octets: bytes) -> Answer:
    """The answer to what is said on a connection of its own, in one segment."""
    with connect(balancer) as sock:
        sock.sendall(octets)
        return read_response(sock)


def change(balancer: LoadBalancer, **keys: Any) -> None:
    """Another configuration, in force when this returns."""
    balancer.reconfigure(replace(balancer.config, **keys), "test")
    done = threading.Event()
    balancer.reactor.call_soon(done.set)
    assert done.wait(PATIENCE)


def field(request: bytes, name: str) -> list[str]:
    """The values that a request's head gives this field."""
    lines = request.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")[1:]
    pairs = (line.partition(":") for line in lines)
    return [value.strip() for given, _, value in pairs if given.lower() == name.lower()]


def lines(tmp_path: Path) -> list[tuple[str, str, str]]:
    """Client, code and what stands between, of each line of the log about a request or a connection."""
    found = (re.search(r"INFO (\S+) (.*) \d+\.\dms code=(\S\S)", line) for line in log_lines(tmp_path))
    return [(match[1], match[3], match[2]) for match in found if match]


def who(tmp_path: Path) -> list[str]:
    """The client of each such line."""
    return [client for client, _, _ in lines(tmp_path)]


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
        return json.load(answer)


def refusals(balancer: LoadBalancer, count: int = 1) -> list[tuple[str, str, str | None]]:
    """Address of the client, code and reason of whatever went wrong, the oldest first; waits until it is so many."""
    url = f"{balancer.admin_url}api/requests"
    eventually(lambda: len(get(url)["requests"]) >= count, "what there is to be explained")
    kept = [get(f"{url}/{one['id']}") for one in get(url)["requests"]]
    return [(one["client"].rpartition(":")[0], one["code"], one["told"]) for one in reversed(kept)]


def is_closed(sock: socket.socket) -> bool:
    """Whether the other side has nothing to say and ends: with octets unread the end is a reset."""
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def taken(balancer: LoadBalancer) -> int:
    """Octets of headers that are not whole."""
    return sum(len(one._header) for one in list(balancer.listener.sessions) if isinstance(one, Greeting))


def is_quiet(sock: socket.socket, seconds: float = SOON) -> bool:
    """Whether the other side neither speaks nor ends for a while."""
    sock.settimeout(seconds)
    try:
        return sock.recv(1) is None
    except TimeoutError:
        return True
    finally:
        sock.settimeout(PATIENCE)


# A header that is whole -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "client"),
    [
        (v1(CLIENT, FRONT), CLIENT),
        (v2(CLIENT, FRONT), CLIENT),
        (v1(CLIENT6, FRONT6), CLIENT6),
        (v2(CLIENT6, FRONT6), CLIENT6),
        (v1(CLIENT, FRONT6), CLIENT),  # which is written ::ffff:192.0.2.1
        (WITH_TLVS, CLIENT),
    ],
    ids=["v1", "v2", "v1-ipv6", "v2-ipv6", "mapped", "tlvs"],
)
def test_the_client_is_the_one_that_the_header_names(tmp_path: Path, header: bytes, client: Address) -> None:
    """In the log, and in what the backend is told; header and request come in one segment."""
    with greeting(tmp_path) as (balancer, backend), connect(balancer) as sock, sock.makefile("rb") as answers:
        sock.sendall(header + GET)
        assert read_response(answers).body == b"ok"
        sock.sendall(GET)
        assert read_response(answers).body == b"ok"
    assert [field(request, "X-Forwarded-For") for request in backend.requests] == [[client[0]]] * 2
    host = f"[{client[0]}]" if ":" in client[0] else client[0]
    assert who(tmp_path) == [f"{host}:{client[1]}"] * 2


@pytest.mark.parametrize("header", [v1(CLIENT, FRONT), v2(CLIENT, FRONT), WITH_TLVS], ids=["v1", "v2", "tlvs"])
def test_a_header_may_come_in_as_many_pieces_as_it_has_octets(tmp_path: Path, header: bytes) -> None:
    with greeting(tmp_path) as (balancer, backend), connect(balancer) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for octet in header:
            sock.sendall(bytes((octet,)))
        assert is_quiet(sock)
        assert backend.requests == []
        sock.sendall(GET)
        assert read_response(sock).status == 200
    assert who(tmp_path) == ["192.0.2.1:56324"]


def test_the_longest_headers_are_taken_whole(tmp_path: Path) -> None:
    """Version 1 ends within 107 octets (2.1); in version 2 the length is 16 bits (2.2)."""
    unknown = b"PROXY UNKNOWN " + b"x" * 91 + b"\r\n"
    assert len(unknown) == 107
    block = struct.pack("!4s4sHH", b"\xc0\0\2\1", b"\xc6\x33\x64\7", 56324, 443) + bytes(65535 - 12)
    with greeting(tmp_path) as (balancer, _):
        assert ask(balancer, unknown + GET).status == 200
        assert ask(balancer, SIGNATURE + struct.pack("!BBH", 0x21, 0x11, 65535) + block + GET).status == 200
    assert [client.rpartition(":")[0] for client in who(tmp_path)] == ["127.0.0.1", "192.0.2.1"]


@pytest.mark.parametrize(
    "header",
    [
        UNKNOWN_V1,
        b"PROXY UNKNOWN ffff:f...f:ffff ffff:f...f:ffff 65535 65535\r\n",
        LOCAL_V2,
        SIGNATURE + struct.pack("!BBH", 0x20, 0x11, 12) + b"\xc0\0\2\1\xc6\x33\x64\7\xdc\4\1\xbb",
        SIGNATURE + struct.pack("!BBH216s", 0x21, 0x31, 216, b"/run/a.sock"),
    ],
    ids=["UNKNOWN", "UNKNOWN with words", "LOCAL", "LOCAL with addresses", "UNIX"],
)
def test_a_header_that_names_no_address_leaves_the_connections_own(tmp_path: Path, header: bytes) -> None:
    with greeting(tmp_path) as (balancer, backend), connect(balancer) as sock:
        own = "{}:{}".format(*sock.getsockname())
        sock.sendall(header + GET)
        assert read_response(sock).status == 200
    assert field(backend.requests[0], "X-Forwarded-For") == ["127.0.0.1"]
    assert who(tmp_path) == [own]


def test_what_looks_like_a_second_header_is_no_header(tmp_path: Path) -> None:
    """Who is behind the proxy may send one, too, and would be anybody it likes."""
    with greeting(tmp_path) as (balancer, backend):
        assert ask(balancer, v1(CLIENT, FRONT) + v1(("192.0.2.66", 1), FRONT) + GET).status == 400
        assert ask(balancer, v2(CLIENT, FRONT) + v2(("192.0.2.66", 1), FRONT) + GET).status == 400
    assert backend.requests == []
    assert who(tmp_path) == ["192.0.2.1:56324"] * 2


# Who may send one -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", [v1(CLIENT, FRONT), v2(CLIENT, FRONT), UNKNOWN_V1, LOCAL_V2])
@pytest.mark.parametrize("peers", [[], ["192.0.2.0/24", "::1"]])
def test_from_a_peer_that_is_not_named_it_is_no_request(tmp_path: Path, header: bytes, peers: list[str]) -> None:
    """Whoever connects could be anybody else."""
    with greeting(tmp_path, proxy_protocol_from=peers) as (balancer, backend):
        answer = ask(balancer, header + GET)
        assert answer.status == 400
    assert backend.requests == []
    [(client, code, _)] = lines(tmp_path)
    assert (client.rpartition(":")[0], code) == ("127.0.0.1", "PR")


def test_a_reload_that_names_peers_holds_for_connections_that_begin_after_it(tmp_path: Path) -> None:
    with greeting(tmp_path, proxy_protocol_from=[]) as (balancer, _), connect(balancer) as former:
        former.sendall(GET)
        assert read_response(former).status == 200
        change(balancer, proxy_protocol_from=("127.0.0.0/8",))
        former.sendall(GET)
        assert read_response(former).status == 200
        assert ask(balancer, v1(CLIENT, FRONT) + GET).status == 200
        change(balancer, proxy_protocol_from=())
        assert ask(balancer, GET).status == 200
    assert [client.rpartition(":")[0] for client in who(tmp_path)] == ["127.0.0.1"] * 2 + ["192.0.2.1", "127.0.0.1"]


# A header that is none --------------------------------------------------------------------------------------------

MALFORMED = {
    "a request": GET,
    "TLS": b"\x16\x03\x01\x02\x00\x01",
    "lower case": b"proxy TCP4 192.0.2.1 198.51.100.7 56324 443\r\n",
    "another family": b"PROXY UDP4 192.0.2.1 198.51.100.7 56324 443\r\n",
    "a leading zero": b"PROXY TCP4 192.0.2.01 198.51.100.7 56324 443\r\n",
    "a port too high": b"PROXY TCP4 192.0.2.1 198.51.100.7 65536 443\r\n",
    "families that differ": b"PROXY TCP4 2001:db8::1 198.51.100.7 56324 443\r\n",
    "no ports": b"PROXY TCP4 192.0.2.1 198.51.100.7\r\n",
    "a lone LF": b"PROXY TCP4 192.0.2.1 198.51.100.7 56324 443\n",
    "108 octets": b"PROXY UNKNOWN " + b"x" * 92 + b"\r\n",
    "no end": b"PROXY UNKNOWN " + b"x" * 100_000,
    "version 1 in binary": SIGNATURE + struct.pack("!BBH", 0x11, 0x11, 0),
    "an unknown command": SIGNATURE + struct.pack("!BBH", 0x22, 0x11, 12) + bytes(12),
    "an unknown family": SIGNATURE + struct.pack("!BBH", 0x21, 0x41, 12) + bytes(12),
    "a block too short": SIGNATURE + struct.pack("!BBH", 0x21, 0x21, 12) + bytes(12),
    "half a signature": SIGNATURE[:6] + GET,
}


def test_what_is_malformed_ends_the_connection_and_reaches_nobody(tmp_path: Path) -> None:
    """Without a word, which could be taken for an answer; the log and the operator's port say what was wrong."""
    with greeting(tmp_path) as (balancer, backend):
        for octets in MALFORMED.values():
            for rest in (b"", GET):
                with connect(balancer) as sock:
                    sock.sendall(octets + rest)
                    assert is_closed(sock), octets
        assert ask(balancer, v1(CLIENT, FRONT) + GET).status == 200
        told = refusals(balancer, 2 * len(MALFORMED))
    assert len(backend.requests) == 1
    assert [code for _, code, _ in lines(tmp_path)] == ["PR"] * 2 * len(MALFORMED) + ["--"]
    assert {(client, code) for client, code, _ in told} == {("127.0.0.1", "PR")}
    reasons = [reason for _, _, reason in told[::2]]
    assert all(reason and reason.startswith("a PROXY header was due: ") for reason in reasons)
    said = dict(zip(MALFORMED, reasons, strict=True))
    assert said["a request"] == "a PROXY header was due: begins with b'GET / HTTP/1.1\\r\\n', not with a PROXY header"
    assert said["108 octets"] == said["no end"] == "a PROXY header was due: a PROXY line of more than 107 octets"


HALVES = [v1(CLIENT, FRONT)[:20], v1(CLIENT, FRONT)[:-1], b"P", SIGNATURE[:3], v2(CLIENT, FRONT)[:-1], WITH_TLVS[:-1]]


@pytest.mark.parametrize("half", HALVES)
def test_a_connection_that_ends_within_its_header_is_told_of(tmp_path: Path, half: bytes) -> None:
    with greeting(tmp_path) as (balancer, backend), connect(balancer) as sock:
        sock.sendall(half)
        sock.shutdown(socket.SHUT_WR)
        assert is_closed(sock)
        assert refusals(balancer) == [("127.0.0.1", "CR", "the connection ended within its PROXY header")]
        assert not balancer.listener.sessions
    assert backend.requests == []
    assert [(code, what.split()[:2]) for _, code, what in lines(tmp_path)] == [("CR", ["tcp", f"{len(half)}/0"])]


def test_a_connection_that_is_reset_within_its_header_is_told_of(tmp_path: Path) -> None:
    with greeting(tmp_path) as (balancer, _):
        with connect(balancer) as sock:
            sock.sendall(HALVES[0])
            eventually(lambda: taken(balancer) == len(HALVES[0]))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        eventually(lambda: not balancer.listener.sessions)
    assert [code for _, code, _ in lines(tmp_path)] == ["CR"]


def test_a_connection_on_which_nothing_came_is_no_error(tmp_path: Path) -> None:
    """Checks of a port and browsers open some."""
    with greeting(tmp_path, **SHORT) as (balancer, _):
        with connect(balancer) as sock:
            assert is_closed(sock), "the time for a header is over"
        connect(balancer).close()
        eventually(lambda: not balancer.listener.sessions)
        assert refusals(balancer, 0) == []
    assert lines(tmp_path) == []


@pytest.mark.parametrize("half", HALVES)
def test_a_header_that_does_not_end_in_time_ends_the_connection(tmp_path: Path, half: bytes) -> None:
    with greeting(tmp_path, **SHORT) as (balancer, _), connect(balancer) as sock:
        sock.sendall(half)
        assert is_closed(sock)
        assert refusals(balancer) == [("127.0.0.1", "cR", "no PROXY header came in time")]


def test_a_header_that_drips_gets_no_more_time_than_one_that_stands_still(tmp_path: Path) -> None:
    """The time is for the whole of it, and not from one octet to the next."""
    dripping = threading.Event()

    def drip(sock: socket.socket) -> None:
        for octet in SIGNATURE + struct.pack("!BBH", 0x21, 0x11, 65535) + bytes(1000):
            try:
                sock.sendall(bytes((octet,)))
            except OSError:
                return
            if dripping.wait(SOON / 2):
                return

    with greeting(tmp_path, **SHORT) as (balancer, _), connect(balancer) as sock:
        thread = threading.Thread(target=drip, args=(sock,))
        thread.start()
        try:
            assert is_closed(sock)
        finally:
            dripping.set()
            thread.join()
        assert refusals(balancer) == [("127.0.0.1", "cR", "no PROXY header came in time")]


def test_many_that_say_nothing_or_half_of_it_keep_nobody_waiting(tmp_path: Path) -> None:
    with ExitStack() as stack, greeting(tmp_path) as (balancer, _):
        for number in range(100):
            sock = stack.enter_context(connect(balancer))
            sock.sendall(HALVES[number % len(HALVES)] if number % 2 else b"")
        eventually(lambda: len(balancer.listener.sessions) == 100)
        for _ in range(10):
            assert ask(balancer, v2(CLIENT, FRONT) + GET).status == 200
        assert len(balancer.listener.sessions) >= 100


# Stopping ---------------------------------------------------------------------------------------------------------


def test_a_header_that_began_before_a_stop_may_still_become_a_request(tmp_path: Path) -> None:
    """Whoever was accepted is served; that it was the last is said with the answer."""
    with greeting(tmp_path) as (balancer, _), connect(balancer) as sock:
        sock.sendall(HALVES[0])
        eventually(lambda: taken(balancer) == len(HALVES[0]))
        drained = threading.Event()
        balancer.drain(drained.set)
        eventually(lambda: balancer._front.draining)
        sock.sendall(v1(CLIENT, FRONT)[len(HALVES[0]) :] + GET)
        answer = read_response(sock)
        assert (answer.status, answer.headers["Connection"]) == (200, "close")
        sock.close()
        assert drained.wait(PATIENCE)


def test_a_stop_cuts_what_has_not_become_one(tmp_path: Path) -> None:
    with ExitStack() as stack:
        with greeting(tmp_path) as (balancer, _):
            half, silent = (stack.enter_context(connect(balancer)) for _ in range(2))
            half.sendall(HALVES[0])
            eventually(lambda: taken(balancer) == len(HALVES[0]))
            eventually(lambda: len(balancer.listener.sessions) == 2)
        assert is_closed(half)
        assert is_closed(silent)
    assert [code for _, code, _ in lines(tmp_path)] == ["KR"]


# TLS behind it ----------------------------------------------------------------------------------------------------


def trusting() -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(DATA / "root.pem"))


@pytest.mark.parametrize("header", [v1(CLIENT, FRONT), v2(CLIENT, FRONT), WITH_TLVS], ids=["v1", "v2", "tlvs"])
def test_tls_begins_behind_the_header(tmp_path: Path, header: bytes) -> None:
    """The header is in the clear (2): in one segment with the first octets of the handshake, and by itself."""
    with greeting(tmp_path, **TLS) as (balancer, backend):
        with connect(balancer) as sock:
            sock.sendall(header)
            with trusting().wrap_socket(sock, server_hostname="127.0.0.1") as client:
                client.sendall(GET)
                assert read_response(client).body == b"ok"
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        hello = trusting().wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
        with connect(balancer) as sock:
            before = header
            while True:
                try:
                    hello.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    sock.sendall(before + outgoing.read())
                    before = b""
                    incoming.write(sock.recv(65536))
            hello.write(GET)
            sock.sendall(outgoing.read())
            answer = b""
            while b"\r\n\r\nok" not in answer:
                try:
                    answer += hello.read()
                except ssl.SSLWantReadError:
                    incoming.write(sock.recv(65536))
    assert [field(request, "X-Forwarded-Proto") for request in backend.requests] == [["https"]] * 2
    assert who(tmp_path) == ["192.0.2.1:56324"] * 2


def test_plain_http_behind_the_header_is_told_that_tls_is_spoken(tmp_path: Path) -> None:
    with greeting(tmp_path, **TLS) as (balancer, _):
        answer = ask(balancer, v2(CLIENT, FRONT) + GET)
        assert answer.status == 400
        assert b"https" in answer.body
    [(client, code, _)] = lines(tmp_path)
    assert (client, code) == ("192.0.2.1:56324", "PR")


def test_garbage_behind_the_header_is_the_clients_whom_it_names(tmp_path: Path) -> None:
    with greeting(tmp_path, **TLS) as (balancer, _), connect(balancer) as sock:
        sock.sendall(v1(CLIENT, FRONT) + bytes(range(1, 200)))
        eventually(lambda: not balancer.listener.sessions)
        [(client, code, told)] = refusals(balancer)
    assert (client, code) == ("192.0.2.1", "PR")
    assert told is not None
    assert told.startswith("TLS: ")


# TCP mode ---------------------------------------------------------------------------------------------------------


def turn_around(connection: Connection) -> None:
    """Says hello, then each line backwards."""
    connection.send(b"hello\n")
    while line := connection.file.readline():
        connection.send(line[:-1][::-1] + b"\n")


@pytest.mark.parametrize("header", [v1(CLIENT6, FRONT6), v2(CLIENT6, FRONT6)], ids=["v1", "v2"])
def test_a_tcp_connection_begins_behind_the_header(tmp_path: Path, header: bytes) -> None:
    with greeting(tmp_path, turn_around, mode="tcp") as (balancer, _):
        for pieces in ([header + b"abc\n"], [header[:9], header[9:], b"abc\n"]):
            with connect(balancer) as sock, sock.makefile("rb") as file:
                for piece in pieces:
                    sock.sendall(piece)
                assert file.readline() + file.readline() == b"hello\ncba\n"
    assert who(tmp_path) == ["[2001:db8::1]:56324"] * 2


def test_in_tcp_mode_a_header_that_nobody_waits_for_goes_to_the_backend(tmp_path: Path) -> None:
    keys = {"mode": "tcp", "proxy_protocol_from": []}
    with greeting(tmp_path, turn_around, **keys) as (balancer, _), connect(balancer) as sock:
        sock.sendall(UNKNOWN_V1)
        with sock.makefile("rb") as file:
            assert file.readline() + file.readline() == b"hello\n\rNWONKNU YXORP\n"


def test_in_tcp_mode_what_is_malformed_opens_no_connection_to_a_backend(tmp_path: Path) -> None:
    with greeting(tmp_path, turn_around, mode="tcp") as (balancer, backend):
        eventually(lambda: backend.accepted == 1, "the probe's connection")
        for octets in MALFORMED.values():
            with connect(balancer) as sock:
                sock.sendall(octets)
                assert is_closed(sock)
        assert backend.accepted == 1
    assert [code for _, code, _ in lines(tmp_path)] == ["PR"] * len(MALFORMED)
