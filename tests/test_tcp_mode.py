"""TCP mode through a running balancer: servers that are not HTTP, half-closes, resets, long streams, idle tunnels."""

from __future__ import annotations

import hashlib
import random
import re
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from balancer import tunnel as tunnel_module
from balancer.balancer import LoadBalancer
from balancing import connect, log_lines, running
from conftest import PATIENCE, eventually
from fakes import Connection, FakeBackend

RESET = struct.pack("ii", 1, 0)
MEGABYTE = 1024 * 1024
LONG = 64 * MEGABYTE
IDLE_TUNNELS = 200
QUIET = {"interval": 1000}  # one probe at the start, and no other


@contextmanager
def balancing(tmp_path: Path, *backends: FakeBackend | tuple[str, int], **keys: Any) -> Iterator[LoadBalancer]:
    addresses = [backend if isinstance(backend, tuple) else (backend.host, backend.port) for backend in backends]
    with running(tmp_path, addresses, mode="tcp", health_check=QUIET, **keys) as balancer:
        probed(balancer)
        yield balancer


def probed(balancer: LoadBalancer) -> None:
    """Wait for the first probes: a connection of theirs must not be taken for a client's."""
    eventually(lambda: all(backend.probed for backend in balancer.pool.backends), "a probe of each backend")


def over(balancer: LoadBalancer) -> None:
    """Wait until no connection is left; nobody may have anything in hand then."""
    eventually(lambda: not balancer.listener.sessions, "no session")
    assert [backend.active for backend in balancer.pool.backends] == [0] * len(balancer.pool.backends)


def tcp_lines(tmp_path: Path) -> list[str]:
    """The log's lines about connections, from the client's address on."""
    lines = (re.match(r"\S+ \S+ INFO (127\.0\.0\.1:\d+ tcp .*)", line) for line in log_lines(tmp_path))
    return [line[1] for line in lines if line]


def told(line: str) -> tuple[str, str, str, str]:
    """Octets in and out, backend, code and tries of a line."""
    match = re.fullmatch(
        r"127\.0\.0\.1:\d+ tcp (\d+/\d+) backend=(\S+) \d+\.\dms code=(\S\S) tries=(\d+)(?: id=\S+)?",
        line,
    )
    assert match, line
    return match[1], match[2], match[3], match[4]


def receive(sock: socket.socket, count: int = sys.maxsize) -> bytes:
    """So many octets and not one more; fewer where the stream ends before."""
    got = bytearray()
    while len(got) < count and (data := sock.recv(min(count - len(got), MEGABYTE))):
        got += data
    return bytes(got)


def send(sock: socket.socket, data: bytes) -> None:
    """All of it; the socket's patience is for each piece."""
    for place in range(0, len(data), MEGABYTE):
        sock.sendall(data[place : place + MEGABYTE])


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    sock.close()


def dead_address(stack: ExitStack) -> tuple[str, int]:
    """A port that is held, and on which nobody listens."""
    sock = stack.enter_context(socket.socket())
    sock.bind(("127.0.0.1", 0))
    host, port = sock.getsockname()
    return host, port


# Servers that are not HTTP ----------------------------------------------------------------------------------------


def greeter(name: bytes) -> Callable[[Connection], None]:
    """Speaks first, as mail and database servers do; then turns each line around, with bytes of every value."""

    def serve(connection: Connection) -> None:
        connection.send(b"\x00\xff" + name + b"\n")
        while line := connection.file.readline():
            connection.send(line[:-1][::-1] + b"\n")

    return serve


