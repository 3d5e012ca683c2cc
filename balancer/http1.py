"""Message heads of HTTP/1.1 as bytes: parse, refuse, rewrite, write. No socket in here.

`RequestReader.read(buffer)` and `AnswerReader.read(buffer)` return a parsed head and its length once the buffer
begins with a whole one, None while it does not, and raise HttpError, which carries the status to answer with.

The rules that keep two readers of the same octets from seeing different messages (RFC 9112 sections 2.2, 5, 6, 11.2):
- lines end in CRLF; a lone CR or LF, or a NUL, is refused, never repaired;
- no white space before the first field or before a colon, no folded lines, no field name that is not a token;
- Transfer-Encoding is exactly "chunked" and stands alone, never beside Content-Length, never in HTTP/1.0;
- Content-Length is given once, in digits;
- the start line, Host, the framing fields and the connection fields are written anew, never passed on; a field that
  Connection names is dropped unless it is one of those, and our own are added after that.

On a kept-alive connection the next head is nearly always the last one again, and if not, its fields are. Each reader
keeps its last head and its last block of fields with what came of them: comparing is a memcmp, parsing is not.
"""

from __future__ import annotations

import re
from email.utils import formatdate
from http import HTTPStatus

CHUNKED = -1  # a body's length where it is not a number of octets
UNTIL_CLOSE = -2

# Methods that may be sent a second time without asking the client (RFC 9110 section 9.2.2).
IDEMPOTENT = frozenset((b"GET", b"HEAD", b"PUT", b"DELETE", b"OPTIONS", b"TRACE"))

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_REQUEST_LINE = re.compile(rb"(" + _TOKEN + rb") ([\x21\x22\x24-\x7e]+) HTTP/([0-9])\.([0-9])")
_STATUS_LINE = re.compile(rb"HTTP/1\.([0-9]) ([1-5][0-9][0-9])(?: ([\t\x20-\x7e\x80-\xff]*))?")
_BLOCK = re.compile(rb"\r\n(?:" + _TOKEN + rb":[\t\x20-\x7e\x80-\xff]*\r\n)*")
# The fields that mean something to us begin with these letters; a look in a table tells which they are.
_FIELD = re.compile(rb"\r\n([CDEHKMPTUXcdehkmptux][^:]*):[ \t]*([^\r]*)")
_HOST = re.compile(rb"(?:[A-Za-z0-9\-._~%!$&'()*+,;=]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")
_ABSOLUTE = re.compile(rb"(?i:https?)://([^/?]*)(.*)")
_DIGITS = re.compile(rb"[0-9]{1,18}")
_LONE = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)|\x00")

_NEVER_PASSED = frozenset(
    b"connection keep-alive proxy-connection te trailer transfer-encoding content-length upgrade host".split()
)
# Ours to say, whatever the client says: an application must be able to trust them.
_FORWARDED = frozenset(b"x-forwarded-for x-forwarded-proto x-forwarded-host x-forwarded-port".split())
_REQUEST_NAMES = _NEVER_PASSED | _FORWARDED | {b"expect", b"max-forwards"}
_ANSWER_NAMES = (_NEVER_PASSED - {b"host"}) | {b"date"}


class HttpError(Exception):
    """A message that is refused. `status` is what the client is told, `reason` says why in words."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"{status} {reason}")
        self.status = status
        self.reason = reason


class BadAnswer(HttpError):
    """A backend's answer that is not HTTP; the client gets 502."""

    def __init__(self, reason: str) -> None:
        super().__init__(502, reason)


class HeadLimits:
    """Bounds of one head: octets in all, octets of the first line, number of fields."""

    __slots__ = ("fields", "head", "line")

    def __init__(self, head: int = 65536, line: int = 16384, fields: int = 128) -> None:
        self.head = head
        self.line = line
        self.fields = fields


class Request:
    """A request's head, and what a backend is sent for it. Never changed after it was made."""

    __slots__ = ("expect", "head", "idempotent", "length", "line", "method", "minor", "persistent", "upgrade")

    method: bytes
    line: bytes  # the request line as it came, for the log
    minor: int  # of the client's HTTP/1.x
    head: bytes  # for the backend, complete with its empty line
    length: int  # octets of the body, or CHUNKED
    persistent: bool  # may the connection stay after this exchange?
    expect: bool  # waits for 100 (Continue)
    upgrade: bool  # asks for a protocol that may begin after a 101
    idempotent: bool


