"""Who is let in, and how much of it: networks, rates, connections at once, the size of bodies; in both modes.

Each refusal is told to the client in HTTP mode, logged, and explained at the operator's port.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from balancer.balancer import LoadBalancer
from balancer.config import Limits, load
from balancer.proxy_protocol import UNKNOWN_V1, v1, v2
from balancing import connect, running
from conftest import PATIENCE, eventually
from fakes import Answer, FakeBackend, read_response
from test_certificates import DATA
from test_greeting import ADMIN, CLIENT, FRONT, NAMED, change, is_closed, lines, refusals, turn_around, who
from test_http_mode import GET, OK, QUIET, Gate, at, leases_come_back, settled
from test_identity import TRUSTED, of, request, statuses, told

ME = "127.0.0.1"
KILOBYTE, MEGABYTE = 1024, 1024 * 1024


@contextmanager
def limiting(
    tmp_path: Path, script: Any = OK, limits: dict[str, Any] | None = None, **keys: Any
) -> Iterator[tuple[LoadBalancer, FakeBackend]]:
    """A balancer with these limits before one backend, which was probed. All is over at the end."""
    keys = QUIET | ADMIN | {"limits": limits or {}} | keys
    with FakeBackend(script) as backend, running(tmp_path, at(backend), **keys) as balancer:
        settled(balancer)
        yield balancer, backend
        leases_come_back(balancer)


def ask(balancer: LoadBalancer, octets: bytes = GET) -> Answer:
    with connect(balancer) as sock:
        sock.sendall(octets)
        return read_response(sock)


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def is_turned_away(sock: socket.socket) -> bool:
    """Whether the connection ends without an answer to anything, be it that it is told why."""
    said = b""
    try:
        while piece := sock.recv(65536):
            said += piece
    except ConnectionResetError:
        return True  # with what it had sent unread
    return not said or said.startswith((b"HTTP/1.1 403 ", b"HTTP/1.1 429 "))


# Who may come -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "clients"),
    [
        ({"deny": ["192.0.2.0/24"]}, {"192.0.2.1": 403, "192.0.3.1": 200, "2001:db8::1": 200}),
        ({"allow": ["192.0.2.0/24"]}, {"192.0.2.1": 200, "192.0.3.1": 403, "2001:db8::1": 403}),
        (
            {"allow": ["192.0.2.0/24", "2001:db8::/32"], "deny": ["192.0.2.1"]},
            {"192.0.2.1": 403, "192.0.2.2": 200, "2001:db8::1": 200, "2001:db9::1": 403, "::ffff:192.0.2.1": 403},
        ),
        ({"deny": ["0.0.0.0/0"]}, {"192.0.2.1": 403, "2001:db8::1": 200}),
        ({"allow": ["::/0"]}, {"192.0.2.1": 403, "2001:db8::1": 200}),
    ],
)
def test_clients_are_let_in_by_their_networks(tmp_path: Path, keys: dict[str, Any], clients: dict[str, int]) -> None:
    """Those that a trusted proxy names."""
    with limiting(tmp_path, **keys, **TRUSTED) as (balancer, backend):
        for client, status in clients.items():
            assert ask(balancer, of(client)).status == status, client
        assert len(backend.requests) == list(clients.values()).count(200)


def test_who_is_not_let_in_is_told_logged_and_explained(tmp_path: Path) -> None:
    with limiting(tmp_path, deny=[ME]) as (balancer, backend):
        answer = ask(balancer)
        assert (answer.status, answer.headers["Connection"]) == (403, "close")
        assert answer.body.startswith(b"403 Forbidden: this address is not let in\ncode: PR, request id: ")
        assert refusals(balancer) == [(ME, "PR", "this address is not let in")]
    assert backend.requests == []
    [(client, code, what)] = lines(tmp_path)
    assert (client.rpartition(":")[0], code) == (ME, "PR")
    assert " 403 " in what


def test_who_is_not_let_in_need_not_ask_to_hear_it(tmp_path: Path) -> None:
    with limiting(tmp_path, deny=[ME]) as (balancer, _), connect(balancer) as sock, sock.makefile("rb") as file:
        assert read_response(file).status == 403
        assert file.read() == b""


def test_what_a_client_asks_that_is_not_let_in_reaches_nobody(tmp_path: Path) -> None:
    """Nor is what follows it taken for a request; and to HEAD there is no body."""
    denied = of("192.0.2.1")
    post = denied.replace(b"GET", b"POST").replace(b"\r\n\r\n", b"\r\nContent-Length: 9\r\n\r\nGET / HTT")
    with limiting(tmp_path, deny=["192.0.2.1"], **TRUSTED) as (balancer, backend):
        for octets, method in ((post + GET, "POST"), (denied.replace(b"GET", b"HEAD"), "HEAD")):
            with connect(balancer) as sock, sock.makefile("rb") as answers:
                sock.sendall(octets)
                assert read_response(answers, method).status == 403
                assert answers.read() == b""
    assert backend.requests == []
    assert [what.split(" 403")[0] for _, _, what in lines(tmp_path)] == ['"POST / HTTP/1.1"', '"HEAD / HTTP/1.1"']


@pytest.mark.parametrize("keys", [{"deny": [ME]}, {"allow": ["::1"]}])
def test_in_tcp_mode_who_is_not_let_in_is_closed(tmp_path: Path, keys: dict[str, Any]) -> None:
    with limiting(tmp_path, turn_around, mode="tcp", **keys) as (balancer, backend):
        eventually(lambda: backend.accepted == 1, "the probe's connection")
        for said in (b"", b"abc\n"):
            with connect(balancer) as sock:
                sock.sendall(said)
                assert is_closed(sock)
        assert backend.accepted == 1
        assert refusals(balancer, 2) == [(ME, "PR", "this address is not let in")] * 2
    assert [code for _, code, _ in lines(tmp_path)] == ["PR", "PR"]


@pytest.mark.parametrize("header", [v1(CLIENT, FRONT), v2(CLIENT, FRONT)], ids=["v1", "v2"])
@pytest.mark.parametrize("mode", ["http", "tcp"])
def test_whom_a_header_names_is_the_one_that_is_let_in_or_not(tmp_path: Path, header: bytes, mode: str) -> None:
    keys = {"mode": mode, "deny": [CLIENT[0]], **NAMED}
    other = v1(("192.0.2.2", 1), FRONT)
    with limiting(tmp_path, **keys) as (balancer, _):
        with connect(balancer) as sock:
            sock.sendall(header + GET)
            assert is_turned_away(sock)
        assert ask(balancer, other + GET).status == 200
        assert refusals(balancer) == [(CLIENT[0], "PR", "this address is not let in")]


@pytest.mark.parametrize("mode", ["http", "tcp"])
@pytest.mark.parametrize("keys", [{"allow": ["192.0.2.0/24"]}, {"deny": ["127.0.0.0/8"]}])
def test_whoever_is_to_name_others_is_let_in_for_them(tmp_path: Path, mode: str, keys: dict[str, Any]) -> None:
    """But not for itself."""
    with limiting(tmp_path, mode=mode, **keys, **NAMED) as (balancer, _):
        assert ask(balancer, v1(CLIENT, FRONT) + GET).status == 200
        with connect(balancer) as sock:
            sock.sendall(UNKNOWN_V1 + GET)
            assert is_turned_away(sock)


def test_a_reload_holds_for_the_next_request_of_a_connection_that_is_open(tmp_path: Path) -> None:
    with limiting(tmp_path) as (balancer, _), connect(balancer) as sock:
        assert statuses(sock, GET) == [200]
        change(balancer, deny=("127.0.0.0/8",))
        assert statuses(sock, GET) == [403]
        change(balancer, deny=())
        assert ask(balancer).status == 200


def test_a_request_in_hand_outlives_a_reload_that_would_not_let_it_in(tmp_path: Path) -> None:
    gate = Gate()
    with limiting(tmp_path, gate) as (balancer, _), connect(balancer) as sock:
        sock.sendall(GET)
        gate.wait_for_request()
        change(balancer, deny=("127.0.0.0/8",))
        gate.open.set()
        assert read_response(sock).status == 200


# Connections at once ----------------------------------------------------------------------------------------------


def refused(balancer: LoadBalancer) -> bool:
    """Whether one more connection is refused, before anything is said on it, and closed."""
    with connect(balancer) as sock, sock.makefile("rb") as file:
        return read_response(file).status == 429 and file.read() == b""


def test_one_connection_too_many_is_told_at_once_and_closed(tmp_path: Path) -> None:
    with limiting(tmp_path, limits={"client_connections": 2}) as (balancer, backend), ExitStack() as stack:
        socks = [stack.enter_context(connect(balancer)) for _ in range(2)]
        assert [statuses(sock, GET) for sock in socks] == [[200], [200]]
        with connect(balancer) as sock, sock.makefile("rb") as file:
            answer = read_response(file)
            assert (answer.status, answer.headers["Connection"]) == (429, "close")
            assert b"too many connections from this address" in answer.body
            sock.sendall(GET)
            assert file.read() == b""
        assert [statuses(sock, GET) for sock in socks] == [[200], [200]]
        assert refusals(balancer) == [(ME, "PR", "too many connections from this address")]
        assert len(backend.requests) == 4
    assert [code for _, code, _ in lines(tmp_path)] == ["--", "--", "PR", "--", "--"]


ENDS: dict[str, Callable[[socket.socket], object]] = {
    "closed": lambda sock: sock.close(),
    "reset": reset,
    "after a request": lambda sock: (statuses(sock, GET), sock.close()),
    "with a request": lambda sock: (sock.sendall(GET), reset(sock)),
    "half a head": lambda sock: (sock.sendall(GET[:9]), sock.close()),
    "half a body": lambda sock: (
        sock.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n1"),
        reset(sock),
    ),
    "no request": lambda sock: (sock.sendall(b"\0\r\n\r\n"), read_response(sock), sock.close()),
    "the last request": lambda sock: statuses(sock, request("Connection: close")),
    "not let in": lambda sock: statuses(sock, b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n"),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_connection_that_has_ended_makes_room_for_another(tmp_path: Path, end: str) -> None:
    with limiting(tmp_path, limits={"client_connections": 1, "body_bytes": 50}) as (balancer, _):
        listener = balancer.listener
        for number in range(1, 4):
            with connect(balancer) as sock:
                ENDS[end](sock)
            eventually(lambda number=number: listener.accepted == number and not listener.sessions)
        assert ask(balancer).status == 200


def test_a_tunnel_that_has_ended_makes_room_for_another(tmp_path: Path) -> None:
    upgraded = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n"
    with limiting(tmp_path, upgraded, limits={"client_connections": 1}) as (balancer, _):
        for _ in range(2):
            with connect(balancer) as sock:
                sock.sendall(request("Connection: Upgrade", "Upgrade: x"))
                assert sock.recv(100).startswith(b"HTTP/1.1 101 ")
                assert refused(balancer)
            eventually(lambda: not balancer.listener.sessions)


def test_in_tcp_mode_one_connection_too_many_is_closed(tmp_path: Path) -> None:
    with limiting(tmp_path, turn_around, {"client_connections": 1}, mode="tcp") as (balancer, _):
        for _ in range(2):
            with connect(balancer) as sock, sock.makefile("rb") as file:
                assert file.readline() == b"hello\n"
                with connect(balancer) as other:
                    assert is_closed(other)
                sock.sendall(b"abc\n")
                assert file.readline() == b"cba\n"
            eventually(lambda: not balancer.listener.sessions)
        assert refusals(balancer, 2) == [(ME, "PR", "too many connections from this address")] * 2


def test_trusted_proxies_may_have_any_number_of_connections(tmp_path: Path) -> None:
    """Those that come through them are many."""
    limits = {"client_connections": 1}
    with limiting(tmp_path, limits=limits, **TRUSTED) as (balancer, _), ExitStack() as stack:
        socks = [stack.enter_context(connect(balancer)) for _ in range(5)]
        assert [statuses(sock, of("192.0.2.1")) for sock in socks] == [[200]] * 5


@pytest.mark.parametrize("mode", ["http", "tcp"])
def test_connections_are_counted_for_whom_their_headers_name(tmp_path: Path, mode: str) -> None:
    """In its /64, where that is an IPv6 client."""
    clients = ["192.0.2.1", "192.0.2.2", "2001:db8::1", "2001:db8:0:1::1"]
    limits = {"client_connections": 1}
    with limiting(tmp_path, limits=limits, mode=mode, **NAMED) as (balancer, _), ExitStack() as stack:
        for client in clients:
            sock = stack.enter_context(connect(balancer))
            sock.sendall(v2((client, 1), (client, 2)))
            assert statuses(sock, GET) == [200]
        for client in ("192.0.2.1", "2001:db8::2"):
            with connect(balancer) as sock:
                sock.sendall(v2((client, 1), (client, 2)))
                assert is_turned_away(sock)
        assert {told for _, _, told in refusals(balancer, 2)} == {"too many connections from this address"}


@pytest.mark.parametrize("mode", ["http", "tcp"])
def test_whoever_is_to_name_others_is_not_counted_itself(tmp_path: Path, mode: str) -> None:
    """All of its clients come at once, and none of their headers is there yet."""
    limits = {"client_connections": 1}
    with limiting(tmp_path, limits=limits, mode=mode, **NAMED) as (balancer, _), ExitStack() as stack:
        socks = [stack.enter_context(connect(balancer)) for _ in range(5)]
        eventually(lambda: len(balancer.listener.sessions) == 5)
        for last, sock in enumerate(socks):
            sock.sendall(v1((f"192.0.2.{last}", 1), FRONT))
            assert statuses(sock, GET) == [200]


def test_a_reload_changes_the_limit_while_connections_are_open(tmp_path: Path) -> None:
    """Who has more than the new one keeps them, and gets no further ones until enough of them have ended."""
    limits = Limits(client_connections=3)
    with limiting(tmp_path, limits={"client_connections": 3}) as (balancer, _), ExitStack() as stack:
        socks = [stack.enter_context(connect(balancer)) for _ in range(3)]
        assert [statuses(sock, GET) for sock in socks] == [[200]] * 3
        assert refused(balancer)
        change(balancer, limits=replace(limits, client_connections=1))
        assert [statuses(sock, GET) for sock in socks] == [[200]] * 3
        for sock in socks[:2]:
            sock.close()
        eventually(lambda: len(balancer.listener.sessions) == 1)
        assert refused(balancer)
        socks[2].close()
        eventually(lambda: not balancer.listener.sessions)
        with connect(balancer) as sock:
            assert statuses(sock, GET) == [200]
            assert refused(balancer)
            change(balancer, limits=replace(limits, client_connections=0))
            assert ask(balancer).status == 200


# Requests per second ----------------------------------------------------------------------------------------------


def test_a_rate_is_exact_to_within_one_request_under_16_parallel_clients(tmp_path: Path) -> None:
    """All of one address, on connections of their own, and each asks again at once, whatever the answer.

    The bucket is full until the first request comes, which is between `began` and the end of its answer, and it is
    empty when the last one is refused.
    """
    rate, burst, seconds = 40, 25, 1.0
    found: list[tuple[float, float, int]] = []  # of each request: when it was sent, when it was answered, its status
    with limiting(tmp_path, limits={"client_rate": rate, "client_burst": burst}) as (balancer, backend):
        start = threading.Barrier(16)

        def keep_asking() -> None:
            start.wait(PATIENCE)
            end = time.monotonic() + seconds
            sent = 0.0
            while sent < end:
                with connect(balancer) as sock, sock.makefile("rb") as answers:
                    status = 200
                    while status == 200 and (sent := time.monotonic()) < end:
                        sock.sendall(GET)
                        status = read_response(answers).status
                        found.append((sent, time.monotonic(), status))

        threads = [threading.Thread(target=keep_asking) for _ in range(16)]
        began = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        ended = time.monotonic()
        allowed = [answered for _, answered, status in found if status == 200]
        assert {status for _, _, status in found} == {200, 429}
        assert len(backend.requests) == len(allowed)
    last_refused = max(sent for sent, _, status in found if status == 429)
    least = burst + rate * (last_refused - min(allowed))
    most = burst + rate * (ended - began)
    assert least - 1 <= len(allowed) <= most + 1
    assert len(found) > 2 * len(allowed), "they asked for much more than that"


def test_clients_of_one_proxy_have_a_rate_each(tmp_path: Path) -> None:
    """Exactly the burst, because a rate of one in 100 s adds nothing while this lasts."""
    limits = {"client_rate": 0.01, "client_burst": 5}
    clients = [f"192.0.2.{last}" for last in range(4)]
    with limiting(tmp_path, limits=limits, **TRUSTED) as (balancer, _):
        found = {client: [ask(balancer, of(client)).status for _ in range(7)] for client in clients}
        assert ask(balancer).status == 200, "the proxy's own requests are counted by themselves"
    assert found == {client: [200] * 5 + [429] * 2 for client in clients}
    assert who(tmp_path)[:28] == [f"{client}:0" for client in clients for _ in range(7)]


def test_requests_that_a_proxy_has_sent_before_are_judged_each_for_its_client(tmp_path: Path) -> None:
    """That a head is known says what it means, and not that whoever sends it may."""
    one, other, body = of("192.0.2.1"), of("192.0.2.2"), request("X-Forwarded-For: 192.0.2.2", "Content-Length: 2")
    fine = b"HTTP/1.1 200 OK\r\nDate: Sat, 21 Nov 2026 05:00:00 GMT\r\nContent-Length: 2\r\n\r\nok"
    limits = {"client_rate": 0.01, "client_burst": 5}
    with limiting(tmp_path, fine, limits=limits, **TRUSTED) as (balancer, backend):
        with connect(balancer) as sock:
            assert statuses(sock, one, one, one, other, other, body + b"hi", body + b"ho", one) == [200] * 8
            assert statuses(sock, one, one) == [200, 429]
        assert [told(octets)["For"] for octets in backend.requests] == [
            [f"192.0.2.{client}, {ME}"] for client in (1, 1, 1, 2, 2, 2, 2, 1, 1)
        ]
        assert backend.requests[5:7] == [backend.requests[5], backend.requests[5].replace(b"hi", b"ho")]
    assert who(tmp_path) == [f"192.0.2.{client}:0" for client in (1, 1, 1, 2, 2, 2, 2, 1, 1, 1)]


def test_what_is_no_request_is_not_logged_as_that_of_the_client_before(tmp_path: Path) -> None:
    fine = b"HTTP/1.1 200 OK\r\nDate: Sat, 21 Nov 2026 05:00:00 GMT\r\nContent-Length: 2\r\n\r\nok"
    with limiting(tmp_path, fine, **TRUSTED) as (balancer, _), connect(balancer) as sock:
        assert statuses(sock, of("192.0.2.1"), of("192.0.2.1"), b"NOTHING\r\n\r\n") == [200, 200, 400]
    assert [client.rpartition(":")[0] for client in who(tmp_path)] == ["192.0.2.1", "192.0.2.1", ME]


def test_a_client_that_calls_itself_another_each_time_is_one(tmp_path: Path) -> None:
    """Nobody trusts it to know."""
    with limiting(tmp_path, limits={"client_rate": 0.01, "client_burst": 3}) as (balancer, _):
        assert [ask(balancer, of(f"192.0.2.{last}")).status for last in range(5)] == [200] * 3 + [429] * 2


def test_a_client_that_is_refused_is_told_when_to_come_back(tmp_path: Path) -> None:
    with limiting(tmp_path, limits={"client_rate": 0.01}) as (balancer, backend):
        assert ask(balancer).status == 200
        answer = ask(balancer)
        assert (answer.status, answer.reason, answer.headers["Connection"]) == (429, "Too Many Requests", "close")
        assert 100 - PATIENCE <= int(answer.headers["Retry-After"]) <= 100
        assert refusals(balancer) == [(ME, "PR", "too many requests from this address")]
        assert len(backend.requests) == 1
    assert [code for _, code, _ in lines(tmp_path)] == ["--", "PR"]


def test_who_waits_as_long_as_it_is_told_is_let_in(tmp_path: Path) -> None:
    with limiting(tmp_path, limits={"client_rate": 20, "client_burst": 1}) as (balancer, _):
        assert ask(balancer).status == 200
        eventually(lambda: ask(balancer).status == 200, "a second request, after 50 ms")


def test_in_tcp_mode_the_rate_is_that_of_connections(tmp_path: Path) -> None:
    limits = {"client_rate": 0.01, "client_burst": 2}
    with limiting(tmp_path, turn_around, limits, mode="tcp") as (balancer, _):
        for _ in range(2):
            with connect(balancer) as sock:
                assert sock.recv(6) == b"hello\n"
        with connect(balancer) as sock:
            assert is_closed(sock)
        assert refusals(balancer)[-1] == (ME, "PR", "too many requests from this address")


def test_pipelined_requests_are_counted_each(tmp_path: Path) -> None:
    """What stands behind one that is refused is dropped with the connection."""
    limits = {"client_rate": 0.01, "client_burst": 3}
    with limiting(tmp_path, limits=limits) as (balancer, backend), connect(balancer) as sock:
        sock.sendall(GET * 10)
        with sock.makefile("rb") as answers:
            assert [read_response(answers).status for _ in range(4)] == [200, 200, 200, 429]
            assert answers.read() == b""
        assert len(backend.requests) == 3


def test_a_reload_changes_the_rate_for_connections_that_are_open(tmp_path: Path) -> None:
    with limiting(tmp_path) as (balancer, _), connect(balancer) as sock:
        assert statuses(sock, GET, GET, GET) == [200] * 3
        change(balancer, limits=Limits(client_rate=0.01, client_burst=2))
        assert statuses(sock, GET, GET) == [200] * 2
        change(balancer, limits=Limits(client_rate=0.01, client_burst=2, fields=100))
        assert statuses(sock, GET) == [429]
        change(balancer, limits=Limits())
        assert [ask(balancer).status for _ in range(3)] == [200] * 3


# The size of bodies -----------------------------------------------------------------------------------------------


def post(*fields: str) -> bytes:
    return request(*fields).replace(b"GET", b"POST", 1)


def chunks(*contents: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(content), content) for content in contents)


def test_a_body_that_says_that_it_is_too_large_is_refused_at_once(tmp_path: Path) -> None:
    """Before any of it has come: nobody has to send it, and no 100 (Continue) asks for it."""
    with limiting(tmp_path, limits={"body_bytes": 1000}) as (balancer, backend):
        for fields in (["Content-Length: 1001"], ["Content-Length: 999999999999", "Expect: 100-continue"]):
            with connect(balancer) as sock, sock.makefile("rb") as answers:
                sock.sendall(post(*fields))
                assert answers.readline().startswith(b"HTTP/1.1 413 ")
                assert b"\r\nConnection: close\r\n" in answers.read()
        assert refusals(balancer, 2) == [(ME, "PR", "a body may have at most 1000 octets here")] * 2
    assert backend.requests == []


def test_a_body_may_be_as_large_as_it_may_be(tmp_path: Path) -> None:
    content = b"x" * 1000
    with limiting(tmp_path, limits={"body_bytes": 1000}) as (balancer, backend), connect(balancer) as sock:
        whole = post("Content-Length: 1000") + content
        for body in ([content], [content[:1], content[1:]], [b"x"] * 1000):
            chunked = post("Transfer-Encoding: chunked") + chunks(*body) + b"0\r\n\r\n"
            assert statuses(sock, whole, chunked, GET) == [200] * 3
    assert len(backend.requests) == 9


def test_an_answer_may_be_of_any_size(tmp_path: Path) -> None:
    long = b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n" + b"x" * 5000
    with limiting(tmp_path, long, {"body_bytes": 1000}) as (balancer, _):
        assert len(ask(balancer).body) == 5000


def test_chunks_that_are_too_large_together_are_refused_where_they_become_so(tmp_path: Path) -> None:
    """At the size of the chunk that is too much, before its content has come."""
    with limiting(tmp_path, limits={"body_bytes": 1000}) as (balancer, _):
        for before, piece in (
            (b"", b"3e9\r\n"),
            (chunks(b"x" * 999), b"2\r\n"),
            (chunks(b"x" * 500, b"x" * 500), b"1;extension\r\n"),
            (chunks(*[b"x"] * 1000), b"fffffffffffffff\r\n"),
        ):
            for pieces in ([before + piece], [before, piece]):
                with connect(balancer) as sock:
                    sock.sendall(post("Transfer-Encoding: chunked") + pieces[0])
                    for one in pieces[1:]:
                        sock.sendall(one)
                    answer = read_response(sock)
                    assert (answer.status, answer.headers["Connection"]) == (413, "close")
                    assert b"the body is larger than is allowed here" in answer.body
        told = refusals(balancer, 8)
    assert {reason for _, _, reason in told} == {"the body is larger than is allowed here"}
    assert {code for _, code, _ in told} <= {"PR", "PD"}


def test_chunks_become_too_large_on_a_pump(tmp_path: Path) -> None:
    """A long upload is a thread's; so is to find out that it is too long. The backend gets no more than is allowed."""
    received: list[int] = []

    def swallow(connection: Any) -> None:
        count = 0
        while piece := connection.sock.recv(MEGABYTE):
            count += len(piece)
        received.append(count)

    piece = chunks(b"x" * 64 * KILOBYTE)
    with limiting(tmp_path, swallow, {"body_bytes": 4 * MEGABYTE}) as (balancer, _):
        with connect(balancer) as sock:
            sock.sendall(post("Transfer-Encoding: chunked"))
            for _ in range(64):
                sock.sendall(piece)
            sock.sendall(piece[:9])
            answer = read_response(sock)
            assert answer.status == 413
        assert refusals(balancer) == [(ME, "PD", "the body is larger than is allowed here")]
        leases_come_back(balancer)
        eventually(lambda: max(received, default=0), "the end of the upload, where the probe has sent nothing")
    assert MEGABYTE < max(received) < 4 * MEGABYTE + 8 * KILOBYTE


