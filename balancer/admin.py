"""The operator's port: a page, figures and changes over plain HTTP. What there is, see api.py; who may, see gate.py.

One request to a connection (`Connection: close`): a page that polls each second needs no more, and nothing that a
request leaves unread can be taken for the next one. Each connection has a thread of its own, at most MOST at a time,
and a deadline that `service_actions` keeps: a client that is silent, that drips or that does not read is cut. When all
are taken, the one that has waited longest makes room, so that silent ones never lock an operator out. A request that
is being worked on has no deadline.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import BaseServer
from typing import Any

from balancer.api import LARGEST_BODY, Answer, Api, Operator, Refused, Route, body_length, find_route
from balancer.config import AdminPort, format_address
from balancer.gate import Gate, anybody_can_read
from balancer.listener import PAUSE, SHORT_OF_DESCRIPTORS, bind

PAGE = Path(__file__).with_name("page.html")

LARGEST_HEAD = 65536
MOST = 64  # connections at a time
PATIENCE = 10.0  # seconds that a client is given to send its request, and again to take the answer and hang up
ROOM_PATIENCE = 1.0  # seconds that one which makes room is given to be gone
STOP_PATIENCE = 2.0  # seconds that requests are given to end when the port is closed
POLL = 0.25  # seconds from one look at the deadlines to the next
QUIET = 10.0  # seconds from one line about refused changes, or about bugs, to the next
NEVER = math.inf

COMMON_FIELDS = {
    "Connection": "close",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""On every answer; an answer's own fields win."""


