"""Where bodies end, however they come. M is RFC 9112."""

from __future__ import annotations

import time
from collections.abc import Iterable

import pytest

from balancer.framing import (
    LAST_CHUNK,
    Body,
    ChunkedBody,
    CloseBody,
    FramingError,
    LengthBody,
    Truncated,
    as_chunk,
    as_is,
    body_of,
)
from balancer.http1 import CHUNKED, UNTIL_CLOSE
from messages import HOSTILE_BODIES, Hostile, arrivals, read_by_http_client


def feed(body: Body, pieces: Iterable[bytes]) -> tuple[bytes, bytes]:
    """Hand the pieces over. The content, and what came behind the body."""
    content = b""
    behind = b""
    for piece in pieces:
        if body.done:
            behind += piece
        else:
            content += body.feed(piece)
            behind += body.rest
    return content, behind


# Length --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("behind", [b"", b"\r\n", b"GET / HTTP/1.1\r\n\r\n"])
@pytest.mark.parametrize("content", [b"a", b"hello", b"\r\n\r\n", b"0\r\n\r\n"])
def test_a_length_counts_octets_whatever_they_are(content: bytes, behind: bytes) -> None:
    """M 6.2"""
    for pieces in arrivals(content + behind):
        body = body_of(len(content))
        assert not body.done
        assert feed(body, pieces) == (content, behind)
        assert body.done
        body.eof()


def test_a_body_of_no_octets_is_over_before_it_begins() -> None:
    body = body_of(0)
    assert body.done
    body.eof()
    assert body.feed(b"next") == b""
    assert body.rest == b"next"


def test_octets_that_were_passed_on_unread_count() -> None:
    body = LengthBody(10)
    assert body.feed(b"abc") == b"abc"
    assert body.left == 7
    body.skipped(5)
    assert (body.left, body.done) == (2, False)
    body.skipped(2)
    assert (body.left, body.done) == (0, True)


@pytest.mark.parametrize("came", [b"", b"h", b"hell"])
def test_a_length_that_is_not_reached_is_no_end(came: bytes) -> None:
    """M 8: what was cut is never taken for complete."""
    body = LengthBody(5)
    body.feed(came)
    with pytest.raises(Truncated):
        body.eof()


# Until close ---------------------------------------------------------------------------------------------------------


def test_only_a_close_ends_a_body_without_a_length() -> None:
    """M 6.3, rule 8"""
    body = body_of(UNTIL_CLOSE)
    assert isinstance(body, CloseBody)
    content = b"0\r\n\r\nHTTP/1.1 200 OK\r\n\r\n"
    assert feed(body, [content, content]) == (content * 2, b"")
    body.skipped(10**15)
    assert not body.done
    assert body.left
    body.eof()
    assert body.done


# Chunks --------------------------------------------------------------------------------------------------------------

CHUNKED_BODIES = [
    pytest.param(b"0\r\n\r\n", b"", id="M 7.1 nothing"),
    pytest.param(b"5\r\nhello\r\n0\r\n\r\n", b"hello", id="M 7.1 one chunk"),
    pytest.param(b"1\r\nh\r\n2\r\nel\r\n2\r\nlo\r\n0\r\n\r\n", b"hello", id="M 7.1 three chunks"),
    pytest.param(b"a\r\n0123456789\r\nA\r\n0123456789\r\n0\r\n\r\n", b"0123456789" * 2, id="M 7.1 digits of any case"),
    pytest.param(b"000000000000005\r\nhello\r\n000\r\n\r\n", b"hello", id="M 7.1 leading zeros"),
    pytest.param(b"6\r\n\r\n\r\n\r\n\r\n0\r\n\r\n", b"\r\n\r\n\r\n", id="M 7.1 line ends as content"),
    pytest.param(b"7\r\n0\r\n\r\nab\r\n0\r\n\r\n", b"0\r\n\r\nab", id="M 7.1 a last chunk as content"),
    pytest.param(b"5;a\r\nhello\r\n0;b=c\r\n\r\n", b"hello", id="M 7.1.1 extensions"),
    pytest.param(b"5 \t; a = \"b;\xe9\" \r\nhello\r\n0\r\n\r\n", b"hello", id="M 7.1.1 extensions with blanks"),
    pytest.param(b"5\r\nhello\r\n0\r\nX-A: 1\r\nContent-Length: 9\r\n\r\n", b"hello", id="M 7.1.2 trailers"),
    pytest.param(b"0\r\nX-A:\r\n\r\n", b"", id="M 7.1.2 an empty trailer"),
]  # fmt: skip


@pytest.mark.parametrize("behind", [b"", b"\r\n", b"5\r\n"])
@pytest.mark.parametrize(("octets", "content"), CHUNKED_BODIES)
def test_chunks_are_taken_apart(octets: bytes, content: bytes, behind: bytes) -> None:
    for pieces in arrivals(octets + behind):
        body = body_of(CHUNKED)
        assert body.left is None
        assert feed(body, pieces) == (content, behind)
        assert body.done
        body.eof()


