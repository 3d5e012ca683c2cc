"""Backends that the balancer starts itself: when they are started, how they are ended, what is told of them."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from balancer import supervisor
from balancer.config import Server
from balancer.supervisor import Supervisor, answers, expand
from conftest import PATIENCE, eventually

LISTEN = "import socket, sys; s = socket.create_server(('127.0.0.1', int(sys.argv[1])));"
"""Beginning of a program that serves at the port in its arguments."""
WAIT = "import signal; signal.pause()"


class Told:
    """A journal that keeps events, and lets a test wait for one."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    def event(self, level: str, text: str) -> None:
        self.events.append((level, text))

    @property
    def texts(self) -> list[str]:
        return [text for _, text in self.events]

    def wait_for(self, pattern: str, times: int = 1) -> re.Match[str]:
        """The latest event that matches, when there are so many."""

        def found() -> re.Match[str] | None:
            matches = [match for text in list(self.texts) if (match := re.search(pattern, text))]
            return matches[-1] if len(matches) >= times else None

        return eventually(found, f"{times} of {pattern!r} in {self.texts}")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def server(command: Sequence[str] = ("program",), *, id: str = "1", port: int = 1, host: str = "127.0.0.1") -> Server:
    return Server(id=id, host=host, port=port, command=tuple(command))


def python(code: str) -> tuple[str, ...]:
    return ("{python}", "-c", code, "{port}")


def runs(pid: int) -> bool:
    """Whether a process exists that is not merely waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        if Path("/proc/self").exists():
            return False
    return subprocess.run(["ps", "-p", str(pid)], stdout=subprocess.DEVNULL, check=False).returncode == 0


# What it does when: a clock, processes and addresses in the hand of the test --------------------------------------


class FakeProcess:
    """A process that ends when it is told to, or signalled."""

    ended = -1

    def __init__(self, pid: int, obedient: bool = True) -> None:
        self.pid = pid
        self.obedient = obedient
        self.status: int | None = None
        self.signals: list[int] = []
        self.output, self.writer = os.pipe()
        os.set_blocking(self.output, False)

    def poll(self) -> int | None:
        return self.status

    def signal(self, number: int) -> None:
        self.signals.append(number)
        if self.status is None and self.obedient:
            self.status = -number

    def close(self) -> None:
        os.close(self.output)
        os.close(self.writer)


class Stage:
    """A supervisor whose rounds are plain calls."""

    def __init__(self, *servers: Server, obedient: bool = True) -> None:
        self.now = 1000.0
        self.obedient = obedient
        self.ended: list[tuple[Server, float]] = []
        self.journal = Told()
        self.answering: set[Server] = set()
        self.refusal: OSError | None = None
        self.spawned: list[FakeProcess] = []
        self.supervisor = Supervisor(
            servers or [server()],
            Path("/base"),
            self.journal,
            spawn=self.spawn,
            clock=lambda: self.now,
            answers=self.answering.__contains__,
        )

    def spawn(self, words: Sequence[str], base: Path) -> FakeProcess:
        if self.refusal:
            raise self.refusal
        assert base == Path("/base")
        self.spawned.append(FakeProcess(100 + len(self.spawned), self.obedient))
        return self.spawned[-1]

    def round(self, later: float = 0.0) -> float | None:
        self.now += later
        return self.supervisor.round()

    def die(self, status: int = 1, later: float = 0.0) -> None:
        self.spawned[-1].status = status
        self.round(later)

    def follow(self, *servers: Server) -> None:
        self.supervisor.follow(servers)
        self.round()

    def run(self, instance: Server) -> None:
        self.supervisor.run(instance, lambda *end: self.ended.append(end))
        self.round()


@pytest.fixture
def stage() -> Iterator[Callable[..., Stage]]:
    stages = []

    def make(*servers: Server, obedient: bool = True) -> Stage:
        stages.append(Stage(*servers, obedient=obedient))
        return stages[-1]

    yield make
    for each in stages:
        for process in each.spawned:
            process.status = process.status or 0
        each.supervisor._end_all()
        each.supervisor.stop()


def test_only_servers_with_a_command_are_started(stage):
    it = stage(server(id="a"), Server(id="b", host="127.0.0.1", port=2), server(id="c", port=3))
    it.round()
    it.round()
    assert it.journal.texts == ["backend a: process 100 started: program", "backend c: process 101 started: program"]


def test_what_answers_already_is_left_alone_and_said_once(stage):
    it = stage()
    it.answering.add(server())
    it.round()
    for _ in range(5):
        it.round(later=supervisor.LOOK_AGAIN)
    assert it.spawned == []
    assert it.journal.events == [("info", "backend 1: something answers at 127.0.0.1:1 already and is left alone")]


def test_what_was_left_alone_is_started_when_nothing_answers_any_more(stage):
    it = stage()
    it.answering.add(server())
    it.round()
    it.answering.clear()
    it.round(later=supervisor.LOOK_AGAIN / 2)
    assert it.spawned == []
    it.round(later=supervisor.LOOK_AGAIN / 2)
    assert len(it.spawned) == 1


def test_one_that_runs_is_not_asked_whether_it_answers(stage):
    """It may take its time to start; health is another's business."""
    it = stage()
    it.round()
    it.answering.add(server())
    it.round(later=100)
    assert len(it.journal.events) == 1


