"""What is asked of each peer: one Work for each row of the comparison."""

from __future__ import annotations

import http.client
import json
import select
import socket
import ssl
import statistics
import subprocess
import time
import zlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from peers import (
    BULK_BYTES,
    PATIENCE,
    SMALL,
    Among,
    Direct,
    Origin,
    Ours,
    Peer,
    PythonPeer,
    Trouble,
    cpu_seconds,
    resident_mb,
    threads,
)

REFERENCE = "haproxy"
WARM_UP = 1  # seconds


@dataclass(frozen=True)
class Load:
    """What the load generator saw."""

    rate: float
    """In the work's unit."""
    amount: float
    """Requests, or MB, in all: what CPU time is divided by."""
    p50_ms: float | None
    p99_ms: float | None


@dataclass(frozen=True)
class Sample:
    """One peer, one work, one round; or the medians of several. None is what was not measured."""

    rate: float | None = None
    cpu_us: float | None = None
    p50_ms: float | None = None
    p99_ms: float | None = None
    memory_mb: float | None = None
    each_kb: float | None = None
    threads_before: float | None = None
    threads_after: float | None = None


class Work:
    """One row for each peer: a kind of load on it, in one mode."""

    unit = ""
    cpu_unit = ""
    needs: ClassVar[Sequence[str]] = ()
    """Programs that make the load."""
    columns: ClassVar[Sequence[str]] = ("rate", "cpu_us", "p50_ms", "p99_ms", "memory_mb")
    """What of a sample it measures."""

    def __init__(self, name: str, what: str, mode: str) -> None:
        self.name, self.what, self.mode = name, what, mode
        self.reference = REFERENCE
        """The peer that the others are compared with."""

    def lineup(self, peers: Sequence[Peer]) -> Sequence[Peer]:
        """Who does this work when these were chosen."""
        return peers

    def measure(self, peer: Peer, seconds: int, home: Path, origin: Origin) -> Sample:
        """Start the peer, see that it answers rightly, warm it up, load it."""
        with peer.run(self.mode, self.backends(origin), home / "peer") as (pid, port):
            self.check(port, origin)
            self.load(port, WARM_UP, home, origin)
            before = cpu_seconds(pid) if pid else 0
            load = self.load(port, seconds, home, origin)
            cpu_us = 1e6 * (cpu_seconds(pid) - before) / load.amount if pid else None
            memory = still_resident_mb(pid) if pid else None
        return Sample(load.rate, cpu_us, load.p50_ms, load.p99_ms, memory)

    def beyond(self, peer: Peer) -> str:
        """Why this peer cannot do it; "" when it can."""
        return ""

    def backends(self, origin: Origin) -> Sequence[int]:
        return origin.ports

    def check(self, port: int, origin: Origin) -> None:
        """Trouble when an answer through `port` is not the right one."""
        raise NotImplementedError

    def load(self, port: int, seconds: int, home: Path, origin: Origin) -> Load:
        """Work on the peer for about `seconds`; Trouble when an answer was wrong."""
        raise NotImplementedError


def still_resident_mb(pid: int) -> float:
    memory = resident_mb(pid)
    if memory == 0:
        raise Trouble("ended before the load did")
    return memory


def ask(
    port: int,
    method: str,
    target: str,
    body: object = None,
    fields: dict[str, str] | None = None,
    scheme: str = "http",
) -> bytes:
    """The body of a 200 answer; Trouble for any other. Any certificate will do."""
    if scheme == "https":
        context = ssl._create_unverified_context()
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            "127.0.0.1", port, timeout=PATIENCE, context=context
        )
    else:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request(method, target, body=body, headers=fields or {})  # type: ignore[arg-type]
        answer = connection.getresponse()
        octets = answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise Trouble(f"{method} {target}: {error!r}") from error
    finally:
        connection.close()
    if answer.status != 200:
        raise Trouble(f"{method} {target}: status {answer.status}")
    return octets


# Requests by wrk --------------------------------------------------------------------------------------------------

REPORT = """
done = function(summary, latency, requests)
    local e = summary.errors
    io.write(string.format(
        '\\n{"requests": %d, "seconds": %.6f, "bytes": %d, "errors": %d, "p50": %.4f, "p99": %.4f}\\n',
        summary.requests, summary.duration / 1e6, summary.bytes, e.connect + e.read + e.write + e.status + e.timeout,
        latency:percentile(50) / 1e3, latency:percentile(99) / 1e3))
end
"""

