"""A balancer inside a program of yours, such as a test suite: `from balancer import LoadBalancer`.

    with LoadBalancer(["127.0.0.1:8001", {"id": "b2", "host": "127.0.0.1", "port": 8002}], port=0) as lb:
        urllib.request.urlopen(lb.url)
        lb.fail("b2")

Each is by itself, with threads and sockets of its own, and leaves nothing behind. By default it writes no log, opens no
operator's port and installs no signal handlers.

Its backends can be made to misbehave. What does that are real sockets between the balancer and the backend, so that the
balancer meets it as it would meet it in life: the connection is refused, the answer is late.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from balancer import balancer
from balancer.admission import Admission
from balancer.backend import Backend, Endpoint
from balancer.config import Config, from_addresses, parse
from balancer.diversion import Delaying, Diversion, Refusing
from balancer.journal import Exchange
from balancer.keys import Keys
from balancer.servers_file import document

REMEMBERED = 100_000  # requests in `requests`
LOCALHOST = "127.0.0.1"


class Served(NamedTuple):
    """A request that was answered, or a connection in TCP mode, where method, path and status are empty."""

    method: str
    path: str
    status: int
    backend: str  # id; "-" where none had to do with it
    seconds: float  # from its first octet to the answer's last
    tries: int  # backends that were tried
    code: str  # how it ended: "--" is well, see the README


class LoadBalancer(balancer.LoadBalancer):
    """`servers` are entries as in servers.json, or "HOST:PORT"; `keys` are the other keys of that file.

    Raises ConfigError for what is wrong with them, OSError where it cannot listen.
    """

    def __init__(
        self, servers: Sequence[str | Mapping[str, Any]], *, host: str = LOCALHOST, port: int = 0, **keys: Any
    ) -> None:
        self._served: deque[Exchange] = deque(maxlen=REMEMBERED)
        self._serving = False
        self._diversions: dict[str, Diversion] = {}  # by the backend's address
        super().__init__(_config(servers, {"host": host, "port": port}, keys))

    def __enter__(self) -> LoadBalancer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop(patience=0.0)

    def start(self) -> None:
        super().start()
        self._serving = True

    def close(self) -> int:
        if not self._serving:
            return 0  # it was stopped before
        self._serving = False
        cut = super().close()
        for diversion in self._diversions.values():
            diversion.close()
        self._diversions.clear()
        return cut

    @property
    def requests(self) -> list[Served]:
        """Those that have ended, in the order of their ends."""
        self._catch_up()
        return [_served(record) for record in list(self._served)]

    @property
    def states(self) -> dict[str, str]:
        """UP, DOWN, DRAIN or MAINT of each backend."""
        return {backend.id: backend.status for backend in self.pool.backends}

    def fail(self, backend_id: str) -> None:
        """From now on this backend refuses connections, also those of probes. What it has in hand it may finish."""
        self._divert(self._backend(backend_id), Refusing())

    def delay(self, backend_id: str, seconds: float) -> None:
        """From now on each request waits so long before it reaches this backend; probes do, too."""
        backend = self._backend(backend_id)
        self._divert(backend, Delaying(seconds, partial(super()._resolve, backend.host, backend.port)))

    def recover(self, backend_id: str) -> None:
        """It behaves again. As after any failure, `health_check.rise` good probes bring it back up."""
        self._divert(self._backend(backend_id), None)

    def _backend(self, backend_id: str) -> Backend:
        for backend in self.pool.backends:
            if backend.id == backend_id:
                return backend
        known = ", ".join(backend.id for backend in self.pool.backends)
        raise KeyError(f"there is no backend {backend_id!r}; there are {known}")

    def _divert(self, backend: Backend, diversion: Diversion | None) -> None:
        former = self._diversions.pop(backend.address, None)
        if diversion is not None:
            self._diversions[backend.address] = diversion
        backend.endpoints = self._resolve(backend.host, backend.port)
        # Kept connections lead to where it was before.
        self.reactor.call_soon(self.upstreams.drop_idle, backend)
        self._catch_up()
        if former is not None:
            former.close()
        self._health.probe_now(backend)

    def _catch_up(self) -> None:
        """Let the reactor do what it was asked for, and end what it is about."""
        if self._serving:
            done = threading.Event()
            self.reactor.call_soon(done.set)
            done.wait()

    def _resolve(self, host: str, port: int) -> tuple[Endpoint, ...]:
        for backend in self.pool.backends:
            if (backend.host, backend.port) == (host, port) and backend.address in self._diversions:
                return (self._diversions[backend.address].endpoint,)
        return super()._resolve(host, port)

    def _follow_config(self, config: Config, keys: Keys, admission: Admission) -> None:
        super()._follow_config(config, keys, admission)
        self._listen_in()

    def _listen_in(self) -> None:
        """Remember what goes to the log."""
        log, remember = self._front.record, self._served.append

        def record(exchange: Exchange) -> None:
            remember(exchange)
            log(exchange)

        self._front.record = record


def _config(servers: Sequence[str | Mapping[str, Any]], listen: dict[str, Any], keys: Mapping[str, Any]) -> Config:
    entries = [
        document(from_addresses([entry]))["servers"][0] | {"id": str(number)} if isinstance(entry, str) else dict(entry)
        for number, entry in enumerate(servers, 1)
    ]
    quiet = {"log": {"file": ""}, "admin": {"address": "off"}}
    return parse(json.dumps({**quiet, **keys, "servers": entries, "listen": listen}), "LoadBalancer", Path.cwd())


def _served(record: Exchange) -> Served:
    method, _, rest = record[2].decode("ascii", "backslashreplace").partition(" ")
    return Served(method, rest.rpartition(" ")[0], record[3], record[5], record[10], record[12], record[11])
