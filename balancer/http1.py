"""Message heads of HTTP/1.1 as bytes: parse, refuse, rewrite, write. No socket in here.

`RequestReader.read(buffer)` and `AnswerReader.read(buffer)` return a parsed head and its length once the buffer
begins with a whole one, None while it does not, and raise HttpError, which carries the status to answer with.

The rules that keep two readers of the same octets from seeing different messages (RFC 9112 sections 2.2, 5, 6, 11.2):
- lines end in CRLF; a lone CR or LF, or a NUL, is refused, never repaired;
- no white space before the first field or before a colon, no folded lines, no field name that is not a token;
- Transfer-Encoding is exactly "chunked" and stands alone, never beside Content-Length, never in HTTP/1.0;
- Content-Length is given once, in digits;
- the start line, Host, the framing fields and the connection fields are written anew, never passed on; a field that
  Connection names is dropped unless it is one of those, and our own are added after that;
- a request's field whose name is that of one of these but for the signs between its words, like Content_Length or
  X_Forwarded_For, is dropped: behind CGI and its heirs, which spell every sign as "_", it would be taken for the other.

On a kept-alive connection the next head is nearly always the last one again; if not, it is mostly like one of the last
but for its target and the value of one field; and if not, most of its lines were seen before. Each is remembered with
what came of it: comparing and looking up are quick where parsing is not.
What a head means depends on nothing but its octets and the reader's settings, so that a copy of it means the same.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Sequence, Set
from email.utils import formatdate
from http import HTTPStatus
from ipaddress import IPv6Address
from itertools import filterfalse

CHUNKED = -1  # a body's length where it is not a number of octets
UNTIL_CLOSE = -2

# Methods that may be sent a second time without asking the client (RFC 9110 section 9.2.2).
IDEMPOTENT = frozenset((b"GET", b"HEAD", b"PUT", b"DELETE", b"OPTIONS", b"TRACE"))

# Heads longer than this are parsed each time: a connection at rest should not hold on to much.
REMEMBERED = 4096

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_REQUEST_LINE = re.compile(rb"(" + _TOKEN + rb") ([\x21\x22\x24-\x7e]+) HTTP/([0-9])\.([0-9])")
_FIELD_LINE = re.compile(rb"(" + _TOKEN + rb"):([\t\x20-\x7e\x80-\xff]*)")
_STATUS_LINE = re.compile(rb"HTTP/1\.([0-9]) ([1-5][0-9][0-9])(?: [\t\x20-\x7e\x80-\xff]*)?")
_BLOCK = re.compile(rb"(?:\r\n" + _TOKEN + rb":[^\r]*)*\r\n")
_TEXT = bytes((0x09, *range(0x20, 0x7F), *range(0x80, 0x100)))  # the octets of a field's value
_PRINTED = bytes(octet for octet in range(0x20, 0x7F) if octet != 0x23)  # the octets of a target, and the space
_ANY_FIELD = re.compile(rb"\r\n([^:]+):[^\r]*")
# The fields of an answer that mean something to us begin with these letters; a look in a table tells which they are.
# Common ones that mean nothing are passed over by what follows, which is faster than the look.
_ANSWER_FIELD = re.compile(rb"\r\n([CKPTUckptu](?!ache-|ontent-[^Ll]|ragma|riority)[^:]*):([^\r]*)")
_HOST = re.compile(
    rb"(?:(?!:|\Z)[A-Za-z0-9\-._~!$&'()*+,;=]*(?:%[0-9A-Fa-f]{2}[A-Za-z0-9\-._~!$&'()*+,;=]*)*|\[([0-9A-Fa-f:.]+)\])"
    rb"(?::[0-9]{0,5})?"
)
_ABSOLUTE = re.compile(rb"(?i:https?)://([^/?]*)(.*)")
_DIGITS = re.compile(rb"[0-9]{1,18}")
_LONE = re.compile(rb"\n(?<!\r\n)|\r(?!\n|\Z)|\x00")

_NEVER_PASSED = frozenset(
    b"connection keep-alive proxy-connection te trailer transfer-encoding content-length upgrade".split()
)
# Ours to say, whatever the client says: an application must be able to trust them.
_FORWARDED = frozenset(b"forwarded x-forwarded-for x-forwarded-proto x-forwarded-host x-forwarded-port".split())
_REQUEST_NAMES = _NEVER_PASSED | _FORWARDED | {b"host", b"expect", b"max-forwards"}
_ANSWER_NAMES = _NEVER_PASSED
# What Connection names goes, save for what is ours to handle anyway, and Date, which an answer has to have.
_REQUEST_STAYS = _REQUEST_NAMES | {b"close"}
_ANSWER_STAYS = _ANSWER_NAMES | {b"close", b"date"}
_SIGNS = b"!#$%&'*+.^_`|~"
_HYPHENATED = bytes.maketrans(_SIGNS, b"-" * len(_SIGNS))


class HttpError(Exception):
    """A message that goes no further. `status` is what the client is told, `reason` says why in words.

    The status is 200 for OPTIONS with Max-Forwards: 0, which is no refusal: it was for us to answer.
    """

    def __init__(self, status: int, reason: str, *fields: str) -> None:
        super().__init__(f"{status} {reason}")
        self.status = status
        self.reason = reason
        self.fields = fields  # further lines of the answer's head


class BadAnswer(HttpError):
    """A backend's answer that is not HTTP; the client gets 502."""

    def __init__(self, reason: str) -> None:
        super().__init__(502, reason)