def test_pause_before_a_restart_grows_and_has_an_end(stage):
    it = stage()
    it.round()
    pauses = []
    for _ in range(9):
        it.die()
        pauses.append(it.round())
        it.round(later=pauses[-1] - 0.01)
        assert it.spawned[-1].status is not None, "started too early"
        it.round(later=0.02)
    assert pauses == pytest.approx([0.5, 1, 2, 4, 8, 16, 30, 30, 30])


def test_one_that_lived_long_enough_is_restarted_soon_again(stage):
    it = stage()
    it.round()
    for _ in range(4):
        it.die()
        it.round(later=supervisor.LONGEST_PAUSE)
    it.die(later=supervisor.STEADY)
    assert it.round() == supervisor.FIRST_PAUSE


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (0, "ended with exit status 0"),
        (3, "ended with exit status 3"),
        (-signal.SIGSEGV, "was ended by SIGSEGV"),
        (-63, "was ended by signal 63"),
    ],
)
def test_each_death_is_one_line_with_status_or_signal(stage, status: int, words: str):
    it = stage()
    it.round()
    it.die(status, later=1.25)
    assert it.journal.events[1:] == [
        ("warning", f"backend 1: process 100 {words} after 1.2 s; started again in 0.5 s"),
    ]


def test_what_is_left_of_the_group_of_a_dead_leader_is_killed(stage):
    """Its workers would hold the port, and each restart would fail."""
    it = stage()
    it.round()
    it.die()
    assert it.spawned[0].signals == [signal.SIGKILL]


def test_command_that_cannot_be_started_is_told_and_tried_again_with_the_pause(stage):
    it = stage(server(), server(id="2", port=2))
    it.refusal = FileNotFoundError(2, "No such file or directory", "program")
    assert it.round() == supervisor.FIRST_PAUSE
    it.round(later=0.5)
    text = "backend 1: cannot be started: No such file or directory: program; tried again in {} s"
    assert it.journal.events[::2] == [("error", text.format(0.5)), ("error", text.format(1))]
    it.refusal = None
    it.round(later=1)
    assert len(it.spawned) == 2


def test_without_commands_nothing_is_ever_due(stage):
    it = stage(Server(id="a", host="127.0.0.1", port=1))
    assert it.round() is None
    it.supervisor.start()
    assert "supervisor" not in [thread.name for thread in threading.enumerate()]


def test_followed_servers_are_started_and_those_that_are_gone_are_stopped(stage):
    it = stage(server(id="a"), server(id="b", port=2))
    it.round()
    it.follow(server(id="b", port=2), server(id="c", port=3), Server(id="d", host="127.0.0.1", port=4))
    assert [process.signals[:1] for process in it.spawned] == [[signal.SIGTERM], [], []]
    assert it.journal.texts[2:] == [
        "backend a: it is stopped, for its command is configured no more",
        "backend a: process 100 was ended by SIGTERM after 0.0 s",
        "backend c: process 102 started: program",
    ]
    it.round(later=supervisor.LONGEST_PAUSE)
    assert len(it.spawned) == 3


def test_followed_server_whose_command_changed_is_stopped_and_started_again_at_once(stage):
    it = stage(server(["old", "{id}"], id="a"))
    it.round()
    it.follow(server(["new", "{id}"], id="a"))
    assert it.journal.texts[1:] == [
        "backend a: it is stopped, for its command has changed",
        "backend a: process 100 was ended by SIGTERM after 0.0 s",
        "backend a: process 101 started: new a",
    ]


def test_followed_server_that_stays_is_left_in_peace_whatever_else_is_changed_about_it(stage):
    """Its address tells who it is. Its pause stays too, or reloads would keep a crash loop going."""
    it = stage()
    it.round()
    it.die()
    it.follow(Server("other", "127.0.0.1", 1, weight=9, command=("program",)))
    assert len(it.spawned) == 1
    it.round(later=supervisor.FIRST_PAUSE)
    assert it.journal.texts[-1] == "backend other: process 101 started: program"


