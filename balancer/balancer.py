"""The whole of it: every part made, wired, started, drained and stopped, in the order that each of these needs."""

from __future__ import annotations

import os
import resource
import threading
import traceback
from collections.abc import Callable
from typing import TextIO

from balancer.backend import Backend
from balancer.config import Config, format_address
from balancer.frontend import Frontend
from balancer.health import HealthChecker
from balancer.http1 import HeadLimits
from balancer.http_session import HttpSession
from balancer.journal import Journal
from balancer.listener import Listener, bind
from balancer.pickers import make_picker
from balancer.pool import Pool
from balancer.pump import Pumps
from balancer.reactor import Reactor
from balancer.supervisor import Supervisor
from balancer.tcp_session import TcpSession
from balancer.upstream import Upstreams

READY_PATIENCE = 5.0  # seconds that commands are given to answer before the first client is accepted
CUT_PATIENCE = 5.0  # seconds that sessions which were cut are given to end
DESCRIPTORS_APART = 100  # for the log, the probes, the children, the interpreter


class LoadBalancer:
    """One listener and its backends. `start`, then `stop`; or `drain` and `close`, where waiting is the caller's.

    Raises ValueError for a policy's file that is of no use, OSError where it cannot listen or open its log.
    """

    def __init__(self, config: Config, echo: TextIO | None = None) -> None:
        self.config = config
        log = config.log
        self._journal = Journal(
            log.file, level=log.level, max_bytes=log.max_bytes, backups=log.backups, format=log.format, echo=echo
        )
        picker = make_picker(config.algorithm, config.base, lambda text: self._journal.event("error", text))
        limits = config.limits
        head_limits = HeadLimits(limits.head_bytes, limits.request_line_bytes, limits.fields)
        health = config.health_check
        self.pool = Pool(
            [Backend(server, head_limits) for server in config.servers],
            picker,
            rise=health.rise,
            fall=health.fall,
            on_change=self._backend_changed,
        )
        self._sock = bind(config.host, config.port)
        self.reactor = Reactor(tick=_tick(config), on_error=self._crashed)
        self.pumps = Pumps(on_error=self._crashed)
        self._health = HealthChecker(self.pool, health, on_error=lambda text: self._journal.event("error", text))
        self.upstreams = Upstreams(
            self.reactor,
            self.pool,
            config.timeouts,
            limits,
            config.retries,
            on_refused=self._health.probe_now,
        )
        self.listener = Listener(
            self.reactor,
            self._sock,
            TcpSession if config.mode == "tcp" else HttpSession,
            limits.connections or (_raise_descriptor_limit() - DESCRIPTORS_APART) // 2,
            self._journal.event,
        )
        self._front = Frontend(
            config,
            self.reactor,
            self.pool,
            self.upstreams,
            self.pumps,
            self._journal,
            self.listener.session_closed,
        )
        self.listener.front = self._front
        self._supervisor = Supervisor(config.servers, config.base, self._journal)
        self.host, self.port = self.listener.address
        self._front.authority = format_address(self.host, self.port).encode()

    @property
    def url(self) -> str:
        return f"{self.config.mode}://{format_address(self.host, self.port)}"

    def start(self) -> None:
        """Returns once connections are accepted."""
        try:
            self._journal.start()
        except OSError as error:
            self._sock.close()
            self._health.stop()
            self._supervisor.stop()
            self.reactor.stop()
            raise OSError(f"cannot open the log {self.config.log.file}: {os.strerror(error.errno or 0)}") from None
        config = self.config
        self._journal.event(
            "info", f"start: {self.url}, {len(config.servers)} backends, {config.algorithm}, from {config.source}"
        )
        self._supervisor.start()
        self._supervisor.wait_ready(READY_PATIENCE)
        self._health.start()
        self.reactor.start()
        self.reactor.call_soon(self.listener.start)

    def drain(self, on_drained: Callable[[], None]) -> None:
        """Accept no more and let what is in hand end. `on_drained` is called on another thread."""
        self._journal.event("info", "stop: accepting no more connections")
        self.listener.on_drained = on_drained
        self.reactor.call_soon(self._drain)

    def close(self) -> int:
        """Cut what is left, and end every thread and child. Returns how many connections were cut."""
        cut: list[int] = []
        done = threading.Event()
        self.listener.on_drained = done.set
        self.reactor.call_soon(lambda: cut.append(self.listener.kill()))
        if not done.wait(CUT_PATIENCE):
            self._journal.event("error", f"stop: {len(self.listener.sessions)} connections did not end")
        self.reactor.call_soon(self._drop_idle)
        self._health.stop()
        self.reactor.stop()
        self.pumps.stop()
        self._supervisor.stop()
        self._journal.event("info", f"stop: done, {sum(cut)} connections cut" if sum(cut) else "stop: done")
        self._journal.stop()
        return sum(cut)

    def stop(self, patience: float | None = None) -> int:
        """Drain for at most so many seconds (`timeouts.drain`), then close. Returns how many were cut."""
        drained = threading.Event()
        self.drain(drained.set)
        drained.wait(self.config.timeouts.drain if patience is None else patience)
        return self.close()

    def _drain(self) -> None:
        self._front.draining = True
        self.listener.stop()

    def _drop_idle(self) -> None:
        for backend in self.pool.backends:
            self.upstreams.drop_idle(backend)

    def _backend_changed(self, backend: Backend, reason: str) -> None:
        """On whichever thread noticed it."""
        level = "info" if backend.healthy else "warning"
        self._journal.event(level, f"backend {backend.id} {backend.address} {backend.status}: {reason}")
        self.reactor.call_soon(self._follow_change, backend)

    def _follow_change(self, backend: Backend) -> None:
        if not backend.eligible:
            self.upstreams.drop_idle(backend)
        if not backend.healthy and backend.check.endswith("TOUT"):
            # It is there and says nothing. One that refuses, or says that it is unwell, may finish what it has in hand.
            for session in list(self.listener.sessions):
                session.backend_hung(backend)
        self.upstreams.serve_waiting()

    def _crashed(self, where: str, error: Exception) -> None:
        trace = " | ".join(line.strip() for line in traceback.format_exception(error))
        self._journal.event("error", f"bug in {where}: {trace}")


def _tick(config: Config) -> float:
    """How late a deadline may be noticed: a tenth of the shortest timeout, within reason."""
    seconds: list[float] = [value for value in vars(config.timeouts).values() if value]
    return min(0.5, max(0.02, min(seconds) / 10))


def _raise_descriptor_limit() -> int:
    """Take as many descriptors as the system allows; returns how many these are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 1_048_576 if hard == resource.RLIM_INFINITY else hard
    if soft < most:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        except (OSError, ValueError):
            return soft  # macOS names a hard limit that it does not grant
        return most
    return soft
