"""Messages for tests: the hostile ones of data/http, every way octets can arrive, and readers that nobody here wrote.

A file of data/http is one message, octet for octet, named for what is wrong with it. The tables say which section of
RFC 9110 (S) or 9112 (M) it breaks and which status a client is given for it. Those that are too long for a file are
made in the tests.
"""

from __future__ import annotations

import http.client
import io
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import NamedTuple

from fakes import Lent

FILES = Path(__file__).parent / "data" / "http"


class Hostile(NamedTuple):
    """A message that breaks the rules."""

    section: str
    name: str
    status: int
    octets: bytes

    def __str__(self) -> str:
        return f"{self.section} {self.name}"


def _load(table: dict[tuple[str, int], str]) -> list[Hostile]:
    return [
        Hostile(section, name, status, (FILES / f"{name}.http").read_bytes())
        for (section, status), names in table.items()
        for name in names.split()
    ]


_REFUSED: dict[tuple[str, int], str] = {
    ("M 2.2", 400): (
        "lone_lf_line_ends lone_lf_after_request_line lone_lf_after_field lone_lf_before_empty_line "
        "lone_cr_in_value lone_cr_before_crlf lone_cr_in_name lone_cr_in_request_line lone_cr_before_request_line "
        "lone_lf_before_request_line lone_cr_and_lone_lf_apart lf_before_cr nul_in_value nul_in_name "
        "nul_in_target two_empty_lines_first space_before_first_field tab_before_first_field "
        "line_of_blanks_before_first_field tls_client_hello"
    ),
    ("M 3.2", 400): (
        "space_in_target tab_in_target tab_between_words two_spaces_before_target two_spaces_before_version "
        "space_before_method space_after_version control_in_target vertical_tab_in_target del_in_target "
        "octet_above_ascii_in_target fragment_in_target no_target no_version method_that_is_no_token no_method "
        "target_without_slash target_that_is_a_query no_host two_hosts two_hosts_alike two_hosts_in_http_1_0 "
        "host_empty host_of_blanks host_with_space host_list host_with_userinfo host_with_path host_with_scheme "
        "host_with_backslash host_with_quotes host_with_octet_above_ascii host_port_of_letters host_port_negative "
        "host_port_too_long host_of_port_alone host_with_two_ports host_half_escaped host_ipv6_unclosed "
        "host_ipv6_without_brackets host_ipv6_of_dots host_ipv6_too_long host_ipv6_then_text host_folded"
    ),
    ("M 3.2.4", 400): "asterisk_for_get",
    ("M 3.2.2", 400): (
        "target_of_another_scheme target_without_host target_with_userinfo target_with_backslash_in_host "
        "target_with_port_of_letters absolute_target_without_host_field absolute_target_with_bad_host_field"
    ),
    ("M 3.2.3", 405): "connect",
    ("S 6.2", 505): "http_2_0 http_2_preface http_0_9 http_3_0",
    ("M 2.3", 400): "version_in_lower_case version_of_two_digits version_without_minor version_of_another_protocol",
    ("M 5.1", 400): (
        "space_before_colon tab_before_colon space_before_colon_of_content_length "
        "space_before_colon_of_transfer_encoding"
    ),
    ("M 5.2", 400): "folded_with_space folded_with_tab folded_blank_line folded_transfer_encoding",
    ("S 5.1", 400): (
        "name_empty name_with_space name_with_parenthesis name_with_slash name_in_quotes "
        "name_with_octet_above_ascii name_with_control field_without_colon"
    ),
    ("S 5.5", 400): "control_in_value vertical_tab_in_value form_feed_in_value escape_in_value del_in_value",
    ("M 6.1", 400): (
        "te_and_cl cl_and_te te_and_cl_of_zero te_other_than_chunked_and_cl te_in_http_1_0 "
        "te_vertical_tab_before_chunked te_nul_after_chunked te_no_break_space_before_chunked"
    ),
    ("M 6.3", 400): (
        "te_chunked_twice te_chunked_in_two_fields te_chunked_then_identity "
        "te_chunked_then_identity_in_two_fields te_chunked_then_gzip te_gzip te_identity te_empty te_comma_last "
        "te_comma_first te_chunked_with_parameter te_chunked_in_quotes te_xchunked te_chunked_and_more cl_plus "
        "cl_minus cl_hex cl_underscore cl_list cl_list_that_differs cl_comma cl_empty cl_blanks cl_two_numbers "
        "cl_point cl_exponent cl_letters cl_in_quotes cl_twenty_digits cl_leading_vertical_tab cl_semicolon "
        "cl_superscript cl_arabic_digit cl_two_that_differ cl_two_alike cl_two_in_other_case"
    ),
    ("M 6.1", 501): "te_gzip_then_chunked te_identity_then_chunked te_gzip_then_chunked_in_two_fields",
    ("S 10.1.1", 417): "expect_something_else expect_list expect_empty",
}
_CHUNKED: dict[tuple[str, int], str] = {
    ("M 7.1", 400): (
        "chunk_size_plus chunk_size_minus chunk_size_0x chunk_size_underscore chunk_size_blank_before "
        "chunk_size_blank_after chunk_size_tab_after chunk_size_missing chunk_size_extension_alone "
        "chunk_size_letters chunk_size_17_digits chunk_size_17_digits_of_zero chunk_size_two_numbers "
        "chunk_size_comma chunk_line_lone_lf chunk_line_lone_cr chunk_line_cr_cr_lf chunk_line_nul "
        "chunk_data_longer chunk_data_shorter chunk_data_ended_by_junk chunk_data_ended_by_lf "
        "chunk_data_ended_by_cr chunk_data_not_ended chunk_last_ended_by_lf chunk_last_not_ended "
        "chunk_last_ended_by_cr_alone"
    ),
    ("M 7.1.1", 400): (
        "chunk_extension_lone_lf chunk_extension_lone_cr chunk_extension_nul chunk_extension_without_semicolon"
    ),
    ("M 7.1.2", 400): (
        "chunk_trailer_without_colon chunk_trailer_space_before_colon chunk_trailer_folded chunk_trailer_lone_lf "
        "chunk_trailer_lone_cr chunk_trailer_nul chunk_trailer_name_that_is_no_token"
    ),
}
_ANSWERS: dict[tuple[str, int], str] = {
    ("M 6.3", 502): (
        "answer_cl_plus answer_cl_list answer_cl_letters answer_cl_empty answer_cl_two_that_differ "
        "answer_cl_two_alike answer_cl_twenty_digits answer_te_and_cl answer_te_twice answer_te_gzip "
        "answer_te_gzip_then_chunked answer_te_vertical_tab_before_chunked answer_cl_bad_on_204"
    ),
    ("M 6.1", 502): "answer_te_in_http_1_0",
    ("M 2.2", 502): (
        "answer_lone_lf_line_ends answer_lone_lf_after_field answer_lone_cr_in_value answer_nul_in_value "
        "answer_lone_lf_first answer_empty_line_first answer_space_before_first_field"
    ),
    ("M 5.2", 502): "answer_folded",
    ("M 5.1", 502): "answer_space_before_colon answer_space_before_colon_of_content_length",
    ("S 5.1", 502): "answer_name_empty answer_name_with_space answer_field_without_colon",
    ("S 5.5", 502): "answer_control_in_value",
    ("M 4", 502): (
        "answer_version_2 answer_version_lower_case answer_version_two_digits answer_status_of_two_digits "
        "answer_status_of_four_digits answer_status_of_letters answer_status_missing answer_status_below_100 "
        "answer_status_above_599 answer_two_spaces_before_status answer_control_in_reason answer_garbage "
        "answer_http_0_9"
    ),
    ("S 15.2.2", 502): "answer_switch_without_upgrade",
}

