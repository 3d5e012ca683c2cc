"""The PROXY protocol, versions 1 and 2: what is a header, what is none, and HAProxy on both sides.

Sections are those of HAProxy's proxy-protocol.txt.
"""

from __future__ import annotations

import ipaddress
import random
import shutil
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from http.client import HTTPConnection
from pathlib import Path

import pytest

from balancer.proxy_protocol import LOCAL_V2, SIGNATURE, UNKNOWN_V1, Address, Header, ProxyError, parse, v1, v2
from conftest import PATIENCE, eventually
from programs import free_ports

SEED = 20100
FUZZED = 4000  # headers
CLIENT: Address = ("192.0.2.1", 56324)
FRONT: Address = ("198.51.100.7", 443)
CLIENT6: Address = ("2001:db8::1", 56324)
FRONT6: Address = ("2001:db8:ffff::7", 443)
NOBODY = (None, None)
PAYLOAD = b"PROXY \r\n\r\n\0\r\nQUIT\n GET / HTTP/1.1\r\n"
LONGEST_V1 = 107
LONGEST = 16 + 65535


def binary(command: int, family: int, block: bytes, length: int | None = None) -> bytes:
    return SIGNATURE + struct.pack("!BBH", command, family, len(block) if length is None else length) + block


def tlv(kind: int, value: bytes) -> bytes:
    return struct.pack("!BH", kind, len(value)) + value


def packed(*addresses: Address) -> bytes:
    hosts = b"".join(ipaddress.ip_address(host).packed for host, _ in addresses)
    return hosts + b"".join(port.to_bytes(2, "big") for _, port in addresses)


TCP4 = packed(CLIENT, FRONT)
TCP6 = packed(CLIENT6, FRONT6)
UNIX = b"/run/a.sock".ljust(108, b"\0") + b"/run/b.sock".ljust(108, b"\0")
TLVS = tlv(1, b"h2") + tlv(4, b"") + tlv(3, b"\xde\xad\xbe\xef") + tlv(0x20, bytes(5) + tlv(0x21, b"TLSv1.3"))