def test_command_that_was_mended_is_tried_at_once(stage):
    it = stage(server(["broken"]))
    it.round()
    for _ in range(6):
        it.die(later=supervisor.LONGEST_PAUSE)
        it.round(later=supervisor.LONGEST_PAUSE)
    it.die()
    it.follow(server(["mended"]))
    assert it.journal.texts[-1].endswith("started: mended")


def test_server_that_comes_back_while_its_command_ends_is_started_again(stage):
    it = stage(obedient=False)
    it.round()
    it.follow()
    it.follow(server())
    assert len(it.spawned) == 1
    it.die(0)
    assert len(it.spawned) == 2


def test_command_that_does_not_end_is_killed_and_given_up_at_last(stage):
    it = stage(obedient=False)
    it.round()
    it.follow()
    it.round(later=supervisor.STOP_PATIENCE)
    it.round(later=supervisor.KILL_PATIENCE)
    assert it.spawned[0].signals == [signal.SIGTERM, signal.SIGKILL]
    assert it.journal.events[-1] == ("error", "backend 1: process 100 does not end, even by SIGKILL")
    assert it.round() is None


def test_instance_is_run_once_and_its_end_is_told_once(stage):
    it = stage(Server(id="a", host="127.0.0.1", port=1))
    instance = server(id="i", port=9)
    it.run(instance)
    assert it.ended == []
    it.die(3, later=1.5)
    assert it.ended == [(instance, 1.5)]
    assert it.journal.events[-1] == ("warning", "backend i: process 100 ended with exit status 3 after 1.5 s")
    it.supervisor.end(instance)
    it.round(later=supervisor.LONGEST_PAUSE)
    assert len(it.spawned) == len(it.ended) == 1


def test_instance_that_cannot_be_started_has_ended(stage):
    it = stage()
    it.refusal = FileNotFoundError(2, "No such file or directory", "program")
    it.run(server(id="i", port=9))
    assert it.ended == [(server(id="i", port=9), 0.0)]
    assert it.journal.events[-1] == ("error", "backend i: cannot be started: No such file or directory: program")


def test_instance_is_ended_when_that_is_asked_for_and_by_no_configuration(stage):
    it = stage()
    instance = server(id="i", port=9)
    it.run(instance)
    it.follow()
    assert it.ended == []
    it.supervisor.end(instance)
    it.round()
    assert it.ended == [(instance, 0.0)]
    assert it.journal.events[-1] == ("info", "backend i: process 101 was ended by SIGTERM after 0.0 s")


def test_instance_that_is_ended_before_it_began_is_told_too(stage):
    it = stage(Server(id="a", host="127.0.0.1", port=1))
    it.supervisor.run(server(), lambda *end: it.ended.append(end))
    it.supervisor.end(server())
    it.round()
    assert it.spawned == []
    assert len(it.ended) == 1


def test_output_is_logged_line_by_line_with_the_backends_name(stage):
    it = stage(server(id="a"))
    it.round()
    for chunk in (b"one\ntw", b"o\r\n\n  \nth\xffree\tx\n", b"the last"):
        os.write(it.spawned[0].writer, chunk)
        it.supervisor._wait(0)
    assert it.journal.texts[1:] == ["backend a: one", "backend a: two", "backend a: th\udcffree  x"]
    it.die()
    assert it.journal.texts[4] == "backend a: the last"


def test_line_without_an_end_is_logged_in_pieces(stage):
    it = stage()
    it.round()
    os.write(it.spawned[0].writer, b"x" * 2500)
    it.supervisor._wait(0)
    assert [len(text) for text in it.journal.texts[1:]] == [len("backend 1: ") + n for n in (1000, 1000, 500)]


def test_words_of_a_command_have_their_placeholders_replaced_and_other_braces_left():
    words = ("{python}", "x.py", "{host}:{port}", "--name={id}", '{"a": {}}', "{{port}}", "awk '{print $1}'")
    assert expand(server(words, id="b{port}", port=8001)) == [
        sys.executable,
        "x.py",
        "127.0.0.1:8001",
        "--name=b{port}",
        '{"a": {}}',
        "{8001}",
        "awk '{print $1}'",
    ]


# Real processes ---------------------------------------------------------------------------------------------------


@pytest.fixture
def supervise(tmp_path: Path) -> Iterator[Callable[..., tuple[Supervisor, Told]]]:
    made: list[Supervisor] = []

    def make(*servers: Server) -> tuple[Supervisor, Told]:
        told = Told()
        made.append(Supervisor(servers, tmp_path, told))
        made[-1].start()
        return made[-1], told

    yield make
    for each in made:
        each.stop()