class HeadLimits:
    """Bounds of one head: octets in all, octets of the first line, number of fields."""

    __slots__ = ("fields", "head", "line", "short")

    def __init__(self, head: int = 65536, line: int = 16384, fields: int = 128) -> None:
        self.head = head
        self.line = line
        self.fields = fields
        self.short = min(head, line, REMEMBERED)  # octets of a head that is remembered, and breaks neither of the two


class Request:
    """A request's head, and what a backend is sent for it. Never changed after it was made."""

    __slots__ = (
        "expect",
        "forwarded_for",
        "head",
        "idempotent",
        "length",
        "line",
        "method",
        "minor",
        "persistent",
        "plain",
        "received",
        "target",
        "upgrade",
    )

    received: bytes  # the head as it came, without an empty line before it
    method: bytes
    target: bytes  # for the backend, in origin form
    line: bytes  # the request line as it came, for the log
    minor: int  # of the client's HTTP/1.x
    head: bytes  # for the backend, complete with its empty line
    length: int  # octets of the body, or CHUNKED
    persistent: bool  # may the connection stay after this exchange?
    expect: bool  # waits for 100 (Continue)
    upgrade: bool  # asks for a protocol that may begin after a 101
    idempotent: bool
    plain: bool  # may its answer be passed on as it is, head and body?
    forwarded_for: bytes  # X-Forwarded-For as it came, where the peer is trusted to know


class _Mould:
    """What heads have in common that differ in nothing but the target, a path, and the value of one field.

    That field is one that goes on as it came and has no other meaning to us. Such a head is `start`, the rest of the
    target, a space, `before`, the value, `after`. A backend is sent the method, the target, `sent_before`, the value,
    `sent_after`. What else there is to say of one is said of all.
    """

    __slots__ = ("after", "at", "before", "first", "sent_after", "sent_before", "slot", "start", "varies")

    start: bytes  # method, space and slash
    before: bytes  # from the version to the colon before the value
    after: bytes  # from the CRLF behind the value to the end of the head
    at: int  # where the value begins, counted from the version
    slot: slice  # where it is
    varies: bool  # is there such a field at all? If not, an empty value stands before the empty line
    sent_before: bytes
    sent_after: bytes
    first: Request  # of such a head


class _Meaning:
    """What the fields say that mean something to us, whatever the request line and the fields beside them."""

    __slots__ = (
        "close",
        "dropped",
        "expect",
        "framing",
        "hops",
        "host",
        "keep_alive",
        "length",
        "modern",
        "upgrade",
    )

    close: bool
    keep_alive: bool
    expect: bool
    upgrade: bool
    host: bytes | None
    hops: int  # Max-Forwards, or -1
    length: int
    framing: bytes  # the field that tells the backend the length, with its end
    modern: bytes  # fields for the backend that an HTTP/1.0 client has no say in
    dropped: frozenset[bytes]  # names of further fields that Connection has listed


