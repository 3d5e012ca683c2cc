"""Backends that the balancer starts itself: those of the configuration that have a `command`, and scaled instances.

A command is started when nothing answers at its backend's address, restarted with a growing pause when it dies, and
stopped with the balancer. Where something answers already, it is left alone, and asked again every few seconds. An
instance is run once: whoever had it run is told of its end, and decides what comes then.

Each command leads a process group of its own, so that its workers can be ended with it and a Ctrl-C at the terminal
reaches the balancer alone. Whatever is left of a group when its leader has died is killed: it would hold the port.
A balancer that is killed with -9 cannot stop anything; that is done by the guard, a small process that holds the
reading end of a pipe and ends the groups it was told of when the writing end closes. (The kernel's own way,
PR_SET_PDEATHSIG, would have to be asked for between fork and exec, where a program with threads must not run Python,
and reaches the leader only.)

All is done by the thread "supervisor", which waits in one selector for output, ends of processes and orders; it and
the guard exist from the first command on. Other threads leave orders, which the next round carries out in their order.
So nothing is locked but the leaving of orders.
"""

from __future__ import annotations

import os
import re
import selectors
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from balancer.checks import PLACEHOLDERS
from balancer.config import Server
from balancer.journal import Journal

FIRST_PAUSE = 0.5
"""Seconds before a command that died is started again; each time twice as long, up to LONGEST_PAUSE."""
LONGEST_PAUSE = 30.0
STEADY = 10.0
"""Seconds after which a command has lived long enough for its pause to be the first again."""
LOOK_AGAIN = 3.0
"""Seconds between two looks at an address where something else answered."""
CONNECT_PATIENCE = 0.5
STOP_PATIENCE = 2.0
"""Seconds from SIGTERM to SIGKILL."""
KILL_PATIENCE = 1.0
"""Seconds from SIGKILL to giving up, which only a process in a hanging system call brings about."""
POLL = 0.1
"""Seconds between two looks for ended processes where the kernel has no descriptor for them (macOS)."""
LONGEST_LINE = 1000
"""Octets; a longer line of output is logged in pieces."""


class Process(Protocol):
    """A running command, as the supervisor uses it."""

    pid: int
    output: int  # descriptor from which its output is read, never blocking
    ended: int  # descriptor that is readable when it has ended; -1 where there is none

    def poll(self) -> int | None:
        """Its exit status, or the negative number of the signal that ended it; None while it runs."""

    def signal(self, number: int) -> None:
        """Signal its whole process group."""

    def close(self) -> None:
        """Give back the descriptors."""


class Command:
    """The leader of a process group, its stdout and stderr in one pipe. Raises OSError when it cannot be run."""

    def __init__(self, words: Sequence[str], base: Path) -> None:
        self._popen = subprocess.Popen(
            words,
            cwd=base,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},  # Python's output would come in blocks of 8 KB
        )
        assert self._popen.stdout
        self.pid = self._popen.pid
        self.output = self._popen.stdout.fileno()
        os.set_blocking(self.output, False)
        self.ended = _end_of_process(self.pid)

    def poll(self) -> int | None:
        return self._popen.poll()

    def signal(self, number: int) -> None:
        _signal_group(self.pid, number)

    def close(self) -> None:
        assert self._popen.stdout
        self._popen.stdout.close()
        if self.ended >= 0:
            os.close(self.ended)


def _end_of_process(pid: int) -> int:
    try:
        return os.pidfd_open(pid) if sys.platform == "linux" else -1
    except (AttributeError, OSError):  # a Python or a kernel without it, or no descriptor left
        return -1


def _signal_group(group: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):  # macOS says the latter of a group of zombies
        os.killpg(group, number)


def answers(server: Server) -> bool:
    """Whether something accepts TCP connections at the server's address."""
    try:
        with socket.create_connection((server.host, server.port), CONNECT_PATIENCE) as connection:
            # A port of the ephemeral range can be given to the connecting end itself, which then is its own peer.
            return bool(connection.getsockname() != connection.getpeername())
    except OSError:
        return False


