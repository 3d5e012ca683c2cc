"""The operator's port: its page, how it bears clients that mean no good, and how it ends."""

from __future__ import annotations

import base64
import errno
import hashlib
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from balancer import admin
from balancer.admin import AdminServer, Sparing, page_policy
from balancer.config import AdminPort
from conftest import PATIENCE, eventually
from fakes import read_response
from operating import TOKEN, FakeOperator, Port, error, raising, serving


@pytest.fixture
def port() -> Iterator[Port]:
    with serving() as port:
        yield port


@pytest.fixture(autouse=True)
def nothing_on_stderr(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """http.server writes each request there, and socketserver each traceback."""
    yield
    assert capfd.readouterr().err == ""


# Answers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/metrics", "/healthz", "/api/status", "/api/backends/1", "/nothing"])
def test_head_is_get_without_the_body(port, path):
    head, get = port.ask("HEAD", path), port.ask("GET", path)
    assert (head.status, head.body) == (get.status, b"")
    assert head.headers["Content-Length"] == get.headers["Content-Length"] == str(len(get.body))
    assert head.headers["Content-Type"] == get.headers["Content-Type"]


@pytest.mark.parametrize("path", ["/", "/metrics", "/healthz", "/api/status", "/nothing"])
def test_every_answer_is_neither_kept_nor_guessed_at_nor_framed(port, path):
    fields = port.ask("GET", path).headers
    assert fields["Cache-Control"] == "no-store"
    assert fields["X-Content-Type-Options"] == "nosniff"
    assert fields["Referrer-Policy"] == "no-referrer"
    assert fields["Cross-Origin-Resource-Policy"] == "same-origin"
    assert "frame-ancestors 'none'" in fields["Content-Security-Policy"]
    assert "Access-Control-Allow-Origin" not in fields
    assert "Set-Cookie" not in fields
    assert "Server" not in fields


def test_nothing_from_outside_can_work_in_the_page(port):
    answer = port.ask("GET", "/")
    assert (answer.status, answer.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert answer.body == admin.PAGE.read_bytes()
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert "unsafe" not in str(policy)


def test_every_script_and_style_of_the_page_is_let_in_by_its_hash(port):
    page = admin.PAGE.read_text(encoding="utf-8")
    policy = port.ask("GET", "/").headers["Content-Security-Policy"]
    for kind in ("script", "style"):
        texts = re.findall(rf"<{kind}>(.*?)</{kind}>", page, re.DOTALL)
        assert len(texts) == len(re.findall(rf"<{kind}\b", page)) >= 1
        for text in texts:
            assert base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() in policy


def test_a_page_without_scripts_allows_none():
    assert "script-src 'none'; style-src 'none'" in page_policy("<p>hello")


# Clients of all kinds ----------------------------------------------------------------------------------------------


def test_a_connection_has_one_request(port):
    """What follows it is read and dropped, so that the answer arrives before the end, and no reset."""
    with port.connect() as sock, sock.makefile("rb") as file:
        request = port.head("GET", "/healthz")
        sock.sendall(request + request + port.head("POST", "/api/reload", Authorization=f"Bearer {TOKEN}"))
        answer = read_response(file)
        assert (answer.status, answer.headers["Connection"]) == (200, "close")
        assert file.read() == b""
    assert port.operator.done == []


@pytest.mark.parametrize("cut", [1, 2, 4, 30])
def test_half_a_request_is_not_acted_on(port, cut):
    """http.server takes the end of the stream for the end of the head."""
    head = port.head("POST", "/api/reload", Authorization=f"Bearer {TOKEN}")
    with port.connect() as sock:
        sock.sendall(head[:-cut])
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(1) == b""
    assert port.operator.done == []


@pytest.mark.parametrize(
    ("octets", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"POST /api/reload\r\n\r\n", 400),
        (b"GET / HTTP/1.1 x\r\n\r\n", 400),
        (b"GET / HTTP/one\r\n\r\n", 400),
        (b"GET / HTTP/2.0\r\n\r\n", 505),
        (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", 400),
        (b"GET /" + b"x" * 70_000, 431),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * 70_000, 431),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 102 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 20_000, 431),
        (b"GET /healthz\r\n\r\n", 200),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_is_no_request_is_answered_in_json_too(port, octets, status):
    answer = port.say(octets)
    assert answer.status == status
    assert status == 200 or error(answer)
    assert port.events == []


def test_a_body_that_ends_early_changes_nothing(port):
    with port.connect() as sock:
        fields = {"Authorization": f"Bearer {TOKEN}", "Content_Type": "application/json", "Content_Length": "20"}
        sock.sendall(port.head("PATCH", "/api/backends/1", **fields) + b'{"weight": 2}')
        sock.shutdown(socket.SHUT_WR)
        answer = read_response(sock)
    assert (answer.status, error(answer)) == (400, "the body ended after 13 of 20 octets")
    assert port.operator.done == []


def test_a_body_that_is_refused_does_not_cost_the_client_its_answer(port):
    """A socket that is closed with unread octets resets, and takes the answer along (RFC 9112, 9.6)."""
    with port.connect() as sock:
        length = 1_000_000
        fields = {"Authorization": f"Bearer {TOKEN}", "Content_Type": "application/json"}
        sock.sendall(port.head("POST", "/api/backends", Content_Length=str(length), **fields) + b" " * length)
        assert read_response(sock).status == 413


def test_a_body_is_asked_for_only_when_it_is_wanted(port):
    """RFC 9110, 10.1.1: a client that expects 100 need not send what would be refused."""
    fields = {"Content_Type": "application/json", "Content_Length": "13", "Expect": "100-continue"}
    with port.connect() as sock:
        sock.sendall(port.head("PATCH", "/api/backends/1", **fields))
        assert sock.makefile("rb").readline() == b"HTTP/1.1 401 Unauthorized\r\n"
    with port.connect() as sock, sock.makefile("rb") as file:
        sock.sendall(port.head("PATCH", "/api/backends/1", Authorization=f"Bearer {TOKEN}", **fields))
        assert (file.readline(), file.readline()) == (b"HTTP/1.1 100 Continue\r\n", b"\r\n")
        sock.sendall(b'{"weight": 2}')
        assert read_response(file).status == 200


def test_a_silent_client_is_cut():
    with serving(patience=0.1) as port, port.connect() as silent, port.connect() as half:
        half.sendall(b"GET / HTTP/1.1\r\nHost: ")
        assert silent.recv(1) == b""
        assert half.recv(1) == b""
        assert port.events == []


def test_a_client_that_drips_is_cut():
    """Each octet comes in time, the request never does."""
    with serving(patience=0.1) as port, port.connect() as sock:
        sock.settimeout(0.02)
        sock.sendall(b"GET / HTTP/1.1\r\nX: ")

        def is_cut() -> bool:
            try:
                sock.sendall(b"x")
                return sock.recv(1) == b""
            except TimeoutError:
                return False
            except OSError:
                return True

        eventually(is_cut)


def test_a_client_that_takes_no_answer_is_cut():
    with serving(patience=0.1) as port, socket.socket() as sock:
        port.operator.status.on_status = lambda: "x" * 20_000_000
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(port.server.socket.getsockname())
        sock.sendall(port.head("GET", "/api/status"))
        eventually(lambda: not handlers(), "its thread ends")
        assert port.events == []


def handlers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("admin-")]


def test_silent_clients_keep_nobody_out():
    """The one that has waited longest makes room; the number of threads is bounded."""
    with serving(most=8) as port, ExitStack() as stack:
        silent = [stack.enter_context(port.connect()) for _ in range(200)]
        for _ in range(20):
            assert port.ask("GET", "/healthz").status == 200
            assert len(handlers()) <= 16  # some may be about to end
        assert silent[0].recv(1) == b""


def test_a_slow_operator_keeps_no_other_client_waiting(port):
    asked, go_on = threading.Event(), threading.Event()

    def think() -> None:
        asked.set()
        go_on.wait(PATIENCE)

    port.operator.status.on_status = think
    with port.connect() as slow:
        slow.sendall(port.head("GET", "/api/status"))
        assert asked.wait(PATIENCE)
        assert port.ask("GET", "/healthz").status == 200
        go_on.set()
        assert read_response(slow).status == 200


def test_what_is_being_worked_on_is_never_cut(monkeypatch):
    """Neither for its time nor for another client; that one is let go when there is no room."""
    monkeypatch.setattr(admin, "ROOM_PATIENCE", 0.05)
    asked, go_on = threading.Event(), threading.Event()

    def think() -> None:
        asked.set()
        go_on.wait(PATIENCE)

    now = [0.0]
    with serving(clock=lambda: now[0], most=1) as port, port.connect() as sock:
        port.operator.on_change = think
        sock.sendall(port.head("POST", "/api/reload", Authorization=f"Bearer {TOKEN}"))
        assert asked.wait(PATIENCE)
        with port.connect() as other:
            assert other.recv(1) == b""
        now[0] += 1_000_000
        port.server.service_actions()
        go_on.set()
        assert read_response(sock).status == 200


def test_a_client_that_leaves_is_nothing(port):
    asked, go_on = threading.Event(), threading.Event()

    def think() -> str:
        asked.set()
        go_on.wait(PATIENCE)
        return "x" * 1_000_000

    port.operator.status.on_status = think
    with port.connect() as sock:
        sock.sendall(port.head("GET", "/api/status"))
        assert asked.wait(PATIENCE)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
    go_on.set()
    eventually(lambda: not handlers())
    assert port.events == []


# What the log is told ----------------------------------------------------------------------------------------------


def test_a_refused_change_is_a_warning_that_nobody_can_flood_the_log_with():
    now = [100.0]
    with serving(clock=lambda: now[0]) as port:
        for _ in range(20):
            port.change("PATCH", "/api/backends/1", {"weight": 2}, Authorization="Bearer guess")
        [(level, text)] = port.events
        assert level == "warning"
        line = r"admin 127\.0\.0\.1:[0-9]+: PATCH /api/backends/ID was refused: the token is wrong; .*"
        assert re.fullmatch(line, text)
        now[0] += admin.QUIET
        eventually(lambda: len(port.events) == 2, "the rest is told when it is time")
        assert re.fullmatch(line + r" \(the last of 19 since the line before\)", port.events[1][1])


def test_reads_and_mistakes_are_no_warnings(port):
    port.ask("GET", "/api/status", Authorization="Bearer wrong")
    port.ask("GET", "/api/status", Host="evil.example")
    port.change("PATCH", "/api/backends/1", {"wieght": 1})
    port.change("PATCH", "/api/backends/1?persist=2", {"weight": 1})
    assert port.events == []


def test_a_sparing_voice_speaks_again_after_a_while():
    now, lines = [0.0], []
    voice = Sparing(lambda *line: lines.append(line), lambda: now[0])
    voice.flush()
    assert lines == []
    for text in "abc":
        voice.say("warning", text)
    assert lines == [("warning", "a")]
    now[0] += admin.QUIET
    voice.say("warning", "d")
    assert lines[1:] == [("warning", "d (the last of 3 since the line before)")]
    now[0] += admin.QUIET
    voice.flush()
    assert len(lines) == 2


def test_a_flood_of_warnings_does_not_drown_an_error():
    now, lines = [0.0], []
    voice = Sparing(lambda *line: lines.append(line), lambda: now[0])
    for level in ("warning", "error", "warning", "warning"):
        voice.say(level, "text")
    now[0] += admin.QUIET
    voice.flush()
    assert sorted(lines[1:]) == [("error", "text"), ("warning", "text (the last of 2 since the line before)")]


def test_a_client_that_leaves_within_its_body_is_nothing(port):
    fields = {"Content_Type": "application/json", "Content_Length": "13", "Expect": "100-continue"}
    with port.connect() as sock:
        sock.sendall(port.head("PATCH", "/api/backends/1", Authorization=f"Bearer {TOKEN}", **fields))
        with sock.makefile("rb") as file:
            assert file.readline() == b"HTTP/1.1 100 Continue\r\n"
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
    eventually(lambda: not handlers())
    assert (port.events, port.operator.done) == ([], [])


@pytest.mark.parametrize("exception", [RuntimeError("a\nb"), ZeroDivisionError(), KeyError("x"), OSError(5, "broken")])
def test_a_crash_is_an_answer_and_a_line(port, exception):
    port.operator.status.on_status = raising(exception)
    answer = port.ask("GET", "/api/status")
    assert answer.status == 500
    assert type(exception).__name__ in error(answer)
    [(level, text)] = port.events
    assert level == "error"
    assert re.fullmatch(rf"admin 127.*: GET /api/status: bug: {type(exception).__name__}: .*\(operating.py:\d+\)", text)
    assert port.ask("GET", "/healthz").status == 200


def test_a_token_file_that_anybody_can_read_is_a_warning(tmp_path):
    file = tmp_path / "token"
    file.write_text(TOKEN)
    for mode, warnings in ((0o600, 0), (0o640, 0), (0o644, 1)):
        file.chmod(mode)
        events: list[tuple[str, str]] = []
        address = AdminPort(port=0, token_file=str(file))
        server = AdminServer(address, TOKEN, FakeOperator(), lambda *event, to=events: to.append(event))
        server.start()
        server.stop()
        assert [level for level, _ in events] == ["warning"] * warnings
        assert all(str(file) in text for _, text in events)


# The server --------------------------------------------------------------------------------------------------------


def test_figures_are_sampled_all_the_time_and_survive_a_crash():
    with serving() as port:
        eventually(lambda: port.operator.status.sampled)
        port.operator.status.on_sample = raising(RuntimeError("no figures"))
        eventually(lambda: port.events)
        assert [level for level, _ in port.events] == ["error"]
        assert "sampling: bug: RuntimeError: no figures" in port.events[0][1]
        sampled = port.operator.status.sampled
        eventually(lambda: port.operator.status.sampled > sampled)
        assert port.ask("GET", "/healthz").status == 200


def test_a_shortage_of_descriptors_is_waited_out(monkeypatch):
    """The client stays in the backlog and the port readable, so that without a pause the loop would spin."""
    monkeypatch.setattr(admin, "PAUSE", 0.05)

    class Short(socket.socket):
        def accept(self) -> Any:
            raise OSError(errno.EMFILE, "Too many open files")

    server = AdminServer(AdminPort(port=0), "", FakeOperator(), pytest.fail)
    server.socket = Short(fileno=server.socket.detach())
    began = time.monotonic()
    with pytest.raises(OSError, match="Too many open files"):
        server.get_request()
    assert time.monotonic() - began >= 0.05
    server.stop()


def test_stop_ends_open_connections_at_once():
    with ExitStack() as stack:
        with serving() as port:
            silent, half, answered = (stack.enter_context(port.connect()) for _ in range(3))
            half.sendall(b"GET / HT")
            answered.sendall(port.head("GET", "/healthz"))
            assert read_response(answered).status == 200
            eventually(lambda: len(handlers()) == 3)
            began = time.monotonic()
        assert time.monotonic() - began < admin.STOP_PATIENCE / 2
        assert handlers() == []
        assert silent.recv(1) == half.recv(1) == b""
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", int(port.authority.rpartition(":")[2])))


def test_stop_lets_a_change_end_and_answer():
    asked, go_on = threading.Event(), threading.Event()

    def think() -> None:
        asked.set()
        go_on.wait(PATIENCE)

    with serving() as port, port.connect() as sock, port.connect() as idle:
        port.operator.on_change = think
        sock.sendall(port.head("POST", "/api/reload", Authorization=f"Bearer {TOKEN}"))
        assert asked.wait(PATIENCE)
        eventually(lambda: len(port.server._deadlines) == 2, "the other is accepted")
        stop = threading.Thread(target=port.server.stop)
        stop.start()
        assert idle.recv(1) == b"", "who waits for nothing is cut once the port is closed"
        go_on.set()
        assert read_response(sock).status == 200
        sock.close()
        stop.join(PATIENCE)
        assert not stop.is_alive()


def test_stop_does_not_wait_for_ever_for_an_operator(monkeypatch):
    monkeypatch.setattr(admin, "STOP_PATIENCE", 0.05)
    asked, go_on = threading.Event(), threading.Event()

    def think() -> None:
        asked.set()
        go_on.wait(PATIENCE)

    with serving() as port, port.connect() as sock:
        port.operator.on_change = think
        sock.sendall(port.head("POST", "/api/reload", Authorization=f"Bearer {TOKEN}"))
        assert asked.wait(PATIENCE)
        port.server.stop()
        assert port.events == [("error", "admin: requests that did not end: 1")]
        go_on.set()


def test_stop_may_come_before_start_and_twice():
    server = AdminServer(AdminPort(port=0), "", FakeOperator(), pytest.fail)
    server.stop()
    with serving() as port:
        port.server.stop()


def test_a_port_that_is_taken_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        with pytest.raises(OSError, match=f"^cannot listen on 127.0.0.1:{taken}: Address already in use$"):
            AdminServer(AdminPort(port=taken), "", FakeOperator(), pytest.fail)


def test_a_page_that_is_missing_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(admin, "PAGE", tmp_path / "page.html")
    with pytest.raises(OSError, match=r"^cannot read .*page\.html: No such file or directory$"):
        AdminServer(AdminPort(port=0), "", FakeOperator(), pytest.fail)


def test_ipv6():
    with serving(host="::1") as port:
        assert re.fullmatch(r"http://\[::1\]:[0-9]+", port.server.url)
        assert port.change("POST", "/api/reload", Origin=port.server.url).status == 200
        assert re.fullmatch(r"admin \[::1\]:[0-9]+", port.operator.done[0][1])
