"""What the balancer tells of itself: dictionaries for the operator's API, text for Prometheus.

Everything is read where it is kept, without a lock that others wait for, at the cost that a sum may be one request
ahead of another. It does hold that no count ever goes backwards: what a backend has counted stays in the sums when it
has gone, and `Pool.members` tells who is there and who has gone at one moment.

Names and meanings that begin with haproxy_ are those of HAProxy's own exporter and of its management guide, section
9.1, so that its dashboards and alerts can be used. Where ours differ:
- There is one queue, in front of all servers, so a server's own is always empty and has no limit.
- Exchanges are counted when they end. Octets are those of bodies, without heads; in TCP mode and after an Upgrade
  those of the whole stream.
- The balancer's own refusals count for the frontend; those that tell of a failure (5xx) for the backend too, because
  most of them say that no server was to be had.
- Connections that fail count as failed probes, for that is how they are taken.
- `check_failures_total` and `queue_limit` exist for the backend too.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from balancer.backend import Backend
from balancer.config import Config
from balancer.frontend import Frontend
from balancer.journal import Journal
from balancer.listener import Listener
from balancer.metrics import SHARES, STEP, Exposition, History, Lately, Tally, labels
from balancer.pool import Pool
from balancer.upstream import Upstreams
from balancer.version import __version__

SAMPLE = 1.0  # seconds between two looks at the counts
STATES = ("UP", "DOWN", "DRAIN", "MAINT")
CLASSES = ("none", "1xx", "2xx", "3xx", "4xx", "5xx")
"""What `Tally.responses` has, in words."""
CODES = ("other", *CLASSES[1:])
"""The same in HAProxy's."""
NO_LIMIT = math.nan  # as HAProxy tells it

_COUNTERS = (
    ("bytes_in_total", "Octets from clients: of request bodies, or of the stream in TCP mode.", "octets_in"),
    ("bytes_out_total", "Octets to clients: of the answers' bodies, or of the stream in TCP mode.", "octets_out"),
    ("sessions_total", "Requests given to a server, or connections in TCP mode.", "sessions"),
    ("connection_errors_total", "Attempts to connect to a server that failed.", "connect_errors"),
    ("response_errors_total", "Answers that were malformed, were cut or did not come.", "response_errors"),
    ("retry_warnings_total", "Requests begun again with it, as a kept connection was closed.", "retries"),
    ("redispatch_warnings_total", "Requests that went on to another server after it failed.", "redispatches"),
    ("check_failures_total", "Probes that did not pass, and connections that failed.", "check_failures"),
)
"""Name, what it says, field of Tally: the same for one server and for all of them."""
_RESPONSES = "Requests that have ended, by the class of the answer's status; other: there was no answer."
_REQUESTS = "Requests that have ended, with those that were refused."


class Running(Protocol):
    """The balancer that is told of."""

    config: Config
    config_error: str | None
    draining: bool
    pool: Pool
    upstreams: Upstreams
    listener: Listener

    @property
    def url(self) -> str: ...
    @property
    def restart_needed(self) -> Sequence[str]: ...


class Whole:
    """Whether all servers together are up. From any thread."""

    def __init__(self, up: bool, now: float) -> None:
        self._lock = threading.Lock()  # guards everything below
        self.up = up
        self.since = now
        self.up_down = 0  # changes from up to down
        self._downtime = 0.0  # seconds, of periods that are over

    def observe(self, up: bool, now: float) -> None:
        with self._lock:
            if up == self.up:
                return
            if up:
                self._downtime += now - self.since
            else:
                self.up_down += 1
            self.up = up
            self.since = now

    def downtime(self, now: float) -> float:
        """Seconds, with those of a period that still goes on."""
        with self._lock:
            return self._downtime + (0.0 if self.up else now - self.since)


