"""Message heads: what is refused, and what goes on, octet for octet. M is RFC 9112, S is RFC 9110."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from functools import partial

import pytest

from balancer.http1 import (
    CHUNKED,
    REMEMBERED,
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
    http_date,
    interim_head,
    own_answer,
)
from messages import (
    FILES,
    HOSTILE_ANSWERS,
    HOSTILE_BODIES,
    HOSTILE_HEADS,
    REWRITTEN,
    Hostile,
    Rewritten,
    arrivals,
    forwarded,
    head,
    read_by_http_client,
)

NOW = 1_000_000_000.9  # Sun, 09 Sep 2001 01:46:40 GMT, and most of a second
DATE = b"Date: Sun, 09 Sep 2001 01:46:40 GMT\r\n"


def reader(limits: HeadLimits | None = None) -> RequestReader:
    return RequestReader(b"192.0.2.1", b"http", b"lb.test:8080", limits or HeadLimits())


def get(*fields: str, line: str = "GET / HTTP/1.1", host: str = "Host: a.test") -> bytes:
    return head(line, host, *fields)


def sent(*lines: str, minor: int = 1) -> bytes:
    """What a backend is sent: these lines, of which the second names the host, and what is added to every request."""
    return forwarded(lines, minor=minor, client="192.0.2.1", port=8080)


SENT = sent("GET / HTTP/1.1", "Host: a.test")


def read_request(pieces: Sequence[bytes], by: RequestReader | None = None) -> tuple[Request, bytes]:
    """Hand the pieces over one by one. The request, and the octets that came with its head and are not of it."""
    by = by or reader()
    buffer = b""
    for piece in pieces:
        buffer += piece
        found = by.read(buffer)
        if found is not None:
            request, length = found
            return request, buffer[length:]
    raise AssertionError(f"no request in {buffer!r}")


def read_answer(pieces: Sequence[bytes], by: AnswerReader | None = None) -> tuple[Answer, bytes]:
    by = by or AnswerReader(HeadLimits())
    buffer = b""
    for piece in pieces:
        seen = len(buffer)
        buffer += piece
        found = by.read(buffer, seen)
        if found is not None:
            answer, length = found
            return answer, buffer[length:]
    raise AssertionError(f"no answer in {buffer!r}")


# Refused ----------------------------------------------------------------------------------------------------------


def test_every_hostile_file_is_used() -> None:
    """A file that stands in no table of messages.py is tested by nobody."""
    used = {hostile.name for hostile in [*HOSTILE_HEADS, *HOSTILE_BODIES, *HOSTILE_ANSWERS]}
    assert {path.stem for path in FILES.glob("*.http")} == used


@pytest.mark.parametrize("hostile", HOSTILE_HEADS, ids=str)
def test_a_hostile_head_is_refused_however_it_comes(hostile: Hostile) -> None:
    for pieces in arrivals(hostile.octets):
        with pytest.raises(HttpError) as refusal:
            read_request(pieces)
        assert refusal.value.status == hostile.status


@pytest.mark.parametrize("hostile", HOSTILE_ANSWERS, ids=str)
def test_a_hostile_answer_is_a_502_however_it_comes(hostile: Hostile) -> None:
    for pieces in arrivals(hostile.octets):
        with pytest.raises(BadAnswer) as refusal:
            read_answer(pieces)
        assert refusal.value.status == hostile.status


@pytest.mark.parametrize("prefix", [b"", get()], ids=["first", "behind another"])
def test_a_reader_refuses_a_hostile_head_each_time_it_comes(prefix: bytes) -> None:
    """What was refused is not remembered as something that was read, nor does it spoil what was."""
    for hostile in HOSTILE_HEADS:
        by = reader()
        if prefix:
            read_request([prefix], by)
        for _ in range(2):
            with pytest.raises(HttpError):
                by.read(hostile.octets)


@pytest.mark.parametrize(
    ("octets", "words"),
    [
        (get("A: 1\rB"), "a lone CR or LF, or a NUL, in the head"),
        (head("GET / HTTP/1.1", " Host: a"), "white space before the first field"),
        (get("A: 1", " b"), "a folded line"),
        (get("A"), "a field without a colon"),
        (get("A : 1"), "white space before a colon"),
        (get("A b: 1"), "a field name that is no token"),
        (get("A: \x01"), "a control octet in a field value"),
    ],
)
def test_a_refusal_says_what_is_wrong(octets: bytes, words: str) -> None:
    with pytest.raises(HttpError) as refusal:
        reader().read(octets)
    assert refusal.value.reason == words


# Limits -----------------------------------------------------------------------------------------------------------

LIMITS = HeadLimits(head=200, line=60, fields=4)


def line_of(octets: int) -> str:
    return "GET /" + "a" * (octets - 14) + " HTTP/1.1"


def head_of(octets: int) -> bytes:
    return get("A: " + "a" * (octets - len(get("A: "))))


@pytest.mark.parametrize("before", [b"", b"\r\n"], ids=["", "after an empty line"])
@pytest.mark.parametrize(
    ("octets", "status"),
    [
        pytest.param(get(line=line_of(60)), 0, id="M 3 line at its limit"),
        pytest.param(get(line=line_of(61)), 414, id="M 3 line too long"),
        pytest.param(head_of(200), 0, id="S 5.4 head at its limit"),
        pytest.param(head_of(201), 431, id="S 5.4 head too large"),
        pytest.param(get("A: 1", "A: 1", "A: 1"), 0, id="S 5.4 fields at their limit"),
        pytest.param(get("A: 1", "A: 1", "A: 1", "A: 1"), 431, id="S 5.4 too many fields"),
    ],
)
def test_a_head_within_its_limits_is_served_and_one_beyond_is_not(octets: bytes, status: int, before: bytes) -> None:
    for pieces in arrivals(before + octets):
        try:
            read_request(pieces, reader(LIMITS))
        except HttpError as refusal:
            assert refusal.status == status
        else:
            assert status == 0


@pytest.mark.parametrize(
    ("octets", "status"),
    [
        pytest.param(b"GET /" + b"a" * 60, 414, id="M 3 line"),
        pytest.param(get().removesuffix(b"\r\n") + b"A: " + b"a" * 200, 431, id="S 5.4 head"),
    ],
)
def test_what_never_ends_is_refused_at_its_limit(octets: bytes, status: int) -> None:
    with pytest.raises(HttpError) as refusal:
        reader(LIMITS).read(octets)
    assert refusal.value.status == status


def test_a_request_line_of_8000_octets_is_served() -> None:
    """M 3 recommends to support that much at least."""
    request, _ = read_request([get(line=line_of(8000))])
    assert len(request.line) == 8000


@pytest.mark.parametrize(
    ("octets", "fits"),
    [
        pytest.param(b"HTTP/1.1 200 OK\r\nA: " + b"a" * 175 + b"\r\n\r\n", True, id="head at its limit"),
        pytest.param(b"HTTP/1.1 200 OK\r\nA: " + b"a" * 177 + b"\r\n\r\n", False, id="head too large"),
        pytest.param(b"HTTP/1.1 200 OK\r\n" + b"A: 1\r\n" * 4 + b"\r\n", True, id="fields at their limit"),
        pytest.param(b"HTTP/1.1 200 OK\r\n" + b"A: 1\r\n" * 5 + b"\r\n", False, id="too many fields"),
        pytest.param(b"HTTP/1.1 200 OK\r\nA: " + b"a" * 200, False, id="head without an end"),
    ],
)
def test_an_answer_within_its_limits_is_read_and_one_beyond_is_a_502(octets: bytes, fits: bool) -> None:
    """M 6.3: a head of absurd size."""
    for pieces in arrivals(octets):
        try:
            read_answer(pieces, AnswerReader(LIMITS))
        except BadAnswer:
            assert not fits
        else:
            assert fits


LINE = b"GET / HTTP/1.1\r\nHost: a.test\r\n"
LONG = 64_000


@pytest.mark.parametrize(
    "octets",
    [
        pytest.param(LINE + b"A: " + b"a" * LONG + b"\x01\r\n\r\n", id="bad octet at the end of a long value"),
        pytest.param(LINE + (b"A: " + b"a" * 500 + b"\r\n") * 120 + b"B\r\n\r\n", id="bad field behind many"),
        pytest.param(LINE + b"a" * LONG + b"\r\n\r\n", id="long name without a colon"),
        pytest.param(LINE + b":" * LONG + b"\r\n\r\n", id="colons"),
        pytest.param(LINE + b"\r\r\n" * 20_000, id="CR CR LF"),
        pytest.param(LINE + b"Connection: " + b"a," * 30_000 + b"\r\n\r\n", id="connection options"),
        pytest.param(LINE + b"Transfer-Encoding: " + b"," * LONG + b"\r\n\r\n", id="codings"),
        pytest.param(LINE + b"Upgrade: " + b"a," * 30_000 + b"\r\n\r\n", id="protocols"),
        pytest.param(LINE + b"Content-Length:" + b" " * LONG + b"x\r\n\r\n", id="blanks before a value"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: " + b"a" * LONG + b"@\r\n\r\n", id="long host"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: " + b"%61" * 20_000 + b"@\r\n\r\n", id="escaped host"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: [" + b":" * LONG + b"]\r\n\r\n", id="long IPv6 host"),
        pytest.param(b"GET http://" + b"a" * 16_000 + b"@/ HTTP/1.1\r\nHost: a\r\n\r\n", id="long target host"),
        pytest.param(b"G" * 16_000 + b"\x01 / HTTP/1.1\r\nHost: a\r\n\r\n", id="long method"),
    ],
)
def test_no_head_takes_long(octets: bytes) -> None:
    """A pattern that goes back and forth would take seconds or years for these. They take 0.1 to 3 ms."""
    began = time.perf_counter()
    try:
        read_request([octets])
    except HttpError:
        pass
    assert time.perf_counter() - began < 0.5


@pytest.mark.parametrize(
    "octets", [LINE + b"A: " + b"a" * LONG + b"\r\n\r\n", LINE + (b"A: " + b"a" * 520 + b"\r\n") * 120 + b"\r\n"]
)
def test_a_long_head_in_small_pieces_is_not_searched_from_its_beginning_each_time(octets: bytes) -> None:
    """Whole searches would take this head's length squared: 6 s, where it takes 0.1 s."""
    requests, answers = reader(), AnswerReader(HeadLimits())
    answer = b"HTTP/1.1 200 OK" + octets[14:]
    began = time.perf_counter()
    for by, message in ((requests.read, octets), (answers.read, answer)):
        seen = 0
        for end in range(16, len(message), 16):
            assert (by(message[:end]) if by == requests.read else answers.read(message[:end], seen)) is None
            seen = end
    assert time.perf_counter() - began < 2.0


