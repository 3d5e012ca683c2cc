"""The PROXY protocol: who the client of a proxied connection is, told ahead of its first octet. No socket in here.

Versions 1, a line of text, and 2, binary, as HAProxy's proxy-protocol.txt has them; its sections are named below.

Rules:
- Nothing may be read from a connection as something else before the header is whole; what is malformed ends it, and
  there is no guessing whether a header comes: the caller asks only for peers that are to send one (2).
- A line ends in CRLF within 107 octets; a lone CR or LF is refused, numbers have no leading zeros (2.1).
- The length of version 2 is believed and skipped whole: behind the addresses stand extensions, TLVs, which are not
  looked at, and LOCAL may have a block of any kind (2.2).
- Where the header names no TCP addresses (UNKNOWN, LOCAL, UNIX sockets, datagrams) the connection's own ones hold.
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

from balancer.clients import MAPPED, pack, plain_address, unmapped, unpack

Address = tuple[str, int]

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
LOCAL_V2 = SIGNATURE + b"\x20\0\0\0"
"""What a probe sends: the connection is the proxy's own."""
UNKNOWN_V1 = b"PROXY UNKNOWN\r\n"
"""The nearest to it that version 1 has. Some servers refuse it: 2.1 advises to name the connection's own addresses."""

_FIRST_V1 = b"PROXY "
_LONGEST_V1 = 107  # octets, with CRLF
_LONE_V1 = re.compile(rb"\n|\r(?!\Z)")  # where no CRLF was found
_UNKNOWN = re.compile(rb"PROXY UNKNOWN(?: [^\r\n]*)?")
_LINE = re.compile(
    rb"PROXY (?:TCP4 ([0-9.]+) ([0-9.]+)|TCP6 ([0-9A-Fa-f.]*:[0-9A-Fa-f:.]*) ([0-9A-Fa-f.]*:[0-9A-Fa-f:.]*))"
    rb" (0|[1-9][0-9]{0,4}) (0|[1-9][0-9]{0,4})"
)

_FIXED = struct.Struct("!12sBBH")  # signature, version and command, family and transport, octets that follow
_TCP4 = struct.Struct("!4s4sHH")
_TCP6 = struct.Struct("!16s16sHH")
_LOCAL, _PROXY = 0x20, 0x21
# Family and transport, and how many octets of addresses they have. What is unspecified in part may have any.
_BLOCKS = {0x11: 12, 0x12: 12, 0x21: 36, 0x22: 36, 0x31: 216, 0x32: 216} | dict.fromkeys((0, 1, 2, 0x10, 0x20, 0x30), 0)
_TCP = {0x11: _TCP4, 0x21: _TCP6}


class ProxyError(ValueError):
    """The connection does not begin with a header as it should; the text says why."""


class Header(NamedTuple):
    """What a header says. Both addresses are None where the connection's own ones hold."""

    source: Address | None  # the client
    destination: Address | None  # where it connected to
    length: int  # octets of the header


def parse(buffer: bytes) -> Header | None:
    """The header that the buffer begins with; None while it is not complete, which takes at most 65,551 octets.

    An IPv4 address that is written as an IPv6 one is given as IPv4. Raises ProxyError.
    """
    if buffer.startswith(_FIRST_V1):
        return _parse_v1(buffer)
    if buffer.startswith(SIGNATURE):
        return _parse_v2(buffer)
    if _FIRST_V1.startswith(buffer) or SIGNATURE.startswith(buffer):
        return None
    raise ProxyError(f"begins with {buffer[:16]!r}, not with a PROXY header")


def _parse_v1(buffer: bytes) -> Header | None:
    end = buffer.find(b"\r\n", 0, _LONGEST_V1)
    if end < 0:
        if len(buffer) >= _LONGEST_V1:
            raise ProxyError(f"a PROXY line of more than {_LONGEST_V1} octets")
        if _LONE_V1.search(buffer):
            raise ProxyError("a PROXY line that does not end in CRLF")
        return None
    line = buffer[:end]
    if _UNKNOWN.fullmatch(line):
        return Header(None, None, end + 2)
    match = _LINE.fullmatch(line)
    if match:
        *hosts, source_port, destination_port = (group.decode() for group in match.groups() if group is not None)
        try:
            source, destination = map(plain_address, hosts)
        except ValueError as error:
            raise ProxyError(f"a PROXY line in which {error}") from None
        if int(source_port) <= 65535 >= int(destination_port):
            return Header((source, int(source_port)), (destination, int(destination_port)), end + 2)
    raise ProxyError(f"a malformed PROXY line: {line!r}")


def _parse_v2(buffer: bytes) -> Header | None:
    if len(buffer) < _FIXED.size:
        return None
    _, command, family, length = _FIXED.unpack_from(buffer)
    end = _FIXED.size + length
    if command == _LOCAL:
        return Header(None, None, end) if len(buffer) >= end else None
    if command != _PROXY:
        raise ProxyError(f"a PROXY header of version and command 0x{command:02x}")
    block = _BLOCKS.get(family)
    if block is None:
        raise ProxyError(f"a PROXY header of unknown family and transport 0x{family:02x}")
    if length < block:
        raise ProxyError(f"a PROXY header of {length} octets, too few for addresses of kind 0x{family:02x}")
    if len(buffer) < end:
        return None
    if family not in _TCP:
        return Header(None, None, end)
    source, destination, source_port, destination_port = _TCP[family].unpack_from(buffer, _FIXED.size)
    return Header((unpack(unmapped(source)), source_port), (unpack(unmapped(destination)), destination_port), end)


def v1(source: Address, destination: Address) -> bytes:
    """The line that names the client and where it connected to."""
    one, other = _alike(source, destination)
    family = "TCP4" if len(one) == 4 else "TCP6"
    return f"PROXY {family} {unpack(one)} {unpack(other)} {source[1]} {destination[1]}\r\n".encode()


def v2(source: Address, destination: Address) -> bytes:
    """The same in binary."""
    one, other = _alike(source, destination)
    family = 0x11 if len(one) == 4 else 0x21
    fixed = _FIXED.pack(SIGNATURE, _PROXY, family, _BLOCKS[family])
    return fixed + _TCP[family].pack(one, other, source[1], destination[1])


def _alike(source: Address, destination: Address) -> tuple[bytes, bytes]:
    """Both hosts as octets of one family: beside an IPv6 address, an IPv4 one is written as IPv6."""
    one, other = pack(source[0]), pack(destination[0])
    if len(one) != len(other):
        one, other = (packed if len(packed) == 16 else MAPPED + packed for packed in (one, other))
    return one, other