def test_three_servers_that_are_not_http_take_turns(tmp_path):
    with ExitStack() as stack:
        backends = [stack.enter_context(FakeBackend(greeter(name))) for name in (b"one", b"two", b"three")]
        with balancing(tmp_path, *backends) as balancer:
            greetings = []
            for _ in range(6):
                with connect(balancer) as client, client.makefile("rb") as file:
                    greetings.append(file.readline())
                    client.sendall(b"\r\xfe\x00GET / HTTP/9.9\r\r\n")
                    assert file.readline() == b"\r\r9.9/PTTH / TEG\x00\xfe\r\n"
            over(balancer)
    assert greetings == [b"\x00\xffone\n", b"\x00\xfftwo\n", b"\x00\xffthree\n"] * 2
    assert sorted(told(line) for line in tcp_lines(tmp_path)) == [
        ("20/26", "1", "--", "1"),
        ("20/26", "1", "--", "1"),
        ("20/26", "2", "--", "1"),
        ("20/26", "2", "--", "1"),
        ("20/28", "3", "--", "1"),
        ("20/28", "3", "--", "1"),
    ]


# How connections end ----------------------------------------------------------------------------------------------


def answer_at_the_end(connection: Connection) -> None:
    """Says nothing before it has heard all."""
    question = connection.file.read()
    connection.send(b"%d octets" % len(question))


def test_a_client_that_half_closes_first_gets_its_answer(tmp_path):
    with FakeBackend(answer_at_the_end) as backend, balancing(tmp_path, backend) as balancer:
        with connect(balancer) as client:
            client.sendall(b"x" * 1000)
            client.shutdown(socket.SHUT_WR)
            assert receive(client) == b"1000 octets"
        over(balancer)
    assert told(tcp_lines(tmp_path)[0]) == ("1000/11", "1", "--", "1")


def test_a_server_that_half_closes_first_is_told_the_rest(tmp_path):
    heard = []

    def speak_then_listen(connection: Connection) -> None:
        connection.send(b"that is all")
        connection.sock.shutdown(socket.SHUT_WR)
        heard.append(connection.file.read())

    with FakeBackend(speak_then_listen) as backend, balancing(tmp_path, backend) as balancer:
        heard.clear()  # what the probe said
        with connect(balancer) as client:
            assert receive(client) == b"that is all"
            client.sendall(b"thank you")
        over(balancer)
        eventually(lambda: b"thank you" in heard, "the rest")
    assert told(tcp_lines(tmp_path)[0]) == ("9/11", "1", "--", "1")


def test_a_reset_by_the_server_reaches_the_client_as_one(tmp_path):
    """A stream that was cut must not look complete."""

    def reset_after_a_word(connection: Connection) -> None:
        if connection.file.readline():
            connection.send(b"the first half of")
            connection.file.readline()
            connection.file.close()
            reset(connection.sock)

    with FakeBackend(reset_after_a_word) as backend, balancing(tmp_path, backend) as balancer:
        with connect(balancer) as client:
            client.sendall(b"go\n")
            assert receive(client, 17) == b"the first half of"
            client.sendall(b"go on\n")
            with pytest.raises(ConnectionResetError):
                receive(client)
        over(balancer)
    assert told(tcp_lines(tmp_path)[0]) == ("9/17", "1", "SD", "1")


def test_a_reset_by_the_client_reaches_the_server_as_one(tmp_path):
    problems = []

    def listen(connection: Connection) -> None:
        try:
            connection.send(b"hello\n")
            connection.file.read()
        except ConnectionResetError as error:
            problems.append(error)

    with FakeBackend(listen) as backend, balancing(tmp_path, backend) as balancer:
        client = connect(balancer)
        assert receive(client, 6) == b"hello\n"
        reset(client)
        over(balancer)
        eventually(lambda: problems, "a reset")
    assert told(tcp_lines(tmp_path)[0]) == ("0/6", "1", "CD", "1")


def test_a_server_that_answers_before_it_has_heard_all_is_heard(tmp_path):
    """It closes with octets unread, which makes a reset of its close; the answer has left it before that."""
    answer = b"too long\n" + bytes(20_000)  # no more than a receiver's first window

    def refuse(connection: Connection) -> None:
        if connection.sock.recv(1):
            connection.send(answer)

    with FakeBackend(refuse) as backend, balancing(tmp_path, backend) as balancer:
        with connect(balancer) as client:
            client.sendall(b"x" * 100_000)
            assert receive(client, len(answer)) == answer
        over(balancer)


