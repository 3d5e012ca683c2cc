"""load_balancer.log: the file that it goes to, and the thread that writes it. Its lines: balancer/log_formats.py.

Nobody who logs ever waits: a line is made at once, for what it is made of is at hand, and left in a deque. The thread
"journal" looks every 100 ms whether there is something to write, and more often while there is much. To be woken
instead would put a system call on every request; the idle looks cost 0.2% of a core.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO

from balancer.log_formats import FORMATS, Event, Exchange, text_event

__all__ = ["LEVELS", "Event", "Exchange", "Journal", "LogFile"]

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}

WAITING = 100_000
"""Lines that are kept while the file cannot be written; beyond it the oldest are dropped, and counted."""
ECHOES = 10_000
"""Events that are kept while the terminal does not take them."""
EVENTS = 500
"""Events that are kept to be looked at."""
BATCH = 2000
"""Lines to one write, at most: about 0.1 ms of the interpreter's lock."""
BUSY = 500
"""Lines in a batch from which on the next look is soon."""
LONGEST_PAUSE = 0.1
SHORTEST_PAUSE = 0.02
LOOK = 1.0
"""Seconds between two looks at whether the file was moved away."""
PATIENCE = 5.0
"""Seconds that a stop or a change waits for a disk that hangs."""


# The file ---------------------------------------------------------------------------------------------------------


class LogFile:
    """A file that is appended to, rotated by size, and opened again when its path leads elsewhere.

    It holds at most one batch of lines that is not written yet. Methods raise OSError and may be called again after
    it. What is no regular file by itself (a link, a pipe, /dev/stdout) is never rotated.
    """

    def __init__(self, path: str, max_bytes: int, backups: int, warn: Callable[[str], None]) -> None:
        self.path = path
        self.unwritten = b""
        self.max_bytes = max_bytes
        self.backups = backups
        self._done = 0  # octets of `unwritten` that are in the file already
        self._warn = warn
        self._fd = -1
        self._identity = (0, 0)
        self._size = 0
        self._regular = False

    def open(self) -> None:
        self.close()
        self._begin(_appended(self.path))

    def move(self, path: str) -> None:
        """Go on in another file. When that cannot be opened, all is as it was."""
        fd = _appended(path)
        self.close()
        self.path = path
        self._begin(fd)

    def _begin(self, fd: int) -> None:
        self._fd = fd
        status = os.fstat(fd)
        self._identity = (status.st_dev, status.st_ino)
        self._size = status.st_size
        self._regular = stat.S_ISREG(status.st_mode) and not os.path.islink(self.path)
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
        if self._size and not self._done and 0 < self.max_bytes < self._size + len(self.unwritten) and self._regular:
            self._rotate()
        while self._done < len(self.unwritten):
            written = os.write(self._fd, self.unwritten[self._done :])
            self._done += written
            self._size += written
        self.unwritten = b""
        self._done = 0

    def _rotate(self) -> None:
        names = [self.path, *(f"{self.path}.{number}" for number in range(1, self.backups + 1))]
        try:
            if not self.backups:
                os.ftruncate(self._fd, 0)
            for number in range(self.backups, 0, -1):
                with suppress(FileNotFoundError):
                    os.replace(names[number - 1], names[number])
        except OSError as error:
            self._warn(f"{self.path}: cannot be rotated and grows on: {_reason(error)}")
            self._size = 0  # to try again after as much once more
        else:
            self.open()


def _appended(path: str) -> int:
    """A descriptor of the file, made if need be."""
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


# The writer -------------------------------------------------------------------------------------------------------


