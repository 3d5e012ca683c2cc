"""client.py: the figures, what counts as which error, and the program as a user starts it."""

from __future__ import annotations

import errno
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from backend_server import Backend, make_server, serving
from client import (
    Bucket,
    Outcome,
    Settings,
    Stats,
    command_line,
    draw,
    figures,
    histogram,
    kind_of,
    percentile,
    simulate,
    summary,
)
from conftest import PATIENCE, eventually
from fakes import Connection, FakeBackend

PROGRAM = Path(__file__).resolve().parent.parent / "client.py"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@pytest.fixture
def backend() -> Iterator[Backend]:
    with serving(make_server(name="1")) as server:
        yield server


def play(port: int, **settings: object) -> Stats:
    return simulate(Settings(port=port, **settings)).stats  # type: ignore[arg-type]


def free_port() -> int:
    """A port at which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


# Figures


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [
        ([], 50, None),
        ([7], 1, 7),
        ([7], 100, 7),
        ([1, 2], 50, 1),
        ([1, 2, 3], 50, 2),
        (range(1, 101), 50, 50),
        (range(1, 101), 99, 99),
        (range(1, 102), 99, 100),
        (range(1, 11), 90, 9),
    ],
)
def test_a_percentile_is_the_value_of_nearest_rank(values, percent, expected):
    assert percentile(values, percent) == expected


def test_a_histogram_goes_from_its_first_to_its_last_value():
    assert histogram([0.0011, 0.0019, 0.0002, 0.004]) == [
        Bucket(0.2, 0.5, 1), Bucket(0.5, 1, 0), Bucket(1, 2, 2), Bucket(2, 5, 1),
    ]  # fmt: skip


def test_a_histogram_has_room_for_everything():
    assert histogram([]) == []
    assert histogram([0.0]) == [Bucket(0, 0.01, 1)]
    assert histogram([86400.0]) == [Bucket(5e7, 1e8, 1)]


def test_the_bars_are_to_scale_and_none_that_counts_is_invisible():
    lines = draw([Bucket(1, 2, 1000), Bucket(2, 5, 0), Bucket(5, 10, 500), Bucket(10, 20, 1)], width=10)
    assert [line.count("#") for line in lines] == [10, 0, 5, 1]
    assert lines[0].split() == ["1", "to", "2", "1000", "#" * 10]
    assert draw([]) == []


def test_stats_add_up():
    first = Stats(3, 1, 1, 10, 5, array("d", [0.1, 0.2]), Counter({"1": 2}), Counter({"reset": 1}))
    second = Stats(2, 1, 0, 20, 5, array("d", [0.3]), Counter({"1": 1, "2": 1}), Counter({"reset": 1}))
    assert Stats.merged([first, second]) == Stats(
        5, 2, 1, 30, 10, array("d", [0.1, 0.2, 0.3]), Counter({"1": 3, "2": 1}), Counter({"reset": 2})
    )


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (ConnectionRefusedError(), "refused"),
        (http.client.RemoteDisconnected(), "closed"),
        (ConnectionResetError(), "reset"),
        (BrokenPipeError(), "reset"),
        (TimeoutError(), "timeout"),
        (socket.gaierror(socket.EAI_NONAME, "x"), "unknown host"),
        (http.client.IncompleteRead(b""), "cut off"),
        (http.client.BadStatusLine("x"), "not HTTP"),
        (OSError(errno.EMFILE, "x"), "EMFILE"),
        (OSError("x"), "OSError"),
    ],
)
def test_each_error_has_its_word(error, word):
    assert kind_of(error) == word


def test_the_figures_carry_their_units_and_the_summary_says_them():
    stats = Stats(4, 2, 1, 3_000_000, 1_000_000, array("d", [0.001, 0.002, 0.004]))
    stats.answered_by.update({"1": 2, "2": 1})
    stats.errors.update({"status 503": 1, "refused": 1})
    found = figures(Settings(clients=2), Outcome(stats, 2.0, False))
    assert found["requests_per_second"] == 1.5
    assert found["received_megabytes_per_second"] == 1.5
    assert (found["p50_ms"], found["p90_ms"], found["p99_ms"], found["max_ms"]) == (2, 4, 4, 4)
    text = summary(found)
    assert "4 requests to http://127.0.0.1:8080/ by 2 clients in 2.00 s\n2 failed, 1 reconnects\n" in text
    assert re.search(r"^  1 +2 +66\.7%$", text, re.MULTILINE)
    assert re.search(r"^  status 503 +1$", text, re.MULTILINE)


def test_a_run_without_an_answer_has_a_summary_too():
    found = figures(Settings(), Outcome(Stats(), 0.0, True))
    assert (found["p50_ms"], found["histogram"]) == (None, [])
    assert "interrupted" in summary(found)


# Requests


@pytest.mark.parametrize("new_connections", [False, True])
def test_exactly_as_many_requests_are_made_as_asked_for(new_connections):
    with FakeBackend(OK) as fake:
        stats = play(fake.port, requests=57, clients=8, new_connections=new_connections)
        assert (stats.requests, stats.failed, len(stats.latencies), len(fake.requests)) == (57, 0, 57, 57)
        assert fake.accepted == 57 if new_connections else fake.accepted <= 8


def test_duration_wins_over_the_number_of_requests(backend):
    outcome = simulate(Settings(port=backend.port, requests=1, clients=2, duration=0.1))
    assert outcome.stats.requests > 2
    assert 0.1 <= outcome.seconds < PATIENCE
    assert outcome.stats.failed == 0


def test_who_answered_is_told_by_x_backend_then_by_server_then_not_at_all():
    fields = [b"Server: s\r\nX-Backend: 2\r\n", b"Server: s\r\n", b""]
    with FakeBackend([b"HTTP/1.1 200 OK\r\n%bContent-Length: 0\r\n\r\n" % each for each in fields]) as fake:
        assert play(fake.port, requests=3, clients=1).answered_by == {"2": 1, "s": 1, "-": 1}


def test_bodies_are_sent_and_read_whatever_their_framing(backend):
    posted = play(backend.port, path="/echo", method="POST", body_size=100_000, requests=4, clients=2)
    assert (posted.sent, posted.received, posted.failed) == (400_000, 400_000, 0)
    chunked = play(backend.port, path="/bytes/100000?chunked", requests=3, clients=1)
    assert (chunked.received, chunked.failed) == (300_000, 0)
    assert play(backend.port, path="/bytes/100000", method="HEAD", requests=3, clients=1).received == 0


def test_a_status_of_400_and_above_is_an_answer_that_failed(backend):
    stats = play(backend.port, path="/status/503", requests=5, clients=2)
    assert (stats.requests, stats.failed, len(stats.latencies)) == (5, 5, 5)
    assert (stats.errors, stats.answered_by) == ({"status 503": 5}, {"1": 5})
    assert play(backend.port, path="/status/304", requests=1, clients=1).failed == 0


def test_a_refused_connection_is_counted_and_not_tried_again():
    stats = play(free_port(), requests=3, clients=2)
    assert (stats.requests, stats.errors, stats.reconnects) == (3, {"refused": 3}, 0)


def test_a_silent_server_is_a_timeout():
    with FakeBackend(lambda connection: connection.file.read()) as fake:
        assert play(fake.port, requests=1, clients=1, timeout=0.05).errors == {"timeout": 1}


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhe",
    ],
)
def test_half_an_answer_is_an_error(answer):
    """http.client's readinto takes an early end for an end."""
    with FakeBackend(one_answer_each(answer)) as fake:
        assert play(fake.port, requests=2, clients=1).errors == {"cut off": 2}