def test_started_when_start_returns_and_ready_when_it_accepts(supervise):
    it, told = supervise(server(python(LISTEN + WAIT), port=free_port()))
    assert re.match(r"backend 1: process \d+ started: ", told.texts[0])
    assert it.wait_ready(PATIENCE)


def test_waiting_for_one_that_never_accepts_has_an_end(supervise):
    it, _ = supervise(server(python(WAIT), port=free_port()))
    assert not it.wait_ready(0.05)


def test_one_that_died_is_not_waited_for(supervise):
    it, told = supervise(server(python("raise SystemExit(3)"), port=free_port()))
    told.wait_for("ended with exit status 3")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        other, _ = supervise(server(python(WAIT), port=taken.getsockname()[1]))
        assert other.wait_ready(PATIENCE)
    assert it.wait_ready(PATIENCE)


def test_one_that_is_killed_comes_back(supervise):
    port = free_port()
    it, told = supervise(server(python(LISTEN + WAIT), port=port))
    assert it.wait_ready(PATIENCE)
    os.kill(int(told.wait_for(r"process (\d+) started")[1]), signal.SIGKILL)
    told.wait_for("was ended by SIGKILL after")
    told.wait_for(r"process \d+ started", times=2)
    assert it.wait_ready(PATIENCE)


def test_output_of_both_streams_comes_while_it_runs(supervise):
    """Python's own output too, which a pipe makes come in blocks of 8 KB."""
    _, told = supervise(server(python("import sys; print('to stdout'); print('to stderr', file=sys.stderr);" + WAIT)))
    told.wait_for("backend 1: to stdout")
    told.wait_for("backend 1: to stderr")


def test_last_words_come_before_the_death(supervise):
    _, told = supervise(server(python("raise SystemExit('address in use')")))
    told.wait_for("ended with exit status 1")
    assert told.texts.index("backend 1: address in use") == 1


def test_runs_in_the_directory_of_the_configuration(supervise, tmp_path: Path):
    (tmp_path / "hello.py").write_text("import os; print('in', os.getcwd())")
    _, told = supervise(server(("{python}", "hello.py")))
    told.wait_for(f"backend 1: in {re.escape(str(tmp_path.resolve()))}")


def test_one_that_closes_its_output_lives_on(supervise):
    port = free_port()
    it, told = supervise(server(python("import os; os.close(1); os.close(2);" + LISTEN + WAIT), port=port))
    assert it.wait_ready(PATIENCE)
    it.stop()
    assert "was ended by SIGTERM" in told.texts[-1]


def test_command_that_does_not_exist_is_one_clear_line(supervise):
    _, told = supervise(server(("no-such-program", "x")))
    level, text = told.events[0]
    assert (level, text) == (
        "error",
        "backend 1: cannot be started: No such file or directory: no-such-program; tried again in 0.5 s",
    )
    told.wait_for("tried again in 1 s")


def test_thread_and_guard_begin_with_the_first_command(supervise):
    it, told = supervise(Server("a", "127.0.0.1", 1))
    it.follow([Server("b", "127.0.0.1", 2)])
    it.end(server())
    assert it._thread is None
    it.follow([server(python(WAIT), port=free_port())])
    told.wait_for("started")
    assert "supervisor" in [thread.name for thread in threading.enumerate()]
    assert runs(it._guard._popen.pid)


