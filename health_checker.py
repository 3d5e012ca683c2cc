"""Watch the backends of a servers.json with the balancer's own probes, and tell of every change.

    python health_checker.py [--config servers.json] [--once] [--interval SECONDS] [--log-file FILE]

It begins with a line for each backend, then prints one whenever a state changes:

    2026-11-20 20:37:20 backend 1 127.0.0.1:8001 DOWN: L4CON refused, 3rd failure

--once probes each backend once, prints a table, and exits 0 if all are up, 1 if not. Status 2 is a wrong argument or
configuration. SIGINT and SIGTERM end it.
"""

from __future__ import annotations

import argparse
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from balancer import config
from balancer.backend import Backend
from balancer.health import HealthChecker
from balancer.journal import Journal
from balancer.pickers import RoundRobin
from balancer.pool import Pool
from balancer.version import __version__

PROGRAM = "health_checker.py"
NEVER_AGAIN = 86400.0  # seconds between two probes of a backend that is to be probed once


class WatchedPool(Pool):
    """A pool that tells of a backend's first result even if it is no change."""

    def report(self, backend: Backend, passed: bool, check: str) -> None:
        first = not backend.probed
        super().report(backend, passed, check)
        if first and passed:
            self.on_change(backend, check)


class Watcher:
    """Backends, probes and log as one, and a queue that brings what happens to the main thread; None is a signal."""

    def __init__(self, settings: config.Config, journal: Journal) -> None:
        self.happened: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._journal = journal
        self._probes = settings.health_check
        backends = [Backend(server) for server in settings.servers]
        self.pool = WatchedPool(
            backends, RoundRobin(), rise=self._probes.rise, fall=self._probes.fall, on_change=self._changed
        )

    def _changed(self, backend: Backend, reason: str) -> None:
        self._tell("info" if backend.healthy else "warning", f"{title(backend)} {backend.status}: {reason}")

    def _tell(self, level: str, text: str) -> None:
        self._journal.event(level, text)
        self.happened.put(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}")

    def watch(self) -> int:
        """Print what happens until a signal comes."""
        with self._checking(self._probes, lambda text: self._tell("error", text)):
            while line := self.happened.get():
                print(line, flush=True)
        return 0

    def once(self) -> int:
        """Print the state of each backend after one probe, and tell by the exit status whether all are up."""
        probes = replace(self._probes, interval=NEVER_AGAIN)
        with self._checking(probes, lambda text: print(f"{PROGRAM}: {text}", file=sys.stderr)):
            for _ in self.pool.backends:
                if self.happened.get() is None:
                    return 1
        rows = [(backend.id, backend.address, backend.status, backend.check) for backend in self.pool.backends]
        print(table([("ID", "ADDRESS", "STATE", "CHECK"), *rows]), flush=True)
        return 0 if all(backend.healthy for backend in self.pool.backends) else 1

    @contextmanager
    def _checking(self, probes: config.HealthCheck, on_error: Callable[[str], None]) -> Iterator[None]:
        checker = HealthChecker(self.pool, probes, on_error=on_error)
        try:
            checker.start()
            yield
        finally:
            checker.stop()


def await_signals(act: Callable[[], None]) -> None:
    """Have `act` called when SIGINT or SIGTERM comes. Call it before any other thread starts: they inherit the mask.

    A thread of its own that waits, and no handler: a handler runs only once the main thread gets to it, and a signal
    that comes just before that blocks in a queue does not wake it.
    """
    signals = {signal.SIGINT, signal.SIGTERM}

    def wait() -> None:
        signal.sigwait(signals)
        act()

    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    threading.Thread(target=wait, name="signals", daemon=True).start()


def title(backend: Backend) -> str:
    return f"backend {backend.id} {backend.address}"


def table(rows: list[tuple[str, ...]]) -> str:
    """Columns as wide as their longest cell, two blanks between them."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def command_line(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog=PROGRAM, description="Watch the backends of a servers.json and tell of every change.")
    add = parser.add_argument
    add("--config", metavar="FILE", help="default: servers.json here, else the one beside this program")
    add("--once", action="store_true", help="probe each once, print a table, exit 0 if all are up and 1 if not")
    add("--interval", metavar="SECONDS", help="between two probes of a backend (default: the configuration's)")
    add("--log-file", metavar="FILE", help="write the changes there too")
    add("--version", action="version", version=f"{PROGRAM} {__version__}")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = command_line(arguments)
    try:
        settings = config.load(config.find(options.config, Path(__file__).resolve().parent))
        settings = config.override(settings, interval=options.interval, log_file=options.log_file)
    except config.ConfigError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2
    log = settings.log
    # Without the flag there is no file: the one that is configured is the balancer's to write and to rotate.
    journal = Journal(log.file if options.log_file else "", max_bytes=log.max_bytes, backups=log.backups)
    watcher = Watcher(settings, journal)
    await_signals(lambda: watcher.happened.put(None))
    try:
        journal.start()
    except OSError as error:
        print(f"{PROGRAM}: --log-file: {log.file} cannot be opened: {error.strerror}", file=sys.stderr)
        return 2
    try:
        return watcher.once() if options.once else watcher.watch()
    except BrokenPipeError:  # who read our lines has gone; without this the interpreter would complain at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    finally:
        journal.stop()


if __name__ == "__main__":
    sys.exit(main())
