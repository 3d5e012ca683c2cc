"""Where a message's body ends (RFC 9112 section 6): one small class per framing, one interface.

`feed(data)` takes octets as they came and returns those that are the body's content; once `done`, `rest` holds what
came after the body. `eof()` is told when the other side closed. `left` is how many octets may be passed on unread,
None where each must be looked at.

Chunks are taken apart and written anew, so that extensions, odd line ends and trailers never reach the other side.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

from balancer.http1 import CHUNKED, UNTIL_CLOSE


class FramingError(Exception):
    """The body breaks the rules of its framing, or ended before its end. `status` is what its sender is told."""

    status = 400


class Truncated(FramingError):
    """The other side closed before the body's end."""


class TooLarge(FramingError):
    """The body has more content than is allowed."""

    status = 413


class LengthBody:
    """Exactly so many octets (RFC 9112 section 6.2)."""

    __slots__ = ("done", "left", "rest")

    def __init__(self, length: int) -> None:
        self.left: int | None = length
        self.done = length == 0
        self.rest = b""

    def feed(self, data: bytes) -> bytes:
        left = self.left or 0
        if len(data) < left:
            self.left = left - len(data)
            return data
        self.left = 0
        self.done = True
        self.rest = data[left:]
        return data[:left]

    def skipped(self, octets: int) -> None:
        """So many octets were passed on without being fed."""
        self.left = (self.left or 0) - octets
        self.done = self.left == 0

    def eof(self) -> None:
        if not self.done:
            raise Truncated(f"closed {self.left} octets before the end of the body")


class CloseBody:
    """Whatever comes until the other side closes (RFC 9112 section 6.3, rule 8)."""

    __slots__ = ("done", "left", "rest")

    def __init__(self) -> None:
        self.left: int | None = sys.maxsize
        self.done = False
        self.rest = b""

    def feed(self, data: bytes) -> bytes:
        return data

    def skipped(self, octets: int) -> None:
        """As many as there are: nothing to count."""

    def eof(self) -> None:
        self.done = True


_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?\r\n")
_CHUNK_LINE_BEGUN = re.compile(rb"[0-9A-Fa-f]{0,15}(?:(?<=[0-9A-Fa-f])[ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?)?\r?")
_TRAILER_BEGUN = re.compile(rb"(?:[!#$%&'*+\-.^_`|~0-9A-Za-z]+(?::[\t\x20-\x7e\x80-\xff]*)?)?\r?")
_TRAILER_LINE = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[\t\x20-\x7e\x80-\xff]*\r\n")


class ChunkedBody:
    """Chunks, each with its size in front (RFC 9112 section 7.1). Trailers are read, bounded and dropped."""

    __slots__ = ("_allowed", "_held", "_size", "_trailer", "done", "left", "rest")

    LONGEST_LINE = 1024  # octets of a chunk's size and its extensions
    LONGEST_TRAILER = 8192  # octets of all trailer fields

    def __init__(self, most: int = 0) -> None:
        """`most` octets of content are allowed, any number where it is 0."""
        self.left: int | None = None
        self.done = False
        self.rest = b""
        self._allowed = most or sys.maxsize  # octets of further chunks
        self._held = b""  # the beginning of a line, or of the CRLF after a chunk, whose end has not come yet
        self._size = 0  # octets that are still missing of the current chunk and its CRLF
        self._trailer = -1  # octets of trailers seen; -1 before the last chunk

    def feed(self, data: bytes) -> bytes:
        if self._held:
            data = self._held + data
            self._held = b""
        content = []
        position = 0
        while position < len(data) and not self.done:
            if self._trailer >= 0:
                position = self._read_trailer(data, position)
            elif self._size > 2:
                piece = data[position : position + self._size - 2]
                content.append(piece)
                position += len(piece)
                self._size -= len(piece)
            elif self._size:
                position = self._read_chunk_end(data, position)
            else:
                position = self._read_chunk_line(data, position)
        if self.done:
            self.rest = data[position:]
        return content[0] if len(content) == 1 else b"".join(content)

    def skipped(self, octets: int) -> None:
        raise AssertionError("chunks are not passed on unread")

    def eof(self) -> None:
        if not self.done:
            raise Truncated("closed before the last chunk")

    def _read_chunk_line(self, data: bytes, position: int) -> int:
        match = _CHUNK_LINE.match(data, position)
        if match is None:
            return self._hold(data, position, _CHUNK_LINE_BEGUN, self.LONGEST_LINE, "a chunk's size is malformed")
        if match.end() - position > self.LONGEST_LINE:
            raise FramingError("a chunk's extensions are too long")
        size = int(match[1], 16)
        self._allowed -= size
        if self._allowed < 0:
            raise TooLarge("the body is larger than is allowed here")
        if size:
            self._size = size + 2
        else:
            self._trailer = 0
        return match.end()

    def _read_chunk_end(self, data: bytes, position: int) -> int:
        expected = b"\r\n"[-self._size :]
        got = data[position : position + self._size]
        if not expected.startswith(got):
            raise FramingError("a chunk is not followed by CRLF")
        self._size -= len(got)
        return position + len(got)

    def _read_trailer(self, data: bytes, position: int) -> int:
        if data.startswith(b"\r\n", position):
            self.done = True
            return position + 2
        match = _TRAILER_LINE.match(data, position)
        if match is None:
            return self._hold(data, position, _TRAILER_BEGUN, self.LONGEST_TRAILER, "a trailer is malformed")
        self._trailer += match.end() - position
        if self._trailer > self.LONGEST_TRAILER:
            raise FramingError("the trailers are too long")
        return match.end()

    def _hold(self, data: bytes, position: int, begun: re.Pattern[bytes], most: int, problem: str) -> int:
        """Keep the beginning of a line for the next call, if a line can still come of it."""
        if len(data) - position > most or begun.fullmatch(data, position) is None:
            raise FramingError(problem)
        self._held = data[position:]
        return len(data)


Body = LengthBody | CloseBody | ChunkedBody


def body_of(length: int, most: int = 0) -> Body:
    """The reader for a body's length as http1 gives it: octets, CHUNKED or UNTIL_CLOSE. `most` bounds the chunks."""
    if length == CHUNKED:
        return ChunkedBody(most)
    if length == UNTIL_CLOSE:
        return CloseBody()
    return LengthBody(length)


def as_chunk(content: bytes) -> bytes:
    """One chunk of this content; nothing for nothing, since an empty chunk would end the body."""
    return b"%x\r\n%b\r\n" % (len(content), content) if content else b""


def as_is(content: bytes) -> bytes:
    return content


LAST_CHUNK = b"0\r\n\r\n"

Encoder = Callable[[bytes], bytes]