# What a backend is sent --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rewritten", REWRITTEN, ids=str)
def test_what_a_backend_is_sent(rewritten: Rewritten) -> None:
    for pieces in arrivals(head(*rewritten.lines)):
        request, rest = read_request(pieces)
        assert request.head == sent(*rewritten.forwarded, minor=rewritten.minor)
        assert request.head.startswith(b"%b %b HTTP/1.1\r\n" % (request.method, request.target))
        assert rest == b""


def test_what_follows_a_head_is_not_of_it() -> None:
    for follows in (b"\r\n", b"hello", get(), b"\r\n\r\n"):
        request, rest = read_request([get() + follows])
        assert request.head == SENT
        assert rest == follows


@pytest.mark.parametrize(
    ("method", "status"),
    [
        pytest.param("OPTIONS", 200, id="OPTIONS says what is offered"),
        pytest.param("TRACE", 405, id="TRACE is not echoed"),
    ],
)
@pytest.mark.parametrize("hops", [["Max-Forwards: 0"], ["max-forwards:00 "], ["Max-Forwards: 5", "Max-Forwards: 0"]])
def test_a_request_with_no_hops_left_is_ours_to_answer(method: str, status: int, hops: list[str]) -> None:
    """S 7.6.2: at zero the request goes no further."""
    by = reader()
    for _ in range(2):
        with pytest.raises(HttpError) as refusal:
            by.read(get(*hops, line=f"{method} / HTTP/1.1"))
        assert refusal.value.status == status


