#!/usr/bin/env python3
"""What one exchange costs, counted and not timed: system calls, calls of functions, instructions, the log's line.

    python tests/counting.py [--names]

prints what tests/test_guard.py bounds, as the interpreter that runs this counts it; with --names also what it is made
of, the most frequent first. A count does not depend on how busy
the machine is, save for what comes with time: the reactor's ticks, and the interpreter's lock when another thread wants
it. So everything is counted over many exchanges and divided by their number, which leaves hundredths of such things.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from balancer.journal import Exchange, Journal  # noqa: E402 - both directories have to be on the path first
from balancer.log_formats import FORMATS  # noqa: E402
from balancer.reactor import Reactor  # noqa: E402
from balancing import running  # noqa: E402
from conftest import PATIENCE, eventually  # noqa: E402
from fakes import Connection, FakeBackend, read_message  # noqa: E402
from programs import LB, started  # noqa: E402

VERSION = "{}.{}".format(*sys.version_info)
TRACED = 200  # exchanges under strace
LOGGED = 1000  # records that the journal takes; as many as it takes at once

Rates = dict[str, float]
"""What was done, and how often for each exchange."""


# The work ---------------------------------------------------------------------------------------------------------

ANSWER = (
    b"HTTP/1.1 200 OK\r\nServer: origin\r\nDate: Sat, 21 Nov 2026 05:00:00 GMT\r\nContent-Type: text/plain\r\n"
    b"Content-Length: 6\r\n\r\nhello\n"
)
FIELDS = "Host: shop.example\r\nUser-Agent: counting\r\nAccept: */*\r\n"
MANY_FIELDS = "".join(f"X-Field-{number}: {'v' * number}\r\n" for number in range(8, 25))
BODY = "x" * 10_000


@dataclass(frozen=True)
class Work:
    """One kind of exchange. What a client sends has `word` within its first octets."""

    name: str
    message: Callable[[str], str]
    mode: str = "http"
    closes: bool = False
    """Does each exchange have a connection of its own?"""


def page(word: str) -> str:
    """The same for all that is counted: a client asks again for what it had before."""
    return "page" if word.isdigit() else word


GET = Work("get", lambda word: f"GET /{page(word)} HTTP/1.1\r\n{FIELDS}\r\n")
VARIED = Work(
    "varied", lambda word: f"GET /{word} HTTP/1.1\r\n{FIELDS}{MANY_FIELDS}Cookie: a=b; session={word}\r\n\r\n"
)
POST = Work("post", lambda word: f"POST /{page(word)} HTTP/1.1\r\n{FIELDS}Content-Length: {len(BODY)}\r\n\r\n{BODY}")
NEW = Work("new", lambda word: f"GET /{word} HTTP/1.1\r\n{FIELDS}Connection: close\r\n\r\n", closes=True)
TCP = Work("tcp", lambda word: f"/{word}\r\n", mode="tcp")
WORKS = (GET, VARIED, POST, NEW, TCP)


class Client:
    """Makes one exchange after the other."""

    def __init__(self, work: Work, port: int) -> None:
        self._work, self._port = work, port
        self._connection = ExitStack()

    def __enter__(self) -> Client:
        self._connect()
        return self

    def __exit__(self, *error: object) -> None:
        self._connection.close()

    def _connect(self) -> None:
        self._connection.close()
        self._sock = self._connection.enter_context(socket.create_connection(("127.0.0.1", self._port), PATIENCE))
        self._file = self._connection.enter_context(self._sock.makefile("rb"))

    def ask(self, *words: str) -> None:
        """An exchange for each word; returns when the last is answered."""
        for message in (self._work.message(word).encode() for word in words):
            self._sock.sendall(message)
            if self._work.mode == "tcp":
                assert self._file.readline() == message
            else:
                answer = read_message(self._file)
                assert answer.startswith(b"HTTP/1.1 200 "), answer
                assert answer.endswith(b"\r\n\r\nhello\n"), answer
            if self._work.closes:
                assert not self._file.read()
                self._connect()


def echo(connection: Connection) -> None:
    while line := connection.file.readline():
        connection.send(line)


@contextmanager
def backends(work: Work) -> Iterator[list[tuple[str, int]]]:
    """Two, for with one there is nothing to choose."""
    script = echo if work.mode == "tcp" else ANSWER
    with FakeBackend(script) as one, FakeBackend(script) as other:
        yield [(backend.host, backend.port) for backend in (one, other)]


_numbers = count(1)


def words(number: int) -> list[str]:
    """Never the same, lest what is asked for be known."""
    return [f"{next(_numbers):06}" for _ in range(number)]


WARM_UP = [f"warm-up-{number}" for number in range(10)]


# System calls -----------------------------------------------------------------------------------------------------

KINDS = {
    **dict.fromkeys(("recvfrom", "recvmsg", "read", "readv"), "receive"),
    **dict.fromkeys(("sendto", "sendmsg", "sendmmsg", "write", "writev"), "send"),
    **dict.fromkeys(("epoll_wait", "epoll_pwait", "epoll_pwait2"), "poll"),
    **dict.fromkeys(("mmap", "munmap", "mprotect", "mremap", "madvise", "brk"), "memory"),
}
"""Calls that do the same, whichever the interpreter prefers. Any other call is a kind of its own."""

REPLACE = "import os, sys; os.execvp(sys.argv[1], sys.argv[1:])"
CALL = re.compile(r"(\w+)\(")
TICK = re.compile(r"epoll_\w+\(\d+, \[\], \d+, [^0].*\) = 0$")  # nothing happened for as long as was asked


def no_strace() -> str:
    """Why system calls cannot be counted here, "" where they can."""
    if not shutil.which("strace"):
        return "strace is not installed"
    trial = subprocess.run(
        ["strace", "-D", "-o", os.devnull, "true"], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    return f"strace may not trace: {trial.stderr.strip()}" if trial.returncode else ""


def system_calls(work: Work, directory: Path, *flags: object) -> Rates:
    """The system calls of the reactor's thread, for each exchange of the real program, started with these flags."""
    # -D leaves the program our own child, with strace beside it; -ff gives each thread a file.
    strace = ("strace", "-D", "-ff", "-o", directory / "trace")
    program = (sys.executable, LB, "--port", 0, "--admin", "off", "--mode", work.mode, *flags)
    with (
        backends(work) as addresses,
        started(
            *("-c", REPLACE, *strace, *program, *(f"{host}:{port}" for host, port in addresses)), directory=directory
        ) as balancer,
        Client(work, balancer.port) as client,
    ):
        client.ask(*WARM_UP)
        client.ask("begin", *words(TRACED), "end")
    traces = eventually(lambda: ended_traces(directory), "each thread's end in its trace")
    [trace] = [trace for trace in traces if any("/begin" in line for line in trace)]
    return rates(kinds(between(trace, "/begin", "/end")), TRACED + 1)


