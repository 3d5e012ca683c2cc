"""The loop: readiness, deadlines, calls from other threads, and that one connection's bug is nobody else's."""

from __future__ import annotations

import os
import select
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest

from balancer import reactor as reactor_module
from balancer.reactor import DONTWAIT, NEVER, READ, WRITE, Reactor
from conftest import PATIENCE, eventually


class Clock:
    """A clock that the test holds."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Loop:
    """A reactor that runs, what it complained of, and a way to have something done on its thread."""

    def __init__(self, reactor: Reactor, errors: list[tuple[str, str]]) -> None:
        self.reactor = reactor
        self.errors = errors

    def do(self, function: Callable[[], object]) -> object:
        """Call this on the reactor's thread, in a batch of its own, and return its answer."""
        answers: list[object] = []
        done = threading.Event()

        def work() -> None:
            answers.append(function())
            done.set()

        self.reactor.call_soon(work)
        assert done.wait(PATIENCE)
        return answers[0]


@pytest.fixture(params=[False, True], ids=["own poller", "portable poller"])
def portable(request) -> bool:
    if not request.param and not hasattr(select, "epoll"):
        pytest.skip("there is no epoll")
    return request.param


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def loop(portable, clock) -> Iterator[Loop]:
    errors: list[tuple[str, str]] = []
    reactor = Reactor(
        tick=0.01,
        clock=clock,
        portable=portable,
        on_error=lambda where, error: errors.append((where, str(error))),
    )
    reactor.start()
    yield Loop(reactor, errors)
    reactor.stop()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


class Owner:
    """Something with a handler, a deadline and a last word."""

    def __init__(self, problem: str = "", second: str = "") -> None:
        self.problem = problem
        self.second = second
        self.deadline = NEVER
        self.masks: list[int] = []
        self.expiries: list[float] = []
        self.crashes: list[str] = []
        self.called = threading.Event()

    def on_ready(self, mask: int) -> None:
        self.masks.append(mask)
        self.called.set()
        self.fail()

    def expired(self, now: float) -> None:
        self.expiries.append(now)
        self.called.set()
        self.fail()

    def crashed(self, error: Exception) -> None:
        self.crashes.append(str(error))
        if self.second:
            raise ValueError(self.second)

    def fail(self) -> None:
        if self.problem:
            raise ValueError(self.problem)

    def works(self, *arguments: object) -> None:
        self.called.set()


# Readiness --------------------------------------------------------------------------------------------------------


def test_a_handler_is_called_when_its_descriptor_is_readable(loop, pair):
    ours, theirs = pair
    owner = Owner()
    loop.do(lambda: loop.reactor.add(ours.fileno(), READ, owner.on_ready))
    theirs.send(b"x")
    assert owner.called.wait(PATIENCE)
    loop.do(lambda: loop.reactor.remove(ours.fileno()))
    assert owner.masks[0] & READ


def test_watch_changes_what_a_descriptor_is_watched_for(loop, pair):
    ours, _ = pair
    owner = Owner()
    loop.do(lambda: loop.reactor.add(ours.fileno(), READ, owner.on_ready))
    assert owner.masks == []
    loop.do(lambda: loop.reactor.watch(ours.fileno(), WRITE))
    assert owner.called.wait(PATIENCE)
    loop.do(lambda: loop.reactor.remove(ours.fileno()))
    assert set(owner.masks) == {WRITE}


def test_a_descriptor_that_was_removed_is_forgotten(loop, pair):
    ours, theirs = pair
    owner = Owner()
    theirs.send(b"x")
    loop.do(lambda: loop.reactor.add(ours.fileno(), READ, owner.on_ready))
    assert owner.called.wait(PATIENCE)
    loop.do(lambda: loop.reactor.remove(ours.fileno()))
    calls = len(owner.masks)
    loop.do(lambda: None)
    assert len(owner.masks) == calls


def test_an_entry_in_handlers_hands_a_descriptor_to_another_owner(loop, pair):
    ours, theirs = pair
    first, second = Owner(), Owner()
    loop.do(lambda: loop.reactor.add(ours.fileno(), READ, first.on_ready))
    loop.do(lambda: loop.reactor.handlers.__setitem__(ours.fileno(), second.on_ready))
    theirs.send(b"x")
    assert second.called.wait(PATIENCE)
    loop.do(lambda: loop.reactor.remove(ours.fileno()))
    assert first.masks == []


