"""Stand-ins that tests play backends and clients with: raw sockets, port 0, every octet as it came."""

from __future__ import annotations

import http.client
import io
import selectors
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from conftest import PATIENCE


class Connection:
    """One connection that a FakeBackend accepted, as its handler sees it."""

    def __init__(self, sock: socket.socket, requests: list[bytes]) -> None:
        self.sock = sock
        self.file = sock.makefile("rb")
        self._requests = requests

    def read_request(self) -> bytes:
        """The next request's head and body as they came, b"" at the end; recorded in the backend's `requests`."""
        octets = read_message(self.file)
        if octets:
            self._requests.append(octets)
        return octets

    def send(self, octets: bytes) -> None:
        self.sock.sendall(octets)


Handler = Callable[[Connection], object]


class FakeBackend:
    """A backend that does as it is told: on port 0, one thread that accepts and one for each connection.

    `script` is a handler, called with each Connection, which is closed when the handler returns; or the answers in raw
    octets, sent one for each request that comes, on whichever connection. The last answer repeats; b"" hangs up
    without one. A handler that raises anything but OSError fails the test.

    Use it as a context manager. Leaving hangs up on everyone and waits until its threads have ended.
    """

    def __init__(self, script: Handler | Sequence[bytes] | bytes, *, host: str = "127.0.0.1") -> None:
        self.requests: list[bytes] = []
        self.accepted = 0
        self._answers = [script] if isinstance(script, bytes) else [] if callable(script) else list(script)
        self._handler = script if callable(script) else self._answer
        self._lock = threading.Lock()  # guards _answers, _open, _threads and accepted
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, backlog=128)
        self.host = host
        self.port: int = self._listener.getsockname()[1]
        self._wake, self._woken = socket.socketpair()
        self._acceptor = threading.Thread(target=self._accept, name=f"fake-{self.port}-accept")
        self._acceptor.start()

    @property
    def address(self) -> str:
        """`127.0.0.1:PORT`, `[::1]:PORT`."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __enter__(self) -> FakeBackend:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening, hang up on every connection and wait for the threads. May be called twice."""
        self._wake.close()
        self._acceptor.join(PATIENCE)
        with self._lock:
            connections, threads = list(self._open), list(self._threads)
        for connection in connections:
            hang_up(connection)
        for thread in threads:
            thread.join(PATIENCE)
        stuck = [thread.name for thread in [self._acceptor, *threads] if thread.is_alive()]
        assert not stuck, f"handlers that do not return: {stuck}"

    def _accept(self) -> None:
        with self._listener, self._woken, selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while self._woken not in [key.fileobj for key, _ in selector.select()]:
                sock, _ = self._listener.accept()
                with self._lock:
                    self.accepted += 1
                    name = f"fake-{self.port}-{self.accepted}"
                    thread = threading.Thread(target=self._serve, args=(sock,), name=name)
                    self._open.add(sock)
                    self._threads.append(thread)
                thread.start()

    def _serve(self, sock: socket.socket) -> None:
        with sock:
            connection = Connection(sock, self.requests)
            try:
                with connection.file:
                    self._handler(connection)
            except OSError:
                return  # the other side went away: the test looks at what that side saw
            finally:
                with self._lock:
                    self._open.discard(sock)
                hang_up(sock)

    def _answer(self, connection: Connection) -> None:
        while connection.read_request():
            with self._lock:
                answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
            if not answer:
                return
            connection.send(answer)


def hang_up(sock: socket.socket) -> None:
    """End both directions, which wakes a thread that reads (close alone would not)."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # it is gone already


def read_message(file: io.BufferedReader) -> bytes:
    """One HTTP message that has a length or is chunked, as it came; what there is of it if the peer ends before."""
    head = read_lines(file)
    fields = head.lower().split(b"\r\n")[1:]
    values = {name.strip(): value.strip() for name, _, value in (field.partition(b":") for field in fields)}
    if values.get(b"transfer-encoding", b"").endswith(b"chunked"):
        return head + read_chunks(file)
    return head + file.read(int(values.get(b"content-length", 0)))


def read_chunks(file: io.BufferedReader) -> bytes:
    """A chunked body as it came, to the end of its trailers."""
    octets = b""
    while line := file.readline():
        octets += line
        size = int(line.split(b";")[0], 16)
        if size == 0:
            return octets + read_lines(file)
        octets += file.read(size + 2)
    return octets


def read_lines(file: io.BufferedReader) -> bytes:
    """Lines up to and with an empty one."""
    octets = b""
    while line := file.readline():
        octets += line
        if line == b"\r\n":
            break
    return octets


@dataclass(frozen=True)
class Answer:
    """What a client got back, its body decoded."""

    status: int
    reason: str
    version: int
    """10 or 11."""
    headers: http.client.HTTPMessage
    body: bytes


def read_response(source: socket.socket | io.BufferedReader, method: str = "GET") -> Answer:
    """The next answer, read by http.client; a 100 before it is skipped.

    From a socket only where no octets follow the answer at once, for they would be lost; to read several answers make
    one `sock.makefile("rb")` and pass that each time. `method` is the request's: HEAD has no body.
    """
    if isinstance(source, socket.socket):
        with source.makefile("rb") as file:
            return read_response(file, method)
    response = http.client.HTTPResponse(Lent(source), method=method)  # type: ignore[arg-type]
    response.begin()
    body = response.read()
    return Answer(response.status, response.reason, response.version, response.headers, body)


class Lent:
    """A file lent to HTTPResponse, which takes a socket and closes what it has read to the end."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = file

    def makefile(self, mode: str) -> Lent:
        return self

    def close(self) -> None:
        """The file stays its owner's to close."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
