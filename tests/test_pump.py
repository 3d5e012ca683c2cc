"""One direction of bytes on a thread of its own: what arrives, how it ends, what it leaves alone; and the threads."""

from __future__ import annotations

import errno
import hashlib
import http.client
import io
import os
import random
import select
import socket
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial

import pytest

from balancer import pump
from balancer.framing import LAST_CHUNK, ChunkedBody, CloseBody, LengthBody, as_chunk, as_is
from balancer.pump import FEW, NARROW, PIECE, WARY, WIDE, End, Flow, Pace, Pipe, Pumps, relay_body, relay_stream
from conftest import PATIENCE, eventually
from fakes import hang_up

SHORT = 0.03  # seconds: a timeout that a test waits for
LONG = 32 * 1024 * 1024  # octets of a long body
RESET = struct.pack("ii", 1, 0)


class Line:
    """Both connections that a pump works between: `giver` -> source, sink -> `taker`."""

    def __init__(self) -> None:
        self.giver, self.source = connection()
        self.taker, self.sink = connection()
        self.flow = Flow(self.source, self.sink)

    def close(self) -> None:
        for sock in (self.giver, self.source, self.sink, self.taker):
            sock.close()


def connection() -> tuple[socket.socket, socket.socket]:
    """Both ends of a TCP connection: the test's, which is patient, and the pump's, which blocks."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname(), timeout=PATIENCE)
        other, _ = listener.accept()
    return one, other


@pytest.fixture(params=["splice", "copy"])
def line(request, monkeypatch) -> Iterator[Line]:
    """A line whose pump splices, and again one whose pump receives and sends."""
    if request.param == "splice" and not pump.SPLICES:
        pytest.skip("there is no splice")
    monkeypatch.setattr(pump, "SPLICES", request.param == "splice")
    made = Line()
    yield made
    made.close()


@pytest.fixture
def splicing() -> Iterator[Line]:
    if not pump.SPLICES:
        pytest.skip("there is no splice")
    made = Line()
    yield made
    made.close()


@contextmanager
def pumping(*work: Callable[[], None]) -> Iterator[Pumps]:
    """Do this on one pump thread, one after the other; leaving waits for it."""
    pumps = Pumps(limit=1)
    pumps.run("pump", lambda: [piece() for piece in work])
    try:
        yield pumps
    finally:
        pumps.stop()


def pumped(*work: Callable[[], None]) -> None:
    with pumping(*work):
        pass


def read_all(sock: socket.socket) -> bytes:
    with sock.makefile("rb") as file:
        return file.read()


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    sock.close()


@cache
def octets(count: int) -> bytes:
    return random.Random(count).randbytes(count)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sent_by(sock: socket.socket, data: bytes, *, then_close: bool = False) -> threading.Thread:
    """A thread that sends this."""

    def send() -> None:
        sock.sendall(data)
        if then_close:
            sock.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=send, name="giver")
    thread.start()
    return thread


@contextmanager
def flooding(sock: socket.socket) -> Iterator[None]:
    """Send without end, until this is left."""

    def send() -> None:
        with suppress(OSError):
            while True:
                sock.sendall(bytes(65536))

    thread = threading.Thread(target=send, name="flood")
    thread.start()
    try:
        yield
    finally:
        hang_up(sock)
        thread.join()


# A body, by each framing ------------------------------------------------------------------------------------------


def test_a_body_of_known_length_arrives_and_nothing_behind_it_is_consumed(line):
    line.giver.sendall(b"0123456789GET /next")
    pumped(lambda: relay_body(line.flow, LengthBody(10), as_is))
    line.sink.close()
    assert read_all(line.taker) == b"0123456789"
    assert line.source.recv(100) == b"GET /next"
    assert (line.flow.end, line.flow.octets) == (End.DONE, 10)


def test_what_goes_first_and_last_is_passed_as_it_is_and_not_counted(line):
    line.giver.sendall(b"body")
    pumped(lambda: relay_body(line.flow, LengthBody(4), as_is, b"head ", b" tail"))
    line.sink.close()
    assert read_all(line.taker) == b"head body tail"
    assert line.flow.octets == 4


def test_a_body_that_is_over_already_takes_nothing(line):
    line.giver.sendall(b"next")
    pumped(lambda: relay_body(line.flow, LengthBody(0), as_is, b"the rest of it"))
    line.sink.close()
    assert read_all(line.taker) == b"the rest of it"
    assert line.source.recv(100) == b"next"
    assert line.flow.end is End.DONE


def test_a_body_until_close_ends_with_the_source(line):
    line.giver.sendall(b"all there is")
    line.giver.shutdown(socket.SHUT_WR)
    pumped(lambda: relay_body(line.flow, CloseBody(), as_is))
    line.sink.close()
    assert read_all(line.taker) == b"all there is"
    assert (line.flow.end, line.flow.octets) == (End.DONE, 12)


def test_a_body_until_close_can_be_passed_on_in_chunks(line):
    line.giver.sendall(b"all there is")
    line.giver.shutdown(socket.SHUT_WR)
    pumped(lambda: relay_body(line.flow, CloseBody(), as_chunk, last=LAST_CHUNK))
    line.sink.close()
    assert read_all(line.taker) == b"c\r\nall there is\r\n0\r\n\r\n"
    assert (line.flow.end, line.flow.octets) == (End.DONE, 12)


def test_chunks_are_written_anew_without_extensions_and_trailers(line):
    line.giver.sendall(b"3;name=value\r\nabc\r\n4\r\ndefg\r\n0\r\nX-Trailer: 1\r\n\r\nGET /next")
    body = ChunkedBody()
    pumped(lambda: relay_body(line.flow, body, as_chunk, last=LAST_CHUNK))
    line.sink.close()
    assert read_all(line.taker) == b"7\r\nabcdefg\r\n0\r\n\r\n"
    assert body.rest == b"GET /next"
    assert (line.flow.end, line.flow.octets) == (End.DONE, 7)


def test_a_chunked_body_can_be_passed_on_plain(line):
    line.giver.sendall(b"3\r\nabc\r\n4\r\ndefg\r\n0\r\n\r\n")
    pumped(lambda: relay_body(line.flow, ChunkedBody(), as_is))
    line.sink.close()
    assert read_all(line.taker) == b"abcdefg"


@pytest.mark.parametrize("until_close", [False, True], ids=["known length", "until close"])
def test_a_long_body_arrives_octet_for_octet(line, until_close):
    data = octets(LONG)
    giver = sent_by(line.giver, data, then_close=until_close)
    body = CloseBody() if until_close else LengthBody(LONG)

    def work() -> None:
        relay_body(line.flow, body, as_is)
        line.sink.shutdown(socket.SHUT_WR)

    with pumping(work):
        assert digest(read_all(line.taker)) == digest(data)
    giver.join()
    assert (line.flow.end, line.flow.octets) == (End.DONE, LONG)


def test_a_long_chunked_body_arrives_octet_for_octet(line):
    data = octets(LONG // 2)
    framed = io.BytesIO()
    place, sizes = 0, random.Random(2)
    while place < len(data):
        piece = data[place : place + sizes.choice((1, 17, 4096, 70_000, 300_000))]
        framed.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        place += len(piece)
    giver = sent_by(line.giver, framed.getvalue() + b"0\r\n\r\n")
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    with pumping(lambda: relay_body(line.flow, ChunkedBody(), as_chunk, head, LAST_CHUNK)):
        answer = http.client.HTTPResponse(line.taker)
        answer.begin()
        assert digest(answer.read()) == digest(data)
    giver.join()
    assert (line.flow.end, line.flow.octets) == (End.DONE, len(data))


# How it can end early ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_a_source_that_closes_within_the_body_cuts_it(line, chunked):
    line.giver.sendall(b"5\r\nab")
    line.giver.close()
    body, encode = (ChunkedBody(), as_chunk) if chunked else (LengthBody(10), as_is)
    pumped(lambda: relay_body(line.flow, body, encode, last=LAST_CHUNK))
    line.sink.close()
    assert line.flow.end is End.CUT
    assert not read_all(line.taker).endswith(LAST_CHUNK)
    assert "closed" in line.flow.problem


def test_a_source_that_is_silent_for_too_long_ends_it(line):
    line.flow.wait_at_most(SHORT, PATIENCE)
    line.giver.sendall(b"12345")
    pumped(lambda: relay_body(line.flow, LengthBody(10), as_is))
    assert (line.flow.end, line.flow.octets) == (End.SILENT, 5)
    assert line.taker.recv(100) == b"12345"


def test_a_sink_that_takes_nothing_for_too_long_ends_it(line):
    line.flow.wait_at_most(PATIENCE, SHORT)
    with flooding(line.giver):
        pumped(lambda: relay_body(line.flow, LengthBody(1 << 40), as_is))
    assert line.flow.end is End.SINK_STUCK
    line.sink.close()
    taken = len(read_all(line.taker))
    assert taken - PIECE < line.flow.octets <= taken, "what is counted is what was sent on, but for the last piece"


def test_a_chunk_that_breaks_the_rules_ends_it(line):
    line.giver.sendall(b"3\r\nabc\r\nxyz\r\n")
    pumped(lambda: relay_body(line.flow, ChunkedBody(), as_chunk, last=LAST_CHUNK))
    line.sink.close()
    assert line.flow.end is End.BAD
    assert "chunk" in line.flow.problem
    assert LAST_CHUNK not in read_all(line.taker)


def test_a_source_that_resets_ends_it(line):
    reset(line.giver)
    pumped(lambda: relay_body(line.flow, LengthBody(10), as_is))
    assert (line.flow.end, line.flow.problem) == (End.SOURCE_LOST, os.strerror(errno.ECONNRESET))


def test_a_sink_that_resets_ends_it(line):
    reset(line.taker)
    with flooding(line.giver):
        pumped(lambda: relay_body(line.flow, LengthBody(1 << 40), as_is))
    assert line.flow.end is End.SINK_LOST


@pytest.mark.parametrize("make_body", [partial(LengthBody, 10), ChunkedBody], ids=["length", "chunked"])
def test_a_shutdown_elsewhere_wakes_a_pump_that_waits_for_its_source(line, make_body):
    """A close would not: `recv` in another thread goes on waiting."""
    with pumping(lambda: relay_body(line.flow, make_body(), as_is, b"I wait")):
        assert line.taker.recv(100) == b"I wait"
        hang_up(line.source)
    assert line.flow.end is End.CUT


def test_a_shutdown_elsewhere_wakes_a_pump_that_waits_for_its_sink(line):
    with flooding(line.giver), pumping(lambda: relay_body(line.flow, LengthBody(1 << 40), as_is)):
        eventually(lambda: not select.select([], [line.sink], [], 0)[1], "a sink that is full")
        hang_up(line.sink)
    assert line.flow.end is End.SINK_LOST


def test_a_pump_that_breaks_is_not_held_to_be_done(line):
    """A body that ended by a bug of ours would else look complete, and the connection would be used again."""

    class Broken(ChunkedBody):
        def feed(self, data: bytes) -> bytes:
            raise ZeroDivisionError("a bug")

    line.giver.sendall(b"1\r\n")
    told = []
    pumps = Pumps(on_error=lambda where, error: told.append((where, str(error))))
    pumps.run("conn-1-down", lambda: relay_body(line.flow, Broken(), as_is))
    pumps.stop()
    assert line.flow.end is End.FAILED
    assert told == [("pump conn-1-down", "a bug")]


# A stream ---------------------------------------------------------------------------------------------------------


def test_a_stream_ends_with_its_source_and_half_closes_the_sink(line):
    line.giver.sendall(b"all there is")
    line.giver.shutdown(socket.SHUT_WR)
    pumped(lambda: relay_stream(line.flow, b"received before: "))
    assert read_all(line.taker) == b"received before: all there is"
    assert (line.flow.end, line.flow.octets) == (End.DONE, 29)
    line.taker.sendall(b"the other way is open")
    assert line.sink.recv(100) == b"the other way is open"


def test_a_long_stream_arrives_octet_for_octet(line):
    data = octets(LONG)
    giver = sent_by(line.giver, data, then_close=True)
    with pumping(lambda: relay_stream(line.flow)):
        assert digest(read_all(line.taker)) == digest(data)
    giver.join()
    assert (line.flow.end, line.flow.octets) == (End.DONE, LONG)


def test_a_stream_that_was_silent_can_be_taken_up_again(line):
    line.flow.wait_at_most(SHORT, PATIENCE)
    line.giver.sendall(b"one ")
    pumped(lambda: relay_stream(line.flow))
    assert line.flow.end is End.SILENT
    line.giver.sendall(b"two")
    line.giver.close()
    pumped(lambda: relay_stream(line.flow))
    assert read_all(line.taker) == b"one two"
    assert (line.flow.end, line.flow.octets) == (End.DONE, 7)


# Splice, and what stands in for it --------------------------------------------------------------------------------


def test_what_one_stream_left_in_the_pipe_never_reaches_another(splicing):
    """One thread serves one connection after the other with the same pipe."""
    other = Line()
    try:
        splicing.flow.wait_at_most(PATIENCE, SHORT)
        other.giver.sendall(b"mine alone")
        other.giver.close()
        with flooding(splicing.giver):
            pumped(lambda: relay_stream(splicing.flow), lambda: relay_stream(other.flow))
        assert splicing.flow.end is End.SINK_STUCK
        assert read_all(other.taker) == b"mine alone"
    finally:
        other.close()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS])
def test_a_source_that_cannot_be_spliced_is_copied(splicing, monkeypatch, number):
    refuse_splice(monkeypatch, from_socket=number)
    splicing.giver.sendall(b"copied")
    splicing.giver.close()
    pumped(lambda: relay_stream(splicing.flow))
    assert read_all(splicing.taker) == b"copied"
    assert (splicing.flow.end, splicing.flow.octets, splicing.flow.copies) == (End.DONE, 6, True)


def test_a_sink_that_cannot_be_spliced_gets_what_is_in_the_pipe_and_then_copies(splicing, monkeypatch):
    refuse_splice(monkeypatch, to_socket=errno.EINVAL)
    data = octets(1_000_000)
    giver = sent_by(splicing.giver, data, then_close=True)
    with pumping(lambda: relay_stream(splicing.flow)):
        assert digest(read_all(splicing.taker)) == digest(data)
    giver.join()
    assert (splicing.flow.end, splicing.flow.octets, splicing.flow.copies) == (End.DONE, len(data), True)


def refuse_splice(monkeypatch, *, from_socket: int = 0, to_socket: int = 0) -> None:
    real = os.splice

    def splice(source: int, sink: int, count: int) -> int:
        number = from_socket if is_socket(source) else to_socket
        if number:
            raise OSError(number, os.strerror(number))
        return real(source, sink, count)

    monkeypatch.setattr(os, "splice", splice)


def is_socket(fd: int) -> bool:
    return stat.S_ISSOCK(os.fstat(fd).st_mode)


def test_without_descriptors_for_a_pipe_it_is_copied(splicing, monkeypatch):
    def pipe() -> tuple[int, int]:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "pipe", pipe)
    splicing.giver.sendall(b"copied")
    splicing.giver.close()
    pumped(lambda: relay_stream(splicing.flow))
    assert read_all(splicing.taker) == b"copied"


def test_a_pipe_that_would_stay_small_is_closed_and_it_is_copied(splicing, monkeypatch):
    """A user's pipes may take 64 MiB altogether; beyond that each gets two pages (pipe(7))."""

    def fcntl(fd: int, command: int, argument: int) -> int:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(pump.fcntl, "fcntl", fcntl)
    splicing.giver.sendall(b"copied")
    splicing.giver.close()
    before = len(os.listdir("/proc/self/fd"))
    open_then = []
    pumped(lambda: relay_stream(splicing.flow), lambda: open_then.append(len(os.listdir("/proc/self/fd"))))
    assert read_all(splicing.taker) == b"copied"
    assert open_then == [before]


