"""A small backend to try the balancer with: it says who it is, and answers in every way an HTTP backend can.

    python backend_server.py --port 8081 [--host 127.0.0.1] [--id NAME] [--delay SECONDS] [--fail-rate 0..1] [--tcp]

    /                   one line that says which backend answered, as the field X-Backend does everywhere
    /health             200 ok, or 503 failing; POST /health/fail and POST /health/ok switch it
    /echo               the request's body, sent back as it comes, framed as it came; any method
    /sink               reads the body; JSON of its length and its sha256
    /headers            JSON of the request line and the fields as they arrived, order and duplicates kept
    /bytes/N            N octets, see `pattern`; /bytes/N?chunked sends them chunked
    /status/N           an answer of that status; a 1xx goes out as an interim answer before a 200
    /slow/SECONDS       an answer after that time
    /stream             server-sent events, each sent at once; /stream?n=5&interval=0.2
    /ws                 a WebSocket echo (RFC 6455)

A path that has no use for a body answers at once and reads the body afterwards, so an answer may come before its
upload is done. With --tcp it is no HTTP server at all: it greets nobody and echoes bytes.
"""

from __future__ import annotations

import argparse
import base64
import codecs
import contextlib
import errno
import hashlib
import json
import random
import re
import resource
import signal
import socket
import socketserver
import sys
import threading
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any, NoReturn
from urllib.parse import parse_qs

BLOCK = 65536
LINE_LIMIT = 8192
LINGER = 1.0  # seconds for which a refused client is still read from
PERIOD = bytes(range(251))  # a prime length: a block that is lost or sent twice cannot go unnoticed
CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n]*)?\r\n")
WHOLE = re.compile(r"\d{1,15}")
DECIMAL = re.compile(r"\d{1,5}(?:\.\d{1,6})?")
NAME = re.compile(r"(?:[!-~](?: (?=[!-~]))?)*")
WEBSOCKET_KEY = re.compile(r"[A-Za-z0-9+/]{22}==")
WEBSOCKET_LIMIT = 16 << 20  # octets in one frame
CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10