GOOD: dict[str, tuple[bytes, tuple[Address | None, Address | None]]] = {
    "v1 IPv4": (b"PROXY TCP4 192.0.2.1 198.51.100.7 56324 443\r\n", (CLIENT, FRONT)),
    "v1 IPv4, longest": (
        b"PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535\r\n",
        (("255.255.255.255", 65535), ("255.255.255.255", 65535)),
    ),
    "v1 zeros": (b"PROXY TCP4 0.0.0.0 0.0.0.0 0 0\r\n", (("0.0.0.0", 0), ("0.0.0.0", 0))),
    "v1 IPv6": (b"PROXY TCP6 2001:db8::1 2001:db8:ffff::7 56324 443\r\n", (CLIENT6, FRONT6)),
    "v1 IPv6, upper case and not shortened": (
        b"PROXY TCP6 2001:0DB8:0000:0000:0000:0000:0000:0001 2001:0DB8:FFFF:0000:0000:0000:0000:0007 56324 443\r\n",
        (CLIENT6, FRONT6),
    ),
    "v1 IPv6, longest": (
        b"PROXY TCP6 " + b" ".join([b":".join([b"ffff"] * 8)] * 2) + b" 65535 65535\r\n",
        ((":".join(["ffff"] * 8), 65535), (":".join(["ffff"] * 8), 65535)),
    ),
    "v1 IPv4 as IPv6": (b"PROXY TCP6 ::ffff:192.0.2.1 ::FFFF:c633:6407 56324 443\r\n", (CLIENT, FRONT)),
    "v1 UNKNOWN": (b"PROXY UNKNOWN\r\n", NOBODY),
    "v1 UNKNOWN with addresses": (b"PROXY UNKNOWN ffff::1 ffff::2 65535 65535\r\n", NOBODY),
    "v1 UNKNOWN with anything": (b"PROXY UNKNOWN \0\xff PROXY TCP4\r\n", NOBODY),
    "v1 UNKNOWN, longest": (b"PROXY UNKNOWN ".ljust(LONGEST_V1 - 2, b"f") + b"\r\n", NOBODY),
    "v2 IPv4": (binary(0x21, 0x11, TCP4), (CLIENT, FRONT)),
    "v2 IPv6": (binary(0x21, 0x21, TCP6), (CLIENT6, FRONT6)),
    "v2 IPv4 as IPv6": (
        binary(0x21, 0x21, packed(("::ffff:192.0.2.1", 56324), ("::ffff:198.51.100.7", 443))),
        (CLIENT, FRONT),
    ),
    "v2 IPv4 and TLVs": (binary(0x21, 0x11, TCP4 + TLVS), (CLIENT, FRONT)),
    "v2 IPv6 and TLVs": (binary(0x21, 0x21, TCP6 + TLVS), (CLIENT6, FRONT6)),
    "v2 IPv4 and what is no TLV": (binary(0x21, 0x11, TCP4 + b"\x01\xff\xff\r\n"), (CLIENT, FRONT)),
    "v2 UDP": (binary(0x21, 0x12, TCP4), NOBODY),
    "v2 UDP over IPv6": (binary(0x21, 0x22, TCP6), NOBODY),
    "v2 UNIX": (binary(0x21, 0x31, UNIX), NOBODY),
    "v2 UNIX datagrams": (binary(0x21, 0x32, UNIX + TLVS), NOBODY),
    "v2 unspecified": (binary(0x21, 0x00, b""), NOBODY),
    "v2 unspecified with addresses": (binary(0x21, 0x00, TCP4), NOBODY),
    "v2 unspecified transport": (binary(0x21, 0x10, TCP4[:8]), NOBODY),
    "v2 unspecified family": (binary(0x21, 0x01, b""), NOBODY),
    "v2 LOCAL": (binary(0x20, 0x00, b""), NOBODY),
    "v2 LOCAL with addresses": (binary(0x20, 0x11, TCP4 + TLVS), NOBODY),
    "v2 LOCAL with part of an address": (binary(0x20, 0x21, b"\x01"), NOBODY),
    "v2 LOCAL of a family that is none": (binary(0x20, 0xFF, b"abc"), NOBODY),
}

