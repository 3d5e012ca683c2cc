"""The haproxy format as `halog` reads it, HAProxy's own analyser (in Debian's package haproxy)."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from collections import Counter
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import NamedTuple

import pytest

from balancer.balancer import LoadBalancer
from balancer.journal import Exchange, Journal
from balancing import connect, running
from conftest import PATIENCE
from fakes import FakeBackend

HALOG = shutil.which("halog", path="/usr/bin:/usr/sbin:/usr/local/bin:/usr/local/sbin")
pytestmark = pytest.mark.skipif(HALOG is None, reason="needs halog, of Debian's package haproxy")

NOBODY = "servers/<NOSRV>"
NO_REQUEST = "lb/<NOSRV>"


class Told(NamedTuple):
    """What is known of one exchange, however it is known."""

    server: str
    status: int  # -1: none
    code: str
    whole: bool  # was everything reached, from the request's head to the answer's?


def halog(log: Path, *options: str) -> tuple[list[list[str]], str]:
    """The words of each line that it prints, without the heading, and what it says at the end on stderr."""
    assert HALOG
    with log.open("rb") as file:
        done = subprocess.run([HALOG, *options], stdin=file, capture_output=True, timeout=PATIENCE, check=True)
    rows = [line.split(" ") for line in done.stdout.decode().splitlines() if not line.startswith("#")]
    return rows, done.stderr.decode()


def assert_halog_agrees(log: Path, told: list[Told], events: int) -> None:
    """Every exchange is counted as what it was, and nothing else is: not an event, not a line that somebody forged."""
    expected = f"{len(told) + events} lines in, {{}} lines out, {events} parsing errors\n"

    rows, summary = halog(log, "-st")
    assert {int(status): int(count) for status, count in rows} == Counter(one.status for one in told)
    assert summary == expected.format(len(rows))

    rows, summary = halog(log, "-tc")
    assert {code: int(count) for code, count in rows} == Counter(one.code for one in told)
    assert summary == expected.format(len(rows))

    rows, summary = halog(log, "-cc")
    assert rows == [["--", str(len(told))]]

    rows, summary = halog(log, "-srv")
    assert summary == expected.format(len(rows))
    found = {row[0]: [int(count) for count in row[1:9]] for row in rows}
    classes = (1, 2, 3, 4, 5, 0)
    for server in {one.server for one in told}:
        its = [one for one in told if one.server == server]
        counts = Counter(max(one.status, 0) // 100 for one in its)
        assert found.pop(server) == [*(counts[each] for each in classes), len(its), sum(one.whole for one in its)]
    assert not found

    rows, summary = halog(log, "-pct")
    whole = sum(one.whole for one in told)
    assert rows[-1][:2] == ["100.0", str(whole)]
    assert summary == expected.format(whole)


def exchange(
    told: Told, *, line: bytes = b"GET / HTTP/1.1", client: str = "127.0.0.1:54321", tries: int = 1
) -> Exchange:
    """A record of it, whose times are 1, 2, 3 and 4 ms, and 5 for the data."""
    moments = (0.001, 0.003, 0.006, 0.010) if told.whole else (-1.0, -1.0, -1.0, -1.0)
    backend = "-" if told.server.endswith("<NOSRV>") else told.server.removeprefix("servers/")
    load = (9, 7, 5, 3)
    status = max(told.status, 0)
    return (1_000_000_000.0, client, line, status, 34, backend, *moments, 0.015, told.code, tries, "f00d", 12, *load)


ENDS = [
    Told("servers/1", 200, "--", True),
    Told("servers/1", 304, "--", True),
    Told("servers/2", 404, "--", True),
    Told("servers/2", 500, "--", True),
    Told("servers/2", 101, "CD", True),
    Told("servers/2", 200, "sD", True),
    Told("servers/2", 200, "cD", True),
    Told("servers/2", 200, "KD", True),
    Told("servers/app-3", 502, "SH", False),
    Told("servers/app-3", 502, "PH", False),
    Told("servers/app-3", 504, "sH", False),
    Told("servers/app-3", 504, "DH", False),
    Told("servers/app-3", 500, "IH", False),
    Told("servers/app-3", -1, "CH", False),
    Told(NOBODY, 503, "SC", False),
    Told(NOBODY, 503, "sQ", False),
    Told(NOBODY, 503, "PQ", False),
    Told(NOBODY, 503, "RC", False),
    Told(NO_REQUEST, 400, "PR", False),
    Told(NO_REQUEST, 400, "CR", False),
    Told(NO_REQUEST, 408, "cR", False),
    Told(NO_REQUEST, 200, "LR", False),
]
"""One of each way that an exchange can end."""

HOSTILE = [
    b"",
    b"GET",
    b'GET /"a" b" HTTP/1.1',
    b"GET /\n Nov 20 20:37:20 h haproxy[1]: 1.2.3.4:5 [20/Nov/2026:20:37:20.122] lb servers/9 0/0/0/0/0 200 1",
    b"GET /\r\n[01/Jan/2026:00:00:00.000]",
    bytes(range(256)),
    b"GET /" + b"x" * 16_000 + b" HTTP/1.1",
    b"GET /" + b"\xff" * 16_000 + b" HTTP/1.1",
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lb.log"


@pytest.fixture
def log(path: Path):
    made = Journal(str(path), format="haproxy")
    made.start()
    yield made
    made.stop()


def test_every_way_to_end_is_counted_as_what_it_is(log: Journal, path: Path):
    told = [one for number, one in enumerate(ENDS, 1) for _ in range(number)]
    for one in told:
        log.exchange(exchange(one))
    log.stop()
    assert_halog_agrees(path, told, events=0)


def test_request_lines_forge_nothing_and_hide_nothing(log: Journal, path: Path):
    told = [Told("servers/1", 200, "--", True)] * len(HOSTILE)
    for one, line in zip(told, HOSTILE, strict=True):
        log.exchange(exchange(one, line=line))
    log.stop()
    assert_halog_agrees(path, told, events=0)


def test_events_are_no_exchanges_whatever_they_say(log: Journal, path: Path):
    forged = "[20/Nov/2026:20:37:20.122] lb servers/9 0/0/0/0/0 200 1 - - ---- 1/1/1/1/0 0/0"
    told = [Told("servers/1", 200, "--", True)]
    for text in ("started", forged, f"1.2.3.4:5 {forged}", f"x\n{forged}", ""):
        log.event("warning", text)
    log.exchange(exchange(told[0]))
    log.stop()
    assert_halog_agrees(path, told, events=5)


def test_clients_urls_and_times_are_found_where_they_are(log: Journal, path: Path):
    one = Told("servers/1", 200, "--", True)
    for client in ("127.0.0.1:1", "127.0.0.1:2", "[::1]:3", "[2001:db8::7]:4"):
        log.exchange(exchange(one, client=client, line=b"GET /a?b=c HTTP/1.1", tries=2))
    log.stop()
    rows, _ = halog(path, "-ic", "-q")
    assert {row[-1]: row[0] for row in rows} == {"127.0.0.1": "2", "::1": "1", "2001:db8::7": "1"}
    rows, _ = halog(path, "-u", "-q")
    assert [(row[0], row[-1], row[7]) for row in rows] == [("4", "/a", str(4 * 34))]
    rows, _ = halog(path, "-srv", "-q")
    assert rows[0][-2:] == ["3", "4"]  # average of connecting and of answering, in ms
    rows, _ = halog(path, "-pct", "-q")
    assert rows[-1][:6] == ["100.0", "4", "1", "3", "4", "5"]
    rows, _ = halog(path, "-Q", "-c", "-q")
    assert rows == [["4"]]  # each waited in the queue


# A real load ------------------------------------------------------------------------------------------------------

QUIET = {"health_check": {"type": "tcp", "interval": 1000}}  # one probe at the start, and it asks for nothing


def answer(status: str) -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: 2\r\n\r\nok".encode()


def ask(balancer: LoadBalancer, method: str, times: int = 1) -> list[int]:
    """The statuses of as many requests, one after the other on one connection."""
    with closing(HTTPConnection(balancer.host, balancer.port, timeout=PATIENCE)) as client:
        statuses = []
        for _ in range(times):
            client.request(method, "/x")
            with client.getresponse() as found:
                found.read()
                statuses.append(found.status)
        return statuses


def octets(sock: socket.socket) -> bytes:
    with sock, sock.makefile("rb") as file:
        return file.read()


def test_halog_agrees_with_a_real_load(tmp_path: Path, path: Path):
    """Statuses, a retry, an answer that never came, and what is no request: what the client saw is what is counted."""
    first = FakeBackend([*[answer("200 OK")] * 7, answer("404 Not Found"), answer("500 Oh"), b""])
    with first, FakeBackend(answer("200 OK")) as second:
        backends = [(first.host, first.port), (second.host, second.port)]
        log = {"file": str(path), "format": "haproxy"}
        with running(tmp_path, backends, log=log, algorithm="round_robin", **QUIET) as balancer:
            assert ask(balancer, "GET", 6) == [200] * 6
            second.close()
            assert ask(balancer, "GET", 4) == [200] * 4  # the first that was for the second is retried
            assert ask(balancer, "GET", 2) == [404, 500]
            assert ask(balancer, "POST") == [502]
            with connect(balancer) as sock:
                sock.sendall(b"GARBAGE\r\n\r\n")
                assert octets(sock).startswith(b"HTTP/1.1 400 ")
            retried = sum(backend.tally.redispatches for backend in balancer.pool.backends)
    told = [
        *[Told("servers/1", 200, "--", True)] * 7,
        *[Told("servers/2", 200, "--", True)] * 3,
        Told("servers/1", 404, "--", True),
        Told("servers/1", 500, "--", True),
        Told("servers/1", 502, "SH", False),
        Told(NO_REQUEST, 400, "PR", False),
    ]
    text = path.read_text()
    assert_halog_agrees(path, told, events=len(re.findall(r"haproxy\[\d+\]: lb ", text)))
    assert len(re.findall(r"/\+1 0/0 ", text)) == retried >= 1


def test_line_of_a_real_connection_in_tcp_mode(tmp_path: Path, path: Path):
    with FakeBackend(answer("200 OK")) as backend:
        log = {"file": str(path), "format": "haproxy"}
        with (
            running(tmp_path, [(backend.host, backend.port)], mode="tcp", log=log) as balancer,
            connect(balancer) as sock,
        ):
            sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
            sock.shutdown(socket.SHUT_WR)
            assert octets(sock) == answer("200 OK")
    lines = re.findall(r"haproxy\[\d+\]: (127.*)", path.read_text())
    assert len(lines) == 1
    assert re.fullmatch(r"127\.0\.0\.1:\d+ \[.{24}\] lb servers/1 \d+/\d+/\d+ 40 -- 1/1/\d/\d/0 0/0", lines[0])
    rows, _ = halog(path, "-H", "-c", "-q")
    assert rows == [["0"]]  # which is how it counts the lines that are of HTTP