class _RequestFields:
    """What a block of fields says, whatever the request line before it."""

    __slots__ = ("close", "expect", "forward", "hops", "host", "keep_alive", "length", "tail", "upgrade")

    close: bool
    keep_alive: bool
    expect: bool
    host: bytes | None
    upgrade: bytes | None
    hops: int  # Max-Forwards, or -1
    length: int
    forward: bytes  # what goes on unchanged, and the framing; from the CRLF before the first to the one after the last
    tail: tuple[int, bytes]  # the client's minor version, and all of the backend's head that follows the target


class RequestReader:
    """Reads the request heads of one client connection.

    client: the address for X-Forwarded-For. proto: b"http" or b"https". authority: how the client reached us, for
    HTTP/1.0 requests that name no host.
    """

    __slots__ = ("_authority", "_block", "_fields", "_head", "_limits", "_request", "_scanned", "_suffix")

    def __init__(self, client: bytes, proto: bytes, authority: bytes, limits: HeadLimits) -> None:
        self._authority = authority
        self._limits = limits
        self._suffix = b"X-Forwarded-For: %b\r\nX-Forwarded-Proto: %b\r\nX-Forwarded-Port: %b\r\n" % (
            client,
            proto,
            authority.rpartition(b":")[2],
        )
        self._scanned = 0  # octets of an unfinished head that were searched for its end
        self._head = b"\n"  # the last head: no buffer begins with this one
        self._request: Request | None = None
        self._block = b""  # the last block of fields
        self._fields: _RequestFields | None = None

    def read(self, buffer: bytes) -> tuple[Request, int] | None:
        """The request at the buffer's beginning and the length of its head; None while it is not complete.

        Between calls that return None the buffer may only grow.
        """
        if buffer.startswith(self._head):
            return self._request, len(self._head)  # type: ignore[return-value]
        start = 2 if buffer.startswith(b"\r\n") else 0  # RFC 9112 section 2.2: one empty line is skipped
        end = buffer.find(b"\r\n\r\n", max(start, self._scanned))
        if end < 0:
            self._check_unfinished(buffer, start)
            self._scanned = max(0, len(buffer) - 3)
            return None
        self._scanned = 0
        head = buffer[start : end + 4]
        request = self._parse(head)
        if not start:
            self._head = head
            self._request = request
        return request, end + 4

    def _check_unfinished(self, buffer: bytes, start: int) -> None:
        """Refuse as soon as it is clear that no whole head can come of it."""
        line_end = buffer.find(b"\r\n", start)
        if (len(buffer) if line_end < 0 else line_end) - start > self._limits.line:
            raise HttpError(414, "the request line is too long")
        if len(buffer) - start > self._limits.head:
            raise HttpError(431, "the head is too large")
        if _LONE.search(buffer, max(start, self._scanned - 1)):
            raise HttpError(400, "a line does not end in CRLF, or holds a NUL")

    def _parse(self, head: bytes) -> Request:
        limits = self._limits
        line_end = head.find(b"\r\n")
        if line_end > limits.line:
            raise HttpError(414, "the request line is too long")
        if len(head) > limits.head:
            raise HttpError(431, "the head is too large")
        line = head[:line_end]
        match = _REQUEST_LINE.fullmatch(line)
        if match is None:
            raise HttpError(400, "malformed request line")
        method, target, major, minor_digit = match.groups()
        if major != b"1":
            raise HttpError(505, "only HTTP/1.0 and HTTP/1.1 are spoken here")
        minor = 0 if minor_digit == b"0" else 1
        if method == b"CONNECT":
            raise HttpError(405, "CONNECT is not offered")

        block = head[line_end:-2]
        if block == self._block:
            fields = self._fields
            assert fields is not None
        else:
            fields = self._parse_fields(block)
            self._block = block
            self._fields = fields
        if fields.length == CHUNKED and minor == 0:
            raise HttpError(400, "Transfer-Encoding in HTTP/1.0")
        host = None
        if target[:1] != b"/":
            target, host = _origin_form(method, target)
        if host is None and fields.host is None and minor:
            raise HttpError(400, "HTTP/1.1 without a Host field")

        request = Request()
        request.method = method
        request.line = line
        request.minor = minor
        request.length = fields.length
        request.idempotent = method in IDEMPOTENT
        request.expect = fields.expect and minor == 1
        request.upgrade = fields.upgrade is not None and minor == 1
        request.persistent = not fields.close and (minor == 1 or fields.keep_alive)
        if host is not None:
            tail = self._tail(fields, host, minor)
        else:
            known, tail = fields.tail
            if known != minor:
                tail = self._tail(fields, fields.host or self._authority, minor)
                fields.tail = (minor, tail)
        if fields.hops >= 0 and method in (b"TRACE", b"OPTIONS"):
            tail = _one_hop_less(tail, fields.hops)
        request.head = b"%b %b%b" % (method, target, tail)
        return request

    def _tail(self, fields: _RequestFields, host: bytes, minor: int) -> bytes:
        expect = b"Expect: 100-continue\r\n" if fields.expect and minor else b""
        upgrade = b"Connection: Upgrade\r\nUpgrade: %b\r\n" % fields.upgrade if fields.upgrade and minor else b""
        ours = b"%bX-Forwarded-Host: %b\r\nVia: 1.%d lb\r\n\r\n" % (self._suffix, host, minor)
        return b"".join((b" HTTP/1.1\r\nHost: ", host, fields.forward, expect, upgrade, ours))

    def _parse_fields(self, block: bytes) -> _RequestFields:
        _check_block(block, self._limits.fields)
        fields = _RequestFields()
        fields.host = None
        fields.close = fields.keep_alive = fields.expect = False
        fields.upgrade = None
        fields.hops = -1
        fields.length = 0
        fields.tail = (-1, b"")
        options: list[bytes] = []
        upgrades: list[bytes] = []
        found: list[tuple[bytes, bytes, int, int]] = []
        lengths: list[bytes] = []
        codings: list[bytes] = []
        for match in _FIELD.finditer(block):
            name = match[1].lower()
            if name not in _REQUEST_NAMES:
                continue
            value = match[2].rstrip(b" \t")
            found.append((name, value, match.start(), match.end()))
            if name == b"host":
                if fields.host is not None:
                    raise HttpError(400, "two Host fields")
                if not _HOST.fullmatch(value):
                    raise HttpError(400, "Host is not a host")
                fields.host = value
            elif name == b"connection":
                options += _list(value.lower())
            elif name == b"content-length":
                lengths.append(value)
            elif name == b"transfer-encoding":
                codings += [coding.strip(b" \t") for coding in value.lower().split(b",")]
            elif name == b"expect":
                if value.lower() != b"100-continue":
                    raise HttpError(417, "the only expectation known is 100-continue")
                fields.expect = True
            elif name == b"upgrade":
                upgrades.append(value)
            elif name == b"max-forwards" and _DIGITS.fullmatch(value):
                fields.hops = int(value)
        fields.close = b"close" in options
        fields.keep_alive = b"keep-alive" in options
        # HTTP/2 in clear text is not passed on: what came after it would be read by nobody here.
        protocols = [name for value in upgrades for name in _list(value) if name.lower() != b"h2c"]
        if b"upgrade" in options and protocols:
            fields.upgrade = b", ".join(protocols)
        framing = b""
        if codings:
            fields.length = _transfer_coding(codings, lengths)
            framing = b"Transfer-Encoding: chunked\r\n"
        elif lengths:
            fields.length = _content_length(lengths)
            framing = b"Content-Length: %d\r\n" % fields.length
        drop = [(start, end) for name, _, start, end in found if name != b"max-forwards"]
        if extra := _named_by_connection(options, _REQUEST_NAMES):
            drop += _spans(block, extra)
        fields.forward = _without(block, drop) + framing
        return fields


