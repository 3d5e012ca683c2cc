"""Mutations of good and hostile messages, the same in each run: what must hold whatever comes.

- Nothing but HttpError and FramingError comes out of the parser and the framings, however the octets are cut up.
- A reader that met many heads before understands the next one as a new reader does.
- What is accepted is read by http.server and http.client as exactly one message of the same meaning.
- Through a running balancer: nothing crashes or hangs, a refused request leaves no octet at a backend, and what is
  forwarded is exactly the requests that the client sent, each as http.server reads it.
"""

from __future__ import annotations

import random
import re
import socket
import threading
from collections.abc import Iterator, Sequence
from itertools import chain, zip_longest
from pathlib import Path

import pytest

from balancer.balancer import LoadBalancer
from balancer.framing import LAST_CHUNK, FramingError, as_chunk, as_is, body_of
from balancer.http1 import (
    CHUNKED,
    UNTIL_CLOSE,
    Answer,
    AnswerReader,
    BadAnswer,
    HeadLimits,
    HttpError,
    Known,
    Request,
    RequestReader,
    answer_head,
)
from balancing import connect, log_lines, running
from conftest import PATIENCE, eventually
from fakes import Connection, FakeBackend
from messages import (
    HOSTILE_ANSWERS,
    HOSTILE_BODIES,
    HOSTILE_HEADS,
    REWRITTEN,
    NotRead,
    head,
    read_by_http_client,
    read_by_http_server,
    read_head_by_http_server,
)

CLIENT = "127.0.0.1"
AUTHORITY = "127.0.0.1:8080"
LIMITS = HeadLimits(head=4096, line=1024, fields=64)  # http.client reads at most 100 fields

CHUNKS = b"5;a=b\r\nhello\r\n3\r\nabc\r\n0\r\nX-A: 1\r\n\r\n"
GOOD_REQUESTS = [
    *(head(*rewritten.lines) for rewritten in REWRITTEN),
    head("POST /a?b HTTP/1.1", "Host: a.test", "Content-Length: 5") + b"hello",
    head("POST / HTTP/1.1", "Host: a.test", "Transfer-Encoding: chunked") + CHUNKS,
    head("PUT / HTTP/1.1", "Host: a.test", "Trailer: X-A", "Transfer-Encoding: chunked", "Cookie: a") + CHUNKS,
    head("GET /1 HTTP/1.1", "Host: a.test") + head("GET /2 HTTP/1.1", "Host: b.test"),
]
BAD_REQUESTS = [hostile.octets for hostile in [*HOSTILE_HEADS, *HOSTILE_BODIES]]
GOOD_ANSWERS = [
    head("HTTP/1.1 200 OK", "Date: x", "Content-Length: 5", "Set-Cookie: a", "Set-Cookie: b") + b"hello",
    head("HTTP/1.1 200 OK", "Transfer-Encoding: chunked", "Connection: keep-alive, X-A", "X-A: 1") + CHUNKS,
    head("HTTP/1.0 404 Not Found", "Connection: keep-alive", "Content-Length: 5") + b"hello",
    head("HTTP/1.1 304 Not Modified", "ETag: x", "Content-Length: 5"),
    head("HTTP/1.1 200") + b"hello",
    head("HTTP/1.1 100 Continue") + head("HTTP/1.1 200 OK", "Content-Length: 0"),
]
BAD_ANSWERS = [hostile.octets for hostile in HOSTILE_ANSWERS]
PARTICLES = [
    *(bytes([octet]) for octet in b"\r\n\0\t :;,_-+0159aAfFxX\x0b\x0c\x1f\x7f\x80\x85\xa0\xff%#@/[]*"),
    *(b"\r\n", b"\r\n\r\n", b"\n\n", b"\r\n ", b"\r\n\t", b"0x", b"0\r\n\r\n", b"5\r\nhello\r\n", b" HTTP/1.1"),
    *(b"Host: b.test\r\n", b"Content-Length: 5\r\n", b"Content-Length: 0\r\n", b"Transfer-Encoding: chunked\r\n"),
    *(b"Content_Length: 5\r\n", b"Connection: close\r\n", b"Connection: keep-alive, x-a\r\n", b"X-A: 1\r\n"),
    *(b"Expect: 100-continue\r\n", b"Upgrade: websocket\r\nConnection: upgrade\r\n", b"Max-Forwards: 1\r\n"),
    *(b"X-Forwarded-For: 1\r\n", b"X_Forwarded_For: 1\r\n", b"GET / HTTP/1.1\r\n", b"http://b.test", b"chunked, "),
]  # fmt: skip


