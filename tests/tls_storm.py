"""5,000 handshakes, a third of them an attacker's, and clients beside them: `python tests/tls_storm.py [ROUNDS]`.

A third is broken off, left half way or garbage, and 200 connections more say nothing at all. Whoever is left half way
stays there, and has longer for it than all of this lasts, so that in the end more than a thousand stand about at once.

What is fair to compare: handshakes take time also when they are honest, here on the same two cores on which the clients
themselves and the backend run. So what bystanders (who have their connections already, and ask for something at fixed
moments, whether or not the last answer has come) notice is measured twice: beside the good handshakes alone, which come
at the same moments, and beside all. Rounds of both alternate, and of each the median counts, as other programs disturb
some of them. The ratio of the two is what the attack costs. How bystanders fare when nobody comes is printed, too.

Then nothing may have failed, and the balancer has the descriptors, threads and sessions that it had.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from random import Random
from statistics import median
from types import TracebackType

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from client import percentile  # noqa: E402 - both directories have to be on the path first
from conftest import PATIENCE, eventually  # noqa: E402
from fakes import read_response  # noqa: E402
from programs import LB, Program, free_ports, started, write_settings  # noqa: E402

DATA = ROOT / "tests" / "data" / "certificates"
HANDSHAKES = 5000
BAD = 3  # one in so many
RATE = 400.0  # handshakes a second
SILENT = 200
BYSTANDERS = 16
ASKS = 20.0  # times a second that each of them does
WORKERS = 16  # that the good and the bad handshakes are spread over
ROUNDS = 5
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with a reset
GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
LAST = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


def trusting() -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(DATA / "root.pem"))


def secure(port: int, context: ssl.SSLContext) -> ssl.SSLSocket:
    sock = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
    return context.wrap_socket(sock, server_hostname="localhost")


@dataclass
class Seen:
    """What became of requests: seconds from when each was due, and what went wrong."""

    latencies: list[float] = field(default_factory=list)
    failed: Counter[str] = field(default_factory=Counter)

    def add(self, other: Seen) -> None:
        self.latencies += other.latencies
        self.failed += other.failed

    def ms(self, percent: float) -> float:
        return 1000 * (percentile(sorted(self.latencies), percent) or 0.0)


# Attackers --------------------------------------------------------------------------------------------------------


def client_hello() -> bytes:
    outgoing = ssl.MemoryBIO()
    client = trusting().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost")
    with suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


HELLO = client_hello()
Attack = Callable[[socket.socket, Random], bool]  # whether the connection is to be left open


def half_a_hello(sock: socket.socket, dice: Random) -> bool:
    sock.sendall(HELLO[: dice.randrange(1, len(HELLO))])
    return True


def half_a_handshake(sock: socket.socket, dice: Random) -> bool:
    sock.sendall(HELLO)
    return True


def breaks_off(sock: socket.socket, dice: Random) -> bool:
    sock.sendall(HELLO[: dice.randrange(len(HELLO) + 1)])
    return False


def breaks_off_when_answered(sock: socket.socket, dice: Random) -> bool:
    sock.sendall(HELLO)
    sock.recv(1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    return False


def garbage(sock: socket.socket, dice: Random) -> bool:
    sock.sendall(dice.randbytes(dice.randrange(1, 20_000)))
    return True


def garbage_in_a_record(sock: socket.socket, dice: Random) -> bool:
    sock.sendall(b"\x16\x03\x01\x40\x00" + dice.randbytes(16384))
    return True


def plain_http(sock: socket.socket, dice: Random) -> bool:
    sock.sendall(GET)
    return True


ATTACKS: tuple[Attack, ...] = (
    half_a_hello,
    half_a_handshake,
    breaks_off,
    half_a_hello,
    half_a_handshake,
    breaks_off_when_answered,
    half_a_handshake,
    garbage,
    garbage_in_a_record,
    plain_http,
)


class Storm:
    """Handshakes that begin at fixed moments; each good one has a request answered. `bad`: with the attackers."""

    def __init__(self, port: int, number: int, rate: float, *, bad: bool, silent: int = 0) -> None:
        self._port = port
        self._number = number
        self._rate = rate
        self._bad = bad
        self._silent = silent if bad else 0
        self._next = count()
        self._held: list[socket.socket] = []  # each operation on it is a single one, so it needs no lock
        self._parts: list[Seen] = []
        self.good = Seen()
        self.bad = 0

    def __enter__(self) -> Storm:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        while self._held:
            self._held.pop().close()

    def blow(self) -> Storm:
        """Returns when the last handshake is over. Who was left half way, and who is silent, stay until the exit."""
        for _ in range(self._silent):
            self._held.append(socket.create_connection(("127.0.0.1", self._port), timeout=PATIENCE))
        self._begun = time.monotonic()
        workers = [threading.Thread(target=self._work, args=(seed,), name=f"storm-{seed}") for seed in range(WORKERS)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        for part in self._parts:
            self.good.add(part)
        self.bad = self._number // BAD if self._bad else 0
        return self

    def _work(self, seed: int) -> None:
        seen, dice, context, pause = Seen(), Random(seed), trusting(), threading.Event()
        self._parts.append(seen)
        while (turn := next(self._next)) < self._number:
            due = self._begun + turn / self._rate
            if (early := due - time.monotonic()) > 0:
                pause.wait(early)
            if turn % BAD != BAD - 1:
                self._greet(seen, context, due)
            elif self._bad:
                self._attack(ATTACKS[turn // BAD % len(ATTACKS)], dice)

    def _greet(self, seen: Seen, context: ssl.SSLContext, due: float) -> None:
        try:
            with secure(self._port, context) as sock:
                sock.sendall(LAST)
                status = read_response(sock).status
        except (OSError, ValueError) as error:
            seen.failed[repr(error)] += 1
            return
        seen.latencies.append(time.monotonic() - due)
        if status != 200:
            seen.failed[str(status)] += 1

    def _attack(self, attack: Attack, dice: Random) -> None:
        sock = socket.create_connection(("127.0.0.1", self._port), timeout=PATIENCE)
        stays = False
        with suppress(OSError):  # the balancer hangs up on most of them
            stays = attack(sock, dice)
        if stays:
            self._held.append(sock)
        else:
            sock.close()


# Bystanders -------------------------------------------------------------------------------------------------------


class Bystanders:
    """Clients that were there before, from entering to leaving."""

    def __init__(self, port: int, number: int = BYSTANDERS) -> None:
        self._stop = threading.Event()
        self._port = port
        self._number = number
        self._parts = [Seen() for _ in range(number)]
        self._ready = threading.Barrier(number + 1)
        self._threads = [
            threading.Thread(target=self._stand_by, args=(place, part), name=f"bystander-{place}")
            for place, part in enumerate(self._parts)
        ]
        self.seen = Seen()

    def __enter__(self) -> Bystanders:
        for thread in self._threads:
            thread.start()
        self._ready.wait(2 * PATIENCE)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        for part in self._parts:
            self.seen.add(part)

    def _stand_by(self, place: int, seen: Seen) -> None:
        try:
            with secure(self._port, trusting()) as sock:
                self._ready.wait(2 * PATIENCE)
                due = time.monotonic() + place / self._number / ASKS
                while not self._stop.wait(max(0.0, due - time.monotonic())):
                    sock.sendall(GET)
                    if (status := read_response(sock).status) != 200:
                        seen.failed[str(status)] += 1
                    seen.latencies.append(time.monotonic() - due)
                    due += 1 / ASKS
        except (OSError, ValueError) as error:
            seen.failed[repr(error)] += 1


@contextmanager
def bystanders(port: int, seen: Seen) -> Iterator[None]:
    """The same in a process of their own, where they wait for nothing but the balancer."""
    words = [sys.executable, __file__, "bystanders", str(port)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield
        process.stdin.close()
        told = json.loads(process.stdout.read())
        seen.add(Seen(told["latencies"], Counter(told["failed"])))


def stand_by(port: int) -> int:
    """Until standard input ends."""
    with Bystanders(port) as them:
        print("ready", flush=True)
        sys.stdin.read()
    print(json.dumps({"latencies": them.seen.latencies, "failed": them.seen.failed}))
    return 0


# All of it --------------------------------------------------------------------------------------------------------


def stand(directory: Path, stack: ExitStack) -> Program:
    """A backend, and a balancer before it."""
    port = free_ports(1)[0]
    backend = stack.enter_context(started(ROOT / "backend_server.py", "--port", port, directory=directory))
    assert backend.first_line
    settings = {
        "servers": [{"id": "1", "host": "127.0.0.1", "port": port}],
        "listen": {"port": 0},
        "admin": {"address": "127.0.0.1:0"},
        "tls": {"certificates": [{"cert": str(DATA / "local.pem"), "key": str(DATA / "ec.key")}]},
        "timeouts": {"handshake": 120},
    }
    write_settings(directory, settings)
    balancer = stack.enter_context(started(LB, directory=directory))
    assert balancer.port
    return balancer


def belongings(balancer: Program) -> dict[str, float]:
    """What a balancer has: descriptors and threads, as Linux counts them, and sessions, as it counts them itself."""
    process = Path(f"/proc/{balancer.pid}")
    admin = balancer.out.split("status page ", 1)[1].split()[0]
    with urllib.request.urlopen(f"{admin}metrics", timeout=PATIENCE) as answer:
        lines = answer.read().decode().splitlines()
    sessions = [line for line in lines if line.startswith("haproxy_frontend_current_sessions")]
    return {
        "descriptors": len(os.listdir(process / "fd")),
        "threads": len(os.listdir(process / "task")),
        "sessions": float(sessions[0].split()[-1]),
    }


def row(what: str, beside: Seen, storm: Storm | None = None) -> str:
    cells = [f"{len(beside.latencies)}", f"{beside.ms(50):.1f}", f"{beside.ms(99):.1f}", f"{beside.failed.total()}"]
    if storm:
        good = storm.good
        cells += [f"{len(good.latencies)}", f"{good.ms(50):.1f}", f"{good.ms(99):.1f}", f"{good.failed.total()}"]
        cells += [str(storm.bad)]
    return "| ".join([f"{what:28}", *(f"{cell:>9}" for cell in cells)])


def main(words: list[str]) -> int:
    if words[:1] == ["bystanders"]:
        return stand_by(int(words[1]))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    rounds = int(words[0]) if words else ROUNDS
    p99s: dict[bool, list[float]] = {False: [], True: []}  # of bystanders, without attackers and with them
    failed: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="lb-storm-") as directory, ExitStack() as stack:
        balancer = stand(Path(directory), stack)
        with Storm(balancer.port, 2 * BAD, RATE, bad=False) as first:
            assert not first.blow().good.failed, first.good.failed
        eventually(lambda: belongings(balancer)["sessions"] == 0)
        before = belongings(balancer)
        names = ["bystanders:", "p50 ms", "p99 ms", "failed", "good new:", "p50 ms", "p99 ms", "failed", "bad"]
        print("| ".join([" " * 28, *(f"{name:>9}" for name in names)]))
        alone = Seen()
        with bystanders(balancer.port, alone):
            time.sleep(HANDSHAKES / RATE / 2)
        print(row("nobody comes", alone), flush=True)
        for number in range(1, rounds + 1):
            for bad, what in ((False, "good handshakes alone"), (True, "and attackers")):
                seen = Seen()
                with Storm(balancer.port, HANDSHAKES, RATE, bad=bad, silent=SILENT) as storm:
                    with bystanders(balancer.port, seen):
                        storm.blow()
                    print(row(f"{what}, {number}", seen, storm), flush=True)
                p99s[bad].append(seen.ms(99))
                failed += seen.failed + storm.good.failed
        left = what_is_left(balancer, before)
    calm, stormy = median(p99s[False]), median(p99s[True])
    print(f"median p99 of bystanders: {stormy:.1f} ms, {stormy / calm:.2f} times what it is without attackers")
    print(f"failed: {dict(failed) or 'nothing'}; left behind: {left or 'nothing'}")
    return 0 if stormy <= 2 * calm and not failed and not left else 1


def what_is_left(balancer: Program, before: dict[str, float]) -> dict[str, float]:
    """What it has more than before, when it was given time to come to rest."""
    more: dict[str, float] = {}

    def is_as_before() -> bool:
        more.clear()
        now = belongings(balancer)
        more.update({name: now[name] - before[name] for name in before if now[name] > before[name]})
        return not more

    with suppress(AssertionError):
        eventually(is_as_before, within=3 * PATIENCE)
    return more


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