class Answer:
    """A backend's final or interim head, and what the client is sent for it. Never changed after it was made."""

    __slots__ = ("dated", "fields", "length", "line", "plain", "reusable", "status", "upgrade")

    status: int
    line: bytes  # the status line for the client, without its CRLF
    fields: bytes  # the fields for the client, from the CRLF before the first to the CRLF after the last
    length: int  # octets of the body, CHUNKED or UNTIL_CLOSE; what HEAD, 204 and 304 say of it is in here too
    dated: bool
    plain: bytes  # the whole head, where length is a number and the client's connection stays; else empty
    reusable: bool  # may the backend's connection be used again?
    upgrade: bytes | None  # the protocol of a 101


class AnswerReader:
    """Reads the answer heads of one backend."""

    __slots__ = ("_answer", "_head", "_limits")

    def __init__(self, limits: HeadLimits) -> None:
        self._limits = limits
        self._head = b"\n"
        self._answer: Answer | None = None

    def read(self, buffer: bytes) -> tuple[Answer, int] | None:
        """The answer at the buffer's beginning and the length of its head; None while it is not complete."""
        if buffer.startswith(self._head):
            return self._answer, len(self._head)  # type: ignore[return-value]
        end = buffer.find(b"\r\n\r\n")
        if (end if end >= 0 else len(buffer)) > self._limits.head:
            raise BadAnswer("the backend's head is too large")
        if end < 0:
            if not buffer.startswith(b"HTTP/1."[: len(buffer)]):
                raise BadAnswer("the backend does not speak HTTP/1.1")
            if _LONE.search(buffer):
                raise BadAnswer("a line of the backend's head does not end in CRLF, or holds a NUL")
            return None
        head = buffer[: end + 4]
        answer = self._parse(head)
        if answer.dated:
            self._head = head
            self._answer = answer
        return answer, end + 4

    def _parse(self, head: bytes) -> Answer:
        line_end = head.find(b"\r\n")
        match = _STATUS_LINE.fullmatch(head, 0, line_end)
        if match is None:
            raise BadAnswer("malformed status line from the backend")
        modern = match[1] != b"0"
        answer = Answer()
        answer.status = int(match[2])
        answer.line = b"HTTP/1.1 %b %b" % (match[2], match[3] or b"")
        try:
            self._parse_fields(answer, head[line_end:-2], modern)
        except HttpError as error:
            raise BadAnswer(f"in the backend's answer: {error.reason}") from None
        if answer.length >= 0 and answer.dated:
            answer.plain = b"%b%bContent-Length: %d\r\n\r\n" % (answer.line, answer.fields, answer.length)
        else:
            answer.plain = b""
        return answer

    def _parse_fields(self, answer: Answer, block: bytes, modern: bool) -> None:
        _check_block(block, self._limits.fields)
        answer.dated = False
        answer.upgrade = None
        options: list[bytes] = []
        lengths: list[bytes] = []
        codings: list[bytes] = []
        drop: list[tuple[int, int]] = []
        for found in _FIELD.finditer(block):
            name = found[1].lower()
            if name not in _ANSWER_NAMES:
                continue
            if name == b"date":
                answer.dated = True
                continue
            value = found[2].rstrip(b" \t")
            drop.append(found.span())
            if name == b"connection":
                options += _list(value.lower())
            elif name == b"content-length":
                lengths.append(value)
            elif name == b"transfer-encoding":
                codings += [coding.strip(b" \t") for coding in value.lower().split(b",")]
            elif name == b"upgrade":
                answer.upgrade = value
        if codings:
            if not modern:
                raise HttpError(400, "Transfer-Encoding in HTTP/1.0")
            answer.length = _transfer_coding(codings, lengths)
        else:
            answer.length = _content_length(lengths) if lengths else UNTIL_CLOSE
        answer.reusable = b"close" not in options and (modern or b"keep-alive" in options)
        if extra := _named_by_connection(options, _ANSWER_NAMES):
            drop += _spans(block, extra)
        answer.fields = _without(block, drop)


