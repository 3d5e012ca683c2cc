"""Who is compared, and the servers behind them: how each program is configured, started, watched and stopped."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 10.0  # seconds for a program to start, or to stop before it is killed
TICK = 1 / os.sysconf("SC_CLK_TCK")

T = TypeVar("T")


class Trouble(Exception):
    """A peer that is missing, does not start, or answers wrongly. Its text goes into the table."""


# Programs ---------------------------------------------------------------------------------------------------------


def wait_for(predicate: Callable[[], T], what: str) -> T:
    """Ask every 10 ms until the answer is true; Trouble after PATIENCE."""
    deadline = time.monotonic() + PATIENCE
    while not (answer := predicate()):
        if time.monotonic() > deadline:
            raise Trouble(what)
        time.sleep(0.01)
    return answer


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on at this moment, all different."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [sock.getsockname()[1] for sock in sockets]


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


@contextmanager
def running(command: Sequence[str], output: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A program in a session of its own, so that a Ctrl-C reaches us alone; stopped with all it started at the end."""
    with output.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=output.parent,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            pass
        finally:
            end_session(process)


def end_session(process: subprocess.Popen[bytes]) -> None:
    """Kill whatever is left of the program's session, and wait for the program itself."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it took everything with it, as it should
    process.wait()


def await_port(process: subprocess.Popen[bytes], port: int, output: Path) -> None:
    """Until the program listens; Trouble with its last words when it ends instead."""

    def ready() -> bool:
        if process.poll() is not None:
            raise Trouble(f"ended with status {process.returncode}: {last_line(output)}")
        return listens(port)

    wait_for(ready, f"does not listen after {PATIENCE:g} s: {last_line(output)}")


def raise_descriptor_limit() -> None:
    """Thousands of connections are held, and nginx listens on a thousand ports: as many descriptors as are allowed."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def last_line(output: Path) -> str:
    return (output.read_text(errors="replace").strip().splitlines() or ["(it said nothing)"])[-1]


# What a program uses ----------------------------------------------------------------------------------------------


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            fields = stat_fields(int(entry.name))
            if fields:
                parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found = [pid]
    for member in found:  # grows as it goes
        found.extend(parents.get(member, []))
    return found


