"""backend_server.py: what each path answers, how it ends, and the program as a user starts it."""

from __future__ import annotations

import hashlib
import http.client
import json
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from backend_server import (
    BINARY,
    CLOSE,
    CONTINUATION,
    PING,
    PONG,
    TEXT,
    Backend,
    frame,
    main,
    make_server,
    mask,
    pattern,
    serving,
    websocket_accept,
)
from conftest import PATIENCE, eventually

PROGRAM = Path(__file__).resolve().parent.parent / "backend_server.py"


@pytest.fixture
def backend() -> Iterator[Backend]:
    with serving(make_server(name="1")) as server:
        yield server


class Reply:
    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status, self.headers, self.body = response.status, response.headers, response.read()
        self.text = self.body.decode("latin-1")


def ask(server: Backend, target: str, method: str = "GET", body: Any = None, **fields: str) -> Reply:
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)) as connection:
        headers = {name.replace("_", "-"): value for name, value in fields.items()}
        connection.request(method, target, body, headers, encode_chunked="Transfer-Encoding" in headers)
        return Reply(connection.getresponse())


@contextmanager
def dialled(server: Backend) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as sock:
        yield sock


def exchange(server: Backend, octets: bytes) -> bytes:
    """Send octets, half-close, and read to the end."""
    with dialled(server) as sock:
        sock.sendall(octets)
        sock.shutdown(socket.SHUT_WR)
        with sock.makefile("rb") as file:
            return file.read()


def head_of(file: BinaryIO) -> bytes:
    return b"".join(iter(file.readline, b"\r\n"))


# Who it is


def test_it_says_who_it_is_in_the_body_and_in_a_field(backend):
    reply = ask(backend, "/")
    assert (reply.status, reply.headers["X-Backend"]) == (200, "1")
    assert reply.text == f"backend 1 at 127.0.0.1:{backend.port}\n"


def test_without_a_name_it_goes_by_its_port():
    with serving(make_server()) as server:
        assert ask(server, "/").headers["X-Backend"] == str(server.port)


def test_it_listens_on_ipv6():
    try:
        server = make_server("::1", name="six")
    except OSError:
        pytest.skip("no IPv6 here")
    with serving(server), socket.create_connection(("::1", server.port), PATIENCE) as sock:
        sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        with sock.makefile("rb") as file:
            assert f"backend six at [::1]:{server.port}\n".encode() in file.read()


def test_what_is_not_there_is_404(backend):
    paths = ("/nothing", "/bytes/", "/bytes/x", "/slow/-1", "/status/99", "*")
    assert {ask(backend, path).status for path in paths} == {404}


# Health


def test_health_is_switched_by_post(backend):
    assert (ask(backend, "/health").status, ask(backend, "/health").text) == (200, "ok\n")
    assert ask(backend, "/health/fail", "POST").status == 200
    assert ask(backend, "/health").status == 503
    assert ask(backend, "/").status == 200
    ask(backend, "/health/ok", "POST")
    assert ask(backend, "/health").status == 200


def test_health_is_not_switched_by_looking(backend):
    reply = ask(backend, "/health/fail")
    assert (reply.status, reply.headers["Allow"]) == (405, "POST")
    assert ask(backend, "/health").status == 200


# Echo, and bodies


@pytest.mark.parametrize("method", ["POST", "PUT", "GET", "DELETE", "REPORT"])
def test_echo_keeps_a_known_length(backend, method):
    body = b"".join(pattern(200_000))
    reply = ask(backend, "/echo", method, body, Content_Type="application/x-thing")
    assert (reply.headers["Content-Length"], reply.headers["Transfer-Encoding"]) == ("200000", None)
    assert reply.headers["Content-Type"] == "application/x-thing"
    assert reply.body == body


def test_echo_of_a_chunked_body_is_chunked(backend):
    reply = ask(backend, "/echo", "POST", iter([b"one ", b"two ", b"x" * 100_000]), Transfer_Encoding="chunked")
    assert (reply.headers["Content-Length"], reply.headers["Transfer-Encoding"]) == (None, "chunked")
    assert reply.body == b"one two " + b"x" * 100_000


