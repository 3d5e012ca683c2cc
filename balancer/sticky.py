"""Sessions that stick: a cookie tells which backend a client had before.

Its value is an HMAC-SHA256 of the backend's id and address. That is a name and its signature in one: without the
secret nobody can make one, nor tell which address is behind one, and there is nothing in it to be parsed. Whoever has
a table of the values of today's backends needs one look. With the same secret the values are the same in any run.

Cookies are read as RFC 6265 section 4.2.1 writes them: pairs between semicolons, names as they are spelt, and no
quoted strings that could hide a semicolon.
"""

from __future__ import annotations

import hmac
import re
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from functools import lru_cache
from typing import Protocol

# Patterns that begin with fixed octets are searched for thirty times as fast as those that begin with a choice.
_COOKIE_FIELD = re.compile(rb"\r\n(?i:cookie):([^\r]*)")
_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_OURS = re.compile(rb"[A-Za-z0-9_-]{22}")  # 16 octets in base64, without padding
_LEAST_SECRET = 16  # octets
MOST_LINES = 4096  # that are kept ready-made


class Named(Protocol):
    """What a value is made of: a backend."""

    id: str
    address: str


class Sticky:
    """The cookie of one configuration. `secure` is for clients that come over TLS.

    Raises ValueError for a name that is no cookie's, and for a secret of less than 16 octets.
    """

    def __init__(self, name: str, secret: bytes, *, secure: bool = False) -> None:
        if not _NAME.fullmatch(name):
            raise ValueError(f'"{name}" cannot be the name of a cookie')
        if len(secret) < _LEAST_SECRET:
            raise ValueError(f"the secret has {len(secret)} octets; it takes at least {_LEAST_SECRET} to be one")
        self._name = name.encode()
        self._secret = secret
        self._lines: dict[tuple[str, str], bytes] = {}  # by address and id of the backend
        self._attributes = b"; Path=/; HttpOnly; SameSite=Lax" + (b"; Secure" if secure else b"")

    def value(self, backend: Named) -> str:
        """What stands for this backend: 22 letters, digits, "-" and "_"."""
        named = f"{self._name.decode()}\n{backend.address}\n{backend.id}"
        digest = hmac.digest(self._secret, named.encode("utf-8", "surrogatepass"), "sha256")
        return urlsafe_b64encode(digest[:16]).rstrip(b"=").decode()

    def find(self, fields: bytes) -> str | None:
        """The cookie's value in a request's head; None where there is none that could be ours."""
        for value in cookie_values(fields, self._name):
            if _OURS.fullmatch(value):
                return value.decode()
        return None

    def set_cookie(self, backend: Named) -> bytes:
        """The line that has a client come back to this backend for as long as the browser is open, with its end."""
        key = backend.address, backend.id
        line = self._lines.get(key)
        if line is None:
            if len(self._lines) >= MOST_LINES:
                self._lines.clear()
            line = b"Set-Cookie: %b=%b%b\r\n" % (self._name, self.value(backend).encode(), self._attributes)
            self._lines[key] = line
        return line


def cookie_values(fields: bytes, name: bytes) -> Iterator[bytes]:
    """Each value that the Cookie fields of a head give this name, in their order.

    `fields` was found to be well-formed: lines of "name:value", each with CRLF before it, behind whatever first line.
    """
    if name + b"=" not in fields:
        return
    pair = _pair(name)
    for field in _COOKIE_FIELD.finditer(fields):
        for found in pair.finditer(b";" + field[1]):
            yield found[1].strip(b" \t")


@lru_cache(maxsize=16)
def _pair(name: bytes) -> re.Pattern[bytes]:
    return re.compile(rb";[ \t]*" + re.escape(name) + rb"=([^;]*)")