NAMES = (
    "connection keep-alive proxy-connection te trailer transfer-encoding content-length upgrade host "
    "forwarded x-forwarded-for x-forwarded-proto x-forwarded-host x-forwarded-port"
)


@pytest.mark.parametrize("name", NAMES.split())
def test_a_name_is_known_in_any_case_and_its_likes_are_dropped(name: str) -> None:
    """Nothing of these that a client sends goes on as it came, however it is spelt."""
    value = {"host": "a.test", "transfer-encoding": "chunked", "content-length": "5"}.get(name, "mark")
    host = [] if name == "host" else ["Host: a.test"]
    framing = {"transfer-encoding": ["Transfer-Encoding: chunked"], "content-length": ["Content-Length: 5"]}.get(
        name, []
    )
    for spelt in (name, name.upper(), name.title(), name.title().swapcase()):
        request, _ = read_request([head("GET / HTTP/1.1", *host, "A: 1", f"{spelt}: {value}", "B: 1")])
        assert request.head == sent("GET / HTTP/1.1", "Host: a.test", "A: 1", "B: 1", *framing)
        for sign in "_.!#$%&'*+^`|~" if "-" in name else "":
            request, _ = read_request([get("A: 1", f"{spelt.replace('-', sign)}: mark", "B: 1")])
            assert request.head == sent("GET / HTTP/1.1", "Host: a.test", "A: 1", "B: 1")


# What a request says of itself ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "version", "stays"),
    [
        ([], "1.1", True),
        ([], "1.0", False),
        (["Connection: close"], "1.1", False),
        (["Connection: CLOSE"], "1.1", False),
        (["Connection: a, close ,b"], "1.1", False),
        (["Connection: a", "Connection: close"], "1.1", False),
        (["Connection: closed"], "1.1", True),
        (["Connection: keep-alive"], "1.0", True),
        (["Connection: Keep-Alive, a"], "1.0", True),
        (["Connection: keep-alive, close"], "1.0", False),
        (["Connection: keep-alive, close"], "1.1", False),
        (["Proxy-Connection: keep-alive"], "1.0", False),
        (["Proxy-Connection: close"], "1.1", True),
    ],
)
def test_whether_a_connection_stays(fields: list[str], version: str, stays: bool) -> None:
    """M 9.3"""
    request, _ = read_request([get(*fields, line=f"GET / HTTP/{version}")])
    assert request.persistent is stays
    assert request.minor == int(version[-1])


def test_what_is_told_about_a_request() -> None:
    fields = ["Content-Length: 12", "Expect: 100-continue", "Connection: upgrade", "Upgrade: x"]
    request, _ = read_request([get(*fields, line="PUT /a HTTP/1.1")])
    assert (request.method, request.line, request.minor) == (b"PUT", b"PUT /a HTTP/1.1", 1)
    assert (request.length, request.expect, request.upgrade, request.idempotent) == (12, True, True, True)
    old, _ = read_request([get(*fields, line="POST /a HTTP/1.0")])
    assert (old.length, old.expect, old.upgrade, old.idempotent) == (12, False, False, False)


@pytest.mark.parametrize(
    ("method", "idempotent"),
    [(name, True) for name in ("GET", "HEAD", "PUT", "DELETE", "OPTIONS", "TRACE")]
    + [(name, False) for name in ("POST", "PATCH", "get", "LOCK", "X")],
)
def test_which_methods_may_be_sent_again(method: str, idempotent: bool) -> None:
    """S 9.2.2"""
    request, _ = read_request([get(line=f"{method} / HTTP/1.1")])
    assert request.idempotent is idempotent


@pytest.mark.parametrize(
    ("fields", "length"),
    [
        ([], 0),
        (["Content-Length: 0"], 0),
        (["Content-Length: 999999999999999999"], 10**18 - 1),
        (["Transfer-Encoding: chunked"], CHUNKED),
    ],
)
def test_a_body_is_told_by_its_framing(fields: list[str], length: int) -> None:
    """M 6.3: without a field that says so there is none."""
    assert read_request([get(*fields, line="POST / HTTP/1.1")])[0].length == length


# Memory --------------------------------------------------------------------------------------------------------------


def test_a_head_that_comes_again_is_not_parsed_again() -> None:
    by = reader()
    first, _ = read_request([get()], by)
    again, rest = read_request([get() + b"hello"], by)
    assert again is first
    assert rest == b"hello"


def test_a_long_head_is_not_held_on_to() -> None:
    """Ten thousand connections at rest would otherwise hold as many heads of the largest size."""
    by = reader()
    long = get("A: " + "a" * REMEMBERED)
    assert read_request([long], by)[0] is not read_request([long], by)[0]
    for number in range(3):
        by.read(get("B: 2", f"A: {number}" + "a" * REMEMBERED))
    assert held_by(by) < REMEMBERED


def test_nothing_is_remembered_by_a_reader_that_has_read_nothing() -> None:
    """Whatever comes first is looked at, be it one octet."""
    for octet in range(256):
        try:
            assert reader().read(bytes([octet])) is None
        except HttpError as refusal:
            assert refusal.status == 400
        try:
            assert AnswerReader(HeadLimits()).read(bytes([octet])) is None
        except BadAnswer:
            assert octet != ord("H")