def test_orders_of_many_threads_are_all_carried_out(supervise):
    """Each of them has a program run that ends by itself, and one stopped that runs on."""
    it, told = supervise()
    ends: list[Server] = []

    def order(number: int) -> None:
        short, long = (server(python(code), id=f"{code[:4]}-{number}", port=number) for code in ("pass", WAIT))
        it.run(replace(short, port=100 + number), lambda server, lived: ends.append(server))
        it.run(long, lambda server, lived: ends.append(server))
        it.end(long)

    threads = [threading.Thread(target=order, args=(number,)) for number in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    eventually(lambda: len(ends) == 16, f"the ends: {told.texts}")
    assert len(set(ends)) == 16


def test_after_the_stop_nothing_is_started(supervise):
    it, told = supervise(server(python(WAIT), port=free_port()))
    it.stop()
    texts = list(told.texts)
    it.follow([server(python(WAIT), port=free_port())])
    it.run(server(python(WAIT), port=free_port()), lambda *_: None)
    it.end(server())
    it.stop()
    assert told.texts == texts


def test_stop_is_told_to_the_command_and_leaves_nothing(supervise):
    code = "import signal, sys; signal.signal(15, lambda *_: sys.exit('bye')); print('up');" + WAIT
    it, told = supervise(server(python(code)), server(python(code), id="2", port=2))
    told.wait_for("backend 1: up")
    told.wait_for("backend 2: up")
    began = time.monotonic()
    it.stop()
    assert time.monotonic() - began < supervisor.STOP_PATIENCE
    assert "supervisor" not in [thread.name for thread in threading.enumerate()]
    for id in "12":
        texts = [text for text in told.texts if text.startswith(f"backend {id}:")]
        assert texts[2] == f"backend {id}: bye"
        assert re.fullmatch(rf"backend {id}: process \d+ ended with exit status 1 after \d+\.\d s", texts[3])
    it.stop()  # once more does nothing


def test_stop_kills_what_does_not_obey(supervise, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(supervisor, "STOP_PATIENCE", 0.1)
    it, told = supervise(server(python("import signal; signal.signal(15, signal.SIG_IGN); print('up');" + WAIT)))
    told.wait_for("backend 1: up")
    it.stop()
    assert "was ended by SIGKILL" in told.texts[-1]


def test_stop_ends_the_whole_group(supervise):
    """A worker that outlives its master would hold the port."""
    code = "import subprocess, sys; print('worker', subprocess.Popen([sys.executable, '-c', sys.argv[2]]).pid);" + WAIT
    stubborn = "import signal; signal.signal(15, signal.SIG_IGN); print('up', flush=True);" + WAIT
    it, told = supervise(server((*python(code), stubborn)))
    worker = int(told.wait_for(r"worker (\d+)")[1])
    told.wait_for("backend 1: up")
    it.stop()
    eventually(lambda: not runs(worker), "the worker is gone")


def test_stop_before_start_gives_everything_back(tmp_path: Path):
    Supervisor([server()], tmp_path, Told()).stop()


def test_without_descriptors_for_ends_of_processes_deaths_are_noticed_too(supervise, monkeypatch: pytest.MonkeyPatch):
    """macOS, and Linux before 5.3."""
    monkeypatch.setattr(supervisor, "_end_of_process", lambda pid: -1)
    it, told = supervise(server(python("import os; os.close(1); os.close(2); raise SystemExit(3)")))
    told.wait_for("ended with exit status 3 after")
    told.wait_for("started", times=2)
    it.stop()


def test_balancer_killed_outright_takes_its_commands_and_instances_along(tmp_path: Path):
    """`kill -9` runs no handler: it is the guard that ends them."""
    program = f"""
import os, signal, sys
from pathlib import Path
from balancer import supervisor
from balancer.config import Server

class Journal:
    def event(self, level, text):
        print(text, flush=True)

def waiting(port):
    return Server(str(port), "127.0.0.1", port, command=("{{python}}", "-c", "{WAIT}"))

supervisor.STOP_PATIENCE = 0.2
it = supervisor.Supervisor([], Path(), Journal())
it.start()
it.follow([waiting(1)])
it.run(waiting(2), lambda server, lived: None)
sys.stdin.readline()
print(it._guard._popen.pid, flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as balancer:
        try:
            lines = [balancer.stdout.readline() for _ in range(2)]
            children = [int(re.search(r"process (\d+) started", line)[1]) for line in lines]
            balancer.stdin.write("\n")
            balancer.stdin.flush()
            guard = int(balancer.stdout.readline())
            assert all(map(runs, children))
        finally:
            balancer.kill()
    eventually(lambda: not any(map(runs, children)), "the commands are gone")
    eventually(lambda: not runs(guard), "the guard is gone")


def test_guard_that_was_killed_is_done_without(supervise):
    it, told = supervise(server(python(WAIT)))
    it._guard._popen.kill()
    it._guard._popen.wait()
    os.kill(int(told.wait_for(r"process (\d+) started")[1]), signal.SIGKILL)
    told.wait_for(r"process \d+ started", times=2)
    it.stop()


def test_answers_needs_a_listener():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert answers(server(port=port))
    assert not answers(server(port=port))


def test_connection_to_itself_is_no_answer(monkeypatch: pytest.MonkeyPatch):
    """Linux gives a connecting socket the port it connects to, now and then: it then is its own peer."""
    alone = socket.socket()
    alone.bind(("127.0.0.1", 0))
    alone.connect(alone.getsockname())
    monkeypatch.setattr(supervisor.socket, "create_connection", lambda *_: contextlib.closing(alone))
    assert not answers(server(port=alone.getsockname()[1]))
