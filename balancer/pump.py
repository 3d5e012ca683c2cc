"""One direction of bytes, blocking, on a thread of its own; and the pool of those threads.

While a pump runs it owns the receiving side of `source` and the sending side of `sink`; nobody else may use those.
It never closes a socket: it says how it ended, and the session, which awaits both directions, closes.
It ends early when somebody shuts one of the sockets down (`close` in another thread would not wake it).

How long it waits is the kernel's business: SO_RCVTIMEO on the source and SO_SNDTIMEO on the sink cost nothing per call,
where `settimeout` would poll before each. Sockets stay in blocking mode; the reactor asks for MSG_DONTWAIT per call.

Bytes that need not be looked at move by `os.splice` through a pipe, without being copied. Where there is no splice, no
descriptors for a pipe or no pages to make it large, they are received and sent.

A sender that is as fast as we are would wake us for each piece that it sends, and pay for that itself. So after a small
move in a flood a pump lets the next ones gather for a moment, as a network card holds its interrupts back: see `Pace`.
"""

from __future__ import annotations

import enum
import errno
import fcntl
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from functools import partial

from balancer.framing import Body, Encoder, FramingError, Truncated, as_is
from balancer.stream import Stream

PIECE = 1 << 20  # octets per call of splice at most: what a wide pipe holds
WIDE = 16  # wide pipes at once: a user's pipes may have 64 MiB altogether, and other programs want some
NARROW = 1 << 18  # octets that any other pipe holds
COPIED = 1 << 18  # octets that a copy receives at once
LIMIT = 4096  # pump threads at once
IDLE_SECONDS = 10.0  # that a pump thread waits for its next piece of work
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with a reset
STEPS = 4  # in which a sink that takes nothing is waited for
FEW = 1 << 17  # octets: a move of fewer is small, and a flood's may gather
MOMENT = 2e-5  # seconds that they are given, to which Linux adds some 50 microseconds of its own
WARY = 16  # small moves in a row before the first pause, and after one that gathered nothing
SPLICES = hasattr(os, "splice")

# What splice says of a kind of socket that it cannot read from or write to.
_UNSPLICEABLE = frozenset((errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM))
_F_SETPIPE_SZ = 1031  # fcntl.F_SETPIPE_SZ, which Python 3.10 has no name for on every system


class End(enum.Enum):
    """How one direction ended."""

    DONE = "done"  # the end of the body, or of the stream
    SILENT = "silent"  # nothing came for as long as was agreed
    CUT = "cut"  # the source closed before the end of the body
    BAD = "bad"  # the body breaks the rules of its framing
    SOURCE_LOST = "source lost"  # reset, or shut down by us
    SINK_LOST = "sink lost"
    SINK_STUCK = "sink stuck"  # it took nothing for as long as was agreed
    FAILED = "failed"  # it is the pump that broke: a bug, or no memory


class Flow:
    """What a pump moves, and how far it came.

    `octets` counts what was sent on, without chunk framing; where the sink failed, a piece that was being copied just
    then is left out.
    """

    __slots__ = ("copies", "end", "exact", "octets", "problem", "sink", "source", "status", "stuck")

    def __init__(self, source: Stream, sink: Stream) -> None:
        self.source = source
        self.sink = sink
        self.octets = 0
        self.exact = isinstance(source, socket.socket)  # gives no more than it is asked for, which TLS does
        # Receives and sends, where splice cannot be used.
        self.copies = not (SPLICES and self.exact and isinstance(sink, socket.socket))
        self.stuck = float("inf")  # seconds for which the sink may take nothing
        self.end = End.FAILED  # until the pump knows better: no direction is held to be whole by mistake
        self.problem = ""
        self.status = 400  # what the one who sent a body that is BAD is to be told

    def wait_at_most(self, silence: float, stuck: float) -> None:
        """Bound how long the pump waits for the source and for the sink, in seconds. For the reactor's thread."""
        self.stuck = stuck
        try:
            self.source.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(silence))
            self.sink.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(stuck / STEPS))
        except OSError:
            return  # macOS refuses this for a connection that is dead, and so will the pump's first call


Order = tuple[str, Callable[[], None]]  # the name for the thread, and the work


class _Post:
    """Where one thread waits for its next order. (A timeout of SimpleQueue.get may never end, up to Python 3.12.)"""

    __slots__ = ("bell", "order")

    def __init__(self) -> None:
        self.bell = threading.Lock()  # released by whoever has an order, or the last word, for the thread
        self.bell.acquire()
        self.order: Order | None = None