VARIED = """
local head = " HTTP/1.1\\r\\nHost: shop.example\\r\\n"
for number, name in ipairs({"Accept", "Accept-Encoding", "Accept-Language", "Cache-Control", "DNT", "Origin",
        "Pragma", "Priority", "Referer", "Sec-CH-UA", "Sec-CH-UA-Mobile", "Sec-CH-UA-Platform", "Sec-Fetch-Dest",
        "Sec-Fetch-Mode", "Sec-Fetch-Site", "Sec-Fetch-User", "Upgrade-Insecure-Requests", "User-Agent"}) do
    head = head .. name .. ": " .. string.rep("v", 8 + number) .. "\\r\\n"
end
head = head .. "Cookie: theme=dark; session="
local number = 0
request = function()
    number = number + 1
    return "GET /item/" .. number .. "?from=" .. number % 97 .. head .. number * 7919 .. "\\r\\n\\r\\n"
end
"""


class Requests(Work):
    """As many requests as the peer takes, from a fixed number of connections."""

    unit = "req/s"
    cpu_unit = "us/req"
    needs = ("wrk",)

    def __init__(
        self, name: str, what: str, mode: str = "http", *, target: str = "/", connections: int = 64, script: str = ""
    ) -> None:
        super().__init__(name, what, mode)
        self.target, self.connections, self.script = target, connections, script
        self.body_bytes = 0
        """Octets of one answer's body; the check sets it."""
        self.scheme = "http"
        """What the peer speaks that is being measured."""

    def measure(self, peer: Peer, seconds: int, home: Path, origin: Origin) -> Sample:
        self.scheme = peer.scheme
        return super().measure(peer, seconds, home, origin)

    def check(self, port: int, origin: Origin) -> None:
        expected = ask(origin.ports[0], "GET", self.target)
        for _ in range(2 * len(origin.ports)):  # every backend, whatever the policy's order
            if ask(port, "GET", self.target, scheme=self.scheme) != expected:
                raise Trouble(f"GET {self.target}: the body is not the origin's")
        self.body_bytes = len(expected)
        if ask(port, "POST", "/", body=bytes(10_000), scheme=self.scheme) != SMALL:
            raise Trouble("POST /: the body is not the origin's")

    def load(self, port: int, seconds: int, home: Path, origin: Origin) -> Load:
        script = home / "load.lua"
        script.write_text(self.script + REPORT)
        command = ["wrk", "-t1", f"-c{self.connections}", f"-d{seconds}s", "--timeout", f"{PATIENCE:g}s"]
        words = [*command, "-s", str(script), f"{self.scheme}://127.0.0.1:{port}{self.target}"]
        done = run(words, seconds)
        try:
            report = json.loads(done.strip().splitlines()[-1])
        except (ValueError, IndexError) as error:
            raise Trouble(f"wrk said {done!r}") from error
        if report["errors"] or not report["requests"]:
            raise Trouble(f"{report['errors']} errors in {report['requests']} requests")
        if report["bytes"] < report["requests"] * self.body_bytes:
            raise Trouble(f"{report['bytes']} octets in {report['requests']} answers of {self.body_bytes}")
        rate = report["requests"] / report["seconds"]
        return Load(rate, report["requests"], report["p50"], report["p99"])


class HalfLoad(Requests):
    """The same requests at half the rate that the reference reaches, which tells how long one waits on a calm day."""

    def pace(self, full_rate: float) -> None:
        """Offer about half of `full_rate` from now on.

        At full load each of n connections gets an answer every n/rate seconds. At half load it is to ask every 2n/rate
        seconds, of which the answer takes some n/2rate: the rest is a random pause, in whole ms. wrk ends a pause at a
        tick of its clock, half a ms early on average.
        """
        mean_ms = 1.5 * 1000 * self.connections / full_rate
        self.script = f"delay = function() return math.floor(math.random() * {2 * (mean_ms + 0.5) + 1:.3f}) end\n"


# Bulk by curl -----------------------------------------------------------------------------------------------------