class Known:
    """What was learnt of lines of fields, shared by all connections that keep to the same limits.

    Clients of one kind send the same lines again and again, and between the requests of one client few change.
    """

    LINES = 1024
    LONGEST = 256  # octets of a line that is remembered
    MEANINGS = 64

    __slots__ = ("meanings", "plain", "telling")

    def __init__(self) -> None:
        self.plain: set[bytes] = set()  # well formed lines that go on as they are
        self.telling: dict[bytes, tuple[bytes, bytes]] = {}  # the others: name and value; no name for one to be dropped
        self.meanings: dict[tuple[bytes, ...], _Meaning] = {}  # of all the telling lines of a head

    def learn(self, line: bytes) -> tuple[bytes, bytes] | None:
        """What a line says: name and value, or None if it is plain. ValueError where it is no field."""
        match = _FIELD_LINE.fullmatch(line)
        if match is None:
            raise ValueError
        name = match[1].lower()
        said = None
        if name in _REQUEST_NAMES:
            said = name, match[2].strip(b" \t")
        elif name.translate(_HYPHENATED) in _REQUEST_NAMES:
            said = b"", b""
        if len(line) <= self.LONGEST:
            if len(self.plain) + len(self.telling) >= self.LINES:
                self.plain.clear()
                self.telling.clear()
            if said is None:
                self.plain.add(line)
            else:
                self.telling[line] = said
        return said