class Pumps:
    """Threads that are kept for the next piece of work, `idle_seconds` long. At most `limit` at once.

    on_error: is told, on the pump's thread, of work that raised, which is a bug.
    """

    def __init__(
        self,
        limit: int = LIMIT,
        idle_seconds: float = IDLE_SECONDS,
        on_error: Callable[[str, Exception], None] | None = None,
    ) -> None:
        self._lock = threading.Lock()  # guards `_stopped`, `_waiting` and `_threads`
        self._stopped = False
        self._waiting: list[_Post] = []  # the newest last, and called first: the others may reach the end of their time
        self._threads: set[threading.Thread] = set()
        self._limit = limit
        self._on_error = on_error
        self.idle_seconds = idle_seconds

    def __repr__(self) -> str:
        return f"<Pumps {len(self._threads)} threads, {len(self._waiting)} waiting>"

    @property
    def threads(self) -> int:
        return len(self._threads)

    def run(self, name: str, work: Callable[[], None]) -> None:
        """Run this on a thread called `name`. Raises RuntimeError when no thread can be had."""
        with self._lock:
            if self._waiting:
                post = self._waiting.pop()
                post.order = (name, work)
                post.bell.release()
                return
            if self._stopped or len(self._threads) >= self._limit:
                raise RuntimeError(f"no pump thread for {name}: {'stopped' if self._stopped else 'all are busy'}")
            thread = threading.Thread(target=self._serve, args=(name, work), name=name)
            thread.start()  # under the lock, so that `stop` finds none that has not begun
            self._threads.add(thread)

    def stop(self) -> None:
        """Wait for the work in hand, which somebody must have ended, and for every thread."""
        with self._lock:
            self._stopped = True
            while self._waiting:
                self._waiting.pop().bell.release()
            threads = list(self._threads)
        for thread in threads:
            thread.join()

    def _serve(self, name: str, work: Callable[[], None]) -> None:
        this = threading.current_thread()
        post = _Post()
        try:
            while True:
                this.name = name
                try:
                    work()
                except Exception as error:
                    if self._on_error is None:
                        raise
                    self._on_error(f"pump {name}", error)
                this.name = "pump-waiting"
                order = self._next_order(post)
                if order is None:
                    return
                name, work = order
        finally:
            _close_pipe()
            with self._lock:
                self._threads.discard(this)

    def _next_order(self, post: _Post) -> Order | None:
        """The next piece of work, or None when it is time to go."""
        post.order = None
        with self._lock:
            if self._stopped:
                return None
            self._waiting.append(post)
        if not post.bell.acquire(timeout=self.idle_seconds):
            with self._lock:
                if post in self._waiting:
                    self._waiting.remove(post)
                    return None
            post.bell.acquire()  # it was called at the last moment
        return post.order


def _timeval(seconds: float) -> bytes:
    whole = int(seconds)
    return struct.pack("@ll", whole, max(1, int((seconds - whole) * 1_000_000)))  # 0 would be for ever


def relay_body(flow: Flow, body: Body, encode: Encoder, first: bytes = b"", last: bytes = b"") -> None:
    """Move a message's body: `first` as it is, then the content that `body` finds, encoded, then `last` as it is.

    Nothing behind the body is taken from the source, save what came in one piece with the end of the last chunk, which
    is in `body.rest`. The result stands in `flow`.
    """
    flow.end = End.FAILED
    try:
        if first:
            _send_all(flow, first)
        pace = Pace()
        while not body.done:
            moved = _move_content(flow, body, encode)
            if not moved:
                body.eof()
            elif not body.done:
                pace.moved(moved)
        if last:
            _send_all(flow, last)
        flow.end = End.DONE
    except _Ended as ended:
        flow.end, flow.problem = ended.end, ended.problem
    except Truncated as error:
        flow.end, flow.problem = End.CUT, str(error)
    except FramingError as error:
        flow.end, flow.problem, flow.status = End.BAD, str(error), error.status


def _move_content(flow: Flow, body: Body, encode: Encoder) -> int:
    """Pass on some of the body, and count the octets that this took from the source. 0 at its end."""
    if body.left is not None and encode is as_is and flow.exact:
        moved = _move(flow, min(PIECE, body.left))
        body.skipped(moved)
        return moved
    data = _receive(flow.source, COPIED if body.left is None else min(COPIED, body.left))
    if data and (content := body.feed(data)):
        _send_all(flow, encode(content))
        flow.octets += len(content)
    return len(data)


def relay_stream(flow: Flow, first: bytes = b"") -> None:
    """Move whatever comes until the source ends, and then half-close the sink, or until the source is silent."""
    flow.end = End.FAILED
    try:
        if first:
            _send_all(flow, first)
            flow.octets += len(first)
        pace = Pace()
        while moved := _move(flow, PIECE):
            pace.moved(moved)
        flow.end = End.DONE if half_close(flow.sink) else End.SINK_LOST
    except _Ended as ended:
        flow.end, flow.problem = ended.end, ended.problem