def one_answer_each(answer: bytes) -> Callable[[Connection], None]:
    """A backend that answers one request of each connection and hangs up without having said so."""

    def serve(connection: Connection) -> None:
        connection.read_request()
        connection.send(answer)

    return serve


def test_an_answer_that_is_no_http_is_an_error():
    with FakeBackend(one_answer_each(b"220 mail.example\r\n")) as fake:
        assert play(fake.port, requests=1, clients=1).errors == {"not HTTP": 1}


# Reconnects


def test_a_kept_connection_that_was_closed_meanwhile_is_opened_anew():
    """RFC 9110 section 9.2.2: an idempotent request may be repeated when the connection closed without an answer."""
    with FakeBackend(one_answer_each(OK)) as fake:
        stats = play(fake.port, requests=4, clients=1)
        assert (stats.failed, stats.reconnects, fake.accepted) == (0, 3, 4)


def test_a_post_is_never_sent_twice():
    with FakeBackend(one_answer_each(OK)) as fake:
        stats = play(fake.port, requests=4, clients=1, method="POST")
        assert (len(stats.latencies), stats.failed, stats.reconnects) == (2, 2, 0)
        assert len(fake.requests) == 2


def test_it_is_opened_anew_only_once():
    with FakeBackend([OK, b""]) as fake:
        stats = play(fake.port, requests=2, clients=1)
        assert (stats.failed, stats.reconnects, fake.accepted) == (1, 1, 2)


