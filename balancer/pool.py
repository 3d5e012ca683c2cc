"""Today's backends behind one lock: who may get work, who has how much, who is away.

Everything that several threads need to agree on is decided here under `_lock`, and nothing else happens there: no
socket call, no log line, no call-back. The reactor leases and releases, the health thread reports, an operator changes
admin states; whoever causes a change of state is the one whose thread tells `on_change` about it, after the lock.

A change of the configuration replaces the backends at once, and those whose address stayed are the same objects before
and after it: health, counts, averages and positions are theirs. Who left is in `leaving` until its last work has ended.

`_candidates` is the answer to "who is available" and is computed only when that changes, so that a lease is a
look-up, and so that a picker can recognise the set by its identity.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence

from balancer.backend import Admin, Backend
from balancer.config import Server
from balancer.explain import Standing
from balancer.metrics import Tally
from balancer.pickers import Picker

Listener = Callable[[Backend, str], None]  # the backend that changed, and why, in words


class Pool:
    """The live set. `lease` and `release` come in pairs."""

    def __init__(
        self,
        backends: Iterable[Backend],
        picker: Picker,
        *,
        rise: int = 2,
        fall: int = 3,
        on_change: Listener = lambda backend, reason: None,
        on_left: Callable[[Backend], None] = lambda backend: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._lock = threading.Lock()  # guards everything below, and the shared fields of each backend
        self._backends = tuple(backends)
        self._use_locked(picker)
        self._rise = rise
        self._fall = fall
        self._clock = clock
        self.on_change = on_change
        self.on_left = on_left  # one that was taken out has ended the last of its work
        self.leaving: Sequence[Backend] = ()  # no longer configured, with work in hand
        self.departed = Tally()  # the counts of those that have left for good
        self.in_hand = 0  # leases out, of all backends
        self._standings: Sequence[Standing] | None = None
        self._candidates: Sequence[Backend] = ()
        self._find_candidates_locked()

    def __repr__(self) -> str:
        return f"<Pool {len(self._candidates)} of {len(self._backends)} available>"

    @property
    def backends(self) -> Sequence[Backend]:
        return self._backends

    def members(self) -> tuple[Sequence[Backend], Sequence[Backend], Tally]:
        """Who is there, who still ends its work, and a copy of what those have counted that are gone: of one moment."""
        departed = Tally()
        with self._lock:
            departed.merge(self.departed)
            return self._backends, self.leaving, departed

    def lease(self, key: str, tried: Collection[Backend] = (), wanted: Backend | None = None) -> Backend | None:
        """Take a backend that was not tried yet, and count the work; None when there is none.

        `key` is what a policy may go by: the client's address, or what hash_on names. `wanted` is had if it can be.
        """
        lock = self._lock
        lock.acquire()  # `with` takes twice as long, and this is done for each request
        try:
            candidates = self._available_locked(tried) if tried else self._candidates
            if not candidates:
                return None
            if wanted is not None and wanted.available and wanted not in tried:
                backend = wanted
            else:
                backend = self._pick(candidates, key)
            backend.active = active = backend.active + 1
            backend.tally.sessions += 1
            self.in_hand += 1
            if self._leased is not None:
                self._leased(backend)
            if active == backend.max_connections:
                self._find_candidates_locked()
            return backend
        finally:
            lock.release()

    def release(self, backend: Backend) -> None:
        """Give back what `lease` gave."""
        lock = self._lock
        lock.acquire()
        try:
            backend.active = active = backend.active - 1
            self.in_hand -= 1
            if self._released is not None:
                self._released(backend)
            if backend.max_connections and active == backend.max_connections - 1:
                self._find_candidates_locked()
        finally:
            lock.release()
        if backend.leaving:
            self._dismiss()

    def only_full(self, tried: Collection[Backend] = ()) -> bool:
        """Is there a backend that would serve if it were not full? Then waiting in a queue makes sense."""
        with self._lock:
            return any(backend.eligible and backend.full and backend not in tried for backend in self._backends)

    def report(self, backend: Backend, passed: bool, check: str) -> None:
        """Count the result of a probe, or of a connection that was refused or failed, said in words in `check`."""
        with self._lock:
            if not passed:
                backend.tally.check_failures += backend.healthy
                if backend.check != check:
                    self._standings = None
            backend.check = check
            if backend.leaving:
                return
            changed = backend.observe(passed, self._rise, self._fall)
            failures = backend.failures
            if changed:
                now = self._clock()
                backend.tally.up_down += not passed
                if passed and backend.changed_at is not None:
                    backend.tally.downtime += now - backend.changed_at
                backend.changed_at = now
                self._find_candidates_locked()
        if changed:
            self.on_change(backend, check if passed else f"{check}, {ordinal(failures)} failure")

    def set_admin(self, backend: Backend, admin: Admin, who: str) -> None:
        """Carry out an operator's word."""
        with self._lock:
            changed = backend.admin is not admin
            backend.admin = admin
            self._find_candidates_locked()
        if changed:
            self.on_change(backend, f"set to {admin.value} by {who}")

    def replace(
        self, servers: Sequence[Server], make: Callable[[Server], Backend] = Backend
    ) -> tuple[Sequence[Backend], Sequence[Backend]]:
        """Make these the backends, in this order. Returns those that are new, and those that left.

        One that is new counts as down until its first probe has passed; so does one that returns while it still ends
        what it had in hand.
        """
        added = []
        with self._lock:
            present = {backend.address: backend for backend in self._backends}
            returning = {backend.address: backend for backend in self.leaving}
            backends = []
            for server in servers:
                backend = present.pop(server.address, None)
                if backend is None:
                    backend = returning.get(server.address) or make(server)
                    backend.healthy = backend.probed = backend.leaving = False
                    backend.streak = 0
                    backend.changed_at = self._clock()
                    added.append(backend)
                backend.configure(server)
                backends.append(backend)
            left = tuple(present.values())
            for backend in left:
                backend.leaving = True
            self.leaving = tuple(backend for backend in (*self.leaving, *left) if backend.leaving)
            self._backends = tuple(backends)
            self._find_candidates_locked()
        self._dismiss()
        return added, left

    def configure(self, *, picker: Picker | None = None, rise: int | None = None, fall: int | None = None) -> None:
        """Change how it is chosen and how results are counted, from the next one on; None leaves as it is."""
        with self._lock:
            if picker is not None:
                self._use_locked(picker)
            self._rise = rise or self._rise
            self._fall = fall or self._fall

    def standings(self) -> Sequence[Standing]:
        """How all backends stand, to explain a decision. The same object until a backend changes or fills up."""
        standings = self._standings
        if standings is None:
            with self._lock:
                standings = self._standings = tuple(map(Standing.of, self._backends))
        return standings

    def _use_locked(self, picker: Picker) -> None:
        """Have it pick from here on, and tell it of leases and releases if it wants to hear of them."""
        self._pick = picker.pick
        self._leased: Callable[[Backend], None] | None = getattr(picker, "leased", None)
        self._released: Callable[[Backend], None] | None = getattr(picker, "released", None)

    def _dismiss(self) -> None:
        """Part with those that left and have nothing in hand any more."""
        with self._lock:
            gone = [backend for backend in self.leaving if not backend.active]
            self.leaving = tuple(backend for backend in self.leaving if backend.active)
            for backend in gone:
                self.departed.merge(backend.tally)
        for backend in gone:
            self.on_left(backend)

    def _find_candidates_locked(self) -> None:
        self._standings = None
        self._candidates = tuple(self._available_locked(()))

    def _available_locked(self, tried: Collection[Backend]) -> list[Backend]:
        """Backups count only where no other backend is eligible. That the others are full is no reason: work waits."""
        eligible = [backend for backend in self._backends if backend.eligible and backend not in tried]
        tier = [backend for backend in eligible if not backend.backup] or eligible
        return [backend for backend in tier if not backend.full]


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th, ... 11th, 12th, 13th, ... 21st."""
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