def capacity(pipe: Pipe) -> int:
    return pump.fcntl.fcntl(pipe.inlet, 1032)  # F_GETPIPE_SZ, which Python 3.10 has no name for on every system


def granted(octets: int) -> bool:
    """Does this user get a pipe of this size?"""
    outlet, inlet = os.pipe()
    try:
        pump.fcntl.fcntl(inlet, 1031, octets)
    except OSError:
        return False
    finally:
        os.close(outlet)
        os.close(inlet)
    return True


@pytest.fixture
def wide(monkeypatch) -> None:
    """None of the wide pipes that there may be is taken, and the system grants them."""
    if not (pump.SPLICES and granted(PIECE)):
        pytest.skip("there are no wide pipes")
    monkeypatch.setattr(pump, "_wide_pipes", threading.BoundedSemaphore(WIDE))


def test_only_so_many_pipes_are_wide_and_one_that_is_closed_makes_room(wide):
    """A program that took all of its user's pages for pipes would leave other programs pipes of two pages."""
    pipes = [Pipe() for _ in range(WIDE + 1)]
    try:
        assert [capacity(pipe) for pipe in pipes] == [PIECE] * WIDE + [NARROW]
        for pipe in (pipes.pop(), pipes.pop()):
            pipe.close()
        pipes += [Pipe(), Pipe()]
        assert [capacity(pipe) for pipe in pipes[-2:]] == [PIECE, NARROW]
    finally:
        for pipe in pipes:
            pipe.close()


