"""A configuration that changes while the balancer runs: what differs, and the thread that notices it.

The file is looked at, not subscribed to: a look is one `stat`, works on every system and file system, through links
(in a Kubernetes ConfigMap it is the link's target that changes) and when the file is replaced. The rules of a look:

- A file that changed is read only once it is the same for one more look, and what was read counts only if the file is
  still the same after it. So one that is being written is not read half.
- A file that is gone, or empty, for a moment is being replaced by an editor. Only when it stays so is that an error.
- One error is told once, however often it is met again. When it is mended, even back to what runs, that is told too.
- What is wrong may stand in another file (a policy) or with the system: while there is an error, it is tried again now
  and then.
"""

from __future__ import annotations

import json
import os
import shlex
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from balancer.config import Config, ConfigError, Tls, format_address
from balancer.servers_file import settings

PERIOD = 0.25
"""Seconds between two looks; a change is in force after two of them."""
ABSENCE = 3.0
"""Seconds that a file may be gone or empty before that is an error."""
RETRY = 5.0
"""Seconds after which a configuration that was refused is tried again, though the file is the same."""
AT_START = ": takes effect at the next start"


# What differs -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """What one configuration has otherwise than another, in lines for people. It is false when that is nothing."""

    removed: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    restart_needed: tuple[str, ...] = ()  # what cannot change while the balancer runs

    @property
    def lines(self) -> tuple[str, ...]:
        """All of them."""
        return self.removed + self.added + self.changed + self.restart_needed

    def __bool__(self) -> bool:
        return bool(self.lines)

    def __str__(self) -> str:
        return "\n".join(self.lines)


def applicable(running: Config, wanted: Config) -> Config:
    """The configuration that is wanted, but for what cannot change while the balancer runs: that stays."""
    probe = wanted.health_check
    if probe.follows_mode:
        probe = replace(probe, type=running.mode)
    return replace(
        wanted,
        host=running.host,
        port=running.port,
        mode=running.mode,
        admin=running.admin,
        tls=_applicable_tls(running.tls, wanted.tls),
        health_check=probe,
    )


def _applicable_tls(running: Tls | None, wanted: Tls | None) -> Tls | None:
    """The port that redirects stays as it is, and so does that there is TLS where it sends clients to."""
    redirect_from = running.redirect_from if running else ""
    if wanted is None:
        return running if redirect_from else None
    return replace(wanted, redirect_from=redirect_from)


def difference(old: Config, new: Config) -> Difference:
    """What a balancer that runs with `old` makes of `new`. A backend is known by its address."""
    now = applicable(old, new)
    before = {server.address: server for server in old.servers}
    after = {server.address: server for server in new.servers}
    changed = []
    for address, server in after.items():
        was = before.get(address, server)
        if server.id != was.id:
            changed.append(f"backend at {address}: id {was.id} -> {server.id}")
        lines = _changes(asdict(was), asdict(replace(server, id=was.id)))
        changed += (f"backend {server.id}: {line}" for line in lines)
    return Difference(
        removed=tuple(f"removed backend {before[gone].id} at {gone}" for gone in before if gone not in after),
        added=tuple(f"added backend {after[come].id} at {come}" for come in after if come not in before),
        changed=(*changed, *_changes(_general(old), _general(now))),
        restart_needed=tuple(line + AT_START for line in _changes(_general(now), _general(new))),
    )


def _general(config: Config) -> dict[str, Any]:
    """All settings but those of backends; the listening address is one setting."""
    found = settings(config)
    del found["servers"]
    return found | {"listen": format_address(config.host, config.port)}