LINES = {
    "no space": b"PROXYTCP4 192.0.2.1 198.51.100.7 1 2\r\n",
    "two spaces": b"PROXY  TCP4 192.0.2.1 198.51.100.7 1 2\r\n",
    "two spaces within": b"PROXY TCP4 192.0.2.1  198.51.100.7 1 2\r\n",
    "tab": b"PROXY TCP4 192.0.2.1\t198.51.100.7 1 2\r\n",
    "lower case": b"proxy TCP4 192.0.2.1 198.51.100.7 1 2\r\n",
    "lower case within": b"PROXY tcp4 192.0.2.1 198.51.100.7 1 2\r\n",
    "space at the end": b"PROXY TCP4 192.0.2.1 198.51.100.7 1 2 \r\n",
    "space at the beginning": b" PROXY TCP4 192.0.2.1 198.51.100.7 1 2\r\n",
    "nothing": b"PROXY \r\n",
    "no family": b"PROXY 192.0.2.1 198.51.100.7 1 2\r\n",
    "another family": b"PROXY UDP4 192.0.2.1 198.51.100.7 1 2\r\n",
    "TCP5": b"PROXY TCP5 192.0.2.1 198.51.100.7 1 2\r\n",
    "UNKNOWN and more": b"PROXY UNKNOWNS\r\n",
    "UNKNOWN and a tab": b"PROXY UNKNOWN\tTCP4\r\n",
    "IPv6 in TCP4": b"PROXY TCP4 2001:db8::1 2001:db8::2 1 2\r\n",
    "IPv4 in TCP6": b"PROXY TCP6 192.0.2.1 198.51.100.7 1 2\r\n",
    "two families": b"PROXY TCP6 2001:db8::1 198.51.100.7 1 2\r\n",
    "one address": b"PROXY TCP4 192.0.2.1 1 2\r\n",
    "three addresses": b"PROXY TCP4 192.0.2.1 198.51.100.7 198.51.100.7 1 2\r\n",
    "one port": b"PROXY TCP4 192.0.2.1 198.51.100.7 1\r\n",
    "three ports": b"PROXY TCP4 192.0.2.1 198.51.100.7 1 2 3\r\n",
    "no port": b"PROXY TCP4 192.0.2.1 198.51.100.7\r\n",
    "leading zero in an address": b"PROXY TCP4 192.0.2.01 198.51.100.7 1 2\r\n",
    "leading zero in a destination": b"PROXY TCP4 192.0.2.1 198.051.100.7 1 2\r\n",
    "leading zero in a port": b"PROXY TCP4 192.0.2.1 198.51.100.7 01 2\r\n",
    "zeros as a port": b"PROXY TCP4 192.0.2.1 198.51.100.7 1 00\r\n",
    "256": b"PROXY TCP4 192.0.2.256 198.51.100.7 1 2\r\n",
    "three numbers": b"PROXY TCP4 192.0.2 198.51.100.7 1 2\r\n",
    "five numbers": b"PROXY TCP4 192.0.2.1.1 198.51.100.7 1 2\r\n",
    "hexadecimal": b"PROXY TCP4 0xc0.0.2.1 198.51.100.7 1 2\r\n",
    "dots": b"PROXY TCP4 ... 198.51.100.7 1 2\r\n",
    "name": b"PROXY TCP4 localhost localhost 1 2\r\n",
    "port too large": b"PROXY TCP4 192.0.2.1 198.51.100.7 65536 2\r\n",
    "destination port too large": b"PROXY TCP4 192.0.2.1 198.51.100.7 1 99999\r\n",
    "port of six digits": b"PROXY TCP4 192.0.2.1 198.51.100.7 100000 2\r\n",
    "signed port": b"PROXY TCP4 192.0.2.1 198.51.100.7 +1 2\r\n",
    "negative port": b"PROXY TCP4 192.0.2.1 198.51.100.7 -1 2\r\n",
    "port with an underscore": b"PROXY TCP4 192.0.2.1 198.51.100.7 1_0 2\r\n",
    "port in other digits": "PROXY TCP4 192.0.2.1 198.51.100.7 \u0661 2\r\n".encode(),
    "two double colons": b"PROXY TCP6 1::2::3 2001:db8::2 1 2\r\n",
    "seven groups": b"PROXY TCP6 1:2:3:4:5:6:7 2001:db8::2 1 2\r\n",
    "nine groups": b"PROXY TCP6 1:2:3:4:5:6:7:8:9 2001:db8::2 1 2\r\n",
    "group of five": b"PROXY TCP6 12345:: 2001:db8::2 1 2\r\n",
    "zone": b"PROXY TCP6 fe80::1%lo fe80::2%lo 1 2\r\n",
    "brackets": b"PROXY TCP6 [2001:db8::1] [2001:db8::2] 1 2\r\n",
    "NUL": b"PROXY TCP4 192.0.2.1\0 198.51.100.7 1 2\r\n",
    "lone LF": b"PROXY TCP4 192.0.2.1 198.51.100.7 1 2\n",
    "lone CR": b"PROXY TCP4 192.0.2.1 198.51.100.7 1 2\rGET / HTTP/1.1\r\n",
    "two CR": b"PROXY TCP4 192.0.2.1 198.51.100.7 1 2\r\r\n",
    "lone LF in UNKNOWN": b"PROXY UNKNOWN\n",
    "lone LF before the end of UNKNOWN": b"PROXY UNKNOWN \nGET / HTTP/1.1\r\n",
    "lone CR before the end of UNKNOWN": b"PROXY UNKNOWN \rGET / HTTP/1.1\r\n",
    "two CR after UNKNOWN": b"PROXY UNKNOWN \r\r\n",
    "line of 108 octets": b"PROXY UNKNOWN ".ljust(LONGEST_V1 - 1, b"f") + b"\r\n",
    "line without an end": b"PROXY UNKNOWN ".ljust(LONGEST_V1, b"f"),
}
BLOCKS = {
    "version 0": binary(0x01, 0x11, TCP4),
    "version 1": binary(0x11, 0x11, TCP4),
    "version 3": binary(0x31, 0x11, TCP4),
    "command 2": binary(0x22, 0x11, TCP4),
    "command 15": binary(0x2F, 0x11, TCP4),
    "family 4": binary(0x21, 0x41, TCP6),
    "family 15": binary(0x21, 0xF1, TCP6),
    "transport 3": binary(0x21, 0x13, TCP4),
    "transport 15": binary(0x21, 0x2F, TCP6),
    "IPv4 without addresses": binary(0x21, 0x11, b""),
    "IPv4 of 11 octets": binary(0x21, 0x11, TCP4[:11]),
    "IPv6 of 35 octets": binary(0x21, 0x21, TCP6[:35]),
    "IPv6 of IPv4's length": binary(0x21, 0x21, TCP4),
    "UDP of 11 octets": binary(0x21, 0x12, TCP4[:11]),
    "UNIX of 215 octets": binary(0x21, 0x31, UNIX[:215]),
}
NO_HEADERS = {
    "HTTP": b"GET / HTTP/1.1\r\n",
    "HTTP with a method like it": b"PROXYFIND / HTTP/1.1\r\n",
    "another method like it": b"PROPFIND / HTTP/1.1\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03abc",
    "empty lines": b"\r\n\r\n\r\nGET /",
    "signature with an octet too many": b"\r\n" + binary(0x21, 0x11, TCP4),
    "signature without its NUL": binary(0x21, 0x11, TCP4).replace(b"\0", b" "),
    "NUL": b"\0",
}
BAD = {**LINES, **BLOCKS, **NO_HEADERS}

