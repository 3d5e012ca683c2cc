"""load_balancer.log: what a line looks like, the file it goes to, and the thread that writes it.

A record of one exchange, or of one connection in TCP mode, is a plain tuple, because that is the fastest thing to
build. Its positions are those of `Exchange`. An event is a line of its own: a start, a change of state, an error.

Nobody who logs ever waits: `Journal.exchange` is `deque.append` itself, and the thread "journal" looks every 100 ms
whether there is something to write (100 times a second while there is much, so that no batch keeps the interpreter's
lock for long). To be woken instead would put a system call on every request; the idle looks cost 0.2% of a core.

No line can be forged by what a client or a backend sends: characters that could end a line or steer a terminal are
written as \\xNN, as nginx writes them, and so are the quotes inside the quoted request line.
"""

from __future__ import annotations

import os
import re
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from typing import NamedTuple, TextIO

Exchange = tuple[
    float,  # 0 when it ended: seconds since the epoch
    str,  # 1 client, "ip:port"
    bytes,  # 2 request line as received; b"" in TCP mode
    int,  # 3 status; 0 when none was sent, and in TCP mode
    int,  # 4 octets sent to the client
    str,  # 5 backend's id; "-" when there is none
    float,  # 6 seconds in the queue; in each of these four -1.0 when it was never reached
    float,  # 7 seconds until the connection to the backend stood
    float,  # 8 seconds until the answer's head was there
    float,  # 9 seconds altogether
    str,  # 10 two letters: what ended it, and where; "--" when all went well
    int,  # 11 how many backends were tried
    str,  # 12 the request's id; "" when it has none
    int,  # 13 octets received from the client
]
Event = tuple[float, str, str]  # seconds since the epoch, level, text

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}

WAITING = 100_000
"""Records that are kept while the file cannot be written; beyond it the oldest are dropped, and counted."""
ECHOES = 10_000
"""Events that are kept while the terminal does not take them."""
BATCH = 1000
"""Records to one write, at most: about 1.1 ms of the interpreter's lock."""
BUSY = 50
"""Records in a batch from which on the next look is soon."""
LONGEST_PAUSE = 0.1
SHORTEST_PAUSE = 0.01
LOOK = 1.0
"""Seconds between two looks at whether the file was moved away."""
STOP_PATIENCE = 5.0


# What a line looks like -------------------------------------------------------------------------------------------


class Format(NamedTuple):
    """How records become lines, without their line ends."""

    exchange: Callable[[Exchange], str]
    event: Callable[[Event], str]


def text_exchange(record: Exchange) -> str:
    """One line for people:
    `2026-11-20 20:37:20.123 INFO 127.0.0.1:54321 "GET / HTTP/1.1" 200 34 backend=1 0.8ms code=-- tries=1`;
    in TCP mode `tcp 517/34`, octets from and to the client, in place of request line, status and octets.
    """
    ended, client, line, status, bytes_out, backend, _, _, _, total, code, tries, request_id, bytes_in = record
    date = _date(int(ended * 1000))
    end = f"backend={backend} {total * 1000:.1f}ms code={code} tries={tries}"
    if line or status:
        text = f'{date} INFO {client} "{_request(line)}" {status or "-"} {bytes_out} {end}'
    else:
        text = f"{date} INFO {client} tcp {bytes_in}/{bytes_out} {end}"
    return f"{text} id={_quotable(request_id).replace(' ', '_')}" if request_id else text


def text_event(event: Event) -> str:
    """One line for people: `2026-11-20 20:37:20.123 WARNING backend 1 is DOWN: L4CON refused, 3rd failure`."""
    moment, level, text = event
    return f"{_date(int(moment * 1000))} {level.upper()} {_printable(text)}"


FORMATS = {"text": Format(text_exchange, text_event)}


@lru_cache(maxsize=16)
def _date(milliseconds: int) -> str:
    """Local time, `2026-11-20 20:37:20.123`."""
    return f"{_second(milliseconds // 1000)}.{milliseconds % 1000:03d}"