def test_a_tunnel_that_is_silent_for_too_long_is_cut(tmp_path):
    with FakeBackend(greeter(b"one")) as backend, balancing(tmp_path, backend, timeouts={"tunnel": 0.1}) as balancer:
        with connect(balancer) as client:
            assert receive(client) == b"\x00\xffone\n"
        over(balancer)
    assert told(tcp_lines(tmp_path)[0]) == ("0/6", "1", "cD", "1")


def test_a_stop_cuts_what_is_open_and_says_so(tmp_path):
    with ExitStack() as stack:
        backend = stack.enter_context(FakeBackend(greeter(b"one")))
        client = None
        with balancing(tmp_path, backend) as balancer:
            client = stack.enter_context(connect(balancer))
            assert receive(client, 6) == b"\x00\xffone\n"
        assert receive(client) == b""
        assert balancer.pool.backends[0].active == 0
    assert told(tcp_lines(tmp_path)[0]) == ("0/6", "1", "KD", "1")


# Backends that are away or full -----------------------------------------------------------------------------------


def test_a_dead_backend_is_skipped(tmp_path):
    with ExitStack() as stack:
        backend = stack.enter_context(FakeBackend(greeter(b"two")))
        with running(tmp_path, [dead_address(stack), (backend.host, backend.port)], mode="tcp") as balancer:
            for _ in range(4):
                with connect(balancer) as client:
                    assert receive(client, 6) == b"\x00\xfftwo\n"
            over(balancer)
    assert {told(line)[1:3] for line in tcp_lines(tmp_path)} == {("2", "--")}


def test_a_backend_that_dies_unnoticed_costs_a_try_and_no_connection(tmp_path):
    """It has passed its probe; the first connection after that finds it out."""
    with ExitStack() as stack:
        one, two = (stack.enter_context(FakeBackend(greeter(name))) for name in (b"one", b"two"))
        with balancing(tmp_path, one, two) as balancer:
            one.close()
            with connect(balancer) as client:
                assert receive(client, 6) == b"\x00\xfftwo\n"
            over(balancer)
    assert told(tcp_lines(tmp_path)[0])[1:] == ("2", "--", "2")


def test_without_a_backend_the_connection_is_closed(tmp_path):
    with ExitStack() as stack, balancing(tmp_path, dead_address(stack)) as balancer, connect(balancer) as client:
        assert receive(client) == b""
        over(balancer)
    assert told(tcp_lines(tmp_path)[0]) == ("0/0", "-", "SC", "0")


def test_a_connection_waits_for_a_backend_that_is_full(tmp_path):
    with ExitStack() as stack:
        backend = stack.enter_context(FakeBackend(greeter(b"one")))
        server = {"host": backend.host, "port": backend.port, "max_connections": 1}
        with running(tmp_path, [server], mode="tcp", health_check=QUIET) as balancer:
            first = stack.enter_context(connect(balancer))
            assert receive(first, 6) == b"\x00\xffone\n"
            second = stack.enter_context(connect(balancer))
            eventually(lambda: balancer.upstreams.waiting == 1, "one that waits")
            first.close()
            assert receive(second, 6) == b"\x00\xffone\n"
            second.close()
            over(balancer)
    assert [told(line) for line in tcp_lines(tmp_path)] == [("0/6", "1", "--", "1")] * 2