class Pace:
    """Lets what a flood brings gather between two moves, where that makes the moves larger.

    A dialogue gains nothing by a pause: its next message comes when the last one is answered. So a pause that is not
    followed by more octets than a move without one brings is not tried again soon.
    """

    __slots__ = ("_paused", "_sleep", "_usual", "_wary")

    def __init__(self, sleep: Callable[[float], object] = time.sleep) -> None:
        self._sleep = sleep
        self._paused = False
        self._usual = 0  # octets of the last small move that had no pause before it
        self._wary = WARY  # small moves until a pause may be tried

    def moved(self, octets: int) -> None:
        """So many were passed on: pause, if that is worth it."""
        if not self._paused:
            self._usual = octets
        elif octets <= self._usual:
            self._wary = WARY
        self._paused = octets < FEW and not self._wary
        if self._paused:
            self._sleep(MOMENT)
        elif octets < FEW:
            self._wary -= 1


class _Ended(Exception):
    def __init__(self, end: End, error: OSError) -> None:
        self.end = end
        self.problem = error.strerror or str(error)


def _receive(source: Stream, most: int) -> bytes:
    try:
        return source.recv(most)
    except BlockingIOError as error:  # SO_RCVTIMEO
        raise _Ended(End.SILENT, error) from None
    except OSError as error:
        raise _Ended(End.SOURCE_LOST, error) from None


def _send_all(flow: Flow, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[_push(flow, partial(flow.sink.send, rest)) :]


def _push(flow: Flow, send: Callable[[], int]) -> int:
    """Have the sink take something, and return how much that was.

    SO_SNDTIMEO begins anew with each page that is taken within one call, so it is only the step in which time passes;
    how long the sink has taken nothing is measured here.
    """
    begun = time.monotonic()
    while True:
        try:
            return send()
        except BlockingIOError as error:
            if time.monotonic() - begun >= flow.stuck:
                raise _Ended(End.SINK_STUCK, error) from None
        except OSError as error:
            if error.errno in _UNSPLICEABLE:
                raise
            raise _Ended(End.SINK_LOST, error) from None


def half_close(sink: Stream) -> bool:
    """Pass the end of a stream on. False where there is nobody left to hear it."""
    try:
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        return False
    return True


class Pipe:
    """What a splice moves octets through, empty between two moves. Raises OSError where there can be none of use.

    Where its user's pipes have all the pages that they may, a pipe has two (pipe(7), pipe-user-pages-soft), and copying
    is faster.
    """

    __slots__ = ("_wide", "inlet", "outlet")

    def __init__(self) -> None:
        self.outlet, self.inlet = os.pipe()
        self._wide = _wide_pipes.acquire(blocking=False)
        if self._wide and not self._holds(PIECE):
            self._wide = False
            _wide_pipes.release()
        if not self._wide and not self._holds(NARROW):
            self.close()
            raise OSError(errno.EPERM, "no pages for a pipe")

    def _holds(self, octets: int) -> bool:
        """Make it so large. False where that is refused."""
        try:
            fcntl.fcntl(self.inlet, _F_SETPIPE_SZ, octets)
        except OSError:
            return False
        return True

    def close(self) -> None:
        os.close(self.outlet)
        os.close(self.inlet)
        if self._wide:
            _wide_pipes.release()


_wide_pipes = threading.BoundedSemaphore(WIDE)
_of_thread = threading.local()  # .pipe: the pump thread's


def _move(flow: Flow, most: int) -> int:
    """Pass on up to so many octets unread, and count them. 0 at the source's end."""
    if not flow.copies:
        pipe = _pipe()
        if pipe is not None:
            moved = _splice(flow, pipe, most)
            if moved is not None:
                return moved
        flow.copies = True
    data = _receive(flow.source, min(most, COPIED))
    if data:
        _send_all(flow, data)
        flow.octets += len(data)
    return len(data)


def _splice(flow: Flow, pipe: Pipe, most: int) -> int | None:
    """Move octets through the pipe; None, with nothing done, where the source's kind of socket does not allow it."""
    try:
        left = moved = os.splice(flow.source.fileno(), pipe.inlet, most)
    except BlockingIOError as error:
        raise _Ended(End.SILENT, error) from None
    except OSError as error:
        if error.errno in _UNSPLICEABLE:
            return None
        raise _Ended(End.SOURCE_LOST, error) from None
    sink = flow.sink.fileno()
    try:
        while left:
            left -= _push(flow, partial(os.splice, pipe.outlet, sink, left))
    except OSError:
        flow.copies = True  # the sink's kind of socket does not allow it
        while left:
            data = os.read(pipe.outlet, left)
            _send_all(flow, data)
            left -= len(data)
    finally:
        flow.octets += moved - left
        if left:
            _close_pipe()  # what lies in it belongs to nobody
    return moved


def _pipe() -> Pipe | None:
    """This thread's pipe. None where there are no descriptors for one, or no pages to make it worth its while."""
    pipe: Pipe | None = getattr(_of_thread, "pipe", None)
    if pipe is None:
        try:
            pipe = _of_thread.pipe = Pipe()
        except OSError:
            return None
    return pipe


def _close_pipe() -> None:
    pipe: Pipe | None = getattr(_of_thread, "pipe", None)
    if pipe is not None:
        _of_thread.pipe = None
        pipe.close()
