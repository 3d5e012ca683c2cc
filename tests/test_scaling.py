"""Backends that come and go with the load: the decision by its figures, and what follows, with a clock in the hand."""

from __future__ import annotations

import itertools
import math
import random
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from balancer import scaling
from balancer.config import Scaling, Server
from balancer.scaling import LOOK, PORT_REST, SAMPLE, SOON, WINDOW, Figures, Load, Meter, Scaler, decide, reason
from balancer.supervisor import LONGEST_PAUSE, STEADY, Supervisor
from conftest import PATIENCE, eventually
from programs import free_ports

SETTINGS = Scaling(
    command=("program", "{port}"),
    ports=(9001, 9010),
    min=1,
    max=8,
    target_active=10,
    idle_stop=300,
    pause=5,
    start_timeout=30,
)
ASLEEP = replace(SETTINGS, min=0)
CALM = Figures(
    wanted=1, serving=1, waiting=0, load=0, floor=0, peak=math.inf, idle=0, since_step=math.inf, since_growth=math.inf
)


def figures(wanted: int, **others: float) -> Figures:
    """All of them serve, nothing has changed for long, and whether fewer would do is not known."""
    return CALM._replace(**{"wanted": wanted, "serving": wanted, "floor": others.get("load", 0), **others})


# The decision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("load", "wanted"), [(0, 2), (19.9, 2), (20, 2), (20.1, 3), (30, 3), (30.1, 4), (79, 8), (80.1, 8), (1e9, 8)]
)
def test_as_many_as_bring_the_load_to_its_target_at_once_and_at_most_max(load: float, wanted: int):
    assert decide(SETTINGS, figures(2, load=load)) == wanted


def test_load_that_has_not_been_too_much_for_long_is_borne():
    assert decide(SETTINGS, figures(2, load=80, floor=20)) == 2
    assert decide(SETTINGS, figures(2, load=80, floor=20.1)) == 8


def test_more_is_never_answered_by_fewer():
    answers = [decide(SETTINGS, figures(3, load=load, peak=load)) for load in range(200)]
    assert answers == sorted(answers)


@pytest.mark.parametrize(
    "too_early", [{"since_step": 4.9}, {"since_growth": WINDOW - 0.1}, {"serving": 1}, {"serving": 0}]
)
def test_next_step_up_waits_for_what_the_last_one_brings(too_early: dict[str, float]):
    """A backlog that grew while nobody served would else be taken for a load that needs everybody."""
    assert decide(SETTINGS, figures(2, load=80)) == 8
    assert decide(SETTINGS, figures(2, load=80)._replace(**too_early)) == 2


@pytest.mark.parametrize(("peak", "wanted"), [(0, 3), (21, 3), (21.1, 4), (40, 4), (math.inf, 4)])
def test_one_goes_when_the_others_would_be_well_below_the_target_for_long(peak: float, wanted: int):
    assert decide(SETTINGS, figures(4, peak=peak)) == wanted


def test_one_goes_even_if_another_has_never_served():
    """One that cannot be started must not keep others."""
    assert decide(SETTINGS, figures(4, peak=0, serving=2)) == 3


def test_next_one_goes_after_the_pause():
    assert decide(SETTINGS, figures(4, peak=0, since_step=4.9)) == 4


def test_what_goes_up_a_step_does_not_come_down_it():
    """The hysteresis: a load that stays as it is brings about one step at most."""
    for load in [tenth / 10 for tenth in range(1000)]:
        for wanted in range(1, 9):
            risen = decide(SETTINGS, figures(wanted, load=load, peak=load))
            again = decide(SETTINGS, figures(risen, load=load, peak=load))
            assert again == risen or again < risen <= wanted, (load, wanted)


def test_min_and_max_hold_at_once():
    just_now = {"since_step": 0, "since_growth": 0}
    assert decide(replace(SETTINGS, min=3), figures(0, **just_now)) == 3
    assert decide(replace(SETTINGS, max=2), figures(8, load=80, **just_now)) == 2
    assert decide(SETTINGS, figures(1, peak=0, idle=math.inf)) == 1


def test_last_one_goes_only_after_a_time_without_any_request():
    assert decide(ASLEEP, figures(1, peak=0, idle=299.9)) == 1
    assert decide(ASLEEP, figures(1, peak=0, idle=300)) == 0
    assert decide(ASLEEP, figures(1, peak=0, idle=300, since_step=4.9)) == 1


