"""Whole programs, started as a user starts them: what they print, whom they start, how they end."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from conftest import PATIENCE, eventually, processes

ROOT = Path(__file__).resolve().parent.parent
LB = ROOT / "lb.py"


class Program:
    """Python with these words as its arguments. What it prints goes to files, so it never waits for a reader."""

    def __init__(self, words: tuple[object, ...], directory: Path) -> None:
        number = len(list(directory.glob(".program-*-out")))
        self._out, self._err = directory / f".program-{number}-out", directory / f".program-{number}-err"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, *map(str, words)], stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=directory
            )
        self.pid = self.process.pid

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    @property
    def first_line(self) -> str:
        eventually(lambda: "\n" in self.out or self.process.poll() is not None, "its first line")
        assert self.out, f"ended with status {self.process.returncode}: {self.err}"
        return self.out.splitlines()[0]

    @property
    def port(self) -> int:
        """That of the address in its first line."""
        address = re.search(r"//127\.0\.0\.1:(\d+)", self.first_line)
        assert address, self.first_line
        return int(address[1])

    def children(self) -> dict[int, str]:
        """Process ids and command lines of those that it has started."""
        return {pid: command for pid, parent, command in processes() if parent == self.pid}

    def wait(self) -> int:
        """Its exit status."""
        return self.process.wait(PATIENCE)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, and wait for the exit status."""
        self.process.send_signal(number)
        return self.wait()


@contextmanager
def started(*words: object, directory: Path, ends: int = 0) -> Iterator[Program]:
    """A program that runs in `directory`, is stopped by SIGTERM at the end if it runs still, and `ends` with that."""
    program = Program(words, directory)
    try:
        yield program
        if program.process.poll() is None:
            assert program.stop() == ends, program.err
    finally:
        if program.process.poll() is None:
            program.process.kill()
            program.wait()


def run(*words: object, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run a program to its end."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=directory,
        timeout=2 * PATIENCE,
        check=False,
    )


def checkout(directory: Path) -> Path:
    """What `git clone` gives of the programs, in `directory`; its servers.json has free ports and frequent probes."""
    for program in ROOT.glob("*.py"):
        shutil.copy(program, directory)
    shutil.copytree(ROOT / "balancer", directory / "balancer", ignore=shutil.ignore_patterns("__pycache__"))
    settings = json.loads((ROOT / "servers.json").read_text())
    for server, port in zip(settings["servers"], free_ports(len(settings["servers"])), strict=True):
        server["port"] = port
    settings["health_check_interval"] = 0.1
    write_settings(directory, settings)
    return directory


def write_settings(directory: Path, settings: Any) -> Path:
    path = directory / "servers.json"
    path.write_text(json.dumps(settings))
    return path


def free_ports(count: int) -> list[int]:
    """Ports at which nothing listens, below those that systems give to connecting ends: they are free for a while."""
    found: list[int] = []
    with ExitStack() as stack:
        for port in random.sample(range(10000, 32000), 1000):
            if len(found) == count:
                return found
            with suppress(OSError):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
                found.append(port)
    raise LookupError(f"not even {count} ports are free")


def resident_kb(pid: int, name: str = "VmRSS") -> int:
    """A process's memory as Linux counts it: VmRSS is what it has, VmHWM the most that it ever had."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise LookupError(name)
