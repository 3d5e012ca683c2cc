"""The probes: a thread that asks every backend again and again whether it lives, and tells the pool.

One thread and a selector carry all probes, so that a backend that hangs delays no other. A `Probe` reads like a
conversation that blocks: it is a generator that yields where it has to wait, and a time that has run out is raised
there as a TimeoutError. Whoever adds a step to it (a TLS handshake, a PROXY header) adds a `yield from`.

What a result says is in HAProxy's words: L4 is the connection, L7 the answer, OK passed, CON and RSP failed, STS the
status was not expected, TOUT took too long; DNS is ours.

Rules:
- A probe is due `interval` after the last one began; a little sooner by chance, never later, so that backends drift
  apart and one that returns is seen in time. The first one is due at once; of MANY backends the second comes at any
  time within the interval, for a thousand probes at once would make requests wait.
- Every endpoint of a backend is tried within one probe, each for its share of the timeout; the one that let us in
  comes first from then on, for the forwarding path too.
- A head that is complete decides. What follows it is read and thrown away, because to close with octets unread is a
  reset to the backend, and an error in its log.
- A shortage of our own (descriptors, buffers) is no fault of the backend's.
- Names are looked up in other threads, since that may block for long, and again every 30 s. An address that was found
  is kept until the name leads elsewhere: a broken name server takes no running backend away.
"""

from __future__ import annotations

import errno
import heapq
import math
import os
import queue
import random
import re
import selectors
import socket
import ssl
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator
from functools import partial
from itertools import count
from pathlib import Path
from typing import NamedTuple

from balancer.backend import (
    Admin,
    Backend,
    Endpoint,
    connect_failure,
    in_words,
    literal_endpoints,
    resolve,
    tls_in_words,
)
from balancer.config import HealthCheck
from balancer.pool import Pool
from balancer.proxy_protocol import LOCAL_V2, UNKNOWN_V1
from balancer.version import __version__

HEAD_BYTES = 65536  # octets of one head, after which it is no head
REST_BYTES = 1 << 20  # octets after the head that are read for the sake of politeness
EARLIER = 0.1  # share of the interval by which a probe may come sooner
MANY = 20  # backends whose probes are spread over the interval from the beginning
TOGETHER = 0.05  # share of the interval whose probes of MANY begin together: a thread that wakes makes others wait
SOONEST = 0.1  # seconds between two probes of one backend, however often `probe_now` is called
SHORTAGE_PAUSE = 0.25  # seconds until a probe is tried again that our own shortage prevented
SHORTAGE_SILENCE = 10.0  # seconds in which a shortage is not mentioned again
NAME_AGE = 30.0  # seconds after which a name is looked up again
NAME_PATIENCE = 1.0  # seconds for which `start` waits for the first look-ups
RESOLVERS = 4  # look-ups at the same time

SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([1-5][0-9][0-9])(?=[ \r\n])")
HEAD_END = re.compile(rb"\n\r?\n")  # a lone LF ends a line too (RFC 9112, 2.2)

Steps = Generator[None, None, None]
Answer = Callable[[tuple[Endpoint, ...], str], None]  # the endpoints of a name, and what was wrong when there are none


class ProbeError(Exception):
    """A probe did not pass; its text says why, in words for the log."""


class Result(NamedTuple):
    passed: bool
    check: str


