"""What goes wrong around a balancer, under load: `python tests/faults.py` prints a table of what that costs.

Each scenario starts three backends and a balancer, each a process of its own, keeps closed-loop clients busy, lets
something happen, and counts which requests failed. tests/test_faults.py asserts on the same rows.
"""

from __future__ import annotations

import itertools
import re
import signal
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from client import Settings, Stats, play  # noqa: E402 - both directories have to be on the path first
from conftest import PATIENCE, eventually  # noqa: E402
from programs import LB, Program, free_ports, write_settings  # noqa: E402

CLIENTS = 16
PIECE = 300  # requests between two events
QUICK_PROBES = {"path": "/health", "interval": 0.2, "timeout": 0.5}
BACKEND = ROOT / "backend_server.py"


class Stand:
    """Three backends and a balancer before them. `settings` are keys of servers.json."""

    def __init__(self, directory: Path, servers: dict[str, Any] | None = None, **settings: Any) -> None:
        self.directory = directory
        self.ports = free_ports(3)
        self.backends = [self._backend(place) for place in range(3)]
        rows = [
            {"id": place + 1, "host": "127.0.0.1", "port": port, **(servers or {})}
            for place, port in enumerate(self.ports)
        ]
        keys = {"health_check": QUICK_PROBES, "listen": {"port": 0}, **settings}
        write_settings(directory, {"servers": rows, **keys})
        for backend in self.backends:
            assert backend.first_line
        self.balancer = Program((LB,), directory)
        self.port = self.balancer.port

    def __enter__(self) -> Stand:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.balancer.process.poll() is None:
            self.balancer.stop()
        for place, backend in enumerate(self.backends):
            if backend.process.poll() is None:
                self.thaw(place)
                backend.stop(signal.SIGKILL)

    def _backend(self, place: int) -> Program:
        return Program((BACKEND, "--port", self.ports[place], "--id", place + 1), self.directory)

    def kill(self, place: int, number: int = signal.SIGKILL) -> None:
        self.backends[place].stop(number)

    def start(self, place: int) -> None:
        """Start a backend anew, and wait until the balancer says that it is back."""
        seen = self.count(place, "UP")
        self.backends[place] = self._backend(place)
        assert self.backends[place].first_line
        eventually(lambda: self.count(place, "UP") > seen or not self.is_down(place), f"backend {place + 1} is up")

    def freeze(self, place: int) -> None:
        self.backends[place].process.send_signal(signal.SIGSTOP)

    def thaw(self, place: int) -> None:
        self.backends[place].process.send_signal(signal.SIGCONT)

    def log(self) -> str:
        return (self.directory / "load_balancer.log").read_text()

    def codes(self) -> Counter[str]:
        """Termination codes in the log, of those requests that did not end well."""
        return Counter(re.findall(r"code=([A-Za-z-]{2})", self.log())) - Counter({"--": 10**9})

    def count(self, place: int, state: str) -> int:
        return len(re.findall(rf"backend {place + 1} \S+ {state}:", self.log()))

    def is_down(self, place: int) -> bool:
        states = re.findall(rf"backend {place + 1} \S+ (UP|DOWN):", self.log())
        return bool(states) and states[-1] == "DOWN"


class Load:
    """Closed-loop clients, as many threads, from entering to leaving."""

    def __init__(self, port: int, clients: int = CLIENTS, **settings: Any) -> None:
        self._stop = threading.Event()
        self._parts = [Stats() for _ in range(clients)]
        wanted = Settings(port=port, timeout=PATIENCE, **settings)
        self._threads = [
            threading.Thread(
                target=play, args=(wanted, itertools.repeat(0), float("inf"), self._stop, part), name="load"
            )
            for part in self._parts
        ]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    @property
    def stats(self) -> Stats:
        return Stats.merged(self._parts)

    @property
    def done(self) -> int:
        return sum(part.requests for part in self._parts)

    @property
    def failed(self) -> int:
        return sum(part.failed for part in self._parts)

    @property
    def all_refused(self) -> bool:
        """Has each client been refused a connection?"""
        return all(part.errors["refused"] for part in self._parts)

    def more(self, requests: int) -> None:
        """Wait until so many more have been answered."""
        until = self.done + requests
        eventually(lambda: self.done >= until, f"{requests} more answers")


@dataclass
class Row:
    """What one scenario cost."""

    name: str
    requests: int = 0
    failed: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    note: str = ""

    def __str__(self) -> str:
        return "| {:46} | {:8} | {:6} | {:24} | {:16} | {} |".format(
            self.name,
            self.requests,
            self.failed,
            ", ".join(f"{count} {what}" for what, count in self.errors.items()) or "-",
            ", ".join(f"{count} {what}" for what, count in self.codes.items()) or "-",
            self.note,
        )


def row(name: str, load: Load, stand: Stand, note: str = "") -> Row:
    stats = load.stats
    return Row(name, stats.requests, stats.failed, stats.errors, stand.codes(), note)




def killed(directory: Path, **load_settings: Any) -> Row:
    """kill -9 of a backend, and its restart."""
    with Stand(directory) as stand, Load(stand.port, **load_settings) as load:
        load.more(PIECE)
        stand.kill(1)
        load.more(PIECE)
        eventually(lambda: stand.is_down(1), "the killed one is down")
        stand.start(1)
        load.more(PIECE)
    kind = " ".join(f"{value}" for value in load_settings.values()) or "GET"
    return row(f"kill -9 and restart, {kind}", load, stand)


def killed_new_connections(directory: Path) -> Row:
    result = killed(directory, new_connections=True)
    result.name = "kill -9 and restart, a connection per request"
    return result