def test_a_head_in_pieces_that_is_the_last_one_again_hides_no_end_behind_it() -> None:
    """How far an unfinished head was searched says nothing of the next one, which may be shorter.

    Its end was passed over, and that of a later request taken for it.
    """
    for cut in range(1, len(get())):
        by = reader()
        read_request([get()], by)
        read_request([get()[:cut], get()[cut:]], by)
        short = b"GET / HTTP/1.1\r\nHost:b\r\n\r\n"
        request, rest = read_request([short + get()], by)
        assert request.line == b"GET / HTTP/1.1"
        assert rest == get()


def test_one_block_of_fields_means_what_its_request_line_makes_of_it() -> None:
    """The same block behind other request lines, in every order, means what it means to a reader that met no other."""
    fields = ["Connection: keep-alive", "Expect: 100-continue", "Max-Forwards: 4", "Content-Length: 3"]
    lines = [
        "GET / HTTP/1.1",
        "GET / HTTP/1.0",
        "OPTIONS * HTTP/1.1",
        "POST http://b.test/ HTTP/1.1",
        "TRACE http://c.test/ HTTP/1.0",
    ]

    def told(request: Request) -> list[object]:
        return [getattr(request, name) for name in Request.__slots__]

    alone = {line: told(read_request([get(*fields, line=line)])[0]) for line in lines}
    for order in itertools.permutations(lines):
        by = reader()
        for line in [*order, *order]:
            assert told(read_request([get(*fields, line=line)], by)[0]) == alone[line]


def test_a_block_that_one_version_allows_is_still_refused_in_the_other() -> None:
    """M 6.1: no Transfer-Encoding in HTTP/1.0. M 3.2: no HTTP/1.1 without Host."""
    by = reader()
    read_request([get("Transfer-Encoding: chunked")], by)
    with pytest.raises(HttpError):
        by.read(get("Transfer-Encoding: chunked", line="GET / HTTP/1.0"))
    read_request([head("GET / HTTP/1.0", "A: 1")], by)
    with pytest.raises(HttpError):
        by.read(head("GET / HTTP/1.1", "A: 1"))


def test_an_empty_line_is_skipped_before_each_request() -> None:
    """M 2.2: an old client sends one behind a body."""
    by = reader()
    buffer = (get() + b"\r\n") * 4
    for _ in range(3):
        request, buffer = read_request([buffer], by)
        assert request.head == SENT


# A head much like the last one ---------------------------------------------------------------------------------------


def understood(by: RequestReader, octets: bytes) -> list[object]:
    """All that a reader says of a whole head: what it means, or why it is refused."""
    try:
        found = by.read(octets)
    except HttpError as refusal:
        return [refusal.status, refusal.reason]
    assert found is not None
    return [found[1], *(getattr(found[0], name) for name in Request.__slots__)]


def held_by(what: object) -> int:
    """Octets of heads that a reader holds on to, or a part of it."""
    if isinstance(what, bytes):
        return len(what)
    parts = what if isinstance(what, tuple) else [getattr(what, name) for name in getattr(what, "__slots__", ())]
    return sum(map(held_by, parts))


HELD = (4 * RequestReader.MOULDS + 8) * REMEMBERED  # of each mould two heads, which came and went, in one and in parts


VALUES = [
    *(b" 1", b"", b" ", b"\t 2 \t", b" a: b", b":", b" \x80\xe9\xff", b" 1" * 20, b" x-id", b" close", b" date"),
    b" x-forwarded-for",
    *(b" 5", b" 0", b" chunked", b" 10.0.0.1", b" b.test", b" b.test:81", b" b test", b" 100-continue"),
    *(b" a\x00", b"\x01", b" \x7f", b" a\rb", b" a\nb", b" a\r\n b", b" a\r\nB: 2", b"\r", b" a\r\nX-Id: 2"),
    *(b" " + b"a" * REMEMBERED, b" " + b"a" * 60_000, b" " + b"a" * 66_000),
]  # fmt: skip
VARYING = {
    "a plain field": b"GET / HTTP/1.1\r\nHost: a.test\r\nA: 1\r\nX-Id:%b\r\nB: 2\r\n\r\n",
    "the first": b"GET / HTTP/1.1\r\nX-Id:%b\r\nHost: a.test\r\n\r\n",
    "the last": b"GET / HTTP/1.1\r\nHost: a.test\r\nX-Id:%b\r\n\r\n",
    "the same twice": b"GET / HTTP/1.1\r\nHost: a.test\r\nX-Id:%b\r\nA: 1\r\nX-Id:%b\r\n\r\n",
    "two": b"GET / HTTP/1.1\r\nHost: a.test\r\nX-Id:%b\r\nA: 1\r\nX-No:%b\r\n\r\n",
    "S 7.6.1 one that Connection names": b"GET / HTTP/1.1\r\nHost: a.test\r\nConnection: x-id\r\nX-Id:%b\r\n\r\n",
    "M 3.2 Host": b"GET / HTTP/1.1\r\nHost:%b\r\nA: 1\r\n\r\n",
    "M 6.2 Content-Length": b"GET / HTTP/1.1\r\nHost: a.test\r\nContent-Length:%b\r\n\r\n",
    "M 6.1 Transfer-Encoding": b"GET / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding:%b\r\n\r\n",
    "M 9.6 Connection": b"GET / HTTP/1.1\r\nHost: a.test\r\nX-Id: 1\r\nConnection:%b\r\n\r\n",
    "S 7.6.2 Max-Forwards": b"OPTIONS / HTTP/1.1\r\nHost: a.test\r\nMax-Forwards:%b\r\n\r\n",
    "X-Forwarded-For": b"GET / HTTP/1.1\r\nHost: a.test\r\nX-Forwarded-For:%b\r\n\r\n",
    "one that looks like ours": b"GET / HTTP/1.1\r\nHost: a.test\r\nContent_Length:%b\r\n\r\n",
    "S 5.1 a name": b"GET / HTTP/1.1\r\nHost: a.test\r\nX-I%b: 1\r\n\r\n",
    "S 5.1 a colon": b"GET / HTTP/1.1\r\nHost: a.test\r\nX-Id%b 1\r\n\r\n",
    "HTTP/1.0": b"GET / HTTP/1.0\r\nX-Id:%b\r\nConnection: keep-alive\r\n\r\n",
}
OTHER = get("X-Id: 7", "Content-Length: 9", line="POST /other HTTP/1.1", host="Host: other.test")