def answer_head(answer: Answer, framing: int | None, minor: int, persistent: bool, now: float) -> bytes:
    """The head that goes to the client: framing None writes no framing field; `minor` is of the client's version."""
    parts = [answer.line, answer.fields]
    if not answer.dated:
        parts.append(b"Date: %b\r\n" % http_date(now))
    if framing == CHUNKED:
        parts.append(b"Transfer-Encoding: chunked\r\n")
    elif framing is not None and framing >= 0:
        parts.append(b"Content-Length: %d\r\n" % framing)
    if not persistent:
        parts.append(b"Connection: close\r\n")
    elif minor == 0:
        parts.append(b"Connection: keep-alive\r\n")
    parts.append(b"\r\n")
    return b"".join(parts)


def interim_head(answer: Answer) -> bytes:
    """A 1xx head for the client; a 101 names its protocol (RFC 9110 sections 15.2, 7.8)."""
    upgrade = b""
    if answer.status == 101 and answer.upgrade:
        upgrade = b"Connection: Upgrade\r\nUpgrade: %b\r\n" % answer.upgrade
    return b"%b%b%b\r\n" % (answer.line, answer.fields, upgrade)


def own_answer(
    status: int, reason: str, request_id: str, now: float, *, persistent: bool, minor: int = 1, body: bool = True
) -> bytes:
    """An answer of our own: short, readable, dated, with the request's id. `body` is False for HEAD."""
    phrase = HTTPStatus(status).phrase
    text = f"{status} {phrase}: {reason}\nrequest id: {request_id}\n".encode("ascii", "backslashreplace")
    fields = [
        f"HTTP/1.1 {status} {phrase}",
        f"Date: {http_date(now).decode()}",
        "Content-Type: text/plain; charset=utf-8",
        f"Content-Length: {len(text)}",
        f"X-Request-Id: {request_id}",
    ]
    if status == 503:
        fields.append("Retry-After: 1")
    if status == 405:
        fields.append("Allow: GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS, TRACE")
    if not persistent:
        fields.append("Connection: close")
    elif minor == 0:
        fields.append("Connection: keep-alive")
    return "\r\n".join([*fields, "", ""]).encode() + (text if body else b"")