def pattern(count: int) -> Iterator[bytes]:
    """The `count` octets of /bytes/N, in blocks: the octet at offset i is i % 251."""
    block = PERIOD * (4 * BLOCK // len(PERIOD))
    while count > 0:
        yield block[:count]
        count -= len(block)


class Backend(socketserver.ThreadingTCPServer):
    """A backend that is bound and listens; OSError when it cannot. Port 0 takes a free one: see `port`.

    The default name is the port. `delay` is in seconds, before each answer (with `tcp`: each block). `shutdown`, then
    `server_close`, end every connection and leave no thread.

    It is no http.server.HTTPServer, which asks the name service for the host's full name as it binds, and waits.
    """

    allow_reuse_address = True
    request_queue_size = 1024
    daemon_threads = False  # server_close waits for a connection's thread only when it is no daemon

    def __init__(
        self, host: str = "127.0.0.1", port: int = 0, name: str = "", *,
        delay: float = 0.0, fail_rate: float = 0.0, seed: int | None = None, tcp: bool = False,
    ) -> None:  # fmt: skip
        address: Any
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        self.address_family = family
        self.delay = delay
        self.fail_rate = fail_rate
        self.dice = random.Random(seed)
        self.healthy = True
        self.stopping = threading.Event()
        self.connections: set[socket.socket] = set()  # each operation on it is a single one, so it needs no lock
        super().__init__(address, TcpEcho if tcp else HttpBackend)
        self.port: int = self.socket.getsockname()[1]
        self.name = name or str(self.port)
        self.address = f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"

    def pause(self, seconds: float) -> None:
        """Wait; raise ConnectionAbortedError as soon as the server is being stopped."""
        if seconds > 0 and self.stopping.wait(seconds):
            raise ConnectionAbortedError("the server stops")

    def fails(self) -> bool:
        """Whether this answer is one of the share that is to fail."""
        return self.fail_rate > 0 and self.dice.random() < self.fail_rate

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # an OSError is a client that went away
            super().handle_error(request, client_address)

    def shutdown(self) -> None:
        with contextlib.suppress(OSError):  # wakes the accept loop, which else looks up only every half second
            self.socket.shutdown(socket.SHUT_RDWR)
        super().shutdown()

    def server_close(self) -> None:
        self.stopping.set()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        super().server_close()


make_server = Backend


class TcpEcho(socketserver.BaseRequestHandler):
    """Bytes, back as they come. What came before the client's half-close goes out, then the server half-closes too."""

    server: Backend

    def handle(self) -> None:
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.server.fails():
            return
        while block := self.request.recv(BLOCK):
            self.server.pause(self.server.delay)
            self.request.sendall(block)


class HttpBackend(BaseHTTPRequestHandler):
    """One client's connection: a request after the other."""

    server: Backend
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    rbufsize = wbufsize = BLOCK  # a buffered wfile sends a head together with its body

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):  # http.server looks for one such function for each method
            return self.respond
        raise AttributeError(name)

    def version_string(self) -> str:
        return "backend_server"

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the balancer's log tells what was asked."""

    def handle_expect_100(self) -> bool:
        return True  # whoever wants the body calls `read_body`, and that sends the 100

    def finish(self) -> None:
        with contextlib.suppress(OSError):  # closing flushes, to a client that may have gone away
            super().finish()
        self.rfile.close()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuse a request that cannot be read, and close."""
        self.request_version = "HTTP/1.1"  # where the version could not be read, http.server takes 0.9: a bare body
        self.close_connection, self.expects, self.headless = True, False, self.command == "HEAD"
        self.answer(code, f"{message or explain}\n")
        self.linger()

    def linger(self) -> None:
        """Half-close and read on for a moment: to close with octets unread is a reset, which destroys the answer."""
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_WR)
        self.connection.settimeout(LINGER)
        with contextlib.suppress(TimeoutError):
            for _ in range(1024):
                if not self.connection.recv(BLOCK):
                    break

    def respond(self) -> None:
        """Answer one request, whatever its method."""
        coding = self.headers.get("Transfer-Encoding", "").strip().lower()
        length = self.headers.get("Content-Length", "0").strip()
        if coding not in ("", "chunked"):
            return self.send_error(501, "transfer coding not known")
        if not WHOLE.fullmatch(length):
            return self.send_error(400, "Content-Length is no number")
        self.length = None if coding else int(length)
        self.expects = self.headers.get("Expect", "").lower() == "100-continue" and self.request_version >= "HTTP/1.1"
        self.headless = self.command == "HEAD"
        self.body = self.blocks()
        path, _, query = self.path.partition("?")
        self.server.pause(self.server.delay)
        if self.server.fails() and not path.startswith("/health"):
            self.answer(500, f"backend {self.server.name} fails, as --fail-rate asks\n")
        else:
            self.route(path, query)
        self.wfile.flush()
        if not self.expects:
            for _ in self.body:
                continue
        return None

    def route(self, path: str, query: str) -> None:
        name = self.server.name
        match path.split("/")[1:]:
            case [""]:
                self.answer(200, f"backend {name} at {self.server.address}\n")
            case ["health"]:
                self.answer(*((200, "ok\n") if self.server.healthy else (503, "failing\n")))
            case ["health", "ok" | "fail" as word] if self.command == "POST":
                self.server.healthy = word == "ok"
                self.answer(200, "ok\n" if self.server.healthy else "failing\n")
            case ["health", "ok" | "fail"]:
                self.answer(405, "POST switches it\n", [("Allow", "POST")])
            case ["echo"]:
                self.echo()
            case ["sink"]:
                self.sink()
            case ["headers"]:
                fields = [list(field) for field in self.headers.items()]
                self.answer_json({"backend": name, "request_line": self.requestline, "fields": fields})
            case ["bytes", count] if WHOLE.fullmatch(count):
                chunked = "chunked" in parse_qs(query, keep_blank_values=True)
                self.begin(200, None if chunked else int(count), [("Content-Type", "application/octet-stream")])
                self.put_all(pattern(int(count)))
            case ["status", number] if WHOLE.fullmatch(number) and 100 <= int(number) <= 599 and number != "101":
                status = int(number)
                if status < 200 and self.request_version >= "HTTP/1.1":
                    self.send_interim(status)
                status = max(status, 200)
                self.answer(status, f"backend {name} answers {status}\n")
            case ["slow", seconds] if DECIMAL.fullmatch(seconds):
                self.server.pause(float(seconds))
                self.answer(200, f"backend {name} waited {seconds} s\n")
            case ["stream"]:
                self.stream(query)
            case ["ws"]:
                self.websocket()
            case _:
                self.answer(404, f"backend {name} has nothing at {path}\n")

    def echo(self) -> None:
        body = self.read_body()
        self.begin(200, self.length, [("Content-Type", self.headers.get("Content-Type", "application/octet-stream"))])
        self.put_all(body, flush=True)

    def sink(self) -> None:
        count, digest = 0, hashlib.sha256()
        for block in self.read_body():
            count += len(block)
            digest.update(block)
        self.answer_json({"backend": self.server.name, "bytes": count, "sha256": digest.hexdigest()})

    def stream(self, query: str) -> None:
        options = {"n": "5", "interval": "0.2"} | {name: values[-1] for name, values in parse_qs(query).items()}
        if not (WHOLE.fullmatch(options["n"]) and DECIMAL.fullmatch(options["interval"])):
            return self.answer(400, "n is a whole number, interval is in seconds\n")
        self.begin(200, None, [("Content-Type", "text/event-stream"), ("Cache-Control", "no-cache")])
        return self.put_all(self.events(int(options["n"]), float(options["interval"])), flush=True)

    def events(self, count: int, interval: float) -> Iterator[bytes]:
        for number in range(1, count + 1):
            yield f"id: {number}\ndata: backend {self.server.name} event {number}\n\n".encode()
            self.server.pause(interval if number < count else 0)

    def websocket(self) -> None:
        upgrade, connection = (self.headers.get(name, "").lower() for name in ("Upgrade", "Connection"))
        fields = [("Upgrade", "websocket"), ("Connection", "Upgrade")]
        if upgrade != "websocket" or "upgrade" not in re.split(r"[ \t]*,[ \t]*", connection):
            return self.answer(426, "this path speaks WebSocket\n", fields)
        if self.headers.get("Sec-WebSocket-Version") != "13":
            return self.answer(426, "version 13 is spoken\n", [*fields, ("Sec-WebSocket-Version", "13")])
        key = self.headers.get("Sec-WebSocket-Key", "").strip()
        if self.command != "GET" or not WEBSOCKET_KEY.fullmatch(key):
            return self.answer(400, "a GET with a Sec-WebSocket-Key of 16 octets opens a WebSocket\n")
        self.send_response(101)
        for name, value in [*fields, ("X-Backend", self.server.name), ("Sec-WebSocket-Accept", websocket_accept(key))]:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.flush()
        self.close_connection = True
        try:
            echo_frames(self.rfile, self.wfile)
        except WebSocketError as error:
            self.wfile.write(frame(CLOSE, error.code.to_bytes(2, "big") + str(error).encode()))
            self.linger()
        return None

    # The request's body

    def read_body(self) -> Iterator[bytes]:
        """The body in blocks as they come, asked for with a 100 where the client waits for one."""
        if self.expects:
            self.expects = False
            self.send_interim(100)
        return self.body

    def blocks(self) -> Iterator[bytes]:
        if self.length is not None:
            yield from self.exactly(self.length)
            return
        while size := self.chunk_size():
            yield from self.exactly(size)
            if self.rfile.read(2) != b"\r\n":
                raise ConnectionAbortedError("no line end after a chunk")
        for _ in range(128):  # trailers, which nobody asks for
            if self.rfile.readline(LINE_LIMIT) in (b"\r\n", b""):
                return
        raise ConnectionAbortedError("trailers without end")

    def chunk_size(self) -> int:
        line = CHUNK_SIZE.fullmatch(self.rfile.readline(LINE_LIMIT))
        if not line:
            raise ConnectionAbortedError("no chunk size where one belongs")
        return int(line[1], 16)

    def exactly(self, count: int) -> Iterator[bytes]:
        while count:
            block = self.rfile.read1(min(count, BLOCK))
            if not block:
                raise ConnectionAbortedError("the body ended early")
            count -= len(block)
            yield block

    # The answer

    def send_interim(self, status: int) -> None:
        reason = self.responses.get(status, ("Interim",))[0]
        self.wfile.write(f"HTTP/1.1 {status} {reason}\r\n\r\n".encode())
        self.wfile.flush()

    def begin(self, status: int, length: int | None, fields: Iterable[tuple[str, str]]) -> None:
        """Write the head. No `length`: the body says itself where it ends, by its chunks, or in HTTP/1.0 by a close."""
        bodiless = status in (204, 304)
        self.chunked = length is None and self.request_version >= "HTTP/1.1"
        self.headless = self.headless or bodiless
        if self.expects or (length is None and not self.chunked):
            self.close_connection = True  # expects: whether the body that was not asked for comes all the same is open
        self.send_response(status)
        self.send_header("X-Backend", self.server.name)
        for name, value in fields if not bodiless else ():
            self.send_header(name, value)
        if self.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif length is not None and not bodiless:
            self.send_header("Content-Length", str(length))
        if self.close_connection:
            self.send_header("Connection", "close")
        elif self.request_version == "HTTP/1.0":
            self.send_header("Connection", "keep-alive")
        self.end_headers()

    def put_all(self, blocks: Iterable[bytes], flush: bool = False) -> None:
        """Write the body that `begin` announced, each block at once with `flush`. HEAD has none."""
        if self.headless:
            return
        for block in blocks:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(block), block) if self.chunked else block)
            if flush:
                self.wfile.flush()
        if self.chunked:
            self.wfile.write(b"0\r\n\r\n")

    def answer(self, status: int, text: str, fields: Iterable[tuple[str, str]] = ()) -> None:
        body = b"" if status == 205 else text.encode()  # RFC 9110 section 15.3.6: a 205 has no content
        self.begin(status, len(body), fields or [("Content-Type", "text/plain; charset=utf-8")])
        self.put_all([body])

    def answer_json(self, value: object) -> None:
        self.answer(200, json.dumps(value) + "\n", [("Content-Type", "application/json")])


# A WebSocket's frames (RFC 6455), from the server's side


class WebSocketError(Exception):
    """The client broke the protocol; `code` is the status of the Close frame that tells it so (section 7.4.1)."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def websocket_accept(key: str) -> str:
    """The Sec-WebSocket-Accept that answers a Sec-WebSocket-Key (section 4.2.2)."""
    return base64.b64encode(hashlib.sha1(f"{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11".encode()).digest()).decode()


