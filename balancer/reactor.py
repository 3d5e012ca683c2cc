"""The selector loop: descriptors, deadlines, wake-ups. It knows no protocol.

One thread runs it, and everything registered here is called on that thread. Three things happen to it:

- A descriptor is ready: its handler is called. Readiness is a hint, not a promise (a descriptor may have been closed
  and its number given to another within one batch), so handlers ask the socket, without blocking.
- A deadline passes. What has one is a `Timed` in `timed`, with a `deadline` on the reactor's clock that it moves by
  plain assignment, which is all that a request pays. A sweep a few times a second finds those that are over: the cost
  is some 50 ns for each connection and sweep, and a deadline is kept to within one `tick`.
- Another thread says something by `call_soon`: pumps that ended, the health thread, an operator.

What handlers have to send may go to `outbox`, and is sent once all handlers of a batch have run: a processor that does
the same thing many times in a row does it faster than one that does many things in turn (a tenth of all that a small
request costs). For the same reason the clocks are read once for a batch, into `now` and `wall`.

A handler that raises loses its own connection and nothing else: `owner.crashed(error)` is its chance to clean up.
"""

from __future__ import annotations

import select
import selectors
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from operator import itemgetter
from typing import Any, Protocol

# Plain numbers: to combine members of the enumeration that these are of takes a microsecond.
DONTWAIT = int(socket.MSG_DONTWAIT)
PEEK = int(socket.MSG_PEEK)

READ = 1  # EPOLLIN
WRITE = 4  # EPOLLOUT

NEVER = float("inf")

MOST_EVENTS = 1023  # that one call of select.epoll's `poll` returns: with so many, more may be ready

Handler = Callable[[int], None]  # is given the mask that is ready; where there is epoll, EPOLLERR and EPOLLHUP too


_descriptor = itemgetter(0)  # of what a poller returns


class Timed(Protocol):
    """Something with a deadline. Both methods are called on the reactor's thread."""

    deadline: float  # on the reactor's clock; NEVER for none

    def expired(self, now: float) -> None: ...

    def crashed(self, error: Exception) -> None: ...


class Sink(Protocol):
    """What can be sent to without waiting: `send` takes flags, and returns how many octets it has taken."""

    def send(self, data: bytes, flags: int, /) -> int: ...


class Sender(Protocol):
    """Who has something in the outbox. Is told once all of the outbox has been offered."""

    def on_sent(self) -> None:
        """All of it was sent."""

    def on_unsent(self, sink: Any, rest: bytes | None) -> None:
        """So much of it was not; None: nothing was, the connection is lost."""


def send_now(sink: Sink, data: bytes) -> bytes | None:
    """Send what is taken at once. Returns the rest; None where the connection is lost."""
    try:
        sent = sink.send(data, DONTWAIT)
    except BlockingIOError:
        return data
    except OSError:
        return None
    return data[sent:]


class _Poller(Protocol):
    def register(self, fd: int, mask: int, /) -> Any: ...
    def modify(self, fd: int, mask: int, /) -> Any: ...
    def unregister(self, fd: int, /) -> Any: ...
    def poll(self, timeout: float | None, /) -> list[tuple[int, int]]: ...
    def close(self) -> None: ...