_date = (0, b"")


def http_date(now: float) -> bytes:
    """The Date field's value (RFC 9110 section 5.6.7) for a wall-clock time; the last second's is kept."""
    global _date  # noqa: PLW0603 - a pair, replaced whole, so that any thread may ask
    second, text = _date
    if second != int(now):
        text = formatdate(int(now), usegmt=True).encode()
        _date = (int(now), text)
    return text


def _check_block(block: bytes, most: int) -> None:
    """Refuse a block of fields (from the CRLF before the first to the CRLF after the last) that breaks the grammar."""
    if block.count(b"\n") - 1 > most:
        raise HttpError(431, "too many fields")
    if _BLOCK.fullmatch(block) is None:
        raise HttpError(400, _what_is_wrong(block))


def _what_is_wrong(block: bytes) -> str:
    if _LONE.search(block):
        return "a lone CR or LF, or a NUL, in the head"
    for number, line in enumerate(block[2:-2].split(b"\r\n")):
        if line[:1] in (b" ", b"\t"):
            return "a folded line" if number else "white space before the first field"
        name, colon, value = line.partition(b":")
        if not colon:
            return "a field without a colon"
        if name != name.rstrip(b" \t"):
            return "white space before a colon"
        if re.fullmatch(_TOKEN, name) is None:
            return "a field name that is no token"
        if re.fullmatch(rb"[\t\x20-\x7e\x80-\xff]*", value) is None:
            return "a control octet in a field value"
    return "malformed fields"


def _origin_form(method: bytes, target: bytes) -> tuple[bytes, bytes | None]:
    """The target for the backend, and the host that an absolute-form target names (RFC 9112 section 3.2)."""
    if target == b"*" and method == b"OPTIONS":
        return target, None
    match = _ABSOLUTE.fullmatch(target)
    if match is None:
        raise HttpError(400, "the target is neither a path nor an absolute http URL")
    host, path = match.groups()
    if not _HOST.fullmatch(host):
        raise HttpError(400, "the target's host is not a host")
    if not path:
        return (b"*" if method == b"OPTIONS" else b"/"), host
    return (path if path[:1] == b"/" else b"/" + path), host


def _one_hop_less(forward: bytes, hops: int) -> bytes:
    """Max-Forwards counted down (RFC 9110 section 7.6.2). At zero the request is ours to answer."""
    if hops == 0:
        raise HttpError(400, "Max-Forwards is used up here")
    return re.sub(rb"(?i)(\r\nmax-forwards:)[^\r]*", b"\\1 %d" % (hops - 1), forward)


def _list(value: bytes) -> list[bytes]:
    return [item for item in (part.strip(b" \t") for part in value.split(b",")) if item]


def _content_length(values: list[bytes]) -> int:
    if len(values) > 1 or not _DIGITS.fullmatch(values[0]):
        raise HttpError(400, "Content-Length is not one number in digits")
    return int(values[0])


def _transfer_coding(codings: list[bytes], lengths: list[bytes]) -> int:
    if lengths:
        raise HttpError(400, "Transfer-Encoding beside Content-Length")
    if codings[-1] != b"chunked" or codings.count(b"chunked") > 1:
        raise HttpError(400, "chunked is not the last transfer coding, or is named twice")
    if len(codings) > 1:
        raise HttpError(501, "a transfer coding other than chunked")
    return CHUNKED


def _named_by_connection(options: list[bytes], handled: frozenset[bytes]) -> set[bytes]:
    """Fields that go because Connection names them, beyond those that never stay or are ours to write."""
    return {option for option in options if option not in handled and option not in (b"close", b"date")}


def _spans(block: bytes, names: set[bytes]) -> list[tuple[int, int]]:
    """Where the fields of these names stand in a block, each from the CRLF before it."""
    return [
        match.span() for match in re.finditer(rb"\r\n([^:\r\n]+):[^\r]*", block) if match[1].lower() in names
    ]


def _without(block: bytes, spans: list[tuple[int, int]]) -> bytes:
    """The block with the spans cut out; begins with CRLF and ends with CRLF."""
    if not spans:
        return block
    kept = []
    position = 0
    for start, end in sorted(spans):
        kept.append(block[position:start])
        position = end
    kept.append(block[position:])
    return b"".join(kept)