def mutated(chance: random.Random, *seeds: Sequence[bytes]) -> bytes:
    """A seed of one of these kinds, with up to four things done to it."""
    octets = chance.choice(chance.choice(seeds))
    for _ in range(chance.choice((0, 1, 1, 1, 2, 4))):
        at = chance.randrange(len(octets) + 1)
        what = chance.random()
        if what < 0.45:
            octets = octets[:at] + chance.choice(PARTICLES) + octets[at:]
        elif what < 0.6:
            octets = octets[:at] + octets[at + chance.choice((1, 1, 1, 2, 5)) :]
        elif what < 0.75:
            octets = octets[:at] + bytes([chance.randrange(256)]) + octets[at + 1 :]
        elif what < 0.85:
            octets = octets[:at] + octets[at : at + 9].swapcase() + octets[at + 9 :]
        elif what < 0.95:
            lines = octets.split(b"\r\n")
            lines.insert(chance.randrange(len(lines)), chance.choice(lines))
            octets = b"\r\n".join(lines)
        else:
            other = chance.choice(chance.choice(seeds))
            octets = octets[:at] + other[chance.randrange(len(other) + 1) :]
    return octets


def cut_up(chance: random.Random, octets: bytes) -> Iterator[bytes]:
    """The octets in pieces: one, a few or many."""
    most = chance.choice((len(octets) + 1, 60, 7))
    at = 0
    while at < len(octets):
        piece = octets[at : at + chance.randint(1, most)]
        at += len(piece)
        yield piece


def read_in_pieces(by: RequestReader | AnswerReader, pieces: Iterator[bytes]) -> tuple[Request | Answer, bytes] | None:
    """The head, and what came with it; None if it does not end. What is left of the pieces was not taken."""
    buffer = b""
    for piece in pieces:
        buffer += piece
        found = by.read(buffer)
        if found is not None:
            return found[0], buffer[found[1] :]
    return None


def told(message: object) -> list[object]:
    return [getattr(message, name) for name in type(message).__slots__]  # type: ignore[attr-defined]


def read_body(length: int, first: bytes, pieces: Iterator[bytes]) -> tuple[bytes, bytes] | None:
    """A body's content and what stands behind it; None if it does not end."""
    body = body_of(length)
    content = body.feed(first)
    for piece in pieces:
        if body.done:
            body.rest += piece
        else:
            content += body.feed(piece)
    if isinstance(body.left, int) and length == UNTIL_CLOSE:
        body.eof()
    return (content, body.rest) if body.done else None


# The parser and the framings ------------------------------------------------------------------------------------------

# Fields with a meaning for us, which are dropped, written anew, or added.
SPECIAL = frozenset(
    ["connection", "keep-alive", "proxy-connection", "te", "trailer", "upgrade", "transfer-encoding", "content-length"]
    + ["host", "expect", "max-forwards", "via", "date", "forwarded"]
    + [f"x-forwarded-{what}" for what in ("for", "proto", "host", "port")]
)


def plain_fields(octets: bytes) -> list[tuple[str, str]]:
    """The fields of a head, taken apart as simply as can be, without those that have a meaning or look like it."""
    lines = octets.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")
    pairs = [line.split(":", 1) for line in lines[1:]]
    fields = [(name.lower(), value.strip(" \t")) for name, value in pairs]
    named = {
        option.strip(" \t").lower() for name, value in fields if name == "connection" for option in value.split(",")
    }
    return [(name, value) for name, value in fields if name not in named and not means_something(name)]