def test_where_a_wide_pipe_is_refused_it_is_narrow_and_carries_all(wide, splicing, monkeypatch):
    """A user who is not root may set the size of one pipe to no more than pipe-max-size (pipe(7))."""
    real = pump.fcntl.fcntl

    def fcntl(fd: int, command: int, argument: int = 0) -> int:
        if argument > NARROW:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        return real(fd, command, argument)

    monkeypatch.setattr(pump.fcntl, "fcntl", fcntl)
    pipes = [Pipe() for _ in range(WIDE + 1)]
    assert {capacity(pipe) for pipe in pipes} == {NARROW}
    for pipe in pipes:
        pipe.close()
    data = octets(3 * PIECE)
    giver = sent_by(splicing.giver, data, then_close=True)
    with pumping(lambda: relay_stream(splicing.flow)):
        assert digest(read_all(splicing.taker)) == digest(data)
    giver.join()
    assert (splicing.flow.octets, splicing.flow.copies) == (len(data), False)


# The pace of a flood ----------------------------------------------------------------------------------------------


class Sender:
    """Gives a pace its moves, and counts the pauses: a move after a pause brings `gathered` octets, others `usual`."""

    def __init__(self, usual: int, gathered: int) -> None:
        self.usual, self.gathered = usual, gathered
        self.pauses = 0
        self.pace = Pace(self._sleep)

    def _sleep(self, seconds: float) -> None:
        assert 0 < seconds < 0.001, "nobody notices it"
        self.pauses += 1

    def moves(self, count: int) -> int:
        """So many moves; the pauses among them."""
        first = before = self.pauses
        self.pace.moved(self.usual)
        for _ in range(count - 1):
            paused, before = self.pauses > before, self.pauses
            self.pace.moved(self.gathered if paused else self.usual)
        return self.pauses - first