def test_a_client_that_sends_on_regardless_still_gets_to_know(tmp_path: Path) -> None:
    """It reads only when it has sent all, which a close at once would turn into a reset (RFC 9112 section 9.6)."""
    content = b"x" * (2 * MEGABYTE)
    with limiting(tmp_path, limits={"body_bytes": MEGABYTE}) as (balancer, _):
        for octets in (
            post(f"Content-Length: {len(content)}") + content,
            post("Transfer-Encoding: chunked") + chunks(*[content[: 64 * KILOBYTE]] * 32) + b"0\r\n\r\n",
        ):
            assert ask(balancer, octets).status == 413


def test_chunks_become_too_large_while_a_backend_is_being_waited_for(tmp_path: Path) -> None:
    gate = Gate()
    with FakeBackend(gate) as backend, ExitStack() as stack:
        entry = {"host": backend.host, "port": backend.port, "max_connections": 1}
        balancer = stack.enter_context(running(tmp_path, [entry], limits={"body_bytes": 1000}, **QUIET, **ADMIN))
        settled(balancer)
        first, second = (stack.enter_context(connect(balancer)) for _ in range(2))
        first.sendall(GET)
        gate.wait_for_request()
        second.sendall(post("Transfer-Encoding: chunked") + chunks(b"x" * 500))
        eventually(lambda: balancer.upstreams.waiting == 1)
        second.sendall(chunks(b"x" * 501))
        assert read_response(second).status == 413
        assert balancer.upstreams.waiting == 0
        gate.open.set()
        assert read_response(first).status == 200
        leases_come_back(balancer)
        assert len(backend.requests) == 1