class _PortablePoller:
    """select.epoll's calls on whatever the system has."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()

    def register(self, fd: int, mask: int) -> None:
        self._selector.register(fd, self._events(mask))

    def modify(self, fd: int, mask: int) -> None:
        self._selector.modify(fd, self._events(mask))

    def unregister(self, fd: int) -> None:
        self._selector.unregister(fd)

    def poll(self, timeout: float | None) -> list[tuple[int, int]]:
        ready = self._selector.select(timeout)
        return [(key.fd, self._mask(events)) for key, events in ready]

    def close(self) -> None:
        self._selector.close()

    @staticmethod
    def _events(mask: int) -> int:
        return (selectors.EVENT_READ if mask & READ else 0) | (selectors.EVENT_WRITE if mask & WRITE else 0)

    @staticmethod
    def _mask(events: int) -> int:
        return (READ if events & selectors.EVENT_READ else 0) | (WRITE if events & selectors.EVENT_WRITE else 0)


class Reactor:
    """The loop. `tick` is how late a deadline may be noticed, in seconds."""

    def __init__(
        self,
        *,
        tick: float = 0.5,
        on_error: Callable[[str, Exception], None],
        clock: Callable[[], float] = time.monotonic,
        portable: bool = not hasattr(select, "epoll"),
    ) -> None:
        self._must_unregister = portable or sys.platform != "linux"
        self._poller: _Poller = _PortablePoller() if self._must_unregister else select.epoll()
        self.tick = tick
        self._clock = clock
        self._on_error = on_error
        self._stopped = False
        self._calls: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._thread: threading.Thread | None = None
        self._bell, self._bell_button = socket.socketpair()
        self._bell.setblocking(False)
        self._bell_button.setblocking(False)
        self.outbox: list[tuple[Sink, bytes, Sender, bool]] = []  # is it told, too, when all of it was sent?
        self.handlers: dict[int, Handler] = {}  # change an entry to hand a descriptor to another handler
        self.timed: set[Timed] = set()
        self.ready: set[int] = set()  # the descriptors of the current batch, but for those that were emptied since
        self._looked = False  # are they those that were found ready for the current outbox?
        self.now = clock()  # the clock, as it stood when the current batch began
        self.wall = time.time()  # and the time of day: seconds since the epoch
        self.add(self._bell.fileno(), READ, self._bell_rang)

    def add(self, fd: int, mask: int, handler: Handler) -> None:
        """Watch a descriptor. Raises OSError where the system can watch no more."""
        self._poller.register(fd, mask)
        self.handlers[fd] = handler

    def watch(self, fd: int, mask: int) -> None:
        """Change what a descriptor is watched for: READ, WRITE or both."""
        self._poller.modify(fd, mask)

    def remove(self, fd: int) -> None:
        """Forget a descriptor, which must still be open."""
        del self.handlers[fd]
        self._poller.unregister(fd)

    def forget(self, fd: int) -> None:
        """Forget a descriptor that is about to be closed, which is all that epoll has to be told."""
        del self.handlers[fd]
        if self._must_unregister:
            self._poller.unregister(fd)

    def call_soon(self, function: Callable[..., None], *arguments: Any) -> None:
        """Have the reactor call this. Any thread may ask."""
        self._calls.append((function, arguments))
        self.wake()

    def defer(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call this after the current batch. Only the reactor's own thread may ask."""
        self._calls.append((function, arguments))

    def call(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call this now, on the reactor's own thread: where it raises, its owner is lost and the caller is not."""
        try:
            function(*arguments)
        except Exception as error:  # one connection's bug must not end all others
            self._crashed(function, error)

    def wake(self) -> None:
        try:
            self._bell_button.send(b"\0")
        except BlockingIOError:
            return  # it is ringing already
        except OSError:
            return  # the reactor has ended, and what was asked for has nobody to do it

    def may_be_ready(self, fd: int) -> bool:
        """May something have come on this descriptor? The system is asked when an outbox wants to know first."""
        if not self._looked:
            self._looked = True
            self.ready = set(map(_descriptor, self._poller.poll(0)))
        return fd in self.ready or len(self.ready) >= MOST_EVENTS

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="reactor")
        self._thread.start()

    def stop(self) -> None:
        """End the loop, wait for its thread, and close what the reactor itself holds.

        What was asked for by `call_soon` before this is still called.
        """
        self._stopped = True
        self.wake()
        if self._thread is not None:
            self._thread.join()
        self._poller.close()
        self._bell.close()
        self._bell_button.close()

    def _run(self) -> None:
        poll = self._poller.poll
        clock = self._clock
        wall = time.time
        handlers = self.handlers
        now = clock()
        next_sweep = now + self.tick
        while not self._stopped:
            if self._calls:
                events = poll(0)
            elif self.timed:
                events = poll(next_sweep - now)
            else:
                events = poll(None)  # nothing has a deadline: sleep until something happens
            self.now = now = clock()
            self.wall = wall()
            self.ready = set(map(_descriptor, events))
            self._looked = False
            for fd, mask in events:
                handler = handlers.get(fd)
                if handler is not None:
                    try:  # as in `call`, without the cost of calling that
                        handler(mask)
                    except Exception as error:
                        self._crashed(handler, error)
            self.ready = set()
            if self.outbox:
                self._send_out()
            if self._calls:
                self._make_calls()
            if now >= next_sweep:
                self._sweep(now)
                next_sweep = now + self.tick
        self._make_calls()

    def _bell_rang(self, mask: int) -> None:
        try:
            self._bell.recv(4096)
        except BlockingIOError:
            return

    def _make_calls(self) -> None:
        for _ in range(len(self._calls)):
            function, arguments = self._calls.popleft()
            self.call(function, *arguments)
            if self.outbox:
                self._send_out()

    def _sweep(self, now: float) -> None:
        for timed in [timed for timed in self.timed if timed.deadline <= now]:
            if timed.deadline > now or timed not in self.timed:
                continue  # an earlier one's end changed it
            timed.deadline = NEVER
            self.call(timed.expired, now)
            if self.outbox:
                self._send_out()

    def _send_out(self) -> None:
        """Send what is in the outbox, and then tell those whose it was, who may fill it again."""
        while self.outbox:
            outbox, self.outbox = self.outbox, []
            self._looked = False
            sent_all: list[Sender] = []
            sent_some: list[tuple[Sender, Sink, bytes | None]] = []
            for sink, data, sender, wants_to_know in outbox:  # `send_now`, without the cost of calling that
                try:
                    sent = sink.send(data, DONTWAIT)
                except BlockingIOError:
                    sent_some.append((sender, sink, data))
                except OSError:
                    sent_some.append((sender, sink, None))
                except Exception as error:
                    self._crashed(sender.on_unsent, error)
                else:
                    if sent < len(data):
                        sent_some.append((sender, sink, data[sent:]))
                    elif wants_to_know:
                        sent_all.append(sender)
            for sender in sent_all:
                try:
                    sender.on_sent()
                except Exception as error:
                    self._crashed(sender.on_sent, error)
            for sender, sink, rest in sent_some:
                self.call(sender.on_unsent, sink, rest)

    def _crashed(self, function: Callable[..., None], error: Exception) -> None:
        method = getattr(function, "func", function)  # what a partial stands for
        name = getattr(method, "__qualname__", repr(method))
        self._on_error(f"reactor: {name}", error)
        crashed = getattr(getattr(method, "__self__", None), "crashed", None)
        if crashed is None:
            return
        try:
            crashed(error)
        except Exception as second:
            self._on_error(f"reactor: cleaning up after {name}", second)
