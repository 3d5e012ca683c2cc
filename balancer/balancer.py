"""The whole of it: every part made, wired, started, drained and stopped, in the order that each of these needs."""

from __future__ import annotations

import os
import resource
import socket
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from balancer.admin import AdminServer
from balancer.admission import Admission
from balancer.backend import Backend, Endpoint, literal_endpoints, resolve
from balancer.certificates import server_name
from balancer.config import COMMAND_LINE, Config, ConfigError, Server, format_address
from balancer.control import Control
from balancer.frontend import Frontend
from balancer.handshake import Handshaker
from balancer.health import HealthChecker
from balancer.http1 import AnswerReader, HeadLimits
from balancer.http_session import HttpSession, PlainHttpSession
from balancer.journal import Journal
from balancer.keys import Keys
from balancer.listener import Listener, bind
from balancer.pickers import Picker, make_picker
from balancer.pool import Pool
from balancer.pump import Pumps
from balancer.reactor import Reactor
from balancer.reload import Difference, Watcher, applicable, difference
from balancer.scaling import Load, Scaler
from balancer.status import Status
from balancer.supervisor import Supervisor
from balancer.tcp_session import TcpSession
from balancer.upstream import Upstreams

READY_PATIENCE = 5.0  # seconds that commands are given to answer before the first client is accepted
CUT_PATIENCE = 5.0  # seconds that sessions which were cut are given to end
HANDSHAKE_THREADS = 2  # TLS handshakes are computed on these
HANDSHAKES = 2048  # with clients, under way at once; others wait
DESCRIPTORS_APART = 100  # for the log, the probes, the children, the interpreter