BROKEN = "broken"


def verdict(buffer: bytes) -> Header | str | None:
    try:
        return parse(buffer)
    except ProxyError as error:
        assert str(error).isprintable(), "it stands in the log"
        return BROKEN


def verdicts(octets: bytes) -> list[Header | str | None]:
    """One after each octet that arrives."""
    return [verdict(octets[:count]) for count in range(len(octets) + 1)]


# Headers and what is none -----------------------------------------------------------------------------------------


def test_a_header_is_found_when_its_last_octet_has_come_and_never_reaches_further():
    for name, (octets, (source, destination)) in GOOD.items():
        expected = Header(source, destination, len(octets))
        assert verdicts(octets) == [None] * len(octets) + [expected], name
        assert parse(octets + PAYLOAD) == expected, name


def test_whatever_is_malformed_is_refused_for_good_and_never_taken_for_a_header():
    """Once an octet too many has come, no others mend it: the connection can be closed at once."""
    for name, octets in BAD.items():
        found = verdicts(octets + PAYLOAD)
        first = found.index(BROKEN)
        assert set(found[:first]) == {None}, name
        assert set(found[first:]) == {BROKEN}, name
        assert first <= len(octets), f"{name} is refused as soon as it is there"


def test_refusals_say_what_is_wrong():
    for octets, words in {
        NO_HEADERS["HTTP"]: "begins with b'GET / HTTP/1.1\\r\\n', not with a PROXY header",
        LINES["256"]: "a PROXY line in which '192.0.2.256' is not an IP address",
        LINES["TCP5"]: "a malformed PROXY line: b'PROXY TCP5 192.0.2.1 198.51.100.7 1 2'",
        LINES["line without an end"]: "a PROXY line of more than 107 octets",
        LINES["lone LF"]: "a PROXY line that does not end in CRLF",
        BLOCKS["version 3"]: "a PROXY header of version and command 0x31",
        BLOCKS["family 4"]: "a PROXY header of unknown family and transport 0x41",
        BLOCKS["IPv4 of 11 octets"]: "a PROXY header of 11 octets, too few for addresses of kind 0x11",
    }.items():
        with pytest.raises(ProxyError) as refusal:
            parse(octets)
        assert str(refusal.value) == words