def killed_posts(directory: Path) -> Row:
    """Only POSTs in flight at the killed backend may fail, each with 502 and its code."""
    result = killed(directory, method="POST", body_size=100)
    result.name = "kill -9 and restart, POST"
    return result


def rolling_restart(directory: Path) -> Row:
    with Stand(directory) as stand, Load(stand.port) as load:
        for place in range(3):
            load.more(PIECE)
            stand.kill(place, signal.SIGTERM)
            load.more(PIECE)
            stand.start(place)
        load.more(PIECE)
    return row("rolling restart of all three", load, stand)


def frozen(directory: Path) -> Row:
    """A backend that hangs is taken out by its probes, and what it holds unanswered goes to another."""
    with Stand(directory) as stand, Load(stand.port) as load:
        load.more(PIECE)
        stand.freeze(1)
        eventually(lambda: stand.is_down(1), "the frozen one is down")
        load.more(PIECE)
        stand.thaw(1)
        eventually(lambda: not stand.is_down(1), "the thawed one is up")
        load.more(PIECE)
    return row("SIGSTOP of a backend, GET", load, stand)


def all_away(directory: Path) -> Row:
    """All backends gone, and back: without `no_backend` 503 at once."""
    with Stand(directory) as stand, Load(stand.port) as load:
        load.more(PIECE)
        for place in range(3):
            stand.kill(place)
        load.more(PIECE)
        for place in range(3):
            stand.start(place)
        load.more(PIECE)
    return row("all away, default", load, stand, "503 at once")


def all_away_patience(directory: Path) -> Row:
    """With `timeouts.no_backend` requests wait for one to come back."""
    with Stand(directory, timeouts={"no_backend": PATIENCE}) as stand, Load(stand.port) as load:
        load.more(PIECE)
        for place in range(3):
            stand.kill(place)
        eventually(lambda: all(stand.is_down(place) for place in range(3)), "all are down")
        for place in range(3):
            stand.start(place)
        load.more(PIECE)
    return row("all away, timeouts.no_backend", load, stand)


def stopped(directory: Path, **load_settings: Any) -> Row:
    """SIGTERM of the balancer: what it accepted it answers.

    Later clients are refused by the system, or reset if they stood in its backlog just when that was closed: `failed`
    is what the log has as answered and no client has.
    """
    with Stand(directory) as stand:
        with Load(stand.port, **load_settings) as load:
            load.more(PIECE)
            status = stand.balancer.stop()
            eventually(lambda: load.all_refused, "every client has seen the end")
        kind = "a connection per request" if load_settings else "kept-alive"
        result = row(f"SIGTERM of the balancer, {kind}", load, stand, f"exit status {status}")
    result.failed = stand.log().count('"GET / HTTP/1.1" 200 ') - (load.done - load.failed)
    for word in ("refused", "reset", "closed"):
        result.errors.pop(word, None)
    return result


def stopped_new_connections(directory: Path) -> Row:
    return stopped(directory, new_connections=True)


def overloaded(directory: Path) -> Row:
    """More clients than the backends may have at once: the queue evens it out."""
    with Stand(directory, servers={"max_connections": 2}) as stand, Load(stand.port, path="/slow/0.01") as load:
        load.more(PIECE)
    return row("max_connections 2, 16 clients, queue", load, stand)


def overloaded_for_long(directory: Path) -> Row:
    """A queue that is not served in time: 503 with sQ, and nothing else."""
    settings = {"servers": {"max_connections": 1}, "timeouts": {"queue": 0.1}}
    with Stand(directory, **settings) as stand, Load(stand.port, path="/slow/0.3") as load:
        load.more(50)
    return row("max_connections 1, queue timeout 0.1 s", load, stand, "503 with sQ")


def capped(directory: Path) -> Row:
    """More connections than `limits.connections`: the rest wait in the backlog."""
    with Stand(directory, limits={"connections": 4}) as stand, Load(stand.port, new_connections=True) as load:
        load.more(PIECE)
    return row("limits.connections 4, 16 clients", load, stand)


def short_of_descriptors(directory: Path) -> Row:
    """Descriptors run out, and come back: nobody is lost, clients wait."""
    import resource

    with Stand(directory) as stand, ExitStack() as stack:
        pid = stand.balancer.pid
        with Load(stand.port, clients=4) as load:
            load.more(PIECE)
        limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        used = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + 4, limits[1]))
        load = stack.enter_context(Load(stand.port, new_connections=True))
        eventually(lambda: "accepting pauses" in stand.log(), "descriptors are short")
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
        load.more(PIECE)
        eventually(lambda: "accepting again" in stand.log(), "descriptors are there again")
        before = load.failed
        load.more(PIECE)
        assert load.failed == before
    return row("descriptors exhausted, and back", load, stand, "503 with RC while they are short")


SCENARIOS: tuple[Callable[[Path], Row], ...] = (
    killed,
    killed_new_connections,
    killed_posts,
    rolling_restart,
    frozen,
    all_away,
    all_away_patience,
    stopped,
    stopped_new_connections,
    overloaded,
    overloaded_for_long,
    capped,
    short_of_descriptors,
)


def main() -> int:
    print("| {:46} | {:8} | {:6} | {:24} | {:16} | note |".format("what", "requests", "failed", "errors", "codes"))
    print(f"|{'-' * 48}|{'-' * 10}|{'-' * 8}|{'-' * 26}|{'-' * 18}|------|")
    wanted = set(sys.argv[1:])
    for scenario in SCENARIOS:
        if not wanted or scenario.__name__ in wanted:
            with tempfile.TemporaryDirectory(prefix="lb-faults-") as directory:
                print(scenario(Path(directory)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