@pytest.mark.parametrize("gathered", [3000, FEW - 1])
def test_as_long_as_pauses_make_the_moves_larger_they_go_on(gathered):
    sender = Sender(1000, gathered)
    assert sender.moves(WARY) == 0, "what is short is not held up"
    assert sender.moves(100) == 100


def test_a_move_that_is_large_needs_no_pause():
    assert Sender(FEW, FEW).moves(1000) == 0
    assert Sender(FEW - 1, PIECE).moves(WARY + 100) == 50, "nor does one that a pause made large"


def test_a_dialogue_is_hardly_ever_held_up():
    """Its next message comes when this one is answered, however long the pump pauses."""
    assert Sender(40_000, 40_000).moves(100 * (WARY + 1)) == 100


# The threads ------------------------------------------------------------------------------------------------------


@pytest.fixture
def pumps() -> Iterator[Pumps]:
    made = Pumps(limit=2)
    yield made
    made.stop()


class Task:
    """Work that begins and ends when the test wants it to."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.may_end = threading.Event()
        self.name = ""
        self.thread: threading.Thread | None = None

    def __call__(self) -> None:
        self.thread = threading.current_thread()
        self.name = self.thread.name
        self.begun.set()
        assert self.may_end.wait(PATIENCE)

    def finish(self) -> None:
        """Let it end, and wait until its thread has nothing to do."""
        assert self.begun.wait(PATIENCE)
        self.may_end.set()
        eventually(lambda: self.thread.name == "pump-waiting", "a thread that waits")


def waits(pumps: Pumps) -> None:
    """Wait until every thread of these waits."""
    eventually(lambda: repr(pumps) == f"<Pumps {pumps.threads} threads, {pumps.threads} waiting>", "idle threads")


def test_a_thread_is_named_for_its_work_and_kept_for_the_next(pumps):
    first, second = Task(), Task()
    pumps.run("conn-1-up", first)
    first.finish()
    waits(pumps)
    pumps.run("conn-2-down", second)
    second.finish()
    assert (first.name, second.name) == ("conn-1-up", "conn-2-down")
    assert first.thread is second.thread
    assert pumps.threads == 1


def test_at_the_limit_there_is_no_thread_until_one_is_free(pumps):
    tasks = [Task(), Task()]
    for task in tasks:
        pumps.run("busy", task)
    with pytest.raises(RuntimeError, match="no pump thread for conn-3-up: all are busy"):
        pumps.run("conn-3-up", Task())
    tasks[0].finish()
    waits_for_one = Task()
    eventually(lambda: "1 waiting" in repr(pumps), "a thread that waits")
    pumps.run("conn-3-up", waits_for_one)
    waits_for_one.finish()
    tasks[1].finish()


def test_a_thread_that_cannot_be_started_is_not_counted(pumps, monkeypatch):
    """At the limit of the user's processes `Thread.start` raises RuntimeError."""

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(RuntimeError):
            pumps.run("conn-1-up", Task())
    assert pumps.threads == 0
    task = Task()
    pumps.run("conn-1-up", task)
    task.finish()


