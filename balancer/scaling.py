"""Backends that the balancer runs as many of as the load needs: when to have more, when fewer, and how that is done.

`decide` is a pure function of figures. The load is the requests that the instances have in hand and those that wait for
a backend, averaged over the last WINDOW seconds.

- More: when the load has been above target_active for each instance for WINDOW seconds, as many are added at once as
  bring it to target_active, up to `max`. First those of the step before must serve, and must have served for WINDOW
  seconds: until then the load is a backlog, which says how slow the start was and not how much work there is.
- Fewer: one at a time, when one fewer would still have no more than LOW of target_active each, and would have had that
  all through the last `idle_stop` seconds. The load that goes up a step is therefore far from the one that goes down
  it, and one that swings is followed at its peaks (as Kubernetes does by its stabilization window).
- The last one goes, where `min` is 0, after `idle_stop` seconds without any request.
- From 0 to 1 it goes at once when a request finds no backend, and no further for however many requests that wait.
- `min` and `max` hold at once whatever the load is. Between all other steps there are `pause` seconds.

An instance is started at the lowest port of the range that is free, put among the backends when something accepts
there, and counts as serving from its first passed probe on; it has failed when that has not come about within
`start_timeout`. To be stopped it is withdrawn from the backends first, and ends what it has in hand, for as long as a
drain may take. One that fails to start, or dies within STEADY seconds, is replaced after a pause that doubles each
time, and then one is started at a time, until one has lived so long; one that dies later is replaced at once.

A change of the command replaces the instances one by one: a new one is started beside them, and when it serves an old
one is withdrawn; where no port is left for that, the other way round. Old ones that do not serve yet go at once.

All is done by the thread "scaling", which calls out without a lock: other threads leave a message and wake it.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from balancer.config import Scaling, Server
from balancer.supervisor import FIRST_PAUSE, LONGEST_PAUSE, STEADY, Supervisor, answers

WINDOW = 2.0
"""Seconds over which the load is averaged."""
SAMPLE = 0.2
"""Seconds between two samples of the load."""
LOOK = 0.05
"""Seconds between two looks at an instance that is being started."""
LOW = 0.7
"""Share of target_active that each instance may have at most after one was stopped."""
PEAKS = 30
"""Parts of `idle_stop` of which each has its peak remembered: how exactly that time is kept."""
PORT_REST = 60.0
"""Seconds for which a port is not used again as long as there are others: whoever still knows it by its last instance
should find nobody there."""
SOON = 2.0
"""Seconds: a request may wait for the next attempt at a start when that is not further away."""
TROUBLE_PAUSE = 1.0
"""Seconds until the next round after one that failed by an error of the program."""


class Load(NamedTuple):
    """What the instances have to do at this moment."""

    active: int  # requests (in TCP mode connections) in hand
    waiting: int  # requests that wait for a backend, of whatever kind
    leased: int  # requests that were ever given to instances; that this has grown tells of those between two samples


class Figures(NamedTuple):
    """What `decide` goes by. Times are in seconds."""

    wanted: int  # instances, as it was decided last
    serving: int  # instances that have passed their first probe
    waiting: int  # requests that wait for a backend, or have asked for one
    load: float  # average over WINDOW
    floor: float  # the lowest such average of the last WINDOW seconds
    peak: float  # the highest such average of the last `idle_stop` seconds; infinite as long as that is not known
    idle: float  # since there was a request
    since_step: float
    since_growth: float  # since an instance has begun to serve


def decide(settings: Scaling, figures: Figures) -> int:
    """How many instances there should be."""
    wanted = min(max(figures.wanted, settings.min), settings.max)
    if wanted == 0:
        return 1 if figures.waiting else 0
    if figures.since_step < settings.pause:
        return wanted
    if _is_too_much(settings, figures, wanted):
        return min(math.ceil(figures.load / settings.target_active - 1e-9), settings.max)
    if wanted > settings.min and _one_fewer_suffices(settings, figures, wanted - 1):
        return wanted - 1
    return wanted


def _is_too_much(settings: Scaling, figures: Figures, wanted: int) -> bool:
    is_settled = figures.serving >= wanted and figures.since_growth >= WINDOW
    return is_settled and figures.floor > settings.target_active * wanted


def _one_fewer_suffices(settings: Scaling, figures: Figures, fewer: int) -> bool:
    if fewer == 0:
        return figures.idle >= settings.idle_stop
    return figures.peak <= LOW * settings.target_active * fewer


def reason(settings: Scaling, figures: Figures, wanted: int) -> str:
    """Why `decide` came to another number than there was, in words."""
    if wanted > figures.wanted:
        if wanted == settings.min:
            return f"min is {settings.min}"
        if figures.wanted == 0:
            return "a request waits"
        return f"{figures.load:.1f} requests in hand, {settings.target_active:g} for each are the target"
    if wanted == settings.max:
        return f"max is {settings.max}"
    if wanted == 0:
        return f"no request for {settings.idle_stop:g} s"
    return f"at most {figures.peak:.1f} requests in hand for {settings.idle_stop:g} s"


class Meter:
    """Remembers the load: samples of the last WINDOW seconds, their averages, and the peaks of these for longer."""

    def __init__(self, now: float) -> None:
        self._samples: deque[tuple[float, float]] = deque()  # when, and the load
        self._averages: deque[tuple[float, float]] = deque()
        self._peaks: deque[tuple[float, float]] = deque()  # when a part of the time began, and its highest average
        self._leased = 0
        self._busy_at = now

    def add(self, now: float, load: Load, memory: float) -> None:
        """Take a sample. `memory`: the seconds of which peaks are remembered."""
        if load.active or load.waiting or load.leased > self._leased:
            self._busy_at = now
        self._leased = load.leased
        self._samples.append((now, load.active + load.waiting))
        _forget_before(self._samples, now - WINDOW)
        average = sum(load for _, load in self._samples) / len(self._samples)
        self._averages.append((now, average))
        _forget_before(self._averages, now - WINDOW)
        if not self._peaks or now >= self._peaks[-1][0] + memory / PEAKS:
            self._peaks.append((now, average))
        else:
            began, highest = self._peaks.pop()
            self._peaks.append((began, max(highest, average)))
        while len(self._peaks) > 1 and self._peaks[1][0] <= now - memory:
            self._peaks.popleft()

    @property
    def average(self) -> float:
        """Over the last WINDOW seconds."""
        return self._averages[-1][1] if self._averages else 0.0

    @property
    def floor(self) -> float:
        """The lowest average of the last WINDOW seconds."""
        return min((average for _, average in self._averages), default=0.0)

    def peak(self, now: float, memory: float) -> float:
        """The highest average of the last `memory` seconds; infinite when there are no samples of so long."""
        if not self._peaks or self._peaks[0][0] > now - memory:
            return math.inf
        return max(highest for _, highest in self._peaks)

    def idle(self, now: float) -> float:
        """Seconds since there was a request."""
        return now - self._busy_at


def _forget_before(values: deque[tuple[float, float]], time: float) -> None:
    while values[0][0] <= time:
        values.popleft()


@dataclass(eq=False)
class Instance:
    """One process of the command, from the order to run it to its end."""

    server: Server  # as a backend: without the command, which is not the configuration's
    command: tuple[str, ...]
    started: float
    accepts: bool = False  # something has answered at its port
    serves: bool = False  # it has passed a probe
    withdrawn: float | None = None  # since when it is no backend any more
    dismissed: bool = False  # its process was told to end

    def __repr__(self) -> str:
        state = "leaving" if self.withdrawn is not None else "serves" if self.serves else "starting"
        return f"<Instance {self.server.id} {self.server.address} {state}>"


class Scaler:
    """Runs instances by the load, in the thread "scaling".

    load       what the instances have to do; asked a few times a second
    publish    makes these servers the instances among the backends: who is new counts as down until its first probe,
               which is made at once; who is not among them any more is given no more work
    serves     whether a server that was published passes its probes
    drained    whether a server that is not published any more has nothing in hand
    on_event   is given a level and a text for the log
    on_error   is given what went wrong and the error that nobody expected

    All of them are called without a lock, on the thread. `wake`, `starting` and `describe` are for any thread and never
    block; so is `configure`. `start` and `stop` belong to one caller, who holds no lock that `publish` needs; processes
    are ended by the supervisor's stop, not by this one's.
    """

    def __init__(
        self,
        supervisor: Supervisor,
        *,
        load: Callable[[], Load],
        publish: Callable[[Sequence[Server]], None],
        serves: Callable[[Server], bool],
        drained: Callable[[Server], bool],
        on_event: Callable[[str, str], None],
        on_error: Callable[[str, Exception], None],
        clock: Callable[[], float] = time.monotonic,
        answers: Callable[[Server], bool] = answers,
    ) -> None:
        self._supervisor = supervisor
        self._load = load
        self._publish = publish
        self._serves = serves
        self._drained = drained
        self._on_event = on_event
        self._on_error = on_error
        self._clock = clock
        self._answers = answers

        # Messages to the thread, and the event that says that there are some.
        self._message = threading.Event()
        self._configurations: deque[tuple[Scaling | None, Sequence[Server], float]] = deque(maxlen=1)
        self._endings: deque[tuple[Server, float]] = deque()
        self._woken = False
        self._stopping = False
        # What it says to others.
        self._asleep = False  # there are no instances, and one is started when it is woken
        self._pending = False  # there will soon be an instance more that serves
        self._description: dict[str, Any] | None = None

        self._thread: threading.Thread | None = None
        self._settings: Scaling | None = None
        self._others: Sequence[Server] = ()
        self._patience = 0.0  # seconds that an instance which is withdrawn is given to end what it has in hand
        self._meter = Meter(clock())
        self._sample_due = -math.inf
        self._waiting = 0  # as of the last sample
        self._wanted = 0
        self._stepped_at = self._grew_at = -math.inf
        self._last_step: str | None = None
        self._instances: list[Instance] = []
        self._published: Sequence[Server] = ()
        self._released: dict[int, tuple[float, Server]] = {}  # by port: when it became free, and who had it last
        self._failures = 0  # starts in a row that came to nothing
        self._failed_at = -math.inf
        self._start_due = -math.inf

    # For other threads ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread = threading.Thread(target=self._work, name="scaling", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; instances run on."""
        self._stopping = True
        self._message.set()
        if self._thread:
            self._thread.join()
            self._thread = None

    def configure(self, settings: Scaling | None, others: Sequence[Server] = (), drain: float = 30.0) -> None:
        """Change the settings; None stops all instances.

        `others` are the servers that are no instances: theirs are neither the ids nor the addresses. `drain` is the
        number of seconds that work in hand is given when an instance is to be stopped.
        """
        if settings:
            self._pending = True  # as far as is known before the thread has seen it
        self._configurations.append((settings, others, drain))
        self._message.set()

    def wake(self) -> None:
        """A request has found no backend: start one if there is none. Afterwards `starting` tells whether to wait."""
        if self._asleep and not self._woken:
            self._woken = True
            self._message.set()

    @property
    def starting(self) -> bool:
        """Does it make sense for a request to wait, because another instance will serve soon?"""
        return self._pending or self._woken

    def describe(self) -> dict[str, Any] | None:
        """Instances that serve, those that are being started, and how it came to that; None where nothing is scaled."""
        return self._description

    # The thread -----------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while not self._stopping:
            try:
                pause = self.round()
            except Exception as error:
                self._on_error("scaling", error)
                pause = TROUBLE_PAUSE
            self._message.wait(pause)
            self._message.clear()

    def round(self) -> float | None:
        """One turn of the thread: look at the load and at each instance once, decide, and do what follows from that.

        Returns the seconds until the next round; None when only a message can bring something to do.
        """
        now = self._clock()
        woken = self._woken
        self._take_configuration(now)
        self._take_endings(now)
        for instance in list(self._instances):
            if instance.withdrawn is not None:
                self._see_off(instance, now)
            elif self._settings and not instance.serves:
                self._await(instance, self._settings, now)
            elif instance.started > self._failed_at and now - instance.started >= STEADY:
                self._failures = 0
        self._decide(now, woken)
        self._reconcile(now)
        self._tell(now)
        if woken:
            self._woken = False
        return self._next_round(now)

    def _next_round(self, now: float) -> float | None:
        if any(not instance.serves for instance in self._present):
            return LOOK
        if self._settings:
            return max(0.0, self._sample_due - now)
        return SAMPLE if self._instances else None

    def _take_configuration(self, now: float) -> None:
        while self._configurations:
            before = self._settings
            self._settings, self._others, self._patience = self._configurations.popleft()
            if self._settings and not before:
                self._meter = Meter(now)
            elif self._settings and before and self._settings.command != before.command:
                self._failures = 0  # they were the old command's
                self._start_due = -math.inf

    def _take_endings(self, now: float) -> None:
        """Part with the instances whose processes have ended."""
        while self._endings:
            server, lived = self._endings.popleft()
            instance = next(instance for instance in self._instances if instance.server.address == server.address)
            self._instances.remove(instance)
            self._released[server.port] = now, instance.server
            if instance.withdrawn is not None:
                continue
            if not instance.serves:
                self._fail(instance.started, f"{server.id} ended before it served", now)
            elif lived < STEADY:
                self._fail(instance.started, f"{server.id} ended {lived:.1f} s after its start", now)

    def _ended(self, server: Server, lived: float) -> None:
        """On the supervisor's thread."""
        self._endings.append((server, lived))
        self._message.set()

    @property
    def _present(self) -> list[Instance]:
        """The instances that are to stay."""
        return [instance for instance in self._instances if instance.withdrawn is None]

    # The load -------------------------------------------------------------------------------------------------------

    def _decide(self, now: float, woken: bool) -> None:
        settings = self._settings
        if settings is None:
            self._wanted = 0
            self._asleep = False
            return
        if now >= self._sample_due or woken:
            load = self._load()
            self._waiting = max(load.waiting, int(woken))
            self._meter.add(now, load._replace(waiting=self._waiting), settings.idle_stop)
            self._sample_due = now + SAMPLE
        figures = Figures(
            wanted=self._wanted,
            serving=sum(instance.serves for instance in self._present),
            waiting=self._waiting,
            load=self._meter.average,
            floor=self._meter.floor,
            peak=self._meter.peak(now, settings.idle_stop),
            idle=self._meter.idle(now),
            since_step=now - self._stepped_at,
            since_growth=now - self._grew_at,
        )
        wanted = decide(settings, figures)
        if wanted != self._wanted:
            step = f"from {self._wanted} to {wanted} instances: {reason(settings, figures, wanted)}"
            self._on_event("info", f"scaling {step}")
            self._wanted, self._stepped_at, self._last_step = wanted, now, step
        self._asleep = wanted == 0

    # Instances ------------------------------------------------------------------------------------------------------

    def _await(self, instance: Instance, settings: Scaling, now: float) -> None:
        """Look whether one that is being started has come so far that it can be published, or serves."""
        instance.accepts = instance.accepts or self._answers(instance.server)
        if instance.server in self._published and self._serves(instance.server):
            instance.serves = True
            self._grew_at = now
        elif now - instance.started >= settings.start_timeout:
            what = "has passed no probe" if instance.accepts else "has accepted no connection"
            self._fail(instance.started, f"{instance.server.id} {what} within {settings.start_timeout:g} s", now)
            instance.withdrawn = now

    def _see_off(self, instance: Instance, now: float) -> None:
        """End the process of one that was withdrawn, as soon as it has nothing in hand."""
        assert instance.withdrawn is not None
        if instance.dismissed or instance.server in self._published:
            return
        drained = self._drained(instance.server)
        if drained or now - instance.withdrawn >= self._patience:
            if not drained:
                what = f"{instance.server.id} has work in hand after {self._patience:g} s and is stopped all the same"
                self._on_event("warning", f"scaling: {what}")
            instance.dismissed = True
            self._supervisor.end(instance.server)

    def _reconcile(self, now: float) -> None:
        """Start and withdraw instances, until there are as many as are wanted and all are as they are configured."""
        outdated = []
        for instance in self._present:
            if self._settings and self._is_outdated(instance, self._settings):
                if instance.serves:
                    outdated.append(instance)
                else:
                    instance.withdrawn = now
        while outdated and sum(instance.serves for instance in self._present) > self._wanted:
            outdated.pop(0).withdrawn = now
        allowed = self._wanted + bool(outdated)
        # Whoever serves stays rather than one that does not yet, and then the older one: it has more in its caches.
        ranked = sorted(self._present, key=lambda instance: not instance.serves)
        for instance in ranked[allowed:]:
            instance.withdrawn = now
        missing = allowed - len(ranked)
        if self._failures:
            missing = min(missing, 1 - sum(not instance.serves for instance in self._present))
        if self._settings and now >= self._start_due:
            for _ in range(missing):
                if not self._begin(self._settings, outdated, now):
                    break

    def _is_outdated(self, instance: Instance, settings: Scaling) -> bool:
        return instance.command != settings.command or not self._is_ours(instance.server, settings)

    def _is_ours(self, server: Server, settings: Scaling) -> bool:
        """May an instance be this one?"""
        low, high = settings.ports
        is_anothers = any(server.address == other.address or server.id == other.id for other in self._others)
        return server.host == settings.host and low <= server.port <= high and not is_anothers

    def _begin(self, settings: Scaling, outdated: Sequence[Instance], now: float) -> bool:
        """Start one more. False where there is no port for it."""
        server = self._free_server(settings, now)
        if server is None:
            if not all(instance.serves and instance.withdrawn is None for instance in self._instances):
                return False  # one that leaves will give its port back, and one that starts has to prove itself first
            in_the_way = [instance for instance in outdated if self._is_ours(instance.server, settings)]
            if in_the_way:
                in_the_way[0].withdrawn = now
            else:
                self._fail(now, f"no port of {settings.ports[0]}-{settings.ports[1]} is free", now)
            return False
        self._instances.append(Instance(server, settings.command, now))
        self._supervisor.run(replace(server, command=settings.command), self._ended)
        return True

    def _free_server(self, settings: Scaling, now: float) -> Server | None:
        """What another instance would be: at the lowest port that is free and rested, else at what has rested most."""
        taken = {instance.server.port for instance in self._instances}
        low, high = settings.ports
        for port in sorted(range(low, high + 1), key=lambda port: (self._rest(port, now), port)):
            server = Server(f"auto-{port}", settings.host, port)
            if port in taken or not self._is_ours(server, settings):
                continue
            if port in self._released and not self._drained(self._released[port][1]):
                continue  # the last instance there is gone, and the balancer has not noticed with all of its requests
            if not self._answers(server):
                return server
        return None

    def _rest(self, port: int, now: float) -> float:
        """Seconds for which the port should not be used."""
        released = self._released.get(port)
        return max(0.0, released[0] + PORT_REST - now) if released else 0.0

    def _fail(self, started: float, what: str, now: float) -> None:
        """Put the next start off. Those that were started before the last failure had no part in it."""
        if started <= self._failed_at:
            return
        self._failures += 1
        self._failed_at = now
        pause = min(FIRST_PAUSE * 2 ** min(self._failures - 1, 20), LONGEST_PAUSE)
        self._start_due = now + pause
        times = f", {self._failures} failures in a row" if self._failures > 1 else ""
        self._on_event("error", f"scaling: {what}{times}; the next one is started in {pause:g} s")

    def _tell(self, now: float) -> None:
        """Publish the instances, and say how things are."""
        present = self._present
        published = tuple(instance.server for instance in present if instance.accepts)
        if published != self._published:
            self._publish(published)
            self._published = published
        starting = sum(not instance.serves for instance in present)
        about_to_start = len(present) < self._wanted and self._start_due - now <= SOON
        self._pending = bool(starting) or about_to_start
        settings = self._settings
        self._description = self._describe(settings, len(present) - starting, starting) if settings else None

    def _describe(self, settings: Scaling, serving: int, starting: int) -> dict[str, Any]:
        return {
            "instances": serving,
            "starting": starting,
            "wanted": self._wanted,
            "min": settings.min,
            "max": settings.max,
            "target_active": settings.target_active,
            "last_step": self._last_step,
        }