class RequestReader:
    """Reads the request heads of one client, on any number of connections.

    client: the address for X-Forwarded-For. proto: b"http" or b"https". authority: how the client reached us, for
    HTTP/1.0 requests that name no host. known: what lines say, shared by readers of the same limits. trusts: whether
    the client is a proxy whose own X-Forwarded-* are believed and added to. forwarded: whether the field of RFC 7239 is
    written too.
    """

    MOULDS = 4
    """Several browsers may share an address, and one may take turns between methods."""

    __slots__ = (
        "_authority",
        "_blocks",
        "_client",
        "_forwarded",
        "_known",
        "_last",
        "_limits",
        "_moulds",
        "_proto",
        "_request",
        "_suffix",
        "_trusts",
    )

    def __init__(
        self,
        client: bytes,
        proto: bytes,
        authority: bytes,
        limits: HeadLimits,
        known: Known | None = None,
        *,
        trusts: bool = False,
        forwarded: bool = False,
    ) -> None:
        self._client = client
        self._proto = proto
        self._authority = authority
        self._limits = limits
        self._known = Known() if known is None else known
        self._trusts = trusts
        self._forwarded = forwarded
        self._suffix = b"X-Forwarded-For: %b\r\nX-Forwarded-Proto: %b\r\nX-Forwarded-Port: %b\r\nX-Forwarded-Host: " % (
            client,
            proto,
            authority.rpartition(b":")[2],
        )
        self._last: bytes | tuple[()] = ()  # the last head; nothing begins with one of none
        self._request: Request | None = None
        self._moulds: tuple[_Mould, ...] = ()  # the youngest first
        self._blocks: deque[int] = deque(maxlen=self.MOULDS)  # hashes of the last blocks of which no mould was made

    def read(self, buffer: bytes, seen: int = 0) -> tuple[Request, int] | None:
        """The request at the buffer's beginning and the length of its head; None while it is not complete.

        `seen` octets of the buffer were there when the last call returned None, and are not searched again.
        """
        if buffer.startswith(self._last):
            return self._request, len(self._last)  # type: ignore[return-value]
        request = self._of_a_mould(buffer)  # which is mostly one head and no more
        if request is not None:
            return request, len(buffer)
        start = 2 if buffer.startswith(b"\r\n") else 0  # RFC 9112 section 2.2: one empty line is skipped
        end = buffer.find(b"\r\n\r\n", max(start, seen - 3))
        if end < 0:
            self._check_unfinished(buffer, start, seen)
            return None
        head = buffer[start : end + 4]
        if len(head) < len(buffer):
            request = self._of_a_mould(head)
        if request is None:
            request = self._parse(head)
            if not start and len(head) <= REMEMBERED:
                self._last = head
                self._request = request
        return request, end + 4

    def _of_a_mould(self, head: bytes) -> Request | None:
        """The request whose head these octets are, if all of them are known but for a target and a value."""
        if len(head) > self._limits.short:
            return None
        try:
            method, target, rest = head.split(b" ", 2)
        except ValueError:
            return None
        for mould in self._moulds:
            if rest.startswith(mould.before) and rest.endswith(mould.after, mould.at) and head.startswith(mould.start):
                value = rest[mould.slot]
                # A value may hold other octets, too, but hardly ever does: then its head is parsed.
                if (value and not mould.varies) or (target + value).translate(None, _PRINTED):
                    continue
                first = mould.first
                request = Request()
                request.received = head
                request.method = method
                request.line = head[: 8 - len(rest)]  # the rest begins with the version's 8 octets
                request.target = target
                request.minor = first.minor
                request.head = b"".join((method, b" ", target, mould.sent_before, value, mould.sent_after))
                request.length = first.length
                request.idempotent = first.idempotent
                request.plain = first.plain
                request.expect = first.expect
                request.upgrade = first.upgrade
                request.persistent = first.persistent
                request.forwarded_for = first.forwarded_for
                return request
        return None

    def _check_unfinished(self, buffer: bytes, start: int, seen: int) -> None:
        """Refuse as soon as it is clear that no whole head can come of it."""
        line_end = buffer.find(b"\r\n", start)
        if line_end == start:
            raise HttpError(400, "more than one empty line before the request line")
        if (len(buffer) - buffer.endswith(b"\r") if line_end < 0 else line_end) - start > self._limits.line:
            raise HttpError(414, "the request line is too long")
        if len(buffer) - start > self._limits.head:
            raise HttpError(431, "the head is too large")
        if _LONE.search(buffer, max(start, seen - 1)):
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

        fields, meaning, claims, varies = self._understand(head[line_end:-2])
        if meaning.length == CHUNKED and minor == 0:
            raise HttpError(400, "Transfer-Encoding in HTTP/1.0")
        if meaning.host is None and minor:
            raise HttpError(400, "HTTP/1.1 without a Host field")
        host = meaning.host or self._authority
        absolute = target[:1] != b"/"
        if absolute:
            target, named = _origin_form(method, target)
            host = host if named is None else named
        if meaning.hops >= 0 and method in (b"TRACE", b"OPTIONS"):
            fields = _one_hop_less(method, fields, meaning.hops)

        request = Request()
        request.received = head
        request.method = method
        request.line = line
        request.target = target
        request.minor = minor
        ending = self._ending(meaning, claims, host, minor)
        request.head = b"".join((method, b" ", target, b" HTTP/1.1\r\nHost: ", host, fields, ending))
        request.length = meaning.length
        request.idempotent = method in IDEMPOTENT
        request.plain = minor == 1 and method != b"HEAD"
        request.expect = meaning.expect and minor == 1
        request.upgrade = meaning.upgrade and minor == 1
        request.persistent = not meaning.close and (minor == 1 or meaning.keep_alive)
        request.forwarded_for = claims.get(b"x-forwarded-for", b"")
        if varies is not None and not absolute and len(head) <= self._limits.short:
            self._moulds = (_mould(request, varies, len(ending)), *self._moulds[: self.MOULDS - 1])
        return request

    def _understand(self, block: bytes) -> tuple[bytes, _Meaning, dict[bytes, bytes], bytes | None]:
        """What of a block of fields goes on unchanged, what the block means, and what it says of who asks whom.

        The last tells what blocks may come next: this one with another value in the line that is told, which nobody had
        seen before; or, where that is b"", just this one, which is here again; None where there is nothing to expect.
        """
        lines = block.split(b"\r\n")  # with nothing before the first CRLF, and nothing after the last
        if len(lines) - 2 > self._limits.fields:
            raise HttpError(431, "too many fields")
        known = self._known
        telling, new = [], []
        claims: dict[bytes, bytes] = {}
        for line in filterfalse(known.plain.__contains__, lines[1:-1]):
            try:
                said = known.telling.get(line) or known.learn(line)
            except ValueError:
                raise HttpError(400, _what_is_wrong(block)) from None
            if said is None:
                new.append(line)
                continue
            name, value = said
            if name != b"max-forwards":
                lines.remove(line)
            if name in _FORWARDED:
                if self._trusts:
                    claims[name] = b"%b, %b" % (claims[name], value) if claims.get(name) else value
            elif name:
                telling.append(line)
        meaning = known.meanings.get(key := tuple(telling))
        if meaning is None:
            meaning = _meaning(known.telling.get(line) or known.learn(line) for line in telling)
            if len(known.meanings) >= known.MEANINGS:
                known.meanings.clear()
            if sum(map(len, key)) <= known.LONGEST:
                known.meanings[key] = meaning
        fields = b"\r\n".join(lines)
        if meaning.dropped:
            fields = _without(fields, meaning.dropped)
        elif len(new) == 1:
            return fields, meaning, claims, new[0]
        elif hash(block) in self._blocks:
            return fields, meaning, claims, b""
        self._blocks.append(hash(block))
        return fields, meaning, claims, None

    def _ending(self, meaning: _Meaning, claims: dict[bytes, bytes], host: bytes, minor: int) -> bytes:
        """All of the backend's head that follows the fields that go on unchanged."""
        modern = meaning.modern if minor else b""
        via = b"\r\nVia: 1.1 lb\r\n\r\n" if minor else b"\r\nVia: 1.0 lb\r\n\r\n"
        return b"".join((meaning.framing, modern, self._forwarding(claims, host), via))

    def _forwarding(self, claims: dict[bytes, bytes], host: bytes) -> bytes:
        """The fields that tell the backend who asks, without the last line's end."""
        if not claims and not self._forwarded:
            return self._suffix + host
        given = claims.get
        before = given(b"x-forwarded-for")
        lines = [
            b"X-Forwarded-For: %b" % (b"%b, %b" % (before, self._client) if before else self._client),
            b"X-Forwarded-Proto: %b" % given(b"x-forwarded-proto", self._proto),
            b"X-Forwarded-Port: %b" % given(b"x-forwarded-port", self._authority.rpartition(b":")[2]),
            b"X-Forwarded-Host: %b" % given(b"x-forwarded-host", host),
        ]
        if self._forwarded:
            element = forwarded_element(self._client, host, self._proto)
            before = given(b"forwarded")
            lines.append(b"Forwarded: %b" % (b"%b, %b" % (before, element) if before else element))
        return b"\r\n".join(lines)