def page_policy(page: str) -> str:
    """The Content-Security-Policy under which the scripts and styles that stand in the page work, and nothing else."""

    def allowed(kind: str) -> str:
        digests = [hashlib.sha256(text.encode()).digest() for text in re.findall(rf"(?s)<{kind}>(.*?)</{kind}>", page)]
        return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests) or "'none'"

    return (
        f"default-src 'none'; script-src {allowed('script')}; style-src {allowed('style')}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    )


class Sparing:
    """Speaks once in QUIET seconds; of what there was to say between it keeps the last of each level, and how many."""

    def __init__(self, on_event: Callable[[str, str], None], clock: Callable[[], float]) -> None:
        self._on_event = on_event
        self._clock = clock
        self._lock = threading.Lock()  # guards what follows
        self._unsaid: dict[str, tuple[str, int]] = {}  # by level
        self._due = -math.inf

    def say(self, level: str, text: str) -> None:
        with self._lock:
            _, count = self._unsaid.get(level, ("", 0))
            self._unsaid[level] = text, count + 1
        self.flush()

    def flush(self) -> None:
        """Say what is unsaid, if it is time."""
        with self._lock:
            now = self._clock()
            if not self._unsaid or now < self._due:
                return
            self._due = now + QUIET
            lines, self._unsaid = self._unsaid, {}
        for level, (text, count) in lines.items():
            self._on_event(level, text if count == 1 else f"{text} (the last of {count} since the line before)")


class Handler(BaseHTTPRequestHandler):
    """One request and its answer. An OSError that it raises is a client that has gone, or was cut."""

    server: AdminServer
    protocol_version = "HTTP/1.1"
    default_request_version = request_version = "HTTP/1.0"  # so that even HTTP/0.9 is answered with a head
    command = ""
    expects_continue = False

    def handle(self) -> None:
        # http.server takes the end of the stream for the end of the head, and half a request must not be acted on.
        head, line = bytearray(), b""
        while line not in (b"\r\n", b"\n"):
            line = self.rfile.readline(LARGEST_HEAD + 1 - len(head))
            head += line
            if not line:
                return
            if len(head) > LARGEST_HEAD:
                self.send_error(431)
                return
        self.raw_requestline, _, fields = bytes(head).partition(b"\n")
        stream, self.rfile = self.rfile, io.BytesIO(fields)
        try:
            is_request = self.parse_request()
        finally:
            self.rfile = stream
        if is_request:
            self._send(self._answer())

    def _answer(self) -> Answer:
        route: Route | None = None
        who = _name(self.client_address)
        path, _, query = self.path.partition("?")
        try:
            route, id = find_route(self.command, path)
            self.server.gate.check(route, self.headers)
            body = self._read_body() if route.has_body else b""
        except Refused as refused:
            if route and route.changes and refused.status in (401, 403):
                # The path as it came could be of any length and hold anything, even a token.
                self.server.voice.say("warning", f"{who}: {route.method} {route.path} was refused: {refused}")
            return refused.answer()
        self.server.allow(self.connection, NEVER)
        try:
            return self.server.api.answer(route, id, who, query, body)
        except Exception as error:
            self.server.report_bug(f"{who}: {route.method} {route.path}")
            return Refused(500, f"internal error, {type(error).__name__}; the log says more").answer()

    def _read_body(self) -> bytes:
        length = body_length(self.headers)
        if self.expects_continue:
            super().handle_expect_100()
        body = self.rfile.read(length)
        if len(body) < length:
            raise Refused(400, f"the body ended after {len(body)} of {length} octets")
        return body

    def handle_expect_100(self) -> bool:
        """The body is asked for when it is wanted: not by a request that is refused."""
        self.expects_continue = True
        return True

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the parser of http.server refuses. Its own text repeats what the client sent."""
        self._send(Refused(code, f"send an HTTP/1.1 request, its head at most {LARGEST_HEAD} octets long").answer())

    def _send(self, answer: Answer) -> None:
        self.server.allow(self.connection, self.server.patience)
        self.send_response_only(answer.status)
        fields = {"Date": self.date_time_string(), "Content-Type": answer.kind, "Content-Length": str(len(answer.body))}
        for name, value in {**COMMON_FIELDS, **fields, **answer.fields}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)


class AdminServer(BaseServer):
    """The operator's port. The constructor binds it; raises OSError with a line for people.

    `token` is what changes need; with "" there are none. `on_event` is told (level, text) from any thread.
    """

    def __init__(
        self,
        address: AdminPort,
        token: str,
        operator: Operator,
        on_event: Callable[[str, str], None],
        *,
        patience: float = PATIENCE,
        most: int = MOST,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        try:
            page = PAGE.read_text(encoding="utf-8")
        except OSError as error:
            raise OSError(f"cannot read {PAGE}: {error.strerror}") from None
        policy = {"Content-Security-Policy": page_policy(page)}
        self.api = Api(operator, Answer(200, "text/html; charset=utf-8", page.encode(), policy))
        self.gate = Gate(address, token)
        self.voice = Sparing(on_event, clock)
        self.patience = patience
        self._token_file = address.token_file
        self._on_event = on_event
        self._most = most
        self._clock = clock
        self._room = threading.Condition()  # guards the deadlines; notified when a connection was closed
        self._deadlines: dict[socket.socket, float] = {}  # of each open connection
        self._handlers: list[threading.Thread] = []  # those that have not ended, and perhaps some that have
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self.serve_forever, args=(POLL,), name="admin", daemon=True)
        self.socket = bind(address.host, address.port)
        host, port = self.socket.getsockname()[:2]
        self.url = f"http://{format_address(host, port)}"
        super().__init__((host, port), Handler)

    def start(self) -> None:
        if self._token_file and anybody_can_read(self._token_file):
            self._on_event("warning", f"{self._token_file}: anybody here can read the token; chmod o-r the file")
        self._thread.start()

    def stop(self) -> None:
        """Close the port, let changes under way end, and end every connection and thread. May be called twice."""
        self._stopping.set()
        if self._thread.is_alive():
            with suppress(OSError):  # not on macOS, where the poll has to end by itself
                self.socket.shutdown(socket.SHUT_RDWR)
            self.shutdown()
            self._thread.join()
        self.socket.close()
        for deadline in (sys.float_info.max, NEVER):  # first those that wait for a client, then those at work too
            self._cut_overdue(deadline)
            until = time.monotonic() + STOP_PATIENCE
            for handler in self._handlers:
                handler.join(max(0.0, until - time.monotonic()))
        if left := sum(handler.is_alive() for handler in self._handlers):
            self._on_event("error", f"admin: requests that did not end: {left}")

    def allow(self, request: socket.socket, seconds: float) -> None:
        """The connection is cut unless it has ended, or was given more time, in so many seconds."""
        with self._room:
            self._deadlines[request] = self._clock() + seconds

    def report_bug(self, where: str) -> None:
        """Say in one line what the error is that is being handled, and where it comes from."""
        _, error, trace = sys.exc_info()
        *_, place = traceback.extract_tb(trace)
        text = f"{where}: bug: {type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
        self.voice.say("error", " ".join(text.split()))

    # What follows is called by socketserver: on the thread "admin", or on a connection's own where it is said.

    def fileno(self) -> int:
        return self.socket.fileno()

    def service_actions(self) -> None:
        self._cut_overdue(self._clock())
        self.voice.flush()
        try:
            self.api.figures.sample()
        except Exception:  # without this thread there would be no port any more
            self.report_bug("sampling")

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            request, address = self.socket.accept()
        except OSError as error:
            if error.errno in SHORT_OF_DESCRIPTORS:
                self._stopping.wait(PAUSE)  # the client stays in the backlog, and select would say so at once
            raise
        request.setblocking(True)  # on macOS it inherits the listener's mode
        return request, address

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give the connection a thread, for which another may have to go."""
        with self._room:
            if len(self._deadlines) >= self._most:
                if (soonest := min(self._deadlines.values())) < NEVER:
                    self._cut_overdue(soonest)
                if not self._room.wait_for(lambda: len(self._deadlines) < self._most, ROOM_PATIENCE):
                    request.close()
                    return
            self._deadlines[request] = self._clock() + self.patience
        name = f"admin-{client_address[1]}"
        thread = threading.Thread(target=self._serve, args=(request, client_address), name=name, daemon=True)
        thread.start()
        self._handlers = [*(handler for handler in self._handlers if handler.is_alive()), thread]

    def _serve(self, request: socket.socket, client_address: Any) -> None:
        """On the connection's own thread."""
        try:
            with suppress(OSError):  # the client has gone, or was cut
                self.finish_request(request, client_address)
                # Closing a socket with unread octets would reset it, and take the answer along (RFC 9112, 9.6).
                request.shutdown(socket.SHUT_WR)
                while request.recv(LARGEST_BODY):
                    continue
        except Exception:
            self.handle_error(request, client_address)
        finally:
            self.close_request(request)

    def close_request(self, request: Any) -> None:
        """On the connection's own thread."""
        with self._room:
            self._deadlines.pop(request, None)
            request.close()
            self._room.notify_all()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """On either kind of thread, while the error is being handled."""
        self.report_bug(_name(client_address))

    def _cut_overdue(self, now: float) -> None:
        """Wake their threads, which end. The lock keeps this from a descriptor that is another's by then."""
        with self._room:
            for request, deadline in self._deadlines.items():
                if deadline <= now:
                    with suppress(OSError):  # it has gone by itself
                        request.shutdown(socket.SHUT_RDWR)


def _name(client_address: Any) -> str:
    """Who asks, for the log."""
    return f"admin {format_address(*client_address[:2])}"