HOSTILE_HEADS = _load(_REFUSED)
"""Requests that are refused for their head, whatever body they have."""

HOSTILE_BODIES = _load(_CHUNKED)
"""Requests with a good head whose chunks are no chunks."""

HOSTILE_ANSWERS = _load(_ANSWERS)
"""What a backend may say and no client is to see."""


def head(*lines: str) -> bytes:
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def forwarded(lines: Sequence[str], *, minor: int, client: str, port: int) -> bytes:
    """What a backend is sent: these lines, of which the second names the host, and what is added to every request."""
    return head(
        *lines,
        f"X-Forwarded-For: {client}",
        "X-Forwarded-Proto: http",
        f"X-Forwarded-Port: {port}",
        f"X-Forwarded-Host: {lines[1].removeprefix('Host: ')}",
        f"Via: 1.{minor} lb",
    )


SAME: list[str] = []


class Rewritten(NamedTuple):
    """A good request's lines and those of what a backend is sent for it, without what is added to every request."""

    name: str  # the section, and what it shows
    lines: list[str]
    sent: list[str]  # SAME where they do not differ

    def __str__(self) -> str:
        return self.name

    @property
    def forwarded(self) -> list[str]:
        return self.sent or self.lines

    @property
    def minor(self) -> int:
        return 0 if self.lines[0].endswith("1.0") else 1