def test_a_first_request_that_is_not_answered_is_not_repeated():
    with FakeBackend(b"") as fake:
        stats = play(fake.port, requests=2, clients=1)
        assert (stats.errors, stats.reconnects, len(fake.requests)) == ({"closed": 2}, 0, 2)


# TCP


@pytest.mark.parametrize("new_connections", [False, True])
def test_tcp_sends_and_expects_the_same_back(new_connections):
    with serving(make_server(tcp=True)) as server:
        stats = play(server.port, tcp=True, body_size=100_000, requests=6, clients=2, new_connections=new_connections)
    assert (stats.failed, stats.sent, stats.received, stats.answered_by) == (0, 600_000, 600_000, {"-": 6})


def test_tcp_notices_an_echo_that_is_wrong_or_ends():
    with FakeBackend(lambda connection: connection.send(b"\x00\x01\xff")) as fake:
        assert play(fake.port, tcp=True, body_size=3, requests=1, clients=1).errors == {"wrong echo": 1}
    with FakeBackend(lambda connection: (connection.file.read(3), connection.send(b"\x00"))) as fake:
        assert play(fake.port, tcp=True, body_size=3, requests=1, clients=1).errors == {"closed": 1}


# The program


@pytest.mark.parametrize(
    ("arguments", "url"),
    [
        ([], "http://127.0.0.1:8080/"),
        (["localhost:81/a b?c=ü"], "http://localhost:81/a%20b?c=%C3%BC"),
        (["http://h"], "http://h:80/"),
        (["http://[::1]:9/%20?"], "http://[::1]:9/%20"),
        (["--tcp"], "tcp://127.0.0.1:8080"),
        (["--tcp", "tcp://h:7"], "tcp://h:7"),
    ],
)
def test_the_address_is_read_as_people_write_it(arguments, url):
    assert command_line(arguments)[0].url == url


def test_the_sizes_follow_what_is_asked_for():
    assert command_line([])[0].body_size == 0
    assert command_line(["--tcp"])[0].body_size == 64
    assert command_line(["-n", "3", "-c", "20"])[0].clients == 3
    assert command_line(["-n", "3", "-c", "20", "--duration", "1"])[0].clients == 20


@pytest.mark.parametrize(
    "arguments",
    [["ftp://h"], ["--tcp", "http://h:1"], ["--tcp", "h"], ["http://:1"], ["h:99999"], ["a..b"], ["-n", "0"],
     ["-c", "0"], ["--duration", "nan"], ["--timeout", "0"], ["--method", "A B"], ["--body-size", "-1"],
     ["--tcp", "--body-size", "0"], ["--nonsense"]],
)  # fmt: skip
def test_a_wrong_command_line_is_one_line_and_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        command_line(arguments)
    assert ended.value.code == 2
    assert re.fullmatch(r"client\.py: .+\n", capsys.readouterr().err)


@contextmanager
def started(*arguments: str, stderr: int = subprocess.PIPE) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(PROGRAM), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_json_is_one_object_and_a_good_run_exits_0(backend):
    with started(f"http://127.0.0.1:{backend.port}/", "-n", "50", "-c", "3", "--json") as process:
        out, err = process.communicate(timeout=PATIENCE)
    found = json.loads(out)
    assert (process.returncode, err) == (0, "")
    assert (found["requests"], found["failed"], found["answered_by"]) == (50, 0, {"1": 50})
    assert sum(bucket["requests"] for bucket in found["histogram"]) == 50
    assert 0 < found["p50_ms"] <= found["p90_ms"] <= found["p99_ms"] <= found["max_ms"]


def test_a_run_in_which_a_request_failed_exits_1():
    with started(f"http://127.0.0.1:{free_port()}/", "-n", "2") as process:
        out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (1, "")
    assert re.search(r"^  refused +2$", out, re.MULTILINE)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell starts what it puts in the background with SIGINT ignored, and every program from there inherits that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("path", ["/", "/slow/1000"])
@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_prints_the_summary_and_exits_130(backend, path):
    with started(f"127.0.0.1:{backend.port}{path}", "--duration", "1000", "-c", "2") as process:
        eventually(lambda: len(backend.connections) == 2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (130, "")
    assert re.match(r"\d+ requests to http://.* by 2 clients in .* s, interrupted\n0 failed", out)


def test_progress_is_shown_on_a_terminal(backend):
    ours, theirs = os.openpty()
    try:
        with started(f"127.0.0.1:{backend.port}", "-n", "30", "-c", "1", stderr=theirs) as process:
            out, _ = process.communicate(timeout=PATIENCE)
        assert b"30 of 30 requests, 0 failed, " in os.read(ours, 65536)
        assert out.startswith("30 requests to ")
    finally:
        os.close(ours)
        os.close(theirs)