def test_a_connection_that_waits_in_vain_is_closed(tmp_path):
    with ExitStack() as stack:
        backend = stack.enter_context(FakeBackend(greeter(b"one")))
        server = {"host": backend.host, "port": backend.port, "max_connections": 1}
        with running(tmp_path, [server], mode="tcp", health_check=QUIET, timeouts={"queue": 0.05}) as balancer:
            first = stack.enter_context(connect(balancer))
            assert receive(first, 6) == b"\x00\xffone\n"
            second = stack.enter_context(connect(balancer))
            assert receive(second) == b""
            first.close()
            over(balancer)
    assert [told(line) for line in tcp_lines(tmp_path)] == [("0/0", "-", "sQ", "0"), ("0/6", "1", "--", "1")]


# Much of it -------------------------------------------------------------------------------------------------------


def test_64_megabytes_both_ways_at_once_arrive_octet_for_octet(tmp_path):
    down, up = random.Random(1).randbytes(LONG), random.Random(2).randbytes(LONG)
    digests = []

    def exchange(connection: Connection) -> None:
        if not connection.sock.recv(1, socket.MSG_PEEK):
            return  # a probe
        sender = threading.Thread(target=send, args=(connection.sock, down), name="server-sends")
        sender.start()
        digests.append(hashlib.sha256(receive(connection.sock, LONG)).hexdigest())
        sender.join()

    with FakeBackend(exchange) as backend, balancing(tmp_path, backend) as balancer:
        with connect(balancer) as client:
            sender = threading.Thread(target=send, args=(client, up), name="client-sends")
            sender.start()
            assert hashlib.sha256(receive(client)).digest() == hashlib.sha256(down).digest()
            sender.join()
        over(balancer)
    assert digests == [hashlib.sha256(up).hexdigest()]
    assert told(tcp_lines(tmp_path)[0]) == (f"{LONG}/{LONG}", "1", "--", "1")


def test_200_idle_tunnels_hold_no_thread_and_wake_up_again(tmp_path, monkeypatch):
    monkeypatch.setattr(tunnel_module, "REST_AFTER", 0.05)
    with ExitStack() as stack:
        backend = stack.enter_context(FakeBackend(greeter(b"one")))
        balancer = stack.enter_context(balancing(tmp_path, backend))
        balancer.pumps.idle_seconds = 0.05
        clients = []
        for _ in range(IDLE_TUNNELS):
            client = stack.enter_context(connect(balancer))
            assert receive(client, 6) == b"\x00\xffone\n"
            clients.append(client)
        for size in (100_000, 5, 100_000, 5):  # what takes pumps, and what does not
            for client in clients:
                client.sendall(b"x" * (size - 1) + b"\n")
            for client in clients:
                assert receive(client, size) == b"x" * (size - 1) + b"\n"
            eventually(lambda: balancer.pumps.threads == 0, "no thread of a pump")
            assert [thread.name for thread in threading.enumerate() if thread.name.startswith("conn-")] == []
            assert balancer.pool.backends[0].active == IDLE_TUNNELS
        for client in clients:
            client.close()
        over(balancer)
    assert [told(line) for line in tcp_lines(tmp_path)] == [("200010/200016", "1", "--", "1")] * IDLE_TUNNELS


def test_many_connections_at_once_all_end_well(tmp_path):
    def talk(balancer: LoadBalancer) -> None:
        for _ in range(20):
            with connect(balancer) as client:
                assert receive(client, 2) == b"\x00\xff"
                client.sendall(b"abc\n")
                client.shutdown(socket.SHUT_WR)
                assert receive(client).endswith(b"\ncba\n")

    with ExitStack() as stack:
        backends = [stack.enter_context(FakeBackend(greeter(name))) for name in (b"one", b"two", b"three")]
        with balancing(tmp_path, *backends, algorithm="least_connections") as balancer:
            clients = [threading.Thread(target=talk, args=(balancer,), name="client") for _ in range(8)]
            for client in clients:
                client.start()
            for client in clients:
                client.join(PATIENCE)
            over(balancer)
    lines = [told(line) for line in tcp_lines(tmp_path)]
    assert len(lines) == 160
    assert {(code, tries) for _, _, code, tries in lines} == {("--", "1")}