class LoadBalancer:
    """One listener and its backends. `start`, then `stop`; or `drain` and `close`, where waiting is the caller's.

    `load` gives the configuration anew when its file has changed; without it no file is watched. `token` is what an
    operator must know to change anything. Raises ValueError for a policy's file that is of no use, OSError where it
    cannot listen or open its log.
    """

    def __init__(
        self,
        config: Config,
        echo: TextIO | None = None,
        *,
        load: Callable[[], Config] | None = None,
        token: str = "",
    ) -> None:
        self.config = self.wanted = config  # what applies, and what was asked for: some of it takes a restart
        self.config_error: str | None = None  # what is wrong with the file, until that is mended
        self.draining = False
        self._keys = Keys(config)
        self._changing = threading.Lock()  # one change of the configuration at a time
        self._supervising = threading.Lock()  # what is to be run is found out and passed on by one thread at a time
        self._known: dict[str, Server] = {}  # by address; also those that leave, for their commands
        log = config.log
        self._journal = Journal(
            log.file, level=log.level, max_bytes=log.max_bytes, backups=log.backups, format=log.format, echo=echo
        )
        limits, health = config.limits, config.health_check
        self.pool = Pool(
            [self._make_backend(server) for server in config.servers],
            self._make_picker(config),
            rise=health.rise,
            fall=health.fall,
            on_change=self._backend_changed,
            on_left=self._backend_left,
        )
        self._sock = bind(config.host, config.port)
        redirect = self._bind_redirect(config)
        self.reactor = Reactor(tick=_tick(config), on_error=self._crashed)
        self.pumps = Pumps(on_error=self._crashed)
        self._handshaker = Handshaker(self.reactor, HANDSHAKE_THREADS, HANDSHAKES, self._crashed)
        self._health = HealthChecker(
            self.pool, health, on_error=lambda text: self._journal.event("error", text), resolve=self._resolve
        )
        self.upstreams = Upstreams(
            self.reactor,
            self.pool,
            config.timeouts,
            limits,
            config.retries,
            self._handshaker,
            on_refused=self._health.probe_now,
        )
        self.listener = Listener(
            self.reactor,
            self._sock,
            TcpSession if config.mode == "tcp" else HttpSession,
            _most_connections(config),
            self._journal.event,
        )
        self._front = self._make_front(self.listener)
        self._front.make_refusal = PlainHttpSession if config.mode == "http" else None
        self._listeners = [self.listener]
        if redirect is not None:
            also = Listener(self.reactor, redirect, HttpSession, self.listener.most, self._journal.event)
            self._listeners.append(also)
            front = self._make_front(also)
            front.redirects_to = b"" if self.listener.address[1] == 443 else b":%d" % self.listener.address[1]
            front.incidents, front.tally = self._front.incidents, self._front.tally
        self._follow_config(config, self._keys, self._front.admission)
        self._supervisor = Supervisor(config.servers, config.base, self._journal)
        self._instances: Sequence[Server] = ()  # backends that are started by the load
        self._scaler = Scaler(
            self._supervisor,
            load=self._instances_load,
            publish=self._publish,
            serves=lambda server: any(backend.eligible for backend in self._backends_at(server)),
            drained=lambda server: not self._backends_at(server),
            on_event=self._journal.event,
            on_error=self._crashed,
        )
        self._scaler.configure(config.scaling, config.servers, config.timeouts.drain)
        self.upstreams.worth_waiting = self._worth_waiting
        self.host, self.port = self.listener.address
        for listener in self._listeners:
            assert listener.front is not None
            listener.front.authority = format_address(self.host, self.port).encode()
        self.status = Status(
            self,
            self._front,
            self._journal,
            can_change=bool(token),
            scaling=self._scaler.describe,
            warnings=lambda: self._keys.warnings,
        )
        path = None if config.source == COMMAND_LINE else Path(config.source)
        self._watcher = load and Watcher(
            path,
            config,
            load,
            self._take_file,
            self._refuse_file,
            self._crashed,
            others=self._key_files,
            renew=self._renew,
        )
        on_known = self._watcher.known if self._watcher else lambda config, before=None: None
        self._control = Control(self, self.status, self._front.incidents, load, on_known)
        self._no_admin = ""  # why there is no operator's port
        self._admin = self._make_admin(config, token)

    @property
    def url(self) -> str:
        scheme = "https" if self.config.tls and self.config.mode == "http" else self.config.mode
        return f"{scheme}://{format_address(self.host, self.port)}"

    @property
    def strength(self) -> str:
        """How many backends there are, in words."""
        count, scaling = len(self.config.servers), self.config.scaling
        backends = "1 backend" if count == 1 else f"{count} backends"
        return f"{backends}, {scaling.min} to {scaling.max} instances" if scaling else backends

    @property
    def admin_url(self) -> str:
        """Where the operator's port is; "" where there is none."""
        return f"{self._admin.url}/" if self._admin else ""

    def _bind_redirect(self, config: Config) -> socket.socket | None:
        """For clients of plain HTTP, who are told where it is served encrypted."""
        if config.tls is None or not config.tls.redirect_from:
            return None
        host, _, port = config.tls.redirect_from.rpartition(":")
        try:
            return bind(host.strip("[]"), int(port))
        except OSError:
            self._sock.close()
            raise

    def _make_front(self, listener: Listener) -> Frontend:
        front = listener.front = Frontend(
            self.config,
            self.reactor,
            self.pool,
            self.upstreams,
            self.pumps,
            self._handshaker,
            self._journal,
            listener.sessions,
            listener.session_closed,
        )
        return front

    def _make_admin(self, config: Config, token: str) -> AdminServer | None:
        if not config.admin.host:
            return None
        try:
            return AdminServer(config.admin, token, self._control, self._journal.event)
        except OSError as error:
            if config.admin.asked_for:
                self._discard()
                raise
            # Another balancer on this machine has it, as is the way of defaults.
            self._no_admin = f"there is no status page: {error}; choose an address by --admin HOST:PORT"
            return None

    def _discard(self) -> None:
        """Give back what the parts hold that were never started."""
        for listener in self._listeners:
            listener.discard()
        self._health.stop()
        self._supervisor.stop()
        self.reactor.stop()

    def start(self) -> None:
        """Returns once connections are accepted."""
        try:
            self._journal.start()
        except OSError as error:
            if self._admin:
                self._admin.stop()
            self._discard()
            raise OSError(f"cannot open the log {self.config.log.file}: {os.strerror(error.errno or 0)}") from None
        config = self.config
        self._journal.event("info", f"start: {self.url}, {self.strength}, {config.algorithm}, from {config.source}")
        self._warn(self._keys)
        if self._no_admin:
            self._journal.event("warning", self._no_admin)
        self._supervisor.start()
        self._supervisor.wait_ready(READY_PATIENCE)
        self._health.start()
        self.reactor.start()
        self.status.sample()  # rates are counted from here
        for listener in self._listeners:
            self.reactor.call_soon(listener.start)
        self._scaler.start()
        if self._watcher:
            self._watcher.start()
        if self._admin:
            self._admin.start()

    def announce_stop(self) -> None:
        """Say at /healthz that this balancer is going away, and serve on."""
        if not self.draining:
            self.draining = True
            self._journal.event("info", "stop: /healthz says so from here on")

    def drain(self, on_drained: Callable[[], None]) -> None:
        """Accept no more and let what is in hand end. `on_drained` is called on another thread."""
        self.announce_stop()
        self._journal.event("info", "stop: accepting no more connections")
        self._when_drained(on_drained)
        self.reactor.call_soon(self._drain)

    def close(self) -> int:
        """Cut what is left, and end every thread and child. Returns how many connections were cut."""
        cut: list[int] = []
        done = threading.Event()
        self._when_drained(done.set)
        for listener in self._listeners:
            self.reactor.call_soon(lambda listener=listener: cut.append(listener.kill()))
        if not done.wait(CUT_PATIENCE):
            left = sum(len(listener.sessions) for listener in self._listeners)
            self._journal.event("error", f"stop: {left} connections did not end")
        self._handshaker.settle(CUT_PATIENCE)
        self.reactor.call_soon(self._drop_idle)
        if self._admin:
            self._admin.stop()
        if self._watcher:
            self._watcher.stop()
        self._scaler.stop()
        self._health.stop()
        self.reactor.stop()
        self.pumps.stop()
        self._handshaker.stop()
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

    # ---- another configuration ------------------------------------------------------------------------------------

    @property
    def restart_needed(self) -> Sequence[str]:
        """What the configuration says and only the next start can bring about, in lines."""
        return difference(self.config, self.wanted).restart_needed

    def reconfigure(self, change: Config | Callable[[Config], Config], who: str) -> Difference:
        """Swap in another configuration, for whatever begins from here on; nothing that is open is disturbed.

        `change` may be a function of the configuration that is wanted until then. Returns what is different. Raises
        ConfigError where that cannot be done, and then all is as it was.
        """
        with self._changing:
            config = change(self.wanted) if callable(change) else change
            found = difference(self.wanted, config)
            wanted, config = config, applicable(self.config, config)
            keys = Keys(config, self._keys)
            admission = Admission(config, self._front.admission)
            try:
                same = (config.algorithm, config.hash_balance) == (self.config.algorithm, self.config.hash_balance)
                picker = None if same else self._make_picker(config)
                log = config.log
                self._journal.configure(
                    log.file, level=log.level, max_bytes=log.max_bytes, backups=log.backups, format=log.format
                )
            except ValueError as error:
                raise ConfigError(f"{config.source}: algorithm: {error}") from None
            except OSError as error:
                raise ConfigError(f"{config.source}: log.file: {log.file}: {os.strerror(error.errno or 0)}") from None
            self.config, self.wanted, self._keys = config, wanted, keys
            for line in (*found.removed, *found.added, *found.changed):
                self._journal.event("info", f"{who}: {line}")
            for line in found.restart_needed:
                self._journal.event("warning", f"{who}: {line}")
            self.pool.configure(picker=picker, rise=config.health_check.rise, fall=config.health_check.fall)
            self._set_backends()
            self._warn(keys)
            self._scaler.configure(config.scaling, config.servers, config.timeouts.drain)
            self.reactor.call_soon(self._follow_config, config, keys, admission)
            return found

    def look_at_file(self) -> None:
        """Load the file soon, whether it looks changed or not."""
        if self._watcher:
            self._watcher.notice_now()

    def reopen_log(self) -> None:
        """Go on in a new file, the old one having been moved away."""
        self._journal.reopen()

    def _key_files(self) -> tuple[object, ...]:
        return self._keys.state()

    def _renew(self) -> None:
        """A file that belongs to the configuration has changed, or an error is over; nothing else has changed."""
        self.reconfigure(lambda wanted: wanted, self.wanted.source)
        self._forget_error()

    def _take_file(self, config: Config) -> None:
        """The file has another content."""
        self.reconfigure(config, config.source)
        self._forget_error()

    def _forget_error(self) -> None:
        if self.config_error is not None:
            self.config_error = None
            self._journal.event("info", f"{self.wanted.source}: is right again")

    def _refuse_file(self, text: str) -> None:
        self.config_error = text
        self._journal.event("error", f"{text}; the former configuration goes on")

    def _set_backends(self) -> None:
        """Have the pool, the probes and the commands follow the configuration and the instances."""
        config = self.config
        configured = {server.address: server for server in config.servers}
        instances = [server for server in self._instances if server.address not in configured]
        added, left = self.pool.replace((*config.servers, *instances), self._make_backend)
        for backend in added:
            backend.scaled = backend.address not in configured
        changed = [
            backend
            for backend in self.pool.backends
            if backend.address in configured and self._encrypt(backend, configured[backend.address])
        ]
        for backend in (*left, *changed):
            self.reactor.call_soon(self.upstreams.drop_idle, backend)
        self._health.configure(config.health_check)
        self._supervise()
        self.status.backend_changed()
        self.reactor.call_soon(self._find_sticks)

    def _make_backend(self, server: Server) -> Backend:
        backend = Backend(server, _head_limits(self.config))
        self._encrypt(backend, server)
        return backend

    def _encrypt(self, backend: Backend, server: Server) -> bool:
        """Have connections to it encrypted, or not, as its entry says. False when that is as it was."""
        context = self._keys.backend_context(server)
        name = server_name(server.tls, server.host) if server.tls else ""
        if (context, name) == (backend.tls_context, backend.server_name):
            return False
        backend.tls_context, backend.server_name = context, name
        backend.epoch += 1
        return True

    def _resolve(self, host: str, port: int) -> tuple[Endpoint, ...]:
        """The endpoints of a backend's host."""
        return literal_endpoints(host, port) or resolve(host, port)

    def _make_picker(self, config: Config) -> Picker:
        def report(text: str) -> None:
            self._journal.event("error", text)

        return make_picker(config.algorithm, config.base, report, hash_balance=config.hash_balance)

    def _warn(self, keys: Keys) -> None:
        for warning in keys.warnings:
            self._journal.event("warning", warning)

    def _follow_config(self, config: Config, keys: Keys, admission: Admission) -> None:
        """The reactor's part of a change."""
        if config.limits != self._front.limits:
            for backend in self.pool.backends:
                backend.answers = AnswerReader(_head_limits(config))
        self._front.tls_context = keys.context
        self._front.sticky = keys.sticky
        self._find_sticks()
        upstreams = self.upstreams
        upstreams.timeouts, upstreams.limits, upstreams.retries = config.timeouts, config.limits, config.retries
        self.reactor.tick = _tick(config)
        for listener in self._listeners:
            assert listener.front is not None
            listener.front.configure(config, admission)
            listener.allow(_most_connections(config))
            for session in listener.sessions:
                session.configured()
        upstreams.serve_waiting()

    def _find_sticks(self) -> None:
        """Which backend each cookie stands for, on the reactor's thread."""
        sticky = self._front.sticky
        self._front.sticks = {sticky.value(backend): backend for backend in self.pool.backends} if sticky else {}
        for session in self.listener.sessions if sticky else ():
            session.configured()

    def _backend_left(self, backend: Backend) -> None:
        """The last that it had in hand has ended, on whichever thread that was."""
        self._journal.event("info", f"backend {backend.id} {backend.address} is gone: it has nothing in hand any more")
        self._supervise()

    def _supervise(self) -> None:
        """Run the commands of the backends that there are, and of those that still end what they have in hand."""
        with self._supervising:
            self._known.update((server.address, server) for server in self.config.servers)
            present = {server.address for server in self.config.servers}
            leaving = {backend.address for backend in self.pool.leaving} - present
            self._known = {address: self._known[address] for address in present | leaving if address in self._known}
            self._supervisor.follow([server for server in self._known.values() if server.command])

    # ---- backends that are started by the load ----------------------------------------------------------------------

    def _publish(self, servers: Sequence[Server]) -> None:
        with self._changing:
            self._instances = tuple(servers)
            self._set_backends()

    def _backends_at(self, server: Server) -> list[Backend]:
        """The backend with this server's address, be it one that leaves; none when that is gone."""
        backends, leaving, _ = self.pool.members()
        return [backend for backend in (*backends, *leaving) if backend.address == server.address]

    def _instances_load(self) -> Load:
        instances = [backend for backend in self.pool.backends if backend.scaled]
        return Load(
            active=sum(backend.active for backend in instances),
            waiting=self.upstreams.waiting,
            leased=sum(backend.tally.sessions for backend in instances),
        )

    def _worth_waiting(self) -> float:
        """For how long a request may wait that finds no backend: until an instance has started, if one does."""
        scaling = self.config.scaling
        if scaling is None:
            return 0.0
        self._scaler.wake()
        return scaling.start_timeout if self._scaler.starting else 0.0

    # ---- what the threads tell each other ---------------------------------------------------------------------------

    def _when_drained(self, on_drained: Callable[[], None]) -> None:
        def one_is() -> None:
            if all(listener.drained for listener in self._listeners):
                on_drained()

        for listener in self._listeners:
            listener.on_drained = one_is

    def _drain(self) -> None:
        for listener in self._listeners:
            if listener.front:
                listener.front.draining = True
            listener.stop()

    def _drop_idle(self) -> None:
        for backend in self.pool.backends:
            self.upstreams.drop_idle(backend)

    def _backend_changed(self, backend: Backend, reason: str) -> None:
        """On whichever thread noticed it."""
        level = "info" if backend.healthy else "warning"
        self._journal.event(level, f"backend {backend.id} {backend.address} {backend.status}: {reason}")
        self.status.backend_changed()
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


def _head_limits(config: Config) -> HeadLimits:
    limits = config.limits
    return HeadLimits(limits.head_bytes, limits.request_line_bytes, limits.fields)


def _most_connections(config: Config) -> int:
    """How many client connections there may be at once: each may need another to a backend."""
    return config.limits.connections or (_raise_descriptor_limit() - DESCRIPTORS_APART) // 2


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
