"""What an operator may do to a running balancer: every change is another configuration, swapped in whole.

A change that is not written to the file lasts until the file itself changes, or is loaded because somebody asks for
that: then the file says what there is. State (ready, drain, maint) is no configuration and stays with its backend, as
long as that stays.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from balancer import servers_file
from balancer.backend import Admin, Backend
from balancer.config import COMMAND_LINE, Config, ConfigError, parse, refuse_contradictions
from balancer.explain import Incidents
from balancer.pool import Pool
from balancer.reload import Difference
from balancer.status import Status

SETTINGS = ("weight", "max_connections")
"""Keys of a backend that can be changed."""
KEYS = ("id", "host", "port", "backup", *SETTINGS)
"""Keys that one can be added with. No command is among them: who may add one need not be allowed to run programs."""
SOURCE = "request"


class Balancer(Protocol):
    """What is controlled."""

    wanted: Config
    draining: bool
    pool: Pool

    def reconfigure(self, change: Config | Callable[[Config], Config], who: str) -> Difference: ...


class Control:
    """The operator's commands. From any thread.

    They raise ConfigError for a value that is wrong, KeyError for an id that there is not, ValueError for what cannot
    be done as things are, and OSError where the file cannot be written; each with one line for people.
    """

    def __init__(
        self,
        balancer: Balancer,
        status: Status,
        incidents: Incidents,
        load: Callable[[], Config] | None,
        on_known: Callable[[Config, Config | None], None],
    ) -> None:
        self._balancer = balancer
        self._incidents = incidents
        self._load = load
        self._on_known = on_known  # the file is known to say this, and what it said before
        self._lock = threading.Lock()  # one command at a time: each begins with what the last has left
        self.status = status

    @property
    def draining(self) -> bool:
        return self._balancer.draining

    def explanation(self, request_id: str) -> dict[str, Any] | None:
        return self._incidents.find(request_id)

    def explanations(self) -> list[dict[str, Any]]:
        return self._incidents.latest()

    def document(self) -> dict[str, Any]:
        """The configuration as servers.json would have it."""
        return servers_file.document(self._balancer.wanted)

    def add(self, entry: Mapping[str, Any], who: str, persist: bool) -> Backend:
        """Add a backend by an entry as in servers.json; without an id it is given the first number that is free."""
        for key in entry:
            if key not in KEYS:
                raise ConfigError(f"{SOURCE}: {key}: is no key of a backend to add; these are {', '.join(KEYS)}")
        with self._lock:
            taken = {server["id"] for server in self.document()["servers"]}
            taken |= {backend.id for backend in self._balancer.pool.backends}
            entry = {"id": next(id for id in map(str, count(1)) if id not in taken), **entry}
            self._reconfigure(lambda servers: [*servers, entry], who)
            if persist:
                self._rewrite(add=[entry])
        return next(one for one in self._balancer.pool.backends if one.id == str(entry["id"]))

    def remove(self, backend_id: str, who: str, persist: bool) -> None:
        """Take a backend out; what it has in hand is ended first."""
        with self._lock:
            self._must_be_configured(backend_id)
            self._reconfigure(lambda servers: [one for one in servers if one["id"] != backend_id], who)
            if persist:
                self._rewrite(remove=[backend_id])

    def change(self, backend_id: str, changes: Mapping[str, Any], who: str, persist: bool) -> None:
        """Change a backend's settings, and its state by "state": ready, drain or maint, which is never written."""
        settings = dict(changes)
        admin = _admin(settings.pop("state")) if "state" in settings else None
        for key in settings:
            if key not in SETTINGS:
                raise ConfigError(f"{SOURCE}: {key}: cannot be changed; state, weight and max_connections can")
        with self._lock:
            backend = self._find(backend_id)
            if settings:
                self._must_be_configured(backend_id)
                self._reconfigure(
                    lambda servers: [{**one, **settings} if one["id"] == backend_id else one for one in servers], who
                )
            if admin is not None:
                self._balancer.pool.set_admin(backend, admin, who)
            if settings and persist:
                self._rewrite(change={backend_id: settings})

    def reload(self, who: str) -> list[str]:
        """Load the file again. Returns what that has changed, in lines."""
        if self._load is None:
            raise ValueError("there is no file to load")
        with self._lock:
            config = self._load()
            lines = list(self._balancer.reconfigure(config, who).lines)
            self._on_known(config, None)
            return lines

    def _find(self, backend_id: str) -> Backend:
        for backend in self._balancer.pool.backends:
            if backend.id == backend_id:
                return backend
        raise KeyError(backend_id)

    def _must_be_configured(self, backend_id: str) -> None:
        backend = self._find(backend_id)
        if backend.scaled:
            raise ValueError(f"backend {backend_id} was started by the load, and is stopped by it; see scaling")

    def _reconfigure(self, edit: Callable[[list[dict[str, Any]]], list[dict[str, Any]]], who: str) -> None:
        """Have the entries of the configuration edited, whatever that is by then."""

        def changed(config: Config) -> Config:
            document = servers_file.document(config)
            document["servers"] = edit(document["servers"])
            config = replace(config, servers=parse(json.dumps(document), SOURCE, config.base).servers)
            refuse_contradictions(config)
            return config

        self._balancer.reconfigure(changed, who)

    def _rewrite(self, **edits: Any) -> None:
        path = self._balancer.wanted.source
        if self._load is None or path == COMMAND_LINE:
            raise ValueError("done, but there is no file to write it to: the backends were given on the command line")
        try:
            before = self._load()
            servers_file.rewrite(Path(path), **edits)
            self._on_known(self._load(), before)
        except KeyError as error:
            raise ValueError(f"done, but {path} has no backend {error.args[0]}, so it was not written there") from None
        except (ConfigError, OSError) as error:
            raise ValueError(f"done, but not written to the file: {error}") from None


def _admin(word: Any) -> Admin:
    try:
        return Admin(word)
    except ValueError:
        raise ConfigError(f'{SOURCE}: state: must be "ready", "drain" or "maint", not {json.dumps(word)}') from None