@pytest.mark.parametrize(("octets", "content"), CHUNKED_BODIES)
def test_chunks_that_break_off_are_no_end(octets: bytes, content: bytes) -> None:
    """M 8: without the last chunk and the empty line behind its trailers it is not complete."""
    for end in range(len(octets)):
        for pieces in ([octets[:end]], [octets[i : i + 1] for i in range(end)]):
            body = ChunkedBody()
            feed(body, pieces)
            assert not body.done
            with pytest.raises(Truncated):
                body.eof()


@pytest.mark.parametrize("hostile", HOSTILE_BODIES, ids=str)
def test_chunks_that_are_none_are_refused_however_they_come(hostile: Hostile) -> None:
    octets = hostile.octets.partition(b"\r\n\r\n")[2]
    for pieces in arrivals(octets):
        with pytest.raises(FramingError) as refusal:
            feed(ChunkedBody(), pieces)
        assert not isinstance(refusal.value, Truncated)


@pytest.mark.parametrize(
    ("octets", "fits"),
    [
        pytest.param(
            b"5;" + b"a" * (ChunkedBody.LONGEST_LINE - 4) + b"\r\nhello\r\n0\r\n\r\n", True, id="M 7.1.1 line"
        ),
        pytest.param(b"5;" + b"a" * (ChunkedBody.LONGEST_LINE - 3) + b"\r\nhello\r\n0\r\n\r\n", False, id="longer"),
        pytest.param(b"5;" + b"a" * (ChunkedBody.LONGEST_LINE + 9), False, id="M 7.1.1 a line without an end"),
        pytest.param(b"0\r\nA:" + b"a" * (ChunkedBody.LONGEST_TRAILER - 4) + b"\r\n\r\n", True, id="M 7.1.2 trailer"),
        pytest.param(b"0\r\nA:" + b"a" * (ChunkedBody.LONGEST_TRAILER - 3) + b"\r\n\r\n", False, id="longer trailer"),
        pytest.param(b"0\r\n" + b"A: 1\r\n" * (ChunkedBody.LONGEST_TRAILER // 6), False, id="M 7.1.2 without an end"),
        pytest.param(b"0\r\n" + b"A: 1\r\n" * (ChunkedBody.LONGEST_TRAILER // 6 + 1), False, id="M 7.1.2 trailers"),
    ],
)
def test_lines_between_chunks_are_bounded(octets: bytes, fits: bool) -> None:
    for pieces in ([octets], [octets[i : i + 7] for i in range(0, len(octets), 7)]):
        body = ChunkedBody()
        try:
            feed(body, pieces)
        except FramingError as refusal:
            assert not fits
            assert not isinstance(refusal, Truncated)
        else:
            assert body.done is fits


def test_trailers_are_bounded_all_together() -> None:
    """M 7.1.2: not each by itself, or there would be no end of them."""
    body = ChunkedBody()
    body.feed(b"0\r\n")
    with pytest.raises(FramingError):
        feed(body, [b"A: 1\r\n"] * ChunkedBody.LONGEST_TRAILER)


def test_chunks_are_not_passed_on_unread() -> None:
    with pytest.raises(AssertionError):
        ChunkedBody().skipped(1)


@pytest.mark.parametrize(
    "octets",
    [
        pytest.param(b"1\r\na\r\n" * 10_000 + b"0\r\n\r\n", id="tiny chunks"),
        pytest.param(b"1;" + b"a" * 1000 + b"\r\na\r\n0\r\n\r\n", id="long extension"),
        pytest.param(b"0\r\nA: " + b"a" * 8000 + b"\r\n\r\n", id="long trailer"),
        pytest.param(b"8000\r\n" + b"a" * 32768 + b"\r\n0\r\n\r\n", id="one chunk"),
    ],
)
def test_chunks_in_small_pieces_take_no_longer_than_they_must(octets: bytes) -> None:
    """Octet by octet these take 10 to 90 ms."""
    began = time.perf_counter()
    body = ChunkedBody()
    feed(body, (octets[i : i + 1] for i in range(len(octets))))
    assert body.done
    assert time.perf_counter() - began < 2.0


# Written anew --------------------------------------------------------------------------------------------------------


def test_what_is_written_in_chunks_is_read_as_it_was() -> None:
    """M 7.1, as http.client reads it; nothing is written for nothing, which would be the last chunk."""
    pieces = [b"a", b"", b"hello\r\n0\r\n\r\n", b"x" * 70_000]
    octets = b"".join(map(as_chunk, pieces)) + LAST_CHUNK
    answer = read_by_http_client(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + octets + b"rest")
    assert answer.body == b"".join(pieces)
    assert answer.rest == b"rest"
    assert feed(ChunkedBody(), [octets + b"rest"]) == (b"".join(pieces), b"rest")


def test_a_body_with_a_length_is_written_as_it_is() -> None:
    assert as_is(b"hello") == b"hello"