def test_who_is_removed_by_an_earlier_handler_of_the_same_batch_is_not_called(loop):
    """Both are ready when the selector is asked; the first that is called closes the other's descriptor."""
    with ExitStack() as stack:
        mine, yours = socket.socketpair(), socket.socketpair()
        for sock in mine + yours:
            stack.enter_context(sock)
        called = []

        def end_the_other(name: str, this: socket.socket, other: socket.socket, mask: int) -> None:
            called.append(name)
            loop.reactor.remove(this.fileno())
            loop.reactor.remove(other.fileno())
            other.close()

        def begin() -> None:
            loop.reactor.add(mine[0].fileno(), READ, partial(end_the_other, "mine", mine[0], yours[0]))
            loop.reactor.add(yours[0].fileno(), READ, partial(end_the_other, "yours", yours[0], mine[0]))

        mine[1].send(b"x")
        yours[1].send(b"x")
        loop.do(begin)
        eventually(lambda: called, "a handler that is called")
        loop.do(lambda: None)
        assert len(called) == 1
        assert loop.errors == []


def test_what_the_system_cannot_watch_leaves_no_handler(loop, tmp_path):
    with open(tmp_path / "file", "wb") as file:
        fd = file.fileno()

        def add() -> bool:
            with pytest.raises(OSError):
                loop.reactor.add(fd, READ, lambda mask: None)
            return fd in loop.reactor.handlers

        assert not loop.do(add)


# Calls from elsewhere ---------------------------------------------------------------------------------------------


def test_a_call_from_another_thread_wakes_a_loop_that_waits_for_nothing(loop):
    main = threading.current_thread()
    assert loop.do(threading.current_thread) is not main