def test_echo_of_nothing_is_nothing(backend):
    reply = ask(backend, "/echo")
    assert (reply.headers["Content-Length"], reply.body) == ("0", b"")


def test_echo_comes_back_while_the_body_is_still_on_its_way(backend):
    with dialled(backend) as sock, sock.makefile("rb") as file:
        sock.sendall(b"POST /echo HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n")
        assert b"200 OK" in head_of(file)
        assert file.read(8) == b"3\r\none\r\n"
        sock.sendall(b"3;extension=1\r\ntwo\r\n0\r\nTrailer: t\r\n\r\n")
        assert file.read(13) == b"3\r\ntwo\r\n0\r\n\r\n"
        sock.sendall(b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
        assert b"backend 1 at" in file.read()


def test_sink_counts_and_hashes(backend):
    body = b"".join(pattern(300_001))
    found = json.loads(ask(backend, "/sink", "PUT", body).body)
    assert found == {"backend": "1", "bytes": 300_001, "sha256": hashlib.sha256(body).hexdigest()}


def test_the_100_is_sent_to_who_waits_for_it(backend):
    """RFC 9110 section 10.1.1."""
    with dialled(backend) as sock, sock.makefile("rb") as file:
        sock.sendall(b"POST /echo HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n")
        assert head_of(file) == b"HTTP/1.1 100 Continue\r\n"
        sock.sendall(b"body")
        assert head_of(file).startswith(b"HTTP/1.1 200 ")
        assert file.read(4) == b"body"


def test_a_body_that_is_not_wanted_is_refused_without_a_100(backend):
    with dialled(backend) as sock, sock.makefile("rb") as file:
        sock.sendall(b"POST /status/413 HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n")
        head = head_of(file)
        assert head.startswith(b"HTTP/1.1 413 ")
        assert b"Connection: close\r\n" in head
        file.read()


def test_an_answer_may_come_before_the_upload_is_done(backend):
    """RFC 9112 section 9.5 lets a server answer early; the connection stays in step all the same."""
    with dialled(backend) as sock, sock.makefile("rb") as file:
        sock.sendall(b"POST /status/403 HTTP/1.1\r\nHost: h\r\nContent-Length: 8\r\n\r\nhalf")
        assert head_of(file).startswith(b"HTTP/1.1 403 ")
        file.readline()
        sock.sendall(b"rest" + b"GET /status/201 HTTP/1.1\r\nHost: h\r\n\r\n")
        assert head_of(file).startswith(b"HTTP/1.1 201 ")


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        (b"Content-Length: +5", 400),
        (b"Content-Length: 5, 5", 400),
        (b"Content-Length: -1", 400),
        (b"Transfer-Encoding: gzip", 501),
    ],
)
def test_a_body_of_unknown_extent_is_refused_and_the_connection_closed(backend, fields, status):
    answer = exchange(backend, b"POST /echo HTTP/1.1\r\nHost: h\r\n%b\r\n\r\nhello" % fields)
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert b"\r\nConnection: close\r\n" in answer
    assert answer.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize("body", [b"zz\r\nhello\r\n0\r\n\r\n", b"5\r\nhelloXX0\r\n\r\n", b"5\r\nhel", b""])
def test_a_broken_chunked_body_is_never_made_to_look_complete(backend, body):
    answer = exchange(backend, b"POST /echo HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n" + body)
    assert not answer.endswith(b"0\r\n\r\n")


def test_a_request_line_that_cannot_be_read_is_answered_400_with_a_head(backend):
    answer = exchange(backend, b"what is this thing\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ")


def test_headers_are_shown_as_they_arrived(backend):
    octets = b"GET /headers?a=%20 HTTP/1.1\r\nHost: h\r\nX-B: 2\r\nx-a: 1\r\nX-B: 1\r\nConnection: close\r\n\r\n"
    found = json.loads(exchange(backend, octets).partition(b"\r\n\r\n")[2])
    assert found["request_line"] == "GET /headers?a=%20 HTTP/1.1"
    assert found["fields"] == [["Host", "h"], ["X-B", "2"], ["x-a", "1"], ["X-B", "1"], ["Connection", "close"]]