class Guard:
    """A process that ends process groups when this one is gone without having done so."""

    # Its input is a line "+4711" for each group that begins and "-4711" for each that ended. It can only ask whether
    # a group is still there (signal 0), not wait for it: the processes are not its own.
    PROGRAM = """
import os, signal, sys, time
groups = set()
for line in sys.stdin:
    (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
def end(number):
    for group in list(groups):
        try:
            os.killpg(group, number)
        except OSError:
            groups.discard(group)
end(signal.SIGTERM)
deadline = time.monotonic() + float(sys.argv[1])
while groups and time.monotonic() < deadline:
    time.sleep(0.05)
    end(0)
end(signal.SIGKILL)
"""

    def __init__(self) -> None:
        self._popen = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", self.PROGRAM, str(STOP_PATIENCE)],
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            bufsize=0,
        )

    def add(self, group: int) -> None:
        self._tell(f"+{group}\n")

    def discard(self, group: int) -> None:
        self._tell(f"-{group}\n")

    def _tell(self, line: str) -> None:
        assert self._popen.stdin
        with suppress(BrokenPipeError):  # somebody killed the guard: there is none then
            self._popen.stdin.write(line.encode())

    def close(self) -> None:
        """End the guard and nothing else."""
        self._popen.kill()
        assert self._popen.stdin
        self._popen.stdin.close()
        self._popen.wait()


OnEnd = Callable[[Server, float], None]  # the server, and the seconds its command lived, 0 if it could not be started


class Child:
    """One command and what became of it."""

    def __init__(self, server: Server, on_end: OnEnd | None = None) -> None:
        self.server = server
        self.words = expand(server)
        self.on_end = on_end  # told of the end of what is run once; None: it is started again
        self.wanted = True
        self.process: Process | None = None
        self.started = 0.0  # by the supervisor's clock
        self.lived = 0.0  # seconds, of the process that ended last
        self.signalled = 0  # the signal by which it was asked to end, 0: it was not
        self.due = 0.0  # when to look whether it must be started; once it was signalled: when to use stronger means
        self.pause = FIRST_PAUSE
        self.left_alone = False  # something else answers at its address
        self.rest = b""  # output after the last line end

    def __repr__(self) -> str:
        state = f"process {self.process.pid}" if self.process else "left alone" if self.left_alone else "not running"
        return f"<Child {self.server.id} {self.server.address} {state}>"


def expand(server: Server) -> list[str]:
    """The words of the server's command, with what the placeholders stand for."""
    values = dict(zip(PLACEHOLDERS, (sys.executable, str(server.port), server.host, server.id), strict=True))
    return [re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), word) for word in server.command]


def how_it_ended(status: int) -> str:
    """An exit status as `Process.poll` gives it, in words."""
    if status >= 0:
        return f"ended with exit status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:  # a real-time signal: they have no names
        return f"was ended by signal {-status}"