class Probe:
    """One look at one backend.

    Its owner calls `resume` to begin, whenever the selector gives it `on_ready`, and with `late` when `deadline` has
    passed; `result` is there as soon as it is known, which may be some time before all is over.
    """

    def __init__(
        self,
        backend: Backend,
        settings: HealthCheck,
        selector: selectors.BaseSelector,
        on_ready: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self._backend = backend
        self._settings = settings
        self._selector = selector
        self._on_ready = on_ready
        self._clock = clock
        self._began = clock()
        self._end = self.deadline = self._began + settings.timeout
        self.result: Result | None = None
        self._socket: socket.socket | None = None
        self._steps = self._run()

    def resume(self, late: bool = False) -> bool:
        """Go on, and tell whether there is still something to wait for. A shortage of our own raises OSError."""
        try:
            if late:
                self._steps.throw(TimeoutError())
            else:
                next(self._steps)
        except StopIteration:
            return False
        return True

    def close(self) -> None:
        """Give up what is left of it."""
        self._steps.close()
        if self._socket is not None:
            self._socket.close()

    def _run(self) -> Steps:
        try:
            sock = yield from self._connect()
            if self._backend.send_proxy:
                sock.send(LOCAL_V2 if self._backend.send_proxy == "v2" else UNKNOWN_V1)  # a fresh connection takes it
            if self._backend.tls_context is not None:
                sock = yield from self._encrypt(sock, self._backend.tls_context)
            if self._settings.type == "tcp":
                layer = "L4OK" if self._backend.tls_context is None else "L6OK"
                self.result = Result(True, f"{layer} in {self._elapsed()} ms")
                return
            self.result = yield from self._ask(sock)
        except ProbeError as failure:
            self.result = Result(False, str(failure))
            return
        yield from self._read_rest(sock)

    def _elapsed(self) -> int:
        """Milliseconds since this probe began."""
        return round((self._clock() - self._began) * 1000)

    def _wait(self, sock: socket.socket, events: int) -> Steps:
        self._selector.register(sock, events, self._on_ready)
        try:
            yield
        finally:
            self._selector.unregister(sock)

    def _connect(self) -> Generator[None, None, socket.socket]:
        """A connection to the first endpoint that lets us in."""
        endpoints = self._backend.endpoints
        failures = []
        for place, endpoint in enumerate(endpoints):
            now = self._clock()
            self.deadline = now + (self._end - now) / (len(endpoints) - place)
            try:
                sock = yield from self._dial(*endpoint)
            except OSError as error:
                if error.errno in SHORTAGES:
                    raise
                failures.append(connect_failure(error))
                continue
            if place:
                self._backend.endpoints = (endpoint, *endpoints[:place], *endpoints[place + 1 :])
            self.deadline = self._end
            return sock
        # localhost is ::1 too where there is no IPv6: that "cannot assign requested address" would only confuse.
        raise ProbeError("L4CON refused" if "L4CON refused" in failures else failures[0])

    def _dial(self, family: int, address: tuple[str, int]) -> Generator[None, None, socket.socket]:
        if self._socket is not None:
            self._socket.close()
        self._socket = sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setblocking(False)
        code = sock.connect_ex(address)
        if code == errno.EINPROGRESS:
            yield from self._wait(sock, selectors.EVENT_WRITE)
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code == 0 and sock.getsockname() == sock.getpeername():
            # Nobody listens, and the system chose the very port we dial for our own end: TCP connects it to itself.
            code = errno.ECONNREFUSED
        if code:
            raise OSError(code, os.strerror(code))
        return sock

    def _encrypt(self, sock: socket.socket, context: ssl.SSLContext) -> Generator[None, None, socket.socket]:
        try:
            tls = context.wrap_socket(sock, do_handshake_on_connect=False, server_hostname=self._backend.server_name)
            self._socket = tls
            while True:
                try:
                    tls.do_handshake()
                    return tls
                except ssl.SSLWantReadError:
                    yield from self._wait(tls, selectors.EVENT_READ)
                except ssl.SSLWantWriteError:
                    yield from self._wait(tls, selectors.EVENT_WRITE)
        except TimeoutError:
            raise ProbeError("L6TOUT") from None
        except ssl.SSLError as error:
            raise ProbeError(f"L6RSP {tls_in_words(error)}") from None
        except OSError as error:
            raise ProbeError(f"L6RSP {in_words(error)}") from None

    def _ask(self, sock: socket.socket) -> Generator[None, None, Result]:
        """Send the request, and judge the answer."""
        received = bytearray()
        try:
            yield from self._send(sock)
            status = yield from self._status(sock, received)
        except TimeoutError:
            raise ProbeError("L7TOUT") from None
        except ConnectionError:
            raise ProbeError(f"L7RSP reset {_where(received)}") from None
        except OSError as error:
            raise ProbeError(f"L7RSP {in_words(error)}") from None
        if any(low <= status <= high for low, high in self._settings.expect):
            return Result(True, f"L7OK {status} in {self._elapsed()} ms")
        return Result(False, f"L7STS {status}")

    def _send(self, sock: socket.socket) -> Steps:
        host = re.sub(r"%[^\]]*", "", self._backend.address)  # a zone means nothing to others (RFC 6874)
        unsent = (
            f"GET {self._settings.path} HTTP/1.1\r\nHost: {host}\r\n"
            f"User-Agent: lb-health/{__version__}\r\nConnection: close\r\n\r\n"
        ).encode()
        while unsent:
            try:
                unsent = unsent[sock.send(unsent) :]
            except (BlockingIOError, ssl.SSLWantWriteError):
                yield from self._wait(sock, selectors.EVENT_WRITE)

    def _receive(self, sock: socket.socket, size: int) -> Generator[None, None, bytes]:
        while True:
            try:
                return sock.recv(size)
            except (BlockingIOError, ssl.SSLWantReadError):
                yield from self._wait(sock, selectors.EVENT_READ)

    def _status(self, sock: socket.socket, received: bytearray) -> Generator[None, None, int]:
        """The status of the final answer: any number of interim ones may come before (RFC 9110, 15.2)."""
        while True:
            octets = yield from self._receive(sock, HEAD_BYTES)
            if not octets:
                raise ProbeError(f"L7RSP closed {_where(received)}")
            searched = max(0, len(received) - 2)
            received += octets
            while end := HEAD_END.search(received, searched):
                line = STATUS_LINE.match(received)
                if not line:
                    raise ProbeError("L7RSP not HTTP")
                status = int(line[1])
                if status >= 200 or status == 101:
                    return status
                del received[: end.end()]
                searched = 0
            if received[:7] != b"HTTP/1."[: len(received)]:
                raise ProbeError("L7RSP not HTTP")
            if len(received) > HEAD_BYTES:
                raise ProbeError(f"L7RSP head of more than {HEAD_BYTES} octets")

    def _read_rest(self, sock: socket.socket) -> Steps:
        """Wait until the backend has said everything, within reason."""
        left = REST_BYTES
        try:
            while left > 0:
                octets = yield from self._receive(sock, 65536)
                if not octets:
                    return
                left -= len(octets)
        except OSError:  # the result is known, and how this connection ends is of no interest
            return


def _where(received: bytearray) -> str:
    return "within its head" if received else "before an answer"


class Resolver:
    """Looks names up in threads of its own.

    Those are daemons: getaddrinfo may hang for minutes and nothing can wake it, and that must not keep the program from
    ending. `look_up` and the answers are the owner's thread's; `post` is how another thread has something done there.
    """

    def __init__(self, resolve: Callable[[str, int], tuple[Endpoint, ...]], post: Callable[[Callable[[], None]], None]):
        self._resolve = resolve
        self._post = post
        self._jobs: queue.SimpleQueue[tuple[str, int, Answer] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self.pending = 0

    def look_up(self, host: str, port: int, answer: Answer) -> None:
        self.pending += 1
        self._jobs.put((host, port, answer))
        if len(self._threads) < min(self.pending, RESOLVERS):
            thread = threading.Thread(target=self._run, name="resolver", daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self, patience: float = 0.2) -> None:
        """End the threads that do not hang, and leave the others to themselves after `patience` seconds."""
        for _ in self._threads:
            self._jobs.put(None)
        deadline = time.monotonic() + patience
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        while job := self._jobs.get():
            host, port, answer = job
            endpoints: tuple[Endpoint, ...] = ()
            problem = "DNS name does not resolve"
            try:
                endpoints = self._resolve(host, port)
            except Exception as error:  # the system's resolver: whatever it raises is its answer
                absent = isinstance(error, socket.gaierror) and error.errno == socket.EAI_NONAME
                if not absent:
                    problem = f"DNS {in_words(error) if isinstance(error, OSError) else error}"
            self._post(partial(self._done, answer, endpoints, problem))

    def _done(self, answer: Answer, endpoints: tuple[Endpoint, ...], problem: str) -> None:
        self.pending -= 1
        answer(endpoints, problem)


class Watch:
    """What the health thread knows of one backend, and what comes next for it."""

    __slots__ = ("backend", "began", "due", "is_name", "look_up_at", "looking_up", "next", "probe", "waiting")

    def __init__(self, backend: Backend, now: float) -> None:
        self.backend = backend
        self.probe: Probe | None = None
        self.due = math.nan  # when something is to be done: begin, or stop waiting; what else is in the heap is stale
        self.began = -math.inf  # when the last probe began
        self.next = now  # when the next one is to begin
        self.is_name = not literal_endpoints(backend.host, backend.port)
        self.look_up_at = now
        self.looking_up = False
        self.waiting = False  # for its name: there is no address to probe yet

    @property
    def busy(self) -> bool:
        """Is a result being waited for? A probe that has one only reads what is left, and the next may cut it short."""
        return self.waiting or (self.probe is not None and self.probe.result is None)


class HealthChecker:
    """Probes the backends of a pool, whichever these are at the time. `stop` it even if it was never started.

    `on_error` is given a line about whatever is wrong with the checking itself. Times are those of `clock`, in seconds.
    """

    def __init__(
        self,
        pool: Pool,
        settings: HealthCheck,
        *,
        on_error: Callable[[str], None] = lambda text: None,
        clock: Callable[[], float] = time.monotonic,
        resolve: Callable[[str, int], tuple[Endpoint, ...]] = resolve,
        rng: random.Random | None = None,
    ) -> None:
        self._pool = pool
        self._settings = settings
        self._on_error = on_error
        self._clock = clock
        self._rng = rng or random.Random()
        self._members: object = None  # the pool's backends as last seen
        self._watches: dict[Backend, Watch] = {}
        self._timers: list[tuple[float, int, Watch]] = []
        self._tiebreak = count()
        self._shortage_said = -math.inf
        self._resolver = Resolver(resolve, self._post)
        self._names_known = threading.Event()  # every look-up that was asked for has an answer
        self._inbox: deque[Callable[[], None]] = deque()  # what other threads want done
        self._selector = selectors.DefaultSelector()
        self._waker, self._woken = socket.socketpair()
        self._waker.setblocking(False)
        self._woken.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ, partial(self._woken.recv, 4096))
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="health")

    def start(self) -> None:
        """Begin, and wait a moment for names, so that a backend on "localhost" has an address for the first request."""
        self._thread.start()
        if not all(backend.endpoints for backend in self._pool.backends):
            self._names_known.wait(NAME_PATIENCE)

    def stop(self) -> None:
        """End the thread and whatever probe is under way. May be called twice."""
        self._stopping.set()
        self._wake()
        if self._thread.is_alive():
            self._thread.join()
        self._resolver.stop()
        for watch in self._watches.values():
            self._forget(watch)
        self._watches.clear()
        self._selector.close()
        self._waker.close()
        self._woken.close()

    def probe_now(self, backend: Backend) -> None:
        """Have a backend probed at once: it was added, or it refused a connection. From any thread."""
        self._post(partial(self._hasten, backend))

    def configure(self, settings: HealthCheck) -> None:
        """Probe by these settings, every backend at once, and look at the pool's membership. From any thread."""
        self._post(partial(self._configure, settings))

    def turn(self, patience: float = math.inf) -> None:
        """One round: wait for whatever comes first, at most `patience` seconds, and do what is to be done."""
        self._notice_members()
        while self._inbox:
            self._inbox.popleft()()
        # Sockets come before timers: after a standstill (a suspended machine) what did arrive in time is seen first.
        for key, _ in self._selector.select(self._pause(patience)):
            key.data()
        now = self._clock()
        while self._timers and self._timers[0][0] <= now:
            when, _, watch = heapq.heappop(self._timers)
            if watch.due == when:
                self._on_time(watch)
        if not self._resolver.pending:
            self._names_known.set()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self.turn()
            except Exception as error:  # without this thread all states would freeze
                self._on_error(f"health checks: {_describe(error)}")
                self._stopping.wait(SHORTAGE_PAUSE)

    def _post(self, action: Callable[[], None]) -> None:
        self._inbox.append(action)
        self._wake()

    def _wake(self) -> None:
        try:
            self._waker.send(b"\0")
        except OSError:  # full, so it is awake already; or closed, and there is nobody to wake
            return

    def _pause(self, patience: float) -> float:
        """Seconds to wait. Who changes the pool's membership calls `configure`; still it is looked at now and then."""
        longest = min(patience, self._settings.interval)
        return max(0.0, min(longest, self._timers[0][0] - self._clock())) if self._timers else longest

    def _schedule(self, watch: Watch, when: float) -> None:
        if watch.due != when:
            watch.due = when
            heapq.heappush(self._timers, (when, next(self._tiebreak), watch))

    def _notice_members(self) -> None:
        backends = self._pool.backends
        if backends is self._members:
            return
        self._members = backends
        for backend in self._watches.keys() - set(backends):
            self._forget(self._watches.pop(backend))
        now = self._clock()
        for backend in backends:
            if backend not in self._watches:
                watch = self._watches[backend] = Watch(backend, now)
                self._schedule(watch, now)

    def _forget(self, watch: Watch) -> None:
        watch.due = math.nan
        if watch.probe is not None:
            watch.probe.close()
            watch.probe = None

    def _configure(self, settings: HealthCheck) -> None:
        if settings == self._settings:
            return
        self._settings = settings
        for backend in self._watches:
            self._hasten(backend)

    def _hasten(self, backend: Backend) -> None:
        watch = self._watches.get(backend)
        if watch is None:
            return
        watch.next = min(watch.next, max(self._clock(), watch.began + min(SOONEST, self._settings.interval)))
        if not watch.busy:
            self._schedule(watch, min(watch.next, watch.due))

    def _on_time(self, watch: Watch) -> None:
        watch.due = math.nan
        if watch.probe is not None:
            self._resume(watch, late=True)
        elif watch.waiting:
            self._settle(watch, "DNS no answer in time")
        else:
            self._begin(watch)

    def _begin(self, watch: Watch) -> None:
        sooner = 1.0 if watch.began == -math.inf and len(self._watches) >= MANY else EARLIER
        watch.began = self._clock()
        watch.next = watch.began + self._settings.interval * (1 - sooner * self._rng.random())
        if len(self._watches) >= MANY:
            together = self._settings.interval * TOGETHER
            watch.next = max(watch.began, watch.next // together * together)
        backend = watch.backend
        if backend.admin is Admin.MAINT:
            self._schedule(watch, watch.next)
            return
        if watch.is_name and watch.began >= watch.look_up_at and not watch.looking_up:
            watch.looking_up = True
            self._resolver.look_up(backend.host, backend.port, partial(self._learn, watch))
        if backend.endpoints:
            self._probe(watch)
        else:
            watch.waiting = True
            self._schedule(watch, watch.began + self._settings.timeout)

    def _learn(self, watch: Watch, endpoints: tuple[Endpoint, ...], problem: str) -> None:
        """A look-up has ended. The endpoint that let us in stays the first as long as the name leads there."""
        watch.looking_up = False
        backend = watch.backend
        if endpoints:
            watch.look_up_at = self._clock() + NAME_AGE
            known = backend.endpoints[:1]
            backend.endpoints = tuple(sorted(endpoints, key=lambda endpoint: endpoint not in known))
        if not watch.waiting or self._watches.get(backend) is not watch:
            return
        if backend.endpoints:
            watch.waiting = False
            self._probe(watch)
        else:
            self._settle(watch, problem)

    def _settle(self, watch: Watch, problem: str) -> None:
        watch.waiting = False
        self._schedule(watch, watch.next)
        self._report(watch.backend, Result(False, problem))

    def _probe(self, watch: Watch) -> None:
        on_ready = partial(self._resume, watch)
        watch.probe = Probe(watch.backend, self._settings, self._selector, on_ready, self._clock)
        self._resume(watch)

    def _resume(self, watch: Watch, late: bool = False) -> None:
        probe = watch.probe
        assert probe is not None, "only a probe has a socket and a deadline"
        known = probe.result
        try:
            goes_on = probe.resume(late)
        except Exception as error:  # one backend's trouble must not become that of the others
            goes_on = False
            self._handle(error, watch, probe)
        if goes_on:
            self._schedule(watch, probe.deadline if watch.busy else min(probe.deadline, watch.next))
        else:
            probe.close()
            watch.probe = None
            self._schedule(watch, watch.next)
        if probe.result is not None and probe.result is not known:
            self._report(watch.backend, probe.result)

    def _handle(self, error: Exception, watch: Watch, probe: Probe) -> None:
        now = self._clock()
        if not isinstance(error, OSError) or error.errno not in SHORTAGES:
            self._on_error(f"health check of backend {watch.backend.id} {watch.backend.address}: {_describe(error)}")
            probe.result = Result(False, f"internal error: {_describe(error)}")
            return
        watch.next = now + SHORTAGE_PAUSE
        if now >= self._shortage_said + SHORTAGE_SILENCE:
            self._shortage_said = now
            self._on_error(f"health checks wait: {in_words(error)}")

    def _report(self, backend: Backend, result: Result) -> None:
        if backend.admin is not Admin.MAINT:  # the operator may have said so while the probe was under way
            self._pool.report(backend, result.passed, result.check)


def _describe(error: Exception) -> str:
    """One line that names the error and the place in the code."""
    *_, place = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