def _changes(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """A line for each key that has another value."""
    for key, value in new.items():
        was = old[key]
        if isinstance(was, dict) and isinstance(value, dict):
            yield from _changes(was, value, f"{path}{key}.")
        elif isinstance(value, dict):
            yield f"added {path}{key}: {', '.join(f'{name} {_shown(item)}' for name, item in value.items())}"
        elif isinstance(was, dict):
            yield f"removed {path}{key}"
        elif value != was:
            yield f"{path}{key} {_shown(was)} -> {_shown(value)}"


def _shown(value: Any) -> str:
    """A setting on one line, whatever is in it."""
    if value in ("", [], ()):
        return "none"
    text = shlex.join(_words(value)) if isinstance(value, (list, tuple)) else value
    return text if isinstance(text, str) and text.isprintable() else json.dumps(text)


def _words(items: Sequence[Any]) -> Iterator[str]:
    """Those of a list: of a certificate the names of its files."""
    for item in items:
        yield from item.values() if isinstance(item, dict) else (item,)


# Noticing it ------------------------------------------------------------------------------------------------------

_State = tuple[Any, ...]  # what `stat` says of a file; empty when there is no file, or nothing in it


def _state(path: Path) -> _State:
    """Something else whenever the file has changed.

    The time of change of the inode is in it: it tells of a file whose mode was mended, and of one that was overwritten
    by a tool that sets the time of modification back.
    """
    try:
        status = os.stat(path)
    except OSError:
        return ()
    if not status.st_size:
        return ()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


class Watcher:
    """Looks whether a file has changed, and has it applied or refused. `start` and `stop`; or `look`, round by round.

    Without a path only `others` and `notice_now` bring something to do.

    `load` reads it, with all that the command line adds, and raises ConfigError; `running` is what it gave before the
    watch began. `apply` is given each configuration that is another than the last, or comes after an error or from
    `notice_now`; it may raise ConfigError or OSError, which is then an error like those of `load`. `refuse` is given
    each error's line once. Both are called on the thread "reload". `on_error` is told of bugs in them. `others` is
    something else whenever another file has changed that belongs to what runs (a certificate): then, and when an error
    is over while the configuration is what it was, `renew` is called, in the way of `apply`.
    """

    def __init__(
        self,
        path: Path | None,
        running: Config,
        load: Callable[[], Config],
        apply: Callable[[Config], object],
        refuse: Callable[[str], None],
        on_error: Callable[[str, Exception], None],
        clock: Callable[[], float] = time.monotonic,
        others: Callable[[], _State] = lambda: (),
        renew: Callable[[], object] = lambda: None,
    ) -> None:
        self._others = others
        self._renew = renew
        self._path = path
        self._config = running  # the last that was applied
        self._load = load
        self._apply = apply
        self._refuse = refuse
        self._on_error = on_error
        self._clock = clock
        self._error = ""  # the last that was told, "" once it is mended
        self._seen: tuple[_State, _State] = (), ()  # the file and the others at the last look
        self._seen_at = clock()  # when they became so
        # When they were last read; the file may have changed before the watch began.
        self._read: tuple[_State | None, _State] = None, others()
        self._read_at = 0.0
        self._asked = False
        self._stopping = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reload")

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    def notice_now(self) -> None:
        """Have the file read and applied even if it is the same, and its error told again. Any thread may call it."""
        self._asked = True
        self._wake.set()

    def known(self, config: Config, before: Config | None = None) -> None:
        """Take a configuration for applied, because the balancer itself has just written it. Any thread may call it.

        Otherwise the file would be applied, and undo what had been changed before without being written.
        """
        if before is None or self._config == before:  # else there is more in the file, which is still to be applied
            self._config = config

    def look(self) -> None:
        """One look at the file, and all that follows from it."""
        now, others = self._clock(), self._others()
        state = self._file_state(), others
        if state != self._seen:
            self._seen, self._seen_at = state, now
            return
        if not state[0] and now - self._seen_at < ABSENCE:
            return
        if state == self._read and not self._asked and not (self._error and now - self._read_at >= RETRY):
            return
        asked, self._asked = self._asked, False
        config: Config | None = None
        error = ""
        try:
            config = self._load()
        except ConfigError as refused:
            error = str(refused)
        if self._file_state() != state[0]:  # it was written while it was read
            self._asked |= asked
            return
        renewed = others != self._read[1]
        self._read, self._read_at = state, now
        changed = config is not None and (config != self._config or (asked and self._path is not None))
        if config and (changed or renewed or asked or self._error):
            try:
                if changed:
                    self._apply(config)
                else:
                    self._renew()  # what was changed without being written stays
                self._config, self._error = config, ""
            except (ConfigError, OSError) as refused:
                error = str(refused)
        if error and (asked or error != self._error):
            self._error = error
            self._refuse(error)

    def _file_state(self) -> _State:
        return _state(self._path) if self._path else (0,)

    def _run(self) -> None:
        while not self._stopping:
            try:
                self.look()
            except Exception as error:
                self._on_error("reload", error)
            self._wake.wait(PERIOD)
            self._wake.clear()