@pytest.mark.parametrize("trusts", [False, True], ids=["", "trusts"])
@pytest.mark.parametrize("between", [b"", OTHER], ids=["", "another between"])
@pytest.mark.parametrize("template", VARYING.values(), ids=VARYING)
def test_a_head_that_differs_from_the_last_in_a_line_means_what_it_means_alone(
    template: bytes, between: bytes, trusts: bool
) -> None:
    """Nothing that a reader knows of lines or of what stands around one may change what the next head is."""
    new = partial(RequestReader, b"192.0.2.1", b"http", b"lb.test:80", HeadLimits(), trusts=trusts)
    by = new()
    for number, value in enumerate([*VALUES, *reversed(VALUES)]):
        usual = template.replace(b"%b", b" %d" % number)
        for octets in (usual, template.replace(b"%b", value), between, usual.replace(b" / ", b" /other "), usual):
            assert not octets or understood(by, octets) == understood(new(), octets)
            assert held_by(by) < HELD


LIKE = {
    "other targets": [get("A: 1", line=f"GET /{number} HTTP/1.1") for number in range(9)],
    "no field but Host": [get(line=f"GET /{number} HTTP/1.1") for number in range(9)],
    "other values": [get(f"A: {number}") for number in range(9)],
    "both": [get("A: 1", f"B: {number}", "C: 2", line=f"GET /?{number} HTTP/1.1") for number in range(9)],
    "HTTP/1.0": [head(f"GET /{number} HTTP/1.0", f"A: {number}") for number in range(9)],
    "two browsers": [
        get(f"User-Agent: {n % 2}", "A: 1", f"Cookie: a={n}", line=f"GET /{n} HTTP/1.1") for n in range(15)
    ],
    "two methods": [get("A: 1", line=f"{('GET', 'POST')[n % 2]} /{n} HTTP/1.1") for n in range(15)],
    "bodies": [get("Content-Length: 4", line=f"PUT /{number} HTTP/1.1") + b"\r\n\r\n" for number in range(9)],
    "another behind": [get(line=f"GET /{number} HTTP/1.1") + get("A: 1") for number in range(9)],
    "an empty line before": [b"\r\n" + get(line=f"GET /{number} HTTP/1.1") for number in range(9)],
}


