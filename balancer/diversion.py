"""Backends that misbehave, for the tests of programs: what the balancer is led to in a backend's place.

These are real sockets on loopback, so a connection is refused by the system itself and an answer is late on the wire.
Nothing here is used by a balancer that serves.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial

from balancer.backend import Endpoint

PIECE = 65536  # octets


class Diversion:
    """An endpoint of our own."""

    def __init__(self) -> None:
        self._sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._sock.bind(("127.0.0.1", 0))

    @property
    def endpoint(self) -> Endpoint:
        return socket.AF_INET, self._sock.getsockname()

    def close(self) -> None:
        self._sock.close()


class Refusing(Diversion):
    """A port that is taken and does not listen: the system refuses connections to it."""


class Delaying(Diversion):
    """Leads to one of the `endpoints`, but what comes after an answer, or first of all, waits `seconds` before it."""

    def __init__(self, seconds: float, endpoints: Callable[[], Sequence[Endpoint]]) -> None:
        super().__init__()
        self._seconds = seconds
        self._endpoints = endpoints
        self._closed = threading.Event()
        self._lock = threading.Lock()  # guards what follows
        self._open: set[socket.socket] = {self._sock}
        self._threads: list[threading.Thread] = []
        self._sock.listen(128)
        self._start(self._accept)

    def close(self) -> None:
        """Cut every connection, and wait for the threads."""
        self._closed.set()
        with self._lock:
            for sock in self._open:
                _shut(sock, socket.SHUT_RDWR)
        while self._threads:
            self._threads.pop().join()
        super().close()

    def _start(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, name="delay", daemon=True)
        with self._lock:
            self._threads = [*(one for one in self._threads if one.is_alive()), thread]
            thread.start()

    def _accept(self) -> None:
        with suppress(OSError):  # the end: it was shut down
            while True:
                client, _ = self._sock.accept()
                self._start(partial(self._carry, client))

    def _carry(self, client: socket.socket) -> None:
        """One connection: down on this thread, up on another."""
        turn = threading.Event()  # what comes next from the client begins a request
        turn.set()
        with self._watched(client), suppress(OSError):  # a backend that cannot be reached: the client is closed
            family, address = self._endpoints()[0]
            backend = socket.socket(family, socket.SOCK_STREAM)
            with self._watched(backend):
                backend.connect(address)

                def before_passing_up() -> None:
                    if turn.is_set():
                        turn.clear()
                        self._closed.wait(self._seconds)

                pass_up = partial(_pass_on, client, backend, before_passing_up)
                up = threading.Thread(target=pass_up, name="delay", daemon=True)
                up.start()
                _pass_on(backend, client, turn.set)
                up.join()

    @contextmanager
    def _watched(self, sock: socket.socket) -> Iterator[None]:
        """Close it at the end, and have `close` cut it before that."""
        with sock:
            with self._lock:
                self._open.add(sock)
                if self._closed.is_set():
                    _shut(sock, socket.SHUT_RDWR)
            try:
                yield
            finally:
                with self._lock:
                    self._open.discard(sock)


def _pass_on(source: socket.socket, sink: socket.socket, before: Callable[[], None]) -> None:
    """Whatever comes, until one of the two ends; then the other is told."""
    with suppress(OSError):
        while data := source.recv(PIECE):
            before()
            sink.sendall(data)
    _shut(sink, socket.SHUT_WR)


def _shut(sock: socket.socket, how: int) -> None:
    with suppress(OSError):  # it is gone already
        sock.shutdown(how)