def test_threads_without_work_end_after_a_while():
    pumps = Pumps(idle_seconds=SHORT)
    task = Task()
    pumps.run("conn-1-up", task)
    task.finish()
    eventually(lambda: pumps.threads == 0, "no thread")
    pumps.stop()


def test_an_order_that_comes_as_its_thread_gives_up_waiting_is_carried_out(monkeypatch):
    """The wait is over and nothing was there; before the thread could say that it goes, it is given an order."""
    given, done = threading.Event(), threading.Event()

    class LateBell:
        def __init__(self, bell: threading.Lock) -> None:
            self.release = bell.release
            self._bell = bell

        def acquire(self, timeout: float = -1) -> bool:
            if timeout == -1:
                return self._bell.acquire()
            assert given.wait(PATIENCE)
            return False

    class Post(pump._Post):
        def __init__(self) -> None:
            super().__init__()
            self.bell = LateBell(self.bell)

    monkeypatch.setattr(pump, "_Post", Post)
    pumps = Pumps()
    pumps.run("conn-1-up", lambda: None)
    waits(pumps)
    pumps.run("conn-2-up", done.set)
    given.set()
    assert done.wait(PATIENCE)
    pumps.stop()


def test_the_thread_that_waited_least_is_called_first():
    """So that the others end in time, where a turn for each would keep as many as were ever needed."""
    pumps = Pumps()
    tasks = [Task() for _ in range(3)]
    for task in tasks:
        pumps.run("conn-1-up", task)
    for number, task in enumerate(tasks, 1):
        task.finish()
        eventually(lambda number=number: f"{number} waiting" in repr(pumps), "one more that waits")
    for _ in range(5):
        again = Task()
        pumps.run("conn-2-up", again)
        again.finish()
        assert again.thread is tasks[-1].thread
        waits(pumps)
    pumps.stop()