def means_something(name: str) -> bool:
    return re.sub("[^a-z0-9]", "-", name) in SPECIAL


def asked_for(octets: bytes) -> tuple[str, str, list[str]]:
    """Method, target and host of a head, taken apart as simply as can be."""
    line, *fields = octets.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")
    method, target, _ = line.split(" ")
    hosts = [field[5:].strip(" \t") for field in fields if field.lower().startswith("host:")]
    if absolute := re.fullmatch("[^/:]*://([^/?]*)(.*)", target):
        hosts, target = [absolute[1]], absolute[2]
        if not target.startswith("/"):
            target = "*" if method == "OPTIONS" and not target else "/" + target
    return method, target, hosts or [AUTHORITY]


def check_request(chance: random.Random, experienced: RequestReader) -> bool:
    """Is the mutation accepted?"""
    octets = mutated(chance, GOOD_REQUESTS, GOOD_REQUESTS, BAD_REQUESTS)
    pieces = cut_up(chance, octets)
    try:
        found = read_in_pieces(new_reader(), pieces)
    except HttpError as refusal:
        assert 200 <= refusal.status <= 505
        with pytest.raises(HttpError):
            experienced.read(octets)
        return False
    if found is None:
        return False
    request, first = found
    assert isinstance(request, Request)
    again = experienced.read(octets)
    assert again is not None
    assert told(again[0]) == told(request)

    came = octets[: again[1]].removeprefix(b"\r\n")
    sent = read_head_by_http_server(request.head)
    assert sent.rest == b""
    assert (*sent.start, sent.values("host")) == asked_for(came)
    assert sent.values("x-forwarded-for") == [CLIENT]
    framing = {0: ([], ["0"]), CHUNKED: (["chunked"],)}.get(request.length, ([str(request.length)],))
    assert sent.values("content-length") + sent.values("transfer-encoding") in framing
    hidden = [(name, value) for name, value in sent.fields if not means_something(name)]
    assert [(name, value.strip(" \t")) for name, value in hidden] == plain_fields(came)

    try:
        body = read_body(request.length, first, pieces)
    except FramingError:
        return False
    if body is not None and request.length == CHUNKED:
        content, rest = body
        as_they_came = read_by_http_client(head("HTTP/1.1 200 OK", "Transfer-Encoding: chunked") + octets[again[1] :])
        assert (as_they_came.body, as_they_came.rest) == (content, rest)
        assert read_by_http_server(request.head + as_chunk(content) + LAST_CHUNK + rest).body == content
    return True


def check_answer(chance: random.Random, experienced: AnswerReader) -> bool:
    octets = mutated(chance, GOOD_ANSWERS, GOOD_ANSWERS, BAD_ANSWERS)
    pieces = cut_up(chance, octets)
    try:
        found = read_in_pieces(AnswerReader(LIMITS), pieces)
    except BadAnswer:
        with pytest.raises(BadAnswer):
            experienced.read(octets)
        return False
    if found is None:
        return False
    answer, first = found
    assert isinstance(answer, Answer)
    again = experienced.read(octets)
    assert again is not None
    assert told(again[0]) == told(answer)
    bodiless = answer.status < 200 or answer.status in (204, 304)
    try:
        body = read_body(0 if bodiless else answer.length, first, pieces)
    except FramingError:
        return False
    if body is None or answer.status < 200:
        return True
    content, _ = body
    chunked = answer.length < 0 and not bodiless
    out = answer_head(answer, None if bodiless else CHUNKED if chunked else answer.length, 1, True, 0.0)
    out += as_chunk(content) + LAST_CHUNK if chunked else as_is(content)
    got = read_by_http_client(out)
    assert (got.start[0], got.body, got.rest) == (str(answer.status), content, b"")
    assert len(got.values("date")) >= 1
    kept = [(name, value.strip(" \t")) for name, value in got.fields if not means_something(name)]
    assert kept == plain_fields(octets[: again[1]])
    return True