# Answers of every form


@pytest.mark.parametrize("count", [0, 1, 250, 300_000])
def test_bytes_come_in_the_pattern_that_the_name_promises(backend, count):
    known, chunked = ask(backend, f"/bytes/{count}"), ask(backend, f"/bytes/{count}?chunked")
    assert known.headers["Content-Length"] == str(count)
    assert chunked.headers["Transfer-Encoding"] == "chunked"
    assert known.body == chunked.body == bytes(at % 251 for at in range(count))


@pytest.mark.parametrize("status", [200, 302, 404, 503, 599])
def test_any_status_is_answered(backend, status):
    reply = ask(backend, f"/status/{status}")
    assert (reply.status, reply.text) == (status, f"backend 1 answers {status}\n")


@pytest.mark.parametrize("status", [204, 304])
def test_204_and_304_have_neither_body_nor_length(backend, status):
    """RFC 9110 section 8.6."""
    octets = exchange(backend, b"GET /status/%d HTTP/1.1\r\nHost: h\r\n\r\n" % status)
    assert octets.startswith(b"HTTP/1.1 %d " % status)
    assert octets.endswith(b"\r\n\r\n")
    assert b"Content-Length" not in octets


def test_an_interim_status_comes_before_a_200(backend):
    octets = exchange(backend, b"GET /status/103 HTTP/1.1\r\nHost: h\r\n\r\n")
    assert octets.startswith(b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\n")


@pytest.mark.parametrize(
    "path", ["/", "/health", "/bytes/500", "/bytes/500?chunked", "/stream", "/headers", "/status/404", "/no", "/echo"]
)
def test_head_has_the_fields_of_get_and_no_body(backend, path):
    """RFC 9110 section 9.3.2."""
    octets = exchange(backend, b"HEAD %b HTTP/1.1\r\nHost: h\r\n\r\n" % path.encode())
    head, _, body = octets.partition(b"\r\n\r\n")
    assert body == b""
    assert b"\r\nContent-Length: " in head or b"\r\nTransfer-Encoding: chunked" in head


def test_http_1_0_gets_no_chunks_and_keeps_the_connection_only_when_asked_to(backend):
    """RFC 9112 sections 6.1 and 9.3."""
    head, _, body = exchange(backend, b"GET /bytes/4?chunked HTTP/1.0\r\n\r\n").partition(b"\r\n\r\n")
    assert body == b"\x00\x01\x02\x03"
    assert b"Transfer-Encoding" not in head
    kept = exchange(backend, b"GET /status/201 HTTP/1.0\r\nConnection: keep-alive\r\n\r\nGET / HTTP/1.0\r\n\r\n")
    assert b"\r\nConnection: keep-alive\r\n" in kept
    assert kept.count(b"HTTP/1.1 20") == 2


def test_pipelined_requests_are_answered_in_order(backend):
    octets = b"".join(b"GET /status/%d HTTP/1.1\r\nHost: h\r\n\r\n" % status for status in (201, 202, 203))
    assert re.findall(rb"HTTP/1.1 (\d+)", exchange(backend, octets)) == [b"201", b"202", b"203"]


# Time


def test_slow_and_delay_add_up():
    with serving(make_server(delay=0.02)) as server:
        begun = time.monotonic()
        assert ask(server, "/slow/0.03").text.endswith("waited 0.03 s\n")
        assert time.monotonic() - begun >= 0.05


def test_events_arrive_as_they_are_sent(backend):
    with dialled(backend) as sock, sock.makefile("rb") as file:
        sock.sendall(b"GET /stream?n=2&interval=1000 HTTP/1.1\r\nHost: h\r\n\r\n")
        assert b"Content-Type: text/event-stream\r\n" in head_of(file)
        file.readline()
        assert file.read(31) == b"id: 1\ndata: backend 1 event 1\n\n"


def test_the_stream_ends_after_its_last_event(backend):
    assert ask(backend, "/stream?n=3&interval=0").text.count("data: ") == 3
    assert ask(backend, "/stream?n=0").text == ""
    assert ask(backend, "/stream?n=many").status == 400


def test_stopping_waits_for_nobody():
    with serving(make_server()) as server, dialled(server) as sock, dialled(server):
        sock.sendall(b"GET /slow/10000 HTTP/1.1\r\nHost: h\r\n\r\n")
        eventually(lambda: len(server.connections) == 2)
        begun = time.monotonic()
        server.shutdown()
        server.server_close()
        assert time.monotonic() - begun < PATIENCE / 2
        assert sock.recv(1) == b""


# Failures


def test_the_share_of_failures_is_kept_and_repeatable():
    def statuses(seed: int) -> list[int]:
        with serving(make_server(fail_rate=0.5, seed=seed)) as server:
            return [ask(server, "/").status for _ in range(40)]

    first = statuses(7)
    assert first == statuses(7) != statuses(8)
    assert 8 <= first.count(500) <= 32


def test_health_tells_of_its_switch_and_not_of_the_fail_rate():
    with serving(make_server(fail_rate=1)) as server:
        assert (ask(server, "/").status, ask(server, "/health").status) == (500, 200)


def test_nothing_is_said_about_clients_that_go_away(backend, capfd):
    upload, download = b"POST /echo HTTP/1.1\r\nContent-Length: 9\r\n\r\nhalf", b"GET /bytes/99999999 HTTP/1.1\r\n\r\n"
    for octets in (upload, download, b"GET"):
        with dialled(backend) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a close that is a reset
            sock.sendall(octets)
            eventually(lambda: backend.connections)
    eventually(lambda: not backend.connections)
    assert capfd.readouterr() == ("", "")


# TCP


def test_tcp_echoes_and_greets_nobody():
    with serving(make_server(tcp=True)) as server:
        assert exchange(server, b"") == b""
        assert exchange(server, b"\x00\xff any bytes") == b"\x00\xff any bytes"


def test_tcp_sends_what_is_left_after_a_half_close():
    octets = b"".join(pattern(150_000))
    with serving(make_server(tcp=True)) as server:
        assert exchange(server, octets) == octets


def test_tcp_closes_the_share_that_is_to_fail():
    with serving(make_server(tcp=True, fail_rate=1)) as server, dialled(server) as sock:
        assert sock.recv(1) == b""


# WebSocket

KEY = "dGhlIHNhbXBsZSBub25jZQ=="
HANDSHAKE = (
    f"GET /ws HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\nConnection: keep-alive, Upgrade\r\n"
    f"Sec-WebSocket-Key: {KEY}\r\nSec-WebSocket-Version: 13\r\n\r\n"
).encode()


def masked(opcode: int, payload: bytes, final: bool = True) -> bytes:
    """A client's frame: the server's with the mask bit, a key, and the payload masked."""
    plain = frame(opcode, payload, final)
    head = plain[: len(plain) - len(payload)]
    return bytes([head[0], head[1] | 0x80]) + head[2:] + b"\x0a\x0b\x0c\x0d" + mask(payload, b"\x0a\x0b\x0c\x0d")


def test_the_accept_value_of_the_standard():
    """RFC 6455 section 1.3."""
    assert websocket_accept(KEY) == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="


def test_the_masked_hello_of_the_standard():
    """RFC 6455 section 5.7."""
    assert mask(bytes([0x7F, 0x9F, 0x4D, 0x51, 0x58]), bytes([0x37, 0xFA, 0x21, 0x3D])) == b"Hello"


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65535, 65536])
def test_websocket_echoes_messages_of_every_length_form(backend, size):
    payload = b"".join(pattern(size))
    octets = exchange(backend, HANDSHAKE + masked(BINARY, payload) + masked(CLOSE, b"\x03\xe8bye"))
    head, _, frames = octets.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 101 ")
    assert b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" in head
    assert frames == frame(BINARY, payload) + frame(CLOSE, b"\x03\xe8")