def test_a_length_is_believed_up_to_the_largest_and_skipped_whole():
    """2.2: the length of the header is always exactly 16 + this value."""
    block = TCP4 + random.Random(SEED).randbytes(65535 - len(TCP4))
    for octets, expected in (
        (binary(0x21, 0x11, block), Header(CLIENT, FRONT, LONGEST)),
        (binary(0x20, 0x11, block), Header(None, None, LONGEST)),
        (binary(0x21, 0x31, block), Header(None, None, LONGEST)),
    ):
        assert parse(octets[:-1]) is None
        assert parse(octets + PAYLOAD) == expected


def test_a_block_too_short_for_its_addresses_is_refused_before_it_has_come():
    """Or the octets of the request would become addresses: apache/httpd 683."""
    for family, least in ((0x11, 12), (0x12, 12), (0x21, 36), (0x22, 36), (0x31, 216), (0x32, 216)):
        for length in range(least):
            assert verdict(binary(0x21, family, b"", length)) == BROKEN
        assert verdict(binary(0x21, family, b"", least)) is None


def test_every_octet_of_version_command_family_and_transport():
    """2.2: version 2 alone, two commands, four families, three transports."""
    for command in range(256):
        for family in range(256):
            found = verdict(binary(command, family, bytes(216)))
            proxied = command == 0x21 and family >> 4 <= 3 and family & 15 <= 2
            assert (found != BROKEN) == (command == 0x20 or proxied)
            if isinstance(found, Header):
                assert (found.source is not None) == (command == 0x21 and family in (0x11, 0x21))


# Fuzz -------------------------------------------------------------------------------------------------------------


def reference(octets: bytes) -> Header | str:
    """What the text of the protocol says of these octets, read with other means, once they are all there."""
    if octets.startswith(b"PROXY "):
        return reference_v1(octets)
    if not octets.startswith(SIGNATURE) or len(octets) < 16:
        return BROKEN
    command, family, length = octets[12], octets[13], int.from_bytes(octets[14:16], "big")
    block, whole = octets[16 : 16 + length], Header(None, None, 16 + length)
    if command >> 4 != 2 or command & 15 > 1 or len(block) < length:
        return BROKEN
    if command & 15 == 0:
        return whole
    if family >> 4 > 3 or family & 15 > 2:
        return BROKEN
    size = {0: 0, 1: 4, 2: 16, 3: 108}[family >> 4] if family & 15 else 0
    if length < 2 * size + 4 * (size in (4, 16)):
        return BROKEN
    if size not in (4, 16) or family & 15 == 2:
        return whole
    hosts = [unmapped(ipaddress.ip_address(part)) for part in (block[:size], block[size : 2 * size])]
    ports = [int.from_bytes(block[at : at + 2], "big") for at in (2 * size, 2 * size + 2)]
    return Header((hosts[0], ports[0]), (hosts[1], ports[1]), 16 + length)