class Bulk(Work):
    """One transfer of 256 MB after the other."""

    unit = "MB/s"
    cpu_unit = "us/MB"
    needs = ("curl",)

    def load(self, port: int, seconds: int, home: Path, origin: Origin) -> Load:
        rates: list[float] = []
        deadline = time.monotonic() + seconds
        while not rates or time.monotonic() < deadline:
            command = ["curl", "-sS", "-w", "%{stderr}%{json}", *self.arguments(port, home, origin)]
            report = run(command, PATIENCE, stderr=True)
            try:
                seen = json.loads(report.strip().splitlines()[-1])
            except (ValueError, IndexError) as error:
                raise Trouble(f"curl said {report!r}") from error
            self.verify(seen, home)
            rates.append(BULK_BYTES / 1e6 / (seen["time_total"] - seen["time_pretransfer"]))
        return Load(statistics.median(rates), len(rates) * BULK_BYTES / 1e6, None, None)

    def arguments(self, port: int, home: Path, origin: Origin) -> Sequence[str]:
        raise NotImplementedError

    def verify(self, seen: dict[str, object], home: Path) -> None:
        """Trouble when curl's report of one transfer is not that of a whole one."""
        raise NotImplementedError


class Download(Bulk):
    target = "/files/bulk"

    def check(self, port: int, origin: Origin) -> None:
        body = ask(port, "GET", self.target)
        if len(body) != BULK_BYTES or zlib.crc32(body) != origin.bulk_crc:
            raise Trouble(f"GET {self.target}: the body is not the origin's")

    def arguments(self, port: int, home: Path, origin: Origin) -> Sequence[str]:
        return ["-o", "/dev/null", f"http://127.0.0.1:{port}{self.target}"]

    def verify(self, seen: dict[str, object], home: Path) -> None:
        if seen["http_code"] != 200 or seen["size_download"] != BULK_BYTES:
            raise Trouble(f"status {seen['http_code']}, {seen['size_download']} octets")


class Upload(Bulk):
    def beyond(self, peer: Peer) -> str:
        return "" if peer.streams else "holds the whole of a request's body in memory, and takes minutes for this one"

    def backends(self, origin: Origin) -> Sequence[int]:
        return [origin.sink_port]

    def check(self, port: int, origin: Origin) -> None:
        with origin.bulk_file.open("rb") as file:
            body = ask(port, "PUT", "/crc", file, {"Content-Length": str(BULK_BYTES)})
        if body != f"{BULK_BYTES} {origin.bulk_crc}\n".encode():
            raise Trouble(f"PUT: the origin got {body!r}")

    def arguments(self, port: int, home: Path, origin: Origin) -> Sequence[str]:
        # Expect would make curl wait for a 100 which the sink does not send.
        source = ["-T", str(origin.bulk_file), "-H", "Expect:"]
        return [*source, "-o", str(home / "answer"), f"http://127.0.0.1:{port}/put"]

    def verify(self, seen: dict[str, object], home: Path) -> None:
        answer = (home / "answer").read_bytes()
        if seen["http_code"] != 200 or answer != b"%d\n" % BULK_BYTES:
            raise Trouble(f"status {seen['http_code']}, the origin got {answer!r}")