def test_a_reload_changes_the_size_from_the_next_request_on(tmp_path: Path) -> None:
    gate = Gate()
    with limiting(tmp_path, gate) as (balancer, backend), connect(balancer) as sock, sock.makefile("rb") as answers:
        gate.open.set()
        sock.sendall(post("Transfer-Encoding: chunked") + chunks(b"x" * 500))
        eventually(lambda: balancer.pool.in_hand == 1)
        change(balancer, limits=Limits(body_bytes=600))
        sock.sendall(chunks(b"x" * 500) + b"0\r\n\r\n")
        assert read_response(answers).status == 200
        sock.sendall(post("Content-Length: 601"))
        assert read_response(answers).status == 413
    assert len(backend.requests) == 1


# All of it --------------------------------------------------------------------------------------------------------


def test_limits_come_by_the_file_and_are_told_as_changes(tmp_path: Path) -> None:
    """As an operator does it: the file is edited while connections are open."""
    path = tmp_path / "servers.json"
    with FakeBackend(OK) as backend, ExitStack() as stack:
        settings: dict[str, Any] = {
            "servers": [{"host": backend.host, "port": backend.port}],
            "listen": {"port": 0},
            "log": {"file": str(tmp_path / "lb.log")},
            "admin": {"address": "off"},
            **QUIET,
        }
        path.write_text(json.dumps(settings))
        balancer = LoadBalancer(load(path), load=lambda: load(path))
        balancer.start()
        stack.callback(balancer.stop, 0.0)
        sock = stack.enter_context(connect(balancer))
        assert statuses(sock, GET) == [200]
        path.write_text(json.dumps(settings | {"limits": {"body_bytes": 5}, "deny": ["192.0.2.1"]}))
        balancer.look_at_file()
        eventually(lambda: ask(balancer, post("Content-Length: 6") + b"a body").status == 413)
        assert statuses(sock, GET, post("Content-Length: 6")) == [200, 413]
    text = (tmp_path / "lb.log").read_text()
    assert f"{path}: limits.body_bytes 0 -> 5\n" in text
    assert f"{path}: deny none -> 192.0.2.1/32\n" in text