def _mould(request: Request, line: bytes, ending: int) -> _Mould:
    """The mould of this request, in which this line varies, none if it is b"".

    In what a backend is sent, `ending` octets follow the fields that go on.
    """
    mould = _Mould()
    mould.start = request.method + b" /"
    mould.varies = line != b""
    skipped = len(request.method) + 1 + len(request.target)
    before, mould.after = _around_value(request.received, line, 2)
    mould.before = before[skipped + 1 :]
    mould.at = len(mould.before)
    mould.slot = slice(mould.at, -len(mould.after))
    before, mould.sent_after = _around_value(request.head, line, ending)
    mould.sent_before = before[skipped:]
    mould.first = request
    return mould


def _around_value(head: bytes, line: bytes, ending: int) -> tuple[bytes, bytes]:
    """A head before and behind the value of this line of its fields, which so many octets follow."""
    begin = head.rindex(b"\r\n" + line + b"\r\n" if line else b"\r\n", 0, -ending) + 2
    return head[: begin + line.find(b":") + 1], head[begin + len(line) :]


def _meaning(said: Iterable[tuple[bytes, bytes] | None]) -> _Meaning:
    """What the telling lines of a head say together. HttpError where that is not allowed, or not one thing."""
    meaning = _Meaning()
    meaning.host = None
    meaning.expect = False
    meaning.hops = -1
    options: list[bytes] = []
    upgrades: list[bytes] = []
    lengths: list[bytes] = []
    codings: list[bytes] = []
    for name, value in filter(None, said):
        if name == b"host":
            if meaning.host is not None:
                raise HttpError(400, "two Host fields")
            meaning.host = _host(value)
        elif name == b"connection":
            options += _list(value.lower())
        elif name == b"content-length":
            lengths.append(value)
        elif name == b"transfer-encoding":
            codings += value.lower().split(b",")
        elif name == b"expect":
            if value.lower() != b"100-continue":
                raise HttpError(417, "the only expectation known is 100-continue")
            meaning.expect = True
        elif name == b"upgrade":
            # HTTP/2 in clear text is not passed on: what came after it would be read by nobody here.
            upgrades += [protocol for protocol in _list(value) if protocol.lower() != b"h2c"]
        elif name == b"max-forwards" and _DIGITS.fullmatch(value):
            meaning.hops = int(value) if meaning.hops < 0 else min(meaning.hops, int(value))
    meaning.close = b"close" in options
    meaning.keep_alive = b"keep-alive" in options
    meaning.upgrade = b"upgrade" in options and upgrades != []
    meaning.modern = b"Expect: 100-continue\r\n" if meaning.expect else b""
    if meaning.upgrade:
        meaning.modern += b"Connection: Upgrade\r\nUpgrade: %b\r\n" % b", ".join(upgrades)
    meaning.length = 0
    meaning.framing = b""
    if codings:
        meaning.length = _transfer_coding(codings, lengths)
        meaning.framing = b"Transfer-Encoding: chunked\r\n"
    elif lengths:
        meaning.length = _content_length(lengths)
        meaning.framing = b"Content-Length: %d\r\n" % meaning.length
    meaning.dropped = frozenset(options) - _REQUEST_STAYS
    return meaning


