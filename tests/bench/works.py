"""What is asked of each peer: one Work for each row of the comparison."""

from __future__ import annotations

import http.client
import json
import statistics
import subprocess
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from peers import BULK_BYTES, PATIENCE, SMALL, Origin, Trouble


@dataclass(frozen=True)
class Load:
    """What the load generator saw."""

    rate: float
    """In the work's unit."""
    amount: float
    """Requests, or MB, in all: what CPU time is divided by."""
    p50_ms: float | None
    p99_ms: float | None


class Work:
    """One row: a kind of load on a peer in one mode."""

    unit = ""
    cpu_unit = ""
    needs: ClassVar[Sequence[str]] = ()
    """Programs that make the load."""

    def __init__(self, name: str, what: str, mode: str) -> None:
        self.name, self.what, self.mode = name, what, mode

    def backends(self, origin: Origin) -> Sequence[int]:
        return origin.ports

    def check(self, port: int, origin: Origin) -> None:
        """Trouble when an answer through `port` is not the right one."""
        raise NotImplementedError

    def load(self, port: int, seconds: int, home: Path, origin: Origin) -> Load:
        """Work on the peer for about `seconds`; Trouble when an answer was wrong."""
        raise NotImplementedError


def ask(port: int, method: str, target: str, body: object = None, fields: dict[str, str] | None = None) -> bytes:
    """The body of a 200 answer; Trouble for any other."""
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

    def check(self, port: int, origin: Origin) -> None:
        expected = ask(origin.ports[0], "GET", self.target)
        for _ in range(2 * len(origin.ports)):  # every backend, whatever the policy's order
            if ask(port, "GET", self.target) != expected:
                raise Trouble(f"GET {self.target}: the body is not the origin's")
        self.body_bytes = len(expected)
        if ask(port, "POST", "/", body=bytes(10_000)) != SMALL:
            raise Trouble("POST /: the body is not the origin's")

    def load(self, port: int, seconds: int, home: Path, origin: Origin) -> Load:
        script = home / "load.lua"
        script.write_text(self.script + REPORT)
        command = ["wrk", "-t1", f"-c{self.connections}", f"-d{seconds}s", "--timeout", f"{PATIENCE:g}s"]
        words = [*command, "-s", str(script), f"http://127.0.0.1:{port}{self.target}"]
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
    )
}