def test_threads_that_lose_their_work_to_another_still_end_in_time():
    """A wait that is woken for nothing still has an end. That of SimpleQueue.get may have none, up to Python 3.12."""
    pumps = Pumps(idle_seconds=0.002)
    for _ in range(300):
        for _ in range(3):
            pumps.run("conn-1-up", lambda: None)
    eventually(lambda: pumps.threads == 0, "no thread", within=PATIENCE / 2)
    pumps.stop()


def test_no_order_is_lost_while_threads_come_and_go():
    pumps = Pumps(idle_seconds=0.001)
    done: list[int] = []
    for number in range(1000):
        pumps.run(f"conn-{number}-up", lambda number=number: done.append(number))
        if number % 10 == 0:
            eventually(lambda number=number: len(done) == number + 1, "all so far")
    eventually(lambda: len(done) == 1000, "all")
    eventually(lambda: pumps.threads == 0, "no thread")
    pumps.stop()


def test_work_that_raises_is_told_and_its_thread_goes_on(pumps):
    told = []
    pumps = Pumps(limit=1, on_error=lambda where, error: told.append((where, repr(error))))
    pumps.run("conn-1-up", lambda: 1 // 0)
    eventually(lambda: told, "the error")
    waits(pumps)
    task = Task()
    pumps.run("conn-2-up", task)
    task.finish()
    pumps.stop()
    assert told[0][0] == "pump conn-1-up"
    assert told[0][1].startswith("ZeroDivisionError")


def test_stop_waits_for_the_work_in_hand_and_for_what_was_promised(pumps):
    busy, order = Task(), threading.Event()
    idle = Task()
    pumps.run("conn-1-up", idle)
    idle.finish()
    waits(pumps)
    pumps.run("conn-1-up", order.set)
    pumps.run("conn-2-up", busy)
    assert busy.begun.wait(PATIENCE)
    stopper = threading.Thread(target=pumps.stop)
    stopper.start()
    eventually(lambda: "0 waiting" in repr(pumps), "a stop that has begun")
    busy.may_end.set()
    stopper.join(PATIENCE)
    assert not stopper.is_alive()
    assert order.is_set()
    assert pumps.threads == 0


def test_after_the_stop_no_work_is_taken(pumps):
    pumps.stop()
    with pytest.raises(RuntimeError, match="no pump thread for conn-1-up: stopped"):
        pumps.run("conn-1-up", Task())


# Waiting ----------------------------------------------------------------------------------------------------------


def test_waits_of_less_than_a_second_are_not_taken_for_for_ever(line):
    line.flow.wait_at_most(0.001, 0.001)
    for option, sock in ((socket.SO_RCVTIMEO, line.source), (socket.SO_SNDTIMEO, line.sink)):
        seconds, microseconds = struct.unpack("@ll", sock.getsockopt(socket.SOL_SOCKET, option, 16))
        assert seconds == 0
        assert 0 < microseconds <= 20_000


def test_waits_can_be_set_on_a_connection_that_is_dead(line):
    """macOS answers EINVAL here; the pump's first call is to say what is wrong."""
    reset(line.giver)
    eventually(lambda: line.source.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR), "a reset that has come")
    line.flow.wait_at_most(1.0, 1.0)