def forwarded_element(client: bytes, host: bytes, proto: bytes) -> bytes:
    """What we know, as an element of the Forwarded field (RFC 7239 section 4); a colon takes quotes."""
    node = b'"[%b]"' % client if b":" in client else client
    return b'for=%b;host="%b";proto=%b' % (node, host, proto)


class Answer:
    """A backend's final or interim head, and what the client is sent for it. Never changed after it was made."""

    __slots__ = ("closing", "dated", "fields", "length", "line", "plain", "reusable", "status")

    status: int
    line: bytes  # the status line for the client, without its CRLF
    fields: bytes  # the fields for the client, from the CRLF before the first to the CRLF after the last
    length: int  # octets of the body, CHUNKED or UNTIL_CLOSE; what HEAD, 204 and 304 say of it is in here too
    dated: bool
    plain: bytes  # the whole head for a client whose connection stays; empty where that takes more thought
    closing: bytes  # the same where the client's connection does not stay
    reusable: bool  # may the backend's connection be used again?


class AnswerReader:
    """Reads the answer heads of one backend.

    head    the last one, which `answer` stands for; nothing begins with one of none
    whole   octets of a message with that head, where all there is to do with it is to pass it on; else -1
    """

    __slots__ = ("_limits", "answer", "head", "whole")

    def __init__(self, limits: HeadLimits) -> None:
        self._limits = limits
        self.head: bytes | tuple[()] = ()
        self.whole = -1
        self.answer: Answer | None = None

    def read(self, buffer: bytes, seen: int = 0) -> tuple[Answer, int] | None:
        """The answer at the buffer's beginning and the length of its head; None while it is not complete.

        `seen` octets of the buffer were there when the last call returned None, and are not searched again.
        """
        if buffer.startswith(self.head):
            return self.answer, len(self.head)  # type: ignore[return-value]
        end = buffer.find(b"\r\n\r\n", max(0, seen - 3))
        if (end + 4 if end >= 0 else len(buffer)) > self._limits.head:
            raise BadAnswer("the backend's head is too large")
        if end < 0:
            if not buffer.startswith(b"HTTP/1."[: len(buffer)]):
                raise BadAnswer("the backend does not speak HTTP/1.1")
            if _LONE.search(buffer, max(0, seen - 1)):
                raise BadAnswer("a line of the backend's head does not end in CRLF, or holds a NUL")
            return None
        head = buffer[: end + 4]
        self.answer = answer = self._parse(head)
        self.head = head
        self.whole = len(head) + answer.length if answer.plain else -1
        return answer, end + 4

    def _parse(self, head: bytes) -> Answer:
        line_end = head.find(b"\r\n")
        match = _STATUS_LINE.fullmatch(head, 0, line_end)
        if match is None:
            raise BadAnswer("malformed status line from the backend")
        minor_digit, status = match.groups()
        answer = Answer()
        answer.status = int(status)
        # The space behind the status stands even where no reason follows (RFC 9112 section 4).
        answer.line = b"HTTP/1.1" + head[8:line_end] if line_end > 12 else b"HTTP/1.1 %b " % status
        try:
            self._parse_fields(answer, head[line_end:-2], modern=minor_digit != b"0")
        except HttpError as error:
            raise BadAnswer(f"in the backend's answer: {error.reason}") from None
        if answer.length >= 0 and answer.dated and answer.status >= 200 and answer.status not in (204, 304):
            head = b"%b%bContent-Length: %d\r\n" % (answer.line, answer.fields, answer.length)
            answer.plain = head + b"\r\n"
            answer.closing = head + b"Connection: close\r\n\r\n"
        else:
            answer.plain = answer.closing = b""
        return answer

    def _parse_fields(self, answer: Answer, block: bytes, *, modern: bool) -> None:
        _check_block(block, self._limits.fields)
        answer.dated = b"\r\nDate:" in block or b"\r\ndate:" in block.lower()
        options: list[bytes] = []
        upgrades: list[bytes] = []
        lengths: list[bytes] = []
        codings: list[bytes] = []
        parts = iter(_ANSWER_FIELD.split(block))
        kept = [next(parts)]
        for spelt, value, following in zip(parts, parts, parts):  # noqa: B905 - the pattern's groups see to it
            name = spelt.lower()
            if name not in _ANSWER_NAMES:
                kept += (b"\r\n", spelt, b":", value)
            elif name == b"connection":
                options += _list(value.lower())
            elif name == b"content-length":
                lengths.append(value.strip(b" \t"))
            elif name == b"transfer-encoding":
                codings += value.lower().split(b",")
            elif name == b"upgrade":
                upgrades += _list(value)
            kept.append(following)
        if codings:
            if not modern:
                raise HttpError(400, "Transfer-Encoding in HTTP/1.0")
            answer.length = _transfer_coding(codings, lengths)
        else:
            answer.length = _content_length(lengths) if lengths else UNTIL_CLOSE
        answer.reusable = b"close" not in options and (modern or b"keep-alive" in options)
        answer.fields = b"".join(kept)
        if not _ANSWER_STAYS.issuperset(options):
            answer.fields = _without(answer.fields, set(options) - _ANSWER_STAYS)
        # The two answers that are about a protocol name it (RFC 9110 sections 15.2.2 and 15.5.22).
        if answer.status == 101 and not upgrades:
            raise HttpError(400, "a 101 without an Upgrade field")
        if answer.status in (101, 426) and upgrades:
            answer.fields += b"Connection: Upgrade\r\nUpgrade: %b\r\n" % b", ".join(upgrades)