@lru_cache(maxsize=4)
def _second(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


@lru_cache(maxsize=256)
def _request(line: bytes) -> str:
    """A request line, fit for quotes. What is asked for once is mostly asked for again."""
    return _quotable(line.decode("ascii", "surrogateescape"))


_UNQUOTABLE = re.compile(r"[^ !#-\[\]-~]")  # all but printable ASCII, and the quote and the backslash of it


def _quotable(text: str) -> str:
    if not _UNQUOTABLE.search(text):
        return text
    return _UNQUOTABLE.sub(lambda match: _escape(match[0]), text)


def _printable(text: str) -> str:
    if text.isprintable() and "\\" not in text:
        return text
    return "".join(char if char.isprintable() and char != "\\" else _escape(char) for char in text)


def _escape(char: str) -> str:
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:  # an octet that was not ASCII, by way of "surrogateescape"
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


# The file ---------------------------------------------------------------------------------------------------------


class LogFile:
    """A file that is appended to, rotated by size, and opened again when its path leads elsewhere.

    It holds at most one batch of lines that is not written yet. Methods raise OSError and may be called again after
    it. What is no regular file by itself (a link, a pipe, /dev/stdout) is never rotated.
    """

    def __init__(self, path: str, max_bytes: int, backups: int, warn: Callable[[str], None]) -> None:
        self.path = path
        self.unwritten = b""
        self._done = 0  # octets of `unwritten` that are in the file already
        self._max_bytes = max_bytes
        self._backups = backups
        self._warn = warn
        self._fd = -1
        self._identity = (0, 0)
        self._size = 0
        self._rotates = False

    def open(self) -> None:
        self.close()
        self._fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        status = os.fstat(self._fd)
        self._identity = (status.st_dev, status.st_ino)
        self._size = status.st_size
        self._rotates = self._max_bytes > 0 and stat.S_ISREG(os.lstat(self.path).st_mode)
        # A line that was cut by a full disk begins again in the file that comes after it.
        self._done = self.unwritten.rfind(b"\n", 0, self._done) + 1

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def follow(self) -> None:
        """Open the path again when it leads to another file than ours, or to none."""
        try:
            status = os.stat(self.path)
        except OSError:
            self.open()
        else:
            if (status.st_dev, status.st_ino) != self._identity:
                self.open()
            self._size = min(self._size, status.st_size)  # less when somebody emptied the file in place

    def flush(self) -> None:
        """Write what is unwritten, after a rotation if the file would grow beyond its size.

        A file is larger than `max_bytes` only when a single batch is.
        """
        if self._fd < 0:
            self.open()
        if self._rotates and self._size and not self._done and self._size + len(self.unwritten) > self._max_bytes:
            self._rotate()
        while self._done < len(self.unwritten):
            written = os.write(self._fd, self.unwritten[self._done :])
            self._done += written
            self._size += written
        self.unwritten = b""
        self._done = 0

    def _rotate(self) -> None:
        names = [self.path, *(f"{self.path}.{number}" for number in range(1, self._backups + 1))]
        try:
            if not self._backups:
                os.ftruncate(self._fd, 0)
            for number in range(self._backups, 0, -1):
                with suppress(FileNotFoundError):
                    os.replace(names[number - 1], names[number])
        except OSError as error:
            self._warn(f"{self.path}: cannot be rotated and grows on: {_reason(error)}")
            self._size = 0  # to try again after as much once more
        else:
            self.open()


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


# The writer -------------------------------------------------------------------------------------------------------


class Journal:
    """The log: records are appended by any thread and written by one.

    path       of the file, "" to write none
    level      the least that is written; exchanges are "info"
    max_bytes  size at which the file is rotated to path.1, path.2 ...; 0: never
    backups    how many of those are kept; 0: the file is emptied instead
    echo       a stream that is given the events too, not the exchanges

    The file is opened again when it was moved away or deleted. A disk that is full, a directory that vanished or a
    terminal that was closed raise nothing: records wait, the oldest are dropped at last, and it is said on stderr when
    the trouble begins and in the log when it is over. A terminal or a pipe that takes nothing stops the file too.
    """

    exchange: Callable[[Exchange], None]
    """Log one exchange. This is `deque.append`: nothing else happens on the caller's thread."""

    def __init__(
        self,
        path: str,
        *,
        level: str = "info",
        max_bytes: int = 50_000_000,
        backups: int = 3,
        echo: TextIO | None = None,
        format: str = "text",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._level = LEVELS[level]
        self._format = FORMATS[format]
        self._clock = clock
        self._file = LogFile(path or os.devnull, max_bytes, backups, lambda text: self.event("warning", text))
        # Appending to a deque that is full drops the oldest. That bounds the memory even while the writer is stuck in
        # a system call; otherwise the writer drops them itself, at half that number, for it can count them.
        self._waiting: deque[Exchange | Event] = deque(maxlen=2 * WAITING if path else 0)
        self._echo = echo
        self._echoes: deque[Event] = deque(maxlen=ECHOES if echo else 0)
        self.exchange = self._waiting.append if LEVELS["info"] >= self._level else deque[Exchange](maxlen=0).append
        self._look_due = 0.0
        self._reopen = False
        self._trouble: tuple[float, str] | None = None  # since when the file cannot be written, and why
        self._lost = 0
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def event(self, level: str, text: str) -> None:
        """Log what happened; `level` is one of LEVELS. From any thread."""
        if LEVELS[level] >= self._level:
            event = (time.time(), level, text)
            self._waiting.append(event)
            self._echoes.append(event)

    def start(self) -> None:
        """Open the file and begin to write. Raises OSError when the path cannot be opened."""
        self._file.open()
        self._look_due = self._clock() + LOOK
        self._thread = threading.Thread(target=self._work, name="journal", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Write everything that was appended before, and end the thread; given up after 5 s if the disk hangs."""
        if self._thread:
            self._stopping.set()
            self._thread.join(STOP_PATIENCE)
            self._thread = None

    def reopen(self) -> None:
        """Open the file again at the next look, within 100 ms. Safe in a signal handler."""
        self._reopen = True

    def _work(self) -> None:
        pause = LONGEST_PAUSE
        while not self._stopping.wait(pause):
            taken = self.round()
            more = len(self._waiting) >= BATCH
            pause = 0.0 if more else SHORTEST_PAUSE if taken >= BUSY else LONGEST_PAUSE
        for _ in range(len(self._waiting) // BATCH + 3):  # the batch in hand, the last that is not full, the last event
            self.round()
        if self._trouble:
            self._lost += len(self._waiting) + self._file.unwritten.count(b"\n")
            self._say(f"{self._file.path}: {self._lost} lines were lost: {self._trouble[1]}")
        self._file.close()

    def round(self) -> int:
        """One round of the writer: write the next batch, to a file that was looked after.

        Returns how many records it took.
        """
        self._echo_events()
        taken = 0
        try:
            self._follow()
            if not self._file.unwritten:
                taken = self._take()
            self._file.flush()
        except OSError as error:
            self._suffer(error)
        else:
            self._recover()
        return taken

    def _follow(self) -> None:
        if self._reopen:
            self._reopen = False
            self._file.open()
        elif (now := self._clock()) >= self._look_due:
            self._look_due = now + LOOK
            self._file.follow()

    def _take(self) -> int:
        """Format the oldest records that wait; at most BATCH of them."""
        waiting = len(self._waiting)
        if waiting >= 2 * WAITING:
            self.event("error", f"{self._file.path}: was not written fast enough; uncounted lines were lost")
        taken = min(waiting, BATCH)
        oldest = self._waiting.popleft
        exchange, event = self._format
        records = [oldest() for _ in range(taken)]
        try:
            lines = [event(record) if len(record) == 3 else exchange(record) for record in records]
        except Exception:
            lines = [self._line(record) for record in records]
        if lines:
            lines.append("")
            self._file.unwritten = "\n".join(lines).encode("utf-8", "backslashreplace")
        return taken

    def _line(self, record: Exchange | Event) -> str:
        """The line of a record, even of one that was built wrongly, which must not end the log."""
        exchange, event = self._format
        try:
            return event(record) if len(record) == 3 else exchange(record)
        except Exception as error:
            return event((time.time(), "error", f"no line can be made of {record!r}: {error!r}"))

    def _suffer(self, error: OSError) -> None:
        """Note the trouble, say so once, and keep the memory bounded."""
        if not self._trouble:
            reason = _reason(error)
            self._trouble = (self._clock(), reason)
            self._say(f"{self._file.path}: cannot be written: {reason}; the last {WAITING} lines are kept until it can")
        while len(self._waiting) > WAITING:
            self._waiting.popleft()
            self._lost += 1

    def _recover(self) -> None:
        if self._trouble:
            since, reason = self._trouble
            trouble = f"{self._file.path}: could not be written for {self._clock() - since:.1f} s: {reason}"
            self.event("error", f"{trouble}; {self._lost} lines were lost")
            self._trouble = None
            self._lost = 0

    def _echo_events(self) -> None:
        if not self._echoes or not self._echo:
            return
        encoding = self._echo.encoding or "utf-8"
        try:
            while self._echoes:
                line = text_event(self._echoes.popleft())
                self._echo.write(line.encode(encoding, "backslashreplace").decode(encoding) + "\n")
            self._echo.flush()
        except (OSError, ValueError):  # the terminal or the pipe was closed: the file goes on without it
            self._echo = None
            self._echoes = deque(maxlen=0)

    def _say(self, text: str) -> None:
        with suppress(OSError, ValueError):
            print(text, file=sys.stderr, flush=True)