def test_websocket_answers_a_ping_between_the_fragments_of_a_text(backend):
    """RFC 6455 section 5.4; the fragments cut a character in two."""
    hello = "Grüße".encode()
    between = masked(PING, b"?") + masked(PONG, b"unasked")
    sent = masked(TEXT, hello[:3], False) + between + masked(CONTINUATION, hello[3:]) + masked(CLOSE, b"")
    frames = exchange(backend, HANDSHAKE + sent).partition(b"\r\n\r\n")[2]
    expected = frame(TEXT, hello[:3], False) + frame(PONG, b"?") + frame(CONTINUATION, hello[3:]) + frame(CLOSE, b"")
    assert frames == expected


@pytest.mark.parametrize(
    ("octets", "code"),
    [
        (frame(TEXT, b"not masked"), 1002),
        (b"\xc1\x80\x00\x00\x00\x00", 1002),
        (masked(3, b""), 1002),
        (masked(PING, b"", False), 1002),
        (masked(PING, b"x" * 126), 1002),
        (masked(CONTINUATION, b"of nothing"), 1002),
        (masked(TEXT, b"a", False) + masked(TEXT, b"b"), 1002),
        (masked(TEXT, b"\xff"), 1007),
        (masked(TEXT, b"\xc3"), 1007),
        (b"\x82\xff" + (1 << 40).to_bytes(8, "big") + b"keys", 1009),
    ],
    ids=["unmasked", "reserved-bit", "reserved-opcode", "ping-fragment", "ping-long", "orphan", "interleaved",
         "not-utf8", "half-character", "huge"],
)  # fmt: skip
def test_websocket_closes_with_the_status_for_what_was_wrong(backend, octets, code):
    """RFC 6455 section 7.4.1."""
    frames = exchange(backend, HANDSHAKE + octets).partition(b"\r\n\r\n")[2]
    assert code.to_bytes(2, "big") in frames
    assert frames[frames.index(code.to_bytes(2, "big")) - 2] == 0x80 | CLOSE