class Supervisor:
    """Starts, restarts and stops the commands of those `servers` that have one, in the directory `base`.

    `follow`, `run` and `end` are for any thread and return at once; what they are told before `start` waits for it, and
    after `stop` it is ignored. `stop` must be called even if `start` was not.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        base: Path,
        journal: Journal,
        *,
        spawn: Callable[[Sequence[str], Path], Process] = Command,
        clock: Callable[[], float] = time.monotonic,
        answers: Callable[[Server], bool] = answers,
    ) -> None:
        self._children = [Child(server) for server in servers if server.command]
        self._base = base
        self._journal = journal
        self._spawn = spawn
        self._clock = clock
        self._answers = answers
        self._selector = selectors.DefaultSelector()
        self._sender, self._receiver = socket.socketpair()  # an octet is sent to end the thread's wait
        self._sender.setblocking(False)
        self._receiver.setblocking(False)
        self._selector.register(self._receiver, selectors.EVENT_READ)
        self._lock = threading.Lock()  # held to leave an order, and while that makes the thread begin or forbids it
        self._orders: deque[Callable[[], None]] = deque()
        self._started = False
        self._stopping = threading.Event()
        self._settled = threading.Event()  # the first round is over
        self._guard: Guard | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Launch what must be launched, and go on in the thread "supervisor", which begins with the first command."""
        with self._lock:
            self._started = True
            if self._children or self._orders:
                self._launch_locked()
        if self._thread:
            self._settled.wait()

    def follow(self, servers: Sequence[Server]) -> None:
        """Run the commands of these servers from here on; who is who is told by the address.

        A command that is not among them any more is stopped, one that has changed is stopped and started again.
        Instances are not concerned.
        """
        commands = {server.address: server for server in servers if server.command}
        self._leave_order(lambda: self._follow(commands), begins=bool(commands))

    def run(self, server: Server, on_end: OnEnd) -> None:
        """Run the server's command once. `on_end` is called once, on the supervisor's thread, whatever ends it."""
        self._leave_order(lambda: self._children.append(Child(server, on_end)), begins=True)

    def end(self, server: Server) -> None:
        """End a command that is `run`; nothing if it has ended already."""
        self._leave_order(lambda: self._dismiss(server), begins=False)

    def stop(self) -> None:
        """End every command, and wait for it: as soon as they obey, 3 s at most."""
        with self._lock:
            self._stopping.set()
            with suppress(OSError):  # it is full of octets, or closed
                self._sender.send(b"\0")
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._guard:
            self._guard.close()
            self._guard = None
        self._selector.close()
        self._sender.close()
        self._receiver.close()

    def wait_ready(self, patience: float) -> bool:
        """Wait until every command that runs accepts connections; False when `patience` seconds were not enough.

        One that died is not waited for. For the thread that called `start`.
        """
        deadline = time.monotonic() + patience
        pause = 0.01
        waiting = self._children
        while waiting := [child for child in waiting if child.process and not self._answers(child.server)]:
            left = deadline - time.monotonic()
            if left <= 0 or self._stopping.wait(min(pause, left)):
                return False
            pause = min(2 * pause, 0.1)
        return True

    def round(self) -> float | None:
        """Carry out orders, and look after each command once: notice that it died, start or end it when that is due.

        Returns the seconds until the next round; None when only an event of the selector can bring something to do.
        """
        while self._orders:
            self._orders.popleft()()
        for child in self._children:
            self._look_after(child)
        gone = [child for child in self._children if not child.process and not child.wanted]
        self._children = [child for child in self._children if child.process or child.wanted]
        for child in gone:
            if child.on_end:
                child.on_end(child.server, child.lived)
        now = self._clock()
        waits = [max(0.0, child.due - now) for child in self._children if child.signalled or not child.process]
        blind = [POLL for child in self._children if child.process and child.process.ended < 0]
        return min([*waits, *blind], default=None)

    def _look_after(self, child: Child) -> None:
        if child.process:
            self._notice_end(child)
        is_due = self._clock() >= child.due
        if child.process and child.signalled and is_due:
            self._urge(child)
        elif not child.process and child.wanted and is_due and not self._stopping.is_set():
            self._begin(child)

    # Orders ---------------------------------------------------------------------------------------------------------

    def _leave_order(self, order: Callable[[], None], *, begins: bool) -> None:
        """Have the thread carry out the order. Where there is none yet it is made, if the order `begins` something."""
        with self._lock:
            if self._stopping.is_set():
                return
            if self._started and not self._thread:
                if not begins:
                    return  # there has never been anything that it could concern
                self._launch_locked()
            self._orders.append(order)
            with suppress(BlockingIOError):  # so many octets wait there that one more makes no difference
                self._sender.send(b"\0")

    def _launch_locked(self) -> None:
        self._thread = threading.Thread(target=self._work, name="supervisor", daemon=True)
        self._thread.start()

    def _follow(self, commands: dict[str, Server]) -> None:
        """The order of `follow`; commands are by address."""
        new = dict(commands)
        for child in self._children:
            if child.on_end:
                continue
            server = new.pop(child.server.address, None)
            child.wanted = server is not None
            if server is None:
                self._stop(child, "it is stopped, for its command is configured no more")
            else:
                words = child.words
                child.server, child.words = server, expand(server)
                if child.words != words:
                    self._stop(child, "it is stopped, for its command has changed")
        self._children += map(Child, new.values())

    def _dismiss(self, server: Server) -> None:
        """The order of `end`."""
        for child in self._children:
            if child.on_end and child.server.address == server.address:
                child.wanted = False
                self._stop(child)

    # The thread -----------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            try:
                self._guard = Guard()
            except OSError as error:
                self._journal.event("warning", f"commands would outlive a balancer that is killed: no guard: {error}")
            while not self._stopping.is_set():
                pause = self.round()
                self._settled.set()
                self._wait(pause)
        finally:
            self._settled.set()
            self._end_all()

    def _wait(self, seconds: float | None) -> None:
        """Wait for output, the end of a process, an order or the stop; log the output."""
        for key, _ in self._selector.select(seconds):
            child: Child | None = key.data
            if child is None:
                self._receiver.recv(4096)
            elif child.process and key.fd == child.process.output:
                self._read(child, child.process)

    def _end_all(self) -> None:
        self._stopping.set()
        self._orders.clear()
        for child in self._children:
            child.wanted = False
            self._stop(child)
        pause = self.round()
        while self._children:
            self._wait(pause)
            pause = self.round()

    # One child ------------------------------------------------------------------------------------------------------

    def _event(self, level: str, child: Child, text: str) -> None:
        self._journal.event(level, f"backend {child.server.id}: {text}")

    def _begin(self, child: Child) -> None:
        """Start the command, unless something answers at its address. An instance's was chosen because nothing did."""
        if not child.on_end and self._answers(child.server):
            if not child.left_alone:
                self._event("info", child, f"something answers at {child.server.address} already and is left alone")
            child.left_alone = True
            child.due = self._clock() + LOOK_AGAIN
            return
        child.left_alone = False
        try:
            process = self._spawn(child.words, self._base)
        except OSError as error:
            what = f"{error.strerror}: {error.filename or child.words[0]}"
            child.lived = 0.0
            again = self._after_end(child, "tried")
            self._event("error", child, f"cannot be started: {what}{again}")
            return
        child.process = process
        child.started = self._clock()
        self._selector.register(process.output, selectors.EVENT_READ, child)
        if process.ended >= 0:
            self._selector.register(process.ended, selectors.EVENT_READ, child)
        if self._guard:
            self._guard.add(process.pid)
        self._event("info", child, f"process {process.pid} started: {shlex.join(child.words)}")

    def _stop(self, child: Child, why: str = "") -> None:
        """Have the command end, if it runs and was not told so; what is wanted all the same begins without a pause."""
        if child.process and not child.signalled:
            if why:
                self._event("info", child, why)
            self._urge(child)
        elif not child.process:
            child.due = self._clock()
            child.pause = FIRST_PAUSE

    def _urge(self, child: Child) -> None:
        """Ask the command to end, each time by stronger means; give up when there are none."""
        process = child.process
        assert process
        if child.signalled == signal.SIGKILL:
            self._event("error", child, f"process {process.pid} does not end, even by SIGKILL")
            self._forget(child, process)
            return
        means = (signal.SIGKILL, KILL_PATIENCE) if child.signalled else (signal.SIGTERM, STOP_PATIENCE)
        child.signalled, patience = means
        child.due = self._clock() + patience
        process.signal(child.signalled)

    def _after_end(self, child: Child, verb: str) -> str:
        """Make the next start due after the pause, and the pause after that longer. Returns that in words.

        What is run once is not wanted any more.
        """
        if child.on_end:
            child.wanted = False
            return ""
        if child.lived >= STEADY:
            child.pause = FIRST_PAUSE
        pause = child.pause
        child.due = self._clock() + pause
        child.pause = min(2 * pause, LONGEST_PAUSE)
        return f"; {verb} again in {pause:g} s"

    def _notice_end(self, child: Child) -> None:
        """If the child's process has ended: log that and its last words, and make a restart due where there is one."""
        process = child.process
        if not process or (status := process.poll()) is None:
            return
        process.signal(signal.SIGKILL)  # what is left of its group
        for _ in range(32):  # more than a pipe holds
            if not self._read(child, process):
                break
        self._log_lines(child, b"\n")
        asked = bool(child.signalled)
        self._forget(child, process)
        text = f"process {process.pid} {how_it_ended(status)} after {child.lived:.1f} s"
        if asked:
            self._event("info", child, text)
            child.due = self._clock()
            child.pause = FIRST_PAUSE
        else:
            self._event("warning", child, f"{text}{self._after_end(child, 'started')}")

    def _forget(self, child: Child, process: Process) -> None:
        for descriptor in (process.output, process.ended):
            with suppress(KeyError, ValueError):  # its output has ended before, or it has no descriptor for its end
                self._selector.unregister(descriptor)
        process.close()
        if self._guard:
            self._guard.discard(process.pid)
        child.process = None
        child.signalled = 0
        child.lived = self._clock() - child.started

    def _read(self, child: Child, process: Process) -> bool:
        """Log what the process has written. False when there was nothing."""
        try:
            data = os.read(process.output, 65536)
        except BlockingIOError:
            return False
        if data:
            self._log_lines(child, data)
        else:
            with suppress(KeyError):
                self._selector.unregister(process.output)
        return bool(data)

    def _log_lines(self, child: Child, data: bytes) -> None:
        *lines, child.rest = (child.rest + data).split(b"\n")
        if len(child.rest) > LONGEST_LINE:
            lines.append(child.rest)
            child.rest = b""
        for line in lines:
            for start in range(0, len(line), LONGEST_LINE):
                text = line[start : start + LONGEST_LINE].decode("utf-8", "surrogateescape").expandtabs().rstrip()
                if text:
                    self._event("info", child, text)