class Journal:
    """The log: lines are made by any thread and written by one.

    path       of the file, "" to write none
    level      the least that is written; exchanges are "info"
    max_bytes  size at which the file is rotated to path.1, path.2 ...; 0: never
    backups    how many of those are kept; 0: the file is emptied instead
    format     one of FORMATS
    echo       a stream that is given the events too, as text, not the exchanges

    The file is opened again when it was moved away or deleted. A disk that is full, a directory that vanished or a
    terminal that was closed raise nothing: lines wait, the oldest are dropped at last, and it is said on stderr when
    the trouble begins and in the log when it is over. A terminal or a pipe that takes nothing stops the file too.
    """

    exchange: Callable[[Exchange], None]
    """Log one exchange.

    `configure` may put another in its place. The old one still works, but knows nothing of a change of level.
    """
    events: deque[Event]
    """The last events that are "info" or more, whatever the level of the file; `latest_events` copies them safely."""

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
        self._clock = clock
        self._file = LogFile(path or os.devnull, max_bytes, backups, lambda text: self.event("warning", text))
        # Appending to a deque that is full drops the oldest. That bounds the memory even while the writer is stuck in
        # a system call; otherwise the writer drops them itself, at half that number, for it can count them.
        self._waiting: deque[str] = deque(maxlen=2 * WAITING)
        self._echo = echo
        self._echoes: deque[Event] = deque(maxlen=ECHOES if echo else 0)
        self.events = deque(maxlen=EVENTS)
        self._events_lock = threading.Lock()  # of `events`, which cannot be copied while it grows
        self._writing = threading.Lock()  # held through a round, and while its file or its format are changed
        self._look_due = 0.0
        self._reopen = False
        self._trouble: tuple[float, str, str] | None = None  # since when which file cannot be written, and why
        self._lost = 0
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._choose(path, level, format)

    def _choose(self, path: str, level: str, format: str) -> None:
        """What is written, and how."""
        self._level = LEVELS[level]
        self._format = FORMATS[format]
        self._written = self._waiting if path else deque[str](maxlen=0)
        self.exchange = self._maker() if path and LEVELS["info"] >= self._level else deque[Exchange](maxlen=0).append

    def _maker(self) -> Callable[[Exchange], None]:
        append = self._written.append

        def exchange(record: Exchange) -> None:
            try:
                append(self._format.exchange(record))
            except Exception as error:  # even one that was built wrongly must not end a session
                self.event("error", f"no line can be made of {record!r}: {error!r}")

        return exchange

    def event(self, level: str, text: str) -> None:
        """Log what happened; `level` is one of LEVELS. From any thread."""
        event = (time.time(), level, text)
        if LEVELS[level] >= LEVELS["info"]:
            with self._events_lock:
                self.events.append(event)
        if LEVELS[level] >= self._level:
            self._written.append(self._format.event(event))
            self._echoes.append(event)

    def latest_events(self) -> list[Event]:
        """`events`, the oldest first. From any thread."""
        with self._events_lock:
            return list(self.events)

    def configure(self, path: str, level: str, max_bytes: int, backups: int, format: str) -> None:
        """Go on with these settings, which mean what they mean to the constructor. From any thread, at any time.

        What was logged before goes to the file and in the format that were there before; what waits because that file
        cannot be written goes to the new one. A file whose path stays is not opened again. `exchange` may be another
        object afterwards.

        Raises OSError when a new path cannot be opened, or (EBUSY) when the file in use has taken nothing for 5 s; all
        is then as it was.
        """
        if not self._writing.acquire(timeout=PATIENCE):
            raise OSError(errno.EBUSY, "the log does not take what is written to it", self._file.path)
        try:
            file, place = self._file, path or os.devnull
            if self._thread:
                former, self._format = self._format, FORMATS[format]  # what is made from here on goes to the new place
                self._write_out(len(self._waiting))
                if place != file.path:
                    try:
                        file.move(place)
                    except OSError:
                        self._format = former
                        raise
            file.path, file.max_bytes, file.backups = place, max_bytes, backups
            self._choose(path, level, format)
        finally:
            self._writing.release()

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
            self._thread.join(PATIENCE)
            self._thread = None

    def reopen(self) -> None:
        """Open the file again at the next look, within 100 ms. Safe in a signal handler."""
        self._reopen = True

    def _work(self) -> None:
        pause = LONGEST_PAUSE
        while not self._stopping.wait(pause):
            pause = self.pause_after(self.round())
        self._echo_events()
        with self._writing:
            self._write_out()
            if self._trouble:
                _, path, reason = self._trouble
                self._lost += len(self._waiting) + self._file.unwritten.count(b"\n")
                self._say(f"{path}: {self._lost} lines were lost: {reason}")
            self._file.close()

    def pause_after(self, taken: int) -> float:
        """Seconds until the next round, after one that took so many lines."""
        if self._trouble:
            return LONGEST_PAUSE  # however much waits: there is nowhere to write it
        if len(self._waiting) >= BATCH:
            return 0.0
        return SHORTEST_PAUSE if taken >= BUSY else LONGEST_PAUSE

    def round(self) -> int:
        """One round of the writer: write the next batch, to a file that was looked after.

        Returns how many lines it took.
        """
        self._echo_events()
        with self._writing:
            return self._write_batch()

    def _write_out(self, most: int = 2 * WAITING) -> None:
        """Write all that waits, or `most` lines of it. `_writing` is held."""
        for _ in range(len(self._waiting) // BATCH + 3):  # the batch in hand, one that is not full, the last event
            most -= self._write_batch(most)

    def _write_batch(self, most: int = BATCH) -> int:
        taken = 0
        try:
            self._follow()
            if not self._file.unwritten:
                taken = self._take(min(most, BATCH))
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

    def _take(self, most: int) -> int:
        """Take the oldest lines that wait, so many at most."""
        waiting = len(self._waiting)
        if waiting >= 2 * WAITING:
            self.event("error", f"{self._file.path}: was not written fast enough; uncounted lines were lost")
        taken = min(waiting, most)
        oldest = self._waiting.popleft
        if taken:
            lines = [oldest() for _ in range(taken)]
            lines.append("")
            self._file.unwritten = "\n".join(lines).encode("utf-8", "backslashreplace")
        return taken

    def _suffer(self, error: OSError) -> None:
        """Note the trouble, say so once, and keep the memory bounded."""
        if not self._trouble:
            path, reason = self._file.path, _reason(error)
            self._trouble = (self._clock(), path, reason)
            self._say(f"{path}: cannot be written: {reason}; the last {WAITING} lines are kept until it can")
        while len(self._waiting) > WAITING:
            self._waiting.popleft()
            self._lost += 1

    def _recover(self) -> None:
        if self._trouble:
            since, path, reason = self._trouble
            trouble = f"{path}: could not be written for {self._clock() - since:.1f} s: {reason}"
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