def answer_head(
    answer: Answer,
    framing: int | None,
    minor: int,
    persistent: bool,
    now: float,
    request_id: str = "",
    fields: bytes = b"",
) -> bytes:
    """The head that goes to the client: framing None writes no framing field; `minor` is of the client's version.

    A request id of ours is named where there is one, unless the backend has one of its own. `fields` are further lines,
    each with its end.
    """
    parts = [answer.line, answer.fields, fields]
    if request_id and b"\nx-request-id:" not in b"\n" + answer.fields.lower():
        parts.append(b"X-Request-Id: %b\r\n" % request_id.encode())
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


def interim_head(answer: Answer, fields: bytes = b"") -> bytes:
    """A 1xx head for the client, with further lines of ours, each with its end."""
    return b"%b%b%b\r\n" % (answer.line, answer.fields, fields)


def own_answer(
    status: int,
    reason: str,
    code: str,
    request_id: str,
    now: float,
    *,
    persistent: bool,
    minor: int = 1,
    body: bool = True,
    fields: Sequence[str] = (),
) -> bytes:
    """An answer of our own: short, readable, dated, with the log's code and id. `body` is False for HEAD.

    `fields` are further lines of its head.
    """
    phrase = HTTPStatus(status).phrase
    text = f"{status} {phrase}: {reason}\ncode: {code}, request id: {request_id}\n".encode("ascii", "backslashreplace")
    lines = [
        f"HTTP/1.1 {status} {phrase}",
        f"Date: {http_date(now).decode()}",
        "Content-Type: text/plain; charset=utf-8",
        f"Content-Length: {len(text)}",
        f"X-Request-Id: {request_id}",
        *fields,
    ]
    if status == 503:
        lines.append("Retry-After: 1")
    if status in (200, 405):
        lines.append("Allow: GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS")
    if not persistent:
        lines.append("Connection: close")
    elif minor == 0:
        lines.append("Connection: keep-alive")
    return "\r\n".join([*lines, "", ""]).encode() + (text if body else b"")


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
    # Without its text a good block is line ends alone, as many as there are fields and one. The pattern looks at names
    # and at what follows a CR: no lone LF or control octet passes the one, no lone CR the other.
    ends = block.translate(None, _TEXT)
    lines = len(ends) // 2
    if lines - 1 > most:
        raise HttpError(431, "too many fields")
    if ends != b"\r\n" * lines or _BLOCK.fullmatch(block) is None:
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