def test_first_request_wakes_one_without_a_pause_and_many_wake_no_more():
    assert decide(ASLEEP, figures(0, idle=math.inf)) == 0
    for waiting in (1, 1000):
        assert decide(ASLEEP, figures(0, waiting=waiting, load=waiting, since_step=0)) == 1


@pytest.mark.parametrize(
    ("settings", "before", "after", "words"),
    [
        (SETTINGS, figures(0), 1, "min is 1"),
        (ASLEEP, figures(0, waiting=3), 1, "a request waits"),
        (SETTINGS, figures(1, load=24.51), 3, "24.5 requests in hand, 10 for each are the target"),
        (replace(SETTINGS, max=2), figures(4), 2, "max is 2"),
        (SETTINGS, figures(4, peak=3.2), 3, "at most 3.2 requests in hand for 300 s"),
        (ASLEEP, figures(1, peak=0, idle=300), 0, "no request for 300 s"),
    ],
)
def test_each_step_has_its_reason_in_words(settings: Scaling, before: Figures, after: int, words: str):
    assert decide(settings, before) == after
    assert reason(settings, before, after) == words


# The figures ------------------------------------------------------------------------------------------------------


class Metered:
    """A meter and a clock."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.meter = Meter(self.now)

    def add(self, *loads: int, every: float = SAMPLE, memory: float = 30.0) -> None:
        for load in loads:
            self.now += every
            self.meter.add(self.now, Load(load, 0, 0), memory)


def test_average_is_that_of_the_last_window():
    it = Metered()
    it.add(*[100] * 50, *[4] * 5, *[8] * 5)
    assert it.meter.average == 6


def test_floor_is_the_lowest_average_of_the_last_window():
    it = Metered()
    it.add(*[0] * 50, *[10] * 15)
    assert it.meter.floor == 6
    it.add(*[10] * 5)
    assert it.meter.floor == 10


def test_load_is_what_is_in_hand_and_what_waits():
    meter = Meter(0)
    meter.add(1, Load(3, 4, 0), 30)
    assert meter.average == 7


def test_peak_is_not_known_before_that_time_has_passed():
    it = Metered()
    it.add(*[1] * 149)
    assert it.meter.peak(it.now, 30) == math.inf
    it.add(1, 1)
    assert it.meter.peak(it.now, 30) == 1


def test_peak_is_remembered_for_that_time_and_not_much_longer():
    it = Metered()
    it.add(*[0] * 200, *[10] * 10, *[0] * 140)
    assert it.meter.peak(it.now, 30) == 10
    it.add(*[0] * 30)
    assert it.meter.peak(it.now, 30) == 0


def test_peak_over_weeks_takes_no_more_memory_than_over_seconds():
    it = Metered()
    it.add(*range(2000), every=1000, memory=1_000_000)
    assert len(it.meter._peaks) <= scaling.PEAKS + 2
    assert it.meter.peak(it.now, 1_000_000) == 1999


@pytest.mark.parametrize("load", [Load(1, 0, 5), Load(0, 1, 5), Load(0, 0, 6)])
def test_request_is_noticed_in_hand_or_waiting_or_when_it_was_over_between_two_samples(load: Load):
    meter = Meter(0)
    meter.add(1, Load(0, 0, 5), 30)
    meter.add(2, Load(0, 0, 5), 30)
    assert meter.idle(10) == 9
    meter.add(11, load, 30)
    assert meter.idle(12) == 1


def test_instance_that_leaves_with_its_counts_is_no_request():
    meter = Meter(0)
    meter.add(1, Load(0, 0, 5), 30)
    meter.add(2, Load(0, 0, 2), 30)
    assert meter.idle(3) == 2


# What follows: instances that are run by fakes --------------------------------------------------------------------


class Runner:
    """Stands for the supervisor: notes what it is told, and tells ends when the test says so."""

    def __init__(self) -> None:
        self.commands: dict[int, Server] = {}
        self.on_end: dict[int, Callable[[Server, float], None]] = {}
        self.dismissed: list[int] = []

    def run(self, server: Server, on_end: Callable[[Server, float], None]) -> None:
        assert server.port not in self.commands
        self.commands[server.port] = server
        self.on_end[server.port] = on_end

    def end(self, server: Server) -> None:
        self.dismissed.append(server.port)


class Stage:
    """A scaler whose rounds are plain calls; programs that start at once, unless told otherwise."""

    def __init__(self, settings: Scaling | None = SETTINGS, others: Sequence[Server] = (), drain: float = 30.0) -> None:
        self.now = 1000.0
        self.runner = Runner()
        self.demand = 0  # requests that are in hand of those that serve, or wait for one
        self.leased = 0
        self.starts = self.passes = self.obeys = True
        self.answering: set[int] = set()  # ports of foreign programs
        self.busy: set[int] = set()  # ports of those that have work in hand when they are withdrawn
        self.published: tuple[Server, ...] = ()
        self.events: list[tuple[str, str]] = []
        self.steps: list[tuple[float, int]] = []
        self.scaler = Scaler(
            self.runner,
            load=self.load,
            publish=self.publish,
            serves=lambda server: self.passes and server in self.published,
            drained=lambda server: server.port not in self.busy,
            on_event=lambda level, text: self.events.append((level, text)),
            on_error=lambda where, error: pytest.fail(f"{where}: {error!r}"),
            clock=lambda: self.now,
            answers=lambda server: server.port in self.answering or (self.starts and server.port in self.ports),
        )
        self.scaler.configure(settings, others, drain)

    def load(self) -> Load:
        if not self.published:
            return Load(0, self.demand, self.leased)
        self.leased += self.demand
        return Load(self.demand, 0, self.leased)

    def publish(self, servers: Sequence[Server]) -> None:
        self.published = tuple(servers)

    @property
    def ports(self) -> list[int]:
        """Those of the programs that run."""
        return sorted(self.runner.commands)

    @property
    def serving(self) -> list[int]:
        return sorted(server.port for server in self.published)

    @property
    def texts(self) -> list[str]:
        return [text for _, text in self.events]

    @property
    def shown(self) -> tuple[int, int, int]:
        found = self.scaler.describe()
        return found["instances"], found["starting"], found["wanted"]

    def round(self, later: float = 0.0) -> float | None:
        self.now += later
        pause = self.scaler.round()
        if self.obeys:
            for port in self.runner.dismissed:
                self.die(port)
            self.runner.dismissed.clear()
        wanted = (self.scaler.describe() or {"wanted": 0})["wanted"]
        if not self.steps or self.steps[-1][1] != wanted:
            self.steps.append((self.now, wanted))
        return pause

    def pass_time(self, seconds: float, every: float = SAMPLE) -> None:
        for _ in range(math.ceil(seconds / every - 1e-9)):
            self.round(every)

    def settle(self) -> None:
        """What needs no time: start, be published, pass a probe, leave."""
        for _ in range(10):
            self.round()

    def die(self, port: int, lived: float = 0.0) -> None:
        self.runner.on_end[port](self.runner.commands.pop(port), lived)


def test_as_many_as_min_are_started_and_published_without_their_command():
    """A server with a command is one of the configuration, which the supervisor would start again by itself."""
    it = Stage(replace(SETTINGS, min=2, host="::1"))
    it.settle()
    assert it.runner.commands[9001] == Server("auto-9001", "::1", 9001, command=SETTINGS.command)
    assert it.published == (Server("auto-9001", "::1", 9001), Server("auto-9002", "::1", 9002))
    assert it.texts == ["scaling from 0 to 2 instances: min is 2"]


def test_published_as_soon_as_something_accepts_and_serves_when_a_probe_has_passed():
    it = Stage()
    it.starts = it.passes = False
    it.round()
    assert it.round(LOOK) == LOOK
    assert it.ports == [9001]
    assert it.published == ()
    it.starts = True
    it.round(LOOK)
    assert it.serving == [9001]
    assert it.shown == (0, 1, 1)
    assert it.scaler.starting
    it.passes = True
    assert it.round(LOOK) > LOOK
    assert it.shown == (1, 0, 1)
    assert not it.scaler.starting


def test_load_that_rises_is_followed_by_as_many_as_it_needs():
    it = Stage()
    it.pass_time(10)
    it.demand = 44
    it.pass_time(1.5 * WINDOW)
    it.settle()
    assert it.serving == [9001, 9002, 9003, 9004, 9005]
    assert it.scaler.describe() == {
        "instances": 5,
        "starting": 0,
        "wanted": 5,
        "min": 1,
        "max": 8,
        "target_active": 10,
        "last_step": it.texts[-1].removeprefix("scaling "),
    }


def test_load_that_falls_is_followed_one_by_one_and_the_youngest_go_first():
    it = Stage()
    it.pass_time(10)
    it.demand = 44
    it.pass_time(30)
    it.demand = 13
    fell = it.now
    it.pass_time(400)
    assert it.ports == [9001, 9002]
    times, falls = zip(*[(at - fell, wanted) for at, wanted in it.steps if at > fell], strict=True)
    assert falls == (4, 3, 2)
    assert times[0] == pytest.approx(300, abs=300 / scaling.PEAKS + WINDOW)
    assert times[2] - times[0] == pytest.approx(10, abs=2 * SAMPLE)


def test_load_that_swings_around_the_mark_does_not_make_instances_flap():
    it = Stage()
    for turn in range(200):
        it.demand = 8 if turn % 2 else 13
        it.pass_time(3.1)
    assert [wanted for _, wanted in it.steps] == [1, 2]


@pytest.mark.parametrize("seed", range(5))
def test_whatever_the_load_does_steps_have_their_pause_and_those_down_come_late(seed: int):
    settings = replace(SETTINGS, min=0, idle_stop=20, pause=4)
    dice = random.Random(seed)
    it = Stage(settings)
    for _ in range(60):
        it.demand = dice.choice([0, 0, 5, 15, 30, 200])
        it.pass_time(dice.choice([0.4, 2, 5, 15, 40]))
    it.demand = 0
    it.pass_time(100)
    assert it.ports == []
    rose = -math.inf
    for (before, was), (at, wanted) in itertools.pairwise(it.steps):
        assert wanted <= settings.max
        assert was == 0 or at - before > settings.pause - 0.001
        if wanted > was:
            rose = at
        else:
            assert wanted == was - 1
            assert at - rose > settings.idle_stop - WINDOW
    assert len(it.steps) > 10


def test_to_zero_without_requests_and_back_with_the_first():
    it = Stage(ASLEEP)
    it.settle()
    assert it.ports == []
    assert not it.scaler.starting
    it.demand = 1
    it.scaler.wake()
    assert it.scaler.starting
    it.round()
    assert it.scaler.starting
    it.settle()
    assert it.serving == [9001]
    assert not it.scaler.starting
    it.demand = 0
    it.pass_time(290)
    assert it.serving == [9001]
    it.pass_time(20)
    assert it.ports == []
    assert it.texts == ["scaling from 0 to 1 instances: a request waits", it.texts[-1]]
    assert it.texts[-1] == "scaling from 1 to 0 instances: no request for 300 s"


def test_many_that_wake_it_at_once_start_one():
    it = Stage(ASLEEP)
    it.starts = False
    it.round()
    it.demand = 1000
    for _ in range(1000):
        it.scaler.wake()
    for _ in range(100):
        it.scaler.wake()
        it.round(SAMPLE)
    assert it.ports == [9001]


def test_one_that_is_awake_is_not_woken():
    """Its only instance may be down: there is nothing to be started, and waiting would be in vain."""
    it = Stage()
    it.settle()
    it.scaler.wake()
    assert not it.scaler.starting


def test_request_that_comes_while_the_last_one_leaves_starts_another():
    it = Stage(ASLEEP)
    it.settle()
    it.scaler.wake()
    it.settle()
    it.busy = {9001}
    it.pass_time(302, every=1)
    assert it.serving == []
    it.scaler.wake()
    it.settle()
    assert it.serving == [9002]
    assert it.ports == [9001, 9002]


def test_requests_may_wait_even_before_the_first_round():
    """The listener and the scaler start at the same time."""
    assert Stage(ASLEEP).scaler.starting
    assert not Stage(None).scaler.starting


def test_one_that_is_withdrawn_ends_its_work_before_it_is_stopped():
    it = Stage(replace(SETTINGS, min=2))
    it.settle()
    it.busy = {9002}
    it.scaler.configure(replace(SETTINGS, max=1))
    it.pass_time(25)
    assert it.serving == [9001]
    assert it.ports == [9001, 9002]
    it.busy = set()
    it.round()
    assert it.ports == [9001]


def test_one_whose_work_does_not_end_is_stopped_when_a_drain_may_take_no_longer():
    it = Stage(replace(SETTINGS, min=2))
    it.settle()
    it.busy = {9002}
    it.scaler.configure(replace(SETTINGS, max=1), drain=7)
    it.pass_time(6.9)
    assert it.ports == [9001, 9002]
    it.pass_time(0.4)
    assert it.ports == [9001]
    assert it.events[-1] == ("warning", "scaling: auto-9002 has work in hand after 7 s and is stopped all the same")


# Ports ------------------------------------------------------------------------------------------------------------


def test_port_where_something_answers_already_and_those_of_other_servers_are_not_taken():
    it = Stage(SETTINGS, others=[Server("a", "127.0.0.1", 9002), Server("auto-9003", "127.0.0.1", 80)])
    it.answering = {9001}
    it.settle()
    assert it.ports == [9004]


def test_port_rests_after_its_instance_while_there_are_others():
    it = Stage(replace(SETTINGS, ports=(9001, 9010)))
    it.settle()
    used = []
    for _ in range(3):
        used += it.ports
        it.die(it.ports[0], lived=STEADY)
        it.settle()
    it.pass_time(PORT_REST)
    it.die(it.ports[0], lived=STEADY)
    it.settle()
    assert [*used, *it.ports] == [9001, 9002, 9003, 9001]


def test_port_is_used_again_early_where_there_is_no_other():
    it = Stage(replace(SETTINGS, max=1, ports=(9001, 9001)))
    it.settle()
    it.die(9001, lived=STEADY)
    it.settle()
    assert it.serving == [9001]


def test_port_is_not_used_again_before_the_last_instance_there_is_done_with():
    it = Stage(replace(SETTINGS, max=1, ports=(9001, 9001)))
    it.settle()
    it.busy = {9001}
    it.die(9001, lived=STEADY)
    it.settle()
    assert it.ports == []
    it.busy = set()
    it.pass_time(2)
    assert it.serving == [9001]


def test_no_free_port_is_said_once_for_each_attempt():
    it = Stage(replace(SETTINGS, max=2, ports=(9001, 9002)))
    it.answering = {9001, 9002}
    it.pass_time(3)
    assert it.events[1:] == [
        ("error", "scaling: no port of 9001-9002 is free; the next one is started in 0.5 s"),
        ("error", "scaling: no port of 9001-9002 is free, 2 failures in a row; the next one is started in 1 s"),
        ("error", "scaling: no port of 9001-9002 is free, 3 failures in a row; the next one is started in 2 s"),
    ]
    it.answering = {9001}
    it.pass_time(2)
    assert it.serving == [9002]


# Failures ---------------------------------------------------------------------------------------------------------


def test_one_that_dies_is_withdrawn_at_once_and_replaced():
    it = Stage(replace(SETTINGS, min=2))
    it.settle()
    it.die(9001, lived=STEADY)
    it.starts = False
    it.round()
    assert it.serving == [9002]
    assert it.ports == [9002, 9003]
    assert it.scaler.starting


def test_crash_loop_backs_off_and_is_said_once_for_each_step():
    it = Stage()
    it.starts = False
    pauses = []
    for _ in range(9):
        it.round()
        [port] = it.ports
        it.die(port)
        it.round()
        died = it.now
        while not it.ports:
            it.round(SAMPLE)
        pauses.append(it.now - died)
    assert pauses == pytest.approx([0.5, 1, 2, 4, 8, 16, *[LONGEST_PAUSE] * 3], abs=SAMPLE)
    assert it.events[1:3] == [
        ("error", "scaling: auto-9001 ended before it served; the next one is started in 0.5 s"),
        ("error", "scaling: auto-9002 ended before it served, 2 failures in a row; the next one is started in 1 s"),
    ]
    assert len(it.events) == 1 + 9


def test_requests_wait_for_another_attempt_only_when_it_comes_soon():
    it = Stage()
    it.starts = False
    while it.scaler.starting:
        it.round(SAMPLE)
        for port in it.ports:
            it.die(port)
        it.round()
    assert re.search("3 failures in a row; the next one is started in 2 s", it.texts[-2])
    assert re.search(f"started in {2 * SOON:g} s", it.texts[-1])


def test_one_that_dies_young_again_and_again_is_a_crash_loop_too():
    it = Stage()
    it.settle()
    for _ in range(3):
        it.pass_time(5)
        it.die(it.ports[0], lived=5)
        it.round()
    assert it.events[-1] == (
        "error",
        "scaling: auto-9003 ended 5.0 s after its start, 3 failures in a row; the next one is started in 2 s",
    )


def test_crash_loop_is_over_when_one_has_lived_long_enough():
    it = Stage()
    it.settle()
    for lived in (1, 1, STEADY + 1, 1):
        it.pass_time(lived)
        it.die(it.ports[0], lived)
        it.pass_time(3)
    assert "failures in a row" not in it.texts[-1]


def test_many_that_crash_together_are_one_failure_and_then_one_is_tried_at_a_time():
    it = Stage(replace(SETTINGS, min=4))
    it.starts = False
    it.round()
    assert len(it.ports) == 4
    for port in it.ports:
        it.die(port)
        it.round()
    assert it.texts[1:] == ["scaling: auto-9001 ended before it served; the next one is started in 0.5 s"]
    it.pass_time(2)
    assert len(it.ports) == 1
    it.starts = True
    it.settle()
    assert len(it.serving) == 4


@pytest.mark.parametrize(("starts", "words"), [(False, "has accepted no connection"), (True, "has passed no probe")])
def test_one_that_does_not_get_ready_in_time_has_failed(starts: bool, words: str):
    it = Stage()
    it.starts, it.passes = starts, False
    it.pass_time(29.9)
    assert it.ports == [9001]
    it.pass_time(0.4)
    assert it.ports == []
    assert it.serving == []
    assert it.events[1:] == [
        ("error", f"scaling: auto-9001 {words} within 30 s; the next one is started in 0.5 s"),
    ]
    it.pass_time(1)
    assert it.ports == [9002]


# Another configuration --------------------------------------------------------------------------------------------


def test_other_limits_and_target_apply_at_once():
    it = Stage()
    it.settle()
    it.scaler.configure(replace(SETTINGS, min=3))
    it.settle()
    assert it.serving == [9001, 9002, 9003]
    it.scaler.configure(replace(SETTINGS, max=1))
    it.settle()
    assert it.ports == [9001]
    it.demand = 9
    it.pass_time(10)
    it.scaler.configure(replace(SETTINGS, target_active=3))
    it.settle()
    assert len(it.serving) == 3


def test_other_command_replaces_one_after_the_other_and_never_has_fewer():
    it = Stage(replace(SETTINGS, min=3))
    it.settle()
    it.scaler.configure(replace(SETTINGS, min=3, command=("other", "{port}")))
    for _ in range(30):
        it.round()
        assert 3 <= len(it.serving) <= 4
        assert len(it.ports) <= 5
    assert [server.command[0] for server in it.runner.commands.values()] == ["other"] * 3


def test_other_command_that_does_not_start_leaves_those_that_serve():
    it = Stage(replace(SETTINGS, min=2))
    it.settle()
    it.starts = False
    it.scaler.configure(replace(SETTINGS, min=2, command=("broken", "{port}")))
    for _ in range(20):
        it.pass_time(1)
        for port in it.ports:
            if it.runner.commands[port].command[0] == "broken":
                it.die(port)
    assert it.serving == [9001, 9002]
    assert "failures in a row" in it.texts[-1]


def test_mended_command_is_tried_at_once():
    it = Stage()
    it.starts = False
    for _ in range(30):
        it.round(SAMPLE)
        for port in it.ports:
            it.die(port)
    assert it.ports == []
    it.starts = True
    it.scaler.configure(replace(SETTINGS, command=("mended", "{port}")))
    it.settle()
    assert len(it.serving) == 1


def test_where_no_port_is_left_an_old_one_makes_room_for_a_new_one():
    it = Stage(replace(SETTINGS, min=2, max=2, ports=(9001, 9002)))
    it.settle()
    it.scaler.configure(replace(SETTINGS, min=2, max=2, ports=(9001, 9002), command=("other", "{port}")))
    for _ in range(30):
        it.round()
        assert len(it.serving) >= 1
    assert it.serving == [9001, 9002]
    assert {server.command[0] for server in it.runner.commands.values()} == {"other"}


def test_other_ports_that_are_all_taken_leave_those_that_serve():
    it = Stage(replace(SETTINGS, min=2))
    it.settle()
    it.answering = {8001, 8002}
    it.scaler.configure(replace(SETTINGS, min=2, max=2, ports=(8001, 8002)))
    it.pass_time(10)
    assert it.serving == [9001, 9002]
    it.answering = set()
    it.pass_time(10)
    assert it.serving == [8001, 8002]


def test_instance_whose_address_a_server_gets_is_replaced():
    it = Stage()
    it.settle()
    it.scaler.configure(SETTINGS, others=[Server("a", "127.0.0.1", 9001)])
    it.settle()
    assert it.ports == [9002]


def test_none_stops_all_and_settings_begin_again():
    it = Stage(replace(SETTINGS, min=3))
    it.settle()
    it.busy = {9002}
    it.scaler.configure(None)
    it.settle()
    assert it.serving == []
    assert it.ports == [9002]
    assert it.scaler.describe() is None
    assert not it.scaler.starting
    it.busy = set()
    it.settle()
    assert it.round() is None
    assert it.ports == []
    it.scaler.configure(SETTINGS)
    it.settle()
    assert len(it.serving) == 1


# The thread, and real programs ------------------------------------------------------------------------------------


@pytest.fixture
def closing() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_thread_is_woken_and_ends(closing: ExitStack, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scaling, "SAMPLE", PATIENCE * 10)
    it = Stage(ASLEEP)
    closing.callback(it.scaler.stop)
    it.scaler.start()
    eventually(lambda: it.scaler.describe() is not None, "the first round")
    assert "scaling" in [thread.name for thread in threading.enumerate()]
    it.scaler.wake()
    eventually(lambda: it.serving == [9001], "the instance")


def test_error_in_what_it_calls_is_told_and_ends_nothing(closing: ExitStack, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scaling, "TROUBLE_PAUSE", 0.01)
    it = Stage()
    told: list[str] = []
    it.scaler._publish, publish = lambda servers: 1 / 0, it.scaler._publish
    it.scaler._on_error = lambda where, error: told.append(f"{where}: {error}")
    closing.callback(it.scaler.stop)
    it.scaler.start()
    eventually(lambda: told, "the error")
    assert told[0] == "scaling: division by zero"
    it.scaler._publish = publish
    eventually(lambda: it.serving == [9001], "the instance")


class Journal:
    def __init__(self) -> None:
        self.texts: list[str] = []

    def event(self, level: str, text: str) -> None:
        self.texts.append(text)


def test_real_programs_start_serve_and_end(closing: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """From 0 to 2 and back to 0, with a supervisor, sockets and both threads."""
    monkeypatch.setattr(scaling, "WINDOW", 0.1)
    monkeypatch.setattr(scaling, "SAMPLE", 0.02)
    program = "import socket, sys, signal; s = socket.create_server((sys.argv[1], int(sys.argv[2]))); signal.pause()"
    low = free_ports(1)[0]
    settings = replace(
        ASLEEP, command=("{python}", "-c", program, "{host}", "{port}"), ports=(low, low + 30), idle_stop=0.3, pause=0.1
    )
    it, journal = Stage(), Journal()
    supervisor = Supervisor([], tmp_path, journal)
    scaler = Scaler(
        supervisor,
        load=it.load,
        publish=it.publish,
        serves=lambda server: True,
        drained=lambda server: True,
        on_event=journal.event,
        on_error=lambda where, error: journal.event("error", repr(error)),
    )
    closing.callback(supervisor.stop)
    closing.callback(scaler.stop)
    scaler.configure(settings)
    supervisor.start()
    scaler.start()
    eventually(lambda: not scaler.starting, "the first round")
    it.demand = 15
    scaler.wake()
    eventually(lambda: len(it.published) == 2, "2 instances")
    for server in it.published:
        socket.create_connection((server.host, server.port), PATIENCE).close()
    it.demand = 0
    eventually(lambda: sum("was ended by SIGTERM" in text for text in journal.texts) == 2, "their ends")
    assert [text.split(":")[0] for text in journal.texts if text.startswith("scaling")] == [
        "scaling from 0 to 1 instances",
        "scaling from 1 to 2 instances",
        "scaling from 2 to 1 instances",
        "scaling from 1 to 0 instances",
    ]
    assert any(re.match(rf"backend auto-{low}: process \d+ started: {sys.executable}", text) for text in journal.texts)