def reference_v1(octets: bytes) -> Header | str:
    line, end, _ = octets[:LONGEST_V1].partition(b"\r\n")
    if not end or b"\r" in line or b"\n" in line:
        return BROKEN
    _, kind, *rest = line.split(b" ")
    if kind == b"UNKNOWN":
        return Header(None, None, len(line) + 2)
    try:
        one, other, *ports = (word.decode("ascii") for word in rest)
        parse_host = {b"TCP4": ipaddress.IPv4Address, b"TCP6": ipaddress.IPv6Address}[kind]
        hosts = [unmapped(parse_host(host)) for host in (one, other)]
        if "%" in one + other or any(str(int(port)) != port or not 0 <= int(port) <= 65535 for port in ports):
            return BROKEN
        source_port, destination_port = map(int, ports)
    except (ValueError, KeyError):
        return BROKEN
    return Header((hosts[0], source_port), (hosts[1], destination_port), len(line) + 2)


def unmapped(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    address = getattr(address, "ipv4_mapped", None) or address
    return socket.inet_ntop(socket.AF_INET if address.version == 4 else socket.AF_INET6, address.packed)


def mutated(rng: random.Random, octets: bytes) -> bytes:
    """A few small changes, of the kind that a careless or a hostile sender makes."""
    found = bytearray(octets)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 4))):
        at = rng.randrange(len(found) + 1)
        match rng.randrange(6):
            case 0:
                found[at:at] = rng.choice((b" ", b"\r", b"\n", b"\r\n", b"0", b":", b".", b"\0", b"\xff", b"f"))
            case 1:
                del found[at : at + rng.randrange(1, 4)]
            case 2 if at < len(found):
                found[at] = rng.randrange(256)
            case 3 if at < len(found):
                found[at] ^= 1 << rng.randrange(8)
            case 4 if len(found) > 16:
                found[rng.randrange(12, 16)] = rng.choice((0, 1, 2, 12, 36, 0x10, 0x11, 0x20, 0x21, 0x22, 0x31, 255))
            case _:
                found[at:at] = found[at : at + rng.randrange(1, 12)]
    return bytes(found)


def test_headers_with_faults_are_read_as_the_protocol_says():
    """Each is a header, not whole, or broken, as an independent reading of the text has it; at every split point."""
    rng = random.Random(SEED)
    seeds = [octets for octets, _ in GOOD.values()], list(BAD.values())
    headers = broken = 0
    for _ in range(FUZZED):
        octets = mutated(rng, rng.choice(rng.choice(seeds))) + rng.choice((b"", PAYLOAD))
        expected = reference(octets)
        found = verdict(octets)
        assert (BROKEN if found is None else found) == expected, octets
        headers += isinstance(found, Header)
        broken += found == BROKEN
        rises = verdicts(octets) if rng.random() < 0.1 else [found]
        settled = next((index for index, one in enumerate(rises) if one is not None), len(rises))
        assert rises[settled:] == [found] * (len(rises) - settled), octets
    assert min(headers, broken) > 500, "both are met often"


def test_noise_is_refused_or_awaited_for_the_length_that_it_names():
    rng = random.Random(SEED)
    for _ in range(4000):
        octets = rng.choice((b"", b"PROXY ", SIGNATURE, SIGNATURE + b"\x21")) + rng.randbytes(rng.randrange(300))
        found = verdict(octets)
        if found is None:
            assert verdict(octets + bytes(LONGEST)) is not None
        elif found == BROKEN:
            assert verdict(octets + bytes(300)) == BROKEN


# Our own headers --------------------------------------------------------------------------------------------------


def hosts(rng: random.Random) -> str:
    if rng.random() < 0.5:
        return str(ipaddress.IPv4Address(rng.getrandbits(32)))
    address = rng.getrandbits(128) & ~(rng.getrandbits(64) << rng.randrange(64))
    return socket.inet_ntop(socket.AF_INET6, address.to_bytes(16, "big"))


@pytest.mark.parametrize("build", [v1, v2])
def test_what_is_built_says_what_it_was_built_from(build: Callable[[Address, Address], bytes]):
    """Of two families too: then the IPv4 address goes as ::ffff:0:0/96, and comes back as IPv4."""
    rng = random.Random(SEED)
    for _ in range(1000):
        source, destination = (hosts(rng), rng.randrange(65536)), (hosts(rng), rng.randrange(65536))
        octets = build(source, destination)
        assert parse(octets + PAYLOAD) == Header(source, destination, len(octets))
        assert reference(octets) == Header(source, destination, len(octets))


