"""What goes wrong around a balancer, under load: `python tests/faults.py` prints a table of what that costs.

Each scenario starts three backends and a balancer, each a process of its own, keeps closed-loop clients busy, lets
something happen, and counts which requests failed. tests/test_faults.py asserts on the same rows.
"""

from __future__ import annotations

import gc
import http.client
import itertools
import re
import signal
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from backend_server import serving  # noqa: E402 - both directories have to be on the path first
from balancer import upstream  # noqa: E402
from balancer.balancer import LoadBalancer  # noqa: E402
from balancer.http_session import HttpSession  # noqa: E402
from balancer.pump import Flow  # noqa: E402
from balancer.tunnel import Tunnel  # noqa: E402
from balancing import running  # noqa: E402
from client import Settings, Stats, percentile, play  # noqa: E402
from conftest import PATIENCE, descriptors, eventually, threads  # noqa: E402
from mixture import Caller, unruly  # noqa: E402
from programs import LB, Program, free_ports, resident_kb, started, write_settings  # noqa: E402

CLIENTS = 16
PIECE = 300  # requests between two events
QUICK_PROBES = {"path": "/health", "interval": 0.1, "timeout": 0.5, "rise": 1}
BACKEND = ROOT / "backend_server.py"
SLOW_CLIENTS = ROOT / "tests" / "slow_clients.py"


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

    def tell(self, place: int, state: str) -> None:
        """Have its /health say so: `ok` or `fail`."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.ports[place], timeout=PATIENCE)) as connection:
            connection.request("POST", f"/health/{state}")
            connection.getresponse().read()

    def log(self, since: int = 0) -> str:
        """What it has from that octet on."""
        with (self.directory / "load_balancer.log").open() as file:
            file.seek(since)
            return file.read()

    def codes(self, since: int = 0) -> Counter[str]:
        """Termination codes in the log, of those requests that did not end well."""
        return Counter(re.findall(r"code=([A-Za-z-]{2})", self.log(since))) - Counter({"--": 10**9})

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


def frozen_posts(directory: Path) -> Row:
    """What the frozen backend holds may not go to another, and is told when the probes know: 504 with DH."""
    half = CLIENTS // 2
    with (
        Stand(directory) as stand,
        Load(stand.port, half) as gets,
        Load(stand.port, half, method="POST", path="/echo", body_size=100) as posts,
    ):
        posts.more(PIECE)
        stand.freeze(1)
        eventually(lambda: stand.is_down(1), "the frozen one is down")
        posts.more(PIECE)
        stand.thaw(1)
        eventually(lambda: not stand.is_down(1), "the thawed one is up")
        posts.more(PIECE)
    return row("SIGSTOP of a backend, POST", posts, stand, f"{gets.failed} of {gets.done} GETs beside them failed")


def unwell(directory: Path) -> Row:
    """A backend whose /health says 503 gets nothing more, and what it has in hand is not disturbed."""
    with (
        Stand(directory) as stand,
        Load(stand.port, method="POST", path="/slow/0.02", body_size=100) as load,
    ):
        load.more(PIECE // 3)
        stand.tell(1, "fail")
        eventually(lambda: stand.is_down(1), "the unwell one is down")
        load.more(PIECE // 3)
        stand.tell(1, "ok")
        eventually(lambda: not stand.is_down(1), "it is up again")
        load.more(PIECE // 3)
    return row("503 from /health, POST", load, stand)


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
        load.more(PIECE // 2)
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


def slowloris(directory: Path, heads: int = 2000, readers: int = 200, rounds: int = 5) -> Row:
    """What those who take their time cost the others: the p99 of well-behaved clients with and without them."""
    alone, beside, most_threads, most_kb = [], [], 0, 0
    with Stand(directory, timeouts={"request_head": 2, "client": 1}) as stand:
        pid = stand.balancer.pid
        for _ in range(rounds):
            alone.append(sample(stand))
            with beset(stand, heads, readers):
                beside.append(sample(stand))
                most_threads = max(most_threads, len(list(Path(f"/proc/{pid}/task").iterdir())))
                most_kb = max(most_kb, resident_kb(pid))
        codes = stand.codes()
    with_them, without = (median(p99_ms(stats) for stats in samples) for samples in (beside, alone))
    note = (
        f"p99 {with_them:.1f} ms beside them, {without:.1f} ms without: ratio {with_them / without:.2f}; "
        f"cut: {codes['cR']} heads, {codes['cD']} readers; {most_threads} threads, {most_kb // 1024} MB"
    )
    total = Stats.merged([*alone, *beside])
    return Row(f"{heads} slow heads, {readers} slow readers", total.requests, total.failed, total.errors, codes, note)


def sample(stand: Stand) -> Stats:
    """Requests enough for a p99, and for each of the slow ones to be cut once meanwhile."""
    with Load(stand.port) as load:
        load.more(6000)
    return load.stats


def p99_ms(stats: Stats) -> float:
    found = percentile(sorted(stats.latencies), 99)
    assert found is not None
    return 1000 * found


@contextmanager
def beset(stand: Stand, heads: int, readers: int) -> Iterator[None]:
    """So many slow clients, a process of their own, from the time when the first of them were cut."""
    descriptors_before = open_descriptors(stand.balancer.pid)
    log_before = len(stand.log())
    with started(SLOW_CLIENTS, stand.port, heads, readers, directory=stand.directory):
        eventually(lambda: {"cR", "cD"} <= set(stand.codes(log_before)), "both kinds are being cut")
        yield
    eventually(lambda: open_descriptors(stand.balancer.pid) <= descriptors_before, "the slow ones have gone")


def open_descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def leaks(directory: Path, requests: int = 20_000) -> Row:
    """Requests of every kind, all at once; then everything is where it was."""
    callers: list[Caller] = []
    with unruly_stand(directory) as balancer:
        address = (balancer.host, balancer.port)
        Caller(address).play(1, 0)
        settled = Belongings(balancer)
        callers = [Caller(address) for _ in range(CLIENTS)]
        players = [
            threading.Thread(target=caller.play, args=(requests // CLIENTS, seed), name=f"caller-{seed}")
            for seed, caller in enumerate(callers)
        ]
        for player in players:
            player.start()
        for player in players:
            player.join()
        left = settled.wait()
    wrong = sum((caller.wrong for caller in callers), Counter[str]())
    turns = sum(caller.turns for caller in callers)
    return Row("requests of every kind", turns, wrong.total(), wrong, Counter(), left or "nothing left behind")


@contextmanager
def unruly_stand(directory: Path) -> Iterator[LoadBalancer]:
    """A balancer in this process that keeps nothing idle for long, before three backends of `mixture`."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(upstream, "KEEP_IDLE", 0.3))
        backends = [stack.enter_context(serving(unruly(name))) for name in "123"]
        addresses = [("127.0.0.1", backend.port) for backend in backends]
        balancer = stack.enter_context(running(directory, addresses, health_check={"type": "tcp", "interval": 1000}))
        balancer.pumps.idle_seconds = 0.1
        eventually(lambda: all(backend.probed for backend in balancer.pool.backends), "the first probes")
        yield balancer