def test_a_reload_changes_the_size_of_heads_for_answers_too(tmp_path: Path) -> None:
    """Of the backends that are there already, and on connections that they have open."""
    large = b"HTTP/1.1 200 OK\r\nX-Large: " + b"x" * 5000 + b"\r\nContent-Length: 0\r\n\r\n"
    with limiting(tmp_path, large, {"head_bytes": 2000}) as (balancer, _):
        assert ask(balancer).status == 502
        change(balancer, limits=Limits())
        assert ask(balancer).status == 200
        change(balancer, limits=Limits(head_bytes=5000))
        assert ask(balancer).status == 502


def test_the_port_that_redirects_keeps_to_the_same_rules(tmp_path: Path) -> None:
    """From the start, and as a reload changes them."""
    certificates = [{"cert": str(DATA / "local.pem"), "key": str(DATA / "ec.key")}]
    tls = {"certificates": certificates, "redirect_from": "127.0.0.1:0"}
    with limiting(tmp_path, tls=tls, deny=["192.0.2.0/24"], **TRUSTED) as (balancer, _), ExitStack() as stack:
        _, redirecting = balancer._listeners
        found = []
        for denied in (balancer.config.deny, ("198.51.100.0/24",)):
            change(balancer, deny=denied)
            for client in ("192.0.2.1", "198.51.100.1"):
                sock = stack.enter_context(socket.create_connection(redirecting.address, PATIENCE))
                found += statuses(sock, of(client))
    assert found == [403, 308, 308, 403]


def test_thousands_of_clients_leave_nothing_but_their_buckets(tmp_path: Path) -> None:
    """All over one connection; what bounds these is in test_clients."""
    limits = {"client_rate": 0.01, "client_burst": 1, "client_connections": 5}
    with limiting(tmp_path, limits=limits, **TRUSTED) as (balancer, _), connect(balancer) as sock:
        with sock.makefile("rb") as answers:
            for batch in range(20):
                sock.sendall(b"".join(of(f"192.{batch}.{last}.1") for last in range(100)))
                assert {read_response(answers).status for _ in range(100)} == {200}
        admission = balancer._front.admission
        assert admission._rates is not None
        assert (len(admission._rates), len(admission._connections)) == (2000, 0)