def test_what_is_built_is_what_the_protocol_prints():
    """The examples of 2.1 and 2.2, octet for octet."""
    source, destination = ("192.168.0.1", 56324), ("192.168.0.11", 443)
    assert v1(source, destination) == b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\n"
    assert v2(source, destination) == (
        b"\r\n\r\n\0\r\nQUIT\n" + bytes((0x21, 0x11, 0, 12, 192, 168, 0, 1, 192, 168, 0, 11, 0xDC, 0x04, 0x01, 0xBB))
    )
    assert v1(CLIENT6, FRONT6) == b"PROXY TCP6 2001:db8::1 2001:db8:ffff::7 56324 443\r\n"
    assert v2(CLIENT6, FRONT6) == binary(0x21, 0x21, TCP6)
    assert v1(CLIENT, FRONT6) == b"PROXY TCP6 ::ffff:192.0.2.1 2001:db8:ffff::7 56324 443\r\n"


def test_what_probes_send_names_nobody():
    assert parse(LOCAL_V2 + PAYLOAD) == Header(None, None, 16)
    assert parse(UNKNOWN_V1 + PAYLOAD) == Header(None, None, 15)


# HAProxy ----------------------------------------------------------------------------------------------------------

HAPROXY = shutil.which("haproxy", path="/usr/bin:/usr/sbin:/usr/local/bin:/usr/local/sbin")
needs_haproxy = pytest.mark.skipif(HAPROXY is None, reason="needs haproxy")


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


class HAProxy:
    """One that passes connections on with a header each, probes, and tells clients whom their header names."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.taken, self.probed_v1, self.probed_v2 = (
            stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)
        )
        for listener in (self.taken, self.probed_v1, self.probed_v2):
            listener.settimeout(PATIENCE)
        ways = {"v1": "send-proxy", "v2": "send-proxy-v2", "tlv": "send-proxy-v2 proxy-v2-options unique-id,crc32c"}
        self.told, *ports = free_ports(1 + len(ways))
        self.ports = dict(zip(ways, ports, strict=True))
        sections = [
            f"""
listen {way}
    bind 127.0.0.1:{self.ports[way]}
    {f"bind [::1]:{self.ports[way]}" if has_ipv6() else ""}
    bind unix@{directory}/{way}
    unique-id-format %ci-%ts
    server back {address(self.taken)} {words}
"""
            for way, words in ways.items()
        ]
        config = directory / "haproxy.cfg"
        config.write_text(f"""
defaults
    mode tcp
    timeout connect 5s
    timeout client 5s
    timeout server 5s
{"".join(sections)}
backend probed
    server v1 {address(self.probed_v1)} check check-send-proxy send-proxy inter 100ms
    server v2 {address(self.probed_v2)} check check-send-proxy send-proxy-v2 inter 100ms
listen told
    bind 127.0.0.1:{self.told} accept-proxy
    mode http
    http-request return status 200 content-type text/plain lf-string "%[src] %[src_port] %[dst] %[dst_port]"
""")
        output = directory / "output"
        with output.open("wb") as file:
            process = subprocess.Popen(
                [str(HAPROXY), "-db", "-f", str(config)], stdin=subprocess.DEVNULL, stdout=file, stderr=file
            )
        stack.callback(process.wait, PATIENCE)
        stack.callback(process.terminate)

        def listens() -> bool:
            assert process.poll() is None, output.read_text(errors="replace")
            with socket.socket() as sock:
                return sock.connect_ex(("127.0.0.1", self.told)) == 0

        eventually(listens)

    def whom(self, header: bytes) -> str:
        """What it tells a client behind a proxy that sends this header; "ME" stands for the connection's own end."""
        with closing(HTTPConnection("127.0.0.1", self.told, timeout=PATIENCE)) as connection:
            connection.connect()
            connection.sock.sendall(header)
            connection.request("GET", "/")
            own = "{} {}".format(*connection.sock.getsockname())
            return connection.getresponse().read().decode().replace(own, "ME").replace(f" {self.told}", "")


