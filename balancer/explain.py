"""Why a request went the way it went: what was decided on its way, kept if it failed, was retried, or was slow.

A request that goes well leaves nothing here. The first thing that goes wrong on its way makes it a `Trail`, to which
each decision adds a step: what happened, how long that took, and how all backends stood when the next was looked for.
At its end the trail and the record for the log become an incident, under the id that the log and the answer show.

Incidents are kept by their termination code, the last KEPT of each, so that a flood of one kind (a scanner's bad
requests) pushes out no other.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

from balancer.backend import Backend
from balancer.journal import Exchange

KEPT = 200

ENDED_BY = {
    "-": "it ended well",
    "C": "the client went away",
    "c": "the client was too slow",
    "S": "the backend refused, or broke off",
    "s": "the backend, or the queue, was too slow",
    "D": "the backend's probes timed out",
    "P": "the balancer refused it",
    "L": "the balancer answered it",
    "R": "descriptors or threads ran out",
    "K": "it was cut by a stop",
    "I": "a bug in the balancer, which has a line of its own in the log",
}
"""The first letter of a termination code, in words."""
ENDED_IN = {
    "-": "",
    "R": "in the request's head",
    "Q": "in the queue",
    "C": "while connecting",
    "H": "while waiting for the answer's head",
    "D": "in the body, or in a tunnel",
    "L": "while the last octets went to the client",
}
"""The second letter."""


class Standing(NamedTuple):
    """How a backend stood at the moment of a decision."""

    backend: Backend
    id: str
    status: str  # UP, DOWN, DRAIN, MAINT
    check: str
    changed_at: float | None  # wall clock
    active: int
    most: int  # `max_connections`
    backup: bool

    @classmethod
    def of(cls, backend: Backend) -> Standing:
        return cls(
            backend,
            backend.id,
            backend.status,
            backend.check,
            backend.changed_at,
            backend.active,
            backend.max_connections,
            backend.backup,
        )

    def passed_over(self, tried: Collection[Backend], backups_count: bool) -> str:
        """Why it could not be chosen, in words; "" when it could."""
        if self.backend in tried:
            return "tried already"
        if self.status == "DOWN":
            since = f" since {clock_time(self.changed_at)}" if self.changed_at else ""
            return f"down{since}: {self.check}"
        if self.status != "UP":
            return f"set to {self.status.lower()} by an operator"
        if self.backup and not backups_count:
            return "a backup, and others are up"
        if 0 < self.most <= self.active:
            return f"full: {self.active} of {self.most} in hand"
        return ""


class Step(NamedTuple):
    """Something that happened to a request, and who could have been chosen after it."""

    at: float  # reactor's clock
    text: str
    backend: str  # id; "" where it concerns none
    tried: tuple[Backend, ...]
    standings: Sequence[Standing]


class Trail:
    """What happened to one request, from the first thing that went wrong."""

    __slots__ = ("leased_at", "queued", "steps")

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.leased_at: float | None = None  # when a wait for a backend ended, on the reactor's clock
        self.queued = 0  # how many were before it in the queue

    def note(
        self, now: float, text: str, backend: str, tried: Iterable[Backend], standings: Sequence[Standing]
    ) -> None:
        self.steps.append(Step(now, text, backend, tuple(tried), standings))


class Incident(NamedTuple):
    record: Exchange
    policy: str
    reason: str  # in words, as the client was told if it could be told; "" where there is none but the code's
    began: float  # reactor's clock
    steps: Sequence[Step]
    standings: Sequence[Standing]  # at its end


class Incidents:
    """The last incidents of each kind. `keep` is the reactor's; any thread may ask for what is kept."""

    def __init__(self) -> None:
        self._by_code: dict[str, deque[Incident]] = {}

    def keep(self, incident: Incident) -> None:
        code = incident.record[11]
        kept = self._by_code.get(code)
        if kept is None:
            kept = self._by_code[code] = deque(maxlen=KEPT)
        kept.append(incident)

    def latest(self) -> list[dict[str, Any]]:
        """One line's worth of each, the newest first."""
        return [summary(incident) for incident in sorted(self._all(), key=lambda one: one.record[0], reverse=True)]

    def find(self, request_id: str) -> dict[str, Any] | None:
        """Everything about the request of this id; None where it is not kept: no longer, or it was an ordinary one."""
        return next((explanation(one) for one in self._all() if one.record[13] == request_id), None)

    def _all(self) -> list[Incident]:
        # Copies: list() of a deque holds the interpreter's lock, iteration over one that grows raises.
        return [incident for kept in list(self._by_code.values()) for incident in list(kept)]