def ended_traces(directory: Path) -> list[list[str]]:
    """The lines of each thread's trace; none at all while one of them has not ended."""
    traces = [path.read_text(errors="replace").splitlines() for path in directory.glob("trace.*")]
    return traces if all(trace and trace[-1].startswith("+++ ") for trace in traces) else []


def between(trace: list[str], first: str, last: str) -> list[str]:
    """From the first line that speaks of `first` to the one before the first that speaks of `last`."""
    begin, end = (next(number for number, line in enumerate(trace) if word in line) for word in (first, last))
    return trace[begin:end]


def kinds(trace: Iterable[str]) -> Counter[str]:
    """The calls of a trace. Polls that time ended are left out; one that was to return at once is not such a one."""
    names = [call[1] for line in trace if (call := CALL.match(line)) and not TICK.match(line)]
    return Counter(KINDS.get(name, name) for name in names)


def rates(counts: Counter[str], exchanges: int) -> Rates:
    """From the most frequent to the least."""
    return {name: round(count / exchanges, 3) for name, count in counts.most_common() if count}


# Calls and instructions -------------------------------------------------------------------------------------------


class Counting:
    """Something that counts what the thread does that calls `begin` and `end`, by name, through so many exchanges."""

    EXCHANGES: ClassVar[int]

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def begin(self) -> None:
        raise NotImplementedError

    def end(self) -> None:
        raise NotImplementedError


