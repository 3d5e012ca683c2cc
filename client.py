"""A load simulator: many clients at once, and who answered them, how fast, and what went wrong.

    python client.py [URL] -n 1000 -c 20 [--duration S] [--new-connections] [--method GET] [--body-size N] [--timeout S]
    python client.py --tcp HOST:PORT ...

Each client is a thread with a connection of its own that sends the next request when it has the answer to the last.
Exactly -n requests are made, or with --duration as many as that time allows. With --tcp a request is --body-size bytes
that must come back as they were sent. Nothing that failed is tried again, with one exception, which browsers make too:
a kept connection that the server closed between two requests is opened anew, once, if the method is idempotent
(RFC 9110 section 9.2.2); that counts as a reconnect.

Exit status: 0, 1 when a request failed (no answer, half an answer, or a status of 400 and above), 2 for a wrong command
line, 130 after Ctrl-C, which prints the summary of what was done so far.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import errno
import functools
import http.client
import itertools
import json
import math
import re
import resource
import signal
import socket
import string
import sys
import threading
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn
from urllib.parse import quote, urlsplit

BLOCK = 65536
PING = 16384  # octets sent before their echo is read: few enough for every buffer between, so neither side blocks
GRACE = 1.0  # seconds that requests in flight are given after Ctrl-C
TICK = 0.2  # seconds from one progress line to the next
METHOD = re.compile(r"[A-Za-z]+")
IDEMPOTENT = {"GET", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE"}
EDGES_MS = [0.0, *(float(f"{digit}e{exponent}") for exponent in range(-2, 9) for digit in (1, 2, 5))]


@dataclass(frozen=True)
class Settings:
    """What to do. Times are in seconds."""

    host: str = "127.0.0.1"
    port: int = 8080
    path: str = "/"
    tcp: bool = False
    method: str = "GET"
    body_size: int = 0
    requests: int = 1000
    clients: int = 20
    duration: float | None = None
    new_connections: bool = False
    timeout: float = 30.0

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp://{host}:{self.port}" if self.tcp else f"http://{host}:{self.port}{self.path}"


@dataclass
class Stats:
    """What one client saw. Each thread has its own, so that nothing is locked; `merged` adds them up."""

    requests: int = 0
    failed: int = 0
    reconnects: int = 0
    received: int = 0  # octets of bodies that were answered, as `sent`
    sent: int = 0
    latencies: array[float] = field(default_factory=lambda: array("d"))  # seconds, one for each complete answer
    answered_by: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)

    def fail(self, kind: str) -> None:
        self.failed += 1
        self.errors[kind] += 1

    @classmethod
    def merged(cls, parts: Sequence[Stats]) -> Stats:
        whole = cls()
        for part in parts:
            whole.requests += part.requests
            whole.failed += part.failed
            whole.reconnects += part.reconnects
            whole.received += part.received
            whole.sent += part.sent
            whole.latencies += part.latencies
            whole.answered_by += part.answered_by
            whole.errors += part.errors
        return whole


# One client


class Answer(NamedTuple):
    who: str
    status: int  # 0 where there is none, in TCP
    received: int  # octets


class HttpClient:
    """One HTTP connection, kept from request to request unless told otherwise, or until the server closes it."""

    def __init__(self, settings: Settings, stats: Stats) -> None:
        self.settings = settings
        self.stats = stats
        self.connection = http.client.HTTPConnection(settings.host, settings.port, timeout=settings.timeout)
        self.body = bytes(settings.body_size) or None
        self.fields = {"User-Agent": "client.py"} | ({"Connection": "close"} if settings.new_connections else {})
        self.block = bytearray(BLOCK)

    def request(self) -> Answer:
        kept = self.connection.sock is not None
        try:
            response = self.send()
        except ConnectionError:
            if not kept or self.settings.method not in IDEMPOTENT:
                raise
            self.close()
            self.stats.reconnects += 1
            response = self.send()
        with response:
            received = 0
            while count := response.readinto(self.block):
                received += count
            if response.length:  # to readinto an early end is an end like any other
                raise http.client.IncompleteRead(b"", response.length)
        who = response.headers.get("X-Backend") or response.headers.get("Server") or "-"
        if self.settings.new_connections:
            self.close()
        return Answer(who, response.status, received)

    def send(self) -> http.client.HTTPResponse:
        self.connection.request(self.settings.method, self.settings.path, self.body, self.fields)
        return self.connection.getresponse()

    def close(self) -> None:
        self.connection.close()


class WrongEchoError(Exception):
    """Other bytes came back than were sent."""


class TcpClient:
    """One TCP connection to something that echoes."""

    def __init__(self, settings: Settings, stats: Stats) -> None:
        self.settings = settings
        self.sock: socket.socket | None = None
        self.body = (bytes(range(251)) * (settings.body_size // 251 + 1))[: settings.body_size]

    def request(self) -> Answer:
        if self.sock is None:
            self.sock = socket.create_connection((self.settings.host, self.settings.port), self.settings.timeout)
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start in range(0, len(self.body), PING):
            ping = self.body[start : start + PING]
            self.sock.sendall(ping)
            while ping:
                pong = self.sock.recv(len(ping))
                if not pong:
                    raise http.client.RemoteDisconnected("the echo ended")
                if not ping.startswith(pong):
                    raise WrongEchoError
                ping = ping[len(pong) :]
        if self.settings.new_connections:
            self.close()
        return Answer("-", 0, len(self.body))

    def close(self) -> None:
        if self.sock is not None:
            self.sock.close()
            self.sock = None


KINDS: tuple[tuple[type[Exception], str], ...] = (  # the first that fits is taken
    (ConnectionRefusedError, "refused"),
    (http.client.RemoteDisconnected, "closed"),
    (ConnectionError, "reset"),
    (TimeoutError, "timeout"),
    (socket.gaierror, "unknown host"),
    (http.client.IncompleteRead, "cut off"),
    (http.client.HTTPException, "not HTTP"),
    (WrongEchoError, "wrong echo"),
)


def kind_of(error: Exception) -> str:
    """The word under which an error is counted."""
    for kind, word in KINDS:
        if isinstance(error, kind):
            return word
    return errno.errorcode.get(getattr(error, "errno", None) or 0, type(error).__name__)


def play(settings: Settings, tickets: Iterator[object], deadline: float, stop: threading.Event, stats: Stats) -> None:
    """Be one client: a request for each ticket, until `deadline` (time.monotonic) or `stop`."""
    client = TcpClient(settings, stats) if settings.tcp else HttpClient(settings, stats)
    with contextlib.closing(client):
        while time.monotonic() < deadline and not stop.is_set() and next(tickets, None) is not None:
            begun = time.perf_counter()
            try:
                answer, error = client.request(), ""
            except (OSError, http.client.HTTPException, WrongEchoError) as problem:
                answer, error = None, kind_of(problem)
                client.close()
            took = time.perf_counter() - begun
            if stop.is_set():
                return  # the summary is being made
            stats.requests += 1
            if answer is None:
                stats.fail(error)
                continue
            stats.latencies.append(took)
            stats.answered_by[answer.who] += 1
            stats.received += answer.received
            stats.sent += settings.body_size
            if answer.status >= 400:
                stats.fail(f"status {answer.status}")


# All of them


class Outcome(NamedTuple):
    stats: Stats
    seconds: float
    interrupted: bool


def simulate(settings: Settings, progress: Callable[[Sequence[Stats], float], None] | None = None) -> Outcome:
    """Play all clients, each in a thread, to the end or to Ctrl-C; `progress` is called now and then meanwhile."""
    stop = threading.Event()
    parts = [Stats() for _ in range(settings.clients)]
    # One iterator for all: its step is atomic under the interpreter's lock, so exactly as many requests are made.
    tickets: Iterator[object] = iter(range(settings.requests)) if settings.duration is None else itertools.repeat(0)
    deadline = time.monotonic() + (math.inf if settings.duration is None else settings.duration)
    # Daemons, because after Ctrl-C one that waits for an answer must not hold up the end.
    threads = [
        threading.Thread(target=play, args=(settings, tickets, deadline, stop, part), name=name, daemon=True)
        for name, part in ((f"client-{number}", part) for number, part in enumerate(parts, 1))
    ]
    begun = time.perf_counter()
    interrupted = False
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(TICK)
                if progress:
                    progress(parts, time.perf_counter() - begun)
        seconds = time.perf_counter() - begun
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one ends the program at once
        stop.set()
        interrupted = True
        seconds = time.perf_counter() - begun
        patience = time.monotonic() + GRACE
        for thread in threads:
            if thread.is_alive():
                thread.join(max(0.0, patience - time.monotonic()))
    return Outcome(Stats.merged(parts), seconds, interrupted)


# What came of it


class Bucket(NamedTuple):
    """How many requests took at least `from_ms` and less than `to_ms`."""

    from_ms: float
    to_ms: float
    requests: int


def percentile(ordered: Sequence[float], percent: float) -> float | None:
    """The smallest of the ordered values that is not exceeded by `percent` of them (nearest rank); None of nothing."""
    return ordered[max(1, math.ceil(len(ordered) * percent / 100)) - 1] if ordered else None


def histogram(latencies: Sequence[float]) -> list[Bucket]:
    """Latencies (seconds) in buckets that grow 1, 2, 5, 10, ..., from the first that is not empty to the last."""
    counts = Counter(bisect.bisect_right(EDGES_MS, 1000 * latency) for latency in latencies)
    if not counts:
        return []
    return [Bucket(EDGES_MS[at - 1], EDGES_MS[at], counts[at]) for at in range(min(counts), max(counts) + 1)]


def draw(buckets: Sequence[Bucket], width: int = 50) -> list[str]:
    """The histogram in characters, a line each; the longest bar has `width`, and none that counts is invisible."""
    most = max((bucket.requests for bucket in buckets), default=0)
    bars = ["#" * math.ceil(width * bucket.requests / most) for bucket in buckets]
    return [f"{low:>8g} to {high:<6g} {n:>8} {bar}".rstrip() for (low, high, n), bar in zip(buckets, bars, strict=True)]


def figures(settings: Settings, outcome: Outcome) -> dict[str, Any]:
    """Everything the summary says, as --json prints it. A rate counts complete answers, whatever their status."""
    stats, seconds = outcome.stats, max(outcome.seconds, 1e-9)
    ordered = sorted(stats.latencies)
    found = {f"p{percent}_ms": percentile(ordered, percent) for percent in (50, 90, 99)}
    found["max_ms"] = percentile(ordered, 100)
    return {
        "url": settings.url,
        "clients": settings.clients,
        "requests": stats.requests,
        "failed": stats.failed,
        "reconnects": stats.reconnects,
        "interrupted": outcome.interrupted,
        "duration_seconds": round(seconds, 6),
        "requests_per_second": round(len(ordered) / seconds, 3),
        "received_bytes": stats.received,
        "sent_bytes": stats.sent,
        "received_megabytes_per_second": round(stats.received / seconds / 1e6, 6),
        "sent_megabytes_per_second": round(stats.sent / seconds / 1e6, 6),
        **{name: None if value is None else round(1000 * value, 3) for name, value in found.items()},
        "answered_by": dict(sorted(stats.answered_by.items())),
        "errors": dict(stats.errors.most_common()),
        "histogram": [bucket._asdict() for bucket in histogram(ordered)],
    }


def summary(found: dict[str, Any]) -> str:
    """The figures for people."""
    answers = sum(found["answered_by"].values())
    lines = [
        f"{found['requests']} requests to {found['url']} by {found['clients']} clients in "
        f"{found['duration_seconds']:.2f} s{', interrupted' if found['interrupted'] else ''}",
        f"{found['failed']} failed, {found['reconnects']} reconnects",
        f"{found['requests_per_second']:.0f} requests/s, {found['received_megabytes_per_second']:.2f} MB/s received, "
        f"{found['sent_megabytes_per_second']:.2f} MB/s sent",
    ]
    if answers:
        lines += ["", "answered by"]
        lines += [f"  {who:<20} {n:>8} {100 * n / answers:>6.1f}%" for who, n in found["answered_by"].items()]
        times = "  ".join(f"{name} {found[f'{name}_ms']:g}" for name in ("p50", "p90", "p99", "max"))
        lines += ["", f"milliseconds  {times}", *draw([Bucket(**bucket) for bucket in found["histogram"]])]
    if found["errors"]:
        lines += ["", "errors", *(f"  {kind:<20} {n:>8}" for kind, n in found["errors"].items())]
    return "\n".join(lines)


def show_progress(settings: Settings, parts: Sequence[Stats], seconds: float) -> None:
    """One line on the terminal, written over itself."""
    done, failed = sum(part.requests for part in parts), sum(part.failed for part in parts)
    if settings.duration is None:
        goal = f"of {settings.requests} requests"
    else:
        goal = f"requests, {seconds:.0f} of {settings.duration:g} s"
    print(f"\r\x1b[K{done} {goal}, {failed} failed, {done / seconds:.0f}/s", end="", file=sys.stderr, flush=True)


# The program


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def command_line(arguments: list[str] | None) -> tuple[Settings, bool]:
    """The settings, and whether JSON is wanted; exits with status 2 and one line when an argument is wrong."""
    parser = Parser(prog="client.py", description="Simulate many clients, and show who answered and how fast.")
    add = parser.add_argument
    add("url", nargs="?", default="127.0.0.1:8080", metavar="URL", help="default: http://127.0.0.1:8080/")
    add("-n", "--requests", type=int, default=1000, help="how many in all (default: 1000)")
    add("-c", "--clients", type=int, default=20, help="how many at once (default: 20)")
    add("--duration", type=float, metavar="SECONDS", help="for this long, however many requests that makes")
    add("--new-connections", action="store_true", help="a connection for each request")
    add("--method", default="GET", help="default: GET")
    add("--body-size", type=int, metavar="BYTES", help="of each request's body (default: none; with --tcp 64)")
    add("--tcp", action="store_true", help="no HTTP: send bytes and expect them back")
    add("--json", action="store_true", help="print one JSON object")
    add("--timeout", type=float, default=30.0, metavar="SECONDS", help="longest silence of a server (default: 30)")
    options = parser.parse_args(arguments)
    scheme = "tcp" if options.tcp else "http"
    try:
        url = urlsplit(options.url if "://" in options.url else f"{scheme}://{options.url}")
        port = url.port or (None if options.tcp else 80)
        (url.hostname or "").encode("idna")
    except ValueError as error:
        parser.error(f"{options.url}: {error}")
    for right, problem in (
        (url.scheme == scheme, f"{options.url}: must begin with {scheme}://, or with nothing"),
        (url.hostname, f"{options.url}: names no host"),
        (port, f"{options.url}: names no port"),
        (options.requests >= 1, "argument -n: must be 1 or more"),
        (1 <= options.clients <= 10000, "argument -c: must be 1 to 10000"),
        (options.duration is None or 0 < options.duration < math.inf, "argument --duration: must be more than 0"),
        (METHOD.fullmatch(options.method), "argument --method: must be a word"),
        (options.body_size is None or options.body_size >= options.tcp, "argument --body-size: is too small"),
        (0 < options.timeout <= 86400, "argument --timeout: must be more than 0, and at most 86400"),
    ):
        if not right:
            parser.error(problem)
    path = quote((url.path or "/") + (f"?{url.query}" if url.query else ""), safe=string.punctuation)
    body_size = options.body_size if options.body_size is not None else 64 if options.tcp else 0
    settings = Settings(
        host=url.hostname or "", port=port or 0, path=path, tcp=options.tcp, method=options.method.upper(),
        body_size=body_size, requests=options.requests,
        clients=options.clients if options.duration is not None else min(options.clients, options.requests),
        duration=options.duration, new_connections=options.new_connections, timeout=options.timeout,
    )  # fmt: skip
    return settings, options.json


def main(arguments: list[str] | None = None) -> int:
    settings, as_json = command_line(arguments)
    with contextlib.suppress(ValueError, OSError):  # macOS refuses the "unlimited" that it names itself
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    on_terminal = sys.stderr.isatty()
    try:
        outcome = simulate(settings, functools.partial(show_progress, settings) if on_terminal else None)
    except RuntimeError as error:  # a thread that the system does not start
        print(f"client.py: {settings.clients} clients are too many: {error}", file=sys.stderr)
        return 1
    if on_terminal:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    found = figures(settings, outcome)
    print(json.dumps(found) if as_json else summary(found), flush=True)
    if outcome.interrupted:
        return 130
    return 1 if outcome.stats.failed else 0


if __name__ == "__main__":
    sys.exit(main())
