"""Today's backends behind one lock: who may get work, who has how much, who is away.

Everything that several threads need to agree on is decided here under `_lock`, and nothing else happens there: no
socket call, no log line, no call-back. The reactor leases and releases, the health thread reports, an operator changes
admin states; whoever causes a change of state is the one whose thread tells `on_change` about it, after the lock.

`_candidates` is the answer to "who is available" and is computed only when that changes, so that a lease is a
look-up, and so that a picker can recognise the set by its identity.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence

from balancer.backend import Admin, Backend
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
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._lock = threading.Lock()  # guards everything below, and the shared fields of each backend
        self._backends = tuple(backends)
        self._picker = picker
        self._rise = rise
        self._fall = fall
        self._clock = clock
        self.on_change = on_change
        self._candidates: Sequence[Backend] = ()
        self._find_candidates_locked()

    def __repr__(self) -> str:
        return f"<Pool {len(self._candidates)} of {len(self._backends)} available>"

    @property
    def backends(self) -> Sequence[Backend]:
        return self._backends

    def lease(self, client: str, tried: Collection[Backend] = ()) -> Backend | None:
        """Take a backend that was not tried yet, and count the work; None when there is none."""
        with self._lock:
            candidates = self._candidates if not tried else self._available_locked(tried)
            if not candidates:
                return None
            backend = candidates[0] if len(candidates) == 1 else self._picker.pick(candidates, client)
            backend.active += 1
            if backend.active == backend.max_connections:
                self._find_candidates_locked()
            return backend

    def release(self, backend: Backend) -> None:
        """Give back what `lease` gave."""
        with self._lock:
            backend.active -= 1
            if backend.active == backend.max_connections - 1:
                self._find_candidates_locked()

    def only_full(self, tried: Collection[Backend] = ()) -> bool:
        """Is there a backend that would serve if it were not full? Then waiting in a queue makes sense."""
        with self._lock:
            return any(backend.eligible and backend.full and backend not in tried for backend in self._backends)

    def report(self, backend: Backend, passed: bool, check: str) -> None:
        """Count the result of a probe, or of a connection that was refused or failed, said in words in `check`."""
        with self._lock:
            backend.check = check
            changed = backend.observe(passed, self._rise, self._fall)
            failures = backend.failures
            if changed:
                backend.changed_at = self._clock()
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

    def _find_candidates_locked(self) -> None:
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