def new_reader() -> RequestReader:
    return RequestReader(CLIENT.encode(), b"http", AUTHORITY.encode(), LIMITS)


@pytest.mark.parametrize("seed", range(10))
def test_whatever_comes_is_refused_or_is_one_message_to_every_reader(seed: int) -> None:
    """100,000 in all."""
    chance = random.Random(seed)
    requests, answers = new_reader(), AnswerReader(LIMITS)
    accepted = sum(check_request(chance, requests) for _ in range(7500))
    assert 1500 < accepted < 6000
    accepted = sum(check_answer(chance, answers) for _ in range(2500))
    assert 500 < accepted < 2000


HEADS = [octets.partition(b"\r\n\r\n")[0] + b"\r\n\r\n" for octets in GOOD_REQUESTS]


def run_of_heads(chance: random.Random) -> Iterator[bytes]:
    """A good head with a line or two more, whose values change from one to the next, and now and then the lines.

    In half of the runs the target changes, too. Something may come before or behind the head.
    """
    lines = chance.choice(HEADS).split(b"\r\n")[:-2]
    for name in chance.choice(([b"X-A"], [b"X-A", b"X-B"], [b"X-A", b"x-a"], [b"X-A", b"X-Forwarded-For"])):
        lines.insert(chance.randint(1, len(lines)), name + b": 1")
    varied = chance.choices(range(1, len(lines)), k=chance.choice((0, 1, 1, 2)))
    usual = lines[0]
    targets = chance.random() < 0.5
    for _ in range(chance.randint(3, 12)):
        for number in varied:
            name, _, value = lines[number].partition(b":")
            what = chance.random()
            if what < 0.6:
                lines[number] = name + b": %d" % chance.randrange(10 ** chance.randint(1, 9))
            elif what < 0.8:
                lines[number] = name + b":" + chance.choice(PARTICLES)
            elif what < 0.9:
                at = chance.randrange(len(lines[number]) + 1)
                lines[number] = lines[number][:at] + chance.choice(PARTICLES) + lines[number][at:]
            else:
                lines[number] = name + b":" + value[: chance.randrange(3)]
        if targets:
            lines[0] = usual.replace(b" /", b" /%d" % chance.randrange(100), 1)
            if chance.random() < 0.2:
                at = chance.randrange(len(lines[0]) + 1)
                lines[0] = lines[0][:at] + chance.choice(PARTICLES) + lines[0][at:]
        octets = b"\r\n".join([*lines, b"", b""])
        yield chance.choice((b"", b"", b"", b"\r\n")) + octets + chance.choice((b"", b"", b"", b"hello", octets))


def heard_by(by: RequestReader, octets: bytes) -> list[object]:
    try:
        found = by.read(octets)
    except HttpError as refusal:
        return [refusal.status, refusal.reason]
    return [found[1], *told(found[0])] if found else []


def test_heads_that_differ_in_a_line_or_two_are_to_an_experienced_reader_what_they_are_to_a_new_one() -> None:
    """16,000 or so, to two readers that share what they know, as the connections of two clients do.

    Two runs take turns, as those of two connections of one client do.
    """
    chance = random.Random(0)
    known = Known()
    experienced = [
        RequestReader(client, b"http", AUTHORITY.encode(), LIMITS, known, trusts=trusts)
        for client, trusts in ((b"192.0.2.1", False), (b"192.0.2.2", True))
    ]
    accepted = refused = 0
    for _ in range(1200):
        number = chance.randrange(2)
        for octets in chain.from_iterable(zip_longest(run_of_heads(chance), run_of_heads(chance), fillvalue=b"")):
            client, trusts = (b"192.0.2.1", b"192.0.2.2")[number], bool(number)
            new = RequestReader(client, b"http", AUTHORITY.encode(), LIMITS, trusts=trusts)
            heard = heard_by(new, octets)
            assert heard_by(experienced[number], octets) == heard, octets
            accepted += len(heard) > 2
            refused += len(heard) == 2
    assert accepted > 8000
    assert refused > 1000