REWRITTEN = [
    Rewritten(
        "M 2.3 our own version",
        ["GET / HTTP/1.0", "Host: a.test"],
        ["GET / HTTP/1.1", "Host: a.test"],
    ),
    Rewritten(
        "M 2.3 a later minor version",
        ["GET / HTTP/1.9", "Host: a.test"],
        ["GET / HTTP/1.1", "Host: a.test"],
    ),
    Rewritten(
        "M 2.2 one empty line is skipped",
        ["", "GET / HTTP/1.1", "Host: a.test"],
        ["GET / HTTP/1.1", "Host: a.test"],
    ),
    Rewritten(
        "M 3.2 HTTP/1.0 without Host",
        ["GET / HTTP/1.0"],
        ["GET / HTTP/1.1", "Host: lb.test:8080"],
    ),
    Rewritten(
        "M 3.2.1 path and query, octet for octet",
        ['GET //a/../%2e%2F?q=%00&"<>\\^`{|}\'"[]!$;?/ HTTP/1.1', "Host: a.test"],
        SAME,
    ),
    Rewritten(
        "M 3.2.2 absolute target over Host",
        ["GET http://b.test:81/p?q HTTP/1.1", "Host: a.test"],
        ["GET /p?q HTTP/1.1", "Host: b.test:81"],
    ),
    Rewritten(
        "M 3.2.2 absolute target without a path",
        ["GET HTTPS://b.test?q HTTP/1.1", "Host: a.test"],
        ["GET /?q HTTP/1.1", "Host: b.test"],
    ),
    Rewritten(
        "M 3.2.2 absolute target in HTTP/1.0",
        ["GET http://b.test HTTP/1.0"],
        ["GET / HTTP/1.1", "Host: b.test"],
    ),
    Rewritten(
        "M 3.2.4 asterisk",
        ["OPTIONS * HTTP/1.1", "Host: a.test"],
        SAME,
    ),
    Rewritten(
        "M 3.2.4 absolute OPTIONS without a path",
        ["OPTIONS http://b.test HTTP/1.1", "Host: a.test"],
        ["OPTIONS * HTTP/1.1", "Host: b.test"],
    ),
    Rewritten(
        "M 3.2 IPv6 host",
        ["GET / HTTP/1.1", "hOST:[2001:db8::1]:80 \t"],
        ["GET / HTTP/1.1", "Host: [2001:db8::1]:80"],
    ),
    Rewritten(
        "M 3.2 host with every sign",
        ["GET / HTTP/1.1", "Host: a-b._~!$&'()*+,;=%41:"],
        SAME,
    ),
    Rewritten(
        "S 5.1 fields go on as they came",
        ["GET / HTTP/1.1", "Host: a.test", "a:", "X-A:  1\t", "Set_It: é", "Cookie: a=b; c", "!#$%&'*+.^_`|~0: x"],
        SAME,
    ),
    Rewritten(
        "S 5.3 the order of those of one name",
        ["GET / HTTP/1.1", "Host: a.test", "A: 1", "B: 2", "a: 3", "A: 1"],
        SAME,
    ),
    Rewritten(
        "S 5.1 names that nearly mean something",
        ["GET / HTTP/1.1", "Host: a.test", "Hos: 1", "Tee: 1", "X-Forwarded: 1", "Upgrade-Insecure-Requests: 1"],
        SAME,
    ),
    Rewritten(
        "S 7.6.1 hop-by-hop fields",
        [
            "GET / HTTP/1.1",
            "Host: a.test",
            "A: 1",
            "Connection: keep-alive",
            "Keep-Alive: 5",
            "Proxy-Connection: close",
            "TE: trailers",
            "Trailer: X",
            "B: 2",
        ],
        ["GET / HTTP/1.1", "Host: a.test", "A: 1", "B: 2"],
    ),
    Rewritten(
        "S 7.6.1 fields that Connection names",
        [
            "GET / HTTP/1.1",
            "X-A: 1",
            "Host: a.test",
            "B: 2",
            "connection: x-a ,, Close",
            "x-a: 3",
            "CONNECTION: c",
            "C: 4",
        ],
        ["GET / HTTP/1.1", "Host: a.test", "B: 2"],
    ),
    Rewritten(
        "S 7.6.1 Connection: Host",
        ["GET / HTTP/1.1", "Connection: Host", "Host: a.test"],
        ["GET / HTTP/1.1", "Host: a.test"],
    ),
    Rewritten(
        "S 7.6.1 Connection: Content-Length",
        ["GET / HTTP/1.1", "Host: a.test", "Connection: Content-Length", "Content-Length: 5"],
        ["GET / HTTP/1.1", "Host: a.test", "Content-Length: 5"],
    ),
    Rewritten(
        "S 7.6.1 Connection: Transfer-Encoding",
        ["GET / HTTP/1.1", "Host: a.test", "Connection: Transfer-Encoding", "Transfer-Encoding: chunked"],
        ["GET / HTTP/1.1", "Host: a.test", "Transfer-Encoding: chunked"],
    ),
    Rewritten(
        "S 7.6.1 Connection: close, X-Forwarded-For",
        ["GET / HTTP/1.1", "Host: a.test", "Connection: close, X-Forwarded-For, Via", "X-Forwarded-For: 1"],
        ["GET / HTTP/1.1", "Host: a.test"],
    ),
    Rewritten(
        "S 7.6.1 Connection: Expect, Max-Forwards",
        [
            "GET / HTTP/1.1",
            "Host: a.test",
            "Connection: Expect, Max-Forwards",
            "Expect: 100-continue",
            "Max-Forwards: 1",
        ],
        ["GET / HTTP/1.1", "Host: a.test", "Max-Forwards: 1", "Expect: 100-continue"],
    ),
    Rewritten(
        "S 7.6.3 Via is added to",
        ["GET / HTTP/1.1", "Host: a.test", "Via: 1.0 fred"],
        SAME,
    ),
    Rewritten(
        "S 7.6.2 Max-Forwards on OPTIONS",
        ["OPTIONS * HTTP/1.1", "Host: a.test", "max-forwards: 10 ", "A: 1"],
        ["OPTIONS * HTTP/1.1", "Host: a.test", "max-forwards: 9", "A: 1"],
    ),
    Rewritten(
        "S 7.6.2 Max-Forwards on TRACE",
        ["TRACE / HTTP/1.1", "Host: a.test", "Max-Forwards: 1"],
        ["TRACE / HTTP/1.1", "Host: a.test", "Max-Forwards: 0"],
    ),
    Rewritten(
        "S 7.6.2 Max-Forwards twice: the smaller holds",
        ["TRACE / HTTP/1.1", "Host: a.test", "Max-Forwards: 3", "Max-Forwards: 9"],
        ["TRACE / HTTP/1.1", "Host: a.test", "Max-Forwards: 2", "Max-Forwards: 2"],
    ),
    Rewritten(
        "S 7.6.2 Max-Forwards on others",
        ["GET / HTTP/1.1", "Host: a.test", "Max-Forwards: 0"],
        SAME,
    ),
    Rewritten(
        "X-Forwarded-* and Forwarded are replaced",
        [
            "GET / HTTP/1.1",
            "Host: a.test",
            "X-Forwarded-For: 1",
            "x-forwarded-proto: https",
            "X-FORWARDED-HOST: h",
            "X-Forwarded-Port: 1",
            "Forwarded: for=1",
        ],
        ["GET / HTTP/1.1", "Host: a.test"],
    ),
    Rewritten(
        "X_Forwarded_For would be taken for ours",
        ["GET / HTTP/1.1", "Host: a.test", "X_Forwarded_For: 1", "X-Forwarded_For: 1", "x.forwarded.host: 1"],
        ["GET / HTTP/1.1", "Host: a.test"],
    ),
    Rewritten(
        "Content_Length would be taken for Content-Length",
        ["GET / HTTP/1.1", "Host: a.test", "Content_Length: 5", "Transfer_Encoding: chunked", "Content-Length: 3"],
        ["GET / HTTP/1.1", "Host: a.test", "Content-Length: 3"],
    ),
    Rewritten(
        "other names with _ beside the same with -",
        ["GET / HTTP/1.1", "Host: a.test", "X-User: a", "X_User: b"],
        SAME,
    ),
    Rewritten(
        "M 6.1 chunked",
        ["GET / HTTP/1.1", "Host: a.test", "transfer-encoding: CHUNKED", "A: 1"],
        ["GET / HTTP/1.1", "Host: a.test", "A: 1", "Transfer-Encoding: chunked"],
    ),
    Rewritten(
        "M 6.2 a length is written anew",
        ["GET / HTTP/1.1", "Host: a.test", "content-length:0005\t", "A: 1"],
        ["GET / HTTP/1.1", "Host: a.test", "A: 1", "Content-Length: 5"],
    ),
    Rewritten(
        "M 6.2 a length of zero",
        ["GET / HTTP/1.1", "Host: a.test", "Content-Length: 0"],
        SAME,
    ),
    Rewritten(
        "S 10.1.1 Expect",
        ["GET / HTTP/1.1", "Host: a.test", "expect: 100-Continue", "Content-Length: 5"],
        ["GET / HTTP/1.1", "Host: a.test", "Content-Length: 5", "Expect: 100-continue"],
    ),
    Rewritten(
        "S 10.1.1 Expect in HTTP/1.0",
        ["GET / HTTP/1.0", "Host: a.test", "Expect: 100-continue", "Content-Length: 5"],
        ["GET / HTTP/1.1", "Host: a.test", "Content-Length: 5"],
    ),
    Rewritten(
        "S 7.8 Upgrade",
        ["GET / HTTP/1.1", "Host: a.test", "Connection: Upgrade, a", "Upgrade: websocket, foo/2", "B: 1"],
        ["GET / HTTP/1.1", "Host: a.test", "B: 1", "Connection: Upgrade", "Upgrade: websocket, foo/2"],
    ),
    Rewritten(
        "S 7.8 Upgrade that Connection does not name",
        ["GET / HTTP/1.1", "Host: a.test", "Upgrade: websocket"],
        ["GET / HTTP/1.1", "Host: a.test"],
    ),
    Rewritten(
        "S 7.8 Upgrade in HTTP/1.0",
        ["GET / HTTP/1.0", "Host: a.test", "Connection: Upgrade", "Upgrade: websocket"],
        ["GET / HTTP/1.1", "Host: a.test"],
    ),
    Rewritten(
        "S 7.8 Upgrade to HTTP/2",
        ["GET / HTTP/1.1", "Host: a.test", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AA"],
        ["GET / HTTP/1.1", "Host: a.test"],
    ),
]


def arrivals(octets: bytes) -> Iterator[list[bytes]]:
    """Every way in which octets can come: whole, one by one, and in two pieces, cut at each position."""
    yield [octets]
    yield [octets[i : i + 1] for i in range(len(octets))]
    for cut in range(1, len(octets)):
        yield [octets[:cut], octets[cut:]]


class Read(NamedTuple):
    """A message as a reader of the standard library understood it. Names are in lower case, in their order."""

    start: tuple[str, str]  # method and target, or status and reason
    fields: list[tuple[str, str]]
    body: bytes
    rest: bytes  # what stands behind it

    def values(self, name: str) -> list[str]:
        return [value for other, value in self.fields if other == name]


class NotRead(Exception):
    """The reader refuses the octets, or they are not all of a message."""


def read_head_by_http_server(octets: bytes) -> Read:
    """The request's head that begins these octets, as http.server reads it; all that follows is in `rest`."""
    if b"\r\n\r\n" not in octets:
        raise NotRead("the head has no end, which http.server does not mind")
    reader = _Reader(octets)
    if not reader.parse_request() or reader.request_version != "HTTP/1.1":
        raise NotRead("http.server sees no HTTP/1.1 request")
    return Read(
        (reader.command, reader.requestline.split(" ")[1]),
        [(name.lower(), value) for name, value in reader.headers.items()],
        b"",
        reader.rfile.read(),
    )


def read_by_http_server(octets: bytes) -> Read:
    """The request that begins these octets, as http.server reads it, and its body, by Content-Length or in chunks."""
    read = read_head_by_http_server(octets)
    lengths, codings = read.values("content-length"), read.values("transfer-encoding")
    if codings:
        if codings != ["chunked"] or lengths:
            raise NotRead(f"ambiguous framing: {codings} {lengths}")
        framing = "Transfer-Encoding: chunked"
    else:
        if len(lengths) > 1:
            raise NotRead(f"ambiguous framing: {lengths}")
        framing = f"Content-Length: {lengths[0] if lengths else 0}"
    # http.server leaves the body to its user: http.client reads it, as that of an answer.
    as_answer = read_by_http_client(f"HTTP/1.1 200 OK\r\n{framing}\r\n\r\n".encode() + read.rest)
    return read._replace(body=as_answer.body, rest=as_answer.rest)


def read_by_http_client(octets: bytes, method: str = "GET") -> Read:
    """The answer that begins these octets, as http.client reads it."""
    if b"\r\n\r\n" not in octets:
        raise NotRead("the head has no end, which http.client does not mind")
    file = io.BytesIO(octets)
    response = http.client.HTTPResponse(Lent(file), method=method)  # type: ignore[arg-type]
    try:
        response.begin()
        body = response.read()
    except (http.client.HTTPException, ConnectionError, ValueError) as error:
        raise NotRead(f"http.client refuses it: {error!r}") from error
    fields = [(name.lower(), value) for name, value in response.headers.items()]
    return Read((str(response.status), response.reason), fields, body, file.read())


class _Reader(BaseHTTPRequestHandler):
    """http.server's reader without its socket."""

    protocol_version = "HTTP/1.1"

    def __init__(self, octets: bytes) -> None:
        self.rfile = io.BytesIO(octets)
        self.raw_requestline = self.rfile.readline(65537)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        raise NotRead(f"http.server refuses it: {code} {message}")

    def handle_expect_100(self) -> bool:
        return True