def mask(payload: bytes, key: bytes) -> bytes:
    """Mask, or unmask (section 5.3): one exclusive-or of two long numbers, which beats a loop over octets."""
    pad = (key * (len(payload) // 4 + 1))[: len(payload)]
    return (int.from_bytes(payload, "big") ^ int.from_bytes(pad, "big")).to_bytes(len(payload), "big")


def frame(opcode: int, payload: bytes, final: bool = True) -> bytes:
    """An unmasked frame, as a server sends them (section 5.2)."""
    size = len(payload)
    if size < 126:
        length = bytes([size])
    elif size < 65536:
        length = bytes([126]) + size.to_bytes(2, "big")
    else:
        length = bytes([127]) + size.to_bytes(8, "big")
    return bytes([final << 7 | opcode]) + length + payload


def read_frame(rfile: Any) -> tuple[bool, int, bytes]:
    """A client's next frame (section 5.2): whether it is final, its opcode, its payload unmasked."""
    first, second = exactly(rfile, 2)
    final, opcode, size = bool(first & 0x80), first & 0x0F, second & 0x7F
    if first & 0x70 or opcode not in (CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG):
        raise WebSocketError(1002, "reserved bit or opcode")
    if not second & 0x80:
        raise WebSocketError(1002, "a client's frames are masked")
    if opcode >= CLOSE and (not final or size > 125):
        raise WebSocketError(1002, "control frame in fragments or too long")
    if size > 125:
        size = int.from_bytes(exactly(rfile, 2 if size == 126 else 8), "big")
    if size > WEBSOCKET_LIMIT:
        raise WebSocketError(1009, "frame too big")
    key = exactly(rfile, 4)
    return final, opcode, mask(exactly(rfile, size), key)


def exactly(rfile: Any, count: int) -> bytes:
    octets: bytes = rfile.read(count)
    if len(octets) < count:
        raise ConnectionAbortedError("closed within a frame")
    return octets


def echo_frames(rfile: Any, wfile: Any) -> None:
    """Echo messages fragment by fragment and answer pings, until the client's Close is answered (sections 5.4, 5.5)."""
    message = CONTINUATION  # the opcode of the message of which fragments are still to come; CONTINUATION: of none
    decoder = codecs.getincrementaldecoder("utf-8")()
    opcode = CONTINUATION
    while opcode != CLOSE:
        final, opcode, payload = read_frame(rfile)
        if opcode == CLOSE:
            wfile.write(frame(CLOSE, payload[:2]))
        elif opcode == PING:
            wfile.write(frame(PONG, payload))
        elif opcode != PONG:
            if (opcode == CONTINUATION) == (message == CONTINUATION):
                raise WebSocketError(1002, "fragments out of order")
            message = opcode or message
            if message == TEXT:
                try:
                    decoder.decode(payload, final)
                except UnicodeDecodeError:
                    raise WebSocketError(1007, "text that is not UTF-8") from None
            message = CONTINUATION if final else message
            wfile.write(frame(opcode, payload, final))
        wfile.flush()


# The program


@contextlib.contextmanager
def serving(server: Backend) -> Iterator[Backend]:
    """Serve in a thread for as long as the `with` block lasts, and leave nothing behind."""
    thread = threading.Thread(target=server.serve_forever, name=f"backend-{server.name}")
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def command_line(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="backend_server.py", description="A small backend to try the balancer with.")
    add = parser.add_argument
    add("--port", type=int, default=8081, help="0 takes a free port (default: 8081)")
    add("--host", default="127.0.0.1", help="the address to listen on (default: 127.0.0.1)")
    add("--id", default="", metavar="NAME", help="who it says it is (default: its port)")
    add("--delay", type=float, default=0.0, metavar="SECONDS", help="wait before each answer")
    add("--fail-rate", type=float, default=0.0, metavar="SHARE", help="answer 500 to this share of the requests, "
        "those for /health apart; with --tcp, close this share of the connections at once")  # fmt: skip
    add("--seed", type=int, help="makes the failures of --fail-rate repeatable")
    add("--tcp", action="store_true", help="echo raw bytes in place of HTTP")
    options = parser.parse_args(arguments)
    for right, flag, must in (
        (0 <= options.port <= 65535, "--port", "0 to 65535"),
        (0 <= options.delay <= 86400, "--delay", "0 to 86400 seconds"),
        (0 <= options.fail_rate <= 1, "--fail-rate", "0 to 1"),
        (NAME.fullmatch(options.id), "--id", "printable ASCII"),
    ):
        if not right:
            parser.error(f"argument {flag}: must be {must}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = command_line(arguments)
    with contextlib.suppress(ValueError, OSError):  # macOS refuses the "unlimited" that it names itself
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        server = make_server(
            options.host, options.port, options.id, delay=options.delay, fail_rate=options.fail_rate,
            seed=options.seed, tcp=options.tcp,
        )  # fmt: skip
    except OSError as error:
        reason = "the port is in use" if error.errno == errno.EADDRINUSE else error.strerror or error
        print(f"backend_server.py: {options.host}:{options.port}: {reason}", file=sys.stderr)
        return 1
    stops = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, stops)  # before a thread starts, for that inherits it: sigwait gets them
    with serving(server):
        scheme = "tcp" if options.tcp else "http"
        print(f"backend {server.name}: listening on {scheme}://{server.address}", flush=True)
        signal.sigwait(stops)
    return 0


if __name__ == "__main__":
    sys.exit(main())