def test_calls_are_made_in_order_and_none_is_lost(loop):
    """From several threads at once, each of which the loop may be about to fall asleep upon."""
    made: list[tuple[int, int]] = []

    def ask(who: int) -> None:
        for number in range(500):
            loop.reactor.call_soon(lambda *call: made.append(call), who, number)

    askers = [threading.Thread(target=ask, args=(who,)) for who in range(4)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    eventually(lambda: len(made) == 2000, "every call")
    for who in range(4):
        assert [number for asker, number in made if asker == who] == list(range(500))


def test_more_calls_than_the_bell_can_count_are_all_made(portable):
    """Nobody answers the bell yet: the caller must neither block nor fail when its buffer is full."""
    reactor = Reactor(portable=portable, on_error=lambda where, error: None)
    made: list[int] = []
    for number in range(5000):
        reactor.call_soon(made.append, number)
    reactor.start()
    try:
        eventually(lambda: len(made) == 5000, "every call")
    finally:
        reactor.stop()


def test_what_is_deferred_comes_after_the_batch(loop):
    order = []

    def work() -> None:
        loop.reactor.defer(order.append, "deferred")
        order.append("batch")

    loop.do(work)
    loop.do(lambda: None)
    assert order == ["batch", "deferred"]


# Deadlines --------------------------------------------------------------------------------------------------------


def test_a_deadline_that_passes_is_told_once(loop, clock):
    owner = Owner()
    owner.deadline = clock.now + 5
    loop.do(lambda: loop.reactor.timed.add(owner))
    clock.now += 4
    loop.do(lambda: None)
    assert owner.expiries == []
    clock.now += 2
    assert owner.called.wait(PATIENCE)
    clock.now += 100
    loop.do(lambda: None)
    loop.do(lambda: None)
    assert len(owner.expiries) == 1
    assert owner.deadline == NEVER


def test_a_deadline_that_was_moved_is_not_told(loop, clock):
    owner, other = Owner(), Owner()
    owner.deadline = other.deadline = clock.now + 5
    loop.do(lambda: loop.reactor.timed.update((owner, other)))
    owner.deadline += 10
    clock.now += 6
    assert other.called.wait(PATIENCE)
    loop.do(lambda: None)
    assert owner.expiries == []


def test_who_is_ended_by_another_ones_deadline_is_not_told_of_its_own(loop, clock):
    first, second = Owner(), Owner()

    def end(this: Owner, other: Owner, now: float) -> None:
        this.expiries.append(now)
        loop.reactor.timed.discard(other)

    first.expired = partial(end, first, second)
    second.expired = partial(end, second, first)
    first.deadline = second.deadline = clock.now + 1
    loop.do(lambda: loop.reactor.timed.update((first, second)))
    clock.now += 2
    eventually(lambda: first.expiries or second.expiries, "one that is told")
    loop.do(lambda: None)
    assert len(first.expiries + second.expiries) == 1


# What is sent -----------------------------------------------------------------------------------------------------


class Sink:
    """Takes so many octets at once, or raises. Both it and its sender note in `events` what happens."""

    def __init__(self, events: list[object], takes: int | OSError = 1000) -> None:
        self.events = events
        self.takes = takes

    def send(self, data: bytes, flags: int) -> int:
        assert flags == DONTWAIT
        self.events.append(data)
        if isinstance(self.takes, OSError):
            raise self.takes
        return min(len(data), self.takes)


class Sender(Owner):
    """Is told what became of it, and then does what it was made for."""

    def __init__(self, events: list[object], then: Callable[[], object] = lambda: None) -> None:
        super().__init__()
        self.events = events
        self.then = then

    def on_sent(self) -> None:
        self._note(self)

    def on_unsent(self, sink: Any, rest: bytes | None) -> None:
        self._note((sink, rest))

    def _note(self, event: object) -> None:
        self.events.append(event)
        self.called.set()
        self.then()


@pytest.fixture
def both_ready(loop: Loop) -> Iterator[tuple[int, int]]:
    """Two descriptors that will be ready in the same batch, once they are watched."""
    with ExitStack() as stack:
        pairs = [socket.socketpair() for _ in range(2)]
        for ours, theirs in pairs:
            stack.enter_context(ours)
            stack.enter_context(theirs)
            theirs.send(b"x")
        yield pairs[0][0].fileno(), pairs[1][0].fileno()


def test_the_outbox_is_sent_in_its_order_after_all_handlers_of_the_batch(loop, both_ready):
    events: list[object] = []
    sink, sender = Sink(events), Sender(events)

    def handle(fd: int, mask: int) -> None:
        loop.reactor.remove(fd)
        events.append("handler")
        loop.reactor.outbox += [(sink, b"%d of %d" % (part, len(events)), sender, True) for part in (1, 2)]

    loop.do(lambda: [loop.reactor.add(fd, READ, partial(handle, fd)) for fd in both_ready])
    eventually(lambda: len(events) == 10, "everything")
    assert events[:6] == ["handler", "handler", b"1 of 1", b"2 of 1", b"1 of 2", b"2 of 2"]
    assert events[6:] == [sender] * 4


@pytest.mark.parametrize(
    ("takes", "rest"),
    [(5, b""), (3, b"lo"), (0, b"hello"), (BlockingIOError(), b"hello"), (BrokenPipeError(), None)],
    ids=["all", "some", "nothing", "it would block", "lost"],
)
@pytest.mark.parametrize("asks", [True, False], ids=["asks", "does not ask"])
def test_who_sends_is_told_what_is_left_and_that_nothing_is_only_if_it_asks(loop, takes, rest, asks):
    """And what becomes of one concerns nobody else."""
    events: list[object] = []
    sink, other, sender, second = Sink(events, takes), Sink(events), Sender(events), Sender(events)
    loop.do(lambda: loop.reactor.outbox.extend([(sink, b"hello", sender, asks), (other, b"there", second, True)]))
    told = [(sink, rest)] if rest != b"" else [sender] * asks
    loop.do(lambda: None)
    assert events[:2] == [b"hello", b"there"]
    assert len(events) == 3 + len(told)
    assert all(event in events for event in [*told, second])


def test_a_real_socket_takes_what_it_has_room_for(loop, pair):
    ours, theirs = pair
    sender = Sender([])
    data = bytes(10_000_000)
    loop.do(lambda: loop.reactor.outbox.append((ours, data, sender, False)))
    assert sender.called.wait(PATIENCE)
    ((sink, rest),) = sender.events
    assert sink is ours
    assert 0 < len(rest) < len(data)
    theirs.close()
    loop.do(lambda: loop.reactor.outbox.append((ours, data, sender, False)))
    eventually(lambda: len(sender.events) == 2, "the second")
    assert sender.events[1] == (ours, None)


def test_a_sender_that_raises_ends_its_owner_and_nobody_else(loop):
    events: list[object] = []
    sink = Sink(events)
    bad = Sender(events, then=partial(Owner("in the sender").on_ready, READ))
    good = Sender(events)
    loop.do(lambda: loop.reactor.outbox.extend([(sink, b"1", bad, True), (sink, b"2", good, True)]))
    assert good.called.wait(PATIENCE)
    assert bad.crashes == ["in the sender"]
    assert good.crashes == []
    assert loop.errors == [("reactor: Sender.on_sent", "in the sender")]


def test_what_comes_of_sending_is_sent_before_the_next_batch(loop, pair):
    """A session that has passed an answer on may send the next request of somebody who waited for that."""
    ours, theirs = pair
    theirs.send(b"x")
    events: list[object] = []
    sink = Sink(events)
    last = Sender(events)
    second = Sender(events, then=lambda: loop.reactor.outbox.append((sink, b"3", last, False)))
    first = Sender(events, then=lambda: loop.reactor.outbox.append((sink, b"2", second, True)))

    def handle(mask: int) -> None:
        if events:
            events.append("next batch")
            loop.reactor.remove(ours.fileno())
        else:
            loop.reactor.outbox.append((sink, b"1", first, True))

    loop.do(lambda: loop.reactor.add(ours.fileno(), READ, handle))
    eventually(lambda: "next batch" in events, "the next batch")
    assert events == [b"1", first, b"2", second, b"3", "next batch"]


@pytest.mark.parametrize("by", ["call_soon", "defer", "expired"])
def test_whatever_fills_the_outbox_has_it_sent(loop, clock, by):
    """Nothing else happens that the loop could wake up for."""
    events: list[object] = []
    sender = Sender(events)

    class Late(Owner):
        def expired(self, now: float) -> None:
            loop.reactor.timed.discard(self)
            fill()

    def fill() -> None:
        loop.reactor.outbox.append((Sink(events), b"hello", sender, True))

    if by == "call_soon":
        loop.reactor.call_soon(fill)
    elif by == "defer":
        loop.reactor.call_soon(loop.reactor.defer, fill)
    else:
        late = Late()
        late.deadline = clock.now + 1
        loop.do(lambda: loop.reactor.timed.add(late))
        clock.now += 2
    assert sender.called.wait(PATIENCE)
    assert events[0] == b"hello"


def test_each_call_has_sent_what_it_had_to_send_when_the_next_one_is_made(loop):
    events: list[object] = []
    sink, sender = Sink(events), Sender(events)

    def fill(data: bytes) -> None:
        loop.reactor.outbox.append((sink, data, sender, True))

    loop.do(lambda: [loop.reactor.defer(fill, data) for data in (b"1", b"2")])
    loop.do(lambda: None)
    assert events == [b"1", sender, b"2", sender]


def test_who_is_about_to_send_may_ask_what_has_come_since_the_batch_began(loop, pair):
    """And the system is asked once for all of an outbox."""
    ours, theirs = pair
    seen: list[bool] = []

    class Careful(Sink):
        def send(self, data: bytes, flags: int) -> int:
            seen.append(loop.reactor.may_be_ready(ours.fileno()))
            theirs.send(b"x")
            return super().send(data, flags)

    sink, last = Careful([]), Sender([])
    second = Sender([], then=lambda: loop.reactor.outbox.append((sink, b"3", last, True)))
    loop.do(lambda: loop.reactor.add(ours.fileno(), READ, lambda mask: ours.recv(100)))
    loop.do(lambda: loop.reactor.outbox.extend([(sink, b"1", last, False), (sink, b"2", second, True)]))
    assert last.called.wait(PATIENCE)
    assert seen == [False, False, True]


def test_where_as_much_is_ready_as_can_be_told_anything_may_be(loop, pair, monkeypatch):
    monkeypatch.setattr(reactor_module, "MOST_EVENTS", 1)
    ours, theirs = pair
    asked: list[bool] = []

    def ask() -> None:
        asked.append(loop.reactor.may_be_ready(-1))

    def handle(mask: int) -> None:
        ask()
        ours.recv(1)

    loop.do(ask)
    loop.do(lambda: loop.reactor.add(ours.fileno(), READ, handle))
    theirs.send(b"x")
    eventually(lambda: len(asked) == 2, "the byte is there")
    assert asked == [False, True]


def test_a_last_call_sends_what_it_has_to_send(portable):
    """The last words of the balancer, just before it stops the loop."""
    events: list[object] = []
    reactor = Reactor(portable=portable, on_error=lambda where, error: None)
    reactor.call_soon(lambda: reactor.outbox.append((Sink(events), b"bye", Sender(events), False)))
    reactor.start()
    reactor.stop()
    assert events == [b"bye"]


# Bugs -------------------------------------------------------------------------------------------------------------


def test_a_handler_that_raises_ends_its_owner_and_nobody_else(loop, pair):
    ours, theirs = pair
    owner, other = Owner(problem="in the handler"), Owner()
    loop.do(lambda: loop.reactor.add(ours.fileno(), READ, owner.on_ready))
    theirs.send(b"x")
    eventually(lambda: owner.crashes, "a crash that is told")
    loop.do(lambda: loop.reactor.remove(ours.fileno()))
    assert owner.crashes[0] == "in the handler"
    assert loop.errors[0] == ("reactor: Owner.on_ready", "in the handler")
    loop.reactor.call_soon(other.works)
    assert other.called.wait(PATIENCE)


def test_a_call_that_raises_ends_its_owner(loop):
    owner = Owner(problem="in the call")
    loop.reactor.call_soon(partial(owner.on_ready, READ))
    eventually(lambda: owner.crashes, "a crash that is told")
    assert loop.errors == [("reactor: Owner.on_ready", "in the call")]


def test_a_deadline_that_raises_ends_its_owner(loop, clock):
    owner = Owner(problem="in the deadline")
    owner.deadline = clock.now
    loop.do(lambda: loop.reactor.timed.add(owner))
    clock.now += 1
    eventually(lambda: owner.crashes, "a crash that is told")
    assert loop.errors == [("reactor: Owner.expired", "in the deadline")]


def test_a_last_word_that_raises_is_told_too(loop):
    owner = Owner(problem="first", second="second")
    loop.reactor.call_soon(owner.on_ready, READ)
    eventually(lambda: len(loop.errors) == 2, "both errors")
    assert loop.errors[1] == ("reactor: cleaning up after Owner.on_ready", "second")
    loop.do(lambda: None)


def test_a_call_that_raises_leaves_its_caller_unharmed(loop):
    """One session gives back what another waits for: what comes of that is the other's matter."""
    owner = Owner(problem="not the caller's")
    assert loop.do(lambda: loop.reactor.call(owner.on_ready, READ) or "went on") == "went on"
    assert owner.crashes == ["not the caller's"]


# The end ----------------------------------------------------------------------------------------------------------


def test_what_was_asked_for_before_the_stop_is_still_done(portable):
    """The balancer's last words, which close idle connections, are said just before it stops the loop."""
    reactor = Reactor(portable=portable, on_error=lambda where, error: None)
    busy, go_on = threading.Event(), threading.Event()
    made: list[str] = []

    def keep_busy() -> None:
        busy.set()
        assert go_on.wait(PATIENCE)

    reactor.start()
    reactor.call_soon(keep_busy)
    assert busy.wait(PATIENCE)
    reactor.call_soon(made.append, "called")  # too late for this batch, and there is to be no other
    stopper = threading.Thread(target=reactor.stop)
    stopper.start()
    eventually(lambda: reactor._stopped, "a stop that has begun")
    go_on.set()
    stopper.join(PATIENCE)
    assert made == ["called"]


def test_a_call_after_the_stop_harms_nobody(portable):
    """A pump may report after the loop has ended."""
    reactor = Reactor(portable=portable, on_error=lambda where, error: None)
    reactor.start()
    reactor.stop()
    reactor.call_soon(pytest.fail, "nobody is there to call this")


def test_a_reactor_that_never_ran_can_be_stopped(portable):
    before = len(os.listdir("/dev/fd"))
    Reactor(portable=portable, on_error=lambda where, error: None).stop()
    assert len(os.listdir("/dev/fd")) == before