def run(command: Sequence[str], seconds: float, *, stderr: bool = False) -> str:
    """Run a load generator to its end; what it wrote to stdout, or to stderr. Trouble when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 3 * PATIENCE, check=False)
    except subprocess.TimeoutExpired as error:
        raise Trouble(f"{command[0]} did not end in {error.timeout:g} s") from error
    if done.returncode:
        raise Trouble(f"{command[0]}: {(done.stderr or done.stdout).strip()}")
    return done.stderr if stderr else done.stdout


# Connections that rest ---------------------------------------------------------------------------------------------


class Idle(Work):
    """Connections that were used once and are kept open: what each takes of the balancer's memory."""

    columns = ("each_kb", "threads_before", "threads_after", "memory_mb")

    WARM_UP = 1000  # connections, one after the other
    REST = 3  # seconds; longer than threads and connections to backends are kept for work that may follow

    def __init__(self, name: str, what: str, mode: str, count: int) -> None:
        super().__init__(name, what, mode)
        self.count = count

    def lineup(self, peers: Sequence[Peer]) -> Sequence[Peer]:
        return [peer for peer in peers if not isinstance(peer, Direct | PythonPeer)]

    def measure(self, peer: Peer, seconds: int, home: Path, origin: Origin) -> Sample:
        """`seconds` are of no account here."""
        with peer.run(self.mode, self.backends(origin), home / "peer") as (pid, port), ExitStack() as held:
            for _ in range(self.WARM_UP):
                self.connect(port).close()
            time.sleep(self.REST)
            threads_before, before = threads(pid), still_resident_mb(pid)
            quiet = select.poll()
            for _ in range(self.count):
                quiet.register(held.enter_context(self.connect(port)), select.POLLIN)
            time.sleep(self.REST)
            if closed := len(quiet.poll(0)):
                raise Trouble(f"{closed} of {self.count} connections did not stay")
            memory = still_resident_mb(pid)
            return Sample(
                memory_mb=memory,
                each_kb=1000 * (memory - before) / self.count,
                threads_before=float(threads_before),
                threads_after=float(threads(pid)),
            )

    @staticmethod
    def connect(port: int) -> socket.socket:
        """A connection on which one request was answered rightly."""
        sock = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
        try:
            sock.sendall(b"GET / HTTP/1.1\r\nHost: shop.example\r\n\r\n")
            octets = b""
            while not octets.endswith(SMALL):
                more = sock.recv(65536)
                if not more:
                    raise Trouble(f"GET /: closed after {octets!r}")
                octets += more
            if not octets.startswith(b"HTTP/1.1 200 "):
                raise Trouble(f"GET /: {octets[:40]!r}")
        except OSError as error:
            sock.close()
            raise Trouble(f"GET /: {error!r}") from error
        except Trouble:
            sock.close()
            raise
        return sock


# Many backends ----------------------------------------------------------------------------------------------------

CROWD = 1000

MANY_PATHS = """
local number = 0
request = function()
    number = number + 1
    return "GET /item/" .. number % 1000 .. " HTTP/1.1\\r\\nHost: shop.example\\r\\n\\r\\n"
end
"""

MANY_CLIENTS = """
local number = 0
request = function()
    number = number + 1
    return "GET / HTTP/1.1\\r\\nHost: shop.example\\r\\nX-Forwarded-For: 10.0.0." .. number % 250 .. "\\r\\n\\r\\n"
end
"""


class Crowd(Requests):
    """What a policy costs among a thousand backends: ours before them, beside ours before three of them."""

    def __init__(self, policy: str, settings: Mapping[str, object] | None = None, script: str = "") -> None:
        super().__init__(f"backends-{policy}", f"{CROWD:,} backends, policy {policy}", script=script)
        settings = {"algorithm": policy, **(settings or {})}
        self.few, self.many = Among(3, settings), Among(CROWD, settings)
        self.reference = self.few.name

    def lineup(self, peers: Sequence[Peer]) -> Sequence[Peer]:
        return [self.few, self.many] if any(isinstance(peer, Ours) for peer in peers) else []

    def backends(self, origin: Origin) -> Sequence[int]:
        return origin.crowd


POST = 'wrk.method = "POST"\nwrk.body = string.rep("0123456789", 1000)\n'
CLOSE = 'wrk.headers["Connection"] = "close"\n'

WORKS: dict[str, Work] = {
    work.name: work
    for work in (
        Requests("http-small", "64 kept-alive connections, 34 bytes"),
        HalfLoad("http-half", "the same, at half of the reference's rate"),
        Requests("http-varied", "20 fields, path and cookie always new", script=VARIED),
        Requests("http-new", "new connection for each request", script=CLOSE),
        Requests("http-post", "10 KB POST, kept alive", script=POST),
        Requests("http-100k", "100 KB answers, 32 connections", target="/files/medium", connections=32),
        Download("http-down", "256 MB download", "http"),
        Upload("http-up", "256 MB upload", "http"),
        Download("tcp-down", "256 MB download, mode tcp", "tcp"),
        Upload("tcp-up", "256 MB upload, mode tcp", "tcp"),
        Requests("tcp-small", "64 connections, ping-pong, mode tcp", "tcp"),
        Idle("idle-http", "5,000 idle kept-alive connections", "http", 5000),
        Idle("idle-tcp", "2,000 idle tunnels, mode tcp", "tcp", 2000),
        Crowd("round_robin"),
        Crowd("least_connections"),
        Crowd("random"),
        Crowd("power_of_two"),
        Crowd("least_time"),
        Crowd("ip_hash", {"trusted_proxies": ["127.0.0.1"]}, MANY_CLIENTS),
        Crowd("hash", {"hash_on": "path"}, MANY_PATHS),
    )
}