def test_a_websocket_that_is_not_asked_for_is_refused(backend):
    assert ask(backend, "/ws").status == 426
    old = HANDSHAKE.replace(b"Version: 13", b"Version: 8")
    assert b"\r\nSec-WebSocket-Version: 13\r\n" in exchange(backend, old)
    assert exchange(backend, HANDSHAKE.replace(KEY.encode(), b"short")).startswith(b"HTTP/1.1 400 ")


# The program


@contextmanager
def started(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The program and its first line; killed at the end if it still runs."""
    command = [sys.executable, str(PROGRAM), "--port", "0", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process, process.stdout.readline()
        finally:
            process.kill()


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_silently_with_a_client_still_there(stop):
    with started("--id", "1") as (process, line):
        port = int(re.fullmatch(r"backend 1: listening on http://127\.0\.0\.1:(\d+)\n", line)[1])
        with socket.create_connection(("127.0.0.1", port), PATIENCE) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
            assert sock.recv(15) == b"HTTP/1.1 200 OK"
            process.send_signal(stop)
            assert process.communicate(timeout=PATIENCE) == ("", "")
        assert process.returncode == 0


def test_the_line_of_a_tcp_server_says_so():
    with started("--tcp") as (_, line):
        assert re.fullmatch(r"backend (\d+): listening on tcp://127\.0\.0\.1:\1\n", line)


@pytest.mark.parametrize(
    "arguments",
    [["--port", "x"], ["--port", "65536"], ["--fail-rate", "1.1"], ["--fail-rate", "nan"], ["--delay", "-1"],
     ["--id", "a\nb"], ["--nonsense"]],
)  # fmt: skip
def test_a_wrong_flag_is_one_line_and_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert re.fullmatch(r"backend_server\.py: .+\n", capsys.readouterr().err)


def test_a_port_in_use_is_one_line_and_status_1():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, str(PROGRAM), "--port", str(port)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"backend_server.py: 127.0.0.1:{port}: the port is in use\n"
