"""What all tests share: one number of patience, one way to wait, and a watch on what a test leaves behind.

A test that leaves a thread, a descriptor or a process behind fails, and is told which.
"""

from __future__ import annotations

import gc
import os
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

PATIENCE = 10.0
"""Seconds after which something that was to happen is held not to happen. Every wait of the suite is bounded by it."""

RUN_MARK = "LOAD_BALANCER_TEST_RUN"
"""Environment variable by which a process is known to descend from this run, even when its parent is gone."""

T = TypeVar("T")


def eventually(predicate: Callable[[], T], what: str = "", *, within: float = PATIENCE) -> T:
    """Ask `predicate` until its answer is true, and return that answer; fail after `within` seconds.

    For what another process or thread does and gives no event of. `what` says what was waited for; it may be left out
    where the predicate's name says it.
    """
    deadline = time.monotonic() + within
    pause, seconds = threading.Event(), 0.0005  # most of what is waited for is there before the first long pause
    while True:
        answer = predicate()
        if answer:
            return answer
        if time.monotonic() >= deadline:
            name = what or getattr(predicate, "__name__", repr(predicate))
            raise AssertionError(f"not within {within:g} s: {name} (last answer: {answer!r})")
        pause.wait(seconds)
        seconds = min(2 * seconds, 0.005)


# Options ----------------------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="run the long tests too, those marked soak")


def pytest_configure() -> None:
    os.environ[RUN_MARK] = str(os.getpid())


def pytest_collection_finish() -> None:
    gc.freeze()  # what pytest itself holds by now need not be searched after each test


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Take what outlives a file, reports mostly, out of what is searched after each test: else thousands of tests
    make that ten times as long."""
    yield
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--soak"):
        return
    for item in items:
        if item.get_closest_marker("soak"):
            item.add_marker(pytest.mark.skip(reason="long; --soak runs it"))


# What a test leaves behind ----------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fail a test that leaves a thread, a descriptor or a child process behind which was not there before it."""
    before = belongings()

    def left() -> list[str]:
        return [what for key, what in belongings().items() if key not in before]

    yield
    gc.collect()  # a socket that nothing refers to and nobody closed is reported as the ResourceWarning that it raises
    try:
        eventually(lambda: not left(), within=PATIENCE / 5)
    except AssertionError:
        remaining = left()
    else:
        return
    pytest.fail("left behind: " + "; ".join(remaining), pytrace=False)


def belongings() -> dict[object, str]:
    """Everything that a test could leave behind: a key that tells it from any other, and how to name it to people."""
    return {**threads(), **descriptors(), **children()}


def threads() -> dict[object, str]:
    return {thread: f"thread {thread.name!r}" for thread in threading.enumerate()}


def descriptors() -> dict[object, str]:
    """Open descriptors by number and by what each points at, so that a number that was reused is seen too."""
    found: dict[object, str] = {}
    for name in os.listdir("/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"):
        try:
            target = descriptor_target(int(name))
        except OSError:  # the descriptor by which the directory itself was listed
            continue
        found["fd", name, target] = f"descriptor {name} -> {target}"
    return found


def descriptor_target(fd: int) -> str:
    """What a descriptor points at: `socket:[4711]`, `/tmp/x`; where there is no /proc its kind and inode."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:
        status = os.fstat(fd)
        return f"{stat.filemode(status.st_mode)} device {status.st_dev} inode {status.st_ino}"


def children() -> dict[object, str]:
    """Child processes, and on Linux their orphans too, which carry RUN_MARK in their environment.

    A child that has ended counts until it was waited for.
    """
    found: dict[object, str] = {}
    for pid, parent, command in processes(besides=strangers):
        if parent == os.getpid() or (pid != os.getpid() and carries_mark(pid)):
            found["process", pid] = f"process {pid} ({command})"
        else:
            strangers.add(pid)
    return found


strangers: set[int] = set()
"""Processes that were seen to be none of ours, and need no second look: two looks for each test are many."""


def processes(besides: set[int] | None = None) -> Iterator[tuple[int, int, str]]:
    """Each process of this machine: its id, its parent's and its command line.

    Those that are in `besides` are passed over, and those that have ended are taken out of it.
    """
    if not os.path.isdir("/proc/self"):
        table = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,command="], capture_output=True, text=True, check=True)
        for line in table.stdout.splitlines():
            words = line.split(None, 2)
            if not words[2].startswith("ps -A -o pid="):
                yield int(words[0]), int(words[1]), words[2]
        return
    there = {int(name) for name in os.listdir("/proc") if name.isdigit()}
    if besides:
        besides &= there
    for pid in there - (besides or set()):
        entry = Path(f"/proc/{pid}")
        try:
            status = (entry / "stat").read_text(errors="replace")
            command = (entry / "cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it ended while we looked
            continue
        name = status[status.index("(") : status.rindex(")") + 1]
        parent = int(status[status.rindex(")") + 2 :].split()[1])
        yield pid, parent, command or f"{name}, ended but not waited for"


def carries_mark(pid: int) -> bool:
    """Whether a process descends from this run, even if its parent is gone."""
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # another user's, or gone, or no /proc
        return False
    return f"{RUN_MARK}={os.getpid()}".encode() in environment.split(b"\0")