def summary(incident: Incident) -> dict[str, Any]:
    record = incident.record
    return {
        "id": record[13],
        "at": record[0],
        "client": record[1],
        "request": record[2].decode("ascii", "backslashreplace"),
        "status": record[3],
        "code": record[11],
        "backend": None if record[5] == "-" else record[5],
        "total_ms": milliseconds(record[10]),
    }


def explanation(incident: Incident) -> dict[str, Any]:
    """Times are milliseconds since the request's first octet."""
    record, began = incident.record, incident.began
    names = ("head", "leased", "connected", "answered", "total")
    steps = []
    before = began + max(0.0, record[6])
    for step in incident.steps:
        steps.append(
            {
                "at_ms": milliseconds(step.at - began),
                "took_ms": milliseconds(step.at - before),
                "what": step.text,
                "backend": step.backend or None,
                "backends": _candidates(step.standings, step.tried),
            }
        )
        before = step.at
    return {
        **summary(incident),
        "ended": in_words(record[11]),
        "told": incident.reason or None,
        "policy": incident.policy,
        "tries": record[12],
        "times_ms": {
            name: milliseconds(seconds) if seconds >= 0 else None
            for name, seconds in zip(names, record[6:11], strict=True)
        },
        "steps": steps,
        "backends": _candidates(incident.standings, ()),
    }


def _candidates(standings: Sequence[Standing], tried: Collection[Backend]) -> list[dict[str, Any]]:
    others = [one for one in standings if one.status == "UP" and not one.backup and one.backend not in tried]
    return [
        {"id": one.id, "state": one.status, "passed_over": one.passed_over(tried, not others) or None}
        for one in standings
    ]


def in_words(code: str) -> str:
    """A termination code: "SH" is "the backend refused, or broke off, while waiting for the answer's head"."""
    who, where = ENDED_BY.get(code[:1], "unknown"), ENDED_IN.get(code[1:2], "")
    return f"{who}, {where}" if where else who


def as_text(found: dict[str, Any]) -> str:
    """An explanation for people, as `lb.py --explain` prints it."""
    date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found["at"]))
    what = f'"{found["request"]}"' if found["request"] else "a TCP connection"
    lines = [
        f"request {found['id']}, {date}: {what} of {found['client']}",
        f"  status {found['status'] or '-'}, code {found['code']}: {found['ended']}; {found['total_ms']} ms",
    ]
    if found["told"]:
        lines.append(f"  the reason: {found['told']}")
    times = ", ".join(f"{name} after {value} ms" for name, value in found["times_ms"].items() if value is not None)
    lines.append(f"  {times}")
    lines.append(f"  policy {found['policy']}, backend {found['backend'] or '-'}, {found['tries']} tried")
    for step in found["steps"]:
        who = f"backend {step['backend']}: " if step["backend"] else ""
        lines.append(f"  at {step['at_ms']} ms, after {step['took_ms']} ms: {who}{step['what']}")
        lines.extend(_standing_lines(step["backends"]))
    if not found["steps"]:
        lines.append("  the backends at its end:")
        lines.extend(_standing_lines(found["backends"]))
    return "".join(f"{_printable(line)}\n" for line in lines)


def _printable(line: str) -> str:
    """Nothing that a client wrote may steer a terminal, or begin a line."""
    return re.sub(r"[^ -~]", lambda match: f"\\x{ord(match[0]):02x}", line)


def _standing_lines(backends: Sequence[dict[str, Any]]) -> list[str]:
    return [f"    backend {one['id']}: {one['passed_over'] or 'could be chosen'}" for one in backends]


def clock_time(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))


def milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 1)
