"""Requests of every kind, and backends for them that do everything a backend may do wrong.

Each of KINDS is one turn of a `Caller` and tells whether it went as it should; `Caller.play` takes them at random.
"""

from __future__ import annotations

import http.client
import os
import random
import socket
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress

from backend_server import CLOSE, TEXT, Backend, HttpBackend, frame, mask, pattern
from conftest import PATIENCE
from fakes import read_lines, read_response

RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with a reset
LONG = 300_000  # octets of a body that is too long for the reactor's turns
UPGRADE = (
    b"GET /ws HTTP/1.1\r\nHost: lb.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAECAwQFBgcICQoLDA0ODw==\r\n\r\n"
)
ENDLESS = b"POST /sink HTTP/1.1\r\nHost: lb.test\r\nContent-Length: 1000000000\r\n\r\n"


class UnrulyBackend(HttpBackend):
    """As backend_server.py, and /reset, /close, /garbage and /cut."""

    def route(self, path: str, query: str) -> None:
        if path == "/reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            os.close(self.connection.detach())
            raise ConnectionAbortedError("as it was asked to")
        if path == "/close":
            raise ConnectionAbortedError("as it was asked to")
        if path == "/garbage":
            self.wfile.write(b"220 mail.example ESMTP\r\n")
            self.close_connection = True
        elif path == "/cut":
            self.begin(200, 2 * LONG, [])
            self.put_all(pattern(LONG))
            self.close_connection = True
        else:
            super().route(path, query)


def unruly(name: str) -> Backend:
    backend = Backend(name=name)
    backend.RequestHandlerClass = UnrulyBackend
    return backend


class Caller:
    """A client with one connection, kept as long as what it is used for leaves it open."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address
        self._sock: socket.socket | None = None
        self.turns = 0
        self.wrong: Counter[str] = Counter()

    def play(self, turns: int, seed: int) -> None:
        """So many turns; each kind as often as any other. What went wrong is counted in `wrong`."""
        dice = random.Random(seed)
        names: list[str] = []
        for _ in range(turns):
            names = names or dice.sample(sorted(KINDS), len(KINDS))
            name = names.pop()
            try:
                fine = KINDS[name](self)
            except (OSError, http.client.HTTPException) as error:
                fine = False
                name += f": {error!r}"
            if not fine:
                self.wrong[name] += 1
                self.leave()
            self.turns += 1
        self.leave()

    @property
    def sock(self) -> socket.socket:
        if self._sock is None:
            self._sock = socket.create_connection(self._address, timeout=PATIENCE)
            self.file = self._sock.makefile("rb")
        return self._sock

    def send(self, octets: bytes) -> None:
        self.sock.sendall(octets)

    def answer(self, method: str = "GET") -> tuple[int, bytes]:
        """The next answer's status and body."""
        answer = read_response(self.file, method)
        if answer.version == 10 or "close" in answer.headers.get("Connection", ""):
            self.leave()
        return answer.status, answer.body

    def leave(self, *, reset: bool = False) -> None:
        if self._sock is not None:
            if reset:
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            self.file.close()
            self._sock.close()
            self._sock = None


Kind = Callable[[Caller], bool]


def asks(octets: bytes, status: int, body: bytes | None = None, *, anew: bool = False) -> Kind:
    """One request and its answer, `anew` on a connection of its own."""
    method = octets.partition(b" ")[0].decode()

    def play(caller: Caller) -> bool:
        if anew:
            caller.leave()
        caller.send(octets)
        found, content = caller.answer(method)
        return found == status and body in (None, content)

    return play


def gives_up(octets: bytes, read: int = 0, *, reset: bool = True) -> Kind:
    """A client that sends this, reads so much of the answer, and goes away."""

    def play(caller: Caller) -> bool:
        caller.leave()
        caller.send(octets)
        fine = len(caller.file.read(read)) == read
        caller.leave(reset=reset)
        return fine

    return play


def half_a_head(caller: Caller) -> bool:
    caller.leave()
    caller.send(b"GET / HTTP/1.1\r\nHo")
    caller.sock.shutdown(socket.SHUT_WR)
    return caller.answer()[0] == 400


def is_cut(caller: Caller) -> bool:
    caller.send(request("GET", "/cut"))
    with suppress(http.client.IncompleteRead):
        caller.answer()
        return False
    caller.leave()
    return True


def waits_for_continue(caller: Caller) -> bool:
    caller.send(request("POST", "/echo", "Expect: 100-continue", "Content-Length: 5"))
    fine = read_lines(caller.file) == b"HTTP/1.1 100 Continue\r\n\r\n"
    caller.send(b"hello")
    return fine and caller.answer() == (200, b"hello")