def _host(value: bytes) -> bytes:
    """The value of a Host field or a target's authority, once it is known to be one (RFC 3986 section 3.2.2)."""
    match = _HOST.fullmatch(value)
    if match is None or (match[1] is not None and not _is_ipv6(match[1])):
        raise HttpError(400, "Host is not a host")
    return value


def _is_ipv6(address: bytes) -> bool:
    try:
        IPv6Address(address.decode())
    except ValueError:
        return False
    return True


def _origin_form(method: bytes, target: bytes) -> tuple[bytes, bytes | None]:
    """The target for the backend, and the host that an absolute-form target names (RFC 9112 section 3.2)."""
    if target == b"*" and method == b"OPTIONS":
        return target, None
    match = _ABSOLUTE.fullmatch(target)
    if match is None:
        raise HttpError(400, "the target is neither a path nor an absolute http URL")
    host, path = match.groups()
    _host(host)
    if not path:
        return (b"*" if method == b"OPTIONS" else b"/"), host
    return (path if path[:1] == b"/" else b"/" + path), host


def _one_hop_less(method: bytes, fields: bytes, hops: int) -> bytes:
    """Max-Forwards counted down. At zero we are the last recipient (RFC 9110 section 7.6.2).

    As such we say what is offered; a TRACE is not sent back, since it may hold what its sender's scripts must not read.
    """
    if hops == 0:
        raise HttpError(200 if method == b"OPTIONS" else 405, "Max-Forwards is 0: the request ends here")
    return re.sub(rb"(?i)(\r\nmax-forwards:)[^\r]*", b"\\1 %d" % (hops - 1), fields)


def _list(value: bytes) -> list[bytes]:
    return [item for part in value.split(b",") if (item := part.strip(b" \t"))]


def _content_length(values: list[bytes]) -> int:
    if len(values) > 1 or not _DIGITS.fullmatch(values[0]):
        raise HttpError(400, "Content-Length is not one number in digits")
    return int(values[0])


def _transfer_coding(codings: list[bytes], lengths: list[bytes]) -> int:
    codings = [coding.strip(b" \t") for coding in codings]
    if lengths:
        raise HttpError(400, "Transfer-Encoding beside Content-Length")
    if codings[-1] != b"chunked" or codings.count(b"chunked") > 1 or b"" in codings:
        raise HttpError(400, "chunked is not the last transfer coding, or is named twice")
    if len(codings) > 1:
        raise HttpError(501, "a transfer coding other than chunked")
    return CHUNKED


def _without(block: bytes, names: Set[bytes]) -> bytes:
    """The block without the fields of these names, which are in lower case."""
    return _ANY_FIELD.sub(lambda field: b"" if field[1].lower() in names else field[0], block)