def stat_fields(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; none when the process is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return []
    return text[text.rindex(")") + 2 :].split()


def cpu_seconds(pid: int) -> float:
    """User and system time so far: all threads, living descendants, and children already waited for."""
    return TICK * sum(sum(map(int, fields[11:15])) for fields in map(stat_fields, family(pid)) if fields)


def resident_mb(pid: int) -> float:
    """Resident memory of a process and its descendants; what they share counts for each."""
    pages = 0
    for member in family(pid):
        try:
            pages += int(Path(f"/proc/{member}/statm").read_text().split()[1])
        except OSError:
            continue  # gone between the look and the reading
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def threads(pid: int) -> int:
    """Of a process and its descendants."""
    return sum(int(fields[17]) for fields in map(stat_fields, family(pid)) if fields)


# The origin -------------------------------------------------------------------------------------------------------

SMALL = b"the answer of a very small server\n"
MEDIUM_BYTES = 100_000
BULK_BYTES = 256 << 20


class Origin:
    """What stands behind every peer: nginx on three ports, and on those of a crowd; a sink for uploads."""

    def __init__(self, work: Path, stack: ExitStack, *, bulk: bool, crowd: int = 0) -> None:
        """Start them for as long as `stack` lives; the 256 MB file is made only when `bulk` is asked for."""
        if not shutil.which("nginx"):
            raise Trouble("nginx is needed as the origin server; it is not installed")
        self.bulk_file = work / "files" / "bulk"
        self.bulk_file.parent.mkdir()
        (self.bulk_file.parent / "medium").write_bytes(os.urandom(MEDIUM_BYTES))
        self.bulk_crc = write_random(self.bulk_file, BULK_BYTES) if bulk else 0
        ports = free_ports(3 + crowd)
        self.ports, self.crowd = ports[:3], ports[3:]
        listen = "".join(f"listen 127.0.0.1:{port} backlog=4096; " for port in ports)
        site = f"""
            server {{
                {listen}
                client_max_body_size 0;
                location / {{ default_type text/plain; return 200 "{SMALL.decode().rstrip()}\\n"; }}
                location /files/ {{ root {work}; }}
            }}"""
        process = stack.enter_context(nginx(work / "origin", site, workers=1))
        await_port(process, self.ports[0], work / "origin" / "output")
        output = work / "sink.output"
        process = stack.enter_context(running([sys.executable, str(Path(__file__).with_name("sink.py"))], output))
        self.sink_port = int(wait_for(output.read_text, "the sink does not start"))
        await_port(process, self.sink_port, output)


def write_random(path: Path, size: int) -> int:
    """Fill a file with `size` random octets, a whole number of MiB; their CRC-32."""
    crc = 0
    with path.open("wb") as file:
        for _ in range(size >> 20):
            block = os.urandom(1 << 20)
            crc = zlib.crc32(block, crc)
            file.write(block)
    return crc


@contextmanager
def nginx(home: Path, http: str, *, workers: int) -> Iterator[subprocess.Popen[bytes]]:
    """nginx with nothing of its own outside `home`, and `http` inside its http block."""
    home.mkdir()
    paths = "\n".join(
        f"{kind}_temp_path {home}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (home / "nginx.conf").write_text(f"""
        daemon off;
        {"user root;" if os.geteuid() == 0 else ""}
        worker_processes {workers};
        worker_rlimit_nofile 20000;
        pid {home}/pid;
        error_log stderr error;
        events {{ worker_connections 8192; }}
        http {{
            access_log off;
            sendfile on;
            keepalive_requests 1000000000;
            {paths}
            {http}
        }}""")
    command = ["nginx", "-p", str(home), "-e", "stderr", "-c", str(home / "nginx.conf")]
    with running(command, home / "output") as process:
        yield process


# The peers --------------------------------------------------------------------------------------------------------


class Peer:
    """One load balancer: how to tell whether it is here, and how to run it."""

    name = ""
    scheme = "http"
    """What its clients speak in mode http."""
    streams = True
    """Does it pass on the beginning of a request's body before the end has come?"""

    def missing(self, mode: str) -> str:
        """Why it cannot run in this mode ("http" or "tcp") on this machine; "" when it can."""
        raise NotImplementedError

    def run(self, mode: str, backends: Sequence[int], home: Path) -> AbstractContextManager[tuple[int, int]]:
        """Run it before these ports of 127.0.0.1, its files in `home`; gives its process id (0: none) and its port."""
        raise NotImplementedError


class Ours(Peer):
    """`settings` are keys of servers.json beside the servers, `starter` is what stands before lb.py in the command."""

    def __init__(
        self, name: str = "ours", settings: Mapping[str, object] | None = None, starter: Sequence[str] = ()
    ) -> None:
        self.name, self.settings, self.starter = name, settings or {}, starter
        self.scheme = "https" if "tls" in self.settings else "http"

    def missing(self, mode: str) -> str:
        return "" if (ROOT / "lb.py").exists() else "there is no lb.py"

    @contextmanager
    def run(self, mode: str, backends: Sequence[int], home: Path) -> Iterator[tuple[int, int]]:
        home.mkdir()
        servers = [{"host": "127.0.0.1", "port": port} for port in backends]
        (home / "servers.json").write_text(json.dumps({"servers": servers, **self.settings}))
        options = ["--mode", mode, "--port", "0", "--log-file", str(home / "load_balancer.log")]
        output = home / "output"
        program = [sys.executable, *self.starter, str(ROOT / "lb.py"), "--config", str(home / "servers.json")]
        with running([*program, *options], output) as process:

            def announced() -> str:
                if process.poll() is not None:
                    raise Trouble(f"ended with status {process.returncode}: {last_line(output)}")
                first, end, _ = output.read_text(errors="replace").partition("\n")
                return first if end else ""

            line = wait_for(announced, "does not say where it listens")
            port = line.rpartition(":")[2].rstrip("/")
            if "listening on" not in line or not port.isdigit():
                raise Trouble(f"its first line is {line!r}")
            yield process.pid, int(port)


class Among(Ours):
    """Ours with a policy, before the first `count` of the backends, all of which pass their probes."""

    def __init__(self, count: int, settings: Mapping[str, object]) -> None:
        super().__init__(f"{count:,} backends", {**settings, "admin": {"address": "127.0.0.1:0"}})
        self.count = count

    @contextmanager
    def run(self, mode: str, backends: Sequence[int], home: Path) -> Iterator[tuple[int, int]]:
        with super().run(mode, backends[: self.count], home) as (pid, port):

            def status_page() -> str:
                _, found, rest = (home / "output").read_text().partition("status page ")
                return rest.partition("\n")[0] if found else ""

            url = wait_for(status_page, "does not say where its status page is") + "api/backends"

            def all_passed() -> bool:
                with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
                    checks = [backend["check"] for backend in json.load(answer)["backends"]]
                return len(checks) == self.count and all(check.startswith("L7OK") for check in checks)

            wait_for(all_passed, f"not all of {self.count} backends have passed their probes")
            yield pid, port


class HAProxy(Peer):
    name = "haproxy"

    def missing(self, mode: str) -> str:
        return "" if shutil.which("haproxy") else "not installed"

    @contextmanager
    def run(self, mode: str, backends: Sequence[int], home: Path) -> Iterator[tuple[int, int]]:
        home.mkdir()
        [port] = free_ports(1)
        # A spliced connection may need four descriptors: two sockets and a pipe for each direction's remainder.
        most = {"http": 8000, "tcp": 4000}[mode]
        own = {"http": "http-reuse always\n option forwardfor", "tcp": "option splice-auto"}[mode]
        servers = "\n ".join(f"server s{number} 127.0.0.1:{to} check" for number, to in enumerate(backends, 1))
        (home / "haproxy.cfg").write_text(f"""
global
 nbthread 2
 maxconn {most}
defaults
 mode {mode}
 no log
 timeout connect 5s
 timeout client 60s
 timeout server 60s
 {own}
frontend front
 bind 127.0.0.1:{port} backlog 4096
 default_backend back
backend back
 balance roundrobin
 {servers}
""")
        output = home / "output"
        with running(["haproxy", "-db", "-f", str(home / "haproxy.cfg")], output) as process:
            await_port(process, port, output)
            yield process.pid, port


class Nginx(Peer):
    name = "nginx"

    def missing(self, mode: str) -> str:
        if not shutil.which("nginx"):
            return "not installed"
        return "" if mode == "http" else "its stream module is not part of every build"

    @contextmanager
    def run(self, mode: str, backends: Sequence[int], home: Path) -> Iterator[tuple[int, int]]:
        [port] = free_ports(1)
        servers = " ".join(f"server 127.0.0.1:{to};" for to in backends)
        site = f"""
            upstream back {{ {servers} keepalive 128; keepalive_requests 1000000000; }}
            server {{
                listen 127.0.0.1:{port} backlog=4096;
                client_max_body_size 0;
                location / {{
                    proxy_pass http://back;
                    proxy_http_version 1.1;
                    proxy_set_header Connection "";
                    proxy_set_header X-Forwarded-For $remote_addr;
                    proxy_request_buffering off;
                    proxy_max_temp_file_size 0;
                }}
            }}"""
        with nginx(home, site, workers=2) as process:
            await_port(process, port, home / "output")
            yield process.pid, port


@lru_cache
def imports(python: str, modules: str) -> bool:
    """Has this interpreter all of these?"""
    try:
        return not subprocess.run([python, "-c", f"import {modules}"], capture_output=True, check=False).returncode
    except OSError as error:
        raise Trouble(f"{python}: {error.strerror}") from error


class PythonPeer(Peer):
    """One of the package index, as a program beside this file."""

    python = sys.executable
    """The interpreter that has the packages."""

    def __init__(self, name: str, program: str, modules: str, packages: str, *, streams: bool = True) -> None:
        self.name, self.program, self.modules, self.packages = name, program, modules, packages
        self.streams = streams

    def missing(self, mode: str) -> str:
        if mode != "http":
            return "speaks HTTP only"
        return "" if imports(self.python, self.modules) else f"pip install {self.packages}"

    @contextmanager
    def run(self, mode: str, backends: Sequence[int], home: Path) -> Iterator[tuple[int, int]]:
        home.mkdir()
        [port] = free_ports(1)
        output = home / "output"
        program = str(Path(__file__).with_name(self.program))
        with running([self.python, program, str(port), *map(str, backends)], output) as process:
            await_port(process, port, output)
            yield process.pid, port


class Direct(Peer):
    """No balancer at all: the ceiling that load and origin set."""

    name = "direct"

    def missing(self, mode: str) -> str:
        return ""

    @contextmanager
    def run(self, mode: str, backends: Sequence[int], home: Path) -> Iterator[tuple[int, int]]:
        yield 0, backends[0]


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Ours(),
        HAProxy(),
        Nginx(),
        PythonPeer("aiohttp", "aiohttp_proxy.py", "aiohttp, uvloop", "aiohttp uvloop"),
        PythonPeer("proxy.py", "proxy_py.py", "proxy", "proxy.py", streams=False),
        Direct(),
    )
}