# Through a balancer ---------------------------------------------------------------------------------------------------

LAST = head("HTTP/1.1 204 No Content", "Connection: close")


class Recorder:
    """A strict backend: keeps every octet of each connection, and answers what http.server reads as a request."""

    def __init__(self) -> None:
        self.taken: list[bytearray] = []
        self.ended = threading.Semaphore(0)

    def serve(self, connection: Connection) -> None:
        octets = bytearray()
        self.taken.append(octets)
        try:
            while piece := connection.sock.recv(65536):
                octets += piece
                try:
                    read_by_http_server(bytes(octets))
                except NotRead:
                    continue
                connection.send(LAST)
        finally:
            self.ended.release()


def requests_within(octets: bytes, port: int) -> tuple[list[bytes], bytes]:
    """What a backend is to be sent for these octets: whole requests, and the head of one whose body does not end."""
    by = RequestReader(CLIENT.encode(), b"http", b"127.0.0.1:%d" % port, HeadLimits())
    wanted: list[bytes] = []
    try:
        while found := by.read(octets):
            request, length = found
            body = read_body(request.length, octets[length:], iter(()))
            if body is None:
                return wanted, request.head
            content, octets = body
            wanted.append(request.head + (as_chunk(content) + LAST_CHUNK if request.length == CHUNKED else content))
            if not request.persistent:
                break
    except (HttpError, FramingError):
        pass
    return wanted, b""


def say_and_listen(balancer: LoadBalancer, octets: bytes) -> bytes:
    """All that comes back for octets that came in one piece, and then no more."""
    heard = b""
    with connect(balancer) as sock:
        sock.sendall(octets)
        sock.shutdown(socket.SHUT_WR)
        while piece := sock.recv(65536):
            heard += piece
    return heard


@pytest.mark.parametrize("seed", range(4))
def test_a_balancer_forwards_what_is_a_request_and_not_an_octet_more(tmp_path: Path, seed: int) -> None:
    """2,000 in all, one after the other, so that the backend's connections come in the order of the requests."""
    chance = random.Random(seed)
    backend = Recorder()
    whole: list[bytes] = []
    begun: set[bytes] = set()
    health = {"type": "tcp", "interval": 1000}
    with (
        FakeBackend(backend.serve) as fake,
        running(tmp_path, [(fake.host, fake.port)], health_check=health) as balancer,
    ):
        threads = set(threading.enumerate())
        for number in range(501):
            octets = mutated(chance, GOOD_REQUESTS, GOOD_REQUESTS, BAD_REQUESTS) if number < 500 else GOOD_REQUESTS[0]
            wanted, unfinished = requests_within(octets, balancer.port)
            heard = say_and_listen(balancer, octets)
            assert heard.count(b"HTTP/1.1 204 ") == len(wanted), octets
            whole += wanted
            begun.add(unfinished)
        eventually(lambda: not balancer.listener.sessions, "every client's connection has ended")
        assert not any(backend.active for backend in balancer.pool.backends)
        for _ in range(fake.accepted):
            assert backend.ended.acquire(timeout=PATIENCE)
        assert not {thread for thread in threads - set(threading.enumerate()) if not thread.name.startswith("fake-")}
    assert not [line for line in log_lines(tmp_path) if "bug" in line]

    assert 100 < len(whole) < 450
    left = iter(whole)
    for taken in filter(None, map(bytes, backend.taken)):
        try:
            request = read_by_http_server(taken)
        except NotRead:
            assert taken.partition(b"\r\n\r\n")[0] + b"\r\n\r\n" in begun
        else:
            assert request.rest == b""
            assert taken == next(left)
    assert list(left) == []