def address(listener: socket.socket) -> str:
    return "{}:{}".format(*listener.getsockname())


def accepted(listener: socket.socket) -> tuple[Header, bytes, Address]:
    """The next connection's header, what follows it until its end, and the address that it came from.

    HAProxy ends its probes with a reset.
    """
    sock, peer = listener.accept()
    octets, header = b"", None
    with sock, suppress(ConnectionResetError):
        sock.settimeout(PATIENCE)
        while piece := sock.recv(1):  # in as many pieces as there can be
            octets += piece
            header = header or parse(octets)
    assert header, octets
    return header, octets[header.length :], peer


@pytest.fixture(scope="module")
def haproxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HAProxy]:
    with ExitStack() as stack:
        yield HAProxy(tmp_path_factory.mktemp("haproxy"), stack)


@needs_haproxy
@pytest.mark.parametrize("way", ["v1", "v2", "tlv"])
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_client_behind_haproxy_is_known_by_its_header(haproxy, way, host):
    """Both versions, and version 2 with extensions behind the addresses; what follows the header is left alone."""
    if host == "::1" and not has_ipv6():
        pytest.skip("needs IPv6 on the loopback interface")
    with socket.create_connection((host, haproxy.ports[way]), PATIENCE) as client:
        ends = client.getsockname()[:2], client.getpeername()[:2]
        client.sendall(PAYLOAD)
        client.shutdown(socket.SHUT_WR)
        header, payload, _ = accepted(haproxy.taken)
    assert (header.source, header.destination) == ends
    assert payload == PAYLOAD


@needs_haproxy
@pytest.mark.parametrize("way", ["v1", "v2", "tlv"])
def test_a_client_of_haproxys_unix_socket_has_no_address(haproxy, way, tmp_path_factory):
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(PATIENCE)
        client.connect(str(tmp_path_factory.getbasetemp() / "haproxy0" / way))
        client.sendall(PAYLOAD)
        client.shutdown(socket.SHUT_WR)
        header, payload, _ = accepted(haproxy.taken)
    assert (header.source, header.destination) == NOBODY
    assert payload == PAYLOAD


@needs_haproxy
def test_a_probe_of_haproxys_is_its_own_connection(haproxy):
    """LOCAL in version 2; version 1 names the connection's own addresses, as 2.1 advises, or UNKNOWN."""
    header, payload, _ = accepted(haproxy.probed_v2)
    assert (header.source, header.destination, payload) == (None, None, b"")
    header, payload, peer = accepted(haproxy.probed_v1)
    assert (header.source, header.destination) in (NOBODY, (peer, haproxy.probed_v1.getsockname()))
    assert payload == b""


@needs_haproxy
@pytest.mark.parametrize("build", [v1, v2])
def test_haproxy_knows_a_client_by_our_header(haproxy, build):
    assert haproxy.whom(build(CLIENT, FRONT)) == "192.0.2.1 56324 198.51.100.7 443"
    assert haproxy.whom(build(CLIENT6, FRONT6)) == "2001:db8::1 56324 2001:db8:ffff::7 443"
    assert haproxy.whom(build(CLIENT, FRONT6)).endswith("192.0.2.1 56324 2001:db8:ffff::7 443")


@needs_haproxy
def test_haproxy_takes_our_probes_for_connections_of_our_own(haproxy):
    assert haproxy.whom(LOCAL_V2) == haproxy.whom(UNKNOWN_V1) == "ME 127.0.0.1"