def pipelines(caller: Caller) -> bool:
    octets = [request("POST", "/echo", "Content-Length: 1") + b"%d" % number for number in range(5)]
    caller.send(b"".join(octets))
    return [caller.answer()[1] for _ in octets] == [b"%d" % number for number in range(5)]


def talks_by_websocket(caller: Caller) -> bool:
    caller.leave()
    caller.send(UPGRADE)
    fine = read_lines(caller.file).startswith(b"HTTP/1.1 101 ")
    for opcode, payload in (TEXT, b"hello"), (CLOSE, b"\x03\xe8"):
        key = b"\x37\xfa\x21\x3d"
        caller.send(bytes([0x80 | opcode, 0x80 | len(payload)]) + key + mask(payload, key))
        fine = fine and caller.file.read(len(payload) + 2) == frame(opcode, payload)
    fine = fine and caller.file.read() == b""
    caller.leave()
    return fine


def request(method: str, path: str, *fields: str) -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: lb.test", *fields, "\r\n"]).encode()


def chunks(blocks: Sequence[bytes]) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(block), block) for block in blocks) + b"0\r\n\r\n"


content = b"".join(pattern(LONG))

KINDS: dict[str, Kind] = {
    "kept": asks(request("GET", "/"), 200),
    "new": asks(request("GET", "/", "Connection: close"), 200, anew=True),
    "1.0": asks(b"GET /bytes/1000?chunked HTTP/1.0\r\n\r\n", 200, content[:1000]),
    "head": asks(request("HEAD", "/bytes/1000"), 200, b""),
    "not there": asks(request("GET", "/nothing"), 404),
    "not modified": asks(request("GET", "/status/304"), 304, b""),
    "post": asks(request("POST", "/echo", "Content-Length: 5") + b"hello", 200, b"hello"),
    "post in chunks": asks(
        request("POST", "/echo", "Transfer-Encoding: chunked") + chunks([b"hello", b"there"]), 200, b"hellothere"
    ),
    "long up": asks(request("PUT", "/sink", f"Content-Length: {LONG}") + content, 200),
    "long up in chunks": asks(request("PUT", "/sink", "Transfer-Encoding: chunked") + chunks([content] * 2), 200),
    "long down": asks(request("GET", f"/bytes/{LONG}"), 200, content),
    "long down in chunks": asks(request("GET", f"/bytes/{LONG}?chunked"), 200, content),
    "100-continue": waits_for_continue,
    "refused 100-continue": asks(request("POST", "/status/403", "Expect: 100-continue", "Content-Length: 5"), 403),
    "pipelined": pipelines,
    "websocket": talks_by_websocket,
    "upgrade that is not granted": asks(UPGRADE.replace(b"/ws", b"/"), 200),
    "no host": asks(b"GET / HTTP/1.1\r\n\r\n", 400),
    "two lengths": asks(request("POST", "/", "Content-Length: 1", "Content-Length: 2"), 400),
    "bad chunk": asks(request("POST", "/", "Transfer-Encoding: chunked") + b"zz\r\n", 400),
    "head too long": asks(request("GET", "/", "X-Long: " + "x" * 70000), 431, anew=True),
    "head that ends": half_a_head,
    "backend resets": asks(request("GET", "/reset"), 502),
    "backend resets a post": asks(request("POST", "/reset", "Content-Length: 5") + b"hello", 502),
    "backend closes": asks(request("GET", "/close"), 502),
    "backend babbles": asks(request("GET", "/garbage"), 502),
    "backend cuts": is_cut,
    "leaves at once": gives_up(b"", reset=False),
    "leaves within the head": gives_up(b"GET / HT"),
    "leaves within a small upload": gives_up(ENDLESS + b"hello"),
    "closes within a small upload": gives_up(ENDLESS + b"hello", reset=False),
    "leaves within a long upload": gives_up(ENDLESS + content),
    "closes within a long upload": gives_up(ENDLESS + content, reset=False),
    "leaves before the 100": gives_up(request("POST", "/slow/0.1", "Expect: 100-continue", "Content-Length: 5")),
    "leaves before the answer": gives_up(request("GET", "/slow/0.1")),
    "closes before the answer": gives_up(request("GET", "/slow/0.1"), reset=False),
    "leaves within the answer": gives_up(request("GET", "/bytes/3000000"), 1),
    "closes within the answer": gives_up(request("GET", "/bytes/3000000?chunked"), 1, reset=False),
    "leaves within events": gives_up(request("GET", "/stream?n=2&interval=0.1"), 1),
    "leaves the tunnel": gives_up(UPGRADE, 1),
    "closes the tunnel": gives_up(UPGRADE, 1, reset=False),
}