class PythonCalls(Counting):
    """Calls of functions that are written in Python."""

    EXCHANGES = 200
    EVENT = "call"

    def begin(self) -> None:
        sys.setprofile(self._profile)

    def end(self) -> None:
        sys.setprofile(None)

    def _profile(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == self.EVENT:
            self.counts[self._name(frame, argument)] += 1

    def _name(self, frame: FrameType, argument: Any) -> str:
        return name_of(frame)


class CCalls(PythonCalls):
    """Calls of functions and methods that are written in C; not of types."""

    EVENT = "c_call"

    def _name(self, frame: FrameType, argument: Any) -> str:
        return str(argument.__qualname__)


class Instructions(Counting):
    """Instructions of the interpreter, by the function that they are in."""

    EXCHANGES = 50

    def begin(self) -> None:
        for frame in frames():  # they run already, the reactor's loop among them
            frame.f_trace = self._trace(frame, "call", None)
        sys.settrace(self._trace)

    def end(self) -> None:
        sys.settrace(None)
        for frame in frames():
            frame.f_trace = None

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "call":
            frame.f_trace_lines = False
            frame.f_trace_opcodes = True
        elif event == "opcode":
            self.counts[name_of(frame)] += 1
        return self._trace


def frames() -> Iterator[FrameType]:
    """The caller, its caller and so on."""
    frame = sys._getframe().f_back
    while frame:
        yield frame
        frame = frame.f_back


def name_of(frame: FrameType) -> str:
    """`http_session.on_client`"""
    return f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}"


WITH_THE_CLOCK = ("log_formats._date", "log_formats._second")
"""Once a millisecond or a second, however many exchanges end in it."""

COUNTINGS: tuple[type[Counting], ...] = (PythonCalls, CCalls, Instructions)


def on_reactor(work: Work, directory: Path, **keys: Any) -> dict[type[Counting], Rates]:
    """What the reactor's thread does for each exchange, in a balancer with these keys of servers.json."""
    found = {}
    with (
        backends(work) as addresses,
        running(directory, addresses, mode=work.mode, **keys) as balancer,
        Client(work, balancer.port) as client,
    ):
        client.ask(*WARM_UP)
        for kind in COUNTINGS:
            nothing, counting = kind(), kind()
            for counter, asked in (nothing, []), (counting, words(kind.EXCHANGES)):
                call(balancer.reactor, counter.begin)
                client.ask(*asked)
                call(balancer.reactor, counter.end)
            counting.counts.subtract(nothing.counts)
            for name in WITH_THE_CLOCK:
                del counting.counts[name]
            found[kind] = rates(counting.counts, kind.EXCHANGES)
    return found


def call(reactor: Reactor, function: Callable[[], None]) -> None:
    """Have the reactor call it, and return when that is done."""
    done = threading.Event()
    reactor.call_soon(function)
    reactor.call_soon(done.set)
    assert done.wait(PATIENCE)


# The log ----------------------------------------------------------------------------------------------------------


def on_journal(format: str, directory: Path) -> dict[type[Counting], Rates]:
    """What it takes to write a line of the log in that format."""
    found = {}
    for kind in COUNTINGS:
        nothing, counting = kind(), kind()
        for counter, number in (nothing, 0), (counting, LOGGED):
            journal = Journal(str(directory / "journal.log"), format=format)
            made = list(records(number))
            counter.begin()
            try:
                for record in made:
                    journal.exchange(record)
                journal.round()
            finally:
                counter.end()
            journal.start()  # for its stop, which closes the file
            journal.stop()
        counting.counts.subtract(nothing.counts)
        found[kind] = rates(counting.counts, LOGGED)
    return found


def records(number: int) -> Iterator[Exchange]:
    """Exchanges that ended in the same second, of several clients, with lines all different."""
    for n in range(number):
        moments = (0.0, 0.00001 * n, 0.00002 * n, 0.00003 * n, 0.00004 * n)
        line = b"GET /item/%d HTTP/1.1" % n
        client = f"127.0.0.1:{10_000 + n % 64}"
        yield (1e9 + n / LOGGED, client, line, 200, 6, f"{n % 2}", *moments, "--", 1, f"{n:016x}", 0, 64, 64, 32, 0)


# The tables -------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description="Print what tests/test_guard.py bounds.")
    parser.add_argument("--names", action="store_true", help="also what it is made of")
    names = parser.parse_args().names
    why = no_strace()
    print(f"no SYSTEM_CALLS: {why}" if why else "SYSTEM_CALLS")
    for work in () if why else WORKS:
        with tempfile.TemporaryDirectory() as directory:
            print(f'    "{work.name}": {system_calls(work, Path(directory))},')
    with tempfile.TemporaryDirectory() as directory:
        found = {work.name: on_reactor(work, Path(directory)) for work in WORKS}
        found |= {format: on_journal(format, Path(directory)) for format in FORMATS}
    for kind, table in (PythonCalls, "PYTHON_CALLS"), (CCalls, "C_CALLS"), (Instructions, "INSTRUCTIONS"):
        print(table, f"{VERSION}:", {row: round(sum(counted[kind].values()), 1) for row, counted in found.items()})
        for row, counted in found.items() if names else ():
            print(f"    {row}: {counted[kind]}")


if __name__ == "__main__":
    main()
