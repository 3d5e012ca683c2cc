"""Clients that take their time, any number of them on one thread: `python tests/slow_clients.py PORT HEADS READERS`.

HEADS send one octet of a request's head every second, READERS ask for a long answer and read one octet of it every
second, which is what slowloris and its kin do. Whoever is cut begins anew, until SIGTERM.
"""

from __future__ import annotations

import selectors
import signal
import socket
import struct
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from contextlib import ExitStack, suppress
from types import TracebackType

HEAD = b"GET / HTTP/1.1\r\nHost: lb.test\r\nX-Slow: "  # and then x for ever
LONG = b"GET /bytes/5000000 HTTP/1.1\r\nHost: lb.test\r\n\r\n"
SMALL_WINDOW = 2048  # octets that a reader's kernel takes in for it: the rest has to wait where it is
LIFE = 6.0  # seconds after which a reader hangs up and begins anew: it cannot see that it was cut
GLANCE = 0.05  # seconds after which it is noticed that all are to end
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with a reset


class SlowClient(ABC):
    """One connection after the other. What ended each is counted in `seen`."""

    def __init__(self, port: int, seen: Counter[str], selector: selectors.BaseSelector) -> None:
        self._port = port
        self._seen = seen
        self._selector = selector
        self.sock: socket.socket | None = None
        self.ended = 0

    def turn(self) -> None:
        """An octet, or a connection where there is none."""
        try:
            if self.sock is None:
                self.sock = socket.socket()
                self.begin(self.sock)
            else:
                self.go_on(self.sock)
        except BlockingIOError:
            return
        except OSError as error:
            self.end(type(error).__name__)

    @abstractmethod
    def begin(self, sock: socket.socket) -> None: ...

    @abstractmethod
    def go_on(self, sock: socket.socket) -> None: ...

    def end(self, what: str = "") -> None:
        if what:
            self._seen[what] += 1
            self.ended += 1
        if self.sock is not None:
            with suppress(KeyError):
                self._selector.unregister(self.sock)
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            self.sock.close()
            self.sock = None


class SlowHead(SlowClient):
    """Sends one octet of a head at a time; counts the status of what it is told, 408 if all is well."""

    def begin(self, sock: socket.socket) -> None:
        self._sent = 0
        self._told = b""
        sock.connect(("127.0.0.1", self._port))
        self._selector.register(sock, selectors.EVENT_READ, self)

    def go_on(self, sock: socket.socket) -> None:
        sock.send(HEAD[self._sent : self._sent + 1] or b"x")
        self._sent += 1

    def readable(self) -> None:
        assert self.sock is not None
        try:
            data = self.sock.recv(4096)
        except OSError as error:
            self.end(type(error).__name__)
            return
        self._told += data
        if not data:
            self.end(self._told[9:12].decode() or "closed")


class SlowReader(SlowClient):
    """Reads one octet of a long answer at a time."""

    def begin(self, sock: socket.socket) -> None:
        self._until = time.monotonic() + LIFE
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_WINDOW)
        sock.connect(("127.0.0.1", self._port))
        sock.send(LONG)

    def go_on(self, sock: socket.socket) -> None:
        if time.monotonic() > self._until:
            self.end("hung up")
        elif not sock.recv(1, socket.MSG_DONTWAIT):
            self.end("closed")


class SlowClients:
    """So many of each, on a thread from entering to leaving. `again`: whoever has ended begins anew."""

    def __init__(self, port: int, heads: int, readers: int, *, interval: float = 1.0, again: bool = True) -> None:
        self.seen: Counter[str] = Counter()
        self._interval = interval
        self._again = again
        self._stop = threading.Event()
        self._selector = selectors.DefaultSelector()
        self._clients: list[SlowClient] = [
            *(SlowHead(port, self.seen, self._selector) for _ in range(heads)),
            *(SlowReader(port, self.seen, self._selector) for _ in range(readers)),
        ]
        self._thread = threading.Thread(target=self.run, name="slow-clients")

    def __enter__(self) -> SlowClients:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()
        self._thread.join()

    def stop(self) -> None:
        self._stop.set()

    def run(self) -> None:
        """Give each its turn every `interval` seconds, evenly spread, until they are to stop."""
        with ExitStack() as stack:
            stack.enter_context(self._selector)
            for client in self._clients:
                stack.callback(client.end)
            begun = time.monotonic()
            step = self._interval / len(self._clients)
            due = deque((begun + place * step, client) for place, client in enumerate(self._clients))
            while due and not self._stop.is_set():
                now = time.monotonic()
                while due and due[0][0] <= now:
                    at, client = due.popleft()
                    client.turn()
                    if self._again or not client.ended:
                        due.append((at + self._interval, client))
                wait = min(GLANCE, max(0.0, due[0][0] - now)) if due else 0.0
                for key, _ in self._selector.select(wait):
                    key.data.readable()


def main() -> int:
    clients = SlowClients(*map(int, sys.argv[1:4]))
    signal.signal(signal.SIGTERM, lambda number, frame: clients.stop())
    clients.run()
    print(dict(clients.seen))
    return 0


if __name__ == "__main__":
    sys.exit(main())