class Belongings:
    """What a balancer at rest has, and what it has more than that later."""

    def __init__(self, balancer: LoadBalancer) -> None:
        self._balancer = balancer
        eventually(lambda: not self._busy(), "it is at rest")
        self._before = {**descriptors(), **threads()}

    def wait(self) -> str:
        """Give it time to come to rest. What it has left then, in words; empty for nothing."""
        try:
            eventually(lambda: not self._left())
        except AssertionError:
            return "; ".join(self._left())
        return ""

    def _left(self) -> list[str]:
        """Threads and descriptors that came, then what `_busy` tells, then what is still in memory."""
        more = [what for key, what in {**descriptors(), **threads()}.items() if key not in self._before]
        return more or self._busy() or self._in_memory()

    def _busy(self) -> list[str]:
        balancer = self._balancer
        counts = {
            "sessions": len(balancer.listener.sessions),
            "active": sum(backend.active for backend in balancer.pool.backends),
            "idle connections": balancer.upstreams.idle,
            "waiting": balancer.upstreams.waiting,
            "pumps": balancer.pumps.threads,
            "with a deadline": len(balancer.reactor.timed) - 1,  # the listener
        }
        return [f"{count} {what}" for what, count in counts.items() if count]

    def _in_memory(self) -> list[str]:
        self._balancer.reactor.wake()  # its loop still holds whom it called last
        gc.collect()
        kinds = (HttpSession, Flow, Tunnel, upstream.Upstream, upstream.Attempt)
        found = Counter(type(thing).__name__ for thing in gc.get_objects() if isinstance(thing, kinds))
        return [f"{count} {kind} in memory" for kind, count in found.items()]


SCENARIOS: tuple[Callable[[Path], Row], ...] = (
    killed,
    killed_new_connections,
    killed_posts,
    rolling_restart,
    frozen,
    frozen_posts,
    unwell,
    all_away,
    all_away_patience,
    stopped,
    stopped_new_connections,
    overloaded,
    overloaded_for_long,
    capped,
    short_of_descriptors,
    slowloris,
    leaks,
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