class Status:
    """The figures of a running balancer. From any thread.

    `front` and `journal` are the balancer's; `can_change` is whether an operator can change anything; `scaling` tells
    of the backends that are started by the load, `warnings` of what is to be looked after. `clock` is a wall clock,
    `ticks` a monotonic one.
    """

    def __init__(
        self,
        balancer: Running,
        front: Frontend,
        journal: Journal,
        *,
        can_change: bool = False,
        scaling: Callable[[], dict[str, Any] | None] = lambda: None,
        warnings: Callable[[], Sequence[str]] = tuple,
        clock: Callable[[], float] = time.time,
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        self._balancer = balancer
        self._front = front
        self._journal = journal
        self._can_change = can_change
        self._scaling = scaling
        self._warnings = warnings
        self._clock = clock
        self._ticks = ticks
        self.started_at = clock()
        now = ticks()
        self._began = now
        self._history = History(now)
        self._whole = Whole(self._is_up(), now)
        self._sample_due = now

    # ---- what keeps it going ----------------------------------------------------------------------------------

    def sample(self) -> None:
        """Take a look at the counts, if a second has passed since the last. To be called at least that often."""
        now = self._ticks()
        if now < self._sample_due:
            return
        self._sample_due = now + SAMPLE
        backends, leaving, _ = self._balancer.pool.members()
        self._history.sample(now, [self._front.tally, *(backend.tally for backend in (*backends, *leaving))])
        self.backend_changed()

    def backend_changed(self) -> None:
        """A backend goes up or down, comes or goes: look whether there is any left to give work to."""
        self._whole.observe(self._is_up(), self._ticks())

    def _is_up(self) -> bool:
        """As HAProxy has it: one without servers, such as ours while all instances sleep, is up."""
        backends = self._balancer.pool.backends
        return not backends or any(backend.eligible for backend in backends)

    # ---- for the API ------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """The balancer as a whole, and each backend."""
        balancer, listener = self._balancer, self._balancer.listener
        config = balancer.config
        _, tally = self._tallies()
        lately = self._history.whole()
        return {
            "version": __version__,
            "url": balancer.url,
            "mode": config.mode,
            "algorithm": config.algorithm,
            "source": config.source,
            "state": "draining" if balancer.draining else "serving",
            "started_at": round(self.started_at, 3),
            "uptime_s": round(self._ticks() - self._began, 3),
            "can_change": self._can_change,
            "log": config.log.file,
            "config_error": balancer.config_error,
            "restart_needed": list(balancer.restart_needed),
            "connections": {"current": len(listener.sessions), "limit": listener.most, "total": listener.accepted},
            "active": balancer.pool.in_hand,
            "queue": balancer.upstreams.waiting,
            "idle_upstreams": balancer.upstreams.idle,
            **_counts(tally, lately),
            "octets_in_per_s": round(lately.octets_in_per_s),
            "octets_out_per_s": round(lately.octets_out_per_s),
            "history": {"step_s": STEP, **_series(lately)},
            "warnings": list(self._warnings()),
            "scaling": self._scaling(),
            "backends": self.backends(),
        }

    def backends(self) -> list[dict[str, Any]]:
        """Each backend: those of the configuration in its order, then those that still end what they have in hand."""
        backends, leaving, _ = self._balancer.pool.members()
        return [self._backend(backend) for backend in (*backends, *leaving)]

    def backend(self, backend_id: str) -> dict[str, Any] | None:
        """The one with that id, None where there is none. One that is configured comes before one that leaves."""
        found = self._by_id().get(backend_id)
        return self._backend(found) if found else None

    def events(self) -> list[dict[str, Any]]:
        """What happened, the oldest first."""
        return [{"at": round(at, 3), "level": level, "text": text} for at, level, text in self._journal.latest_events()]

    def _backend(self, backend: Backend) -> dict[str, Any]:
        tally = backend.tally
        lately = self._history.lately(tally)
        return {
            "id": backend.id,
            "host": backend.host,
            "port": backend.port,
            "address": backend.address,
            "weight": backend.weight,
            "backup": backend.backup,
            "max_connections": backend.max_connections,
            "state": backend.status,
            "admin": backend.admin.value,
            "healthy": backend.healthy,
            "check": backend.check,
            "changed_at": backend.changed_at and round(backend.changed_at, 3),
            "leaving": backend.leaving,
            "scaled": backend.scaled,
            "active": backend.active,
            "idle": len(backend.idle),
            "sessions_total": tally.sessions,
            **_counts(tally, lately),
            "average_ms": _milliseconds(backend.average if backend.average_at else None),
            "connect_errors_total": tally.connect_errors,
            "response_errors_total": tally.response_errors,
            "retries_total": tally.retries,
            "redispatches_total": tally.redispatches,
            "check_failures_total": tally.check_failures,
            "up_down_total": tally.up_down,
            "downtime_s": round(self._downtime(backend, self._clock()), 3),
            "history": _series(lately),
        }

    def _by_id(self) -> dict[str, Backend]:
        """An id may be another backend's before the one that had it has gone: the configured one has it."""
        backends, leaving, _ = self._balancer.pool.members()
        found = {backend.id: backend for backend in backends}
        for backend in reversed(leaving):
            found.setdefault(backend.id, backend)
        return found

    def _tallies(self) -> tuple[Tally, Tally]:
        """What all backends have counted that there are and were, and that with what no backend had to do with."""
        backends, leaving, served = self._balancer.pool.members()
        for backend in (*backends, *leaving):
            served.merge(backend.tally)
        whole = Tally()
        whole.merge(served)
        whole.merge(self._front.tally)
        return served, whole

    def _downtime(self, backend: Backend, now: float) -> float:
        """Seconds down so far. `changed_at` is a wall clock's, and that can be set back."""
        seconds = backend.tally.downtime
        if not backend.healthy:
            seconds += max(0.0, now - (backend.changed_at or self.started_at))
        return seconds

    # ---- for Prometheus ---------------------------------------------------------------------------------------

    def prometheus(self) -> str:
        """All figures in Prometheus's text format."""
        text = Exposition()
        served, whole = self._tallies()
        is_http = self._balancer.config.mode == "http"
        self._expose_servers(text, is_http)
        self._expose_backend(text, served, is_http)
        self._expose_frontend(text, whole, is_http)
        self._expose_process(text)
        return str(text)

    def _expose_servers(self, text: Exposition, is_http: bool) -> None:
        now = self._clock()
        found = self._by_id()
        names, servers = list(found), list(found.values())
        tallies = [server.tally for server in servers]
        families = _Families(text, "haproxy_server", [labels(proxy="servers", server=name) for name in names])
        families.states(
            "1 for the state that the server is in, 0 for the others. DRAIN and MAINT are an operator's word; DRAIN is "
            "also a server that is configured no longer and ends what it has in hand.",
            STATES,
            [server.status for server in servers],
        )
        gauge, counter = families.gauge, families.counter
        gauge("weight", "The server's share beside the weights of the others.", [server.weight for server in servers])
        gauge("current_sessions", "Requests or TCP connections in hand.", [server.active for server in servers])
        limits = [server.max_connections or NO_LIMIT for server in servers]
        gauge("limit_sessions", "The server's max_connections; NaN: none.", limits)
        gauge("current_queue", "Always 0: what waits is in haproxy_backend_current_queue.", [0] * len(servers))
        gauge("queue_limit", "Always NaN: a server has no queue of its own.", [NO_LIMIT] * len(servers))
        gauge("idle_connections_current", "Connections kept for reuse.", [len(server.idle) for server in servers])
        since = [max(0.0, now - (server.changed_at or self.started_at)) for server in servers]
        gauge("check_last_change_seconds", "Since the server last went up or down, or since the start.", since)
        for name, help, field in _COUNTERS:
            counter(name, help, [getattr(tally, field) for tally in tallies])
        counter("check_up_down_total", "How often the server went down.", [tally.up_down for tally in tallies])
        downtimes = [self._downtime(server, now) for server in servers]
        counter("downtime_seconds_total", "How long the server was down, until now.", downtimes)
        if is_http:
            families.responses([tally.responses for tally in tallies])

        at = [labels(server=name) for name in names]
        text.counter(
            "lb_request_errors_total",
            "Requests, or connections in TCP mode, that went wrong through no fault of the client's: answered 5xx, or "
            "cut, or not answered.",
            zip(at, [tally.errors for tally in tallies], strict=True),
        )
        text.histogram(
            "lb_request_duration_seconds",
            "From a request's first octet to the answer's last, with the wait in the queue and tries that failed; from "
            "beginning to end of a connection in TCP mode or after an Upgrade.",
            [(where, tally.buckets, tally.seconds) for where, tally in zip(at, tallies, strict=True)],
        )

    def _expose_backend(self, text: Exposition, served: Tally, is_http: bool) -> None:
        self.backend_changed()
        whole, pool, now = self._whole, self._balancer.pool, self._ticks()
        waiting = self._balancer.upstreams.waiting
        eligible = [backend for backend in pool.backends if backend.eligible]
        active = [backend for backend in eligible if not backend.backup]
        limits = [backend.max_connections for backend in pool.backends]
        families = _Families(text, "haproxy_backend", [labels(proxy="servers")])
        state = "UP" if whole.up else "DOWN"
        families.states("UP while any server can be given work, or none is configured.", STATES[:2], [state])
        gauge, counter = families.gauge, families.counter
        gauge("active_servers", "Servers, without backups, that may be given work.", [len(active)])
        gauge("backup_servers", "Backups that may be given work.", [len(eligible) - len(active)])
        gauge("weight", "Sum of the weights of those who get work.", [sum(one.weight for one in active or eligible)])
        gauge("current_sessions", "Requests in hand and in the queue.", [pool.in_hand + waiting])
        gauge("limit_sessions", "Sum of max_connections; NaN: none.", [sum(limits) if all(limits) else NO_LIMIT])
        gauge("current_queue", "Requests that wait for a server.", [waiting])
        gauge("queue_limit", "How many may wait.", [self._balancer.config.limits.queue])
        gauge("check_last_change_seconds", "Since the status changed, or since the start.", [now - whole.since])
        for name, help, field in _COUNTERS:
            counter(name, help, [getattr(served, field)])
        counter("check_up_down_total", "How often the last server was lost.", [whole.up_down])
        counter("downtime_seconds_total", "How long there was no server, until now.", [whole.downtime(now)])
        if is_http:
            responses = [*served.responses[:5], served.responses[5] + self._front.tally.responses[5]]
            counter("http_requests_total", _REQUESTS, [sum(responses)])
            families.responses([responses])

    def _expose_frontend(self, text: Exposition, whole: Tally, is_http: bool) -> None:
        listener = self._balancer.listener
        families = _Families(text, "haproxy_frontend", [labels(proxy="lb")])
        gauge, counter = families.gauge, families.counter
        gauge("current_sessions", "Client connections.", [len(listener.sessions)])
        gauge("limit_sessions", "Client connections that there may be at once.", [listener.most])
        counter("connections_total", "Client connections accepted.", [listener.accepted])
        counter("denied_connections_total", "Always 0: beyond the limit they wait in the system's backlog.", [0])
        for name, help, field in _COUNTERS[:2]:
            counter(name, help, [getattr(whole, field)])
        refused = self._front.tally.responses[4]
        counter("request_errors_total", "Requests that were refused with 4xx, or did not come whole.", [refused])
        if is_http:
            counter("http_requests_total", _REQUESTS, [whole.requests])
            families.responses([whole.responses])

    def _expose_process(self, text: Exposition) -> None:
        families = _Families(text, "haproxy_process", [""])
        families.gauge("start_time_seconds", "The start, since the epoch.", [self.started_at])
        families.gauge("uptime_seconds", "Since the start.", [self._ticks() - self._began])
        build = _Families(text, "haproxy_process", [labels(version=__version__)])
        build.gauge("build_info", "Always 1; the version is its label.", [1])
        text.gauge(
            "lb_config_last_reload_successful",
            "0 while there is a mistake in the configuration's file, and what it said before goes on.",
            [("", int(self._balancer.config_error is None))],
        )


class _Families:
    """Families whose names begin alike, with a value for each of the same labels."""

    def __init__(self, text: Exposition, prefix: str, at: Sequence[str]) -> None:
        self._text = text
        self._prefix = prefix
        self._at = at

    def gauge(self, name: str, help: str, values: Sequence[float]) -> None:
        self._text.gauge(f"{self._prefix}_{name}", help, zip(self._at, values, strict=True))

    def counter(self, name: str, help: str, values: Sequence[float]) -> None:
        self._text.counter(f"{self._prefix}_{name}", help, zip(self._at, values, strict=True))

    def states(self, help: str, states: Sequence[str], found: Sequence[str]) -> None:
        """For each state whether it is that which was found."""
        pairs = zip(self._at, found, strict=True)
        samples = [(f'{at},state="{state}"', int(state == is_in)) for at, is_in in pairs for state in states]
        self._text.gauge(f"{self._prefix}_status", help, samples)

    def responses(self, counts: Sequence[Sequence[int]]) -> None:
        """`Tally.responses` of each."""
        pairs = zip(self._at, counts, strict=True)
        samples = [(f'{at},code="{code}"', count) for at, of in pairs for code, count in zip(CODES, of, strict=True)]
        self._text.counter(f"{self._prefix}_http_responses_total", _RESPONSES, samples)


# Pieces of the API's objects ---------------------------------------------------------------------------------------


def _counts(tally: Tally, lately: Lately) -> dict[str, Any]:
    """What a backend and the whole have in common."""
    shares = zip(SHARES, lately.latency, strict=True)
    return {
        "requests_total": tally.requests,
        "requests_per_s": round(lately.requests_per_s, 1),
        "errors_total": tally.errors,
        "errors_per_s": round(lately.errors_per_s, 1),
        "octets_in_total": tally.octets_in,
        "octets_out_total": tally.octets_out,
        "responses": dict(zip(CLASSES, tally.responses, strict=True)),
        "latency_ms": {f"p{share * 100:g}": _milliseconds(seconds) for share, seconds in shares},
    }


def _series(lately: Lately) -> dict[str, Any]:
    return {"requests_per_s": lately.requests, "errors_per_s": lately.errors}


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 2)
