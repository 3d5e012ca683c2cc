"""What is counted, what of it was lately, and how it is told to Prometheus.

A `Tally` only ever grows, and whoever asks for a rate or a percentile asks for a difference between two readings of it.
`History` takes these once a second, so that nothing is kept for each request: readings for a minute, and the rates that
came of them for five.
"""

from __future__ import annotations

import math
import threading
from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import accumulate
from operator import add, sub
from typing import NamedTuple

BOUNDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds of the latency histogram's buckets in seconds, each of them within its bucket (Prometheus's `le`)."""
FAULTS = frozenset("SsDIRK")
"""First letters of the termination codes of what went wrong through no fault of the client's."""
BAD_ANSWERS = frozenset(("SH", "sH", "DH", "PH", "SD", "sD"))
"""Termination codes of answers that were malformed, were cut, or did not come."""

RATE_SAMPLES = 5  # differences of about a second each that a rate is taken over
STEP = 5.0  # seconds between two points of a series
POINTS = 60  # of a series: five minutes
LATENCY_STEPS = 12  # that percentiles are taken over: the last minute
SHARES = (0.5, 0.9, 0.99)  # the percentiles


class Tally:
    """What is counted of one backend, or of whatever had nothing to do with a backend.

    One thread, or one lock, owns each field's changes; any thread may read. `responses` has the exchanges by
    `status // 100`; at 0 are those that ended without a status, which are all in TCP mode.
    """

    __slots__ = (
        "buckets",
        "check_failures",
        "connect_errors",
        "downtime",
        "failures",
        "octets_in",
        "octets_out",
        "redispatches",
        "response_errors",
        "responses",
        "retries",
        "seconds",
        "sessions",
        "up_down",
    )

    def __init__(self) -> None:
        self.responses = [0] * 6
        self.octets_in = 0  # from clients
        self.octets_out = 0  # to clients
        self.buckets = [0] * (len(BOUNDS) + 1)  # exchanges by the time they took; the last is beyond all bounds
        self.seconds = 0.0  # that all exchanges took together
        self.failures = 0  # that have no 5xx: nothing or not all of the answer came, a TCP connection was broken off
        self.connect_errors = 0  # connections that could not be made
        self.response_errors = 0  # answers that were malformed, were cut, or did not come
        self.retries = 0  # exchanges begun again with this backend, as a kept connection to it turned out closed
        self.redispatches = 0  # exchanges that went on to another backend after this one had failed them
        self.check_failures = 0  # probes that did not pass while it was up, and connections that counted as such
        self.up_down = 0  # changes from up to down
        self.downtime = 0.0  # seconds down, of periods that are over
        self.sessions = 0  # leases ever

    def add(self, status: int, octets_in: int, octets_out: int, seconds: float, code: str = "--") -> None:
        """Count one exchange that has ended, or one connection in TCP mode, where `status` is 0.

        `code` is the termination code. This is called for each request: 0.2 us, 0.35 us on Python 3.10.
        """
        self.responses[status // 100] += 1
        if octets_in:
            self.octets_in += octets_in
        self.octets_out += octets_out
        self.buckets[bisect_left(BOUNDS, seconds)] += 1
        self.seconds += seconds
        if code != "--":
            self.failures += status < 500 and code[0] in FAULTS
            self.response_errors += code in BAD_ANSWERS

    def merge(self, other: Tally) -> None:
        """Add what another has counted."""
        for name in Tally.__slots__:
            mine, theirs = getattr(self, name), getattr(other, name)
            if isinstance(mine, list):
                mine[:] = map(int.__add__, mine, theirs)
            else:
                setattr(self, name, mine + theirs)

    @property
    def requests(self) -> int:
        """Exchanges, or connections in TCP mode, that have ended."""
        return sum(self.responses)

    @property
    def errors(self) -> int:
        """Those that went wrong through no fault of the client's: answers of 5xx, and `failures`."""
        return self.responses[5] + self.failures


def percentile(buckets: Sequence[int], share: float) -> float | None:
    """The seconds that this share of the exchanges took at most; None where there were none.

    Those of one bucket are taken to be spread evenly over it. The last has no end: its beginning is told.
    """
    rank = share * sum(buckets)
    if not rank:
        return None
    passed, lower = 0, 0.0
    for count, upper in zip(buckets, BOUNDS, strict=False):
        if passed + count >= rank:
            return lower + (upper - lower) * (rank - passed) / count
        passed += count
        lower = upper
    return lower


# What was lately ---------------------------------------------------------------------------------------------------


class Lately(NamedTuple):
    """What one of them did in the last minutes, or all together."""

    requests_per_s: float = 0.0  # over the last five seconds, as the three that follow
    errors_per_s: float = 0.0  # those of `Tally.errors`
    octets_in_per_s: float = 0.0
    octets_out_per_s: float = 0.0
    latency: Sequence[float | None] = (None,) * len(SHARES)  # seconds, over the last minute, for each of SHARES
    requests: Sequence[float] = (0.0,) * POINTS  # a second, step by step, the newest last
    errors: Sequence[float] = (0.0,) * POINTS


NOTHING = Lately()

Reading = array  # of a tally at one moment: requests, errors, octets in, octets out, then the buckets
_RATES = 4  # how many of these come before the buckets


def _read(tally: Tally) -> Reading[int]:
    return array("q", (tally.requests, tally.errors, tally.octets_in, tally.octets_out, *tally.buckets))


class _Track:
    """The last readings of one tally. One in which nothing changed is the same object as that before it."""

    __slots__ = ("errors", "recent", "requests", "steps")

    def __init__(self, now: float, reading: Reading[int]) -> None:
        self.recent = deque([(now, reading)], RATE_SAMPLES + 1)
        self.steps = deque([reading], LATENCY_STEPS + 1)
        self.requests = deque(NOTHING.requests, POINTS)
        self.errors = deque(NOTHING.errors, POINTS)

    @property
    def newest(self) -> Reading[int]:
        return self.recent[-1][1]

    def end_steps(self, steps: int, seconds: float) -> None:
        """So many steps are over, which took so many seconds together."""
        before, reading = self.steps[-1], self.newest
        self.requests.extend([round((reading[0] - before[0]) / seconds, 1)] * steps)
        self.errors.extend([round((reading[1] - before[1]) / seconds, 1)] * steps)
        self.steps.extend([before] * (steps - 1))
        self.steps.append(reading)

    def lately(self) -> Lately:
        (since, first), (until, last) = self.recent[0], self.recent[-1]
        seconds = until - since or 1.0
        counted = map(sub, last[:_RATES], first[:_RATES])
        requests, errors, octets_in, octets_out = (number / seconds for number in counted)
        minute = list(map(sub, last[_RATES:], self.steps[0][_RATES:]))
        return Lately(
            requests,
            errors,
            octets_in,
            octets_out,
            [percentile(minute, share) for share in SHARES],
            list(self.requests),
            list(self.errors),
        )


class History:
    """The last minutes of several tallies, and of all together. From any thread.

    `now` is a monotonic clock's everywhere. What a tally has counted before it was sampled first is no part of it.
    """

    def __init__(self, now: float) -> None:
        self._lock = threading.Lock()  # guards everything below
        self._tracks: dict[Tally, _Track] = {}
        self._whole = _Track(now, _read(Tally()))
        self._ended_at = now  # the last step
        self._due = now + STEP  # the end of this one

    def sample(self, now: float, tallies: Iterable[Tally]) -> None:
        """Read these, and forget all others.

        To be called about once a second: 1,000 of them take 5 ms, and 1 ms when all are idle.
        """
        with self._lock:
            tracks = {}
            whole = self._whole.newest
            for tally in tallies:
                reading = _read(tally)
                track = self._tracks.get(tally)
                if track is None:
                    track = _Track(now, reading)
                elif reading == track.newest:
                    track.recent.append((now, track.newest))
                else:
                    whole = array("q", map(add, whole, map(sub, reading, track.newest)))
                    track.recent.append((now, reading))
                tracks[tally] = track
            self._tracks = tracks
            self._whole.recent.append((now, whole))
            if now >= self._due:
                self._end_steps_locked(now)

    def _end_steps_locked(self, now: float) -> None:
        steps = 1 + int((now - self._due) / STEP)  # more than one where nobody sampled for a while
        for track in (self._whole, *self._tracks.values()):
            track.end_steps(min(steps, POINTS), now - self._ended_at)
        self._ended_at = now
        self._due += steps * STEP

    def lately(self, tally: Tally) -> Lately:
        """What this one did; NOTHING where it was not sampled yet."""
        with self._lock:
            track = self._tracks.get(tally)
            return track.lately() if track else NOTHING

    def whole(self) -> Lately:
        """What all did, with those that are forgotten."""
        with self._lock:
            return self._whole.lately()


# Prometheus --------------------------------------------------------------------------------------------------------


def labels(**pairs: str) -> str:
    """`proxy="servers",server="b1"`: what stands between the braces."""
    return ",".join(f'{name}="{_escaped(value)}"' for name, value in pairs.items())


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _text(number: float) -> str:
    if type(number) is int:
        return str(number)
    if math.isfinite(number):
        return repr(float(number))
    return "NaN" if math.isnan(number) else "+Inf" if number > 0 else "-Inf"


class Exposition:
    """Prometheus's text format, version 0.0.4: one family after the other, then `str` of it.

    Labels are those that the function `labels` made, "" for none. No two samples of a family may have the same: one
    that comes twice has Prometheus refuse everything.
    """

    def __init__(self) -> None:
        self._lines: list[str] = []

    def __str__(self) -> str:
        return "\n".join((*self._lines, ""))

    def counter(self, name: str, help: str, samples: Iterable[tuple[str, float]]) -> None:
        """Numbers that only grow; the name ends in `_total`."""
        self._family(name, "counter", help, samples)

    def gauge(self, name: str, help: str, samples: Iterable[tuple[str, float]]) -> None:
        """Numbers that come and go."""
        self._family(name, "gauge", help, samples)

    def histogram(self, name: str, help: str, samples: Iterable[tuple[str, Sequence[int], float]]) -> None:
        """For each its labels, how many fell into each bucket of BOUNDS, and the sum of all values."""
        self._begin(name, "histogram", help)
        lines = self._lines
        for at, buckets, total in samples:
            begin = f"{name}_bucket{{{at}," if at else f"{name}_bucket{{"
            counts = list(accumulate(buckets))
            lines += [f'{begin}le="{bound}"}} {count}' for bound, count in zip(_LE, counts, strict=True)]
            braced = f"{{{at}}}" if at else ""
            lines += [f"{name}_sum{braced} {_text(total)}", f"{name}_count{braced} {counts[-1]}"]

    def _begin(self, name: str, kind: str, help: str) -> None:
        escaped = help.replace("\\", r"\\").replace("\n", r"\n")
        self._lines += [f"# HELP {name} {escaped}", f"# TYPE {name} {kind}"]

    def _family(self, name: str, kind: str, help: str, samples: Iterable[tuple[str, float]]) -> None:
        self._begin(name, kind, help)
        self._lines += [f"{name}{{{at}}} {_text(value)}" if at else f"{name} {_text(value)}" for at, value in samples]


_LE = (*(f"{bound:g}" for bound in BOUNDS), "+Inf")