@pytest.mark.parametrize("octets", LIKE.values(), ids=LIKE)
def test_a_head_that_is_like_one_of_the_last_is_not_parsed(
    octets: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = [understood(reader(), one) for one in octets]
    by = reader()
    for one in octets[:-4]:
        by.read(one)
    monkeypatch.delattr(RequestReader, "_parse")
    assert [understood(by, one) for one in octets[-4:]] == alone[-4:]


@pytest.mark.parametrize(
    "octets",
    [
        pytest.param(get("A: 1", "B: 2", line="GET /\x01 HTTP/1.1"), id="a control octet in the target"),
        pytest.param(get("A: 1", "B: 2", line="GET /\x80 HTTP/1.1"), id="no ASCII in the target"),
        pytest.param(get("A: 1", "B: 2", line="GET /#a HTTP/1.1"), id="a fragment"),
        pytest.param(get("A: 1", "B: 2", line="GET /a b HTTP/1.1"), id="a space in the target"),
        pytest.param(get("A: 1", "B: 2", line="GET  / HTTP/1.1"), id="two spaces"),
        pytest.param(get("A: 1", "B: 2", line="GET a HTTP/1.1"), id="no path"),
        pytest.param(get("A: 1", "B: 2", line="get / HTTP/1.1"), id="another method"),
        pytest.param(get("A: 1", "B: 2", line="CONNECT / HTTP/1.1"), id="CONNECT"),
        pytest.param(get("A: 1", "B: 2", line="GET / HTTP/2.0"), id="another version"),
        pytest.param(get("A: 1", "B: 2", line="GET / HTTP/1.1 "), id="a space behind the version"),
        pytest.param(get("A: 1\n", "B: 2"), id="a lone LF"),
        pytest.param(get("A: \x00", "B: 2"), id="NUL"),
        pytest.param(get("A: 1\r\nContent-Length: 3", "B: 2"), id="a line more"),
        pytest.param(get("A: \xe9\t", "B: 2"), id="a value that is not ASCII"),
        pytest.param(get("A: 1", "B: 2") + b"a" + get("B: 2")[-10:], id="a body that ends like it"),
        pytest.param(get("B: 2"), id="a line less"),
        pytest.param(get("A: 1", "B: 2", line=line_of(61)), id="S 5.4 too long a line"),
        pytest.param(get("A: " + "a" * 150, "B: 2"), id="S 5.4 too large a head"),
    ],
)
@pytest.mark.parametrize("limits", [LIMITS, HeadLimits(100), HeadLimits()], ids=["tight", "tighter", ""])
def test_a_head_that_is_only_nearly_like_the_last_ones_means_what_it_means_alone(
    octets: bytes, limits: HeadLimits
) -> None:
    by = reader(limits)
    for number in range(3):
        by.read(get(f"A: {number}", "B: 2", line=f"GET /{number} HTTP/1.1"))
    assert understood(by, octets) == understood(reader(limits), octets)
    usual = get("A: 7", "B: 2", line="GET /7 HTTP/1.1")
    assert understood(by, usual) == understood(reader(limits), usual)


@pytest.mark.parametrize("octets", LIKE.values(), ids=LIKE)
def test_a_head_that_begins_like_the_last_ones_is_not_whole_before_it_ends(octets: list[bytes]) -> None:
    by = reader()
    for one in octets[:-1]:
        by.read(one)
    unfinished = octets[-1][: octets[-1].index(b"\r\n\r\n") + 2]
    for end in range(len(unfinished) + 2):
        assert by.read((unfinished + b"\r")[:end]) is None
    assert by.read(unfinished + b"a: 1\r\n") is None
    with pytest.raises(HttpError):
        by.read(unfinished + b"a\r\n\r\n")


@pytest.mark.parametrize("fields", [("Via: 1.1 lb", "A: 1"), ("A: 1", "Via: 1.1 lb"), ("A: 1", "B: 2", "A: 1")])
def test_a_varied_line_is_not_taken_for_another_that_is_the_same(fields: tuple[str, ...]) -> None:
    """We add a Via of our own, which a client's, that of another balancer like us, may be like."""
    for place in range(len(fields)):
        by = reader()
        varied = [*fields]
        for value in (varied[place].partition(": ")[2], "7", "8"):
            varied[place] = f"{varied[place].partition(':')[0]}: {value}"
            by.read(get(*[line for number, line in enumerate(varied) if number != place]))
            for number in range(3):
                octets = get(*varied, line=f"GET /{number} HTTP/1.1")
                assert understood(by, octets) == understood(reader(), octets)


def test_what_stands_around_a_value_may_not_overlap() -> None:
    """The line's name and what comes behind it are both there, and share octets: one line less, not an empty one."""
    by = reader()
    fewer, more = ("A:",), ("A: 1", "A:")
    for fields in (fewer, more, ("A: 2", "A:"), fewer, more):
        assert understood(by, get(*fields)) == understood(reader(), get(*fields))


def test_values_that_take_turns_are_not_mixed_up() -> None:
    """One line varies, then another, then both, then one that was seen before comes again."""
    by = reader()
    for a, b in [(1, 1), (2, 1), (3, 1), (3, 2), (3, 3), (4, 4), (4, 5), (1, 1), (1, 5), (6, 5), (1, 6)]:
        octets = get(f"A: {a}", "Accept: x", f"B: {b}")
        request, _ = read_request([octets], by)
        assert request.head == sent("GET / HTTP/1.1", "Host: a.test", f"A: {a}", "Accept: x", f"B: {b}")


def test_a_reader_that_knows_its_lines_still_counts_them() -> None:
    """S 5.4"""
    by = reader(LIMITS)
    for _ in range(3):
        read_request([get("A: 1", "B: 1", "C: 1")], by)
        for fields in (["A: 1"] * 4, ["A: 1", "B: 1", "C: 1", "D: 1"], ["A: 1", "B: 1", "C: 1", "X-Forwarded-For: 1"]):
            with pytest.raises(HttpError) as refusal:
                by.read(get(*fields))
            assert refusal.value.status == 431


def test_however_many_lines_come_a_bounded_number_is_known() -> None:
    """And none that is long; what comes after them is understood as ever."""
    known = Known()
    new = partial(RequestReader, b"192.0.2.1", b"http", b"lb.test:80", HeadLimits())
    by = new(known)
    long = "a" * Known.LONGEST
    for number in range(2 * Known.LINES):
        octets = get(f"A: {number}", f"B: {number}", f"Content-Length: {number}", f"C: {long}{number}")
        if number % 64 == 0:
            octets = get(f"Connection: {long}{number}", *[f"Connection: {'b' * 200}{digit}" for digit in range(2)])
            assert understood(by, octets) == understood(new(), octets)
        by.read(octets)
        assert len(known.plain) + len(known.telling) <= Known.LINES
        assert len(known.meanings) <= Known.MEANINGS
    assert max(map(len, [*known.plain, *known.telling])) <= Known.LONGEST
    assert max(sum(map(len, lines)) for lines in known.meanings) <= Known.LONGEST
    assert held_by(by) < HELD
    assert understood(by, get("A: 1", "X-Forwarded-For: 1")) == understood(new(), get("A: 1", "X-Forwarded-For: 1"))


def test_however_many_kinds_of_heads_come_a_bounded_number_is_held() -> None:
    by = reader()
    for number in range(100):
        for target in range(4):
            by.read(get(f"A-{number}: 1", "B: " + "b" * (REMEMBERED - 100), line=f"GET /{target} HTTP/1.1"))
        assert held_by(by) < HELD


def test_what_is_known_of_a_line_says_nothing_of_who_reads_it() -> None:
    """Readers for other clients share it: one is trusted, one writes Forwarded, one speaks TLS."""
    known = Known()
    kinds = [
        partial(RequestReader, b"192.0.2.1", b"http", b"lb.test:80", HeadLimits()),
        partial(RequestReader, b"192.0.2.2", b"http", b"lb.test:80", HeadLimits(), trusts=True),
        partial(RequestReader, b"192.0.2.3", b"https", b"lb.test:443", HeadLimits(), forwarded=True),
    ]
    readers = [kind(known) for kind in kinds]
    fields = ["X-Forwarded-For: 10.0.0.1", "X-Forwarded-Proto: https", "Forwarded: for=b", "A: 1", "Max-Forwards: 2"]
    for octets in [get(*fields), get(*fields, line="GET / HTTP/1.0"), get(*fields[:2]), get(*fields)]:
        for by, kind in zip(readers, kinds, strict=True):
            assert understood(by, octets) == understood(kind(), octets)


def test_two_connections_that_share_a_reader_are_told_of_their_own_requests() -> None:
    """The heads of either come in pieces, between those of the other; `seen` is each connection's own."""
    heads = [get("A: 1"), get("A: 2"), get("A: 1", "Content-Length: 3"), get("A: 1", line="POST /a HTTP/1.1")]
    for first, second in itertools.permutations(heads, 2):
        alone = [understood(reader(), octets) for octets in (first, second)]
        by = reader()
        for cut in range(1, min(len(first), len(second))):
            assert by.read(first[:cut]) is None
            assert by.read(second[:cut]) is None
            found, length = by.read(second + first, cut) or pytest.fail("there is a whole head")
            assert [length, *(getattr(found, name) for name in Request.__slots__)] == alone[1]
            found, length = by.read(first + second, cut) or pytest.fail("there is a whole head")
            assert [length, *(getattr(found, name) for name in Request.__slots__)] == alone[0]


# Answers -------------------------------------------------------------------------------------------------------------

# id, the answer's lines, the lines for the client, length, reusable
ANSWERS: list[tuple[str, list[str], list[str], int, bool]] = [
    ("M 4 no reason", ["HTTP/1.1 200"], ["HTTP/1.1 200 "], UNTIL_CLOSE, True),
    ("M 4 empty reason", ["HTTP/1.1 200 "], ["HTTP/1.1 200 "], UNTIL_CLOSE, True),
    ("M 4 any reason", ["HTTP/1.1 599 I  \xe9\t!"], ["HTTP/1.1 599 I  \xe9\t!"], UNTIL_CLOSE, True),
    ("M 2.3 our own version", ["HTTP/1.0 200 OK"], ["HTTP/1.1 200 OK"], UNTIL_CLOSE, False),
    ("M 2.3 a later minor version", ["HTTP/1.9 200"], ["HTTP/1.1 200 "], UNTIL_CLOSE, True),
    (
        "M 6.3 length",
        ["HTTP/1.1 200 OK", "A: 1", "content-length: 007 ", "B: 2"],
        ["HTTP/1.1 200 OK", "A: 1", "B: 2"],
        7,
        True,
    ),
    (
        "M 6.3 chunked",
        ["HTTP/1.1 200 OK", "TRANSFER-ENCODING:\tChunked", "A: 1"],
        ["HTTP/1.1 200 OK", "A: 1"],
        CHUNKED,
        True,
    ),
    (
        "M 9.3 close",
        ["HTTP/1.1 200 OK", "Content-Length: 0", "Connection: a, Close"],
        ["HTTP/1.1 200 OK"],
        0,
        False,
    ),
    (
        "M 9.3 kept-alive in HTTP/1.0",
        ["HTTP/1.0 200 OK", "Content-Length: 0", "Connection: Keep-Alive"],
        ["HTTP/1.1 200 OK"],
        0,
        True,
    ),
    (
        "S 7.6.1 hop-by-hop fields",
        [
            "HTTP/1.1 200 OK",
            "A: 1",
            "Connection: x-a, close",
            "Keep-Alive: 5",
            "Proxy-Connection: a",
            "TE: a",
            "Trailer: a",
            "Upgrade: h2",
            "X-A: 1",
            "B: 2",
        ],
        ["HTTP/1.1 200 OK", "A: 1", "B: 2"],
        UNTIL_CLOSE,
        False,
    ),
    (
        "S 7.6.1 Connection: Content-Length, Date",
        ["HTTP/1.1 200 OK", "Connection: Content-Length, Date, Host", "Host: a", "Content-Length: 3", "Date: now"],
        ["HTTP/1.1 200 OK", "Date: now"],
        3,
        True,
    ),
    (
        "S 5.1 fields go on as they came",
        ["HTTP/1.1 200 OK", "Set-Cookie: a", "Content_Length: 9", "set-cookie:  b\t", "C:"],
        ["HTTP/1.1 200 OK", "Set-Cookie: a", "Content_Length: 9", "set-cookie:  b\t", "C:"],
        UNTIL_CLOSE,
        True,
    ),
    (
        "S 15.2.2 a switch names its protocol",
        ["HTTP/1.1 101 Switching Protocols", "Upgrade: websocket", "Connection: upgrade"],
        ["HTTP/1.1 101 Switching Protocols", "Connection: Upgrade", "Upgrade: websocket"],
        UNTIL_CLOSE,
        True,
    ),
    (
        "S 15.5.22 so does one that is required",
        ["HTTP/1.1 426 Upgrade Required", "Upgrade: a", "Upgrade: b", "Connection: upgrade"],
        ["HTTP/1.1 426 Upgrade Required", "Connection: Upgrade", "Upgrade: a, b"],
        UNTIL_CLOSE,
        True,
    ),
]


@pytest.mark.parametrize(
    ("lines", "told", "length", "reusable"), [pytest.param(*case[1:], id=case[0]) for case in ANSWERS]
)
def test_what_an_answer_says(lines: list[str], told: list[str], length: int, reusable: bool) -> None:
    for pieces in arrivals(head(*lines)):
        answer, rest = read_answer(pieces)
        assert answer.line + answer.fields + b"\r\n" == head(*told)
        assert (answer.status, answer.length, answer.reusable) == (int(lines[0][9:12]), length, reusable)
        assert rest == b""


@pytest.mark.parametrize(
    ("fields", "dated"),
    [
        (DATE, True),
        (DATE.lower(), True),
        (b"DATE: x\r\n", True),
        (b"", False),
        (b"X-Date: x\r\nA: Date: x\r\nDated: x\r\n", False),
    ],
)
def test_an_answer_is_dated_once(fields: bytes, dated: bool) -> None:
    """S 6.6.1: what has a Date keeps it, what has none is given one."""
    answer, _ = read_answer([b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n" + fields + b"\r\n"])
    assert answer.dated is dated
    plain = b"HTTP/1.1 200 OK\r\n" + fields + b"Content-Length: 3\r\n\r\n"
    assert answer.plain == (plain if dated else b"")
    whole = b"HTTP/1.1 200 OK\r\n" + fields + (b"" if dated else DATE) + b"Content-Length: 3\r\n\r\n"
    assert answer_head(answer, 3, 1, True, NOW) == whole


def test_an_answer_that_comes_again_is_not_parsed_again() -> None:
    for date in (b"", DATE):
        octets = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n" + date + b"\r\n"
        by = AnswerReader(HeadLimits())
        first, _ = read_answer([octets], by)
        again, rest = read_answer([octets + b"ok"], by)
        assert again is first
        assert rest == b"ok"


@pytest.mark.parametrize(
    ("fields", "whole"),
    [
        ([DATE, b"Content-Length: 2\r\n"], 2),
        ([DATE, b"Content-Length: 0\r\n"], 0),
        ([DATE, b"Content-Length: 2\r\nConnection: close\r\n"], 2),
        ([b"Content-Length: 2\r\n"], -1),
        ([DATE, b"Transfer-Encoding: chunked\r\n"], -1),
        ([DATE], -1),
    ],
)
def test_which_answers_can_be_passed_on_by_their_length_alone(fields: list[bytes], whole: int) -> None:
    """What is told of one head holds until the next: after one of another kind, too."""
    octets = b"HTTP/1.1 200 OK\r\n" + b"".join(fields) + b"\r\n"
    by = AnswerReader(HeadLimits())
    for before in (b"", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n" + DATE + b"\r\n", b"HTTP/1.1 100 Continue\r\n\r\n"):
        if before:
            by.read(before)
        by.read(octets)
        assert by.whole == (len(octets) + whole if whole >= 0 else -1)
    for status in (b"204 No", b"304 No", b"103 Early Hints"):  # of which the last is no final one
        by.read(octets.replace(b"200 OK", status))
        assert by.whole == -1


@pytest.mark.parametrize(
    ("framing", "minor", "persistent", "ends"),
    [
        pytest.param(5, 1, True, b"Content-Length: 5\r\n\r\n", id="M 6.3 length"),
        pytest.param(0, 1, False, b"Content-Length: 0\r\nConnection: close\r\n\r\n", id="M 9.6 close"),
        pytest.param(5, 0, True, b"Content-Length: 5\r\nConnection: keep-alive\r\n\r\n", id="M 9.3 HTTP/1.0"),
        pytest.param(CHUNKED, 1, True, b"Transfer-Encoding: chunked\r\n\r\n", id="M 6.3 chunked"),
        pytest.param(None, 0, False, b"Connection: close\r\n\r\n", id="M 6.3 until close"),
        pytest.param(None, 1, True, b"\r\n", id="M 6.3 no body"),
    ],
)
def test_the_head_for_a_client(framing: int | None, minor: int, persistent: bool, ends: bytes) -> None:
    answer, _ = read_answer([b"HTTP/1.0 200 OK\r\nA: 1\r\nContent-Length: 77\r\n\r\n"])
    assert answer_head(answer, framing, minor, persistent, NOW) == b"HTTP/1.1 200 OK\r\nA: 1\r\n" + DATE + ends


def test_an_interim_head_says_nothing_of_a_body() -> None:
    """M 6.1, 6.2: no framing field in a 1xx."""
    answer, _ = read_answer([b"HTTP/1.1 103 Early Hints\r\nLink: a\r\nContent-Length: 5\r\nConnection: x\r\n\r\n"])
    assert interim_head(answer) == b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n"


# Our own answers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 400, 405, 408, 413, 414, 417, 431, 501, 502, 503, 504, 505])
def test_our_own_answers_are_whole_and_readable(status: int) -> None:
    octets = own_answer(status, "because of \u00e9", "PR", "id-7", NOW, persistent=False)
    answer = read_by_http_client(octets)
    assert answer.rest == b""
    assert answer.start[0] == str(status)
    assert answer.values("date") == ["Sun, 09 Sep 2001 01:46:40 GMT"]
    assert answer.values("content-length") == [str(len(answer.body))]
    assert answer.values("connection") == ["close"]
    assert answer.values("x-request-id") == ["id-7"]
    assert answer.values("retry-after") == (["1"] if status == 503 else [])
    assert answer.values("allow") == (["GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"] if status in (200, 405) else [])
    assert b"because of \\xe9" in answer.body
    assert b"id-7" in answer.body


def test_our_own_answer_keeps_to_the_clients_version_and_method() -> None:
    kept = own_answer(503, "full", "sQ", "1", NOW, persistent=True)
    assert b"Connection:" not in kept
    old = own_answer(503, "full", "sQ", "1", NOW, persistent=True, minor=0)
    assert b"\r\nConnection: keep-alive\r\n" in old
    head, _, body = own_answer(503, "full", "sQ", "1", NOW, persistent=True, body=False).partition(b"\r\n\r\n")
    assert body == b""
    assert b"Content-Length: %d" % len(kept.partition(b"\r\n\r\n")[2]) in head


def test_dates() -> None:
    """S 5.6.7: in GMT and English, whatever the second before was."""
    assert http_date(NOW) == b"Sun, 09 Sep 2001 01:46:40 GMT"
    assert http_date(NOW + 1) == b"Sun, 09 Sep 2001 01:46:41 GMT"
    assert http_date(NOW) == b"Sun, 09 Sep 2001 01:46:40 GMT"
    assert http_date(0.0) == b"Thu, 01 Jan 1970 00:00:00 GMT"
